"""Applies an adapter of PEFT to a model, as a method and its delta."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft
from lightning_peft.core import anatomy, select, structure
from lightning_peft.core.delta import collect
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint, same_weights
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.tuning import Tuning
from lightning_peft.interop import adapter_config, folder
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.converters import CONVERTERS, Converter
from lightning_peft.interop.converters.base import Parts, check_names
from lightning_peft.interop.converters.tokens import filled, split
from lightning_peft.interop.experts import stack
from lightning_peft.interop.export import skipped
from lightning_peft.interop.names import PREFIX, PROMPT_PREFIX, Names, strip
from lightning_peft.interop.task_types import AUTO_CLASSES
from lightning_peft.methods.trainable_tokens import TrainableTokens

_COPIES = re.compile(r"\.(?:original_module|modules_to_save)\.")
"""What bias='all' of PEFT writes beside a module that is saved whole: it is never read."""


def from_peft(model: nn.Module, path: str | Path, allow_other_base: bool = False) -> TuningMethod:
    """Apply to ``model`` the method that an adapter folder of PEFT describes, and load what it has trained.

    Args:
        model: the plain base model, or a LightningModule that holds it.
        path: the folder.
        allow_other_base: load it though the base has another name, or other weights, than the one that it was
            trained on; shapes and names must fit all the same.

    Returns:
        The method. One that puts tokens into the input prepares batches: ``model(**method.prepare(batch))``. For a LoRA
        with trained tokens it is the LoRA; a TrainableTokens is applied beside it.

    Raises:
        TuningError: the base differs, tensors are missing or unknown, or there is no twin; nothing has changed then.
    """
    return apply_adapter(model, folder.read_adapter(Path(path)), allow_other_base)


def apply_adapter(model: nn.Module, adapter: PeftAdapter, allow_other_base: bool = False) -> TuningMethod:
    """Apply an adapter that has been read; see `from_peft`."""
    backbone = select.backbone_of(model)
    if Tuning.of(backbone) is not None:
        raise TuningError(f"{type(backbone).__name__} is tuned already: import an adapter into a plain model.")
    names, words, read = Names(backbone), None, adapter
    if adapter.config["peft_type"] == "LORA":
        adapter, words = split(stack(adapter, names), names)
    parts = _parts(adapter, names, allow_other_base)
    check_names(backbone, parts.layers, adapter.source)
    if not allow_other_base:
        _check_base(adapter, parts, names)
    converter = CONVERTERS[adapter.config["peft_type"]]
    arguments = converter.arguments(parts, names) | _heads(parts, names, converter)
    folder.check_config(read)
    methods: list[TuningMethod] = [getattr(lightning_peft, converter.method_of(parts))(**arguments)]
    if words is not None:
        methods.append(TrainableTokens(tokens=list(words.ids), exclude=arguments.get("exclude")))
    try:
        for method in methods:
            method.apply(backbone)
        given = converter.fill(parts, backbone, methods[0]) | parts.in_place
        if words is not None:
            given |= filled(words, backbone, methods[1])
        _fill(backbone, methods[0], given, parts)
    except BaseException:
        for method in reversed(methods):
            if method.is_applied(backbone):
                method.remove(backbone)
        raise
    return methods[0]


def _parts(adapter: PeftAdapter, names: Names, allow_other_base: bool) -> Parts:
    """Sort the tensors of an adapter by where they belong."""
    parts = Parts(adapter.config, {}, {}, {}, {}, adapter.source)
    unknown, given = [], set[str]()
    prefix = PROMPT_PREFIX if adapter_config.is_prompt(adapter.config) else PREFIX
    for key, tensor in sorted(adapter.tensors.items()):
        name, wrapped = strip(key, prefix)
        if _COPIES.search(name):
            continue
        place = names.locate(name)
        if place is None:
            if key == name:  # no prefix: a prompt
                parts.bare[key] = tensor
            else:
                unknown.append(name)
            continue
        module, part, called = place
        parts.called[module] = called
        if f"{module}.{part}" not in names.tensors:
            own = key.removeprefix(prefix).removesuffix(f".{part}")
            layer = own.replace(called, module, 1) if own.startswith(called) else own
            parts.layers.setdefault(layer, {})[part] = tensor
        elif wrapped and part != "bias":
            live = names.tensors[f"{module}.{part}"]
            if not _is_copy(live, tensor, f"{module}.{part}", adapter.source, allow_other_base):
                parts.in_place[names.first[id(live)]] = tensor
                given |= {name for name, other in names.tensors.items() if other is live}
        else:
            _put(parts, names, f"{module}.{part}", tensor)
    _check_tied(parts, names, given | {_full(names, key, prefix) for key in adapter.tensors})
    if names.in_memory and any(called in names.in_memory for called in parts.called.values()):
        parts.called |= {module: disk for module, disk in names.on_disk.items() if module not in parts.called}
    if unknown:
        near = select.near(unknown[0], names.modules)
        raise TuningError(
            f"{adapter.source} has {len(unknown)} tensors for which {type(names.model).__name__} has no module, e.g. "
            f"{unknown[0]}{near}: it was made for another base."
        )
    return parts


def _full(names: Names, key: str, prefix: str) -> str:
    place = names.locate(strip(key, prefix)[0])
    return "" if place is None else f"{place[0]}.{place[1]}"


def _check_tied(parts: Parts, names: Names, given: set[str]) -> None:
    """Check that an adapter has all names of a tied tensor: PEFT unties it when it saves one of the modules.

    Raises:
        TuningError: it has trained one of the tied modules and left another.
    """
    for name in parts.in_place:
        twins = [other for other, tensor in names.tensors.items() if tensor is names.tensors[name]]
        left = [twin for twin in twins if twin not in given]
        if left:
            raise TuningError(
                f"{parts.source} replaces {name} and not {left[0]}, which is the same tensor in this model: PEFT has "
                "untied them, so untie them in the model's configuration (tie_word_embeddings)."
            )


def _is_copy(ours: Tensor, theirs: Tensor, name: str, source: str, allow_other: bool) -> bool:
    """Tell whether a table of the base, which PEFT saves with its update, is the one of this model.

    Raises:
        TuningError: it is not, and no other base is allowed, or it has another shape.
    """
    same_shape = ours.shape == theirs.shape
    if same_shape and torch.equal(ours.detach().cpu().to(theirs.dtype), theirs):
        return True
    if not (same_shape and allow_other):
        other = int((ours.detach().cpu().to(theirs.dtype) != theirs).any(-1).sum()) if same_shape else "all"
        raise TuningError(
            f"{source} brings {name} with it, {list(theirs.shape)}, and {other} of the rows are not those of this "
            f"model, {list(ours.shape)}: build it with as many words; where the rows of new words were drawn anew, "
            "allow_other_base=True takes those of the adapter."
        )
    return False


def _put(parts: Parts, names: Names, name: str, tensor: Tensor) -> None:
    """Keep a tensor of the base under the name that a delta has for it; copies of a tied one must agree."""
    live = names.tensors[name]
    if live.shape != tensor.shape:
        raise TuningError(
            f"{parts.source} has {name} of shape {list(tensor.shape)}, this model of {list(live.shape)}: build the "
            "model with as many classes or words as the adapter was trained with."
        )
    first = names.first[id(live)]
    if first in parts.in_place and not torch.equal(parts.in_place[first], tensor):
        other = next(each for each, held in names.tensors.items() if held is live and each != first)
        raise TuningError(
            f"{parts.source} has two values for {first} and {other}, which are one tensor in this model: PEFT has "
            "trained the copies apart, so untie them in the model's configuration."
        )
    parts.in_place[first] = tensor


def _check_base(adapter: PeftAdapter, parts: Parts, names: Names) -> None:
    """Check that the model is the one that the adapter was trained on, as far as the adapter says."""
    model: Any = names.model
    hint = "load that one, or allow_other_base=True"
    known = adapter.header.get("fingerprint")
    if known is not None:
        if not same_weights(fingerprint(model, skipped(names, parts.in_place)), known):
            base = adapter.config["base_model_name_or_path"]
            raise TuningError(
                f"{adapter.source} was trained on another base{f' ({base})' if base else ''} than this "
                f"{type(model).__name__}, whose weights differ: {hint}."
            )
        return
    kind = (adapter.config["auto_mapping"] or {}).get("base_model_class")
    if kind not in (None, type(model).__name__):
        raise TuningError(f"{adapter.source} was trained on a {kind}, not a {type(model).__name__}: {hint}.")
    theirs = adapter.config["base_model_name_or_path"] or ""
    ours = structure.name_or_path(model)
    if theirs and ours and _last(theirs) != _last(ours):
        raise TuningError(f"{adapter.source} was trained on {theirs}, and this model is {ours}: {hint}.")


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()


def _heads(parts: Parts, names: Names, converter: Converter) -> dict[str, Any]:
    """Return the arguments that say which tensors of the base are trained besides."""
    head = [name for name in anatomy.head_names(names.model) if name.rpartition(".")[0] not in parts.layers]
    arguments: dict[str, Any] = {}
    absent = [name for name in head if name not in parts.in_place]
    parameters = {name for name, _ in names.model.named_parameters()}
    if absent:  # PEFT has left the head alone, or trained its bias alone
        roots = sorted({name.partition(".")[0] for name in head})
        whole = {name for name in parameters if name.partition(".")[0] in roots} == set(absent)
        chosen = [rf"{re.escape(r)}(\..*)?" for r in roots] if whole else [re.escape(name) for name in absent]
        arguments["exclude"] = "|".join(chosen)
    also = [name for name in parts.in_place if name not in head]
    also = [n for n in also if n in parameters and not (n.endswith(".bias") and converter.trains_bias(parts, n))]
    if also:
        arguments["also_train"] = _regex(also, parameters)
    return arguments


def _regex(chosen: list[str], names: set[str]) -> str:
    """Return a regex for exactly these names: those of whole modules, or one by one."""
    modules = sorted({name.rpartition(".")[0] for name in chosen})
    whole = "|".join(rf"{re.escape(module)}\..*" for module in modules)
    if {name for name in names if re.fullmatch(whole, name)} == set(chosen):
        return whole
    return "|".join(re.escape(name) for name in chosen)


def _fill(model: nn.Module, method: TuningMethod, given: dict[str, Tensor], parts: Parts) -> None:
    """Copy the tensors of the adapter into the delta of the model, after checking that each has its place."""
    live = collect(model)
    if missing := sorted(live.keys() - given.keys()):
        raise TuningError(
            f"{parts.source} lacks {len(missing)} of {len(live)} tensors, e.g. {missing[0]}: take another copy."
        )
    odd = sorted(given.keys() - live.keys()) or _unread(parts, given)
    if odd:
        raise TuningError(
            f"{parts.source} has {odd[0]}, for which {type(method).__name__} has no place: it was made for another "
            "base, or by a newer PEFT."
        )
    for name, tensor in given.items():
        if live[name].shape != tensor.shape:
            raise TuningError(
                f"{parts.source} has {name} of shape {list(tensor.shape)}, this model of {list(live[name].shape)}: it "
                "was made for another base."
            )
        if live[name].is_floating_point() != tensor.is_floating_point():
            raise TuningError(
                f"{parts.source} has {name} in {tensor.dtype}, this model in {live[name].dtype}: take another copy."
            )
    with torch.no_grad():
        for name, tensor in given.items():
            live[name].copy_(tensor)


def _unread(parts: Parts, given: dict[str, Tensor]) -> list[str]:
    """Return the tensors of the file that nothing in ``given`` is taken from."""
    read = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    every = {f"{m}.{part}": t for m, entry in parts.layers.items() for part, t in entry.items()} | parts.bare
    return sorted(name for name, tensor in every.items() if tensor.untyped_storage().data_ptr() not in read)


def load_base(adapter: PeftAdapter, backbone: str | None = None) -> nn.Module:
    """Load the model that an adapter was trained on.

    Args:
        adapter: says the class and the task, and where the model came from.
        backbone: folder or hub id of the model; None: what the adapter names.

    Raises:
        TuningError: the adapter does not say what it was trained on.
    """
    from lightning_peft.core.hub import load_model, model_class

    name = backbone or adapter.config["base_model_name_or_path"]
    kind = (adapter.config["auto_mapping"] or {}).get("base_model_class")
    kind = kind or AUTO_CLASSES.get(adapter.config["task_type"] or "")
    cls = model_class(kind or "")
    if not name or cls is None:
        raise TuningError(f"{adapter.source} does not say what model it was trained on: give --backbone.")
    heads = [t for key, t in adapter.tensors.items() if key.endswith(".weight") and ".lora_" not in key and t.ndim == 2]
    labels: dict[str, Any] = {}
    if heads and adapter.config["task_type"] in ("SEQ_CLS", "TOKEN_CLS"):
        labels = {"num_labels": min(t.shape[0] for t in heads)}
    return load_model(cls, name, **labels)  # the adapter brings the head
