"""LoRA on matrices that are read without calling a layer: nn.MultiheadAttention, and experts stacked in one tensor."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, TuningError, collect, load_delta, merge, save_delta
from lightning_peft.core.graft import grafts
from lightning_peft.updates.low_rank_weights import LowRankWeights
from lightning_peft.updates.targets import targets
from tests.contract import assert_near, half, shake

KINDS = (nn.Linear, nn.Embedding, nn.Conv2d)


def encoder(**changes: int) -> tuple[nn.Module, Tensor]:
    """Return torch's own transformer: packed attention inside, linear layers beside it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **changes)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval(), torch.randn(3, 5, 16)


def attention(kdim: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return one attention; with ``kdim`` its three projections are apart."""
    torch.manual_seed(0)
    host = nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, batch_first=True)
    q, kv = torch.randn(2, 3, 16), torch.randn(2, 6, kdim or 16)
    return nn.ModuleDict({"attention": host}).eval(), (q, kv, kv)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return hf.MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Experts stored as [in, out]."""
    torch.manual_seed(0)
    config = hf.GptOssConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return hf.GptOssForCausalLM(config).eval()


EXPERTS = pytest.mark.parametrize("build", [mixtral, gpt_oss])


def ids() -> Tensor:
    return torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(0))


def test_packed_matrices_are_found_by_themselves() -> None:
    model, _ = encoder()
    assert list(targets(model, KINDS)) == [f"layers.{i}.self_attn.in_proj_weight" for i in range(2)]
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    assert list(targets(model, KINDS, "all-linear")) == [f"layers.{i}.{part}" for i in range(2) for part in parts]
    both = ["layers.1.self_attn.in_proj_weight", "layers.1.self_attn.out_proj"]
    assert list(targets(model, KINDS, ["self_attn"], layers=[1])) == both
    assert list(targets(model, KINDS, ["1.self_attn.out_proj"])) == both[1:]
    apart, _ = attention(kdim=8)
    names = [f"attention.{part}" for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")]
    assert list(targets(apart, KINDS, ["attention"])) == names


@EXPERTS
def test_experts_are_found_by_themselves(build) -> None:
    found = targets(build(), KINDS, "all-linear")
    experts = [n for n, target in found.items() if target.weight]
    parts = ("gate_up_proj", "down_proj")
    assert experts == [f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in parts]
    assert list(targets(build(), KINDS, ["experts.down_proj"])) == experts[1::2]
    assert len(found) == 2 * (4 + 2)


def test_matrices_of_other_layers_of_torch_are_not_taken() -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.ConvTranspose1d(4, 4, 3), nn.Bilinear(4, 4, 4))
    for name in ("0.weight_ih_l0", "1.weight", "2.weight", "0", "1", "2"):
        with pytest.raises(TuningError, match="matches no"):
            LoRA(r=2, target_modules=[name]).apply(model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kdim", [None, 8])
def test_an_attention_is_that_of_the_changed_weights(kdim: int | None, dora: bool) -> None:
    model, inputs = attention(kdim)
    host = model.attention
    before = host(*inputs)[0]
    state = {name: p.detach().clone() for name, p in host.named_parameters()}
    LoRA(r=3, alpha=6.0, target_modules=["attention"], use_dora=dora).apply(model)
    assert torch.equal(host(*inputs)[0], before) is not dora or torch.allclose(host(*inputs)[0], before, atol=1e-6)
    shake(model, 0.5)
    changed, plain = {}, attention(kdim)[0].attention
    for name in host.lora.weights:
        part = host.lora.part(name)
        v = state[name] + 2.0 * part.B @ part.A
        changed[name] = v if not dora else part.m[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    expected = torch.func.functional_call(plain, state | changed, inputs)[0]
    found = host(*inputs)[0]
    assert_near({"": expected}, {"": found}, 1e-5)
    weight = torch.randn_like(found)
    parameters = list(host.lora.parameters())
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    ours = torch.autograd.grad((found * weight).sum(), parameters)
    for left, right in zip(theirs, ours, strict=True):
        assert left.any()
        assert_near({"": left}, {"": right}, 1e-5)
    assert dict(host.named_parameters()).keys() >= state.keys()
    live = host(*inputs)[0].detach()
    merge(model)
    assert_near({"": live}, {"": host(*inputs)[0]}, 1e-5)
    assert list(dict(host.named_parameters())) == list(state)


@pytest.mark.parametrize("norm_first", [0, 1])
def test_the_fast_path_of_torch_does_not_go_round_the_grafts(norm_first: int) -> None:
    """``nn.TransformerEncoderLayer`` reads all weights itself where nothing needs a gradient."""
    model, x = encoder(norm_first=bool(norm_first))
    LoRA(r=2, target_modules="all-linear").apply(model)
    shake(model, 0.3)
    slow = model(x)
    model.requires_grad_(False)
    with torch.no_grad():
        fast = model(x)
    assert_near({"": slow.detach()}, {"": fast}, 1e-5)
    with torch.no_grad():
        assert_near({"": fast}, {"": merge(model)(x)}, 1e-5)


@EXPERTS
@pytest.mark.parametrize("dora", [False, True])
def test_each_expert_has_matrices_of_its_own(build, dora: bool) -> None:
    model, plain = build(), build()
    LoRA(r=2, alpha=4.0, target_modules=["experts"], use_dora=dora).apply(model)
    with torch.no_grad():
        base, start = plain(input_ids=ids()).logits, model(input_ids=ids()).logits
    assert_near({"": base}, {"": start}, 1e-5)
    assert dora or torch.equal(base, start)
    shake(model, 0.3)
    for place in grafts(model):
        assert isinstance(place.graft, LowRankWeights)
        mirror = plain.get_submodule(place.path)
        for name in place.graft.weights:
            part = place.graft.part(name)
            assert part.A.shape[:2] == (4, 2)
            with torch.no_grad():
                w = mirror.get_parameter(name)
                flip = build is gpt_oss
                for e in range(4):
                    v = (w[e].t() if flip else w[e]) + 2.0 * part.B[e] @ part.A[e]
                    v = v if not dora else part.m[e][:, None] * v / v.norm(dim=1, keepdim=True)
                    w[e] = v.t() if flip else v
    with torch.no_grad():
        live = model(input_ids=ids()).logits
        assert_near({"": plain(input_ids=ids()).logits}, {"": live}, 1e-5)
        assert not torch.allclose(live, base, atol=0.05)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if ".lora." in n)
    with torch.no_grad():
        assert_near({"": live}, {"": merge(model)(input_ids=ids()).logits}, 1e-5)
    assert list(model.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_every_init_starts_at_the_frozen_model(init: str) -> None:
    model = mixtral()
    with torch.no_grad():
        before = model(input_ids=ids()).logits
        LoRA(r=2, init=init, target_modules="all-linear").apply(model)
        assert torch.equal(before, model(input_ids=ids()).logits)


def test_life_of_a_packed_update(tmp_path) -> None:
    method = LoRA(r=2, target_modules="all-linear", rank_pattern={"in_proj_weight": 3})
    (model, x), (bare, _) = encoder(), encoder()
    method.apply(model)
    assert model.layers[0].self_attn.lora.part("in_proj_weight").A.shape == (3, 16)
    shake(model, 0.3)
    out = model(x).detach()
    save_delta(model, tmp_path / "delta.safetensors")
    (other, _), copied, pickled = encoder(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    LoRA(**method.init_args()).apply(other)
    load_delta(other, tmp_path / "delta.safetensors")
    for each in (other, copied, pickled):
        assert torch.equal(each(x), out)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    assert_near({"": out}, {"": compiled(x)}, 1e-5)
    assert method.merge(model) == 0
    assert_near({"": out}, {"": model(x)}, 1e-5)
    method.unmerge(model)
    assert torch.equal(model(x), out)
    method.remove(model)
    assert torch.equal(model(x), bare(x))
    assert set(collect(other)) == {n for n, p in other.named_parameters() if p.requires_grad}


def test_half_precision_and_autocast() -> None:
    model, x = encoder()
    half(model)
    LoRA(r=2, target_modules="all-linear", use_dora=True).apply(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(x.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model, x = encoder()
    LoRA(r=2, target_modules="all-linear").apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dropout_has_no_input_there() -> None:
    with pytest.raises(TuningError, match=r"in_proj_weight is read without a call, so dropout=0\.1"):
        LoRA(r=2, dropout=0.1).apply(encoder()[0])


def test_a_rank_that_does_not_fit_names_the_matrix() -> None:
    with pytest.raises(
        TuningError, match=r"r=17 does not fit layers\.0\.self_attn\.in_proj_weight of shape \[48, 16\]"
    ):
        LoRA(r=17).apply(encoder()[0])


def test_biases_of_a_packed_attention() -> None:
    model, _ = encoder()
    LoRA(r=2, bias="lora_only", target_modules=["self_attn"]).apply(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n]
    assert trained == [f"layers.{i}.self_attn.{n}" for i in range(2) for n in ("in_proj_bias", "out_proj.bias")]
    x = torch.randn(3, 5, 16)
    model(x).square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n in trained)
    assert F.linear is not None
