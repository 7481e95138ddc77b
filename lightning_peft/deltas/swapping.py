"""Puts another LoRA into the place of one, whose parameters stay the same objects of the same shapes.

So a compiled model runs on as it is compiled. Lower ranks are filled up with zeros, other scales go into B, and layers
that the new one leaves alone get an update of zero.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.select import near
from lightning_peft.core.sharded import like
from lightning_peft.core.tuning import Tuning
from lightning_peft.deltas.low_rank_sums import part_of, updated
from lightning_peft.deltas.named_files import Content
from lightning_peft.methods.lora import LoRA, by_name
from lightning_peft.training.rebuild import methods_of
from lightning_peft.updates.factors import Factors
from lightning_peft.updates.low_rank_layers import GRAFTS
from lightning_peft.updates.low_rank_weights import LowRankWeights
from lightning_peft.updates.targets import Target, targets


def slot(method: TuningMethod, max_r: int) -> TuningMethod:
    """Return a LoRA that has room for others of its name up to a rank.

    Raises:
        TuningError: the method is no LoRA, or has a higher rank.
    """
    if not isinstance(method, LoRA):
        raise TuningError(f"max_r={max_r} is for LoRA, the file is of {type(method).__name__}: leave it out.")
    highest = round(max([method.r, *method.rank_pattern.values()]) * method.widening)
    if highest > max_r:
        raise TuningError(f"max_r={max_r} has no room for rank {highest} of the file: take at least that.")
    return dataclasses.replace(
        method, r=max_r, alpha=float(max_r), use_rslora=False, rank_pattern={}, alpha_pattern={}, init="kaiming"
    )


def fits(tuning: Tuning, name: str, content: Content) -> bool:
    """Tell whether a delta of a file is to be fitted into one that is there: both are one LoRA.

    Where both are alike and have beginnings, each tensor has its own place already.
    """
    keys, (entry, *others) = tuning.of_delta(name), content.meta["methods"]
    method = tuning.methods[keys[0]]
    if others or len(keys) > 1 or type(method) is not LoRA or not entry["class_path"].endswith(".LoRA"):
        return False
    if not any(tensor.endswith(".A0") for tensor in content.tensors):
        return True
    now, free = method.init_args(), LoRA.may_change
    return any(now.get(n) != value for n, value in entry["init_args"].items() if n not in free)


@torch.no_grad()
def swap(
    backbone: nn.Module, tuning: Tuning, name: str, content: Content, tensors: dict[str, Tensor], source: str
) -> None:
    """Give the LoRA of this name the values of another one, after checking all of it.

    Args:
        backbone: the tuned backbone.
        tuning: its record.
        name: of the delta.
        content: of the file.
        tensors: those of the file, by the names that they would have here.
        source: the file, for messages.

    Raises:
        TuningError: the file has a higher rank, other layers, magnitudes or beginnings, or other tensors.
    """
    (key,) = tuning.of_delta(name)
    there = tuning.methods[key]
    (other,) = methods_of({"methods": [entry | {"backbone": ""} for entry in content.meta["methods"]]})
    assert isinstance(there, LoRA)
    assert isinstance(other, LoRA)
    room, wanted = _wanted(other, there, name, source, backbone)
    rest = {n.removeprefix(content.start): t for n, t in tensors.items()}
    scales = _scales(other, list(wanted))
    writes: list[Callable[[], None]] = []
    paths = {module: path for path, module in backbone.named_modules()}
    for own, target in room.items():
        new = part_of(target, key)
        prefix = _prefix(paths[target.host], target, key)
        old = {leaf: rest.pop(f"{prefix}.{leaf}") for leaf in ("A", "B", "m", "A0", "B0") if f"{prefix}.{leaf}" in rest}
        _check(old, new, own in wanted, f"{source} at {own}")
        writes.append(_write(new, old, scales.get(own, 1.0), target, key))
    writes += _writes_of_the_rest(backbone, rest, f"{source} has", name)
    for write in writes:
        write()


def _writes_of_the_rest(
    backbone: nn.Module, rest: Mapping[str, Tensor], has: str, name: str
) -> list[Callable[[], None]]:
    """Return what writes the tensors that are of no update: heads and biases."""
    state = backbone.state_dict() if rest else {}
    for tensor, value in rest.items():
        if tensor not in state or state[tensor].shape != value.shape or not value.isfinite().all():
            raise TuningError(f"{has} {tensor}, which {name} has no room for{near(tensor, state)}.")
    return [partial(_copy, state[tensor], value) for tensor, value in rest.items()]


def _copy(live: Tensor, value: Tensor) -> None:
    live.copy_(value)


def _wanted(
    other: LoRA, there: LoRA, name: str, source: str, backbone: nn.Module
) -> tuple[dict[str, Target], dict[str, Target]]:
    """Return the layers of the LoRA that is there, and of the one that is to take its place.

    Raises:
        TuningError: they are of unlike kinds, or there is no room for a layer.
    """
    if there.use_dora is not other.use_dora or there.bias != other.bias:
        raise TuningError(
            f"{source} has use_dora={other.use_dora} and bias={other.bias!r}, {name} has {there.use_dora} and "
            f"{there.bias!r}: load it under another name."
        )
    room = updated(backbone, there.key)
    if all(vars(there)[field] == vars(other)[field] for field in ("target_modules", "layers", "exclude")):
        return room, room
    every = targets(backbone, tuple(GRAFTS), other.target_modules, other.layers)
    wanted = other.without_excluded(every)
    if missing := sorted(wanted.keys() - room.keys()):
        raise TuningError(
            f"{source} changes {missing[0]}, which {name} has no room for{near(missing[0], room)}: load it under "
            "another name, or give that name a LoRA of all these layers first."
        )
    return room, wanted


def _scales(method: LoRA, names: list[str]) -> dict[str, float]:
    ranks = by_name(method.rank_pattern, names, method.r, "rank_pattern")
    alphas = by_name(method.alpha_pattern, names, method.alpha, "alpha_pattern")
    return {n: alphas[n] / (ranks[n] ** 0.5 if method.use_rslora else ranks[n]) for n in names}


def _prefix(path: str, target: Target, key: str) -> str:
    inner = "" if target.weight is None else f".{LowRankWeights.part_name(target.weight)}"
    return f"{path}.{key}{inner}".lstrip(".")


def _check(old: dict[str, Tensor], new: Factors, is_there: bool, where: str) -> None:
    needed = {"A", "B"} | ({"m"} if new.m is not None else set())
    if lost := sorted(needed - old.keys()) if is_there else []:
        raise TuningError(f"{where} lacks {lost[0]}: it is not whole, so take another copy.")
    if not old:
        return
    if not all(map(_is_finite, old.values())):
        raise TuningError(f"{where} has NaN or infinity: its run diverged, so take an earlier file.")
    rank = old["A"].shape[new.rank_axes[0]] * (2 if "A0" in old else 1)
    if rank > new.rank:
        raise TuningError(f"{where} has rank {rank}, there is room for {new.rank}: load the first with max_r={rank}.")


def _write(new: Factors, old: dict[str, Tensor], scale: float, target: Target, key: str) -> Callable[[], None]:
    def write() -> None:
        if new.m is not None:
            neutral = target.host.get_submodule(key).neutral(target.host, _leaf(target, "m"))  # type: ignore[operator]
            new.m.copy_(like(new.m, old.get("m", neutral)))
        if not old:
            new.A.zero_()
            new.B.zero_()
            return
        a, b = old["A"], old["B"]
        first, last = new.rank_axes
        if "A0" in old:
            a = torch.cat([a, a - old["A0"]], first)
            b = torch.cat([b - old["B0"], old["B0"]], last)
        if scale != new.scale:
            b = b * (scale / new.scale)
        new.A.copy_(like(new.A, _filled(a, new.A.shape, first)))
        new.B.copy_(like(new.B, _filled(b, new.B.shape, last)))

    return write


def _filled(factor: Tensor, shape: torch.Size, along: int) -> Tensor:
    """Return a factor of this shape, whose rank is filled up with zeros."""
    if factor.shape == shape:
        return factor
    whole = torch.zeros(shape)
    whole.narrow(along, 0, factor.shape[along]).copy_(factor)
    return whole


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite: a sum in double precision is then, and it is one pass without a copy."""
    return math.isfinite(tensor.sum(dtype=torch.float64).item())


def _leaf(target: Target, leaf: str) -> str:
    return leaf if target.weight is None else f"{LowRankWeights.part_name(target.weight)}.{leaf}"
