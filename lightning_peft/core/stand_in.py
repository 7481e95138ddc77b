"""What a named delta trains of the backbone's own tensors: copies that its hosts read in their place.

So several deltas can have a head or biases of their own on one backbone, whose tensors stay as they are.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.core.graft import Graft, attach, grafts
from lightning_peft.core.reads import reads_below

_HALF = (torch.float16, torch.bfloat16)


class StandIn(Graft):
    """Lets its host read parameters of a delta in place of its own.

    Args:
        values: name of a parameter below the host -> what is read; a tied one is shared by the grafts of its hosts.
        of: name of a parameter below the host -> the first of its names in the backbone.
    """

    folds_ties = True

    def __init__(self, values: Mapping[str, nn.Parameter], of: Mapping[str, str]) -> None:
        super().__init__()
        self.weights, self.of = tuple(values), dict(of)
        self.values = nn.ParameterDict({_key(name): value for name, value in values.items()})

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the delta's parameter in the dtype of the host's."""
        return self.values[_key(name)].to(w.dtype)

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return the host's own value."""
        return host.get_parameter({f"values.{_key(own)}": own for own in self.weights}[name])

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Put the values into the parameters of the host."""
        for name in self.weights:
            host.get_parameter(name).copy_(self.values[_key(name)])

    def parameter(self, name: str) -> nn.Parameter:
        """Return what stands in for a parameter, by its name below the host."""
        return self.values[_key(name)]


def stand_in(backbone: nn.Module, key: str, names: Collection[str], values: Mapping[str, Tensor]) -> None:
    """Let a method train copies of these parameters of the backbone, which start from ``values`` or from what is there.

    Args:
        backbone: the model.
        key: of the method, which owns the grafts where this is called.
        names: of the parameters.
        values: their values, by name, where these are not those of the backbone now.
    """
    parameters = dict(backbone.named_parameters())
    wanted = {id(parameters[name]): name for name in names}
    copies: dict[int, nn.Parameter] = {}
    for _, host, own in list(readers(backbone)):
        found = {name: p for name, p in own.items() if id(p) in wanted}
        for p in found.values():
            if id(p) not in copies:
                start = values.get(wanted[id(p)], p.detach())
                dtype = torch.float32 if start.dtype in _HALF else start.dtype
                copies[id(p)] = nn.Parameter(start.to(p.device, dtype, copy=True))
        if found:
            of = {name: wanted[id(p)] for name, p in found.items()}
            attach(host, StandIn({name: copies[id(p)] for name, p in found.items()}, of), f"{key}_own")


def stand_ins(backbone: nn.Module, owner: str | None = None) -> dict[str, str]:
    """Return, for each parameter that stands in for one of the backbone, its name -> the name of that one."""
    return {
        f"{place.full_name}.values.{_key(name)}": place.graft.of[name]
        for place in grafts(backbone, owner)
        if isinstance(place.graft, StandIn)
        for name in place.graft.weights
    }


def trained_parameter(host: nn.Module, name: str, owner: str) -> nn.Parameter:
    """Return what the method ``owner`` trains for a parameter of ``host``: what stands in for it, or itself."""
    for child in host.children():
        if isinstance(child, StandIn) and child.owner == owner and name in child.weights:
            return child.parameter(name)
    return host.get_parameter(name)


def readers(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Yield each module that reads parameters in its own forward pass: path, module, name below it -> parameter.

    Those that a module reads of a layer below it, without a call or besides one, are yielded with that module.
    """
    inner: set[int] = set()
    for path, module in backbone.named_modules():
        if id(module) in inner:
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):  # it reads the weights of its projection without a call
            own |= {f"out_proj.{name}": p for name, p in module.out_proj.named_parameters()}
            inner.add(id(module.out_proj))
        for layer in dict.fromkeys(read.layer for read in reads_below(module)):
            if id(read_here := module.get_submodule(layer)) not in inner:
                own |= {f"{layer}.{name}": p for name, p in read_here.named_parameters(recurse=False)}
                inner.add(id(read_here))
        if own:
            yield path, module, own


def _key(name: str) -> str:
    return name.replace(".", "_")
