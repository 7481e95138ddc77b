"""``submit``: a SLURM script for a fit, written and handed to sbatch. Standard library and rich only."""

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_peft.commands import fail
from lightning_peft.commands.config_files import named
from lightning_peft.commands.wording import one_sentence
from lightning_peft.core.errors import TuningError

_SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
{resources}#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --signal=USR1@{warning}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/%x-%j.out
{more}
# One folder for each job and array task: logs, checkpoints and the file that a restart goes on from.
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
run={folder}/{name}-$job

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false
# Nodes rarely reach the internet: models and data come from the shared cache.
export HF_HUB_OFFLINE=${{HF_HUB_OFFLINE:-1}} HF_DATASETS_OFFLINE=${{HF_DATASETS_OFFLINE:-1}}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Where the default route is not the fast network, name its interface:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
{exports}
# Ranks meet at the first node, at a port of this job's own.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))

# A rank that dies takes the others with it instead of letting them wait.
code=0
srun --kill-on-bad-exit=1 --wait=60 {command} || code=$?

# 75: saved and requeued by the run itself. A killed rank costs the steps since the last save: three times at most.
if (( code > 128 && ${{SLURM_RESTART_COUNT:-0}} < 3 )) && compgen -G "$run/requeue-*.ckpt" > /dev/null &&
    [[ $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
    scontrol requeue "$job"
    sleep 60
fi
exit $code
"""


def submit(arguments: Sequence[str]) -> None:
    """Write a script for a fit and submit it; with ``--dry-run`` print it.

    Raises:
        TuningError: a configuration is missing, or there is no sbatch.
    """
    options, rest = _parser().parse_known_args(list(arguments))
    for file in options.config:
        if not Path(named(file)).is_file():
            raise TuningError(
                f"--config {file!r} is no file: give a path, or a name that lightning-peft configs lists."
            )
    script = script_of(options, rest)
    if options.dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise TuningError("there is no sbatch on this machine: submit from a login node, or print with --dry-run.")
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.name}.sbatch"
    path.write_text(script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode:
        raise TuningError(f"sbatch refused {path} ({done.stderr.strip() or done.stdout.strip()}): see man sbatch.")
    print(f"{done.stdout.strip()}, by {path}")


def script_of(options: argparse.Namespace, rest: Sequence[str] = ()) -> str:
    """Return the batch script for these options; ``rest`` goes to ``lightning-peft fit`` as it is."""
    configs = [word for file in options.config for word in ("--config", file)]
    if not any(Path(file).stem == "slurm" for file in options.config):
        configs += ["--config", "configs/trainers/slurm.yaml"]
    command = shlex.join(["lightning-peft", "fit", *configs, *rest])
    command += f' \\\n    --trainer.default_root_dir "$run" --trainer.num_nodes {options.nodes}'
    command += f" --trainer.devices {options.gpus or options.tasks}"
    per_node = options.gpus or options.tasks
    return _SCRIPT.format(
        name=options.name,
        nodes=options.nodes,
        gpus=per_node,
        resources=f"#SBATCH --gpus-per-node={options.gpus}\n" if options.gpus else "",
        cpus=options.cpus,
        time=options.time,
        warning=options.warning,
        folder=options.folder,
        more="".join(f"#SBATCH {line}\n" for line in options.sbatch),
        exports="".join(f"export {line}\n" for line in options.export),
        command=command,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one sentence and exit code 2."""
        fail(one_sentence(message, ()))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lightning-peft submit",
        description="Write a SLURM script for a fit and submit it. What is no option here goes to lightning-peft fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        help="a YAML file of fit, or the name of a shipped one",
    )
    parser.add_argument("--nodes", type=_at_least(1), default=1, help="machines")
    parser.add_argument("--gpus", type=_at_least(0), default=1, help="GPUs of each machine, one process each; 0: CPUs")
    parser.add_argument("--tasks", type=_at_least(1), default=1, help="processes of each machine if --gpus is 0")
    parser.add_argument("--cpus", type=_at_least(1), default=8, help="CPU cores of each process")
    parser.add_argument("--time", default="24:00:00", help="the time limit of one run; the job goes on after it")
    parser.add_argument("--warning", type=_at_least(1), default=300, help="seconds before the limit at which to save")
    parser.add_argument("--name", type=_name, default="tune", help="the name of the job")
    parser.add_argument("--folder", default="runs", help="where logs and runs go; all nodes must share it")
    parser.add_argument("--sbatch", action="append", default=[], help="a further line, e.g. --sbatch=--partition=a100")
    parser.add_argument(
        "--export", action="append", default=[], help="a variable, e.g. --export NCCL_SOCKET_IFNAME=ib0"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    return parser


def _at_least(least: int) -> "type[int]":
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number  # type: ignore[return-value]


def _name(text: str) -> str:
    """Refuse the names by which Lightning takes SLURM for absent, and what no file name can hold."""
    if text in ("bash", "interactive") or not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} hides SLURM from Lightning or is no plain name")
    return text
