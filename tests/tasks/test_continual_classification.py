"""A sequence of tasks in one fit: masked logits, A[i, t] and what is made of it."""

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_peft import (
    L2P,
    CODAPrompt,
    ContinualClassification,
    ContinualData,
    DualPrompt,
    FullFineTuning,
    LinearProbe,
    Method,
    RanPAC,
    TuningError,
    collect,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from lightning_peft.tasks.continual_metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    learning_accuracy,
)
from tests.contract import assert_same
from tests.images import save_vit, shapes
from tests.modules import trainer

ROOT = Path(__file__).parents[2]
A = [[0.9, 0.8, 0.7], [0, 0.85, 0.8], [0, 0, 0.95]]
COLOURS = {"colours": ["red", "green", "blue", "yellow"], "shapes": ["circle"]}
POOL = {"pool_size": 4, "prompt_length": 2, "top_n": 2}


def data(path: str, **kwargs: Any) -> ContinualData:
    return ContinualData(shapes(processor=path, keep_in_memory=True), **{"tasks": 2, "epochs_per_task": 2} | kwargs)


def task(path: str, **kwargs: Any) -> ContinualClassification:
    L.seed_everything(0, verbose=False)
    return ContinualClassification(path, **{"labels": shapes().label_names, "lr": 0.01} | kwargs)


def fit(path: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    return trainer(path, *callbacks, **{"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1} | kwargs)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


def test_scores_of_a_matrix() -> None:
    assert average_accuracy(A) == pytest.approx(0.81667, abs=5e-6)
    assert forgetting(A) == pytest.approx(0.125)
    assert backward_transfer(A) == pytest.approx(-0.125)
    assert learning_accuracy(A) == pytest.approx(0.9)


def test_scores_after_a_task() -> None:
    assert average_accuracy(A, 1) == pytest.approx((0.8 + 0.85) / 2)
    assert forgetting(A, 1) == pytest.approx(0.1)
    assert average_accuracy(A, 0) == 0.9
    assert forgetting(A, 0) == backward_transfer(A, 0) == 0
    better = [[0.5, 0.7], [0, 0.9]]
    assert forgetting(better) == 0
    assert backward_transfer(better) == pytest.approx(0.2)


def test_only_the_classes_of_the_task_are_trained(path: str, tmp_path: Path) -> None:
    module = task(path)
    fit(tmp_path, LinearProbe(), max_epochs=4, limit_train_batches=1).fit(module, data(path))
    head = module.backbone.classifier
    assert head.weight.any(1).all()

    module = task(path)
    found = data(path)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    fit(tmp_path, LinearProbe(), Stop()).fit(module, found)
    head = module.backbone.classifier
    assert head.weight.any(1).tolist() == [True, True, False, False]
    assert head.bias.bool().tolist() == [True, True, False, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_among_the_classes_of_the_task(path: str, smoothing: float) -> None:
    module = task(path, label_smoothing=smoothing, zero_head=False)
    module._classes, module.task = [[3, 0], [1, 2]], 1
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([2, 1, 2])}
    module.log = lambda *args, **kwargs: None  # there is no Trainer
    logits = module.eval()(batch)
    expected = F.cross_entropy(logits[:, 1:3], torch.tensor([1, 0, 1]), label_smoothing=smoothing)
    loss = module.training_step(batch, 0)
    assert loss.isfinite()
    assert torch.allclose(loss, expected)


def test_one_fit_fills_the_matrix(path: str, tmp_path: Path) -> None:
    colours = shapes(processor=path, keep_in_memory=True, **COLOURS)
    module = task(path, lr=0.003, head_lr=0.003, labels=colours.label_names)
    found = ContinualData(colours, tasks=2, epochs_per_task=15)
    run = fit(tmp_path, FullFineTuning(), max_epochs=30)
    run.fit(module, found)
    (first, after), (zero, second) = module.matrix
    assert zero == 0.0
    assert first > 0.8
    assert second > 0.8
    assert after < first, "training all of it on other classes must cost something"
    (scores,) = run.test(module, found, verbose=False)[:1]
    assert scores["test_accuracy_task_0"] == pytest.approx(after)
    assert scores["test_accuracy"] == pytest.approx((after + second) / 2)
    rows = module.result_rows()
    assert {"metric": "task_accuracy", "task": 0, "after": 1, "value": after} in rows
    assert {"metric": "forgetting", "after": 1, "value": pytest.approx(first - after)} in rows
    assert module.confusion_matrix().sum() == 12


class OtherImages(L.Callback):
    """Gives the validation, which scores the images of the test, their negatives in their place, and another label."""

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        batch["pixel_values"].neg_()
        batch["labels"].fill_(0)


@pytest.mark.parametrize(
    "method",
    [
        DualPrompt(num_tasks=2, general_length=2, expert_length=2, general_layers=[0], expert_layers=[1]),
        pytest.param(CODAPrompt(num_tasks=2, components=4, length=2, layers=[0]), marks=pytest.mark.slow),
        pytest.param(L2P(**POOL), marks=pytest.mark.slow),
        pytest.param(RanPAC(width=16), marks=pytest.mark.slow),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_images_of_the_test_change_nothing_that_is_learnt(path: str, tmp_path: Path, method: Method) -> None:
    """Neither keys nor prompts, nor how many images of which task have been seen."""
    deltas, scores = [], []
    for others in ([], [OtherImages()]):
        module = task(path)
        run = fit(tmp_path, copy.deepcopy(method), *others, max_epochs=2)
        run.fit(module, data(path, epochs_per_task=1))
        deltas.append(collect(module))
        scores.append(module.matrix)
    assert_same(*deltas)
    assert scores[0] != scores[1], "the images were the same"


@pytest.mark.parametrize(("known", "counts"), [("seen", (2, 4)), ("all", (4, 4)), ("task", (2, 2))])
def test_the_classes_an_image_is_told_from(path: str, known: str, counts: tuple[int, int]) -> None:
    module = task(path, known=known)
    module._classes = [[0, 3], [1, 2]]
    for now, count in enumerate(counts):
        module.task = now
        assert int(module._known(now).sum()) == count
        assert module._known(now)[module._classes[now]].all()


def test_moments_begin_anew_and_callbacks_are_told(path: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            seen.append((task, len(trainer.optimizers[0].state)))

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
            assert steps == {3 * (trainer.current_epoch % 2 + 1)}

    fit(tmp_path, LinearProbe(), Watch()).fit(task(path), data(path))
    assert seen == [(0, 0), (1, 0)]


def test_l2p_takes_the_frequencies_of_earlier_tasks(path: str, tmp_path: Path) -> None:
    method, module = L2P(**POOL, diversify=True), task(path)
    fit(tmp_path, method).fit(module, data(path))
    pool = method.pool(module)
    assert pool.frequency.sum() == pytest.approx(1)
    assert pool.counts.sum() == 2 * 4 * 12


def test_a_run_goes_on_from_a_checkpoint(path: str, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> ContinualClassification:
        every = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1)
        module = task(path)
        fit(tmp_path, L2P(**POOL), every).fit(module, data(path), ckpt_path=ckpt_path)
        return module

    straight = run()
    middle = (tmp_path / "run" / "epoch=2.ckpt").rename(tmp_path / "middle.ckpt")
    for rest in (tmp_path / "run").glob("*.ckpt"):
        rest.unlink()
    resumed = run(middle)
    assert resumed.matrix == straight.matrix
    assert_same(dict(straight.delta_state()), dict(resumed.delta_state()))


def test_a_delta_keeps_the_matrix(path: str, tmp_path: Path) -> None:
    module, found, run = task(path), data(path), fit(tmp_path, LinearProbe())
    run.fit(module, found)
    run.save_checkpoint(tmp_path / "delta.ckpt")
    again = load_from_checkpoint(ContinualClassification, tmp_path / "delta.ckpt")
    scores = fit(tmp_path).test(again, found, tmp_path / "delta.ckpt", verbose=False)
    assert scores == run.test(module, found, verbose=False)
    assert again.matrix == module.matrix
    assert again.task == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_epochs": 5}, "max_epochs=5, but 2 tasks of 2 epochs take 4: set trainer.max_epochs to 4"),
        ({"reload_dataloaders_every_n_epochs": 0}, "set trainer.reload_dataloaders_every_n_epochs to 1"),
        ({"check_val_every_n_epoch": 3}, "check_val_every_n_epoch=3 leaves tasks unscored: take a divisor of 2"),
    ],
)
def test_a_trainer_that_does_not_fit_is_refused(path: str, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        fit(tmp_path, LinearProbe(), **arguments).fit(task(path), data(path))


def test_what_does_not_fit_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="needs tasks: give it ContinualData"):
        fit(tmp_path, LinearProbe()).fit(task(path), shapes(processor=path))
    with pytest.raises(TuningError, match="known='none'"):
        task(path, known="none")
    with pytest.raises(TuningError, match=r"label_smoothing=1\.0"):
        task(path, label_smoothing=1.0)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(ROOT / "configs/tasks/continual_classification.yaml"), "--method", "L2P"]
    arguments += ["--model.model", path, "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    arguments += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    arguments += ["--data.epochs_per_task", "1", "--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "1"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments, "--method.pool_size", "4", "--method.top_n", "2"])
    main()
    (delta,) = tmp_path.rglob("*.ckpt")
    held = torch.load(delta, weights_only=True)
    assert [len(row) for row in held["continual"]["matrix"]] == [5] * 5
