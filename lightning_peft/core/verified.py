"""Remembers which files were found whole, so that one that is read again and again is compared with its checksums once.

A file is the same if its place, its size and its times are. One that was written within the last two seconds is not
remembered: another write within a tick of the file system's clock would not show in its times.
"""

import time
from pathlib import Path

_SETTLED = 2_000_000_000
"""How old a file must be [ns]."""
_MOST = 4096
_WHOLE: dict[Path, tuple[int, ...]] = {}
"""Path -> the stamp of the file that was found whole there."""


def stamp(path: Path) -> tuple[int, ...]:
    """Return what tells a file from another one, or from itself before it was written to."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_whole(path: Path, now: tuple[int, ...]) -> bool:
    """Tell whether the file of this stamp has been found whole."""
    return _WHOLE.get(path.absolute()) == now


def remember(path: Path, before: tuple[int, ...]) -> None:
    """Note that a file is whole, unless it has changed since ``before``, the stamp of when it was opened."""
    if stamp(path) == before and time.time_ns() - max(before[3:]) > _SETTLED:
        if len(_WHOLE) >= _MOST:
            _WHOLE.clear()
        _WHOLE[path.absolute()] = before
