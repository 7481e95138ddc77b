"""Steps over the same rows of unlike length, cut into batches and ranks in several ways.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.by_token FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import FullyShard, LossByToken, Method, collect
from lightning_peft.core.sharded import whole
from tests.models import tiny
from tests.modules import trainer

ROWS = 12
LENGTHS = (3, 14, 6, 2, 9, 11, 4, 13, 2, 7, 12, 5)


def rows() -> list[dict[str, Tensor]]:
    """Return rows whose tokens after the length are padding."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 100, (ROWS, max(LENGTHS)), generator=draw)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": i.masked_fill(~m, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


class Summing(L.LightningModule):
    """A module of a user's own: it returns the sum of the losses and the number of tokens."""

    def __init__(self, kind: str = "gpt2") -> None:
        super().__init__()
        self.model = tiny(kind).train()
        self.norms: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        labels = batch["labels"][:, 1:]
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss_sum = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss_sum, (labels != -100).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [whole(p.grad) for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def stepped(
    folder: Path, size: int, accumulate: int, method: Method, strategy: Any = "auto", **options: Any
) -> Summing:
    """Return a module after an epoch of batches of ``size`` rows on each rank."""
    L.seed_everything(0, verbose=False)
    module, data, ranks = options.pop("module", None) or Summing(), rows(), 1 if strategy == "auto" else 2
    sampler = DistributedSampler(data, 2, int(sys.argv[2]), shuffle=False) if ranks == 2 else None
    loader = DataLoader(data, size, sampler=sampler)
    run = {
        "strategy": strategy,
        "devices": ranks,
        "accumulate_grad_batches": accumulate,
        "use_distributed_sampler": False,
    }
    trainer(folder, method, LossByToken(), **run | options).fit(module, loader)
    return module


def trained(module: L.LightningModule) -> dict[str, Tensor]:
    """Return what was trained, whole."""
    return {name: whole(tensor).detach().clone() for name, tensor in collect(module).items()}


def main(folder: Path) -> None:
    """Save what two ranks have trained; how many rows make a step is that of the test."""
    import os

    from lightning_peft import LoRA

    sys.argv = [*sys.argv[:2], os.environ["RANK"]]
    for name, size, accumulate in (("4", 4, 1), ("2x2", 2, 2)):
        for kind in ("ddp", "fsdp2"):
            strategy = (
                DDPStrategy(process_group_backend="gloo") if kind == "ddp" else FullyShard(process_group_backend="gloo")
            )
            module = stepped(
                folder, size, accumulate, LoRA(r=4), strategy, gradient_clip_val=0.5 if kind == "ddp" else None
            )
            found = trained(module)
            if os.environ["RANK"] == "0":
                torch.save(found, folder / f"{kind} {name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
