"""What a backbone says of itself, over the families of models."""

import pytest
import transformers as hf
from torch import nn

from lightning_peft import LadderSideTuning, TuningError
from lightning_peft.core import anatomy, structure, text_structure
from tests.models import HIDDEN, KINDS, POSITIONS, TEXT, meta, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_models_inside_of_a_model_do_not_count(kind: str) -> None:
    model = tiny(kind)
    assert structure.pretrained_models(model) == {"": model}
    assert structure.pretrained_models(nn.ModuleDict({"net": model, "net2": nn.Identity()})) == {"net": model}


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        ("bert", {"bert.encoder.layer": 2}),
        ("distilbert", {"distilbert.transformer.layer": 2}),
        ("gpt2", {"transformer.h": 2}),
        ("llama", {"model.layers": 2}),
        ("t5", {"encoder.block": 2, "decoder.block": 2}),
        ("vit", {"vit.layers": 2}),
    ],
)
def test_blocks_are_the_outermost_lists(kind: str, lists: dict[str, int]) -> None:
    assert {name: len(blocks) for name, blocks in anatomy.block_lists(tiny(kind)).items()} == lists


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("bert", ["bert.embeddings.word_embeddings"]),
        ("distilbert", ["distilbert.embeddings.word_embeddings"]),
        ("gpt2", ["transformer.wte"]),
        ("llama", ["model.embed_tokens"]),
        ("t5", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]),
    ],
)
def test_word_tables(kind: str, tables: list[str]) -> None:
    model = tiny(kind)
    found = structure.word_tables(model)
    assert list(found) == tables
    assert len({id(table.weight) for table in found.values()}) == 1


def test_a_model_without_words() -> None:
    for model in (tiny("vit"), nn.Linear(2, 2)):
        with pytest.raises(TuningError, match="has no table of word embeddings"):
            structure.word_tables(model)


@pytest.mark.parametrize("kind", TEXT)
def test_positions_of_learned_tables(kind: str) -> None:
    learned = kind in ("bert", "distilbert", "gpt2")
    assert text_structure.max_positions(tiny(kind)) == (POSITIONS if learned else None)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (hf.RobertaConfig(max_position_embeddings=514, num_hidden_layers=1), 512),
        (hf.OPTConfig(max_position_embeddings=2048, num_hidden_layers=1), 2048),
        (hf.BartConfig(max_position_embeddings=1024, encoder_layers=1, decoder_layers=1), 1024),
        (hf.MPNetConfig(max_position_embeddings=514, num_hidden_layers=1), 512),
    ],
    ids=["roberta", "opt", "bart", "mpnet"],
)
def test_positions_of_shifted_tables(config: hf.PreTrainedConfig, positions: int) -> None:
    assert text_structure.max_positions(meta(config)) == positions


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_an_encoder_may_be_pooled(kind: str) -> None:
    assert structure.is_encoder(tiny(kind)) is (kind in ("bert", "distilbert"))


def test_a_plain_module_is_no_encoder() -> None:
    assert structure.is_encoder(nn.Linear(2, 2)) is False
    assert structure.is_encoder(meta(hf.BertConfig(is_decoder=True, num_hidden_layers=1))) is False


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", ["classifier.weight", "classifier.bias"]),
        ("distilbert", ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"]),
        ("vit", ["classifier.weight", "classifier.bias"]),
        ("gpt2", []),
        ("llama", []),
        ("t5", []),
    ],
)
def test_the_head_is_what_lies_outside_of_the_base_model(kind: str, head: list[str]) -> None:
    assert anatomy.head_names(tiny(kind)) == head


@pytest.mark.parametrize(
    ("auto", "config", "head"),
    [
        (hf.AutoModel, hf.BertConfig(num_hidden_layers=1), []),
        (hf.AutoModelForMaskedLM, hf.BertConfig(num_hidden_layers=1), []),
        (hf.AutoModelForSequenceClassification, hf.GPT2Config(n_layer=1, num_labels=2), ["score.weight"]),
        (
            hf.AutoModelForTokenClassification,
            hf.BertConfig(num_hidden_layers=1),
            ["classifier.weight", "classifier.bias"],
        ),
        (
            hf.AutoModelForQuestionAnswering,
            hf.BertConfig(num_hidden_layers=1),
            ["qa_outputs.weight", "qa_outputs.bias"],
        ),
    ],
)
def test_heads_of_other_tasks(auto: object, config: hf.PreTrainedConfig, head: list[str]) -> None:
    assert anatomy.head_names(meta(config, auto)) == head


def test_a_plain_module_has_no_head() -> None:
    assert anatomy.head_names(nn.Sequential(nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vit", {"vit.layers": ["vit.layers.0", "vit.layers.1"]}),
        ("t5", {f"{p}.block": [f"{p}.block.0", f"{p}.block.1"] for p in ("encoder", "decoder")}),
        ("swin", {"swin.encoder.layers": [f"swin.encoder.layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]}),
        (
            "resnet",
            {"resnet.encoder.stages": [f"resnet.encoder.stages.{i}.layers.{j}" for i in (0, 1) for j in (0, 1)]},
        ),
    ],
)
def test_blocks_are_counted_across_stages(kind: str, expected: dict[str, list[str]]) -> None:
    model = tiny(kind)
    found = anatomy.blocks(model)
    assert {outer: [name for name, _ in entries] for outer, entries in found.items()} == expected
    assert all(model.get_submodule(name) is block for entries in found.values() for name, block in entries)


def test_norms_and_biases_leave_out_the_head_and_grafts() -> None:
    model = tiny("bert")
    assert len(anatomy.norm_names(model)) == 10
    owners = anatomy.bias_owners(model)
    LadderSideTuning().apply(model)
    assert len(anatomy.norm_names(model)) == 10
    assert anatomy.bias_owners(model) == owners
    assert "classifier" not in owners


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit", "clip", "siglip"])
def test_sizes_and_parts(kind: str) -> None:
    model = tiny(kind)
    config, base = structure.config_of(model), structure.base_model_of(model)
    assert structure.width_of(model) == HIDDEN
    assert structure.settings_of(model) == config.to_dict()
    assert structure.is_encoder_decoder(model) is (kind == "t5")
    assert (base is model) is (kind == "t5")
    assert (structure.output_embeddings_of(model) is not None) is (kind in ("gpt2", "llama", "t5"))
    assert structure.main_input_of(model) == ("pixel_values" if kind == "vit" else "input_ids")
    assert structure.image_size(config) == ((16, 16) if kind in ("vit", "clip", "siglip") else None)
    assert structure.arguments_of(base)[0] == structure.main_input_of(base)
    assert (structure.part(base, "vision_model.embeddings") is not None) is (kind in ("clip", "siglip"))


def test_a_plain_module_says_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    assert structure.config_of(model) is None
    assert structure.settings_of(model) == {}
    assert structure.name_or_path(model) == ""
    assert structure.width_of(model) is structure.main_input_of(model) is structure.image_size(None) is None
    assert structure.is_encoder_decoder(model) is bool(structure.recomputing(model)) is False
    assert structure.base_model_of(model) is model
    assert structure.output_embeddings_of(model) is structure.input_embeddings_of(model) is None
    assert structure.part(model, "weight") is structure.part(model[0], "weight") is None
    assert structure.out_features_of(model[0]) == 3
    assert structure.computes_in_place(model)


def test_a_zero_is_an_answer() -> None:
    """What a configuration says counts, 0 and False included; None does not."""
    config = hf.BertConfig(hidden_dropout_prob=0.0, problem_type=None)
    assert structure.setting(config, "problem_type", "hidden_dropout_prob", "hidden_size") == 0.0
    assert structure.setting(config, "no_such_entry") is None
