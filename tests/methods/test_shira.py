"""SHiRA: ``W' = W + S``: its places and values, its counts, sparse switching, and PEFT's."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lightning_peft import LoRA, SHiRA, TuningError, activate, collect, load_delta, merge, read_delta, save_delta
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, assert_same, output
from tests.interop.twins import check_twin, shake, shaken
from tests.models import tiny

R = 2


class TestSHiRA(MethodContract):
    method = SHiRA(r=R)
    backbones = ("bert", "gpt2")
    on_families = (("shira", SHiRA(r=2)),)
    traces_backward = True

    def count(self, kind: str) -> int:
        """L r (in + out) for each target."""
        return 2 * R * {"bert": 2 * (32 + 32), "gpt2": 32 + 96}[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_it_is_the_sum_and_the_merged_weight(kind: str, mask: str) -> None:
    model = shaken(kind, SHiRA(r=R, mask=mask, target_modules="all-linear"))
    for place in grafts(model):
        weight = tiny(kind).get_submodule(place.path).weight.detach().clone()
        matrix = weight.t() if kind == "gpt2" else weight
        rows, columns = place.graft.indices.tolist()
        assert len({*zip(rows, columns, strict=True)}) == R * sum(matrix.shape) == len(rows)
        if mask == "magnitude":
            least = matrix.abs()[rows, columns].min()
            assert (matrix.abs() >= least).sum() == len(rows)
        for i, j, value in zip(rows, columns, place.graft.values.tolist(), strict=True):
            matrix[i, j] += value
        x = torch.randn(3, 5, matrix.shape[1])
        bias = place.host.bias
        expected = x @ matrix.t() + (0 if bias is None else bias)
        assert_near({"": expected}, {"": place.host(x)}, 1e-5)
        update = matrix - (place.host.weight.t() if kind == "gpt2" else place.host.weight)
        assert torch.linalg.matrix_rank(update) > 2 * R
    live = output(model, kind)
    assert_near({"": live}, {"": output(merge(copy.deepcopy(model)), kind)}, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_gradients_are_those_that_the_transforms_of_torch_func_give(kind: str, ordered: bool) -> None:
    """They run plain operations; twice differentiated, too, and with DoRA behind, which scales the output."""
    model = shaken(kind, LoRA(r=2, use_dora=True))
    SHiRA(r=R).apply(model)
    shake(model)
    host = next(place.host for place in grafts(model) if place.name == "shira")
    if not ordered:
        host.shira.indices.copy_(host.shira.indices.flip(1))
    host.lora.m.data.mul_(1.5)
    x = torch.randn(3, 5, host.weight.shape[0 if kind == "gpt2" else 1], requires_grad=True)
    values = {"shira.values": host.shira.values}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(host, values, x).tanh().square().sum()

    def steepness(values: dict[str, Tensor], x: Tensor) -> Tensor:
        ours, of_x = torch.func.grad(loss, (0, 1))(values, x)
        return ours["shira.values"].square().sum() + of_x.square().sum()

    given = (values["shira.values"], x)
    own = torch.autograd.grad(loss(values, x), given)
    assert host.shira.apart
    assert_near(both(torch.func.grad(loss, (0, 1))(values, x)), both(own), 1e-5)
    slopes = torch.autograd.grad(loss(values, x), given, create_graph=True)
    twice = torch.autograd.grad(sum(each.square().sum() for each in slopes), given)
    assert_near(both(own), both(slopes), 1e-5)
    assert_near(both(torch.func.grad(steepness, (0, 1))(values, x)), both(twice), 1e-4)


def both(gradients: Any) -> dict[str, Tensor]:
    values, x = gradients
    return {"values": values["shira.values"] if isinstance(values, dict) else values, "x": x}


def test_peft_has_the_same(tmp_path: Path) -> None:
    config = peft.ShiraConfig(r=R, random_seed=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    check_twin("llama", config, tmp_path)


def test_deltas_are_switched_by_their_entries_and_leave_the_weights(tmp_path: Path) -> None:
    model, weights = tiny("llama"), dict(tiny("llama").state_dict())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    alone = {}
    for by, name in ((0.1, "films"), (0.2, "books")):
        single = shaken("llama", SHiRA(r=R))
        shake(single, by)
        alone[name] = output(single, "llama")
        file = save_delta(single, tmp_path / f"{name}.safetensors")
        load_delta(model, file, name)
        entries = sum(R * sum(place.host.weight.shape) for place in grafts(model, f"shira_{name}"))
        assert sum(t.numel() for t in read_delta(file)[0].values()) == 3 * entries  # row, column and value of each
    for name, expected in alone.items():
        activate(model, name)
        assert torch.equal(output(model, "llama"), expected)
        assert_same(weights, {key: model.state_dict()[key] for key in weights})
        assert {key: model.state_dict()[key].data_ptr() for key in places} == places
    assert not torch.equal(*alone.values())


def test_a_delta_is_indices_and_values_and_entries_of_another_layer_are_refused(tmp_path: Path) -> None:
    model = shaken("llama", SHiRA(r=R))
    assert {name.rpartition(".")[2] for name in collect(model)} == {"indices", "values"}
    next(iter(grafts(model))).graft.indices[0, 5] = 32
    file = save_delta(model, tmp_path / "delta.safetensors")
    with pytest.raises(TuningError, match=r"q_proj of shape \[32, 32\] has not all entries of the file"):
        load_delta(tiny("llama"), file, "films")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 17}, r"r=17 makes 1088 entries of .*query, which has 1024: take 16 or less"),
        ({"mask": "struct"}, "mask='struct' chooses no entries: take one of random, magnitude"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=message):
        SHiRA(**arguments).apply(model)
    SHiRA(r=16).apply(model)
