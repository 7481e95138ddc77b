"""Adapters of other versions and of bases that differ: read where that gives PEFT's numbers, else the true reason."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, PromptTuning, TuningError, collect, load_delta, save_delta
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, shake
from tests.interop.adapters import logits, nested, plain, saved_by_peft, theirs_from
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning",  # and yet it does
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_keys_of_a_later_version(tmp_path: Path) -> None:
    """A number is read without, in a warning; a switch is refused, and so is what no later version has written."""
    expected = saved_by_peft("llama", peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, peft_version="0.22.0", new_group_size=16, new_switch=False)
    model = tiny("llama")
    with pytest.warns(UserWarning, match=r"has new_group_size=16, unknown to PEFT 0\.21\.2, .*and is read without"):
        from_peft(model, tmp_path)
    assert_near({"": expected}, {"": logits(model, "llama")}, 1e-5)
    edit(tmp_path, new_switch=True)
    with pytest.raises(TuningError, match=r"new_switch=True, .*which PEFT 0\.22\.0 may compute otherwise by: save"):
        from_peft(tiny("llama"), tmp_path)
    edit(tmp_path, peft_version="0.21.2", new_switch=False)
    with pytest.raises(TuningError, match=r"new_group_size=16, .*which PEFT never writes"):
        from_peft(tiny("llama"), tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_model_that_has_none(bias: Any, tmp_path: Path) -> None:
    expected = saved_by_peft("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], bias=bias), tmp_path)
    model = tiny("llama")
    from_peft(model, tmp_path)
    assert_near({"": expected}, {"": logits(model, "llama")}, 1e-5)


def test_new_rows_of_a_vocabulary_that_were_drawn_anew(tmp_path: Path) -> None:
    """PEFT puts the table of the adapter in the place of the model's, and so it is here where that is allowed."""

    def base(seed: int) -> nn.Module:
        model = tiny("llama")
        torch.manual_seed(seed)
        model.resize_token_embeddings(104, mean_resizing=False)
        return model

    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    expected = saved_by_peft("llama", config, tmp_path, base(1))
    rows = plain("llama") | {"input_ids": plain("llama")["input_ids"].clone().fill_(102)}
    other = base(2)
    with pytest.raises(TuningError, match=r"and 4 of the rows are not .*allow_other_base=True takes those of the"):
        from_peft(other, tmp_path)
    from_peft(other, tmp_path, allow_other_base=True)
    theirs = peft.PeftModel.from_pretrained(base(2), tmp_path).eval()
    with torch.no_grad():
        assert_near({"": theirs(**rows).logits}, {"": other.eval()(**rows).logits}, 1e-5)
        assert not torch.allclose(base(2).eval()(**rows).logits, other(**rows).logits, atol=1e-3)
    assert expected.shape[-1] == 104
    assert "model.embed_tokens.weight" in collect(other)


def test_a_tied_update_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(
        TuningError, match="uses ensure_weight_tying=True, by which lm_head has the update of the table"
    ):
        from_peft(model, tmp_path)


def test_the_weight_of_a_linear_layer_as_a_parameter(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    config = peft.LoraConfig(
        r=2, target_modules="foo", target_parameters=["module.foo.weight"], init_lora_weights=False,
        alpha_pattern={"foo.weight": 5},
    )  # fmt: skip
    theirs = peft.get_peft_model(nested(), config)
    theirs.save_pretrained(tmp_path)
    model = nested()
    from_peft(model, tmp_path)
    assert_near({"": theirs(x)}, {"": model(x)}, 1e-5)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["wte.weight"])
    peft.get_peft_model(tiny("gpt2"), config).save_pretrained(tmp_path / "table")
    with pytest.raises(TuningError, match=r"parameter of transformer\.wte \(Embedding\) by target_parameters"):
        from_peft(tiny("gpt2"), tmp_path / "table")


def test_mica_is_not_said_to_change_the_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="mica")
    expected = saved_by_peft("llama", config, tmp_path)
    with pytest.raises(TuningError, match=r"'mica', by which B stays as it was .*: merge it with PEFT"):
        from_peft(tiny("llama"), tmp_path)
    merged = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).merge_and_unload()
    assert_near({"": expected}, {"": logits(merged, "llama")}, 1e-5)


def test_a_prompt_of_a_model_without_a_head(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    base = tiny("llama").model
    rows = {key: tensor for key, tensor in plain("llama").items() if key != "labels"}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(hf.LlamaModel(base.config), config).eval()
    theirs.base_model.load_state_dict(base.state_dict())
    shake(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path / "theirs")
    method = from_peft(base, tmp_path / "theirs")
    assert isinstance(method, PromptTuning)
    expected = _hidden(theirs, rows)
    assert_near({"": expected}, {"": _hidden(base, dict(method.prepare(rows)))}, 1e-5)
    to_peft(base, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny("llama").model, tmp_path / "ours").eval()
    assert_near({"": expected}, {"": _hidden(again, rows)}, 1e-5)


def _hidden(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Return the hidden states of the text, which is last."""
    with torch.no_grad():
        return model.eval()(**rows).last_hidden_state[:, -rows["input_ids"].shape[1] :][:, -5:]


def test_a_delta_is_read_whatever_its_file_is_called(tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    for each in (model, other):
        LoRA(r=2).apply(each)
    shake(model)
    load_delta(other, save_delta(model, tmp_path / "a.st"))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    assert theirs_from(to_peft(model, tmp_path / "x"), "llama").shape == logits(model, "llama").shape
