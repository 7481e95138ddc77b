"""Data for token classification (NER, tagging): lists of words with one tag a word."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.select import near
from lightning_peft.data.classes import check_columns
from lightning_peft.data.sources import SourcedData


class TokenClassificationData(SourcedData):
    """Sentences as lists of words, and a tag for each word.

    A batch has ``labels`` [B, T]: the number of the tag at the first token of each word, -100 elsewhere. In a batch to
    predict it is 0 at the first token of each word. Words beyond ``max_length`` tokens are left out.

    Args:
        words: column of the words, a list of texts.
        tags: column of the tags, a list of texts or of class labels.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(self, words: str = "tokens", tags: str = "tags", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words = words
        self.tags = tags

    @cached_property
    def label_names(self) -> list[str]:
        """The tags, in the order of their numbers in a batch."""
        rows = self.all_classes()
        check_columns(rows, "train", [self.tags])
        if (names := _tag_names(rows, self.tags)) is not None:
            return list(names)
        _check_lists(rows, "train", self.tags)
        return sorted({str(tag) for tag in chain.from_iterable(rows[self.tags][:])}, key=lambda tag: (tag != "O", tag))

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of words and tags."""
        return [self.words] if split == "predict" else [self.words, self.tags]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise the words and number the tags.

        Raises:
            TuningError: a column holds no lists, a row has more tags than words, or a tag that the training rows lack.
        """
        _check_lists(rows, split, self.words)
        if not self.tokenizer.is_fast:
            raise TuningError(f"{self.tokenizer_name} does not say which word a token is of: take a fast tokenizer.")
        arguments = {"tokenizer": self.tokenizer, "words": self.words, "tags": None, "max_length": self.max_length}
        if split == "predict":
            return _tokenise, arguments
        _check_lists(rows, split, self.tags)
        names = _tag_names(rows, self.tags)
        numbers = {}
        for number, (words, tags) in enumerate(zip(rows[self.words], rows[self.tags], strict=True)):
            if len(words) != len(tags):
                raise TuningError(f"{self.row_name(split, number)} has {len(words)} words and {len(tags)} tags.")
            for tag in tags:
                name = names[tag] if names is not None else str(tag)
                if name not in self.label_names:
                    raise TuningError(
                        f"the {split} split has tag {name!r}, which train has not{near(name, self.label_names)}."
                    )
                numbers[tag] = self.label_names.index(name)
        return _tokenise, arguments | {"tags": self.tags, "numbers": list(numbers.items())}


def _tag_names(rows: Dataset, column: str) -> list[str] | None:
    """Return the names of the tags where the column's type has them."""
    feature = rows.features[column]
    own = feature.feature if isinstance(feature, (List, LargeList)) else None
    return own.names if isinstance(own, ClassLabel) else None


def _check_lists(rows: Dataset, split: str, column: str) -> None:
    values = rows[column][:]
    wrong = next((value for value in values if not isinstance(value, list) or None in value), [])
    if wrong or not isinstance(wrong, list):
        raise TuningError(f"column {column!r} of the {split} split holds {wrong!r}: give a list with one entry a word.")
    if any(not value for value in values):
        raise TuningError(f"column {column!r} of the {split} split has rows without words: leave them out.")


def _tokenise(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    words: str,
    tags: str | None,
    max_length: int,
    numbers: Sequence[tuple[Any, int]] = (),
) -> dict[str, list[Any]]:
    texts = [[str(word) for word in row] for row in rows[words]]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    number = dict(numbers)
    labels = []
    for i, row in enumerate(texts):
        own = [number[tag] for tag in rows[tags][i]] if tags is not None else [0] * len(row)
        places, before = [], None
        for word in encoded.word_ids(i):
            places.append(IGNORED if word is None or word == before else own[word])
            before = word
        labels.append(places)
    return dict(encoded) | {"labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}
