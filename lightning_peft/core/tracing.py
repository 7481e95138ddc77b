"""Tells whether a computation is run, or is turned into a graph that is run later with other inputs."""

import torch


def is_traced() -> bool:
    """Tell whether a tracer follows: torch.compile, torch.export, torch.jit.trace, the ONNX exporter in either form.

    What it sees must be plain operations that depend on the values of no tensor, and nothing may be taken from a cache:
    a cached tensor would be a constant of the graph, and a tracer that runs twice would see two graphs.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
