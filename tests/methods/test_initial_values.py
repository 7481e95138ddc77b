"""Initial values over ten seeds against the rules of the authors' code: mean, deviation and bounds of each."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    DAPL,
    IA3,
    IVLP,
    L2P,
    VPT,
    WARP,
    ClipAdapter,
    CoOp,
    DualPrompt,
    HiRA,
    LoRA,
    LoReFT,
    MaPLe,
    Method,
    MLPHead,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TinyTL,
)
from lightning_peft.core import structure
from lightning_peft.core.graft import grafts
from lightning_peft.towers.window_prompts import ImagePrompts
from tests.models import HIDDEN, tiny

SEEDS = 10
PATCH = 3 * 4 * 4
"""Numbers in a patch of the tiny ViT."""


@dataclass
class Rule:
    """Which tensors of a method are drawn from which distribution."""

    method: Callable[[], Method]
    kind: str
    ending: str
    """What the names of the tensors end with, below their graft."""
    std: float
    mean: float = 0.0
    bound: float | None = None
    """Of a uniform distribution."""


def uniform(bound: float) -> dict[str, float]:
    return {"std": bound / math.sqrt(3), "bound": bound}


SPREAD = structure.initializer_range(tiny("bert"))
V = math.sqrt(6 / (PATCH + HIDDEN))
V8 = math.sqrt(6 / (PATCH + 8))
FAN = 1 / math.sqrt(HIDDEN)
RULES = {
    "LoRA: A of kaiming_uniform(sqrt 5)": Rule(lambda: LoRA(r=8), "llama", ".A", **uniform(FAN)),
    "LoRA: B of 0": Rule(lambda: LoRA(r=8), "llama", ".B", 0.0),
    "HiRA: A of kaiming_uniform(sqrt 5)": Rule(lambda: HiRA(r=8), "llama", ".A", **uniform(FAN)),
    "LoReFT: nn.Linear": Rule(LoReFT, "llama", "source", **uniform(FAN)),
    "IA3: 1": Rule(IA3, "t5", "", 0.0, 1.0),
    "T5 prompt tuning: U(-0.5, 0.5)": Rule(
        lambda: PromptTuning(num_virtual_tokens=40, init="random_uniform"), "gpt2", "weight", **uniform(0.5)
    ),
    "P-Tuning: the table of nn.Embedding": Rule(
        lambda: PTuning(num_virtual_tokens=12, encoder="mlp"), "gpt2", "table", 1.0
    ),
    "Prefix-Tuning: the table of nn.Embedding": Rule(
        lambda: PrefixTuning(num_virtual_tokens=40, mid_dim=16), "gpt2", "0.weight", 1.0
    ),
    "Prefix-Tuning: nn.Linear": Rule(
        lambda: PrefixTuning(num_virtual_tokens=4, mid_dim=64), "gpt2", "project.weight", **uniform(1 / 8)
    ),
    "P-Tuning v2: N(0, 0.02)": Rule(lambda: PTuningV2(num_virtual_tokens=40), "bert", "keys", 0.02),
    "P-Tuning v2: table of the network": Rule(
        lambda: PTuningV2(num_virtual_tokens=40, mid_dim=64), "bert", "0.weight", SPREAD
    ),
    "P-Tuning v2: layers of the network": Rule(
        lambda: PTuningV2(num_virtual_tokens=4, mid_dim=64), "bert", "project.weight", SPREAD
    ),
    "P-Tuning v2: biases of the network": Rule(
        lambda: PTuningV2(num_virtual_tokens=4, mid_dim=64), "bert", "project.bias", 0.0
    ),
    "VPT: U(-v, v)": Rule(lambda: VPT(num_virtual_tokens=40), "vit", "weight", **uniform(V)),
    "CoOp: N(0, 0.02)": Rule(CoOp, "clip", "weight", 0.02),
    "CoOp, for each class: N(0, 0.02)": Rule(lambda: CoOp(class_specific=True, num_classes=3), "clip", "weight", 0.02),
    "DAPL: N(0, 0.02)": Rule(DAPL, "clip", "", 0.02),
    "MaPLe: nn.Linear": Rule(lambda: MaPLe(init=None, depth=2), "clip", "projections.0.weight", **uniform(FAN)),
    "IVLP: N(0, 0.02)": Rule(lambda: IVLP(init=None, depth=2), "clip", "images.0", 0.02),
    "CLIP-Adapter: nn.Linear": Rule(ClipAdapter, "clip", "down.weight", **uniform(FAN)),
    "MLPHead: he_fout": Rule(MLPHead, "vit", "layers.0.weight", math.sqrt(2 / HIDDEN)),
    "L2P: U(-1, 1)": Rule(L2P, "vit", "", **uniform(1.0)),
    "DualPrompt: U(0, 0.01)": Rule(
        lambda: DualPrompt(general_layers=[0], expert_layers=[1]), "vit", "", 0.01 / math.sqrt(12), 0.005, 0.01
    ),
}


built = cache(tiny)


def drawn(rule: Rule) -> Tensor:
    found = []
    for seed in range(SEEDS):
        model = copy.deepcopy(built(rule.kind))
        torch.manual_seed(seed)
        rule.method().apply(model)
        found += [p.flatten() for place in grafts(model) for name, p in place.graft.named_parameters()
                  if f".{name}".endswith(f".{rule.ending.lstrip('.')}" if rule.ending else "")]  # fmt: skip
    return torch.cat(found).detach()


@pytest.mark.parametrize("name", RULES)
def test_initial_values(name: str) -> None:
    rule = RULES[name]
    values = drawn(rule)
    error = rule.std / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(rule.mean, abs=5 * error + 1e-8)
    assert values.std().item() == pytest.approx(rule.std, rel=0.03, abs=1e-8)
    if rule.bound is not None:
        assert 0.98 * rule.bound < values.abs().max() <= rule.bound


def test_prompts_before_a_projection_are_drawn_by_its_width() -> None:
    rows, weights = [], []
    for seed in range(SEEDS):
        model, method = tiny("vit"), VPT(num_virtual_tokens=40, projection=8)
        torch.manual_seed(seed)
        method.apply(model)
        rows += [prompt.flatten() for prompt in method.prompts(model)]
        weights += [
            place.graft.projection.weight.flatten() for place in grafts(model) if isinstance(place.graft, ImagePrompts)
        ]
    assert 0.98 * V8 < torch.cat(rows).abs().max() <= V8
    assert torch.cat(weights).std().item() == pytest.approx(math.sqrt(2 / HIDDEN), rel=0.05)


def test_warp_draws_from_one_normal_distribution(tokenizer: str) -> None:
    rows = []
    for seed in range(SEEDS):
        model = tiny("mlm")
        table = model.get_input_embeddings().weight.data
        table[:, 0] += 3.0  # a mean and deviation for each column would show it
        torch.manual_seed(seed)
        method = WARP(num_virtual_tokens=40, words=["good", "bad"], tokenizer=str(tokenizer))
        method.apply(model)
        rows.append(method.rows(model).detach())
    found = torch.cat(rows)
    assert found.mean().item() == pytest.approx(
        table.mean().item(), abs=5 * table.std().item() / len(found.flatten()) ** 0.5
    )
    assert found.std().item() == pytest.approx(table.std().item(), rel=0.03)
    assert abs(found[:, 0].mean() - found[:, 1].mean()) < 0.2


def test_tiny_tl_draws_by_what_leaves_a_layer() -> None:
    layers: dict[tuple[int, int], list[Tensor]] = {}
    for seed in range(SEEDS):
        model = tiny("resnet")
        torch.manual_seed(seed)
        TinyTL().apply(model)
        for place in grafts(model):
            for layer in place.graft.children():
                if isinstance(layer, nn.Conv2d):
                    layers.setdefault((layer.kernel_size[0], layer.out_channels), []).append(layer.weight.flatten())
    assert layers
    for (size, channels), weights in layers.items():
        assert torch.cat(weights).std().item() == pytest.approx(math.sqrt(2 / (size**2 * channels)), rel=0.05)
