"""One delta for each row of a batch, in one forward pass."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import compatibility, structure, task_class
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts, overrides
from lightning_peft.core.run import unwrapped
from lightning_peft.core.switch import Rows, Switch
from lightning_peft.core.tuning import Tuning, chosen

_JOINTS = ("before", "after", "around", "weight")
_FILL = {"labels": -100}


@contextmanager
def routed(model: nn.Module, names: Sequence[str | None], copies: int = 1) -> Iterator[None]:
    """Let each row of a batch be computed with the delta of its name, and rows of None by the bare backbone.

    The backbone runs once; each module that a delta joins runs once for each of the deltas, on its rows. Soft prompts
    and what makes sequences of images longer join the whole model, which then runs once for each of the deltas.
    Activations are kept, where transformers would compute them anew in the backward pass.

    Args:
        model: a backbone, or a module with one.
        names: of a delta, or None, for each row.
        copies: how often each row is there, one after the other, as beams and several samples make them.

    Raises:
        TuningError: there is no delta of a name, or it trains tensors in place under no name.
    """
    module, wanted = unwrapped(model), list(dict.fromkeys(name for name in names if name is not None))
    if not names:
        raise TuningError("names= is empty: give one name, or None, for each row of the batch.")
    with ExitStack() as stack:
        for backbone, tuning, _ in chosen(module, wanted):
            stack.enter_context(_by_row(backbone, tuning, names, copies))
        yield


@contextmanager
def at_rest(backbone: nn.Module, tuning: Tuning, off: frozenset[str]) -> Iterator[None]:
    """Let these methods of a backbone rest inside the context, for all rows."""
    switch = tuning.switch
    before, groups = switch.off, switch.groups
    tuning.rest(backbone, off)
    switch.groups = None
    try:
        with keeping_activations(backbone):
            yield
    finally:
        tuning.rest(backbone, before)
        switch.groups = groups


def prepared_by_row(tuning: Tuning, batch: Mapping[str, Any], groups: Sequence[Rows]) -> dict[str, Any]:
    """Return a batch of which each group of rows is prepared by its own methods, padded on the right to one length."""
    size = sum(len(group.numbers) for group in groups)
    parts = []
    for group in groups:
        part: Mapping[str, Any] = {name: _rows_of(value, group.numbers, size) for name, value in batch.items()}
        for key, method in tuning.methods.items():
            if key not in group.off:
                part = method.prepare(part)
        parts.append(dict(part))
    if any("attention_mask" in part for part in parts):
        for part in parts:
            part.setdefault("attention_mask", torch.ones_like(part["input_ids"]))
    order = [row for group in groups for row in group.numbers]
    return {name: _one([part[name] for part in parts], order, name) for name in parts[0]}


@contextmanager
def side_by_side(backbone: nn.Module, tuning: Tuning, core: nn.Module, groups: Sequence[Rows]) -> Iterator[None]:
    """Let each module of a core be called, inside the context, for each of the groups of rows.

    Args:
        backbone: the tuned backbone.
        tuning: its record.
        core: the part of the backbone that is called for all rows; what is around it is not.
        groups: of rows, with the methods that rest for each.
    """
    keys = [key for key in tuning.methods if any(key not in group.off for group in groups)]
    inside, switch = set(core.modules()) - {core}, tuning.switch
    before = switch.off, switch.groups
    with ExitStack() as stack:
        for host in _hosts(backbone, tuning, keys):
            if host in inside:
                stack.enter_context(_split(host, switch))
        switch.off, switch.groups = frozenset(tuning.methods), list(groups)
        try:
            yield
        finally:
            switch.off, switch.groups = before


def can_share(backbone: nn.Module, tuning: Tuning, core: nn.Module, keys: Collection[str]) -> bool:
    """Tell whether these methods leave it to a core of a backbone to run once for all of them, each on its rows."""
    if any(compatibility.LENGTH in tuning.methods[key].breaks for key in keys):
        return False
    if core is backbone and task_class.is_of_a_task(backbone):  # T5's kin have their loss and no model below their head
        return False
    places = [place for key in keys for place in grafts(backbone, key) if place.host is core]
    return not any(overrides(place.graft, joint) for place in places for joint in ("around", "weight"))


@contextmanager
def _by_row(backbone: nn.Module, tuning: Tuning, rows: Sequence[str | None], copies: int) -> Iterator[None]:
    groups = []
    for name in dict.fromkeys(rows):
        keys = [] if name is None else tuning.of_delta(name)
        if in_place := sorted(set().union(*(tuning.trains[key] for key in keys))):
            raise TuningError(
                f"{name} trains {in_place[0]} in place, which all rows share: load it under a name, as load_delta(..., "
                "name=) does, or apply it with one."
            )
        numbers = [i for i, each in enumerate(rows) if each == name]
        groups.append(Rows(numbers, frozenset(tuning.methods.keys() - set(keys))))
    hosts = _hosts(backbone, tuning, [key for key in tuning.methods if any(key not in group.off for group in groups)])
    with at_rest(backbone, tuning, frozenset(tuning.methods)), ExitStack() as stack:
        stack.enter_context(_checked(backbone, tuning.switch, len(rows), copies))
        for host in hosts:
            stack.enter_context(_split(host, tuning.switch))
        tuning.switch.groups = groups
        yield


def _hosts(backbone: nn.Module, tuning: Tuning, keys: Sequence[str]) -> list[nn.Module]:
    """Return the modules that are called for each group of rows, or the whole where a method makes sequences longer."""
    if any(compatibility.LENGTH in tuning.methods[key].breaks for key in keys):
        return [backbone]
    places = (place for key in keys for place in grafts(backbone, key))
    return list(dict.fromkeys(p.host for p in places if any(overrides(p.graft, joint) for joint in _JOINTS)))


@contextmanager
def keeping_activations(backbone: nn.Module) -> Iterator[None]:
    """Let no activations be computed anew in the backward pass, where other deltas would compute."""
    recomputing = structure.recomputing(backbone)
    for module in recomputing:
        vars(module)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module in recomputing:
            vars(module)["gradient_checkpointing"] = True


@contextmanager
def _split(host: nn.Module, switch: Switch) -> Iterator[None]:
    """Let a host be called for each group of rows on its own."""
    inner = vars(host).pop("forward", None)
    run = inner or partial(type(host).forward, host)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if switch.groups is None:
            return run(*args, **kwargs)
        _set(host, inner)  # a whole call, with all hooks, of the host as it is
        try:
            return switch.by_rows(host, args, kwargs)
        finally:
            vars(host)["forward"] = forward

    vars(host)["forward"] = forward
    try:
        yield
    finally:
        _set(host, inner)


@contextmanager
def _checked(backbone: nn.Module, switch: Switch, size: int, copies: int) -> Iterator[None]:
    """Refuse a batch of another number of rows."""

    def check(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        if switch.groups is not None and tensors and len(tensors[0]) not in (size, size * copies):
            raise TuningError(
                f"a batch of {len(tensors[0])} rows is routed by {size} names: give one name, or None, for each row, "
                "and copies= for beams."
            )

    handle = backbone.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _set(host: nn.Module, forward: Callable[..., Any] | None) -> None:
    vars(host).pop("forward", None)
    if forward is not None:
        vars(host)["forward"] = forward


def _rows_of(value: Any, rows: list[int], size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value[torch.tensor(rows, device=value.device)]
    return [value[row] for row in rows] if isinstance(value, list) and len(value) == size else value


def _one(values: Sequence[Any], order: list[int], name: str) -> Any:
    """Return the values of groups of rows as one, in the order of the rows."""
    if isinstance(values[0], list):
        flat = [each for value in values for each in value]
        return [flat[order.index(row)] for row in range(len(order))]
    if not isinstance(values[0], Tensor) or not values[0].ndim:
        return values[0]
    if values[0].ndim > 1:
        longest = max(value.shape[1] for value in values)
        pad = [0, 0] * (values[0].ndim - 2)
        values = [F.pad(v, [*pad, 0, longest - v.shape[1]], value=_FILL.get(name, 0)) for v in values]
    back = torch.tensor([order.index(row) for row in range(len(order))])
    joined = torch.cat(list(values))
    return joined[back.to(joined.device)]
