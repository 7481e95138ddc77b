"""Checksums: every bit and every place counts, parts add up to the whole, and nested values are told apart."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.core import checksums
from lightning_peft.core.checksums import _of_words, checksum, sums

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 50
    return values > 0 if dtype is torch.bool else values.abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_sum_of_words_by_definition(dtype: torch.dtype) -> None:
    tensor = drawn(dtype, 37, 101)
    data = (
        tensor.numpy(force=True).tobytes()
        if dtype is not torch.bfloat16
        else tensor.view(torch.int16).numpy().tobytes()
    )
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    weights = [0x9E3779B97F4A7C15 * (k // 1021) + k % 1021 + 1 for k in range(len(words))]
    expected = sum(words), sum(w * x for w, x in zip(weights, words, strict=True))
    assert [value % 2**64 for value in sums(tensor)[0]] == [value % 2**64 for value in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    tensor = drawn(dtype, 5, 7)
    known, draw = checksum(tensor), random.Random(0)
    for _ in range(50):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[draw.randrange(tensor.nbytes)] ^= (
            1 if dtype is torch.bool else 1 << draw.randrange(8)
        )
        assert checksum(changed) != known


@pytest.mark.parametrize("shape", [(1,), (2, 3), (3000, 700), (0,), ()])
def test_places_and_shapes_count(shape: tuple[int, ...]) -> None:
    tensor = drawn(torch.float32, *shape)
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor) != checksum(tensor.unsqueeze(0))
    assert checksum(tensor) != checksum(tensor.double())
    if tensor.numel() > 1:
        assert checksum(tensor.flip(0)) != checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_of_parts_add_up(dtype: torch.dtype) -> None:
    flat = drawn(dtype, 40_000)
    cuts = [0, 8, 4096, 20_000, 39_992, 40_000]
    parts = [_of_words(flat[a:b].contiguous(), a * flat.element_size() // 8) for a, b in itertools.pairwise(cuts)]
    assert sum(parts).tolist() == list(sums(flat)[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 1.0}),
        ({"a": "1"}, {"a": 1}),
        ([[1], 2], [[1, 2]]),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, 1)}),
        (None, ""),
    ],
)
def test_other_values_have_another_checksum(one: Any, other: Any) -> None:
    assert checksum(one) != checksum(other)


def test_the_order_of_entries_does_not_count() -> None:
    assert checksum({"a": 1, "b": [torch.ones(2)]}) == checksum({"b": (torch.ones(2),), "a": 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 8, 4080, 8168, 12_345 * 8])
def test_long_tensors_are_summed_as_short_ones_are(dtype: torch.dtype, first: int, monkeypatch: Any) -> None:
    flat, forms = drawn(dtype, 300_000), (torch.bfloat16, torch.float16)
    monkeypatch.setattr("lightning_peft.core.checksums._flat", lambda tensor: (tensor, first, None))
    monkeypatch.setattr("lightning_peft.core.checksums._CHUNK", 16)
    wanted = [flat, *(flat.to(form) if flat.is_floating_point() else flat for form in forms)]
    expected = [_of_words(values, first * values.element_size() // 8).tolist() for values in wanted]
    assert [list(pair) for pair in sums(flat, *forms)] == expected


def test_a_part_of_a_tensor_that_begins_within_a_word_is_summed_as_a_copy() -> None:
    flat = drawn(torch.float16, 50_000)
    for begin in (1, 2, 3, 4):
        assert checksum(flat[begin:]) == checksum(flat[begin:].clone())


def test_a_rank_without_rows_gathers_where_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever in another collective operation."""
    tensor = torch.ones(1, 3)
    for rows in (tensor, tensor[:0]):
        monkeypatch.setattr(checksums, "leading_rows", lambda _, rows=rows: (rows, 0, "group"))
        flat, first, group = checksums._flat(tensor)
        assert (flat.tolist(), first, group) == ([1.0] * 3, 0, None)
