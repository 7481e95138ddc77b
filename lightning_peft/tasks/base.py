"""The base class of all tasks: loads the model, feeds it, steps, logs the scores of an epoch, makes the optimizer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_peft.core import anatomy, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_model, load_tokenizer, model_without_weights, padding_id, resolve
from lightning_peft.core.switching import prepare
from lightning_peft.data.protocols import Truncated
from lightning_peft.prompts.virtual_tokens import is_widened
from lightning_peft.tasks import texts as texts_module
from lightning_peft.tasks.optimizer import Shapes, adamw, parameter_groups, shapes_of
from lightning_peft.tasks.rate_scale import RateScaled
from lightning_peft.training.lean import Lean, lean_of
from lightning_peft.training.loss_by_token import LossByToken
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import MethodMixin

Split = Literal["val", "test"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class Task(RateScaled, MethodMixin, L.LightningModule):
    """A model and how it is trained.

    A subclass says which class of transformers loads the model, returns the `loss` of a batch, names its metrics once
    (`score_by`) and adds a batch to them (`score`); the steps, and what is logged when an epoch ends, are here.

    The optimizer is AdamW; the learning rate rises linearly from 0 and then falls linearly to 0. Matrices have weight
    decay; biases, norms and other vectors have none.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        lr: learning rate of the delta, that is of all that is trained but the head; None: what each method recommends
            for its own (`core.rates`).
        head_lr: learning rate of the head; None: the smallest that the methods recommend for one.
        weight_decay: of matrices.
        warmup: share of the steps in which the learning rate rises.
        dtype: what the model is loaded in; "auto": what it was saved in.
    """

    backbone: Any
    auto: Any
    """The class of transformers that loads the model."""
    what = "model"
    """What the model is, for error messages."""
    not_inputs: frozenset[str] = frozenset({"labels", "task_ids"})
    """The entries of a batch that are tensors and no inputs of the model."""
    padding_side: Literal["left", "right"] | None = None
    """Where the batches of `predict` are padded; None: where the tokenizer says."""
    of_texts = False
    """Whether a row is one text, so that `predict` knows what to do with it."""
    lean = False
    """Whether a fit has the callback `Lean` by itself."""
    monitor = "val_loss"
    """The score that says which checkpoint is best."""
    val_scores: Any
    test_scores: Any

    def __init__(
        self,
        model: str,
        lr: float | None = None,
        head_lr: float | None = None,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.head_lr = head_lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.model_name = resolve(model)
        self.dtype_name = dtype
        self._shapes: Shapes = {}

    def load(self, **config: Any) -> nn.Module:
        """Return the pretrained model in training mode; ``config`` overrides entries of its configuration.

        Raises:
            TuningError: there is no such model, or none for this task.
        """
        name = self.model_name
        if torch.get_default_device().type == "meta":  # `check --meta true`: the configuration alone is read
            return model_without_weights(self.auto, name, self.what, self.dtype_name, **config).train()
        model, info = load_model(self.auto, name, self.what, dtype=self.dtype_name, output_loading_info=True, **config)
        self.check_loaded(model, info)
        if getattr(model.config, "pad_token_id", 0) is None:  # a vision model has no such entry
            model.config.pad_token_id = padding_id(name, model.config)
        trained: nn.Module = model.train()
        return trained

    def check_loaded(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        """Warn of tensors outside of the head that the saved model has no weights for."""
        missing = sorted(without_weights(info) - set(anatomy.head_names(model)))
        if missing:
            rank_zero_warn(
                f"{self.model_name} has no weights for {len(missing)} tensors of {type(model).__name__} outside of its "
                f"head, e.g. {missing[0]}: they are random, so name them in also_train= of the method, or take another "
                "model."
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model.

        Raises:
            TuningError: it has none.
        """
        tokenizer = load_tokenizer(self.model_name, "save one in the folder")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what of a batch the model is fed."""
        return {n: v for n, v in batch.items() if isinstance(v, Tensor) and n not in self.not_inputs}

    def prepared(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch with the prompts in it, which a Trainer has put there, and another caller has not."""
        trainer = self.attached
        by_trainer = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
        if by_trainer and any(isinstance(callback, Method) for callback in trainer.callbacks):  # type: ignore[union-attr]
            return batch
        return batch if is_widened(batch) else prepare(self.backbone, batch)

    def text_columns(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return ``values`` [B, P + N, ...] at the N columns of the text; those of virtual tokens are left out.

        Raises:
            TuningError: rows have unlike many virtual tokens.
        """
        virtual = batch["input_ids"] < 0
        if values.shape[:2] != virtual.shape or not bool(virtual.any()):
            return values
        counts = virtual.sum(1)
        if bool((counts != counts[0]).any()):
            raise TuningError(
                f"rows of a batch have {int(counts.min())} to {int(counts.max())} virtual tokens: "
                "give the masked ones virtual ids, too."
            )
        return values[~virtual].unflatten(0, (len(virtual), -1))

    @property
    def attached(self) -> L.Trainer | None:
        """The Trainer that it is attached to, if there is one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    @property
    def data(self) -> L.LightningDataModule | None:
        """The data module of the Trainer, if there is one."""
        return self.attached.datamodule if self.attached is not None else None  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """See that the data fit the model, and note which parameters are matrices before a strategy flattens them.

        Raises:
            TuningError: texts may be longer than the model's positions, or as `check_data` says.
        """
        data, limit = self.data, text_structure.max_positions(self.backbone)
        self.check_data(data, stage)
        if limit is not None and isinstance(data, Truncated) and data.max_length > limit:
            raise TuningError(
                f"max_length={data.max_length} of the data is beyond the {limit} positions of the model: lower it."
            )
        self._shapes = shapes_of(self, self.backbone)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data are for this task."""

    def score_by(self, metrics: Mapping[str, Any]) -> None:
        """Name the metrics of a validation and of a test."""
        self.val_scores = MetricCollection(dict(metrics), prefix="val_", compute_groups=False)
        self.test_scores = self.val_scores.clone(prefix="test_")

    def metrics(self, split: Split) -> Sequence[Any]:
        """Return the metrics that are reset when an epoch begins, and logged when it ends."""
        return [self.val_scores if split == "val" else self.test_scores]

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a training batch."""
        raise NotImplementedError

    def counted(self, batch: Any) -> Tensor | None:
        """Return over how many tokens the loss of a training batch is a mean, by which a step weighs its batches.

        None: batches, and ranks, weigh alike.
        """
        return None

    def score(self, batch: Any, split: Split) -> None:
        """Add a batch to the metrics."""
        raise NotImplementedError

    def log_scores(self, split: Split) -> None:
        """Log the scores of the epoch that ends, over all processes."""
        for scores in self.metrics(split):
            found = scores.compute().items()  # some of torchmetrics are whole numbers, in some of its versions
            floats = {name: value.float() if isinstance(value, Tensor) else value for name, value in found}
            self.log_dict(floats, prog_bar=True, sync_dist=True)

    def configure_callbacks(self) -> list[L.Callback]:
        """Hand the method to the Trainer, and where tokens are counted, what makes a step a mean over its tokens."""
        callbacks = super().configure_callbacks()
        if self.lean and lean_of(self.attached) is None:
            callbacks.append(Lean())
        return callbacks if type(self).counted is Task.counted else [*callbacks, LossByToken()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Return the loss of a batch, with the number of its tokens where they count, and log it."""
        loss, count = self.loss(batch), self.counted(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=self.rows_in(batch))
        return loss if count is None else {"loss": loss, "num_tokens": count}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch."""
        self.score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch."""
        self.score(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Reset the scores: not where an epoch ends, which may be in inference mode while the next one is not."""
        self.reset_scores("val")

    def on_test_epoch_start(self) -> None:
        """Reset the scores."""
        self.reset_scores("test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self.log_scores("test")

    def predict(
        self, texts: Sequence[str], batch_size: int = 32, max_length: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what the model says of each text, as a row: ``text``, and ``label`` with ``probabilities`` by name.

        A model that writes gives ``written`` in their place. No Trainer is needed.

        Args:
            texts: as a person writes them; for a model that writes, the whole prompt.
            batch_size: how many at a time.
            max_length: where a text is cut [tokens]; None: at the last position of the model.

        Raises:
            TuningError: the rows of this task are no single texts.
        """
        if not self.of_texts:
            raise TuningError(f"{type(self).__name__} is not of single texts: give its data to trainer.predict.")
        return texts_module.predict(self, texts, batch_size, max_length)

    def rows_in(self, batch: Any) -> int:
        """Return how many rows a training batch has."""
        return len(next(iter(self.inputs(batch).values())))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, with groups for head and delta, with and without weight decay, and the schedule of its steps.

        Raises:
            TuningError: the number of steps is not limited.
        """
        steps = self.trainer.estimated_stepping_batches
        return adamw(self.parameter_groups(), self.warmup, steps, self.trainer.precision)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the optimizer."""
        shapes = shapes_of(self, self.backbone) | self._shapes
        groups = parameter_groups(self, shapes, {"delta": self.lr, "head": self.head_lr}, self.weight_decay)
        return [{**group, "lr": group["lr"] * self.rate_scale} for group in groups]

    def reset_scores(self, split: Split) -> None:
        """Forget the scores of an earlier epoch."""
        for scores in self.metrics(split):
            scores.reset()


def without_weights(info: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensors that transformers found no weights for, or some of another shape."""
    return {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
