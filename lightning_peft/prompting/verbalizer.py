"""Verbalizers: the words that stand for each label in a language model's output.

A label has one word or several, a word has one token or several (its tokens are the business of `prompting.encoding`).
The score of a label is made of the log-likelihoods of its words: their ``mean`` (PET; the same order of labels as the
mean of logits), their ``max``, or the log of the ``sum`` of the likelihoods (calibration's AGNews: Technology +
Science).

Source: Schick and Schütze 2020 (2001.07676), section 3; Zhao et al. 2021 (2102.09690), appendix.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from typing import Literal

from lightning_peft.core.errors import TuningError

Combine = Literal["mean", "max", "sum"]
COMBINE: tuple[Combine, ...] = ("mean", "max", "sum")


class Verbalizer:
    """The words of each label.

    >>> verbalizer = Verbalizer({"world": "World", "tech": ["Technology", "Science"]})
    >>> verbalizer.labels, verbalizer.words
    (['world', 'tech'], ['World', 'Technology', 'Science'])
    >>> verbalizer.owners
    [0, 1, 1]
    >>> verbalizer.scores([-1.0, -2.0, -4.0])
    [-1.0, -3.0]

    Args:
        words: label -> its word or words.
        combine: how the scores of words make the score of their label.

    Raises:
        TuningError: a label has no word, or two labels share one.
    """

    def __init__(self, words: Mapping[str, str | Sequence[str]], combine: Combine = "mean") -> None:
        if combine not in COMBINE:
            raise TuningError(f"combine={combine!r} is no way to combine words: take {', '.join(COMBINE)}.")
        if len(words) < 2:
            raise TuningError(f"a verbalizer of {len(words)} labels leaves no choice: give words of two or more.")
        self.combine: Combine = combine
        self.of: dict[str, list[str]] = {
            str(label): [own] if isinstance(own, str) else [str(word) for word in own] for label, own in words.items()
        }
        owner: dict[str, str] = {}
        for label, own in self.of.items():
            if not own or not all(word.strip() for word in own):
                raise TuningError(f"label {label!r} has an empty word or none: give it one word or more.")
            for word in own:
                first = owner.setdefault(word.strip(), label)
                if first != label:
                    raise TuningError(f"labels {first!r} and {label!r} share the word {word!r}: give each its own.")
            if len({word.strip() for word in own}) < len(own):
                raise TuningError(f"label {label!r} has a word twice ({', '.join(own)}): give each once.")

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of their numbers."""
        return list(self.of)

    @property
    def words(self) -> list[str]:
        """The words of all labels, one label after the other."""
        return [word for own in self.of.values() for word in own]

    @property
    def owners(self) -> list[int]:
        """The number of the label of each word."""
        return [number for number, own in enumerate(self.of.values()) for _ in own]

    def ordered(self, labels: Iterable[str]) -> "Verbalizer":
        """Return the verbalizer with its labels in the order of the data.

        Raises:
            TuningError: a label has no words, or words have no label.
        """
        labels = list(labels)
        missing = [label for label in labels if label not in self.of]
        if missing:
            raise TuningError(f"the verbalizer has no word for {missing[0]!r}: give words to each of {labels}.")
        extra = [label for label in self.of if label not in labels]
        if extra:
            raise TuningError(f"the verbalizer has words for {extra[0]!r}, which is none of the labels {labels}.")
        return Verbalizer({label: self.of[label] for label in labels}, self.combine)

    def scores(self, words: Sequence[float]) -> list[float]:
        """Return the score of each label from those of the words."""
        own: list[list[float]] = [[] for _ in self.of]
        for owner, score in zip(self.owners, words, strict=True):
            own[owner].append(score)
        if self.combine == "mean":
            return [sum(scores) / len(scores) for scores in own]
        if self.combine == "max":
            return [max(scores) for scores in own]
        return [max(scores) + log(sum(exp(score - max(scores)) for score in scores)) for scores in own]

    def __repr__(self) -> str:
        return f"Verbalizer({self.of!r}, combine={self.combine!r})"
