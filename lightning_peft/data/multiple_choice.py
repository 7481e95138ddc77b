"""Multiple choice: each row has a few options, one of which is right; the options are rows of a batch.

Forms of data sets are templates: `FORMS` has those of COPA, SWAG and RACE, whose columns are those of their files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from string import ascii_uppercase
from typing import Any, Literal

import torch
from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.bad_rows import shown
from lightning_peft.data.padding import Padder
from lightning_peft.data.sources import SourcedData
from lightning_peft.prompting.template import Template


@dataclass(frozen=True)
class Form:
    """How a data set asks.

    Args:
        first: template of the first text, such as the article; ``{option}`` is the option.
        second: template of the second text.
        options: the column that lists the options, or one column for each.
        label: column of the right one: its number from 0, its letter or its text.
        says: column -> value -> what it is called in the templates.
    """

    first: str
    second: str
    options: tuple[str, ...]
    label: str
    says: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


FORMS = {
    "plain": Form("{context}", "{question} {option}", ("options",), "label"),
    "copa": Form(
        "{premise} {question}", "{option}", ("choice1", "choice2"), "label",
        {"question": {"cause": "because", "effect": "so"}},
    ),
    "swag": Form("{sent1}", "{sent2} {option}", ("ending0", "ending1", "ending2", "ending3"), "label"),
    "race": Form("{article}", "{question} {option}", ("options",), "answer"),
}  # fmt: skip
FormName = Literal["plain", "copa", "swag", "race"]


class MultipleChoiceData(SourcedData):
    """Questions with options, for `MultipleChoice`.

    A batch of B questions with N options in all has ``input_ids``, ``attention_mask`` [N, T], ``row`` and ``option``
    [N], the number of the question and of the option in it, and ``labels`` [B], the number of the right option. What is
    too long is cut in the first text.

    Args:
        form: 'plain' (columns ``context``, ``question``, ``options``, ``label``), 'copa', 'swag' or 'race': which
            columns there are, and how they are put together; what follows changes single entries of it.
        first: template of the first text.
        second: template of the second text, with ``{option}``; "": there is none, and the first has it.
        options: the column that lists the options, or one column for each.
        label: column of the right option: its number from 0, its letter or its text.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        form: FormName = "plain",
        first: str | None = None,
        second: str | None = None,
        options: str | list[str] | None = None,
        label: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if form not in FORMS:
            raise TuningError(f"form={form!r} is no form of multiple choice: take {', '.join(FORMS)}.")
        own = FORMS[form]
        self.first = Template(own.first if first is None else first)
        text = own.second if second is None else second
        self.second = Template(text) if text else None
        self.options = [options] if isinstance(options, str) else list(options or own.options)
        self.label = label or own.label
        self.says = own.says
        if "option" not in self._fields:
            raise TuningError(f"no template of {form!r} shows the option: write {{option}} into first= or second=.")

    @property
    def _fields(self) -> list[str]:
        return [name for template in (self.first, self.second) if template is not None for name in template.fields]

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of the templates, of the options and of the right one."""
        names = [name for name in self._fields if name != "option"]
        return list(dict.fromkeys([*names, *self.options, *([] if split == "predict" else [self.label])]))

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of questions: their options are its rows."""
        return OptionRows(Padder.of(self.tokenizer, multiple=self.pad_to_multiple_of))

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise every option with its question.

        Raises:
            TuningError: a row has fewer than two options, or a right one that is none of them.
        """
        self.check_each(rows, split, partial(check_choice, options=self.options, label=self._label(split)))
        return _encode, {
            "tokenizer": self.tokenizer,
            "templates": [self.first.text, *([self.second.text] if self.second is not None else [])],
            "fields": [name for name in self._fields if name != "option"],
            "options": self.options,
            "label": self._label(split),
            "says": {name: dict(values) for name, values in self.says.items()},
            "max_length": self.max_length,
        }

    def _label(self, split: str) -> str | None:
        return None if split == "predict" else self.label


class OptionRows:
    """Makes a batch of questions, whose options become its rows.

    Args:
        pad: what makes a batch of rows.
    """

    def __init__(self, pad: Padder) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the batch."""
        if isinstance(rows, Mapping):
            rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        counts = [len(row["input_ids"]) for row in rows]
        by_option = [name for name in rows[0] if name in self.pad.fills and isinstance(rows[0][name], list)]
        batch = self.pad({name: [ids for row in rows for ids in row[name]] for name in by_option})
        batch["row"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        batch["option"] = torch.cat([torch.arange(count) for count in counts])
        for name in {"labels", "right"} & rows[0].keys() - {*by_option}:
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def number_of(value: Any, options: Sequence[str]) -> int:
    """Return the number of the right option, given by its text, its number from 0 or its letter.

    >>> number_of("soup", ["rice", "soup"]), number_of(1, ["rice", "soup"]), number_of("B", ["rice", "soup"])
    (1, 1, 1)

    Raises:
        TuningError: it is none of the options.
    """
    text = str(value).strip()
    found = -1
    if text in options:
        found = list(options).index(text)
    elif text.isdecimal():
        found = int(text)
    elif len(text) == 1:
        found = ascii_uppercase.find(text.upper())
    if not 0 <= found < len(options):
        raise TuningError(
            f"{value!r} names none of the {len(options)} options ({', '.join(options)}): give the number from 0, the "
            "letter or the text of the right one."
        )
    return found


def check_choice(row: Mapping[str, Any], options: Sequence[str], label: str | None) -> None:
    """See that a row has options, and that the right one is one of them.

    Raises:
        TuningError: it has fewer than two, or another one is right.
    """
    own = options_of(row, options)
    if label is not None:
        number_of(row[label], own)


def options_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the texts of a row's options: those that one column lists, or one of each column.

    Raises:
        TuningError: there are fewer than two, or no list of them.
    """
    listed = row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]
    if listed is not None and not isinstance(listed, list):
        raise TuningError(f"it has {shown(listed)} for its options: give a list, or name one column for each.")
    own = [str(option).strip() for option in listed or [] if option is not None]
    if len(own) < 2:
        raise TuningError(f"it has the options {own}, which leave no choice: give two or more.")
    return own


def _encode(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    templates: list[str],
    fields: list[str],
    options: list[str],
    label: str | None,
    says: Mapping[str, Mapping[str, str]],
    max_length: int,
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"length": []}
    for i in range(len(rows[options[0]])):
        own = options_of({column: rows[column][i] for column in options}, options)
        values = {name: says.get(name, {}).get(str(rows[name][i]), rows[name][i]) for name in fields}
        texts = [[Template(text).render({**values, "option": option}) for option in own] for text in templates]
        encoded = tokenizer(*texts, truncation="only_first" if len(texts) > 1 else True, max_length=max_length)
        for name, ids in encoded.items():
            out.setdefault(name, []).append(ids)
        out["length"].append(max(map(len, encoded["input_ids"])))
        if label is not None:
            out.setdefault("labels", []).append(number_of(rows[label][i], own))
    return out
