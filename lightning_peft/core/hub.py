"""Opens what is named by a folder, a hub id or an installed package: tokenizers, models, files."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line


def load_tokenizer(backbone: nn.Module, name: str | None, reason: str) -> Any:
    """Return the tokenizer of a folder or hub id, or else the one that lies beside the backbone's weights.

    Raises:
        TuningError: none is found; ``reason`` says what it was wanted for.
    """
    from transformers import AutoTokenizer

    place = name or getattr(getattr(backbone, "config", None), "_name_or_path", "")
    if not place:
        raise TuningError(f"{reason} needs the words of the model: give tokenizer= (a folder or hub id).")
    try:
        return AutoTokenizer.from_pretrained(resolve(place))
    except (OSError, ValueError) as error:
        raise TuningError(f"no tokenizer at {place!r} ({first_line(error)}): give tokenizer=.") from None


def resolve(name: str) -> str:
    """Return a folder or hub id as it is, and for ``package://NAME/FOLDER`` the folder in that installed package.

    Raises:
        TuningError: there is no such package or folder.
    """
    if not name.startswith("package://"):
        return name
    package, _, folder = name.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package)
    places = [Path(place) / folder for place in (spec.submodule_search_locations or ())] if spec is not None else []
    for place in places:
        if place.is_dir():
            return str(place)
    raise TuningError(f"{name} names no folder of an installed package: pip install {package.replace('_', '-')}.")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from telling, while it loads a model, that the head is new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
