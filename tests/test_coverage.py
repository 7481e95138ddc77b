"""The page of what is described names files, tests and commands that exist."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_peft.cli import _COMMANDS
from lightning_peft.core import shipped

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (.+?) \| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "docs/coverage.md").read_text(), re.MULTILINE)


def test_each_row_is_a_statement_of_its_own() -> None:
    statements = [statement for statement, *_ in ROWS]
    assert len(statements) >= 200
    assert len(set(statements)) == len(statements)


@pytest.mark.parametrize(("statement", "where", "shown"), ROWS, ids=[row[0] for row in ROWS])
def test_what_shows_a_statement_exists(statement: str, where: str, shown: str) -> None:
    assert (ROOT / where).exists(), statement
    program, *words = shlex.split(shown)
    if program == "python":
        assert (ROOT / words[0]).is_file()
    elif program == "lightning-peft":
        assert words[0] in _COMMANDS
        named = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        assert [name for name in named if shipped.find(name) is None] == []
    else:
        file, _, name = program.partition("::")
        assert re.search(rf"(def|class) {name or 'test_'}\b" if name else "def test_", (ROOT / file).read_text())
