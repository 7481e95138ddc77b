"""Templates: the words around the data, in one small syntax that is parsed and never evaluated.

============== =======================================================================================================
``{name}``     the field ``name`` of a row; when a prompt is too long, fields are shortened, the last one first
``{name!}``    the same, never shortened
``{mask}``     what a masked language model fills in
``{answer}``   what a language model goes on with
``{options}``  the answers to choose from, as in FLAN: ``OPTIONS:``, then one a line
``{lettered}`` those of the row itself, a list in its column ``options``, as ``(A) ...``, one a line
``{v:3}``      three virtual tokens of a soft prompt
``{{ }}``      braces
============== =======================================================================================================

Sources: cloze and prefix prompts, Schick and Schütze 2020 (2001.07676) section 3; options, Wei et al. 2021 (2109.01652)
section 2; tokens anywhere in a template, Liu et al. 2021 (2103.10385) section 3.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.template_parts import (
    RESERVED,
    Answer,
    Field,
    Lettered,
    Mask,
    Options,
    Part,
    Soft,
    Text,
    add_text,
    lettered,
    options_text,
    words_of,
)

_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
_NAME = re.compile(r"([^\W\d]\w*)(!?)")
_SOFT = re.compile(r"v:(\d+)")


@dataclass(frozen=True)
class Template:
    r"""A prompt with slots.

    >>> template = Template("Review: {text}\nSentiment: {answer}")
    >>> template.prompt({"text": "good film"})
    'Review: good film\nSentiment:'
    >>> template.render({"text": "good film"}, answer="Positive")
    'Review: good film\nSentiment: Positive'
    >>> Template("{v:3} {sub} {v:2} {mask}").parts[0]
    Soft(count=3, first=0)

    Args:
        text: the template, in the syntax of this module.
        name: by which it is listed and scored.
        inverse: turns the task around (asks for the text of a label): it trains, but is not scored.

    Raises:
        TuningError: the text is no template.
    """

    text: str
    name: str = ""
    inverse: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise TuningError(f"{self.text!r} is no template: give a text with a slot such as {{text}}.")
        self.parts  # noqa: B018 (a mistake in the syntax shows when the template is made)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The segments of the template, in order; neighbouring texts are one."""
        parts: list[Part] = []
        end = soft = 0
        for found in _TOKEN.finditer(self.text):
            add_text(parts, self.text[end : found.start()])
            end = found.end()
            token = found[0]
            if token in ("{{", "}}"):
                add_text(parts, token[0])
                continue
            part = self._slot(token, soft)
            soft += part.count if isinstance(part, Soft) else 0
            parts.append(part)
        add_text(parts, self.text[end:])
        return tuple(parts)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the columns that a row must have, each once, in order."""
        names = [part.name if isinstance(part, Field) else "options" for part in self.parts if _reads_row(part)]
        return tuple(dict.fromkeys(names))

    @property
    def num_virtual_tokens(self) -> int:
        """How many virtual tokens the soft slots have together."""
        return sum(part.count for part in self.parts if isinstance(part, Soft))

    @property
    def has_options(self) -> bool:
        """Whether the template lists the answers to choose from."""
        return any(isinstance(part, Options) for part in self.parts)

    @property
    def slot(self) -> int | None:
        """Where in ``parts`` the mask or the answer is; None: the answer follows at the end.

        Raises:
            TuningError: there are several.
        """
        slots = [i for i, part in enumerate(self.parts) if isinstance(part, (Mask, Answer))]
        if len(slots) > 1:
            raise TuningError(f"{self} has {len(slots)} slots for an answer: keep one {{mask}} or {{answer}}.")
        return slots[0] if slots else None

    @property
    def is_cloze(self) -> bool:
        """Whether there is a mask."""
        return any(isinstance(part, Mask) for part in self.parts)

    @property
    def before(self) -> tuple[Part, ...]:
        """The parts in front of the answer, without the blanks that the answer's first word carries."""
        parts = self.parts[: self.slot] if self.slot is not None else self.parts
        if parts and isinstance(parts[-1], Text):
            bare = parts[-1].text.rstrip(" ")
            return (*parts[:-1], Text(bare)) if bare else parts[:-1]
        return parts

    @property
    def after(self) -> tuple[Part, ...]:
        """The parts behind the answer."""
        return self.parts[self.slot + 1 :] if self.slot is not None else ()

    @property
    def lead(self) -> str:
        """The blank in front of the answer, or nothing; an answer at the end of a template without a slot has one."""
        parts = self.parts[: self.slot] if self.slot is not None else self.parts
        last = parts[-1] if parts else None
        if self.slot is None:
            return "" if isinstance(last, Text) and last.text[-1] in "\n\t" else " "
        return " " if isinstance(last, Text) and last.text.endswith(" ") else ""

    def cloze(self) -> "Template":
        """Return the template itself if it has exactly one mask.

        Raises:
            TuningError: it has none or several.
        """
        masks = sum(isinstance(part, Mask) for part in self.parts)
        if masks != 1:
            raise TuningError(f"{self} has {masks} masks: a cloze needs one {{mask}}.")
        self.slot  # noqa: B018 (a mask and an answer are too many)
        return self

    def check_columns(self, columns: Iterable[str]) -> "Template":
        """Return the template itself if rows with these columns can fill it.

        Raises:
            TuningError: a field is no column.
        """
        columns = list(columns)
        for field in self.fields:
            if field not in columns:
                close = get_close_matches(field, columns, n=1)
                mend = f"did you mean {close[0]!r}" if close else "write braces of the text as {{ }}"
                raise TuningError(f"{self} asks for {field!r}, rows have {', '.join(columns) or 'nothing'}: {mend}.")
        return self

    def render(
        self,
        fields: Mapping[str, Any],
        *,
        answer: str | None = None,
        options: Sequence[str] | None = None,
        mask: str = "[MASK]",
    ) -> str:
        """Return the whole text; without an answer it ends where the answer would begin.

        Args:
            fields: the row; its ``options``, and its ``answer`` for an ``{answer}``, are taken where none are given.
            answer: what stands in place of ``{answer}`` or ``{mask}``, or follows a template without a slot.
            options: what to choose from.
            mask: what stands in place of ``{mask}`` where there is no answer.

        Raises:
            TuningError: a field is missing, or is no text or number.
        """
        options = fields.get("options") if options is None else options
        slot = self.slot
        if answer is None and slot is not None and isinstance(self.parts[slot], Answer):
            answer = words_of(fields.get("answer"), "answer") or None
        if answer is None and self.is_cloze:
            answer = mask
        if answer is None:
            return self._text(self.parts if slot is None else self.before, fields, options)
        return self._text(self.before, fields, options) + self.lead + answer + self._text(self.after, fields, options)

    def prompt(self, fields: Mapping[str, Any], options: Sequence[str] | None = None) -> str:
        """Return the text in front of the answer, whatever answer the row has; it ends in no blank."""
        return self._text(self.before, fields, options)

    def words(self, part: Part, fields: Mapping[str, Any], options: Sequence[str] | None = None) -> str:
        """Return the words of a part for a row; of virtual tokens, ``[v]`` as often as there are.

        Raises:
            TuningError: the row lacks the field, or there are no options.
        """
        if isinstance(part, Text):
            return part.text
        if isinstance(part, Field):
            if part.name not in fields:
                self.check_columns(fields)
            return words_of(fields[part.name], part.name)
        if isinstance(part, Soft):
            return "[v]" * part.count
        if isinstance(part, Options):
            if not options or isinstance(options, str):
                raise TuningError(f"{self} lists {{options}}, and there are none: give options=, two answers or more.")
            return options_text(options)
        if isinstance(part, Lettered):
            own = fields.get("options")
            if not isinstance(own, Sequence) or isinstance(own, str) or not own:
                raise TuningError(f"{self} letters the options of a row, and this one has none: give a column options.")
            return lettered([words_of(option, "options") for option in own])
        return ""

    def _text(self, parts: Sequence[Part], fields: Mapping[str, Any], options: Sequence[str] | None) -> str:
        return "".join(self.words(part, fields, options) for part in parts)

    def _slot(self, token: str, soft: int) -> Part:
        inside = token[1:-1].strip() if len(token) > 1 else ""
        if found := _SOFT.fullmatch(inside):
            if not int(found[1]):
                raise TuningError(f"{token} in {self.text!r} has no virtual tokens: give 1 or more.")
            return Soft(int(found[1]), soft)
        if inside in RESERVED:
            return RESERVED[inside]
        if found := _NAME.fullmatch(inside):
            return Field(found[1], not found[2])
        raise TuningError(
            f"{token!r} in the template {self.text!r} is no slot: write {{name}}, {{mask}}, {{answer}}, {{options}}, "
            "{lettered} or {v:3}, and a brace of the text twice."
        )

    def __str__(self) -> str:
        return f"template {self.name or self.text!r}"


def _reads_row(part: Part) -> bool:
    return isinstance(part, (Field, Lettered))
