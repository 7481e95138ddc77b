"""Combines the low-rank updates of several LoRAs on one backbone into those of one."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import Tuning
from lightning_peft.deltas.merging_rules import Rule, factors_of_rank, of_rank, side_by_side
from lightning_peft.methods.lora import LoRA
from lightning_peft.updates.factors import Factors
from lightning_peft.updates.low_rank_layers import GRAFTS
from lightning_peft.updates.low_rank_weights import LowRankWeights
from lightning_peft.updates.targets import Target, matrix_name


class Part(NamedTuple):
    """One low-rank update: its weight in the sum, and its parameters."""

    weight: float
    factors: Factors

    @property
    def rank(self) -> int:
        """The rank of the whole update."""
        return int(self.matrices()[0].shape[-2])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A [..., r, in] and B [..., out, r], with the scale in B; kernels are flattened."""
        a, b = (factor.detach() for factor in self.factors.factors())
        if self.factors.of_kernels:
            a, b = a.flatten(1), b.flatten(1)
        return a, b * self.factors.scale


def part_of(target: Target, key: str) -> Factors:
    """Return the update that a method has for a matrix."""
    graft = target.host.get_submodule(key)
    if isinstance(graft, LowRankWeights):
        assert target.weight is not None
        return graft.part(target.weight)
    assert isinstance(graft, Factors)
    return graft


def updated(backbone: nn.Module, key: str) -> dict[str, Target]:
    """Return the matrices that the LoRA of this key has updates of, by name."""
    found: dict[str, Target] = {}
    for path, host, _, graft in grafts(backbone, key):
        if isinstance(graft, LowRankWeights):
            called = isinstance(host, tuple(GRAFTS))
            found |= {path if called else matrix_name(path, weight): Target(host, weight) for weight in graft.weights}
        elif isinstance(graft, Factors):
            found[path] = Target(host)
    return found


def parts_of(backbone: nn.Module, methods: Sequence[tuple[float, LoRA]]) -> dict[str, list[Part]]:
    """Return the updates of each matrix.

    Raises:
        TuningError: some have magnitudes and some have none.
    """
    if len({method.use_dora for _, method in methods}) > 1:
        raise TuningError("use_dora is true for some of the deltas and false for others: combine like with like.")
    found: dict[str, list[Part]] = {}
    for weight, method in methods:
        for name, target in updated(backbone, method.key).items():
            found.setdefault(name, []).append(Part(weight, part_of(target, method.key)))
    return found


def new_method(methods: Sequence[LoRA], parts: Mapping[str, list[Part]], rule: Rule) -> LoRA:
    """Return the LoRA that has room for what comes out, its scales being 1 unless all methods are alike.

    Raises:
        TuningError: 'linear' cannot take the mean of factors of different ranks, or beginnings.
    """
    first = methods[0]
    if rule.how == "linear" and _are_alike(methods):
        return dataclasses.replace(first)
    starts = any(part.factors.A0 is not None for each in parts.values() for part in each)
    ranks = {name: _rank(name, each, rule, starts) for name, each in parts.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return dataclasses.replace(
        first,
        r=r,
        alpha=float(r),
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern={name: float(rank) for name, rank in others.items()},
        target_modules="|".join(map(re.escape, parts)),
        layers=None,
        exclude=_excluded(methods),
        init="kaiming",
        svd_iterations=None,
    )


def _excluded(methods: Sequence[LoRA]) -> str | None:
    """Return a pattern of what each of the methods leaves out, as they may the head."""
    patterns = list(dict.fromkeys(method.exclude for method in methods))
    if None in patterns:
        return None
    return patterns[0] if len(patterns) == 1 else "".join(rf"(?=(?:{each})\Z)" for each in patterns) + ".*"


@torch.no_grad()
def fill(new: Factors, parts: Sequence[Part], rule: Rule) -> float:
    """Give an update the values that come out; return the share of it that its rank has no room for."""
    weights = [part.weight for part in parts]
    if rule.how == "linear":
        _fill_with_means(new, parts)
        return 0.0
    rank = new.rank
    if rule.is_sum:
        a, b = side_by_side([part.matrices() for part in parts], weights)
        matrix = None if a.shape[-2] <= rank else b @ a
        a, b = (a, b) if matrix is None else of_rank(a, b, rank)
    else:
        changes = [b @ a for a, b in (part.matrices() for part in parts)]
        matrix = rule.change(changes, weights)
        a, b = factors_of_rank(matrix, rank)
    lost = 0.0 if matrix is None else float((matrix - b @ a).norm() / matrix.norm().clamp(min=1e-30))
    _put(new, a, b)
    return lost


def _fill_with_means(new: Factors, parts: Sequence[Part]) -> None:
    shares = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    scales = torch.tensor([part.factors.scale / new.scale for part in parts], dtype=torch.float64)
    old_ones = [part.factors.state_dict() for part in parts]
    for name, tensor in new.state_dict().items():
        if name in ("A", "A0", "B", "B0"):
            by = shares / shares.sum() if name.startswith("A") else shares * scales
            old = torch.stack([state[name] for state in old_ones])
            tensor.copy_(torch.einsum("n,n...->...", by.to(old.device), old.double()))


def _put(new: Factors, a: Tensor, b: Tensor) -> None:
    rank = a.shape[-2]
    if new.of_kernels:
        new.A[:rank] = a.view(rank, *new.A.shape[1:])
        new.B.zero_()[:, :rank] = b.view(*b.shape, *[1] * (new.B.dim() - 2)) / new.scale
        return
    new.A[..., :rank, :] = a
    new.B.zero_()[..., :rank] = b / new.scale


def _rank(name: str, parts: Sequence[Part], rule: Rule, starts: bool) -> int:
    """Return the rank of what comes out for a matrix."""
    ranks = [part.rank for part in parts]
    a, b = parts[0].factors.A, parts[0].factors.B
    kernels = parts[0].factors.of_kernels
    limit = min(a.shape[1], b.shape[0]) if kernels else min(a.shape[-1], b.shape[-2])
    if rule.how == "linear":
        if len(set(ranks)) > 1 or starts:
            why = (
                f"ranks {', '.join(map(str, ranks))} of {name}"
                if len(set(ranks)) > 1
                else "beginnings of PiSSA or OLoRA"
            )
            raise TuningError(f"{why} have no mean: take how='cat', which is the exact sum, or 'svd'.")
        return ranks[0]
    if kernels and b.shape[1] != a.shape[0]:
        raise TuningError(
            f"{name} is a convolution of several groups, whose update is no matrix product, so there is no sum of rank "
            "r: take how='linear', or leave one delta out."
        )
    return min(limit, sum(ranks) if rule.how == "cat" else rule.r or max(ranks))


def _are_alike(methods: Sequence[LoRA]) -> bool:
    free = LoRA.may_change
    arguments = [{n: v for n, v in m.init_args().items() if n not in free} for m in methods]
    return all(each == arguments[0] for each in arguments)


def loras(tuning: Tuning, weights: Mapping[str, float]) -> list[tuple[float, LoRA]]:
    """Return the LoRAs of these deltas with the weights of the deltas."""
    found = [(weight, tuning.methods[key]) for name, weight in weights.items() for key in tuning.of_delta(name)]
    return [(weight, method) for weight, method in found if isinstance(method, LoRA)]
