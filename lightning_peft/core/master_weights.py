"""Keeps fp32 master copies of weights trained in place in a half-precision backbone, cast when they are used."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.graft import Graft, attach, detach, grafts
from lightning_peft.core.tuning import tunings

_NAME = "fp32"


_HALF = (torch.float16, torch.bfloat16)


class MasterWeights(Graft):
    """Lets its host read its fp32 parameters in the half precision that they had; gradients flow through the cast."""

    def __init__(self, dtype: torch.dtype, weights: tuple[str, ...]) -> None:
        super().__init__()
        self.dtype, self.weights = dtype, weights

    def before(self, host: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the input in that precision too: T5 casts it to the one in which it finds the weight stored."""
        return x.to(self.dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the parameter rounded to the precision of the backbone."""
        return w.to(self.dtype)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Round the parameters to the precision of the backbone."""
        for parameter in host.parameters(recurse=False):
            parameter.data = parameter.data.to(self.dtype)


def hold_fp32(module: nn.Module, values: dict[str, Tensor] | None = None) -> None:
    """Store in fp32 what is trained in place and was cast to half precision, with its ``values`` before the cast."""
    for path, backbone, tuning in tunings(module):
        parameters = dict(backbone.named_parameters())
        dtypes: dict[int, torch.dtype] = {}
        for name in tuning.trained_in_place():
            parameter = parameters[name]
            if parameter.dtype in _HALF:
                dtypes[id(parameter)] = parameter.dtype
                before = (values or {}).get(f"{path}.{name}".lstrip("."), parameter.data)
                parameter.data = before.to(parameter.device, torch.float32)
        for host in list(backbone.modules()):  # a tied parameter has several
            own = [dtypes[id(p)] for p in host.parameters(recurse=False) if id(p) in dtypes]
            if own and not hasattr(host, _NAME):
                names = tuple(name for name, p in host.named_parameters(recurse=False) if p.is_floating_point())
                attach(host, MasterWeights(own[0], names), _NAME)


def release(backbone: nn.Module) -> None:
    """Detach the master weights of hosts that are trained no more."""
    for place in grafts(backbone):
        host = place.host
        if place.name == _NAME and not any(p.dtype is torch.float32 for p in host.parameters(recurse=False)):
            detach(host, _NAME)
