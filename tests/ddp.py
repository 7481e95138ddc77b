"""What `test_ddp` runs in each of two processes: fits under DDP, whose results each rank saves."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import BitFit, FullFineTuning, LinearProbe, LoRA, Method, PromptTuning, collect
from tests.modules import Tuned, loader, trainer

ROWS, SIZE = 16, 4
"""Rows of an epoch, and rows of a step over all ranks."""


def cases(mode: str = "eval") -> dict[str, tuple[str, Method]]:
    """Return name -> kind of model and method, T5 for the prompt since three tables share it."""
    return {
        "LoRA": ("bert", LoRA(r=2, dropout=0.1 if mode == "train" else 0.0, backbone_mode=mode)),
        "BitFit": ("gpt2", BitFit(backbone_mode=mode)),
        "LinearProbe": ("vit", LinearProbe(backbone_mode=mode)),
        "PromptTuning": (
            "t5",
            PromptTuning(num_virtual_tokens=3, init="random_uniform", backbone_mode=mode),
        ),
        "FullFineTuning": ("bert", FullFineTuning(backbone_mode=mode)),
    }


def descend(folder: Path, kind: str, method: Method, ranks: int, seed: int) -> Tuned:
    """Fit two epochs of SGD without anything random but the first values, in a total batch of ``SIZE`` rows."""
    torch.manual_seed(seed)
    module = Tuned(kind, optimizer="SGD", lr=1e-3)
    rows = loader(kind, ROWS, padded=False).dataset
    # Lightning's own sampler would shuffle.
    mine = DistributedSampler(rows, ranks, int(os.environ.get("RANK", "0")), shuffle=False)
    data = DataLoader(rows, SIZE // ranks, sampler=mine)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    strategy = "ddp" if ranks > 1 else "auto"
    trainer(folder, method, saved, devices=ranks, strategy=strategy, max_epochs=2).fit(module, data, data)
    return module


def resume(folder: Path, kind: str, method: Method, seed: int, ckpt_path: Path | None = None) -> Tuned:
    """Fit two epochs of Adam with dropout and shuffling."""
    torch.manual_seed(seed)
    module = Tuned(kind, dropout=0.2)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(folder, method, saved, devices=2, strategy="ddp", max_epochs=2)
    fit.fit(module, loader(kind, ROWS, SIZE // 2, shuffle=True), loader(kind, ROWS, 2), ckpt_path=ckpt_path)
    return module


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for name, (kind, method) in cases().items():
        module = descend(folder / name, kind, method, ranks=2, seed=rank)
        torch.save(dict(module.model.state_dict()), folder / f"{name}.state.{rank}.pt")
    for name, (kind, method) in cases("train").items():
        straight = resume(folder / f"{name}.straight", kind, method, seed=rank)
        middle = folder / f"{name}.straight" / "epoch=0.ckpt"
        resumed = resume(folder / f"{name}.resumed", kind, cases("train")[name][1], seed=7 + rank, ckpt_path=middle)
        results = [{n: t.clone() for n, t in collect(m).items()} for m in (straight, resumed)]
        torch.save(results, folder / f"{name}.resumed.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
