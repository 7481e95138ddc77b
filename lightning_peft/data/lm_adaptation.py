"""Data for the prefix-LM objective: plain text cut in two, the first part as input, the second as target."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.sources import SourcedData
from lightning_peft.data.text_data import words


class LMAdaptationData(SourcedData):
    """Natural text, cut at a random place: ``input_ids`` before it, ``labels`` after it (Lester et al. 2021, 3.2).

    The texts are put end to end, each with its end-of-sequence token, and cut into pieces of ``max_length`` tokens. The
    place where a piece is cut in two is drawn once, from the seed and the number of the piece.

    Args:
        text: column of the text.
        shortest: the fewest tokens on either side of the cut.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(self, text: str = "text", shortest: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= shortest <= self.max_length // 2:
            raise TuningError(
                f"shortest={shortest} does not fit pieces of {self.max_length} tokens: "
                f"take 1 to {self.max_length // 2}."
            )
        self.text = text
        self.shortest = shortest

    def columns(self, split: str) -> Sequence[str]:
        """Return the column of the text."""
        return [self.text]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise, put end to end, and cut.

        Raises:
            TuningError: the texts together are shorter than a piece has to be.
        """
        arguments = {
            "tokenizer": self.tokenizer,
            "text": self.text,
            "max_length": self.max_length,
            "shortest": self.shortest,
            "seed": self.seed,
        }
        if not any(_cut(rows[: min(len(rows), 1000)], [0], **arguments).values()):
            raise TuningError(
                f"the texts of the {split} split are shorter than {2 * self.shortest} tokens together: give more text."
            )
        return _cut, arguments

    numbered = True


def _cut(
    rows: Mapping[str, list[Any]],
    numbers: Sequence[int],
    tokenizer: Any,
    text: str,
    max_length: int,
    shortest: int,
    seed: int,
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "length": []}
    for number, piece in enumerate(pieces(rows[text], tokenizer, max_length)):
        if len(piece) < 2 * shortest:
            continue
        place = random.Random(f"{seed} {numbers[0]} {number}").randint(shortest, len(piece) - shortest)
        out["input_ids"].append(piece[:place])
        out["attention_mask"].append([1] * place)
        out["labels"].append(piece[place:])
        out["length"].append(place)
    return out


def pieces(texts: Sequence[Any], tokenizer: Any, length: int) -> list[list[int]]:
    """Return the ids of texts put end to end, each with its end-of-sequence token, in pieces of so many tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(words(texts), add_special_tokens=False)["input_ids"]
    ids = list(chain.from_iterable([*row, *end] for row in encoded))
    return [ids[start : start + length] for start in range(0, len(ids), length)]
