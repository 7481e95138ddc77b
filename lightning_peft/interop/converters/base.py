"""The base class of converters between a method and a type of adapter, and the two forms that they convert."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, grafts
from lightning_peft.core.method import TuningMethod
from lightning_peft.interop.names import Names
from lightning_peft.interop.patterns import is_target
from lightning_peft.interop.schema import Kind
from lightning_peft.updates.read_layer import ReadLayer


@dataclass
class Exported:
    """A method in the format of PEFT.

    Attributes:
        config: the keys of ``adapter_config.json`` that are not the default.
        layers: module -> part -> tensor, such as ``lora_A.weight``.
        bare: tensors that belong to no module, such as ``prompt_embeddings``.
        delta: the names of the tensors of the delta that these stand for.
    """

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bare: dict[str, Tensor] = field(default_factory=dict)
    delta: set[str] = field(default_factory=set)


@dataclass
class Parts:
    """An adapter of PEFT that is being read, its names being those of the model.

    Attributes:
        config: ``adapter_config.json``, complete.
        layers: module -> part -> tensor.
        bare: tensors that belong to no module.
        in_place: name of a tensor of the model -> what the adapter puts in its place.
        called: module -> its name in the file, which ``target_modules`` and the patterns go by.
        source: what the adapter is called in errors.
    """

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    bare: dict[str, Tensor]
    in_place: dict[str, Tensor]
    called: dict[str, str]
    source: str


class Converter:
    """Converts one method to one type of adapter, and back. The methods know nothing of it."""

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    """The classes of methods that it exports, by their names in this package; the first one is imported."""
    defaults: ClassVar[Mapping[str, Any]]
    """Every key that PEFT writes for this type, but those that all types have, with its default."""
    without: ClassVar[frozenset[str]] = frozenset()
    """Keys that PEFT writes for all other types."""
    is_prompt: ClassVar[bool] = False
    """Whether it is of a prompt, whose model PEFT does not wrap."""

    def method_of(self, parts: Parts) -> str:
        """Return the name of the method that an adapter becomes."""
        return self.methods[0]

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the method in the format of PEFT.

        Raises:
            TuningError: PEFT would compute something else.
        """
        raise NotImplementedError

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the arguments of the method that an adapter describes.

        Raises:
            TuningError: the adapter is not whole, or this package would compute something else.
        """
        raise NotImplementedError

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the adapter's tensors by their names in the delta of ``model``, to which ``method`` is applied."""
        raise NotImplementedError

    def config_of_bias(self, biases: set[str], layers: Iterable[str]) -> str | None:
        """Return the value of ``bias`` for biases that are trained alone; None: this type has none."""
        return None

    def kinds(self) -> Mapping[str, tuple[Kind, ...]]:
        """Return the kinds of value of keys that have others in this type than in the rest."""
        return {}

    def trains_bias(self, parts: Parts, name: str) -> bool:
        """Tell whether the arguments that were read already say that this bias is trained."""
        return False


def places(model: nn.Module, method: TuningMethod) -> list[Grafted[Any]]:
    """Return the grafts of a method."""
    return list(grafts(model, owner=method.key))


def delta_name(place: Grafted[Any], parameter: str) -> str:
    """Return the name in the delta of a parameter of a graft."""
    return f"{place.full_name}.{parameter}"


class Changed(NamedTuple):
    """A layer that a graft changes.

    Attributes:
        path: its name.
        layer: the layer.
        graft: what changes it.
        start: of the names in the delta of the graft's tensors.
    """

    path: str
    layer: nn.Module
    graft: Graft
    start: str


def changed(place: Grafted[Any]) -> Changed:
    """Return the layer that a graft changes, its host or one that the host reads."""
    graft = place.graft
    if isinstance(graft, ReadLayer):
        return Changed(
            f"{place.path}.{graft.layer}".lstrip("."), graft.host_layer, graft.inner, delta_name(place, "inner.")
        )
    return Changed(place.path, place.host, graft, delta_name(place, ""))


def check_called(model: nn.Module, path: str, what: str) -> None:
    """Check that a layer is called where PEFT changes what it gives.

    Raises:
        TuningError: it is the out-projection of torch's own attention.
    """
    owner = model.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention):
        raise TuningError(
            f"PEFT changes what {path} gives when it is called, and nn.MultiheadAttention reads its weight alone, so "
            f"that {what} would do nothing there: exclude it, or merge."
        )


def graft_tensors(place: Grafted[Any]) -> set[str]:
    """Return the names in the delta of all tensors of a graft."""
    return {delta_name(place, name) for name in place.graft.state_dict()}


def refuse(config: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """Check that a configuration uses none of these features.

    Raises:
        TuningError: it does.
    """
    used = [key for key in keys if config.get(key)]
    if used:
        raise TuningError(
            f"{source} uses {', '.join(f'{key}={config[key]!r}' for key in used)}, which has no twin here: "
            "train it without, or merge it with PEFT."
        )


def check_complete(parts: Parts, names: Names, kinds: tuple[type[nn.Module], ...]) -> None:
    """Check that each layer of these kinds that the configuration names has tensors.

    Raises:
        TuningError: one has none.
    """
    targets = [
        name
        for name, module in names.modules.items()
        if isinstance(module, kinds) and is_target(parts.config, parts.called.get(name, name))
    ]
    if missing := sorted(set(targets) - parts.layers.keys()):
        raise TuningError(
            f"{parts.source} targets {missing[0]} of this model but has no tensor for it: it is not whole, or was "
            "made for another base."
        )


def check_names(model: nn.Module, layers: Iterable[str], what: str) -> None:
    """Check that no layer with an update has two names, of which PEFT wraps one, while here the layer is one.

    Args:
        model: the backbone.
        layers: their names.
        what: which adapter it is, for the message.

    Raises:
        TuningError: one has.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for names in paths.values():
        if len(names) > 1 and not set(names).isdisjoint(layers):
            raise TuningError(
                f"{what} has an update of {names[0]}, which is one layer with {names[1]} in {type(model).__name__}: "
                "PEFT would change one of the two alone, so leave it out, or give each a layer of its own."
            )
