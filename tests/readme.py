"""``python -m tests.readme`` writes the tables of methods, in README.md and two pages of docs, from the classes."""

import re
from pathlib import Path

from lightning_peft.commands.tools import row_of
from lightning_peft.methods import every_method

ROOT = Path(__file__).parents[1]
WHEN = {
    "weights": "the default: near full fine-tuning on most tasks, and free at inference once it is merged",
    "biases": "few rows, small deltas; also where weights must stay as they are",
    "activations": "the smallest delta of those that change every block",
    "modules": "several tasks in one model; costs time at inference",
    "prefix": "tasks of writing, and prompts for deep models; needs higher learning rates and more steps",
    "mask": "a decoder that reads a source before it writes; beside any other method",
    "words": "new words, such as the marks of a chat template; beside any other method",
    "prompt": "very large models, images and CLIP; one frozen model answers rows of many tasks in one batch",
    "head": "the baseline of every frozen model, and the fastest, with `cache_features`",
    "blocks": "between the head alone and the whole model",
    "side network": "no backward pass through the backbone: the least memory",
    "all": "the baseline that all others are measured against",
}
"""Kind of a method -> when to take one; in the order of the table."""


def with_methods(text: str) -> str:
    """Return a page with a row for every method, those of a kind together."""
    rows = sorted(every_method().items(), key=lambda row: list(WHEN).index(row[1].kind))
    table = "".join(f"| `{name}` | {' | '.join(row_of(method))} |\n" for name, method in rows)
    return _replaced(text, "| method | kind | trains | paper |\n|---|---|---|---|\n", table)


def with_kinds(text: str) -> str:
    """Return a page with a row for every kind of method: its methods, and when to take one."""
    named = {kind: [f"`{name}`" for name, method in every_method().items() if method.kind == kind] for kind in WHEN}
    table = "".join(f"| {kind} | {' '.join(named[kind])} | {when} |\n" for kind, when in WHEN.items())
    return _replaced(text, "| what is trained | methods | take one for |\n|---|---|---|\n", table)


def with_twins(text: str) -> str:
    """Return a page with a row for every method that PEFT has too, tensor by tensor."""
    twins = [(name, method.twin) for name, method in every_method().items() if method.twin is not None]
    rows = [(name, twin.peft_type, ", ".join(f"`{k.__name__}`" for k in twin.kinds)) for name, twin in twins]
    table = "".join(f"| `{name}` | {peft_type} | {kinds} |\n" for name, peft_type, kinds in rows)
    return _replaced(text, "| method | PEFT | layers |\n|---|---|---|\n", table)


def _replaced(text: str, head: str, table: str) -> str:
    before, found, after = text.partition(head)
    return before + found + table + re.sub(r"\A(\|.*\n)*", "", after) if found else text


PAGES = {ROOT / "README.md": with_kinds, ROOT / "docs/choosing.md": with_methods}
TWINS = {ROOT / "docs/interop.md": with_twins}

if __name__ == "__main__":
    for page, written in (PAGES | TWINS).items():
        page.write_text(written(page.read_text()))
