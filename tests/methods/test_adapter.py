"""Adapter: bottleneck networks after, around and beside the sublayers."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import Adapter, BitFit, LoRA, PromptTuning, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, descend, output, shake, snapshot
from tests.models import BERT_LARGE, MINILM, batch, meta, tiny

D, M = 32, 4
ONE = 2 * D * M + D + M


class TestHoulsby(MethodContract):
    method = Adapter(bottleneck=M)
    backbones = ("bert", "distilbert", "gpt2", "llama", "t5", "vit")
    on_families = (("parallel", Adapter(form="parallel", bottleneck=2)),)
    traces_backward = True
    compiled = ("bert", "llama")

    def count(self, kind: str) -> int:
        """2 L (2dm + d + m), and the norms of the backbone."""
        blocks = 4 if kind == "t5" else 2
        norms = {
            "bert": 5 * 2 * D,
            "distilbert": 5 * 2 * D,
            "gpt2": 5 * 2 * D,
            "llama": 5 * D,
            "t5": (2 * 2 + 2 * 3 + 2) * D,  # cross-attention has one too
            "vit": 5 * 2 * D,
        }[kind]
        return 2 * blocks * ONE + norms


class TestPfeiffer(MethodContract):
    method = Adapter(form="pfeiffer", reduction=8)
    backbones = ("bert", "vit")
    compiled = ("bert",)

    def count(self, kind: str) -> int:
        """L (2dm + d + m)."""
        return 2 * ONE


class TestParallel(MethodContract):
    method = Adapter(form="parallel", bottleneck=M, scale=4.0)
    backbones = ("bert", "gpt2")
    compiled = ("bert",)

    def count(self, kind: str) -> int:
        """L (2dm + d + m)."""
        return 2 * ONE


@pytest.mark.parametrize(
    ("config", "method", "count"),
    [
        (hf.BertConfig(), Adapter(), 2_379_264 + 38_400),
        (hf.BertConfig(), Adapter(train_norms=False), 2_379_264),
        (BERT_LARGE, Adapter(), 6_343_680 + 100_352),
        (hf.BertConfig(), Adapter(form="pfeiffer"), 1_189_632),
        (BERT_LARGE, Adapter(form="pfeiffer"), 3_171_840),
        (MINILM, Adapter(), 595_200 + 9_984),
        (hf.ViTConfig(), Adapter(form="pfeiffer", reduction=8), 1_779_840),
        (hf.ViTConfig(), Adapter(form="pfeiffer", reduction=64), 230_544),
        (hf.ViTConfig(), Adapter(form="pfeiffer", reduction=256), 64_548),
    ],
)
def test_counts_of_the_papers(config: hf.PreTrainedConfig, method: Adapter, count: int) -> None:
    model = meta(config)
    method.apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def hidden(graft: nn.Module, x: Tensor, activation: str) -> Tensor:
    return graft.up(getattr(F, activation)(graft.down(x)))


def test_houlsby_is_the_formula() -> None:
    """LN(A(dense(h)) + x), in both sublayers of BERT."""
    model, inner = tiny("bert"), torch.randn(2, 3, 2 * D)
    Adapter(bottleneck=M).apply(model)
    shake(model)
    for sublayer, width in (
        (model.bert.encoder.layer[0].attention.output, D),
        (model.bert.encoder.layer[0].output, 2 * D),
    ):
        h, x = inner[..., :width], torch.randn(2, 3, D)
        f = F.linear(h, sublayer.dense.weight, sublayer.dense.bias)
        expected = sublayer.LayerNorm(f + hidden(sublayer.dense.adapter, f, "gelu") + x)
        assert torch.allclose(sublayer(h, x), expected, atol=1e-5)


def test_pfeiffer_norms_twice() -> None:
    """LN(U relu(D LN(f + x)) + f + x), with the same norm."""
    model = tiny("bert")
    Adapter(form="pfeiffer", bottleneck=M).apply(model)
    shake(model)
    sublayer = model.bert.encoder.layer[1].output
    norm, h, x = sublayer.LayerNorm, torch.randn(2, 3, 2 * D), torch.randn(2, 3, D)
    f = sublayer.dense(h)

    def plain(y: Tensor) -> Tensor:
        return F.layer_norm(y, (D,), norm.weight, norm.bias, norm.eps)

    expected = plain(hidden(norm.adapter, plain(f + x), "relu") + f + x)
    assert torch.allclose(sublayer(h, x), expected, atol=1e-5)


def test_pfeiffer_of_a_norm_that_comes_first() -> None:
    """x + f + U relu(D f) in ViT."""
    model = tiny("vit")
    Adapter(form="pfeiffer", bottleneck=M).apply(model)
    shake(model)
    block, x = model.vit.layers[0], torch.randn(2, 3, D)
    f = F.linear(block.mlp.activation_fn(block.mlp.fc1(x)), block.mlp.fc2.weight, block.mlp.fc2.bias)
    assert torch.allclose(block.mlp(x), f + hidden(block.mlp.fc2.adapter, f, "relu"), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "t5", "vit"])
def test_parallel_reads_what_the_feed_forward_sublayer_reads(kind: str) -> None:
    model = tiny(kind)
    Adapter(form="parallel", bottleneck=M, scale=3.0).apply(model)
    shake(model)
    assert len(list(grafts(model))) == (4 if kind == "t5" else 2)
    place = next(iter(grafts(model)))
    x, seen = torch.randn(2, 3, D), []
    if kind == "bert":
        h = torch.randn(2, 3, 2 * D)
        expected = place.host.LayerNorm(place.host.dense(h) + x + 3 * hidden(place.graft, x, "relu"))
        assert torch.allclose(place.host(h, x), expected, atol=1e-5)
        return
    first = next(m for m in place.host.modules() if isinstance(m, nn.Linear | Conv1D))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = place.host(x)
    assert torch.equal(seen[0], x), "the first projection reads the sublayer's input"
    with torch.no_grad():
        place.graft.scale = 0.0
        assert torch.allclose(out, place.host(x) + 3 * hidden(place.graft, x, "relu"), atol=1e-4)


def test_only_the_up_projection_learns_in_the_first_step() -> None:
    model = tiny("vit")
    method = Adapter(form="pfeiffer", bottleneck=M)
    method.apply(model)
    graft = next(iter(grafts(model))).graft
    for moved in (False, True):
        model.zero_grad()
        model(**batch("vit")).loss.backward()
        assert bool(graft.down.weight.grad.any()) is moved
        assert graft.up.weight.grad.any()
        with torch.no_grad():
            for p in graft.parameters():
                p -= 0.1 * p.grad


def test_two_zeros_would_learn_a_bias_alone() -> None:
    """As in a published baseline whose D, U and biases all start at zero; ours refuses a D of zero."""
    model, method = tiny("vit"), Adapter(form="pfeiffer", bottleneck=M)
    method.apply(model)
    for place in grafts(model):
        nn.init.zeros_(place.graft.down.weight)
    descend(model, "vit", method, steps=20, lr=0.1)
    for place in grafts(model):
        assert not place.graft.down.weight.any()
        assert not place.graft.up.weight.any()
        assert place.graft.up.bias.any()
    with pytest.raises(TuningError, match="init_std=0"):
        Adapter(init_std=0).apply(tiny("vit"))


@pytest.mark.parametrize("std", [1e-2, 1e-3])
def test_the_inits_of_paper_and_code(std: float) -> None:
    torch.manual_seed(0)
    model = tiny("bert")
    Adapter(init_std=std, zero_up=False).apply(model)
    for place in grafts(model):
        for weight in (place.graft.down.weight, place.graft.up.weight):
            assert weight.abs().max() <= 2 * std
            assert 0.8 * std < weight.std() < 0.95 * std  # 0.88 std, after the cut
        assert not place.graft.down.bias.any()
        assert not place.graft.up.bias.any()
    x = torch.randn(1000, D)
    change = max((place.graft.update(x)).abs().max().item() for place in grafts(model))
    assert change < (5e-4 if std == 1e-3 else 5e-2)


def test_houlsby_trains_the_norms_and_pfeiffer_does_not() -> None:
    names = {}
    for form in ("houlsby", "pfeiffer", "parallel"):
        model = tiny("bert")
        Adapter(form=form).apply(model)
        names[form] = {name for name in collect(model) if "LayerNorm" in name and "adapter" not in name}
    assert names["houlsby"] == {name for name in tiny("bert").state_dict() if "LayerNorm" in name}
    assert not names["pfeiffer"]
    assert not names["parallel"]


def test_norms_and_biases_have_no_weight_decay() -> None:
    model, method = tiny("bert"), Adapter()
    method.apply(model)
    free = {name for name in collect(model) if method.optimizer_options(name) == {"weight_decay": 0.0}}
    assert {name for name in collect(model) if "classifier" not in name} - free == {
        name for name in collect(model) if name.endswith(("down.weight", "up.weight"))
    }


def test_sizes_by_layer_and_blocks_left_out() -> None:
    model = tiny("gpt2")
    Adapter(bottleneck=[2, 5]).apply(model)
    assert [place.graft.down.out_features for place in grafts(model)] == [2, 2, 5, 5]
    model = tiny("gpt2")
    Adapter(leave_out=[-1]).apply(model)
    assert {place.path.split(".")[2] for place in grafts(model)} == {"0"}


def test_widths_follow_the_stages() -> None:
    model = tiny("swin")
    Adapter(reduction=4, form="pfeiffer").apply(model)
    sizes = [(p.graft.down.in_features, p.graft.down.out_features) for p in grafts(model)]
    assert sizes == [(16, 4), (16, 4), (32, 8), (32, 8)]
    out = model(**batch("swin"))
    out.loss.backward()
    assert all(p.grad is not None for place in grafts(model) for p in place.graft.parameters())


def test_it_comes_after_the_scale_of_a_sublayer() -> None:
    """DINOv2 scales its sublayers, by 1e-5 in some checkpoints: before that an adapter would hardly matter."""
    model = tiny("dinov2")
    Adapter(bottleneck=M).apply(model)
    assert [p.path.rpartition(".")[2] for p in grafts(model)] == ["layer_scale1", "layer_scale2"] * 2


def test_cross_attention_if_asked() -> None:
    model = tiny("t5")
    Adapter(bottleneck=M, cross_attention=True).apply(model)
    assert sum("EncDecAttention" in place.path for place in grafts(model)) == 2
    assert len(list(grafts(model))) == 10
    model = tiny("t5")
    Adapter(bottleneck=M).apply(model)
    assert not any("EncDecAttention" in place.path for place in grafts(model))


def test_named_hosts() -> None:
    model = tiny("bert")
    Adapter(target_modules=["intermediate.dense"], bottleneck=M, train_norms=False).apply(model)
    assert [p.graft.down.in_features for p in grafts(model)] == [2 * D, 2 * D]


@pytest.mark.parametrize("other", [BitFit(), LoRA(r=2), PromptTuning(num_virtual_tokens=3, init="random_uniform")])
def test_it_lives_beside_other_methods(other: object) -> None:
    model, method = tiny("bert"), Adapter(bottleneck=M)
    method.apply(model)
    other.apply(model)
    for again in (False, True):
        before = output(model, "bert", other)
        descend(model, "bert", other, steps=1)
        assert not torch.equal(output(model, "bert", other), before)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), again


def test_it_cannot_be_merged() -> None:
    model = tiny("bert")
    Adapter().apply(model)
    with pytest.raises(TuningError, match="computes what no weight can"):
        merge(model)


def test_it_is_trained_in_half_precision_with_weights_of_its_own() -> None:
    model = tiny("bert").bfloat16()
    Adapter(bottleneck=M).apply(model)
    shake(model)
    full = tiny("bert")
    Adapter(bottleneck=M).apply(full)
    full.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    assert_near({"": output(full, "bert")}, {"": output(model, "bert").float()}, 0.2)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("bert", Adapter(form="serial"), "form='serial' is no form"),
        ("bert", Adapter(activation="gelo"), "activation='gelo' is unknown.*gelu"),
        ("bert", Adapter(bottleneck=0), "bottleneck=0 is no size"),
        ("bert", Adapter(reduction=100), "reduction=100 of width 32 is no size"),
        ("bert", Adapter(bottleneck=[4]), "bottleneck has 1 sizes"),
        ("bert", Adapter(leave_out=[2]), "leave_out has 2"),
        ("bert", Adapter(leave_out=[0, 1]), "leaves no block"),
        ("bert", Adapter(target_modules=["querry"]), "'querry' matches no linear layer .*query"),
        ("bert", Adapter(form="pfeiffer", target_modules=["query"]), "leave one of them"),
        ("resnet", Adapter(), "no output projection of its sublayers under a known name, and no sublayers of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, method: Adapter, message: str) -> None:
    model = tiny(kind)
    before = snapshot(model, kind)
    with pytest.raises(TuningError, match=message):
        method.apply(model)
    assert snapshot(model, kind)["requires_grad"] == before["requires_grad"]
    assert not list(grafts(model))


def test_a_feed_forward_sublayer_without_a_module_has_nothing_beside_it() -> None:
    config = hf.OPTConfig(
        vocab_size=50, hidden_size=D, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=D
    )
    with pytest.raises(TuningError, match="no module around its feed-forward sublayer"):
        Adapter(form="parallel").apply(hf.OPTModel(config))


def test_a_module_without_a_list_of_blocks_has_those_that_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(TuningError, match=r"no list of blocks .*: name linear layers with target_modules="):
        Adapter().apply(model)
    with pytest.raises(TuningError, match=r"no list of blocks .*, and leave leave_out= and a list of bottleneck= out"):
        Adapter(target_modules=["2"], leave_out=[0]).apply(model)
    with pytest.raises(TuningError, match=r"'1' matches no linear layer of Sequential"):
        Adapter(target_modules=["1"]).apply(model)
    x = torch.ones(2, 4)
    before = model(x)
    Adapter(target_modules=["0"], bottleneck=M, zero_up=True).apply(model)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 8 * M + M + 8 + 27
    )  # and the last layer, the head
    assert torch.equal(model(x), before)
    shake(model)
    assert not torch.equal(model(x), before)
