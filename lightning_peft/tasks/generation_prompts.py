"""Writes the prompts that a frozen model continues, and those that ask for the answer after a rationale."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.encoding import Style, encode, special_ids, text_ids
from lightning_peft.prompting.template import Template


class GenerationPrompts:
    """Writes prompts that leave room for all that follows them.

    Args:
        tokenizer: of the model.
        lm: 'causal' or 'seq2seq'.
        trigger: what the rationale begins with; None: the answer is asked for at once.
        ask: what asks for the answer after a rationale.
        max_new_tokens: the most tokens that are written after a prompt.
        max_answer_tokens: the most tokens of the answer after a rationale.
        blank: what stands between sentences.
    """

    def __init__(
        self,
        tokenizer: Any,
        lm: Style,
        trigger: str | None,
        ask: str,
        max_new_tokens: int,
        max_answer_tokens: int,
        blank: str = " ",
    ) -> None:
        self.tokenizer, self.lm, self.blank = tokenizer, lm, blank
        self.opening = "" if trigger is None else f"{blank}{trigger}"
        self.ask = "" if trigger is None else f"{blank}\n{ask}"
        self.max_new_tokens, self.max_answer_tokens = max_new_tokens, max_answer_tokens

    def room(self, whole: int) -> int:
        """Return the most tokens of a first prompt, so that all that follows it has room in ``whole`` tokens.

        Raises:
            TuningError: there is none.
        """
        follows = self.max_new_tokens if self.lm == "causal" else 0
        if self.ask:
            follows = self.max_new_tokens + len(text_ids(self.tokenizer, self.ask, joins=True))
            follows += self.max_answer_tokens if self.lm == "causal" else 0
        if follows >= whole:
            raise TuningError(
                f"what the model may write takes {follows} of its {whole} tokens: lower max_new_tokens, now "
                f"{self.max_new_tokens}."
            )
        return whole - follows

    def ids(self, template: Template, fields: Mapping[str, Any], front: str = "", room: int | None = None) -> list[int]:
        """Return the ids of a prompt and of what the answer begins with, in at most ``room`` tokens."""
        opening, closing = special_ids(self.tokenizer)
        closing = [] if self.lm == "causal" else closing
        more = text_ids(self.tokenizer, self.opening, joins=True) if self.opening else []
        left = None if room is None else room - len(opening) - len(closing) - len(more)
        if left is not None and left < 1:
            raise TuningError(f"prompts have at most {room} tokens, which leaves none for the data: raise max_length.")
        own = encode(
            template, self.tokenizer, fields, style="causal", max_length=left, front=front, specials=False
        ).input_ids
        return [*opening, *own, *more, *closing]

    def after_rationales(self, prompts: Sequence[list[int]], rationales: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts with their rationales, which ask for the answer."""
        closing = [] if self.lm == "causal" else special_ids(self.tokenizer)[1]
        asked = text_ids(self.tokenizer, self.ask, joins=True)
        rows = []
        for prompt, rationale in zip(prompts, rationales, strict=True):
            words = rationale.strip()
            read = text_ids(self.tokenizer, f"{self.blank}{words}", joins=True) if words else []
            rows.append([*prompt[: len(prompt) - len(closing)], *read[: self.max_new_tokens], *asked, *closing])
        return rows
