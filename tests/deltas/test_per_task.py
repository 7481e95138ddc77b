"""A delta for each task of a stream: what a task has learnt stays as it is, bit for bit, by any method."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_peft import (
    L2P,
    Adapter,
    BitFit,
    LoRA,
    Method,
    PerTask,
    PrefixTuning,
    PromptTuning,
    TuningError,
    list_deltas,
)
from tests.contract import assert_same
from tests.tasks.test_continual_text import fit, path, task, tasks

__all__ = ["path"]


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        PromptTuning(num_virtual_tokens=2),
        pytest.param(BitFit(), marks=pytest.mark.slow),
        pytest.param(Adapter(bottleneck=4), marks=pytest.mark.slow),
        pytest.param(PrefixTuning(num_virtual_tokens=2), marks=pytest.mark.slow),
    ],
    ids=lambda method: type(method).__name__,
)
def test_nothing_is_forgotten(path: str, tmp_path: Path, method: Method) -> None:
    module, found = task(path, known="task", lr=5e-2), tasks(path, tmp_path, epochs_per_task=1)
    deltas, seen = PerTask(method, tasks=2), []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append([{name: p.detach().clone() for name, p in deltas.parameters_of(pl_module, member).items()}
                         for member in deltas.members])  # fmt: skip

    run = fit(tmp_path / "run", deltas, Watch(), max_epochs=2, gradient_clip_val=1.0)
    run.fit(module, found)
    (first, other), (again, later) = seen
    assert_same(first, again)
    assert any(not torch.equal(value, later[name]) for name, value in other.items()), "the second task trains its own"
    (learnt, after), _ = module.matrix
    assert learnt == after
    scores = {name: value for (one) in run.test(module, found, verbose=False) for name, value in one.items()}
    assert [scores[f"test_accuracy_task_{i}"] for i in range(2)] == pytest.approx([after, module.matrix[1][1]])
    assert {row["value"] for row in module.result_rows() if row["metric"] in ("forgetting", "backward_transfer")} == {0}


@pytest.mark.slow
def test_each_task_is_learnt(path: str, tmp_path: Path) -> None:
    module, found = task(path, known="task", lr=1e-2, head_lr=1e-2), tasks(path, tmp_path, epochs_per_task=15)
    run = fit(tmp_path, PerTask(LoRA(r=8), tasks=2), max_epochs=30, gradient_clip_val=1.0, check_val_every_n_epoch=15)
    run.fit(module, found)
    assert module.matrix[0][1] == module.matrix[0][0] > 0.8
    assert module.matrix[1][1] > 0.8


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_a_task(path: str, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        every = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1)
        module = task(path, known="task")
        fit(tmp_path, PerTask(LoRA(r=2), tasks=2), every).fit(module, tasks(path, tmp_path), ckpt_path=ckpt_path)
        return dict(module.delta_state())

    straight = run()
    middle = (tmp_path / "run/epoch=2.ckpt").rename(tmp_path / "middle.ckpt")  # the second task has one epoch to come
    for rest in (tmp_path / "run").glob("*.ckpt"):
        rest.unlink()
    assert_same(straight, run(middle))


def test_what_does_not_fit_is_refused(path: str, tmp_path: Path) -> None:
    module = task(path, known="task")
    with pytest.raises(TuningError, match=r"PerTask has 3 deltas, and the data have 2 tasks: give it tasks=2"):
        fit(tmp_path, PerTask(LoRA(r=2), tasks=3), max_epochs=2).fit(module, tasks(path, tmp_path, epochs_per_task=1))
    with pytest.raises(TuningError, match=r"which known='seen' does not tell: give the task known='task'"):
        fit(tmp_path, PerTask(LoRA(r=2), tasks=2)).fit(task(path), tasks(path, tmp_path))
    with pytest.raises(TuningError, match=r"a PerTask of a PerTask has no members to train: give it a method"):
        PerTask(PerTask(LoRA(), tasks=2), tasks=2).apply(module.backbone)
    with pytest.raises(TuningError, match="BertForSequenceClassification has no vision transformer"):
        PerTask(L2P(), tasks=2).apply(task(path).backbone)
    deltas, module = PerTask(LoRA(r=2), tasks=2, name="stream"), task(path)
    deltas.apply(module.backbone)
    assert [delta.name for delta in list_deltas(module.backbone)] == ["stream_0", "stream_1"]
    assert [file.name for file in deltas.save(module.backbone, tmp_path / "out")] == [
        "stream_0.safetensors", "stream_1.safetensors"
    ]  # fmt: skip
    deltas.remove(module.backbone)
    assert not list_deltas(module.backbone)
