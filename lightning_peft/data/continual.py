"""Data for class-incremental learning: the classes come one task after another."""

from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.image_data import ImageData
from lightning_peft.data.module import DataArguments
from lightning_peft.data.text_data import TextData


class ContinualData(DataArguments):
    """The classes of ``data`` in a sequence of tasks: each is trained for some epochs and then seen no more.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1`` and as many epochs as all tasks have together. Validation
    scores every task that has begun; the test scores all of them.

    Args:
        data: the images or the texts.
        tasks: how many tasks of equally many classes, as far as that goes; or the names of the classes of each task.
        epochs_per_task: how long a task is trained.
        class_seed: of the order of the classes where ``tasks`` is a number; None: the order of ``data``.
        score: 'test': validation during training scores the test rows, as the field reports it; 'validation': the
            validation rows, to choose settings by.
        processor: passed on to ``data`` of images where that has none.

    Raises:
        TuningError: a class is in two tasks or in none, or there are more tasks than classes.
    """

    def __init__(
        self,
        data: ImageData | TextData,
        tasks: int | list[list[str]] = 5,
        epochs_per_task: int = 5,
        class_seed: int | None = None,
        score: Literal["test", "validation"] = "test",
        processor: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["data"])
        if epochs_per_task < 1:
            raise TuningError(f"epochs_per_task={epochs_per_task} trains nothing: take 1 or more.")
        if score not in ("test", "validation"):
            raise TuningError(f"score={score!r} is no split to score: take 'test' or 'validation'.")
        self.data = data
        if isinstance(data, ImageData) and data.processor is None:
            data.processor = processor
        self.tasks = tasks
        self.epochs_per_task = epochs_per_task
        self.class_seed = class_seed
        self.score = score

    @property
    def label_names(self) -> list[str]:
        """The names of all classes, in the order of their numbers in a batch."""
        return self.data.label_names

    @cached_property
    def task_classes(self) -> list[list[int]]:
        """The numbers of the classes of each task."""
        names = self.label_names
        if isinstance(self.tasks, int):
            if not 1 <= self.tasks <= len(names):
                raise TuningError(f"tasks={self.tasks}, but there are {len(names)} classes: take 1 to {len(names)}.")
            order = np.arange(len(names))
            if self.class_seed is not None:
                order = np.random.default_rng(self.class_seed).permutation(order)
            return [part.tolist() for part in np.array_split(order, self.tasks)]
        task_of: dict[str, int] = {}
        for task, classes in enumerate(self.tasks):
            for name in classes:
                if name not in names:
                    raise TuningError(
                        f"task {task} has the class {name!r}, which the data have not{near(name, names)}."
                    )
                if name in task_of:
                    raise TuningError(
                        f"class {name!r} is in task {task_of[name]} and in task {task}: tasks must not overlap, "
                        "so name it once."
                    )
                task_of[name] = task
        if left_out := [name for name in names if name not in task_of]:
            raise TuningError(f"class {left_out[0]!r} is in no task: name it in one, or leave it out of the data.")
        return [[names.index(name) for name in classes] for classes in self.tasks]

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.task_classes)

    def task_at(self, epoch: int) -> int:
        """Return the number of the task that an epoch trains."""
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def prepare_data(self) -> None:
        """Read in one process of each machine."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Find the rows, and check the tasks before the first batch.

        Raises:
            TuningError: there are no rows to score by, or none of a task.
        """
        self.data.trainer = self.trainer
        self.data.setup(stage)
        read = {"fit": ("train", self.score), "validate": (self.score,), "test": ("test",)}.get(stage, ())
        if not self.num_tasks or not read:
            return
        if stage != "test":
            if self.score == "test" and self.data.rows("test") is not None:
                self.data.setup("test")
            if not self.data.has(self.score):
                other = "validation" if self.score == "test" else "test"
                raise TuningError(
                    f"there are no {self.score} rows to score tasks by: add them, or fit with score={other!r}."
                )
        for split in read:
            for task in range(self.num_tasks):
                self._loader(split, task)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches of the task that the current epoch belongs to."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        return self._loader("train", self.task_at(epoch), shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the rows to score by of each task up to the current one."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        last = self.task_at(epoch) if fitting else self.num_tasks - 1
        return [self._loader(self.score, task) for task in range(last + 1)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test rows of each task."""
        return [self._loader("test", task) for task in range(self.num_tasks)]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the rows to predict in their own order."""
        return self.data.predict_dataloader()

    def _loader(self, split: str, task: int, shuffle: bool = False) -> DataLoader[Any]:
        loader = self.data.class_loader(split, self.task_classes[task], shuffle)
        if loader is None:
            raise TuningError(f"the {split} split has no rows of task {task}: give it some.")
        return loader
