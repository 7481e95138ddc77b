"""One class for each image, by any ``AutoModelForImageClassification``."""

from typing import Any

from torch import Tensor
from transformers import AutoModelForImageClassification

from lightning_peft.tasks.base import class_config
from lightning_peft.tasks.text_classification import ClassScores


class ImageClassification(ClassScores):
    """Classify images with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes; None: those that the model was trained for.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForImageClassification
    what = "image classifier"

    def __init__(self, model: str, labels: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load(problem_type="single_label_classification", **class_config(labels))
        self.score_classes(list(self.backbone.config.id2label.values()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits, [B, classes], in fp32."""
        logits: Tensor = self.backbone(**self.inputs(batch)).logits
        return logits.float()
