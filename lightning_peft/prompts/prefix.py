"""Prefixes: trained keys and values before those of the text, in every attention.

``Attn(q, [P_k; K], [P_v; V])`` with P columns for each attention, trained as they are or as the output of a network,
``P = W tanh(U E + b) + c`` with its own W for each attention, that is dropped after training.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import cache_argument
from lightning_peft.core.attention_probe import Attention
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.sharded import is_part, whole


class PrefixNetwork(Graft):
    """The part of the reparametrisation that attentions of one kind share: ``tanh(U E + b)``, [P, mid].

    It is a graft of the backbone that takes part in no joint: it keeps what the prefixes compute from.
    """

    def __init__(self, kinds: Iterable[str], count: int, dim: int, mid_dim: int) -> None:
        super().__init__()
        self.trunks = nn.ModuleDict(
            {kind: nn.Sequential(nn.Embedding(count, dim), nn.Linear(dim, mid_dim), nn.Tanh()) for kind in kinds}
        )

    def hidden(self, kind: str) -> Tensor:
        """Return the hidden states that the prefixes of this kind of attention are projected from, [P, mid]."""
        table, *rest = self.trunks[kind].children()
        return nn.Sequential(*rest)(table.weight)


class Prefix(Graft):
    """P keys and values of one attention.

    Args:
        place: the attention.
        count: P.
        std: of the normal distribution that they start from; None leaves them to the network.
        network: what they are computed from while they are trained; None: they are parameters themselves.
        dropout: probability for each number of them in training.
    """

    network: PrefixNetwork | None
    bias_table: nn.Module | None
    """The attention of T5 whose table of position biases all layers of its stack have."""

    def __init__(
        self, place: Attention, count: int, std: float, network: PrefixNetwork | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = (place.heads, place.key_dim, place.value_dim)
        self.count, self.kind, self.dropout = count, place.kind, dropout
        self.columns = count
        self.refer(network=network, bias_table=None)
        if network is None:
            self.keys = nn.Parameter(torch.randn(place.heads, count, place.key_dim) * std)
            self.values = nn.Parameter(torch.randn(place.heads, count, place.value_dim) * std)
        else:
            mid_dim = network.trunks[place.kind][1].out_features  # type: ignore[index]
            self.project = nn.Linear(mid_dim, place.heads * (place.key_dim + place.value_dim))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys [H, P, d_k] and the values [H, P, d_v]."""
        if self.network is None:
            return self.keys, self.values
        heads, key_dim, value_dim = self.shape
        out = self.project(self.network.hidden(self.kind).to(self.project.weight.device))
        keys, values = out.split([heads * key_dim, heads * value_dim], dim=1)
        return keys.view(self.count, heads, -1).transpose(0, 1), values.view(self.count, heads, -1).transpose(0, 1)

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values with the prefix on their left, [B, H, P + S, d]."""
        keys, values = (
            F.dropout(t, self.dropout, self.training).to(key.dtype).expand(key.shape[0], -1, -1, -1)
            for t in self.rows()
        )
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def position_bias(self, bias: Tensor, added: int) -> Tensor:
        """Return T5's bias for the prefix, [1, H, N, P]: that of tokens before the text, or 0 where it is unshifted."""
        table = self.bias_table
        if table is None:
            return bias.new_zeros(1, *bias.shape[1:3], added)
        queries, length = bias.shape[2], added + bias.shape[3]
        with _gathered(table.relative_attention_bias):  # type: ignore[arg-type]
            left = table.compute_bias(queries, length, device=bias.device, past_seen_tokens=length - queries)  # type: ignore[operator]
        return left[..., :added]

    def drop_network(self) -> None:
        """Store the keys and values, and drop the network that computed them."""
        keys, values = (t.detach().clone() for t in self.rows())
        self.network = None
        del self.project
        self.keys, self.values = nn.Parameter(keys.contiguous()), nn.Parameter(values.contiguous())


@contextmanager
def _gathered(embedding: nn.Embedding) -> Iterator[None]:
    """Let a frozen table be whole: under FSDP2 it belongs to the first block, and this may be a later one."""
    weight = embedding.weight
    if not is_part(weight):
        yield
        return
    if weight.requires_grad:
        raise TuningError(
            "T5's position bias is trained and sharded, and a prefix reads it outside of its block: leave "
            "relative_attention_bias frozen, or train under DDP."
        )
    embedding.weight = nn.Parameter(whole(weight), requires_grad=False)
    try:
        yield
    finally:
        embedding.weight = weight


class ShiftedTable(Graft):
    """Shifts a position table by P: its host reads the rows from P on, and too long an input is out of range."""

    weights = ("weight",)

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the rows from P on, [T - P, d]."""
        return w[self.by :]


class ShiftedPositions(Graft):
    """Shifts the positions by P that its host, a rotary embedding say, or an attention, computes from."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute what the host does of ``position_ids + P``."""
        inputs = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.by
        return forward(**inputs)


class TextPositions(Graft):
    """Counts the positions of a text from its first token, where padding stands before it.

    Without this a prefix would be as far away from the text as the padding is long.

    Args:
        host: the decoder.
        by: by how much they are shifted, too; 0 where what computes from them is.
    """

    def __init__(self, host: nn.Module, by: int) -> None:
        super().__init__()
        self.by = by
        self._names = tuple(inspect.signature(host.forward).parameters)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        text = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        positions = inputs.get("position_ids")
        if positions is None and isinstance(text, Tensor):
            positions = positions_of(inputs.get("attention_mask"), text.shape[1])
        if positions is None and isinstance(text, Tensor) and self.by:
            cache = cache_argument.cache_in(inputs)
            start = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(start, start + text.shape[1], device=text.device)[None]
        return forward(**inputs | {"position_ids": None if positions is None else positions + self.by})


def positions_of(mask: Any, length: int) -> Tensor | None:
    """Return the positions of the last ``length`` tokens under a mask [B, T], or None where the mask is none."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
