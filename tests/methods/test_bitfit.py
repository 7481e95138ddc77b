"""BitFit: the biases, found by the last part of their names."""

import pytest
import torch
import transformers as hf

from lightning_peft import BitFit, TuningError, collect
from tests.contract import MethodContract, copy_of, descend, snapshot
from tests.models import BERT_LARGE, MINILM, meta, tiny

PAIR = "query+intermediate"


class TestBitFit(MethodContract):
    method = BitFit()
    backbones = ("bert", "distilbert", "gpt2", "vit")
    compiled = ("gpt2",)

    def count(self, kind: str) -> int:
        """L (7d + ff) as in the paper, LayerNorms included, and the biases outside of the blocks."""
        d, ff = 32, 64
        return {
            "bert": 2 * (7 * d + ff) + d + d,  # LayerNorm of the embeddings, pooler
            "distilbert": 2 * (7 * d + ff) + d,  # LayerNorm of the embeddings
            "vit": 2 * (7 * d + ff) + d + d,  # projection of the patches, last LayerNorm
            "gpt2": 2 * (3 * d + d + 4 * d + d + 2 * d) + d,  # query, key and value in one, ff = 4d; last LayerNorm
        }[kind]


@pytest.mark.parametrize(
    ("config", "biases", "count"),
    [
        (hf.BertConfig(), "all", 102_912),
        (BERT_LARGE, "all", 272_384),
        (MINILM, "all", 26_112),
        (hf.BertConfig(), PAIR, 46_080),
        (BERT_LARGE, PAIR, 122_880),
        (MINILM, PAIR, 11_520),
    ],
    ids=["base", "large", "MiniLM", "base, subset", "large, subset", "MiniLM, subset"],
)
def test_counts_of_the_paper(config: hf.BertConfig, biases: str, count: int) -> None:
    model = meta(config)
    BitFit(biases=biases).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        (hf.BertConfig(vocab_size=30522), 0.00093, 0.00096),
        (hf.BertConfig(vocab_size=28996), 0.00093, 0.00096),
        (BERT_LARGE, 0.00081, 0.00082),
    ],
    ids=["base uncased", "base cased", "large uncased"],
)
def test_fractions_of_the_paper(config: hf.BertConfig, low: float, high: float) -> None:
    model = meta(config)
    BitFit().apply(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert low < trained / sum(p.numel() for p in model.parameters()) < high


def test_the_head_counts_apart() -> None:
    """RoBERTa-base: the authors' code trains its head of 592,130 too, since "classifier" is in its names."""
    model = meta(hf.RobertaConfig(vocab_size=50265, num_labels=2), hf.AutoModelForSequenceClassification)
    BitFit().apply(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(n for name, n in trained.items() if name.startswith("classifier."))
    assert (head, sum(trained.values()) - head) == (592_130, 102_912 - 768)  # a RoBERTa classifier has no pooler


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_only_biases_move(kind: str) -> None:
    model = tiny(kind)
    before = copy_of(model.state_dict())
    method = BitFit(exclude="classifier.*" if kind == "bert" else None)
    method.apply(model)
    descend(model, kind, method, steps=2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith(".bias") for name in moved)
    norms = {name for name in before if "ln_1" in name or "LayerNorm" in name}
    assert norms & moved == {name for name in norms if name.endswith(".bias")}


def test_a_bias_is_named_by_the_last_part() -> None:
    """MPNet has a table of relative positions under the name ``relative_attention_bias.weight``."""
    config = hf.MPNetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = meta(config)
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    BitFit().apply(model)
    delta = collect(model)
    assert delta
    assert all(name.endswith(".bias") for name in delta)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_the_subset_is_query_and_intermediate(kind: str) -> None:
    model = tiny(kind)
    BitFit(biases=PAIR, exclude=r"(pre_)?classifier\..*").apply(model)
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [32, 64, 32, 64]


def test_suffixes_choose_biases() -> None:
    model = tiny("bert")
    BitFit(biases=["output.LayerNorm", "1.attention.self.key"], exclude="classifier.*").apply(model)
    assert sorted(name.removeprefix("bert.encoder.layer.") for name in collect(model)) == [
        "0.attention.output.LayerNorm.bias",
        "0.output.LayerNorm.bias",
        "1.attention.output.LayerNorm.bias",
        "1.attention.self.key.bias",
        "1.output.LayerNorm.bias",
    ]


@pytest.mark.parametrize(
    ("kind", "biases", "message"),
    [
        ("t5", "all", "T5ForConditionalGeneration has no biases"),
        ("llama", "all", "LlamaForCausalLM has no biases"),
        ("gpt2", PAIR, "no query projection with a bias of its own"),
        ("bert", ["querry"], r"'querry' matches no module with a bias .*attention\.self\.query"),
        ("bert", ["classifier"], "'classifier' matches no module with a bias"),
        ("bert", "al", "'al' matches no module with a bias"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, biases: str | list[str], message: str) -> None:
    model = tiny(kind)
    before = snapshot(model, kind)
    with pytest.raises(TuningError, match=message):
        BitFit(biases=biases).apply(model)
    assert snapshot(model, kind)["requires_grad"] == before["requires_grad"]
