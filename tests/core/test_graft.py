"""The graft: a named child of its host, joined to it by hooks, and nothing else of the host changed."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Graft, TuningError, attach, collect, detach, merge
from lightning_peft.core.graft import grafts
from lightning_peft.core.private_torch import is_compiled


class Shift(Graft):
    """Adds a trained vector to the input of its host."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(size))

    def before(self, host: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x + self.by


class Scale(Graft):
    """Multiplies the output of its host, which may be a tuple."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((size,), 2.0))

    def after(self, out: Tensor, host: nn.Module, *args: object, **kwargs: object) -> Tensor:
        return (out[0] * self.by, *out[1:]) if isinstance(out, tuple) else out * self.by


class Both(Shift, Scale):
    def __init__(self) -> None:
        Graft.__init__(self)
        self.by = nn.Parameter(torch.full((3,), 2.0))


class Block(nn.Module):
    """Has arguments of every kind and returns a tuple."""

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, *, twice: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return (2 * hidden if twice else hidden), mask


def test_the_host_stays_what_it_is() -> None:
    host = nn.Linear(3, 3)
    keys, kind, forward = list(host.state_dict()), type(host), host.forward
    attach(host, Shift(), "shift")
    assert list(host.state_dict()) == [*keys, "shift.by"]
    assert type(host) is kind
    assert host.forward == forward
    host.load_state_dict(
        {name: torch.zeros_like(t) for name, t in host.state_dict().items() if name in keys}, strict=False
    )
    assert not host.weight.any()


def test_before_sees_the_input_and_after_the_output() -> None:
    host, x = nn.Linear(3, 3), torch.randn(2, 3)
    plain = host(x)
    attach(host, Scale(), "scale")
    assert torch.equal(host(x), 2 * plain)
    attach(host, Shift(), "shift")
    assert torch.equal(host(x - 1), 2 * host.forward(x - 1 + 1))


def test_both_joints_of_one_graft() -> None:
    host, x = nn.Identity(), torch.randn(2, 3)
    attach(host, Both(), "both")
    assert torch.equal(host(x), 2 * (x + 2))


@pytest.mark.parametrize("by_name", [True, False])
def test_the_other_arguments_pass_through(by_name: bool) -> None:
    host, x, mask = Block(), torch.randn(2, 3), torch.ones(2)
    attach(host, Shift(), "shift")
    attach(host, Scale(), "scale")
    out, given = host(hidden=x, mask=mask, twice=True) if by_name else host(x, mask, twice=True)
    assert torch.equal(out, 2 * (2 * (x + 1)))
    assert given is mask


def test_joints_are_told_the_host_and_its_arguments() -> None:
    seen = []

    class Looking(Graft):
        def before(self, host: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            seen.append((host, x, args, kwargs))
            return x

        def after(self, out: object, host: nn.Module, *args: object, **kwargs: object) -> object:
            seen.append((host, *args, kwargs))
            return out

    host, x, mask = Block(), torch.randn(2, 3), torch.ones(2)
    attach(host, Looking(), "looking")
    host(x, mask, twice=True)
    host(hidden=x, mask=mask)
    assert seen[0] == (host, x, (mask,), {"twice": True})
    assert seen[1] == (host, x, mask, {"twice": True})
    assert seen[2] == (host, x, (), {"mask": mask})
    assert seen[3] == (host, x, {"mask": mask})


def test_the_graft_computes_through_its_own_call() -> None:
    """A sharding wrapper gathers the parameters of a unit in hooks on that unit."""
    host = nn.Linear(3, 3)
    graft = attach(host, Both(), "both")
    calls = []
    graft.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    host(torch.randn(2, 3))
    assert calls == ["before", "after"]


def test_detach_restores_the_host() -> None:
    host, x = nn.Linear(3, 3), torch.randn(2, 3)
    before, attributes = host(x), sorted(vars(host))
    attach(host, Both(), "both")
    assert not torch.equal(host(x), before)
    detach(host, "both")
    assert torch.equal(host(x), before)
    assert sorted(vars(host)) == attributes
    assert not host._forward_hooks
    assert not host._forward_pre_hooks
    assert not list(host.children())


def test_a_detached_graft_can_be_attached_again() -> None:
    one, other, x = nn.Identity(), nn.Identity(), torch.randn(2, 3)
    graft = attach(one, Shift(), "shift")
    detach(one, "shift")
    attach(other, graft, "shift")
    assert torch.equal(one(x), x)
    assert torch.equal(other(x), x + 1)


def test_a_taken_name_is_refused() -> None:
    host = nn.Linear(3, 3)
    attach(host, Shift(), "shift")
    for name in ("shift", "weight", "forward"):
        with pytest.raises(TuningError, match=f"already has an attribute '{name}'"):
            attach(host, Shift(), name)


@pytest.mark.parametrize("name", ["weight", "nothing"])
def test_only_grafts_are_detached(name: str) -> None:
    host = nn.Linear(3, 3)
    with pytest.raises(TuningError, match=f"'{name}' of Linear is no graft"):
        detach(host, name)
    assert host.weight is not None


def test_a_compiled_host_is_refused() -> None:
    inside = nn.Linear(3, 3)
    inside.compile(backend="eager")
    for host in (torch.compile(nn.Linear(3, 3), backend="eager"), inside):
        assert is_compiled(host)
        with pytest.raises(TuningError, match="is compiled and would ignore grafts"):
            attach(host, Shift(), "shift")
    assert not is_compiled(nn.Linear(3, 3))


def test_a_copy_calls_its_own_graft() -> None:
    host, x = nn.Linear(3, 3), torch.randn(2, 3)
    attach(host, Both(), "both")
    before = host(x)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(other(x), before)
        other.both.by.data.mul_(3)
        assert torch.equal(host(x), before)
        assert not torch.equal(other(x), before)
        detach(other, "both")
        assert torch.equal(other(x), other.forward(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_graft_keeps_its_dtype(cast: str) -> None:
    host = nn.Sequential(nn.Linear(3, 3))
    graft = attach(host[0], Shift(), "shift")
    value = torch.tensor([0.1, 0.2, 0.3])
    graft.by.data.copy_(value)
    getattr(host, cast)()
    host.to(torch.float16)
    assert host[0].weight.dtype == torch.float16
    assert graft.by.dtype == torch.float32
    assert torch.equal(graft.by, value)


def test_a_graft_moves_with_its_host() -> None:
    host = nn.Sequential(nn.Linear(3, 3))
    graft = attach(host[0], Shift(), "shift")
    host.to("meta", torch.bfloat16)
    assert graft.by.is_meta
    assert graft.by.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_a_graft_is_in_the_mode_of_its_host(training: bool) -> None:
    host = nn.Linear(3, 3).train(training)
    graft = attach(host, Shift(), "shift")
    assert graft.training is training
    host.train(not training)
    assert graft.training is not training


def test_grafts_are_found_with_their_places() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    attach(model[0], Shift(), "shift")
    attach(model[1][0], Shift(), "shift")
    attach(model, Scale(), "scale")
    assert [(place.path, place.name) for place in grafts(model)] == [("", "scale"), ("0", "shift"), ("1.0", "shift")]
    assert all(place.host is model.get_submodule(place.path) for place in grafts(model))


def test_gradients_reach_the_graft_and_the_input() -> None:
    host, x = nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3, requires_grad=True)
    graft = attach(host, Both(), "both")
    host(x).sum().backward()
    assert graft.by.grad is not None
    assert x.grad is not None
    assert host.weight.grad is None


def test_compile_sees_the_graft() -> None:
    host, x = nn.Linear(3, 3), torch.randn(2, 3)
    attach(host, Both(), "both")
    torch._dynamo.reset()
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), host(x))
    host.both.by.data.mul_(2)
    assert torch.equal(compiled(x), host(x))


def test_a_graft_knows_whether_another_hook_comes_before_it() -> None:
    host = nn.Linear(2, 2)
    first = attach(host, _Plus(), "first")
    second = attach(host, _Plus(), "second")
    assert first.is_first(host)
    assert not second.is_first(host)


def test_a_first_argument_by_keyword() -> None:
    host = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = host(x)
    attach(host, _Plus(), "plus")
    assert torch.equal(host(input=x), plain + 1)


class _Plus(Graft):
    def after(self, out: Any, host: nn.Module, x: Any) -> Any:
        return out + 1


class Borrowing(Graft):
    """Adds what a layer of elsewhere in the model gives; has one buffer to keep and one that can be computed anew."""

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.refer(layer=layer)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("index", torch.arange(3), persistent=False)

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        return out + self.layer(x)


def test_a_module_of_elsewhere_is_kept_and_is_no_child() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    names = list(model.state_dict())
    graft = attach(model[1], Borrowing(model[0]), "borrowing")
    assert graft.layer is model[0]
    assert [*graft.children(), *graft.parameters()] == []
    assert list(model.state_dict()) == [*names, "1.borrowing.seen"]
    x = torch.ones(1, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].borrowing.layer is other[0]
        assert torch.equal(other(x), model(x))
        with torch.no_grad():
            other[0].weight.add_(1)
        assert not torch.equal(other(x), model(x))
    graft.layer = None
    assert graft.layer is None


def test_the_persistent_buffers_of_a_graft_belong_to_the_delta() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    attach(model[1], Borrowing(model[0]), "borrowing")
    assert list(collect(model)) == ["1.borrowing.seen"]


def test_what_a_graft_does_not_declare_is_refused() -> None:
    """Neither folding nor splitting is guessed from what a graft happens to have."""
    model = nn.Sequential(nn.Linear(3, 3))
    graft = attach(model[0], Borrowing(model[0]), "borrowing")
    assert (graft.merged, graft.listens_only, dict(graft.splits)) == (False, False, {})
    with pytest.raises(TuningError, match="Borrowing at 0 computes what no weight can"):
        merge(model)
