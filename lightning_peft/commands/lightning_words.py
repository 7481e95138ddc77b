"""Says what Lightning objects to in a run in the words of the command line: the argument, its value, what it takes.

An objection comes as an error with a text, by which alone one is told from another, and many texts name no argument or
no remedy. What is not in the table here is quoted.
https://github.com/Lightning-AI/pytorch-lightning/tree/2.6.6/src/lightning/pytorch
"""

import re
import sys

_SAYS: tuple[tuple[str, str], ...] = (
    (
        r"Early stopping conditioned on metric `(.*?)` which is not available.*following: (.*)$",
        "EarlyStopping's monitor={0!r} is no metric of this run: take one of {1}.",
    ),
    (
        r"`ModelCheckpoint\(monitor='(.*?)'\)` could not find the monitored key in the returned metrics: \[(.*?)\]",
        "ModelCheckpoint's monitor={0!r} is no metric of this run: take one of {1}.",
    ),
    (
        r"ReduceLROnPlateau conditioned on metric (.*?) which is not available. Available metrics are: \[(.*?)\]",
        "lr_scheduler's monitor={0!r} is no metric of this run: take one of {1}.",
    ),
    (
        r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\)",
        "trainer.val_check_interval={0} is more than the {1} training batches of an epoch: take {1} at most, or "
        "trainer.check_val_every_n_epoch=null, with which batches are counted across epochs.",
    ),
    (
        r"You requested to check (\S+) of the `(\w+)_dataloader` but \S+ \* (\d+) < 1",
        "trainer.limit_{1}_batches (or overfit_batches) is {0}, which of {2} batches is less than one: take a larger "
        "share, or a number of batches such as 1.",
    ),
    (
        r"(?:using|When using) an `?IterableDataset`?.*`Trainer\((limit_\w+_batches|val_check_interval)\)` must be",
        "trainer.{0} is a share of data whose length is not known: give a number of batches, or 1.0 for all.",
    ),
    (
        r"Cannot use `(\w+)` callback with `Trainer.*logger",
        "{0} has nothing to write to, since trainer.logger is false: give trainer.logger=true, or leave {0} out.",
    ),
    (
        r"enable_checkpointing=False` but found `(\w+)`",
        "{0} is among trainer.callbacks, but trainer.enable_checkpointing is false: make that true, or leave out {0}.",
    ),
    (
        r"enable_progress_bar=False` but found `(\w+)`",
        "{0} is among trainer.callbacks, but trainer.enable_progress_bar is false: make that true, or leave out {0}.",
    ),
    (
        r"You added multiple progress bar callbacks",
        "trainer.callbacks has more than one progress bar: leave all but one out.",
    ),
    (
        r"You have set `accumulate_grad_batches` and are using the `GradientAccumulationScheduler`",
        "trainer.accumulate_grad_batches is given beside GradientAccumulationScheduler, which sets it: leave out one "
        "of them.",
    ),
    (
        r'ckpt_path="hpc"\)` is set but no HPC checkpoint was found',
        "--ckpt_path hpc finds no file hpc_ckpt_*.ckpt in trainer.default_root_dir: give the path of a checkpoint.",
    ),
    (
        r"restored a checkpoint with current_epoch=(\d+), but you have set Trainer\(max_epochs=(\d+)\)",
        "the checkpoint comes after {0} epochs, and trainer.max_epochs={1} is less: take more, or no --ckpt_path.",
    ),
    (
        r"Trying to restore .* state but checkpoint contains only the model",
        "the checkpoint was written with save_weights_only=true, and a run cannot go on from weights alone: test, "
        "validate and predict take it, --ckpt_path of fit a checkpoint that was written without.",
    ),
    (
        r"`Timer\(duration=(.*?)\)` is not a valid duration",
        "{0!r} is no time for trainer.max_time or a Timer: give days, hours, minutes and seconds as DD:HH:MM:SS, such "
        "as 00:01:30:00.",
    ),
    (
        r"(?:Invalid time format for|Non-integer component in) `val_check_interval`(?: string)?: (.*?)\. (?:Exp|Use)",
        "trainer.val_check_interval={0!r} is no time: give days, hours, minutes and seconds as DD:HH:MM:SS, such as "
        "00:00:30:00, a number of batches, or a share of an epoch.",
    ),
    (
        r"`val_check_interval` should be an integer or a time-based duration",
        "trainer.val_check_interval is a share of an epoch, but trainer.check_val_every_n_epoch=null counts batches "
        "across epochs: give a number of batches or a time.",
    ),
    (
        r"'(\w+)' is an invalid keyword argument for",
        "{0!r} is no unit of time: take days, hours, minutes or seconds.",
    ),
    (
        r"You have passed invalid value (\S+) for (\w+), it has to be in \[0.0, 1.0\] or an int",
        "trainer.{1}={0} is neither a share nor a number of batches: take 0.0 to 1.0, or an integer.",
    ),
    (
        r"Found more than one stateful callback of type `(\w+)`",
        "trainer.callbacks has {0} twice with the same arguments, so that a checkpoint cannot tell them apart: leave "
        "out one, or give it other arguments.",
    ),
    (
        r"cannot represent an object.*<Interval",
        "Timer's interval has a default that no file of arguments can hold: give it as step or epoch, or take "
        "trainer.max_time.",
    ),
    (
        r"`(\w+)Accelerator` can not run on your system.*argument of `Trainer`: \[(.*?)\]",
        "trainer.accelerator asks for {0}, which this machine has not: take one of {1}, or auto.",
    ),
    (
        r"every_n_train_steps=(\S+), every_n_epochs=(\S+) and train_time_interval=(.+?) should be mutually exclusive",
        "ModelCheckpoint has every_n_train_steps={0}, every_n_epochs={1} and train_time_interval={2}: give one of "
        "them.",
    ),
    (
        r"SparseAdam does not support dense gradients",
        "SparseAdam is for gradients of sparse embeddings, and those here are dense: take Adam or AdamW.",
    ),
    (
        r"Requirement '([\w.-]+)[^']*' not met",
        "a logger or other class that is asked for needs the package {0}, which is not installed: pip install {0}, "
        "or take another, such as trainer.logger=CSVLogger.",
    ),
    (
        r"Neither `(tensorboard)` nor `tensorboardX` is available",
        "TensorBoardLogger needs the package {0}, which is not installed: pip install {0}, or take "
        "trainer.logger=CSVLogger.",
    ),
    (
        r"^Install (\w+) to access (\S+)",
        "{1} is read by the package {0}, which is not installed: pip install {0}, or give a path of this machine.",
    ),
    (
        r"`Trainer\(devices=(.*?)\)` value is not a valid input using (\w+) accelerator",
        "trainer.devices={0} is nothing that accelerator {1} takes: give a number of devices, or auto.",
    ),
)


def said(error: BaseException) -> str | None:
    """Return the sentence for what Lightning objects to in one of the errors that led to this one; None: another's."""
    for one in _chain(error):
        for pattern, words in _SAYS:
            if (found := re.search(pattern, _text(one))) is not None:
                return words.format(*(re.sub("[\"'`]", "", group) or "those that it logs" for group in found.groups()))
    return None


def objection(error: BaseException) -> str | None:
    """Return a sentence with the text of an error by which Lightning says that something is set up wrongly."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # without it, it has raised nothing
    if lightning is None or not isinstance(error, lightning.MisconfigurationException):
        return None
    return f"the run cannot go on as it is set up ({_text(error)[:300].rstrip('.: ')}): change what is named there."


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those that it came from."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found
