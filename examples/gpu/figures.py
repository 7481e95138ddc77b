"""Rows 7 to 13: times and memory, beside the frozen model and HF PEFT."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import lightning_peft as lp
from gpu.checks import Module, fit, rows_of
from gpu.models import Line, Setup, floor, measure, tuned

TARGETS = ["q_proj", "v_proj"]


def theirs(model: nn.Module, **options: Any) -> nn.Module | None:
    """Return the model with LoRA of PEFT, or None: it is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, **options)).train()


def ours(model: nn.Module, **options: Any) -> nn.Module:
    """Return the model with our LoRA of the same shape."""
    return tuned(model, lp.LoRA(r=8, alpha=16.0, target_modules=TARGETS, **options))


def _measured(setup: Setup, case: str, model: nn.Module | None, batch: dict[str, torch.Tensor], steps: int) -> Line:
    if model is None:
        return Line(case, "left out", note="peft is not installed")
    line = measure(setup, case, model, batch, steps)
    del model
    gc.collect()
    if setup.gpu:
        torch.cuda.empty_cache()
    return line


def short_texts(setup: Setup) -> Iterator[Line]:
    """Llama of 1 B with grouped keys, 512 tokens, bf16, by turns; ours and PEFT start from one loss."""
    words = 100 if setup.tiny else 32000
    batch = setup.texts(4, 512, words)
    for case, make in (("floor", floor), ("LoRA", ours), ("floor again", floor), ("LoRA of PEFT", theirs)):
        torch.manual_seed(0)
        yield _measured(setup, f"1 B, T = 512, {case}", make(setup.llama("1b")), batch, 8)


def long_texts(setup: Setup) -> Iterator[Line]:
    """The same at 8,192 tokens, one row: the methods that lengthen what attention sees, too."""
    batch = setup.texts(1, 8192, 100 if setup.tiny else 32000)
    methods = {
        "LoRA": lp.LoRA(r=8, target_modules=TARGETS),
        "PromptTuning": lp.PromptTuning(num_virtual_tokens=20, init="random_uniform"),
        "PrefixTuning": lp.PrefixTuning(num_virtual_tokens=20, mid_dim=None),
    }
    yield _measured(setup, "1 B, T = 8,192, floor", floor(setup.llama("1b")), batch, 4)
    for case, method in methods.items():
        yield _measured(setup, f"1 B, T = 8,192, {case}", tuned(setup.llama("1b"), method), batch, 4)


def large_model(setup: Setup) -> Iterator[Line]:
    """Llama of 7 B in bf16, without and with checkpointing."""
    batch = setup.texts(1, 512, 100 if setup.tiny else 32000)
    cases: dict[str, Any] = {
        "floor": floor,
        "LoRA": ours,
        "DoRA": lambda model: ours(model, use_dora=True),
        "LoRA of PEFT": theirs,
    }
    for case, make in cases.items():
        yield _measured(setup, f"7 B, T = 512, {case}", make(setup.llama("7b")), batch, 4)
    for case, make in cases.items():
        model = setup.llama("7b")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        yield _measured(setup, f"7 B, checkpointed, {case}", make(model), batch, 3)


def compiled(setup: Setup) -> Iterator[Line]:
    """Compiled by inductor, and four layers as a CUDA graph."""
    words = 100 if setup.tiny else 32000
    how: dict[str, Any] = {"backend": "eager"} if setup.tiny else {}
    batch = setup.texts(4, 512, words)
    for case, make in (("LoRA", ours), ("LoRA of PEFT", theirs)):
        torch._dynamo.reset()
        model = make(setup.llama("1b", num_hidden_layers=2 if setup.tiny else 8))
        if model is not None:
            model.compile(**how)
        yield _measured(setup, f"compiled, {case}", model, batch, 8)
    torch._dynamo.reset()
    model = ours(setup.llama("1b", num_hidden_layers=2 if setup.tiny else 4))
    model.compile(**(how or {"mode": "reduce-overhead"}))
    yield _measured(setup, "reduce-overhead, LoRA", model, batch, 8)


def strategies(setup: Setup) -> Iterator[Line]:
    """FSDP2 and DDP in a world of one."""
    os.environ.setdefault("MASTER_PORT", "29571")
    backend = None if setup.gpu else "gloo"
    for case, strategy in (("FSDP2", lp.FullyShard(process_group_backend=backend)), ("DDP", "ddp")):
        torch.manual_seed(0)
        module = Module(Setup(True, setup.until).llama("small", torch.float32))
        done = fit(setup, module, rows_of(setup.texts(4, 12), 12), lp.LoRA(r=4), strategy=strategy, max_steps=3)
        yield Line(case, "held" if done.global_step == 3 else "FAILED")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def experts(setup: Setup) -> Iterator[Line]:
    """A mixture of experts of four layers: LoRA on its attention, and on its experts too."""
    batch = setup.texts(1, 512)
    for case, targets in (("attention", TARGETS), ("experts", ["gate_up_proj", "down_proj"])):
        model = tuned(setup.moe(4), lp.LoRA(r=8, target_modules=targets))
        own = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name) / 2**20
        line = _measured(setup, f"experts, LoRA on {case}", model, batch, 3)
        line.note += f", experts are {own:,.0f} MiB"
        yield line


def images(setup: Setup) -> Iterator[Line]:
    """VPT on ViT-B/16 and CoOp on CLIP's."""
    size = 16 if setup.tiny else 224
    pixels = torch.randn(8, 3, size, size, device=setup.device)
    batch = {"pixel_values": pixels, "labels": torch.arange(8, device=setup.device) % 2}
    yield _measured(setup, "ViT-B, VPT", tuned(setup.vit(large=True), lp.VPT(num_virtual_tokens=10)), batch, 8)
    yield _measured(setup, "CLIP, CoOp", tuned(setup.clip(large=True), lp.CoOp(num_virtual_tokens=4)), batch, 8)
