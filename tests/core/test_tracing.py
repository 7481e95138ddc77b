"""A tracer sees plain operations: what it makes of a tuned model computes what the model does, for other inputs too."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from lightning_peft import IA3, L2P, CoOp, DiffPruning, LinearProbe, LoRA, Method, PromptTuning, PTuning
from lightning_peft.core.tracing import is_traced
from tests.contract import shake
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # tracers and transformers warn of each other
CASES: dict[str, tuple[str, Method]] = {
    "LoRA": ("bert", LoRA(r=2)),
    "LoRA of Conv1D": ("gpt2", LoRA(r=2)),
    "DoRA": ("bert", LoRA(r=2, use_dora=True)),
    "PiSSA": ("bert", LoRA(r=2, init="pissa")),
    "IA3": ("gpt2", IA3()),
    "prompt before the text": ("llama", PromptTuning(num_virtual_tokens=2, init="random_uniform")),
    "prompt of an LSTM": ("bert", PTuning(num_virtual_tokens=2)),
    "packed prompts": ("clip", CoOp(num_virtual_tokens=2)),
    "kept queries": ("vit", L2P(cache_queries=True)),
}


class Plain(nn.Module):
    """Takes tensors by position and returns the logits, as tracers want it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def tuned(kind: str, method: Method, training: bool = False) -> tuple[Plain, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a model tuned at random, and two inputs for it, as the methods prepare them."""
    model = tiny(kind)
    method.apply(model)
    shake(model)
    first, other = (inputs(kind, method, seed) for seed in (1, 2))
    return Plain(model.train(training), list(first)), tuple(first.values()), tuple(other.values())


def inputs(kind: str, method: Method, seed: int) -> dict[str, Tensor]:
    columns = {name: t for name, t in batch(kind, size=2, padded=False, seed=seed).items() if name != "labels"}
    return dict(method.prepare(columns)) if "input_ids" in columns else columns


SLOW = ("LoRA of Conv1D", "PiSSA", "prompt before the text", "prompt of an LSTM")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_traced_model_is_the_model(case: str) -> None:
    model, first, other = tuned(*CASES[case])
    wanted = [model(*each) for each in (first, other)]
    traced = torch.jit.trace(model, first)  # traces twice, and compares the graphs
    for each, logits in zip((first, other), wanted, strict=True):
        torch.testing.assert_close(traced(*each), logits, rtol=1e-5, atol=1e-5)


def onnx_by_script(module: nn.Module, x: Tensor) -> None:
    """Trace for ONNX by TorchScript; what is traced is written by the package onnx, which need not be there."""
    with contextlib.suppress(OnnxExporterError):
        torch.onnx.export(module, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize(
    "trace",
    [
        lambda module, x: torch.jit.trace(module, x, check_trace=False),
        lambda module, x: torch.export.export(module, (x,), strict=False),  # so does torch.onnx.export(dynamo=True)
        onnx_by_script,
    ],
    ids=["jit", "export", "onnx"],
)
def test_a_tracer_is_seen(trace: Callable[[nn.Module, Tensor], object]) -> None:
    seen = []

    class Line(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_traced())
            return super().forward(x)

    trace(Line(2, 2), torch.ones(1, 2))
    assert set(seen) == {True}
    assert not is_traced()


@pytest.mark.parametrize(
    "case",
    ["LoRA of Conv1D", pytest.param("DoRA", marks=pytest.mark.slow), pytest.param("IA3", marks=pytest.mark.slow)],
)
def test_an_exported_model_is_the_model(case: str) -> None:
    model, first, other = tuned(*CASES[case])
    program = torch.export.export(model, first)
    called = " ".join(str(node.target) for node in program.graph.nodes)
    assert not any(f"aten.{name}_." in called for name in ("addmm", "add", "mul", "copy"))
    exported = program.module()
    for each in (first, other):
        torch.testing.assert_close(exported(*each), model(*each), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_noise_is_drawn_anew_in_a_traced_model() -> None:
    model, first, _ = tuned("bert", DiffPruning(), training=True)
    traced = torch.jit.trace(model, first, check_trace=False)
    once, again = traced(*first), traced(*first)
    assert not torch.equal(once, again)


def test_cached_features_are_no_constants_of_a_graph(tmp_path: Path) -> None:
    """A probe whose features are all cached is traced with its frozen part."""

    class Traces(Tuned):
        difference = 1.0

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                return
            self.eval()
            given = {name: column[None] for name, column in loader("vit").dataset[0].items() if name != "labels"}
            model = Plain(self.model, list(given))
            with torch.no_grad():
                traced = torch.jit.trace(model, tuple(given.values()))
                pixels = torch.randn(1, 3, 16, 16)
                self.difference = float((traced(pixels) - model(pixels)).abs().max())
            self.train()

    module = Traces("vit")
    run = trainer(tmp_path, LinearProbe(cache_features=True), max_epochs=2, limit_val_batches=0)
    run.fit(module, loader("vit"))
    assert module.difference < 1e-5


def test_a_graph_is_logged_beside_a_method(tmp_path: Path) -> None:
    class Shown(Tuned):
        example_input_array = batch("bert", padded=False)["input_ids"]

        def forward(self, ids: Tensor) -> Any:
            return self.model(ids).logits

    logger = TensorBoardLogger(tmp_path, log_graph=True)
    run = trainer(tmp_path, LoRA(r=2, backbone_mode="eval"), logger=logger, limit_val_batches=0)
    run.fit(Shown(), loader("bert"))
    assert run.global_step == 3
    assert any(file.stat().st_size > 10_000 for file in tmp_path.rglob("events.*"))
