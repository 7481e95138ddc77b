r"""Compare contexts for CLIP offline: zero-shot and few-shot, base and new classes, from one style to another.

    python examples/pretrain_clip.py                       # the backbone, runs/clip
    python examples/compare_clip.py                        # runs/compare_clip/results.csv and pictures, three seeds
    python examples/compare_clip.py --seeds 0 --epochs 5   # sooner

What to look for: CoOp against zero-shot with 16 outlines of each class, CoCoOp against CoOp on classes that neither
saw, and DAPL against a context of the source alone on the target. A seed draws pictures of its own, those of the test
too. Each method has the learning rate of ``--rates`` with the best accuracy on validation images of the first seed:
those of the base classes, or of the source domain.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import datasets
import lightning as L
import torch
import transformers

from lightning_peft import (
    DAPL,
    CLIPClassification,
    CLIPData,
    CoCoOp,
    ColouredShapes,
    CoOp,
    DomainAdaptation,
    DomainData,
    Method,
    ResultRows,
)
from lightning_peft.reports import read_rows
from lightning_peft.reports.plots import plot

FEW = (1, 2, 4, 8, 16)


@cache
def shapes(model: str, style: str, seed: int, shots: int | None = None) -> ColouredShapes:
    return ColouredShapes(
        style, shots=shots, seed=seed, drawing=10 + seed, processor=model, keep_in_memory=True, per_class=FEW[-1]
    )


@dataclass
class Run:
    """What to train and to test it on."""

    method: Method | None
    task: L.LightningModule
    data: L.LightningDataModule
    shots: int | str = ""

    @property
    def name(self) -> str:
        return "zero-shot" if self.method is None else type(self.method).__name__


def few_shot(model: str, seed: int, lr: float, name: str, shots: int) -> Run:
    if name == "zero-shot":
        return Run(None, CLIPClassification(model), CLIPData(shapes(model, "outline", seed)), 0)
    task = CLIPClassification(model, cache_image_features=True, lr=lr)
    return Run(CoOp(init="a photo of a"), task, CLIPData(shapes(model, "outline", seed, shots)), shots)


def base_to_new(model: str, seed: int, lr: float, name: str, shots: int) -> Run:
    data = CLIPData(shapes(model, "outline", seed, shots), base_to_new=True)
    if name == "zero-shot":
        return Run(None, CLIPClassification(model), data, 0)
    method = CoOp(init="a photo of a") if name == "CoOp" else CoCoOp(init="a photo of a")
    return Run(method, CLIPClassification(model, cache_image_features=True, lr=lr), data, shots)


def adaptation(model: str, seed: int, lr: float, name: str, shots: int) -> Run:
    data = DomainData(shapes(model, "filled", seed, shots), shapes(model, "dark", seed))
    if name == "zero-shot":
        return Run(None, DomainAdaptation(model), data)
    if name == "CoOp":  # a context of the source alone
        return Run(CoOp(), DomainAdaptation(model, lr=lr, weight=0.0), data)
    return Run(DAPL(), DomainAdaptation(model, lr=lr, contrast="own"), data)


class Protocol(NamedTuple):
    """What makes a run, the methods, how long they are trained, and the scores to print."""

    build: Callable[[str, int, float, str, int], Run]
    methods: tuple[str, ...]
    epochs: int
    scores: tuple[str, ...]


PROTOCOLS = {
    "few_shot": Protocol(few_shot, ("zero-shot", "CoOp"), 30, ("accuracy",)),
    "base_to_new": Protocol(
        base_to_new, ("zero-shot", "CoOp", "CoCoOp"), 15, ("base_accuracy", "new_accuracy", "harmonic_mean")
    ),
    "adaptation": Protocol(
        adaptation, ("zero-shot", "CoOp", "DAPL"), 10, ("accuracy", "class_accuracy", "coverage", "pseudo_accuracy")
    ),
}


def fit(run: Run, seed: int, epochs: int, folder: Path, protocol: str = "") -> L.Trainer:
    """Train, and look at the validation images after the last epoch; with a protocol, append rows of results."""
    torch.manual_seed(seed)
    callbacks: list[L.Callback] = [] if run.method is None else [run.method]
    if protocol:
        coverage = ["train_coverage"] if run.name == "DAPL" else []
        extra = {"protocol": protocol, "seed": seed, "shots": run.shots}
        callbacks.append(ResultRows(method=run.name, epoch_metrics=coverage, extra=extra))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if run.method is not None:
        trainer.fit(run.task, run.data)
    return trainer


def choose(protocol: str, name: str, model: str, seed: int, epochs: int, rates: list[float], folder: Path) -> float:
    """Return the learning rate of the best accuracy on validation images, of the least loss among equals."""
    if len(rates) == 1 or name == "zero-shot":
        return rates[0]
    found = {}
    for lr in rates:
        run = PROTOCOLS[protocol].build(model, seed, lr, name, FEW[-1])
        scores = fit(run, seed, epochs, folder).callback_metrics
        found[lr] = (float(scores["val_accuracy"]), -float(scores["val_loss"]))
    shown = ", ".join(f"{lr}: {accuracy:.3f}" for lr, (accuracy, _) in found.items())
    best = max(rates, key=lambda lr: found[lr])
    print(f"{protocol}, {name}: validation accuracy by learning rate {shown}; {best} is taken", flush=True)
    return best


def show(file: Path, protocol: str) -> None:
    rows = [row for row in read_rows(file) if row["protocol"] == protocol and "epoch" not in row]
    for metric in PROTOCOLS[protocol].scores:
        own = [row for row in rows if row["metric"] == metric]
        for method, shots in dict.fromkeys((row["method"], row.get("shots", "")) for row in own):
            values = [row["value"] for row in own if (row["method"], row.get("shots", "")) == (method, shots)]
            spread = stdev(values) if len(values) > 1 else 0.0
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{protocol:12} {metric:15} {method:10} {shots:>3} {fmean(values):.3f} ± {spread:.3f}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/clip")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_clip"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="if not those of the protocol")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    file = args.folder / "results.csv"
    file.unlink(missing_ok=True)
    for protocol in args.protocols:
        build, names, epochs, _ = PROTOCOLS[protocol]
        epochs = args.epochs or epochs
        for name in names:
            lr = choose(protocol, name, args.model, args.seeds[0], epochs, args.rates, args.folder)
            for seed in args.seeds:
                for shots in FEW if (protocol, name) == ("few_shot", "CoOp") else FEW[-1:]:
                    run = build(args.model, seed, lr, name, shots)
                    fit(run, seed, epochs, args.folder, protocol).test(run.task, run.data, verbose=False)
        show(file, protocol)
    for picture in plot(str(file), str(args.folder)):
        print(picture)


if __name__ == "__main__":
    main()
