"""Answers that a frozen language model generates: directly, by chain of thought, by self-consistency."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.languages import language_of
from lightning_peft.prompting.reasoning import (
    Kind,
    Pick,
    answer_trigger,
    extract_answer,
    majority,
    solved,
)
from lightning_peft.prompting.steps import Checked, check_steps, sound
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.generation_prompts import GenerationPrompts
from lightning_peft.tasks.metrics import ExactMatch
from lightning_peft.tasks.prompted import PromptedTask, padded
from lightning_peft.tasks.sampling import Sampler
from lightning_peft.tasks.template_scores import TemplateScores

Reasoning = Literal["none", "zero_shot"]
Check = Literal["no", "note", "filter"]


class PromptedGeneration(PromptedTask):
    r"""Answer by what a frozen causal or encoder-decoder model writes after a prompt; nothing is trained.

    Logs ``test_exact_match``, the share of rows whose answer is a right one, and ``test_answered``, the share of rows
    with an answer; the same for validation. With several templates they are means over them, and there are
    ``test_exact_match/NAME``. Predictions keep the rationales.

    Args:
        model: folder or hub id of the language model.
        templates: as in `PromptedTask`, e.g. "Q: {question}\nA: {answer}".
        target: column of the right answer: a text or number, or a list of right ones.
        rationale: column of the rationale of training rows: demonstrations show it and end with "The answer is ...".
        language: whose phrases are written and read, such as "zh": a code of `lightning_peft.prompting.languages`, or
            the path of a YAML file with those of another one; None: English is written, and answers are found in what
            is said in any language of the table.
        reasoning: 'zero_shot' lets the model write a rationale after ``trigger``, and asks for the answer then.
        trigger: what the rationale of ``zero_shot`` begins with; None: the language's "Let's think step by step.".
        ask: what asks for the answer after a rationale; None: the words of the paper for this kind of answer, or those
            of the language.
        answer: 'number', 'choice' (a letter), 'yes_no' or 'text': what is looked for in what the model wrote.
        choices: the letters of 'choice'.
        paths: how many texts are sampled for each row; the most frequent answer counts (self-consistency). Texts
            without an answer have no vote; of equally many votes the likelier answer wins, then the first.
        check: work out the sums of each text anew: 'note' what is wrong, unused or unlike the answer in predictions,
            and log ``test_wrong_steps``, the share of texts with a wrong sum; 'filter' leaves such texts, and those
            whose last sum is not their answer, out of the vote, unless no other is left. For answers that are numbers.
        temperature: of sampling; 0: the likeliest token each time.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens of this share together.
        repetition_penalty: θ; the logit of a token that was written already is divided by it, or multiplied where it is
            negative, so that it falls either way; 1: none. CTRL takes 1.2 (1909.05858, section 4.1; its code divides
            negative logits too, which raises them). The words of the prompt are not punished.
        max_new_tokens: where a text is cut [tokens].
        max_answer_tokens: where the answer after a rationale is cut [tokens].
        stop: a text ends before these words; None: before the separator, where there are demonstrations.
        **kwargs: as in `PromptedTask`.

    Sources: few-shot 2201.11903, zero-shot 2205.11916, self-consistency 2203.11171.
    """

    monitor = "val_exact_match"

    def __init__(
        self,
        model: str,
        templates: str | list[str],
        target: str = "answer",
        rationale: str | None = None,
        language: str | None = None,
        reasoning: Reasoning = "none",
        trigger: str | None = None,
        ask: str | None = None,
        answer: Kind = "text",
        choices: str = "ABCDE",
        paths: int = 1,
        check: Check = "no",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 128,
        max_answer_tokens: int = 32,
        stop: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, templates, **kwargs)
        _check_numbers(paths=paths, max_new_tokens=max_new_tokens, max_answer_tokens=max_answer_tokens)
        _check_sampling(paths, temperature, repetition_penalty, check, answer)
        self._refuse_masked()
        self.target, self.rationale, self.language = target, rationale, language
        words = language_of(language or "en")
        self.reasoning, self.trigger = reasoning, words.steps if trigger is None else trigger
        self.kind, self.choices, self.check, self.decimal = answer, choices, check, words.decimal
        self.ask = ask or answer_trigger(answer, choices, language=words)
        self.paths, self.max_new_tokens, self.max_answer_tokens = paths, max_new_tokens, max_answer_tokens
        self.stop = stop if stop is not None else (self.separator if self.demonstrations else None)
        first = self.trigger if reasoning == "zero_shot" else None
        limits = (max_new_tokens, max_answer_tokens)
        self.prompts = GenerationPrompts(self.tokenizer, self.lm, first, self.ask, *limits, words.blank)
        self.sampler = Sampler(self.tokenizer, self.lm, temperature, top_k, top_p, repetition_penalty, self.stop)
        self.take_templates()
        self.answered, self.wrong_steps = MeanMetric(), MeanMetric()

    def take_templates(self) -> None:
        """Make what keeps the scores of each template.

        Raises:
            TuningError: one has words behind the answer.
        """
        self._check_templates()
        names = [template.name for template in self.templates]
        self.by_template = TemplateScores(names, {"exact_match": ExactMatch()}, "exact_match")

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return the answer of a demonstration, with its rationale if there is one.

        Raises:
            TuningError: the row has none.
        """
        right = self.right_answers(row)[0]
        if self.rationale is None:
            return right
        if not isinstance(row.get(self.rationale), str):
            raise TuningError(f"a training row has no rationale in column {self.rationale!r}: give each one.")
        return solved(row[self.rationale], right, self.language or "en")

    def right_answers(self, row: Mapping[str, Any]) -> list[str]:
        """Return the right answers of a row, in the form in which answers are found.

        Raises:
            TuningError: there is none, or one is no answer of this kind.
        """
        if row.get(self.target) is None:
            names = ", ".join(row)
            raise TuningError(f"a row has no answer in column {self.target!r} (it has {names}): name it with target=.")
        given = row[self.target] if isinstance(row[self.target], list) else [row[self.target]]
        found = [self.found_in(str(value), "first") for value in given]
        for value, right in zip(given, found, strict=True):
            if right is None:
                raise TuningError(f"the right answer {value!r} holds no {self.kind}: set answer= to its kind.")
        return [right for right in found if right is not None]

    def found_in(self, text: str, pick: Pick) -> str | None:
        """Return the answer in a text, or None."""
        return extract_answer(text, self.kind, self.choices, pick, self.language)

    def needed(self, split: str) -> list[list[str]]:
        """Return the fields of the templates, and the column of the answer."""
        return [*super().needed(split), *([[self.target]] if split != "predict" else [])]

    def room_left(self, template: int, fields: Mapping[str, Any]) -> int:
        """Return how many tokens a row leaves for its demonstrations."""
        return self.prompts.room(self.room) - len(self.prompts.ids(self.templates[template], fields))

    def write_prompts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[list[int]]]:
        """Return the prompts of rows as texts, and their token ids."""
        texts, ids = [], []
        for number, row, front in self.fronts(rows, None):
            template = self.templates[number]
            texts.append(front.text + template.prompt(rows[row]) + self.prompts.opening)
            ids.append(self.prompts.ids(template, rows[row], front.text, self.prompts.room(self.room)))
        return texts, ids

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return for each prompt ``texts`` and ``answers`` of the paths, their ``scores``, and the ``answer``."""
        seed = zlib.crc32("\0".join(batch["prompts"]).encode()) ^ self.seed
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # of the rows alone: the same whatever was sampled before
            ids, mask = batch["input_ids"], batch["attention_mask"]
            paths = self.sampler.write(self.backbone, ids, mask, self.max_new_tokens, self.paths)
            texts = [self.sampler.text(path) for path in paths]
            if self.reasoning == "none":
                pick: Pick = "last" if self.rationale is not None else "first"
                answers = [self.found_in(text, pick) for text in texts]
            else:
                answers = self._answers_after(ids, mask, texts)
        found = []
        for start in range(0, len(paths), self.paths):
            own = slice(start, start + self.paths)
            scores = [path.score for path in paths[own]]
            one: dict[str, Any] = {"texts": texts[own], "answers": answers[own], "scores": scores, "checks": []}
            if self.check != "no":
                each = zip(texts[own], answers[own], strict=True)
                one["checks"] = [check_steps(text, answer, self.decimal) for text, answer in each]
            found.append(one | {"answer": self._voted(one)})
        return found

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the answers to a batch to the scores of each template."""
        rows = batch["fields"]
        right = [self.right_answers(row) for row in rows]
        found = self(batch)
        for number in range(len(self.templates)):
            answers = [one["answer"] for one in found[number * len(rows) : (number + 1) * len(rows)]]
            self.by_template.add(number, [answer or "" for answer in answers], right)
            for answer in answers:
                self.answered.update(float(answer is not None))
        for one in found:
            for check in one["checks"]:
                self.wrong_steps.update(float(bool(check.wrong)))

    def reset_scores(self, split: Split) -> None:
        """Forget the scores of an earlier epoch."""
        super().reset_scores(split)
        self.answered.reset()
        self.wrong_steps.reset()

    def log_scores(self, split: Split) -> None:
        """Log the scores, and the share of rows with an answer."""
        super().log_scores(split)
        answered = self.answered.compute()
        self.log(f"{split}_answered", answered, prog_bar=True, sync_dist=True)
        if self.check != "no":
            self.log(f"{split}_wrong_steps", self.wrong_steps.compute(), sync_dist=True)
        if answered == 0:
            rank_zero_warn(
                f"no text held an answer of kind {self.kind}: look at the texts of `predict`, and at max_new_tokens."
            )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return for each row ``prompt``, ``text`` (with its rationale), ``scores``, ``answers`` and ``answer``.

        ``text``, ``scores`` and ``answers`` list the paths; of several templates, all their paths vote for ``answer``.
        Where sums are checked, ``steps`` has of each path the ``wrong`` and ``unused`` ones, and ``consistent``.
        """
        found, size = self(batch), len(batch["fields"])
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "text", "scores", "answers", "answer")}
        for row in range(size):
            own = found[row::size]
            prompts = batch["prompts"][row::size]
            joined = {name: [value for one in own for value in one[name]] for name in ("answers", "scores", "checks")}
            columns["prompt"].append(prompts[0] if len(prompts) == 1 else prompts)
            columns["text"].append([text for one in own for text in one["texts"]])
            columns["scores"].append(joined["scores"])
            columns["answers"].append(joined["answers"])
            columns["answer"].append(self._voted(joined))
            if self.check != "no":
                columns.setdefault("steps", []).append([_noted(check) for check in joined["checks"]])
        return columns

    def _voted(self, paths: Mapping[str, Any]) -> str | None:
        """Return the answer that most paths give; with ``filter``, of those alone whose sums hold."""
        answers: list[str | None] = paths["answers"]
        return majority(sound(answers, paths["checks"]) if self.check == "filter" else answers, paths["scores"])

    def _answers_after(self, ids: Tensor, mask: Tensor, rationales: Sequence[str]) -> list[str | None]:
        """Return the answers that the model gives when it has read its rationales."""
        first = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True) for _ in range(self.paths)]
        second = padded(self.tokenizer, self.lm, self.prompts.after_rationales(first, rationales))
        asked = (second["input_ids"].to(ids.device), second["attention_mask"].to(ids.device))
        paths = self.sampler.write(self.backbone, *asked, self.max_answer_tokens, 0)
        return [self.found_in(self.sampler.text(path), "first") for path in paths]

    def _refuse_masked(self) -> None:
        if self.lm == "masked":
            raise TuningError(f"{self.model_name} is a masked language model, which writes no texts: take another.")

    def _check_templates(self) -> None:
        for template in self.templates:
            if template.after:
                raise TuningError(
                    f"{template} has words behind the answer, which are not written: end with {{answer}}."
                )


def _noted(check: Checked) -> dict[str, Any]:
    """Return what a check found, as it is written beside a prediction."""
    wrong, unused = ([step.text for step in steps] for steps in (check.wrong, check.unused))
    return {"wrong": wrong, "unused": unused, "consistent": check.consistent}


def _check_numbers(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise TuningError(f"{name}={value} is out of range: take 1 or more.")


def _check_sampling(paths: int, temperature: float, repetition_penalty: float, check: Check, answer: Kind) -> None:
    if check != "no" and answer != "number":
        raise TuningError(f"check={check!r} compares sums with an answer of kind {answer}: set answer='number'.")
    if paths > 1 and temperature <= 0:
        raise TuningError(f"paths={paths} of temperature=0 are all the same: take a temperature such as 0.7.")
    if repetition_penalty < 1:
        raise TuningError(f"repetition_penalty={repetition_penalty} rewards repetition: take 1 (none) or more.")
