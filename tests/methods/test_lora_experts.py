"""LoRA on stacked experts: low-rank products of the routed tokens, equal to those of the changed weight."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.features.activation_memory import Kept
from lightning_peft.updates import stacked
from lightning_peft.updates.stacked import ChangedExperts
from tests.contract import shake

IDS = torch.arange(32).view(2, 16)


def mixture(implementation: str, dtype: torch.dtype = torch.float32, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.MixtralConfig(**shape, num_key_value_heads=2, vocab_size=50, num_local_experts=4)
    model = hf.MixtralForCausalLM(config).to(dtype)
    model.set_experts_implementation(implementation)
    LoRA(r=3, target_modules=["gate_up_proj", "down_proj"]).apply(model)
    shake(model)
    return model.train()


def results(model: nn.Module) -> list[Tensor]:
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_products_are_those_of_the_changed_weight(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low_rank = results(mixture(implementation))
    monkeypatch.setattr(stacked, "changes", lambda w: False)
    whole = results(mixture(implementation))
    assert len(low_rank) == len(whole) > 4
    for one, other in zip(low_rank, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_changed_weight_is_built_or_kept(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(self: Any) -> Tensor:
        raise AssertionError("the changed weight was built")

    monkeypatch.setattr(ChangedExperts, "whole", built)
    model = mixture(implementation, torch.bfloat16, size=64)
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name and ".lora." not in name)
    with Kept([*model.parameters(), *model.buffers()]) as kept:
        model(input_ids=IDS[:1], labels=IDS[:1], use_cache=False)
    assert kept.bytes < 0.5 * experts


def test_what_is_not_known_is_done_to_the_changed_weight() -> None:
    w, a, b = torch.randn(2, 4, 3), torch.randn(2, 1, 3), torch.randn(2, 4, 1)
    whole, x = w + 2.0 * b @ a, torch.randn(5, 3)
    for flipped in (False, True):
        posing = ChangedExperts.of(w.mT.contiguous() if flipped else w, (a, b), 2.0, flipped)
        expected = whole.mT if flipped else whole
        torch.testing.assert_close(posing + 1, expected + 1)
        torch.testing.assert_close(posing.mT.contiguous(), expected.mT.contiguous())
        torch.testing.assert_close(torch.stack([posing, posing]), torch.stack([expected, expected]))
        assert posing.shape == expected.shape
    one = ChangedExperts.of(w, (a, b), 2.0, False)[torch.tensor(1)]
    torch.testing.assert_close(nn.functional.linear(x, one), x @ whole[1].T)
    torch.testing.assert_close(x @ one.mT, x @ whole[1].T)
