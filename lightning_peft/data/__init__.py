"""LightningDataModules: what is trained on."""

from lightning_peft.data.stdlib_docstrings import StdlibDocstrings
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.data.text_data import TextData

__all__ = ["StdlibDocstrings", "TextClassificationData", "TextData"]
