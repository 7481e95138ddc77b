"""The directions of most variance in the inputs of layers, and ranks shared out by them (EVA).

Inputs are decomposed batch by batch, until the directions turn no more: what has been kept of the batches before, its
singular values times its directions, is decomposed again with the rows of the batch, as in the incremental principal
components of Ross et al. 2008. Layers that read one tensor, as query and value do, share one decomposition.
"""

import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.batches import inputs_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.gathering import rows_of_all
from lightning_peft.core.graft import Graft, attach, detach
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.placement import device_of

ALIKE = 0.99
"""Cosine of a direction with what it was a batch before, from which on it counts as found."""
BATCHES = 256
"""How many batches are read at most."""
_SEED = 42


class Directions:
    """The first directions of variance of the rows that have been added.

    Args:
        count: how many directions.

    Attributes:
        vectors: [count, d], the greatest variance first; None: there have not been enough rows yet.
        shares: of the whole variance, [count].
        found: how many of the first directions the last batch has not turned.
    """

    def __init__(self, count: int) -> None:
        self.count, self.rows, self.found = count, 0, 0
        self.vectors: Tensor | None = None
        self.shares = self.values = self.mean = torch.empty(0)
        self.spread = 0.0

    def add(self, rows: Tensor) -> None:
        """Decompose what there is anew, with these rows [N, d]; fewer than directions are left out."""
        if len(rows) < self.count:
            return
        mean, total = rows.mean(0, dtype=torch.float64), self.rows + len(rows)
        parts = [rows - rows.mean(0)]
        self.spread += float(parts[0].square().sum())
        if self.vectors is not None:
            moved = (self.rows * len(rows) / total) ** 0.5 * (self.mean - mean)
            self.spread += float(moved.square().sum())
            parts = [self.values.unsqueeze(1) * self.vectors, *parts, moved.unsqueeze(0)]
            mean = (self.rows * self.mean + len(rows) * mean) / total
        table = torch.cat(parts)  # in double precision from the second batch on, as in HF PEFT
        with torch.random.fork_rng(devices=[table.device] if table.is_cuda else []):
            torch.manual_seed(_SEED)
            _, values, vectors = torch.svd_lowrank(table, q=min(2 * self.count, *table.shape), niter=4)
        vectors = vectors.t()[: self.count]
        greatest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * greatest.sign()  # a decomposition leaves the sign open
        if self.vectors is not None:
            same = torch.cosine_similarity(vectors, self.vectors) >= ALIKE
            self.found = int(same.long().cumprod(0).sum())
        self.vectors, self.values, self.mean, self.rows = vectors, values[: self.count], mean, total
        self.shares = self.values.square() / max(self.spread, torch.finfo(torch.float32).tiny)


class Heard(Graft):
    """Adds the inputs of its host to directions, but for rows that are padding or are not learnt.

    Args:
        name: of the layer.
        count: how many directions.
        by_layer: name -> the directions of that layer; those of layers with one input are one object.
        seen: the inputs of the pass so far, by their number, and the directions that they are for.
    """

    listens_only = True

    def __init__(
        self, name: str, count: int, by_layer: dict[str, Directions], seen: dict[int, tuple[Any, Directions]]
    ) -> None:
        super().__init__()
        self.name, self.count, self.by_layer, self.seen = name, count, by_layer, seen
        self.kept: Tensor | None = None
        self.done = False

    def after(self, out: Any, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output as it is."""
        before = self.seen.get(id(x))
        if before is not None and before[0]() is x:
            theirs = before[1]
            theirs.count = max(theirs.count, self.count)
            self.by_layer[self.name] = theirs
            return out
        own = self.by_layer.setdefault(self.name, Directions(self.count))
        self.seen[id(x)] = weakref.ref(x), own
        if not self.done:
            kept = self.kept
            rows = x.flatten(0, -2) if kept is None or kept.shape != x.shape[:-1] else x[kept]
            own.add(rows_of_all(rows.float()))
        return out


def directions(
    backbone: nn.Module, layers: Mapping[str, tuple[nn.Module, int]], budget: int, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Return the directions that each layer gets of a budget, [rank, in], by the name of the layer.

    A layer takes no more rows in as soon as the directions that it would get now turn no more.

    Args:
        backbone: is called with what it takes of a batch, in eval mode.
        layers: name -> the layer, and how many directions it may get.
        budget: how many directions there are for all layers.
        batches: are read again from the first where they are too few.

    Raises:
        TuningError: there are no batches, they fit no argument of the backbone, or have fewer rows than directions.
    """
    found: dict[str, Directions] = {}
    seen: dict[int, tuple[Any, Directions]] = {}
    heard = [attach(layer, Heard(name, count, found, seen), "heard_inputs") for name, (layer, count) in layers.items()]
    ranks, read = {name: count for name, (_, count) in layers.items()}, 0
    try:
        with in_eval(backbone):
            for batch in chain.from_iterable(batches for _ in range(BATCHES)):
                seen.clear()
                _read(backbone, heard, batch)
                read += 1
                if found.keys() == layers.keys() and all(each.vectors is not None for each in found.values()):
                    ranks = shared_out(found, budget)
                for each in heard:
                    own = found.get(each.name)
                    most = max(rank for name, rank in ranks.items() if found.get(name) is own)
                    each.done = own is not None and own.vectors is not None and own.found >= most
                if read == BATCHES or all(each.done for each in heard):
                    break
    finally:
        for layer, _ in layers.values():
            detach(layer, "heard_inputs")
    return {name: _first(found.get(name), rank, name, layers[name][1], read) for name, rank in ranks.items()}


def _first(own: Directions | None, rank: int, name: str, count: int, read: int) -> Tensor:
    """Return the directions that a layer gets."""
    vectors = None if own is None else own.vectors
    if vectors is None:
        raise TuningError(
            f"{read} batches gave {name} fewer than {count} rows each, which is the greatest rank that it may get: "
            "give larger batches, or less r= or eva_rho=."
        )
    return vectors[:rank]


def shared_out(found: Mapping[str, Directions], budget: int) -> dict[str, int]:
    """Return how many directions each layer gets of a budget, which goes to the greatest shares of variance."""
    pairs = [(float(share), name) for name, each in found.items() for share in each.shares]
    ranks = dict.fromkeys(found, 0)
    for _, name in sorted(pairs, key=lambda pair: -pair[0])[:budget]:
        ranks[name] += 1
    return ranks


def _read(backbone: nn.Module, heard: list[Heard], batch: Any) -> None:
    device = device_of(backbone)
    named = batch if isinstance(batch, Mapping) else {}
    mask, labels = named.get("attention_mask"), named.get("labels")
    kept = None if mask is None else mask.to(device).bool()
    if kept is not None and labels is not None and labels.shape == kept.shape:
        kept = kept & (labels.to(device) != IGNORED)
    for each in heard:
        each.kept = kept
    backbone(**{name: value.to(device) for name, value in inputs_of(batch, backbone).items()})
