"""The base class of methods that train a soft prompt: where it goes, its initial values, and its nearest words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import attention, compatibility, structure, text_structure
from lightning_peft.core.arguments import natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.host_copy import ask
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.prompts.decoder_prompt import DecoderPrompt
from lightning_peft.prompts.in_model import InModel, KnownTokens, Prepared, readers
from lightning_peft.prompts.shared_prompt import PromptCall, PromptLoss, SharedPrompt, decoder_of
from lightning_peft.prompts.source_mask import reads_source
from lightning_peft.prompts.virtual_tokens import (
    OtherTable,
    PlainIds,
    PromptRows,
    VirtualTokens,
    best_words,
    insert,
    is_widened,
    texts_of,
)
from lightning_peft.training.method import Method


@dataclass(eq=False, kw_only=True)
class PromptMethod(Method):
    """Train P rows that stand for virtual tokens.

    Args:
        num_virtual_tokens: length P of the prompt [tokens].
        tokenizer: folder or hub id of the tokenizer; None: that of the backbone.
    """

    num_virtual_tokens: int = natural(20, "is no prompt")
    tokenizer: str | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "the embeddings of virtual tokens in the input"
    needs: ClassVar[frozenset[str]] = Method.needs | {compatibility.TOKENS}
    breaks: ClassVar[frozenset[str]] = frozenset({compatibility.TOKENS})
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"tokenizer"}

    def place(
        self,
        backbone: nn.Module,
        weight: nn.Parameter | nn.Module,
        anywhere: bool = False,
        before_cls: bool = False,
    ) -> None:
        """Attach the prompt: before the text of a causal model, computed once a batch; else as virtual tokens.

        Where the source is a sound or an image they come before the target that is written.

        Args:
            backbone: the model.
            weight: the rows, [P, d], or a module that computes them.
            anywhere: a template may put the virtual tokens anywhere in the text.
            before_cls: they come before the first token of an encoder, so that one of them is what is pooled.
        """
        is_encoder = self._is_encoder(backbone, before_cls)
        decoder = None if anywhere or reads_source(backbone) else decoder_of(backbone)
        writer = text_structure.target_decoder_of(backbone)
        if writer is not None:
            self._before(backbone, writer, weight, anywhere)
        elif decoder is not None:
            self._share(backbone, decoder, weight)
            attention.spare_mask(backbone)
        else:
            self._attach(backbone, weight)
            padding = structure.setting(structure.config_of(backbone), "pad_token_id") or 0
            for table in structure.other_word_tables(backbone).values():
                attach(table, OtherTable(padding), self.key)
            if structure.generates(backbone):
                attach(backbone, PlainIds(), f"{self.key}_ids")
        self._before_target = writer is not None
        self._in_batch = decoder is None and writer is None
        # The first token of these is pooled, or the start of a text, and the prompt comes after it.
        self._after = 1 if (is_encoder and not before_cls) or structure.has_two_towers(backbone) else 0
        self._targets = structure.is_encoder_decoder(backbone)
        self._check_room(backbone)

    def _is_encoder(self, backbone: nn.Module, before_cls: bool) -> bool:
        """Tell whether the first token of a backbone is pooled, as it must be for ``before_cls``."""
        is_encoder = structure.is_encoder(backbone)
        if before_cls and not is_encoder:
            raise TuningError(
                f"before_cls=True is for encoders whose first token is pooled, and {type(backbone).__name__} is none: "
                "leave it out."
            )
        return is_encoder

    def _check_room(self, backbone: nn.Module) -> None:
        self._limit = text_structure.max_positions(backbone)
        if self._limit is not None and self.num_virtual_tokens >= self._limit:
            raise TuningError(
                f"num_virtual_tokens={self.num_virtual_tokens} leaves no room in the {self._limit} positions of "
                f"{type(backbone).__name__}: take fewer."
            )

    def _before(self, backbone: nn.Module, writer: nn.Module, weight: nn.Parameter | nn.Module, anywhere: bool) -> None:
        if anywhere:
            raise TuningError(
                f"{type(backbone).__name__} takes no text, in which a template or a task of its own has a place: take "
                "one prompt without a template, which comes before what is written."
            )
        for table in structure.word_tables(backbone).values():
            attach(table, VirtualTokens(weight), self.key)
        attach(writer, DecoderPrompt(self.num_virtual_tokens, writer), f"{self.key}_target")

    def _share(self, backbone: nn.Module, decoder: nn.Module, weight: nn.Parameter | nn.Module) -> None:
        call = PromptCall()
        name = self.key if decoder is not backbone else f"{self.key}_prompt"
        attach(decoder, SharedPrompt(weight, self.num_virtual_tokens, decoder, call), name)
        if structure.output_embeddings_of(backbone) is not None and "labels" in structure.arguments_of(backbone):
            attach(backbone, PromptLoss(call, backbone), f"{self.key}_loss")

    def _attach(self, backbone: nn.Module, weight: nn.Parameter | nn.Module) -> None:
        tables, known = structure.word_tables(backbone), Prepared()
        for table in tables.values():
            attach(table, KnownTokens(weight, known), self.key)
        for reader in readers(backbone, tables):
            attach(reader, InModel(self.prepare, known), f"{self.key}_in_model")
        self._known = known

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the prompt in every row; one that has virtual tokens already is returned as it is.

        Each text of a batch gets it, those of ``pos_input_ids`` and ``input_ids_b`` too, with the tensors of such names
        that go along. A batch that shows no text, such as a tuple, is left as it is: the model puts the prompt in where
        it is called. Before the text of a causal model, or the target of sounds and images, the prompt is in no batch.

        Raises:
            TuningError: with the prompt it is too long for the positions.
        """
        if self._before_target:
            self._check_target(batch)
            return batch
        prepared: Mapping[str, Any] = batch
        for text in texts_of(batch):
            entries = self._prepared(text.entries)
            if entries is not text.entries:
                prepared = {**prepared, **text.named(entries)}
        return prepared

    def _prepared(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        given = is_widened(batch)
        if given and not self._in_batch:
            raise TuningError(
                f"the batch has virtual tokens, but {type(self).__name__} puts its prompt before the text itself: "
                "give plain texts."
            )
        if self._in_batch and not given:
            batch = self.insert(batch)
        elif self._in_batch:
            self._check_ids(batch["input_ids"])
        length = batch["input_ids"].shape[1] + (0 if self._in_batch else self.num_virtual_tokens)
        if self._limit is not None and length > self._limit:
            raise TuningError(
                f"{length - self.num_virtual_tokens} tokens and a prompt of {self.num_virtual_tokens} do not fit "
                f"the {self._limit} positions of the model: set max_length to "
                f"{self._limit - self.num_virtual_tokens}."
            )
        if self._in_batch:
            self._known.note(batch["input_ids"])
        return batch

    def _check_target(self, batch: Mapping[str, Any]) -> None:
        targets = [batch.get(name) for name in ("labels", "decoder_input_ids")] if isinstance(batch, Mapping) else []
        length = max(
            (target.shape[1] for target in targets if isinstance(target, Tensor) and target.ndim == 2), default=0
        )
        if self._limit is not None and length + self.num_virtual_tokens > self._limit:
            raise TuningError(
                f"{length} tokens and a prompt of {self.num_virtual_tokens} before them do not fit the {self._limit} "
                f"positions of the model: cut targets to {self._limit - self.num_virtual_tokens} tokens."
            )

    def insert(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the virtual tokens at the front of every row, after [CLS] in an encoder."""
        return insert(batch, self.num_virtual_tokens, self._after, self._targets)

    def rows(self, model: nn.Module) -> Tensor:
        """Return the prompt, [P, d].

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        return self.own_grafts(model, PromptRows)[0].graft.rows()

    def nearest_words(self, model: nn.Module, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each virtual token, the k words of highest cosine, with it.

        Source: Lester et al. 2021, arXiv 2104.08691, section 7.
        """
        backbone = self._tuned(model)
        table = next(iter(structure.word_tables(backbone).values()))
        with torch.no_grad():
            words = F.normalize(table.weight.float(), dim=1)  # type: ignore[arg-type]
            cosine = F.normalize(self.rows(backbone).float(), dim=1) @ words.t()
        return best_words(cosine, k, tokenizer_of(backbone, self.tokenizer, "nearest_words"))

    def ids_of(self, backbone: nn.Module, text: str | None) -> list[int]:
        """Return the token ids of the words that a prompt starts from.

        Raises:
            TuningError: there are none.
        """
        if not text:
            raise TuningError("init='text' needs the words of the prompt: give text=.")
        tokenizer = tokenizer_of(backbone, self.tokenizer, "init='text'")
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TuningError(f"text={text!r} has no tokens: give the words of the prompt.")
        return ids

    def _check_ids(self, ids: Tensor) -> None:
        highest = ask(ids, lambda given: int(-1 - given.min()))
        if highest >= self.num_virtual_tokens * self._prompts():
            raise TuningError(
                f"the batch has virtual token {highest}, {type(self).__name__} trains {self.num_virtual_tokens}: "
                "give it the num_virtual_tokens of the data's template."
            )

    def _prompts(self) -> int:
        return 1


def cut_to(ids: Sequence[int], count: int) -> list[int]:
    """Return ids repeated or cut to a length."""
    return [ids[i % len(ids)] for i in range(count)]
