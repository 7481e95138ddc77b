"""IA3: ``ia3_l`` of each layer, [out, 1] where its output is scaled and [1, in] where its input is.

Of a convolution it is [1, channels, 1 ...] in both cases, and the configuration alone says which.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.pattern import pattern
from lightning_peft.interop.converters.base import (
    Converter,
    Exported,
    Parts,
    changed,
    check_called,
    check_complete,
    graft_tensors,
    places,
)
from lightning_peft.interop.names import Names, selection
from lightning_peft.methods.ia3 import ScaledOutput
from lightning_peft.updates.layer_update import LINEAR
from lightning_peft.updates.low_rank import shape_of

PART = "ia3_l"
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_KINDS = (*LINEAR, *_CONVOLUTIONS)


class IA3Converter(Converter):
    """The vectors of the layers; PEFT's scale a whole output, where ours may leave out the queries of a fused one."""

    peft_type: ClassVar[str] = "IA3"
    methods: ClassVar[tuple[str, ...]] = ("IA3",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "target_modules": None,
    }

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the vectors, with 1 for features that are not scaled."""
        exported = Exported({})
        inputs = []
        for place in places(model, method):
            path, layer, graft, _ = changed(place)
            l = graft.get_parameter("l").detach()  # noqa: E741
            outward = isinstance(graft, ScaledOutput)
            shape = _shape(layer, outward)
            if shape is None:
                raise TuningError(
                    f"PEFT has IA3 of linear layers and of Conv2d and Conv3d, and {path} is a "
                    f"{type(layer).__name__}: exclude it, or merge."
                )
            check_called(model, path, "IA3")
            if not outward:
                inputs.append(path)
            missing = math.prod(shape) - len(l)  # the queries of a fused projection
            exported.layers[path] = {PART: torch.cat([l.new_ones(missing), l]).view(shape)}
            exported.delta |= graft_tensors(place)
        targets, ends = selection(exported.layers, names.modules), selection(inputs, names.modules)
        found = [name for name in exported.layers if name.endswith(tuple(ends))]  # as PEFT does, and no whole parts
        if isinstance(ends, list) and (found != inputs or not (isinstance(targets, str) or set(ends) <= set(targets))):
            ends = "|".join(map(re.escape, inputs))  # of lists, PEFT wants one to be in the other
        exported.config = {
            "fan_in_fan_out": any(isinstance(changed(place).layer, Conv1D) for place in places(model, method)),
            "feedforward_modules": ends,
            "target_modules": targets,
        }
        return exported

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the layers whose outputs and whose inputs are scaled."""
        outputs: list[str] = []
        inputs: list[str] = []
        for name, tensors in parts.layers.items():
            host = names.modules.get(name)
            if not isinstance(host, _KINDS) or tensors.keys() != {PART}:
                raise TuningError(
                    f"{parts.source} has {', '.join(tensors)} of {name}: a layer of IA3 is linear or a convolution and "
                    f"has {PART}."
                )
            check_called(names.model, name, "IA3")
            shape = list(tensors[PART].shape)
            convolves = isinstance(host, _CONVOLUTIONS)
            outward = not _is_inward(parts, name) if convolves else shape == _shape(host, True)
            if shape != _shape(host, outward):
                both = dict.fromkeys(str(_shape(host, way)) for way in ((outward,) if convolves else (True, False)))
                raise TuningError(
                    f"{parts.source} has {PART} of {name} in shape {shape}, and this layer makes it "
                    f"{' or '.join(both)}: it was made for another base."
                )
            (outputs if outward else inputs).append(name)
        if not parts.layers:
            raise TuningError(f"{parts.source} has no tensor of IA3: take another copy of the adapter.")
        check_complete(parts, names, _KINDS)
        head = set(anatomy.said_head_names(names.model) or [])
        linear = [n for n, m in names.modules.items() if isinstance(m, _KINDS) and f"{n}.weight" not in head]
        return {"target_modules": selection(outputs, linear), "feedforward_modules": selection(inputs, linear)}

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the vectors by the names of the grafts."""
        layers = map(changed, places(model, method))
        return {f"{start}l": parts.layers[path][PART].flatten() for path, _, _, start in layers}


def _shape(host: nn.Module, outward: bool) -> list[int] | None:
    """Return the shape of the vector that scales the output of a layer, or its input; None: PEFT has none."""
    if isinstance(host, _CONVOLUTIONS):
        return [1, host.out_channels if outward else host.in_channels, *[1] * len(host.kernel_size)]
    if not isinstance(host, LINEAR):
        return None
    out, inside = shape_of(host)
    return [out, 1] if outward else [1, inside]


def _is_inward(parts: Parts, name: str) -> bool:
    """Tell whether PEFT scales the input of a layer: the ends of names, as there, and no whole parts."""
    ends, called = parts.config["feedforward_modules"] or [], parts.called.get(name, name)
    return pattern(ends).fullmatch(called) if isinstance(ends, str) else called.endswith(tuple(ends))
