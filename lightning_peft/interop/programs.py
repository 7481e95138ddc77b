"""Writes a merged model as a program that runs without its Python code: by ``torch.export``, or as ONNX."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line
from lightning_peft.interop.check import apart, example, logits_of

Kind = Literal["torch", "onnx"]
FILES: dict[Kind, str] = {"torch": "model.pt2", "onnx": "model.onnx"}
_LIMIT = 1e-3


class Logits(nn.Module):
    """A model whose inputs are given in an order, and whose output is its logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits."""
        out: Any = self.model(**dict(zip(self.names, inputs, strict=True)))
        logits: Tensor = out.logits
        return logits


def write_program(model: nn.Module, folder: str | Path, kind: Kind) -> tuple[Path, float | None]:
    """Write a merged model as a program, for any number of rows and of tokens, and compare its logits.

    Args:
        model: a transformers model with logits, without grafts.
        folder: where to; it is made.
        kind: 'torch', a file of ``torch.export``; 'onnx'.

    Returns:
        The file, and how far the logits of other rows than it was made with are from the model's, as a share of the
        largest; None where nothing that reads the file is installed.

    Raises:
        TuningError: a package is missing, or the model cannot be written so, or its logits differ.
    """
    if kind == "onnx" and find_spec("onnxscript") is None:
        raise TuningError("ONNX is written by the package onnxscript, which is not installed: pip install onnxscript.")
    few, many = example(model, rows=2, columns=22), example(model, rows=3, columns=30)
    file = Path(folder) / FILES[kind]
    file.parent.mkdir(parents=True, exist_ok=True)
    cached = structure.config_of(model).to_dict().get("use_cache")
    try:
        model.eval().config.use_cache = False  # type: ignore[union-attr]
        program = _program(model, few)
        got = _written_torch(program, file, many) if kind == "torch" else _written_onnx(program, file, many)
    finally:
        if cached is not None:
            model.config.use_cache = cached  # type: ignore[union-attr]
    difference = None if got is None else apart(got, logits_of(model, many))
    if difference is not None and not difference <= _LIMIT:
        file.unlink()
        raise TuningError(
            f"{file} computes other logits than the model (apart by {difference:.2g} of the largest): take the folder "
            "that lightning-peft merge writes."
        )
    return file, difference


def _program(model: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    free = tuple(
        dict.fromkeys(range(1 if tensor.is_floating_point() else 2), torch.export.Dim.AUTO)
        for tensor in inputs.values()
    )
    given = Logits(model, list(inputs)), tuple(inputs.values())
    try:
        with torch.no_grad():
            return torch.export.export(*given, dynamic_shapes={"inputs": free}, strict=False)
    except Exception as error:  # whatever stands in a model's own code
        raise TuningError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)[:200]}): take the folder that "
            "lightning-peft merge writes."
        ) from error


def _written_torch(program: torch.export.ExportedProgram, file: Path, inputs: dict[str, Tensor]) -> Tensor:
    torch.export.save(program, file)
    with torch.no_grad():
        got: Tensor = torch.export.load(file).module()(*inputs.values())
    return got


@torch.no_grad()  # attention is taken apart in another way where gradients may be wanted, and T5 then not written
def _written_onnx(program: torch.export.ExportedProgram, file: Path, inputs: dict[str, Tensor]) -> Tensor | None:
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": ["logits"]}
    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:  # whatever stands in a model's own code
        raise TuningError(
            f"torch.onnx cannot write this model ({first_line(error)[:200]}): take --torch-export, or the folder that "
            "lightning-peft merge writes."
        ) from error
    assert written is not None
    written.save(str(file))
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(got)
