"""Which rows make which batch, in every process, in every epoch, and after a resume."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from lightning_peft import TuningError
from lightning_peft.data.batches import Batches, BatchesLoader


def lengths(count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(1, 100) for _ in range(count)]


def padded(batches: Batches) -> int:
    return sum(len(batch) * max(batches.lengths[batch]) for batch in batches)


@pytest.mark.parametrize("count", [4, 5, 31, 32, 33, 35, 36, 100])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bucket", [False, True])
def test_every_row_once_and_equally_many_batches_everywhere(
    count: int, processes: int, shuffle: bool, bucket: bool
) -> None:
    for size in (1, 2, 8):
        ranks = [Batches(lengths(count), size, shuffle, bucket, 0, processes, rank) for rank in range(processes)]
        taken = [list(rank) for rank in ranks]
        assert sorted(row for batches in taken for batch in batches for row in batch) == list(range(count))
        assert {len(batches) for batches in taken} == {len(rank) for rank in ranks} == {len(ranks[0])}
        widths = [len(batch) for batches in taken for batch in batches]
        assert min(widths) >= 1
        assert max(widths) <= size + (processes > 1)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {}
    for seed, epoch in itertools.product([0, 1, 2], repeat=2):
        torch.manual_seed(seed * 10 + epoch)
        batches = Batches(lengths(40), 8, True, True, seed)
        batches.set_epoch(epoch)
        orders[seed, epoch] = list(batches)
        other = Batches(lengths(40), 8, True, True, seed)
        other.set_epoch(5)
        list(other)
        other.set_epoch(epoch)
        assert list(other) == orders[seed, epoch]
    assert len({str(order) for order in orders.values()}) == 9


def test_exact_batches() -> None:
    sizes = [5, 1, 4, 2, 3, 9, 7]
    batches = Batches(sizes, 2, shuffle=True, bucket=True, seed=3)
    assert list(batches) == [[4, 2], [1, 3], [0, 6], [5]]
    batches.set_epoch(1)
    assert list(batches) == [[5], [1, 3], [4, 2], [0, 6]]
    assert list(Batches(sizes, 2, shuffle=False, bucket=True)) == [[1, 3], [4, 2], [0, 6], [5]]
    assert list(Batches(sizes, 2, shuffle=False, bucket=False)) == [[0, 1], [2, 3], [4, 5], [6]]


def test_processes_share_the_batches_of_one() -> None:
    alone = list(Batches(lengths(50), 8, True, True))
    first, second = (list(Batches(lengths(50), 4, True, True, 0, 2, rank)) for rank in range(2))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in alone]


def test_buckets_spare_padding() -> None:
    sizes = lengths(2000)
    plain, bucketed = (padded(Batches(sizes, 16, True, bucket)) for bucket in (False, True))
    assert bucketed < 1.05 * sum(sizes) < 1.6 * sum(sizes) < plain


def test_fewer_rows_than_processes() -> None:
    with pytest.raises(TuningError, match=r"^3 rows do not go round 4 processes: use fewer processes\.$"):
        Batches([1, 1, 1], 8, False, False, 0, 4, 0)


def rows_loader(workers: int = 0, count: int = 20, size: int = 4) -> BatchesLoader:
    rows = torch.arange(count)
    batches = Batches(lengths(count), size, True, True)
    generator = torch.Generator()
    return BatchesLoader(rows, sampler=batches, batch_size=None, num_workers=workers, generator=generator)


def given(loader: BatchesLoader, epoch: int = 0) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_inside_an_epoch(workers: int) -> None:
    whole = given(rows_loader(), epoch=3)
    first = rows_loader(workers)
    first.sampler.set_epoch(3)
    iterator = iter(first)
    taken = [next(iterator).tolist() for _ in range(2)]
    state = first.state_dict()
    assert (taken, state) == (whole[:2], {"epoch": 3, "batches": 2, "of": 5})
    iterator.close()
    second = rows_loader(workers)
    second.load_state_dict(state)
    assert len(second) == 5
    assert given(second, 3) == whole[2:]
    assert given(second, 3) == whole


def test_a_state_is_for_its_epoch() -> None:
    loader = rows_loader()
    loader.load_state_dict({"epoch": 3, "batches": 5, "of": 5})
    assert given(loader, 4) == given(rows_loader(), 4)


def test_epoch_may_be_set_after_the_iterator_is_made() -> None:
    loader = rows_loader()
    iterator = iter(loader)
    loader.sampler.set_epoch(2)
    assert [batch.tolist() for batch in iterator] == given(rows_loader(), 2)


def test_refuses_a_state_of_other_batches() -> None:
    loader = rows_loader(size=5)
    loader.load_state_dict({"epoch": 0, "batches": 2, "of": 5})
    with pytest.raises(TuningError, match="after batch 2 of 5, now an epoch has 4: resume with the same data"):
        next(iter(loader))


def test_an_epoch_of_which_no_batch_is_done_may_have_other_batches() -> None:
    """BatchSizeFinder goes back to the file that it wrote before the first batch, with another batch size."""
    loader = rows_loader(size=5)
    loader.load_state_dict({"epoch": 0, "batches": 0, "of": 20})
    assert given(loader) == given(rows_loader(size=5))


def test_global_random_state_is_left_alone() -> None:
    before: Tensor = torch.get_rng_state()
    given(rows_loader())
    assert torch.equal(torch.get_rng_state(), before)
