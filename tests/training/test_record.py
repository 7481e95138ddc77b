"""What a run trains: methods say it below a backbone, optimizers outside, and no flag on the way changes it."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_peft import (
    BitFit,
    DeltaGuard,
    DiffPruning,
    LoRA,
    PromptTuning,
    TuningError,
    collect,
    load_delta,
    read_delta,
    save_delta,
)
from tests.contract import assert_same
from tests.models import tiny
from tests.modules import Tuned, loader, trainer


class Trains(Tuned):
    """Has no validation."""

    validation_step = L.LightningModule.validation_step


def fit(folder: Path, module: L.LightningModule, *callbacks: Callback, epochs: int = 1) -> Path:
    """Fit, saving after each epoch, and return the last checkpoint."""
    trainer(folder, *callbacks, Saves(folder), max_epochs=epochs).fit(module, loader("bert"))
    return folder / f"epoch={epochs - 1}.ckpt"


class Saves(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def resume(file: Path, module: L.LightningModule, method: LoRA) -> None:
    """Fit to the end of the second epoch."""
    trainer(file.parent, method, max_epochs=2).fit(module, loader("bert"), ckpt_path=file)


class Critic(Trains):
    """A fixed network that the loss goes through, and that no optimizer has ever held."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.critic(self.model(**batch).logits).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=1e-2)


def test_a_loss_network_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    module = Critic()
    before = copy.deepcopy(module.critic.state_dict())
    file = fit(tmp_path, module, LoRA(r=2))
    assert_same(module.critic.state_dict(), before)
    assert not [name for name in read_delta(file)[0] if name.startswith("critic")]
    resume(file, Critic(), LoRA(r=2))


class Adversaries(Trains):
    """A discriminator that is frozen while the generator steps, and so whenever a file is written."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.judge = nn.Linear(3, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        made = self.model(**batch).logits
        for optimizer, flag, value in ((second, True, made.detach()), (first, False, -made)):
            self.judge.requires_grad_(flag)
            optimizer.zero_grad()
            self.manual_backward(self.judge(value).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.parameters()), torch.optim.Adam(self.judge.parameters())


def test_what_is_frozen_when_a_file_is_written_is_in_it(tmp_path: Path) -> None:
    module = Adversaries()
    file = fit(tmp_path / "part", module, LoRA(r=2))
    assert torch.equal(read_delta(file)[0]["judge.weight"], module.judge.weight)
    again = Adversaries()
    resume(file, again, LoRA(r=2))
    whole = Adversaries()
    fit(tmp_path / "whole", whole, LoRA(r=2), epochs=2)
    assert_same(collect(again), collect(whole))


class FreezeA(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if name.endswith("lora.A"):
                parameter.requires_grad_(trainer.current_epoch == 0)


def test_what_was_trained_and_is_frozen_midway_stays_in_the_file(tmp_path: Path) -> None:
    module = Trains()
    file = fit(tmp_path, module, LoRA(r=2), FreezeA(), epochs=2)
    tensors = read_delta(file)[0]
    assert len(tensors) == 10
    first = read_delta(tmp_path / "epoch=0.ckpt")[0]
    assert all(torch.equal(tensors[name], first[name]) for name in tensors if name.endswith("lora.A")), "it was thawed"
    other = Trains()
    LoRA(r=2).apply(other)
    load_delta(other, file)
    assert_same(collect(other), collect(module))


class Teacher(Trains):
    """A momentum teacher, prototypes and a frozen BatchNorm move without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 3)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3).requires_grad_(False)
        self.bare = nn.BatchNorm1d(3, affine=False)
        self.still = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.model(**batch).logits
        return (self.bare(self.norm(self.head(out))) - self.teacher(out)).pow(2).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_what_moves_without_a_gradient_is_saved_and_resumed(tmp_path: Path) -> None:
    whole = Teacher()
    last = fit(tmp_path / "whole", whole, LoRA(r=2, backbone="model"), epochs=2)
    file = fit(tmp_path / "part", Teacher(), LoRA(r=2, backbone="model"))
    saved = set(read_delta(file)[0])
    assert {"teacher.weight", "norm.running_mean", "bare.running_var"} <= saved
    assert not any(name.startswith("still") for name in saved)
    again = Teacher()
    resume(file, again, LoRA(r=2, backbone="model"))
    assert_same(again.state_dict(), whole.state_dict())
    other = Teacher()
    LoRA(r=2, backbone="model").apply(other)
    load_delta(other, last)
    assert_same(other.state_dict(), whole.state_dict())


class Student(Trains):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.model(**batch).logits - self.teacher(**batch).logits).pow(2).mean()


def test_a_tuned_teacher_stays_frozen_and_out_of_the_file(tmp_path: Path) -> None:
    teacher = tiny("bert", seed=1)
    LoRA(r=2).apply(teacher)
    before = copy.deepcopy(teacher.state_dict())
    module = Student()
    module.teacher = teacher.requires_grad_(False).train()
    file = fit(tmp_path, module, LoRA(r=2, backbone="model"))
    assert_same(module.teacher.state_dict(), before)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert {name.split(".")[0] for name in read_delta(file)[0]} == {"model"}


def test_new_parameters_join_the_optimizer_that_held_the_backbone(tmp_path: Path) -> None:
    class Reversed(Adversaries):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.judge.parameters()), torch.optim.Adam(self.model.bert.embeddings.parameters())

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...

    module = Reversed()
    run = trainer(tmp_path, LoRA(r=2))
    run.fit(module, loader("bert"))
    assert [sum(len(group["params"]) for group in o.param_groups) for o in run.optimizers] == [2, 10]


def test_several_optimizers_without_the_backbone_are_refused(tmp_path: Path) -> None:
    class Neither(Adversaries):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([self.judge.weight]), torch.optim.Adam([self.judge.bias])

    with pytest.raises(TuningError, match="none of the 2 optimizers of Neither holds a parameter of model"):
        trainer(tmp_path, LoRA(r=2)).fit(Neither(), loader("bert"))


@pytest.mark.parametrize("kind", ["Adagrad", "LBFGS"])
def test_optimizers_that_have_state_from_the_start(tmp_path: Path, kind: str) -> None:
    class Other(Trains):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return getattr(torch.optim, kind)(self.parameters(), lr=1e-3)

    class HeadAlone(Other):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return getattr(torch.optim, kind)(self.model.classifier.parameters(), lr=1e-3)

    for cls in (Other, HeadAlone):
        module, folder = cls(), tmp_path / cls.__name__
        file = fit(folder, module, LoRA(r=2))
        again = cls()
        resume(file, again, LoRA(r=2))
        whole = cls()  # which begins with the random numbers that the first one began with
        fit(folder / "whole", whole, LoRA(r=2), epochs=2)
        assert_same(collect(again), collect(whole))


def test_a_delta_that_lost_its_tensors_is_refused_when_it_is_written(tmp_path: Path) -> None:
    class Renames(Trains):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.removeprefix("model."): tensor for name, tensor in state.items()}

    with pytest.raises(TuningError, match=r"lora\.A is trained and not among the .* tensors to be saved"):
        fit(tmp_path, Renames(), LoRA(r=2))
    assert list(tmp_path.glob("*.ckpt")) == []


def test_an_average_made_before_the_grafts_is_refused(tmp_path: Path) -> None:
    class Averaged(Trains):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.model)

    with pytest.raises(TuningError, match="average averages a BertForSequenceClassification as it was without grafts"):
        trainer(tmp_path, LoRA(r=2, backbone="model")).fit(Averaged(), loader("bert"))


def test_heads_may_take_turns(tmp_path: Path) -> None:
    class Turns(Trains):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.heads[batch_idx % 2](self.model(**batch).logits).mean()

    with pytest.warns(UserWarning, match=r"2 trained parameters got no gradient in the first step, e\.g\. heads\.1"):
        trainer(tmp_path, LoRA(r=2)).fit(Turns(), loader("bert"))


def test_a_penalty_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    class Bare(Trains):
        automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.model(**batch).loss.backward()
            optimizer.step()

    with pytest.raises(
        TuningError, match=r"Bare calls loss\.backward\(\), which leaves out the penalty of DiffPruning"
    ):
        trainer(tmp_path, DiffPruning(sparsity=0.01)).fit(Bare(), loader("bert"))


def test_a_batch_is_given_back_when_a_step_fails(tmp_path: Path) -> None:
    class Fails(Trains):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.seen, self.widened = batch, batch["input_ids"].shape
            raise RuntimeError("boom")

    module = Fails()
    rows = loader("bert")
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, PromptTuning(num_virtual_tokens=3, init="random_uniform")).fit(module, rows)
    assert_same(module.seen, next(iter(rows)))
    assert module.widened[1] == module.seen["input_ids"].shape[1] + 3


def test_a_method_that_was_left_behind_is_named(tmp_path: Path) -> None:
    module = Trains()
    trainer(tmp_path, LoRA(r=2)).fit(module, loader("bert"))
    with pytest.warns(UserWarning, match="LoRA, applied to Trains before, computes beside BitFit, frozen"):
        trainer(tmp_path, BitFit(exclude=".*pooler.*")).fit(module, loader("bert"))


def test_a_module_that_fabric_has_wrapped_is_the_module(tmp_path: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = tiny("bert")
    LoRA(r=2).apply(model)
    wrapped = fabric.setup_module(model)
    assert_same(collect(wrapped), collect(model))
    file = save_delta(wrapped, tmp_path / "delta.safetensors")
    other = tiny("bert")
    LoRA(r=2).apply(other)
    load_delta(fabric.setup_module(other), file)
    assert_same(collect(other), collect(model))


class Diverges(Trains):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss * (torch.nan if self.current_epoch else 1)


def test_a_run_that_diverges_writes_over_no_file(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    save = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    with pytest.raises(TuningError, match="has NaN or infinity, so no checkpoint is written over the last one"):
        trainer(tmp_path, LoRA(r=2), save, max_epochs=2).fit(Diverges(), loader("bert"))
    assert all(bool(tensor.isfinite().all()) for tensor in read_delta(file)[0].values())


def test_a_guard_may_warn(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRA(r=2), DeltaGuard("warn"), Saves(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="has NaN or infinity"):
        run.fit(Diverges(), loader("bert"))
    with pytest.raises(TuningError, match="is no action of DeltaGuard"):
        DeltaGuard("ignore")
