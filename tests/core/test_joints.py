"""The joints `weight` and `around`: what a host reads as its parameter, and what runs in place of its forward pass."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import DiffPruning, Graft, attach, detach, merge
from tests.contract import shake
from tests.models import batch, tiny


class Doubled(Graft):
    """Multiplies parameters of its host by a trained number."""

    def __init__(self, *weights: str) -> None:
        super().__init__()
        self.weights = weights
        self.by = nn.Parameter(torch.full((1,), 2.0))

    def weight(self, w: Tensor, name: str) -> Tensor:
        return w * self.by


class Louder(Graft):
    """Multiplies what the forward pass of its host gives, or leaves the pass out."""

    def __init__(self, by: float, skip: bool = False) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((1,), by))
        self.skip = skip

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0] if self.skip else forward(*args, **kwargs)) * self.by


class Shifted(Louder):
    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) + self.by


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_a_weight_is_read_through_its_grafts_and_keeps_its_name() -> None:
    host, bare = linear(), linear()
    attach(host, Doubled("weight"), "one")
    attach(host, Doubled("weight", "bias"), "two")
    assert torch.allclose(host(X), 4 * X @ bare.weight.t() + 2 * bare.bias)
    assert "weight" not in vars(host)
    assert list(host.state_dict()) == ["weight", "bias", "one.by", "two.by"]
    assert isinstance(host.weight, nn.Parameter)
    detach(host, "one")
    assert torch.allclose(host(X), 2 * bare(X))
    detach(host, "two")
    assert torch.equal(host(X), bare(X))
    assert sorted(vars(host)) == sorted(vars(bare))


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_read_without_a_call(training: bool) -> None:
    torch.manual_seed(0)
    host = nn.MultiheadAttention(4, 2, batch_first=True).train(training)
    x = torch.randn(2, 5, 4)
    expected = copy.deepcopy(host)
    expected.in_proj_weight.data *= 2
    expected.out_proj.weight.data *= 2
    attach(host, Doubled("in_proj_weight", "out_proj.weight"), "doubled")
    host.requires_grad_(False).doubled.requires_grad_(True)
    out = host(x, x, x)[0]
    assert torch.allclose(out, expected(x, x, x)[0], atol=1e-6)
    out.sum().backward()
    assert host.doubled.by.grad is not None
    with torch.no_grad():
        assert torch.allclose(host(x, x, x)[0], out, atol=1e-6)


def test_after_an_error_the_host_reads_its_own_weight() -> None:
    host = linear()
    attach(host, Doubled("weight"), "doubled")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        host(torch.ones(2, 5))
    assert "weight" not in vars(host)


def test_around_stands_in_place_of_the_forward_pass_the_latest_outermost() -> None:
    host, bare = linear(), linear()
    signature = list(inspect.signature(host.forward).parameters)
    attach(host, Louder(2.0), "louder")
    attach(host, Shifted(1.0), "shifted")
    assert torch.allclose(host(X), 2 * bare(X) + 1)
    assert list(inspect.signature(host.forward).parameters) == signature
    detach(host, "louder")
    assert torch.allclose(host(X), bare(X) + 1)
    detach(host, "shifted")
    assert torch.equal(host(X), bare(X))
    assert sorted(vars(host)) == sorted(vars(bare))


def test_a_forward_pass_can_be_left_out() -> None:
    host = linear()
    attach(host, Louder(3.0, skip=True), "skipped")
    assert torch.equal(host(X), 3 * X)


def test_around_keeps_a_forward_that_someone_has_set() -> None:
    host = linear()
    host.forward = lambda x: 10 * x
    attach(host, Louder(2.0), "louder")
    assert torch.equal(host(X), 20 * X)
    detach(host, "louder")
    assert torch.equal(host(X), 10 * X)


@pytest.mark.parametrize("graft", [Doubled("weight"), Louder(2.0)], ids=lambda g: type(g).__name__)
def test_a_copy_calls_its_own_graft(graft: Graft) -> None:
    host = linear()
    attach(host, copy.deepcopy(graft), "graft")
    before = host(X)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(other(X), before)
        other.graft.by.data += 1
        assert not torch.equal(other(X), before)
        assert torch.equal(host(X), before)


@pytest.mark.parametrize("graft", [Doubled("weight"), Louder(2.0)], ids=lambda g: type(g).__name__)
def test_compiled_and_checkpointed_give_the_same_gradients(graft: Graft) -> None:
    model = tiny("bert").requires_grad_(False)
    host = model.bert.encoder.layer[1].intermediate.dense
    attach(host, copy.deepcopy(graft), "graft")

    def gradient(run: Callable[..., Any]) -> Tensor:
        model.zero_grad()
        run(**batch("bert")).loss.backward()
        return host.graft.by.grad.clone()

    plain = gradient(model)
    assert torch.equal(gradient(lambda **b: checkpoint(model, use_reentrant=False, **b)), plain)
    assert "weight" not in vars(host)
    torch._dynamo.reset()
    assert torch.allclose(gradient(torch.compile(model, fullgraph=True, backend="aot_eager")), plain, atol=1e-6)


def test_hidden_states_are_noted_as_grafts_leave_them_though_the_model_was_run_before() -> None:
    """From a first run on, transformers notes the output of each block by a hook of its own."""
    noted = []
    for run_before in (False, True):
        model, inputs = tiny("llama").eval(), batch("llama")
        if run_before:
            model(**inputs, output_hidden_states=True)
        block = next(block for name, block in model.named_modules() if name.endswith("layers.0"))
        attach(block, Moved(), "moved")
        noted.append(model(**inputs, output_hidden_states=True).hidden_states)
    assert all(torch.equal(one, other) for one, other in zip(*noted, strict=True))


class Moved(Graft):
    """Adds one to the output of its host."""

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1


class Tables(nn.Module):
    """Has no call of its own: its parent asks it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale + self.moved()

    def moved(self) -> Tensor:
        return self.shift


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables, self.last = Tables(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tables.scaled(x))


def test_parameters_that_a_parent_reads_by_a_method_are_changed_where_they_are_read() -> None:
    model, x = Asking().eval(), torch.ones(2, 3)
    method = DiffPruning()
    method.apply(model)
    shake(model, 0.5)
    live = model(x)
    live.sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert torch.allclose(merge(model)(x), live, atol=1e-6)
