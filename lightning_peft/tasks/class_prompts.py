"""Writes the prompts of rows that are to be classified, and those that tell how likely labels are without a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.encoding import Encoded, Style, encode, special_ids, text_ids, verbalizer_ids
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.verbalizer import Verbalizer
from lightning_peft.tasks.in_context import Front

NULL = -1
"""What stands for the number of the row in prompts without a row, and for that of the content-free input in PMI's."""
Key = tuple[int, str | None]
"""A template and its demonstrations, whose content-free inputs calibrate; without demonstrations: PMI's empty input."""


class Prompt:
    """One row of what the model is fed: a template filled in.

    Args:
        row: number of the row in the batch; negative: it has no content.
        template: number of the template.
        front: the demonstrations.
        free: number of the content-free input; -1: the empty input without demonstrations, of PMI.
        input_ids: the ids.
        shared: ids in front of them that other prompts have, too.
        which: the numbers of the words that are scored.
        words: the ids of these words, with what follows them in the template.
        text: the prompt to read.
    """

    # No dataclass: Lightning would copy it, field by field, when it moves the batch.
    __slots__ = ("free", "front", "input_ids", "row", "shared", "template", "text", "which", "words")

    def __init__(
        self,
        row: int,
        template: int,
        front: Front,
        free: int,
        input_ids: list[int],
        shared: tuple[int, ...],
        which: list[int],
        words: list[list[int]],
        text: str,
    ) -> None:
        self.row, self.template, self.front, self.free = row, template, front, free
        self.input_ids, self.shared, self.which, self.words, self.text = input_ids, shared, which, words, text


@dataclass
class ClassPrompts:
    """Writes the prompts of rows whose label is one of a verbalizer's words.

    Args:
        tokenizer: of the model.
        lm: what sort of language model it is.
        templates: those that ask for the answer.
        verbalizer: the words of the labels.
        several: whether words may have several tokens.
        content_free: inputs that calibrate; none: labels are not calibrated.
        pmi: whether words are compared with their likelihood after an empty input.
    """

    tokenizer: Any
    lm: Style
    templates: Sequence[Template]
    verbalizer: Verbalizer
    several: bool
    content_free: Sequence[str]
    pmi: bool

    def __post_init__(self) -> None:
        self.options = [own[0] for own in self.verbalizer.of.values()]
        leads = [template.lead for template in self.templates]
        self.word_ids = [verbalizer_ids(self.verbalizer, self.tokenizer, lead, self.several) for lead in leads]

    def length(self, template: int, fields: Mapping[str, Any]) -> int:
        """Return how many tokens a row takes without demonstrations, with the longest word."""
        longest = max(map(len, self.word_ids[template]))
        own = self._encoded(template, fields, longest)
        return len(own.input_ids) + len(own.tail) + (longest if self.lm == "causal" else 0)

    def of_row(
        self, row: int, number: int, fields: Mapping[str, Any], front: Front, room: int, free: int = NULL
    ) -> list[Prompt]:
        """Return the prompts of one row and template: one, or for a masked model one for each length of words."""
        template, words = self.templates[number], self.word_ids[number]
        shares = self.lm == "causal" and bool(front.text)
        shared: tuple[int, ...] = ()
        if shares:
            opening, _ = special_ids(self.tokenizer)
            shared = (*opening, *text_ids(self.tokenizer, front.text))
        text = front.text + template.render(fields, options=self.options, answer=None if template.is_cloze else "")
        lengths = sorted({len(word) for word in words}) if self.lm == "masked" else [max(map(len, words))]
        found = []
        for length in lengths:
            left = room - len(shared) - (length if self.lm == "causal" else 0)
            encoded = self._encoded(
                number, fields, length, max_length=left, front="" if shares else front.text, specials=not shares
            )
            ids = encoded.input_ids or [self._first_id]
            which = [i for i, word in enumerate(words) if self.lm != "masked" or len(word) == length]
            scored = [words[i] + encoded.tail for i in which]
            found.append(Prompt(row, number, front, free, ids, shared, which, scored, text.rstrip(" ")))
        return found

    def without_row(self, number: int, front: Front, room: int, known: set[Key]) -> list[Prompt]:
        """Return the prompts that tell how likely labels are anyway, and add to ``known`` what they tell."""
        inputs: list[tuple[str, Front, int]] = []
        if self.pmi and (number, None) not in known:
            known.add((number, None))
            inputs.append(("", Front(""), NULL))
        if self.content_free and (number, front.text) not in known:
            known.add((number, front.text))
            inputs += [(text, front, free) for free, text in enumerate(self.content_free)]
        names = self.templates[number].fields
        return [
            prompt
            for text, before, free in inputs
            for prompt in self.of_row(NULL, number, dict.fromkeys(names, text), before, room, free)
        ]

    def _encoded(self, number: int, fields: Mapping[str, Any], masks: int, **kwargs: Any) -> Encoded:
        template = self.templates[number]
        return encode(template, self.tokenizer, fields, style=self.lm, masks=masks, options=self.options, **kwargs)

    @property
    def _first_id(self) -> int:
        """The id that stands for a prompt without any words."""
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if found is not None:
                return int(found)
        raise TuningError("a prompt is empty, and the tokenizer has no token to begin with: give the template words.")
