"""States of random generators, as tensors and plain values."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import BatchSampler, Sampler


def snapshot() -> dict[str, Any]:
    """Return the state of all random generators of this process as the libraries give it, in less than 0.1 ms.

    Of the GPUs it is that of the process's own, whatever number it has: other processes draw from the others.
    """
    state = {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(legacy=True), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `snapshot` returned as tensors and plain values."""
    return {**state, "numpy": _of_numpy(state["numpy"]), "python": _of_python(state["python"])}


def difference(state: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain states of those generators that differ between two snapshots, but for the devices'."""
    numpy_now, numpy_then = state["numpy"], base["numpy"]
    same = {
        "torch": torch.equal(state["torch"], base["torch"]),
        "numpy": numpy_now[2:] == numpy_then[2:] and bool((numpy_now[1] == numpy_then[1]).all()),
        "python": state["python"] == base["python"],
    }
    now = plain(state)
    return {name: now[name] for name, is_same in same.items() if not is_same}


def random_state() -> dict[str, Any]:
    """Return the state of all random generators of this process as tensors and plain values."""
    return plain(snapshot())


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the random generators of this process to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(_to_numpy(state["numpy"]))
    random.setstate(_to_python(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def own_states(loader: Any) -> list[Any]:
    """Return the states of the generators that a loader holds, in its samplers and its dataset, too."""
    return [_state_of(generator) for generator in _generators(loader)]


def set_own_states(loader: Any, states: Sequence[Any]) -> None:
    """Set the generators that a loader holds to what `own_states` returned; others than it had are left alone."""
    generators = list(_generators(loader))
    if len(generators) == len(states):
        for generator, state in zip(generators, states, strict=True):
            _set_state_of(generator, state)


def gather(state: Any) -> list[Any]:
    """Return the states of all ranks, in order; every rank must call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def of_rank(states: Sequence[Any]) -> Any | None:
    """Return what `gather` has gathered from this rank; None: there were other numbers of ranks."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
    return states[rank] if len(states) == size else None


def _generators(loader: Any) -> Iterator[Any]:
    """Yield the random generators among the attributes of a loader, of its samplers and of its dataset, each once."""
    seen: set[int] = set()
    holders = [loader]
    while holders:
        holder = holders.pop(0)
        for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)):
                yield value
            elif isinstance(value, (Sampler, BatchSampler)) or name == "dataset":
                holders.append(value)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _of_python(generator.getstate())
    if isinstance(generator, numpy.random.RandomState):
        return _of_numpy(generator.get_state(legacy=True))
    return _plain(generator.bit_generator.state)


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_to_python(state))
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(_to_numpy(state))
    else:
        generator.bit_generator.state = _as_arrays(state)


def _of_numpy(state: Any) -> list[Any]:
    kind, keys, position, has_gauss, gauss = state
    return [kind, torch.from_numpy(numpy.asarray(keys, "int64")), position, has_gauss, gauss]


def _to_numpy(state: Sequence[Any]) -> tuple[Any, ...]:
    kind, keys, *rest = state
    return (kind, keys.numpy().astype("uint32"), *rest)


def _of_python(state: tuple[Any, ...]) -> list[Any]:
    return [state[0], list(state[1]), state[2]]


def _to_python(state: Sequence[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return (version, tuple(words), gauss)


def _plain(value: Any) -> Any:
    """Return a state of a bit generator with its arrays as tensors of their bytes, and its numbers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, numpy.ndarray):
        return [str(value.dtype), torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)]
    return value.item() if isinstance(value, numpy.generic) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_arrays(entry) for key, entry in value.items()}
    return numpy.frombuffer(value[1].numpy().tobytes(), value[0]) if isinstance(value, list) else value
