"""Precision plugins that put other layers in the place of a backbone's: before grafts join it, or these would be lost.

Lightning takes `BitsandbytesPrecision` on CUDA alone. bitsandbytes itself computes on a CPU, so the plugin is given to
a Trainer that has been built without it. Files are not read back: what it loads, Lightning quantises on CUDA alone.
"""

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision

from lightning_peft import BitFit, FullFineTuning, LoRA, Method, TuningError, collect, load_delta
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.quantized import is_quantized
from tests.contract import assert_same
from tests.modules import Tuned, loader, trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Late(L.LightningModule):
    """Builds its model in configure_model."""

    training_step, configure_optimizers = Tuned.training_step, Tuned.configure_optimizers

    def __init__(self) -> None:
        super().__init__()
        self.hparams.update(optimizer="Adam", lr=1e-2)

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = Tuned("bert").model


def fitted(folder: Path, module: L.LightningModule, method: Method, mode: Any, **options: Any) -> L.Trainer:
    plugin = BitsandbytesPrecision(mode, dtype=torch.float16 if mode == "int8" else torch.float32, **options)
    fit = trainer(folder, method, max_epochs=2)
    fit.strategy._precision_plugin = plugin  # no public way round the connector's refusal of a CPU
    fit.fit(module, loader("bert"))
    return fit


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "fp4-dq", "int8"])
def test_grafts_are_on_the_layers_that_compute(mode: str, late: bool, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    module = Late() if late else Tuned("bert")
    fit = fitted(tmp_path, module, LoRA(r=2), mode)
    query = module.model.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert is_quantized(query.weight)
    assert type(module.model.classifier) is torch.nn.Linear
    delta = dict(collect(module))
    assert len(delta) == 2 * 2 * 2 + 2
    assert all(tensor.dtype is torch.float32 for tensor in delta.values())
    ups = [tensor for name, tensor in delta.items() if name.endswith("lora.B")]
    assert len(ups) == 4
    assert all(tensor.abs().max() > 0 for tensor in ups)
    assert not any(p.requires_grad for name, p in module.named_parameters() if name not in delta)
    fit.save_checkpoint(tmp_path / "delta.ckpt")
    assert set(read_delta(tmp_path / "delta.ckpt")[0]) == set(delta)
    plain = Tuned("bert")
    LoRA(r=2).apply(plain)
    load_delta(plain, tmp_path / "delta.ckpt")  # it is the delta of the backbone as it was before
    assert_same(delta, dict(collect(plain)))


def test_biases_are_no_weights(tmp_path: Path) -> None:
    module = Tuned("bert")
    before = module.model.bert.encoder.layer[0].attention.self.query.bias.clone()
    fitted(tmp_path, module, BitFit(), "nf4")
    assert not torch.equal(before, module.model.bert.encoder.layer[0].attention.self.query.bias)


def test_what_is_stored_in_few_bits_cannot_be_trained(tmp_path: Path) -> None:
    words = r"query.weight would be trained, but BitsandbytesPrecision stores it in few bits: name .*query in its"
    with pytest.raises(TuningError, match=words):
        fitted(tmp_path, Tuned("bert"), FullFineTuning(), "nf4")
    method = LoRA(r=2, target_modules=["value"], also_train=r".*0\.attention\.self\.query\.weight")
    with pytest.raises(TuningError, match=words):
        fitted(tmp_path, Tuned("bert"), method, "nf4")
    module = Tuned("bert")
    fitted(tmp_path, module, method, "nf4", ignore_modules={"model.bert.encoder.layer.0.attention.self.query"})
    assert module.model.bert.encoder.layer[0].attention.self.query.weight.requires_grad


class StandIn(torch.nn.Module):
    """Has the form of a layer of TransformerEngine, which needs a GPU: no nn.Linear, and trained when it is made."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = torch.nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TransformerEnginePrecision:
    """The plugin of Lightning with a stand-in for the library: what is tested is who comes first."""
    library, common, recipe, layers = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".common", ".common.recipe", ".pytorch")
    )
    StandIn.__module__ = layers.__name__
    norm = type("Norm", (torch.nn.LayerNorm,), {"__module__": layers.__name__})
    recipe.DelayedScaling = object
    layers.Linear, layers.LayerNorm = StandIn, norm
    layers.fp8_autocast = lambda **_: contextlib.nullcontext()
    library.common, library.pytorch, common.recipe = common, layers, recipe
    for module in (library, common, recipe, layers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("lightning.fabric.plugins.precision.transformer_engine._TRANSFORMER_ENGINE_AVAILABLE", True)
    return TransformerEnginePrecision(weights_dtype=torch.bfloat16)


def test_layers_of_transformer_engine_come_first(engine: TransformerEnginePrecision, tmp_path: Path) -> None:
    module, fit = Tuned("bert"), trainer(tmp_path, BitFit())
    fit.strategy._precision_plugin = engine
    fit.fit(module, loader("bert"))
    query = module.model.bert.encoder.layer[0].attention.self.query
    assert type(query) is StandIn
    assert (query.weight.requires_grad, query.weight.dtype) == (False, torch.bfloat16)
    assert (query.bias.requires_grad, query.bias.dtype) == (True, torch.float32)
    assert query.bias.abs().max() > 0
    fit = trainer(tmp_path, LoRA(r=2))
    fit.strategy._precision_plugin = engine
    with pytest.raises(TuningError, match=r"TransformerEnginePrecision has put layers .* give it replace_layers=False"):
        fit.fit(Tuned("bert"), loader("bert"))
