"""LightningModules: what is trained for."""

from lightning_peft.tasks.text_classification import TextClassification

__all__ = ["TextClassification"]
