"""Models whose modules have other names in memory than in their checkpoints and in older adapters."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import LoRA, TuningError
from lightning_peft.interop import from_peft, to_peft
from lightning_peft.interop.names import Names
from tests.contract import assert_near, shake
from tests.interop.adapters import nested
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
    "initializer_range": 0.3,
}
_SWIN = hf.SwinConfig(
    image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
)
_MIXTRAL = hf.MixtralConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_SHAPE)),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**_SHAPE)),
    "beit": (hf.BeitForImageClassification, hf.BeitConfig(**_SHAPE)),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**_SHAPE)),
    "swin": (hf.SwinForImageClassification, _SWIN),
    "mixtral": (hf.MixtralForCausalLM, _MIXTRAL),
}
# What the modules were called in transformers 4, written down by hand.
OLD = {
    "vit": [(r"vit\.layers\.(\d+)", r"vit.encoder.layer.\1")],
    "deit": [(r"deit\.layers\.(\d+)", r"deit.encoder.layer.\1")],
    "beit": [(r"beit\.layers\.(\d+)", r"beit.encoder.layer.\1")],
    "dinov2": [],
    "swin": [],
}
_PROJECTIONS = [
    (r"\.attention\.q_proj", ".attention.attention.query"),
    (r"\.attention\.v_proj", ".attention.attention.value"),
]
_SWIN_PROJECTIONS = [
    (r"\.attention\.q_proj", ".attention.self.query"),
    (r"\.attention\.v_proj", ".attention.self.value"),
]
_FEED_FORWARD = [(r"\.mlp\.fc1", ".intermediate.dense")]


def built(name: str) -> nn.Module:
    kind, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def computed(model: nn.Module, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if name == "mixtral":
            return model.eval()(input_ids=torch.randint(3, 100, (2, 8), generator=generator)).logits
        return model.eval()(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits


def renamed(name: str, text: str) -> str:
    rules = OLD[name] + (_SWIN_PROJECTIONS if name == "swin" else _PROJECTIONS)
    if name != "dinov2":
        rules = rules + _FEED_FORWARD
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


def theirs(name: str, folder: Path, targets: list[str]) -> Tensor:
    """Let PEFT tune a model with these names, save the adapter, and return its logits."""
    model = peft.get_peft_model(built(name), peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        shake(model)
    model.save_pretrained(folder)
    return computed(model, name)


def in_old_names(name: str, folder: Path) -> None:
    """Rewrite an adapter as transformers 4 would have had it."""
    file = folder / "adapter_model.safetensors"
    save_file({renamed(name, key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_of_either_age_is_read(name: str, tmp_path: Path) -> None:
    expected = theirs(name, tmp_path, ["q_proj", "v_proj"])
    for _ in range(2):
        model = built(name)
        from_peft(model, tmp_path)
        assert_near({"": expected}, {"": computed(model, name)}, 1e-5)
        assert not torch.allclose(expected, computed(built(name), name), atol=1e-4)
        in_old_names(name, tmp_path)
    assert any("query" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_our_export_is_read_by_peft_beside_this_transformers(name: str, tmp_path: Path) -> None:
    model = built(name)
    LoRA(r=2, rank_pattern={"0.self_attn.q_proj": 3} if name == "mixtral" else {}).apply(model)
    shake(model)
    to_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(built(name), tmp_path).eval()
    assert_near({"": computed(model, name)}, {"": computed(other, name)}, 1e-5)


@pytest.mark.parametrize("name", OLD)
def test_an_export_in_the_names_of_checkpoints(name: str, tmp_path: Path) -> None:
    model = built(name)
    LoRA(r=2, alpha_pattern={"v_proj": 4.0}).apply(model)
    shake(model)
    to_peft(model, tmp_path / "memory")
    to_peft(model, tmp_path / "disk", names="disk")
    memory, disk = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("memory", "disk"))
    assert {renamed(name, key) for key in memory} == set(disk)
    config = json.loads((tmp_path / "disk" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "value"]
    assert config["alpha_pattern"] == {"value": 4}
    again = built(name)
    from_peft(again, tmp_path / "disk")
    assert torch.equal(computed(model, name), computed(again, name))
    to_peft(again, tmp_path / "again", names="disk")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_other_models_have_one_name(kind: str) -> None:
    assert Names(tiny(kind)).on_disk == {}


def test_the_names_of_a_model_that_was_loaded(tmp_path: Path) -> None:
    built("vit").save_pretrained(tmp_path)
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path)
    assert Names(loaded).on_disk == Names(built("vit")).on_disk
    assert Names(loaded).on_disk["vit.layers.0.attention.q_proj"] == "vit.encoder.layer.0.attention.attention.query"
    assert Names(built("mixtral")).on_disk["model.layers.0.mlp.gate"] == "model.layers.0.block_sparse_moe.gate"


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["experts.down_proj", "experts.gate_up_proj", "q_proj"]])
def test_experts_both_ways(targets: list[str], tmp_path: Path) -> None:
    model = built("mixtral")
    LoRA(r=2, target_modules=targets).apply(model)
    shake(model)
    to_peft(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(built("mixtral"), tmp_path / "ours").eval()
    assert_near({"": computed(model, "mixtral")}, {"": computed(other, "mixtral")}, 1e-5)
    other.save_pretrained(tmp_path / "theirs")
    again = built("mixtral")
    from_peft(again, tmp_path / "theirs")
    assert_near({"": computed(model, "mixtral")}, {"": computed(again, "mixtral")}, 1e-5)
    to_peft(again, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


class Attending(nn.Module):
    """A model with torch's own attention, whose projections are read without a call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
            self.config = hf.PreTrainedConfig()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def test_torch_attention_is_refused_both_ways(tmp_path: Path) -> None:
    """PEFT 0.21 adds the update of the out-projection twice; when this fails, it has been mended."""
    x = torch.randn(2, 5, 32)
    other = peft.get_peft_model(Attending(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"])).eval()
    shake(other)
    out = other.base_model.model.attn.base_layer.out_proj
    update = out.lora_B["default"].weight @ out.lora_A["default"].weight
    with torch.no_grad():
        expected = other(x)
        twice = other.merge_and_unload().attn.out_proj.weight - Attending().attn.out_proj.weight
    assert_near({"": 2 * update}, {"": twice}, 1e-5)
    assert expected.shape == x.shape
    model = Attending()
    LoRA(r=2, target_modules=["attn"]).apply(model)
    with pytest.raises(TuningError, match=r"out-projection of attn .* twice"):
        to_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=["attn"])).save_pretrained(tmp_path / "theirs")
    with pytest.raises(TuningError, match=r"out-projection of attn .* twice"):
        from_peft(Attending(), tmp_path / "theirs")


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=4, target_modules=["foo"], alpha_pattern={"module.foo": 4.0, "module.module.foo": 6.0}),
        LoRA(r=4, target_modules=["foo"], rank_pattern={"module.foo": 3, "module.module.foo": 2}),
        LoRA(r=4, target_modules="foo"),
        LoRA(r=4, target_modules="(module.)?foo", alpha_pattern={"module.foo": 4.0}),
    ],
    ids=["alphas", "ranks", "one of them", "two of them"],
)
def test_names_that_end_alike_go_out_and_come_in(method: LoRA, tmp_path: Path) -> None:
    x, model = torch.randn(3, 8), nested()
    LoRA(**method.init_args()).apply(model)
    shake(model)
    to_peft(model, tmp_path)
    assert_near({"": model(x)}, {"": peft.PeftModel.from_pretrained(nested(), tmp_path)(x)}, 1e-5)
    again = nested()
    from_peft(again, tmp_path)
    assert_near({"": model(x)}, {"": again(x)}, 1e-6)


@pytest.mark.parametrize("pattern", [{"^foo": 5}, {"module.foo": 5}, {"^module.foo": 2, "foo": 3}])
def test_patterns_of_peft_on_names_that_end_alike(pattern: dict[str, int], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["foo"], alpha_pattern=pattern, init_lora_weights=False)
    theirs, x, ours = peft.get_peft_model(nested(), config), torch.randn(3, 8), nested()
    theirs.save_pretrained(tmp_path)
    from_peft(ours, tmp_path)
    assert_near({"": theirs(x)}, {"": ours(x)}, 1e-5)


def test_one_layer_of_two_names_is_refused_both_ways(tmp_path: Path) -> None:
    model = nested()
    model.module.foo = model.foo
    theirs = peft.get_peft_model(nested(), peft.LoraConfig(r=2, target_modules="foo", init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(TuningError, match=r"has an update of foo, which is one layer with module\.foo in Nested"):
        from_peft(model, tmp_path, allow_other_base=True)
    LoRA(r=2, target_modules=["foo"]).apply(model)
    with pytest.raises(TuningError, match=r"PEFT would change one of the two alone, so leave it out"):
        to_peft(model, tmp_path / "out")
