"""Conversations for a causal language model: a chat template renders them, and the assistant's turns are learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset

from lightning_peft.core.labels import IGNORED
from lightning_peft.data.bad_rows import BadRowError
from lightning_peft.data.chat_turns import Renderer, as_messages, as_tools, template_text, tokens_in
from lightning_peft.data.packed_rows import PackedRows

TrainOn = Literal["assistant", "last", "all"]


class ChatData(PackedRows):
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
        **kwargs: as in `CheckedRows`, `SourcedData` and `TokenData`.
    """

    def __init__(
        self,
        messages: str = "messages",
        tools: str = "tools",
        train_on: TrainOn = "assistant",
        template: str | None = None,
        packing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(packing=packing, **kwargs)
        self.messages = messages
        self.tools = tools
        self.train_on = train_on
        self.template = template

    def columns(self, split: str) -> Sequence[str]:
        """Return the column of the conversation."""
        return [self.messages]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Render and tokenise, and mark what is learned.

        Raises:
            TuningError: there is no template, or the tokenizer does not say where its tokens are.
        """
        return _encoded, {
            "tokenizer": self.tokenizer,
            "template": template_text(self.template, self.tokenizer),
            "names": (self.messages, self.tools if self.tools in rows.column_names else None),
            "train_on": None if split == "predict" else self.train_on,
            "max_length": self.max_length,
        }


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
                row |= learned(renderer, messages, tools, tokenizer, train_on, max_length)
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


def learned(
    renderer: Renderer,
    messages: list[dict[str, Any]],
    tools: Any,
    tokenizer: Any,
    train_on: TrainOn,
    max_length: int,
) -> dict[str, Any]:
    """Return a conversation, cut at ``max_length``, with labels for what is learned of it.

    Raises:
        BadRowError: nothing is, or it cannot be told apart.
    """
    text, spans = renderer.turns(messages, tools, last=train_on == "last")
    ids, inside = tokens_in(text, spans, tokenizer)
    if not any(inside[1:max_length]):
        place = inside.index(True) if any(inside) else 0
        raise BadRowError(
            f"has no token of the assistant among its first {max_length}"
            + (f": its turn begins at token {place}, so raise max_length." if place else ": leave the row out.")
        )
    labels = [token if learned or train_on == "all" else IGNORED for token, learned in zip(ids, inside, strict=True)]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length],
        "references": [said[-1 if train_on == "last" else 0]],
    }
