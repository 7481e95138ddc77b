"""Embeddings of sentences, learned from pairs, triplets or scored pairs."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.core.gathering import rows_of_each
from lightning_peft.data.protocols import ScoredPairs
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.pooling import Pool, PoolingTask
from lightning_peft.tasks.retrieval_metrics import Recall, Spearman

EmbeddingLoss = Literal["infonce", "cosent"]


class SentenceEmbedding(PoolingTask):
    """Let texts that belong together have vectors that are near.

    * infonce: the cross-entropy of the right text among all of the batch, those of other anchors, hard negatives and
      other processes, at ``scale`` times the cosine;
    * cosent, of scored pairs: ``log(1 + sum exp(scale (cos_j - cos_i)))`` over the pairs i that have a higher score
      than j in the batch.

    Logs ``train_loss``, and of infonce ``val_recall_at_1`` and ``val_recall_at_5``: how often the right text is among
    the nearest of the whole split; of cosent ``val_spearman``; the same for the test.

    Source: van den Oord et al. 2018, arXiv 1807.03748, equation 4, with in-batch negatives as in Henderson et al. 2017,
    arXiv 1705.00652, section 4; CoSENT: Su 2022.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        pool: what becomes the vector of a text: the mean of its hidden states, the first ([CLS]), or the last.
        objective: infonce, or cosent for scored pairs.
        scale: what cosines are multiplied by, the inverse of the temperature.
        symmetric: of infonce, whether the right anchor is guessed for each text, too.
        **kwargs: as in `Task`.
    """

    not_inputs = frozenset({"scores"})

    def __init__(
        self,
        model: str,
        pool: Pool = "mean",
        objective: EmbeddingLoss = "infonce",
        scale: float = 20.0,
        symmetric: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if not 0 < scale < float("inf"):
            raise TuningError(f"scale={scale} is out of range: take a number above 0.")
        if symmetric and objective != "infonce":
            raise TuningError(f"symmetric=True is for objective=infonce: leave it out of {objective}.")
        self.pool, self.objective, self.scale, self.symmetric = pool, objective, scale, symmetric
        self.backbone = self._load_base()
        if self.backbone.config.is_encoder_decoder:
            raise TuningError(f"{model} is an encoder-decoder: embeddings need an encoder or a decoder alone.")
        self.monitor = "val_recall_at_1" if objective == "infonce" else "val_spearman"
        self.score_by({"recall": Recall()} if objective == "infonce" else {"spearman": Spearman()})

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return vectors of length 1 in fp32, [sides B, d]."""
        batch = self.prepared(batch)
        hidden = self.backbone(**self.inputs(batch)).last_hidden_state
        return F.normalize(self._pooled(hidden, batch).float(), dim=1)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have scores where the objective compares them, and not else.

        Raises:
            TuningError: it is otherwise.
        """
        if not isinstance(data, ScoredPairs) or data.is_scored == (self.objective == "cosent"):
            return
        has, wanted = ("scores", "cosent") if data.is_scored else ("no scores", "infonce")
        raise TuningError(f"the data have {has}, objective={self.objective} is not for them: take {wanted}.")

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of the rows of this process."""
        sides = self(batch).chunk(batch["sides"])
        if self.objective == "cosent":
            return self._cosent((sides[0] * sides[1]).sum(1), batch["scores"])
        rank = self.attached.global_rank if self.attached is not None else 0
        parts = [rows_of_each(side) for side in sides]
        start = sum(len(part) for part in parts[0][:rank])
        every = [torch.cat(part) for part in parts]
        right = torch.arange(start, start + len(sides[0]), device=sides[0].device)
        loss = F.cross_entropy(self.scale * sides[0] @ torch.cat(every[1:]).T, right)
        if self.symmetric:
            loss = (loss + F.cross_entropy(self.scale * sides[1] @ every[0].T, right)) / 2
        return loss

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how many anchors a batch has."""
        return batch["input_ids"].new_tensor(self.rows_in(batch))

    def rows_in(self, batch: Mapping[str, Any]) -> int:
        """Return how many rows of pairs a batch has."""
        rows: int = len(batch["input_ids"]) // batch["sides"]
        return rows

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the pairs of a batch to the metrics."""
        anchors, others = self(batch).chunk(batch["sides"])[:2]
        for scores in self.metrics(split):
            if self.objective == "infonce":
                scores.update(anchors, others)
            else:
                scores.update((anchors * others).sum(1), batch["scores"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``embedding``, the vector of each anchor."""
        return {"embedding": self(batch).chunk(batch["sides"])[0].tolist()}

    def _cosent(self, cosines: Tensor, scores: Tensor) -> Tensor:
        """Return the loss of scored pairs; 0 where no two scores differ."""
        above = scores.unsqueeze(1) > scores.unsqueeze(0)
        gaps = (self.scale * (cosines.unsqueeze(0) - cosines.unsqueeze(1)))[above]
        return torch.cat([gaps.new_zeros(1), gaps]).logsumexp(0)
