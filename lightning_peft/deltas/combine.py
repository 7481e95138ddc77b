"""Makes one delta of several, of a live model or of files."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.bases.prefix import PrefixMethod
from lightning_peft.core.delta import collect, metadata
from lightning_peft.core.delta_file import plain, read_delta, write_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, grafts
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.run import selected, unwrapped
from lightning_peft.core.tuning import Tuning, chosen
from lightning_peft.deltas import low_rank_sums
from lightning_peft.deltas.loading import load_delta
from lightning_peft.deltas.merging_rules import How, Rule
from lightning_peft.deltas.named_files import without_name
from lightning_peft.deltas.newcomer import newcomer
from lightning_peft.methods.lora import LoRA
from lightning_peft.prompts.prefix import Prefix
from lightning_peft.prompts.virtual_tokens import PromptRows
from lightning_peft.training.rebuild import pretrained
from lightning_peft.updates.factors import Factors
from lightning_peft.updates.low_rank_weights import LowRankWeights

_log = logging.getLogger(__name__)


def combine(
    files: Sequence[str | Path],
    weights: Sequence[float],
    file: str | Path,
    how: How = "linear",
    backbone: nn.Module | str | None = None,
    r: int | None = None,
    density: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write one delta file of several.

    Args:
        files: the deltas, of one backbone.
        weights: of each; one file of weight 1 gives itself.
        file: where to write.
        how: see `combine_deltas`.
        backbone: the model, or its folder or hub id; None: what the first delta was trained on.
        r: rank of what comes out; None: the greatest that goes in.
        density: the share of entries that 'ties' and 'dare' keep.
        seed: of what 'dare' drops.

    Raises:
        TuningError: the files are of two backbones, or have no common form for this rule.
    """
    if len(files) != len(weights) or not files:
        raise TuningError(f"{len(files)} files have {len(weights)} weights: give one weight for each file.")
    if not isinstance(backbone, nn.Module):
        _, meta = read_delta(files[0])
        backbone = pretrained(next(iter(meta["backbones"].values())), backbone, str(files[0]))
    with _visiting(backbone):
        names = [f"combine_{i}" for i in range(len(files))]
        for source, name in zip(files, names, strict=True):
            load_delta(backbone, source, name)
        combine_deltas(backbone, dict(zip(names, weights, strict=True)), "combined", how, r, density, seed)
        tuning = Tuning.of(backbone)
        assert tuning is not None
        with selected(backbone, tuning.of_delta("combined")):
            tensors, meta = without_name(collect(backbone), metadata(backbone), backbone, "combined")
        return write_delta(file, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, plain(meta))


def combine_deltas(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    how: How = "linear",
    r: int | None = None,
    density: float = 1.0,
    seed: int = 0,
) -> None:
    """Make one delta of several on a backbone, which stay; the new one computes, alone.

    A tensor whose effect is linear is its neutral value and the weighted sum of the changes from it: 0 for biases and
    for B of a LoRA, 1 for IA3, the backbone's value for its own tensors. Others are weighted means: A of a LoRA, the
    first half of an adapter, prompts and prefixes, whose weights must add up to 1.

    Args:
        model: a backbone, or a module with one.
        weights: names of deltas, with their weights.
        name: of the new delta.
        how: 'linear'; 'cat', the exact sum of low-rank updates, and prompts one after the other; 'svd', that sum at
            rank ``r``; 'ties', 'dare_linear' and 'dare_ties' as in the papers, at rank ``r``.
        r: rank of what comes out; None: the greatest that goes in.
        density: the share of entries that 'ties' and 'dare' keep.
        seed: of what 'dare' drops.

    Raises:
        TuningError: there is no such delta, or they have no common form for this rule; nothing has changed then.
    """
    if how == "linear" and abs(sum(weights.values())) < 1e-6:
        raise TuningError(f"weights {list(weights.values())} add up to 0, so there is no mean: take 'cat' or 'svd'.")
    rule, module = Rule(how, r, density, seed), unwrapped(model)
    ((backbone, tuning, _),) = [found for found in chosen(module, list(weights)) if found[2]]
    methods = _by_kind(tuning, weights)
    parts = low_rank_sums.parts_of(backbone, low_rank_sums.loras(tuning, weights))
    new = [_new(kind, each, parts, rule) for kind, each in methods.items()]
    with newcomer(backbone, name):
        for method in new:
            dataclasses.replace(method, name=name, backbone=None).apply(backbone)
        lost = [_fill(backbone, tuning, key, methods, parts, rule) for key in tuning.of_delta(name)]
    if worst := max(lost, default=0.0):
        _log.warning("The rank has no room for %.1f %% of the combined update, where it is most.", 100 * worst)


def _by_kind(
    tuning: Tuning, weights: Mapping[str, float]
) -> dict[type[TuningMethod], list[tuple[float, TuningMethod]]]:
    """Return the methods of some deltas with their weights, those of a class together."""
    methods: dict[type[TuningMethod], list[tuple[float, TuningMethod]]] = {}
    for delta, weight in weights.items():
        for key in tuning.of_delta(delta):
            methods.setdefault(type(tuning.methods[key]), []).append((weight, tuning.methods[key]))
    return methods


def _new(
    kind: type[TuningMethod],
    methods: Sequence[tuple[float, TuningMethod]],
    parts: Mapping[str, list[low_rank_sums.Part]],
    rule: Rule,
) -> TuningMethod:
    """Return the method that has room for what comes out."""
    first = methods[0][1]
    if isinstance(first, LoRA):
        return low_rank_sums.new_method([m for _, m in methods if isinstance(m, LoRA)], parts, rule)
    lengths = [vars(method).get("num_virtual_tokens") for _, method in methods]
    free = {*kind.may_change, *(["num_virtual_tokens"] if rule.how == "cat" else [])}
    for _, other in methods[1:]:
        for argument, value in first.init_args().items():
            if argument not in free and vars(other)[argument] != value:
                raise TuningError(
                    f"{kind.__name__} has {argument}={value!r} in one delta and {vars(other)[argument]!r} in another: "
                    "combine deltas that were made alike."
                )
    if rule.how == "cat" and lengths[0] is not None and len(lengths) > 1:
        first = dataclasses.replace(first, num_virtual_tokens=sum(lengths))  # type: ignore[call-arg, arg-type]
    if isinstance(first, PrefixMethod) and len(methods) > 1:  # networks have no mean, what they give has one
        return dataclasses.replace(first, mid_dim=None)
    return dataclasses.replace(first)


@torch.no_grad()
def _fill(
    backbone: nn.Module,
    tuning: Tuning,
    key: str,
    methods: Mapping[type[TuningMethod], Sequence[tuple[float, TuningMethod]]],
    parts: Mapping[str, list[low_rank_sums.Part]],
    rule: Rule,
) -> float:
    """Give the grafts of a new method their values; return the greatest share that a rank has no room for."""
    new, lost = tuning.methods[key], 0.0
    if isinstance(new, LoRA):
        for name, target in low_rank_sums.updated(backbone, key).items():
            factors = low_rank_sums.part_of(target, key)
            lost = max(lost, low_rank_sums.fill(factors, parts[name], rule))
    for place in list(grafts(backbone, key)):
        old = []
        for weight, method in methods[type(new)]:
            child = getattr(place.host, method.key + place.name.removeprefix(key), None)
            if isinstance(child, Graft):
                old.append((weight, child))
        _fill_graft(place, old, rule)
    return lost


def _fill_graft(place: Grafted[Graft], old: Sequence[tuple[float, Graft]], rule: Rule) -> None:
    graft, weights = place.graft, [weight for weight, _ in old]
    every = {**dict(graft.named_parameters()), **dict(graft.named_buffers())}
    neutrals = {name: graft.neutral(place.host, name) if t.is_floating_point() else None for name, t in every.items()}
    joins = rule.how == "cat" and isinstance(graft, (Prefix, PromptRows)) and len(old) > 1
    for name, tensor in every.items():
        leaf = name.rpartition(".")[2]
        if isinstance(graft, (Factors, LowRankWeights)) and leaf != "m":
            continue
        values = [_held(each, name) for _, each in old]
        if joins:
            tensor.copy_(_one_after_the_other(graft, values, weights))
            continue
        if any(value.shape != tensor.shape for value in values):
            raise TuningError(
                f"{place.path}.{name} has different shapes in the deltas: combine deltas that were made alike."
            )
        tensor.copy_(
            _value(
                f"{place.path}.{name}",
                values,
                neutrals[name],
                weights,
                rule,
                any(n is not None for n in neutrals.values()),
            )
        )


def _held(graft: Graft, name: str) -> Tensor:
    """Return a tensor of a graft; of a prefix what its network gives, if it has one."""
    if isinstance(graft, Prefix):
        keys, values = graft.rows()
        return {"keys": keys, "values": values, **dict(graft.named_parameters())}[name]
    return {**dict(graft.named_parameters()), **dict(graft.named_buffers())}[name]


def _one_after_the_other(graft: Graft, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if any(weight != 1 for weight in weights):
        raise TuningError(f"prompts that follow one another have no weights, these are {weights}: give each 1.")
    return torch.cat(list(values), 1 if isinstance(graft, Prefix) else 0)


def _value(
    name: str,
    values: Sequence[Tensor],
    neutral: Tensor | None,
    weights: Sequence[float],
    rule: Rule,
    is_scaled: bool,
) -> Tensor:
    """Return what comes out for one tensor; ``is_scaled``: whether another one of its graft carries the weights."""
    if len(values) == 1 and weights[0] == 1:
        return values[0]
    if not values[0].is_floating_point():
        if all(torch.equal(value, values[0]) for value in values):
            return values[0]
        raise TuningError(
            f"{name} holds indices that differ between the deltas, which have no mean: merge one of them."
        )
    if neutral is not None:
        return neutral + rule.change([value - neutral for value in values], weights)
    if not rule.is_sum:
        raise TuningError(f"{name} has no value from which it changes, as how={rule.how!r} needs: take how='linear'.")
    total = sum(weights)
    if total == 0 or (not is_scaled and abs(total - 1) > 1e-6):
        raise TuningError(f"{name} is a weighted mean, but the weights add up to {total:g}: let them add up to 1.")
    return (
        sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(values[0]))
        / total
    )


@contextmanager
def _visiting(backbone: nn.Module) -> Iterator[None]:
    """Give a backbone back with the deltas that it came with, and those at work that were."""
    tuning = Tuning.of(backbone)
    before, off = set() if tuning is None else set(tuning.methods), frozenset() if tuning is None else tuning.switch.off
    try:
        yield
    finally:
        tuning = Tuning.of(backbone)
        for key in [] if tuning is None else list(tuning.methods):
            if key not in before:
                tuning.undo(backbone, key)  # type: ignore[union-attr]
        if before and tuning is not None:
            tuning.rest(backbone, off)
