"""LoRA: `h = W x + (alpha / r) B A x`, its counts, its patterns, and merging."""

import copy
import math
import time

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import IA3, LoRA, PromptTuning, TuningError, collect, load_delta, merge, save_delta
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, output, shake, snapshot
from tests.models import KINDS, MINILM, ROBERTA_LARGE, batch, meta, tiny


class TestLoRA(MethodContract):
    method = LoRA(r=2)
    backbones = KINDS
    traces_backward = True
    compiled = KINDS

    def count(self, kind: str) -> int:
        """r (in + out) for each query and value projection, or for the fused one."""
        square = 2 * (32 + 32)
        return {
            "bert": 2 * 2 * square,
            "distilbert": 2 * 2 * square,
            "vit": 2 * 2 * square,
            "gpt2": 2 * 2 * (32 + 96),
            "llama": 2 * (square + 2 * (32 + 16)),
            "t5": (2 + 2 + 2) * 2 * square,  # in the encoder, in the decoder, and across
        }[kind]


class TestLoRAOnAllLinears(MethodContract):
    method = LoRA(r=3, alpha=5.0, target_modules="all-linear", use_rslora=True, dropout=0.1)
    backbones = ("bert",)

    def count(self, kind: str) -> int:
        """Four square layers and two of the feed-forward network in each block: neither the pooler nor the head."""
        return 2 * 3 * (4 * 64 + 2 * 96)


@pytest.mark.parametrize(
    ("config", "r", "count"),
    [
        (ROBERTA_LARGE, 8, 786_432),
        (hf.RobertaConfig(vocab_size=50265), 8, 294_912),
        (MINILM, 8, 73_728),
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), 4, 393_216),
        (hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20), 4, 737_280),
    ],
    ids=["roberta-large", "roberta-base", "MiniLM", "gpt2-medium", "gpt2-large"],
)
def test_counts_of_the_paper(config: hf.PreTrainedConfig, r: int, count: int) -> None:
    model = meta(config)
    LoRA(r=r).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(12, 10), torch.randn(2, 5, 12)


def conv1d() -> tuple[nn.Module, Tensor]:
    return Conv1D(10, 12), torch.randn(2, 5, 12)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(12, 10, padding_idx=0), torch.randint(0, 12, (2, 5))


def conv2d() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(12, 10, 3, stride=2, padding=1, dilation=2, padding_mode="circular"), torch.randn(2, 12, 9, 9)


HOSTS = pytest.mark.parametrize("build", [linear, conv1d, embedding, conv2d])


def grafted(host: nn.Module, **arguments: object) -> tuple[nn.Module, nn.Module]:
    """Return ``host`` in a module with LoRA on it, and the graft, its A and B random."""
    root = nn.ModuleDict({"host": host})
    LoRA(**{"r": 4, "alpha": 8.0, "target_modules": ["host"]} | arguments).apply(root)
    shake(root, 1.0)
    return root, host.lora


@HOSTS
def test_it_is_the_formula(build) -> None:
    host, x = build()
    with torch.no_grad():
        base = host(x)
        _, graft = grafted(host, alpha=6.0)
        a, b, s = graft.A, graft.B, 6.0 / 4
        if isinstance(host, nn.Embedding):
            expected = base + s * a.t()[x] @ b.t()
        elif isinstance(host, nn.Conv2d):
            kernel = host.weight + s * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
            expected = host._conv_forward(x, kernel, host.bias)
        else:
            expected = base + s * x @ a.t() @ b.t()
        assert not torch.allclose(expected, base, atol=0.1)
        assert_near({"": expected}, {"": host(x)}, 1e-5)


@HOSTS
def test_merged_is_unmerged(build) -> None:
    host, x = build()
    before = host.weight.clone()
    _, graft = grafted(host)
    with torch.no_grad():
        unmerged = host(x)
        for _ in range(2):  # merging what is merged adds nothing
            assert graft.merge(host, keep=True) == 0.0, "nothing is rounded"
            assert_near({"": unmerged}, {"": host(x)}, 1e-5)
        assert not torch.allclose(host.weight, before, atol=0.1)
        for _ in range(2):
            graft.unmerge(host)
            assert torch.equal(before, host.weight)
        assert_near({"": unmerged}, {"": host(x)}, 1e-5)


@HOSTS
def test_merge_into_bf16_rounds_once(build) -> None:
    host, x = build()
    host.bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    with torch.no_grad():
        _, graft = grafted(host)
        graft.A.mul_(0.3)
        graft.B.mul_(0.3)
        unmerged = host(x).float()
        exact = host.weight.float() + graft.scale * (
            (graft.update() / graft.scale).t() if isinstance(host, Conv1D) else graft.update() / graft.scale
        )
        before, update = host.weight.clone(), (exact - host.weight.float()).norm()
        error = graft.merge(host, keep=True)
        assert torch.equal(host.weight, exact.bfloat16())
        assert error == pytest.approx(((exact - exact.bfloat16().float()).norm() / update).item(), rel=1e-4)
        assert_near({"": unmerged}, {"": host(x).float()}, 2e-2)
        graft.unmerge(host)
        assert torch.equal(host.weight, before)
        graft.merge(host)
        with pytest.raises(TuningError, match="without keeping the weights"):
            graft.unmerge(host)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_a_plain_backbone(kind: str) -> None:
    plain, model = tiny(kind), tiny(kind)
    LoRA(r=2).apply(model)
    shake(model)
    tuned = output(model, kind)
    assert merge(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not list(grafts(model))
    assert all(p.requires_grad for p in model.parameters())
    assert_near({"": tuned}, {"": output(model, kind)}, 1e-5)
    assert not torch.allclose(tuned, output(plain, kind), atol=0.1)


def test_an_embedding_tied_to_the_head_is_not_merged() -> None:
    model = tiny("gpt2")
    LoRA(r=2, target_modules=["wte"]).apply(model)
    shake(model)
    before = snapshot(model, "gpt2")
    with pytest.raises(TuningError, match=r"tied to"):
        merge(model)
    assert torch.equal(output(model, "gpt2"), before["output"])


def test_a_starts_random_and_b_at_zero() -> None:
    host = nn.Linear(400, 300)
    LoRA(r=64, target_modules=["0"]).apply(nn.Sequential(host))
    a, b = host.lora.A, host.lora.B
    assert a.abs().max() <= 1 / math.sqrt(400)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert not b.any()


def test_the_row_of_padding_has_no_gradient_as_in_the_table() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2))
    LoRA(r=2, target_modules=["0"]).apply(model)
    model(torch.arange(6)).square().sum().backward()
    gradient = next(p for name, p in model.named_parameters() if name.endswith(".A")).grad
    assert gradient is not None
    assert gradient.norm(dim=0).eq(0).tolist() == [False, False, True, False, False, False]


def test_an_embedding_starts_with_a_at_zero_and_b_normal() -> None:
    host = nn.Embedding(300, 400)
    LoRA(r=64, target_modules=["0"]).apply(nn.Sequential(host))
    assert not host.lora.A.any()
    assert host.lora.B.std().item() == pytest.approx(1, rel=0.02)


@HOSTS
def test_the_first_gradient_reaches_only_the_zero_matrix(build) -> None:
    host, x = build()
    LoRA(r=4, target_modules=["0"]).apply(nn.Sequential(host))
    host(x).square().sum().backward()
    a, b = host.lora.A.grad, host.lora.B.grad
    zero, other = (b, a) if isinstance(host, nn.Embedding) else (a, b)
    assert not zero.any()
    assert other.any()
    assert host.weight.grad is None


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_those_of_the_formula(shape: tuple[int, ...], contiguous: bool) -> None:
    """The fast path is an autograd function in place; its gradients are checked against plain operations."""
    host = nn.Linear(12, 10)
    _, graft = grafted(host)
    data = torch.randn(shape) if contiguous else torch.randn(*shape[:-1], 24)[..., ::2]
    ours, plain = data.requires_grad_(), data.detach().clone().requires_grad_()
    assert ours.is_contiguous() is contiguous or ours.dim() == 1
    expected = F.linear(plain, host.weight, host.bias) + graft.scale * plain @ graft.A.t() @ graft.B.t()
    weight = torch.randn_like(expected)
    inputs = [graft.A, graft.B]
    theirs = torch.autograd.grad((expected * weight).sum(), [plain, *inputs])
    found = torch.autograd.grad((host(ours) * weight).sum(), [ours, *inputs])
    for left, right in zip(theirs, found, strict=True):
        assert_near({"": left}, {"": right}, 1e-5)


def test_second_derivatives_are_those_of_the_formula() -> None:
    host, x = linear()
    _, graft = grafted(host)
    x.requires_grad_()

    def second(out: Tensor) -> tuple[Tensor, ...]:
        inputs = (x, graft.A, graft.B)
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    formula = F.linear(x, host.weight, host.bias) + graft.scale * x @ graft.A.t() @ graft.B.t()
    for left, right in zip(second(formula), second(host(x)), strict=True):
        assert_near({"": left}, {"": right}, 1e-5)


def test_the_update_has_rank_r() -> None:
    host, _ = linear()
    _, graft = grafted(host, r=3)
    assert torch.linalg.matrix_rank(graft.update()) == 3


def test_autocast_trains_in_fp32() -> None:
    model = tiny("bert")
    LoRA(r=2).apply(model)
    shake(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch("bert")).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()), name
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora" in name)


def test_dropout_leaves_the_base_path_alone() -> None:
    host, x = linear()
    base = host(x)
    LoRA(r=4, dropout=0.5, target_modules=["0"]).apply(nn.Sequential(host))
    host.train()
    assert torch.equal(host(x), base), "with B = 0 dropout can change nothing"
    host.lora.B.data.normal_()
    assert not torch.equal(host(x), host(x))
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(5)
    assert_near({"": base + host.lora.scale * dropped @ host.lora.A.t() @ host.lora.B.t()}, {"": host(x)}, 1e-5)
    host.eval()
    assert torch.equal(host(x), host(x))


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    LoRA(r=16, alpha=8.0, use_rslora=True, target_modules=["0"]).apply(model)
    assert model[0].lora.scale == 8.0 / 4


def test_patterns_set_rank_and_alpha_of_some_hosts() -> None:
    model = tiny("bert")
    LoRA(r=2, alpha=4.0, rank_pattern={"value": 3, "1.attention.self.value": 5}, alpha_pattern={"query": 6.0}).apply(
        model
    )
    found = {place.path.removeprefix("bert.encoder.layer."): place.graft for place in grafts(model)}
    assert {path: (graft.A.shape[0], graft.scale) for path, graft in found.items()} == {
        "0.attention.self.query": (2, 3.0),
        "0.attention.self.value": (3, 4 / 3),
        "1.attention.self.query": (2, 3.0),
        "1.attention.self.value": (5, 4 / 5),
    }


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"layers": [1]}, ["1.attention.self.query", "1.attention.self.value"]),
        ({"layers": [-2]}, ["0.attention.self.query", "0.attention.self.value"]),
        ({"target_modules": ["key"]}, ["0.attention.self.key", "1.attention.self.key"]),
        (
            {"target_modules": r".*layer\.1\..*dense"},
            ["1.attention.output.dense", "1.intermediate.dense", "1.output.dense"],
        ),
        (
            {"target_modules": ["0.output.dense", "key"], "exclude": r".*1\..*"},
            ["0.attention.self.key", "0.output.dense"],
        ),
    ],
)
def test_targets(arguments: dict, paths: list[str]) -> None:
    model = tiny("bert")
    LoRA(r=2, **arguments).apply(model)
    assert [place.path.removeprefix("bert.encoder.layer.") for place in grafts(model)] == paths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["nope"]}, r"'nope' matches no Linear .*of BertForSequenceClassification; it has e\.g\. "),
        (
            {"target_modules": ["self.qury"]},
            r"'self\.qury' matches no .*e\.g\. bert\.encoder\.layer\.0\.attention\.self\.query",
        ),
        ({"target_modules": "query"}, "'query' matches no Linear"),
        ({"target_modules": "(query"}, r"'\(query' is no regular expression"),
        ({"target_modules": ["classifier"]}, "'classifier' matches no Linear"),
        ({"r": 0}, r"r=0 does not fit .*\[32, 32\]: choose 1 to 32"),
        ({"r": -1}, r"r=-1 does not fit"),
        ({"r": 33}, r"r=33 does not fit"),
        ({"rank_pattern": {"query": 40}, "init": "olora"}, r"r=40 does not fit .*query"),
        ({"rank_pattern": {"key": 1}}, "rank_pattern has 'key', which matches no targeted module"),
        ({"alpha_pattern": {"quer": 1.0}}, r"alpha_pattern has 'quer'.*self\.query"),
        ({"layers": [2]}, "layers has 2, but .* has blocks 0 to 1"),
        ({"layers": [-3]}, "layers has -3"),
        ({"target_modules": ["pooler.dense"], "layers": [0]}, "keeps none of the selected modules"),
        ({"exclude": ".*"}, "exclude='.*' leaves nothing"),
        ({"exclude": "("}, "is no regular expression"),
        ({"backbone": "encodr"}, "backbone='encodr' is no submodule"),
        ({"also_train": "clasifier.*"}, "also_train='clasifier.*' matches no parameter .*classifier"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"alpha": 0.0}, "alpha=0.0 at .*query would scale the update away"),
        ({"alpha_pattern": {"query": -1.0}}, "alpha=-1.0 at .*query"),
        ({"rank_pattern": {"nothing.like.it": 2}}, "rank_pattern has 'nothing.like.it'"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio=0.0"),
        ({"svd_iterations": 4}, "svd_iterations=4 is for init='pissa'"),
        ({"svd_iterations": 0, "init": "pissa"}, "svd_iterations=0"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: dict, message: str) -> None:
    model = tiny("bert")
    before = snapshot(model, "bert")
    with pytest.raises(TuningError, match=message):
        LoRA(**{"r": 2} | arguments).apply(model)
    after = snapshot(model, "bert")
    assert torch.equal(before.pop("output"), after.pop("output"))
    assert after.pop("state").keys() == before.pop("state").keys()
    assert before == after


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(TuningError, match="4 groups"):
        LoRA(r=2, target_modules=["0"]).apply(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)))


def test_a_model_of_unknown_names_is_refused() -> None:
    with pytest.raises(TuningError, match="no query or value projection under a known name: give target_modules"):
        LoRA().apply(nn.LSTM(3, 3))


def test_a_compiled_model_is_refused() -> None:
    whole, inside = torch.compile(tiny("bert"), backend="eager"), tiny("bert")
    inside.compile(backend="eager")
    for model in (whole, inside):
        with pytest.raises(TuningError, match="compile it afterwards"):
            LoRA(r=2).apply(model)


def test_what_is_trained_beside_it() -> None:
    model = tiny("bert")
    LoRA(r=2, layers=[0], also_train=r"bert\.pooler\..*", exclude=r"classifier\.bias").apply(model)
    assert sorted(collect(model)) == [
        "bert.encoder.layer.0.attention.self.query.lora.A",
        "bert.encoder.layer.0.attention.self.query.lora.B",
        "bert.encoder.layer.0.attention.self.value.lora.A",
        "bert.encoder.layer.0.attention.self.value.lora.B",
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.weight",
    ]


def test_merged_for_a_while() -> None:
    model, method = tiny("bert"), LoRA(r=2, target_modules="all-linear")
    inputs = batch("bert")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TuningError, match="not applied"):
        method.merge(model)
    method.apply(model)
    for place in grafts(model):
        nn.init.normal_(place.graft.B)
    tuned = model(**inputs).logits
    assert method.merge(model) == 0
    method.merge(model)
    assert not torch.equal(
        weights["bert.encoder.layer.0.output.dense.weight"], model.bert.encoder.layer[0].output.dense.weight
    )
    torch.testing.assert_close(model(**inputs).logits, tuned, atol=1e-4, rtol=0)
    method.unmerge(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in weights.items())
    torch.testing.assert_close(model(**inputs).logits, tuned, atol=1e-4, rtol=0)


def test_removed_while_merged_it_gives_the_backbone_back() -> None:
    model, method = tiny("bert"), LoRA(r=2, target_modules="all-linear")
    before = snapshot(model, "bert")
    method.apply(model)
    shake(model)
    method.merge(model)
    method.remove(model)
    after = snapshot(model, "bert")
    assert all(torch.equal(before["state"][n], t) for n, t in after["state"].items())
    assert torch.equal(before["output"], after["output"])


def test_what_is_merged_is_neither_saved_nor_loaded(tmp_path) -> None:
    model, method = tiny("bert"), LoRA(r=2)
    method.apply(model)
    shake(model)
    save_delta(model, tmp_path / "delta.safetensors")
    method.merge(model)
    for act in (save_delta, load_delta):
        with pytest.raises(TuningError, match=r"is merged .*unmerge it first"):
            act(model, tmp_path / "delta.safetensors")
    method.unmerge(model)
    load_delta(model, tmp_path / "delta.safetensors")


def test_one_method_of_several_is_merged_unless_it_shares_its_layers() -> None:
    model, method, other = tiny("bert"), LoRA(r=2), PromptTuning(num_virtual_tokens=2, init="random_uniform")
    method.apply(model)
    other.apply(model)
    shake(model)
    inputs = dict(other.prepare(batch("bert")))
    before = model(**inputs).logits
    method.merge(model)
    assert_near({"": before}, {"": model(**inputs).logits}, 1e-5)
    method.unmerge(model)
    IA3(feedforward_modules=[]).apply(model)
    with pytest.raises(TuningError, match=r"ia3 changes .*value as LoRA does"):
        method.merge(model)


def test_merging_into_half_precision_says_what_it_rounds(caplog) -> None:
    model, method = tiny("bert").bfloat16(), LoRA(r=2)
    method.apply(model)
    shake(model)
    error = method.merge(model)
    assert 0 < error < 0.5
    method.unmerge(model)
    merge(model)
    assert f"{100 * error:.1f} % of the update" in caplog.text


def test_a_double_precision_backbone_is_merged_in_double_precision() -> None:
    host, x = linear()
    host, x = host.double(), x.double()
    _, graft = grafted(host)
    exact = host.weight + graft.scale * graft.B.double() @ graft.A.double()
    graft.merge(host)
    assert (host.weight - exact).abs().max() < 1e-13


def test_the_grafts_of_a_model_of_7_billion_parameters_take_less_than_a_second() -> None:
    method = LoRA(r=8, target_modules="all-linear", use_dora=True)
    seconds = []
    for _ in range(2):  # the faster: Python may look for garbage of all tests before in one of them
        model = meta(hf.LlamaConfig(), hf.AutoModelForCausalLM)
        start = time.process_time()
        method.apply(model)
        seconds.append(time.process_time() - start)
        assert len(list(grafts(model))) == 7 * 32
    assert min(seconds) < 1


CONVOLUTIONS = pytest.mark.parametrize(
    ("host", "shape"),
    [
        (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
        (nn.Conv3d(6, 8, (1, 3, 3), stride=(1, 2, 2)), (2, 6, 3, 7, 7)),
        (nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="reflect"), (2, 6, 7, 7)),
        (nn.Conv1d(6, 8, 4, groups=2, padding="same", padding_mode="circular", dilation=2), (2, 6, 9)),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7)),
    ],
    ids=["1d", "3d", "grouped", "grouped_same", "depthwise"],
)


@CONVOLUTIONS
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")
def test_convolutions_of_any_dimension_and_groups_are_updated_as_by_peft(host: nn.Module, shape: tuple) -> None:
    torch.manual_seed(0)
    r, x = 8, torch.randn(shape)
    root = nn.ModuleDict({"host": copy.deepcopy(host)})
    theirs = peft.get_peft_model(
        nn.ModuleDict({"host": copy.deepcopy(host)}), peft.LoraConfig(r=r, lora_alpha=16, target_modules=["host"])
    )
    LoRA(r=r, target_modules=["host"]).apply(root)
    graft, layer = root["host"].lora, theirs.base_model.model["host"]
    shake(root, 1.0)
    with torch.no_grad():
        for ours, name in ((graft.A, "lora_A"), (graft.B, "lora_B")):
            assert ours.shape == getattr(layer, name)["default"].weight.shape
            getattr(layer, name)["default"].weight.copy_(ours)
        kernel = layer.lora_A["default"]
        kernel.dilation, kernel.padding_mode = host.dilation, host.padding_mode  # which PEFT leaves out
        kernel._reversed_padding_repeated_twice = host._reversed_padding_repeated_twice
        assert_near({"": layer(x)}, {"": root["host"](x)}, 1e-5)
        if host.groups == 1:
            merged = root["host"](x)
            assert_near({"": merged}, {"": merge(root)["host"](x)}, 1e-5)
        else:
            with pytest.raises(TuningError, match="groups, and the update is none of so many"):
                merge(root)


def test_a_rank_above_the_greatest_warns_where_it_was_asked_for() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 1), nn.Linear(8, 8)

    model = nn.ModuleList([Block(), Block()])
    LoRA(r=4, target_modules="all-linear").apply(model)
    assert {tuple(p.shape) for n, p in model.named_parameters() if "gate.lora" in n} == {(1, 8), (1, 1)}
    with pytest.warns(UserWarning, match=r"r=4 is more than the rank that 0\.gate can have, which is 1 \(2 such"):
        LoRA(r=4, target_modules=["gate"]).apply(named := nn.ModuleList([Block(), Block()]))
    assert named[0].gate.lora.A.shape == (4, 8)
    LoRA(r=4, target_modules=["gate"], rank_pattern={"gate": 1}).apply(nn.ModuleList([Block(), Block()]))
