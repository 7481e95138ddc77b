"""Data for text classification from files or from the Hugging Face hub."""

from typing import Any

from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.text_data import TextData, text_columns


class TextClassificationData(CheckedRows, TextData):
    """Texts and their classes from CSV, JSON lines or Parquet files, or from a dataset of the Hugging Face hub.

    >>> data = TextClassificationData(tokenizer="bert-base-uncased", train="reviews.csv", text=["title", "body"])
    >>> data.text
    ['title', 'body']

    Args:
        text: column of the text, or a list of two columns for pairs.
        label: column of the class: strings, integers or class labels.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(self, text: str | list[str] = "text", label: str = "label", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.text = text_columns(text)
        self.label = label
