"""Data for extractive question answering in the form of SQuAD: windows of a context, and spans of tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.padding import Padder
from lightning_peft.data.sources import SourcedData
from lightning_peft.data.text_data import words


class QuestionAnsweringData(SourcedData):
    """Questions about a context, with answers that stand in it, in the form of SQuAD.

    A context longer than ``max_length`` is read in windows that overlap by ``stride`` tokens. A batch row is a window:
    beside the inputs ``start_positions`` and ``end_positions`` [B] (0 where the window has no answer), ``question`` [B]
    (the number of the row it is of), and as lists ``offsets`` (first and last character of each token; none for what
    is not of the context), ``context`` and ``answers``.

    Args:
        question: column of the question.
        context: column of the text that answers it.
        answers: column of the answers: a dict of the lists ``text`` and ``answer_start`` [characters]; empty lists
            where the context does not answer.
        stride: how many tokens two windows share.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    numbered = True

    def __init__(
        self,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        stride: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= stride < self.max_length:
            raise TuningError(f"stride={stride} does not fit windows of {self.max_length} tokens: take fewer, or 0.")
        self.question = question
        self.context = context
        self.answers = answers
        self.stride = stride

    def columns(self, split: str) -> Sequence[str]:
        """Return the three columns; a row to predict needs no answer."""
        return [self.question, self.context, *([self.answers] if split != "predict" else [])]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise question and context, and find the tokens of the answers.

        Raises:
            TuningError: an answer does not stand where it is said to stand, or questions leave no room for contexts.
        """
        if not self.tokenizer.is_fast:
            raise TuningError(f"{self.tokenizer_name} does not say where a token stands: take a fast tokenizer.")
        if split != "predict":
            for number, (context, answers) in enumerate(zip(rows[self.context], rows[self.answers], strict=True)):
                _check_answers(self.row_name(split, number), context, answers)
        questions = self.tokenizer(words(rows[self.question][:]), add_special_tokens=False)["input_ids"]
        longest = max(map(len, questions))
        room = self.max_length - longest - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            raise TuningError(
                f"a question of {longest} tokens leaves {max(room, 0)} of max_length={self.max_length} for its "
                f"context, and windows share stride={self.stride}: raise max_length or lower stride."
            )
        return _tokenise, {
            "tokenizer": self.tokenizer,
            "names": (self.question, self.context, self.answers if split != "predict" else None),
            "max_length": self.max_length,
            "stride": self.stride,
        }

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of rows; padding is on the right, so that spans stay."""
        return Padder.of(self.tokenizer, "right", self.pad_to_multiple_of)


def _check_answers(where: str, context: str, answers: Any) -> None:
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
        raise TuningError(f"{where} has answers {answers!r}: give a dict of the lists text and answer_start.")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise TuningError(f"{where} has unlike many answers and starts of answers: give one start an answer.")
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise TuningError(f"{where} has {found!r} at character {start}, not its answer {text!r}: mend the start.")


def _tokenise(
    rows: Mapping[str, list[Any]],
    numbers: Sequence[int],
    tokenizer: Any,
    names: tuple[str, str, str | None],
    max_length: int,
    stride: int,
) -> dict[str, list[Any]]:
    question, context, answers = names
    contexts = words(rows[context])
    encoded = tokenizer(
        words(rows[question]),
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    of, spans = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    windows = []
    for i, row in enumerate(of):
        parts = encoded.sequence_ids(i)
        offsets = [list(span) if part == 1 else [] for span, part in zip(spans[i], parts, strict=True)]
        ids = encoded["input_ids"][i]
        nowhere = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        given = rows[answers][row] if answers is not None else {"text": [], "answer_start": []}
        start, end = _span(offsets, given, nowhere)
        windows.append(
            {
                "start_positions": start,
                "end_positions": end,
                "question": numbers[row],
                "offsets": offsets,
                "context": contexts[row],
                "answers": list(given["text"]),
                "length": len(ids),
            }
        )
    return dict(encoded) | {name: [window[name] for window in windows] for name in windows[0]}


def _span(offsets: Sequence[Sequence[int]], answers: Mapping[str, Any], nowhere: int) -> tuple[int, int]:
    """Return the first and last token of the first answer; both are ``nowhere`` if it is not all in this window."""
    if not answers["text"]:
        return nowhere, nowhere
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [i for i, span in enumerate(offsets) if span and span[0] < end and span[1] > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return nowhere, nowhere
    return inside[0], inside[-1]
