"""What all tasks share: the model, what it is fed, optimizer and schedule, and scores of whole epochs."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection
from transformers import get_linear_schedule_with_warmup

from lightning_peft.core import structure
from lightning_peft.core.delta import canonical
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_model, load_tokenizer, model_without_weights, resolve
from lightning_peft.training.mixin import MethodMixin

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class Task(MethodMixin, L.LightningModule):
    """A model and how it is trained; a subclass says what it is fed, what its loss is, and how it is scored.

    The optimizer is AdamW; the learning rate rises linearly from 0 and then falls linearly to 0. Matrices have weight
    decay; biases, norms and other vectors have none.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        lr: learning rate of the delta, that is of all that is trained but the head.
        head_lr: learning rate of the head; None: ``lr``.
        weight_decay: of matrices.
        warmup: share of the steps in which the learning rate rises.
        dtype: what the model is loaded in; "auto": what it was saved in.
    """

    backbone: Any
    auto: Any
    """The class of transformers that loads the model."""
    what = "model"
    """What the model is, for error messages."""
    not_inputs = frozenset({"labels", "task_ids"})
    """The entries of a batch that are tensors and no inputs of the model."""
    monitor = "val_loss"
    """The score that says which checkpoint is best."""

    def __init__(
        self,
        model: str,
        lr: float = 2e-3,
        head_lr: float | None = 1e-2,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.head_lr = lr if head_lr is None else head_lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.model_name = resolve(model)
        self.dtype_name = dtype
        self._shapes: dict[str, tuple[int, bool]] = {}

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
            model.config.pad_token_id = _padding(name, model.config)
        trained: nn.Module = model.train()
        return trained

    def check_loaded(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        """Warn of tensors outside of the head that the saved model has no weights for."""
        _warn_of_missing(model, self.model_name, info)

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

    def setup(self, stage: str) -> None:
        """See that the data fit the model, and note which parameters are matrices before a strategy flattens them.

        Raises:
            TuningError: texts may be longer than the model's positions, or as `check` says.
        """
        data = getattr(self.trainer, "datamodule", None)
        self.check(data, stage)
        limit, length = structure.max_positions(self.backbone), getattr(data, "max_length", 0)
        if limit is not None and length > limit:
            raise TuningError(
                f"max_length={length} of the data is beyond the {limit} positions of the model: lower it."
            )
        self._shapes = self._note_shapes()

    def check(self, data: Any, stage: str) -> None:
        """See that the data are for this task; ``data`` is the data module, or None."""

    def on_validation_epoch_start(self) -> None:
        """Begin to score."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Begin to score."""
        self._begin("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, with groups for head and delta, with and without weight decay, and the schedule of its steps.

        Raises:
            TuningError: the number of steps is not limited, so that the schedule has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 0:
            raise TuningError("the learning rate falls to 0 in the last step, and there is none: set max_epochs.")
        groups = self._groups()
        fused = all(_can_fuse(p) for group in groups for p in group["params"]) and self.trainer.precision != "16-mixed"
        optimizer = AdamW(groups, lr=self.lr, fused=fused)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _note_shapes(self) -> dict[str, tuple[int, bool]]:
        """Return canonical name -> the number of dimensions of a parameter, and whether it is of the head.

        The head is that of the backbone, and all that lies outside of it.
        """
        heads = {f"backbone.{name}" for name in structure.head_names(self.backbone)}
        return {
            canonical(name): (parameter.ndim, name in heads or not name.startswith("backbone."))
            for name, parameter in self.named_parameters()
        }

    def _groups(self) -> list[dict[str, Any]]:
        shapes = self._note_shapes() | self._shapes
        members: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                dims, is_head = shapes[canonical(name)]
                members.setdefault(("head" if is_head else "delta", dims > 1), []).append(parameter)
        rates = {"delta": self.lr, "head": self.head_lr}
        return [
            {
                "params": members[part, decays],
                "name": part if decays else f"{part} without decay",
                "lr": rate,
                "weight_decay": self.weight_decay if decays else 0.0,
            }
            for part, rate in rates.items()
            for decays in (True, False)
            if (part, decays) in members
        ]

    def _log_loss(self, loss: Tensor, rows: int) -> Tensor:
        self.log("train_loss", loss, prog_bar=True, batch_size=rows)
        return loss

    def _log_scores(self, scores: MetricCollection) -> None:
        """Log the scores of the epoch that ends, over all processes."""
        self.log_dict(scores.compute(), prog_bar=True)

    def _begin(self, stage: str) -> None:
        """Begin to count anew: not where an epoch ends, which may be in inference mode while the next one is not."""
        for name in (f"{stage}_scores", f"{stage}_texts"):
            scores = getattr(self, name, None)
            if isinstance(scores, MetricCollection):
                scores.reset()


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def _warn_of_missing(model: nn.Module, name: str, info: Mapping[str, Any]) -> None:
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    missing = sorted((set(info["missing_keys"]) | mismatched) - set(structure.head_names(model)))
    if missing:
        rank_zero_warn(
            f"{name} has no weights for {len(missing)} tensors of {type(model).__name__} outside of its head, e.g. "
            f"{missing[0]}: they are random, so name them in also_train= of the method, or take another model."
        )


def _padding(name: str, config: Any) -> int | None:
    """Return the id of the tokenizer's padding token, or where it has none, of its end-of-sequence token."""
    try:
        tokenizer = load_tokenizer(name)
    except TuningError:
        end = config.eos_token_id
        return end[0] if isinstance(end, list) else end
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def class_config(labels: list[str] | None) -> dict[str, Any]:
    """Return the entries of a configuration that name the classes of a head."""
    if labels is None:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def check_names(names: list[str], own: list[str], what: str = "classes") -> None:
    """See that the data have the classes of the model.

    Raises:
        TuningError: they have others.
    """
    if names != own:
        raise TuningError(
            f"the data have {len(names)} {what} ({', '.join(names)}), the model {len(own)} "
            f"({', '.join(own)}): build it with labels=data.label_names."
        )
