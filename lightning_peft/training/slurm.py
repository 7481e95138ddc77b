"""Reads the SLURM job of this process, and refuses jobs that were started so that they would hang.

Standard library only: the console script looks before it imports torch.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

from lightning_peft.core.errors import TuningError

_INTERACTIVE = ("bash", "interactive")  # job names by which Lightning takes SLURM for absent


def is_job() -> bool:
    """Tell whether this process was started by ``srun`` (not by hand inside an allocation)."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ and not _interactive(os.environ)


def is_elastic() -> bool:
    """Tell whether ``torchrun`` started this process and starts it anew when one of them is lost."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


def job_id() -> str:
    """Return the id under which SLURM requeues this job: ``ARRAY_TASK`` in an array job; else torchrun's."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or f"pid{os.getpid()}"


def restarts() -> int:
    """Return how often this job has been started anew, by SLURM or by torchrun."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def job_state() -> str:
    """Return what SLURM calls the state of this job, e.g. RUNNING; '' where it does not answer."""
    return _ask("squeue", "--noheader", "--jobs", job_id(), "--format", "%T").strip().partition("\n")[0]


def requeue() -> str:
    """Put this job back into the queue; return '' or, in a few words, why that was not done.

    A job that is being cancelled is left alone: requeueing would bring it back.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return "there is no SLURM here"
    state = job_state()
    if state not in ("RUNNING", ""):
        return f"it is {state}"
    command = ["scontrol", "requeue", job_id()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)} failed ({error})"
    return "" if done.returncode == 0 else f"{' '.join(command)} failed ({done.stderr.strip() or done.returncode})"


def rank_and_node() -> str:
    """Return which rank on which node this is, for messages; '' where there is but one process."""
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_ID" in os.environ:
        return f"rank {os.environ.get('SLURM_PROCID', '?')} on {node()}"
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '?'))} on {node()}"
    return ""


def node() -> str:
    """Return the name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Check that a job of several processes was started in a way that lets them find each other.

    Raises:
        TuningError: no srun, ``--ntasks`` without ``--ntasks-per-node``, a job name that hides SLURM, or a signal that
            only the batch shell gets and that kills it.
    """
    if "SLURM_JOB_ID" not in environment or "TORCHELASTIC_RUN_ID" in environment:
        return
    tasks = int(environment.get("SLURM_NTASKS") or 1)
    nodes = int(environment.get("SLURM_NNODES") or environment.get("SLURM_JOB_NUM_NODES") or 1)
    if tasks > 1 or nodes > 1:
        if _interactive(environment):
            raise TuningError(
                f"the job is named {environment['SLURM_JOB_NAME']!r}, by which Lightning takes SLURM for absent and "
                "every one of its processes waits for the others: give it another --job-name."
            )
        if "SLURM_STEP_ID" not in environment:
            raise TuningError(
                f"this is one process of a job of {tasks} tasks and would wait for the others, since srun did not "
                "start it: put srun before lightning-peft."
            )
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
            raise TuningError(
                f"the job has --ntasks={tasks} but no --ntasks-per-node, by which processes know their device: "
                "give --nodes and --ntasks-per-node."
            )
    if environment.get("SLURM_LOCALID", "0") == "0":
        _check_signal(_ask("scontrol", "write", "batch_script", environment["SLURM_JOB_ID"], "-"))


def check_sizes(num_nodes: int, num_devices: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that the Trainer's numbers are those of the job.

    Raises:
        TuningError: they differ.
    """
    for option, ours, variable, flag in (
        ("num_nodes", num_nodes, "SLURM_NNODES", "nodes"),
        ("devices", num_devices, "SLURM_NTASKS_PER_NODE", "ntasks-per-node"),
    ):
        theirs = environment.get(variable)
        if theirs is not None and theirs.isdigit() and int(theirs) != ours:
            raise TuningError(
                f"the Trainer has {option}={ours} but the job --{flag}={theirs}, and one side would wait for processes "
                f"that never come: give trainer.{option}={theirs}."
            )


def _check_signal(script: str) -> None:
    signal = re.search(r"^#SBATCH\s+--signal[= ](\S*B\S*:\S+)", script, re.MULTILINE)
    if signal and not re.search(r"^\s*trap\b", script, re.MULTILINE):
        raise TuningError(
            f"--signal={signal[1]} goes to the batch shell alone, which has no trap and dies of it: "
            f"leave out the 'B:' (--signal={signal[1].rpartition(':')[2]})."
        )


def _interactive(environment: Mapping[str, str]) -> bool:
    return environment.get("SLURM_JOB_NAME") in _INTERACTIVE


def _ask(*command: str) -> str:
    """Return what a command of SLURM prints, '' where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
