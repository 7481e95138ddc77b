"""Imports run one way, so that each file can be read with only those before it in mind."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_peft"
LAYERS = [
    ["errors", "cache_argument", "training.signals", "features.activation_memory"],
    ["prompting", "features.kept_rows"],
    ["encoding"],
    ["graft", "files", "training.param_groups", "training.loaders", "training.slurm"],
    ["towers.packing", "updates.quantized", "updates.low_rank_init", "updates.hard_concrete"],
    ["training.sharded"],
    ["select"],
    ["prompts.attention", "towers.vision", "features.heads", "features.side", "training.units"],
    ["towers.window_prompts"],
    ["tuning", "updates.targets", "updates.in_place"],
    ["updates.factors", "updates.bottleneck"],
    ["fingerprint", "prompts.virtual_tokens"],
    ["towers.text_towers", "prompts.shared_prompt", "prompts.infix"],
    ["towers.contexts"],
    ["towers.clip", "towers.deep_prompts"],
    ["delta"],
    ["training.precision"],
    ["folding"],
    ["training.checkpoint_io", "training.weights", "updates.low_rank", "updates.sparse_difference"],
    ["training.tensor_parallel"],
    ["training.strategy", "training.strategy_files"],
    ["training.lifecycle"],
    ["training.requeue", "training.checks"],
    ["training.trainers", "training.together"],
    ["method"],
    ["rebuild", "prompts.prefixes", "prompts.base", "updates.merging", "features.feature_cache"],
    ["mixin"],
    ["methods"],
]
FOLDERS = {name.split(".")[0] for names in LAYERS for name in names if "." in name}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(file: Path) -> set[str]:
    """Return the modules and folders of the package that a file imports from, those for types alone left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parts = (node.module or "").split(".")[1:]
            below = [[alias.name] for alias in node.names]
            found |= {_module([*parts, *more]) for more in below}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")]
            found |= {_module(name.split(".")[1:]) for name in names}
    return found


def _module(parts: list[str]) -> str:
    return ".".join(parts[: 2 if parts[0] in FOLDERS else 1])


@pytest.mark.parametrize("name", [name for names in LAYERS[:-1] for name in names])
def test_a_core_file_imports_what_comes_before_it(name: str) -> None:
    path = PACKAGE / name.replace(".", "/")
    files = list(path.glob("*.py")) or [path.with_suffix(".py")]
    others = set().union(*map(imported, files)) - ({name} if path.is_dir() else set())
    assert {LEVEL.get(other, len(LAYERS)) < LEVEL[name] for other in others} <= {True}


def test_prompting_is_text_alone() -> None:
    for file in (PACKAGE / "prompting").glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, PACKAGE.name}


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("methods/*.py")), ids=lambda file: file.stem)
def test_a_method_knows_no_other_method_and_no_task(file: Path) -> None:
    assert imported(file) <= {name for names in LAYERS[:-1] for name in names}


@pytest.mark.parametrize("folder", ["tasks", "data"])
def test_tasks_and_data_know_no_method(folder: str) -> None:
    for file in PACKAGE.glob(f"{folder}/**/*.py"):
        assert "methods" not in imported(file), file.name
