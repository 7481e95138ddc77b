"""In-context learning: selects, orders and fits the demonstrations in front of a question."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting import demonstrations as text
from lightning_peft.prompting.encoding import text_ids
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.embedding import nearest_rows


@dataclass
class Front:
    """What stands in front of a question.

    Args:
        text: the instruction and the demonstrations that fit.
        shown: how many demonstrations that are.
        dropped: how many did not fit.
    """

    text: str
    shown: int = 0
    dropped: int = 0


@dataclass
class InContext:
    """The demonstrations of a task.

    Args:
        rows: the training rows (indexable).
        answer: returns what a row is answered with; None: demonstrations are shown without an answer.
        classes: the class of each row, for a balanced choice; empty: there are none.
        count: how many demonstrations a prompt has.
        select: 'random' and 'balanced' are the same for all questions; 'nearest' by the embedding.
        order: in the prompt.
        separator: what stands behind each.
        instruction: what stands before them.
        seed: of choice and order.
        embed: texts -> vectors of length 1 [N, d], for 'nearest'.
    """

    rows: Any
    answer: Callable[[Mapping[str, Any]], str] | None
    classes: Sequence[Any]
    count: int
    select: text.Select
    order: text.Order
    separator: str
    instruction: str
    seed: int
    embed: Callable[[Sequence[str]], Tensor]

    def __post_init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self._pool: dict[tuple[str, ...], Tensor] = {}
        self._fixed: list[int] = []
        if self.count and self.select == "balanced" and not self.classes:
            raise TuningError("select=balanced needs classes, and the data have none: take random or nearest.")
        if self.count and self.select != "nearest":
            if self.order.startswith("nearest"):
                raise TuningError(f"order={self.order} needs select=nearest: take random or as_selected.")
            drawn = (
                text.balanced_rows(self.classes, self.count, self.seed)
                if self.select == "balanced"
                else text.random_rows(len(self.rows), self.count, self.seed)
            )
            self._fixed = text.ordered(drawn, self.order, self.seed)

    def choose(self, queries: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[list[int]]:
        """Return the training rows that each question is shown, in the order of the prompt.

        Raises:
            TuningError: one is the row that is asked about.
        """
        if not self.count:
            return [[] for _ in queries]
        chosen = [self._fixed] * len(queries)
        if self.select == "nearest":
            if self.count > len(self.rows):
                text.random_rows(len(self.rows), self.count, self.seed)  # says that there are too few
            own = self.embed([_joined(row, fields) for row in queries])
            numbers = nearest_rows(own, self._embedded(tuple(fields)), self.count)[1].tolist()
            chosen = [text.ordered(row, self.order, self.seed) for row in numbers]
        for query, numbers in zip(queries, chosen, strict=True):
            text.check_apart([self.rows[number] for number in numbers], query, fields)
        return chosen

    def front(
        self, template: Template, tokenizer: Any, numbers: Sequence[int], options: Sequence[str] | None, room: int
    ) -> Front:
        """Return the instruction and the last of these demonstrations that fit into ``room`` tokens, none of them cut.

        Raises:
            TuningError: not even the instruction fits.
        """
        shown = [self._written(template, self.rows[number], options) for number in numbers]
        instruction = text.context([], self.separator, self.instruction)
        room -= self._length(tokenizer, instruction)
        if room < 0:
            raise TuningError(f"the instruction {self.instruction[:60]!r} leaves no room for a question: shorten it.")
        kept = text.within([self._length(tokenizer, one + self.separator) for one in shown], room)
        whole = text.context(shown[len(shown) - kept :], self.separator, self.instruction)
        return Front(whole, kept, len(shown) - kept)

    def _written(self, template: Template, row: Mapping[str, Any], options: Sequence[str] | None) -> str:
        return text.written(template, row, None if self.answer is None else self.answer(row), options)

    def _length(self, tokenizer: Any, words: str) -> int:
        if words not in self._lengths:
            self._lengths[words] = len(text_ids(tokenizer, words))
        return self._lengths[words]

    def _embedded(self, fields: tuple[str, ...]) -> Tensor:
        if fields not in self._pool:
            self._pool[fields] = self.embed([_joined(row, fields) for row in self.rows])
        return self._pool[fields]


def _joined(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    return " ".join(str(row[name]) for name in fields if row.get(name) is not None)
