"""Selecting: by whole dotted parts, with no table of architectures, and with near names in every error."""

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import TuningError
from lightning_peft.core import anatomy, select
from tests.models import KINDS, meta, tiny

LINEAR = (nn.Linear, hf.pytorch_utils.Conv1D)


class Module(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# Names.


def test_a_suffix_is_whole_parts() -> None:
    names = ["layers.1.q", "layers.10.q", "layers.1.kq", "q"]
    assert select.match(names, ["1.q"]) == {"1.q": ["layers.1.q"]}
    assert select.match(names, ["q"]) == {"q": ["layers.1.q", "layers.10.q", "q"]}
    assert select.match(names, ["layers.1"]) == {"layers.1": []}


def test_a_string_is_one_regex_for_the_whole_name() -> None:
    assert select.match(["a.q", "a.qk"], r".*\.q") == {r".*\.q": ["a.q"]}
    with pytest.raises(TuningError, match="'\\*' is no regular expression"):
        select.match(["a"], "*")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("querry", "a.0.query"), ("0.qury", "a.0.query"), ("valeu", "a.0.value"), ("A.0.value", "a.0.value")],
)
def test_near_names_are_the_ones_meant(wrong: str, right: str) -> None:
    names = [f"a.{i}.{role}" for i in range(12) for role in ("query", "key", "value", "dense")]
    assert right in select.near(wrong, names)


def test_near_names_of_nothing() -> None:
    assert select.near("zzz", ["one", "two", "three", "four"]) == "; it has e.g. one, two, three"
    blocks = ["words", *(f"blocks.{i}.{name}" for i in range(2) for name in ("query", "key", "value"))]
    assert select.near("zzz", blocks) == "; it has e.g. query, key, value"
    assert select.near("zzz", []) == "; it has none"


# The backbone.


def test_the_backbone_is_the_one_pretrained_model() -> None:
    model = tiny("bert")
    assert select.backbone_of(model) is model
    assert select.backbone_of(Module(net=model, head=nn.Linear(2, 2))) is model
    assert select.backbone_of(Module(inner=Module(net=model))) is model


def test_without_a_pretrained_model_it_is_the_module() -> None:
    module = Module(net=nn.Linear(2, 2))
    assert select.backbone_of(module) is module
    assert select.backbone_of(module, "net") is module.net


def test_two_pretrained_models_must_be_told_apart() -> None:
    module = Module(one=tiny("bert"), other=tiny("vit"))
    with pytest.raises(TuningError, match=r"2 pretrained models \(one, other\): name one with backbone="):
        select.backbone_of(module)
    assert select.backbone_of(module, "other") is module.other
    with pytest.raises(TuningError, match=r"backbone='othr' is no submodule of Module; it has e\.g\. other"):
        select.backbone_of(module, "othr")


# Roles and blocks.


def test_the_block_of_a_name() -> None:
    lists = ["encoder.block", "decoder.block"]
    assert anatomy.block_index(lists, "decoder.block.11.layer.0.q") == ("decoder.block", 11)
    assert anatomy.block_index(lists, "decoder.blocks.11") is None
    assert anatomy.block_index(lists, "head") is None


@pytest.mark.parametrize(
    ("kind", "queries", "per_block"),
    [
        ("bert", "attention.self.query", 1),
        ("distilbert", "attention.q_lin", 1),
        ("gpt2", "attn.c_attn", 1),
        ("llama", "self_attn.q_proj", 1),
        ("t5", "q", 1.5),  # once in the encoder, twice in the decoder
        ("vit", "attention.q_proj", 1),
    ],
)
def test_the_query_is_found_by_its_role(kind: str, queries: str, per_block: float) -> None:
    model = tiny(kind)
    found = select.hosts(model, LINEAR, select.by_role(model, ["query"], LINEAR))
    assert all(name.endswith(f".{queries}") for name in found)
    blocks = sum(len(blocks) for blocks in anatomy.block_lists(model).values())
    assert len(found) == per_block * blocks


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (hf.OPTConfig, {"q_proj", "v_proj"}),
        (hf.BartConfig, {"q_proj", "v_proj"}),
        (hf.RobertaConfig, {"query", "value"}),
        (hf.DebertaV2Config, {"query_proj", "value_proj"}),
        (hf.ElectraConfig, {"query", "value"}),
        (hf.AlbertConfig, {"query", "value"}),
        (hf.GPTNeoXConfig, {"query_key_value"}),
        (hf.BloomConfig, {"query_key_value"}),
        (hf.Qwen2Config, {"q_proj", "v_proj"}),
        (hf.CLIPConfig, {"q_proj", "v_proj"}),
        (hf.MPNetConfig, {"q", "v"}),
        (hf.XLMConfig, {"q_lin", "v_lin"}),
        (hf.Dinov2Config, {"query", "value", "q_proj", "v_proj"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_one_pattern_reaches_other_families(config: type[hf.PreTrainedConfig], names: set[str]) -> None:
    model = meta(small(config))
    found = select.hosts(model, LINEAR, select.by_role(model, ["query", "value"], LINEAR))
    assert found
    assert {name.rpartition(".")[2] for name in found} <= names


def small(config: type[hf.PreTrainedConfig]) -> hf.PreTrainedConfig:
    """Return a configuration of few layers: on the meta device the widths cost nothing."""
    if config is hf.CLIPConfig:
        return config(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2})
    built = config()
    layers = {"n_layers", "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"} & set(built.to_dict())
    return config(**dict.fromkeys(layers, 2))


def test_twelve_layers_are_told_apart() -> None:
    model = meta(hf.BertConfig(num_hidden_layers=12))
    pattern = select.by_role(model, ["query"], LINEAR)
    assert list(select.hosts(model, LINEAR, pattern, [1])) == ["encoder.layer.1.attention.self.query"]
    assert list(select.hosts(model, LINEAR, pattern, [-1])) == ["encoder.layer.11.attention.self.query"]
    assert list(select.hosts(model, LINEAR, ["layer.1.attention.self.query"])) == [
        "encoder.layer.1.attention.self.query"
    ]


def test_layers_of_an_encoder_decoder_count_in_both() -> None:
    config = hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=2)
    model = meta(config)
    pattern = select.by_role(model, ["query"], LINEAR)

    def blocks(layers: list[int]) -> set[str]:
        return {".".join(name.split(".")[:3]) for name in select.hosts(model, LINEAR, pattern, layers)}

    assert blocks([0]) == {"encoder.block.0", "decoder.block.0"}
    assert blocks([2]) == {"encoder.block.2"}
    assert blocks([-1]) == {"encoder.block.2", "decoder.block.1"}
    with pytest.raises(TuningError, match="layers has 3, but T5Model has blocks 0 to 2"):
        blocks([3])


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_every_linear_layer_of_the_blocks(kind: str) -> None:
    model = tiny(kind)
    lists = anatomy.block_lists(model)
    expected = {n for n, m in model.named_modules() if isinstance(m, LINEAR) and anatomy.block_index(lists, n)}
    assert set(select.hosts(model, (*LINEAR, nn.Embedding), "all-linear")) == expected
    assert expected


def test_all_linear_needs_blocks() -> None:
    with pytest.raises(TuningError, match="finds no linear layer in a list of blocks of Linear"):
        select.hosts(nn.Linear(2, 2), LINEAR, "all-linear")


# Tables, positions, heads.


def test_a_host_in_the_head_is_not_selected() -> None:
    model = tiny("bert")
    assert "classifier" not in select.hosts(model, LINEAR, r".*")
    with torch.device("meta"):
        assert "pooler.dense" in select.hosts(hf.BertModel(hf.BertConfig(num_hidden_layers=1)), LINEAR, r".*")


# Blocks and roles.


@pytest.mark.parametrize(
    ("name", "role", "yes"),
    [
        ("encoder.layer.0.output.dense", "ffn_output", True),
        ("encoder.layer.0.attention.output.dense", "ffn_output", False),
        ("encoder.layer.0.attention.output.dense", "attention_output", True),
        ("encoder.layer.0.crossattention.output.dense", "attention_output", True),
        ("h.0.attn.c_proj", "attention_output", True),
        ("h.0.mlp.c_proj", "attention_output", False),
        ("h.0.mlp.c_proj", "ffn_output", True),
        ("block.0.layer.1.DenseReluDense.wo", "ffn_output", True),
        ("block.0.layer.0.SelfAttention.o", "attention_output", True),
        ("layer.0.output.LayerNorm", "post_norm", True),
        ("layer.0.attention.output.LayerNorm", "post_norm", False),
    ],
)
def test_roles(name: str, role: str, yes: bool) -> None:
    assert select.has_role(name, role) is yes


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_its_two_output_projections(kind: str) -> None:
    names = [name for name, module in tiny(kind).named_modules() if isinstance(module, LINEAR)]
    cross = sum("EncDecAttention" in name and select.has_role(name, "attention_output") for name in names)
    blocks = 4 if kind == "t5" else 2
    assert sum(select.has_role(name, "attention_output") for name in names) - cross == blocks
    assert sum(select.has_role(name, "ffn_output") for name in names) == blocks
