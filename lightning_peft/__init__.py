"""Parameter-efficient tuning as PyTorch Lightning plug-ins.

The public names are those of ``__init__.pyi``, the one list of them, for type checkers and for this file. They are
imported when they are first used, so that ``lightning-peft --help`` needs neither torch nor lightning.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_imports = ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
_MODULES = {name.name: line.module for line in _imports if isinstance(line, ast.ImportFrom) for name in line.names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
