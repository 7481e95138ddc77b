"""Wrong command lines end in one sentence of our own: a share of those that ``python -m tests.command_lines`` runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_lines import Case, Ended, cases, problem, run, workspace

EVERY = cases()
CHOSEN = [
    "model.init_args.weight_decay: null",
    "method.init_args.r: null",
    "method.init_args.alpha: null",
    "method.init_args.dropout: null",
    "data.init_args.batch_size: null",
    "data.init_args.num_workers: 1" + 30 * "0",
    "trainer.devices: ü😀",
    "trainer.accelerator: x",
    "--trainer.strategy ddp_spawn",
    "--trainer.accumulate_grad_batches 0",
    "--ckpt_path train.csv",
    "--ckpt_path empty.ckpt",
    "--optimizer SGD --optimizer.lr -1",
    "--trainer.logger WandbLogger",
    "--method Lora",
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monit",
    "--trainer.val_check_interval 1000",
    "--trainer.val_check_interval 00:00:00:00",
    "--trainer.min_epochs 5 --trainer.max_epochs 1",
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.fil",
    "recursive mapping",
    "recursive root alone",
    "billion laughs",
    "tag",
    "deep",
    "trainer is null",
    "info a b c",
    "submit --config tiny.yaml --nodes 0",
    "export train.csv out --to nosuch",
]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Ended]:
    """Return what runs a case in a folder that has what it names."""
    folder: Path = tmp_path_factory.mktemp("lines")
    workspace(folder)
    return lambda case: run(case, folder)


def test_there_are_many() -> None:
    assert len(EVERY) > 600
    assert len({case.name for case in EVERY}) > 600


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOSEN)
def test_a_wrong_command_line(name: str, ends: Callable[[Case], Ended]) -> None:
    case = next(case for case in EVERY if case.name == name)
    assert problem(ends(case)) == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EVERY, ids=[case.name for case in EVERY])
def test_each_wrong_command_line(case: Case, ends: Callable[[Case], Ended]) -> None:
    assert problem(ends(case)) == ""
