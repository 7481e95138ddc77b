"""Imports run one way, so that each file can be read with only those before it in mind."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_peft"
LAYERS = [
    ["errors"],
    ["graft", "files", "param_groups"],
    ["select"],
    ["attention"],
    ["tuning"],
    ["fingerprint", "virtual_tokens", "precision"],
    ["delta", "folding"],
    ["lifecycle", "checkpoint_io"],
    ["method"],
    ["rebuild"],
    ["mixin"],
    ["methods"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(file: Path) -> set[str]:
    """Return the first parts below the package of all that a file imports from it, those for types alone left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")}
    return found


@pytest.mark.parametrize("name", [name for names in LAYERS[:-1] for name in names])
def test_a_core_file_imports_what_comes_before_it(name: str) -> None:
    assert {LEVEL.get(other, len(LAYERS)) < LEVEL[name] for other in imported(PACKAGE / f"{name}.py")} <= {True}


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("methods/*.py")), ids=lambda file: file.stem)
def test_a_method_knows_no_other_method_and_no_task(file: Path) -> None:
    assert imported(file) <= {name for names in LAYERS[:-1] for name in names}


@pytest.mark.parametrize("folder", ["tasks", "data"])
def test_tasks_and_data_know_no_method(folder: str) -> None:
    for file in PACKAGE.glob(f"{folder}/**/*.py"):
        assert "methods" not in imported(file), file.name
