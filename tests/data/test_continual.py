"""Classes in tasks."""

from typing import Any

import pytest
import torch

from lightning_peft import ContinualData, TuningError
from tests.images import shapes

NAMES = ["red circle", "blue cross", "red cross", "blue circle"]


def data(**kwargs: Any) -> ContinualData:
    return ContinualData(shapes(), **{"tasks": 2, "epochs_per_task": 3} | kwargs)


def test_classes_are_split_evenly_in_order() -> None:
    assert data().label_names == NAMES
    assert data().task_classes == [[0, 1], [2, 3]]
    assert data(tasks=4).task_classes == [[0], [1], [2], [3]]
    assert [len(classes) for classes in data(tasks=3).task_classes] == [2, 1, 1]


def test_a_seed_orders_them() -> None:
    drawn = [data(class_seed=seed).task_classes for seed in range(6)]
    assert all(sorted(number for classes in tasks for number in classes) == [0, 1, 2, 3] for tasks in drawn)
    assert len({str(tasks) for tasks in drawn}) > 2
    assert data(class_seed=3).task_classes == drawn[3]


def test_tasks_by_name() -> None:
    assert data(tasks=[["blue cross"], ["red circle", "blue circle"], ["red cross"]]).task_classes == [[1], [0, 3], [2]]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([NAMES[:2], NAMES[1:]], "class 'blue cross' is in task 0 and in task 1: tasks must not overlap"),
        ([NAMES[:2], ["red star"]], "task 1 has the class 'red star', which the data have not"),
        ([NAMES[:2], NAMES[3:]], "class 'red cross' is in no task"),
        (5, "tasks=5, but there are 4 classes"),
        (0, "tasks=0, but there are 4 classes"),
    ],
)
def test_tasks_that_are_refused(tasks: Any, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        data(tasks=tasks).setup("fit")


def test_arguments_that_are_refused() -> None:
    with pytest.raises(TuningError, match="epochs_per_task=0"):
        data(epochs_per_task=0)
    with pytest.raises(TuningError, match="score='train'"):
        data(score="train")
    without = ContinualData(shapes(validation_per_class=0), tasks=2, score="validation")
    with pytest.raises(TuningError, match="there are no validation rows"):
        without.setup("fit")


def test_each_epoch_has_the_images_of_its_task() -> None:
    found = data()
    assert [found.task_at(epoch) for epoch in range(7)] == [0, 0, 0, 1, 1, 1, 1]

    class Fit:
        current_epoch, distributed_sampler_kwargs = 0, None

    found.trainer = Fit()
    for epoch, classes in ((0, {0, 1}), (2, {0, 1}), (3, {2, 3})):
        found.trainer.current_epoch = epoch
        labels = torch.cat([batch["labels"] for batch in found.train_dataloader()])
        assert set(labels.tolist()) == classes
        assert len(labels) == 12


def test_the_test_has_a_loader_for_each_task() -> None:
    loaders = data().test_dataloader()
    assert [set(torch.cat([batch["labels"] for batch in loader]).tolist()) for loader in loaders] == [{0, 1}, {2, 3}]


def test_the_processor_is_passed_on(tmp_path) -> None:
    assert data(processor=str(tmp_path)).data.processor == str(tmp_path)
