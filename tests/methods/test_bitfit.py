"""BitFit: the biases, found by the last part of their names."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import BitFit, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from lightning_peft.methods.bitfit import BiasPart
from tests.contract import MethodContract, assert_near, copy_of, descend, output, shake, snapshot
from tests.models import BERT_LARGE, MINILM, meta, tiny
from tests.modules import Tuned, loader, trainer

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
        (hf.GPT2Config(), PAIR, 12 * 5 * 768),
    ],
    ids=["base", "large", "MiniLM", "base, subset", "large, subset", "MiniLM, subset", "GPT-2, subset"],
)
def test_counts_of_the_paper(config: hf.BertConfig, biases: str, count: int) -> None:
    model = meta(config)
    BitFit(biases=biases).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_count_of_vit() -> None:
    """(11 L + 2) d: seven in the norms and outputs, four in the first projection; a patch and a last norm."""
    model = meta(hf.ViTConfig(), hf.AutoModelForImageClassification)
    BitFit(exclude="classifier.*").apply(model)
    delta = collect(model)
    assert (sum(t.numel() for t in delta.values()), len(delta)) == (102_912, 98)


def test_a_bias_table_is_no_bias() -> None:
    """Swin has a ``relative_position_bias_table``."""
    model = tiny("swin")
    assert any("bias_table" in name for name, _ in model.named_parameters())
    BitFit().apply(model)
    assert not any("bias_table" in name for name in collect(model))


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


def test_biases_of_other_names() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 4, bidirectional=True)
            self.cell, self.tag = nn.GRUCell(8, 4), nn.Linear(4, 2)

    recurrent = {f"lstm.bias_{side}_l0{way}" for side in ("ih", "hh") for way in ("", "_reverse")}
    for model, names in (
        (Tagger(), recurrent | {"cell.bias_ih", "cell.bias_hh"}),
        (meta(hf.DebertaConfig(num_hidden_layers=1)), {f"encoder.layer.0.attention.self.{n}_bias" for n in "qv"}),
        (
            meta(hf.GptOssConfig(num_hidden_layers=1)),
            {f"layers.0.mlp.experts.{n}_proj_bias" for n in ("gate_up", "down")},
        ),
        (meta(hf.XLNetConfig(n_layer=1)), set()),
    ):
        BitFit().apply(model)
        assert {name for name in collect(model) if not name.endswith((".bias", "tag.weight"))} == names


def test_every_bias_is_there_already() -> None:
    with pytest.raises(TuningError, match=r"every linear layer .* has a bias"):
        BitFit(add_missing_bias=True).apply(tiny("bert"))


def test_two_parts_of_a_fused_bias_are_refused() -> None:
    with pytest.raises(TuningError, match=r"two parts of one fused bias.*'c_attn'"):
        BitFit(biases="query+value").apply(tiny("gpt2"))


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


class TestBitFitPart(MethodContract):
    """The paper's subset where query, key and value are one projection."""

    method = BitFit(biases=PAIR)
    backbones = ("gpt2",)

    def count(self, kind: str) -> int:
        """L (d + ff), a third of the fused bias being the query's; ff = 4d."""
        return 2 * (32 + 4 * 32)


class TestBitFitAdded(MethodContract):
    method = BitFit(add_missing_bias=True)
    backbones = ("llama", "t5")
    compiled = ("llama",)

    def count(self, kind: str) -> int:
        """The outputs of all linear layers in the blocks."""
        d, ff = 32, 64
        if kind == "llama":
            return 2 * (2 * d + 2 * d // 2 + 2 * ff + d)  # keys and values have half the heads
        return 2 * (4 * d + ff + d) + 2 * (8 * d + ff + d)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "torch"])
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_a_part_of_a_fused_bias_is_the_bias_of_that_role(family: str, role: str) -> None:
    """The layout differs: GPT-2 has all queries first, NeoX and BLOOM each head's query, key and value in turn."""
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: tiny("gpt2").transformer,
        "gpt_neox": lambda: hf.GPTNeoXModel(
            hf.GPTNeoXConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
            )
        ),
        "bloom": lambda: hf.BloomModel(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)),
        "torch": lambda: nn.Sequential(nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)])),
    }[family]()
    BitFit(biases=[role]).apply(model)
    place = next(place for place in grafts(model) if isinstance(place.graft, BiasPart))
    nn.init.normal_(place.graft.shift)
    whole = place.graft.whole()
    first = family in ("gpt2", "torch")
    parts = whole.view(3, 32) if first else whole.view(4, 3, 8).transpose(0, 1).reshape(3, 32)
    index = ["query", "key", "value"].index(role)
    assert torch.equal(parts[index], place.graft.shift)
    assert not parts[[i for i in range(3) if i != index]].any()
    if family == "torch":
        x = torch.randn(2, 5, 32)
        attention = place.host
        shifted = attention(x, x, x)[0]
        merge(model)
        assert torch.allclose(attention(x, x, x)[0], shifted, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_a_shift_of_the_interleaved_query_moves_queries_alone(family: str) -> None:
    """Attention sees other queries, and the keys and values that it saw before."""
    torch.manual_seed(0)
    common = {"vocab_size": 50, "hidden_size": 32}
    if family == "gpt_neox":
        config = hf.GPTNeoXConfig(**common, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        model = hf.GPTNeoXModel(config).eval()
        module = model.layers[0].attention
    else:
        model = hf.BloomModel(hf.BloomConfig(**common, n_layer=1, n_head=4)).eval()
        module = model.h[0].self_attention
    BitFit(biases=["query"]).apply(model)
    fused, x = module.query_key_value, torch.randn(1, 5, 32)

    def split(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if family == "bloom":
            return module._reshape(out)
        return out.view(1, 5, 4, 24).transpose(1, 2).chunk(3, dim=-1)

    before = split(fused(x))
    nn.init.normal_(fused.bitfit.shift)
    after = split(fused(x))
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [False, True, True]


def test_a_part_merges_into_the_bias() -> None:
    model = tiny("gpt2")
    BitFit(biases=PAIR).apply(model)
    shake(model)
    before = output(model, "gpt2")
    merge(model)
    assert not list(grafts(model))
    assert_near({"": before}, {"": output(model, "gpt2")}, 1e-5)


def test_added_biases_cannot_be_merged() -> None:
    model = tiny("llama")
    BitFit(add_missing_bias=True).apply(model)
    with pytest.raises(TuningError, match=r"AddedBias .* computes what no weight can"):
        merge(model)


def test_added_biases_of_some_roles() -> None:
    model = tiny("t5")
    BitFit(biases="query+intermediate", add_missing_bias=True).apply(model)
    assert {name.split(".")[-3] for name in collect(model)} == {"q", "wi"}


@pytest.mark.parametrize(
    ("biases", "tails"),
    [
        ("norm", {"attention.output.LayerNorm", "output.LayerNorm", "bert.embeddings.LayerNorm"}),
        ("attention_output+ffn_output", {"attention.output.dense", "output.dense"}),
        (["value", "pooler.dense"], {"attention.self.value", "bert.pooler.dense"}),
        ("value+pooler", {"attention.self.value", "bert.pooler.dense"}),
    ],
)
def test_biases_by_role(biases: str | list[str], tails: set[str]) -> None:
    model = tiny("bert")
    BitFit(biases=biases, exclude="classifier.*").apply(model)
    names = {name.removesuffix(".bias") for name in collect(model)}
    assert {re.sub(r"bert\.encoder\.layer\.\d\.", "", name) for name in names} == tails


def test_biases_have_no_weight_decay(tmp_path: Path) -> None:
    """Though the optimizer has it, a bias without a gradient to speak of stays where it is."""

    class Decaying(Tuned):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-8, weight_decay=1e7)

    module = Decaying("bert")
    fit = trainer(tmp_path, BitFit(exclude=r"classifier\.weight"), max_steps=1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.add_(1)
    before = copy_of(module.state_dict())
    fit.fit(module, loader("bert"), loader("bert"))
    for name, tensor in collect(module).items():
        assert torch.allclose(tensor, before[name], atol=1e-4), name
    assert {group["weight_decay"] for group in fit.optimizers[0].param_groups} == {0.0}


def test_an_optimizer_without_weight_decay_will_do(tmp_path: Path) -> None:
    class Other(Tuned):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Rprop(self.parameters())

    trainer(tmp_path, BitFit(), max_steps=1).fit(Other("bert"), loader("bert"), loader("bert"))


def test_batch_statistics_stay_where_a_bias_alone_is_trained(tmp_path: Path) -> None:
    module = Tuned("resnet")
    before = copy_of(module.state_dict())
    trainer(tmp_path, BitFit(), max_epochs=1).fit(module, loader("resnet"), loader("resnet"))
    delta = collect(module)
    assert any("normalization.bias" in name for name in delta)
    assert not any("running" in name for name in delta)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if "running" in name)


@pytest.mark.parametrize(
    ("kind", "biases", "message"),
    [
        ("t5", "all", "T5ForConditionalGeneration has no biases"),
        ("llama", "all", "LlamaForCausalLM has no biases"),
        ("llama", PAIR, "LlamaForCausalLM has no biases .* add_missing_bias=True"),
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
