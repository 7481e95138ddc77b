"""Classes as words that a frozen language model finds likely in a prompt: cloze and in-context learning."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.padding import Padder
from lightning_peft.prompting.encoding import encode, mask_id, sentinel_id, special_ids, text_ids, verbalizer_ids
from lightning_peft.prompting.instructions import over_templates
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.template_parts import Mask
from lightning_peft.prompting.verbalizer import Combine, Verbalizer
from lightning_peft.tasks import scoring
from lightning_peft.tasks.in_context import Front
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.text_classification import ClassScores

Normalise = Literal["sum", "mean", "pmi"]
_CONTENT_FREE = ("N/A", "[MASK]", "")
_NULL = -1
"""What stands for the number of the row in prompts without a row, and for that of the content-free input in PMI's."""


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
        multi_token: bool = False,
        decoding: scoring.Decoding = "confident",
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
        self.normalise, self.calibrate, self.content_free = normalise, calibrate, tuple(content_free)
        self.decoding = decoding
        self.best_on_validation, self.share_prefix, self.at_once = best_on_validation, share_prefix, prompts_at_once
        several = multi_token or self.lm != "masked"
        self.word_ids = [
            verbalizer_ids(self.verbalizer, self.tokenizer, template.lead, several) for template in self.templates
        ]
        self.score_classes(self.verbalizer.labels)
        self.of_templates = torch.nn.ModuleList(
            self.test_scores.clone() for _ in self.templates if len(self.templates) > 1
        )
        self.best_template: str | None = None
        self._said: dict[Any, str] = {}
        self._forget()

    def check(self, data: Any, stage: str) -> None:
        """See that the data have the classes of the verbalizer, and the columns of the templates."""
        ClassScores.check(self, data, stage)
        self._forget()

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return the first word of the row's label."""
        if not self._said:
            data = self.data()
            if not hasattr(data, "label_names"):
                raise TuningError("demonstrations need labelled training rows: give a data module with classes.")
            first = [own[0] for own in self.verbalizer.of.values()]
            numbers = class_numbers(data.rows("train"), data.label, "train", self.labels)
            self._said = {value: first[number] for value, number in numbers}
        return self._said[row[self.data().label]]

    def classes_of(self, rows: Any) -> Sequence[Any]:
        """Return the labels."""
        return list(rows[self.data().label][:])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write the prompts of the rows, and of the inputs without content that they are compared with."""
        if "prompts" in batch:
            return batch
        rows, asked = self.rows_of(batch), set[Any]()
        prompts: list[Prompt] = []
        for number, template in enumerate(self.templates):
            chosen = self.in_context().choose(rows, template.fields)
            for row, (fields, demonstrations) in enumerate(zip(rows, chosen, strict=True)):
                front = self._front(number, template, fields, demonstrations)
                self.tell_of_dropped(front.shown, front.dropped)
                prompts += self._prompts(row, number, template, fields, front)
                prompts += self._without_content(number, template, front, asked)
        pad = Padder.of(self.tokenizer, "left" if self.lm == "causal" else "right")
        ids = [prompt.input_ids for prompt in prompts]
        inputs = pad({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        return {**batch, **inputs, "prompts": prompts}

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return log p of the labels, for each row and template, [B, templates, C]."""
        prompts: list[Prompt] = batch["prompts"]
        words = self._word_scores(batch)
        found: dict[tuple[int, int], Tensor] = {}
        free: dict[tuple[int, str], list[Tensor]] = {}
        for group in _grouped(prompts):
            first = prompts[group[0]]
            order = torch.tensor([word for i in group for word in prompts[i].which]).argsort()
            score = torch.cat([words[i] for i in group])[order]
            if first.row >= 0:
                found[first.row, first.template] = score
            elif first.free == _NULL:
                self._null[first.template] = score
            else:
                free.setdefault((first.template, first.front.text), []).append(score)
        for (template, front), scores in free.items():
            labels = torch.stack([self._label_scores(score, template) for score in scores])
            self._priors[template, front] = scoring.content_free_prior(labels)
        fronts = {(p.row, p.template): p.front.text for p in prompts}
        rows = len(batch["fields"])
        return torch.stack(
            [
                torch.stack([self._calibrated(found[row, t], t, fronts[row, t]) for t in range(len(self.templates))])
                for row in range(rows)
            ]
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch."""
        self._add(self.val_scores, batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch and count its confusions."""
        scores = self._add(self.test_scores, batch)
        count = scores.shape[1]
        self.confusion.update(scores.flatten(0, 1), batch["labels"].repeat_interleave(count))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return of each row ``answer``, ``scores`` (log p of the labels), ``prompt``, and how many ``demonstrations``.

        With several templates the scores are the means over them, and ``prompt`` lists the prompts.
        """
        scores = self(batch).mean(1).log_softmax(-1)
        texts: dict[int, list[str]] = {}
        shown: dict[int, int] = {}
        for group in _grouped(batch["prompts"]):
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
        data = self.data()
        several = len(self.templates) > 1 and self.best_on_validation
        if several and hasattr(data, "rows") and data.rows("validation") is not None:
            self.best_template = self._find_best(data)

    def on_predict_start(self) -> None:
        """Forget what belongs to other data or weights."""
        self._forget()

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all processes."""
        self._log(self.val_scores, "val_")

    def on_test_epoch_end(self) -> None:
        """Log the scores over all processes, and sum the confusions."""
        super().on_test_epoch_end()
        best = self._log(self.test_scores, "test_")
        if best is not None:
            self.log("test_accuracy_best", best, sync_dist=True)

    def _forget(self) -> None:
        """Forget what was computed of prompts without content, and of prefixes: it depends on the weights."""
        self._null: dict[int, Tensor] = {}
        self._priors: dict[tuple[int, str], Tensor] = {}
        self._shared: dict[tuple[int, ...], scoring.Shared | None] = {}
        self._said = {}

    def _front(self, number: int, template: Template, fields: Mapping[str, Any], chosen: Sequence[int]) -> Front:
        """Return the demonstrations that fit before this row."""
        if not chosen and not self.instruction:
            return Front("")
        longest = max(map(len, self.word_ids[number]))
        own = encode(template, self.tokenizer, fields, style=self.lm, masks=longest, options=self._options)
        used = len(own.input_ids) + len(own.tail) + (longest if self.lm == "causal" else 0)
        return self.in_context().front(template, self.tokenizer, chosen, self._options, self.room - used)

    @property
    def _options(self) -> list[str]:
        return [own[0] for own in self.verbalizer.of.values()]

    def _prompts(
        self, row: int, number: int, template: Template, fields: Mapping[str, Any], front: Front, free: int = _NULL
    ) -> list[Prompt]:
        """Return the prompts of one row and template: one, or for a masked model one for each length of words."""
        words = self.word_ids[number]
        shares = self.lm == "causal" and bool(front.text)
        shared: tuple[int, ...] = ()
        if shares:
            opening, _ = special_ids(self.tokenizer)
            shared = (*opening, *text_ids(self.tokenizer, front.text))
        lengths = sorted({len(word) for word in words}) if self.lm == "masked" else [max(map(len, words))]
        found = []
        for length in lengths:
            room = self.room - len(shared) - (length if self.lm == "causal" else 0)
            encoded = encode(
                template, self.tokenizer, fields, style=self.lm, max_length=room, masks=length, options=self._options,
                front="" if shares else front.text, specials=not shares,
            )  # fmt: skip
            ids = encoded.input_ids or [self._first_id]
            which = [i for i, word in enumerate(words) if self.lm != "masked" or len(word) == length]
            text = front.text + template.render(fields, options=self._options, answer=None if template.is_cloze else "")
            scored = [words[i] + encoded.tail for i in which]
            found.append(Prompt(row, number, front, free, ids, shared, which, scored, text.rstrip(" ")))
        return found

    def _without_content(self, number: int, template: Template, front: Front, asked: set[Any]) -> list[Prompt]:
        """Return the prompts that tell how likely labels are anyway, if that is not known yet, nor ``asked``."""
        found = []
        if self.normalise == "pmi" and number not in self._null and number not in asked:
            asked.add(number)
            found += self._prompts(_NULL, number, template, dict.fromkeys(template.fields, ""), Front(""))
        key = (number, front.text)
        if self.calibrate and key not in self._priors and key not in asked:
            asked.add(key)
            for free, text in enumerate(self.content_free):
                found += self._prompts(_NULL, number, template, dict.fromkeys(template.fields, text), front, free)
        return found

    @property
    def _first_id(self) -> int:
        """The id that stands for a prompt without any words."""
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if found is not None:
                return int(found)
        raise TuningError("a prompt is empty, and the tokenizer has no token to begin with: give the template words.")

    def _word_scores(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return log p of the words of each prompt, summed or averaged over their tokens."""
        prompts: list[Prompt] = batch["prompts"]
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        alike: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            same = tuple(map(tuple, prompt.words)) if self.lm == "masked" else ()
            alike.setdefault((prompt.shared, same, prompt.template), []).append(i)
        for group in alike.values():
            for start in range(0, len(group), self.at_once):
                part = group[start : start + self.at_once]
                for i, score in zip(part, self._scores(batch, part), strict=True):
                    lengths = torch.tensor([len(word) for word in prompts[i].words], device=score.device)
                    found[i] = score / lengths if self.normalise == "mean" else score
        return found

    def _scores(self, batch: Mapping[str, Any], rows: list[int]) -> Tensor:
        """Return log p of the words of some prompts, [rows, words]."""
        ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
        used = mask.any(0)
        ids, mask = ids[:, used], mask[:, used]
        prompts = [batch["prompts"][i] for i in rows]
        words = [prompt.words for prompt in prompts]
        if self.lm == "masked":
            inputs = {"input_ids": ids, "attention_mask": mask}
            return scoring.masked_scores(self.backbone, inputs, mask_id(self.tokenizer), words[0], self.decoding)
        if self.lm == "seq2seq":
            template = self.templates[prompts[0].template]
            gap = template.slot is not None and isinstance(template.parts[template.slot], Mask)
            opening = [sentinel_id(self.tokenizer)] if gap else []
            return scoring.seq2seq_scores(self.backbone, ids, mask, words, opening)
        front = prompts[0].shared
        if not self.share_prefix:
            return scoring.recomputed_scores(self.backbone, ids, mask, words, front)
        if front and front not in self._shared:
            while len(self._shared) > len(self.templates):
                self._shared.pop(next(iter(self._shared)))
            self._shared[front] = scoring.read(self.backbone, front)
        shared = self._shared[front] if front else None
        if front and shared is None:
            return scoring.recomputed_scores(self.backbone, ids, mask, words, front)
        return scoring.causal_scores(self.backbone, ids, mask, words, shared)

    def _label_scores(self, words: Tensor, template: int) -> Tensor:
        if self.normalise == "pmi":
            words = words - self._null[template]
        return scoring.combined(words, self.verbalizer.owners, self.verbalizer.combine)

    def _calibrated(self, words: Tensor, template: int, front: str) -> Tensor:
        scores = self._label_scores(words, template)
        return scoring.calibrated(scores, self._priors[template, front]) if self.calibrate else scores.log_softmax(-1)

    def _add(self, scores: MetricCollection, batch: Mapping[str, Any]) -> Tensor:
        """Add a batch to the scores; return log p of the labels, [B, templates, C]."""
        found: Tensor = self(batch)
        labels = batch["labels"]
        if not len(self.of_templates):
            scores.update(found[:, 0], labels)
        for number, own in enumerate(self.of_templates):
            own.update(found[:, number], labels)  # type: ignore[operator]
        return found

    def _log(self, scores: MetricCollection, prefix: str) -> Tensor | None:
        """Log the scores of an epoch; return the accuracy of the template that is best on the validation split."""
        if self.demonstrations:
            self.log(f"{prefix}demonstrations", self.shown.compute(), sync_dist=True)
        self.shown.reset()
        if not len(self.of_templates):
            self._log_scores(scores)
            return None
        each = self._of_templates()
        for name in next(iter(each.values())):
            over = over_templates([found[name] for found in each.values()])
            self.log(f"{prefix}{name}", over.mean, prog_bar=True, sync_dist=True)
            for spread in ("std", "min", "max"):
                self.log(f"{prefix}{name}_{spread}", getattr(over, spread), sync_dist=True)
        for template, found in each.items():
            self.log(f"{prefix}accuracy/{template}", found["accuracy"], sync_dist=True)
        best = each.get(self.best_template or "")
        return torch.tensor(best["accuracy"]) if best is not None else None

    def _of_templates(self) -> dict[str, dict[str, float]]:
        """Return the scores of each template over all processes, and begin anew."""
        found = {}
        for template, own in zip(self.templates, self.of_templates, strict=True):
            scores: dict[str, Tensor] = own.compute()  # type: ignore[operator]
            found[template.name] = {name.removeprefix("test_"): value.item() for name, value in scores.items()}
            own.reset()  # type: ignore[operator]
        return found

    def _find_best(self, data: Any) -> str:
        """Return the name of the template that is best on the validation split."""
        data.setup("validate")
        for number, batch in enumerate(data.val_dataloader()):
            batch = self.on_before_batch_transfer(batch, 0)
            batch = self.trainer.strategy.batch_to_device(batch)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_batch_start(self.trainer, self, batch, number)
            self._add(self.val_scores, batch)
        each = self._of_templates()
        return max(each, key=lambda name: each[name]["accuracy"])


def _grouped(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the numbers of prompts of the same row, template and input together: they score unlike words."""
    groups: dict[tuple[int, int, int, str], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.row, prompt.template, prompt.free, prompt.front.text), []).append(i)
    return list(groups.values())
