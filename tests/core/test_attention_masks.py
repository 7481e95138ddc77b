"""What causal attention is computed with: no mask where there is no padding, one mask a forward pass where there is."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PrefixTuning, PromptTuning, TuningError
from lightning_peft.core import structure
from lightning_peft.core.cache_argument import name_in
from lightning_peft.features.activation_memory import Kept
from tests.contract import shake
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

METHODS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuning(num_virtual_tokens=4, mid_dim=None),
    "prompt": lambda: PromptTuning(num_virtual_tokens=4, init="random_uniform"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, bool, bool, int, int]]:
    """The mask, whether it is causal and whether keys are shared by heads, and the lengths of queries and keys."""
    seen, real = [], nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        seen.append((attn_mask, rest["is_causal"], bool(rest.get("enable_gqa")), q.shape[2], k.shape[2]))
        return real(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_padding_it_is_causal_and_has_no_mask(name: str, kind: str, calls: list[Any]) -> None:
    torch.manual_seed(0)
    model, method = tiny(kind), METHODS[name]()
    method.apply(model)
    shake(model)
    inputs = method.prepare(batch(kind))
    out = model(**inputs).logits
    text = [call for call in calls if call[4] == 14]
    assert [call[:2] for call in text] == [(None, True)] * 2
    assert all(call[2] == (kind == "llama") for call in text)
    calls.clear()
    given = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}  # no mask is as good as one of ones
    torch.testing.assert_close(model(**given).logits, out, atol=1e-5, rtol=1e-5)
    assert not [call for call in calls if call[0] is not None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_it_is_what_eager_attention_gives(name: str, side: str | None) -> None:
    outputs = []
    inputs = batch("llama")
    if side is not None:
        inputs["attention_mask"][1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        model, method = tiny("llama"), METHODS[name]()
        model.set_attn_implementation(implementation)
        method.apply(model)
        shake(model)
        out = model(**method.prepare(inputs)).logits
        outputs.append(out[inputs["attention_mask"] == 1])
        method.remove(model)
        assert structure.attention_implementation(model) == implementation
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_with_padding_all_layers_share_one_mask(name: str, calls: list[Any]) -> None:
    model, method = tiny("llama"), METHODS[name]()
    method.apply(model)
    inputs = batch("llama")
    inputs["attention_mask"][1, :3] = 0
    model(**method.prepare(inputs))
    masks = [call[0] for call in calls if call[4] == 14]
    assert masks[0].shape[2:] == (10, 14)
    assert masks[0].data_ptr() == masks[1].data_ptr()


def test_a_cache_of_fixed_size_keeps_its_mask() -> None:
    torch.manual_seed(0)
    model, method = tiny("llama"), METHODS["prefix"]()
    method.apply(model)
    shake(model)
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        out = model(ids).logits
        cache = hf.StaticCache(model.config, max_cache_len=16)
        first = model(ids[:, :6], **{name_in(model.forward): cache})
    torch.testing.assert_close(first.logits, out[:, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_a_long_text_keeps_no_more_for_the_backward_pass_than_peft() -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2)).bfloat16()
    ids = torch.randint(3, 50, (2, 1024))

    def kept(model: nn.Module) -> int:
        with Kept([*model.parameters(), *model.buffers()]) as found:
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        return found.bytes

    theirs = copy.deepcopy(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    limit = kept(peft.get_peft_model(theirs, config))
    for make in METHODS.values():
        model = copy.deepcopy(base)
        make().apply(model)
        assert kept(model) <= limit


def test_an_implementation_that_is_set_later_is_refused(tmp_path: Path) -> None:
    module, method = Tuned("llama"), METHODS["prefix"]()
    method.apply(module)
    module.model.set_attn_implementation("eager")
    with pytest.raises(TuningError, match="'eager' was set on LlamaForCausalLM after 'prefixtuning' was applied"):
        trainer(tmp_path, method, max_steps=1).fit(module, loader("llama"), loader("llama"))
    method.remove(module)
    method.apply(module)
    trainer(tmp_path, method, max_steps=1).fit(module, loader("llama"), loader("llama"))
