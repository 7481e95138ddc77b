"""Checks the YAML of a command line before the parser reads it, which has no end where a value refers to itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from lightning_peft.commands.config_files import named
from lightning_peft.core.errors import TuningError

_PLAIN = ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _PLAIN}
_MOST = 100_000
"""How many values a file may have, those of an anchor counted at each place that names it."""


def check_words(words: Sequence[str]) -> None:
    """Check the files of arguments that a command line names, and values that are written as YAML.

    Raises:
        TuningError: one is no file, no YAML or no mapping, refers to itself, or has what no file of arguments has.
    """
    for option, value in _pairs(words):
        if option in ("--config", "-c"):
            _check_config(value)
        elif Path(value).suffix in (".yaml", ".yml", ".json") and is_file(value):
            _compose(_text(value), value)
        elif "&" in value and "*" in value:
            _compose(value, option or repr(value))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each option with its value; of a word alone the option is ''."""
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-") and equals:
            yield name, value
        elif not word.startswith("-"):
            yield option, word
        option = "" if equals or not word.startswith("-") else word


def _check_config(value: str) -> None:
    value = named(value)
    inline = not is_file(value) and (":" in value or "{" in value) and not Path(value).suffix.startswith(".y")
    if not inline and not is_file(value):
        raise TuningError(f"--config {value[:100]!r} is no file: give the path of a YAML file.")
    source = "--config" if inline else value
    node = _compose(value if inline else _text(value), source)
    if not isinstance(node, yaml.MappingNode):
        raise TuningError(f"{source} is no mapping of arguments to values: give lines such as 'method: LoRA'.")
    for key, _ in node.value:
        if key.tag not in (f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge")):
            raise TuningError(
                f"{source} has the key {str(key.value)[:60]!r}{_line(key)}, which is no name of an argument: "
                "lightning-peft fit --help shows them."
            )


def _compose(text: str, source: str) -> yaml.Node | None:
    """Return the root of a YAML text, all of which is plain and ends."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise TuningError(f"{source} nests deeper than any argument does: write it flatter.") from None
    except yaml.YAMLError as error:
        reason = str(getattr(error, "problem", "") or "a character that YAML does not have").rstrip(".")
        raise TuningError(f"{source} is no YAML ({reason}{_line(error)}): mend it there.") from None
    if root is not None:
        try:
            _check_node(root, source, [], [0])
        except RecursionError:
            raise TuningError(f"{source} nests deeper than any argument does: write it flatter.") from None
    return root


def _check_node(node: yaml.Node, source: str, around: list[int], seen: list[int]) -> None:
    seen[0] += 1
    if id(node) in around:
        raise TuningError(f"{source} has an anchor{_line(node)} that stands for itself: write out what is meant.")
    if seen[0] > _MOST:
        raise TuningError(f"{source} has more than {_MOST:,} values where its anchors stand: write out what is meant.")
    if node.tag not in _TAGS:
        raise TuningError(f"{source} has the tag {node.tag}{_line(node)}, which is no plain value: leave it out.")
    children: Sequence[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    around.append(id(node))
    for child in children:
        _check_node(child, source, around, seen)
    around.pop()


def _line(place: object) -> str:
    mark = getattr(place, "start_mark", None) or getattr(place, "problem_mark", None)
    return f" in line {mark.line + 1}" if mark is not None else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} cannot be read as text ({error}): give a YAML file.") from None


def is_file(path: str) -> bool:
    """Tell whether a word of a command line is the path of a file."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # it is too long, or has a null byte
        return False
