"""A number for each text, with any ``AutoModelForSequenceClassification``."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import PearsonCorrCoef
from transformers import AutoModelForSequenceClassification

from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import SquaredError
from lightning_peft.tasks.retrieval_metrics import Spearman


class TextRegression(Task):
    """Predict a number for a text or a pair of texts, such as the likeness of STS-B.

    The loss is the mean squared error. Logs ``train_loss``, ``val_loss``, ``val_pearson``, ``val_spearman`` and the
    same for the test.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForSequenceClassification
    what = "text classifier"
    monitor = "val_pearson"

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load(problem_type="regression", num_labels=1)
        self.score_by({"loss": SquaredError(), "pearson": PearsonCorrCoef(), "spearman": Spearman()})

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return a number for each row, [B], in fp32."""
        logits: Tensor = self.backbone(**self.inputs(batch)).logits
        return logits.float().squeeze(-1)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(self(batch), batch["labels"])

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics."""
        numbers = self(batch)
        for scores in self.metrics(split):
            scores.update(numbers, batch["labels"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``numbers``, one for each row, [B]."""
        return {"numbers": self(batch)}
