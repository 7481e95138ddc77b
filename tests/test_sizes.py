"""The code stays small to look at: files, functions, and how often it asks an object what it has."""

import ast
from pathlib import Path

import pytest

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def long_functions(tree: ast.AST) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [f"{node.name}: {node.end_lineno - node.lineno}" for node in functions if node.end_lineno - node.lineno > 40]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_above_300_lines_and_no_function_above_40(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 300
    assert long_functions(ast.parse(text)) == []


def test_what_a_long_function_is() -> None:
    lines = "\n".join(["    pass"] * 41)
    assert long_functions(ast.parse(f"def f():\n{lines}")) == ["f: 41"]


def test_few_questions_by_name() -> None:
    """At most six calls of getattr and hasattr in 1,000 lines: what is known of a model is in `core/structure.py`."""
    trees = [ast.parse(file.read_text()) for file in FILES]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr")]
    assert 1000 * len(asked) <= 6 * sum(len(file.read_text().splitlines()) for file in FILES)
