"""Conversations for a causal language model: a chat template renders them, and the assistant's turns are learned."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.data.chat_turns import BadRowError, Renderer, as_messages, as_tools, tokens_in
from lightning_peft.data.packed_rows import pack
from lightning_peft.data.padding import Padder
from lightning_peft.data.sources import SourcedData
from lightning_peft.prompts.virtual_tokens import IGNORED_LABEL

TrainOn = Literal["assistant", "last", "all"]


class ChatData(SourcedData):
    """Conversations, rendered by a chat template; what the assistant says has ``labels``, [B, T], the rest has -100.

    Which tokens are the assistant's is what the template marks (``{% generation %}``), or, of one without marks, what a
    turn adds to the text before it. It is checked on every row, and a row in which it cannot be told apart is refused.
    A batch also has ``references``, the first turn that is learned. A batch to predict ends where the assistant is to
    go on, padded on the left.

    Args:
        messages: column of the conversation: a list of ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.
        tools: column of the tools that the template is told of, JSON schemas or their text; it may be missing.
        train_on: all turns of the assistant, its last one, or the whole text.
        template: the chat template, or the path of its file; None: the tokenizer's own.
        packing: put conversations end to end in rows of ``max_length`` tokens, as in `CausalLMData`, for validation,
            too. Packed rows have no ``references``.
        skip_bad_rows: leave out rows that cannot be used, and say how many; else the first of them is an error.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        messages: str = "messages",
        tools: str = "tools",
        train_on: TrainOn = "assistant",
        template: str | None = None,
        packing: bool = False,
        skip_bad_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.messages = messages
        self.tools = tools
        self.train_on = train_on
        self.template = template
        self.packing = packing
        self.skip_bad_rows = skip_bad_rows

    @property
    def chat_template(self) -> str:
        """The text of the template.

        Raises:
            TuningError: there is none, or no such file.
        """
        if self.template is None:
            template = self.tokenizer.chat_template
            if not isinstance(template, str):
                raise TuningError(
                    f"{self.tokenizer_name} has {'several' if template else 'no'} chat templates: give template=, the "
                    "path of a file or the text of one."
                )
            return template
        if "{" in self.template:
            return self.template
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except OSError:
            raise TuningError(f"template={self.template!r} is no file and no template: give one.") from None

    def columns(self, split: str) -> Sequence[str]:
        """Return the column of the conversation."""
        return [self.messages]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Render and tokenise, and mark what is learned.

        Raises:
            TuningError: there is no template, or the tokenizer does not say where its tokens are.
        """
        if not self.tokenizer.is_fast:
            raise TuningError(
                f"{self.tokenizer_name} does not say which characters a token has: save its fast tokenizer "
                "(tokenizer.json) with it."
            )
        return _encoded, {
            "tokenizer": self.tokenizer,
            "template": self.chat_template,
            "names": (self.messages, self.tools if self.tools in rows.column_names else None),
            "train_on": None if split == "predict" else self.train_on,
            "max_length": self.max_length,
        }

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of rows: training pads on the right, prompts to go on from end at the right."""
        return Padder.of(self.tokenizer, "left" if split == "predict" else "right", self.pad_to_multiple_of)

    def _encode(self, rows: Dataset, split: str) -> Dataset:
        encoded = self._without_bad(super()._encode(rows, split).with_format(None), split)
        if self.packing and split in ("train", "validation"):
            how = {"max_length": self.max_length, "pad": self.tokenizer.pad_token_id}
            unpacked = encoded.column_names
            encoded = encoded.map(
                _packed, batched=True, fn_kwargs=how, remove_columns=unpacked, desc=f"Packing {split}"
            )
        return encoded.with_format(None, columns=[name for name in encoded.column_names if name != "length"])

    def _without_bad(self, encoded: Dataset, split: str) -> Dataset:
        """Return the rows that nothing is wrong with.

        Raises:
            TuningError: there are others, and they are not to be skipped, or there are no more rows.
        """
        problems = [(number, problem) for number, problem in enumerate(encoded["problem"]) if problem]
        encoded = encoded.remove_columns("problem")
        if not problems:
            return encoded
        first = f"row {problems[0][0]} of the {split} split {problems[0][1]}"
        if not self.skip_bad_rows or len(problems) == len(encoded):
            raise TuningError(first)
        rank_zero_warn(f"{len(problems)} of {len(encoded)} rows of the {split} split are left out, the first: {first}")
        bad = {number for number, _ in problems}
        return encoded.select([number for number in range(len(encoded)) if number not in bad])


def _packed(rows: Mapping[str, list[Any]], max_length: int, pad: int) -> dict[str, list[Any]]:
    return pack(rows["input_ids"], rows["labels"], max_length, pad)


def _encoded(
    rows: Mapping[str, list[Any]],
    tokenizer: Any,
    template: str,
    names: tuple[str, str | None],
    train_on: TrainOn | None,
    max_length: int,
) -> dict[str, list[Any]]:
    """Return the tokens of each row, or what is wrong with it as ``problem``."""
    renderer, out = Renderer(tokenizer, template), []
    for number, conversation in enumerate(rows[names[0]]):
        row: dict[str, Any] = {"input_ids": [], "labels": [], "references": [], "problem": ""}
        try:
            messages = as_messages(conversation)
            tools = as_tools(rows[names[1]][number]) if names[1] is not None else None
            if train_on is None:
                row |= _prompt(renderer, messages, tools, tokenizer, max_length)
            else:
                row |= _learned(renderer, messages, tools, tokenizer, train_on, max_length)
        except BadRowError as error:
            row["problem"] = str(error)
        row["attention_mask"], row["length"] = [1] * len(row["input_ids"]), len(row["input_ids"])
        out.append(row)
    given = {"labels", "references"} if train_on is None else {"references"} if train_on == "all" else set()
    return {name: [row[name] for row in out] for name in out[0] if name not in given}


def _prompt(
    renderer: Renderer, messages: list[dict[str, Any]], tools: Any, tokenizer: Any, max_length: int
) -> dict[str, Any]:
    """Return a conversation up to where the assistant is to go on."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadRowError("has nothing that the assistant could answer: give a message of the user.")
    ids = tokenizer(renderer.text(messages, tools, prompt=True), add_special_tokens=False)["input_ids"]
    if len(ids) > max_length:
        raise BadRowError(f"has a prompt of {len(ids)} tokens, which is longer than max_length={max_length}: raise it.")
    return {"input_ids": ids}


def _learned(
    renderer: Renderer,
    messages: list[dict[str, Any]],
    tools: Any,
    tokenizer: Any,
    train_on: TrainOn,
    max_length: int,
) -> dict[str, Any]:
    """Return a conversation, cut at ``max_length``, with labels for what is learned of it."""
    text, spans = renderer.turns(messages, tools, last=train_on == "last")
    ids, inside = tokens_in(text, spans, tokenizer)
    if not any(inside[1:max_length]):
        place = inside.index(True) if any(inside) else 0
        raise BadRowError(
            f"has no token of the assistant among its first {max_length}"
            + (f": its turn begins at token {place}, so raise max_length." if place else ": leave the row out.")
        )
    labels = [
        token if learned or train_on == "all" else IGNORED_LABEL for token, learned in zip(ids, inside, strict=True)
    ]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length],
        "references": [said[-1 if train_on == "last" else 0]],
    }
