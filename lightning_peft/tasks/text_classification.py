"""Text classification with any ``AutoModelForSequenceClassification``."""

from transformers import AutoModelForSequenceClassification

from lightning_peft.tasks.class_scores import HeadClassification


class TextClassification(HeadClassification):
    """Classify texts with a pretrained model and a head for the classes at hand; see `HeadClassification`."""

    auto = AutoModelForSequenceClassification
    what = "text classifier"
    of_texts = True
