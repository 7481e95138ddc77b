"""Many deltas on one backbone: listing them, letting some of them rest, and removing one."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn

from lightning_peft.core.compatibility import check_compatible
from lightning_peft.core.routing import at_rest, prepared_by_row
from lightning_peft.core.run import unwrapped
from lightning_peft.core.tuning import chosen, tunings


class Delta(NamedTuple):
    """A delta on a backbone.

    Attributes:
        name: what it goes by.
        backbone: where the backbone is in the module.
        methods: the classes of its methods.
        is_active: whether it computes.
        parameters: how many numbers it trains.
    """

    name: str
    backbone: str
    methods: tuple[str, ...]
    is_active: bool
    parameters: int


def list_deltas(model: nn.Module) -> list[Delta]:
    """Return the deltas on the backbones of a module, in the order in which they came."""
    found = []
    for path, backbone, tuning in tunings(unwrapped(model)):
        for name in dict.fromkeys(method.delta for method in tuning.methods.values()):
            keys = tuning.of_delta(name)
            only = tuning.only(keys)
            trained = {id(p): p for place in only.grafts(backbone) for p in place.graft.parameters()}
            in_place = only.trained_in_place()
            trained |= {id(p): p for n, p in backbone.named_parameters() if n in in_place}
            kinds = tuple(type(tuning.methods[key]).__name__ for key in keys)
            size = sum(p.numel() for p in trained.values())
            found.append(Delta(name, path, kinds, not tuning.switch.off.intersection(keys), size))
    return found


@contextmanager
def muted(model: nn.Module, *names: str) -> Iterator[None]:
    """Let the deltas of these names rest inside the context; without names all, so that the bare backbone computes.

    It may stand in the middle of a training step: gradients of what was computed outside of it stay right.

    Raises:
        TuningError: there is no delta of a name, it is merged, or it trained tensors in place and kept no copy.
    """
    with ExitStack() as stack:
        for backbone, tuning, keys in chosen(unwrapped(model), names or None):
            stack.enter_context(at_rest(backbone, tuning, tuning.switch.off | keys))
        yield


def activate(model: nn.Module, *names: str) -> None:
    """Let the deltas of these names compute from now on, whose effects add up, and the others rest.

    Raises:
        TuningError: there is no delta of a name, or two of them cannot be at work together; nothing has changed then.
    """
    found = chosen(unwrapped(model), names)
    for backbone, tuning, keys in found:
        check_compatible(backbone, tuning, tuning.methods.keys() - keys)
    for backbone, tuning, keys in found:
        tuning.rest(backbone, frozenset(tuning.methods.keys() - keys))


def remove_delta(model: nn.Module, name: str) -> None:
    """Remove one delta and leave the others, and the backbone, as they are without it.

    Raises:
        TuningError: there is no delta of that name, or it trained tensors in place and kept no copies.
    """
    for backbone, tuning, keys in chosen(unwrapped(model), (name,)):
        for key in sorted(keys):
            tuning.methods[key].remove(backbone)


def prepare(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch as the deltas at work on the backbones of a module want it, e.g. with virtual tokens in it."""
    for _, _, tuning in tunings(unwrapped(model)):
        if tuning.switch.groups is not None:
            batch = prepared_by_row(tuning, batch, tuning.switch.groups)
            continue
        for key, method in tuning.methods.items():
            if key not in tuning.switch.off:
                batch = method.prepare(batch)
    return batch
