"""Data for text regression: a number for each text or pair of texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.bad_rows import is_number
from lightning_peft.data.sources import SourcedData
from lightning_peft.data.text_data import encoded_texts, text_columns


class TextRegressionData(SourcedData):
    """Texts, or pairs of texts, and a number for each, from files or the Hugging Face hub.

    A batch is a dict of ``input_ids`` and ``attention_mask`` [B, T], ``token_type_ids`` where the tokenizer gives them,
    and ``labels`` [B], except for prediction.

    Args:
        text: column of the text, or a list of two columns for pairs.
        label: column of the number.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(self, text: str | list[str] = "text", label: str = "label", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.text = text_columns(text)
        self.label = label

    def columns(self, split: str) -> Sequence[str]:
        """Return the text's columns, and that of the number."""
        return self.text if split == "predict" else [*self.text, self.label]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise the texts.

        Raises:
            TuningError: a row has no number.
        """
        if split != "predict":
            for number, value in enumerate(rows[self.label]):
                if not is_number(value):
                    raise TuningError(
                        f"{self.row_name(split, number)} has {value!r} in column {self.label!r}, which is no number: "
                        "give one, or take TextClassificationData for classes."
                    )
        return _tokenise, {
            "tokenizer": self.tokenizer,
            "text": self.text,
            "label": None if split == "predict" else self.label,
            "max_length": self.max_length,
        }


def _tokenise(
    rows: Mapping[str, list[Any]], tokenizer: Any, text: list[str], label: str | None, max_length: int
) -> dict[str, list[Any]]:
    encoded = encoded_texts(rows, tokenizer, text, max_length)
    if label is not None:
        encoded["labels"] = [float(number) for number in rows[label]]
    return encoded
