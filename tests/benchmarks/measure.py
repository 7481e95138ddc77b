"""Measuring on a machine that others use too: interleaved rounds, ratios within a round, medians over rounds."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor


class Times(NamedTuple):
    """Seconds of each round: of this process on its cores, and by the clock on the wall."""

    cpu: list[float]
    wall: list[float]


def interleave(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Times]:
    """Time each call once a round, A B C, then C B A, and so on, so that a slow minute is slow for all of them."""
    for _ in range(warm_up):
        for call in calls.values():
            call()
    times = {name: Times([], []) for name in calls}
    gc.disable()
    try:
        for i in range(rounds):
            gc.collect()
            for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
                cpu, wall = time.process_time(), time.perf_counter()
                calls[name]()
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    finally:
        gc.enable()
    return times


def ratio(these: Sequence[float], those: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the ratios within a round, and their first and third quartile."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def kept(forward: Callable[[], object], ignore: Iterable[Tensor]) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, without those of ``ignore``."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()
    del alive
    return sum(storage.nbytes() for address, storage in storages.items() if address not in skip)


def peak(call: Callable[[], object]) -> int:
    """Return by how many bytes the allocator of the CPU rises above its level during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    level = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, [("-" * (w - 1) + ":") if i else "-" * w for i, w in enumerate(widths)], *rows]
    align = [str.ljust] + [str.rjust] * (len(heads) - 1)
    return "\n".join(
        "| " + " | ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)) + " |" for line in lines
    )


def versions() -> str:
    """Return the versions that a table was measured with."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
