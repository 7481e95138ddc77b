"""Classification by the likelihood of label words in a prompt, with a frozen language model."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import Rows
from lightning_peft.prompting.verbalizer import Combine, Verbalizer
from lightning_peft.tasks import likelihoods
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.class_prompts import ClassPrompts, Prompt
from lightning_peft.tasks.class_scores import ClassScores, class_metrics
from lightning_peft.tasks.label_scores import LabelScores, Normalise, grouped
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.template_scores import TemplateScores

_CONTENT_FREE = ("N/A", "[MASK]", "")


class PromptedClassification(PromptedTask, ClassScores):
    """Classify rows by the words that a frozen language model finds likeliest in a prompt; nothing is trained.

    The score of a word is the log-likelihood of its tokens: in the place of ``{mask}`` for a masked model, after the
    prompt for the others. Words make the score of their label as the verbalizer says. Logs what `TextClassification`
    logs; with several templates each score is the mean over them, and there are ``test_accuracy_std``, ``_min``,
    ``_max``, ``test_accuracy/NAME`` of each, and ``test_accuracy_best``, that of the template that is best on the
    validation split.

    Args:
        model: folder or hub id of the language model.
        templates: as in `PromptedTask`.
        words: label -> its word or words; None: those of the templates' file, else the names of the labels.
        labels: the labels, in the order of their numbers; None: those of ``words``.
        combine: 'mean' of the scores of a label's words (PET), 'max', or 'sum' of their likelihoods.
        normalise: 'sum' of the log-likelihoods of a word's tokens; their 'mean'; or 'pmi': the sum less that of the
            word after the template with empty fields and no demonstrations. With "{answer} {text}" that leaves the
            likelihood of the text behind each label, so that a causal model says which control code a text came from.
        calibrate: divide the probabilities of the labels by those that the same prompt gives with inputs without
            content (contextual calibration).
        content_free: these inputs.
        content_free_mean: how the probabilities after them are averaged: 'raw' ones, as the authors' code does, or
            'normalised' over the labels first, so that all inputs count alike.
        multi_token: whether words may have several tokens; a causal model or decoder takes them always.
        decoding: how a masked model fills several masks: 'confident' (the surest first, as PET does),
            'left_to_right' or 'parallel'.
        best_on_validation: with several templates, test also on the validation split, to name the best of them.
        share_prefix: compute the keys and values of demonstrations once for all questions and labels (causal models).
        prompts_at_once: how many prompts the model is fed together.
        **kwargs: as in `PromptedTask`.

    Sources: PET 2001.07676 and 2009.07118; in-context learning 2005.14165; calibration 2102.09690; PMI 2104.08315.
    """

    def __init__(
        self,
        model: str,
        templates: str | list[str],
        words: dict[str, str | list[str]] | None = None,
        labels: list[str] | None = None,
        combine: Combine = "mean",
        normalise: Normalise = "sum",
        calibrate: bool = False,
        content_free: Sequence[str] = _CONTENT_FREE,
        content_free_mean: likelihoods.ContentFreeMean = "raw",
        multi_token: bool = False,
        decoding: likelihoods.Decoding = "confident",
        best_on_validation: bool = True,
        share_prefix: bool = True,
        prompts_at_once: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, templates, **kwargs)
        if prompts_at_once < 1 or (calibrate and not content_free):
            raise TuningError(
                f"prompts_at_once={prompts_at_once} and content_free={list(content_free)} are too few: take 1 or more."
            )
        own: Mapping[str, Any] = words or self.instructions.words or {label: label for label in labels or ()}
        if not own:
            raise TuningError("there are no labels: give words= or labels=.")
        self.verbalizer = Verbalizer(own, combine).ordered(labels or list(own))
        self.best_on_validation = best_on_validation
        several = multi_token or self.lm != "masked"
        self._prompting = (several, tuple(content_free) if calibrate else (), normalise == "pmi")
        self._scoring = (normalise, decoding, share_prefix, prompts_at_once, content_free_mean)
        self.score_classes(self.verbalizer.labels)
        self.take_templates()
        self.best_template: str | None = None
        self._answers: dict[Any, str] = {}

    def use_words(self, words: Mapping[str, str | list[str]]) -> None:
        """Ask for these words of the labels from now on; all else stays as it is.

        Args:
            words: label -> its word or words.

        Raises:
            TuningError: a label has none, or one does not fit the model.
        """
        self.verbalizer = Verbalizer(words, self.verbalizer.combine).ordered(self.labels)
        self.take_templates()
        self._forget()

    def take_templates(self) -> None:
        """Make what writes prompts of the templates, scores labels in them, and keeps the scores of each."""
        self.prompts = ClassPrompts(self.tokenizer, self.lm, self.templates, self.verbalizer, *self._prompting)
        self.label_scores = LabelScores(self.prompts, *self._scoring)
        names = [template.name for template in self.templates]
        self.by_template = TemplateScores(names, class_metrics(len(self.labels)), "accuracy")

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the classes of the verbalizer, and the columns of the templates."""
        ClassScores.check_data(self, data, stage)
        self._forget()

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return the first word of the row's label."""
        data = self.labelled()
        if not self._answers:
            numbers = class_numbers(data.rows("train"), data.label, "train", self.labels)
            self._answers = {value: self.prompts.options[number] for value, number in numbers}
        return self._answers[row[data.label]]

    def classes_of(self, rows: Any) -> Sequence[Any]:
        """Return the labels."""
        return list(rows[self.labelled().label][:])

    def room_left(self, template: int, fields: Mapping[str, Any]) -> int:
        """Return how many tokens a row leaves for its demonstrations."""
        return self.room - self.prompts.length(template, fields)

    def write_prompts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[list[int]]]:
        """Return the prompts of rows, and of the inputs without content that they are compared with."""
        prompts: list[Prompt] = []
        known = set(self.label_scores.without_row)
        for template, row, front in self.fronts(rows, self.prompts.options):
            prompts += self.prompts.of_row(row, template, rows[row], front, self.room)
            prompts += self.prompts.without_row(template, front, self.room, known)
        return prompts, [prompt.input_ids for prompt in prompts]

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return log p of the labels, for each row and template, [B, templates, C]."""
        return self.label_scores(self.backbone, batch)

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add a batch to the scores of each template, and in the test to the confusions."""
        found, labels = self(batch), batch["labels"]
        for number in range(len(self.templates)):
            self.by_template.add(number, found[:, number], labels)
        if split == "test":
            self.confusion.update(found.flatten(0, 1), labels.repeat_interleave(found.shape[1]))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return of each row ``answer``, ``scores`` (log p of the labels), ``prompt``, and how many ``demonstrations``.

        With several templates the scores are the means over them, and ``prompt`` lists the prompts.
        """
        scores = self(batch).mean(1).log_softmax(-1)
        texts: dict[int, list[str]] = {}
        shown: dict[int, int] = {}
        for group in grouped(batch["prompts"]):
            prompt = batch["prompts"][group[0]]
            if prompt.row >= 0:
                texts.setdefault(prompt.row, []).append(prompt.text)
                shown[prompt.row] = prompt.front.shown
        rows = range(len(scores))
        return {
            "prompt": [texts[row][0] if len(texts[row]) == 1 else texts[row] for row in rows],
            "scores": [dict(zip(self.labels, row, strict=True)) for row in scores.tolist()],
            "answer": [self.labels[label] for label in scores.argmax(1).tolist()],
            "demonstrations": [shown[row] for row in rows],
        }

    def on_validation_start(self) -> None:
        """Forget what belongs to other data or weights."""
        self._forget()

    def on_test_start(self) -> None:
        """Forget the last test; with several templates, find out which is best on the validation split."""
        super().on_test_start()
        self._forget()
        data = self.data
        several = len(self.templates) > 1 and self.best_on_validation
        if several and isinstance(data, Rows) and data.rows("validation") is not None:
            self.best_template = self._find_best(data)

    on_predict_start = on_validation_start

    def log_scores(self, split: Split) -> None:
        """Log the scores, and in the test the accuracy of the template that is best on the validation split."""
        super().log_scores(split)
        if split == "test" and self.best_template is not None:
            self.log("test_accuracy_best", self.by_template.of_each()[self.best_template]["accuracy"], sync_dist=True)

    def _forget(self) -> None:
        self.label_scores.forget()
        self._answers = {}

    def _find_best(self, data: L.LightningDataModule) -> str:
        """Return the name of the template that is best on the validation split."""
        data.setup("validate")
        self.reset_scores("val")
        for number, batch in enumerate(data.val_dataloader()):
            batch = self.on_before_batch_transfer(batch, 0)
            batch = self.trainer.strategy.batch_to_device(batch)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_batch_start(self.trainer, self, batch, number)
            self.score(batch, "val")
        each = self.by_template.of_each()
        return max(each, key=lambda name: each[name]["accuracy"])
