"""HiRA: ``h = W x + (W ∘ (B A)) x``, its counts, the rank of its update, and PEFT's."""

import copy
from pathlib import Path

import peft
import pytest
import torch

from lightning_peft import HiRA, TuningError, merge
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, output
from tests.interop.twins import check_twin, shaken
from tests.models import tiny

R = 2


class TestHiRA(MethodContract):
    method = HiRA(r=R)
    backbones = ("bert", "gpt2")
    on_families = (("hira", HiRA(r=2)),)

    def count(self, kind: str) -> int:
        """L r (in + out) for each target."""
        return 2 * R * {"bert": 2 * (32 + 32), "gpt2": 32 + 96}[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_formula_of_high_rank_and_the_merged_weight(kind: str) -> None:
    model = shaken(kind, HiRA(r=R, target_modules="all-linear"))
    for place in grafts(model):
        weight = place.host.weight.t() if kind == "gpt2" else place.host.weight
        factor = torch.stack([place.graft.B[i] @ place.graft.A for i in range(len(weight))])
        x = torch.randn(3, weight.shape[1])
        expected = tiny(kind).get_submodule(place.path)(x) + x @ (weight * factor).t()
        assert_near({"": expected}, {"": place.host(x)}, 1e-5)
        assert torch.linalg.matrix_rank(factor.detach()) == R
        assert torch.linalg.matrix_rank((weight * factor).detach()) == min(weight.shape)
    live = output(model, kind)
    assert_near({"": live}, {"": output(merge(copy.deepcopy(model)), kind)}, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_has_the_same(kind: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    config = peft.HiraConfig(
        r=R, hira_dropout=0.1, target_modules=targets, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
    )
    check_twin(kind, config, tmp_path)


def test_in_half_precision_a_small_change_is_not_rounded_away() -> None:
    model = tiny("llama").bfloat16()
    HiRA(r=1).apply(model)
    place = next(iter(grafts(model)))
    with torch.no_grad():
        place.graft.A.fill_(1.0)
        place.graft.B.fill_(2.0**-12)
        out = place.graft.after(torch.zeros(1, 32).bfloat16(), place.host, torch.ones(1, 32).bfloat16())
    expected = place.host.weight.double().sum(1) * 2.0**-12
    torch.testing.assert_close(out[0].double(), expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r=0 is out of range: take 1 or more"),
        ({"init": "pissa"}, "init='pissa' is no initial value of A: take one of kaiming, gaussian"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=message):
        HiRA(**arguments).apply(model)
    HiRA(r=1).apply(model)
