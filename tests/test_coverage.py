"""The page of what is described names tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (.+?) \| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "docs/coverage.md").read_text(), re.MULTILINE)


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize(("statement", "where", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_what_shows_a_statement_exists(statement: str, where: str, test: str) -> None:
    assert (ROOT / where).exists(), statement
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text()
    assert f"def {name}(" in text if name else "def test_" in text or "class Test" in text
