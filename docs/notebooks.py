"""Writes examples/notebooks from the tutorials, cell by cell: ``python docs/notebooks.py``."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples/notebooks"
PAGES = ("own_csv", "chat", "clip")
_BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n?", re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a tutorial: its text and its blocks, those of the shell by the magic ``%%bash``."""
    text = (ROOT / f"docs/tutorials/{page}.md").read_text(encoding="utf-8")
    text = text.replace("](../", "](../../docs/")
    cells, end = [], 0
    for block in _BLOCK.finditer(text):
        cells += _words(text[end : block.start()])
        code = block[2] if block[1] == "python" else f"%%bash\n{block[2]}"
        cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **_common(code)})
        end = block.end()
    cells += _words(text[end:])
    cells = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _words(text: str) -> list[dict[str, Any]]:
    return [{"cell_type": "markdown", **_common(text)}] if text.strip() else []


def _common(source: str) -> dict[str, Any]:
    return {"metadata": {}, "source": source.strip().splitlines(keepends=True)}


def written(page: str) -> str:
    """Return a notebook as it stands in its file."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.ipynb").write_text(written(name), encoding="utf-8")
