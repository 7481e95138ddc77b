"""Methods whose tensors PEFT has as they are, layer by layer: they say themselves how it calls them (`core.twin`)."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.twin import Twin
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
from lightning_peft.interop.twins import TWINS
from lightning_peft.updates.layer_update import LINEAR
from lightning_peft.updates.read_layer import ReadLayer

_WHERE = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"}
)
"""Keys that say which layers have tensors, which the tensors say themselves."""


class TwinConverter(Converter):
    """Renames tensors and arguments."""

    twin: ClassVar[Twin]

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the tensors of each layer.

        Raises:
            TuningError: PEFT has no such layer.
        """
        exported = Exported({})
        for place in places(model, method):
            if isinstance(place.graft, ReadLayer) or not isinstance(place.host, self.twin.kinds):
                kind = " or ".join(kind.__name__ for kind in self.twin.kinds)
                raise TuningError(
                    f"PEFT has {self.peft_type} of layers that are called and are {kind}, which "
                    f"{place.path} ({type(place.host).__name__}) is not: exclude it, or merge."
                )
            tensors = place.graft.state_dict()
            _check_equal(self.twin, place.path, place.host)
            parts = self.twin.parts_of(place.host)
            exported.layers[place.path] = {part: tensors[name] for name, part in parts.items()}
            exported.delta |= graft_tensors(place)
        exported.config = {key: self.twin.theirs(name, vars(method)[name]) for name, key in self.twin.arguments.items()}
        exported.config["target_modules"] = selection(exported.layers, names.modules)
        if "fan_in_fan_out" in self.twin.defaults:
            exported.config["fan_in_fan_out"] = any(isinstance(place.host, Conv1D) for place in places(model, method))
        return exported

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the arguments, after seeing that the layers are those that the configuration names."""
        twin, config = self.twin, parts.config
        for key, default in twin.defaults.items():
            if key not in {*twin.arguments.values(), *twin.free, *_WHERE} and config[key] != default:
                raise TuningError(
                    f"{parts.source} uses {key}={config[key]!r}, which has no twin here: train it with "
                    f"{key}={default!r}, or merge it with PEFT."
                )
        for name, tensors in parts.layers.items():
            host = names.modules.get(name)
            wanted = set(twin.parts_of(host).values())
            if not isinstance(host, twin.kinds) or tensors.keys() != wanted:
                raise TuningError(
                    f"{parts.source} has {', '.join(tensors)} of {name}: a layer of {self.peft_type} is "
                    f"{' or '.join(kind.__name__ for kind in twin.kinds)} and has {', '.join(sorted(wanted))}."
                )
            _check_equal(twin, name, host)
        if not parts.layers:
            raise TuningError(f"{parts.source} has no tensor of {self.peft_type}: take another copy of the adapter.")
        check_complete(parts, names, twin.kinds)
        head = set(anatomy.said_head_names(names.model) or [])
        kinds = (*LINEAR, *twin.kinds)
        layers = [n for n, m in names.modules.items() if isinstance(m, kinds) and f"{n}.weight" not in head]
        arguments = {name: twin.ours(name, config[key]) for name, key in twin.arguments.items()}
        return arguments | {"target_modules": selection(parts.layers, layers)}

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the tensors by the names of the grafts."""
        filled = {
            delta_name(place, name): parts.layers[place.path][part]
            for place in places(model, method)
            for name, part in self.twin.parts_of(place.host).items()
        }
        method.expect(model, filled)
        return filled


def _check_equal(twin: Twin, name: str, host: nn.Module) -> None:
    """Check that PEFT computes the same for a layer.

    Raises:
        TuningError: it does not.
    """
    why = twin.differs(host)
    if why is not None:
        raise TuningError(
            f"{name} ({type(host).__name__}) {why}, so {twin.peft_type} of it differs: exclude it, or merge."
        )


def twin_converters() -> tuple[Converter, ...]:
    """Return a converter for each type that a method declares."""
    return tuple(
        type(f"{name}Converter", (TwinConverter,), {"peft_type": peft_type, "methods": (name,), "twin": twin})()
        for peft_type, (name, twin) in TWINS.items()
    )
