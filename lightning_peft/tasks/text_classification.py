"""One class for each text, by any ``AutoModelForSequenceClassification``."""

from transformers import AutoModelForSequenceClassification

from lightning_peft.tasks.class_scores import HeadClassification


class TextClassification(HeadClassification):
    """Classify texts with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes.
    """

    auto = AutoModelForSequenceClassification
    what = "text classifier"
