"""Saves and requeues a SLURM job at pre-emption or its time limit, and resumes it by itself.

Lightning saves inside the signal handler, where each rank is at another place: its barrier meets another rank's
collective, and the job hangs (https://github.com/Lightning-AI/pytorch-lightning/issues/21406). Here the handler sets a
flag (`lightning_peft.training.signals`), the ranks agree after a batch, and all of them save together.
"""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.training import patches, signals, slurm
from lightning_peft.training.vote import Vote

EXIT = 75
"""The exit code of a run that stopped to be continued (EX_TEMPFAIL)."""

_fits = {"begun": 0}


class SafeRequeue(L.Callback):
    """Saves and requeues when SLURM asks the job to end, and resumes from that file when it is started again.

    It is on by default in jobs that ``srun`` or ``torchrun --max-restarts`` started; give it to a Trainer to change its
    arguments. The file is that of this job, array task, step and fit alone, lies in ``default_root_dir`` and is removed
    when fit ends.

    Args:
        every_minutes: how often to save besides, for crashes, which give no warning; None: never.
        requeue: whether to ask SLURM for a restart; False: save and stop.
    """

    def __init__(self, every_minutes: float | None = 10.0, requeue: bool = True) -> None:
        if every_minutes is not None and not 0 <= every_minutes < float("inf"):
            raise TuningError(f"SafeRequeue's every_minutes={every_minutes} is out of range: take 0 or more, or None.")
        self.every_minutes, self.requeue = every_minutes, requeue
        self._path = Path()
        self._decision = ""
        self._saved = time.monotonic()
        self._vote = Vote()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Handle the signals in place of Lightning, and resume from this job's own file if it was requeued."""
        if stage != "fit":
            return
        _handle_signals(trainer)
        _fits["begun"] += 1
        self._saved, self._decision = time.monotonic(), ""
        # torchrun may count restarts otherwise on another node: what rank 0 sees holds.
        own = own_file(trainer.default_root_dir, _fits["begun"])
        path, found, restarts = trainer.strategy.broadcast((str(own), str(_existing(own) or ""), slurm.restarts()))
        self._path = Path(path)
        if found and restarts > 0:
            rank_zero_info(f"restart {restarts}: going on from {found}")
            connector = trainer._checkpoint_connector
            patches.of_run(trainer).patch(
                connector, "resume_start", partial(_resume, type(connector).resume_start, connector, found)
            )
        elif found:
            raise TuningError(
                f"{found} is there although this job has not been restarted, so it belongs to an earlier cluster's job "
                "of this number: remove it, or give another --trainer.default_root_dir."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the ranks speak to each other."""
        self._vote.begin()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what is on its way between the ranks."""
        self._vote.end()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with all ranks, unless gradients are being accumulated."""
        # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._agree(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Do what was agreed, now that hooks, loggers and schedulers have seen the batch before."""
        if self._decision:
            self._act(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here if asked to; the validation is done again as a whole."""
        if trainer.state.fn != "fit":
            return
        if self._decision != "stop":
            self._agree(trainer, save=False)
        if self._decision != "stop":
            return
        if trainer.sanity_checking:
            self._stop(trainer, "nothing trained yet")
        self._act(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the own file: what is finished needs no resuming."""
        if trainer.is_global_zero:
            for path in (self._path, _beside(self._path, "new"), _beside(self._path, "old")):
                _remove(path)

    def _agree(self, trainer: L.Trainer, save: bool = True) -> None:
        """Decide together: one rank that got a signal is enough, and the clock is that of rank 0."""
        late = self.every_minutes is not None and time.monotonic() - self._saved > 60 * self.every_minutes
        due = save and late and trainer.is_global_zero
        wanted, stop = self._vote.ask(bool(signals.received()) or due, bool(signals.received()))
        if wanted:
            self._decision = "stop" if stop else "save" if save else ""

    def _act(self, trainer: L.Trainer) -> None:
        decision, self._decision = self._decision, ""
        new = _beside(self._path, "new")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            _replace(new, self._path)
        trainer.strategy.barrier("SafeRequeue")
        self._saved = time.monotonic()
        if decision == "stop":
            self._stop(trainer, f"saved to {self._path}")

    def _stop(self, trainer: L.Trainer, what: str) -> None:
        """Requeue the job and end this process, on all ranks together."""
        environment = environment_of(trainer)
        wanted = self.requeue and (not isinstance(environment, SLURMEnvironment) or environment.auto_requeue)
        problem = ""
        if trainer.is_global_zero:
            problem = slurm.requeue() if wanted else "requeue is off"
        problem = trainer.strategy.broadcast(problem)
        step = f"step {trainer.global_step}, signal {signals.received() or 'on another rank'}: {what}"
        rank_zero_info(f"{step}, job {slurm.job_id()} " + (f"not requeued: {problem}" if problem else "requeued"))
        raise SystemExit(EXIT)


class RequeueUnsaved(SafeRequeue):
    """Requeues a job without a save: for a short fit before the one of the job, which a restart begins anew."""

    def __init__(self, requeue: bool = True) -> None:
        super().__init__(every_minutes=None, requeue=requeue)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Handle the signals in place of Lightning; this fit is not counted, and nothing is there to go on from."""
        _handle_signals(trainer)
        self._decision = ""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove nothing."""

    def _act(self, trainer: L.Trainer) -> None:
        self._stop(trainer, "nothing trained yet")


def add_requeue(trainer: L.Trainer) -> None:
    """Add `SafeRequeue` to the callbacks of a Trainer in a job that can be started anew, if it has none.

    Raises:
        TuningError: the job was started in a way in which its processes cannot work together, or Lightning would load
            a file of its own requeueing that another job has left.
    """
    if not slurm.is_job() and not slurm.is_elastic():
        return
    if slurm.is_elastic() and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # https://github.com/pytorch/pytorch/issues/167288
        rank_zero_warn(
            "torchrun's restarted processes would look for each other where those before them were: "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun."
        )
    environment = environment_of(trainer)
    if isinstance(environment, SLURMEnvironment):
        slurm.check_sizes(trainer.num_nodes, trainer.num_devices)
    elif not isinstance(environment, TorchElasticEnvironment) and trainer.world_size > 1:
        slurm.check_environment()
    foreign = sorted(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    if foreign:
        raise TuningError(
            f"{foreign[0]} was left by Lightning's own requeueing, which every later run in this folder would load: "
            "move it away and give its path as --ckpt_path if it is to be resumed."
        )
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, SafeRequeue) for callback in callbacks):
        added = SafeRequeue()
        callbacks.append(added)
        # It is there until the next run, since its on_fit_end comes when the strategy's teardown is over.
        patches.of_run(trainer).record(callbacks, "SafeRequeue", partial(_leave, callbacks, added), lasting=True)


def goes_on(trainer: L.Trainer) -> bool:
    """Tell whether the next fit of this process goes on from what its job had saved when it was requeued."""
    return _existing(own_file(trainer.default_root_dir, _fits["begun"] + 1)) is not None


def environment_of(trainer: L.Trainer) -> ClusterEnvironment | None:
    """Return the cluster environment of a Trainer; None where its strategy has one process."""
    return trainer.strategy.cluster_environment if isinstance(trainer.strategy, ParallelStrategy) else None


def own_file(folder: str | Path, fit: int) -> Path:
    """Return the path of the file of the ``fit``-th fit of this process, step, array task and job in ``folder``."""
    step = os.environ.get("SLURM_STEP_ID", "0")
    return Path(folder) / f"requeue-{slurm.job_id()}.{step}-{fit}.ckpt"


def _leave(callbacks: list[L.Callback], added: L.Callback) -> None:
    callbacks[:] = [callback for callback in callbacks if callback is not added]


def _handle_signals(trainer: L.Trainer) -> None:
    """Handle the signals in place of Lightning."""
    signals.install_handlers()
    # Its handlers call collectives, and it has no public switch:
    # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/trainer.py
    patches.of_run(trainer).patch(trainer._signal_connector, "register_signal_handlers", _leave_signals)


def _leave_signals() -> None:
    """Stands in for Lightning's registration of handlers."""


def _resume(resume_start: Any, connector: Any, path: str, *_: Any, **__: Any) -> None:
    """Stands in for Lightning's ``resume_start`` of what the user, or nobody, has named."""
    resume_start(connector, path, weights_only=True)


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}.{word}{path.suffix}")


def _existing(path: Path) -> Path | None:
    """Return the newest whole save: a crash between the two renames of `_replace` leaves the one before."""
    return next((p for p in (path, _beside(path, "old")) if p.exists()), None)


def _replace(new: Path, path: Path) -> None:
    """Put a file or folder in the place of another; one of the two is there at any moment."""
    old = _beside(path, "old")
    _remove(old)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
