"""Loads tokenizers, image processors, configurations and models from a folder, a hub id or an installed package."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line
from lightning_peft.core.structure import name_or_path

_ABSENT = " that this machine has; what a login node downloads into an HF_HOME on the shared disk, all nodes have"


def load_tokenizer(name: str, remedy: str = "give its folder or hub id") -> Any:
    """Return the tokenizer of a folder, hub id or ``package://NAME/FOLDER``.

    Raises:
        TuningError: there is none.
    """
    from transformers import AutoTokenizer

    with _opening(f"no tokenizer at {name!r}", remedy):
        return AutoTokenizer.from_pretrained(resolve(name))


def tokenizer_of(backbone: nn.Module, name: str | None, reason: str) -> Any:
    """Return the tokenizer of a folder or hub id, or else the one that lies beside the backbone's weights.

    Raises:
        TuningError: none is found; ``reason`` says what it was wanted for.
    """
    place = name or name_or_path(backbone)
    if not place:
        raise TuningError(f"{reason} needs the words of the model: give tokenizer= (a folder or hub id).")
    return load_tokenizer(place, "give tokenizer=")


def load_image_processor(name: str) -> Any:
    """Return the image processor, which computes by PIL, of a folder, hub id or ``package://NAME/FOLDER``.

    Raises:
        TuningError: there is none.
    """
    from transformers import AutoImageProcessor

    with _opening(f"{name!r} has no image processor", "give a vision model, or image_size="):
        return AutoImageProcessor.from_pretrained(resolve(name), backend="pil")


def load_config(name: str, what: str = "model", **entries: Any) -> Any:
    """Return the configuration of a folder, hub id or ``package://NAME/FOLDER``; ``entries`` override what it says.

    Raises:
        TuningError: there is no such model; ``what`` says what it was to be.
    """
    from transformers import AutoConfig

    with _opening_model(name, what):
        return AutoConfig.from_pretrained(resolve(name), **entries)


def load_model(kind: Any, name: str, what: str | None = None, **options: Any) -> Any:
    """Return the model of a folder, hub id or ``package://NAME/FOLDER``; a head of another shape than saved is new.

    Raises:
        TuningError: there is no such model, or none of this class; ``what`` says what it was to be.
    """
    with _opening_model(name, what or kind.__name__), quiet_loading():
        return kind.from_pretrained(resolve(name), ignore_mismatched_sizes=True, **options)


def model_without_weights(kind: Any, name: str, what: str, dtype: str, **entries: Any) -> Any:
    """Return the model that a configuration describes, its weights in ``dtype`` ("auto": as saved) but not read.

    Raises:
        TuningError: there is no such model, or none of this class; ``what`` says what it was to be.
    """
    config = load_config(name, what, **entries)
    with _opening_model(name, what):
        return kind.from_config(config, dtype=(config.dtype or "float32") if dtype == "auto" else dtype)


def model_class(name: str) -> Any:
    """Return the class of models of transformers that has this name; None where none has it."""
    import transformers

    try:
        kind = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs what is not installed
        return None
    is_model = isinstance(kind, type) and (issubclass(kind, nn.Module) or name.startswith("AutoModel"))
    return kind if is_model else None


@contextmanager
def _opening(problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except TuningError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise TuningError(f"{problem} ({first_line(error)}): {remedy}.") from None


@contextmanager
def _opening_model(name: str, what: str) -> Iterator[None]:
    remedy = "give a folder or hub id" + ("" if Path(resolve(name)).is_dir() else _ABSENT)
    with _opening(f"no {what} can be made of {name!r}", remedy):
        yield


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


def padding_id(name: str, config: Any) -> int | None:
    """Return the id of the tokenizer's padding token, or where it has none, of its end-of-sequence token."""
    try:
        tokenizer = load_tokenizer(name)
    except TuningError:
        end = config.eos_token_id
        return end[0] if isinstance(end, list) else end
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
