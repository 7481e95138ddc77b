"""Text classification with any ``AutoModelForSequenceClassification``."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.class_scores import HeadClassification, MoreScores, class_config
from lightning_peft.tasks.pooling import PoolingTask

Pooling = Literal["model", "mean"]


class TextClassification(HeadClassification, PoolingTask):
    """Classify texts with a pretrained model and a head for the classes at hand; see `HeadClassification`.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes; None: those that the model was trained for.
        pooling: what the head sees of a text: what the model's own head sees, such as its first or its last token, or
            the mean of its last hidden states, by a linear head of its own.
        more_scores: as in `HeadClassification`.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForSequenceClassification
    what = "text classifier"
    of_texts = True
    pool = "mean"
    head: nn.Linear | None

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        pooling: Pooling = "model",
        more_scores: Sequence[MoreScores] = (),
        **kwargs: Any,
    ) -> None:
        if pooling == "model":
            super().__init__(model, labels, more_scores, **kwargs)
            self.head = None
            return
        PoolingTask.__init__(self, model, **kwargs)
        if pooling != "mean" or not labels:
            reason = "is no pooling: take model or mean" if pooling != "mean" else "has a head of its own: give labels="
            raise TuningError(f"pooling={pooling!r} {reason}.")
        self.auto = AutoModel
        self.backbone = self._load_base(**class_config(labels))
        if self.backbone.config.is_encoder_decoder:
            raise TuningError(f"{model} is an encoder-decoder: pooling='mean' needs an encoder or a decoder alone.")
        head = nn.Linear(self.backbone.config.hidden_size, len(labels))
        nn.init.normal_(head.weight, std=structure.initializer_range(self.backbone))
        nn.init.zeros_(head.bias)
        self.head = head
        self.score_classes(list(labels), more_scores)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits, [B, classes], in fp32."""
        if self.head is None:
            return super().forward(batch)
        batch = self.prepared(batch)
        hidden = self._pooled(self.backbone(**self.inputs(batch)).last_hidden_state, batch)
        logits: Tensor = self.head(hidden.to(self.head.weight.dtype)).float()
        return logits
