"""Pairs of answers to one prompt, of which people, or a judge, prefer one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, LargeList, List

from lightning_peft.data.bad_rows import BadRowError, is_blank, shown
from lightning_peft.data.chat import learned
from lightning_peft.data.chat_turns import Renderer, as_messages, template_text
from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.generation import continued
from lightning_peft.data.padding import Padder, columns_of

SIDES = ("chosen", "rejected")


class PreferenceData(CheckedRows):
    """Prompts with a chosen and a rejected answer, for the task `Preference`.

    A row is three texts, or messages: a ``prompt`` that is a conversation with answers that are messages or texts, or,
    without a column of prompts, two conversations that differ in their last turn. A batch of B rows has 2 B of tokens,
    the chosen ones first; ``labels`` are those of the answers.

    Args:
        prompt: column of the prompt; None: the answers are whole conversations.
        chosen: column of the answer that is preferred.
        rejected: column of the other.
        separator: what to put between a prompt and an answer that are texts.
        template: the chat template of conversations, or the path of its file; None: the tokenizer's own.
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        prompt: str | None = "prompt",
        chosen: str = "chosen",
        rejected: str = "rejected",
        separator: str = " ",
        template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prompt = prompt
        self.chosen = chosen
        self.rejected = rejected
        self.separator = separator
        self.template = template

    def columns(self, split: str) -> Sequence[str]:
        """Return the columns of the prompt and of both answers."""
        return [name for name in (self.prompt, self.chosen, self.rejected) if name is not None]

    def sides(self, split: str) -> Sequence[str]:
        """Return the columns of the prompt and of both answers: another row must not prefer the other one."""
        return self.columns(split)

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise both answers with their prompt."""
        is_chat = any(isinstance(rows.features[name], (List, LargeList)) for name in self.columns(split))
        return _compared, {
            "tokenizer": self.tokenizer,
            "names": (self.prompt, self.chosen, self.rejected),
            "max_length": self.max_length,
            "separator": self.separator,
            "template": template_text(self.template, self.tokenizer) if is_chat else None,
        }

    def padder(self, split: str) -> "PairPadder":
        """Return what makes a batch of pairs."""
        return PairPadder(Padder.of(self.tokenizer, "right", self.pad_to_multiple_of))


class PairPadder:
    """Makes a batch of 2 B rows of B pairs, the chosen ones first.

    Args:
        pad: makes a batch of single rows.
    """

    def __init__(self, pad: Padder) -> None:
        self.pad = pad

    def __call__(self, pairs: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of a list of pairs, or of a mapping of columns."""
        pairs = columns_of(pairs)
        ids, labels = ([v for side in SIDES for v in pairs[f"{side}_{name}"]] for name in ("ids", "labels"))
        return self.pad({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


def _compared(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    names: tuple[str | None, str, str],
    max_length: int,
    separator: str,
    template: str | None,
) -> dict[str, list[Any]]:
    """Return the tokens and labels of both answers of each row, or what is wrong with it as ``problem``."""
    renderer = None if template is None else Renderer(tokenizer, template)
    empty: dict[str, list[int]] = {f"{side}_{name}": [] for side in SIDES for name in ("ids", "labels")}
    out: list[dict[str, Any]] = []
    for number, pair in enumerate(zip(rows[names[1]], rows[names[2]], strict=True)):
        row: dict[str, Any] = {**empty, "problem": "", "length": 0}
        try:
            prompt = rows[names[0]][number] if names[0] is not None else None
            sides = [_side(prompt, answer, renderer, tokenizer, max_length, separator) for answer in pair]
            _check_differ(*sides)
            for side, (ids, labels) in zip(SIDES, sides, strict=True):
                row |= {f"{side}_ids": ids, f"{side}_labels": labels}
            row["length"] = max(len(ids) for ids, _ in sides)
        except BadRowError as error:
            row["problem"] = str(error)
        out.append(row)
    return {name: [row[name] for row in out] for name in out[0]}


def _side(
    prompt: Any, answer: Any, renderer: Renderer | None, tokenizer: Any, max_length: int, separator: str
) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of a prompt with one of its answers."""
    if renderer is not None:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or []
        found = learned(renderer, as_messages([*before, *after]), None, tokenizer, "last", max_length)
        return found["input_ids"], found["labels"]
    for text, what in ((prompt, "prompt"), (answer, "answer")):
        if not isinstance(text, str) or is_blank(text):
            raise BadRowError(f"has {shown(text)} for its {what}: give a text.")
    row = {"prompt": [prompt], "answer": [answer]}
    found = continued(row, tokenizer, ("prompt", "answer"), max_length, prefix="", separator=separator)
    if found["problem"][0]:
        raise BadRowError(found["problem"][0])
    return found["input_ids"][0], found["labels"][0]


def _check_differ(chosen: tuple[list[int], list[int]], rejected: tuple[list[int], list[int]]) -> None:
    """See that two answers differ, and nothing before them does.

    Raises:
        BadRowError: there is nothing to prefer, or the prompts differ.
    """
    if chosen == rejected:
        raise BadRowError("has the same tokens for chosen and rejected: leave the row out, or raise max_length.")
    places = [next(i for i, label in enumerate(labels) if label >= 0) for _, labels in (chosen, rejected)]
    if chosen[0][: places[0]] != rejected[0][: places[1]]:
        raise BadRowError(
            "has other words before the chosen answer than before the rejected one: give both one prompt."
        )
