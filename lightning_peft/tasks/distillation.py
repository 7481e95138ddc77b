"""Distillation: a delta learns to say what another model, or the bare backbone with a text before it, would say."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.hub import load_model, load_tokenizer, model_without_weights, resolve
from lightning_peft.core.labels import IGNORED
from lightning_peft.data.protocols import Truncated
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.references import without_deltas
from lightning_peft.tasks.shared_text import Shared, prefill

Divergence = Literal["forward", "reverse"]


class Distillation(CausalLM):
    """Say at every token of the targets what a teacher would say.

    The loss is a mean over these tokens: ``(1 - w) t^2 KL + w CE + h |s - s'|^2 / d``, where KL is between the next
    tokens' distributions of teacher and student at temperature t (forward: ``KL(teacher || student)``), CE the
    cross-entropy of the target, and s, s' are the last hidden states, of width d.

    Logs what `CausalLM` logs: ``val_loss`` and ``val_perplexity`` are those of the targets.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; reverse: Gu et al. 2023, arXiv 2306.08543.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        teacher: the same for the teacher, of the same vocabulary; None: the backbone with its deltas muted.
        divergence: forward, or reverse, ``KL(student || teacher)``, which looks for one thing the teacher says.
        temperature: of both distributions.
        top_k: compare the teacher's k likeliest tokens alone, whose shares then sum to 1; None: all.
        target_weight: w, the weight of the targets, from 0 to 1.
        hidden_weight: h, the weight of the hidden states, for a teacher of the same width.
        **kwargs: as in `CausalLM`.
    """

    teachers: tuple[nn.Module, ...] = ()
    """The teacher, if it is not the backbone: no submodule, since it is neither tuned nor saved."""

    def __init__(
        self,
        model: str,
        teacher: str | None = None,
        divergence: Divergence = "forward",
        temperature: float = 1.0,
        top_k: int | None = None,
        target_weight: float = 0.0,
        hidden_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if self.loss_chunk is not None:
            raise TuningError(
                f"loss_chunk={self.loss_chunk} is for CausalLM: {type(self).__name__} compares all logits."
            )
        ranges = (
            ("temperature", temperature, 0 < temperature < float("inf"), "a number above 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
            ("target_weight", target_weight, 0 <= target_weight <= 1, "0 to 1"),
            ("hidden_weight", hidden_weight, 0 <= hidden_weight < float("inf"), "0 or more"),
        )
        for name, value, fits, rule in ranges:
            if not fits:
                raise TuningError(f"{name}={value} is out of range: take {rule}.")
        self.divergence, self.temperature, self.top_k = divergence, temperature, top_k
        self.target_weight, self.hidden_weight = target_weight, hidden_weight
        if teacher is not None:
            self.teachers = (self._load_teacher(resolve(teacher)),)

    @property
    def teacher(self) -> nn.Module:
        """The teacher, on the device of the model."""
        if not self.teachers:
            return self.backbone
        (own,) = self.teachers
        return own if next(own.parameters()).device == self.device else own.to(self.device)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the texts fit the teacher.

        Raises:
            TuningError: they may be longer than its positions.
        """
        super().check_data(data, stage)
        for teacher in self.teachers:
            limit = text_structure.max_positions(teacher)
            if limit is not None and isinstance(data, Truncated) and data.max_length > limit:
                raise TuningError(
                    f"max_length={data.max_length} of the data is beyond the {limit} positions of the teacher: lower "
                    "it."
                )

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over the tokens of the targets."""
        self.check_rows(batch)
        targets = self.targets(batch)
        kept = targets != IGNORED
        logits, hidden = self._said(self.backbone, self.inputs(batch), kept)
        plain = self.text_columns(batch["labels"], batch)[:, 1:] != IGNORED
        with self._teaching():
            inputs, lead = self.lesson(batch)
            right, states = self._said(self.teacher, inputs, plain, lead)
        losses = (1 - self.target_weight) * self.distance(logits, right)
        if self.target_weight:
            losses = losses + self.target_weight * F.cross_entropy(logits, targets[kept], reduction="none")
        if self.hidden_weight:
            losses = losses + self.hidden_weight * (hidden - states).square().mean(-1)
        return losses.sum() / kept.sum().clamp(min=1)

    def lesson(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return what the teacher is fed, without virtual tokens, and how many columns it has before the text."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: self.text_columns(batch[name], batch) for name in names if name in batch}, 0

    def distance(self, logits: Tensor, right: Tensor) -> Tensor:
        """Return the divergence between the student's logits [M, V] and the teacher's, times the temperature's square.

        Vocabularies may be padded to unlike many tokens.
        """
        width = min(logits.shape[-1], right.shape[-1])
        logits, right = logits[:, :width], right[:, :width]
        if self.top_k is not None and self.top_k < width:
            right, tokens = right.topk(self.top_k)
            logits = logits.gather(1, tokens)
        student, teacher = ((values / self.temperature).log_softmax(-1) for values in (logits, right))
        of, to = (teacher, student) if self.divergence == "forward" else (student, teacher)
        return self.temperature**2 * (of.exp() * (of - to)).sum(-1)

    def _teaching(self) -> AbstractContextManager[None]:
        return in_eval(self.teacher) if self.teachers else without_deltas(self.backbone)

    def _said(self, model: Any, inputs: Mapping[str, Any], kept: Tensor, lead: int = 0) -> tuple[Tensor, Tensor]:
        """Return logits in fp32 where ``kept`` [B, T - 1] is true, [M, V], and last hidden states, if used."""
        out = model(**{"use_cache": False, **inputs}, output_hidden_states=bool(self.hidden_weight))
        logits = out.logits[:, lead:-1][kept].float()
        return logits, out.hidden_states[-1][:, lead:-1][kept].float() if self.hidden_weight else logits

    def _load_teacher(self, name: str) -> nn.Module:
        """Return a frozen teacher.

        Raises:
            TuningError: it has other tokens, or another width where hidden states are compared.
        """
        if torch.get_default_device().type == "meta":
            model = model_without_weights(self.auto, name, "teacher", self.dtype_name)
        else:
            model = load_model(self.auto, name, "teacher", dtype=self.dtype_name)
        own, other = self.tokenizer.get_vocab(), load_tokenizer(name, "save one in the folder").get_vocab()
        if own != other:
            raise TuningError(
                f"the teacher {name} has {len(other)} tokens that are not the {len(own)} of the model: take one of the "
                "same vocabulary."
            )
        words = model.get_input_embeddings().num_embeddings
        if words < len(own):
            raise TuningError(
                f"the teacher {name} has embeddings of {words} tokens, its tokenizer {len(own)}: take another teacher."
            )
        width, theirs = self.backbone.config.hidden_size, model.config.hidden_size
        if self.hidden_weight and width != theirs:
            raise TuningError(
                f"the teacher's hidden states are {theirs} wide, the model's {width}: set hidden_weight=0."
            )
        return model.requires_grad_(False).eval()


class ContextDistillation(Distillation):
    """Put what a text in the context does into a delta.

    The teacher is the backbone with its deltas muted, which reads the text before each row; the student, the backbone
    with its deltas, reads the row alone. So a prefix or a prompt of P virtual tokens stands for a text of N tokens.
    In a fit the text is read once, where the model has a cache of keys and values alone; else with each row.

    Source: Askell et al. 2021, arXiv 2112.00861, section 2.2.2; Snell et al. 2022, arXiv 2209.15189.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        context: the text, or the path of its file; as a rule it ends with a blank or a newline.
        **kwargs: as in `Distillation`, but the teacher.
    """

    def __init__(self, model: str, context: str, **kwargs: Any) -> None:
        if kwargs.pop("teacher", None) is not None:
            raise TuningError(
                "teacher= is for Distillation: the teacher here is the backbone, which reads the context."
            )
        super().__init__(model, **kwargs)
        text = Path(context).read_text(encoding="utf-8") if len(context) < 256 and Path(context).is_file() else context
        self.context: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self.context:
            raise TuningError("context= has no token: give a text, or the path of a file with one.")
        self._read: dict[bool, Shared | None] | None = None

    def on_fit_start(self) -> None:
        """Read the context anew: the weights may be others than in an earlier fit."""
        self._read = {}

    def on_fit_end(self) -> None:
        """Forget what has been read."""
        self._read = None

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the context fits the model together with the texts.

        Raises:
            TuningError: it does not.
        """
        super().check_data(data, stage)
        limit, size = text_structure.max_positions(self.backbone), len(self.context)
        if limit is not None and isinstance(data, Truncated) and size + data.max_length > limit:
            raise TuningError(
                f"a context of {size} tokens and max_length={data.max_length} of the data are beyond the {limit} "
                "positions of the model: shorten one of them."
            )

    def lesson(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the rows with the context before them, after the beginning-of-sequence token if all have one.

        Raises:
            TuningError: several texts share a row.
        """
        if "position_ids" in batch:
            raise TuningError("the context would stand before the first text of a packed row alone: set packing=false.")
        inputs = super().lesson(batch)[0]
        ids, begin = inputs["input_ids"], self.tokenizer.bos_token_id
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        opens = begin is not None and bool((ids[:, 0] == begin).all())
        text = torch.tensor(self.context, device=ids.device)
        shared = self._shared(opens)
        if shared is None:
            place, size = int(opens), len(text)
            ids = torch.cat([ids[:, :place], text.expand(len(ids), -1), ids[:, place:]], 1)
            return {"input_ids": ids, "attention_mask": torch.cat([mask.new_ones(len(ids), size), mask], 1)}, size
        if opens:  # the first column guesses what comes behind the context, so the context's last token stands there
            ids = torch.cat([text[-1:].expand(len(ids), 1), ids[:, 1:]], 1)
        mask = torch.cat([mask.new_ones(len(ids), shared.length), mask], 1)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": True} | shared.given_to(self.backbone), 0

    def _shared(self, opens: bool) -> Shared | None:
        """Return the context as it has been read; ``opens``: behind the beginning-of-sequence token."""
        if self._read is None:
            return None
        if opens not in self._read:
            text = [self.tokenizer.bos_token_id, *self.context[:-1]] if opens else self.context
            self._read[opens] = prefill(self.backbone, text)
        return self._read[opens]
