"""Beside Lightning's own callbacks and loaders a method loses nothing, and refuses what it cannot go along with."""

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint, ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import BitFit, FullFineTuning, LoRA, Method, TuningError, load_from_checkpoint
from lightning_peft.core.delta_file import read_checkpoint
from lightning_peft.training.loaders import ResumableLoader
from tests.contract import assert_same
from tests.modules import trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(BoringModel):
    """A backbone, and a head of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 8), 4)


def lora() -> LoRA:
    return LoRA(r=1, backbone="backbone", target_modules="0")


def bias() -> BitFit:
    return BitFit(backbone="backbone")


def fit(folder: Path, *callbacks: L.Callback, module: Net | None = None, epochs: int = 2) -> tuple[Net, Path]:
    """Return the module after a fit, and its last checkpoint."""
    module = module or Net()
    last = ModelCheckpoint(folder, save_top_k=-1)
    trainer(folder, *callbacks, last, max_epochs=epochs, limit_val_batches=0).fit(module)
    return module, Path(last.best_model_path)


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_unfreezes_the_backbone_is_refused_in_setup(first: bool, tmp_path: Path) -> None:
    later = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    callbacks = (lora(), later) if first else (later, lora())
    with pytest.raises(TuningError, match=r"BackboneFinetuning trains backbone\.\S+, which is frozen and in no delta"):
        fit(tmp_path, *callbacks)
    for number, remedy in enumerate([(lora(),), (FullFineTuning(backbone="backbone"), later)]):
        module, file = fit(tmp_path / str(number), *remedy)
        again = load_from_checkpoint(Net, file)
        assert_same(module.state_dict(), again.state_dict())


class Unfreezes(BaseFinetuning):
    """Freezes some parameters until the second epoch."""

    def __init__(self, ending: str, freeze: bool = True) -> None:
        super().__init__()
        self.ending, self.freezes = ending, freeze

    def _chosen(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if name.endswith(self.ending)]

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        for parameter in self._chosen(pl_module) if self.freezes else ():
            parameter.requires_grad_(False)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            parameters = self._chosen(pl_module)
            for parameter in parameters:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": parameters, "lr": 0.05})


def test_a_callback_that_unfreezes_a_frozen_weight_on_the_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"Unfreezes trains backbone\.0\.weight, which is frozen and in no delta"):
        fit(tmp_path, lora(), Unfreezes("backbone.0.weight", freeze=False))
    also = LoRA(r=1, backbone="backbone", target_modules="0", also_train=r"0\.weight")
    module, file = fit(tmp_path / "also", also, Unfreezes("backbone.0.weight"))
    assert_same(module.state_dict(), load_from_checkpoint(Net, file).state_dict())


def test_grafts_may_wait_for_a_callback(tmp_path: Path) -> None:
    """What it has frozen is added to the optimizer by it alone, with its own learning rate."""

    class Looks(L.Callback):
        def on_train_epoch_end(self, run: L.Trainer, module: L.LightningModule) -> None:
            seen.append((module.backbone[0].lora.B.clone(), [g["lr"] for g in run.optimizers[0].param_groups]))

    seen: list[tuple[Tensor, list[float]]] = []
    fit(tmp_path, lora(), Unfreezes("lora.B"), Looks())
    (then, rates), (now, later) = seen
    assert not then.any()
    assert now.any()
    assert (rates, later) == ([0.1], [0.1, 0.05])


@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("method", [lora, bias])
def test_a_pruned_head_is_in_the_file(method: Any, permanent: bool, tmp_path: Path) -> None:
    module = Net()
    prunes = ModelPruning("l1_unstructured", [(module.layer, "weight")], amount=0.5, make_pruning_permanent=permanent)
    module, file = fit(tmp_path, method(), prunes, module=module)
    state = read_checkpoint(file)["state_dict"]
    if permanent:
        assert torch.equal(state["layer.weight"], module.layer.weight)
        assert int((state["layer.weight"] == 0).sum()) >= 32
        assert_same(module.state_dict(), load_from_checkpoint(Net, file).state_dict())
    else:
        assert torch.equal(state["layer.weight_orig"] * state["layer.weight_mask"], module.layer.weight)


def test_what_a_method_trains_in_place_may_be_pruned(tmp_path: Path) -> None:
    module = Net()
    prunes = ModelPruning("l1_unstructured", [(module.backbone[0], "bias")], amount=0.5)
    module, file = fit(tmp_path, bias(), prunes, module=module)
    assert int((module.backbone[0].bias == 0).sum()) >= 16
    assert_same(module.state_dict(), load_from_checkpoint(Net, file).state_dict())


def test_a_frozen_weight_that_is_pruned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"0\.weight of Sequential is pruned and no method trains it"):
        fit(tmp_path, bias(), ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5))
    fit(tmp_path / "all", FullFineTuning(backbone="backbone"), ModelPruning("l1_unstructured", amount=0.5))


def test_what_a_hook_adds_to_the_state_dict_is_refused(tmp_path: Path) -> None:
    class Adds(Net):
        beside = False

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            where = checkpoint if self.beside else checkpoint["state_dict"]
            where["extra"] = torch.ones(2)

    with pytest.raises(TuningError, match=r"has put extra into the state dict .* beside the state dict"):
        fit(tmp_path, lora(), module=Adds())
    module = Adds()
    module.beside = True
    _, file = fit(tmp_path, lora(), module=module)
    assert read_checkpoint(file)["extra"].sum() == 2


def test_a_parameter_that_joins_the_optimizer_later_is_saved(tmp_path: Path) -> None:
    class Grows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().optimizer.add_param_group({"params": [self.scale.requires_grad_(True)]})

    module, file = fit(tmp_path, lora(), module=Grows())
    assert not torch.equal(module.scale, torch.ones(2))
    assert torch.equal(read_checkpoint(file)["state_dict"]["scale"], module.scale)


def test_a_part_in_eval_mode_stays_there(tmp_path: Path) -> None:
    class Still(Net):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[tuple[bool, bool]] = []

        def on_train_start(self) -> None:
            self.layer.eval()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.modes.append((self.backbone[1].training, self.layer.training))
            return super().training_step(batch, batch_idx)

    module = Still()
    module.backbone[1].eval()
    before = module.backbone[1].running_mean.clone()
    method: Method = FullFineTuning(backbone="backbone")
    fit(tmp_path, method, module=module)
    assert set(module.modes) == {(False, False)}
    assert torch.equal(module.backbone[1].running_mean, before)
    module.backbone[1].train()  # the user may take it back
    trainer(tmp_path, method, max_epochs=1, limit_val_batches=0).fit(module)
    assert module.modes[-1] == (True, False)


def test_workers_live_through_fit_validate_and_fit(tmp_path: Path) -> None:
    train, val = (DataLoader(RandomDataset(32, 4), 2, num_workers=1, persistent_workers=True) for _ in range(2))
    module = Net()
    run = trainer(tmp_path, lora(), max_epochs=1)
    run.fit(module, train, val)
    assert isinstance(run.train_dataloader, DataLoader)
    assert isinstance(run.val_dataloaders, DataLoader)
    run.validate(module, val)
    run.fit_loop.max_epochs = 2
    run.fit(module, train, val)
    assert run.global_step == 4
    assert isinstance(pickle.loads(pickle.dumps(run)), L.Trainer)


def test_a_loader_that_stands_in_for_another_is_read_written_and_pickled() -> None:
    loader = DataLoader(RandomDataset(32, 4), 2)
    stands = ResumableLoader(loader)
    stands.note = 1  # type: ignore[attr-defined]
    assert loader.note == 1  # type: ignore[attr-defined]
    del stands.note  # type: ignore[attr-defined]
    assert "note" not in vars(loader)
    assert isinstance(stands, DataLoader)
    assert isinstance(stands, ResumableLoader)
    copy = pickle.loads(pickle.dumps(stands))
    assert type(copy) is ResumableLoader
    assert len(list(copy)) == len(copy) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_a_trainer_without_the_method_loads_no_delta(strict: bool, tmp_path: Path) -> None:
    class Plain(Net):
        strict_loading = property(lambda self: strict, lambda self, value: None)  # type: ignore[assignment]

    _, file = fit(tmp_path, lora(), module=Plain())
    alone = trainer(tmp_path)
    with pytest.raises(TuningError, match=r"a delta, of whose method Plain knows nothing: give the Trainer the method"):
        alone.validate(Plain(), ckpt_path=file, verbose=False)
    with_it = trainer(tmp_path, lora()).validate(Plain(), DataLoader(torch.ones(4, 32), 4), ckpt_path=file)
    module = load_from_checkpoint(Plain, file)
    assert alone.validate(module, DataLoader(torch.ones(4, 32), 4)) == with_it
