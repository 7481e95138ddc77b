"""Lists of names that a delta file keeps: the same names come out, and a list of thousands is small."""

import itertools
import json
import random
import tracemalloc

import pytest

from lightning_peft.core.name_lists import Names, is_packed, packed


def test_they_hold_the_names_and_no_others() -> None:
    every = [
        ".".join(parts)
        for parts in itertools.product(("a", "0", "layer"), ("0", "1", "2", "10", "01"), ("q", "3", "x1"), ("0", "w"))
    ]
    draw = random.Random(0)
    for _ in range(40):
        chosen = draw.sample(every, draw.randrange(len(every)))
        entries = json.loads(json.dumps(packed(chosen)))
        assert is_packed(entries)
        assert [name in Names(entries) for name in every] == [name in set(chosen) for name in every]


@pytest.mark.parametrize("name", ["", "0", "7.weight", "a.[0-3].b", "x-1", "12345678901234567890", "a,b", "x.0", "ⅷ.٣"])
def test_any_name_comes_back(name: str) -> None:
    assert name in Names(packed([name]))
    assert "other" not in Names(packed([name]))
    assert name not in Names(packed(["a.2.b", "1"]))


def test_thousands_of_names_are_a_few_hundred_bytes() -> None:
    """Of a model with 48 blocks of 128 experts."""
    experts = [
        f"model.layers.{i}.mlp.experts.{k}.{part}_proj" for i in range(48) for k in range(128)
        for part in ("up", "gate", "down")
    ]  # fmt: skip
    assert len(json.dumps(experts)) > 700_000
    assert len(json.dumps(packed(experts))) < 250


def test_ranges_of_a_file_are_not_written_out() -> None:
    """A million numbers would be tens of megabytes."""
    tracemalloc.start()
    names = Names([["a.", "0-999999", ".", "0-999999", ".b"]])
    assert "a.5.999999.b" in names
    assert "a.5.b" not in names
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000


@pytest.mark.parametrize(
    "value", [None, {}, "x", [3], [["a", "b", "c"]], [["a", "0-1"]], [[]], [["a", "1-", "b"]], [["a", "9" * 10, "b"]]]
)
def test_what_is_no_list_of_names(value: object) -> None:
    assert not is_packed(value)
