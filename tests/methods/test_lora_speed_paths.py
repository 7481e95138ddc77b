"""LoRA writes its update into the output of its host where it may, and elsewhere takes plain operations: equal ones."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA
from lightning_peft.core.graft import attach
from lightning_peft.updates import in_place
from lightning_peft.updates.in_place import _AddLowRank
from lightning_peft.updates.low_rank import LowRank

IN, OUT, R = 12, 10, 4
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}


class Linear(nn.Linear):
    """A linear layer whose own gradient needs its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Tagged(Tensor):
    """A subclass of tensors, which all operations keep."""


def tuned(host: nn.Module, dropout: float = 0.0) -> nn.Module:
    """Return the host, frozen, with a graft that is past the start of training."""
    host.requires_grad_(False)
    graft = attach(host, LowRank(host, R, 8.0, dropout, False), "lora")
    nn.init.normal_(graft.B)
    return host


def run(host: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return the output, and the gradients of x and of what is trained."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    parameters = {name: p for name, p in host.named_parameters() if p.requires_grad}
    out = host(x)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    weight = torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape)
    gradients = torch.autograd.grad((out * weight).sum(), [x, *parameters.values()])
    return {"out": out.detach(), **dict(zip(["x", *parameters], gradients, strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        scale = max(1.0, value.abs().max().item() if value.numel() else 1.0)
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the outputs that were written to."""
    shapes: list[tuple[int, ...]] = []
    add = in_place._add

    def spy(out: Tensor, *args: object) -> Tensor:
        shapes.append(tuple(out.shape))
        return add(out, *args)

    monkeypatch.setattr(in_place, "_add", spy)
    return shapes


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """`run` by plain operations."""

    def run_plain(*args: object, **kwargs: object) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(in_place, "is_free", lambda *_: False)
            return run(*args, **kwargs)

    return run_plain


@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (2, 3, 5, IN), (2, 0, IN)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_both_paths_are_equal(build, shape, dropout, written, plain) -> None:
    host, x = tuned(build(), dropout), torch.randn(shape)
    expected = plain(host, x)
    assert not written
    assert_equal(run(host, x), expected)
    assert written == [(*shape[:-1], OUT)]


@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
def test_half_precision(build, written, plain) -> None:
    """A and B are cast at use, not x, and get their gradients in fp32. In place the sum is rounded once, not twice."""
    host, x = tuned(build().bfloat16()), torch.randn(2, 5, IN).bfloat16()
    found, expected = run(host, x), plain(host, x)
    assert len(written) == 1
    assert {name: value.dtype for name, value in found.items()} == {
        "out": torch.bfloat16,
        "x": torch.bfloat16,
        "lora.A": torch.float32,
        "lora.B": torch.float32,
    }
    assert_equal(found, expected, 2**-7)


def test_a_strided_input_and_a_strided_gradient(written, plain) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(5, 2, IN).transpose(0, 1)
    model = nn.Sequential(host, nn.Flatten(0, 1), nn.Unflatten(0, (2, 5)), nn.Softmax(1))
    assert_equal(run(model, x), plain(model, x))
    assert len(written) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
def test_without_gradients(build, mode, written, plain) -> None:
    host, x = tuned(build()), torch.randn(2, 5, IN)
    expected = plain(host, x)["out"]
    with mode():
        assert_equal({"out": host(x)}, {"out": expected})
    assert len(written) == 1
    assert_equal(run(host, x), plain(host, x))


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_only_the_asked_gradients_are_computed(frozen: str) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(5, IN, requires_grad=True)
    tensors = {"x": x, "A": host.lora.A, "B": host.lora.B}
    tensors.pop(frozen).requires_grad_(False)
    out = host(x)
    assert _AddLowRank.backward(out.grad_fn, torch.ones_like(out))[1 + ["x", "A", "B"].index(frozen)] is None
    out.sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())


def test_nothing_trained_needs_no_graph() -> None:
    host = tuned(nn.Linear(IN, OUT)).requires_grad_(False)
    assert not host(torch.randn(5, IN)).requires_grad


def test_what_else_is_trained_gets_its_gradient(written, plain) -> None:
    """BitFit beside LoRA: the gradient goes on into the host."""
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(2, 5, IN)
    host.bias.requires_grad_(True)
    assert_equal(run(host, x), plain(host, x))
    assert run(host, x)["bias"].any()
    assert len(written) == 2


def test_the_output_may_be_changed_in_place(written, plain) -> None:
    model = nn.Sequential(tuned(nn.Linear(IN, IN)), nn.ReLU(inplace=True), tuned(nn.Linear(IN, OUT)))
    x = torch.randn(2, 5, IN)
    assert_equal(run(model, x), plain(model, x))
    assert len(written) == 2


def test_checkpointing(written, plain) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(tuned(nn.Linear(IN, IN), 0.5), nn.Tanh(), tuned(nn.Linear(IN, OUT))), torch.randn(2, 5, IN)
    expected = plain(nn.Sequential(*model), x)
    assert_equal(run(model, x), expected)
    assert len(written) == 4, "two hosts, run twice"


def test_nothing_is_kept_but_the_input_and_a_product_of_rank_r() -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(2, 5, IN, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        host(x)
    for tensor in (x, *host.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert list(kept.values()) == [4 * R * 10]


def test_whoever_saved_the_output_gets_an_error() -> None:
    """A global hook runs before a graft's; the square needs the output that it saw."""
    host, squares = tuned(nn.Linear(IN, OUT)), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: squares.append(out.square()) if module is host else None
    )
    try:
        out = host(torch.randn(2, 5, IN, requires_grad=True))
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + squares[0].sum()).backward()


def test_a_hook_that_came_first_keeps_what_it_saw(written) -> None:
    host, seen = nn.Linear(IN, OUT), []
    host.register_forward_hook(lambda module, args, out: seen.append(out))
    tuned(host)
    x = torch.randn(2, 5, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad((host(x) * 0 + seen[0].square()).sum(), x)
    base = F.linear(x, host.weight, host.bias)
    assert not written
    assert torch.equal(seen[0], base)
    assert_equal({"": gradient}, {"": torch.autograd.grad(base.square().sum(), x)[0]})


def test_a_hook_that_came_later_sees_the_sum(written) -> None:
    host, seen = tuned(nn.Linear(IN, OUT)), []
    host.register_forward_hook(lambda module, args, out: seen.append(out))
    out = host(torch.randn(2, 5, IN, requires_grad=True))
    assert seen[0] is out
    assert len(written) == 1


def test_a_layer_that_needs_its_output_has_its_gradient(written) -> None:
    host, x = tuned(Linear(IN, OUT)), torch.randn(2, 5, IN)
    patched = tuned(nn.Linear(IN, OUT))
    patched.load_state_dict(host.state_dict())
    patched.forward = lambda x: F.linear(x, patched.weight, patched.bias).relu()

    class Formula(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora = host.lora

        def forward(self, x: Tensor) -> Tensor:
            update = x @ self.lora.A.t() @ self.lora.B.t()
            return F.linear(x, host.weight, host.bias).relu() + self.lora.scale * update

    expected = run(Formula(), x)
    assert_equal(run(host, x), expected)
    assert_equal(run(patched, x), expected)
    assert not written


def test_a_copy_is_as_fast(written) -> None:
    host = deepcopy(tuned(nn.Linear(IN, OUT)))
    host(torch.randn(5, IN))
    assert len(written) == 1


def test_two_updates_of_one_layer(written, plain) -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT)), torch.randn(2, 5, IN)
    LoRA(r=R, target_modules=["0"]).apply(model)
    attach(model[0], LowRank(model[0], 2, 8.0, 0.0, False), "another")
    for name in ("lora", "another"):
        nn.init.normal_(getattr(model[0], name).B)
    assert_equal(run(model, x), plain(model, x))
    assert len(written) == 1


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_first_and_second_derivatives(check) -> None:
    def add(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _AddLowRank.apply(F.linear(x, w), x, a, b, 0.5)

    shapes = [(2, 3, 4), (5, 4), (2, 4), (5, 2)]
    assert check(add, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes])


def test_compiled(written, plain) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(2, 5, IN)
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, x).items()}
    assert_equal(found, plain(host, x))
    assert not written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_plain(dtype: torch.dtype, written, plain) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(2, 5, IN, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(host, x), plain(host, x)
    assert not written
    assert found["lora.A"].dtype == torch.float32
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("change", [lambda out: out.t().contiguous().t(), Tensor.bfloat16, Tagged])
def test_an_output_that_a_linear_layer_does_not_give_is_not_written_to(change, written) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(5, IN)
    base = change(F.linear(x, host.weight, host.bias))
    given = base.clone()
    out = host.lora.after(base, host, x)
    assert not written
    assert torch.equal(base, given)
    assert out.dtype == base.dtype
    assert type(out) is type(base)


def test_a_subclass_for_a_matrix_is_plain(written) -> None:
    host = tuned(nn.Linear(IN, OUT))
    host.lora.A = nn.Parameter(Tagged(host.lora.A.detach()))
    assert type(host(torch.randn(5, IN))) is Tagged
    assert not written


def test_gradients_per_sample(written) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(3, 5, IN)
    state = dict(host.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(host, parameters, sample).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    assert not written
    for i, sample in enumerate(x):
        alone = torch.autograd.grad(loss(state, sample), [host.lora.A, host.lora.B])
        assert_equal({"A": together["lora.A"][i], "B": together["lora.B"][i]}, {"A": alone[0], "B": alone[1]}, 1e-5)


def test_distributed_tensors_are_plain(written, plain) -> None:
    host, x = tuned(nn.Linear(IN, OUT)), torch.randn(2, 5, IN)
    expected = plain(host, x)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = run(distribute_module(host, mesh), distribute_tensor(x, mesh))
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert not written
    assert_equal(whole, expected)
