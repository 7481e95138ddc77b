"""What methods gather from two processes: images of a cache, sums over rows, and draws that must be the same."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import CODAPrompt, RanPAC, TipAdapter
from tests.contract import assert_near
from tests.models import batch, tiny
from tests.modules import Tuned, loader
from tests.processes import free_port, quiet_trainer

pytestmark = pytest.mark.slow
ROWS, SHOTS = 12, 16


def ridge(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the sums and the head of `RanPAC` for these batches."""
    torch.manual_seed(0)
    model, method = tiny("vit"), RanPAC(width=16)
    method.apply(model)
    method.fill(model, batches)
    return model.classifier.ranpac.state_dict()


def halves(number: int) -> list[dict[str, torch.Tensor]]:
    return [{name: rows[number::2] for name, rows in batch("vit", size=8, seed=1).items()}]


def components(number: int) -> torch.Tensor:
    """Return the keys of `CODAPrompt` in its second task, which every process draws from numbers of its own."""
    torch.manual_seed(0)
    model, method = tiny("vit"), CODAPrompt(num_tasks=2, components=4, length=2, layers=[0])
    method.apply(model)
    torch.manual_seed(number)
    method.on_task_start(None, model, 1)
    return model.vit.codaprompt.keys.detach()


def rank(number: int, folder: str, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "one"}
    module = Tuned("clip", optimizer="SGD", lr=0.0)
    rows = loader("clip", ROWS).dataset
    mine = DataLoader(rows, 2, sampler=DistributedSampler(rows, 2, number, shuffle=False))  # Lightning's would shuffle
    quiet_trainer(Path(folder), 2, TipAdapter(num_classes=3, shots=SHOTS), max_epochs=1).fit(module, mine, mine)
    found = {f"cache.{name}": tensor for name, tensor in module.model.towers.tipadapter.state_dict().items()}
    found |= {"components": components(number)} | ridge(halves(number))
    torch.save(found, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_each_process_has_what_all_have_read(tmp_path: Path) -> None:
    mp.spawn(rank, (str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert_near(first, second, 0)
    rows = torch.cat([each["labels"] for each in loader("clip", ROWS)]).tolist()
    assert first["cache.labels"].tolist() == [*rows, *[-1] * (3 * SHOTS - ROWS)]
    model, method = tiny("clip"), TipAdapter(num_classes=3, shots=SHOTS)
    method.apply(model)
    method.fill(model, loader("clip", ROWS, 2))
    assert_near({"": model.towers.tipadapter.keys}, {"": first["cache.keys"]}, 1e-6)
    assert_near({"": components(0)}, {"": first["components"]}, 0)
    alone = ridge([batch("vit", size=8, seed=1)])  # each fifth row is held out, the same one
    assert_near(alone, {name: first[name] for name in alone}, 1e-5)
