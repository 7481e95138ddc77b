"""LoRA on quantised layers: torchao's int8 weights, bitsandbytes' 4 and 8 bits, all of which run on a CPU.

The two libraries are an extra of their own, which `make test-slow` installs: transformers imports them wherever they
are, which takes seconds at each start.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, LoRA, TuningError, load_delta, merge, save_delta
from lightning_peft.core.quantized import dense, is_quantized
from tests.contract import assert_near, shake

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False)).eval()


def torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def bits(layer: Callable[..., nn.Module]) -> nn.Module:
    model = plain()
    for i in (0, 2):
        linear = model[i]
        model[i] = layer(linear.in_features, linear.out_features, bias=linear.bias is not None)
        model[i].load_state_dict(linear.state_dict())
        model[i].to("cpu")
    return model.eval()


def bnb4() -> nn.Module:
    import bitsandbytes as bnb

    return bits(lambda *a, **k: bnb.nn.Linear4bit(*a, compute_dtype=torch.float32, quant_type="nf4", **k))


def bnb8() -> nn.Module:
    import bitsandbytes as bnb

    return bits(lambda *a, **k: bnb.nn.Linear8bitLt(*a, has_fp16_weights=False, **k))


TOLERANCE = {torchao: 1e-5, bnb4: 0.02, bnb8: 0.02}
"""bitsandbytes computes 4 bits in bf16 where the CPU has instructions for it, and 8 bits with a quantised input."""
QUANTISED = pytest.mark.parametrize("build", [torchao, bnb4, bnb8])


def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


@QUANTISED
def test_the_dense_weight_is_the_one_that_it_computes_with(build) -> None:
    model = build()
    with torch.no_grad():
        for layer, source in ((model[0], plain()[0]), (model[2], plain()[2])):
            assert is_quantized(layer.weight)
            weight = dense(layer)
            assert weight.is_floating_point()
            assert weight.shape == source.weight.shape
            assert (weight.float() - source.weight).abs().max() < 0.2 * source.weight.abs().max()
            sample = torch.randn(3, layer.in_features)
            expected = nn.functional.linear(sample, weight.float(), layer.bias)
            assert_near({"": expected}, {"": layer(sample).float()}, TOLERANCE[build])
    assert not is_quantized(plain()[0].weight)
    assert dense(plain()[0]).dtype == torch.float32


@QUANTISED
@pytest.mark.parametrize("dora", [False, True])
def test_it_trains_beside_a_quantised_weight(build, dora: bool) -> None:
    model = build()
    with torch.no_grad():
        base = model(x())
    LoRA(r=4, alpha=8.0, target_modules=["0", "2"], use_dora=dora).apply(model)
    with torch.no_grad():
        assert_near({"": base}, {"": model(x())}, TOLERANCE[build])
    shake(model, 0.1)
    with torch.no_grad():
        h = x()
        for i in (0, 2):
            layer, graft = build()[i], model[i].lora
            out = layer(h)
            bias = 0 if layer.bias is None else layer.bias
            v = dense(layer).float() + graft.scale * graft.B @ graft.A
            ratio = graft.m / v.norm(dim=1) if dora else 1
            h = bias + ratio * (out - bias + graft.scale * h @ graft.A.t() @ graft.B.t())
            h = h.tanh() if i == 0 else h
        assert_near({"": h}, {"": model(x())}, TOLERANCE[build])
    target = torch.randn(5, 64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x()) - target).square().mean()
        loss.backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@QUANTISED
def test_merging_is_refused_or_done_in_float(build) -> None:
    model, method = build(), LoRA(r=4, target_modules=["0", "2"])
    method.apply(model)
    shake(model, 0.1)
    with torch.no_grad():
        live = model(x())
    before = {name: copy.deepcopy(p) for name, p in model.named_parameters()}
    for act in (merge, method.merge):
        with pytest.raises(TuningError, match=r"the weight of 0 is quantised .*dequantize=True"):
            act(model)
    with torch.no_grad():
        assert torch.equal(model(x()), live)
    assert list(before) == [name for name, _ in model.named_parameters()]
    merge(model, dequantize=True)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert list(model.state_dict()) == list(plain().state_dict())
    assert not is_quantized(model[0].weight)
    assert not model.training
    with torch.no_grad():
        assert_near({"": live}, {"": model(x())}, 2 * TOLERANCE[build])


@QUANTISED
def test_other_quantised_layers_stay_as_they_are(build) -> None:
    model = build()
    LoRA(r=4, target_modules=["0"]).apply(model)
    shake(model)
    merge(model, dequantize=True)
    assert not is_quantized(model[0].weight)
    assert is_quantized(model[2].weight)


@QUANTISED
def test_it_is_saved_loaded_and_removed(build, tmp_path) -> None:
    model, other, method = build(), build(), LoRA(r=4, target_modules=["0", "2"], use_dora=True)
    with torch.no_grad():
        base = model(x())
    method.apply(model)
    shake(model)
    save_delta(model, tmp_path / "delta.safetensors")
    LoRA(**method.init_args()).apply(other)
    load_delta(other, tmp_path / "delta.safetensors")
    with torch.no_grad():
        assert torch.equal(model(x()), other(x()))
        method.remove(model)
        assert torch.equal(model(x()), base)


@QUANTISED
def test_pissa_starts_from_the_dequantised_weight(build) -> None:
    model = build()
    with torch.no_grad():
        base = model(x())
        LoRA(r=4, init="pissa", target_modules=["0"]).apply(model)
        assert torch.equal(base, model(x()))


@QUANTISED
def test_ia3_scales_a_quantised_layer(build) -> None:
    model = build()
    IA3(target_modules=["0"], feedforward_modules=["2"]).apply(model)
    shake(model)
    with torch.no_grad():
        live = model(x())
        twin = build()
        expected = twin[2](model[2].ia3.l * (model[0].ia3.l * twin[0](x())).tanh())
        assert_near({"": expected}, {"": live}, 1e-5)
        with pytest.raises(TuningError, match="is quantised"):
            merge(model)
        merge(model, dequantize=True)
        assert_near({"": live}, {"": model(x())}, 2 * TOLERANCE[build])
