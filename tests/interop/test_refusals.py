"""What does not fit is an error in one sentence, and nothing is changed or written; PEFT warns, or computes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    BitFit,
    DiffPruning,
    LinearProbe,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TuningError,
)
from lightning_peft.core.graft import grafts
from lightning_peft.interop import from_peft, to_peft
from tests.contract import shake
from tests.interop.adapters import logits, tuned
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPT = PromptTuning(num_virtual_tokens=3, init="random_uniform")


def exported(folder: Path, kind: str = "bert", *methods: Method) -> Path:
    model, _ = tuned(kind, methods or (LoRA(r=2),))
    return to_peft(model, folder)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], keep_header: bool = False) -> None:
    """Change the tensors, as PEFT would write them: without what our header says of the base."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refuses(model: nn.Module, folder: Path, message: str, **arguments: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TuningError, match=message):
        from_peft(model, folder, **arguments)
    assert not list(grafts(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    edit_tensors(folder, lambda t: t.pop("base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"))
    refuses(tiny("bert"), folder, r"lacks lora_B\.weight of bert\.encoder\.layer\.1\.attention\.self\.value")


def test_a_layer_without_tensors(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for part in ("A", "B"):
            del tensors[f"base_model.model.bert.encoder.layer.1.attention.self.value.lora_{part}.weight"]

    folder = exported(tmp_path / "x")
    edit_tensors(folder, drop)
    refuses(tiny("bert"), folder, r"targets bert\.encoder\.layer\.1\.attention\.self\.value .* has no tensors for it")


def test_an_unknown_tensor(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    edit_tensors(
        folder,
        lambda t: t.update(
            {"base_model.model.bert.encoder.layer.9.attention.self.query.lora_A.weight": torch.ones(2, 32)}
        ),
    )
    refuses(tiny("bert"), folder, r"for which BertForSequenceClassification has no|lora_A\.weight")
    folder = exported(tmp_path / "y")
    edit_tensors(folder, lambda t: t.update({"base_model.model.bert.pooler.dense.lora_B.bias": torch.ones(32)}))
    refuses(tiny("bert"), folder, "tensors for bert.pooler.dense, which its configuration does not target")
    folder = exported(tmp_path / "z")
    edit_tensors(
        folder, lambda t: t.update({"base_model.model.bert.encoder.layer.0.attention.self.query.odd": torch.ones(32)})
    )
    refuses(tiny("bert"), folder, "query.odd, for which LoRA has no place")


def test_another_base_by_its_weights(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    other = tiny("bert", seed=1)
    refuses(other, folder, "trained on another base than this BertForSequenceClassification, whose weights differ")
    from_peft(other, folder, allow_other_base=True)


def test_another_base_by_name_or_class(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    edit_tensors(folder, lambda t: None)
    edit(folder, base_model_name_or_path="somebody/other-model")
    model = tiny("bert")
    model.config._name_or_path = "/models/bert-tiny"
    refuses(model, folder, "trained on somebody/other-model, and this model is /models/bert-tiny")
    model.config._name_or_path = "/copies/Other-Model/"
    from_peft(model, folder)
    edit(folder, auto_mapping={"base_model_class": "RobertaModel", "parent_library": "transformers"})
    refuses(tiny("bert"), folder, "trained on a RobertaModel, not a BertForSequenceClassification")


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x", "llama")
    refuses(tiny("gpt2"), folder, "has .* tensors for which GPT2LMHeadModel has no module", allow_other_base=True)
    folder = exported(tmp_path / "y")
    edit_tensors(folder, lambda t: t.update({"base_model.model.classifier.weight": torch.ones(5, 32)}))
    refuses(tiny("bert"), folder, r"classifier\.weight of shape \[5, 32\], this model of \[3, 32\]")


def test_a_rank_that_was_changed(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    edit(folder, r=4)
    refuses(tiny("bert"), folder, r"in shape \[2, 32\], but rank 4 and this layer make it \[4, 32\]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type='VERA', which has no twin here"),
        ({"peft_type": None}, "peft_type=None"),
        ({"some_new_feature": True}, "some_new_feature=True, unknown to PEFT .*, and which PEFT never writes"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias=True, and the update of .* has a bias of shape None"),
        ({"trainable_token_indices": [1]}, r"has rows of no table and names \[\[1\]\] as their words"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', for which PEFT changes the base"),
    ],
)
def test_features_without_a_twin(changes: dict, message: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    edit(folder, **changes)
    refuses(tiny("bert"), folder, message)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    refuses(tiny("bert"), tmp_path / "none", f"no adapter of PEFT, since it has no {CONFIG}")
    folder = exported(tmp_path / "x")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    refuses(tiny("bert"), folder, "truncated or no safetensors file")
    (folder / WEIGHTS).unlink()
    refuses(tiny("bert"), folder, "neither adapter_model.safetensors nor adapter_model.bin")
    (folder / CONFIG).write_text("{")
    refuses(tiny("bert"), folder, "is no JSON")


def test_a_pickled_adapter_is_read_and_nothing_in_it_runs(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    from_peft(tiny("bert"), folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refuses(tiny("bert"), folder, "adapter_model.bin")


def test_a_tuned_model_is_not_imported_into(tmp_path: Path) -> None:
    folder = exported(tmp_path / "x")
    model = tiny("bert")
    BitFit().apply(model)
    with pytest.raises(TuningError, match="is tuned already"):
        from_peft(model, folder)


def test_copies_of_a_tied_table_that_drifted_apart(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte", "lm_head"])
    other = peft.get_peft_model(tiny("gpt2"), config)
    shake(other)
    other.save_pretrained(tmp_path / "both")
    refuses(tiny("gpt2"), tmp_path / "both", "two values for transformer.wte.weight and|two values for .*lm_head")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte"])
    other = peft.get_peft_model(tiny("gpt2"), config)
    shake(other)
    other.save_pretrained(tmp_path / "one")
    refuses(
        tiny("gpt2"), tmp_path / "one", "replaces transformer.wte.weight and not lm_head.weight, .* PEFT has untied"
    )


def test_a_copy_of_an_embedding_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.get_peft_model(
            tiny("llama", seed=1), peft.LoraConfig(r=2, target_modules=["embed_tokens"])
        ).save_pretrained(tmp_path)
    refuses(
        tiny("llama"),
        tmp_path,
        r"brings model.embed_tokens.weight with it, \[100, 32\], and \d+ of the rows are not those of this model",
    )


def test_a_head_with_a_low_rank_update(tmp_path: Path) -> None:
    peft.get_peft_model(tiny("vit"), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    refuses(tiny("vit"), tmp_path, "low-rank update of classifier, the task head")


# What is not written.


@pytest.mark.parametrize(
    ("kind", "methods", "message"),
    [
        ("bert", (LinearProbe(),), "LinearProbe trains tensors of the model in place, which alone is no adapter"),
        (
            "bert",
            (BitFit(),),
            r"BitFit trains tensors of the model in place.*save_pretrained, or train LoRA\(bias='all'\)",
        ),
        ("bert", (DiffPruning(),), "DiffPruning has no twin in PEFT"),
        ("gpt2", (LoRA(r=2), PROMPT), r"LoRA \+ PromptTuning are in one model"),
        ("llama", (IA3(), LoRA(r=2)), r"IA3 \+ LoRA are in one model"),
        ("gpt2", (IA3(target_modules=["c_attn"]), BitFit()), "IA3 of PEFT has no place for trained biases"),
        ("bert", (PROMPT,), "puts a prompt before .CLS., so that BertForSequenceClassification pools"),
        (
            "t5",
            (PrefixTuning(num_virtual_tokens=2, mid_dim=None),),
            "reaches the decoder of T5ForConditionalGeneration alone",
        ),
        (
            "llama",
            (PrefixTuning(num_virtual_tokens=2, mid_dim=None, layers=[0]),),
            "gives each of the 2 layers a prefix",
        ),
        (
            "gpt2",
            (PrefixTuning(num_virtual_tokens=2, mid_dim=None, positions="unshifted"),),
            "counts the positions of the text from P",
        ),
        (
            "llama",
            (PromptTuning(num_virtual_tokens=2, init="random_uniform", num_prompts=2),),
            "has one prompt, and this",
        ),
    ],
)
def test_what_peft_would_compute_otherwise_is_not_written(
    kind: str, methods: tuple[Method, ...], message: str, tmp_path: Path
) -> None:
    model, _ = tuned(kind, methods)
    with pytest.raises(TuningError, match=message):
        to_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model, method = tuned("bert", (LoRA(r=2),))
    with pytest.raises(TuningError, match="is not empty and no adapter"):
        to_peft(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(TuningError, match="is a file"):
        to_peft(model, tmp_path / "notes.txt")
    folder = to_peft(model, tmp_path / "new")
    shake(model)
    to_peft(model, folder)
    again = tiny("bert")
    from_peft(again, folder)
    assert torch.equal(logits(model, "bert", method), logits(again, "bert"))


def test_a_plain_model_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="has 0 tuned backbones"):
        to_peft(tiny("bert"), tmp_path / "x")


# Profiles of servers.


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("llama", IA3(), "it is a IA3 adapter, and only LoRA is served"),
        ("bert", LoRA(r=2), "classifier would have to replace modules of the model: exclude= them"),
        ("llama", LoRA(r=2, use_dora=True), "it is DoRA: train with use_dora=False"),
        ("gpt2", LoRA(r=2, bias="all"), r"trained biases \(bias='all'\)"),
        ("llama", LoRA(r=2, rank_pattern={"v_proj": 4}), "it has a rank_pattern"),
        ("llama", LoRA(r=2, alpha_pattern={"v_proj": 4.0}), "it has a alpha_pattern"),
        ("llama", LoRA(r=2, target_modules=["embed_tokens", "q_proj"]), "it tunes an embedding"),
        ("llama", LoRA(r=2, use_dora=True, rank_pattern={"v_proj": 4}), "it is DoRA.*; it has a rank_pattern"),
    ],
)
def test_what_vllm_cannot_serve_is_not_written(kind: str, method: Method, message: str, tmp_path: Path) -> None:
    model, _ = tuned(kind, (method,))
    with pytest.raises(TuningError, match=message):
        to_peft(model, tmp_path / "x", profile="vllm")
    assert not (tmp_path / "x").exists()


def test_what_vllm_serves(tmp_path: Path) -> None:
    model, _ = tuned("llama", (LoRA(r=10, alpha=20.0, target_modules="all-linear"),))
    folder = to_peft(model, tmp_path / "mine", profile="vllm")
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["modules_to_save"]) == ("LORA", 10, 20, None)
    assert "--enable-lora --max-lora-rank 16 --lora-modules mine=THIS_FOLDER" in (folder / "README.md").read_text()
    with pytest.raises(TuningError, match="'triton' is no server that is known: take one of vllm"):
        to_peft(model, tmp_path / "y", profile="triton")
