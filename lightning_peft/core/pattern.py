"""Regular expressions of names, which may come from a file: none of them runs without end.

Python's own ``re`` has no limit of time, and one pattern in a file could hang whoever loads it. ``regex``, which
transformers depends on, matches the same language and has one.
"""

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError

SECONDS = 1.0
"""How much time a pattern may take for all names together, apart from matches that are as quick as they should be."""
_QUICK = 0.01


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
        return self._limited(self._compiled.fullmatch, name) is not None

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


@lru_cache(maxsize=1024)
def pattern(text: str, source: str = "") -> Pattern:
    """Return the `Pattern` of a text, the same one for equal texts."""
    return Pattern(text, source)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
