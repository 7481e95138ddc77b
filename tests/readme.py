"""``python -m tests.readme`` writes the README's table of methods, from what the classes say."""

import re
from pathlib import Path

from lightning_peft.commands.tools import row_of
from lightning_peft.methods import every_method

README = Path(__file__).parents[1] / "README.md"


def with_methods(text: str) -> str:
    """Return the README with a row for every method, those of a kind together."""
    rows = sorted(every_method().items(), key=lambda row: row[1].kind)
    table = "".join(f"| `{name}` | {' | '.join(row_of(method))} |\n" for name, method in rows)
    head = "| method | kind | trains | paper |\n|---|---|---|---|\n"
    return re.sub(r"\| method \|.* trains \|.* paper \|\n(\|.*\n)*", lambda _: head + table, text, count=1)


if __name__ == "__main__":
    README.write_text(with_methods(README.read_text()))
