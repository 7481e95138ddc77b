"""Prefix-Tuning: P trained keys and values before those of the text in every attention; the model is frozen.

``Attn(q, [P_k; K], [P_v; V])``, where the prefix of all layers is ``MLP(E)`` in training, ``E`` [P, d] being a table of
its own, and plain numbers after it (`drop_network`). An encoder-decoder has three independent sets: encoder
self-attention, decoder self-attention and cross-attention.

Source: Li & Liang 2021, arXiv 2101.00190, sections 4.2, 4.3 and 7.4. The authors' table is as wide as the model, where
the paper says "smaller", and their model is in eval mode while the prefix trains: we follow the code in both. Their
GPT-2 counts the text's positions from P, their BART from 0: `positions` says which. The default is 'shifted' for BART,
too, since that is what keys and values of real words before the text would give, whatever the model; give
positions='unshifted' to compare with the authors' summaries. Models that share one layer (ALBERT) share its prefix. A
prefix of zeros is no identity: it takes part of the softmax.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.bases.prefix import NETWORK, PrefixMethod
from lightning_peft.core import structure, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import Rates
from lightning_peft.prompts import infix
from lightning_peft.prompts.in_model import InModel, KnownTokens, Prepared, readers
from lightning_peft.prompts.virtual_tokens import PlainIds, is_widened
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Train P keys and values before those of the text in every attention.

    Args:
        num_virtual_tokens: length P of the prefix [tokens].
        mid_dim: width of the network that the prefix is computed by in training; None trains the prefix itself, at
            thirty times the recommended rate.
        form: 'prefix'; or 'infix' ``[x; INFIX; y]``, virtual tokens between the source and the target of a causal text,
            whose keys and values are changed in each layer; it has no network and no gradient checkpointing.
    """

    num_virtual_tokens: int = 10
    mid_dim: int | None = 512
    form: Literal["prefix", "infix"] = "prefix"

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"
    advised: ClassVar[Rates] = NETWORK

    def advice(self) -> Rates:
        """Return the rates of a prefix; those of an infix, for which none were measured, are those of a network."""
        return super().advice() if self.form == "prefix" else self.advised

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach a prefix to each attention, or an infix to the word table and each projection of keys and values."""
        if self.form == "prefix":
            return super().graft(backbone)
        self._check_infix(backbone)
        count, call = self.num_virtual_tokens, infix.InfixIds()
        (table,) = structure.word_tables(backbone).values()
        width: int = table.embedding_dim  # type: ignore[assignment]
        device = device_of(table)
        known, weight = Prepared(), nn.Parameter(torch.randn(count, width, device=device))
        attach(table, KnownTokens(weight, known), self.key)
        for reader in readers(backbone, structure.word_tables(backbone)):
            attach(reader, InModel(self.prepare, known), f"{self.key}_in_model")
        self._known = known
        projections = infix.projections(backbone)
        for host, size, skip in projections.values():
            attach(host, infix.InfixStates(count, size, skip, call).to(device_of(host)), self.key)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in projections):
            attach(backbone.get_submodule(owner), infix.InfixAttention(call), self.key)
        attach(backbone.get_decoder(), infix.InfixDecoder(call), self.key)  # type: ignore[operator]
        attach(backbone, PlainIds(), f"{self.key}_ids")
        self._limit = text_structure.max_positions(backbone)
        return ()

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch, with the infix before the first target token of each row if there is one.

        Raises:
            TuningError: it is longer than the positions of the model, or a row has no source.
        """
        if self.form == "prefix":
            return super().prepare(batch)
        batch = batch if is_widened(batch) else infix.put_between(batch, self.num_virtual_tokens)
        tokens: Tensor = batch["input_ids"]
        self._known.note(tokens)
        if self._limit is not None and tokens.shape[1] > self._limit:
            raise TuningError(
                f"{tokens.shape[1]} tokens with the infix do not fit the {self._limit} positions of the model: "
                f"set max_length to {self._limit - self.num_virtual_tokens}."
            )
        return batch

    def _check_infix(self, backbone: nn.Module) -> None:
        network = (self.mid_dim, self.embedding_dim) != (None, None)
        if network or self.init != "random" or self.init_from or self.sets or self.layers is not None:
            raise TuningError(
                "form='infix' trains numbers of its own in every layer: give mid_dim=None, and none of sets, layers, "
                "embedding_dim, init and init_from."
            )
        other = structure.is_encoder(backbone) or structure.is_encoder_decoder(backbone)
        if other or structure.config_of(backbone) is None:
            raise TuningError(
                f"form='infix' stands between source and target of one text, and {type(backbone).__name__} is no "
                "decoder-only model: take form='prefix'."
            )


class PrefixTuningMixin(TunedBy[PrefixTuning]):
    """For a LightningModule that is tuned by a prefix: set ``self.method`` to change its arguments."""

    def drop_network(self) -> None:
        """Keep the prefix that the network gives and drop the network."""
        method, module = self._owned()
        method.drop_network(module)
