"""Finds a prompt in words: candidates are asked on the validation rows, and the best becomes a template file.

Ways to get candidates (``how``):

============ =========================================================================================================
file         those of a file, one a line
mine         the sentences of a text in which a row's field and its answer stand together (LPAQA, 1911.12543)
paraphrase   one word of the template in other words, from a file ``word: other, another``
edits        words are deleted, swapped, paraphrased and added again, the best so far going on (GrIPS, 2203.07281)
gradient     words are replaced by those that the gradient of the loss points to (AutoPrompt, 2010.15980)
write        the model itself writes instructions from solved rows (APE, 2211.01910)
fill         a T5 writes the words between the text and the answer of solved rows (LM-BFF, 2012.15723)
words        other words for the labels, by their likelihood after rows of the label (LM-BFF, 2012.15723)
gepa         a model reads what went wrong and writes better instructions, the best going on (GEPA, 2507.19457)
============ =========================================================================================================

All have one trace: a row for each candidate, with its score and what it came from. What the test rows say of the winner
is for the caller to ask, once.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import yaml  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic
from lightning_peft.prompting.candidates import Editor, lines_of, listed, mined, paraphrased, synonyms_of
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.filled_prompts import filled_prompts
from lightning_peft.tasks.label_words import label_words
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.reflective_search import Writer, evolved
from lightning_peft.tasks.trigger_search import better_words
from lightning_peft.tasks.written_prompts import solved_rows, written_prompts

How = Literal["file", "mine", "paraphrase", "edits", "gradient", "write", "fill", "words", "gepa"]
HOW: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Args:
        template: its text.
        score: on the validation rows.
        how: what it was made by.
        parent: the template that it was made of, if there was one.
        words: label -> its word, where these were searched for.
    """

    template: str
    score: float
    how: str
    parent: str | None = None
    words: dict[str, str] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """It as a row of the trace, without words where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "words" or value is not None}


@dataclass
class Found:
    """The result of a search.

    Args:
        metric: what was compared.
        tried: every candidate, in order; the first is the template that the task had.
    """

    metric: str
    tried: list[Tried] = field(default_factory=list)

    @property
    def best(self) -> Tried:
        """The candidate with the highest score, the first of equals."""
        return max(self.tried, key=lambda one: one.score)

    def save(self, path: str | Path, words: dict[str, str] | None = None) -> Path:
        """Write the best template as a file that the prompted tasks take, and the trace beside it (``.jsonl``)."""
        path = Path(path)
        parts: dict[str, Any] = {"task": "search", "templates": {"found": self.best.template}}
        if words := self.best.words or words:
            parts["words"] = words
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            Path(file).write_text(yaml.safe_dump(parts, allow_unicode=True, sort_keys=False), encoding="utf-8")
        rows = (json.dumps({"metric": self.metric, **one.row}, ensure_ascii=False) for one in self.tried)
        with atomic(path.with_suffix(".jsonl")) as file:
            Path(file).write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path


def search_prompts(
    task: PromptedTask,
    data: L.LightningDataModule,
    how: How = "edits",
    budget: int = 40,
    *,
    file: str | None = None,
    width: int = 5,
    seed: int = 0,
    trainer: L.Trainer | None = None,
    writer: Writer | str | None = None,
) -> Found:
    """Return what a search for a better template found; the task asks by the best one afterwards.

    Args:
        task: a `PromptedClassification` or `PromptedGeneration`; the search begins with its first template.
        data: has validation rows, on which candidates are compared, and training rows, which 'mine', 'gradient',
            'write', 'fill', 'words' and 'gepa' read.
        how: where candidates come from; 'words' keeps the template, and the task takes the best words.
        budget: how many candidates are asked, that of the task among them.
        file: the templates of 'file', the text of 'mine', the paraphrases of 'paraphrase' and, if given, of 'edits'.
        width: how many edits of the best are asked at a time.
        seed: of what is drawn.
        trainer: runs the validations; None: one that logs nothing.
        writer: of 'gepa', what writes instructions: a function from a text to what follows it, or the name of a model
            that litellm knows; of 'fill', the folder or hub id of a T5; None: the model of the task itself.

    Raises:
        TuningError: an argument is out of range or missing, or there are no candidates.
    """
    if how not in HOW:
        raise TuningError(f"how={how!r} is no way to find prompts: take {', '.join(HOW)}.")
    if budget < 2 or width < 1:
        raise TuningError(f"budget={budget} and width={width} leave nothing to compare: take 2 and 1 or more.")
    search = _Search(task, data, budget, width, seed, trainer or _quiet_trainer())
    search.run(how, file, writer)
    best = search.found.best
    task.use_templates(best.template)
    if best.words is not None and isinstance(task, PromptedClassification):
        task.use_words(best.words)
    return search.found


class _Search:
    """Asks candidates until the budget is spent."""

    def __init__(
        self, task: PromptedTask, data: L.LightningDataModule, budget: int, width: int, seed: int, trainer: L.Trainer
    ) -> None:
        self.task, self.data, self.trainer = task, data, trainer
        self.budget, self.width, self.seed = budget, width, seed
        self.found = Found(task.monitor)

    @property
    def left(self) -> int:
        """How many candidates may still be asked."""
        return self.budget - len(self.found.tried)

    def run(self, how: How, file: str | None, writer: Writer | str | None) -> None:
        """Ask the task's own template, then what the search makes of it.

        Raises:
            TuningError: there are no candidates.
        """
        begin = self.task.templates[0].text
        self.ask([begin], "given", None)
        if how == "edits":
            self.edit(Editor(self.seed, synonyms_of(file) if file else {}))
        elif how == "gradient":
            self.replace_words()
        elif how == "words":
            self.replace_label_words()
        elif how == "gepa":
            for one in evolved(self.task, self.data, begin, self.left, self.seed, writer):
                self.found.tried.append(Tried(one.template, one.score, how, one.parent))
        else:
            if how == "fill":
                texts = filled_prompts(self.task, self.data, begin, self.left, writer, self.seed)
            else:
                texts = _candidates(self.task, self.data, how, file, begin, self.left, self.seed)
            if not texts:
                more = "a larger budget" if how == "fill" else "a file with more"
                raise TuningError(f"how={how!r} gives no candidates: give {more}, or take how='edits'.")
            self.ask(texts[: self.left], how, begin if how == "paraphrase" else None)

    def ask(self, texts: Sequence[str], how: str, parent: str | None) -> float:
        """Score templates together, note them, and return the best score of them."""
        self.task.use_templates(list(texts))
        (scores,) = self.trainer.validate(self.task, self.data, verbose=False)
        metric, best = self.found.metric, float("-inf")
        for template in self.task.templates:
            score = scores[metric if len(texts) == 1 else f"{metric}/{template.name}"]
            self.found.tried.append(Tried(template.text, score, how, parent))
            best = max(best, score)
        return best

    def edit(self, editor: Editor) -> None:
        """Go on from the best edit as long as there are new ones."""
        while self.left > 0:
            parent = self.found.best.template
            known = [one.template for one in self.found.tried]
            edits = editor.edits(parent, min(self.width, self.left), known)
            if not edits:
                return
            self.ask(list(edits), "edits", parent)

    def replace_words(self) -> None:
        """Replace one word after the other by what the gradient points to, as long as that finds new templates."""
        if not isinstance(self.task, PromptedClassification):
            raise TuningError("how='gradient' needs the loss of labels: take a PromptedClassification, or how='edits'.")
        place = stale = 0
        while self.left > 0 and stale < LONG_ENOUGH:
            parent = self.found.best.template
            known = {one.template for one in self.found.tried}
            texts = better_words(self.task, self.data, parent, place, self.width + len(known), self.seed)
            fresh = [text for text in texts if text not in known][: min(self.width, self.left)]
            place, stale = place + 1, 0 if fresh else stale + 1
            if fresh:
                self.ask(fresh, "gradient", parent)

    def replace_label_words(self) -> None:
        """Ask by other words for the labels, those first that tell most of the training rows apart."""
        if not isinstance(self.task, PromptedClassification):
            raise TuningError("how='words' finds words of labels: take a PromptedClassification, or how='edits'.")
        template = self.task.templates[0].text
        for words in label_words(self.task, self.data, self.left):
            self.task.use_words(words)
            (scores,) = self.trainer.validate(self.task, self.data, verbose=False)
            self.found.tried.append(Tried(template, scores[self.found.metric], "words", template, words))


LONG_ENOUGH = 8
"""After so many words without a new candidate the search by gradients ends."""


def _candidates(
    task: PromptedTask, data: L.LightningDataModule, how: How, file: str | None, begin: str, most: int, seed: int
) -> list[str]:
    if how == "write":
        return written_prompts(task, data, begin, most, seed)
    if file is None:
        what = {"file": "templates, one a line", "mine": "sentences, one a line", "paraphrase": "word: other, another"}
        raise TuningError(f"how={how!r} needs a file of {what[how]}: give file=.")
    if how == "file":
        return [text for text in listed(file) if text != begin]
    if how == "paraphrase":
        return paraphrased(begin, synonyms_of(file))
    return _mined(task, data, file, begin, most)


def _mined(task: PromptedTask, data: L.LightningDataModule, file: str, begin: str, most: int) -> list[str]:
    fields = Template(begin).fields
    if len(fields) != 1:
        raise TuningError(
            f"how='mine' looks for one field and its answer in a text, and the template has {len(fields)} fields: give "
            "the task a template with one."
        )
    pairs = [(str(row[fields[0]]), answer) for row, answer in solved_rows(task, data)]
    slot = "mask" if Template(begin).is_cloze else "answer"
    return mined(lines_of(file), pairs, fields[0], slot, most)


def _quiet_trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
