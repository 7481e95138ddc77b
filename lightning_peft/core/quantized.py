"""Quantised weights of bitsandbytes (4 and 8 bits) and torchao: they are read as floats, and no update is folded in.

A graft needs no class of its own for such a layer: it joins the output. Only what reads or writes the weight itself
comes through here.
"""

from importlib import import_module

import torch
from torch import Tensor, nn


def is_quantized(weight: Tensor) -> bool:
    """Tell whether a weight is stored in integers: as such, or in a subclass of tensors that poses as a float."""
    return not (weight.is_floating_point() or weight.is_complex()) or _poses(weight)


def has_quantized_weight(host: nn.Module) -> bool:
    """Tell whether a layer has a weight that is stored in integers."""
    weight = getattr(host, "weight", None)
    return isinstance(weight, Tensor) and is_quantized(weight)


def dense(host: nn.Module) -> Tensor:
    """Return the weight of a layer as floats, in its own layout; of a plain layer, the weight itself."""
    weight: Tensor = host.weight  # type: ignore[assignment]
    if not is_quantized(weight):
        return weight
    if _poses(weight):
        return weight.dequantize()
    functional = import_module("bitsandbytes.functional")
    if getattr(weight, "quant_state", None) is not None:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # type: ignore[attr-defined]
            host.state_dict()  # inference on a CPU with AVX512 packs the weight anew, and this undoes it
        return functional.dequantize_4bit(host.weight.data, host.weight.quant_state)  # type: ignore[union-attr]
    holder = weight if getattr(weight, "SCB", None) is not None else host.state  # moved there by the first forward pass
    return functional.int8_vectorwise_dequant(weight.data, holder.SCB)  # type: ignore[union-attr]


def unpacked(tensor: Tensor) -> Tensor:
    """Return a tensor whose values can be indexed: one that poses as a float as such, any other as it is."""
    return tensor.dequantize() if _poses(tensor) else tensor


def with_float_weight(host: nn.Module, weight: nn.Parameter) -> nn.Linear:
    """Return a plain linear layer with this weight and the bias of the quantised ``host``."""
    bias: Tensor | None = host.bias  # type: ignore[assignment]
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return plain.train(host.training)


def _poses(tensor: Tensor) -> bool:
    """Tell whether a tensor is of torchao, which says that it is a float but stores integers."""
    return type(tensor) not in (Tensor, nn.Parameter) and type(tensor).dequantize is not Tensor.dequantize
