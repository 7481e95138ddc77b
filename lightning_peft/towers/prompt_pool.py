"""A pool of prompts, of which each image gets those whose keys are nearest to its query; queries can be cached."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft
from lightning_peft.core.host_copy import ask
from lightning_peft.core.noted import Noting
from lightning_peft.core.private_torch import times_written
from lightning_peft.core.tracing import is_traced


class ChosenPrompts(Graft):
    """Wraps the embeddings and puts the chosen prompts among the tokens.

    Args:
        start: how many tokens stand before the prompts.
        position: what is added to each prompt, [d]; None: nothing.
    """

    rows: Tensor | None = None
    """Set by the pool for one call, [B, N * L_p, d]."""
    embedded: Tensor | None = None
    """Kept from the query for the pass with prompts, so that the patches are embedded once, [B, n + T, d]."""
    sharing: bool = False

    def __init__(self, start: int, position: str | None) -> None:
        super().__init__()
        self.start = start
        self.position = position

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of the image."""
        if self.embedded is not None:
            embedded, self.embedded = self.embedded, None
            return embedded
        embedded = forward(*args, **kwargs)
        if self.sharing:
            self.embedded = embedded
        return embedded

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings with the prompts among them, [B, n + N * L_p + T, d]."""
        if self.rows is None:
            return out
        rows = self.rows
        if self.position is not None:
            table = host.get_parameter(self.position)
            rows = rows + (table[0, 0] if table.ndim == 3 else table[0])
        return torch.cat((out[:, : self.start], rows.to(out.dtype), out[:, self.start :]), dim=1)


class PromptPool(Noting):
    """Wraps a vision transformer: chooses prompts for each image and pools their outputs.

    Args:
        prompts: [M, L_p, d].
        keys: [M, d].
        top_n: N, how many an image takes.
        child: path of the graft in the embeddings.
        start: how many tokens stand before the prompts.
        diversify: whether keys that earlier tasks chose often are penalised.
        batchwise: when a batch votes on one choice for all of it.
        cache_queries: whether the query of an image is computed once.
    """

    counts: Tensor
    frequency: Tensor

    def __init__(
        self,
        prompts: Tensor,
        keys: Tensor,
        top_n: int,
        child: str,
        start: int,
        diversify: bool,
        batchwise: Literal["never", "train", "always"],
        cache_queries: bool,
    ) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.keys = nn.Parameter(keys)
        self.register_buffer("counts", torch.zeros(len(keys), dtype=torch.long, device=keys.device))
        self.register_buffer("frequency", torch.zeros(len(keys), device=keys.device))
        self.top_n = top_n
        self.child = child
        self.start = start
        self.diversify, self.batchwise = diversify, batchwise
        self.cache = QueryCache() if cache_queries else None

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the tower, every token of its last hidden state the mean of the prompts' outputs."""
        inserted: ChosenPrompts = host.get_submodule(self.child)  # type: ignore[assignment]
        embeddings = host.get_submodule(self.child.rpartition(".")[0])
        share = not host.training and not any(p.requires_grad for p in embeddings.parameters())
        query = self._query(forward, host, inserted, share, args, kwargs)
        chosen, self.noted = self.choose(query)
        inserted.rows = self.prompts[chosen].flatten(1, 2)
        try:
            out = forward(*args, **kwargs)
        finally:
            inserted.rows = inserted.embedded = None
        return self._pooled(out)

    def _pooled(self, out: Any) -> Any:
        """Return the output with the mean of the prompts' outputs in the place of every token."""
        x: Tensor = out[0]
        pooled = x[:, self.start : self.start + self.top_n * self.prompts.shape[1]].mean(1, keepdim=True)
        tokens = x.shape[1] - self.top_n * self.prompts.shape[1]
        pooled = pooled.expand(-1, tokens, -1)
        if isinstance(out, tuple):
            return (pooled, *out[1:])
        out.last_hidden_state = pooled
        return out

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of the prompts that each image takes, [B, N], and the pull on their keys, a scalar."""
        distance = 1 - F.normalize(query.float(), dim=1) @ F.normalize(self.keys.float(), dim=1).t()
        # Stable sorts: topk takes any of several equal ones.
        order = distance.detach().argsort(dim=1, stable=True)
        if self.diversify and self.training:
            score = (distance.detach() * self.frequency).gather(1, order)
            order = order.gather(1, score.argsort(dim=1, stable=True))
        chosen = order[:, : self.top_n]
        if self.batchwise == "always" or (self.batchwise == "train" and self.training):
            votes = F.one_hot(chosen, len(self.keys)).sum((0, 1))
            chosen = votes.argsort(descending=True, stable=True)[: self.top_n].expand(len(query), -1)
        if self.training:
            self._count(chosen)
        return chosen, distance.gather(1, chosen).sum(1).mean()

    def begin_task(self) -> None:
        """Take what has been chosen so far as the frequencies of equation 4."""
        total = self.counts.sum()
        self.frequency.copy_(self.counts / total.clamp(min=1))

    def _count(self, chosen: Tensor) -> None:
        votes = F.one_hot(chosen, len(self.keys)).sum((0, 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(votes)
        self.counts.add_(votes)

    @torch.no_grad()
    def _query(
        self, forward: Callable[..., Any], host: nn.Module, inserted: ChosenPrompts, share: bool, args: Any, kwargs: Any
    ) -> Tensor:
        """Return the first token that the host gives for each image without prompts, [B, d]."""
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        pixels, args, kwargs = (args[0], args[1:], kwargs) if args else (kwargs.pop("pixel_values"), args, kwargs)

        def run(images: Tensor) -> Tensor:
            inserted.sharing = share and images is pixels
            try:
                with in_eval(host) if host.training else nullcontext():
                    out = forward(images, *args, **kwargs)
            finally:
                inserted.sharing = False
            return self._first(host, out)

        return run(pixels) if self.cache is None or is_traced() else self.cache.get(pixels, run, host)

    def _first(self, host: nn.Module, out: Any) -> Tensor:
        """Return the first token of what the host has given, [B, d]."""
        first: Tensor = out[0][:, 0]
        return first

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: neither a tensor of the last call nor cached queries."""
        return super().__getstate__() | {"cache": None if self.cache is None else QueryCache()}


class QueryCache:
    """A cache of queries by image content, cleared when the frozen weights change."""

    def __init__(self) -> None:
        self.queries: dict[bytes, Tensor] = {}
        self.hits = 0
        self._versions: list[int] = []

    def get(self, pixels: Tensor, run: Callable[[Tensor], Tensor], host: nn.Module) -> Tensor:
        """Return the queries of a batch, [B, d], after running those images that have not been seen."""
        versions = [times_written(p) for p in host.parameters() if not p.requires_grad]
        if versions != self._versions:
            self.queries, self._versions = {}, versions
        keys = ask(pixels, _digests)
        missing = [i for i, key in enumerate(keys) if key not in self.queries]
        self.hits += len(keys) - len(missing)
        if _on_any_rank(bool(missing), pixels):
            if 2 * len(missing) > len(keys):
                missing = list(range(len(keys)))
            every = len(missing) == len(keys) or not missing
            found = run(pixels if every else pixels[missing])
            for i, query in zip(range(len(keys)) if every else missing, found, strict=True):
                self.queries[keys[i]] = query.float().clone()
        return torch.stack([self.queries[key] for key in keys])


def _digests(images: Tensor) -> list[bytes]:
    """Return a hash of each image; all of them come from the GPU at once."""
    rows = images.detach().contiguous().cpu().view(len(images), -1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.data, digest_size=16, key=str(images.dtype).encode()).digest() for row in rows]


def _on_any_rank(flag: bool, like: Tensor) -> bool:
    """Tell whether the flag is true in any process: where weights are sharded, all must run the model together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flag
    held = torch.tensor([int(flag)], device=like.device)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return bool(held.item())
