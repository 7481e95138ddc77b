"""One class for each image, by any ``AutoModelForImageClassification``."""

from transformers import AutoModelForImageClassification

from lightning_peft.tasks.class_scores import HeadClassification


class ImageClassification(HeadClassification):
    """Classify images with a pretrained model and a head for the classes at hand; see `HeadClassification`."""

    auto = AutoModelForImageClassification
    what = "image classifier"
