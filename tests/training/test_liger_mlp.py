"""Gated MLPs go through liger's functions with the right arguments; functions of the same arguments stand for them."""

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, muted
from lightning_peft.core.graft import detach
from lightning_peft.features.liger_mlp import use_liger_mlp

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[Any, dict[str, Any], tuple[str, tuple[str, str, str], bool] | None]] = {
    "llama": (hf.LlamaConfig, {}, ("silu", ("gate_proj", "up_proj", "down_proj"), False)),
    "bias": (hf.LlamaConfig, {"mlp_bias": True}, ("silu", ("gate_proj", "up_proj", "down_proj"), False)),
    "square": (hf.LlamaConfig, {"intermediate_size": 16}, ("silu", ("gate_proj", "up_proj", "down_proj"), False)),
    "gemma": (hf.GemmaConfig, {"head_dim": 8}, ("gelu_tanh", ("gate_proj", "up_proj", "down_proj"), False)),
    "phi3": (hf.Phi3Config, {}, ("silu", ("gate_up_proj", "gate_up_proj", "down_proj"), False)),
    "gelu": (hf.LlamaConfig, {"hidden_act": "gelu"}, None),  # liger's has the one with tanh alone
    "relu": (hf.LlamaConfig, {"hidden_act": "relu"}, None),
    "multipliers": (hf.FalconH1Config, {"mlp_multipliers": [0.5, 2.0], "mamba_d_ssm": 32, "mamba_n_heads": 4,
                                        "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}, None),
}  # fmt: skip
CALLS: list[str] = []


def stand_in(name: str, activation: Any) -> Any:
    def product(a: Tensor, b: Tensor) -> Tensor:
        CALLS.append(name)
        return activation(a) * b

    return product


@pytest.fixture(autouse=True)
def _liger(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ModuleType("liger_kernel.transformers.functional")
    vars(kernels)["liger_swiglu"] = stand_in("silu", F.silu)
    vars(kernels)["liger_geglu"] = stand_in("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    CALLS.clear()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    ids = torch.arange(12).view(2, 6) + 3
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_called_with_what(kind: str) -> None:
    config, own, expected = MODELS[kind]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**SIZE | own)).eval()
    LoRA(r=2, target_modules="all-linear", dropout=0.3).apply(model)  # the dropout sleeps in eval mode
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    model.train(kind == "bias")  # the search is in eval mode, whatever mode the model is in
    state = torch.get_rng_state()
    before = gradients(model)
    model.train(kind == "bias")
    places = list(use_liger_mlp(model, "lean"))
    if expected is None:
        assert not places
        return
    assert [(place.graft.activation, place.graft.places, place.graft.turned) for place in places] == [expected] * 2
    assert not CALLS
    torch.set_rng_state(state)
    found = gradients(model)
    assert [expected[0]] * 2 == CALLS
    assert len(before) == len(found) > 8
    assert all((value - found[name]).abs().max() <= 1e-5 for name, value in before.items())
    ids = torch.arange(6)[None] + 3
    with torch.no_grad(), muted(model):
        plain = model.eval()(input_ids=ids).logits
        for place in places:
            detach(place.host, place.name)
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert [expected[0]] * 2 == CALLS  # none without a gradient


class Turned(nn.Module):
    """One layer that gives what is let through before the gate."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.both, self.out, self.act = nn.Linear(4, 12), nn.Linear(6, 4), nn.SiLU()
        self.more = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, -1)
        out: Tensor = self.out(self.act(gate) * up)
        return out if self.more is None else self.more(out)


def test_the_gate_may_come_last_and_what_does_more_is_left_alone() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(Turned(), Turned(dropout=0.5), nn.Linear(4, 4))
    plain = copy.deepcopy(host[0])
    (place,) = use_liger_mlp(host, "lean")
    assert (place.path, place.graft.places, place.graft.turned) == ("0", ("both", "both", "out"), True)
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.allclose(host[0](x), plain(x), atol=1e-6)
    assert CALLS == ["silu"]
