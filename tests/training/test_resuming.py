"""A run that resumes from any file is the one that was not interrupted, bit for bit, or says in a sentence why not."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, Dataset

from lightning_peft import LoRA, collect
from tests import resuming, resuming_runs
from tests.contract import assert_same
from tests.modules import Tuned, loader, trainer
from tests.resuming_runs import Drawn

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)


def silent(rows: list[resuming.Row]) -> list[resuming.Row]:
    """Return the rows that differ and do not say it."""
    return [row for row in rows if row.verdict == "SILENT"]


@pytest.mark.parametrize("number", [1, 8, 19])
def test_drawn_runs(number: int, tmp_path: Path) -> None:
    rows = list(resuming.resumes(resuming_runs.draw(number), tmp_path, most=3, ends=1))
    assert silent(rows) == []
    assert sum(row.verdict == "exact" for row in rows) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_every_drawn_run(number: int, tmp_path: Path) -> None:
    assert silent(list(resuming.resumes(resuming_runs.draw(number), tmp_path, most=9, ends=4))) == []


PLAIN = Drawn(precision="32-true", callbacks="none")
CONFIGURATIONS = {
    "gradients that are being accumulated": dataclasses.replace(PLAIN, accumulate=3, validation="after each batch"),
    "own optimization": dataclasses.replace(PLAIN, manual=True, validation="none"),
    "a schedule that follows training": dataclasses.replace(PLAIN, scheduler="plateau of training"),
    "a schedule that follows validation": dataclasses.replace(PLAIN, scheduler="plateau by epoch", sanity=2),
    "a limit of steps": dataclasses.replace(PLAIN, limit="steps", validation="every 3 batches", sanity=2),
    "two loaders": dataclasses.replace(PLAIN, loader="two, the longer cycles the shorter", validation="none"),
    "a generator": dataclasses.replace(PLAIN, loader="own generator", validation="every second epoch"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_moment_of_a_run(name: str, tmp_path: Path) -> None:
    """Each comes from a way in which files differed silently."""
    drawn, saving = CONFIGURATIONS[name], resuming.SaveEverywhere(tmp_path)
    whole = resuming.fit(drawn)
    assert resuming.difference(whole, resuming.fit(drawn, saving)) == ""
    wanted = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_batch_start")
    files = {hook: [file for file in saving.files if hook in file.name] for hook in wanted}
    for file in [file for of_hook in files.values() for file in (*of_hook[:1], *of_hook[3:4])]:
        resumed = resuming.fit(drawn, ckpt_path=file, seed=5)
        assert (file.stem, resuming.difference(whole, resumed), resumed.said) == (file.stem, "", [])


@pytest.mark.parametrize("how", ["exception", "Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(("place", "times"), [("training_step", 2), ("data", 15), ("validation_step", 2)])
def test_an_end_in_the_middle(how: str, place: str, times: int, tmp_path: Path) -> None:
    whole = resuming.fit(PLAIN)
    resuming.fit(PLAIN, resuming.EndAt(place, times, how), OnExceptionCheckpoint(tmp_path, "end"))
    resumed = resuming.fit(PLAIN, ckpt_path=tmp_path / "end.ckpt", seed=5)
    assert 0 < len(resumed.losses) < len(whole.losses) + (place == "training_step")
    assert (resuming.difference(whole, resumed), resumed.said) == ("", [])


def saved(folder: Path, module: L.LightningModule, data: Any, validation: Any = None, **options: Any) -> Path:
    """Return the file that a run of one epoch writes after its first step."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, LoRA(r=2), saving, max_epochs=1, **options).fit(module, data, validation)
    return folder / "step=1.ckpt"


def resumed(folder: Path, module: L.LightningModule, data: Any, words: str) -> None:
    """See that a run which resumes says these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, LoRA(r=2)).fit(module, data, ckpt_path=folder / "step=1.ckpt")
    assert any(words in str(warning.message) for warning in caught), [str(w.message) for w in caught]


class Following(Tuned):
    """Moves something after each batch, when callbacks have written their files."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stands for a teacher that follows."""


def test_a_hook_that_comes_after_the_save_is_named(tmp_path: Path) -> None:
    saved(tmp_path, Following(), loader("bert"))
    resumed(tmp_path, Following(), loader("bert"), "Following.on_train_batch_end comes after callbacks save")


class Other(Dataset):
    """Rows that are others in each process that reads them."""

    def __init__(self, first: int) -> None:
        self.rows, self.first = loader("bert", rows=12).dataset, first

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return self.rows[(i + self.first) % 12]


def test_data_that_have_changed_are_noticed(tmp_path: Path) -> None:
    saved(tmp_path, Tuned(), DataLoader(Other(0), 4))
    resumed(tmp_path, Tuned(), DataLoader(Other(1), 4), "batch 1 of the epoch is not what it was")


def test_a_run_that_was_told_to_stop_says_so(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, LoRA(r=2), Stop(), saving, max_epochs=1).fit(Tuned(), loader("bert"))
    resumed(tmp_path, Tuned(), loader("bert"), "the run that wrote it had been told to stop")


def test_a_longer_run_goes_on_where_steps_have_ended_an_epoch(tmp_path: Path) -> None:
    """The file is written when the limit is reached, by a hook at the end of the epoch."""

    def fit(folder: str, steps: int, ckpt_path: Path | None = None) -> Tuned:
        L.seed_everything(3, verbose=False)
        module, saving = Tuned(dropout=0.1), ModelCheckpoint(tmp_path / folder, filename="end")
        run = trainer(tmp_path, LoRA(r=2), saving, max_steps=steps, max_epochs=-1)
        run.fit(module, loader("bert", shuffle=True), ckpt_path=ckpt_path)
        return module

    whole = fit("whole", 5)
    fit("parts", 2)
    longer = fit("longer", 5, tmp_path / "parts" / "end.ckpt")
    assert_same({n: t.detach() for n, t in collect(whole).items()}, {n: t.detach() for n, t in collect(longer).items()})


def test_two_runs_of_one_seed_are_equal_where_a_method_computes_the_weight_of_another() -> None:
    """DoRA kept the norms of a weight that was gone, and took them for those of the next one at its address."""
    outcomes = {str(resuming.fit(dataclasses.replace(PLAIN, method="DoRA+DiffPruning")).losses) for _ in range(3)}
    assert len(outcomes) == 1
