"""Handles the signals by which a batch system asks a run to end: the handler sets a flag and does nothing else.

Standard library only, so that the console script can install it before anything heavy is imported: a signal that comes
during ``import torch`` would otherwise kill the process. Data-loader workers inherit the handler and ignore the signals
that the batch system sends to every process of a step.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP = (signal.SIGUSR1, signal.SIGTERM) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)
"""A warning before the time limit (``--signal=USR1@300``), and pre-emption or cancelling."""

_state = {"pid": 0, "received": 0}


def install_handlers() -> None:
    """Install handlers that set this process's flag at the signals of `STOP`."""
    if threading.current_thread() is not threading.main_thread():
        return
    _state["pid"] = os.getpid()
    for number in STOP:
        signal.signal(number, _handle)
    # Python gives signals back to the system when it ends, and a second one would then kill a run that is finished.
    atexit.unregister(_ignore)
    atexit.register(_ignore)


def uninstall() -> None:
    """Give the signals back to the system and forget those that came."""
    for number in STOP:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
    _state["received"] = 0


def received() -> int:
    """Return the number of the latest signal that came, or 0."""
    return _state["received"]


@contextmanager
def held_back() -> Iterator[None]:
    """Hold the signals back; processes that are started inside never get them (a mask is inherited, also by exec)."""
    if not _state["pid"] or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore() -> None:
    for number in STOP:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, _: FrameType | None) -> None:
    if os.getpid() == _state["pid"]:
        _state["received"] = number
