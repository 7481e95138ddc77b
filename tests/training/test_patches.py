"""The table of what is changed on a Trainer: it is undone however a run ends, and no other file changes hooks."""

import ast
import copy
import pickle
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import lightning_peft
from lightning_peft import LoRA, LoRAMixin, SafeRequeue, TuningError, read_delta
from lightning_peft.training import patches, signals
from lightning_peft.training.checkpoint_io import AtomicCheckpointIO
from lightning_peft.training.patches import Patches
from lightning_peft.training.record import Life
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory",
)

PLACES = ("setup", "configure_model", "configure_optimizers", "training_step", "validation_step", "on_fit_end")


class Failing(Tuned):
    """Raises an error in one of its hooks, as often as it is asked to."""

    place: str
    error: BaseException | None

    def _fail(self, place: str) -> None:
        if place == self.place and self.error is not None:
            raise self.error

    def setup(self, stage: str) -> None:
        self._fail("setup")

    def configure_model(self) -> None:
        self._fail("configure_model")

    def configure_optimizers(self) -> Any:
        self._fail("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self._fail("validation_step")
        return super().validation_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        self._fail("on_fit_end")


class Owner(LoRAMixin, Tuned):
    """Owns its method."""


class Part:
    """Stands for an object of Lightning."""

    def hook(self) -> str:
        return "class"


class FailingToSave(L.Callback):
    """Fails when it is told of an exception, so that Lightning tears nothing down."""

    def on_exception(self, *_: Any) -> None:
        raise OSError("no space")


def failing(place: str = "", error: BaseException | None = None) -> Failing:
    module = Failing("bert")  # whose arguments are hyper-parameters, which go into checkpoints
    module.place, module.error = place, error
    return module


def double(owner: Part) -> str:
    return 2 * type(owner).hook(owner)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signals.uninstall()
    signal.signal(signal.SIGINT, before)  # Lightning ignores it when it has been interrupted


def functions(run: L.Trainer, module: L.LightningModule) -> set[tuple[str, str]]:
    """Return the functions that the parts of a Trainer have on the instance."""
    parts = [run.strategy, run.precision_plugin, run._signal_connector, run._checkpoint_connector, module]
    return {
        (type(part).__name__, name)
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, partial) or type(value) in (type(double), type(run.fit))
    }


STAY = {("SingleDeviceStrategy", "connect")} | {
    ("Failing", name) for name in ("configure_optimizers", "on_save_checkpoint", "on_load_checkpoint")
}
"""What saves the delta after a run, and undoes that when the next one begins."""


@pytest.mark.parametrize("error", [ValueError("failed"), KeyboardInterrupt(), SystemExit(75)], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_ends_a_run_the_trainer_is_as_before(tmp_path: Path, place: str, error: BaseException) -> None:
    saving = ModelCheckpoint(tmp_path / "best")
    run = trainer(tmp_path, SafeRequeue(), LoRA(r=2), saving, precision="bf16-true", max_epochs=1)
    module = failing(place, error)
    before = functions(run, module)
    with pytest.raises((ValueError, SystemExit)):
        run.fit(module, loader("bert"), loader("bert"))
    assert functions(run, module) == before | STAY
    assert not (tmp_path / "best" / ".in-use").exists()
    life = Life.of(module)
    assert life.resumed is life.validation_random is None
    module.train().error = None
    again = trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path / "best"), max_epochs=1)
    again.fit(module, loader("bert"), loader("bert"))
    assert again.global_step == 3


@pytest.mark.parametrize("place", ["", *PLACES])
def test_the_same_trainer_runs_again(tmp_path: Path, place: str) -> None:
    run = trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path / "best"), precision="bf16-true", max_epochs=1)
    module = failing(place, ValueError("failed"))
    before = functions(run, module)
    if place:
        with pytest.raises(ValueError, match="failed"):
            run.fit(module, loader("bert"), loader("bert"))
        module.train().error = None
        run.fit_loop.epoch_progress.reset()
    run.fit(module, loader("bert"), loader("bert"))
    run.validate(module, loader("bert"), verbose=False)
    assert functions(run, module) == before | STAY
    patches.restore(run)
    Patches.of(module).restore()
    assert functions(run, module) == before
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO


def test_an_error_of_the_method_itself(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, LoRA(r=2, target_modules=["nope"]), precision="bf16-true"), failing()
    before = functions(run, module)
    with pytest.raises(TuningError, match="nope"):
        run.fit(module, loader("bert"))
    assert functions(run, module) == before | STAY


def test_what_saves_stays_until_the_next_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Owner("bert"), loader("bert"))
    assert type(run.strategy.checkpoint_io) is AtomicCheckpointIO
    run.save_checkpoint(tmp_path / "delta.ckpt")
    assert len(read_delta(tmp_path / "delta.ckpt")[0]) == 10
    run.callbacks = []
    plain = Tuned("bert")
    run.validate(plain, loader("bert"), verbose=False)
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    assert not Patches.of(run)


def test_what_a_user_has_set_since_stays(tmp_path: Path) -> None:
    run, own = trainer(tmp_path, LoRA(r=2), max_epochs=1), AtomicCheckpointIO(on_error="warn")
    run.fit(Tuned("bert"), loader("bert"))
    run.strategy.checkpoint_io = own
    run.validate(Tuned("bert"), loader("bert"), verbose=False)
    assert run.strategy.checkpoint_io is own


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # Lightning looks for a file of an earlier exception
@pytest.mark.parametrize("plugin", [TorchCheckpointIO, lambda: AsyncCheckpointIO(TorchCheckpointIO())])
def test_a_checkpoint_of_an_exception_holds_the_delta(tmp_path: Path, plugin: Any) -> None:
    own, error = plugin(), ValueError("failed")
    callbacks = (LoRA(r=2), OnExceptionCheckpoint(tmp_path, "failed"))
    run = trainer(tmp_path, *callbacks, plugins=own, enable_checkpointing=True)
    with pytest.raises(ValueError, match="failed"):
        run.fit(failing("training_step", error), loader("bert"))
    # A thread may have written it: the strategy that waits for the thread is torn down before it is as it was.
    assert len(read_delta(tmp_path / "failed.ckpt")[0]) == 10
    patches.restore(run)
    assert run.strategy.checkpoint_io is own


def test_the_next_run_begins_with_an_empty_table(tmp_path: Path) -> None:
    saving, fails = ModelCheckpoint(tmp_path / "best"), FailingToSave()
    run, module = trainer(tmp_path, LoRA(r=2), saving, fails, max_epochs=1), failing("training_step", ValueError())
    with pytest.raises(OSError, match="no space"):
        run.fit(module, loader("bert"))
    assert "process_dataloader" in vars(run.strategy)
    run.callbacks = [fails]
    run.validate(Tuned("bert"), loader("bert"), verbose=False)
    assert not Patches.of(run)
    assert not (tmp_path / "best" / ".in-use").exists()
    assert not functions(run, Tuned("bert"))


def test_a_trainer_pickles_after_fit(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path / "best"), max_epochs=1)
    run.fit(Tuned("bert"), loader("bert"))
    other = pickle.loads(pickle.dumps(run))
    other.save_checkpoint(tmp_path / "delta.ckpt")
    assert len(read_delta(tmp_path / "delta.ckpt")[0]) == 10
    patches.restore(other)
    assert type(other.strategy.checkpoint_io) is TorchCheckpointIO
    assert type(run.strategy.checkpoint_io) is AtomicCheckpointIO


def test_patched_twice_is_patched_once() -> None:
    table, part = Patches(), Part()
    table.patch(part, "hook", lambda: "first")
    table.patch(part, "hook", lambda: "second")
    assert (part.hook(), len(table)) == ("second", 1)
    table.restore()
    assert (vars(part), len(table)) == ({}, 0)
    table.restore()


def test_the_latest_is_undone_first() -> None:
    table, part, order = Patches(), Part(), []
    part.name = "earlier"
    for i in range(3):
        table.record(part, str(i), partial(order.append, i))
    table.record(part, "1", partial(order.append, "once more"))
    table.patch(part, "name", "now")
    table.patch(part, "stays", 1, lasting=True)
    table.undo(part, "1")
    table.restore(lasting=False)
    assert order == [1, 2, 0]
    assert vars(part) == {"name": "earlier", "stays": 1}
    table.restore()
    assert vars(part) == {"name": "earlier"}


def test_an_undoing_that_fails_keeps_none_of_the_others() -> None:
    table, part = Patches(), Part()
    table.patch(part, "hook", lambda: "ours")
    table.record(part, "fails", partial(int, "no number"))
    with pytest.raises(ValueError, match="no number"):
        table.restore()
    assert (vars(part), len(table)) == ({}, 0)


def test_a_table_is_copied_with_what_keeps_it() -> None:
    part = Part()
    Patches.of(part).patch(part, "hook", partial(double, part))
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert other.hook() == "classclass"
        Patches.of(other).restore()
        assert other.hook() == "class"
    assert part.hook() == "classclass"


def test_a_hook_is_replaced_for_one_call_or_for_a_while() -> None:
    part = Part()
    patches.once(part, "hook", lambda: "ours, then " + part.hook())
    assert [part.hook(), part.hook()] == ["ours, then class", "class"]
    with patches.patched(Part, "hook", double) as undo:
        assert vars(Part)["hook"] is double
        undo()
        assert part.hook() == "class"
    part.hook = lambda: "own"
    with patches.patched(part, "hook"):
        assert part.hook() == "class"
        part.hook = lambda: "another"
    assert part.hook() == "own"


def replaces(tree: ast.AST) -> list[str]:
    """Return where code sets or deletes attributes, by their names, of what is not its own (``self``)."""
    found = []
    for node in ast.walk(tree):
        call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            owner = re.fullmatch(r"vars\((.+)\)|(.+)\.__dict__", ast.unparse(node.value))
        elif call in ("setattr", "delattr"):
            owner = re.fullmatch(r"(.+)", ast.unparse(node.args[0]))
        else:
            owner = re.fullmatch(r"(?:vars\((.+)\)|(.+)\.__dict__)\.(?:pop|setdefault|update|clear)", call)
        if owner is not None and not re.match(r"self\b", next(filter(None, owner.groups()))):
            found.append(ast.unparse(node))
    return found


def test_what_counts_as_replacing() -> None:
    for line in ("vars(x)['fit'] = f", "del vars(x.y)['fit']", "x.__dict__['fit'] = f", "setattr(x, 'fit', f)",
                 "vars(x).pop('fit')", "x.__dict__.update(fit=f)"):  # fmt: skip
        assert replaces(ast.parse(line)), line
        assert not replaces(ast.parse(line.replace("x", "self"))), line
    assert not replaces(ast.parse("vars(x)['fit']; vars(x).get('fit'); x.update(fit=f)"))


def test_one_file_replaces_hooks_of_lightning() -> None:
    package = Path(lightning_peft.__file__).parent
    floors = ("training", "tasks", "data", "reports", "interop", "commands")  # those below graft torch's modules
    files = [file for floor in floors for file in sorted((package / floor).rglob("*.py"))]
    found = {file.name: where for file in files if (where := replaces(ast.parse(file.read_text())))}
    assert sorted(found) == ["patches.py", "record.py", "trainer.py"]
    assert found["record.py"] == ["vars(module)[ATTRIBUTE]"]
    assert found["trainer.py"] == ["vars(action)['_typehint']"]  # of jsonargparse: tests/test_private_names.py
