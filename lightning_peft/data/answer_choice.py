"""Questions whose answer is one of a few texts, for language models that write: each option is a target."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.data.multiple_choice import OptionRows, check_choice, number_of, options_of
from lightning_peft.data.padding import Padder
from lightning_peft.data.sources import SourcedData
from lightning_peft.prompting.encoding import encode, text_ids
from lightning_peft.prompting.template import Template

WriterStyle = Literal["seq2seq", "causal"]


class AnswerChoiceData(SourcedData):
    """Questions with options, for `AnswerChoice`.

    A batch of B questions with N options in all has a row for each option: ``input_ids``, ``attention_mask`` [N, T],
    ``labels``, the tokens of the option with the end of the text, [N, L] for an encoder-decoder, [N, T] behind the
    question for a causal model; ``row`` and ``option`` [N], the number of the question and of the option in it, and
    ``right`` [B], the number of the right option. What is too long is cut where a row's fields are.

    Args:
        template: the question, in the syntax of `lightning_peft.prompting.template`; the answer follows it.
        options: the column that lists the options of a row, or one column for each.
        words: label -> the text that says it, where all rows have the same options; in place of ``options``.
        label: column of the right option: its number from 0, its letter or its text, or with ``words`` the label.
        style: 'seq2seq' for an encoder-decoder, 'causal' for a causal model.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        template: str = "{context} {question}",
        options: str | list[str] = "options",
        words: dict[str, str] | None = None,
        label: str = "label",
        style: WriterStyle = "seq2seq",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.template = Template(template)
        if self.template.after or self.template.is_cloze:
            raise TuningError(f"{self.template} goes on behind the answer: end it with {{answer}}, or leave that out.")
        if words is not None and len(words) < 2:
            raise TuningError(f"words={words} leave no choice: give two labels or more.")
        self.options = [] if words else [options] if isinstance(options, str) else list(options)
        self.words, self.label, self.style = words, label, style

    def columns(self, split: str) -> Sequence[str]:
        """Return the fields of the template, the columns of the options, and that of the right one."""
        return list(
            dict.fromkeys([*self.template.fields, *self.options, *([] if split == "predict" else [self.label])])
        )

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of questions: their options are its rows; padding is on the right."""
        return OptionRows(Padder.of(self.tokenizer, "right", self.pad_to_multiple_of))

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise every option behind its question.

        Raises:
            TuningError: a row has fewer than two options, or a right one that is none of them.
        """
        self.template.check_columns(rows.column_names)
        label = None if split == "predict" else self.label
        self.check_each(rows, split, partial(_check, options=self.options, words=self.words, label=label))
        return _encode, {
            "tokenizer": self.tokenizer,
            "template": self.template.text,
            "options": self.options,
            "words": self.words,
            "label": label,
            "style": self.style,
            "max_length": self.max_length,
        }


def _check(row: Mapping[str, Any], options: list[str], words: Mapping[str, str] | None, label: str | None) -> None:
    """See that a row has options, and that the right one is one of them."""
    if not words:
        check_choice(row, options, label)
    elif label is not None:
        _number(row[label], list(words))


def _encode(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    template: str,
    options: list[str],
    words: Mapping[str, str] | None,
    label: str | None,
    style: WriterStyle,
    max_length: int,
) -> dict[str, list[Any]]:
    asked = Template(template)
    names = ["input_ids", "attention_mask", "labels", "length"] + (["right"] if label is not None else [])
    out: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(len(next(iter(rows.values())))):
        row = {name: values[i] for name, values in rows.items()}
        own = list(words.values()) if words else options_of(row, options)
        targets = [_answer(tokenizer, asked, text, style) for text in own]
        room = max_length - (max(map(len, targets)) if style == "causal" else 0)
        question = encode(asked, tokenizer, row, style=style, max_length=room, options=own).input_ids
        behind = style == "causal"
        out["input_ids"].append([question + target if behind else question for target in targets])
        out["attention_mask"].append([[1] * len(ids) for ids in out["input_ids"][-1]])
        out["labels"].append([[IGNORED] * len(question) + target if behind else target for target in targets])
        out["length"].append(max(map(len, out["input_ids"][-1])))
        if label is not None:
            out["right"].append(_number(row[label], list(words)) if words else number_of(row[label], own))
    return out


def _answer(tokenizer: Any, template: Template, text: str, style: WriterStyle) -> list[int]:
    """Return the tokens of an answer with the end of a text, if the tokenizer has one."""
    if style == "seq2seq":
        ids: list[int] = tokenizer(text_target=text.strip())["input_ids"]
        return ids
    end = tokenizer.eos_token_id
    lead = template.lead
    return text_ids(tokenizer, lead + text.strip(), joins=bool(lead)) + ([] if end is None else [end])


def _number(value: Any, labels: Sequence[str]) -> int:
    if str(value) not in labels:
        raise TuningError(f"label {value!r} has no words: add it to words=, which has {', '.join(labels)}.")
    return labels.index(str(value))
