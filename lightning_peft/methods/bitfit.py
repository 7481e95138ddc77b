"""BitFit: only the biases of the backbone are trained.

Source: Ben Zaken et al. 2022, arXiv 2106.10199. The authors' code (``glue_evaluator.py``) picks parameters whose name
contains "bias"; we match the last part of the name, since T5 has a ``relative_attention_bias.weight``. LayerNorm
weights are not trained. The subset that the paper finds nearly as good is the biases of the query and of the first
feed-forward projection, as its text and its counts have it; the authors' code adds the pooler's bias to any subset,
which is 'query+intermediate+pooler' here. Where query, key and value are one projection (GPT-2), a shift of the query's
part of its bias is trained, which is the same. Biases have no weight decay here, whatever the optimizer says of its
other parameters.

Backbones without biases (T5, Llama) are refused, or get biases that start at zero with ``add_missing_bias``, as in
t-few (Liu et al. 2022, arXiv 2205.05638, ``bitfit.py``), whose LayerNorm weights we leave frozen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy, select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

ROLES = ("query", "key", "value", "attention_output", "intermediate", "ffn_output", "norm", "pooler")
_PARTS = ("query", "key", "value")


class BiasPart(Graft):
    """Shifts the query's, key's or value's part of the bias of a projection that computes all three.

    Args:
        bias: name of the bias below the host, of 3 n values.
        values: the bias.
        part: 0 for the query, 1 for the key, 2 for the value.
        heads: 1 where the bias is [query, key, value]; the number of heads where it is so for each head in turn.
    """

    def __init__(self, bias: str, values: Tensor, part: int, heads: int) -> None:
        super().__init__()
        self.weights = (bias,)
        self.part, self.heads = part, heads
        self.shift = nn.Parameter(torch.zeros(values.numel() // 3, dtype=torch.float32, device=values.device))

    def neutral(self, host: nn.Module, name: str) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self.shift)

    def whole(self) -> Tensor:
        """Return the shift with zeros for the two other parts, in the layout of the bias."""
        parts = [torch.zeros_like(self.shift).view(self.heads, -1) for _ in _PARTS]
        parts[self.part] = self.shift.view(self.heads, -1)
        return torch.cat(parts, 1).flatten()

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the shifted bias."""
        return w + self.whole().to(w.dtype)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Add the shift to the bias."""
        bias = host.get_parameter(self.weights[0])
        bias.copy_(bias.float() + self.whole())


class AddedBias(Graft):
    """Adds a trained bias, zero at the start, to the output of a projection that has none.

    It cannot be merged: the plain model has no place for it, and would drop it when it is loaded.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        width = host.nf if isinstance(host, Conv1D) else host.out_features
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device_of(host)))  # type: ignore[arg-type]

    def neutral(self, host: nn.Module, name: str) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self.bias)

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``out + b``."""
        return out + self.bias.to(out.dtype)


@dataclass(eq=False, kw_only=True)
class BitFit(Method):
    """Train the biases: ``h = W x + b`` with W frozen.

    Args:
        biases: 'all'; roles joined by '+', such as 'query+intermediate', the paper's subset (roles are query, key,
            value, attention_output, intermediate, ffn_output, norm, pooler); a list of roles and of suffixes of module
            names; or a regex for module names.
        add_missing_bias: give the linear layers of the blocks that have no bias one that starts at zero.
        backbone_mode: whether dropout of the frozen backbone is active in training.
    """

    biases: str | list[str] = "all"
    add_missing_bias: bool = False
    backbone_mode: Literal["train", "eval"] = "train"

    kind: ClassVar[str] = "biases"
    trains: ClassVar[str] = "the biases, or a subset by role"
    paper: ClassVar[str] = "Ben Zaken et al. 2022, arXiv 2106.10199"
    advised: ClassVar[Rates] = Rates(3e-3, 1e-2, MEASURED, Rates(3e-2, 1e-1, DIGITS))

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Return the names of the biases to train; add those that are missing, and shifts of parts of fused ones."""
        owners = anatomy.bias_owners(backbone)
        bare = _without_bias(backbone, owners) if self.add_missing_bias else {}
        if not owners and not bare:
            raise TuningError(
                f"{type(backbone).__name__} has no biases (T5 and Llama have none), so BitFit has nothing to train: "
                "give it some with add_missing_bias=True, or use LoRA or IA3, say."
            )
        if self.add_missing_bias and not bare:
            raise TuningError(
                f"every linear layer in the blocks of {type(backbone).__name__} has a bias: leave add_missing_bias out."
            )
        chosen, parts = self._chosen(backbone, owners, bare)
        kept = self.without_excluded({name: name for name in chosen})
        for name in kept.keys() & bare.keys():
            attach(bare[name], AddedBias(bare[name]), self.key)
        for name, part in self.without_excluded(parts).items():
            self._shift(backbone, name, owners[name], part)
        return [owners[name] for name in chosen if name in owners]

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay of biases."""
        return {"weight_decay": 0.0} if anatomy.is_bias(name) or name.endswith(f"{self.key}.shift") else {}

    def _chosen(
        self, backbone: nn.Module, owners: dict[str, str], bare: dict[str, nn.Module]
    ) -> tuple[list[str], dict[str, int]]:
        """Return the modules whose bias is trained, and those of whose bias one part of three is."""
        names = {**owners, **dict.fromkeys(bare, "")}
        if self.biases == "all":
            return reached(backbone, names), {}
        wanted: str | list[str] = self.biases
        if isinstance(wanted, str) and all(role in ROLES for role in wanted.split("+")):
            wanted = wanted.split("+")
        roles = [entry for entry in wanted if entry in ROLES] if isinstance(wanted, list) else []
        chosen: list[str] = []
        parts: dict[str, int] = {}
        for role in roles:
            found = _of_role(backbone, names, role)
            fused = [n for n in owners if select.has_role(n, "fused_qkv") or owners[n].endswith("in_proj_bias")]
            if not found and fused and role in _PARTS:
                parts |= self._part(fused, role, parts)
                continue
            if not found:
                raise TuningError(
                    f"{type(backbone).__name__} has no {role} with a bias: use biases='all', a list of suffixes, or "
                    "add_missing_bias=True."
                )
            chosen.extend(reached(backbone, found))
        rest = wanted if isinstance(wanted, str) else [entry for entry in wanted if entry not in ROLES]
        for pattern, matched in select.match(names, rest).items():
            if not matched:
                near = select.near(pattern, names)
                raise TuningError(f"{pattern!r} matches no module with a bias in {type(backbone).__name__}{near}.")
            chosen.extend(matched)
        return list(dict.fromkeys(chosen)), parts

    def _part(self, fused: list[str], role: str, parts: dict[str, int]) -> dict[str, int]:
        if parts:
            raise TuningError(
                f"biases={self.biases!r} asks for two parts of one fused bias: take one of them, or the name of the "
                f"whole projection, {fused[0].rpartition('.')[2]!r}."
            )
        return dict.fromkeys(fused, _PARTS.index(role))

    def _shift(self, backbone: nn.Module, name: str, bias: str, part: int) -> None:
        """Attach the shift of one part of a fused bias."""
        host, last = backbone.get_submodule(name), bias.rpartition(".")[2]
        values = host.get_parameter(last)
        heads = 1
        if name.rpartition(".")[2] == "query_key_value":  # query, key and value of each head in turn
            heads = int(backbone.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        width = next(p for p in host.parameters() if p.ndim == 2).numel() // values.numel()
        if values.numel() != 3 * width:
            raise TuningError(
                f"{name} has a bias of {values.numel()} values for an input of {width}, so that its parts are unknown: "
                "use biases='all' or a list of suffixes."
            )
        attach(host, BiasPart(last, values, part, heads), self.key)


BitFitMixin = TunedBy[BitFit]


def _without_bias(backbone: nn.Module, owners: dict[str, str]) -> dict[str, nn.Module]:
    return {
        name: host
        for name, host in select.hosts(backbone, (nn.Linear, Conv1D), "all-linear").items()
        if name not in owners
    }


def _of_role(backbone: nn.Module, names: Iterable[str], role: str) -> list[str]:
    if role == "norm":
        norms = {name for name, module in backbone.named_modules() if "Norm" in type(module).__name__}
        return [name for name in names if name in norms]
    if role == "pooler":
        return [name for name in names if role in name.split(".")]
    return [name for name in names if select.has_role(name, role)]
