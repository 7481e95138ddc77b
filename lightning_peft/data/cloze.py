"""Data for cloze prompts: a template puts a row's fields around the gap where a language model says the answer."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.data.bad_rows import BadRowError, check_any, check_label, is_blank, shown
from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.classes import check_columns, class_names, class_numbers
from lightning_peft.data.padding import Padder
from lightning_peft.prompting.encoding import encode, verbalizer_ids, word_ids
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.verbalizer import Verbalizer

LMStyle = Literal["masked", "causal"]


class ClozeData(CheckedRows):
    """Rows in a template, for a masked or a causal language model.

    A row is cut to ``max_length`` where its fields are, never in the template, the mask or the soft prompt.

    Args:
        template: the text around the fields of a row, in the syntax of `lightning_peft.prompting.template`, e.g.
            "{text} It was {mask}." or, for a causal model, "Review: {text} Sentiment: {answer}"; "{v:3}" is a soft
            prompt of three virtual tokens.
        style: 'masked' or 'causal'; None: masked if the tokenizer has a mask.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(self, template: str, style: LMStyle | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.template = Template(template)
        self._style = style

    @property
    def style(self) -> LMStyle:
        """What sort of model fills the gap."""
        return self._style or style_of(self.tokenizer)

    @property
    def lead(self) -> str:
        """The blank in front of the answer, or nothing."""
        return self.template.lead

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of rows; padding is on the right."""
        return Padder.of(self.tokenizer, "right", self.pad_to_multiple_of)

    def _arguments(self, rows: Dataset, masks: int) -> dict[str, Any]:
        self.template.check_columns(rows.column_names)
        if self.style == "masked":
            self.template.cloze()
        return {
            "tokenizer": self.tokenizer,
            "template": self.template.text,
            "fields": list(self.template.fields),
            "style": self.style,
            "max_length": self.max_length,
            "masks": masks,
        }


class ClozeClassificationData(ClozeData):
    """Labelled rows in a template; the words of a verbalizer say the labels (PET).

    Args:
        template: as in `ClozeData`.
        verbalizer: label -> the word, or the words, that say it, e.g. {good: great, bad: terrible}.
        label: column of the label: strings, integers or class labels.
        multi_token: whether words of several tokens may say a label.
        **kwargs: as in `ClozeData`, `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        template: str,
        verbalizer: dict[str, str | list[str]],
        label: str = "label",
        multi_token: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(template, **kwargs)
        self.label = label
        self.multi_token = multi_token
        self._verbalizer = Verbalizer(verbalizer)

    @cached_property
    def label_names(self) -> list[str]:
        """The labels, in the order of their numbers in a batch."""
        rows = self.all_classes()
        check_columns(rows, "train", [self.label])
        return list(class_names(rows, self.label, "train", skip=True).values())

    @cached_property
    def verbalizer(self) -> dict[str, list[str]]:
        """The words of each label, in the order of the labels."""
        return self._verbalizer.ordered(self.label_names).of

    @cached_property
    def masks(self) -> int:
        """How many tokens the longest word has."""
        words = Verbalizer(self.verbalizer)
        return max(map(len, verbalizer_ids(words, self.tokenizer, self.lead, self.multi_token)))

    def columns(self, split: str) -> Sequence[str]:
        """Return the fields of the template, and the column of the label."""
        return [*self.template.fields, *([self.label] if split != "predict" else [])]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Put the rows into the template and number the labels.

        Raises:
            TuningError: the template does not fit the rows, or a word the tokenizer.
        """
        labelled = split != "predict"
        return _fill, self._arguments(rows, self.masks) | {
            "label": self.label,
            "numbers": class_numbers(rows, self.label, split, self.label_names, skip=True) if labelled else None,
        }


class KnowledgeProbingData(ClozeData):
    """Facts of one relation with their object left out, as in LAMA; a fact's object is one token.

    Args:
        template: the relation in words; the column of the object stands for the gap, e.g. "{sub} was born in {obj} ."
            or, with a soft prompt, "{v:3} {sub} {v:3} {obj} {v:3}".
        obj: column of the object.
        vocabulary: a file with one object a line, or a list: what the model chooses from; None: the objects of all
            splits.
        unknown: what to do with a fact whose object is no candidate of one token: 'error', or 'drop' it, as LAMA does.
        where: column -> value, keeps the facts that have these values, e.g. {predicate_id: P19}.
        **kwargs: as in `ClozeData`, `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        template: str,
        obj: str = "obj",
        vocabulary: str | list[str] | None = None,
        unknown: Literal["error", "drop"] = "error",
        where: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(template, **kwargs)
        self.obj = obj
        self.unknown = unknown
        self.where = where or {}
        self._vocabulary = vocabulary
        if f"{{{obj}}}" in template:
            gap = "{mask}" if self.style == "masked" else "{answer}"
            self.template = Template(template.replace(f"{{{obj}}}", gap))

    def rows(self, split: str) -> Dataset | None:
        """Return the facts of a split."""
        rows = super().rows(split)
        if rows is None or not self.where:
            return rows
        check_columns(rows, split, list(self.where))
        return rows.filter(_has, fn_kwargs={"where": self.where}, desc=f"Choosing {split}")

    @cached_property
    def candidates(self) -> list[str]:
        """What the model chooses from, each one token."""
        given = self._vocabulary
        if isinstance(given, str):
            if not Path(given).is_file():
                raise TuningError(f"vocabulary={given!r} is no file: give one with a word a line, or a list.")
            given = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines()]
        if given is None:
            found = [self.rows(split) for split in ("train", "validation", "test")]
            given = []
            for rows, split in zip(found, ("train", "validation", "test"), strict=True):
                if rows is not None:
                    check_columns(rows, split, [self.obj])
                    given += [str(value) for value in rows[self.obj] if not is_blank(value)]
        words = sorted({word for word in given if word})
        kept = [word for word in words if self._is_one_token(word)]
        if len(kept) < 2:
            raise TuningError(f"{len(kept)} candidates leave no choice: give two words of one token or more.")
        return kept

    def columns(self, split: str) -> Sequence[str]:
        """Return the fields of the template, and the column of the object."""
        return [*self.template.fields, *([self.obj] if split != "predict" else [])]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Put the facts into the template and number the objects.

        Raises:
            TuningError: the template does not fit the rows.
        """
        arguments = self._arguments(rows, 1) | {"label": self.obj, "drop": self.unknown == "drop"}
        labelled = split != "predict"
        return _fill, arguments | {"numbers": [(w, i) for i, w in enumerate(self.candidates)] if labelled else None}

    def finished(self, encoded: Dataset, split: str) -> Dataset:
        """Leave out the facts that are dropped."""
        lengths = encoded["length"][:]
        return encoded if all(lengths) else encoded.select([i for i, length in enumerate(lengths) if length])

    def _is_one_token(self, word: str) -> bool:
        """Tell whether a candidate is one token; that it is not is an error, unless such facts are dropped."""
        try:
            ids = word_ids(self.tokenizer, word, self.lead)
        except TuningError:  # the tokenizer does not know it
            if self.unknown == "error":
                raise
            return False
        if len(ids) > 1 and self.unknown == "error":
            tokens = ", ".join(self.tokenizer.convert_ids_to_tokens(ids))
            raise TuningError(
                f"candidate {word!r} is {len(ids)} tokens ({tokens}): give words of one token, or set unknown=drop."
            )
        return len(ids) == 1


def style_of(tokenizer: Any) -> LMStyle:
    """Return 'masked' if the tokenizer has a mask, else 'causal'."""
    return "causal" if tokenizer.mask_token_id is None else "masked"


def _has(row: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    return all(str(row[column]) == value for column, value in where.items())


def _fill(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    template: str,
    fields: list[str],
    style: LMStyle,
    max_length: int,
    masks: int,
    label: str,
    numbers: list[tuple[Any, int]] | None,
    drop: bool = False,
) -> dict[str, list[Any]]:
    """Return rows in the template, or what is wrong with each as ``problem``; what is dropped has no tokens."""
    number = dict(numbers or [])
    # The word of a causal model comes after the prompt, and needs its place too.
    how: dict[str, Any] = {"style": style, "masks": masks, "max_length": max_length - masks * (style == "causal")}
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "problem")}
    for i in range(len(next(iter(rows.values())))):
        ids, label_id, problem = [], IGNORED, ""
        try:
            values = {name: rows[name][i] for name in fields}
            check_any(values, fields)
            if numbers is not None:
                label_id = _number_of(rows[label][i], label, number, drop)
            if numbers is None or label_id != IGNORED:
                ids = encode(Template(template), tokenizer, values, **how).input_ids
        except BadRowError as error:
            problem = str(error)
        except TuningError as error:
            problem = f"cannot be used: {error}"
        for name, value in (("input_ids", ids), ("labels", label_id), ("problem", problem)):
            out[name].append(value)
    if numbers is None:
        del out["labels"]
    lengths = [len(ids) for ids in out["input_ids"]]
    return out | {"attention_mask": [[1] * length for length in lengths], "length": lengths}


def _number_of(value: Any, column: str, numbers: Mapping[Any, int], drop: bool) -> int:
    """Return the number of a label or an object, or -100 where it is to be dropped.

    Raises:
        BadRowError: there is none, or it is no candidate.
    """
    if is_blank(value):
        check_label(None, column, numbers)
    if value not in numbers and not drop:
        raise BadRowError(
            f"has object {shown(value)}, which is no candidate of one token: add it to the vocabulary, or set "
            "unknown=drop."
        )
    return numbers.get(value, IGNORED)
