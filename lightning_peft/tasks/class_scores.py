"""The base classes of tasks that give each row one of a few classes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from lightning_peft.core.errors import TuningError
from lightning_peft.data.protocols import Labelled
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import CrossEntropy

MoreScores = Literal["matthews", "f1_second"]


class ClassScores(Task):
    """A task that gives each row one of a few classes: scores, predictions and confusions.

    A subclass names the classes in ``labels``, calls `score_classes`, and returns logits [B, classes] from `forward`.

    Args:
        **kwargs: as in `Task`.
    """

    labels: list[str]
    monitor = "val_accuracy"

    def score_classes(self, labels: list[str], more: Sequence[MoreScores] = ()) -> None:
        """Name the classes, and their metrics."""
        self.labels = labels
        self.score_by(class_metrics(len(labels), more))
        self.confusion = MulticlassConfusionMatrix(len(labels))

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the classes of the model.

        Raises:
            TuningError: they have others.
        """
        check_names(data, stage, self.labels)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch), batch["labels"])

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics, and in the test to the confusions."""
        logits, labels = self(batch), batch["labels"]
        for scores in self.metrics(split):
            scores.update(logits, labels)
        if split == "test":
            self.confusion.update(logits, labels)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each row, and ``probabilities``, [B, classes]."""
        return likeliest(self(batch), self.labels)

    def on_test_start(self) -> None:
        """Forget the confusions of an earlier test."""
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Log the scores, and sum the confusions over all processes."""
        super().on_test_epoch_end()
        self.confusion.compute()

    def confusion_matrix(self) -> Tensor:
        """Return how often rows of class i were taken for class j in the last test, [i, j].

        Raises:
            TuningError: there has been no test.
        """
        if not self.confusion.update_called:
            raise TuningError("there is no confusion matrix before a test: run trainer.test first.")
        matrix: Tensor = self.confusion.compute()
        return matrix


class HeadClassification(ClassScores):
    """Classify rows with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes; None: those that the model was trained for.
        more_scores: what else is logged: 'matthews', Matthews' correlation coefficient, as of CoLA; 'f1_second', the F1
            of the second of two classes, as of MRPC and QQP.
        **kwargs: as in `Task`.
    """

    def __init__(
        self, model: str, labels: list[str] | None = None, more_scores: Sequence[MoreScores] = (), **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load(problem_type="single_label_classification", **class_config(labels))
        self.score_classes(list(self.backbone.config.id2label.values()), more_scores)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits, [B, classes], in fp32."""
        logits: Tensor = self.backbone(**self.inputs(batch)).logits
        return logits.float()


def class_metrics(count: int, more: Sequence[MoreScores] = ()) -> dict[str, Metric]:
    """Return the metrics of a task with so many classes.

    Raises:
        TuningError: one is unknown, or is for two classes.
    """
    if odd := [name for name in more if name not in get_args(MoreScores)]:
        raise TuningError(f"more_scores has {odd[0]!r}, which is no score: take {', '.join(get_args(MoreScores))}.")
    if "f1_second" in more and count != 2:
        raise TuningError(f"f1_second is the F1 of the second of two classes, and there are {count}: leave it out.")
    accuracy, f1 = MulticlassAccuracy(count, average="micro"), MulticlassF1Score(count, average="macro")
    others = {"matthews": MulticlassMatthewsCorrCoef(count), "f1_second": _SecondF1()}
    return {"loss": CrossEntropy(), "accuracy": accuracy, "f1": f1} | {name: others[name] for name in more}


class _SecondF1(MulticlassF1Score):
    """The F1 of the second of two classes."""

    def __init__(self) -> None:
        super().__init__(2, average="none")

    def compute(self) -> Tensor:
        """Return it."""
        return super().compute()[1]


def class_config(labels: list[str] | None) -> dict[str, Any]:
    """Return the entries of a configuration that name the classes of a head."""
    if labels is None:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def check_names(data: L.LightningDataModule | None, stage: str, own: list[str], what: str = "classes") -> None:
    """See that the data, where they name classes, name those of the model; rows to predict need none.

    Raises:
        TuningError: they have others.
    """
    if stage == "predict" or not isinstance(data, Labelled):
        return
    names = list(data.label_names)
    if names != own:
        raise TuningError(
            f"the data have {len(names)} {what} ({', '.join(names)}), the model {len(own)} "
            f"({', '.join(own)}): build it with labels=data.label_names."
        )


def likeliest(logits: Tensor, labels: list[str]) -> dict[str, Any]:
    """Return ``labels``, the name of the likeliest class of each row of logits, and ``probabilities``, [B, classes]."""
    probabilities = logits.softmax(1)
    return {"labels": [labels[i] for i in probabilities.argmax(1).tolist()], "probabilities": probabilities}
