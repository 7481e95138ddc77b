r"""Compare contexts for CLIP offline: zero-shot and few-shot, base and new classes, from one style to another.

    python examples/pretrain_clip.py                       # the backbone, runs/clip
    python examples/compare_clip.py                        # runs/compare_clip/results.csv and pictures, three seeds
    python examples/compare_clip.py --seeds 0 --epochs 5   # sooner
    python examples/compare_clip.py --protocols few_shot --methods CoOp ClipAdapter --folder runs/some

What to look for: CoOp against zero-shot with 16 drawings of each class; CoCoOp against CoOp on classes that neither
saw, whose shapes are new; and DAPL against a context of the source alone, from drawings to photos in the dark. CoOp has
16 tokens and 200 epochs, CoCoOp "a photo of a" and 10 with one image at a time, KgCoOp the same words and 100, MaPLe 5
and PromptSRC 20 with four images at a time, as in their papers and code; CoOp from the same words, trained as CoCoOp
is, shows what is due to these and what to the network, MaPLe trained as long as PromptSRC, what is due to the epochs,
and IVLP, which is PromptSRC without its penalties and its average, what is due to these. Prompts in both towers are
in two layers of each, as the text tower has no more. A seed draws pictures of its own, those of the test too. Each
method has, of its learning rates (Tip-Adapter not trained: of its factors), the one with the best accuracy on
validation images of the first seed: those of the base classes, or of the source domain.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import datasets
import lightning as L
import torch
import transformers

from lightning_peft import (
    DAPL,
    IVLP,
    ClipAdapter,
    CLIPClassification,
    CLIPData,
    CoCoOp,
    ColouredShapes,
    CoOp,
    DomainAdaptation,
    DomainData,
    KgCoOp,
    MaPLe,
    Method,
    PromptSRC,
    ResultRows,
    TipAdapter,
)
from lightning_peft.reports.plots import plot
from lightning_peft.reports.rows import read_rows

FEW = (1, 2, 4, 8, 16)
CLASSES, DEPTH = 36, 2
"""Of the shapes; layers of the text tower of the backbone."""
WRITTEN = ("a photo of a", "a", "this is a", "a picture of one", "a drawing of a", "the outline of a", "a striped")
"""What stands before the name of a class in what the backbone has read, as the authors' 60 templates do for CLIP."""


@cache
def shapes(model: str, style: str, seed: int, shots: int | None = None, batch: int = 32) -> ColouredShapes:
    return ColouredShapes(
        style,
        shots=shots,
        seed=seed,
        drawing=10 + seed,
        novel="shape",
        processor=model,
        keep_in_memory=True,
        per_class=FEW[-1],
        test_per_class=50,
        batch_size=batch,
    )


Made = tuple[L.LightningModule, L.LightningDataModule]


def classification(
    model: str, seed: int, lr: float, shots: int, batch: int = 32, base_to_new: bool = False, cached: bool = True
) -> Made:
    data = CLIPData(shapes(model, "outline", seed, shots, batch), base_to_new=base_to_new)
    return CLIPClassification(model, cache_image_features=cached, lr=lr), data


def adaptation(model: str, seed: int, lr: float, shots: int, weight: float = 1.0) -> Made:
    data = DomainData(shapes(model, "outline", seed, shots), shapes(model, "dark", seed))
    return DomainAdaptation(model, lr=lr, weight=weight), data


class Entry(NamedTuple):
    """A method of a protocol, what makes the task and the data, how long it is trained, and what to choose from."""

    method: Method | None
    build: Callable[[str, int, float, int], Made]
    epochs: int = 0
    rates: tuple[float, ...] = (0.03, 0.1)
    others: tuple[Method, ...] = ()


class Protocol(NamedTuple):
    """The methods, and the scores to print."""

    entries: dict[str, Entry]
    scores: tuple[str, ...]


base_to_new = partial(classification, base_to_new=True)
one_by_one = partial(classification, base_to_new=True, batch=1)
both_towers = partial(classification, base_to_new=True, batch=4, cached=False)


def near_images(alpha: float, beta: float, train_keys: bool = True) -> TipAdapter:
    return TipAdapter(num_classes=CLASSES, shots=FEW[-1], alpha=alpha, beta=beta, train_keys=train_keys)


NOT_TRAINED = tuple(near_images(alpha, beta, False) for alpha in (1, 3, 10, 30) for beta in (1, 3, 10, 30))
PROTOCOLS = {
    "few_shot": Protocol(
        {
            "zero-shot": Entry(None, classification),
            "CoOp": Entry(CoOp(), classification, 50),
            "ClipAdapter": Entry(ClipAdapter(), classification, 50, (0.1, 0.3, 1.0)),
            "TipAdapter, not trained": Entry(near_images(1, 1, False), classification, others=NOT_TRAINED),
            "TipAdapter": Entry(near_images(1, 5.5), classification, 20, (0.03, 0.1, 1.0), (near_images(10, 5.5),)),
        },
        ("accuracy",),
    ),
    "base_to_new": Protocol(
        {
            "zero-shot": Entry(None, base_to_new),
            "CoOp": Entry(CoOp(), base_to_new, 200),
            "CoCoOp": Entry(CoCoOp(), one_by_one, 10, (0.01, 0.03)),
            "CoOp from words": Entry(CoOp(init="a photo of a"), one_by_one, 10, (0.01, 0.03)),
            "KgCoOp": Entry(KgCoOp(), base_to_new, 100),
            "MaPLe": Entry(MaPLe(depth=DEPTH), both_towers, 5, (0.01, 0.03, 0.1)),
            "MaPLe, 20 epochs": Entry(MaPLe(depth=DEPTH), both_towers, 20, (0.003, 0.01, 0.03, 0.1)),
            "IVLP": Entry(IVLP(depth=DEPTH), both_towers, 20, (0.003, 0.01, 0.03, 0.1)),
            "PromptSRC": Entry(PromptSRC(depth=DEPTH, words=list(WRITTEN)), both_towers, 20, (0.01, 0.03)),
        },
        ("base_accuracy", "new_accuracy", "harmonic_mean"),
    ),
    "adaptation": Protocol(
        {
            "zero-shot": Entry(None, adaptation),
            "CoOp": Entry(CoOp(), partial(adaptation, weight=0.0), 20),
            "DAPL": Entry(DAPL(), adaptation, 20),
        },
        ("accuracy", "coverage", "pseudo_accuracy"),
    ),
}


def run(
    args: argparse.Namespace,
    protocol: str,
    name: str,
    seed: int,
    lr: float,
    shots: int,
    test: bool,
    method: Method | None = None,
) -> L.Trainer:
    """Train, and look at the validation images after the last epoch, or test and append rows of results.

    Args:
        args: of the command line.
        protocol: of `PROTOCOLS`.
        name: of its entry.
        seed: of all that is random.
        lr: learning rate.
        shots: images of each class.
        test: whether to test.
        method: None: that of the entry.
    """
    own, build, epochs, _, _ = PROTOCOLS[protocol].entries[name]
    torch.manual_seed(seed)
    method, steps = method or own, epochs > 0
    epochs = args.epochs if args.epochs and steps else epochs
    task, data = build(args.model, seed, lr, shots)
    callbacks: list[L.Callback] = [] if method is None else [method]
    if test:
        coverage = ["train_coverage"] if name == "DAPL" else []
        few = (shots if method else 0) if protocol == "few_shot" else ""  # one picture is of all rows that have shots
        callbacks.append(ResultRows(method=name, epoch_metrics=coverage, extra={"protocol": protocol, "shots": few}))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        check_val_every_n_epoch=epochs or 1,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.folder,
    )
    if steps:
        trainer.fit(task, data)
    elif not test:
        trainer.validate(task, data, verbose=False)
    if test:
        trainer.test(task, data, verbose=False)
    return trainer


def choose(args: argparse.Namespace, protocol: str, name: str) -> tuple[Method | None, float]:
    """Return the method and learning rate of the best accuracy on validation images, of the least loss among equals."""
    entry = PROTOCOLS[protocol].entries[name]
    if entry.method is None:
        return None, entry.rates[0]
    found = {}
    for method in (entry.method, *entry.others):
        for lr in entry.rates if entry.epochs else entry.rates[:1]:
            own = copy.deepcopy(method)
            scores = run(args, protocol, name, args.seeds[0], lr, FEW[-1], False, own).callback_metrics
            found[method, lr] = (float(scores["val_accuracy"]), -float(scores["val_loss"]))
    shown = ", ".join(f"{told(*each)}: {accuracy:.3f}" for each, (accuracy, _) in found.items())
    best = max(found, key=lambda each: found[each])
    print(f"{protocol}, {name}: validation accuracy by learning rate {shown}; {told(*best)} is taken", flush=True)
    return best


def told(method: Method, lr: float) -> str:
    return f"{lr}, alpha {method.alpha}, beta {method.beta}" if isinstance(method, TipAdapter) else str(lr)


def show(file: Path, protocol: str) -> None:
    rows = [row for row in read_rows(file) if row["protocol"] == protocol and "epoch" not in row]
    for metric in PROTOCOLS[protocol].scores:
        own = [row for row in rows if row["metric"] == metric]
        for method, shots in dict.fromkeys((row["method"], row.get("shots", "")) for row in own):
            values = [row["value"] for row in own if (row["method"], row.get("shots", "")) == (method, shots)]
            spread = stdev(values) if len(values) > 1 else 0.0
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{protocol:12} {metric:15} {method:25} {shots:>3} {fmean(values):.3f} ± {spread:.3f}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/clip")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_clip"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every method, if not those of the protocol")
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", help="names of entries, if not all of the protocols")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    file = args.folder / "results.csv"
    file.unlink(missing_ok=True)
    for protocol in args.protocols:
        for name, entry in PROTOCOLS[protocol].entries.items():
            if args.methods and name not in args.methods:
                continue
            method, lr = choose(args, protocol, name)
            for seed in args.seeds:
                for shots in FEW if protocol == "few_shot" and entry.method else FEW[-1:]:
                    run(args, protocol, name, seed, lr, shots, True, copy.deepcopy(method))
        show(file, protocol)
    for picture in plot(str(file), str(args.folder)):
        print(picture)


if __name__ == "__main__":
    main()
