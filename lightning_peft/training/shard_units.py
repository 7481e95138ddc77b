"""The units of sharded training: modules whose parameters are gathered and freed together."""

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_peft.core import anatomy


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the units, inner ones first: each block, then each child that has parameters.

    The module itself is none: Lightning calls its ``training_step``, and torch gathers a unit when it is called.
    """
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        for blocks in anatomy.block_lists(child).values():
            yield from blocks
        yield child


def wrap_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Tell FSDP which modules are units: those whose parameters are of one dtype and one ``requires_grad``.

    FSDP keeps a unit in one flat tensor. A graft in its host's unit would make the frozen weights' gradients be kept,
    too, and fp32 deltas do not go together with a bf16 backbone.
    """
    if recurse:
        return True
    kinds = {(p.dtype, p.requires_grad) for p in module.parameters()}
    return nonwrapped_numel > 0 and len(kinds) == 1 and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def plan(module: nn.Module, ranks: int) -> list[tuple[str, int, int]]:
    """Return, for each FSDP2 unit, its name, its bytes when it is gathered and the bytes that each of ``ranks`` keeps.

    It works on the meta device, so a model that fits nowhere can be planned.
    """
    names = {id(child): name for name, child in module.named_modules()}
    seen: set[int] = set()
    rows = []
    for unit in units(module):
        own = {id(p): p for p in unit.parameters() if id(p) not in seen}
        seen.update(own)
        gathered = sum(p.nbytes for p in own.values())
        kept = sum(kept_bytes(p, ranks) for p in own.values() if p.ndim)
        rows.append((names[id(unit)], gathered, kept))
    return rows


def kept_bytes(tensor: Tensor, ranks: int) -> int:
    """Return the bytes that each of ``ranks`` keeps of a tensor: torch splits dimension 0, the last may get less."""
    if tensor.numel() < 2:
        return tensor.nbytes
    return -(-tensor.shape[0] // ranks) * (tensor.nbytes // tensor.shape[0])
