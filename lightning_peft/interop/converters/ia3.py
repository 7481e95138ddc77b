"""IA3: ``ia3_l`` of each layer, [out, 1] where its output is scaled and [1, in] where its input is."""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.interop.converters.base import (
    Converter,
    Exported,
    Parts,
    check_complete,
    delta_name,
    graft_tensors,
    places,
)
from lightning_peft.interop.names import Names, selection
from lightning_peft.methods.ia3 import ScaledOutput
from lightning_peft.updates.low_rank import shape_of

PART = "ia3_l"
_KINDS = (nn.Linear, Conv1D)


class IA3Converter(Converter):
    """The vectors of the layers; PEFT's scale a whole output, where ours may leave out the queries of a fused one."""

    peft_type: ClassVar[str] = "IA3"
    methods: ClassVar[tuple[str, ...]] = ("IA3",)

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the vectors, with 1 for features that are not scaled."""
        exported = Exported({})
        inputs = []
        for place in places(model, method):
            l = place.graft.get_parameter("l").detach()  # noqa: E741
            out, inside = shape_of(place.host)
            if isinstance(place.graft, ScaledOutput):
                vector = torch.cat([l.new_ones(out - len(l)), l]).view(out, 1)
            else:
                inputs.append(place.path)
                vector = l.view(1, inside)
            exported.layers[place.path] = {PART: vector}
            exported.delta |= graft_tensors(place)
        targets, ends = selection(exported.layers, names.modules), selection(inputs, names.modules)
        found = [name for name in exported.layers if name.endswith(tuple(ends))]  # as PEFT does, and no whole parts
        if isinstance(ends, list) and (found != inputs or not (isinstance(targets, str) or set(ends) <= set(targets))):
            ends = "|".join(map(re.escape, inputs))  # of lists, PEFT wants one to be in the other
        exported.config = {
            "fan_in_fan_out": any(isinstance(place.host, Conv1D) for place in places(model, method)),
            "feedforward_modules": ends,
            "target_modules": targets,
        }
        return exported

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the layers whose outputs and whose inputs are scaled, by the shapes of the vectors."""
        outputs: list[str] = []
        inputs: list[str] = []
        for name, tensors in parts.layers.items():
            host = names.modules.get(name)
            if not isinstance(host, _KINDS) or tensors.keys() != {PART}:
                raise TuningError(f"{parts.source} has {', '.join(tensors)} of {name}: IA3 here scales linear layers.")
            out, inside = shape_of(host)
            shape = list(tensors[PART].shape)
            if shape not in ([out, 1], [1, inside]):
                raise TuningError(
                    f"{parts.source} has {PART} of {name} in shape {shape}, and this layer makes it {[out, 1]} or "
                    f"{[1, inside]}: it was made for another base."
                )
            (outputs if shape == [out, 1] else inputs).append(name)
        if not parts.layers:
            raise TuningError(f"{parts.source} has no tensor of IA3: take another copy of the adapter.")
        check_complete(parts, names, _KINDS)
        head = set(anatomy.said_head_names(names.model) or [])
        linear = [n for n, m in names.modules.items() if isinstance(m, _KINDS) and f"{n}.weight" not in head]
        return {"target_modules": selection(outputs, linear), "feedforward_modules": selection(inputs, linear)}

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the vectors by the names of the grafts."""
        return {delta_name(place, "l"): parts.layers[place.path][PART].flatten() for place in places(model, method)}
