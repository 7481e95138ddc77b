"""VPT: trained prompts among the tokens of a frozen vision transformer.

Shallow: ``[x_1, Z_1, E_1] = L_1([x_0, P, E_0])``, then the prompts' outputs Z go on. Deep: every block i gets prompts
of its own, ``[x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])``, and what it makes of them is thrown away.

Source: Jia et al. 2022, arXiv 2203.12119, section 3. Prompts come after [CLS] and registers, before the patches, with
no position embedding. Initial values are drawn from U(-v, v), v = sqrt(6 / (channels * patch area + dp)) with the width
dp of the prompts, d without a projection, as in the authors' code (``src/models/vit_prompt/vit.py``): Xavier's rule for
the patch embedding, not for the prompts. Where we
differ from that code: in Swin a prompt stays with its image in every window (there, prompts of one image join windows
of another as soon as a batch has two), the mean over tokens never has the prompts in it, and dropout is drawn for each
image.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, attention, compatibility, structure
from lightning_peft.core.arguments import choice, natural, rate
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, attach, detach, grafts, owned_by
from lightning_peft.core.meta_run import ran
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import DIGITS, Rates
from lightning_peft.core.reach import reached
from lightning_peft.towers.plain_vision import counting_prefixes
from lightning_peft.towers.token_prompts import (
    BlockPrompt,
    EmbeddedPrompt,
    FoldedPrompt,
    LastBlockPrompt,
    MorePrefixTokens,
    Pooled,
    TokenPrompt,
    WiderMask,
)
from lightning_peft.towers.vision import Tower, tower
from lightning_peft.towers.window_prompts import ImagePrompts, attach_windows
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class VPT(Method):
    """Train P prompts in the input of a vision transformer (shallow) or of each of its blocks (deep).

    Args:
        num_virtual_tokens: P, the number of prompts [tokens]; the paper searches 1 to 200, fewer for Swin.
        deep: whether each block has prompts of its own.
        num_deep_layers: how many blocks have, with ``deep``; None: all.
        deep_from: whether these are the first blocks ('bottom') or the last ('top').
        projection: width of the prompts before a linear layer that all blocks share; None: that of the tokens.
        dropout: of the prompts; None: 0.1 where deep, 0 where shallow, as in the paper.
        pool: what the task head reads: 'model' what it always reads, 'cls' the first token, 'mean' the mean over the
            patches. The prompts are never part of it.
    """

    num_virtual_tokens: int = natural(10, "is no prompt")
    deep: bool = True
    num_deep_layers: int | None = None
    deep_from: Literal["bottom", "top"] = choice("bottom", "is no end of the blocks")
    projection: int | None = natural(None, "is no width")
    dropout: float | None = rate(None, "is no share")
    pool: Literal["model", "cls", "mean"] = choice("model", "is no pooling")

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "tokens among the patches of an image, in the first or in every block"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv 2203.12119"
    advised: ClassVar[Rates] = Rates(3e-2, 1e-2, DIGITS)
    breaks: ClassVar[frozenset[str]] = frozenset({compatibility.LENGTH})
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts to the embeddings or blocks of the vision tower."""
        if not self.deep and (self.num_deep_layers is not None or self.deep_from == "top"):
            raise TuningError("deep=False has prompts in the input alone: leave num_deep_layers and deep_from out.")
        found = tower(backbone, of_patches=True)
        chosen = self._layers(len(found.blocks), type(backbone).__name__)
        self._check_fit(backbone, found)
        image, named = found.inputs(torch.device("meta"), rows=2)
        parts = [part for part in (found.module, backbone) if ran(part, *image, **named)]
        # Prompts that no block hands on can stand aside of what is read between the blocks.
        ways = (False, True) if len(chosen) == len(found.blocks) and not found.windowed else (False,)
        chosen = _read(backbone, found, chosen)
        base = structure.base_model_of(backbone)
        in_texts = structure.gives_image_features(base) and not structure.has_two_towers(base)
        for aside in ways[structure.gives_feature_maps(found.module) or (in_texts and len(ways) > 1) :]:
            self._attach(found, chosen, aside)
            if all(ran(part, *image, **named) for part in parts):
                return ()
            for place in list(grafts(backbone, self.key)):
                detach(place.host, place.name)
        other = "" if found.windowed or len(ways) > 1 else "take deep=True in all blocks, which then hand on none, or "
        raise TuningError(
            f"{type(backbone).__name__} computes from the number or the places of its tokens, which prompts "
            f"change: {other}tune it by LoRA or BitFit."
        )

    def _attach(self, found: Tower, chosen: list[int], aside: bool) -> None:
        bound = initial_bound(found, self.projection)
        if found.windowed:
            weights = {i: self._drawn(bound, _width(found.blocks[i]), found.blocks[i]) for i in chosen}
            attach_windows(found, weights, self._dropout, self.key)
        else:
            self._attach_tokens(found, chosen, bound, aside)
        if self.pool != "model":
            attach(found.module, Pooled(self.pool, found.prefix), self.key)

    def prompts(self, model: nn.Module) -> list[Tensor]:
        """Return the trained prompts of each block that has some, [P, d] or, before a projection, [P, dp]."""
        sources = [place.graft for place in self.own_grafts(model, ImagePrompts)]
        return [graft.weight for graft in sources if graft.weight is not None]

    def to_key_values(self, model: nn.Module) -> None:
        """Turn deep prompts into keys and values of each attention, for inference: no query and no MLP sees them.

        The outputs stay the same, since deep prompts' outputs are thrown away. What was trained is gone from the model
        afterwards, so save the delta first; `remove` still gives the backbone back.

        Raises:
            TuningError: the method is not applied, or the output of some prompts goes on to the next block.
        """
        backbone = self._tuned(model)
        self.applied_to(model)
        found = tower(backbone, of_patches=True)
        chosen = self._layers(len(found.blocks), type(backbone).__name__)
        if chosen != list(range(chosen[0], len(found.blocks))):
            raise TuningError(
                "the outputs of these prompts go on to the next block, so no keys and values can stand for them: "
                "make the prompts deep down to the last block."
            )
        prompted = {id(m) for i in _read(backbone, found, chosen) for m in found.blocks[i].modules()}
        start = 0 if found.windowed else found.prefix
        attentions = [a for a in attention.join(backbone, self.key) if id(a.module) in prompted]
        image, named = found.inputs(device_of(found.patches), rows=1)
        with in_eval(found.module), attention.recorded(attentions) as seen:
            found.module(*image, **named)
        for place in self.own_grafts(model, Graft):
            if not isinstance(place.graft, Pooled):
                detach(place.host, place.name)
        with owned_by(self.key, place.graft.switch):
            for one in attentions:
                columns = slice(start, start + self.num_virtual_tokens)
                key, value = (tensor[:1, :, columns] for tensor in seen[one.path])
                attach(one.module, FoldedPrompt(key, value), self.key)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.dropout is not None else 0.1 * self.deep

    def _layers(self, count: int, name: str) -> list[int]:
        """Return the blocks that get prompts of their own."""
        if not self.deep:
            return [0]
        deep = count if self.num_deep_layers is None else self.num_deep_layers
        if not 1 <= deep <= count:
            raise TuningError(f"num_deep_layers={deep}, but {name} has {count} blocks: take 1 to {count}.")
        return list(range(deep)) if self.deep_from == "bottom" else list(range(count - deep, count))

    def _check_fit(self, backbone: nn.Module, found: Tower) -> None:
        name = type(backbone).__name__
        maps = structure.gives_feature_maps(found.module)
        if maps and (not self.deep or self.num_deep_layers not in (None, len(found.blocks)) or found.windowed):
            raise TuningError(
                f"{name} gives the hidden states of its blocks, and prompts would be among them: take deep=True in "
                "all blocks, which then hand on none, the model without that (AutoModel), or LoRA."
            )
        if found.windowed and self.projection is not None:
            raise TuningError(f"the blocks of {name} have several widths: leave projection out.")
        if self.pool != "model" and (found.plain or found.given is not None):
            raise TuningError(f"pool={self.pool!r} is for a transformers classifier of images: take pool='model'.")
        if self.pool == "cls" and not found.has_cls:
            raise TuningError(f"pool='cls', but {name} has no [CLS] token: take pool='mean' or 'model'.")
        if self.pool != "model" and not anatomy.head_names(backbone):
            raise TuningError(f"pool={self.pool!r} is for a task head, and {name} has none: take pool='model'.")

    def _drawn(self, bound: float, dim: int, host: nn.Module) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_virtual_tokens, dim, device=device_of(host)).uniform_(-bound, bound))

    def _attach_tokens(self, found: Tower, chosen: list[int], bound: float, aside: bool) -> None:
        projection = self._projection(found)
        weights = {i: self._drawn(bound, self.projection or found.dim, found.blocks[i]) for i in chosen}

        def prompt(kind: type[TokenPrompt], i: int, own: bool) -> TokenPrompt:
            weight = weights.get(i) if own else None
            shared = projection if weight is not None else None
            insert = aside or i == chosen[0]
            return kind(weight, shared, self._dropout, found.prefix, self.num_virtual_tokens, insert)

        at_block = aside or found.embeddings is found.blocks[0]
        if 0 in weights and not at_block:
            attach(found.embeddings, prompt(BlockPrompt if found.plain else EmbeddedPrompt, 0, own=True), self.key)
        last = len(found.blocks) - 1
        for i, block in enumerate(found.blocks):
            if (aside and i in weights) or (i == last and not aside):
                attach(block, prompt(LastBlockPrompt, i, own=i > 0 or at_block), self.key)
            elif i in weights and (i > 0 or at_block):
                attach(block, prompt(BlockPrompt, i, own=True), self.key)
        if found.given is not None:
            for block in found.blocks[chosen[0] :]:
                attach(block, WiderMask(self.num_virtual_tokens), f"{self.key}_mask")
        for module in counting_prefixes(found.blocks[chosen[0] :]):
            attach(module, MorePrefixTokens(self.num_virtual_tokens), self.key)

    def _projection(self, found: Tower) -> nn.Linear | None:
        if self.projection is None:
            return None
        projection = nn.Linear(self.projection, found.dim, device=device_of(found.patches))
        nn.init.kaiming_normal_(projection.weight, mode="fan_out")
        return projection


def initial_bound(found: Tower, projection: int | None = None) -> float:
    """Return v of the initial values U(-v, v), 0.0625 for ViT-B/16; a projection's prompts have its width."""
    return math.sqrt(6 / (found.area + (projection or found.dim)))


def _width(block: nn.Module) -> int:
    """Return the width of a block, that of its first norm."""
    return next(int(m.normalized_shape[0]) for m in block.modules() if isinstance(m, nn.LayerNorm))


def _read(backbone: nn.Module, found: Tower, chosen: list[int]) -> list[int]:
    """Return those of the chosen blocks that an output depends on: LLaVA takes the features before the last one."""
    names = {id(module): name for name, module in backbone.named_modules()}
    blocks = {names[id(found.blocks[i])]: i for i in chosen}
    return [blocks[name] for name in reached(backbone, blocks)]


VPTMixin = TunedBy[VPT]
