"""Compares what an adapter that has been written computes with the tuned model that it was made of."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.attention_probe import inputs_on_meta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.switching import prepare
from lightning_peft.features.activation_memory import tensors_in
from lightning_peft.interop import adapter_config
from lightning_peft.interop.folder import read_adapter
from lightning_peft.interop.load import apply_adapter, load_base

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far logits may be apart, as a share of the largest; 0.02 in half precision, whose rounding differs."""


def check_adapter(model: nn.Module, path: str | Path, backbone: str | None = None) -> dict[str, float]:
    """Compare the logits of an adapter on a base that is loaded anew with those of the tuned model.

    Args:
        model: what was exported.
        path: the folder of the adapter; it is no adapter any more when this fails.
        backbone: folder or hub id of the base; None: what the adapter names.

    Returns:
        Who has read the adapter, this package and PEFT where that is installed -> the greatest difference as a share of
        the largest logit.

    Raises:
        TuningError: what was written computes something else.
    """
    path, inputs = Path(path), example(model)
    expected, adapter, found = logits_of(model, prepare(model, inputs)), read_adapter(path), {}
    ours = load_base(adapter, backbone)
    apply_adapter(ours, adapter)
    found["lightning_peft"] = apart(logits_of(ours, prepare(ours, inputs)), expected)
    if find_spec("peft") is not None:
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(load_base(adapter, backbone), str(path))
        found["peft"] = apart(logits_of(theirs, inputs), expected)
    limit = TOLERANCE.get(next(model.parameters()).dtype, 0.02)
    for reader, difference in found.items():
        if not difference <= limit:
            (path / adapter_config.FILE).unlink()
            raise TuningError(
                f"{reader} computes other logits from {path} than the delta does (apart by {difference:.2g} of the "
                f"largest): keep the delta, or merge it; {adapter_config.FILE} was taken away again."
            )
    return found


def example(model: nn.Module, rows: int = 1, columns: int = 12) -> dict[str, Tensor]:
    """Return inputs that a model takes, drawn with one seed; a text ends with the model's end of a text."""
    generator = torch.Generator().manual_seed(0)
    words = structure.input_embeddings_of(model)
    count = len(words.weight) if isinstance(words, nn.Embedding) else 1000
    end = structure.setting(structure.config_of(model), "eos_token_id")
    inputs: dict[str, Tensor] = {}
    for name, empty in inputs_on_meta(model, rows, columns, columns // 2).items():
        if empty.is_floating_point():
            inputs[name] = torch.randn(empty.shape, generator=generator)
        elif name == "attention_mask":
            inputs[name] = torch.ones(empty.shape, dtype=torch.long)
        else:
            inputs[name] = torch.randint(count // 10, count, empty.shape, generator=generator)
            if isinstance(end, int) and end < count:
                inputs[name][:, -1] = end
    return inputs


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return what a model computes in eval mode: its logits, or else the first tensor of numbers that it gives."""
    with in_eval(model):
        out: Any = model(**inputs)
    found: Tensor = out.logits if "logits" in out else next(t for t in tensors_in(out) if t.is_floating_point())
    return found.float()


def apart(one: Tensor, other: Tensor) -> float:
    """Return the greatest difference of two logits as a share of the largest; columns of a prompt are left out."""
    if one.ndim == 3 and one.shape != other.shape:
        columns = min(one.shape[1], other.shape[1])
        one, other = one[:, -columns:], other[:, -columns:]
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
