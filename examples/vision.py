"""Compare methods on images where no hub is: handwritten digits at once, and new shapes in four tasks of eight classes.

    python examples/pretrain_vit.py                      # runs/vit: it knows the other shapes and no digit
    python examples/vision.py                            # runs/vision/results.csv and pictures, three seeds
    python examples/vision.py --seeds 1 --epochs 2       # sooner
    python examples/vision.py --protocols in_tasks --methods CODAPrompt --folder runs/some

Each method has, of the learning rates beside it, the one with the best accuracy on validation images of the first seed.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lightning as L
import torch
import transformers

from lightning_peft import (
    L2P,
    VPT,
    CODAPrompt,
    ColouredShapes,
    ContinualClassification,
    ContinualData,
    Digits,
    DualPrompt,
    FullFineTuning,
    ImageClassification,
    LinearProbe,
    Method,
    RanPAC,
    ResultRows,
)
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES
from lightning_peft.reports.plots import plot
from lightning_peft.reports.rows import read_rows

TASKS = 4
METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "LinearProbe": (LinearProbe(), (1e-2, 3e-2)),
    "VPT-Deep": (VPT(num_virtual_tokens=10), (1e-2, 3e-2)),
}
CONTINUAL: dict[str, tuple[Method, tuple[float, ...]]] = {
    "LinearProbe": (LinearProbe(), (1e-2,)),
    "FullFineTuning": (FullFineTuning(), (1e-4, 1e-3)),
    "L2P": (L2P(cache_queries=True), (3e-3, 1e-2, 3e-2)),
    "DualPrompt": (
        DualPrompt(num_tasks=TASKS, expert_length=5, general_layers=[0, 1], expert_layers=[2, 3]),
        (3e-3, 1e-2, 3e-2),
    ),
    "CODAPrompt": (CODAPrompt(num_tasks=TASKS, components=40, layers=[0, 1, 2, 3]), (1e-3, 3e-3, 1e-2)),
    "RanPAC": (RanPAC(), (1e-3,)),
}


def trainer(folder: Path, method: Method, name: str, epochs: int, write: bool, **kwargs: object) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[method, *([ResultRows("results.csv", method=name)] if write else [])],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )


def at_once(model: str, folder: Path, seed: int, epochs: int, name: str, lr: float, test: bool) -> float:
    """Return the accuracy on validation images; write that of the test."""
    L.seed_everything(seed, verbose=False)
    method = METHODS[name][0]
    data = Digits(processor=model, seed=seed, keep_in_memory=True)
    module = ImageClassification(model, labels=data.label_names, lr=lr, head_lr=lr if name == "LinearProbe" else 1e-2)
    fit = trainer(folder, method, name, epochs, test, check_val_every_n_epoch=epochs)
    fit.fit(module, data)
    found = float(fit.callback_metrics["val_accuracy"])
    if test:
        fit.test(module, data, verbose=False)
    return found


def in_tasks(model: str, folder: Path, seed: int, epochs: int, name: str, lr: float, test: bool) -> float:
    """Return the average accuracy after the last task, on validation images or those of the test."""
    L.seed_everything(seed, verbose=False)
    shapes = ColouredShapes(
        colours=list(COLOURS),
        shapes=list(SHAPES),
        classes="new",
        per_class=16,
        validation_per_class=6,
        test_per_class=10,
        drawing=10 + seed,
        processor=model,
        seed=seed,
        keep_in_memory=True,
        batch_size=16,
    )
    score = "test" if test else "validation"
    data = ContinualData(shapes, tasks=TASKS, epochs_per_task=epochs, class_seed=seed, score=score)
    module = ContinualClassification(model, labels=data.label_names, lr=lr, head_lr=lr)
    settings = {"reload_dataloaders_every_n_epochs": 1, "check_val_every_n_epoch": epochs, "gradient_clip_val": 1.0}
    fit = trainer(folder, CONTINUAL[name][0], name, TASKS * epochs, test, **settings)
    fit.fit(module, data)
    return float(fit.callback_metrics["val_accuracy"])


def compare(run: Callable[..., float], methods: dict[str, tuple[Method, tuple[float, ...]]], *args: Any) -> None:
    """Choose each method's learning rate on validation images with the first seed, then test it with all seeds."""
    model, folder, seeds, epochs, chosen = args
    for name, (_, rates) in methods.items():
        if chosen and name not in chosen:
            continue
        found = {lr: run(model, folder, 0, epochs, name, lr, False) for lr in rates}
        best = max(rates, key=found.__getitem__)
        shown = ", ".join(f"{lr}: {value:.3f}" for lr, value in found.items())
        print(f"{run.__name__}, {name}: validation accuracy by learning rate {shown}; {best} is taken", flush=True)
        for seed in range(seeds):
            run(model, folder, seed, epochs, name, best, True)


def show(file: Path, metrics: Iterable[str], last: int = TASKS - 1) -> None:
    rows = read_rows(file)
    for metric in metrics:
        chosen = [row for row in rows if row["metric"] == metric and row.get("after", last) == last]
        for method in dict.fromkeys(row["method"] for row in chosen):
            values = [row["value"] for row in chosen if row["method"] == method]
            each = ", ".join(f"{value:.3f}" for value in values)
            spread = stdev(values) if len(values) > 1 else 0.0
            print(f"{metric:18} {method:15} {fmean(values):.3f} ± {spread:.3f}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/vit")
    parser.add_argument("--folder", type=Path, default=Path("runs/vision"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--protocols", nargs="+", choices=["at_once", "in_tasks"], default=["at_once", "in_tasks"])
    parser.add_argument("--methods", nargs="+", help="names of entries, if not all of the protocols")
    parser.add_argument("--epochs", type=int, default=8, help="for digits at once; a task has half as many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    (args.folder / "results.csv").unlink(missing_ok=True)
    if "at_once" in args.protocols:
        compare(at_once, METHODS, args.model, args.folder, args.seeds, args.epochs, args.methods)
    if "in_tasks" in args.protocols:
        compare(in_tasks, CONTINUAL, args.model, args.folder, args.seeds, max(1, args.epochs // 2), args.methods)
    show(args.folder / "results.csv", ("accuracy", "average_accuracy", "forgetting"))
    for picture in plot(str(args.folder / "results.csv"), str(args.folder)):
        print(picture)


if __name__ == "__main__":
    main()
