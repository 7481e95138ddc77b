"""Trained rows of the word table, to PEFT and from it: alone, beside a LoRA, tied and not."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import IA3, LoRA, TrainableTokens, TuningError, collect
from lightning_peft.core.tuning import Tuning
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, assert_same, copy_of, shake
from tests.interop.adapters import after_three_steps, logits, plain, saved_by_peft, theirs_from
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)
TOKENS = [43, 9, 69]
TARGETS = {"bert": ["query"], "gpt2": ["c_attn"], "llama": ["q_proj"], "t5": ["q"]}
TABLES = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}


def config(kind: str, alone: bool = False, **settings: Any) -> peft.PeftConfig:
    if alone:
        return peft.TrainableTokensConfig(token_indices=TOKENS)
    arguments = {"trainable_token_indices": TOKENS} | settings
    return peft.LoraConfig(r=2, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **arguments)


@pytest.mark.parametrize(("kind", "alone"), [("bert", False), ("llama", False), ("t5", False), ("t5", True)])
def test_to_and_from_peft(kind: str, alone: bool, tmp_path: Path) -> None:
    expected = saved_by_peft(kind, config(kind, alone), tmp_path / "theirs")
    model, again = tiny(kind), tiny(kind)
    method = from_peft(model, tmp_path / "theirs")
    assert isinstance(method, TrainableTokens if alone else LoRA)
    tuning = Tuning.of(model)
    assert tuning is not None
    assert len(tuning.methods) == 2 - alone
    assert not torch.allclose(expected, logits(tiny(kind), kind), atol=1e-3)
    assert_near({"": expected}, {"": logits(model, kind)}, 1e-5)
    to_peft(model, tmp_path / "ours")
    assert_near({"": expected}, {"": theirs_from(tmp_path / "ours", kind)}, 1e-5)
    from_peft(again, tmp_path / "ours")
    assert_same(copy_of(collect(model)), copy_of(collect(again)))
    _check_steps(kind, tmp_path / "ours", again, tmp_path)


def _check_steps(kind: str, start: Path, model: nn.Module, folder: Path) -> None:
    """Check that three steps give the adapter of PEFT; T5 and GPT-2 are tied, so that both uses of a row count."""
    theirs, ours = after_three_steps(kind, start, model, folder, lr=0.05)
    assert_near({key: theirs[key] for key in ours}, ours, 1e-5)
    before = load_file(start / "adapter_model.safetensors")
    moved = [key for key in ours if not torch.equal(before[key], ours[key])]
    assert any(key.endswith("trainable_tokens_delta") for key in moved)


def test_indices_by_the_name_of_the_table_and_of_what_is_tied_to_it(tmp_path: Path) -> None:
    indices = {"wte": TOKENS, "lm_head": TOKENS}
    expected = saved_by_peft("gpt2", config("gpt2", trainable_token_indices=indices), tmp_path)
    model = tiny("gpt2")
    from_peft(model, tmp_path)
    assert_near({"": expected}, {"": logits(model, "gpt2")}, 1e-5)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        (
            "llama",
            {"trainable_token_indices": {"lm_head": TOKENS}},
            "trains rows of lm_head, and TrainableTokens those",
        ),
        (
            "gpt2",
            {"trainable_token_indices": {"wte": TOKENS, "lm_head": [1, 2]}},
            r"names \[\[.*\], \[.*\]\] as their words, which is to be .* and one list",
        ),
        ("llama", {"trainable_token_indices": {"embed_tokens": [3, 3]}}, "names a word twice"),
    ],
)
def test_rows_of_another_table_or_of_each_its_own(kind: str, settings: Any, why: str, tmp_path: Path) -> None:
    saved_by_peft(kind, config(kind, **settings), tmp_path)
    model = tiny(kind)
    with pytest.raises(TuningError, match=why):
        from_peft(model, tmp_path)
    assert Tuning.of(model) is None


def test_a_damaged_list_of_words(tmp_path: Path) -> None:
    saved_by_peft("llama", config("llama"), tmp_path)
    for indices, why in (
        ([1, 2], r"which is to be \[2, 32\] numbers of model.embed_tokens"),
        ([1, 2, 10**6], "token 1000000 is not in the word table of 100 rows"),
        ([1, 2, "x"], "PEFT writes null or a list of numbers or a mapping"),
        (None, "names .* as their words"),
    ):
        edit(tmp_path, trainable_token_indices=indices)
        with pytest.raises(TuningError, match=why):
            from_peft(tiny("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "token" not in k}, file, metadata={"format": "pt"})
    edit(tmp_path, trainable_token_indices=TOKENS)
    with pytest.raises(TuningError, match="has rows of no table"):
        from_peft(tiny("llama"), tmp_path)


def test_what_peft_cannot_train_is_not_written(tmp_path: Path) -> None:
    words = TrainableTokens(tokens=TOKENS)
    for kind, methods, why in (
        (
            "bert",
            [words],
            "TRAINABLE_TOKENS of PEFT saves no whole modules such as classifier.*or train the words beside",
        ),
        ("mlm", [words], "PEFT leaves out the bias of the scores of BertForMaskedLM"),
        ("llama", [LoRA(r=2, target_modules=["embed_tokens"]), words], "since it has a low-rank update, too"),
        ("gpt2", [words, IA3()], r"IA3 \+ TrainableTokens are in one model, and .* or LoRA with TrainableTokens"),
    ):
        model = tiny(kind)
        for method in methods:
            method.apply(model)
        with pytest.raises(TuningError, match=why):
            to_peft(model, tmp_path / "out")
    model = tiny("gpt2")
    model.config.tie_word_embeddings = False
    words.apply(model)
    with pytest.raises(TuningError, match="tie_word_embeddings=False in the configuration of GPT2LMHeadModel"):
        to_peft(model, tmp_path / "out")
    model = tiny("gpt2")
    LoRA(r=2).apply(model)
    TrainableTokens(tokens=TOKENS).apply(model)
    shake(model)
    assert "TrainableTokens(tokens=" in (to_peft(model, tmp_path / "out") / "README.md").read_text()
    with pytest.raises(TuningError, match="it has trained rows of the word table"):
        to_peft(model, tmp_path / "served", profile="vllm")


def test_a_full_checkpoint_of_a_wrapped_module(tmp_path: Path) -> None:
    from lightning_peft.interop import convert_wrapped

    other: Any = peft.get_peft_model(tiny("gpt2"), config("gpt2")).eval()
    shake(other)
    torch.save(other.state_dict(), tmp_path / "full.pt")
    settings = other.peft_config["default"].to_dict()
    model = tiny("gpt2")
    convert_wrapped(model, tmp_path / "full.pt", tmp_path / "delta.safetensors", settings)
    with torch.no_grad():
        expected = other(**plain("gpt2")).logits
    assert_near({"": expected}, {"": logits(model, "gpt2")}, 1e-5)
    assert isinstance(model, hf.GPT2LMHeadModel)
