"""Keeps lists of the names of modules small: names that differ in numbers alone are one entry with ranges.

A name without numbers is a string. Other names are lists in which text and ranges take turns:
``["encoder.layer.", "0-11", ".query"]`` is twelve names, and 128 experts of 48 blocks are one entry, too. Nothing is
written out again: a name is looked up, so that no list in a file, whatever its ranges, takes long or much memory.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

Entry = str | list[str]
Box = tuple[frozenset[int], ...]

_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d{0,8})(?![^.])")  # a whole part of a name
_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")


def packed(names: Iterable[str]) -> list[Entry]:
    """Return the entries that stand for these names and no others.

    >>> packed(["layer.0.q", "layer.1.q", "layer.3.q", "pooler"])
    [['layer.', '0-1,3', '.q'], 'pooler']
    """
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        texts, numbers = _split(name)
        alike.setdefault(texts, []).append(numbers)
    return [_entry(texts, box) for texts, rows in alike.items() for box in _boxes(rows)]


def is_packed(value: Any) -> bool:
    """Tell whether a value, such as one of a file, is a list that `packed` could have returned."""
    return isinstance(value, list) and all(
        isinstance(entry, str)
        or (
            isinstance(entry, list)
            and len(entry) % 2 == 1
            and all(isinstance(part, str) for part in entry)
            and all(_RANGES.fullmatch(part) for part in entry[1::2])
        )
        for entry in value
    )


class Names:
    """The names that packed entries stand for."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._whole = {entry for entry in entries if isinstance(entry, str)}
        self._ranges: dict[tuple[str, ...], list[list[list[tuple[int, int]]]]] = {}
        for entry in entries:
            if not isinstance(entry, str):
                ranges = [_ends(text) for text in entry[1::2]]
                self._ranges.setdefault(tuple(entry[::2]), []).append(ranges)

    def __contains__(self, name: str) -> bool:
        """Tell whether a name is one of them."""
        texts, numbers = _split(name)
        return name in self._whole or any(
            all(any(a <= n <= b for a, b in ends) for n, ends in zip(numbers, ranges, strict=True))
            for ranges in self._ranges.get(texts, ())
        )


def _split(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    parts = _NUMBER.split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def _boxes(rows: Sequence[tuple[int, ...]]) -> list[Box]:
    """Return products of sets of numbers that hold these rows and no others: rows alike but for one number are one."""
    boxes: list[Box] = [tuple(frozenset((number,)) for number in row) for row in rows]
    for place in reversed(range(len(rows[0]))):
        joined: dict[tuple[Box, Box], frozenset[int]] = {}
        for box in boxes:
            rest = box[:place], box[place + 1 :]
            joined[rest] = joined.get(rest, frozenset()) | box[place]
        boxes = [(*before, numbers, *after) for (before, after), numbers in joined.items()]
    return boxes


def _entry(texts: tuple[str, ...], box: Box) -> Entry:
    if not box:
        return texts[0]
    entry = [texts[0]]
    for numbers, text in zip(box, texts[1:], strict=True):
        entry += [_written(numbers), text]
    return entry


def _written(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _ends(text: str) -> list[tuple[int, int]]:
    """Return the first and the last number of each range."""
    ends = [part.partition("-") for part in text.split(",")]
    return [(int(first), int(last or first)) for first, _, last in ends]
