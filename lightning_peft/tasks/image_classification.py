"""One class for each image, by any ``AutoModelForImageClassification``."""

from transformers import AutoModelForImageClassification

from lightning_peft.tasks.class_scores import HeadClassification


class ImageClassification(HeadClassification):
    """Classify images with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes.
    """

    auto = AutoModelForImageClassification
    what = "image classifier"
