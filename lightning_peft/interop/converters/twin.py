"""Methods whose tensors PEFT has as they are, layer by layer: they say themselves how it calls them (`core.twin`)."""

from collections.abc import Iterator, Mapping
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
    changed,
    check_called,
    check_complete,
    graft_tensors,
    places,
)
from lightning_peft.interop.names import Names, selection
from lightning_peft.interop.schema import BY_TYPE, Kind
from lightning_peft.methods import every_method
from lightning_peft.updates.layer_update import LINEAR

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
            path, layer, graft, _ = changed(place)
            if not isinstance(layer, self.twin.kinds):
                kind = " or ".join(kind.__name__ for kind in self.twin.kinds)
                raise TuningError(
                    f"PEFT has {self.peft_type} of layers that are {kind}, which {path} ({type(layer).__name__}) is "
                    "not: exclude it, or merge."
                )
            _check_equal(self.twin, model, path, layer)
            tensors = graft.state_dict()
            exported.layers[path] = {part: tensors[name] for name, part in self.twin.parts_of(layer).items()}
            exported.delta |= graft_tensors(place)
        exported.config = {key: self.twin.theirs(name, vars(method)[name]) for name, key in self.twin.arguments.items()}
        exported.config["target_modules"] = selection(exported.layers, names.modules)
        if "fan_in_fan_out" in self.twin.defaults:
            transposed = [isinstance(changed(place).layer, Conv1D) for place in places(model, method)]
            exported.config["fan_in_fan_out"] = any(transposed)
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
            _check_equal(twin, names.model, name, host)
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
            f"{start}{name}": parts.layers[path][part]
            for path, layer, _, start in map(changed, places(model, method))
            for name, part in self.twin.parts_of(layer).items()
        }
        method.expect(model, filled)
        return filled

    def kinds(self) -> Mapping[str, tuple[Kind, ...]]:
        """Return the kinds of value of the keys that are arguments of the method; of other numbers and texts, none."""
        plain = {key: value for key, value in self.defaults.items() if type(value) in BY_TYPE}
        words = {key: [word for _, word in self.twin.words.get(own, ())] for own, key in self.twin.arguments.items()}
        return {
            key: tuple(BY_TYPE[kind] for kind in dict.fromkeys(map(type, [value, *words[key]]))) if key in words else ()
            for key, value in plain.items()
        }


def _check_equal(twin: Twin, model: nn.Module, name: str, host: nn.Module) -> None:
    """Check that PEFT computes the same for a layer.

    Raises:
        TuningError: it does not.
    """
    check_called(model, name, twin.peft_type)
    why = twin.differs(host)
    if why is not None:
        raise TuningError(
            f"{name} ({type(host).__name__}) {why}, so {twin.peft_type} of it differs: exclude it, or merge."
        )


def twin_converters() -> Iterator[Converter]:
    """Yield a converter for each type that a method declares."""
    for name, method in every_method().items():
        if (twin := method.twin) is not None:
            about = {"peft_type": twin.peft_type, "methods": (name,), "defaults": twin.defaults, "twin": twin}
            yield type(f"{name}Converter", (TwinConverter,), about)()
