"""A soft prompt is in the same place, and learns the same, in every architecture."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PromptTuning, PTuning
from lightning_peft.core import structure
from lightning_peft.core.graft import grafts
from lightning_peft.prompts.shared_prompt import SharedPrompt
from lightning_peft.prompts.virtual_tokens import PromptRows, insert, real_length
from tests.models import drawn, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)

P, WORDS = 3, 60
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZED = SIZES | {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZED | {"num_key_value_heads": 2, "head_dim": 4}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=4)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, sliding_window=4)),
}
EACH_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": WORDS, "num_kv_shared_layers": 0}


def gemma_4() -> nn.Module:
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**GROUPED, **LAYERS, **EACH_LAYER, global_head_dim=4))


def gemma_3_with_images() -> nn.Module:
    images = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = hf.SiglipVisionConfig(**images, image_size=16, patch_size=8)
    config = hf.Gemma3Config(
        vision_config=vision.to_dict(), text_config=hf.Gemma3TextConfig(**GROUPED, **LAYERS).to_dict(),
        image_token_index=WORDS - 1, mm_tokens_per_image=4,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def tuned(build: Callable[[], nn.Module]) -> tuple[nn.Module, PromptTuning]:
    model, method = drawn(build), PromptTuning(num_virtual_tokens=P, init="random_uniform")
    method.apply(model)
    return model, method


def words(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(5, WORDS - 2, (rows, length), generator=torch.Generator().manual_seed(1))


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def is_shared(model: nn.Module) -> bool:
    return any(isinstance(place.graft, SharedPrompt) for place in grafts(model))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_that_of_peft(name: str) -> None:
    """The last virtual token learns to say the first word, whether the prompt is in the batch or shared."""
    model, method = tuned(CAUSAL[name])
    assert is_shared(model) == (name in ("Llama", "GPT-2"))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    other: Any = peft.get_peft_model(drawn(CAUSAL[name]), config).eval()
    rows = other.prompt_encoder["default"].embedding.weight
    rows.data.copy_(method.rows(model))
    batch = batch_of(words())
    expected, out = other(**batch).loss, model(**method.prepare(copy.copy(batch)))
    torch.testing.assert_close(out.loss, expected)
    expected.backward()
    out.loss.backward()
    torch.testing.assert_close(method.own_grafts(model, PromptRows)[0].graft.weight.grad, rows.grad)
    assert out.logits.shape[1] == 6 + P * (not is_shared(model))


def test_so_it_is_in_a_tuple_and_where_activations_are_computed_anew() -> None:
    model, method = tuned(CAUSAL["Llama"])
    batch = batch_of(words())
    expected = model(**batch).loss
    loss, logits = model(**batch, return_dict=False)[:2]
    assert torch.equal(loss, expected)
    assert logits.shape[1] == 6
    model.train().activation_checkpointing_enable()
    torch.testing.assert_close(model(**batch).loss, expected)
    model.activation_checkpointing_disable()
    batch["labels"][:, 0] = -100
    assert not torch.allclose(model(**batch).loss, expected)
    assert model(input_ids=batch["input_ids"]).logits.shape == logits.shape
    method.remove(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, method = tuned(CAUSAL[name])
    ids = words()
    padded = torch.cat((ids.new_zeros(2, 4), ids), 1)
    given = [method.prepare({"input_ids": x, "attention_mask": (x > 0).long()}) for x in (ids, padded)]
    with torch.no_grad():
        expected, logits = (model(**each).logits[:, -6:] for each in given)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [CAUSAL["Gemma 2"], CAUSAL["BLOOM"], CAUSAL["Llama"], gemma_3_with_images])
def test_generate_gives_words_alone(build: Callable[[], nn.Module]) -> None:
    model, method = tuned(build)
    given = method.prepare({"input_ids": words(), "attention_mask": torch.ones(2, 6, dtype=torch.long)})
    assert real_length(given["input_ids"]) == 6
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    ids = model.generate(**given, **how)
    assert torch.equal(ids[:, :6], words())
    assert ids.shape == (2, 9)
    assert torch.equal(model.generate(**given, **how, return_dict_in_generate=True).sequences, ids)
    beams = copy.deepcopy(model).generate(**given, **how, num_beams=2, num_return_sequences=2)
    assert beams.shape == (4, 9)
    assert bool((beams >= 0).all())
    method.remove(model)
    assert "generate" not in vars(model)


def test_what_runs_along_the_tokens_is_widened_with_them() -> None:
    ids = words(2, 4)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.ones_like(ids),
        "bbox": torch.ones(2, 4, 4, dtype=torch.long),
        "global_attention_mask": torch.ones(2, 4, dtype=torch.bool),
        "decoder_input_ids": torch.ones_like(ids),
        "labels": torch.ones_like(ids),
        "pixel_values": torch.ones(2, 4, 8, 8),
        "entity_ids": torch.ones_like(ids),
    }
    widened = insert(batch, P, 1)
    assert {name: tuple(value.shape[1:]) for name, value in widened.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "mm_token_type_ids", "global_attention_mask", "labels"), (7,)),
        "bbox": (7, 4),
        **dict.fromkeys(("decoder_input_ids", "entity_ids"), (4,)),
        "pixel_values": (4, 8, 8),
    }
    for name in ("mm_token_type_ids", "global_attention_mask"):
        assert widened[name].long().tolist() == [[1, 0, 0, 0, 1, 1, 1]] * 2
    assert widened["bbox"][0, :, 0].tolist() == [1, 0, 0, 0, 1, 1, 1]


def test_a_table_of_words_for_each_layer_has_virtual_tokens_as_padding() -> None:
    model, method = tuned(gemma_4)
    ids = words()
    given = method.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    logits = model(**given).logits
    assert torch.isfinite(logits).all()
    table = next(iter(structure.other_word_tables(model).values()))
    table.weight.data[:0].add_(1.0)
    assert torch.equal(model(**given).logits, logits)
    table.weight.data[0].add_(1.0)
    assert not torch.allclose(model(**given).logits, logits)


def test_a_prompt_stands_before_the_image_of_a_model_with_windows() -> None:
    model, method = tuned(gemma_3_with_images)
    ids = torch.cat((torch.full((1, 4), WORDS - 1), words(1, 4)), 1)
    batch = batch_of(ids) | {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == WORDS - 1).long()}
    model(**method.prepare(batch)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def align() -> nn.Module:
    """A model of two towers whose text tower is a BERT."""
    text = hf.AlignTextConfig(**SIZED, max_position_embeddings=32)
    vision = hf.AlignVisionConfig(
        image_size=16, kernel_sizes=[3], in_channels=[8], out_channels=[16], depthwise_padding=[], strides=[1],
        num_block_repeats=[1], expand_ratios=[1], hidden_dim=16,
    )  # fmt: skip
    return hf.AlignModel(hf.AlignConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def owl() -> nn.Module:
    """One whose text tower is no model of its own."""
    text = hf.OwlViTTextConfig(**SIZED, max_position_embeddings=32)
    vision = hf.OwlViTVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    return hf.OwlViTModel(
        hf.OwlViTConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )


@pytest.mark.parametrize("build", [lambda: tiny("clip").base_model, align, owl])
def test_in_two_towers_a_prompt_is_what_words_after_the_first_token_are(build: Callable[[], nn.Module]) -> None:
    model, method = tuned(build)
    ids = torch.cat((words(2, 4) % 40 + 5, torch.tensor([[2], [2]])), 1)
    prompt = torch.tensor([[11, 12, 13]])
    table = structure.input_embeddings_of(model)
    method.own_grafts(model, PromptRows)[0].graft.weight.data.copy_(table.weight[prompt[0]])
    given = method.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    whole = torch.cat((ids[:, :1], prompt.expand(2, -1), ids[:, 1:]), 1)
    with torch.no_grad():
        features = model.get_text_features(**given)
        expected = drawn(build).get_text_features(input_ids=whole, attention_mask=torch.ones_like(whole))
    torch.testing.assert_close(features.pooler_output, expected.pooler_output)


def test_a_decoder_without_a_head_takes_a_prompt_with_a_network() -> None:
    model = drawn(lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)))
    before = model(input_ids=words()).last_hidden_state
    method = PTuning(num_virtual_tokens=P)
    method.apply(model)
    assert not torch.allclose(model(input_ids=words()).last_hidden_state, before)
    method.remove(model)
    assert torch.equal(model(input_ids=words()).last_hidden_state, before)
