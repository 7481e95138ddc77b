"""The base class of tasks that ask a frozen language model: the model, templates, demonstrations, scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_config, load_model, load_tokenizer
from lightning_peft.data.padding import Padder
from lightning_peft.prompting.demonstrations import Order, Select
from lightning_peft.prompting.encoding import Style
from lightning_peft.prompting.instruction_files import instructions_of
from lightning_peft.prompting.instructions import Instructions
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.base import Dtype, Split, without_weights
from lightning_peft.tasks.embedding import Embedder
from lightning_peft.tasks.frozen import FrozenTask
from lightning_peft.tasks.in_context import Front, InContext
from lightning_peft.tasks.template_scores import TemplateScores

LMKind: TypeAlias = Style
_MODELS: dict[Style, Any] = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_SAVED_AS = {"ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHeadModel": "causal"}
_LONGEST = 2048
"""The context where neither model nor tokenizer has a limit [tokens]."""


class PromptedTask(FrozenTask):
    """A frozen language model that is asked.

    A subclass holds what writes the prompts of a row (`write_prompts`, `room_left`) and what reads the model's answers.

    Args:
        model: folder or hub id of the language model, or ``package://NAME/FOLDER`` in an installed package.
        templates: a template, a list of them, or the path of a YAML file with several.
        lm: 'masked', 'causal' or 'seq2seq'; None: what the model was saved as.
        demonstrations: how many solved training rows stand in front of each question.
        select: 'random' and 'balanced' (over the classes) choose once, by the seed; 'nearest' for each question.
        order: of the demonstrations; 'nearest_last' puts the nearest next to the question.
        show_answers: whether demonstrations have their answers; without, they show the texts alone.
        separator: what stands behind each demonstration.
        instruction: what stands before them.
        embedder: folder or hub id of the model that finds the nearest rows; None: the language model itself.
        max_length: the most tokens of a prompt with its answer; None: what the model can take. Demonstrations that do
            not fit are left out whole, the first ones first.
        seed: of the choice and the order.
        dtype: what the model is loaded in; "auto": what it was saved in.
    """

    by_template: TemplateScores

    def __init__(
        self,
        model: str,
        templates: str | list[str],
        lm: LMKind | None = None,
        demonstrations: int = 0,
        select: Select = "random",
        order: Order = "random",
        show_answers: bool = True,
        separator: str = "\n\n",
        instruction: str = "",
        embedder: str | None = None,
        max_length: int | None = None,
        seed: int = 0,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__(model, dtype=dtype)
        if demonstrations < 0 or seed < 0:
            raise TuningError(f"demonstrations={demonstrations} and seed={seed} are out of range: take 0 or more.")
        self.instructions = instructions_of(templates)
        self.lm: Style = lm or _saved_as(self.model_name)
        self.auto, self.what = _MODELS[self.lm], f"{self.lm} language model"
        self.backbone = self.load().eval().requires_grad_(False)
        self.demonstrations, self.select, self.order = demonstrations, select, order
        self.show_answers, self.separator, self.instruction = show_answers, separator, instruction
        self.embedder, self.seed = embedder, seed
        self._max_length = max_length
        self._in_context: InContext | None = None
        self._is_told = False
        self.shown = MeanMetric()
        self._check(self.instructions)

    def use_templates(self, templates: str | list[str]) -> None:
        """Ask by these templates from now on; all else stays as it is.

        Args:
            templates: a template, a list of them, or the path of a YAML file with several.

        Raises:
            TuningError: one does not fit the model.
        """
        found = instructions_of(templates)
        self._check(found)
        self.instructions = replace(found, words=self.instructions.words)
        self._in_context = None
        self.take_templates()

    def take_templates(self) -> None:
        """Make what depends on the templates."""
        raise NotImplementedError

    def _check(self, instructions: Instructions) -> None:
        for template in instructions.scored:
            if self.lm == "masked":
                template.cloze()
            if template.num_virtual_tokens:
                raise TuningError(
                    f"{template} has virtual tokens, which nothing trains here: take ClozeClassification."
                )

    @property
    def templates(self) -> tuple[Template, ...]:
        """The templates that ask for the answer.

        Raises:
            TuningError: all are inverse.
        """
        if not self.instructions.scored:
            raise TuningError("all templates are inverse and none is scored: give one that asks for the answer.")
        return self.instructions.scored

    @property
    def room(self) -> int:
        """The most tokens of a prompt with its answer."""
        limits = [self._max_length, text_structure.max_positions(self.backbone), self.tokenizer.model_max_length]
        return min(limit for limit in (*limits, _LONGEST) if limit is not None)

    def needed(self, split: str) -> list[list[str]]:
        """Return the fields of the templates."""
        return [sorted({name for template in self.templates for name in template.fields})]

    def check_loaded(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        """See that all of the model was saved: nothing will train what was not.

        Raises:
            TuningError: a weight is missing.
        """
        missing = sorted(without_weights(info))
        if missing:
            raise TuningError(
                f"{self.model_name} has no weights for {len(missing)} tensors of {type(model).__name__}, e.g. "
                f"{missing[0]}: take a {self.what} with its head."
            )

    def setup(self, stage: str) -> None:
        """Check that the data are for this task, and forget the demonstrations of others."""
        super().setup(stage)
        self._in_context, self._is_told = None, False

    def rows_of(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a batch.

        Raises:
            TuningError: it has none, or they lack a field of a template.
        """
        rows = super().rows_of(batch)
        for template in self.templates if rows else ():
            template.check_columns(rows[0])
        return rows

    def in_context(self) -> InContext:
        """Return the demonstrations; they are chosen when they are first needed.

        Raises:
            TuningError: there are no training rows to choose from.
        """
        if self._in_context is None:
            rows = self.training_rows("demonstrations") if self.demonstrations else []
            self._in_context = InContext(
                rows, self.answer_of if self.show_answers else None,
                self.classes_of(rows) if self.demonstrations and self.select == "balanced" else [],
                self.demonstrations, self.select, self.order, self.separator, self.instruction, self.seed,
                lambda texts: self._embed(texts),
            )  # fmt: skip
        return self._in_context

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return what a training row is answered with in a demonstration."""
        raise NotImplementedError

    def classes_of(self, rows: Any) -> Sequence[Any]:
        """Return the class of each training row; none: they have no classes."""
        return []

    def room_left(self, template: int, fields: Mapping[str, Any]) -> int:
        """Return how many tokens a row leaves for its demonstrations."""
        raise NotImplementedError

    def write_prompts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[list[int]]]:
        """Return the prompts of rows, and their token ids."""
        raise NotImplementedError

    def fronts(self, rows: Sequence[Mapping[str, Any]], options: list[str] | None) -> Iterator[tuple[int, int, Front]]:
        """Yield the numbers of template and row, and what stands in front of the row, one template after the other.

        Demonstrations that do not fit are left out, of which the first time warns.
        """
        for number, template in enumerate(self.templates):
            chosen = self.in_context().choose(rows, template.fields)
            for row, demonstrations in enumerate(chosen):
                front = Front("")
                if demonstrations or self.instruction:
                    left = self.room_left(number, rows[row])
                    front = self.in_context().front(template, self.tokenizer, demonstrations, options, left)
                self.shown.update(float(front.shown))
                if front.dropped and not self._is_told:
                    self._is_told = True
                    rank_zero_warn(
                        f"{front.dropped} of {front.shown + front.dropped} demonstrations are left out, as prompts "
                        f"have at most {self.room} tokens: take fewer, or raise max_length."
                    )
                yield number, row, front

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write the prompts of the rows."""
        if "prompts" in batch:
            return batch
        prompts, ids = self.write_prompts(self.rows_of(batch))
        return {**batch, **padded(self.tokenizer, self.lm, ids), "prompts": prompts}

    def metrics(self, split: Split) -> Sequence[MetricCollection]:
        """Return the metrics of each template."""
        return self.by_template.collections

    def reset_scores(self, split: Split) -> None:
        """Forget the scores of an earlier epoch."""
        super().reset_scores(split)
        self.shown.reset()

    def log_scores(self, split: Split) -> None:
        """Log the scores over templates and processes."""
        for name, value in self.by_template.summary().items():
            self.log(f"{split}_{name}", value, prog_bar=name in self.by_template.scores, sync_dist=True)
        if self.demonstrations:
            self.log(f"{split}_demonstrations", self.shown.compute(), sync_dist=True)

    @cached_property
    def _embed(self) -> Embedder:
        if self.embedder is None:
            return Embedder(self.backbone, self.tokenizer, self.room)
        return load_embedder(self.embedder, next(self.backbone.parameters()).device)


def padded(tokenizer: Any, lm: Style, ids: Sequence[list[int]]) -> dict[str, Tensor]:
    """Return prompts as a batch: a causal model's are padded on the left."""
    pad = Padder.of(tokenizer, "left" if lm == "causal" else "right")
    return pad({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def load_embedder(name: str, device: Any = "cpu", max_length: int = 256) -> Embedder:
    """Return a frozen model that embeds texts.

    Raises:
        TuningError: there is no such model.
    """
    model, tokenizer = load_model(AutoModel, name, "embedder", dtype="float32"), load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = text_structure.max_positions(model) or max_length
    return Embedder(model.to(device).eval().requires_grad_(False), tokenizer, min(max_length, limit))


def _saved_as(name: str) -> Style:
    """Return what sort of language model a folder or hub id was saved as.

    Raises:
        TuningError: it is none, or does not say.
    """
    config = load_config(name, "language model")
    saved = list(config.architectures or [])
    if config.is_encoder_decoder:
        return "seq2seq"
    for architecture in saved:
        for ending, kind in _SAVED_AS.items():
            if architecture.endswith(ending):
                return kind  # type: ignore[return-value]
    raise TuningError(
        f"{name} was saved as {', '.join(saved) or 'no known class'}, which has no language-model head: take a masked, "
        "causal or encoder-decoder language model, or say which with lm=."
    )
