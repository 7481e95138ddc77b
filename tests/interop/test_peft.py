"""Adapters of PEFT, both ways: our export gives PEFT's logits, PEFT's adapter gives ours, and equal files come of it.

Where PEFT computes something else on purpose, or by mistake, is written in ``tests/core/test_oracle.py``; what would
come out wrong is refused, see ``test_refusals.py``.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import IA3, BitFit, LoRA, Method, PrefixTuning, PromptTuning, PTuning, PTuningV2, collect, merge
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, assert_same, copy_of, inputs, shake
from tests.interop.adapters import logits, plain, saved_by_peft, theirs_from, tuned
from tests.models import tiny

pytestmark = [
    pytest.mark.usefixtures("peft_finds_the_cache"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
        "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    ),
]


def last(values: Tensor) -> Tensor:
    """Return logits without those of a prompt of three virtual tokens."""
    return values[:, -10:] if values.ndim == 3 and values.shape[1] == 13 else values


DORA: dict[str, Any] = {"r": 2, "use_dora": True}
EXPORTS: dict[str, tuple[str, tuple[Method, ...]]] = {
    "DoRA": ("bert", (LoRA(**DORA),)),
    "DoRA gpt2": ("gpt2", (LoRA(**DORA, target_modules="all-linear"),)),
    "DoRA embedding": ("llama", (LoRA(**DORA, target_modules=["embed_tokens", "q_proj"]),)),
    "DoRA convolution": ("vit", (LoRA(**DORA, target_modules=["projection"]),)),
    "PiSSA": ("bert", (LoRA(r=2, init="pissa"),)),
    "OLoRA with rsLoRA and ranks": ("llama", (LoRA(r=2, init="olora", use_rslora=True, rank_pattern={"v_proj": 3}),)),
    "bias all": ("bert", (LoRA(r=2, bias="all"),)),
    "bias lora_only": ("bert", (LoRA(r=2, bias="lora_only"),)),
    "IA3": ("llama", (IA3(),)),
    "IA3 bert": ("bert", (IA3(),)),
    "IA3 gpt2": ("gpt2", (IA3(target_modules=["c_attn"]),)),
    "IA3 t5": ("t5", (IA3(),)),
    "prefix gpt2": ("gpt2", (PrefixTuning(num_virtual_tokens=3, mid_dim=None),)),
    "prefix llama": ("llama", (PrefixTuning(num_virtual_tokens=3, mid_dim=8),)),
    "P-Tuning v2": ("bert", (PTuningV2(num_virtual_tokens=3),)),
    "P-Tuning": ("llama", (PTuning(num_virtual_tokens=3),)),
    "bert": ("bert", (LoRA(r=2, dropout=0.1),)),
    "bert, head left out": ("bert", (LoRA(r=2, exclude="classifier.*"),)),
    "distilbert": ("distilbert", (LoRA(r=2),)),
    "gpt2": ("gpt2", (LoRA(r=2),)),
    "gpt2, all": ("gpt2", (LoRA(r=2, target_modules="all-linear"),)),
    "llama": ("llama", (LoRA(r=2, layers=[1]),)),
    "t5": ("t5", (LoRA(r=2),)),
    "vit": ("vit", (LoRA(r=2, target_modules="all-linear"),)),
    "vit, convolution": ("vit", (LoRA(r=2, target_modules=["projection", "q_proj"]),)),
    "rsLoRA": ("llama", (LoRA(r=4, use_rslora=True),)),
    "patterns": (
        "bert",
        (
            LoRA(
                r=2,
                rank_pattern={"value": 4},
                alpha_pattern={"0.attention.self.query": 3.0, "1.attention.self.value": 4.5},
            ),
        ),
    ),
    "embedding": ("bert", (LoRA(r=2, target_modules=["word_embeddings", "query"]),)),
    "llama embedding": ("llama", (LoRA(r=2, target_modules=["embed_tokens", "q_proj"]),)),
    "norms too": ("llama", (LoRA(r=2, also_train=r".*\.input_layernorm\.weight"),)),
    "tied table": ("gpt2", (LoRA(r=2, also_train=r"transformer\.wte\.weight"),)),
    "biases too": ("bert", (LoRA(r=2), BitFit())),
    "a table alone": ("bert", (LoRA(r=2, also_train=r"bert\.embeddings\.word_embeddings\.weight"),)),
    "prompt gpt2": ("gpt2", (PromptTuning(num_virtual_tokens=3, init="random_uniform"),)),
    "prompt llama": (
        "llama",
        (PromptTuning(num_virtual_tokens=3, init="random_uniform", also_train=r"model\.norm\..*"),),
    ),
    "prompt t5": ("t5", (PromptTuning(num_virtual_tokens=3, init="random_uniform"),)),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_our_export_gives_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    kind, methods = EXPORTS[name]
    model, applied = tuned(kind, methods)
    to_peft(model, tmp_path / "ours")
    expected = last(logits(model, kind, applied))
    assert_near({"": expected}, {"": last(theirs_from(tmp_path / "ours", kind))}, 1e-5)
    assert not torch.allclose(last(logits(model, kind, applied)), logits(tiny(kind), kind), atol=1e-3)


@pytest.mark.parametrize("name", EXPORTS)
def test_saved_loaded_and_saved_again_is_the_same_bytes(name: str, tmp_path: Path) -> None:
    kind, methods = EXPORTS[name]
    model, applied = tuned(kind, methods)
    first, second = to_peft(model, tmp_path / "x" / "same"), tmp_path / "y" / "same"
    again = tiny(kind)
    method = from_peft(again, first)
    assert_near({"": logits(model, kind, applied)}, {"": logits(again, kind, method)}, 1e-6)
    to_peft(again, second)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    if name not in CHANGED:
        assert_same(copy_of(collect(model)), copy_of(collect(again)))


CHANGED = ("biases too", "PiSSA", "OLoRA with rsLoRA and ranks", "IA3 gpt2", "prefix llama", "P-Tuning")
"""What comes back in another form: one method for two, factors of twice the rank, rows without what computes them."""

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 16}
THEIRS: dict[str, tuple[str, peft.PeftConfig]] = {
    "bert": ("bert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1, **LORA)),
    "bert without task": ("bert", peft.LoraConfig(target_modules=["query"], **LORA)),
    "distilbert": ("distilbert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], **LORA)),
    "gpt2": ("gpt2", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, **LORA)),
    "all linear": ("llama", peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **LORA)),
    "regex": ("llama", peft.LoraConfig(target_modules=r".*1\.self_attn\.(q|v)_proj", **LORA)),
    "layers": ("llama", peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], **LORA)),
    "excluded": (
        "llama",
        peft.LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"], **LORA),
    ),
    "t5": ("t5", peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], **LORA)),
    "vit": ("vit", peft.LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], **LORA)),
    "vit convolution": ("vit", peft.LoraConfig(target_modules=["projection"], **LORA)),
    "patterns": (
        "bert",
        peft.LoraConfig(
            target_modules=["query", "value"],
            rank_pattern={"value": 4},
            alpha_pattern={
                r"^bert.encoder.layer.0.attention.self.query": 3,
                r".*\.1\.attention\.self\.(query|value)": 5,
            },
            **LORA,
        ),
    ),
    "rsLoRA": ("llama", peft.LoraConfig(target_modules=["q_proj"], use_rslora=True, **LORA)),
    "embedding": ("llama", peft.LoraConfig(target_modules=["embed_tokens"], **LORA)),
    "norms": ("llama", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"], **LORA)),
    "DoRA": ("gpt2", peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True, **LORA)),
    "DoRA embedding": ("llama", peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True, **LORA)),
    "DoRA convolution": ("vit", peft.LoraConfig(target_modules=["projection"], use_dora=True, **LORA)),
    "bias all": ("bert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all", **LORA)),
    "bias all, no head": ("bert", peft.LoraConfig(target_modules=["query"], bias="all", **LORA)),
    "bias lora_only": ("bert", peft.LoraConfig(target_modules=["query"], bias="lora_only", **LORA)),
    "IA3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "IA3 bert": ("bert", peft.IA3Config(task_type="SEQ_CLS")),
    "IA3 gpt2": ("gpt2", peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "IA3 t5": ("t5", peft.IA3Config(task_type="SEQ_2_SEQ_LM")),
    "P-Tuning": ("llama", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
    "prefix": ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix with network": (
        "gpt2",
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    ),
    "P-Tuning v2": ("bert", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt gpt2": ("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt t5": ("t5", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_adapter_of_peft_gives_our_logits(name: str, tmp_path: Path) -> None:
    kind, config = THEIRS[name]
    expected = saved_by_peft(kind, config, tmp_path)
    model = tiny(kind)
    method = from_peft(model, tmp_path)
    assert_near({"": last(expected)}, {"": last(logits(model, kind, method))}, 1e-5)
    assert not torch.allclose(last(expected), logits(tiny(kind), kind), atol=1e-3)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in collect(model))


@pytest.mark.parametrize("name", THEIRS)
def test_through_us_and_back_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    kind, config = THEIRS[name]
    expected = saved_by_peft(kind, config, tmp_path / "theirs")
    model = tiny(kind)
    from_peft(model, tmp_path / "theirs")
    to_peft(model, tmp_path / "ours")
    assert_near({"": last(expected)}, {"": last(theirs_from(tmp_path / "ours", kind))}, 1e-5)


TRAINED = (
    *("bert", "gpt2", "all linear", "t5", "vit", "vit convolution", "patterns", "rsLoRA", "embedding", "DoRA"),
    *("DoRA embedding", "bias all", "bias lora_only", "IA3", "IA3 bert", "IA3 gpt2", "prompt gpt2", "prompt t5"),
    *("prefix", "P-Tuning v2"),
)


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_give_the_adapter_of_peft(name: str, tmp_path: Path) -> None:
    kind, config = THEIRS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other: Any = peft.get_peft_model(tiny(kind), copy.deepcopy(config)).eval()
        shake(other)
    other.save_pretrained(tmp_path / "start")
    model = tiny(kind)
    method = from_peft(model, tmp_path / "start")
    rows = plain(kind)
    for each, given in ((other, rows), (model, dict(method.prepare(rows)))):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            each(**given).loss.backward()
            optimizer.step()
    other.save_pretrained(tmp_path / "theirs")
    to_peft(model, tmp_path / "ours")
    start, theirs, ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("start", "theirs", "ours"))
    assert ours.keys() <= theirs.keys()
    assert not {key for key in theirs.keys() - ours.keys() if not re.search("original_module|modules_to_save", key)} - {
        key for key in theirs if key.endswith("base_layer.weight")
    }
    assert_near({key: theirs[key][: len(ours[key])] for key in ours}, ours, 1e-5)
    moved = [key for key in ours if not torch.allclose(start[key][: len(ours[key])], ours[key], atol=1e-5)]
    assert len(moved) > 0.5 * len(ours)


@pytest.mark.parametrize("name", [n for n in TRAINED if "prompt" not in n and "prefix" not in n and "Tuning" not in n])
def test_merged_weights_are_those_of_peft(name: str, tmp_path: Path) -> None:
    kind, config = THEIRS[name]
    saved_by_peft(kind, config, tmp_path)
    other = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).merge_and_unload()
    model = tiny(kind)
    from_peft(model, tmp_path)
    assert_near(dict(other.state_dict()), dict(merge(model).state_dict()), 1e-5)


def test_the_configuration_has_the_keys_of_peft(tmp_path: Path) -> None:
    saved_by_peft("bert", THEIRS["bert"][1], tmp_path / "theirs")
    model, _ = tuned("bert", (LoRA(r=2),))
    to_peft(model, tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ <= {"target_modules", "modules_to_save", "lora_dropout"}
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])


def test_a_language_model_of_another_type_has_the_keys_of_peft(tmp_path: Path) -> None:
    saved_by_peft("gpt2", THEIRS["prompt gpt2"][1], tmp_path / "theirs")
    model, _ = tuned("gpt2", EXPORTS["prompt gpt2"][1])
    to_peft(model, tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert ours == theirs


def test_a_lightning_module_is_exported_by_its_backbone(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bert")

    holder = Holder()
    LoRA(r=2).apply(holder)
    shake(holder)
    to_peft(holder, tmp_path / "ours")
    other = Holder()
    from_peft(other, tmp_path / "ours")
    assert_same(copy_of(collect(holder)), copy_of(collect(other)))
    assert torch.equal(holder.net(**inputs("bert")).logits, other.net(**inputs("bert")).logits)
