"""Any two methods either live on one backbone, in each order, or the second one says that it cannot.

The pairs are made from what the package exports, so a new method takes part as soon as it is there.
"""

import dataclasses
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    BitFit,
    DiffPruning,
    LoRA,
    Method,
    PromptTuning,
    TuningError,
    load_delta,
    merge,
    save_delta,
)
from lightning_peft.methods import every_method
from tests.contract import assert_near, assert_same, copy_of, output, shake
from tests.contracts import contracts, example
from tests.models import KINDS, batch, known, tiny

BESIDE_ALL = {"Adapter", "BitFit", "DiffPruning", "LoRA", "PrefixTuning", "PromptTuning"}
"""Methods of each kind of joint, which are tried beside all others each time; the other pairs with the slow tests."""


def new(name: str) -> Method:
    return LoRA(r=2, use_dora=True) if name == "LoRA" else example(name)


@cache
def fits(name: str, kind: str) -> bool:
    """Tell whether a method can be applied to a kind of model."""
    try:
        applied(kind, new(name))
    except TuningError:
        return False
    return True


def pairs(ways: Any) -> list[Any]:
    """Return all pairs of methods, ordered or not, with a kind of model that suits each of the two alone."""
    found = []
    for first, second in ways(every_method(), 2):
        common = next((kind for kind in KINDS if fits(first, kind) and fits(second, kind)), None)
        marks = () if BESIDE_ALL & {first, second} else pytest.mark.slow
        if common is not None:
            found.append(pytest.param(common, first, second, id=f"{first}+{second}-{common}", marks=marks))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        ordered = "order" not in metafunc.fixturenames
        ways = itertools.permutations if ordered else itertools.combinations
        metafunc.parametrize(("kind", "first", "second"), pairs(ways))


def applied(kind: str, *chosen: Method) -> nn.Module:
    """Return a tiny model with the methods applied, their random values being the same each time."""
    model = known(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for method in chosen:
            method.apply(model)
    return model


def prepared(kind: str, *chosen: Method) -> dict[str, Tensor]:
    inputs: Any = batch(kind)
    for method in chosen:
        inputs = method.prepare(inputs)
    return dict(inputs)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, kind: str, *chosen: Method) -> None:
    """Take two SGD steps; everything trained must get a gradient."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, kind, *chosen).backward()
        assert [name for name, p in parameters.items() if p.grad is None] == []
        optimizer.step()
    model.eval()


def loss_of(model: nn.Module, kind: str, *chosen: Method) -> Tensor:
    """Return the loss with all penalties."""
    loss = model(**prepared(kind, *chosen)).loss
    for method in chosen:
        penalty = method.penalty(model)
        loss = loss if penalty is None else loss + penalty
    return loss


def out(model: nn.Module, kind: str, *chosen: Method) -> Tensor:
    with torch.no_grad():
        return model(**prepared(kind, *chosen)).logits


def test_two_methods_on_one_backbone(kind: str, first: str, second: str, tmp_path: Path) -> None:
    one, other = new(first), new(second)
    model = applied(kind, one)
    alone, before = out(model, kind, one), trained(model)
    try:
        other.apply(model)
    except TuningError:
        assert torch.equal(out(model, kind, one), alone), "a refusal must change nothing"
        assert trained(model).keys() == before.keys()
        return
    start = trained(model)
    assert before.keys() <= start.keys()
    train(model, kind, one, other)
    end = trained(model)
    for names in (before.keys(), start.keys() - before.keys()):
        assert not names or any(not torch.equal(start[name], end[name]) for name in names)
    save_delta(model, tmp_path / "delta.safetensors")
    again = [dataclasses.replace(method) for method in (one, other)]
    fresh = applied(kind, *again)
    load_delta(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(out(model, kind, one, other), out(fresh, kind, *again))


def test_merged_they_compute_what_they_did(kind: str, first: str, second: str) -> None:
    one, other = new(first), new(second)
    model = known(kind)
    try:
        model = applied(kind, one, other)
        shake(model)
        live = out(model, kind, one, other)
        merge(model)
    except TuningError:
        return
    assert_near({"": live}, {"": out(model, kind)}, 1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first goes first", "second goes first"])
def test_they_are_removed_in_any_order(kind: str, first: str, second: str, order: tuple[int, int]) -> None:
    both = (new(first), new(second))
    plain = tiny(kind)
    try:
        model = applied(kind, *both)
    except TuningError:
        return
    if all(method.keeps_originals for method in both):
        train(model, kind, *both)
        model.zero_grad()
    left = both[order[1]]
    both[order[0]].remove(model)
    assert left.is_applied(model)
    assert not both[order[0]].is_applied(model)
    own = [p for p in model.parameters() if p.requires_grad]
    assert bool(own) == (type(left).__name__ != "PrefixLM")  # which trains nothing
    if own:
        loss_of(model, kind, left).backward()
    assert all(p.grad is not None for p in own)
    model.zero_grad()
    left.remove(model)
    assert_same(copy_of(plain.state_dict()), copy_of(model.state_dict()))
    assert torch.equal(output(plain, kind), output(model, kind))
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_each_method_fits_some_model_here() -> None:
    """Else a pair would be left out in silence: what has one of these models in its contract is tried on one."""
    elsewhere = {name for name in every_method() if not any(fits(name, kind) for kind in KINDS)}
    here = {type(kind.method).__name__ for kind in contracts().values() if set(KINDS) & set(kind.backbones)}
    assert here & elsewhere == set()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "chosen",
    [(LoRA(r=2, use_dora=True), IA3()), (IA3(), LoRA(r=2)), (IA3(), BitFit()), (LoRA(r=2, bias="all"), IA3())],
    ids=["LoRA+IA3", "IA3+LoRA", "IA3+BitFit", "LoRA with biases+IA3"],
)
def test_together_they_fold_into_the_weights(kind: str, chosen: tuple[Method, ...]) -> None:
    model = applied(kind, *chosen)
    shake(model)
    live = output(model, kind)
    merge(model)
    assert list(model.state_dict()) == list(tiny(kind).state_dict())
    assert_near({"": live}, {"": output(model, kind)}, 1e-5)


@pytest.mark.parametrize("other", [LoRA(r=2, use_dora=True), LoRA(r=2), IA3()], ids=["DoRA", "LoRA", "IA3"])
@pytest.mark.parametrize("step", [1, -1], ids=["pruned first", "pruned last"])
def test_a_sparse_difference_folds_below_the_others_in_any_order(step: int, other: Method) -> None:
    model = applied("bert", *[DiffPruning(), dataclasses.replace(other)][::step])
    shake(model)
    live = output(model, "bert")
    merge(model)
    assert_near({"": live}, {"": output(model, "bert")}, 1e-5)


def test_a_prompt_and_low_rank_updates_are_the_prompt_on_the_merged_model() -> None:
    lora, prompt = LoRA(r=2), PromptTuning(num_virtual_tokens=2, init="random_uniform")
    model = applied("gpt2", lora, prompt)
    shake(model)
    both = out(model, "gpt2", prompt)
    lora.merge(model)
    assert_near({"": both}, {"": out(model, "gpt2", prompt)}, 1e-5)
