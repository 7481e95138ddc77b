"""Ranks agree a step later, over the CPU, and without waiting."""

from pathlib import Path

import torch
import torch.multiprocessing as mp

from lightning_peft.training.vote import Vote


def test_one_process_is_answered_at_once() -> None:
    vote = Vote()
    vote.begin()
    assert vote.ask(True, False) == (True, False)
    vote.end()


def rank(number: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    collectives: list[str] = []
    for name in ("barrier", "all_reduce", "broadcast"):
        real = getattr(torch.distributed, name)
        setattr(
            torch.distributed, name, lambda *a, _real=real, _name=name, **k: collectives.append(_name) or _real(*a, **k)
        )
    vote = Vote()
    vote.begin()
    answers = [vote.ask(number == 1 and step >= 1, False) for step in range(6)]
    vote.end()
    (Path(folder) / f"{number}.txt").write_text(repr((answers, collectives)))
    torch.distributed.destroy_process_group()


def test_two_ranks_hear_of_each_other_a_step_later(tmp_path: Path) -> None:
    mp.spawn(rank, (str(tmp_path),), nprocs=2)
    none, yes = (False, False), (True, False)
    said = [eval((tmp_path / f"{number}.txt").read_text()) for number in (0, 1)]
    assert said[0][0] == said[1][0] == [none, none, yes, none, yes, none]
    assert said[0][1] == ["all_reduce"] * 4
