"""Answers that a frozen language model writes: directly, after a rationale, or by a vote over several rationales."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from lightning_peft.core.errors import TuningError
from lightning_peft.data.padding import Padder
from lightning_peft.prompting.encoding import encode, special_ids, text_ids
from lightning_peft.prompting.instructions import over_templates
from lightning_peft.prompting.reasoning import (
    STEP_BY_STEP,
    Kind,
    Pick,
    answer_trigger,
    extract_answer,
    majority,
    solved,
)
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.in_context import Front
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.scores import ExactMatch

Reasoning = Literal["none", "zero_shot"]


class Written:
    """What a model wrote for one prompt.

    Args:
        ids: its tokens, without those after the end.
        score: the mean log-likelihood of a token.
    """

    __slots__ = ("ids", "score")

    def __init__(self, ids: list[int], score: float) -> None:
        self.ids, self.score = ids, score


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
        reasoning: 'zero_shot' lets the model write a rationale after ``trigger``, and asks for the answer then.
        trigger: what the rationale of ``zero_shot`` begins with.
        ask: what asks for the answer after a rationale; None: the words of the paper for this kind of answer.
        answer: 'number', 'choice' (a letter), 'yes_no' or 'text': what is looked for in what the model wrote.
        choices: the letters of 'choice'.
        paths: how many texts are sampled for each row; the most frequent answer counts (self-consistency). Texts
            without an answer have no vote; of equally many votes the likelier answer wins, then the first.
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
        reasoning: Reasoning = "none",
        trigger: str = STEP_BY_STEP,
        ask: str | None = None,
        answer: Kind = "text",
        choices: str = "ABCDE",
        paths: int = 1,
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
        for name, value in (
            ("paths", paths),
            ("max_new_tokens", max_new_tokens),
            ("max_answer_tokens", max_answer_tokens),
        ):
            if value < 1:
                raise TuningError(f"{name}={value} is out of range: take 1 or more.")
        if paths > 1 and temperature <= 0:
            raise TuningError(f"paths={paths} of temperature=0 are all the same: take a temperature such as 0.7.")
        if repetition_penalty < 1:
            raise TuningError(f"repetition_penalty={repetition_penalty} rewards repetition: take 1 (none) or more.")
        if self.lm == "masked":
            raise TuningError(f"{self.model_name} is a masked language model, which writes no texts: take another.")
        for template in self.templates:
            if template.after:
                raise TuningError(
                    f"{template} has words behind the answer, which are not written: end with {{answer}}."
                )
        self.target, self.rationale = target, rationale
        self.reasoning, self.trigger = reasoning, trigger
        self.kind, self.choices = answer, choices
        self.ask = ask or answer_trigger(answer, choices)
        self.paths, self.temperature, self.top_k, self.top_p = paths, temperature, top_k, top_p
        self.repetition_penalty = repetition_penalty
        self.max_new_tokens, self.max_answer_tokens = max_new_tokens, max_answer_tokens
        self.stop = stop if stop is not None else (self.separator if self.demonstrations else None)
        self.scores = torch.nn.ModuleList(MetricCollection({"exact_match": ExactMatch()}) for _ in self.templates)
        self.answered = MeanMetric()

    def check(self, data: Any, stage: str) -> None:
        """Nothing is asked of the data but the columns, which each batch shows."""

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
        return solved(row[self.rationale], right)

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
        return extract_answer(text, self.kind, self.choices, pick)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write the prompts of the rows, one template after the other."""
        if "prompts" in batch:
            return batch
        rows, prompts, ids = self.rows_of(batch), [], []
        extra = f" {self.trigger}" if self.reasoning == "zero_shot" else ""
        for template in self.templates:
            chosen = self.in_context().choose(rows, template.fields)
            for fields, numbers in zip(rows, chosen, strict=True):
                front = self._front(template, fields, numbers, extra)
                self.tell_of_dropped(front.shown, front.dropped)
                prompts.append(front.text + template.prompt(fields) + extra)
                ids.append(self._ids(template, fields, front.text, extra, self._room))
        pad = Padder.of(self.tokenizer, "left" if self.lm == "causal" else "right")
        inputs = pad({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        return {**batch, **inputs, "prompts": prompts}

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return for each prompt ``texts`` and ``answers`` of the paths, their ``scores``, and the ``answer``."""
        seed = zlib.crc32("\0".join(batch["prompts"]).encode()) ^ self.seed
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # of the rows alone: the same whatever was sampled before
            ids, mask = batch["input_ids"], batch["attention_mask"]
            paths = self._write(ids, mask, self.max_new_tokens, self.paths)
            texts = [self._text(path) for path in paths]
            if self.reasoning == "none":
                pick: Pick = "last" if self.rationale is not None else "first"
                answers = [self.found_in(text, pick) for text in texts]
            else:
                answers = self._answers_after(ids, mask, texts)
        found = []
        for start in range(0, len(paths), self.paths):
            own = slice(start, start + self.paths)
            scores = [path.score for path in paths[own]]
            answer = majority(answers[own], scores)
            found.append({"texts": texts[own], "answers": answers[own], "scores": scores, "answer": answer})
        return found

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch."""
        self._add(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch."""
        self._add(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return for each row ``prompt``, ``text`` (with its rationale), ``scores``, ``answers`` and ``answer``.

        ``text``, ``scores`` and ``answers`` list the paths; of several templates, all their paths vote for ``answer``.
        """
        found, size = self(batch), len(batch["fields"])
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "text", "scores", "answers", "answer")}
        for row in range(size):
            own = found[row::size]
            prompts = batch["prompts"][row::size]
            answers = [answer for one in own for answer in one["answers"]]
            scores = [score for one in own for score in one["scores"]]
            columns["prompt"].append(prompts[0] if len(prompts) == 1 else prompts)
            columns["text"].append([text for one in own for text in one["texts"]])
            columns["scores"].append(scores)
            columns["answers"].append(answers)
            columns["answer"].append(majority(answers, scores))
        return columns

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all processes."""
        self._log("val_")

    def on_test_epoch_end(self) -> None:
        """Log the scores over all processes."""
        self._log("test_")

    @property
    def _room(self) -> int:
        """The most tokens of a first prompt, so that all that follows it has room."""
        follows = self.max_new_tokens if self.lm == "causal" else 0
        if self.reasoning == "zero_shot":
            follows = self.max_new_tokens + len(text_ids(self.tokenizer, self._asked, joins=True))
            follows += self.max_answer_tokens if self.lm == "causal" else 0
        if follows >= self.room:
            raise TuningError(
                f"what the model may write takes {follows} of its {self.room} tokens: lower max_new_tokens, now "
                f"{self.max_new_tokens}."
            )
        return self.room - follows

    @property
    def _asked(self) -> str:
        return f" \n{self.ask}"

    def _front(self, template: Template, fields: Mapping[str, Any], numbers: Sequence[int], extra: str) -> Front:
        if not numbers and not self.instruction:
            return Front("")
        used = len(self._ids(template, fields, "", extra, None))
        return self.in_context().front(template, self.tokenizer, numbers, None, self._room - used)

    def _ids(
        self, template: Template, fields: Mapping[str, Any], front: str, extra: str, room: int | None
    ) -> list[int]:
        """Return the ids of a prompt and of what the answer begins with."""
        opening, closing = special_ids(self.tokenizer)
        closing = [] if self.lm == "causal" else closing
        more = text_ids(self.tokenizer, extra, joins=True) if extra else []
        left = None if room is None else room - len(opening) - len(closing) - len(more)
        if left is not None and left < 1:
            raise TuningError(f"prompts have at most {room} tokens, which leaves none for the data: raise max_length.")
        own = encode(
            template, self.tokenizer, fields, style="causal", max_length=left, front=front, specials=False
        ).input_ids
        return [*opening, *own, *more, *closing]

    def _write(self, ids: Tensor, mask: Tensor, most: int, paths: int) -> list[Written]:
        """Return what the model writes after each row, ``paths`` texts a row; only these are sampled."""
        samples = self.temperature > 0 and paths == self.paths
        how: dict[str, Any] = {"do_sample": False}
        if samples:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.repetition_penalty > 1:
            # Of what is written alone: the padding of a prompt is the end of a text in many vocabularies.
            prompt = ids.shape[1] if self.lm == "causal" else 1
            punish = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty), prompt_ignore_length=prompt)
            how["logits_processor"] = LogitsProcessorList([punish])
        out = self.backbone.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            num_return_sequences=paths if samples else 1,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **how,
        )
        new = out.sequences[:, ids.shape[1] :] if self.lm == "causal" else out.sequences[:, 1:]
        logits = torch.stack(out.logits, 1).float().log_softmax(-1)
        likely = logits.gather(2, new[:, : logits.shape[1]].unsqueeze(2)).squeeze(2)
        ends = self.backbone.generation_config.eos_token_id
        stops = {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
        written = []
        for row, own in zip(new.tolist(), likely, strict=True):
            count = next((i for i, token in enumerate(row) if token in stops), len(row))
            counted = max(1, min(count + 1, len(own)))  # the end itself was chosen, too
            written.append(Written(row[:count], own[:counted].mean().item()))
        return written

    def _text(self, path: Written) -> str:
        text: str = self.tokenizer.decode(path.ids, skip_special_tokens=True)
        return text.split(self.stop)[0] if self.stop else text

    def _answers_after(self, ids: Tensor, mask: Tensor, rationales: Sequence[str]) -> list[str | None]:
        """Return the answers that the model gives when it has read its rationales."""
        closing = [] if self.lm == "causal" else special_ids(self.tokenizer)[1]
        asked = text_ids(self.tokenizer, self._asked, joins=True)
        rows = []
        for number, rationale in enumerate(rationales):
            row = number // self.paths
            first = ids[row][mask[row].bool()].tolist()
            first = first[: len(first) - len(closing)]
            read = text_ids(self.tokenizer, f" {rationale.strip()}", joins=True) if rationale.strip() else []
            rows.append([*first, *read[: self.max_new_tokens], *asked, *closing])
        pad = Padder.of(self.tokenizer, "left" if self.lm == "causal" else "right")
        batch = pad({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        found = self._write(
            batch["input_ids"].to(ids.device), batch["attention_mask"].to(ids.device), self.max_answer_tokens, 0
        )
        return [self.found_in(self._text(path), "first") for path in found]

    def _add(self, batch: Mapping[str, Any]) -> None:
        rows = batch["fields"]
        right = [self.right_answers(row) for row in rows]
        found = self(batch)
        for number, scores in enumerate(self.scores):
            answers = [one["answer"] for one in found[number * len(rows) : (number + 1) * len(rows)]]
            scores.update([answer or "" for answer in answers], right)  # type: ignore[operator]
            for answer in answers:
                self.answered.update(float(answer is not None))

    def _log(self, prefix: str) -> None:
        """Log the scores of an epoch, and begin anew."""
        each = {}
        for template, scores in zip(self.templates, self.scores, strict=True):
            each[template.name] = scores.compute()["exact_match"].item()  # type: ignore[operator]
            scores.reset()  # type: ignore[operator]
        over = over_templates(list(each.values()))
        self.log(f"{prefix}exact_match", over.mean, prog_bar=True, sync_dist=True)
        if len(each) > 1:
            for spread in ("std", "min", "max"):
                self.log(f"{prefix}exact_match_{spread}", getattr(over, spread), sync_dist=True)
            for name, value in each.items():
                self.log(f"{prefix}exact_match/{name}", value, sync_dist=True)
        answered = self.answered.compute()
        self.log(f"{prefix}answered", answered, prog_bar=True, sync_dist=True)
        if answered == 0:
            rank_zero_warn(
                f"no text held an answer of kind {self.kind}: look at the texts of `predict`, and at max_new_tokens."
            )
        self.answered.reset()
        if self.demonstrations:
            self.log(f"{prefix}demonstrations", self.shown.compute(), sync_dist=True)
        self.shown.reset()
