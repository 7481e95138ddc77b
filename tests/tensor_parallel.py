"""What `test_tensor_parallel` runs in each process: fits whose layers are split between the ranks.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.tensor_parallel FOLDER [NAMES]
"""

import copy
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft import IA3, BitFit, FullyShard, LoRA, Method, PrefixTuning, PromptTuning, TuningError, collect
from lightning_peft.core.sharded import is_part, whole
from tests.contracts import contracts, without_dropout
from tests.models import tiny
from tests.modules import Tuned, loader, trainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLIP = 0.01
LIMIT = 120
BERT = {"query": "colwise", "key": "colwise", "value": "colwise", "attention.output.dense": "rowwise"}
BERT |= {"intermediate.dense": "colwise", "layer.*.output.dense": "rowwise"}


class Noted(Tuned):
    """Descends by momentum and keeps its losses and gradients; Llama has grouped keys."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.losses: list[torch.Tensor] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().clone())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        found = {n: whole(p.grad).clone() for n, p in self.named_parameters() if p.grad is not None}
        self.gradients.append(found)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Adam(Noted):
    """Descends by Adam."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-3)  # without that it enlarges rounding errors


class Dropping(Noted):
    """Has dropout, on tensors that each rank holds whole, too; and each rank has another seed."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.model = tiny(kind, dropout=0.2)
        torch.manual_seed(int(os.environ["RANK"]))


class ByHand(Noted):
    """Parallelizes itself, which needs no FullyShard."""

    def configure_model(self) -> None:
        if self.device_mesh is None or is_part(self.model.model.layers[0].mlp.up_proj.weight):
            return
        plan = {name: (RowwiseParallel if name in ("o_proj", "down_proj") else ColwiseParallel)() for name in TARGETS}
        for block in self.model.model.layers:
            for part in (block.self_attn, block.mlp):
                mine = {n: style for n, style in plan.items() if hasattr(part, n)}
                parallelize_module(part, self.device_mesh["tensor_parallel"], mine)


class Meta(Noted):
    """Builds its backbone on the meta device, from ``folder``, where it has several processes."""

    folder: Path

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.model = None

    def configure_model(self) -> None:
        if self.model is None and self.device_mesh is None:
            self.model = tiny("llama")
        elif self.model is None:
            with torch.device("meta"):
                config = hf.AutoConfig.from_pretrained(self.folder)
                self.model = hf.AutoModelForCausalLM.from_config(config)
            self.model.config._name_or_path = str(self.folder)
        torch.manual_seed(3)  # building drew numbers


def split(**options: Any) -> FullyShard:
    return FullyShard(process_group_backend="gloo", tensor_parallel_size=2, **options)


def split_bert() -> FullyShard:
    return split(tensor_parallel_plan=BERT)


def by_hand() -> ModelParallelStrategy:
    groups = int(os.environ["WORLD_SIZE"]) // 2
    return ModelParallelStrategy(groups, 2, save_distributed_checkpoint=False, process_group_backend="gloo")


Case = tuple[type[Noted], str, Method, Callable[[], Any]]
CASES: dict[str, Case] = {
    "plan of transformers": (Noted, "llama", LoRA(r=4, target_modules=TARGETS), split),
    "head and all": (Noted, "llama", LoRA(r=4, target_modules=[*TARGETS, "lm_head"]), split),
    "by hand": (ByHand, "llama", LoRA(r=4, target_modules=TARGETS), by_hand),
    "on the meta device": (Meta, "llama", LoRA(r=4, target_modules=TARGETS), split),
    "biases and a head": (Noted, "bert", LoRA(r=2, bias="all"), split_bert),
    "DoRA": (Noted, "llama", LoRA(r=4, target_modules=TARGETS, use_dora=True), split),
    "PiSSA": (Noted, "llama", LoRA(r=4, target_modules=TARGETS, init="pissa"), split),
    "folder": (Noted, "llama", LoRA(r=4, target_modules=TARGETS), lambda: split(save_distributed_checkpoint=True)),
    "prompt": (Noted, "llama", PromptTuning(num_virtual_tokens=2, init="random_uniform"), split),
    "bias": (Noted, "bert", BitFit(), split_bert),
    "Adam": (Adam, "llama", LoRA(r=4, target_modules=TARGETS), split),
    "dropout": (Dropping, "bert", LoRA(r=4, dropout=0.3), split_bert),
    "checkpointing": (Noted, "llama", LoRA(r=4, target_modules=TARGETS), lambda: split(activation_checkpointing=True)),
    "offload": (Noted, "llama", LoRA(r=4, target_modules=TARGETS), lambda: split(cpu_offload=True)),
    "units": (Noted, "llama", LoRA(r=4, target_modules=TARGETS), lambda: split(param_dtype="32")),
}
RESUMED = ("plan of transformers", "folder")
REFUSED: dict[str, tuple[str, Method, dict[str, Any], str]] = {
    "IA3": ("llama", IA3(), {}, "ia3 at .* cannot be split between tensor_parallel_size=2 ranks.*take LoRA"),
    "prefix": ("llama", PrefixTuning(num_virtual_tokens=2), {}, "cannot be split.*take LoRA"),
    "no plan": ("bert", LoRA(), {}, "transformers has no tensor-parallel plan for BertForSequenceClassification"),
    "no layer": ("llama", LoRA(), {"nope": "colwise"}, "'nope' of the plan matches nothing"),
    "no style": ("llama", LoRA(), {"q_proj": "sideways"}, "'sideways', which is none of colwise"),
    "no linear": ("llama", LoRA(), {"input_layernorm": "colwise"}, "LlamaRMSNorm; only Linear and Embedding"),
}


def of_the_contract() -> dict[str, Case]:
    """Return a case for each class of the contract that has a backbone with a plan."""
    found: dict[str, Case] = {}
    for name, kind in contracts().items():
        if usable := {"llama", "bert"} & set(kind.backbones):
            backbone = max(usable)
            found[name] = (Noted, backbone, without_dropout(kind, "eval"), split if backbone == "llama" else split_bert)
    return found


METHODS = of_the_contract()


def descend(folder: Path, name: str, strategy: Any, ckpt_path: Path | None = None, epochs: int = 1) -> Noted:
    """Fit two batches an epoch, the same on every rank."""
    module_class, kind, method, _ = (CASES | METHODS)[name]
    torch.manual_seed(3)
    module = module_class(kind)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(
        folder, copy.deepcopy(method), saved, devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy,
        max_epochs=epochs, gradient_clip_val=CLIP, use_distributed_sampler=False,
    )  # fmt: skip
    fit.fit(module, loader(kind, 8), ckpt_path=ckpt_path)
    return module


def run(folder: Path, name: str, rank: int) -> None:
    """Keep what a fit has computed, and of two whether one of them may be interrupted."""
    module = descend(folder / name, name, (CASES | METHODS)[name][3]())
    torch.save((module.losses, module.gradients, delta_of(module)), folder / name / f"{rank}.pt")
    if name in RESUMED:
        straight = descend(folder / f"{name}, 2 epochs", name, CASES[name][3](), epochs=2)
        first = folder / f"{name}, 2 epochs" / "epoch=0.ckpt"
        again = descend(folder / f"{name}, resumed", name, CASES[name][3](), first, epochs=2)
        torch.save([delta_of(straight), delta_of(again)], folder / name / f"resumed.{rank}.pt")


def delta_of(module: Noted) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in collect(module).items()}


def refuse(folder: Path, name: str, _: int) -> None:
    """Write down the sentence with which a fit is refused."""
    kind, method, plan, _ = REFUSED[name]
    try:
        fit = trainer(folder, copy.deepcopy(method), devices=2, strategy=split(tensor_parallel_plan=plan or "auto"))
        fit.fit(Noted(kind), loader(kind, 8))
    except TuningError as error:
        (folder / f"{name}.txt").write_text(str(error))


def main(folder: Path, rank: int, names: list[str]) -> None:
    """Run the cases of these names in one process group."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    Meta.folder = folder / "llama"
    if rank == 0:
        tiny("llama").save_pretrained(Meta.folder)
    torch.distributed.barrier()
    for name in names:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            (refuse if name in REFUSED else run)(folder, name, rank)
        except TuningError as error:
            (folder / f"{name}.{rank}.refused").write_text(str(error))
        except Exception:  # the other rank has failed alike
            (folder / f"{name}.{rank}.failed").write_text(traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2:] or [*CASES, *METHODS, *REFUSED])
