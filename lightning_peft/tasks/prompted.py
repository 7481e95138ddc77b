"""What the tasks without training share: a frozen language model, templates, and rows of a data module as text."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_config, load_model, load_tokenizer
from lightning_peft.data.fields import as_fields
from lightning_peft.prompting.demonstrations import Order, Select
from lightning_peft.prompting.encoding import Style
from lightning_peft.prompting.instruction_files import instructions_of
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.base import Dtype, Task
from lightning_peft.tasks.embedding import Embedder
from lightning_peft.tasks.in_context import InContext

LMKind: TypeAlias = Style
_MODELS: dict[Style, Any] = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_SAVED_AS = {"ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHeadModel": "causal"}
_LONGEST = 2048
"""The context where neither model nor tokenizer has a limit [tokens]."""


class FrozenTask(Task):
    """A task that trains nothing; it runs under ``validate``, ``test`` and ``predict``.

    The data module gives its rows as they are (`lightning_peft.data.fields`), whichever it is; batches of any other
    loader need a list of rows, mappings from columns to values, under ``fields``.

    Args:
        **kwargs: as in `Task`.
    """

    def configure_callbacks(self) -> list[L.Callback]:
        """Ask the data module for rows as they are, before it reads them."""
        data = self.data()
        if hasattr(data, "encode_as"):
            data.encode_as(partial(as_fields, data))
        return list(super().configure_callbacks())

    def setup(self, stage: str) -> None:
        """Check that the data are for this task.

        Raises:
            TuningError: something is to be trained, or as `check` says.
        """
        if stage == "fit":
            raise TuningError(f"{type(self).__name__} trains nothing: run validate, test or predict.")
        # Prompts are written before a batch is moved, by this module and not by the data, which Lightning warns of.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        self.check(self.data(), stage)

    def teardown(self, stage: str) -> None:
        """Let the data module encode its rows itself again."""
        data = self.data()
        if hasattr(data, "encode_as"):
            data.encode_as(None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Refuse: nothing trains."""
        raise TuningError(f"{type(self).__name__} trains nothing: run validate, test or predict.")

    def data(self) -> Any:
        """Return the data module of the trainer, or None."""
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def rows_of(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a batch.

        Raises:
            TuningError: it has none.
        """
        if "fields" not in batch:
            raise TuningError(
                f"a batch with {', '.join(map(str, batch))} has no rows as text: take a data module of this package, "
                "or give batches a list of rows under 'fields'."
            )
        rows: list[dict[str, Any]] = batch["fields"]
        return rows

    def training_rows(self, what: str) -> Any:
        """Return the training rows of the data module; ``what`` they are for.

        Raises:
            TuningError: there are none.
        """
        data = self.data()
        rows = data.rows("train") if hasattr(data, "rows") else None
        if rows is None:
            raise TuningError(f"{what} come from training rows, and the data have none: give a train split.")
        return rows


class PromptedTask(FrozenTask):
    """A frozen language model that is asked.

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
        if self.lm == "masked":
            for template in self.templates:
                template.cloze()
        for template in self.templates:
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
        limits = [self._max_length, structure.max_positions(self.backbone), self.tokenizer.model_max_length]
        return min(limit for limit in (*limits, _LONGEST) if limit is not None)

    def check_loaded(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        """See that all of the model was saved: nothing will train what was not.

        Raises:
            TuningError: a weight is missing.
        """
        missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
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
            template.check(rows[0])
        return rows

    def in_context(self) -> InContext:
        """Return the demonstrations; they are chosen when they are first needed.

        Raises:
            TuningError: there are no training rows to choose from.
        """
        if self._in_context is None:
            rows = self.training_rows("demonstrations") if self.demonstrations else []
            self._in_context = InContext(
                rows,
                self.answer_of if self.show_answers else None,
                self.classes_of(rows) if self.demonstrations and self.select == "balanced" else [],
                self.demonstrations,
                self.select,
                self.order,
                self.separator,
                self.instruction,
                self.seed,
                self._embed,
            )
        return self._in_context

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return what a training row is answered with in a demonstration."""
        raise NotImplementedError

    def classes_of(self, rows: Any) -> Sequence[Any]:
        """Return the class of each training row; none: they have no classes."""
        return []

    def tell_of_dropped(self, shown: int, dropped: int) -> None:
        """Warn, once, of demonstrations that do not fit."""
        self.shown.update(float(shown))
        if dropped and not self._is_told:
            self._is_told = True
            rank_zero_warn(
                f"{dropped} of {shown + dropped} demonstrations are left out, as prompts have at most {self.room} "
                "tokens: take fewer, or raise max_length."
            )

    def _embed(self, texts: Sequence[str]) -> Tensor:
        embed = self.__dict__.get("_embedder")
        if embed is None:
            embed = self.__dict__["_embedder"] = self._build_embedder()
        return embed(texts)

    def _build_embedder(self) -> Embedder:
        if self.embedder is None:
            return Embedder(self.backbone, self.tokenizer, self.room)
        return load_embedder(self.embedder, next(self.backbone.parameters()).device)


def load_embedder(name: str, device: Any = "cpu", max_length: int = 256) -> Embedder:
    """Return a frozen model that embeds texts.

    Raises:
        TuningError: there is no such model.
    """
    model, tokenizer = load_model(AutoModel, name, "embedder", dtype="float32"), load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = structure.max_positions(model) or max_length
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
