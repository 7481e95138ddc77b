"""What `test_ddp` runs in each of two processes: fits of all methods, under DDP and FSDP2.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.ddp FOLDER [NAMES]
"""

import copy
import faulthandler
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import LoRA, Method, collect
from lightning_peft.core.sharded import whole
from lightning_peft.training.strategy import FullyShard
from tests.contracts import contracts, without_dropout
from tests.modules import Tuned, loader, trainer

ROWS, SIZE = 16, 4
"""Rows of an epoch, and rows of a step over all ranks."""
STRATEGIES = ("ddp", "fsdp2")
CLIP = 0.002
"""Norm to which gradients are clipped; that of every case is larger in the first step."""
LIMIT = 120
"""Seconds that a case may take before both processes print where they are, and end; two cores do one in 3 to 8."""


class Momentum(Tuned):
    """Descends by momentum, whose state is checkpointed and which adds no noise of its own, as Adam does."""

    norms: tuple[float, ...] = ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not torch.distributed.is_initialized():
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms += (float(torch.nn.utils.get_total_norm(gradients)),)


def cases(mode: str = "eval") -> dict[str, tuple[str, Method]]:
    """Return name -> kind of model and method, for each class of the contract, on one of its backbones.

    Which one hangs on the length of its name, so that they differ, and another method changes none of them. Dropout is
    off, since each rank would draw another mask.
    """
    return {
        name: (kind.backbones[len(name) % len(kind.backbones)], without_dropout(kind, mode))
        for name, kind in contracts().items()
    }


def strategies_of(method: Method) -> tuple[str, ...]:
    """Return the strategies that a method works under."""
    return (*STRATEGIES, "fsdp2-folder") if method.shards else ("ddp",)


def strategy_of(name: str, ranks: int) -> Any:
    """Return a fresh strategy by its name here; for one process, ``auto`` is Lightning's own."""
    if name == "ddp-static":
        return DDPStrategy(static_graph=True, gradient_as_bucket_view=True, bucket_cap_mb=1)
    if name.startswith("fsdp2"):
        return FullyShard(process_group_backend="gloo", save_distributed_checkpoint=name.endswith("folder"))
    return "ddp" if ranks > 1 else "auto"


def descend(
    folder: Path, kind: str, method: Method, strategy: str, ranks: int, seed: int, ckpt_path: Path | None = None
) -> Tuned:
    """Fit two epochs without anything random but the first values, in a total batch of ``SIZE`` rows."""
    torch.manual_seed(seed)
    module = Momentum(kind)
    if strategy == "ddp-static":
        module.model.activation_checkpointing_enable()
        method.backbone_mode = "train"  # in which transformers checkpoints; there is no dropout
    at_once = 2 if strategy == "ddp-static" else 1  # torch cannot accumulate there
    rows = loader(kind, ROWS, padded=False).dataset
    # Lightning's own sampler would shuffle.
    mine = DistributedSampler(rows, ranks, int(os.environ.get("RANK", "0")), shuffle=False)
    data = DataLoader(rows, at_once * SIZE // ranks, sampler=mine)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(
        folder, copy.deepcopy(method), saved, devices=ranks, strategy=strategy_of(strategy, ranks), max_epochs=2,
        gradient_clip_val=CLIP, accumulate_grad_batches=2 // at_once,
    )  # fmt: skip
    fit.fit(module, data, data, ckpt_path=ckpt_path)
    return module


def resume(folder: Path, kind: str, method: Method, seed: int, ckpt_path: Path | None = None) -> Tuned:
    """Fit two epochs of Adam with dropout and shuffling."""
    torch.manual_seed(seed)
    module = Tuned(kind, dropout=0.2)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(folder, copy.deepcopy(method), saved, devices=2, strategy="ddp", max_epochs=2)
    fit.fit(module, loader(kind, ROWS, SIZE // 2, shuffle=True), loader(kind, ROWS, 2), ckpt_path=ckpt_path)
    return module


def main(folder: Path, rank: int, names: list[str]) -> None:
    """Run the cases of these names in one process group; a rank that fails ends both, and so does one that waits."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    frozen, active = cases(), cases("train")
    for name in names:
        began = time.monotonic()
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "begun").touch()
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        kind, method = frozen[name]
        both(folder / name, kind, method, rank)
        kind, method = active[name]
        straight = resume(folder / name / "straight", kind, method, seed=rank)
        middle = folder / name / "straight" / "epoch=0.ckpt"
        resumed = resume(folder / name / "resumed", kind, method, seed=7 + rank, ckpt_path=middle)
        results = [{n: t.clone() for n, t in collect(m).items()} for m in (straight, resumed)]
        torch.save(results, folder / name / f"resumed.{rank}.pt")
        faulthandler.cancel_dump_traceback_later()
        if rank == 0:
            print(f"{name}, {kind}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()


def both(folder: Path, kind: str, method: Method, rank: int) -> None:
    """Fit under each strategy, then go on from the middle of what another strategy has written."""
    for strategy in strategies_of(method):
        keep(descend(folder / strategy, kind, method, strategy, ranks=2, seed=rank), folder / f"{strategy}.{rank}.pt")
    if type(method) is LoRA and method.init != "eva":  # which starts from batches, and these are twice as large
        module = descend(folder / "static", kind, copy.deepcopy(method), "ddp-static", ranks=2, seed=rank)
        keep(module, folder / f"ddp-static.{rank}.pt")
    for strategy, other in (("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2-folder"), ("ddp", "fsdp2-folder")):
        if not method.shards:
            continue
        middle = folder / other / "epoch=0.ckpt"
        module = descend(folder / f"{strategy}-of-{other}", kind, method, strategy, 2, seed=9, ckpt_path=middle)
        keep(module, folder / f"{strategy}-of-{other}.{rank}.pt")


def keep(module: Tuned, file: Path) -> None:
    """Save what the module has become, as one process would hold it; all ranks gather."""
    torch.save({name: whole(tensor).detach().clone() for name, tensor in module.model.state_dict().items()}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2:])
