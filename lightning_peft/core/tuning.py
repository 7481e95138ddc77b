"""The record of what was done to a backbone: which methods, what they train, and what it takes to undo them.

It is kept on the backbone, so it is copied and pickled with it, and it names tensors instead of holding them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core import attention
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, detach, grafts
from lightning_peft.core.private_torch import times_written
from lightning_peft.core.pruned import live_name
from lightning_peft.core.select import near
from lightning_peft.core.sharded import like
from lightning_peft.core.stand_in import stand_in
from lightning_peft.core.switch import Switch

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

    Methods go by their `key`, which their grafts have as the name of their owner.

    Attributes:
        methods: the methods.
        trains: the base tensors that each method trains in place.
        replaces: the base tensors that each method of a named delta has copies of its own of.
        matched: by method, the names that each argument of it that is a regex has matched.
        required_grad: ``requires_grad`` of each parameter before the first method came.
        originals: the values that tensors trained in place had; where those are not kept, how often the tensor had been
            written to, which tells whether it has changed.
        fingerprints: hash of the tensors that are not trained, computed when a checkpoint first needs it, by the names
            of those left out.
        switch: which methods rest.
        parked: the values of tensors trained in place while their methods rest, and whether they require gradients.
        still: names of the parameters that are frozen since a run trains other methods.
        apart: the methods of deltas that were trained side by side, each to compute without the others.
    """

    methods: dict[str, "TuningMethod"] = field(default_factory=dict)
    trains: dict[str, set[str]] = field(default_factory=dict)
    replaces: dict[str, set[str]] = field(default_factory=dict)
    matched: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    required_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor | int] = field(default_factory=dict)
    fingerprints: dict[frozenset[str], str] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    parked: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    still: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, backbone: nn.Module) -> "Tuning | None":
        """Return the record of this very backbone, or None."""
        return vars(backbone).get(_ATTRIBUTE)

    @classmethod
    def begin(cls, backbone: nn.Module) -> "Tuning":
        """Freeze the backbone and keep a record on it."""
        tuning = cls(required_grad={name: p.requires_grad for name, p in backbone.named_parameters()})
        vars(backbone)[_ATTRIBUTE] = tuning
        for parameter in backbone.parameters():  # TorchScript knows no requires_grad_ of a module
            parameter.requires_grad_(False)
        return tuning

    def add(self, backbone: nn.Module, key: str, method: "TuningMethod", trains: set[str], keep: bool) -> None:
        """Record a method; let it train these base tensors: a named one its own copies, others in place.

        The values of tensors trained in place are kept, so that they can be given back.
        """
        parameters = dict(backbone.named_parameters())
        in_grafts = _in_grafts(backbone)
        trains = {name for name in trains if id(parameters[name]) not in in_grafts}
        self.methods[key], self.trains[key], self.replaces[key] = method, set(), set()
        if method.name is not None:
            shared = set().union(*(self.replaces[other] for other in self.of_delta(method.name)))
            self.replaces[key] = trains - shared
            values = {name: value for name, value in self.originals.items() if isinstance(value, Tensor)}
            stand_in(backbone, key, trains - shared, values)
            return
        for tensor in trains:
            if tensor not in self.originals:
                values_now = parameters[tensor].detach()
                self.originals[tensor] = values_now.clone() if keep else _Version(times_written(values_now))
            parameters[tensor].requires_grad_(True)
        self.trains[key] = trains

    def of_delta(self, name: str) -> list[str]:
        """Return the keys of the methods of a delta."""
        return [key for key, method in self.methods.items() if method.delta == name]

    def undo(self, backbone: nn.Module, name: str) -> None:
        """Undo a method, bit for bit; after the last one nothing of this record is left.

        Raises:
            TuningError: it trained tensors in place whose values were not kept.
        """
        self.rest(backbone, self.switch.off - {name})
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
        self.replaces.pop(name, None)
        self.matched.pop(name, None)
        self.apart.discard(name)
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

    def changed(self) -> set[str]:
        """Return the names of all base tensors that some method trains, in place or a copy of."""
        return self.trained_in_place().union(*self.replaces.values())

    def only(self, keys: Collection[str]) -> "Tuning":
        """Return the record of some of the methods, for who looks at what these alone train."""
        methods = {key: method for key, method in self.methods.items() if key in keys}
        trains, replaces = ({k: v for k, v in names.items() if k in keys} for names in (self.trains, self.replaces))
        return replace(self, methods=methods, trains=trains, replaces=replaces)

    def grafts(self, backbone: nn.Module) -> Iterator[Grafted[Graft]]:
        """Yield the grafts that are trained: those of the methods, and those that no method has attached."""
        return (place for place in grafts(backbone) if place.graft.owner in ("", *self.methods))

    def freeze(self, backbone: nn.Module) -> None:
        """Freeze again what the methods do not train; what they train stays frozen where the user has frozen it."""
        own = {id(p) for place in self.grafts(backbone) for p in place.graft.parameters()}
        live, everywhere = dict(backbone.named_parameters()), _in_grafts(backbone)
        in_place = {live_name(name, live) for name in self.trained_in_place()}
        for name, parameter in backbone.named_parameters():
            trained = name in in_place or id(parameter) in own
            if trained and name in self.still:
                self.still.remove(name)
                parameter.requires_grad_(True)
            elif not trained:
                if parameter.requires_grad and (name in self.originals or id(parameter) in everywhere):
                    self.still.add(name)
                parameter.requires_grad_(False)

    def rest(self, backbone: nn.Module, off: frozenset[str]) -> None:
        """Let these methods rest and the others compute; nothing changes where that cannot be.

        Raises:
            TuningError: one is merged into the weights, or trained tensors in place and kept no copies.
        """
        for place in grafts(backbone):
            if place.graft.merged and place.graft.owner in off ^ self.switch.off:
                raise TuningError(f"{place.graft.owner} is merged into {place.path}, so it computes: unmerge it first.")
        at_work = set().union(*(names for key, names in self.trains.items() if key not in off))
        parameters = dict(backbone.named_parameters())
        resting = self.trained_in_place() - at_work
        for name in sorted(resting - self.parked.keys()):
            original = self.originals[name]
            if not isinstance(original, Tensor) and times_written(parameters[name]) != original:
                raise TuningError(
                    f"{name} was trained in place and no copy of it was kept, so that it cannot rest: give its method "
                    "a name=, under which it trains a copy."
                )
        for name in resting - self.parked.keys():
            parameter, original = parameters[name], self.originals[name]
            self.parked[name] = parameter.data, parameter.requires_grad
            if isinstance(original, Tensor):
                parameter.data = like(parameter.data, original).to(parameter.device)
            parameter.requires_grad_(False)
        for name in self.parked.keys() - resting:
            parameters[name].data, flag = self.parked.pop(name)
            parameters[name].requires_grad_(flag)
        self.switch.off = off


def tunings(root: nn.Module) -> Iterator[tuple[str, nn.Module, Tuning]]:
    """Yield ``(name, backbone, record)`` of every tuned backbone in ``root``."""
    for name, module in root.named_modules():
        tuning = Tuning.of(module)
        if tuning is not None:
            yield name, module, tuning


def at_work(backbone: nn.Module) -> tuple[str, ...]:
    """Return the keys of the methods of a backbone that compute."""
    tuning = Tuning.of(backbone)
    return () if tuning is None else tuple(key for key in tuning.methods if key not in tuning.switch.off)


def chosen(module: nn.Module, names: Sequence[str] | None) -> list[tuple[nn.Module, Tuning, frozenset[str]]]:
    """Return each tuned backbone with its record and the keys of the methods of these deltas; None: of all.

    Raises:
        TuningError: there is no delta of a name.
    """
    found = [(backbone, tuning) for _, backbone, tuning in tunings(module)]
    every = dict.fromkeys(method.delta for _, tuning in found for method in tuning.methods.values())
    for name in names or ():
        if name not in every:
            raise TuningError(
                f"{name!r} is no delta of this {type(module).__name__}{near(name, every)}; load it by name=."
            )
    wanted = every if names is None else names
    return [(b, tuning, frozenset(key for name in wanted for key in tuning.of_delta(name))) for b, tuning in found]


def _in_grafts(backbone: nn.Module) -> set[int]:
    """Return the ids of the parameters that methods have added, which are trained as long as they are there."""
    return {id(p) for place in grafts(backbone) for p in place.graft.parameters()}
