"""Class-incremental classification of images or texts, with scores of what is forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torchmetrics import MeanMetric

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.data.protocols import TaskSequence
from lightning_peft.deltas.per_task import PerTask
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.class_scores import HeadClassification
from lightning_peft.tasks.continual_metrics import average_accuracy, backward_transfer, forgetting, learning_accuracy
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.text_classification import TextClassification


@runtime_checkable
class TaskCallback(Protocol):
    """A callback that is told when a task begins."""

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Prepare for the task of this number."""


class ContinualTask(HeadClassification):
    """Class-incremental learning: one head for all classes, which come in tasks; no task is named in the test.

    A training batch is scored among the classes of its task alone. After each task, A[i, t] is the accuracy on task i,
    and ``val_accuracy``, ``val_forgetting`` and ``val_backward_transfer`` are logged, in the test ``test_accuracy``
    (the mean over the tasks) and ``test_accuracy_task_i``. The optimizer is Adam of a constant learning rate; its
    moments begin anew with each task, at which callbacks with a method ``on_task_start(trainer, pl_module, task)`` are
    called. Data come from `ContinualData`.

    Args:
        model: folder or hub id of the pretrained model.
        labels: names of the classes; None: those that the model was trained for.
        known: the classes that a row is told from: 'seen' those of all tasks so far; 'all', which is harder before
            the last task; 'task' those of its own task, which is task-incremental learning.
        label_smoothing: share of the target that goes to the other classes of the task.
        zero_head: begin with a head of zeros, so that classes yet to come have no say.
        **kwargs: as in `Task`; ``warmup`` and ``weight_decay`` are not used.
    """

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        known: Literal["seen", "all", "task"] = "seen",
        label_smoothing: float = 0.0,
        zero_head: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, labels, **kwargs)
        if known not in ("seen", "all", "task"):
            raise TuningError(f"known={known!r} is no set of classes: take 'seen', 'all' or 'task'.")
        if not 0 <= label_smoothing < 1:
            raise TuningError(f"label_smoothing={label_smoothing} is no share: take 0 or more, and less than 1.")
        self.known = known
        self.label_smoothing = label_smoothing
        self.matrix: list[list[float]] = []
        self.task = 0
        self._classes: list[list[int]] = []
        if zero_head:
            parameters = dict(self.backbone.named_parameters())
            with torch.no_grad():
                for name in anatomy.head_names(self.backbone):
                    parameters[name].zero_()

    def setup(self, stage: str) -> None:
        """See that data and Trainer are for a sequence of tasks.

        Raises:
            TuningError: they are not.
        """
        super().setup(stage)
        self._classes = self._sequence().task_classes
        self.accuracies = nn.ModuleList(MeanMetric() for _ in self._classes)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PerTask):
                self._check_deltas(callback)
        if stage == "fit":
            self._check_trainer(self._sequence())
            self.matrix = self.matrix or [[0.0] * len(self._classes) for _ in self._classes]

    def on_train_epoch_start(self) -> None:
        """Begin a task where its first epoch begins."""
        data, epoch = self._sequence(), self.trainer.current_epoch
        self.task = data.task_at(epoch)
        if epoch % data.epochs_per_task:
            return
        if self.task > 0:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TaskCallback):
                callback.on_task_start(self.trainer, self, self.task)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy among the classes of the task.

        Others are left out, not set to minus infinity, with which label smoothing would be infinite.
        """
        classes = torch.tensor(self._classes[self.task], device=self.device)
        logits = self(batch)[:, classes]
        target = (batch["labels"].unsqueeze(1) == classes).int().argmax(1)
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the task of number ``dataloader_idx``."""
        self._score_task(batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the task of number ``dataloader_idx``, and count its confusions."""
        self.confusion.update(self._score_task(batch, dataloader_idx), batch["labels"])

    def metrics(self, split: Split) -> Sequence[Any]:
        """Return the accuracies of the tasks."""
        return list(self.accuracies)

    def log_scores(self, split: Split) -> None:
        """Log the accuracies of the tasks; after the last epoch of a task, fill its column of A."""
        if self.trainer.sanity_checking:
            return
        column = [float(metric.compute()) for metric in self.metrics(split) if metric.update_called]
        if split == "test":
            for i, accuracy in enumerate(column):
                self.log(f"test_accuracy_task_{i}", accuracy)
        self.log(f"{split}_accuracy", sum(column) / len(column), prog_bar=True)
        if self.trainer.state.fn == "fit" and (self.trainer.current_epoch + 1) % self._sequence().epochs_per_task == 0:
            for i, accuracy in enumerate(column):
                self.matrix[i][self.task] = accuracy
            self.log("val_forgetting", forgetting(self.matrix, self.task))
            self.log("val_backward_transfer", backward_transfer(self.matrix, self.task))

    def result_rows(self) -> list[dict[str, Any]]:
        """Return A and its scores as rows of ``metric`` and ``value``; those of A say ``task`` and ``after``."""
        done = range(self.task + 1) if self.matrix else range(0)
        rows: list[dict[str, Any]] = [
            {"metric": "task_accuracy", "task": i, "after": t, "value": self.matrix[i][t]}
            for t in done
            for i in range(t + 1)
        ]
        for score in (average_accuracy, forgetting, backward_transfer, learning_accuracy):
            rows += [{"metric": score.__name__, "after": t, "value": score(self.matrix, t)} for t in done]
        return rows

    def configure_optimizers(self) -> Adam:
        """Return Adam, with a learning rate for the delta and one for the head."""
        groups = [{**group, "weight_decay": 0.0} for group in self.parameter_groups()]
        return Adam(groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep A."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["continual"] = {"matrix": [list(row) for row in self.matrix], "task": self.task}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up A."""
        super().on_load_checkpoint(checkpoint)
        held = checkpoint.get("continual", {"matrix": [], "task": 0})
        self.matrix, self.task = [list(row) for row in held["matrix"]], held["task"]

    def _sequence(self) -> TaskSequence:
        if not isinstance(self.data, TaskSequence):
            raise TuningError(f"{type(self).__name__} needs tasks: give it ContinualData.")
        return self.data

    def _known(self, task: int) -> Tensor:
        """Return which classes a row of a task is told from, [classes]."""
        tasks = {"all": self._classes, "seen": self._classes[: self.task + 1], "task": [self._classes[task]]}
        mask = torch.zeros(len(self.labels), dtype=torch.bool, device=self.device)
        mask[[number for classes in tasks[self.known] for number in classes]] = True
        return mask

    def _score_task(self, batch: Mapping[str, Tensor], task: int) -> Tensor:
        logits: Tensor = self(batch).masked_fill(~self._known(task), float("-inf"))
        self.accuracies[task].update((logits.argmax(1) == batch["labels"]).float())  # type: ignore[operator]
        return logits

    def _check_deltas(self, deltas: PerTask) -> None:
        if deltas.tasks != len(self._classes):
            raise TuningError(
                f"PerTask has {deltas.tasks} deltas, and the data have {len(self._classes)} tasks: give it "
                f"tasks={len(self._classes)}."
            )
        if self.known != "task":
            raise TuningError(
                f"PerTask computes a row by the delta of its task, which known={self.known!r} does not tell: give the "
                "task known='task'."
            )

    def _check_trainer(self, data: TaskSequence) -> None:
        epochs = data.epochs_per_task * len(self._classes)
        if self.trainer.max_epochs != epochs:
            raise TuningError(
                f"max_epochs={self.trainer.max_epochs}, but {len(self._classes)} tasks of {data.epochs_per_task} "
                f"epochs take {epochs}: set trainer.max_epochs to {epochs}."
            )
        if self.trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            raise TuningError("each task has data of its own: set trainer.reload_dataloaders_every_n_epochs to 1.")
        every = self.trainer.check_val_every_n_epoch
        if every is None or data.epochs_per_task % every:
            raise TuningError(
                f"check_val_every_n_epoch={every} leaves tasks unscored: take a divisor of {data.epochs_per_task}."
            )


class ContinualClassification(ContinualTask, ImageClassification):
    """Class-incremental learning of images; see `ContinualTask`."""


class ContinualTextClassification(ContinualTask, TextClassification):
    """Class-incremental learning of texts; see `ContinualTask`."""
