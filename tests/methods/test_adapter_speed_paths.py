"""A bottleneck is added by autograd functions where it may be, and elsewhere by plain operations: equal ones."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForSequenceClassification

from lightning_peft import Adapter
from lightning_peft.graft import attach, grafts
from lightning_peft.updates.bottleneck import AroundNorm, Bottleneck, Parallel, ParallelResidual, Serial, _Down, _Up
from tests.contract import shake
from tests.methods.test_lora_speed_paths import assert_equal, run

D, M = 10, 3


class Tagged(Tensor):
    """A subclass of tensors, which all operations keep."""


class FeedForward(nn.Module):
    """``W tanh(V x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())


class Sublayer(nn.Module):
    """What a parallel adapter stands beside in BERT: ``LN(dense(h) + residual)``, here with h = residual."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(h) + residual)


class Twice(nn.Sequential):
    """Gives its one child the same input twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x, x)


HOSTS: dict[str, tuple[Callable[[], nn.Module], type[Bottleneck]]] = {
    "serial": (lambda: nn.Linear(D, D), Serial),
    "around a norm": (lambda: nn.LayerNorm(D), AroundNorm),
    "parallel": (FeedForward, Parallel),
    "parallel, by the residual": (Sublayer, ParallelResidual),
}


def tuned(name: str, activation: str = "gelu", scale: float = 1.5) -> nn.Module:
    """Return a frozen host with a graft that is past the start of training."""
    build, kind = HOSTS[name]
    host = build().requires_grad_(False)
    graft = attach(host, kind(host, D, M, activation, 0.5, False, scale), "adapter")
    for layer in (graft.down, graft.up):
        nn.init.normal_(layer.bias)
    return Twice(host) if name == "parallel, by the residual" else nn.Sequential(host)


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each sum that is asked for: whether the functions compute it."""
    answers: list[bool] = []
    ask = Bottleneck.is_lean

    def spy(self: Bottleneck, *args: Tensor) -> bool:
        answers.append(ask(self, *args))
        return answers[-1]

    monkeypatch.setattr(Bottleneck, "is_lean", spy)
    return answers


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """`run` by plain operations."""

    def run_plain(*args: object, **kwargs: object) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(Bottleneck, "is_lean", lambda *_: False)
            return run(*args, **kwargs)

    return run_plain


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 5, D), (2, 3, 5, D), (2, 0, D)])
@pytest.mark.parametrize(("activation", "scale"), [("gelu", 1.0), ("relu", 4.0), ("gelu_new", 0.5)])
def test_both_paths_are_equal(name, shape, activation, scale, lean, plain) -> None:
    model, x = tuned(name, activation, scale), torch.randn(shape)
    expected = plain(model, x)
    assert not lean
    assert_equal(run(model, x), expected)
    assert lean == [True]


@pytest.mark.parametrize("name", HOSTS)
def test_half_precision(name, lean, plain) -> None:
    """The parameters are cast at use, not x, and get their gradients in fp32."""
    model, x = tuned(name).bfloat16(), torch.randn(2, 5, D).bfloat16()
    found, expected = run(model, x), plain(model, x)
    assert lean == [True]
    assert {value.dtype for key, value in found.items() if "adapter" in key} == {torch.float32}
    assert_equal(found, expected, 2**-5)


def test_a_strided_input_and_a_strided_gradient(lean, plain) -> None:
    model, x = nn.Sequential(tuned("parallel"), nn.Softmax(1)), torch.randn(5, 2, D).transpose(0, 1)
    assert_equal(run(model, x), plain(model, x))
    outer = nn.Sequential(tuned("serial"), nn.Flatten(0, 1), nn.Unflatten(0, (2, 5)), nn.Softmax(1))
    assert_equal(run(outer, x), plain(outer, x))
    transposed, x = tuned("around a norm"), torch.randn(2, 5, D)
    base = torch.randn(D, 5, 2).permute(2, 1, 0)
    assert torch.allclose(transposed[0].adapter.added(base, x), base + transposed[0].adapter.update(x), atol=1e-6)
    assert lean == [True] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, lean, plain) -> None:
    model, x = tuned("serial"), torch.randn(2, 5, D)
    expected = plain(model, x)["out"]
    with mode():
        assert_equal({"out": model(x)}, {"out": expected})
    assert lean == [True]


@pytest.mark.parametrize("name", ["serial", "parallel"])
@pytest.mark.parametrize("asked", ["x", "down.weight", "down.bias", "up.weight", "up.bias"])
def test_only_the_asked_gradients_are_computed(name: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor alone has the gradient of plain operations, and the functions give no other."""
    given: list[bool] = []
    for function in (_Down, _Up):
        backward = function.backward

        def spy(*args: object, backward: Callable = backward) -> tuple[Tensor | None, ...]:
            given.extend(gradient is not None for gradient in backward(*args))
            return backward(*args)

        monkeypatch.setattr(function, "backward", staticmethod(spy))
    graft = tuned(name).requires_grad_(False)[0].adapter
    x = torch.randn(5, D)
    tensor = x if asked == "x" else graft.get_parameter(asked)
    tensor.requires_grad_(True)
    base = x if name == "serial" else torch.randn(5, D)
    found = torch.autograd.grad(graft.added(base, x).square().sum(), tensor)[0]
    expected = torch.autograd.grad((base + graft.update(x)).square().sum(), tensor)[0]
    assert_equal({asked: found}, {asked: expected})
    # Of h and of the one asked for; where x goes through, that of the base is handed on, which costs nothing.
    below = 2 + (name == "serial")
    assert sum(given) == {"x": below, "down.weight": below, "down.bias": below}.get(asked, 1)


def test_nothing_trained_needs_no_graph() -> None:
    assert not tuned("serial").requires_grad_(False)(torch.randn(5, D)).requires_grad


def test_what_else_is_trained_gets_its_gradient(lean, plain) -> None:
    """BitFit beside an adapter: the gradient goes on into the host."""
    for name in ("serial", "around a norm", "parallel"):
        model, x = tuned(name), torch.randn(2, 5, D)
        model[0].requires_grad_(True)
        assert_equal(run(model, x), plain(model, x))
    assert lean == [True] * 3


def test_the_output_may_be_changed_in_place(lean, plain) -> None:
    model = nn.Sequential(tuned("serial"), nn.ReLU(inplace=True), tuned("parallel"), nn.ReLU(inplace=True))
    x = torch.randn(2, 5, D)
    assert_equal(run(model, x), plain(model, x))
    assert lean == [True, True]


def test_checkpointing(lean, plain) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(tuned("serial"), nn.Tanh(), tuned("parallel")), torch.randn(2, 5, D)
    expected = plain(nn.Sequential(*model), x)
    assert_equal(run(model, x), expected)
    assert lean == [True] * 4, "two hosts, run twice"


def test_nothing_is_kept_but_the_input_and_the_bottleneck() -> None:
    model, x = tuned("serial"), torch.randn(2, 5, D, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    for tensor in (x, *model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sorted(kept.values()) == [4 * M * 10, 4 * M * 10, 4 * D * 10]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("serial", [True, False])
def test_first_and_second_derivatives(check, serial: bool) -> None:
    def add(x: Tensor, base: Tensor, d: Tensor, b1: Tensor, u: Tensor, b2: Tensor) -> Tensor:
        """They are run twice, so that their input depends on their parameters."""
        for _ in range(2):
            hidden, through = _Down.apply(x, d, b1)
            x = _Up.apply(through if serial else base, F.gelu(hidden), u, b2, 0.5)
        return x + base

    shapes = [(2, 3, 4), (2, 3, 4), (2, 4), (2,), (4, 2), (4,)]
    assert check(add, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes])


def test_a_block_that_runs_twice(lean, plain) -> None:
    """ALBERT runs one block for all layers; its gradients are sums over the runs."""
    config = AlbertConfig(
        vocab_size=50, hidden_size=D, embedding_size=D, intermediate_size=20, num_attention_heads=2, num_hidden_layers=3
    )
    model = AlbertForSequenceClassification(config).eval()
    Adapter(bottleneck=M, target_modules=["ffn_output"]).apply(model)
    shake(model)
    assert len(list(grafts(model))) == 1

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(inputs_embeds=x).logits

    words, x = Words(), torch.randn(2, 4, D)
    assert_equal(run(words, x), plain(words, x))
    assert lean == [True] * 3


@pytest.mark.parametrize("name", HOSTS)
def test_compiled(name, lean, plain) -> None:
    model, x = tuned(name), torch.randn(2, 5, D)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {key.removeprefix("_orig_mod."): value for key, value in run(compiled, x).items()}
    assert_equal(found, plain(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_plain(dtype: torch.dtype, lean, plain) -> None:
    model, x = tuned("serial"), torch.randn(2, 5, D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(model, x), plain(model, x)
    assert lean == [False]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_subclasses_are_plain(lean) -> None:
    model = tuned("serial")
    out = model[0].adapter.after(Tagged(torch.randn(5, D)), model[0])
    assert type(out) is Tagged
    model[0].adapter.down.weight = nn.Parameter(Tagged(model[0].adapter.down.weight.detach()))
    assert type(model(torch.randn(5, D))) is Tagged
    assert lean == [False, False]


def test_an_activation_that_is_trained_itself(lean, plain) -> None:
    model, x = tuned("serial", "prelu"), torch.randn(5, D)
    found = run(model, x)
    assert found["0.adapter.activation.weight"].any()
    assert_equal(found, plain(model, x))
    assert lean == [True]


def test_gradients_per_sample(lean) -> None:
    model, x = tuned("serial"), torch.randn(3, 5, D)
    state = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, sample).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    assert lean == [False]
    for i, sample in enumerate(x):
        trained = {name: p for name, p in state.items() if p.requires_grad}
        alone = torch.autograd.grad(loss(state, sample), list(trained.values()))
        assert_equal({n: together[n][i] for n in trained}, dict(zip(trained, alone, strict=True)), 1e-5)


def test_distributed_tensors_are_plain(lean, plain) -> None:
    model, x = tuned("serial"), torch.randn(2, 5, D)
    expected = plain(model, x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = run(distribute_module(model, mesh), distribute_tensor(x, mesh))
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert lean == [False]
    assert_equal(whole, expected)
