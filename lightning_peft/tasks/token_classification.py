"""Token classification (tagging) with any ``AutoModelForTokenClassification``."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForTokenClassification

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.class_scores import check_names, class_config
from lightning_peft.tasks.metrics import CrossEntropy, SpanF1, mean_cross_entropy


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
        self.score_by(scores)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits in fp32, [B, N, tags]."""
        batch = self.prepared(batch)
        logits = self.backbone(**self.inputs(batch)).logits
        return self.text_columns(logits, batch).float()

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the tags of the model.

        Raises:
            TuningError: they have others.
        """
        check_names(data, stage, self.labels, "tags")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, the mean over the words."""
        logits, labels = self(batch), self.text_columns(batch["labels"], batch)
        return mean_cross_entropy(logits, labels)

    def counted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return how many words a batch has."""
        return (batch["labels"] != IGNORED).sum()

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add the words of a batch to the metrics."""
        logits, labels = self(batch), self.text_columns(batch["labels"], batch)
        (scores,), kept = self.metrics(split), labels != IGNORED
        scores["loss"].update(logits, labels)
        scores["accuracy"].update(logits[kept], labels[kept])
        if "spans" in scores:
            scores["spans"].update(logits, labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``tags``, the likeliest tag of each word of each row."""
        guesses, labels = self(batch).argmax(-1), self.text_columns(batch["labels"], batch)
        words = [row[place != IGNORED].tolist() for row, place in zip(guesses, labels, strict=True)]
        return {"tags": [[self.labels[i] for i in row] for row in words]}

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
