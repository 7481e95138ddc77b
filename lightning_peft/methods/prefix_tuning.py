"""Prefix-Tuning: P trained keys and values before those of the text in every attention; the model is frozen.

``Attn(q, [P_k; K], [P_v; V])``, where the prefix of all layers is ``MLP(E)`` in training, ``E`` [P, d] being a table of
its own, and plain numbers after it (`fold`). An encoder-decoder has three independent sets: encoder self-attention,
decoder self-attention and cross-attention.

Source: Li & Liang 2021, arXiv 2101.00190, sections 4.2, 4.3 and 7.4. The authors' table is as wide as the model, where
the paper says "smaller", and their model is in eval mode while the prefix trains: we follow the code in both. Their
GPT-2 counts the text's positions from P, their BART from 0: `positions` says which. Models that share one layer
(ALBERT) share its prefix. A prefix of zeros is no identity: it takes part of the softmax.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.mixin import MethodMixin
from lightning_peft.prefixes import PrefixMethod


@dataclass(eq=False, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Train P keys and values before those of the text in every attention.

    Args:
        num_virtual_tokens: length P of the prefix [tokens].
        mid_dim: width of the network that the prefix is computed by in training; None trains the prefix itself.
    """

    num_virtual_tokens: int = 10
    mid_dim: int | None = 512

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"


class PrefixTuningMixin(MethodMixin):
    """For a LightningModule that is tuned by a prefix: set ``self.method`` to change its arguments."""

    default_method = PrefixTuning

    def fold(self) -> None:
        """Keep the prefix that the network gives and drop the network."""
        assert isinstance(self.method, PrefixTuning)
        assert isinstance(self, nn.Module)
        self.method.fold(self)
