"""Knowledge probing (LAMA): facts as words that a language model puts into a gap."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.core.errors import TuningError
from lightning_peft.data.protocols import Candidates
from lightning_peft.prompting.encoding import word_ids
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.cloze import GapTask
from lightning_peft.tasks.metrics import CrossEntropy


class KnowledgeProbing(GapTask):
    """Ask a language model for facts (LAMA): which of the candidates does it put into the gap?

    Training, of a soft prompt as a rule, minimises the cross-entropy over the whole vocabulary, as P-Tuning does. Logs
    ``train_loss``, ``val_loss``, ``val_p_at_1`` and ``val_p_at_10``, the share of facts whose object is the first, or
    among the first ten, of the candidates, and the same for the test.

    Source: Petroni et al. 2019, arXiv 1909.01066, section 4.5; Liu et al. 2021, arXiv 2103.10385, section 4.1.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        candidates: the objects to choose from, each one token.
        **kwargs: as in `GapTask` and `Task`.
    """

    monitor = "val_p_at_1"
    ids: Tensor

    def __init__(self, model: str, candidates: list[str], **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        ids = [word_ids(self.tokenizer, word, self.lead) for word in candidates]
        for word, own in zip(candidates, ids, strict=True):
            if len(own) > 1:
                raise TuningError(f"candidate {word!r} is {len(own)} tokens of {model}: give words of one token.")
        if len(candidates) < 2:
            raise TuningError(f"candidates={candidates} leave no choice: give two words or more.")
        self.candidates = list(candidates)
        self.register_buffer("ids", torch.tensor([own[0] for own in ids]), persistent=False)
        count = len(candidates)
        one, ten = (MulticlassAccuracy(count, top_k=min(k, count), average="micro") for k in (1, 10))
        self.score_by({"loss": CrossEntropy(), "p_at_1": one, "p_at_10": ten})

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the candidates of the model.

        Raises:
            TuningError: they have others.
        """
        super().check_data(data, stage)
        if stage != "predict" and isinstance(data, Candidates) and list(data.candidates) != self.candidates:
            raise TuningError(
                f"the data have {len(data.candidates)} candidates, the model {len(self.candidates)} others: "
                "build it with candidates=data.candidates."
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of all words in the gap in fp32, [B, V]."""
        return self.gap_logits(self.prepared(batch), 1)[:, 0]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy over the vocabulary."""
        return F.cross_entropy(self(batch), self.ids[batch["labels"]])

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics: the loss over the vocabulary, the ranks among the candidates."""
        logits, (scores,) = self(batch), self.metrics(split)
        scores["loss"].update(logits, self.ids[batch["labels"]])
        chosen = logits[:, self.ids]
        scores["p_at_1"].update(chosen, batch["labels"])
        scores["p_at_10"].update(chosen, batch["labels"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``objects``, the five likeliest candidates of each row, and their ``probabilities`` among all."""
        values, places = self(batch)[:, self.ids].softmax(1).topk(min(5, len(self.candidates)), dim=1)
        return {"objects": [[self.candidates[i] for i in row] for row in places.tolist()], "probabilities": values}
