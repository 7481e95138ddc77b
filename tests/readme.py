"""``python -m tests.readme`` writes the tables of methods, in README.md and two pages of docs, from the classes."""

import re
from pathlib import Path

from lightning_peft.commands.method_kinds import WHEN, by_kind
from lightning_peft.commands.tools import row_of
from lightning_peft.methods import every_method

ROOT = Path(__file__).parents[1]


def with_methods(text: str) -> str:
    """Return a page with a row for every method, those of a kind together."""
    rows = [row for methods in by_kind().values() for row in methods.items()]
    table = "".join(f"| `{name}` | {' | '.join(row_of(method))} |\n" for name, method in rows)
    return _replaced(text, "| method | kind | trains | paper |\n|---|---|---|---|\n", table)


def with_kinds(text: str) -> str:
    """Return a page with a row for every kind of method: its methods, and when to take one."""
    named = {kind: " ".join(f"`{name}`" for name in methods) for kind, methods in by_kind().items()}
    table = "".join(f"| {kind} | {names} | {WHEN.get(kind, '')} |\n" for kind, names in named.items())
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
