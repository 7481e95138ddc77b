"""Decides what is trained in a module: below a tuned backbone by its methods, outside by the optimizers of the run.

It is decided when a fit begins, and no flag that changes on the way takes anything out of it again: what was ever
trained is saved. Outside of the backbones that is also what moves without a gradient, such as a teacher that follows by
momentum, a table of prototypes, the statistics of a frozen BatchNorm: each save compares checksums with the start's.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from lightning_peft.core.checksums import checksum
from lightning_peft.core.private_torch import WRAPPERS
from lightning_peft.core.pruned import live_name, whole_name
from lightning_peft.core.tuning import Tuning, tunings

ATTRIBUTE = "_lightning_peft_life"


@dataclass
class Run:
    """What one run trains of a module, or what was loaded into it.

    Attributes:
        tuned: paths of the backbones that the methods of the run tune; None: all that are tuned.
        keys: of the methods of these backbones that the run trains; None: all that are applied.
        outside: names of the tensors outside of these backbones that have been trained, have moved, or were loaded.
        started: checksum of each other tensor outside when the run began; None: it has not begun.
    """

    tuned: set[str] | None = None
    keys: set[str] | None = None
    outside: set[str] = field(default_factory=set)
    started: dict[str, str] | None = None

    def begin(self, module: nn.Module, held: Iterable[nn.Parameter]) -> None:
        """Note what the optimizers train outside of the backbones, and what the rest is like before it moves."""
        self.hold(module, held)
        below = below_backbones(module)
        if self.started is None:
            self.started = {
                canonical(name): checksum(tensor)
                for name, tensor in module.state_dict().items()
                if not below(name) and canonical(name) not in self.outside and not tensor.is_meta
            }

    def hold(self, module: nn.Module, held: Iterable[nn.Parameter]) -> None:
        """Note what the optimizers train outside of the backbones."""
        ids, below = {id(p) for p in held if p.requires_grad}, below_backbones(module)
        self.outside |= {canonical(name) for name, p in module.named_parameters() if id(p) in ids and not below(name)}

    def note_moved(self, module: nn.Module) -> None:
        """Note which tensors outside of the backbones have moved or been pruned; every rank must call it."""
        known = {**(self.started or {}), **dict.fromkeys(self.outside, "")}
        for name, tensor in ((canonical(n), t) for n, t in module.state_dict().items() if self.started is not None):
            first = whole_name(name, known)
            if first in known and name not in self.outside and (first != name or checksum(tensor) != known[name]):
                self.outside.add(name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that Fabric has wrapped, or the module itself."""
    wrappers = sys.modules.get("lightning.fabric.wrappers")
    return module.module if wrappers is not None and wrappers.is_wrapped(module) else module  # type: ignore[return-value]


def run_of(module: nn.Module) -> Run | None:
    """Return the record of the run that this module is in, or was in last."""
    return vars(module).get(ATTRIBUTE)


def canonical(name: str) -> str:
    """Return a tensor's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return WRAPPERS.sub("", name)


def own_tunings(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tuning]]:
    """Yield ``(name, backbone, record)`` of the backbones that the run of ``module`` tunes, or of all without a run.

    Another one, such as a tuned teacher, is a part of the module like any other. The record is of those methods alone
    that the run trains.
    """
    run = run_of(module)
    for path, backbone, tuning in tunings(module):
        if run is None or run.tuned is None or canonical(path) in run.tuned:
            yield path, backbone, tuning if run is None or run.keys is None else tuning.only(run.keys)


@contextmanager
def selected(module: nn.Module, keys: Collection[str]) -> Iterator[None]:
    """Let what is saved or loaded inside the context be these methods of the backbones of ``module`` alone."""
    run = run_of(module)
    if run is None:
        vars(module)[ATTRIBUTE] = Run(keys=set(keys))
    before = run.keys if run is not None else None
    try:
        if run is not None:
            run.keys = set(keys)
        yield
    finally:
        own = run_of(module)
        assert own is not None
        own.keys = before
        if run is None and not own.outside:
            del vars(module)[ATTRIBUTE]


def below_backbones(module: nn.Module) -> Callable[[str], bool]:
    """Return what tells of the name of a tensor whether it lies in a backbone that the run of ``module`` tunes."""
    starts = tuple(f"{path}." if path else "" for path, _, _ in own_tunings(module))
    return lambda name: name.startswith(starts)


def trained_names(module: nn.Module) -> set[str]:
    """Return the canonical names of the parameters that are trained.

    Outside of backbones these are what the run has held in an optimizer, and before a run what requires gradients.
    """
    run, below = run_of(module), below_backbones(module)
    names: set[str] = set()
    for path, backbone, tuning in own_tunings(module):
        live = dict(backbone.named_parameters())
        own = (*(live_name(name, live) for name in tuning.trained_in_place()), *graft_parameters(backbone, tuning))
        names |= {canonical(f"{path}.{name}".lstrip(".")) for name in own}
    decided = run is not None and run.started is not None
    for name, parameter in module.named_parameters():
        loaded = run is not None and canonical(name) in run.outside
        if not below(name) and (loaded or (parameter.requires_grad and not decided)):
            names.add(canonical(name))
    return names


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; see `trained_names`."""
    names = trained_names(module)
    return {name: p for name, p in module.named_parameters() if canonical(name) in names}


def graft_parameters(backbone: nn.Module, tuning: Tuning) -> list[str]:
    """Return the names of the parameters that the methods of a record have added to a backbone."""
    places = tuning.grafts(backbone)
    return [f"{place.full_name}.{name}" for place in places for name, _ in place.graft.named_parameters()]
