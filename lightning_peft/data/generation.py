"""Data for text generation: prompts with continuations for causal models, sources with targets for seq2seq models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.data.bad_rows import BadRowError, is_blank, shown
from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.packed_rows import PackedRows
from lightning_peft.data.span_corruption import sentinels


class Seq2SeqData(CheckedRows):
    """Sources and targets for an encoder-decoder: ``input_ids`` of the source, ``labels`` of the target.

    A batch also has ``references``, the right targets of each row as texts, except for prediction.

    Args:
        source: column of the source.
        target: column of the target: a text, or a list of right ones, of which the first is trained on.
        max_target_length: where a target is cut [tokens].
        prefix: what to put before each source, e.g. "summarize: " or a control code.
        sentinel: begin each target with ``<extra_id_0>``, as what a T5 that only fills gaps would write there (Lester
            et al. 2021, section 3.2). It is no part of ``references``.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        source: str = "source",
        target: str = "target",
        max_target_length: int = 64,
        prefix: str = "",
        sentinel: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_target_length < 1:
            raise TuningError(f"max_target_length={max_target_length} is out of range: take 1 or more.")
        self.source = source
        self.target = target
        self.max_target_length = max_target_length
        self.prefix = prefix
        self.sentinel = sentinel

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of source and target; a row to predict needs no target."""
        return [self.source] if split == "predict" else [self.source, self.target]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise sources and targets.

        Raises:
            TuningError: the tokenizer has no sentinel that is asked for.
        """
        if self.sentinel and not sentinels(self.tokenizer):
            raise TuningError(
                f"sentinel=True begins targets with <extra_id_0>, which {self.tokenizer_name} does not know: "
                "leave it out, or take a T5."
            )
        return _pairs, {
            "tokenizer": self.tokenizer,
            "names": (self.source, self.target if split != "predict" else None),
            "lengths": (self.max_length, self.max_target_length),
            "prefix": self.prefix,
            "first": sentinels(self.tokenizer)[:1] if self.sentinel else [],
        }


class CausalLMData(PackedRows):
    """Prompts and what follows them, or whole texts, for a causal language model.

    Only the tokens of the target have ``labels``, [B, T]; those of the prompt have -100. Every target ends with the
    end-of-sequence token, if the tokenizer has one. A batch also has ``references``, the targets as texts. A batch to
    predict has the prompts alone, padded on the left.

    Args:
        prompt: column of the prompt; None: all of the text is the target.
        target: column of the text to learn: a text, or a list of right ones, of which the first is trained on.
        prefix: what to put before each row: an instruction, or a control code as CTRL has them, e.g. "Reviews ". It is
            what every text begins with, after the beginning-of-sequence token if the tokenizer has one, in packed rows
            too; nothing is trained to say it, and a prompt that is cut for prediction keeps it.
        separator: what to put between prompt and target.
        packing: put texts end to end in rows of ``max_length`` tokens, so that nothing is padding. ``position_ids``
            begin anew with each text, by which transformers keeps the texts of a row from seeing each other. Packed
            rows have no ``references``. Training and validation are packed, the test is not.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        prompt: str | None = None,
        target: str = "text",
        prefix: str = "",
        separator: str = " ",
        packing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(packing=packing, **kwargs)
        self.prompt = prompt
        self.target = target
        self.prefix = prefix
        self.separator = separator

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of prompt and target; a row to predict needs no target where there is a prompt."""
        return [name for name in (self.prompt, self.target) if name is not None and self._needs(name, split)]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise, and mark the target."""
        return _prompts if split == "predict" else continued, {
            "tokenizer": self.tokenizer,
            "names": (self.prompt, self.target if self._needs(self.target, split) else None),
            "max_length": self.max_length,
            "prefix": self.prefix,
            "separator": self.separator,
        }

    def sides(self, split: str) -> Sequence[str]:
        """Return the columns of prompt and target, which are not to be exchanged."""
        return [self.prompt, self.target] if self.prompt is not None and split != "predict" else []

    def _needs(self, name: str, split: str) -> bool:
        return split != "predict" or name == self.prompt or self.prompt is None


def _target_of(value: Any, column: str) -> list[str]:
    """Return the right targets of a row.

    Raises:
        BadRowError: one is empty or missing, or is no text.
    """
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRowError(f"has target {shown(value)} in column {column!r}: give a text, or a list.")
    return texts


def _check_prompt(value: Any, column: str, prefix: str) -> None:
    """See that there is something that a target can follow.

    Raises:
        BadRowError: it is missing or no text, or is empty and there is no prefix.
    """
    if value is None or not isinstance(value, (str, int, float)) or (is_blank(value) and not prefix.strip()):
        raise BadRowError(f"has {shown(value)} for its prompt, in column {column!r}: give a text.")


def _looked_at(
    rows: Mapping[str, list[Any]], names: tuple[str | None, str | None], prefix: str
) -> tuple[list[list[str]], list[str]]:
    """Return the right targets of each row, and what is wrong with each."""
    prompt, target = names
    references: list[list[str]] = []
    problems: list[str] = []
    for number in range(len(rows[prompt or target or ""])):
        own, problem = [""], ""
        try:
            if prompt is not None:
                _check_prompt(rows[prompt][number], prompt, prefix)
            if target is not None:
                own = _target_of(rows[target][number], target)
        except BadRowError as error:
            problem = str(error)
        references.append(own)
        problems.append(problem)
    return references, problems


def _pairs(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    names: tuple[str, str | None],
    lengths: tuple[int, int],
    prefix: str,
    first: Sequence[int],
) -> dict[str, list[Any]]:
    source, target = names
    references, problems = _looked_at(rows, names, prefix)
    texts = [f"{prefix}{'' if text is None else text}" for text in rows[source]]
    encoded = dict(tokenizer(texts, truncation=True, max_length=lengths[0]))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    if target is not None:
        right = [texts[0] for texts in references]
        targets = tokenizer(text_target=right, truncation=True, max_length=lengths[1] - len(first))["input_ids"]
        encoded["labels"] = [[*first, *ids] for ids in targets]
        encoded["references"] = references
        problems = [problem or _unlearnt(ids) for problem, ids in zip(problems, encoded["labels"], strict=True)]
    return encoded | {"problem": problems}


def _unlearnt(labels: Sequence[int]) -> str:
    """Return what is wrong with a row of which nothing would be learned."""
    if any(label != IGNORED for label in labels):
        return ""
    return "has no token to learn: give a longer target, or leave the row out."


def _prompts(
    rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int, prefix: str, names: Any, **how: Any
) -> dict[str, list[Any]]:
    """Return the prompts alone, cut in the middle: what is next to the continuation stays, and the control code."""
    begin, end = _ends(tokenizer)
    kept = begin + (tokenizer(prefix.rstrip(" "), add_special_tokens=False)["input_ids"] if prefix.strip() else [])
    if len(kept) >= max_length:
        raise TuningError(f"a prefix of {len(kept)} tokens leaves no room for its prompt: raise max_length.")
    prompts, _ = _before_targets(rows, tokenizer, names, prefix=prefix, **how)
    long = [begin + row for row in prompts]
    ids = [r if len(r) <= max_length else r[: len(kept)] + r[len(kept) - max_length :] for r in long]
    ids = [row or end or [tokenizer.pad_token_id] for row in ids]
    lengths = [len(row) for row in ids]
    found: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "length": lengths}
    return found | {"problem": _looked_at(rows, names, prefix)[1]}


def continued(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    names: tuple[str | None, str],
    max_length: int,
    prefix: str,
    separator: str,
) -> dict[str, list[Any]]:
    """Return prompts with their targets, of which the latter have labels, and what is wrong with each."""
    begin, end = _ends(tokenizer)
    references, problems = _looked_at(rows, names, prefix)
    prompts, blanks = _before_targets(rows, tokenizer, names, prefix, separator)
    texts = [f"{blank}{own[0]}" for blank, own in zip(blanks, references, strict=True)]
    targets = tokenizer(texts, add_special_tokens=False)["input_ids"]
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "attention_mask", "labels", "length", "problem")}
    for front, back, problem in zip(prompts, targets, problems, strict=True):
        front, back = begin + front, back + end
        ids, labels = (front + back)[:max_length], ([IGNORED] * len(front) + back)[:max_length]
        if len(front) >= max_length:
            long = f"cannot be used: a prompt of {len(front)} tokens leaves no room for its target: raise max_length."
            problem = problem or long
        out["input_ids"].append(ids)
        out["attention_mask"].append([1] * len(ids))
        out["labels"].append(labels)
        out["length"].append(len(ids))
        out["problem"].append(problem or _unlearnt(labels[1:]))
    return out | {"references": references}


def _before_targets(
    rows: Mapping[str, list[Any]], tokenizer: Any, names: tuple[str | None, str | None], prefix: str, separator: str
) -> tuple[list[list[int]], list[str]]:
    """Return the tokens before each target, and the blanks at their end.

    A blank belongs to the word that follows it in most vocabularies: it goes over to the target.
    """
    prompt, target = names
    count = len(rows[prompt or target or ""])
    before = [prefix] * count if prompt is None else [f"{prefix}{text}{separator}" for text in rows[prompt]]
    stripped = [text.rstrip(" ") for text in before]
    blanks = [text[len(short) :] for text, short in zip(before, stripped, strict=True)]
    return tokenizer(stripped, add_special_tokens=False)["input_ids"], blanks


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a text begins and ends with."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [] if begin is None else [begin], [] if end is None else [end]
