"""Finds the private names of other libraries in the package: those that it does not define, or that a base has, too."""

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_peft"
OF_TUPLES = ("_asdict", "_replace")
"""What the standard library documents of every NamedTuple."""
OF_PARTS = ("endswith", "removesuffix")
"""Functions that take parts of names."""


def used(sources: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """Return the private names of other libraries with the files that use them.

    Args:
        sources: path below the package -> code; None: the whole package.
    """
    if sources is None:
        sources = {str(file.relative_to(PACKAGE)): file.read_text() for file in PACKAGE.rglob("*.py")}
    trees = {file: ast.parse(code) for file, code in sources.items()}
    own = set().union(*map(_defined, trees.values()))
    classes = {
        kind: node for file, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)
        if (kind := _built(file, node.name)) is not None
    }  # fmt: skip
    shared = {name for kind, node in classes.items() for name in _defined(node) & _of_others(kind)}
    found: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        for name in _mentioned(tree):
            if name not in own or name in shared:
                found[name].add(file)
        for node in tree.body:
            kind = _built(file, node.name) if isinstance(node, ast.ClassDef) else None
            for name in _of_itself(node) & _of_others(kind) if kind is not None else ():
                found[name].add(file)
    return dict(found)


def _is_private(name: str | None) -> bool:
    of_its_own = name is None or name in OF_TUPLES or PACKAGE.name in name
    return not of_its_own and re.fullmatch(r"_[a-zA-Z]\w*(?<!__)", name) is not None


def _defined(tree: ast.AST) -> set[str]:
    """Return the private names of functions, classes, variables and attributes of ``self`` that code defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_itself(node.value):
            names.add(node.attr)
    return set(filter(_is_private, names))


def _is_itself(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "cls", "super()")


def _of_itself(tree: ast.AST) -> set[str]:
    """Return the private attributes of ``self`` that code reads or writes."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in attributes if _is_private(node.attr) and _is_itself(node.value)}


def _built(file: str, name: str) -> type | None:
    return getattr(import_module(".".join((PACKAGE.name, *Path(file).with_suffix("").parts))), name, None)


@cache
def _of_others(kind: type) -> set[str]:
    """Return the private names that the bases of a class have which are not of the package."""
    known = (PACKAGE.name, *sys.stdlib_module_names)
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in known]
    return set().union(*map(_names_in, bases))


@cache
def _names_in(kind: type) -> set[str]:
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # it is no Python
        code = ""
    return {*vars(kind), *re.findall(r"\b(?:self|cls)\.(_\w+)", code)}


def _mentioned(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that code imports, reads of an object, passes by keyword or has in a string."""
    parts = {id(part) for part in _parts(tree)}
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.keyword):
            names = [node.arg]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGE.name):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names = [*re.findall(r"(?<!\w)_\w+", node.value)] if id(node) not in parts else []
        yield from filter(_is_private, names)


def _parts(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield strings that are put together to names, or are part of such."""
    for node in ast.walk(tree):
        in_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OF_PARTS
        if in_call or isinstance(node, ast.JoinedStr):
            yield from ast.walk(node)
