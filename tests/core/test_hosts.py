"""Backbones of other kinds: programs, lazy modules, graphs of torch.fx, and complex weights."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, OFT, BitFit, HiRA, LoRA, Method, MiSS, SHiRA, TuningError, merge, muted
from tests.contract import shake

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(8, 8, dtype=torch.cfloat)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x.to(torch.cfloat)).real)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules="all-linear"), BitFit()])
def test_a_program_is_refused_and_the_module_it_was_made_of_is_not(method: Method) -> None:
    module = plain()
    for program in (torch.jit.script(module), torch.jit.trace(module, X)):
        with pytest.raises(TuningError, match="is TorchScript and takes no graft: tune the module that it was made of"):
            method.apply(program)
    method.apply(module)
    shake(module)
    out = module(X)
    torch.testing.assert_close(torch.jit.script(merge(module))(X), out)


def test_a_lazy_module_is_called_first() -> None:
    module = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TuningError, match=r"0\.weight of Sequential is lazy and has no shape yet: call the model once"):
        LoRA(r=2, target_modules="all-linear").apply(module)
    module(X)
    LoRA(r=2, target_modules="all-linear").apply(module)
    assert module[0].lora.A.shape == (2, 8)


def test_a_graph_of_fx_is_tuned_as_its_module_is() -> None:
    found = []
    for module in (plain(), torch.fx.symbolic_trace(plain())):
        torch.manual_seed(1)
        LoRA(r=2, target_modules=["0"]).apply(module)
        shake(module)
        found.append(module(X))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), LoRA(r=2, use_dora=True), IA3(), MiSS(r=2), HiRA(r=2), OFT(block_size=2), SHiRA(r=1)],
    ids=repr,
)
def test_a_complex_layer_has_no_real_update(method: Method) -> None:
    """It is no quantised one, either."""
    method.target_modules = ["mix"]
    with pytest.raises(TuningError, match="mix is complex, and updates of layers are real: leave it out with exclude="):
        method.apply(Complex())
    module = Complex()
    type(method)(**{**method.init_args(), "target_modules": ["mix", "out"], "exclude": "mix"}).apply(module)
    module(X).sum().backward()


def test_complex_weights_are_trained_in_place() -> None:
    module, bare = Complex(), Complex()(X)
    BitFit().apply(module)
    assert torch.equal(module(X), bare)
    shake(module)
    out = module(X)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    with muted(module):
        assert not torch.equal(module(X), out)
    torch.testing.assert_close(merge(module)(X), out)
