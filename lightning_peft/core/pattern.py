"""Regular expressions of names, which may come from a file: none of them runs without end.

Python's own ``re`` has no limit of time, and one pattern in a file could hang whoever loads it. ``regex``, which
transformers depends on, matches the same language and has one. A delta file says which names its patterns have matched,
so those of our own files are not run at all: `Resolved`.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import regex  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError
from lightning_peft.core.name_lists import Entry, Names
from lightning_peft.core.private_torch import WRAPPERS

SECONDS = 1.0
"""How much time a pattern may take for all names together, apart from matches that are as quick as they should be."""
_QUICK = 0.01
_MATCHED: ContextVar[dict[str, dict[str, None]] | None] = ContextVar("matched", default=None)


class Pattern:
    """A regular expression whose matches take limited time.

    Args:
        text: the expression.
        source: what it stands in, for errors; '' where the user has given it.

    Raises:
        TuningError: it is no regular expression.
    """

    def __init__(self, text: str, source: str = "") -> None:
        self.text, self._source, self._left = text, f" in {source}" if source else "", SECONDS
        try:
            re.compile(text)  # whose language is the one that is promised
            self._compiled = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise TuningError(
                f"{_short(text)}{self._source} is no regular expression ({error}): escape it or give a list of "
                "suffixes."
            ) from None

    def fullmatch(self, name: str) -> bool:
        """Tell whether the whole of a name matches.

        Raises:
            TuningError: the pattern takes too long.
        """
        return _noted(self.text, name, self._limited(self._compiled.fullmatch, name) is not None)

    def match(self, name: str) -> Any:
        """Return the match at the start of a name, if there is one.

        Raises:
            TuningError: the pattern takes too long.
        """
        return self._limited(self._compiled.match, name)

    def _limited(self, function: Callable[..., Any], name: str) -> Any:
        begin = time.thread_time()
        try:
            found = function(name, timeout=self._left)
        except (TimeoutError, MemoryError):
            raise TuningError(
                f"{_short(self.text)}{self._source} takes too long to match {_short(name)}: write it without "
                "repetitions inside of repetitions, or give a list of suffixes."
            ) from None
        spent = time.thread_time() - begin
        self._left = max(self._left - spent, _QUICK) if spent > _QUICK else self._left
        return found


class Resolved(str):
    """A regular expression of a file that says which names it has matched, so that it need not be run again.

    Args:
        text: the expression.
        entries: what it has matched, packed.
    """

    def __new__(cls, text: str, entries: Sequence[Entry] = ()) -> "Resolved":
        """Return the text, with its names."""
        made = super().__new__(cls, text)
        vars(made)["names"] = Names(entries)
        return made

    def fullmatch(self, name: str) -> bool:
        """Tell whether the file says that the whole of a name matches."""
        return _noted(str(self), name, WRAPPERS.sub("", name) in vars(self)["names"])


@lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """Return the `Pattern` of a text, the same one for equal texts."""
    return Pattern(text)


def matcher(text: str) -> Pattern | Resolved:
    """Return what tells which names a text matches: its `Pattern`, or what a file says."""
    return text if isinstance(text, Resolved) else pattern(text)


@contextmanager
def matches_noted() -> Iterator[dict[str, dict[str, None]]]:
    """Note which names each pattern matches from now on: the pattern -> the names, without what wrappers put in."""
    noted: dict[str, dict[str, None]] = {}
    token = _MATCHED.set(noted)
    try:
        yield noted
    finally:
        _MATCHED.reset(token)


def _noted(text: str, name: str, matches: bool) -> bool:
    if (noted := _MATCHED.get()) is not None:
        names = noted.setdefault(text, {})
        if matches:
            names[WRAPPERS.sub("", name)] = None
    return matches


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
