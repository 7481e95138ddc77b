"""Finds the layers that the tensors of a LoRA adapter of PEFT belong to, and checks their shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.interop.converters.base import Parts
from lightning_peft.interop.names import BASE_LAYER, LAYERS, Names
from lightning_peft.interop.patterns import is_target, selects
from lightning_peft.updates.layout import Layout
from lightning_peft.updates.low_rank import shape_of
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS


def found_in(parts: Parts, names: Names) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return, for each update in the file, our name of it -> PEFT's key, and the shape [..., out, in] of the matrix."""
    found = {}
    for path, module in names.modules.items():
        if isinstance(module, LAYERS):
            if path in parts.layers:
                found[path] = (path, _shape(module))
            continue
        depth = sum(key == path or key.startswith(f"{path}.{BASE_LAYER}") for key in parts.layers)
        own = targeted(parts, path, module)[:depth]
        if depth and isinstance(module, nn.MultiheadAttention):
            own = ["in_proj_weight"]  # which is refused
        for name, key in wrapped_keys(path, module, own).items() if own else ():
            layout = Layout.of(module, name)
            if layout.product is not None:
                raise TuningError(
                    f"{parts.source} has an update of {path}.{name} as of stacked experts, which it is not, so its "
                    "ranks are of slices: merge it with PEFT, or train it here."
                )
            shape = tuple(layout.matrix(module.get_parameter(name).detach()).shape)
            found[f"{path}.{name}"] = (key, shape)
    return found


def targeted(parts: Parts, path: str, module: nn.Module) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` names."""
    wanted = parts.config["target_parameters"] or []
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return [name for name in own if selects(wanted, f"{parts.called.get(path, path)}.{name}")]


def by_parameter(parts: Parts, path: str, module: nn.Module | None) -> bool:
    """Tell whether a linear layer has an update since ``target_parameters`` names its weight; it is the same update."""
    return isinstance(module, nn.Linear) and targeted(parts, path, module) == ["weight"]


def called_in(parts: Parts, target: str, module: nn.Module | None) -> str:
    """Return the name of a target, which may be a module, in the file, which the patterns go by."""
    if by_parameter(parts, target, module):
        return f"{parts.called.get(target, target)}.weight"
    if target in parts.called:
        return parts.called[target]
    owner, _, leaf = target.rpartition(".")
    return f"{parts.called.get(owner, owner)}.{leaf}"


def check_layers(parts: Parts, names: Names, found: Mapping[str, Any]) -> None:
    """Check that the layers with tensors are those that the configuration names."""
    if not found:
        raise TuningError(f"{parts.source} has no tensor of LoRA: take another copy of the adapter.")
    expected = [
        name
        for name, module in names.modules.items()
        if isinstance(module, LAYERS)
        and (is_target(parts.config, parts.called.get(name, name)) or by_parameter(parts, name, module))
    ]
    expected += [
        f"{path}.{name}"
        for path, module in names.modules.items()
        if not isinstance(module, LAYERS)
        for name in targeted(parts, path, module)
    ]
    if parts.config["target_modules"] == "all-linear":  # older versions did not write out what that is
        return
    missing, odd = sorted(set(expected) - found.keys()), sorted(found.keys() - set(expected))
    if odd and parts.config["ensure_weight_tying"] and _is_tied(names, odd[0]):
        raise TuningError(
            f"{parts.source} uses ensure_weight_tying=True, by which {odd[0]} has the update of the table that it is "
            "tied to, which has no twin here: merge it with PEFT, or train without that table in target_modules."
        )
    other = [name for name in odd if targeted(parts, name, names.modules[name])] if odd else []
    if other:
        raise TuningError(
            f"{parts.source} has an update of a parameter of {other[0]} ({type(names.modules[other[0]]).__name__}) by "
            "target_parameters, which has no twin here: name it in target_modules, or merge it with PEFT."
        )
    if odd:
        raise TuningError(
            f"{parts.source} has tensors for {odd[0]}, which its configuration does not target: one of the two was "
            "changed, so take another copy."
        )
    if missing:
        raise TuningError(
            f"{parts.source} targets {missing[0]} of this model but has no tensors for it ({len(missing)} such "
            "layers): it is not whole, or was made for another base."
        )


def _is_tied(names: Names, path: str) -> bool:
    weight = names.tensors.get(f"{path}.weight")
    return sum(tensor is weight for tensor in names.tensors.values()) > 1


def check_parts(parts: Parts, key: str, shapes: Mapping[str, tuple[int, ...]], r: int) -> None:
    """Check that a layer has all its tensors, in the shapes of the host and the rank."""
    have = parts.layers.get(key, {})
    if lacking := sorted(shapes.keys() - have.keys()):
        raise TuningError(f"{parts.source} lacks {lacking[0]} of {key}: take another copy of the adapter.")
    for part, shape in shapes.items():
        if list(have[part].shape) != list(shape):
            raise TuningError(
                f"{parts.source} has {part} of {key} in shape {list(have[part].shape)}, but rank {r} and this layer "
                f"make it {list(shape)}: it was made for another base, or its configuration was changed."
            )


def add_biases(parts: Parts, names: Names, scales: Mapping[str, float]) -> None:
    """Add the biases of updates (``lora_bias``) to those of their layers, which is what they compute.

    Args:
        parts: the adapter, in which the biases of the layers become tensors that it replaces.
        names: of the model.
        scales: layer -> by what its update is multiplied.

    Raises:
        TuningError: a layer has none, or one of another shape.
    """
    for layer, scale in scales.items():
        change = parts.layers.get(layer, {}).pop("lora_B.bias", None)
        own = names.tensors.get(f"{layer}.bias")
        if change is None or own is None or change.shape != own.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (change, own)]
            raise TuningError(
                f"{parts.source} uses lora_bias=True, and the update of {layer} has a bias of shape {shapes[0]}, the "
                f"layer one of {shapes[1]}, to which it would be added here: train it without."
            )
        name = names.first[id(own)]
        parts.in_place[name] = parts.in_place.get(name, own.detach().cpu()) + scale * change


def _shape(host: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, with a mark before that of an embedding or a convolution."""
    if isinstance(host, nn.Embedding):
        return (0, *shape_of(host))
    return (-host.groups, *shape_of(host)) if isinstance(host, CONVOLUTIONS) else shape_of(host)


def warn_of_padding(model: nn.Module, targets: Iterable[str], what: str) -> None:
    """Warn where a convolution pads otherwise than by zeros, which the update of PEFT does until it is merged.

    Args:
        model: the backbone.
        targets: names of the layers.
        what: which adapter it is, for the message.
    """
    modules = dict(model.named_modules())
    for name in targets:
        host = modules.get(name)
        if isinstance(host, CONVOLUTIONS) and host.padding_mode != "zeros" and set(host.padding) != {0}:
            rank_zero_warn(
                f"{name} pads by {host.padding_mode!r}, and so does its update in {what} here, as in PEFT once it is "
                "merged; unmerged, PEFT pads the update's input by zeros, so that outputs differ: merge it there."
            )
            return


def file_shapes(shape: tuple[int, ...], r: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Return the part -> the shape that PEFT gives it, for a matrix or kernel of ``shape``."""
    magnitude: tuple[int, ...]
    if shape[0] == 0:
        _, out, inside = shape
        shapes: dict[str, tuple[int, ...]] = {"lora_embedding_A": (r, inside), "lora_embedding_B": (out, r)}
        magnitude = (out,)
    elif shape[0] < 0:
        groups, out, per_group, *kernel = shape
        ones = [1] * len(kernel)
        shapes = {"lora_A.weight": (r, -groups * per_group, *kernel), "lora_B.weight": (out, r // -groups, *ones)}
        magnitude = (1, out, *ones)
    elif len(shape) == 3:
        experts, out, inside = shape
        shapes = {"lora_A.weight": (r * experts, inside), "lora_B.weight": (out, r * experts)}
        magnitude = ()
    else:
        out, inside = shape
        shapes = {"lora_A.weight": (r, inside), "lora_B.weight": (out, r)}
        magnitude = (out,)
    return shapes | ({"lora_magnitude_vector": magnitude} if dora else {})


def wrapped_keys(path: str, host: nn.Module, names: list[str]) -> dict[str, str]:
    """Return where PEFT keeps the updates of matrices that a module reads itself.

    It wraps the module once for each of them, the first one innermost.

    Raises:
        TuningError: the module is torch's own attention.
    """
    if isinstance(host, nn.MultiheadAttention):
        raise TuningError(
            f"PEFT adds the update of the out-projection of {path} (nn.MultiheadAttention) twice, so the same matrices "
            "would compute something else: exclude it, or merge."
        )
    depth = len(names) - 1
    return {name: f"{path}{f'.{BASE_LAYER}' * (depth - i)}" for i, name in enumerate(names)}
