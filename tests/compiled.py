"""What `test_compiled` runs in each of two processes: fits of a backbone that is compiled, and of one that is not.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.compiled FOLDER NAMES
"""

import copy
import faulthandler
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lightning_peft import FullyShard, LoRA, Method, PromptTuning
from tests.modules import loader, trainer
from tests.tensor_parallel import TARGETS, Noted, delta_of

LIMIT = 200
METHODS: dict[str, Method] = {
    "LoRA": LoRA(r=4, target_modules=TARGETS),
    "PromptTuning": PromptTuning(num_virtual_tokens=2, init="random_uniform"),
}
STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": lambda: FullyShard(process_group_backend="gloo"),
    "tensor parallel": lambda: FullyShard(process_group_backend="gloo", tensor_parallel_size=2),
}


class Whole(Noted):
    """Its backbone is compiled when fit starts, after whatever was done to it."""

    backend = "aot_eager"

    def on_fit_start(self) -> None:
        self.model.compile(backend=self.backend)


class Blocks(Noted):
    """Its blocks are compiled one by one, which sharding leaves whole."""

    def on_fit_start(self) -> None:
        for block in self.model.model.layers:
            block.compile(backend="aot_eager")


class Inductor(Whole):
    """Is compiled to code for this machine."""

    backend = "inductor"


HOW: dict[str, type[Noted]] = {"plain": Noted, "module": Noted, "backbone": Whole, "blocks": Blocks, "code": Inductor}
"""How a module is compiled: not, as a LightningModule before fit, in its backbone, in its blocks, to code."""


def fit(folder: Path, strategy: str, method: str, how: str) -> Noted:
    """Fit two batches, the same on every rank."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(3)
    module = HOW[how]("llama")
    run = trainer(
        folder, copy.deepcopy(METHODS[method]), devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=STRATEGIES[strategy](), use_distributed_sampler=False, gradient_clip_val=0.01,
    )  # fmt: skip
    run.fit(torch.compile(module, backend="aot_eager") if how == "module" else module, loader("llama", 8))
    return module


def graphs() -> int:
    """Return how many graphs have been compiled since `fit` began."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main(folder: Path, rank: int, names: list[str]) -> None:
    """Run the cases of these names, ``strategy/method/how``, in one process group."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name in names:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        file = folder / f"{name.replace('/', '-')}.{rank}.pt"
        try:
            module = fit(folder, *name.split("/"))
            torch.save((module.losses, module.gradients, delta_of(module), graphs()), file)
        except Exception:  # the other rank has failed alike
            file.with_suffix(".failed").write_text(traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2:])
