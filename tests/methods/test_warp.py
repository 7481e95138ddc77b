"""WARP: prompt tokens, and rows for the classes in the decoder of a masked language model."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_peft import WARP, TuningError, collect
from tests.contract import MethodContract, assert_near, output
from tests.models import HIDDEN, batch, meta, save_tokenizer, tiny

TOKENIZER = str(save_tokenizer(Path(tempfile.mkdtemp())))
K, WORDS = 4, ["good", "bad", "green"]


class TestWARP(MethodContract):
    method = WARP(num_virtual_tokens=K, words=WORDS, tokenizer=TOKENIZER)
    backbones = ("mlm",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """K d + C d + C."""
        return K * HIDDEN + 3 * HIDDEN + 3


def ids(*words: str) -> list[int]:
    return hf.AutoTokenizer.from_pretrained(TOKENIZER).convert_tokens_to_ids(list(words))


def test_the_count_of_the_paper() -> None:
    config = hf.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    model = meta(config, hf.AutoModelForMaskedLM)
    WARP(num_virtual_tokens=20, words=WORDS, tokenizer=TOKENIZER).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 23_555


def test_it_starts_as_the_cloze_with_masks_in_the_text() -> None:
    """Prompts that are copies of [MASK], and rows that are the words' own."""
    plain, model, inputs = tiny("mlm"), tiny("mlm"), batch("mlm", padded=False)
    method = WARP(num_virtual_tokens=K, words=WORDS, tokenizer=TOKENIZER, init="mask")
    method.apply(model)
    masks = torch.full((4, K), ids("[MASK]")[0])
    written = torch.cat((inputs["input_ids"][:, :1], masks, inputs["input_ids"][:, 1:]), 1)
    with torch.no_grad():
        assert_near({"": plain(written).logits}, {"": model(**method.prepare(inputs)).logits}, 1e-5)


def test_the_rows_score_the_words_alone() -> None:
    model = tiny("mlm")
    method = WARP(num_virtual_tokens=K, words=WORDS, tokenizer=TOKENIZER)
    method.apply(model)
    decoder = model.get_output_embeddings()
    assert torch.equal(decoder.warp.weight, decoder.weight[ids(*WORDS)])
    assert torch.equal(decoder.warp.bias, decoder.bias[ids(*WORDS)])
    before = output(model, "mlm", method)
    with torch.no_grad():
        decoder.warp.weight.mul_(-1)
        decoder.warp.bias.add_(3)
    after = output(model, "mlm", method)
    changed = (before != after).flatten(0, 1).any(0).nonzero().flatten().tolist()
    assert changed == sorted(ids(*WORDS))


def test_the_delta_is_prompt_and_rows() -> None:
    model = tiny("mlm")
    WARP(num_virtual_tokens=K, words=WORDS, tokenizer=TOKENIZER).apply(model)
    assert {name.split(".warp.")[-1] for name in collect(model)} == {"weight", "bias"}
    assert len(collect(model)) == 3


def test_prompts_start_like_words() -> None:
    model = tiny("mlm")
    method = WARP(num_virtual_tokens=400 // 8, words=WORDS, tokenizer=TOKENIZER)
    method.apply(model)
    words, rows = model.get_input_embeddings().weight, method.rows(model)
    assert abs(rows.std().item() / words.std().item() - 1) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ["good"]}, "leaves no choice: give a word for each of two classes"),
        ({"words": ["good", "Good"]}, "gives two classes one token"),
        ({"words": ["good", "good film"]}, "'good film' is no single token"),
        ({"words": ["good", "qwertz"]}, "'qwertz' is no single token"),
        ({"init": "random"}, "init='random' is no initial value"),
        ({"template": "{text} {mask}"}, "num_virtual_tokens=0 is no prompt"),
        ({"tokenizer": None}, "the words of the classes needs the words of the model: give tokenizer="),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("mlm")
    keys = list(model.state_dict())
    with pytest.raises(TuningError, match=message):
        WARP(**{"words": WORDS, "tokenizer": TOKENIZER} | changes).apply(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_models_without_a_mask_head_are_refused(kind: str) -> None:
    with pytest.raises(TuningError, match="is no masked language model"):
        WARP(words=WORDS, tokenizer=TOKENIZER).apply(tiny(kind))
