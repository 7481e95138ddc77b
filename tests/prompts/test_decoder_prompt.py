"""A soft prompt where a source is no text, and where a table of words is of its own kind: as further words would be."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PromptTuning, PTuning, TuningError
from lightning_peft.interop import to_peft
from tests.models import drawn

P, WORDS = 3, 40
STACKS = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "max_source_positions": 20, "max_target_positions": 16,
}  # fmt: skip
SIZES = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "pad_token_id": 0, "max_position_embeddings": 16,
}  # fmt: skip


def of_images() -> nn.Module:
    images = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    words = hf.TrOCRConfig(**STACKS, max_position_embeddings=16, cross_attention_hidden_size=16)
    return hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            images, words, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
        )
    )


def moonshine() -> nn.Module:
    heads = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("num_hidden_layers",)}
    heads |= {f"{p}_num_{what}": 2 for p in ("encoder", "decoder") for what in ("attention_heads", "key_value_heads")}
    sizes = {name: size for name, size in SIZES.items() if "num_" not in name}
    return hf.MoonshineForConditionalGeneration(
        hf.MoonshineConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    )


def speech(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


WRITERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "Whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**STACKS, num_mel_bins=8, suppress_tokens=None, begin_suppress_tokens=None)
        ),
        {"input_features": speech(8, 40)},
    ),
    "Speech2Text": (  # multiplies its embeddings of words by 4
        lambda: hf.Speech2TextForConditionalGeneration(
            hf.Speech2TextConfig(
                **STACKS, input_feat_per_channel=8, conv_channels=16, num_conv_layers=1, conv_kernel_sizes=[3]
            )
        ),
        {"input_features": speech(20, 8), "attention_mask": torch.ones(2, 20, dtype=torch.long)},
    ),
    "Moonshine": (moonshine, {"input_values": speech(1600)}),
    "TrOCR": (of_images, {"pixel_values": speech(3, 8, 8)}),
}


def words(length: int = 5) -> Tensor:
    return torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(1))


def prompt(**arguments: Any) -> PromptTuning:
    return PromptTuning(num_virtual_tokens=P, init="random_uniform", **arguments)


def with_more_words(model: nn.Module, rows: Tensor, table: nn.Module) -> nn.Module:
    """Return a copy whose table has further rows, of the words WORDS, WORDS + 1 ..., which are never said."""
    model = copy.deepcopy(model.eval())
    (own,) = (m for m in model.modules() if type(m) is type(table) and m.weight.shape == table.weight.shape)
    own.weight = nn.Parameter(torch.cat((own.weight.detach(), rows.detach())))
    return model


@pytest.mark.parametrize("name", WRITERS)
def test_a_prompt_before_the_target_is_further_words(name: str) -> None:
    build, source = WRITERS[name]
    model, base, targets = drawn(build), drawn(build), words()
    method = prompt()
    method.apply(model)
    more = with_more_words(base, method.rows(model), base.get_decoder().get_input_embeddings())
    virtual = torch.arange(WORDS, WORDS + P).expand(2, -1)
    with torch.no_grad():
        expected = more(**source, decoder_input_ids=torch.cat((virtual, targets), 1)).logits[:, P:]
    batch = {**source, "labels": targets}
    assert dict(method.prepare(batch)) == batch
    mask = torch.ones_like(targets)
    for one in (model, base):
        one.set_attn_implementation("eager")
    shown = {"output_attentions": True, "output_hidden_states": True}
    out = model(**source, decoder_input_ids=targets, decoder_attention_mask=mask, **shown)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert out.decoder_hidden_states[0].shape[1] == out.decoder_attentions[0].shape[2] == targets.shape[1]
    assert out.cross_attentions[0].shape[2] == targets.shape[1]
    model(**batch).loss.backward()
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    assert rows.shape == (P, 16)
    assert bool(rows.grad.abs().sum(1).all())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    said, anew = (model.generate(**source, **options, use_cache=use) for use in (True, False))
    assert said.tolist() == anew.tolist()
    start = said if int(said[0, 0]) == 1 else torch.cat((torch.ones(2, 1, dtype=torch.long), said), 1)
    spoken = model(**source, decoder_input_ids=start[:, :-1]).logits
    spoken[..., 2] = -1e9  # the end, which comes later
    assert spoken.argmax(-1).tolist() == start[:, 1:].tolist()
    method.remove(model)
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_what_does_not_fit_before_a_target_is_refused(tmp_path: Path) -> None:
    build, source = WRITERS["Whisper"]
    model, method = drawn(build), prompt()
    method.apply(model)
    method.prepare({**source, "labels": words(13)})
    with pytest.raises(TuningError, match="cut targets to 13 tokens"):
        method.prepare({**source, "labels": words(14)})
    with pytest.raises(TuningError, match="given embeddings, before which its prompt has no place"):
        model(**source, decoder_inputs_embeds=torch.zeros(2, 4, 16))
    with pytest.raises(TuningError, match="and here it comes before the target: keep the delta"):
        to_peft(model, tmp_path)
    for several in (prompt(num_prompts=2), PTuning(template="{v:3} {text}")):
        with pytest.raises(TuningError, match="takes no text, in which a template"):
            several.apply(drawn(build))
    PTuning(num_virtual_tokens=P).apply(drawn(build))


def i_bert(**settings: Any) -> nn.Module:
    return hf.IBertForSequenceClassification(hf.IBertConfig(**SIZES, **settings))


def perceiver() -> nn.Module:
    return hf.PerceiverForSequenceClassification(
        hf.PerceiverConfig(
            vocab_size=WORDS, max_position_embeddings=16, d_model=16, d_latents=16, num_latents=4, num_blocks=1,
            num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [i_bert, perceiver])
def test_a_table_of_its_own_kind_has_further_words(build: Callable[[], nn.Module]) -> None:
    model, base, ids = drawn(build), drawn(build), words()
    method = prompt()
    method.apply(model)
    (table,) = (m for m in base.modules() if [p.shape[0] for p in m.parameters(recurse=False)] == [WORDS])
    more = with_more_words(base, method.rows(model), table)
    virtual = torch.arange(WORDS, WORDS + P).expand(2, -1)
    with torch.no_grad():
        expected = more(input_ids=torch.cat((ids[:, :1], virtual, ids[:, 1:]), 1)).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)  # Perceiver calls them `inputs`
    method.remove(model)
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_quantised_table_has_no_place_for_rows() -> None:
    model = drawn(lambda: i_bert(quant_mode=True))
    prompt().apply(model)
    with pytest.raises(TuningError, match="train the prompt with quant_mode=False"):
        model(input_ids=words())


def test_a_model_that_writes_into_its_input_leaves_the_prompt_alone() -> None:
    """CTRL multiplies embeddings in place."""
    config = hf.CTRLConfig(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, dff=32, n_positions=16)
    model, base, ids = (drawn(lambda: hf.CTRLLMHeadModel(config)) for _ in range(2)), None, words()
    tuned, base = model
    method = prompt()
    method.apply(tuned)
    rows = method.rows(tuned).detach().clone()
    with torch.no_grad():
        prompted = torch.cat((rows.expand(2, -1, -1), base.get_input_embeddings()(ids)), 1)
        expected = base(inputs_embeds=prompted).logits[:, P:]
        for _ in range(2):
            torch.testing.assert_close(tuned(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(method.rows(tuned), rows)
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert method.rows(tuned).grad is not None
