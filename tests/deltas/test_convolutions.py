"""Deltas of convolutions of one and three dimensions: sums, another in the place of one, a LoRA of any change."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from lightning_peft import HiRA, LoRA, Method, TuningError, combine_deltas, load_delta, save_delta, to_lora
from lightning_peft.core.graft import grafts
from tests.contract import shake
from tests.interop.exchange import computed
from tests.interop.test_other_layers import call, layers

NAMES = ["conv1d", "conv3d", "lin0"]


def made(*methods: Method) -> nn.Module:
    model = layers()
    for method in methods:
        method.apply(model)
    torch.manual_seed(3)
    shake(model)
    return model


def change(model: nn.Module, delta: str) -> dict[str, torch.Tensor]:
    """Return by how much a delta changes each weight."""
    return {p.path: p.graft.fold("weight", torch.zeros_like(p.host.weight), p.host) for p in grafts(model, delta)}


def lora(names: list[str], alpha: float = 16.0, name: str | None = None, r: int = 2) -> LoRA:
    return LoRA(r=r, alpha=alpha, target_modules=names, exclude="end.*", name=name)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_the_sum_of_two(how: Literal["cat", "svd"]) -> None:
    model = made(lora(NAMES, name="one"), dataclasses.replace(lora(NAMES, 5.0, "other"), exclude="end[.].*|end"))
    one, other = change(model, "lora_one"), change(model, "lora_other")
    combine_deltas(model, {"one": 0.7, "other": 0.3}, "both", how, r=4)
    found = change(model, "lora_both")
    for name in NAMES:
        torch.testing.assert_close(found[name], 0.7 * one[name] + 0.3 * other[name], atol=1e-5, rtol=1e-5)


def test_groups_have_means_and_no_sum() -> None:
    model = made(lora(["grouped"], name="one"), lora(["grouped"], name="other"))
    with pytest.raises(TuningError, match=r"grouped is a convolution of several groups, .* take how='linear'"):
        combine_deltas(model, {"one": 0.7, "other": 0.3}, "both", "cat")
    combine_deltas(model, {"one": 0.7, "other": 0.3}, "both", "linear")
    a = {name: next(iter(grafts(model, f"lora_{name}"))).graft.A for name in ("one", "other", "both")}
    torch.testing.assert_close(a["both"], 0.7 * a["one"] + 0.3 * a["other"])


def test_another_rank_takes_the_place_of_one(tmp_path: Path) -> None:
    files = {}
    for r in (1, 3):
        model = made(lora(NAMES, r / 2, r=r))
        files[save_delta(model, tmp_path / f"{r}.safetensors")] = computed(call, model)
    model = layers()
    for file, expected in (*files.items(), *files.items()):
        load_delta(model, file, "slot", max_r=3)
        torch.testing.assert_close(computed(call, model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [lora(NAMES), HiRA(r=2, target_modules=["emb", *NAMES], exclude="end.*")])
def test_a_change_of_kernels_is_a_lora(method: Method) -> None:
    model = made(method)
    expected = computed(call, model)
    hosts = {place.path for place in grafts(model)}
    lost = to_lora(model, 64)  # at most as many as channels
    assert lost.keys() == hosts
    if isinstance(method, LoRA):
        torch.testing.assert_close(computed(call, model), expected, atol=1e-4, rtol=1e-4)
    else:
        assert {name for name, share in lost.items() if share < 1e-5} >= {"emb", "lin0"}
        assert max(lost.values()) < 1


def test_gaussian_values_have_the_deviation_of_the_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(64, 64, 3))
    LoRA(r=4, init="gaussian", target_modules=["0"]).apply(model)
    assert abs(next(iter(grafts(model))).graft.A.std() - 0.25) < 0.02
