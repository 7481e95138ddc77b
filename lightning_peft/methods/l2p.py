"""L2P: a pool of prompts, of which an image takes those whose keys are nearest to it, for classes that come one by one.

A query is the [CLS] of the frozen model without prompts. The N keys of least cosine distance to it choose N prompts of
length L_p, which go into the input; the head reads the mean of the prompts' outputs. The pull
``lambda * mean over images of the sum over chosen keys of (1 - cos)`` is added to the loss.

Source: Wang et al. 2022, arXiv 2112.08654, section 4; sizes are those for Split CIFAR-100. Paper and codes disagree:

* The paper penalises keys that earlier tasks chose often (equation 4), the codes do not: ``diversify``, off. Where all
  scores are 0, as in the first task, the distance decides.
* The codes let a batch vote on one choice for all of it, also in the test, where batches of one task give the task away
  (https://github.com/google-research/l2p/issues/28). Here an image chooses for itself: ``batchwise``.
* google-research/l2p puts prompts first, without position embedding; l2p-pytorch behind [CLS], with its position
  embedding, which stays frozen: ``layout``. Initial values are l2p-pytorch's U(-1, 1).

An optimizer with momentum goes on moving prompts that are not chosen any more, as in both codes.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.core import compatibility, structure
from lightning_peft.core.arguments import natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.towers.vision import tower
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class ChosenPrompts(Graft):
    """Stands around the embeddings and puts the chosen prompts among the tokens.

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


class PromptPool(Graft):
    """Stands around a vision transformer: chooses prompts for each image and pools what comes of them.

    Args:
        prompts: [M, L_p, d].
        keys: [M, d].
        top_n: N, how many an image takes.
        child: path of the graft in the embeddings.
        start: how many tokens stand before the prompts.
        method: says which of the ways to choose are on.
    """

    counts: Tensor
    frequency: Tensor

    def __init__(self, prompts: Tensor, keys: Tensor, top_n: int, child: str, start: int, method: "L2P") -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.keys = nn.Parameter(keys)
        self.register_buffer("counts", torch.zeros(len(keys), dtype=torch.long, device=keys.device))
        self.register_buffer("frequency", torch.zeros(len(keys), device=keys.device))
        self.top_n = top_n
        self.child = child
        self.start = start
        self.diversify = method.diversify
        self.batchwise = method.batchwise
        self.cache = QueryCache() if method.cache_queries else None
        self.pull: Tensor | None = None

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the tower, every token of its last hidden state the mean of the prompts' outputs."""
        inserted: ChosenPrompts = host.get_submodule(self.child)  # type: ignore[assignment]
        embeddings = host.get_submodule(self.child.rpartition(".")[0])
        share = not host.training and not any(p.requires_grad for p in embeddings.parameters())
        query = self._query(forward, host, inserted, share, args, kwargs)
        chosen, self.pull = self.choose(query)
        inserted.rows = self.prompts[chosen].flatten(1, 2)
        try:
            out = forward(*args, **kwargs)
        finally:
            inserted.rows = inserted.embedded = None
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
            modes = {module: module.training for module in host.modules()} if host.training else {}
            if modes:
                host.eval()
            try:
                out = forward(images, *args, **kwargs)
            finally:
                inserted.sharing = False
                for module, mode in modes.items():
                    module.training = mode
            return out[0][:, 0]

        return run(pixels) if self.cache is None else self.cache.get(pixels, run, host)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: neither a tensor of the last call nor cached queries."""
        return self.__dict__ | {"pull": None, "cache": None if self.cache is None else QueryCache()}


class QueryCache:
    """Queries by the content of the images, for as long as the frozen weights stay as they are."""

    def __init__(self) -> None:
        self.queries: dict[bytes, Tensor] = {}
        self.hits = 0
        self._versions: list[int] = []

    def get(self, pixels: Tensor, run: Callable[[Tensor], Tensor], host: nn.Module) -> Tensor:
        """Return the queries of a batch, [B, d], after running those images that have not been seen."""
        versions = [p._version for p in host.parameters() if not p.requires_grad]
        if versions != self._versions:
            self.queries, self._versions = {}, versions
        keys = [_digest(image) for image in pixels]
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


def _digest(image: Tensor) -> bytes:
    raw = image.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16, key=str(image.dtype).encode()).digest()


def _on_any_rank(flag: bool, like: Tensor) -> bool:
    """Tell whether the flag is true in any process: where weights are sharded, all must run the model together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flag
    held = torch.tensor([int(flag)], device=like.device)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return bool(held.item())


@dataclass(eq=False, kw_only=True)
class L2P(Method):
    """Train a pool of prompts and their keys: an image takes the prompts whose keys are nearest to it.

    Args:
        pool_size: M, the number of prompts in the pool.
        prompt_length: L_p, the length of a prompt [tokens].
        top_n: N, how many prompts an image takes.
        pull: lambda, the weight of the distance between queries and the keys they chose, in the loss.
        layout: 'prepend' puts prompts first without position embedding; 'after_cls' behind the tokens before the
            patches, with the position embedding of the first.
        diversify: in training, choose less what earlier tasks chose often; tasks begin by `on_task_start`.
        batchwise: 'never'; 'train': a training batch votes on one choice for all its images; 'always': in the test,
            too, which gives away which task a batch is from.
        cache_queries: compute the query of an image once, in its first batch: up to rounding that of any other; the
            images must look alike in every epoch.
    """

    pool_size: int = natural(10)
    prompt_length: int = natural(5)
    top_n: int = natural(5)
    pull: float = positive(0.5, "leaves the keys without a gradient")
    layout: Literal["prepend", "after_cls"] = "prepend"
    diversify: bool = False
    batchwise: Literal["never", "train", "always"] = "never"
    cache_queries: bool = False

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "a pool of prompts and the keys by which images choose among them"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2112.08654"
    breaks: ClassVar[frozenset[str]] = frozenset({compatibility.LENGTH})
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"pull", "diversify", "batchwise", "cache_queries"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the pool to the vision tower and the place of the prompts to its embeddings."""
        if self.top_n > self.pool_size:
            raise TuningError(f"top_n={self.top_n} is more than the {self.pool_size} prompts of the pool: take fewer.")
        found = tower(backbone)
        name = type(backbone).__name__
        if found.windowed or not found.has_cls:
            raise TuningError(f"L2P asks by the [CLS] token, which {name} has not: take a ViT, DeiT, DINOv2 or CLIP.")
        if structure.gives_feature_maps(found.module) or not structure.head_names(backbone):
            raise TuningError(f"L2P gives a task head the mean of the prompts, and {name} has none: take a classifier.")
        start = 0 if self.layout == "prepend" else found.prefix
        position = _position_table(found.embeddings) if self.layout == "after_cls" else None
        device = found.patches.weight.device
        prompts = torch.empty(self.pool_size, self.prompt_length, found.dim, device=device).uniform_(-1, 1)
        keys = torch.empty(self.pool_size, found.dim, device=device).uniform_(-1, 1)
        path = next(path for path, module in found.module.named_modules() if module is found.embeddings)
        attach(found.embeddings, ChosenPrompts(start, position), self.name)
        pool = PromptPool(prompts, keys, self.top_n, f"{path}.{self.name}", start, self)
        attach(found.module, pool, self.name)
        if self.batchwise == "always":
            rank_zero_warn(
                "batchwise='always' lets a test batch vote on its prompts: batches of one task then give the task "
                "away, and accuracies are too high."
            )
        return ()

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return lambda times the pull of the last batch; None where nothing has been computed since."""
        pool = self.pool(module)
        pull, pool.pull = pool.pull, None
        return None if pull is None else self.pull * pull

    def pool(self, model: nn.Module) -> PromptPool:
        """Return the pool of prompts.

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        return self.own_grafts(model, PromptPool)[0].graft

    def selection_counts(self, model: nn.Module) -> Tensor:
        """Return how often each prompt has been chosen in training, [M]."""
        return self.pool(model).counts.clone()

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Take the choices of the earlier tasks as the frequencies that ``diversify`` goes by."""
        pool = self.pool(pl_module)
        pool.begin_task()
        self._before = {**vars(self).get("_before", {}), task: pool.counts.tolist()}

    def result_rows(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return how often each prompt was chosen as rows of results, by task as far as this process saw them begin."""
        now = self.pool(module).counts.tolist()
        before: dict[int, list[int]] = vars(self).get("_before", {})
        if list(before) != list(range(len(before))) or not before:
            return [{"metric": "selection_count", "prompt": i, "value": count} for i, count in enumerate(now)]
        return [
            {"metric": "selection_count", "task": task, "prompt": i, "value": after - start}
            for task, starts in before.items()
            for i, (start, after) in enumerate(zip(starts, before.get(task + 1, now), strict=True))
        ]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn where a cache of queries has been of no use."""
        super().on_train_epoch_end(trainer, pl_module)
        cache = self.pool(pl_module).cache
        if cache is not None and cache.hits == 0 and trainer.current_epoch == 1 and len(cache.queries) > 0:
            rank_zero_warn(
                f"cache_queries has kept {len(cache.queries)} queries and found none again: it needs images that look "
                "alike in every epoch, without random changes."
            )


def _position_table(embeddings: nn.Module) -> str:
    for name, _ in embeddings.named_parameters():
        if name.startswith("position_embedding"):
            return name
    raise TuningError(f"{type(embeddings).__name__} has no learned positions to copy: take layout='prepend'.")


class L2PMixin(TunedBy[L2P]):
    """For a LightningModule that is tuned by L2P: set ``self.method`` to change its arguments."""

    def selection_counts(self) -> Tensor:
        """Return how often each prompt has been chosen in training, [M]."""
        method, module = self._owned()
        return method.selection_counts(module)
