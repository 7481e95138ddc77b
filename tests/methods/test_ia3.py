"""IA3: `(l_k ∘ k, l_v ∘ v, l_ff ∘ h)`, its counts, and folding it into the weights."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import IA3, LoRA, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, output, shake, snapshot
from tests.models import KINDS, MINILM, batch, meta, tiny
from tests.modules import Tuned, loader, trainer


class TestIA3(MethodContract):
    method = IA3()
    backbones = KINDS

    def count(self, kind: str) -> int:
        """L (d_k + d_v + d_ff) in an encoder, L (2 d_k + 2 d_v + d_ff) in a decoder with cross-attention."""
        plain = 2 * (32 + 32 + 64)
        kinds = {"llama": 2 * (16 + 16 + 64), "t5": plain + 2 * (64 + 64 + 64), "gpt2": 2 * (64 + 128)}
        return kinds.get(kind, plain)


def t5(width: int, heads: int, hidden: int) -> hf.T5Config:
    """Return the shape of T5 v1.1, which T0 is."""
    return hf.T5Config(
        d_model=width,
        d_kv=64,
        num_heads=heads,
        d_ff=hidden,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("config", "count"),
    [(t5(4096, 64, 10240), 1_081_344), (t5(2048, 32, 5120), 540_672), (MINILM, 13_824)],
    ids=["T0-11B", "T0-3B", "MiniLM"],
)
def test_counts_of_the_paper(config: hf.PreTrainedConfig, count: int) -> None:
    model = meta(config)
    IA3().apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "no bias": lambda: nn.Linear(6, 4, bias=False),
    "Conv1D": lambda: Conv1D(4, 6),
}
LAYER = pytest.mark.parametrize("layer", LAYERS)
SIDE = pytest.mark.parametrize("side", ["target_modules", "feedforward_modules"])


def scaled(layer: str, side: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    host = LAYERS[layer]()
    if host.bias is not None:
        nn.init.normal_(host.bias)
    IA3(**{"target_modules": [], "feedforward_modules": []} | {side: ["0"]}).apply(nn.Sequential(host))
    shake(host)
    return host, torch.randn(2, 5, 6)


@LAYER
@SIDE
def test_it_is_the_formula_with_its_gradients(layer: str, side: str) -> None:
    host, x = scaled(layer, side)
    x.requires_grad_()
    scale = host.ia3.l
    plain = LAYERS[layer]()
    plain.load_state_dict({n: t for n, t in host.state_dict().items() if "ia3" not in n})
    expected = scale * plain(x) if side == "target_modules" else plain(scale * x)
    found = host(x)
    assert_near({"": expected}, {"": found}, 1e-6)
    weight = torch.randn_like(found)
    theirs = torch.autograd.grad((expected * weight).sum(), [x, scale])
    ours = torch.autograd.grad((found * weight).sum(), [x, scale])
    for left, right in zip(theirs, ours, strict=True):
        assert_near({"": left}, {"": right}, 1e-5)


@LAYER
@SIDE
def test_it_folds_into_the_weight_and_the_bias(layer: str, side: str) -> None:
    host, x = scaled(layer, side)
    before = {name: p.detach().clone() for name, p in host.named_parameters()}
    with torch.no_grad():
        live = host(x)
        assert host.ia3.merge(host, keep=True) == 0
        assert_near({"": live}, {"": host(x)}, 1e-6)
        assert not torch.equal(host.weight, before["weight"])
        if host.bias is not None:
            assert torch.equal(host.bias, before["bias"]) is (side == "feedforward_modules")
        host.ia3.unmerge(host)
    assert all(torch.equal(before[name], p) for name, p in host.named_parameters())
    assert torch.equal(host(x), live)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_a_plain_backbone(kind: str) -> None:
    plain, model = tiny(kind), tiny(kind)
    IA3().apply(model)
    shake(model)
    tuned = output(model, kind)
    merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not list(grafts(model))
    assert_near({"": tuned}, {"": output(model, kind)}, 1e-5)
    assert not torch.allclose(tuned, output(plain, kind), atol=0.05)


def test_of_a_fused_projection_only_keys_and_values_are_scaled() -> None:
    model = tiny("gpt2")
    IA3(feedforward_modules=[]).apply(model)
    host = model.transformer.h[0].attn.c_attn
    assert host.ia3.l.shape == (64,)
    x = torch.randn(2, 5, 32)
    plain = tiny("gpt2").transformer.h[0].attn.c_attn(x)
    with torch.no_grad():
        host.ia3.l.copy_(torch.arange(64.0))
        out = host(x)
    assert torch.equal(out[..., :32], plain[..., :32])
    assert_near({"": plain[..., 32:] * torch.arange(64.0)}, {"": out[..., 32:]}, 1e-6)


def test_the_keys_and_values_of_a_cross_attention_are_whole() -> None:
    """GPT-2's ``c_attn`` there has no queries in it."""
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, add_cross_attention=True)
    model = hf.GPT2LMHeadModel(config)
    IA3(feedforward_modules=[]).apply(model)
    sizes = {place.path.split(".")[-2]: place.graft.l.numel() for place in grafts(model)}
    assert sizes == {"attn": 64, "crossattention": 64}


def test_a_projection_that_mixes_heads_is_scaled_whole() -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = hf.GPTNeoXForCausalLM(config)
    method = IA3()
    method.apply(model)
    sizes = {place.path.split(".")[-1]: place.graft.l.numel() for place in grafts(model)}
    assert sizes == {"query_key_value": 96, "dense_4h_to_h": 64}
    method.remove(model)
    IA3(target_modules=[]).apply(model)
    assert [place.path.split(".")[-1] for place in grafts(model)] == ["dense_4h_to_h"]


def test_scaling_the_linear_branch_of_a_gate_is_scaling_the_product() -> None:
    """What T-Few does (``wi_1``), and what we do (the input of ``wo``)."""
    config = hf.T5Config(
        d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=1, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    layer = hf.T5EncoderModel(config).eval().encoder.block[0].layer[1].DenseReluDense
    x, scale = torch.randn(2, 5, 16), torch.rand(24)
    root = nn.ModuleDict({"wi_1": layer.wi_1, "wo": layer.wo})
    outs = []
    for arguments in (
        {"target_modules": ["wi_1"], "feedforward_modules": []},
        {"target_modules": [], "feedforward_modules": ["wo"]},
    ):
        method = IA3(**arguments)
        method.apply(root)
        next(iter(grafts(root))).graft.l.data.copy_(scale)
        outs.append(layer(x).detach())
        method.remove(root)
    assert_near({"": outs[0]}, {"": outs[1]}, 1e-6)


def test_in_half_precision_a_small_change_is_not_rounded_away() -> None:
    host, x = scaled("no bias", "feedforward_modules")
    host, x = host.bfloat16(), torch.ones(1, 6).bfloat16()
    seen: list[Tensor] = []
    host.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        host.ia3.l.fill_(1 + 3 * 2**-9)
        host(1.5 * x)
    assert (seen[0].float() == 1.5 + 2**-7).all(), "bf16 of the scale is 1 + 4 * 2^-9, which would give 1.5 + 2^-6"


def test_nothing_decays_to_zero(tmp_path) -> None:
    class Decaying(Tuned):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)

    module = Decaying("bert")
    fit = trainer(tmp_path, IA3())
    fit.fit(module, loader("bert"), loader("bert"))
    names = {id(p): name for name, p in module.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in fit.optimizers[0].param_groups for p in g["params"]}
    assert {decay[name] for name in decay if name.endswith("ia3.l")} == {0.0}
    assert {decay[name] for name in decay if "classifier" in name} == {0.5}


def test_lora_on_a_layer_whose_input_is_scaled_folds_with_it() -> None:
    """What scales the input scales what LoRA has added, whichever came first."""
    for first, second in (
        (IA3(), LoRA(r=2, target_modules="all-linear")),
        (LoRA(r=2, target_modules="all-linear"), IA3()),
    ):
        model = tiny("bert")
        first.apply(model)
        second.apply(model)
        shake(model)
        live = output(model, "bert")
        assert_near({"": live}, {"": output(merge(model), "bert")}, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["nope"]}, "'nope' matches no Linear"),
        ({"feedforward_modules": ["output.dens"]}, r"'output\.dens' matches no Linear .*output\.dense"),
        ({"target_modules": [], "feedforward_modules": []}, "IA3 is left nothing to scale"),
        ({"exclude": ".*"}, "IA3 is left nothing to scale"),
        ({"target_modules": ["key"], "feedforward_modules": ["key"]}, "key is one of target_modules and of"),
        ({"layers": [2]}, "layers has 2"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: dict, message: str) -> None:
    model = tiny("bert")
    before = snapshot(model, "bert")
    with pytest.raises(TuningError, match=message):
        IA3(**arguments).apply(model)
    after = snapshot(model, "bert")
    assert torch.equal(before.pop("output"), after.pop("output"))
    assert after.pop("state").keys() == before.pop("state").keys()
    assert before == after


def test_a_model_of_unknown_names_is_refused() -> None:
    with pytest.raises(TuningError, match="no key or value projection under a known name"):
        IA3().apply(nn.Sequential(nn.Linear(3, 3)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(3, 3), nn.Linear(3, 3)

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    IA3().apply(model)  # a block without a feed-forward network
    assert {place.path.split(".")[-1] for place in grafts(model)} == {"key", "value"}


def test_layers_and_targets() -> None:
    model = tiny("bert")
    IA3(layers=[-1], feedforward_modules=[]).apply(model)
    assert [n for n in collect(model) if "ia3" in n] == [
        f"bert.encoder.layer.1.attention.self.{part}.ia3.l" for part in ("key", "value")
    ]
    model(**batch("bert")).loss.backward()
