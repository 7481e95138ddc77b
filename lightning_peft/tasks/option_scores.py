"""The base class of tasks that choose one of the options of each question."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import Accuracy, CrossEntropy


class OptionScores(Task):
    """A task that scores the options of each question, which are the rows of a batch: scores and predictions.

    A subclass calls `score_options`, and returns scores [B, options] from `forward`, -inf where a question has fewer.

    Args:
        **kwargs: as in `Task`.
    """

    not_inputs = Task.not_inputs | {"row", "option"}
    monitor = "val_accuracy"
    right = "labels"
    """The entry of a batch that has the number of the right option of each question."""

    def score_options(self) -> None:
        """Name the metrics."""
        self.score_by({"loss": CrossEntropy(), "accuracy": Accuracy()})

    def by_question(self, scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of options [N] as [B, options], -inf where a question has fewer."""
        row, option = batch["row"], batch["option"]
        out = scores.new_full((int(row.max()) + 1, int(option.max()) + 1), -float("inf"))
        return out.index_put((row, option), scores)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, the mean over the questions."""
        return F.cross_entropy(self(batch), batch[self.right])

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics."""
        scores = self(batch)
        for metric in self.metrics(split):
            metric.update(scores, batch[self.right])

    def rows_in(self, batch: Mapping[str, Tensor]) -> int:
        """Return how many questions a batch has."""
        return int(batch["row"].max()) + 1

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``answer``, the letter of the likeliest option, and ``probabilities`` of the options of each row."""
        scores = self(batch)
        counts = batch["row"].bincount().tolist()
        shares = [row[:count] for row, count in zip(scores.softmax(1).tolist(), counts, strict=True)]
        return {"answer": [chr(ord("A") + best) for best in scores.argmax(1).tolist()], "probabilities": shares}
