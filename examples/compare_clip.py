r"""Compare contexts for CLIP offline: zero-shot and few-shot, base and new classes, from one style to another.

    python examples/pretrain_clip.py                       # the backbone, runs/clip
    python examples/compare_clip.py --seeds 0 1 2          # appends to runs/compare_clip.csv, in minutes
    lightning-peft plot runs/compare_clip.csv --folder runs/pictures

What to look for: CoOp against zero-shot with 16 pictures of each class, CoCoOp against CoOp on classes that neither
saw, and DAPL against a context of the source alone on the target.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import lightning as L
import torch

from lightning_peft import (
    DAPL,
    CLIPClassification,
    CLIPData,
    CoCoOp,
    ColouredShapes,
    CoOp,
    DomainAdaptation,
    DomainData,
)
from lightning_peft.reports.rows import Row, write_rows

SHOTS = (1, 2, 4, 8, 16)


def shapes(model: str, style: str, seed: int, shots: int | None = None) -> ColouredShapes:
    """Return pictures of one style; the same ones for every seed, of which the shots are drawn."""
    return ColouredShapes(style, shots=shots, seed=seed, processor=model, keep_in_memory=True, per_class=16)


def run(task: L.LightningModule, data: L.LightningDataModule, method: Any, epochs: int) -> dict[str, float]:
    """Train, unless there is no method, and return the scores of the test."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[method] if method is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    if method is not None:
        trainer.fit(task, data)
    tested = trainer.test(task, data, verbose=False)
    return {name.removeprefix("test_"): value for scores in tested for name, value in scores.items()}


def few_shot(model: str, seed: int, epochs: int, lr: float) -> Iterator[Row]:
    """Yield accuracies against shots; zero shots have no seed."""
    data = CLIPData(shapes(model, "outline", seed))
    if seed == 0:
        yield from rows("zero-shot", seed, 0, run(CLIPClassification(model), data, None, 0))
    for shots in SHOTS:
        torch.manual_seed(seed)
        task = CLIPClassification(model, cache_image_features=True, lr=lr)
        data = CLIPData(shapes(model, "outline", seed, shots))
        yield from rows("CoOp", seed, shots, run(task, data, CoOp(init="a photo of a"), epochs))


def base_to_new(model: str, seed: int, epochs: int, lr: float) -> Iterator[Row]:
    """Yield accuracies on base and on new classes."""
    for name, method in (
        ("zero-shot", None),
        ("CoOp", CoOp(init="a photo of a")),
        ("CoCoOp", CoCoOp()),
    ):
        torch.manual_seed(seed)
        task = CLIPClassification(model, cache_image_features=method is not None, lr=lr)
        data = CLIPData(shapes(model, "outline", seed, 16), base_to_new=True)
        yield from rows(name, seed, 16, run(task, data, method, epochs))


def adaptation(model: str, seed: int, epochs: int, lr: float) -> Iterator[Row]:
    """Yield accuracies on the target domain."""
    source_alone = {"weight": 0.0}
    for name, method, arguments in (
        ("zero-shot", None, {}),
        ("source alone", CoOp(), source_alone),
        ("DAPL", DAPL(), {}),
    ):
        torch.manual_seed(seed)
        data = DomainData(shapes(model, "filled", seed), shapes(model, "dark", seed))
        task = DomainAdaptation(model, lr=lr, **arguments)
        scores = run(task, data, method, epochs)
        yield from rows(name, seed, "", {f"target_{metric}": value for metric, value in scores.items()})


def rows(method: str, seed: int, shots: Any, scores: dict[str, float]) -> Iterator[Row]:
    for metric, value in scores.items():
        yield {
            "method": method,
            "dataset": "ColouredShapes",
            "seed": seed,
            "shots": shots,
            "metric": metric,
            "value": value,
        }


PROTOCOLS = {"few_shot": few_shot, "base_to_new": base_to_new, "adaptation": adaptation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/clip")
    parser.add_argument("--file", type=Path, default=Path("runs/compare_clip.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: list[Row] = []
    for protocol in arguments.protocols:
        for seed in arguments.seeds:
            new = list(PROTOCOLS[protocol](arguments.model, seed, arguments.epochs, arguments.lr))
            write_rows(arguments.file, new)
            found += new
        shown = [row for row in found if row["metric"].endswith(("accuracy", "harmonic_mean", "coverage"))]
        for key in dict.fromkeys((r["method"], r["shots"], r["metric"]) for r in shown):
            values = [r["value"] for r in shown if (r["method"], r["shots"], r["metric"]) == key]
            print(
                f"{protocol}: {key[0]}, {key[1]} shots, {key[2]} {fmean(values):.3f} ({len(values)} seeds)", flush=True
            )
        found = []


if __name__ == "__main__":
    main()
