"""The base class of text data: tokenises rows, caches them, and loads padded batches bucketed by length."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_tokenizer
from lightning_peft.data.bad_rows import check_good, other_names
from lightning_peft.data.batches import Batches
from lightning_peft.data.classes import check_columns
from lightning_peft.data.module import SPLITS, DataModule, check_least
from lightning_peft.data.padding import Padder

Encoding: TypeAlias = Callable[[Dataset, str], tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]]
"""From rows and their split to a function of their columns, with its keyword arguments."""


class TokenData(DataModule):
    """Tokenised rows; a subclass says in `rows` where they come from, and in `encoding` what they become.

    A batch is a dict. The rows of a training batch are a function of the seed and the epoch, and a training loader goes
    on inside an epoch where its checkpoint was written. Tokenised rows are kept in the cache of Hugging Face
    ``datasets``.

    Args:
        tokenizer: folder or hub id of the tokenizer, as a rule that of the model.
        max_length: where a row is cut [tokens].
        batch_size: rows of a batch on each device.
        num_workers: how many processes pad batches; the texts are tokenised already, so none is mostly fastest.
        bucket: whether texts of like length share batches, which spares padding.
        pad_to_multiple_of: round the length of a batch up to a multiple, which suits some accelerators [tokens].
        seed: of the order of the training rows, and of the splits that are drawn.
    """

    numbered = False
    """Whether the function of `encoding` is told the numbers of the rows, as its second argument."""
    skip_bad_rows = False
    """Whether rows that cannot be used are left out."""

    def __init__(
        self,
        tokenizer: str,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        bucket: bool = True,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_least(1, max_length=max_length, batch_size=batch_size)
        check_least(0, seed=seed)
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.bucket = bucket
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self._encoded: dict[str, Dataset] = {}
        self._encoding: Encoding | None = None

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns that the rows of a split must have; those to predict have no labels."""
        raise NotImplementedError

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Return a function from columns of rows to columns of a batch, and its keyword arguments.

        It is a function of a module, so that ``datasets`` finds its result in the cache. It gives ``length``, by which
        rows share batches, and may give more rows than it gets, or fewer; one that gives as many may say in ``problem``
        what is wrong with each, or nothing.

        Raises:
            TuningError: the rows cannot be encoded.
        """
        raise NotImplementedError

    def encode_as(self, encoding: Encoding | None) -> None:
        """Encode rows by another function than `encoding`, for a task that makes its own inputs; None: by `encoding`.

        What the function's result leaves as it is reaches the task as lists, numbers as tensors.
        """
        self._encoding, self._encoded = encoding, {}

    @property
    def encodes_otherwise(self) -> bool:
        """Whether a task encodes the rows in its own way."""
        return self._encoding is not None

    def finished(self, encoded: Dataset, split: str) -> Dataset:
        """Return the rows of a split as they are loaded, from those that nothing is wrong with."""
        return encoded

    def problems(self, encoded: Dataset, rows: Dataset, split: str) -> dict[int, str]:
        """Return number of a row -> what is wrong with it, of which the function of `encoding` may say ``problem``."""
        texts = encoded["problem"] if "problem" in encoded.column_names else ()
        return {number: text for number, text in enumerate(texts) if text}

    def row_name(self, split: str, number: int) -> str:
        """Return what an error calls a row, counted from 1 as the user has the rows; ``number`` is from 0 as we do."""
        return f"row {number + 1} of the {split} split"

    def check_each(self, rows: Dataset, split: str, check: Callable[[Mapping[str, Any]], Any]) -> None:
        """See that no row makes a check raise a `TuningError`.

        Raises:
            TuningError: one does; it is named.
        """
        for number, row in enumerate(rows):
            try:
                check(row)
            except TuningError as error:
                raise TuningError(f"{self.row_name(split, number)} cannot be used: {error}") from None

    def usable(self, split: str) -> Dataset | None:
        """Return the rows of a split without those that are left out, or None where there is no such split."""
        rows = self.rows(split)
        bad = None if rows is None else self._looked_at(rows, split)[1]
        return rows.select(_others(len(rows), bad)) if rows is not None and bad else rows

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of rows."""
        return Padder.of(self.tokenizer, multiple=self.pad_to_multiple_of)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; one without a padding token pads with its end-of-sequence token, which the mask hides."""
        tokenizer = load_tokenizer(self.tokenizer_name)
        if self.max_length > tokenizer.model_max_length:
            raise TuningError(
                f"max_length={self.max_length} is longer than the {tokenizer.model_max_length} tokens of "
                f"{self.tokenizer_name}: take {tokenizer.model_max_length} or less."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The first call changes the tokenizer's state, and with it the hash that cached texts are found by
        # (https://github.com/huggingface/transformers/issues/8739).
        tokenizer("", truncation=True, max_length=self.max_length)
        return tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that 'fit', 'validate', 'test' or 'predict' needs.

        Raises:
            TuningError: a split is not there, is empty, lacks a column, or holds what cannot be encoded.
        """
        for split in SPLITS[stage]:
            if split not in self._encoded:
                rows = self.rows(split)
                if rows is not None:
                    self._encoded[split] = self._encode(rows, split)
        self.check_loaders(stage)

    def check_loaders(self, stage: str) -> None:
        """See that a stage has its rows, and that they go round the processes, before a loader is made.

        An error that a loader raises comes late, and leaves what Lightning replaces in torch's loaders where it is.

        Raises:
            TuningError: a split is not there, or has fewer rows than there are processes.
        """
        for split in SPLITS[stage]:
            if split == "validation" and split not in self._encoded:
                continue
            self._split(split)
            if split != "predict" and self.share:
                self.batches(split, shuffle=split == "train", **self.share)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in another order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation batches, or none where there is no such split."""
        return self._loader("validation") if "validation" in self._encoded else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the rows to predict in their own order."""
        return self.plain_loader(self._split("predict"), collate_fn=self._collate("predict"))

    def batches(self, split: str, shuffle: bool, **share: Any) -> Batches:
        """Return which rows make which batch; ``share`` says how many processes there are, and which this one is."""
        return self.batches_of(self._split(split), shuffle, **share)

    def batches_of(self, rows: Dataset, shuffle: bool, **share: Any) -> Batches:
        """Return which of these encoded rows make which batch."""
        lengths = rows.with_format("numpy")["length"][:]
        return Batches(lengths, self.batch_size, shuffle, self.bucket, self.seed, **share)

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        rows, collate = self._split(split), self._collate(split)
        if self.overfits:
            return self.plain_loader(rows, collate_fn=collate)
        return self.batches_loader(rows, self.batches(split, shuffle, **self.share), collate_fn=collate)

    def _collate(self, split: str) -> Callable[..., dict[str, Any]]:
        return Padder({}) if self._encoding else self.padder(split)

    def _split(self, split: str) -> Dataset:
        if split not in self._encoded:
            raise TuningError(f"{type(self).__name__} has no {split} rows: give it a {split} split.")
        return self._encoded[split]

    def _encode(self, rows: Dataset, split: str) -> Dataset:
        check_columns(rows, split, self.columns(split))
        if not len(rows):
            raise TuningError(f"the {split} split is empty: give it at least one row.")
        encoded, bad = self._looked_at(rows, split)
        if bad:
            encoded = encoded.select(_others(len(encoded), bad))
        if not self.encodes_otherwise:
            encoded = self.finished(encoded, split)
        if not len(encoded):
            raise TuningError(f"no row of the {split} split is left: see what is asked of rows.")
        return encoded.with_format(None, columns=[name for name in encoded.column_names if name != "length"])

    def _looked_at(self, rows: Dataset, split: str) -> tuple[Dataset, Mapping[int, str]]:
        """Return the encoded rows, and the numbers of those that are to be left out, with what is wrong with them.

        Raises:
            TuningError: there are others, and they are not to be skipped.
        """
        function, arguments = (self._encoding or self.encoding)(rows, split)
        encoded = rows.map(
            function,
            batched=True,
            with_indices=self.numbered,
            fn_kwargs=arguments,
            remove_columns=rows.column_names,
            desc=f"Tokenising {split}",
        ).with_format(None)
        bad = self.problems(encoded, rows, split)
        if "problem" in encoded.column_names:
            encoded = encoded.remove_columns("problem")
        if bad:
            first = min(bad)
            text = other_names(rows, first, self.columns(split)) or bad[first]
            check_good(len(bad), len(encoded), f"{self.row_name(split, first)} {text}", self.skip_bad_rows, split)
        return encoded, bad


def _others(count: int, bad: Mapping[int, str]) -> list[int]:
    return [number for number in range(count) if number not in bad]
