"""A search in which a language model reads what went wrong and writes a better instruction, by the package gepa.

What evolves is an instruction in front of the template. A candidate is asked on a few training rows; the writer reads
inputs, answers and the right ones, and writes the next. It goes on if it is better on these rows, and is then scored on
all validation rows; which candidate is written anew is drawn from those that are best on some row (a Pareto front).

Source: Agrawal et al. 2025, arXiv 2507.19457, and the interface of its authors' package (``GEPAAdapter``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import lightning as L
import torch

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import LabelledRows, Rows
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from lightning_peft.tasks.written_prompts import write_after

Writer = Callable[[str], str]
PART = "instruction"
"""What gepa calls the text that evolves."""
READ = 3
"""How many training rows the writer reads at a time, gepa's own number."""
AT_ONCE = 16
"""How many rows are asked about together."""
LONGEST = 200
"""Of what the task's own model writes [tokens]."""


@dataclass(frozen=True)
class Evolved:
    """A candidate.

    Args:
        template: the instruction with the template behind it.
        score: the share of the validation rows that it answers rightly.
        parent: the template that it was written from.
    """

    template: str
    score: float
    parent: str | None


def evolved(
    task: PromptedTask, data: L.LightningDataModule, begin: str, most: int, seed: int, writer: Writer | str | None
) -> list[Evolved]:
    """Return the candidates that a search by reflection has let go on, without the one that it began with.

    Args:
        task: asks by the candidates.
        data: its rows.
        begin: the template, which stays behind each instruction.
        most: how many candidates are scored on all validation rows.
        seed: of what is drawn.
        writer: from a text to what follows it; the name of a model that litellm knows, as gepa takes it; None: the
            model of the task itself.

    Raises:
        TuningError: gepa is not installed, the model writes no texts, or rows are missing.
    """
    try:
        gepa = import_module("gepa")
    except ImportError:
        raise TuningError("how='gepa' needs gepa, which is not there: pip install 'lightning-peft[search]'.") from None
    adapter = Adapter(task, data, begin, gepa.EvaluationBatch)
    rows = {split: adapter.rows(split) for split in ("train", "validation")}
    scored = most + 1  # the first is the template as it is
    found = gepa.optimize(
        seed_candidate={PART: ""},
        trainset=rows["train"],
        valset=rows["validation"],
        adapter=adapter,
        reflection_lm=writer or own_writer(task, seed),
        reflection_minibatch_size=min(READ, len(rows["train"])),
        max_metric_calls=scored * (len(rows["validation"]) + 4 * READ),
        stop_callbacks=[lambda _: adapter.scored >= scored],
        logger=Silent(),
        seed=seed,
    )
    texts = [adapter.template(candidate) for candidate in found.candidates]
    parents = [texts[own[0]] if own and own[0] is not None else None for own in found.parents]
    every = zip(texts, found.val_aggregate_scores, parents, strict=True)
    return [Evolved(*one) for one in list(every)[1:][:most]]


def own_writer(task: PromptedTask, seed: int) -> Writer:
    """Return what lets the model of a task write.

    Raises:
        TuningError: it is a masked language model.
    """
    if task.lm == "masked":
        raise TuningError(
            f"{task.model_name} is a masked language model, which writes no texts: give writer=, a function from a "
            "text to what follows it, or take how='edits'."
        )
    drawn = iter(range(seed, seed + 10**9))
    return lambda text: next(iter(write_after(task, text, 1, LONGEST, next(drawn))), "")


class Silent:
    """A logger of gepa that says nothing."""

    def log(self, message: str) -> None:
        """Say nothing."""


class Adapter:
    """What gepa asks of a system whose texts it evolves: to run a candidate on rows, and to say what went wrong.

    Args:
        task: asks.
        data: where the rows are from.
        begin: the template behind an instruction.
        batch: gepa's class of what a candidate has reached on rows.
    """

    propose_new_texts = None

    def __init__(self, task: PromptedTask, data: L.LightningDataModule, begin: str, batch: Callable[..., Any]) -> None:
        self.task, self.data, self.begin, self.batch = task, data, begin, batch
        self.scored = 0

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split.

        Raises:
            TuningError: there are none.
        """
        rows = self.data.rows(split) if isinstance(self.data, Rows) else None
        if rows is None or not len(rows):
            raise TuningError(f"how='gepa' reads {split} rows, and there are none: give a {split} split.")
        self._whole = len(rows)
        return list(rows)

    def template(self, candidate: Mapping[str, str]) -> str:
        """Return the template of a candidate."""
        said = candidate[PART].strip().replace("{", "{{").replace("}", "}}")
        return f"{said}\n{self.begin}" if said else self.begin

    def evaluate(self, batch: Sequence[Mapping[str, Any]], candidate: Mapping[str, str], capture_traces: bool) -> Any:
        """Return the answers to rows, whether each is right, and what the writer reads of them."""
        self.task.use_templates(self.template(candidate))
        self.scored += len(batch) == self._whole
        answers, right = self._answers(batch), [self._right(row) for row in batch]
        scores = [float(answer.strip() in found) for answer, found in zip(answers, right, strict=True)]
        fields = self.task.templates[0].fields
        traces = [
            {
                "Inputs": {name: str(row[name]) for name in fields},
                "Generated Outputs": answer,
                "Feedback": "This is right." if score else f"This is wrong. The right answer is {found[0]!r}.",
            }
            for row, answer, score, found in zip(batch, answers, scores, right, strict=True)
        ]
        return self.batch(outputs=answers, scores=scores, trajectories=traces if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: Sequence[str]
    ) -> dict[str, list[Any]]:
        """Return what the writer reads."""
        return {name: list(eval_batch.trajectories) for name in components_to_update}

    @torch.inference_mode()
    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        task, strategy = self.task.eval(), self.task.trainer.strategy
        task.to(strategy.root_device)  # a Trainer that has done its work leaves it on the CPU
        found: list[str] = []
        for start in range(0, len(rows), AT_ONCE):
            own = [dict(row) for row in rows[start : start + AT_ONCE]]
            batch = strategy.batch_to_device(task.on_before_batch_transfer({"fields": own}, 0))
            found += [answer or "" for answer in task.predict_step(batch, 0)["answer"]]
        return found

    def _right(self, row: Mapping[str, Any]) -> list[str]:
        if isinstance(self.task, PromptedGeneration):
            return [answer.strip() for answer in self.task.right_answers(row)]
        assert isinstance(self.data, LabelledRows)
        return [self._names[row[self.data.label]]]

    @cached_property
    def _names(self) -> dict[Any, str]:
        assert isinstance(self.data, LabelledRows)
        assert isinstance(self.task, PromptedClassification)
        labels = self.task.labels
        numbers: dict[Any, int] = {}
        for split in ("train", "validation"):
            numbers.update(class_numbers(self.data.rows(split), self.data.label, split, labels))
        return {value: labels[number] for value, number in numbers.items()}
