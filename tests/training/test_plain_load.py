"""A plain class's own ``load_from_checkpoint`` refuses a delta by naming ours, whatever ``strict`` says."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, TuningError, load_from_checkpoint
from tests.modules import Tuned, loader, trainer


class Overrides(Tuned):
    """Has its own hook, which calls no other."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = sorted(checkpoint)


class AppliesItself(Tuned):
    """Is tuned when it is built, and keeps what it has where a file lacks it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strict_loading = False
        LoRA(r=2).apply(self.model)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save = ModelCheckpoint(folder, filename="delta", every_n_train_steps=1, save_on_train_epoch_end=False)
    trainer(folder, LoRA(r=2), save, max_steps=1).fit(Tuned("bert"), loader("bert"), loader("bert"))
    return folder / "delta.ckpt"


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("kind", [Tuned, Overrides])
def test_a_delta_is_refused_and_the_remedy_works(delta: Path, kind: type[Tuned], strict: bool | None) -> None:
    before = {name: vars(kind).get(name) for name in ("on_load_checkpoint", "load_from_checkpoint")}
    words = (
        rf"is a delta, .* {kind.__name__} .*: load it by lightning_peft\.load_from_checkpoint\({kind.__name__}, path"
    )
    with pytest.raises(TuningError, match=words):
        kind.load_from_checkpoint(delta, strict=strict)
    assert {name: vars(kind).get(name) for name in before} == before
    loaded = load_from_checkpoint(kind, delta, strict=strict)
    saved = torch.load(delta, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
def test_a_module_that_is_tuned_when_it_is_built_loads_as_before(delta: Path) -> None:
    name = "model.bert.encoder.layer.0.attention.self.query.lora.A"
    saved = torch.load(delta, weights_only=True)["state_dict"]
    assert torch.equal(AppliesItself.load_from_checkpoint(delta).state_dict()[name], saved[name])


def test_a_full_checkpoint_loads_as_before(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="full", every_n_train_steps=1, save_on_train_epoch_end=False)
    module = Overrides("bert")
    trainer(tmp_path, save, max_steps=1).fit(module, loader("bert"), loader("bert"))
    loaded = Overrides.load_from_checkpoint(tmp_path / "full.ckpt")
    assert "state_dict" in loaded.seen
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in loaded.state_dict().items())
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        loaded.load_from_checkpoint(tmp_path / "full.ckpt")
    assert L.LightningModule.load_from_checkpoint.__name__ == "load_from_checkpoint"
