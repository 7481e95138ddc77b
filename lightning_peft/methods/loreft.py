"""LoReFT: the hidden states of a few tokens are changed within a learnt subspace: ``h + Rᵀ (W h + b - R h)``.

R [r, d] has orthonormal rows, W is [r, d] and b [r]; each block has its own. The tokens are the first and the last of
the prompt: padding on either side counts for nothing, nor do the targets of a decoder, which come behind the prompt,
nor what `generate` writes. The weights of the backbone stay as they are; nothing can be merged.

Source: Wu et al. 2024, arXiv 2404.03592, section 3.2. R is the Q factor of what is trained, so that its rows stay
orthonormal, as in the authors' pyreft; W and b start as in a linear layer, and not at the frozen model. A token of both
ends of a short prompt is changed once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, compatibility, select, structure, sublayers
from lightning_peft.core.arguments import bounded, natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.orthogonal import orthonormal
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.prompts.prompt_tokens import Positions, attach_positions
from lightning_peft.prompts.source_mask import with_source
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast


class Intervention(Graft):
    """Changes the hidden states that its host, a block, gives for the chosen tokens.

    Args:
        host: the block.
        width: size d of the hidden states.
        r: size of the subspace.
        first: how many tokens at the beginning.
        last: how many tokens at the end.
        tied: whether beginning and end have the same weights.
        positions: of this call.
    """

    def __init__(
        self, host: nn.Module, width: int, r: int, first: int, last: int, tied: bool, positions: Positions
    ) -> None:
        super().__init__()
        self.first, self.last, self.positions = first, last, positions
        sets, device = 1 if tied or not (first and last) else 2, device_of(host)
        self.rotation = nn.Parameter(torch.empty(sets, r, width, device=device))
        for rows in self.rotation:
            nn.init.orthogonal_(rows)
        bound = 1 / math.sqrt(width)
        self.source = nn.Parameter(torch.empty(sets, r, width, device=device).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(sets, r, device=device).uniform_(-bound, bound))

    def rows(self) -> Tensor:
        """Return R of each set, [sets, r, d], in fp32."""
        return orthonormal(self.rotation)

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output, of which the first tensor is the hidden states, [B, T, d]."""
        if isinstance(out, (tuple, list)):  # the first GPT has lists
            return type(out)((self.after(out[0], host), *out[1:]))
        if self.positions.skips:
            return out
        real, width = self.positions.real, self.rotation.shape[-1]
        if out.ndim != 3 or out.shape[-1] != width or (real is not None and real.shape != out.shape[:2]):
            text = "" if real is None else f" of a text of {list(real.shape)} tokens"
            raise TuningError(
                f"{type(host).__name__} gives {list(out.shape)}, which are no hidden states{text} of width {width}: "
                "exclude it, or take LoRA."
            )
        places, chosen = self.positions.ends(out, self.first, self.last)
        states = out.gather(1, places.unsqueeze(-1).expand(-1, -1, out.shape[-1]))
        with without_autocast(self.rotation):
            edits = self._edits(states.float()) * chosen.any(-1, keepdim=True)
            change = edits[0] if len(edits) == 1 else torch.where(chosen[0], edits[0], edits[1])
        changed = (states + change).to(out.dtype)
        return out.scatter(1, places.unsqueeze(-1).expand_as(changed), changed)

    def _edits(self, states: Tensor) -> Tensor:
        """Return ``Rᵀ (W h + b - R h)`` of each set, [sets, B, n, d]."""
        rows = self.rows()
        inside = torch.einsum("btd,srd->sbtr", states, self.source - rows) + self.bias[:, None, None]
        return torch.einsum("sbtr,srd->sbtd", inside, rows)


@dataclass(eq=False, kw_only=True)
class LoReFT(Method):
    """Train, in each block, a change of the hidden states of the first and last tokens, within a small subspace.

    Args:
        r: size of the subspace.
        first: how many tokens at the beginning of the prompt are changed.
        last: how many tokens at its end are changed.
        layers: indices of the blocks, negative ones from the end; None: all.
        tied: let beginning and end have the same weights.
    """

    r: int = natural(4)
    first: int = bounded(1, "is no number of tokens", at_least=0)
    last: int = bounded(1, "is no number of tokens", at_least=0)
    layers: list[int] | None = None
    tied: bool = True

    kind: ClassVar[str] = "activations"
    trains: ClassVar[str] = "changes of the hidden states of a few tokens, within a subspace"
    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    advised: ClassVar[Rates] = Rates(6e-3, 3e-2, MEASURED)
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS, compatibility.LENGTH})

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach an intervention to each block, and what notes the tokens of a call."""
        name = type(backbone).__name__
        if not self.first + self.last:
            raise TuningError("first=0 and last=0 leave no token to change: take 1 or more of one of them.")
        if structure.is_encoder_decoder(backbone) or structure.has_two_towers(structure.base_model_of(backbone)):
            raise TuningError(f"LoReFT changes the tokens of one stack, and {name} has two: take LoRA.")
        blocks = self.without_excluded({n: b for entries in anatomy.blocks(backbone).values() for n, b in entries})
        if self.layers is not None:
            kept = select.in_layers(backbone, blocks, self.layers)
            blocks = {n: block for n, block in blocks.items() if n in kept}
        if not blocks:
            raise TuningError(f"{name} has no list of blocks, or exclude={self.exclude!r} leaves none: take LoRA.")
        if self.layers is None:
            blocks = {n: blocks[n] for n in reached(backbone, blocks)}
        positions = Positions()
        for path, block in blocks.items():
            width = self._width(backbone, path)
            attach(block, Intervention(block, width, self.r, self.first, self.last, self.tied, positions), self.key)
        attach_positions(backbone, positions, self.key)
        return ()

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with ``source_mask`` [B, T], where its labels tell the prompt from the target."""
        return with_source(batch)

    def _width(self, backbone: nn.Module, block: str) -> int:
        for kind in ("ffn", "attention"):
            if found := sublayers.ends(backbone, block, kind, read=True):
                if self.r > found[-1].width:
                    raise TuningError(
                        f"r={self.r} is wider than {block}, whose hidden states have {found[-1].width} features: take "
                        "fewer."
                    )
                return found[-1].width
        raise TuningError(f"{block} says nothing of the width of its hidden states: exclude it, or take LoRA.")


LoReFTMixin = TunedBy[LoReFT]
