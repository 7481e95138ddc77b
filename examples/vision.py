"""Compare methods on images where no hub is: handwritten digits at once, and in five tasks of two classes.

    python examples/pretrain_vit.py                      # runs/vit, the backbone: it has seen shapes and no digit
    python examples/vision.py                            # runs/vision/results.csv and pictures, three seeds
    python examples/vision.py --seeds 1 --epochs 2       # sooner

Learning rates were tried once and not tuned.
"""

import argparse
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import datasets
import lightning as L

from lightning_peft import (
    L2P,
    VPT,
    ContinualClassification,
    ContinualData,
    Digits,
    FullFineTuning,
    ImageClassification,
    LinearProbe,
    Method,
    ResultRows,
)
from lightning_peft.reports import read_rows
from lightning_peft.reports.plots import plot

METHODS: dict[str, tuple[Method, float]] = {
    "LinearProbe": (LinearProbe(), 1e-2),
    "VPT-Shallow": (VPT(num_virtual_tokens=10, deep=False), 2e-2),
    "VPT-Deep": (VPT(num_virtual_tokens=10), 2e-2),
}
CONTINUAL: dict[str, tuple[Method, float]] = {
    "LinearProbe": (LinearProbe(), 1e-2),
    "FullFineTuning": (FullFineTuning(), 1e-3),
    "L2P": (L2P(cache_queries=True), 1e-2),
}


def trainer(folder: Path, method: Method, name: str, epochs: int, **kwargs: object) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[method, ResultRows("results.csv", method=name)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )


def at_once(model: str, folder: Path, seed: int, epochs: int) -> None:
    for name, (method, lr) in METHODS.items():
        L.seed_everything(seed, verbose=False)
        data = Digits(processor=model, seed=seed, keep_in_memory=True)
        module = ImageClassification(model, labels=data.label_names, lr=lr, head_lr=1e-2)
        fit = trainer(folder, method, name, epochs)
        fit.fit(module, data)
        fit.test(module, data, verbose=False)


def in_tasks(model: str, folder: Path, seed: int, epochs: int) -> None:
    for name, (method, lr) in CONTINUAL.items():
        L.seed_everything(seed, verbose=False)
        digits = Digits(processor=model, seed=seed, keep_in_memory=True, batch_size=16)
        data = ContinualData(digits, tasks=5, epochs_per_task=epochs, class_seed=seed)
        module = ContinualClassification(model, labels=data.label_names, lr=lr, head_lr=lr)
        settings = {"reload_dataloaders_every_n_epochs": 1, "check_val_every_n_epoch": epochs, "gradient_clip_val": 1.0}
        trainer(folder, method, name, 5 * epochs, **settings).fit(module, data)


def show(file: Path, metrics: Iterable[str], last: int = 4) -> None:
    rows = read_rows(file)
    for metric in metrics:
        chosen = [row for row in rows if row["metric"] == metric and row.get("after", last) == last]
        for method in dict.fromkeys(row["method"] for row in chosen):
            values = [row["value"] for row in chosen if row["method"] == method]
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{metric:18} {method:15} {fmean(values):.3f}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/vit")
    parser.add_argument("--folder", type=Path, default=Path("runs/vision"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="for digits at once; a task has half as many")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    (args.folder / "results.csv").unlink(missing_ok=True)
    for seed in range(args.seeds):
        at_once(args.model, args.folder, seed, args.epochs)
        in_tasks(args.model, args.folder, seed, max(1, args.epochs // 2))
    show(args.folder / "results.csv", ("accuracy", "average_accuracy", "forgetting"))
    for picture in plot(str(args.folder / "results.csv"), str(args.folder)):
        print(picture)


if __name__ == "__main__":
    main()
