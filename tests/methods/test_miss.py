"""MiSS: ``h = W x + Dᵀ Σ_k x_k``, its counts, its weights, and PEFT's."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lightning_peft import MiSS, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, output, snapshot
from tests.interop.twins import check_twin, shaken
from tests.models import tiny

R = 4


class TestMiSS(MethodContract):
    method = MiSS(r=R)
    backbones = ("bert", "gpt2")
    on_families = (("miss", MiSS(r=2)),)

    def count(self, kind: str) -> int:
        """L r out for each target: query and value, or the fused projection."""
        return 2 * R * {"bert": 32 + 32, "gpt2": 96}[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_formula_and_the_merged_weight(kind: str) -> None:
    model = shaken(kind, MiSS(r=R, target_modules="all-linear"))
    place = next(iter(grafts(model)))
    x = torch.randn(3, 5, 32)
    bare = tiny(kind).get_submodule(place.path)
    expected = bare(x)
    for i in range(3):
        for j in range(5):
            for k in range(32 // R):
                expected[i, j] = expected[i, j] + x[i, j, R * k : R * (k + 1)] @ place.graft.D
    assert_near({"": expected}, {"": place.host(x)}, 1e-5)
    live = output(model, kind)
    assert_near({"": live}, {"": output(merge(copy.deepcopy(model)), kind)}, 1e-5)


def test_peft_has_the_same(tmp_path: Path) -> None:
    config = peft.MissConfig(r=R, miss_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    check_twin("llama", config, tmp_path)


def test_dropout_is_on_the_input_of_the_update() -> None:
    model = shaken("bert", MiSS(r=R, dropout=0.5))
    place = next(iter(grafts(model)))
    x = torch.randn(2, 32)
    place.graft.train()
    torch.manual_seed(0)
    found = place.host(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    bare = tiny("bert").get_submodule(place.path)
    assert_near({"": bare(x) + dropped.view(2, 8, R).sum(1) @ place.graft.D}, {"": found}, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 5}, r"r=5 does not divide 32, which is the input of .*query: take 4,"),
        ({"r": 40}, r"r=40 does not divide 32, .* take 32,"),
        ({"r": 0}, "r=0 is out of range"),
        ({"target_modules": ["nope"]}, "'nope' matches no Linear"),
        ({"target_modules": []}, "MiSS is left no layer"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: dict, message: str) -> None:
    model = tiny("bert")
    before = snapshot(model, "bert")
    with pytest.raises(TuningError, match=message):
        MiSS(**{"r": R} | arguments).apply(model)
    assert snapshot(model, "bert").keys() == before.keys()
    assert not list(grafts(model))
    MiSS(r=4).apply(model)


def test_where_projections_have_other_names_it_takes_the_linear_layers_of_the_blocks() -> None:
    model = nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2), nn.Linear(8, 2)
    )
    MiSS(r=2).apply(model)
    layers = ("linear1.miss.D", "linear2.miss.D", "self_attn.miss_out_proj.inner.D")
    found = {name for name in collect(model) if "miss" in name}
    assert found == {f"0.layers.{i}.{name}" for i in range(2) for name in layers}
