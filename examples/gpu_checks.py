"""Measure on a GPU: precisions, strategies, compile, and LoRA on Llama shapes against Hugging Face PEFT, in one run.

    python examples/gpu_checks.py [--sizes 1b 7b] [--steps 20] > figures.json

Weights are random. Each line is a JSON object: what ran, milliseconds a step, peak memory, and the versions.
"""

import argparse
import gc
import json
import sys
import time
from typing import Any

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_peft import FullyShard, LoRA, Throughput
from lightning_peft.training.strategy import wrap_policy

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TARGETS = ["q_proj", "v_proj"]


class Tuned(L.LightningModule):
    """A language model of random weights that reads random tokens."""

    def __init__(self, size: str, dtype: torch.dtype, compiled: bool, peft: bool) -> None:
        super().__init__()
        config = transformers.LlamaConfig(**SHAPES[size], vocab_size=32000, bos_token_id=1, eos_token_id=2)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
        self.compiled = compiled

    def on_fit_start(self) -> None:
        if self.compiled:
            self.model.compile()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Clock(L.Callback):
    """Times the steps after the first quarter."""

    def __init__(self, steps: int) -> None:
        self.warm, self.times = steps // 4, []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def milliseconds(self) -> float:
        times = self.times[self.warm :]
        return 1000 * (times[-1] - times[0]) / (len(times) - 1)


def run(name: str, size: str, options: argparse.Namespace, precision: str, strategy: Any = "auto", **how: Any) -> None:
    """Run one case and print its figures; one that fails prints why."""
    gc.collect()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"case": name, "size": size, "precision": precision, "batch": options.batch}
    row |= {"tokens": options.tokens, "steps": options.steps, "command": " ".join(sys.argv)}
    row |= {p.__name__: p.__version__ for p in (torch, L, transformers)}
    row["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    try:
        dtype = torch.float32 if precision in ("32-true", "16-mixed", "bf16-mixed") else torch.bfloat16
        peft = how.get("peft", False)
        module, clock = Tuned(size, dtype, how.get("compiled", False), peft), Clock(options.steps)
        rows = torch.randint(3, 32000, (options.batch * options.steps, options.tokens))
        callbacks = (
            [clock, Throughput()] if peft else [LoRA(r=8, alpha=16.0, target_modules=TARGETS), clock, Throughput()]
        )
        fit = L.Trainer(
            accelerator="auto", devices=1, precision=precision, strategy=strategy, max_epochs=1, logger=False,
            callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        fit.fit(module, DataLoader(rows, options.batch))
        row["ms_a_step"] = round(clock.milliseconds(), 2)
        row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None
        row["trained"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["1b", "7b"], choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    for size in options.sizes:
        for precision in ("bf16-true", "bf16-mixed", *(["16-mixed"] if gpu else [])):
            run("ours", size, options, precision)
        run("HF PEFT", size, options, "bf16-true", peft=True)
        run("ours, compiled", size, options, "bf16-true", compiled=True)
        run("ours, FSDP2", size, options, "bf16-true", FullyShard(process_group_backend=None if gpu else "gloo"))
        if gpu:
            from lightning.pytorch.strategies import FSDPStrategy

            run("ours, FSDP", size, options, "bf16-true", FSDPStrategy(auto_wrap_policy=wrap_policy))


if __name__ == "__main__":
    main()
