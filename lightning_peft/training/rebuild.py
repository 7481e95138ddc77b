"""Builds methods, modules and backbones from delta files alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.delta_file import CLASS_PATH, MATCHED, meta_of, read_checkpoint, read_delta
from lightning_peft.core.delta_load import load_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_model, model_class
from lightning_peft.core.pattern import Resolved
from lightning_peft.training import lifecycle, patches, plain_load
from lightning_peft.training.method import Method

M = TypeVar("M", bound=L.LightningModule)


def methods_of(meta: Mapping[str, Any]) -> list[Method]:
    """Return new methods, as the metadata of a delta describes them. A file can name no code outside of this package.

    Raises:
        TuningError: the class of a method is a user's own and has not been imported, or has no such argument, or there
            are several deltas, each of which is to compute without the others.
    """
    apart = [entry["init_args"].get("name") for entry in meta["methods"] if entry.get("apart")]
    if len(set(apart)) > 1:
        raise TuningError(
            f"the file holds {len(set(apart))} deltas that were trained side by side and do not compute together: load "
            f"one, as load_delta(model, file, name={apart[0]!r})."
        )
    for entry in meta["methods"]:
        if entry["class_path"].startswith("lightning_peft.methods."):
            with suppress(ImportError):  # what is not there is unknown below
                import_module(entry["class_path"].rpartition(".")[0])
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(Method)}
    methods = []
    for entry in meta["methods"]:
        if entry["class_path"] not in known:
            raise TuningError(
                f"the delta was trained with {entry['class_path']}, which is not imported: import it first."
            )
        try:
            methods.append(known[entry["class_path"]](**_arguments(entry)))
        except TypeError as error:
            raise TuningError(
                f"the delta gives {entry['class_path']} arguments that it has not here ({error}): use the version that "
                "wrote it."
            ) from None
    return methods


def _arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method of a file, patterns with the names that they have matched."""
    given: dict[str, Any] = entry["init_args"]
    patterns = {name: Resolved(given[name], names) for name, names in entry.get(MATCHED, {}).items()}
    return {**given, **patterns, "backbone": entry["backbone"] or None}


def load_from_checkpoint(cls: type[M], path: str | Path, *args: Any, **kwargs: Any) -> M:
    """Build a LightningModule of the user's class from a delta checkpoint.

    ``cls.load_from_checkpoint`` knows nothing of methods, so a plain class would miss the grafts: here the methods of
    the file are applied when the module has been built, before the delta is loaded. Arguments are those of Lightning.

    Raises:
        TuningError: the file is no whole delta, or does not fit the module.
    """
    checkpoint = read_checkpoint(path)
    methods = methods_of(meta_of(checkpoint, str(path)))
    with _applying(_built_class(cls, checkpoint), methods):
        loaded: M = plain_load.load(cls, path, *args, **kwargs)
        return loaded


def from_delta(path: str | Path, backbone: nn.Module | str | None = None) -> nn.Module:
    """Return a transformers model tuned as a delta file says, in eval mode.

    Args:
        path: a delta, as safetensors or checkpoint, of one backbone.
        backbone: the model, or its folder or hub id; None: what the delta was trained on.

    Raises:
        TuningError: the delta also holds tensors outside of the backbone, or does not fit, or the arguments are in
            the wrong order.
    """
    if isinstance(path, nn.Module):
        raise TuningError(
            f"from_delta has a {type(path).__name__} where the file is to be: call from_delta(path, model)."
        )
    _, meta = read_delta(path)
    if len(meta["backbones"]) != 1:
        raise TuningError(f"{path} tunes {len(meta['backbones'])} backbones: build the module and use load_delta.")
    (identity,) = meta["backbones"].values()
    model = backbone if isinstance(backbone, nn.Module) else pretrained(identity, backbone, str(path))
    for method in methods_of({"methods": [entry | {"backbone": ""} for entry in meta["methods"]]}):
        method.apply(model)
    load_delta(model, path)
    return model.eval()


def pretrained(identity: Mapping[str, Any], name: str | None, source: str) -> nn.Module:
    """Return the backbone that a delta file names, from its folder, or from another one.

    Args:
        identity: what the file says of it.
        name: a folder or hub id; None: what the file names.
        source: the file, for messages.

    Raises:
        TuningError: the file does not say where it came from.
    """
    kind = model_class(identity["class"])
    name = name or identity["name_or_path"]
    if kind is None or not name:
        raise TuningError(f"{source} does not say where its {identity['class']} came from: give backbone=.")
    labels = {k: identity["config"][k] for k in ("id2label", "label2id") if identity["config"].get(k)}
    if "id2label" in labels:
        labels["id2label"] = {int(k): v for k, v in labels["id2label"].items()}
    model: nn.Module = load_model(kind, name, **labels)  # the delta brings the head
    config, padding = structure.config_of(model), identity["config"].get("pad_token_id")
    if padding is not None and structure.setting(config, "pad_token_id") is None:
        config.pad_token_id = padding  # a task gives one to a model that has none
    return model


def _subclasses(cls: type[Method]) -> Iterator[type[Method]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _built_class(cls: type[L.LightningModule], checkpoint: Mapping[str, Any]) -> type[L.LightningModule]:
    """Return the class that Lightning will build: the CLI writes a subclass's path into the hyper-parameters."""
    path = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).get(CLASS_PATH)
    stack = [cls]
    while stack:
        kind = stack.pop()
        if f"{kind.__module__}.{kind.__qualname__}" == path:
            return kind
        stack.extend(kind.__subclasses__())
    return cls


@contextmanager
def _applying(cls: type[L.LightningModule], methods: list[Method]) -> Iterator[None]:
    """Apply the methods between the building of a module of this class and the loading of its weights."""

    def on_load_checkpoint(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        lifecycle.extend_hooks(module).methods.extend(methods)
        lifecycle.apply_methods(module)
        # The instance's hook, which is extended by now, calls the class's again: that must be the user's by then.
        restore()
        module.on_load_checkpoint(checkpoint)

    with patches.patched(cls, "on_load_checkpoint", on_load_checkpoint) as restore:
        yield
