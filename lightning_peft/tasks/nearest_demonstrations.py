"""Nearest-neighbour classification by the embeddings of a frozen encoder, without training."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoModel

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import TextColumns
from lightning_peft.tasks.base import Dtype
from lightning_peft.tasks.class_scores import ClassScores
from lightning_peft.tasks.embedding import Embedder, nearest_rows
from lightning_peft.tasks.frozen import FrozenTask


class NearestDemonstrations(FrozenTask, ClassScores):
    """Give each row the class of the training rows that are nearest to it; nothing is trained.

    Rows are compared by the cosine of their embeddings, the mean of the encoder's last hidden states. Each of the
    nearest rows votes for its class with weight exp(cosine / temperature). Logs what `TextClassification` logs.

    Args:
        model: folder or hub id of the encoder, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes.
        neighbours: how many rows vote.
        temperature: the lower, the more the nearest of them counts.
        text: columns to compare; None: those that the data module calls its text.
        max_length: where a text is cut [tokens].
        dtype: what the model is loaded in.

    Source: the selection of demonstrations of Liu et al. 2022 (2101.06804), used as a classifier (their KNN baseline).
    """

    auto = AutoModel
    what = "text encoder"

    def __init__(
        self,
        model: str,
        labels: list[str],
        neighbours: int = 10,
        temperature: float = 0.05,
        text: list[str] | None = None,
        max_length: int = 128,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__(model, dtype=dtype)
        if neighbours < 1 or temperature <= 0:
            raise TuningError(
                f"neighbours={neighbours} and temperature={temperature} are out of range: take more than 0."
            )
        self.backbone = self.load().eval().requires_grad_(False)
        self.neighbours, self.temperature, self.text = neighbours, temperature, text
        self.max_length = max_length
        self.score_classes(labels)
        self._columns: list[str] = []
        self._pool: tuple[Tensor, Tensor] | None = None

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have these classes, and columns of text."""
        ClassScores.check_data(self, data, stage)
        self._pool = None
        self._columns = self.text or (list(data.text) if isinstance(data, TextColumns) else [])
        if not self._columns:
            raise TuningError("it is not clear which columns are text: name them with text=.")

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logarithm of the share of the votes, [B, classes].

        Raises:
            TuningError: there are fewer training rows than neighbours.
        """
        if self._pool is None:
            self._pool = self._embedded_training_rows()
        pool, classes = self._pool
        if len(pool) < self.neighbours:
            raise TuningError(f"neighbours={self.neighbours}, but there are {len(pool)} training rows: take fewer.")
        cosines, rows = nearest_rows(self._embed(self.rows_of(batch)), pool, self.neighbours)
        votes = torch.zeros(len(cosines), len(self.labels), device=cosines.device)
        votes.scatter_add_(1, classes[rows], (cosines / self.temperature).softmax(1))
        return votes.clamp(min=1e-6).log().log_softmax(1)

    def on_validation_start(self) -> None:
        """Forget the embeddings of the training rows: the weights may be others."""
        self._pool = None

    def on_test_start(self) -> None:
        """Forget the last test, and the embeddings of the training rows."""
        super().on_test_start()
        self._pool = None

    on_predict_start = on_validation_start

    def _embedded_training_rows(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the training rows [N, d], and their classes [N]."""
        data, rows = self.labelled(), self.training_rows("neighbours")
        numbers = dict(class_numbers(rows, data.label, "train", self.labels))
        found = self._embed(rows)
        return found, torch.tensor([numbers[value] for value in rows[data.label][:]], device=found.device)

    def _embed(self, rows: Any) -> Tensor:
        texts = [" ".join(str(row[name]) for name in self._columns if row[name] is not None) for row in rows]
        length = min(self.max_length, text_structure.max_positions(self.backbone) or self.max_length)
        return Embedder(self.backbone, self.tokenizer, length)(texts)
