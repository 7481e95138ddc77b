"""One class for each text, by any ``AutoModelForSequenceClassification``."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from transformers import AutoModelForSequenceClassification

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Task, check_names, class_config
from lightning_peft.tasks.scores import CrossEntropy


class ClassScores(Task):
    """A task that gives each row one of a few classes: scores, predictions and confusions.

    A subclass names the classes in ``labels``, calls `score_classes`, and returns logits [B, classes] from `forward`.

    Args:
        **kwargs: as in `Task`.
    """

    labels: list[str]
    monitor = "val_accuracy"

    def score_classes(self, labels: list[str]) -> None:
        """Name the classes and begin to count."""
        self.labels = labels
        count = len(labels)
        scores = {
            "loss": CrossEntropy(),
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "f1": MulticlassF1Score(count, average="macro"),
        }
        self.val_scores = MetricCollection(scores, prefix="val_")  # type: ignore[arg-type]
        self.test_scores = self.val_scores.clone(prefix="test_")
        self.confusion = MulticlassConfusionMatrix(count)

    def check(self, data: Any, stage: str) -> None:
        """See that the data have the classes of the model.

        Raises:
            TuningError: they have others.
        """
        if stage != "predict":
            check_names(list(getattr(data, "label_names", self.labels)), self.labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return self._log_loss(F.cross_entropy(self(batch), batch["labels"]), len(batch["labels"]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._score(self.val_scores, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch and count its confusions."""
        logits = self._score(self.test_scores, batch)
        self.confusion.update(logits, batch["labels"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each text, and ``probabilities``, [B, classes]."""
        probabilities = self(batch).softmax(1)
        labels = [self.labels[i] for i in probabilities.argmax(1).tolist()]
        return {"labels": labels, "probabilities": probabilities}

    def on_test_start(self) -> None:
        """Forget the confusions of an earlier test."""
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Sum the confusions over all processes."""
        self.confusion.compute()

    def confusion_matrix(self) -> Tensor:
        """Return how often texts of class i were taken for class j in the last test, [i, j].

        Raises:
            TuningError: there has been no test.
        """
        if not self.confusion.update_called:
            raise TuningError("there is no confusion matrix before a test: run trainer.test first.")
        matrix: Tensor = self.confusion.compute()
        return matrix

    def _score(self, scores: MetricCollection, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self(batch)
        labels = batch["labels"]
        scores.update(logits, labels)
        self.log_dict(scores, prog_bar=True, batch_size=len(labels))
        return logits


class TextClassification(ClassScores):
    """Classify texts with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes; None: those that the model was trained for.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForSequenceClassification
    what = "text classifier"

    def __init__(self, model: str, labels: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load(problem_type="single_label_classification", **class_config(labels))
        self.score_classes(list(self.backbone.config.id2label.values()))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits, [B, classes], in fp32."""
        logits: Tensor = self.backbone(**self.inputs(batch)).logits
        return logits.float()
