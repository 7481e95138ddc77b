"""Multiple choice with any ``AutoModelForMultipleChoice``: a head gives each option one score."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMultipleChoice

from lightning_peft.core.errors import TuningError
from lightning_peft.data.multiple_choice import MultipleChoiceData
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import Accuracy, CrossEntropy


class MultipleChoice(Task):
    """Choose one of the options of each question (COPA, SWAG, RACE).

    The options are the rows of a batch, so every method sees texts of [N, T] as in other tasks. Questions of a batch
    may have unlike many options. Logs ``train_loss``, ``val_loss``, ``val_accuracy``, and the same for the test.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForMultipleChoice
    what = "model for multiple choice"
    not_inputs = Task.not_inputs | {"row", "option"}
    monitor = "val_accuracy"

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load()
        self.score_by({"loss": CrossEntropy(), "accuracy": Accuracy()})

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the options in fp32, [B, options], -inf where a question has fewer."""
        inputs = {name: value.unsqueeze(1) for name, value in self.inputs(batch).items()}
        scores = self.backbone(**inputs).logits.flatten().float()
        row, option = batch["row"], batch["option"]
        out = scores.new_full((int(row.max()) + 1, int(option.max()) + 1), -torch.inf)
        return out.index_put((row, option), scores)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have options.

        Raises:
            TuningError: they have none.
        """
        if data is not None and not isinstance(data, MultipleChoiceData):
            raise TuningError(f"{type(data).__name__} has no options to choose from: use MultipleChoiceData.")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, the mean over the questions."""
        return F.cross_entropy(self(batch), batch["labels"])

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics."""
        scores = self(batch)
        for metric in self.metrics(split):
            metric.update(scores, batch["labels"])

    def rows_in(self, batch: Mapping[str, Tensor]) -> int:
        """Return how many questions a batch has."""
        return int(batch["row"].max()) + 1

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``answer``, the letter of the likeliest option, and ``probabilities`` of the options of each row."""
        scores = self(batch)
        counts = torch.bincount(batch["row"]).tolist()
        shares = [row[:count] for row, count in zip(scores.softmax(1).tolist(), counts, strict=True)]
        return {"answer": [chr(ord("A") + best) for best in scores.argmax(1).tolist()], "probabilities": shares}
