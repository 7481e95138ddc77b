"""SHiRA: a few entries of each weight matrix are trained, chosen once: ``W' = W + S``, S being sparse and of high rank.

S has r (in + out) entries, as many as a LoRA of rank r, at places that are drawn at random or are those of the greatest
weights, and all of them are zero at the start. Its places and values are the delta, so that switching writes few
numbers.

Source: Bhardwaj et al. 2024, arXiv 2406.13175, section 3: SHiRA-Rand and SHiRA-WM (greatest magnitudes). The authors
train the weight with a masked gradient; here the entries alone are parameters, in fp32 beside a weight of any dtype,
as in HF PEFT.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.bases.layers import LayerMethod
from lightning_peft.core.arguments import choice, natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.placement import check_readable, device_of
from lightning_peft.core.quantized import dense, has_quantized_weight
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.sharded import whole
from lightning_peft.core.twin import Twin
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates import entry_gradients
from lightning_peft.updates.layer_update import LayerUpdate
from lightning_peft.updates.low_rank import shape_of

Mask = Literal["random", "magnitude"]


class Entries(LayerUpdate):
    """Adds trained values to entries of the weight that the layer runs with.

    Args:
        host: the layer.
        count: how many entries.
        mask: whether their places are drawn, or are those of the greatest weights.
    """

    weights = ("weight",)
    zero = frozenset({"values"})
    indices: Tensor
    apart = False
    """Whether the running call computes the gradients of the values apart from that of the weight."""

    def __init__(self, host: nn.Module, count: int, mask: Mask) -> None:
        super().__init__(host)
        out, inside = shape_of(host)
        if mask == "magnitude":
            chosen = self.matrix(whole(dense(host)).detach()).abs().flatten().topk(count).indices
        else:
            chosen = torch.randperm(out * inside)[:count]
        chosen = chosen.sort().values.to(device_of(host))
        self.register_buffer("indices", torch.stack([chosen // inside, chosen % inside]).int())
        self.values = nn.Parameter(torch.zeros(count, device=device_of(host)))

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the changed weight, in the dtype of ``w``."""
        if self.merged:
            return w
        self.apart = entry_gradients.is_worth_it(w, self.values)
        return self.matrix(self._sum(self.matrix(w), self.values.detach() if self.apart else self.values))

    def around(self, forward: Callable[..., Tensor], host: nn.Module, x: Tensor) -> Tensor:
        """Return the output, with the gradients of the values where the weight had them as constants."""
        out = forward(x)
        return entry_gradients.with_gradients(out, x, self.values, self.indices) if self.apart else out

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W + S``, the sums computed in fp32 or more and rounded once."""
        return self._sum(weight, self.values)

    def _sum(self, weight: Tensor, values: Tensor) -> Tensor:
        places = tuple(self.indices.long())
        return weight.index_put(places, (weight[places] + values).to(weight.dtype))


@dataclass(eq=False, kw_only=True)
class SHiRA(LayerMethod):
    """Train few entries of each chosen weight matrix.

    Args:
        r: how many entries: r (in + out), as many as a LoRA of this rank trains.
        mask: which: 'random' draws them, 'magnitude' takes those of the greatest weights.
    """

    r: int = natural(32)
    mask: Mask = choice("random", "chooses no entries")

    trains: ClassVar[str] = "few entries of weight matrices, a sparse update of high rank"
    paper: ClassVar[str] = "Bhardwaj et al. 2024, arXiv 2406.13175"
    advised: ClassVar[Rates] = Rates(6e-3, 3e-2, MEASURED)
    twin: ClassVar[Twin | None] = Twin(
        peft_type="SHIRA",
        tensors={"values": "shira_weight", "indices": "shira_indices"},
        arguments={"r": "r"},
        defaults={
            "fan_in_fan_out": False,
            "init_weights": True,
            "mask_type": "random",
            "r": 32,
            "random_seed": None,
            "target_modules": None,
        },
        free=frozenset({"init_weights", "random_seed"}),
    )

    def update(self, name: str, host: nn.Module) -> Entries:
        """Return the trained entries of a layer."""
        out, inside = shape_of(host)
        if self.r * (out + inside) > out * inside:
            most = out * inside // (out + inside)
            raise TuningError(
                f"r={self.r} makes {self.r * (out + inside)} entries of {name}, which has {out * inside}: "
                f"{f'take {most} or less' if most else 'exclude it'}."
            )
        if has_quantized_weight(host):
            raise TuningError(f"{name} is quantised, and has no entries to change: exclude it, or take LoRA.")
        if self.mask == "magnitude":
            check_readable(host, "mask='magnitude'")
        return Entries(host, self.r * (out + inside), self.mask)

    def expect(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Check that the entries of saved tensors are entries of the layers."""
        for place in self.own_grafts(backbone, Entries):
            indices = tensors.get(f"{place.full_name}.indices")
            if indices is not None and indices.dim() == 2 and len(indices) == 2:
                most = indices.new_tensor(shape_of(place.host)).unsqueeze(1)
                if ((indices < 0) | (indices >= most)).any():
                    raise TuningError(
                        f"{place.path} of shape {list(shape_of(place.host))} has not all entries of the file: it is "
                        "damaged, or was made for another backbone."
                    )


SHiRAMixin = TunedBy[SHiRA]
