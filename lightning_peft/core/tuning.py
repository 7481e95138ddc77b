"""The record of what was done to a backbone: which methods, what they train, and what it takes to undo them.

It is kept on the backbone, so it is copied and pickled with it, and it names tensors instead of holding them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core import attention
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import detach, grafts
from lightning_peft.core.private_torch import times_written

if TYPE_CHECKING:
    from lightning_peft.core.method import TuningMethod

_ATTRIBUTE = "_lightning_peft"


class _Version(int):
    """How often a tensor had been written to. The tensors of a copied model count anew, so a copy of this fits none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Version":
        return _Version(-1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Version, (-1,)


@dataclass
class Tuning:
    """The record of what methods did to one backbone.

    Attributes:
        methods: name of a method -> the method.
        trains: name of a method -> the base tensors that it trains in place.
        required_grad: ``requires_grad`` of each parameter before the first method came.
        originals: the values that tensors trained in place had; where those are not kept, how often the tensor had been
            written to, which tells whether it has changed.
        fingerprint: hash of the frozen tensors, computed when a checkpoint first needs it.
    """

    methods: dict[str, "TuningMethod"] = field(default_factory=dict)
    trains: dict[str, set[str]] = field(default_factory=dict)
    required_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor | int] = field(default_factory=dict)
    fingerprint: str | None = None

    @classmethod
    def of(cls, backbone: nn.Module) -> "Tuning | None":
        """Return the record of this very backbone, or None."""
        return vars(backbone).get(_ATTRIBUTE)

    @classmethod
    def begin(cls, backbone: nn.Module) -> "Tuning":
        """Freeze the backbone and keep a record on it."""
        tuning = cls(required_grad={name: p.requires_grad for name, p in backbone.named_parameters()})
        vars(backbone)[_ATTRIBUTE] = tuning
        backbone.requires_grad_(False)
        return tuning

    def add(self, backbone: nn.Module, name: str, method: "TuningMethod", trains: set[str], keep: bool) -> None:
        """Record a method; let the base tensors that it trains require gradients, and keep their values to undo it."""
        parameters = dict(backbone.named_parameters())
        in_grafts = _in_grafts(backbone)
        trains = {name for name in trains if id(parameters[name]) not in in_grafts}
        for tensor in trains:
            if tensor not in self.originals:
                values = parameters[tensor].detach()
                self.originals[tensor] = values.clone() if keep else _Version(times_written(values))
            parameters[tensor].requires_grad_(True)
        self.methods[name], self.trains[name] = method, trains
        self.fingerprint = None

    def undo(self, backbone: nn.Module, name: str) -> None:
        """Undo a method, bit for bit; after the last one nothing of this record is left.

        Raises:
            TuningError: it trained tensors in place whose values were not kept.
        """
        others = set().union(*(names for other, names in self.trains.items() if other != name))
        own = self.trains.get(name, set()) - others
        parameters = dict(backbone.named_parameters())
        versions = {name: value for name in own if isinstance(value := self.originals[name], int)}
        lost = sorted(name for name, version in versions.items() if times_written(parameters[name]) != version)
        if lost:
            raise TuningError(f"{name} trained {lost[0]} in place and kept no copy of it: load the backbone anew.")
        for place in grafts(backbone, owner=name):
            detach(place.host, place.name)
        attention.leave(backbone)
        for tensor in own:
            original = self.originals.pop(tensor)
            if isinstance(original, Tensor):
                parameters[tensor].data = original.to(parameters[tensor].device)
            parameters[tensor].requires_grad_(False)
        self.methods.pop(name, None)
        self.trains.pop(name, None)
        self.fingerprint = None
        if not self.methods:
            self.end(backbone)

    def end(self, backbone: nn.Module) -> None:
        """Forget the record and give every parameter the ``requires_grad`` that it came with."""
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(self.required_grad.get(name, True))
        del vars(backbone)[_ATTRIBUTE]

    def trained_in_place(self) -> set[str]:
        """Return the names of all base tensors that some method trains."""
        return set().union(*self.trains.values())

    def freeze(self, backbone: nn.Module) -> None:
        """Freeze again what the methods do not train; what they train stays frozen where the user has frozen it."""
        trained = self.trained_in_place()
        in_grafts = _in_grafts(backbone)
        for name, parameter in backbone.named_parameters():
            if name not in trained and id(parameter) not in in_grafts:
                parameter.requires_grad_(False)


def tunings(root: nn.Module) -> Iterator[tuple[str, nn.Module, Tuning]]:
    """Yield ``(name, backbone, record)`` of every tuned backbone in ``root``."""
    for name, module in root.named_modules():
        tuning = Tuning.of(module)
        if tuning is not None:
            yield name, module, tuning


def _in_grafts(backbone: nn.Module) -> set[int]:
    """Return the ids of the parameters that methods have added, which are trained as long as they are there."""
    return {id(p) for place in grafts(backbone) for p in place.graft.parameters()}
