"""Pairs of texts that belong together, with texts that do not, or with a score of how alike they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.bad_rows import BadRowError, check_text, is_number, shown
from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.padding import Padder, columns_of


class SentencePairsData(CheckedRows):
    """Pairs, triplets or scored pairs of texts, for the task `SentenceEmbedding`.

    A batch of B rows has ``sides`` times B rows of tokens: the anchors, then the texts that belong to them, then, of
    triplets, those that do not; ``scores`` [B], of scored pairs.

    Args:
        anchor: column of the first text, such as a question.
        positive: column of the text that belongs to it, such as an answer; of scored pairs, the second text.
        negative: column of a text that is like it and does not belong to it; None: there is none.
        score: column of the score of a pair, a number; None: pairs belong together.
        anchor_prompt: what to put before each anchor, such as "query: ".
        positive_prompt: what to put before each of the other texts.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        anchor: str = "anchor",
        positive: str = "positive",
        negative: str | None = None,
        score: str | None = None,
        anchor_prompt: str = "",
        positive_prompt: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if negative is not None and score is not None:
            raise TuningError(f"negative={negative!r} and score={score!r} are of two kinds of rows: give one of them.")
        self.texts = [name for name in (anchor, positive, negative) if name is not None]
        self.scored = score
        self.prompts = [anchor_prompt, positive_prompt, positive_prompt][: len(self.texts)]

    @property
    def is_scored(self) -> bool:
        """Whether pairs have scores."""
        return self.scored is not None

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of the texts, and of the score; a row to predict needs the first text alone."""
        return self.texts[:1] if split == "predict" else [*self.texts, *([self.scored] if self.scored else [])]

    def sides(self, split: str) -> Sequence[str]:
        """Return the columns of the texts; of scored pairs, which are alike both ways, none."""
        return [] if self.is_scored or split == "predict" else self.texts

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise all sides."""
        names = self.columns(split)
        return _tokenised, {
            "tokenizer": self.tokenizer,
            "texts": [name for name in names if name != self.scored],
            "score": self.scored if self.scored in names else None,
            "prompts": self.prompts,
            "max_length": self.max_length,
        }

    def padder(self, split: str) -> "SidesPadder":
        """Return what makes a batch of all sides."""
        return SidesPadder(Padder.of(self.tokenizer, multiple=self.pad_to_multiple_of))


class SidesPadder:
    """Makes one batch of tokens of all sides of rows, side after side.

    Args:
        pad: makes a batch of single texts.
    """

    def __init__(self, pad: Padder) -> None:
        self.pad = pad

    def __call__(self, rows: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of a list of rows, or of a mapping of columns."""
        rows = columns_of(rows)
        sides = len(rows["ids"][0])
        ids = [texts[side] for side in range(sides) for texts in rows["ids"]]
        batch = self.pad({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        return batch | {"sides": sides} | (self.pad({"scores": rows["score"]}) if "score" in rows else {})


def _tokenised(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    texts: list[str],
    score: str | None,
    prompts: list[str],
    max_length: int,
) -> dict[str, list[Any]]:
    """Return the tokens of all sides of each row, or what is wrong with it as ``problem``."""
    out: list[dict[str, Any]] = []
    for number in range(len(rows[texts[0]])):
        row: dict[str, Any] = {"ids": [], "problem": "", "length": 0} | ({"score": 0.0} if score else {})
        try:
            said = [check_text(rows[name][number], name) for name in texts]
            _check_differ(said, texts, score)
            if score is not None:
                row["score"] = _number(rows[score][number], score)
            whole = [prompt + text for prompt, text in zip(prompts, said, strict=False)]
            row["ids"] = tokenizer(whole, truncation=True, max_length=max_length)["input_ids"]
            row["length"] = max(map(len, row["ids"]))
        except BadRowError as error:
            row["problem"] = str(error)
        out.append(row)
    return {name: [row[name] for row in out] for name in out[0]}


def _check_differ(said: list[str], names: list[str], score: str | None) -> None:
    for number, text in enumerate(said):
        if score is None and text in said[:number]:
            other = names[said.index(text)]
            raise BadRowError(f"has the same text in columns {other!r} and {names[number]!r}: leave the row out.")


def _number(value: Any, name: str) -> float:
    if not is_number(value):
        raise BadRowError(f"has {shown(value)} in column {name!r}: give a number.")
    return float(value)
