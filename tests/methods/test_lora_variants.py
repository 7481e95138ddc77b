"""LoRA's variants: DoRA, PiSSA, OLoRA, LoRA+, trained biases, and what is trained beside them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import IA3, BitFit, LoRA, TuningError, collect, load_delta, merge, save_delta
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, output, shake
from tests.models import TEXT, batch, meta, tiny
from tests.modules import Tuned, loader, trainer


def q_and_v(kind: str, r: int) -> int:
    """r (in + out) for each query and value projection, or the fused one."""
    square = r * (32 + 32)
    return {"bert": 4 * square, "gpt2": 2 * r * (32 + 96), "llama": 2 * (square + r * 48), "vit": 4 * square}[kind]


class TestDoRA(MethodContract):
    method = LoRA(r=2, use_dora=True)
    backbones = ("bert", "gpt2", "llama", "vit")

    def count(self, kind: str) -> int:
        """LoRA's, and a magnitude for each output."""
        return q_and_v(kind, 2) + {"bert": 4 * 32, "gpt2": 2 * 96, "llama": 2 * (32 + 16), "vit": 4 * 32}[kind]


class TestDoRAWithDropoutOnAllLinears(MethodContract):
    method = LoRA(r=3, use_dora=True, dropout=0.1, target_modules="all-linear", use_rslora=True)
    backbones = ("bert",)

    def count(self, kind: str) -> int:
        return 2 * (3 * (4 * 64 + 2 * 96) + 4 * 32 + 64 + 32)


class OfTheWeight(MethodContract):
    """The factors of the start are saved, but not trained."""

    backbones = ("bert", "gpt2")

    def count(self, kind: str) -> int:
        return q_and_v(kind, 2)

    def test_the_delta_is_what_requires_gradients(self, kind: str) -> None:
        model = tiny(kind)
        self.applied(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(collect(model)) == trained | {f"{n}0" for n in trained if n.endswith((".A", ".B"))}


class TestPiSSA(OfTheWeight):
    method = LoRA(r=2, init="pissa")


class TestOLoRA(OfTheWeight):
    method = LoRA(r=2, init="olora")


class TestBiases(MethodContract):
    method = LoRA(r=2, bias="lora_only", init="gaussian")
    backbones = ("bert", "gpt2")

    def count(self, kind: str) -> int:
        return q_and_v(kind, 2) + {"bert": 4 * 32, "gpt2": 2 * 96}[kind]


def test_counts_of_dora() -> None:
    """LLaMA-7B, r = 32, on query, key, value, up and down: LoRA 56,098,816, and 876,544 magnitudes."""
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    for r, dora, count in [(32, False, 56_098_816), (32, True, 56_975_360), (16, True, 28_925_952)]:
        model = meta(hf.LlamaConfig(), hf.AutoModelForCausalLM)
        LoRA(r=r, use_dora=dora, target_modules=targets).apply(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# Single layers.

HOSTS = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(2, 5, 12)),
    "no bias": lambda: (nn.Linear(12, 10, bias=False), torch.randn(5, 12)),
    "conv1d": lambda: (Conv1D(10, 12), torch.randn(2, 5, 12)),
    "embedding": lambda: (nn.Embedding(12, 10), torch.randint(0, 12, (2, 5))),
    "conv2d": lambda: (nn.Conv2d(12, 10, 3, stride=2, padding=1), torch.randn(2, 12, 9, 9)),
}
ALL = pytest.mark.parametrize("host", HOSTS)


def grafted(kind: str, by: float = 1.0, **arguments: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a layer with LoRA on it, its graft, past the start of training, and an input."""
    torch.manual_seed(0)
    host, x = HOSTS[kind]()
    LoRA(**{"r": 4, "alpha": 8.0, "target_modules": ["0"]} | arguments).apply(nn.Sequential(host))
    graft = host.lora
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn_like(p), alpha=by * (0.2 if p is graft.m else 1))
    return host, graft, x


def rows(host: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as [out, in]."""
    return weight.t() if isinstance(host, (Conv1D, nn.Embedding)) else weight.flatten(1)


def call(host: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the plain layer gives with another weight, [out, in]."""
    if isinstance(host, nn.Embedding):
        return weight.t()[x]
    if isinstance(host, nn.Conv2d):
        return host._conv_forward(x, weight.view(host.weight.shape), host.bias)
    return F.linear(x, weight, host.bias)


def formula(host: nn.Module, graft: nn.Module, x: Tensor) -> Tensor:
    """Return what DoRA computes, by its definition."""
    v = rows(host, host.weight) + graft.scale * graft.B.flatten(1) @ graft.A.flatten(1)
    return call(host, x, graft.m.flatten()[:, None] * v / v.norm(dim=1, keepdim=True).detach())


@ALL
@pytest.mark.parametrize("keeps_output", [True, False])
def test_dora_is_its_formula_with_its_gradients(host: str, keeps_output: bool) -> None:
    layer, graft, x = grafted(host, use_dora=True)
    graft.keeps_output = keeps_output
    x = x.requires_grad_() if x.is_floating_point() else x
    inputs = [*graft.parameters(), *([x] if x.requires_grad else [])]
    found, expected = layer(x), formula(layer, graft, x)
    assert_near({"": expected}, {"": found}, 1e-5)
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    for left, right in zip(theirs, ours, strict=True):
        assert_near({"": left}, {"": right}, 1e-5)
    with torch.no_grad():
        for _ in range(2):
            assert_near({"": expected}, {"": layer(x)}, 1e-5)


@ALL
def test_the_rows_of_a_merged_weight_have_the_magnitudes(host: str) -> None:
    layer, graft, x = grafted(host, use_dora=True)
    with torch.no_grad():
        live, before = layer(x), layer.weight.clone()
        graft.merge(layer, keep=True)
        assert_near({"": live}, {"": layer(x)}, 1e-5)
        assert_near({"": graft.m.flatten().abs()}, {"": rows(layer, layer.weight).norm(dim=1)}, 1e-5)
        graft.unmerge(layer)
        assert torch.equal(before, layer.weight)
        assert_near({"": live}, {"": layer(x)}, 1e-5)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_that_of_the_sum(host: str, dtype: torch.dtype) -> None:
    layer, graft, _ = grafted(host, use_dora=True)
    weight = rows(layer, layer.weight.detach()).to(dtype)
    v = weight.double() + (graft.scale * graft.B.flatten(1) @ graft.A.flatten(1)).detach().double()
    assert_near({"": v.norm(dim=1).float()}, {"": graft.norm(weight)}, 1e-6)


def test_a_row_of_zeros_stays_one() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[2] = 0
    base = copy.deepcopy(layer)
    LoRA(r=2, use_dora=True, target_modules=["0"]).apply(nn.Sequential(layer))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.lora.parameters())
    assert layer.lora.m.grad[2] == 0


def test_dora_with_dropout_is_that_of_the_authors() -> None:
    """``dora.py`` of NVlabs/DoRA: the base path is not dropped, the change of the direction and of the length is."""
    layer, graft, x = grafted("linear", use_dora=True, dropout=0.5)
    layer.train()
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    v = layer.weight + graft.scale * graft.B @ graft.A
    g = graft.m / v.norm(dim=1).detach()
    expected = F.linear(x, layer.weight, layer.bias) + (g - 1) * F.linear(dropped, layer.weight)
    expected = expected + g * graft.scale * (dropped @ graft.A.t() @ graft.B.t())
    assert_near({"": expected}, {"": found}, 1e-5)


def test_a_trained_bias_under_dora_gets_its_whole_gradient() -> None:
    layer, _, x = grafted("linear", use_dora=True, bias="lora_only")
    layer(x).sum().backward()
    assert_near({"": torch.full((10,), 10.0)}, {"": layer.bias.grad}, 1e-5)


def test_dora_keeps_the_input_the_product_and_its_own_output() -> None:
    layer, _, x = grafted("linear", use_dora=True)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    for tensor in (x, *layer.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert kept.pop(out.untyped_storage().data_ptr()) == out.numel()
    assert sorted(kept.values()) == [10, 4 * 10], "the norms, and A x"


def test_in_half_precision_a_small_change_of_length_is_not_rounded_away() -> None:
    layer, graft, x = grafted("linear", by=0.0, use_dora=True)
    layer, x = layer.bfloat16(), (100 * x).bfloat16()
    with torch.no_grad():
        graft.m.copy_(graft.norm(layer.weight))
        before = layer(x).float()
        graft.m.mul_(1 + 3 * 2**-9)  # bf16 has 1, 1 + 4 * 2^-9 ...
        after = layer(x).float()
    ratio = ((after - layer.bias) / (before - layer.bias)).mean()
    assert ratio == pytest.approx(1 + 3 * 2**-9, abs=5e-4)


def test_modules_that_write_into_their_input_may_follow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    twin = nn.Sequential(*copy.deepcopy(model))
    twin[1] = nn.ReLU()
    for each in (model, twin):
        torch.manual_seed(1)
        LoRA(r=2, use_dora=True, target_modules=["0", "2"]).apply(each)
    x = torch.randn(3, 6)
    for each in (model, twin):
        each(x).square().sum().backward()
    assert not model[0].lora.keeps_output
    assert twin[0].lora.keeps_output
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert left.grad is None or torch.allclose(left.grad, right.grad, atol=1e-6)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_of_the_rescaling(check, biased: bool) -> None:
    from lightning_peft.updates.in_place import _Rescale

    def rescale(x: Tensor, w: Tensor, b: Tensor, m: Tensor) -> Tensor:
        out = F.linear(x, w, b if biased else None)
        return _Rescale.apply(out, b if biased else None, m, norm)

    norm = torch.rand(5, dtype=torch.float64) + 0.5
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 3, 4), (5, 4), (5,), (5,)]]
    if not biased:
        inputs[2] = torch.zeros(5, dtype=torch.float64)
    assert check(rescale, inputs, atol=1e-6, rtol=1e-5)


# What is kept between calls.


@ALL
def test_what_is_kept_at_inference_follows_every_change(host: str) -> None:
    layer, graft, x = grafted(host, use_dora=True)
    layer.eval()

    def check() -> None:
        with torch.no_grad():
            assert_near({"": formula(layer, graft, x)}, {"": layer(x)}, 1e-5)

    check()
    assert graft._kept
    for p in (graft.A, graft.B, graft.m, layer.weight):
        with torch.no_grad():
            p.add_(0.3)
        check()
    layer.load_state_dict({name: t + 0.1 for name, t in layer.state_dict().items()})
    check()
    graft.m.data.add_(0.2)  # goes unseen, until the mode is set
    layer.eval()
    check()


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_step_is_seen(how: dict) -> None:
    layer, graft, x = grafted("linear", use_dora=True)
    optimizer = torch.optim.AdamW(graft.parameters(), lr=0.1, **how)
    for _ in range(2):
        with torch.no_grad():
            assert_near({"": formula(layer, graft, x)}, {"": layer(x)}, 1e-5)
        layer(x).square().sum().backward()
        optimizer.step()


def test_nothing_kept_is_copied_or_pickled() -> None:
    layer, graft, x = grafted("linear", use_dora=True)
    layer.eval()
    with torch.no_grad():
        layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not other.lora._kept
            other.lora.m.add_(0.3)
            assert_near({"": formula(other, other.lora, x)}, {"": other(x)}, 1e-5)
    assert graft._kept


def test_after_inference_mode_it_trains() -> None:
    layer, graft, x = grafted("linear", use_dora=True)
    layer.eval()
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert graft.m.grad is not None


def test_a_scaled_embedding_scales_its_update() -> None:
    """Gemma and BART multiply the rows by a factor after the lookup."""
    torch.manual_seed(0)
    model = hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=20,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            scale_embedding=True,
            tie_word_embeddings=False,
        )
    ).eval()
    table = model.model.encoder.embed_tokens
    table.weight = nn.Parameter(table.weight.detach().clone())  # on its own, so that it can be merged
    LoRA(r=2, target_modules=["encoder.embed_tokens"]).apply(model)
    shake(model)
    ids = torch.randint(3, 20, (2, 5))
    with torch.no_grad():
        live = table(ids)
        table.lora.merge(table)
        assert_near({"": live}, {"": table(ids)}, 1e-5)


# Inits.


@ALL
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_init_of_the_weight_is_the_authors_with_the_base_left_alone(host: str, init: str, dora: bool) -> None:
    """Theirs: W - s B₀ A₀ in the base, B A beside it. The function and the gradients are the same."""
    torch.manual_seed(0)
    layer, x = HOSTS[host]()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        start = layer(x)
    LoRA(r=4, alpha=8.0, init=init, use_dora=dora, target_modules=["0"]).apply(nn.Sequential(layer))
    graft = layer.lora
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), start), "the start is the frozen model, bit for bit"
    a0, b0, s = graft.A.detach().flatten(1).clone(), graft.B.detach().flatten(1).clone(), graft.scale
    matrix = rows(layer, before)
    if init == "pissa":
        u, sv, vt = torch.linalg.svd(matrix, full_matrices=False)
        assert_near({"": (u[:, :4] * sv[:4]) @ vt[:4]}, {"": s * b0 @ a0}, 1e-5)
    else:
        q, upper = torch.linalg.qr(matrix)
        assert_near({"": q[:, :4] @ upper[:4]}, {"": b0 @ a0}, 1e-5)
        assert_near({"": torch.eye(4)}, {"": b0.t() @ b0}, 1e-5)
    residual = matrix - s * b0 @ a0
    for _ in range(2):
        with torch.no_grad():
            graft.A.add_(torch.randn_like(graft.A), alpha=0.3)
            graft.B.add_(torch.randn_like(graft.B), alpha=0.3)
        v = residual + s * graft.B.flatten(1) @ graft.A.flatten(1)
        v = v if not dora else graft.m.flatten()[:, None] * v / v.norm(dim=1, keepdim=True).detach()
        expected, found = call(layer, x, v), layer(x)
        assert_near({"": expected}, {"": found}, 1e-5)
        weight = torch.randn_like(found)
        theirs = torch.autograd.grad((expected * weight).sum(), list(graft.parameters()))
        ours = torch.autograd.grad((found * weight).sum(), list(graft.parameters()))
        for left, right in zip(theirs, ours, strict=True):
            assert_near({"": left}, {"": right}, 1e-5)
    a, b = graft.factors()
    assert (a.shape[0], b.shape[1]) == (8, 8), "a plain LoRA of twice the rank"
    with torch.no_grad():
        live = layer(x)
        graft.merge(layer, keep=True)
        assert_near({"": live}, {"": layer(x)}, 1e-5)
        graft.unmerge(layer)
    assert torch.equal(layer.weight, before)


def test_a_randomised_decomposition_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 40))[0], torch.linalg.qr(torch.randn(30, 30))[0]
    layer = nn.Linear(30, 40)
    with torch.no_grad():
        layer.weight.copy_((u[:, :30] * 0.5 ** torch.arange(30)) @ v.t())
    products = []
    for iterations in (None, 8):
        host = copy.deepcopy(layer)
        LoRA(r=4, init="pissa", svd_iterations=iterations, target_modules=["0"]).apply(nn.Sequential(host))
        products.append(host.lora.B.detach() @ host.lora.A.detach())
    assert_near({"": products[0]}, {"": products[1]}, 1e-4)


def test_a_gaussian_init_is_that_of_peft() -> None:
    layer = nn.Linear(400, 300)
    LoRA(r=64, init="gaussian", target_modules=["0"]).apply(nn.Sequential(layer))
    assert layer.lora.A.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert not layer.lora.B.any()


def test_pissa_is_saved_with_what_it_started_from(tmp_path) -> None:
    model = tiny("bert")
    LoRA(r=2, init="pissa").apply(model)
    shake(model)
    save_delta(model, tmp_path / "delta.safetensors")
    other = tiny("bert")
    LoRA(r=2, init="pissa", svd_iterations=1).apply(other)  # other factors at the start
    load_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(output(model, "bert"), output(other, "bert"))


# Biases, learning rates, and what is trained beside it.


def test_bias_all_is_every_bias() -> None:
    both, biases = tiny("bert"), tiny("bert")
    LoRA(r=2, bias="all").apply(both)
    BitFit().apply(biases)
    bitfit = {name for name, p in biases.named_parameters() if p.requires_grad}
    lora = {name for name, p in both.named_parameters() if p.requires_grad and ".lora." not in name}
    assert lora == bitfit


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_backbone_without_biases_is_refused(bias: str) -> None:
    with pytest.raises(TuningError, match=f"LlamaForCausalLM has no biases that bias='{bias}' could train"):
        LoRA(r=2, bias=bias).apply(tiny("llama"))


def test_lora_plus_gives_b_a_learning_rate_of_its_own(tmp_path) -> None:
    module = Tuned("bert", lr=1e-3)
    fit = trainer(tmp_path, LoRA(r=2, use_dora=True, lora_plus_ratio=16.0, target_modules="all-linear"))
    fit.fit(module, loader("bert"), loader("bert"))
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert len(rates) == 12 * 3 + 2
    for name, rate in rates.items():
        assert rate == pytest.approx(16e-3 if name.endswith("lora.B") else 1e-3), name


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight", "(transformer.wte|lm_head).weight"])
def test_a_tied_pair_is_trained_and_saved_once(name: str, tmp_path) -> None:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    LoRA(r=2, also_train=name).apply(model)
    assert [n for n in collect(model) if "lora" not in n] == ["transformer.wte.weight"]
    shake(model)
    save_delta(model, tmp_path / "delta.safetensors")
    fresh = tiny("gpt2")
    LoRA(r=2, also_train=name).apply(fresh)
    load_delta(fresh, tmp_path / "delta.safetensors")
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(output(model, "gpt2"), output(fresh, "gpt2"))
    assert_near({"": output(model, "gpt2")}, {"": output(merge(fresh), "gpt2")}, 1e-5)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_an_embedding_and_a_head_of_their_own_are_both_trained() -> None:
    model = tiny("llama")
    LoRA(r=2, also_train=r"model\.embed_tokens\.weight|lm_head\.weight").apply(model)
    model(**batch("llama")).loss.backward()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert weight.grad.any()


@pytest.mark.parametrize("kind", TEXT)
def test_merged_dora_is_the_live_one(kind: str) -> None:
    model = tiny(kind)
    LoRA(r=2, use_dora=True, target_modules="all-linear", bias="all" if kind in ("bert", "gpt2") else "none").apply(
        model
    )
    shake(model, 0.05)
    live = output(model, kind)
    merge(model)
    assert not list(grafts(model))
    assert_near({"": live}, {"": output(model, kind)}, 1e-5)
    assert not torch.allclose(live, output(tiny(kind), kind), atol=0.05)


def test_dora_sets_the_magnitude_of_the_layer_alone() -> None:
    model = tiny("bert")
    IA3().apply(model)
    with pytest.raises(TuningError, match=r"already changes the output of .*: apply LoRA first\.$"):
        LoRA(use_dora=True).apply(model)
