"""Data for instruction tuning as in FLAN: a mixture of tasks, each row in a wording drawn from its task's templates."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.classes import check_columns
from lightning_peft.data.generation import CausalLMData, Seq2SeqData
from lightning_peft.data.sources import SourcedData
from lightning_peft.prompting.instruction_files import read_instructions
from lightning_peft.prompting.instructions import CAP, TEMPLATES, Instructions, mixed, mixing_rates
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.template_parts import options_text, words_of


@dataclass
class InstructionTask:
    """One task of a mixture.

    Args:
        instructions: path of the YAML file with its wordings.
        answer: column of the answer.
        options: whether the answers to choose from stand at the end of each wording that has no ``{options}``, as FLAN
            does for classification; None: where ``words`` of the file names them.
        source: arguments of `SourcedData`, such as train, validation, test, or dataset.
        cluster: the kind of task that it is, e.g. 'sentiment', by which `Instructed` holds tasks out; None: a kind of
            its own, which has the name of the task.
    """

    instructions: str
    answer: str = "label"
    options: bool | None = None
    source: dict[str, Any] | None = None
    cluster: str | None = None


class Instructed(SourcedData):
    """Rows of ``prompt`` and ``target``, made of the rows of several tasks.

    Tasks are mixed in proportion to their rows, of which at most ``cap`` count; each row has a wording drawn by the
    seed.

    Args:
        tokenizer: as in `TokenData`.
        tasks: name -> task.
        count: how many training rows are drawn; None: as many as the capped tasks have.
        cap: as how many rows a task counts at most.
        templates: how many wordings each task must have, the inverse ones included; None: any number.
        held_out: clusters of tasks that are tested alone, and neither trained nor validated: how FLAN asks whether
            instructions help with a kind of task that has not been seen (section 2.2). Then the test has no other.
        seed: of the draws.
        **kwargs: as in `TokenData`.
    """

    def __init__(
        self,
        tokenizer: str,
        tasks: dict[str, InstructionTask],
        count: int | None = None,
        cap: int = CAP,
        templates: int | None = TEMPLATES,
        held_out: Sequence[str] = (),
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, seed=seed, **kwargs)
        if not tasks:
            raise TuningError("there are no tasks to mix: give one or more.")
        self.tasks = {name: InstructionTask(**t) if isinstance(t, Mapping) else t for name, t in tasks.items()}
        self._mixed: dict[str, list[tuple[str, int]]] = {}
        self.count, self.cap, self.held_out = count, cap, tuple(held_out)
        self._check_clusters()
        self.instructions: dict[str, Instructions] = {
            name: read_instructions(task.instructions, templates) for name, task in self.tasks.items()
        }

    @cached_property
    def _sources(self) -> dict[str, SourcedData]:
        return {
            name: SourcedData(tokenizer=self.tokenizer_name, seed=self.seed, **task.source or {})
            for name, task in self.tasks.items()
        }

    def rows(self, split: str) -> Dataset | None:
        """Return prompts and targets: drawn by the mixture to train, each row once for the other splits.

        Rows to train have all wordings, the inverse ones too; the others only wordings that ask for the answer.

        Raises:
            TuningError: a task lacks rows, a column or a label.
        """
        own = {name: self._sources[name].rows(split) for name in self._asked(split)}
        found = {name: rows for name, rows in own.items() if rows is not None}
        if not found:
            return None
        if split == "train":
            if len(found) < len(own):
                lacking = next(name for name, rows in own.items() if rows is None)
                raise TuningError(f"task {lacking!r} has no training rows: give it some.")
            sizes = {name: len(rows) for name, rows in found.items()}
            count = self.count or sum(min(size, self.cap) for size in sizes.values())
            drawn = list(mixed(sizes, count, self.cap, self.seed))
        else:
            drawn = [(name, row) for name, rows in found.items() for row in range(len(rows))]
        self._mixed[split] = drawn
        for name, rows in found.items():
            check_columns(rows, split, [self.tasks[name].answer] if split != "predict" else [])
            for template in self.instructions[name].templates if split == "train" else self.instructions[name].scored:
                template.check_columns([*rows.column_names, "answer"])
        draw = random.Random(f"{split} {self.seed}")
        return Dataset.from_list([self._written(name, found[name][row], split, draw) for name, row in drawn])

    def row_name(self, split: str, number: int) -> str:
        """Return what an error calls a row: that of its task."""
        task, row = self._mixed[split][number]
        return f"task {task!r}: {self._sources[task].row_name(split, row)}"

    def rates(self) -> dict[str, float]:
        """Return the share of each task among the training rows."""
        rows = {name: self._sources[name].rows("train") for name in self._asked("train")}
        return mixing_rates({name: len(own) for name, own in rows.items() if own is not None}, self.cap)

    def _check_clusters(self) -> None:
        clusters = {self._cluster(name) for name in self.tasks}
        for name in self.held_out:
            if name not in clusters:
                raise TuningError(f"held_out has {name!r}, which is the cluster of no task{near(name, clusters)}.")
        if clusters <= set(self.held_out):
            raise TuningError(f"held_out={list(self.held_out)} leaves no task to train: hold out fewer clusters.")

    def _cluster(self, name: str) -> str:
        return self.tasks[name].cluster or name

    def _asked(self, split: str) -> list[str]:
        """Return the tasks that a split has."""
        unseen = [name for name in self.tasks if self._cluster(name) in self.held_out]
        if split in ("test", "predict") and unseen:
            return unseen
        return [name for name in self.tasks if name not in unseen]

    def _written(self, name: str, row: Mapping[str, Any], split: str, draw: random.Random) -> dict[str, str]:
        instructions, task = self.instructions[name], self.tasks[name]
        template = draw.choice(instructions.templates if split == "train" else instructions.scored)
        answer = self._answer(name, row) if split != "predict" or template.inverse else ""
        options = list(instructions.words.values())
        fields = {**row, "answer": answer}
        if template.inverse:
            text = template.prompt(fields, options)
            return {"prompt": text, "target": self._turned(template, row), "task": name, "template": template.name}
        text = template.prompt(fields, options)
        suffixed = bool(options) if task.options is None else task.options
        if suffixed and not template.has_options:
            text = f"{text.rstrip()}\n\n{options_text(options)}"
        return {"prompt": text, "target": answer, "task": name, "template": template.name}

    def _answer(self, name: str, row: Mapping[str, Any]) -> str:
        value = words_of(row[self.tasks[name].answer], self.tasks[name].answer)
        words = self.instructions[name].words
        if words and value not in words:
            raise TuningError(
                f"task {name!r} has the label {value!r}, which its file has no word for: add it to words."
            )
        return words.get(value, value)

    def _turned(self, template: Template, row: Mapping[str, Any]) -> str:
        """Return what an inverse wording asks for: the columns that it does not show, but for the answer."""
        names = [name for name in row if name not in template.fields and isinstance(row[name], str)]
        answers = {task.answer for task in self.tasks.values()}
        names = [name for name in names if name not in answers]
        if not names:
            raise TuningError(
                f"{template} shows all columns of a row, so nothing is left to write: take one out of it."
            )
        return " ".join(row[name] for name in names)


class InstructionSeq2SeqData(Instructed, Seq2SeqData):
    """Instructions and answers of several tasks for an encoder-decoder.

    Any method trains on it with the task `Seq2Seq`, and `PromptedClassification` scores the result over all wordings of
    one task.

    Args:
        tokenizer: as in `TokenData`.
        tasks: name -> task.
        **kwargs: as in `Instructed`, `Seq2SeqData` and `TokenData`.

    Source: FLAN, Wei et al. 2021 (2109.01652), section 2.
    """

    def __init__(self, tokenizer: str, tasks: dict[str, InstructionTask], **kwargs: Any) -> None:
        super().__init__(tokenizer, tasks, source="prompt", target="target", **kwargs)


class InstructionCausalLMData(Instructed, CausalLMData):
    """Instructions and answers of several tasks for a causal language model; only the answers are learned.

    Any method trains on it with the task `CausalLM`.

    Args:
        tokenizer: as in `TokenData`.
        tasks: name -> task.
        **kwargs: as in `Instructed`, `CausalLMData` and `TokenData`.

    Source: FLAN, Wei et al. 2021 (2109.01652), section 2.
    """

    def __init__(self, tokenizer: str, tasks: dict[str, InstructionTask], **kwargs: Any) -> None:
        super().__init__(tokenizer, tasks, prompt="prompt", target="target", **kwargs)
