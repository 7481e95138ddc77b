"""Texts end to end in a row see a prompt or a prefix, and themselves, as each does in a row of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Method, PrefixTuning, PromptTuning, TuningError
from tests.models import tiny

LENGTHS = ((5, 7), (3, 2, 7))
METHODS: dict[str, Method] = {
    "prompt": PromptTuning(num_virtual_tokens=3, init="random_uniform"),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "unshifted prefix": PrefixTuning(num_virtual_tokens=3, positions="unshifted"),
}


def tuned(kind: str, name: str, attention: str = "sdpa") -> tuple[nn.Module, Method]:
    method, model = type(METHODS[name])(**METHODS[name].init_args()), tiny(kind)
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    method.apply(model)
    return model, method


def rows() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12) + 5
    return {
        "input_ids": ids,
        "position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS]),
    }


def outputs(model: nn.Module, method: Method, batch: dict[str, Tensor]) -> Tensor:
    return model(**method.prepare(batch), use_cache=False).logits


def alone(model: nn.Module, method: Method) -> Tensor:
    """Return the outputs of the texts, each in a row of its own, as those of the packed rows."""
    ids = rows()["input_ids"]
    parts = [
        torch.cat([outputs(model, method, {"input_ids": text[None]})[0] for text in ids[row].split(lengths)])
        for row, lengths in enumerate(LENGTHS)
    ]
    return torch.stack(parts)


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(out.logsumexp(-1).mean(), trained))


@pytest.mark.parametrize(("kind", "attention"), [("gpt2", "eager"), ("llama", "sdpa")])
@pytest.mark.parametrize("name", METHODS)
def test_packed_is_as_alone(name: str, kind: str, attention: str) -> None:
    model, method = tuned(kind, name, attention)
    packed, apart = outputs(model, method, rows()), alone(model, method)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(model, packed), gradients(model, apart), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    together = outputs(model, method, {"input_ids": rows()["input_ids"]})
    assert (together - apart).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_where_the_prompt_is_in_the_rows(attention: str) -> None:
    """Blocks that are computed anew in the backward pass take no cache, so that the prompt is put into each row."""
    model, method = tuned("llama", "prompt", attention)
    apart = gradients(model, alone(model, method))
    model.activation_checkpointing_enable()
    model.train()
    for one, other in zip(gradients(model, outputs(model, method, rows())), apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_without_a_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = tuned("llama", "prompt")
    name = "lightning_peft.prompts.packed_mask.structure.attention_implementation"
    monkeypatch.setattr(name, lambda host: "flash_attention_2")
    with pytest.raises(TuningError, match="'flash_attention_2' takes no mask by which several texts of a row see one"):
        outputs(model, method, rows())
    assert outputs(model, method, {"input_ids": rows()["input_ids"]}).isfinite().all()


def test_positions_that_go_on_are_one_text() -> None:
    model, method = tuned("llama", "prompt")
    ids = rows()["input_ids"]
    plain: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, -1)}
    assert torch.equal(outputs(model, method, plain), outputs(model, method, {"input_ids": ids}))
