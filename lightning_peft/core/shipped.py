"""The configurations that come with the package by name: ``lora``, ``methods/lora``, ``configs/methods/lora.yaml``."""

from collections import Counter
from pathlib import Path, PurePosixPath


def folder() -> Path:
    """Return where they are: in an installed package beside its modules, in a checkout beside the package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def configurations() -> dict[str, Path]:
    """Return them by the shortest name that means one alone, in the order of their folders."""
    found = {path.relative_to(folder()).with_suffix("").as_posix(): path for path in sorted(folder().rglob("*.yaml"))}
    times = Counter(PurePosixPath(name).name for name in found)
    return {short if times[short := PurePosixPath(name).name] == 1 else name: path for name, path in found.items()}


def find(name: str | Path) -> Path | None:
    """Return the file that is meant: one that exists, else the configuration of that name; None: there is neither."""
    if Path(name).is_file():
        return Path(name)
    asked = PurePosixPath(str(name).removeprefix("configs/"))
    asked = asked.with_suffix("") if asked.suffix in (".yaml", ".yml") else asked
    for short, path in configurations().items():
        if str(asked) in (short, path.relative_to(folder()).with_suffix("").as_posix()):
            return path
    return None
