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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.core import anatomy, compatibility, structure
from lightning_peft.core.arguments import natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.towers.plain_pool import PromptsUnturned, RowEnd, RowPool, RowPrompts, end_of
from lightning_peft.towers.plain_vision import counting_prefixes
from lightning_peft.towers.prompt_pool import ChosenPrompts, PromptPool
from lightning_peft.towers.vision import Tower, tower
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


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
    advised: ClassVar[Rates] = Rates(3e-3, 3e-3, SHAPES)
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
        if structure.gives_feature_maps(found.module) or not anatomy.head_names(backbone):
            raise TuningError(f"L2P gives a task head the mean of the prompts, and {name} has none: take a classifier.")
        start = 0 if self.layout == "prepend" else found.prefix
        position = _position_table(found.embeddings) if self.layout == "after_cls" else None
        device = device_of(found.patches)
        prompts = torch.empty(self.pool_size, self.prompt_length, found.dim, device=device).uniform_(-1, 1)
        keys = torch.empty(self.pool_size, found.dim, device=device).uniform_(-1, 1)
        how = (self.diversify, self.batchwise, self.cache_queries)
        path = self._attach_plain(found) if found.plain else self._attach(found, start, position)
        kind = RowPool if found.plain else PromptPool
        pool = attach(found.module, kind(prompts, keys, self.top_n, path, start, *how), self.key)
        if isinstance(pool, RowPool):
            pool.end = _path(found.module, end_of(found), self.key)
        if self.batchwise == "always":
            rank_zero_warn(
                "batchwise='always' lets a test batch vote on its prompts: batches of one task then give the task "
                "away, and accuracies are too high."
            )
        return ()

    def _attach(self, found: Tower, start: int, position: str | None) -> str:
        """Attach the place of the prompts; return its path below the tower."""
        attach(found.embeddings, ChosenPrompts(start, position), self.key)
        return _path(found.module, found.embeddings, self.key)

    def _attach_plain(self, found: Tower) -> str:
        """Attach the place of the prompts and that of their outputs; return the path of the first below the tower."""
        if found.embeddings is end_of(found):
            raise TuningError(
                f"{type(found.module).__name__} is one block without a norm, where no prompts can go in and out: "
                "take VPT."
            )
        chosen = attach(found.embeddings, RowPrompts(), self.key)
        attach(end_of(found), RowEnd(), self.key)
        for module in counting_prefixes(found.blocks):
            attach(module, PromptsUnturned(self.top_n * self.prompt_length), self.key).refer(chosen=chosen)
        return _path(found.module, found.embeddings, self.key)

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return lambda times the pull of the last batch; None where nothing has been computed since."""
        pull = self.pool(module).take()
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
        """Warn where the cache of queries was never hit."""
        super().on_train_epoch_end(trainer, pl_module)
        cache = self.pool(pl_module).cache
        if cache is not None and cache.hits == 0 and trainer.current_epoch == 1 and len(cache.queries) > 0:
            rank_zero_warn(
                f"cache_queries has kept {len(cache.queries)} queries and found none again: it needs images that look "
                "alike in every epoch, without random changes."
            )


def _path(tower: nn.Module, host: nn.Module, key: str) -> str:
    """Return the path of a graft of this key below a tower."""
    return next(f"{path}.{key}" for path, module in tower.named_modules() if module is host)


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
