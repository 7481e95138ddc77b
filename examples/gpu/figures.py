"""Rows 7 to 13: times and memory, beside the frozen model and HF PEFT."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import lightning_peft as lp
from gpu.fits import Module, fit, rows_of
from gpu.models import Case, Line, Setup, floor, measure, tuned

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


def _measured(
    setup: Setup,
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module], nn.Module | None],
    batch: dict[str, torch.Tensor],
    steps: int,
) -> Line:
    """Measure a model that is built and tuned here, so that nothing of it is left afterwards."""
    torch.manual_seed(0)
    model = make(build())
    return Line("left out", note="peft is not installed") if model is None else measure(setup, model, batch, steps)


def short_texts(setup: Setup) -> Iterator[Case]:
    """Llama of 1 B with grouped keys, 512 tokens, bf16, by turns; ours and PEFT have the same losses."""
    batch, losses = setup.texts(4, 512, 100 if setup.tiny else 32000), {}

    def lora(case: str, make: Callable[[nn.Module], nn.Module | None]) -> Line:
        line = _measured(setup, partial(setup.llama, "1b"), lambda model: _same_start(make(model)), batch, 8)
        losses[case] = line.note
        return line

    def compared() -> Line:
        if not losses["theirs"].startswith("loss"):
            return Line("left out", note=losses["theirs"])
        one, other = ([float(x) for x in losses[case].split()[1::2]] for case in ("ours", "theirs"))
        apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
        return Line("held" if apart < 0.02 else "FAILED", note=f"{apart:.1e} apart in the first or last loss")

    for case, make in (("floor", floor), ("LoRA", ours), ("floor again", floor), ("LoRA of PEFT", theirs)):
        if make is floor:
            yield f"1 B, T = 512, {case}", partial(_measured, setup, partial(setup.llama, "1b"), make, batch, 8)
        else:
            yield f"1 B, T = 512, {case}", partial(lora, "ours" if make is ours else "theirs", make)
    yield "1 B, T = 512, losses of both", compared
    for case, method in _prompts().items():
        how = partial(tuned, method=method)
        yield f"1 B, T = 512, {case}", partial(_measured, setup, partial(setup.llama, "1b"), how, batch, 8)


def _same_start(model: nn.Module | None) -> nn.Module | None:
    """Give the factors A the same values whatever made them; the factors B are zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters() if model is not None else ():
        if parameter.requires_grad and bool(parameter.any()):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model


def _prompts() -> dict[str, Any]:
    return {
        "PromptTuning": lp.PromptTuning(num_virtual_tokens=20, init="random_uniform"),
        "PrefixTuning": lp.PrefixTuning(num_virtual_tokens=20, mid_dim=None),
    }


def long_texts(setup: Setup) -> Iterator[Case]:
    """The same at 8,192 tokens, one row: the methods that lengthen what attention sees, too."""
    batch = setup.texts(1, 8192, 100 if setup.tiny else 32000)
    cases: dict[str, Any] = {"floor": floor, "LoRA": ours, "LoRA of PEFT": theirs}
    cases |= {case: partial(tuned, method=method) for case, method in _prompts().items()}
    for case, make in cases.items():
        yield f"1 B, T = 8,192, {case}", partial(_measured, setup, partial(setup.llama, "1b"), make, batch, 4)


def large_model(setup: Setup) -> Iterator[Case]:
    """Llama of 7 B in bf16, without and with checkpointing."""
    batch = setup.texts(1, 512, 100 if setup.tiny else 32000)
    cases: dict[str, Any] = {"floor": floor, "LoRA": ours, "DoRA": partial(ours, use_dora=True), "LoRA of PEFT": theirs}

    def checkpointed() -> nn.Module:
        model = setup.llama("7b")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return model

    builds: dict[str, Callable[[], nn.Module]] = {"T = 512": partial(setup.llama, "7b"), "checkpointed": checkpointed}
    for how, build in builds.items():
        for case, make in cases.items():
            yield f"7 B, {how}, {case}", partial(_measured, setup, build, make, batch, 4)


def compiled(setup: Setup) -> Iterator[Case]:
    """Four layers, compiled by inductor, and as a CUDA graph."""
    batch = setup.texts(4, 512, 100 if setup.tiny else 32000)
    layers = 2 if setup.tiny else 4

    def compiles(make: Callable[[nn.Module], nn.Module | None], mode: str | None) -> Callable[[nn.Module], Any]:
        def done(model: nn.Module) -> nn.Module | None:
            torch._dynamo.reset()
            made = make(model)
            if made is not None:
                made.compile(**({"backend": "eager"} if setup.tiny else {"mode": mode}))
            return made

        return done

    prompt = partial(tuned, method=_prompts()["PrefixTuning"])
    for case, make, mode in (
        ("compiled, LoRA", ours, None),
        ("compiled, LoRA of PEFT", theirs, None),
        ("reduce-overhead, LoRA", ours, "reduce-overhead"),
        ("reduce-overhead, PrefixTuning", prompt, "reduce-overhead"),
    ):
        build = partial(setup.llama, "1b", num_hidden_layers=layers)
        yield case, partial(_measured, setup, build, compiles(make, mode), batch, 8)


def strategies(setup: Setup) -> Iterator[Case]:
    """FSDP2 and DDP in a world of one."""
    backend = None if setup.gpu else "gloo"
    made: dict[str, Callable[[], Any]] = {
        "FSDP2": lambda: lp.FullyShard(process_group_backend=backend),
        "DDP": lambda: "ddp",
    }
    for case, make in made.items():
        yield case, partial(_strategy, setup, make)


def _strategy(setup: Setup, make: Callable[[], Any]) -> Line:
    os.environ.setdefault("MASTER_PORT", "29571")
    torch.manual_seed(0)
    module = Module(Setup(True, setup.until).llama("small", torch.float32))
    try:
        rows = rows_of(setup.texts(4, 12), 12)
        done = fit(setup, module, rows, lp.LoRA(r=4), strategy=make(), max_steps=3)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return Line("held" if done.global_step == 3 else "FAILED")


def experts(setup: Setup) -> Iterator[Case]:
    """A mixture of experts of four layers: LoRA on its attention, and on its experts too."""
    batch = setup.texts(1, 512)

    def measured(targets: list[str]) -> Line:
        own = 0.0

        def make(model: nn.Module) -> nn.Module:
            nonlocal own
            own = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name) / 2**20
            return tuned(model, lp.LoRA(r=8, target_modules=targets))

        line = _measured(setup, partial(setup.moe, 4), make, batch, 3)
        line.note += f", experts are {own:,.0f} MiB"
        return line

    for case, targets in (("attention", TARGETS), ("experts", ["gate_up_proj", "down_proj"])):
        yield f"experts, LoRA on {case}", partial(measured, targets)


def images(setup: Setup) -> Iterator[Case]:
    """VPT on ViT-B/16 and CoOp on CLIP's."""
    size = 16 if setup.tiny else 224
    pixels = torch.randn(8, 3, size, size, device=setup.device)
    batch = {"pixel_values": pixels, "labels": torch.arange(8, device=setup.device) % 2}
    cases: dict[str, Any] = {
        "ViT-B, VPT": (setup.vit, lp.VPT(num_virtual_tokens=10)),
        "CLIP, CoOp": (setup.clip, lp.CoOp(num_virtual_tokens=4)),
    }
    for case, (build, method) in cases.items():
        how = partial(tuned, method=method)
        yield case, partial(_measured, setup, partial(build, large=True), how, batch, 8)
