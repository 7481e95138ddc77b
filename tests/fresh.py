"""In a process of its own: build each model from its delta file and save what it computes.

To import torch and transformers takes seconds, so a server does that once and forks a process for each request: it has
imported what everyone has, and built and tuned nothing.
"""

import atexit
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compute(folder: Path) -> None:
    """Let a fresh process write ``outputs.pt``: what the models of the deltas in ``folder`` compute."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{folder}\n")
    server.stdin.flush()
    assert server.stdout.readline() == "0\n", f"the process for {folder} failed, see its traceback"


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fresh"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its input is its end
    return server


def _serve() -> None:
    import torch
    import transformers

    import lightning_peft

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the same sums as in the process that compares
    for name in lightning_peft.__all__:
        getattr(lightning_peft, name)
    assert transformers.PreTrainedModel
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _compute(Path(line.strip()))
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _compute(folder: Path) -> None:
    import torch

    from lightning_peft import from_delta
    from lightning_peft.core.tuning import Tuning
    from tests.contract import output
    from tests.models import tiny

    outputs = {}
    for file in sorted(folder.glob("*.safetensors")):
        model = from_delta(file, tiny(file.stem))
        (method,) = Tuning.of(model).methods.values()
        outputs[file.stem] = output(model, file.stem, method)
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    _serve()
