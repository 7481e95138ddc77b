"""Measure on a GPU: precisions, strategies, compile, and LoRA on Llama shapes against Hugging Face PEFT, in one run.

    python examples/gpu_checks.py [--sizes 1b 7b] [--steps 20] > figures.json

Weights are random. Each line is a JSON object: what ran, milliseconds a step, peak memory, and the versions. What needs
a library that is not installed, or a GPU where there is none, is left out and named in a line of its own. The exit code
is 1 if a case failed. ``--sizes tiny --steps 4 --batch 2 --tokens 32`` takes a minute on a CPU.
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader

from lightning_peft import FullyShard, LoRA, Throughput
from lightning_peft.training.shard_units import wrap_policy

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TARGETS = ["q_proj", "v_proj"]
BF16, FP16 = torch.bfloat16, torch.float16


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
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

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


def run(
    name: str,
    size: str,
    options: argparse.Namespace,
    precision: str,
    strategy: Any = "auto",
    compiled: bool = False,
    peft: bool = False,
    plugins: Any = None,
) -> bool:
    """Run one case, print its figures, and return whether it went well; one that fails prints why."""
    gc.collect()
    torch._dynamo.reset()
    torch.manual_seed(0)
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
        module, clock = Tuned(size, dtype, compiled, peft), Clock(options.steps)
        rows = torch.randint(3, 32000, (options.batch * options.steps, options.tokens))
        methods = [] if peft else [LoRA(r=8, alpha=16.0, target_modules=TARGETS)]
        fit = L.Trainer(
            accelerator="auto", devices=1, precision=None if plugins else precision, strategy=strategy, plugins=plugins,
            callbacks=[*methods, clock, Throughput()], max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        fit.fit(module, DataLoader(rows, options.batch))
        trained = [p for p in module.parameters() if p.requires_grad]
        row["ms_a_step"] = round(clock.milliseconds(), 2)
        row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None
        row["trained"] = sum(p.numel() for p in trained)
        row["trained_in"] = sorted({str(p.dtype).removeprefix("torch.") for p in trained})
        row["last_loss"] = round(float(fit.callback_metrics["loss"]), 4)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(row), flush=True)
    return "error" not in row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["1b", "7b"], choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    gpu, went = torch.cuda.is_available(), []
    backend = None if gpu else "gloo"
    # What is needed beside torch -> how the case runs there; strategies and plugins are built where they can be.
    special: dict[str, tuple[tuple[str, ...], bool, Any]] = {
        "ours, FSDP": ((), True, lambda: ("bf16-true", {"strategy": FSDPStrategy(auto_wrap_policy=wrap_policy)})),
        "ours, transformer-engine": (("transformer_engine",), True, lambda: ("transformer-engine", {})),
        "ours, 4 bits": (("bitsandbytes",), True, lambda: ("nf4", {"plugins": BitsandbytesPrecision("nf4", BF16)})),
        "ours, 8 bits": (("bitsandbytes",), True, lambda: ("int8", {"plugins": BitsandbytesPrecision("int8", FP16)})),
        "ours, ZeRO-2": (("deepspeed",), True, lambda: ("bf16-true", {"strategy": DeepSpeedStrategy(stage=2)})),
        "ours, ZeRO-3": (("deepspeed",), True, lambda: ("bf16-true", {"strategy": DeepSpeedStrategy(stage=3)})),
        "HF PEFT": (("peft",), False, lambda: ("bf16-true", {"peft": True})),
        "HF PEFT, compiled": (("peft",), False, lambda: ("bf16-true", {"peft": True, "compiled": True})),
    }
    for size in options.sizes:
        went += [run("ours", size, options, p) for p in ("32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed")]
        went.append(run("ours, compiled", size, options, "bf16-true", compiled=True))
        for name, compiled in (("ours, FSDP2", False), ("ours, FSDP2, compiled", True)):
            went.append(run(name, size, options, "bf16-true", FullyShard(process_group_backend=backend), compiled))
        for name, (libraries, needs_gpu, build) in special.items():
            absent = [library for library in libraries if importlib.util.find_spec(library) is None]
            if absent or (needs_gpu and not gpu):
                print(json.dumps({"case": name, "size": size, "left_out": f"no {(absent or ['GPU'])[0]}"}), flush=True)
                continue
            precision, how = build()
            went.append(run(name, size, options, precision, **how))
    sys.exit(not all(went))


if __name__ == "__main__":
    main()
