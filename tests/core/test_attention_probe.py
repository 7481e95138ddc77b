"""The attentions of models of many shapes are found without a number, and a prefix in them is what a cache would be."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PrefixTuning, PTuningV2, TuningError
from lightning_peft.core import attention
from lightning_peft.core.graft import grafts
from lightning_peft.core.structure import attention_implementation, is_pretrained
from lightning_peft.prompts.prefix import Prefix
from tests.families.every import build_any
from tests.models import drawn

P, WORDS = 3, 60
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_GPT = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
SIZED = SIZES | {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GROUPED = SIZED | {"num_key_value_heads": 2}
OF_NEO = {"vocab_size": WORDS, "hidden_size": 16, "num_heads": 4, "max_position_embeddings": 32}
HYBRID = GROUPED | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
HYBRID |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OF_GPT)),
    "GPT-J": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**OF_GPT)),
    "CodeGen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**OF_GPT)),
    "CTRL": lambda: hf.CTRLLMHeadModel(hf.CTRLConfig(**OF_GPT, dff=32)),
    "GPT-Neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(**OF_NEO, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=20)
    ),
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=4)),
    "Falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZED, new_decoder_architecture=False)),
    "Falcon, ALiBi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZED, alibi=True, multi_query=False)),
    "XGLM": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(vocab_size=WORDS, d_model=16, ffn_dim=32, num_layers=2, attention_heads=4)
    ),
    "GPT-NeoX Japanese": lambda: hf.GPTNeoXJapaneseForCausalLM(hf.GPTNeoXJapaneseConfig(**SIZES)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED | EXPERTS)),
    "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED | EXPERTS, head_dim=4)),
    "JetMoE": lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
            intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        )
    ),
    "DiffLlama": lambda: hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**GROUPED)),
    "Doge": lambda: hf.DogeForCausalLM(hf.DogeConfig(**GROUPED)),
}  # fmt: skip
WINDOW = 2
OF_WINDOWS: dict[str, Callable[[], nn.Module]] = {
    "GPT-Neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(**OF_NEO, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=WINDOW)
    ),
    "GPT-OSS": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **GROUPED | EXPERTS, head_dim=4, layer_types=["full_attention", "sliding_attention"], sliding_window=WINDOW
        )
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "RemBERT": lambda: hf.RemBertForSequenceClassification(
        hf.RemBertConfig(**SIZED, input_embedding_size=8, output_embedding_size=16)
    ),
    "RoFormer": lambda: hf.RoFormerForSequenceClassification(hf.RoFormerConfig(**SIZED, embedding_size=16)),
    "MegatronBERT": lambda: hf.MegatronBertForSequenceClassification(hf.MegatronBertConfig(**SIZED)),
    "ESM": lambda: hf.EsmForSequenceClassification(hf.EsmConfig(**SIZED, position_embedding_type="rotary")),
}


def of_speech() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4}
    config = hf.WhisperConfig(
        vocab_size=WORDS, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def of_images_and_text() -> nn.Module:
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    images = hf.CLIPVisionConfig(**sides, image_size=16, patch_size=8)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=images, text_config=hf.LlamaConfig(**GROUPED), image_token_index=WORDS - 1)
    )


def tuned(build: Callable[[], nn.Module], **arguments: Any) -> tuple[nn.Module, list[Prefix]]:
    model = drawn(build)
    PrefixTuning(num_virtual_tokens=P, mid_dim=None, **arguments).apply(model)
    return model, [place.graft for place in grafts(model) if isinstance(place.graft, Prefix)]


def cache_of(prefixes: list[Prefix]) -> hf.DynamicCache:
    """Return a cache of two rows that holds prefixes as if they were what the model had computed of a text."""
    cache = hf.DynamicCache()
    for i, prefix in enumerate(prefixes):
        cache.update(*(t.detach().expand(2, -1, -1, -1).contiguous() for t in prefix.rows()), i)
    return cache


def words(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(5, WORDS - 2, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_is_what_a_cache_with_its_keys_and_values_is(name: str) -> None:
    model, prefixes = tuned(CAUSAL[name])
    ids = words()
    with torch.no_grad():
        mask = torch.ones(2, P + ids.shape[1], dtype=torch.long)
        expected = drawn(CAUSAL[name])(input_ids=ids, attention_mask=mask, past_key_values=cache_of(prefixes)).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_a_window_leaves_words_out_and_no_prefix(name: str) -> None:
    """As in a model whose mask for the layer of the window has visible columns before those of the text."""
    (model, prefixes), base, ids = tuned(OF_WINDOWS[name]), drawn(OF_WINDOWS[name]), words()
    length = ids.shape[1]
    text = torch.ones(length, length, dtype=torch.bool).tril()
    if name == "GPT-Neo":
        base.get_submodule("transformer.h.1.attn.attention").bias[..., P:, :P] = True
        masks: Any = torch.ones(2, P + length, dtype=torch.long)
    else:
        seen = {"full_attention": text, "sliding_attention": text & ~text.tril(-WINDOW)}
        seen = {kind: torch.nn.functional.pad(mask, (P, 0), value=True)[None, None] for kind, mask in seen.items()}
        masks = {kind: torch.zeros(mask.shape).masked_fill(~mask, -1e9) for kind, mask in seen.items()}
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=masks, past_key_values=cache_of(prefixes)).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "BLOOM", "Falcon", "GPT-J", "GPT-2"])
@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_padding_on_the_left_changes_nothing(name: str, positions: str) -> None:
    model, _ = tuned(CAUSAL[name], positions=positions)
    ids = words()
    padded = torch.cat((ids.new_zeros(2, 4), ids), 1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits = model(input_ids=padded, attention_mask=(padded > 0).long()).logits[:, 4:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BLOOM", "GPT-Neo", "Falcon", "JetMoE", "DiffLlama", "Doge"])
def test_generate_with_and_without_a_cache_gives_the_same(name: str) -> None:
    model, _ = tuned(CAUSAL[name])
    given = {"input_ids": words(), "attention_mask": torch.ones(2, 6, dtype=torch.long), "do_sample": False}
    cached, anew = (model.generate(**given, max_new_tokens=4, use_cache=use) for use in (True, False))
    assert cached.tolist() == anew.tolist()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_attends_to_a_prefix_and_is_given_back(name: str) -> None:
    model, ids = drawn(ENCODERS[name]), words()
    before, implementation = model(input_ids=ids).logits, attention_implementation(model)
    method = PTuningV2(num_virtual_tokens=P)
    method.apply(model)
    place = next(place for place in grafts(model) if isinstance(place.graft, Prefix))
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    assert not torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in place.graft.parameters())
    method.remove(model)
    assert attention_implementation(model) == implementation
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("window", [4, 20])
def test_a_prefix_stays_visible_beyond_a_window(window: int) -> None:
    """In an attention that keeps its mask as in one that is given it, and in generate() as in training."""
    layers = {"num_layers": 1, "attention_types": [[["local"], 1]], "window_size": window}
    local, _ = tuned(lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**OF_NEO, **layers)))
    last = local(input_ids=words(1, 12)).logits[:, -1]
    local.get_submodule("transformer.h.0.attn.attention.prefixtuning").values.data.add_(1.0)
    assert (local(input_ids=words(1, 12)).logits[:, -1] - last).abs().max() > 0.01
    model, _ = tuned(lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=window)))
    ids = words(1, 8)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    again = model(input_ids=made[:, :-1]).logits[:, 7:].argmax(-1)
    assert made[:, 8:].tolist() == again.tolist()


def test_speech_has_prefixes_in_encoder_decoder_and_between() -> None:
    model, prefixes = tuned(of_speech)
    assert [prefix.kind for prefix in prefixes] == ["encoder", "decoder", "cross", "decoder", "cross"]
    assert [prefix.shape[0] for prefix in prefixes] == [2, 4, 4, 4, 4]
    given = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": words(1, 5)}
    model(**given).logits.sum().backward()
    assert all(parameter.grad is not None for prefix in prefixes for parameter in prefix.parameters())


def test_a_model_of_images_and_text_has_them_in_its_text_part() -> None:
    model, prefixes = tuned(of_images_and_text)
    assert len(prefixes) == 2
    ids = torch.cat((torch.full((1, 4), WORDS - 1), words(1, 4)), 1)
    assert model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16)).logits.shape[1] == 8


def test_a_hybrid_has_them_in_its_attentions() -> None:
    model, prefixes = tuned(lambda: hf.JambaForCausalLM(hf.JambaConfig(**HYBRID)))
    assert len(prefixes) == 1
    assert torch.isfinite(model(input_ids=words()).logits).all()


def test_a_model_without_attention_is_refused_and_stays_as_it_was() -> None:
    model = drawn(lambda: hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4)))
    before = model(input_ids=words()).logits
    with pytest.raises(TuningError, match="cannot be reached: tune it by PromptTuning or LoRA"):
        PTuningV2().apply(model)
    assert torch.equal(model(input_ids=words()).logits, before)


def test_the_probe_leaves_nothing_behind() -> None:
    model = drawn(of_images_and_text)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention.join(model)
    attention.leave(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: list(found) for name, found in after.items()} == {name: list(kept) for name, kept in before.items()}
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


APART = {"max_position_embeddings": 32, "type_vocab_size": 1}
OF_DEBERTA = SIZED | APART | {"relative_attention": True, "max_relative_positions": 8}
OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "MPNet": lambda: hf.MPNetModel(hf.MPNetConfig(**SIZED, max_position_embeddings=32)),
    "DeBERTa": lambda: hf.DebertaModel(hf.DebertaConfig(**SIZED | APART)),
    "DeBERTa v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SIZED | APART)),
    "LUKE": lambda: hf.LukeModel(hf.LukeConfig(**SIZED | APART, entity_vocab_size=9, entity_emb_size=8)),
    "DeBERTa, relative": lambda: hf.DebertaModel(hf.DebertaConfig(**OF_DEBERTA, pos_att_type=["c2p", "p2c"])),
    "DeBERTa v2, relative": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**OF_DEBERTA, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True)
    ),
    "GPT": lambda: hf.OpenAIGPTModel(hf.OpenAIGPTConfig(**OF_GPT)),
}


@pytest.mark.parametrize("name", ["MPNet", "DeBERTa", "DeBERTa v2", "LUKE"])
def test_a_prefix_that_repeats_the_keys_and_values_of_a_text_changes_nothing(name: str) -> None:
    """In a softmax over each of them twice, each has half its share: so their scores are scaled alike."""
    model, ids, seen = drawn(OPERATIONS[name]), words(1, 4), {}
    for kind, parameter in model.named_parameters():
        if "relative_attention_bias" in kind:
            parameter.data.zero_()
    expected = model(input_ids=ids).last_hidden_state
    PrefixTuning(num_virtual_tokens=4, mid_dim=None, layers=[0], positions="unshifted").apply(model)
    (place,) = (place for place in grafts(model) if isinstance(place.graft, Prefix))
    children = {role: child for role, child in place.host.named_children() if isinstance(child, nn.Linear)}
    for role, child in children.items():
        child.register_forward_hook(lambda _, __, out, role=role: seen.update({role: out.detach()}))
    model(input_ids=ids)
    if "in_proj" in seen:  # whose bias of the values is a parameter of its own
        keys, values = seen["in_proj"].view(4, 4, -1).transpose(0, 1).chunk(3, -1)[1:]
        values = values + place.host.v_bias.view(4, 1, -1)
    else:
        one, other = (next(out for role, out in seen.items() if role.startswith(letter)) for letter in ("k", "v"))
        keys, values = (out.view(4, 4, -1).transpose(0, 1) for out in (one, other))
    place.graft.keys.data.copy_(keys)
    place.graft.values.data.copy_(values)
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    place.graft.values.data.add_(0.1)
    assert not torch.allclose(model(input_ids=ids).last_hidden_state, expected, atol=1e-3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_prefix_among_the_operations_trains_and_goes_again(name: str) -> None:
    model, ids = drawn(OPERATIONS[name]), words()
    before = model(input_ids=ids).last_hidden_state
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None)
    method.apply(model)
    twin = copy.deepcopy(model)
    model(input_ids=ids).last_hidden_state.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(bool(parameter.grad.abs().sum()) for parameter in trained)
    assert torch.equal(twin(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
    method.remove(model)
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)


def test_a_text_that_is_attended_to_otherwise_is_refused() -> None:
    """LUKE has other queries for words and for entities."""
    model = drawn(OPERATIONS["LUKE"])
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    entities = {"entity_ids": torch.ones(2, 1, dtype=torch.long), "entity_position_ids": torch.zeros(2, 1, 2).long()}
    with pytest.raises(TuningError, match="attends in another way than when the prefix was attached"):
        model(input_ids=words(), **entities, entity_attention_mask=torch.ones(2, 1, dtype=torch.long))


def test_parts_that_compute_attention_otherwise_than_the_whole_go_on_so_afterwards() -> None:
    model = build_any("DepthAnything")[0]
    parts = [module for module in model.modules() if is_pretrained(module)]
    before = [attention_implementation(part) for part in parts]
    assert len(set(before)) > 1
    method = PTuningV2(num_virtual_tokens=2)
    method.apply(model)
    assert all((attention_implementation(part) or "").startswith("grafted_") for part in parts)
    method.remove(model)
    assert [attention_implementation(part) for part in parts] == before
