"""The commands of the console script: how they import what they need, and how they fail."""

import gc
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning_peft.commands import lightning_words


@contextmanager
def imports() -> Iterator[None]:
    """Import what a command needs, and keep it out of every search for garbage, since it stays.

    Such searches take a quarter of the time of an import, and as long again when the process ends. Where torch is there
    already, another program has called us, whose objects are its own.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Print one red sentence to stderr and end."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(sentence, style="bold red"))
    raise SystemExit(code)


def refusal(error: BaseException) -> BaseException | None:
    """Return the error of ours that this one came from, or None."""
    from lightning_peft.core.errors import TuningError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TuningError):
        cause = cause.__cause__ or cause.__context__
    return cause


def is_misfit(error: BaseException) -> bool:
    """Tell whether a task or its data have failed at what they were given by the other."""
    places = tuple(str(Path(__file__).parents[1] / folder) for folder in ("tasks", "data"))
    frames = traceback.extract_tb(error.__traceback__)
    kinds = (IndexError, KeyError, ValueError, NotImplementedError)
    return isinstance(error, kinds) and any(frame.filename.startswith(places) for frame in frames)


def sentence(error: Exception) -> str:
    """Return the message of an error for a user, in one sentence."""
    if (cause := refusal(error)) is not None:
        return str(cause)
    if (known := lightning_words.said(error) or lightning_words.objection(error)) is not None:
        return known
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)[:100]!r} cannot be used ({error.strerror}): give another path."
    first = (str(error).strip().splitlines() or [""])[0]
    if is_misfit(error):
        reason = f"{type(error).__name__}: {first[:200]}".rstrip(".: ")
        return (
            f"a batch of the data does not fit the task ({reason}): give a model and data that belong together "
            "(--debug shows the place)."
        )
    if re.search(
        r"Connection (closed|reset|refused)|Timed out waiting|collective operation timeout|timed out", str(error)
    ):
        return (
            "waits for a rank that has died or stands still, the one that does not say this: see its log, and give the "
            f"strategy a longer timeout= if it is only slow ({first[:200]})"
        )
    return f"{type(error).__name__}: {first} (--debug shows where)"
