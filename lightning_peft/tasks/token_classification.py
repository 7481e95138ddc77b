"""A tag for each word, by any ``AutoModelForTokenClassification``."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForTokenClassification

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Task, check_names, class_config
from lightning_peft.tasks.scores import IGNORED, CrossEntropy, SpanF1


class TokenClassification(Task):
    """Tag words: names, parts of speech, roles.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` (of words) and, where the tags are in the BIO scheme, precision,
    recall and ``val_f1`` of whole spans; the same for the test. A word is tagged at its first token. The columns of
    virtual tokens are no words: logits are [B, N, tags] for N columns of text, whatever a method adds.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: the tags; None: those that the model was trained for.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForTokenClassification
    what = "tagger"

    def __init__(self, model: str, labels: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load(**class_config(labels))
        self.labels: list[str] = list(self.backbone.config.id2label.values())
        scores: dict[str, Any] = {
            "loss": CrossEntropy(),
            "accuracy": MulticlassAccuracy(len(self.labels), average="micro", ignore_index=IGNORED),
        }
        if self._is_bio():
            scores["spans"] = SpanF1(self.labels)
            self.monitor = "val_f1"
        self.val_scores = MetricCollection(scores, prefix="val_", compute_groups=False)
        self.test_scores = self.val_scores.clone(prefix="test_")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits in fp32, [B, N, tags]."""
        logits = self.backbone(**self.inputs(batch)).logits
        return self.text_columns(logits, batch).float()

    def check(self, data: Any, stage: str) -> None:
        """See that the data have the tags of the model.

        Raises:
            TuningError: they have others.
        """
        if stage != "predict":
            check_names(list(getattr(data, "label_names", self.labels)), self.labels, "tags")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, the mean over the words."""
        logits, labels = self(batch), self.text_columns(batch["labels"], batch)
        return self._log_loss(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), len(labels))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._score(self.val_scores, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores(self.val_scores)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._score(self.test_scores, batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores(self.test_scores)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``tags``, the likeliest tag of each word of each row."""
        guesses, labels = self(batch).argmax(-1), self.text_columns(batch["labels"], batch)
        words = [row[place != IGNORED].tolist() for row, place in zip(guesses, labels, strict=True)]
        return {"tags": [[self.labels[i] for i in row] for row in words]}

    def _score(self, scores: MetricCollection, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch), self.text_columns(batch["labels"], batch)
        kept = labels != IGNORED
        scores["loss"].update(logits, labels)
        scores["accuracy"].update(logits[kept], labels[kept])
        if "spans" in scores:
            scores["spans"].update(logits, labels)

    def _is_bio(self) -> bool:
        """Tell whether the tags mark spans; that some do and others do not is a mistake.

        Raises:
            TuningError: it is neither the BIO scheme nor one without spans.
        """
        begin = {label for label in self.labels if label.startswith("B-")}
        odd = [label for label in self.labels if label != "O" and not label.startswith(("B-", "I-"))]
        if begin and odd:
            raise TuningError(
                f"{odd[0]!r} is no tag of the BIO scheme, as {min(begin)!r} is: write spans as B-X, I-X and O."
            )
        return not odd
