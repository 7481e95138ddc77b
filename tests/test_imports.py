"""Folders are floors: each imports from those below it alone."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_peft"
FLOORS = ("core", "prompting", "updates", "features", "prompts", "towers", "training", "bases", "methods", "deltas",
          "data", "tasks", "reports", "interop", "commands", "cli")  # fmt: skip


def imported(file: Path) -> set[str]:
    """Return the folders of the package that a file imports from, those for types alone left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_folder_imports_from_those_below_it(floor: str) -> None:
    files = [*(PACKAGE / floor).rglob("*.py"), *PACKAGE.glob(f"{floor}.py")]
    below = set(FLOORS[: FLOORS.index(floor) + 1])
    assert {file.name: above for file in files if (above := imported(file) & set(FLOORS) - below)} == {}


def test_every_folder_is_a_floor() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(FLOORS)
