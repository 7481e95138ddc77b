"""Tensor parallelism: splits layers of the backbone between ranks, and LoRA as its layers are split.

For a column-wise layer, W [out/p, in], A is whole on each rank and B [out/p, r] is split like W; for a row-wise one,
W [out, in/p], A [r, in/p] is split and B whole, and what is summed over the ranks is the small ``x Aᵀ``, [..., r].
The tensors are DTensors, so gradients, optimizers and checkpoints know their parts.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft.core import select, sharded, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, grafts, overrides

Plan = Mapping[str, str] | Literal["auto"]
MESH = "tensor_parallel"
_STYLES: dict[str, Any] = {  # the names are those of transformers
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_HEADS = ("num_attention_heads", "num_key_value_heads")


def is_split(module: nn.Module) -> bool:
    """Tell whether a plan has been carried out on the module, or it is sharded otherwise."""
    return any(sharded.is_part(parameter) for parameter in module.parameters())


def parallelize(module: nn.Module, mesh: Any, plan: Plan) -> None:
    """Split the layers of the module's backbones that a plan names; it comes before the methods.

    Args:
        module: a module without grafts.
        mesh: the ranks of a group, one dimension.
        plan: names of layers, ``*`` for one part of a name -> ``colwise`` or ``rowwise``; ``auto``: the plans that
            transformers has for the backbones. There, tables of words and tied weights are left whole.

    Raises:
        TuningError: there is no plan, it names nothing, or a layer cannot be split evenly.
    """
    backbones = structure.pretrained_models(module) or {"": module}
    for path, backbone in backbones.items():
        where = f"{type(backbone).__name__} at {path}" if path else type(backbone).__name__
        rules = dict(_own_plan(backbone, where) if plan == "auto" else plan)
        _check_heads(backbone, where, mesh.size())
        for pattern, style in rules.items():
            if style not in _STYLES:
                raise TuningError(
                    f"{pattern!r} of the plan is {style!r}, which is none of {', '.join(_STYLES)}: give "
                    "tensor_parallel_plan with these, or FullyShard without tensor_parallel_size."
                )
            layers = _matches(backbone, pattern)
            if not layers:
                names = [name for name, _ in backbone.named_modules()]
                raise TuningError(f"{pattern!r} of the plan matches nothing in {where}{select.near(pattern, names)}.")
            for name, layer in layers.items():
                _check_layer(name, layer, style, mesh.size())
                parallelize_module(layer, mesh, _STYLES[style]())


def split_grafts(module: L.LightningModule, mesh: Any) -> set[nn.Module]:
    """Split the grafts of split layers, which have just been attached, and return them; every rank must call it.

    Raises:
        TuningError: a method cannot be split.
    """
    found: set[nn.Module] = set()
    for place in grafts(module):
        dimension = _split_dimension(place.host)
        _check_graft(place, dimension, mesh.size())
        if dimension is None or is_split(place.graft):
            continue
        sharded.broadcast([*place.graft.parameters(), *place.graft.buffers()])
        _distribute(place.graft, mesh, place.graft.splits[dimension])
        found.add(place.graft)
    return found


@torch.no_grad()
def share_random_state(mesh: Any) -> None:
    """Give all ranks of a group the random state of its first: what they hold whole, they must drop out alike."""
    group = mesh.get_group()
    source = torch.distributed.get_process_group_ranks(group)[0]
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    for get, put in ((torch.get_rng_state, torch.set_rng_state), (torch.cuda.get_rng_state, torch.cuda.set_rng_state)):
        if get is torch.cuda.get_rng_state and not torch.cuda.is_available():
            continue
        state = get().cuda() if on_gpu else get()
        torch.distributed.broadcast(state, source, group=group)
        put(state.cpu())


def clip_by_norm(plugin: Any, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    """Clip gradients to a norm over all parameters, of which some are split and some are not; torch wants one kind."""
    if clip_val <= 0:
        return
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in plugin.main_params(optimizer):
        if parameter.grad is not None:
            kinds.setdefault(parameter.device_mesh if sharded.is_part(parameter) else None, []).append(parameter)
    grads = ([p.grad for p in parameters] for parameters in kinds.values())
    norms = [sharded.whole(torch.nn.utils.get_total_norm(group)) for group in grads]  # type: ignore[arg-type]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, total)


def _own_plan(backbone: Any, where: str) -> dict[str, str]:
    plan = getattr(backbone, "tp_plan", None)
    if not plan:
        raise TuningError(
            f"transformers has no tensor-parallel plan for {where}: give tensor_parallel_plan, such as "
            "{'layers.*.q_proj': 'colwise', 'layers.*.o_proj': 'rowwise'}, or tensor_parallel_size=1."
        )
    tied: dict[int, int] = {}
    for _, parameter in backbone.named_parameters(remove_duplicate=False):
        tied[id(parameter)] = tied.get(id(parameter), 0) + 1

    def stays(pattern: str, style: str) -> bool:
        layers = _matches(backbone, pattern).values()
        return style == "embedding_rowwise" or any(tied[id(p)] > 1 for layer in layers for p in layer.parameters())

    # A plan may name what this very model lacks, such as the head of another class.
    return {k: v for k, v in plan.items() if _matches(backbone, k) and not stays(k, v)}


def _matches(backbone: nn.Module, pattern: str) -> dict[str, nn.Module]:
    regex = re.compile(r"(.+\.)?" + r"[^.]+".join(map(re.escape, pattern.split("*"))))
    return {name: layer for name, layer in backbone.named_modules() if regex.fullmatch(name)}


def _check_heads(backbone: Any, where: str, size: int) -> None:
    config = structure.config_of(backbone)
    for name in _HEADS:
        heads = structure.setting(config, name)
        if isinstance(heads, int) and heads % size:
            raise TuningError(
                f"{name}={heads} of {where} cannot be split between tensor_parallel_size={size} ranks: take a divisor."
            )


def _check_layer(name: str, layer: nn.Module, style: str, size: int) -> None:
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise TuningError(f"{name} of the plan is a {type(layer).__name__}; only Linear and Embedding can be split.")
    embedding = isinstance(layer, nn.Embedding)
    extent = layer.weight.shape[style.startswith("rowwise")]
    if not embedding and extent % size:
        raise TuningError(
            f"{name} has {extent} {'inputs' if style.startswith('rowwise') else 'outputs'}, which cannot be split "
            f"between tensor_parallel_size={size} ranks: take a divisor."
        )


def _split_dimension(host: nn.Module) -> int | None:
    """Return the dimension of the host's own weights that is split between the ranks of a group; None: none is."""
    dimensions = {
        placement.dim
        for parameter in host.parameters(recurse=False)
        if sharded.is_part(parameter) and parameter.ndim > 1
        for name, placement in zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)  # type: ignore[attr-defined]
        if name == MESH and placement.is_shard()
    }
    return dimensions.pop() if dimensions else None


def _check_graft(place: Grafted[Graft], dimension: int | None, size: int) -> None:
    graft = place.graft
    split_below = any(
        sharded.is_part(p) and MESH in p.device_mesh.mesh_dim_names  # type: ignore[attr-defined]
        for name, p in place.host.named_parameters()
        if name in graft.weights
    )
    if dimension not in (None, *graft.splits) or split_below or overrides(graft, "key_value"):
        raise TuningError(
            f"{type(graft).__name__} of {place.name} at {place.path} cannot be split between "
            f"tensor_parallel_size={size} ranks as its host is: take LoRA, or FullyShard without tensor_parallel_size."
        )


def _distribute(graft: nn.Module, mesh: Any, dimensions: Mapping[str, int]) -> None:
    for name, tensor in (*graft.named_parameters(recurse=False), *graft.named_buffers(recurse=False)):
        placement = Shard(dimensions[name]) if name in dimensions else Replicate()
        part = distribute_tensor(tensor.detach(), mesh, [placement])
        if isinstance(tensor, nn.Parameter):
            graft.register_parameter(name, nn.Parameter(part, requires_grad=tensor.requires_grad))
        else:
            graft.register_buffer(name, part)
