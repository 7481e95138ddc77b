"""What is kept of a text in the context that is put into a delta of 32 virtual tokens (`ContextDistillation`).

A tiny reader (examples/pretrain_reader.py, trained here if there is none) is asked for each of the facts of a text of
512 tokens that it has never seen: with the text before each question, without it, and without it after the text was put
into a delta. A delta learns what the reader says that has the text, answer for answer, of all questions ("asked").
"Begun" is what no delta has seen in training: the beginning of the sentence that tells the fact, to be completed.

    python -m tests.benchmarks.context                                  # ten minutes of one idle core
    python -m tests.benchmarks.context --methods PrefixTuning --seeds 1

An answer is right if the text that is written is it. What has been run stands in ``runs.json`` of the folder, and is
not run again. The program fails where a prefix keeps less than 95 % in the mean of its texts.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch

from examples import pretrain_reader
from examples.pretrain_reader import MOST, Fact, draw_facts
from lightning_peft import CausalLM, CausalLMData, ContextDistillation, LoRA, Method, PrefixTuning, PromptTuning
from lightning_peft.commands.comparing import be_silent
from tests.benchmarks.domains import shown

TOKENS, VIRTUAL, BOUND = 512, 32, 0.95
"""Tokens of a text, virtual tokens that stand for it, and the share of its accuracy that they are to keep."""
STEPS, ROWS = 400, 34
"""Steps of training, and questions of a batch."""
METHODS: dict[str, Callable[[], Method]] = {
    "PrefixTuning": lambda: PrefixTuning(num_virtual_tokens=VIRTUAL, mid_dim=None),
    "PromptTuning": lambda: PromptTuning(num_virtual_tokens=VIRTUAL),
    "LoRA": lambda: LoRA(r=8),
}
"""All at the rates that they recommend."""
FORMS = {"asked": Fact.asked, "begun": Fact.begun}
"""How a fact is asked for; the first is trained on."""


def text_of(seed: int) -> list[Fact]:
    """Return as many facts as 512 tokens tell."""
    found, used = [], 0
    for fact in draw_facts(random.Random(seed), MOST + 50):
        size = len(fact.told().split())
        if used + size <= TOKENS:
            found.append(fact)
            used += size
    return found


def files(folder: Path, facts: list[Fact]) -> dict[str, str]:
    """Write the text and the rows of each form, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(" ".join(fact.told() for fact in facts) + " ", encoding="utf-8")
    for form, prompt in FORMS.items():
        rows = [json.dumps({"prompt": prompt(fact), "target": fact.value}) for fact in facts]
        (folder / f"{form}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {name: str(folder / name) for name in ("text.txt", *(f"{form}.jsonl" for form in FORMS))}


def rows_of(model: str, path: str, text: str = "", size: int = 32) -> CausalLMData:
    """Return the rows of a file, with a text before each."""
    return CausalLMData(
        tokenizer=model, train=path, validation=path, test=path, prompt="prompt", target="target", prefix=text,
        max_length=64 + 2 * len(text.split()), batch_size=size,
    )  # fmt: skip


def trainer(**kwargs: Any) -> L.Trainer:
    """Return a Trainer that says and writes nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, limit_val_batches=0, **quiet, **kwargs)


def scores(task: CausalLM, model: str, paths: dict[str, str], text: str = "") -> dict[str, float]:
    """Return the share of right answers for each form of question."""
    tests = {form: rows_of(model, paths[f"{form}.jsonl"], text) for form in FORMS}
    return {form: trainer().test(task, own, verbose=False)[0]["test_exact_match"] for form, own in tests.items()}


def runs(model: str, seed: int, steps: int, methods: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Ask a reader about one text: with it, without it, and after each method, if named."""
    facts = text_of(seed)
    paths = files(folder / str(seed), facts)
    text = Path(paths["text.txt"]).read_text(encoding="utf-8")
    told = {"seed": seed, "facts": len(facts), "tokens": len(text.split())}
    for name in methods:
        begin = time.process_time()
        L.seed_everything(seed, verbose=False)
        if name in METHODS:
            task: CausalLM = ContextDistillation(model, paths["text.txt"], generate="test", max_new_tokens=2)
            fit = trainer(max_epochs=-1, max_steps=steps, callbacks=[METHODS[name]()])
            fit.fit(task, rows_of(model, paths["asked.jsonl"], size=ROWS))
        else:
            task = CausalLM(model, generate="test", max_new_tokens=2)
        found = scores(task, model, paths, text if name == "with the text" else "")
        yield told | {"way": name, "steps": steps, **found, "seconds": round(time.process_time() - begin)}


def table(found: list[dict[str, Any]]) -> str:
    """Return the mean and the deviation of each way over the texts, and what it keeps of the text's, in Markdown."""
    whole = {row["seed"]: row for row in found if row["way"] == "with the text"}
    lines = ["| way | texts | asked | begun | kept, asked | kept, begun |", "|---|---:|---|---|---|---|"]
    for way in dict.fromkeys(row["way"] for row in found):
        own = [row for row in found if row["way"] == way]
        cells = [shown([row[form] for row in own]) for form in FORMS]
        cells += [shown([row[form] / whole[row["seed"]][form] for row in own]) for form in FORMS]
        lines.append(f"| {way} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table, and see that the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--model", type=Path, default=Path("runs/tiny/reader"))
    parser.add_argument("--folder", type=Path, default=Path("runs/context"))
    given = parser.parse_args()
    be_silent()
    torch.set_num_threads(1)
    if not (given.model / "config.json").is_file():
        share = pretrain_reader.train(given.model)
        print(f"{given.model}: {share:.3f} of new texts", flush=True)
    path = given.folder / "runs.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for seed in range(1, given.seeds + 1):
        known = {row["way"] for row in found if (row["seed"], row["steps"]) == (seed, given.steps)}
        wanted = [name for name in ("with the text", "without it", *given.methods) if name not in known]
        for row in runs(str(given.model), seed, given.steps, wanted, given.folder):
            found.append(row)
            path.write_text(json.dumps(found, indent=1))
            print(row, flush=True)
    found = [row for row in found if row["steps"] == given.steps and row["seed"] <= given.seeds]
    print(table(found))
    kept = [row["asked"] for row in found if row["way"] == "PrefixTuning"]
    whole = [row["asked"] for row in found if row["way"] == "with the text"]
    assert not kept or fmean(kept) >= BOUND * fmean(whole), f"a prefix of {VIRTUAL} keeps less than {BOUND} of the text"


if __name__ == "__main__":
    main()
