"""Checks the values of a parsed command line that its parser lets pass: null for what cannot be, and ranges of numbers.

Ranges go by the names of arguments, which mean the same in all tasks, data and optimizers. Those of methods stand at
their fields, and are checked when a method is built.
"""

import math
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from string import Formatter
from typing import Any, get_args

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft.commands.parameters import Argument, arguments_of
from lightning_peft.core.arguments import Bounds
from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod

_RATE = Bounds(at_least=0, below=1e6)
_COUNT = Bounds(at_least=1, below=1e9)
_OURS = {
    **dict.fromkeys(("lr", "head_lr", "weight_decay", "momentum", "eps"), _RATE),
    **dict.fromkeys(("batch_size", "max_length", "max_new_tokens", "shots", "image_size", "num_beams"), _COUNT),
    **dict.fromkeys(("warmup", "validation_share", "test_share"), Bounds(at_least=0, at_most=1)),
    "num_workers": Bounds(at_least=0, below=1000),
    **dict.fromkeys(("pad_to_multiple_of", "step_size", "T_max", "total_iters", "T_0"), _COUNT),
    "seed": Bounds(at_least=0, below=2**32),
}
_TRAINER = {
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), _COUNT),
    **dict.fromkeys(("max_epochs", "max_steps", "num_sanity_val_steps"), Bounds(at_least=-1, below=1e12)),
    **dict.fromkeys(("min_epochs", "min_steps", "log_every_n_steps"), Bounds(at_least=0, below=1e12)),
    **dict.fromkeys(
        ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
        Bounds(at_least=0, below=1e12),
    ),
    "val_check_interval": Bounds(above=0, below=1e12),
    "gradient_clip_val": Bounds(at_least=0, below=1e12),
    "reload_dataloaders_every_n_epochs": Bounds(at_least=0, below=1e12),
    "num_nodes": Bounds(at_least=1, below=1e5),
    "devices": Bounds(at_least=-1, below=1e4),
}
_CALLBACKS = {("EarlyStopping", "patience"): Bounds(at_least=0), ("LearningRateFinder", "num_training_steps"): _COUNT}
_ANY = Bounds(below=1e12)


def check_values(config: Namespace, trainer: type) -> None:
    """Check the values of all classes that a command line names, and those of the Trainer.

    Raises:
        TuningError: one is null, not finite or out of range.
    """
    if not isinstance(config.get("trainer", Namespace()), Namespace):
        raise TuningError(
            f"trainer={config['trainer']!r} is no mapping of arguments: give trainer.max_epochs and others."
        )
    given = vars(config.get("trainer", Namespace()))
    check_registered(given)
    for name, value in given.items():
        _check(trainer, "Trainer", name, value, _TRAINER)
    _check_epochs(given)
    devices = given.get("devices", "auto")
    if not devices or (isinstance(devices, str) and not re.fullmatch(r"auto|-?\d+(\s*,\s*\d+)*", devices)):
        raise TuningError(f"Trainer's devices={devices!r} names none: give how many, their numbers, or auto.")
    for kind, given in _classes(config):
        if issubclass(kind, TuningMethod):
            continue
        if kind is L.Callback:
            raise TuningError("trainer's callbacks have one without a class: give its class_path.")
        own = kind.__module__.startswith(("lightning_peft.", "torch.optim."))
        for name, value in given.items():
            bounds = _CALLBACKS.get((kind.__name__, name))
            _check(kind, kind.__name__, name, value, _OURS if own else {name: bounds} if bounds else {})
        if issubclass(kind, ModelCheckpoint):
            _check_filename(given.get("filename"))


def _check_epochs(given: Mapping[str, Any]) -> None:
    """Check the arguments of a Trainer that say how long it trains, and how often it validates."""
    for unit in ("epochs", "steps"):
        least, most = given.get(f"min_{unit}"), given.get(f"max_{unit}")
        if least is not None and most is not None and 0 <= most < least:
            raise TuningError(
                f"Trainer's min_{unit}={least} is more than max_{unit}={most}: give a smaller or a larger one."
            )
    for name in ("val_check_interval", "max_time"):
        value = given.get(name)
        parts = value.split(":") if isinstance(value, str) else [*value.values()] if isinstance(value, dict) else []
        if parts and not any(str(part).strip("0") for part in parts):
            raise TuningError(f"Trainer's {name}={value!r} is no time: take more than 0.")


def _check_filename(name: Any) -> None:
    try:
        list(Formatter().parse(name if isinstance(name, str) else ""))
    except ValueError as error:
        raise TuningError(
            f"ModelCheckpoint's filename={name!r} is no pattern of a name ({error}): write a metric as "
            "{val_loss:.2f}, with both braces."
        ) from None


def check_registered(given: Mapping[str, Any]) -> None:
    """Check the names of what a Trainer looks up by name.

    Raises:
        TuningError: Lightning has none of that name.
    """
    known = {
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "profiler": ["simple", "advanced", "pytorch", "xla"],
    }
    for name, every in known.items():
        value = given.get(name)
        if isinstance(value, str) and value not in every:
            raise TuningError(f"Trainer's {name}={value[:60]!r} is unknown: take one of {', '.join(sorted(every))}.")


def check_seed(seed: Any) -> None:
    """Check the seed of a command line.

    Raises:
        TuningError: it is one that numpy does not take.
    """
    if not 0 <= int(seed or 0) < 2**32:
        raise TuningError(f"seed_everything={seed} is out of range: take 0 to {2**32 - 1}, or false for none.")


def _check(kind: type, called: str, name: str, value: Any, ranges: dict[str, Bounds]) -> None:
    said = f"{called}'s {name}={value!r}"
    if value is None and not takes_none(kind, name):
        raise TuningError(f"{said} is of another type: give {_named(arguments_of(kind)[name].hint)}.")
    if ranges and isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = ranges.get(name, _ANY)
        if not math.isfinite(value):
            raise TuningError(f"{said} is not finite: take {bounds}.")
        if not bounds.hold(value):
            raise TuningError(f"{said} is out of range: take {bounds}.")


def takes_none(kind: type, name: str) -> bool:
    """Tell whether an argument of a class may be None, by its annotation and its default."""
    one = arguments_of(kind).get(name, Argument(Any, None))
    linked = one.is_required  # what must be given is None here until another class gives it
    return linked or one.hint is Any or one.default is None or type(None) in (one.hint, *get_args(one.hint))


def _classes(value: Any) -> Iterator[tuple[type, dict[str, Any]]]:
    """Yield each class that a configuration names, with its arguments."""
    if isinstance(value, (Namespace, dict)):
        entries = vars(value) if isinstance(value, Namespace) else value
        kind, given = _class(entries.get("class_path")), entries.get("init_args")
        if kind is not None and isinstance(given, (Namespace, dict)):
            yield kind, vars(given) if isinstance(given, Namespace) else given
        for entry in entries.values():
            yield from _classes(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _classes(entry)


def _class(path: Any) -> type | None:
    if not isinstance(path, str) or "." not in path:
        return None
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return kind if isinstance(kind, type) else None


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
