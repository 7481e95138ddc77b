"""Renders conversations by a chat template, and finds in the text which characters are the assistant's."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from lightning_peft.core.errors import TuningError
from lightning_peft.data.bad_rows import BadRowError

Message = dict[str, Any]
Span = tuple[int, int]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def as_messages(value: Any) -> list[Message]:
    """Return a conversation as messages of ``role`` and ``content``; ShareGPT's ``from`` and ``value`` are read, too.

    Raises:
        BadRowError: it is no list of messages, a role is unknown, or a message is empty.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRowError(f"has {str(value)[:40]!r} for messages: give a list of role and content.")
    messages = [_message(each) for each in value]
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadRowError(f"has the role {role!r} in message {number}: take one of {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise BadRowError(f"has {type(content).__name__} as the content of message {number}: give a text.")
        if not content.strip() and not message.get("tool_calls"):
            raise BadRowError(f"has no content in message {number} ({role}): give a text, or leave the message out.")
    return messages


def as_tools(value: Any) -> list[Any] | None:
    """Return the tools of a row: a list of JSON schemas, or the text of one.

    Raises:
        BadRowError: it is neither.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = value
    if tools is not None and not isinstance(tools, list):
        raise BadRowError(f"has {str(value)[:40]!r} for tools: give a list of JSON schemas, or it as a text.")
    return [_without_none(tool) for tool in tools] if tools else None


def template_text(given: str | None, tokenizer: Any) -> str:
    """Return the text of a chat template: the one given, or that of its file; None: the tokenizer's own.

    Raises:
        TuningError: there is none, or no such file, or the tokenizer does not say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise TuningError(
            f"{tokenizer.name_or_path} does not say which characters a token has: save its fast tokenizer "
            "(tokenizer.json) with it."
        )
    if given is None:
        own = tokenizer.chat_template
        if not isinstance(own, str):
            raise TuningError(
                f"{tokenizer.name_or_path} has {'several' if own else 'no'} chat templates: give template=, the path "
                "of a file or the text of one."
            )
        return own
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError:
        raise TuningError(f"template={given!r} is no file and no template: give one.") from None


def marks_turns(template: str) -> bool:
    """Tell whether a template says by ``{% generation %}`` what the assistant writes."""
    return _MARKS.search(template) is not None


class Renderer:
    """Renders conversations as a tokenizer does.

    Args:
        tokenizer: its special tokens are known to the template.
        template: the chat template.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.names = dict(tokenizer.special_tokens_map)
        self.template = template

    def text(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool = False) -> str:
        """Return a conversation as a text; with ``prompt``, with what stands before the assistant's next turn.

        Raises:
            BadRowError: the template fails.
        """
        return self._rendered(messages, tools, add_generation_prompt=prompt)[0]

    def turns(self, messages: Sequence[Message], tools: list[Any] | None, last: bool) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where in it the assistant's turns are, or the last of them.

        A template says it by its marks. One without marks is asked with and without each turn: what a turn adds to the
        text before it, and to what invites to it, is the turn.

        Raises:
            BadRowError: there is no such turn, or the template does not let it be told apart.
        """
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise BadRowError("has no turn of the assistant: leave the row out.")
        if marks_turns(self.template):
            text, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
            if len(spans) < len(places) or (last and len(spans) > len(places)):
                raise BadRowError(
                    f"has {len(places)} turns of the assistant, of which the template marks {len(spans)}: put "
                    "generation and endgeneration around each."
                )
            return text, spans[-1:] if last else spans
        text = self.text(messages, tools)
        return text, [self._turn(text, messages, place, tools) for place in (places[-1:] if last else places)]

    def _turn(self, text: str, messages: Sequence[Message], place: int, tools: list[Any] | None) -> Span:
        before = self.text(messages[:place], tools, prompt=True)
        until = self.text(messages[: place + 1], tools)
        content = messages[place]["content"].strip()
        if not text.startswith(before) or not text.startswith(until) or content not in text[len(before) : len(until)]:
            raise BadRowError(
                f"has a turn of the assistant, message {place}, that the template writes in another way when it is "
                "the last one: take train_on=last, or a template with generation marks."
            )
        return len(before), len(until)

    def _rendered(self, messages: Sequence[Message], tools: list[Any] | None, **how: Any) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template([list(messages)], tools, None, self.template, **how, **self.names)
        except Exception as error:  # what a template raises, or Jinja
            raise BadRowError(
                f"fails in the chat template ({error}): mend the row, or give another template."
            ) from None
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def tokens_in(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text, and which of them lie in the spans.

    Raises:
        BadRowError: a token is partly inside.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = []
    for start, end in encoded["offset_mapping"]:
        within = [(a, b) for a, b in spans if start < b and end > a]
        if within and text[start : max(start, within[0][0])].strip():
            raise BadRowError(
                f"has the token {text[start:end]!r} in which the assistant's turn begins: let the template put a "
                "blank or a special token there."
            )
        inside.append(bool(within))
    return encoded["input_ids"], inside


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise BadRowError(f"has {str(value)[:40]!r} for a message: give a role and a content.")
    message: Message = _without_none(value)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {"role": _SHAREGPT.get(role, role), "content": message.pop("value", ""), **message}
    return {"role": None, **message, "content": message.get("content", "")}


def _without_none(value: Any) -> Any:
    """Return a value without the entries that a table of rows has filled with nothing."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
