"""The base class of data for text classification, wherever the texts come from."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_peft.core.errors import TuningError
from lightning_peft.data.bad_rows import numbered
from lightning_peft.data.classes import check_columns, class_names, class_numbers, warn_of_odd, warn_of_unlearned
from lightning_peft.data.token_data import TokenData


class TextData(TokenData):
    """Labelled texts; a subclass says in `rows` where they come from and names the columns, ``text`` and ``label``.

    A batch is a dict of ``input_ids`` and ``attention_mask`` [B, T], ``token_type_ids`` where the tokenizer gives them,
    and ``labels`` [B], except for prediction.

    Args:
        **kwargs: as in `TokenData`.
    """

    text: Sequence[str] = ("text",)
    """The columns of the text or of the pair of texts."""
    label: str = "label"
    """The column of the class."""

    @cached_property
    def label_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers in a batch."""
        rows = self.all_classes()
        check_columns(rows, "train", [self.label])
        names = list(class_names(rows, self.label, "train", self.skip_bad_rows).values())
        if len(names) < 2:
            raise TuningError(f"column {self.label!r} holds the classes {names}: a classifier needs two or more.")
        warn_of_odd(names, self.label, len(rows))
        return names

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    def has(self, split: str) -> bool:
        """Return whether a split has texts, once it is set up."""
        return split in self._encoded

    def class_loader(self, split: str, classes: Sequence[int], shuffle: bool = False) -> DataLoader[Any] | None:
        """Return batches of the texts of these classes, or None where a split has none of them."""
        numbered = self._split(split)
        chosen = np.flatnonzero(np.isin(numbered.with_format("numpy")["labels"][:], classes))
        if not len(chosen):
            return None
        rows = numbered.select(chosen)
        return self.batches_loader(rows, self.batches_of(rows, shuffle, **self.share), collate_fn=self._collate(split))

    def columns(self, split: str) -> Sequence[str]:
        """Return the text's columns, and that of the class."""
        return self.text if split == "predict" else [*self.text, self.label]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise the texts and number the classes.

        Raises:
            TuningError: a row has a class that the training rows lack.
        """
        numbers = (
            None if split == "predict" else class_numbers(rows, self.label, split, self.label_names, self.skip_bad_rows)
        )
        if split == "train" and numbers is not None:
            warn_of_unlearned(numbers, self.label_names, self.label)
        return _tokenise, {
            "tokenizer": self.tokenizer,
            "text": list(self.text),
            "label": self.label,
            "numbers": numbers,
            "max_length": self.max_length,
        }


def _tokenise(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    text: list[str],
    label: str,
    numbers: list[tuple[Any, int]] | None,
    max_length: int,
) -> dict[str, list[Any]]:
    encoded = encoded_texts(rows, tokenizer, text, max_length)
    if numbers is not None:
        encoded["labels"], encoded["problem"] = numbered(rows[label], label, dict(numbers))
    return encoded


def text_columns(text: str | list[str]) -> list[str]:
    """Return the columns of a text, or of a pair of texts.

    Raises:
        TuningError: there are not one or two of them.
    """
    columns = [text] if isinstance(text, str) else text
    if len(columns) not in (1, 2):
        raise TuningError(f"text={text!r} names {len(columns)} columns: name one, or two for pairs.")
    return columns


def encoded_texts(
    rows: Mapping[str, list[Any]], tokenizer: Any, text: Sequence[str], max_length: int
) -> dict[str, list[Any]]:
    """Return what a tokenizer makes of the texts, or pairs of texts, of rows, and how long each row is."""
    columns = [words(rows[column]) for column in text]
    encoded = dict(tokenizer(*columns, truncation=True, max_length=max_length))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return encoded


def words(column: Sequence[Any]) -> list[str]:
    """Return the values of a column as texts; a missing one is the empty text."""
    return ["" if value is None else str(value) for value in column]
