"""Rows 1 to 6: what must hold."""

import copy
import importlib.util
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_peft as lp
from gpu.fits import Module, Waits, fit, rows_of
from gpu.models import Case, Line, Setup, close, tuned
from lightning_peft.prompts.prefix import Prefix
from tests.models import batch as batch_of
from tests.models import tiny

PRECISIONS = ("32-true", "bf16-true", "16-mixed")
KERNELS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def small(setup: Setup, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small Llama."""
    torch.manual_seed(0)
    return Setup(True, setup.until).llama("small", dtype)


def examples() -> dict[str, tuple[str, Any]]:
    """Return each class of the contract of methods: its method, and a kind of small model that this tunes."""
    from tests.contracts import contracts  # which needs what the tests need, as pytest; the other rows do not

    return {name: (kind.backbones[0], kind.method) for name, kind in contracts().items()}


def one_step(setup: Setup) -> Iterator[Case]:
    """The package is imported, and LoRA learns something."""

    def learns() -> Line:
        model = tuned(small(setup), lp.LoRA(r=4))
        batch = setup.texts(4, 12)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return Line("held" if losses[2] < losses[0] else "FAILED", note=f"{losses[0]} to {losses[2]}")

    yield "LoRA, three steps", learns


def every_method_in_every_precision(setup: Setup) -> Iterator[Case]:
    """Losses are finite, what is trained is fp32, and all of it is on the run's device."""
    for name, (kind, method) in examples().items():
        yield name, partial(_in_every_precision, setup, kind, method)


def _in_every_precision(setup: Setup, kind: str, method: Any) -> Line:
    odd = []
    for precision in PRECISIONS if setup.gpu else PRECISIONS[:2]:
        module = Module(tiny(kind).to(setup.device))
        try:
            rows = rows_of(batch_of(kind), 8)
            fit(setup, module, rows, copy.deepcopy(method), precision=precision, max_epochs=1)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            odd.append(f"{precision}: {type(error).__name__} {error}"[:120])
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        fine = bool(trained) and all(bool(t.isfinite().all()) for t in (*trained, *module.losses))
        fine &= not method.keep_fp32 or all(p.dtype is torch.float32 for p in trained)
        if not fine or len(module.losses) != 2 or module.devices != {setup.device}:
            odd.append(f"{precision}: losses {[round(x.item(), 3) for x in module.losses]} on {module.devices}")
    return Line("FAILED" if odd else "held", note=", ".join(odd) or ", ".join(PRECISIONS[: 2 + setup.gpu]))


def start_remove_merge(setup: Setup) -> Iterator[Case]:
    """LoRA starts as the frozen model, leaves it behind, and is the same when merged, whatever TF32 does."""
    for precision in ("highest", "high"):
        for use_dora in (False, True):
            case = f"{'DoRA' if use_dora else 'LoRA'}: start and end are frozen, merged is live, {precision}"
            yield case, partial(_start_remove_merge, setup, precision, use_dora)


def _start_remove_merge(setup: Setup, precision: str, use_dora: bool) -> Line:
    torch.set_float32_matmul_precision(precision)
    model, batch = small(setup).eval(), setup.texts(4, 12)
    method = lp.LoRA(r=4, use_dora=use_dora)
    with torch.no_grad():
        bare = model(**batch).logits
        method.apply(model)
        start = model(**batch).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        live = model(**batch).logits
        merged = lp.merge(copy.deepcopy(model))(**batch).logits
        method.remove(model)
        lines = [
            close(merged, live, 1e-4 if precision == "highest" else 1e-2, " merged"),
            close(start, bare, 0.0, " at the start"),
            close(model(**batch).logits, bare, 0.0, " removed"),
        ]
    torch.set_float32_matmul_precision("highest")
    return Line(max((line.verdict for line in lines), key="held FAILED".index), note=", ".join(x.note for x in lines))


def resume(setup: Setup) -> Iterator[Case]:
    """A run that is resumed inside an epoch, with dropout, ends as one that was not stopped."""
    for sure in (True, False):
        yield "resume, " + ("deterministic" if sure else "as by default"), partial(_resumed, setup, sure)


def _resumed(setup: Setup, sure: bool) -> Line:
    rows = rows_of(setup.texts(4, 12) | {"labels": torch.tensor([0, 1, 1, 0])}, 24)

    def run(folder: Path, path: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0 if path is None else 9)
        module = Module(setup.bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))
        if path is None:
            torch.save(module.state_dict(), folder / "start.pt")
        module.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        fit(setup, module, rows, lp.LoRA(r=4, dropout=0.1), saving, max_steps=6, ckpt_path=path,
            enable_checkpointing=True, deterministic=sure)  # fmt: skip
        return {name: tensor.cpu() for name, tensor in lp.collect(module).items()}

    try:
        with tempfile.TemporaryDirectory() as folder:
            straight = run(Path(folder), None)
            resumed = run(Path(folder), Path(folder) / "step=4.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    apart = max((straight[name] - resumed[name]).abs().max().item() for name in straight)
    return Line("held" if apart == 0 or not sure else "FAILED", note=f"{apart:.1e} apart")


def prefixes(setup: Setup) -> Iterator[Case]:
    """A prefix is a cache, a prompt is words before the text, and each attention gives what eager attention gives."""
    made: dict[str, Callable[[], Any]] = {
        "prefix": lambda: lp.PrefixTuning(num_virtual_tokens=4, mid_dim=None),
        "prompt": lambda: lp.PromptTuning(num_virtual_tokens=4, init="random_uniform"),
    }
    for name, make in made.items():
        for kernel in KERNELS if setup.gpu else KERNELS[:1]:
            case = f"{name}, {str(kernel).rpartition('.')[2]} is eager"
            yield case, partial(_as_eager, setup, make, "sdpa", kernel)
        if setup.gpu:
            yield f"{name}, flash_attention_2 is eager", partial(_as_eager, setup, make, "flash_attention_2", None)
    yield "prefix is a cache", partial(_cached, setup)
    yield "prompt is concatenated", partial(_concatenated, setup)


def _as_eager(setup: Setup, make: Callable[[], Any], way: str, kernel: SDPBackend | None) -> Line:
    if way == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return Line("left out", note="flash_attn is not installed")
    batch, outputs = setup.texts(2, 16), []
    for each in ("eager", way):
        model = small(setup, torch.bfloat16 if setup.gpu else torch.float32).eval()
        model.set_attn_implementation(each)  # type: ignore[operator]
        torch.manual_seed(1)
        make().apply(model)
        try:
            with torch.no_grad(), sdpa_kernel(list(KERNELS) if each == "eager" or kernel is None else [kernel]):
                outputs.append(model(**batch).logits)
        except RuntimeError as error:
            if "available kernel" not in str(error):
                raise
            return Line("left out", note=str(error)[:80])
    return close(*outputs, 3e-2 if setup.gpu else 1e-4)


def _cached(setup: Setup) -> Line:
    """A frozen model that is given the prefix as its cache."""
    model, batch = small(setup).eval(), setup.texts(2, 12)
    method = lp.PrefixTuning(num_virtual_tokens=4, mid_dim=None)
    method.apply(model)
    with torch.no_grad():
        ours = model(**batch).logits
        own = [place.graft for place in method.own_grafts(model, Prefix)]
        method.remove(model)
        cache: Any = hf.DynamicCache()
        for i, prefix in enumerate(own):
            cache.update(*(t.expand(len(ours), -1, -1, -1) for t in (prefix.keys, prefix.values)), i)
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        mask = torch.ones(2, 16, dtype=torch.long, device=setup.device)
        frozen = model(input_ids=batch["input_ids"], attention_mask=mask, **{name: cache}).logits
    return close(ours, frozen, 1e-4)


def _concatenated(setup: Setup) -> Line:
    model, batch = small(setup).eval(), setup.texts(2, 12)
    method = lp.PromptTuning(num_virtual_tokens=4, init="random_uniform")
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    method.apply(model)
    with torch.no_grad():
        rows, ids = method.rows(model), batch["input_ids"]
        ours = model(input_ids=ids).logits
        method.remove(model)
        whole = torch.cat((rows.expand(len(ids), -1, -1), table(ids)), 1)
        return close(ours, model(inputs_embeds=whole).logits[:, 4:], 1e-4)


def synchronizes_nothing(setup: Setup) -> Iterator[Case]:
    """A training step of each method waits for the GPU nowhere that one of the frozen model does not."""
    if not setup.gpu:
        yield "synchronizes nothing", lambda: Line("left out", note="no GPU")
        return
    floors: dict[str, set[str]] = {}
    for name, (kind, method) in examples().items():
        yield name, partial(_waits, setup, kind, method, floors)


def _waits(setup: Setup, kind: str, method: Any, floors: dict[str, set[str]]) -> Line:
    if kind not in floors:
        floors[kind] = set(_places(setup, kind))
    found = _places(setup, kind, copy.deepcopy(method))
    own = {place: count for place, count in found.items() if place not in floors[kind]}
    theirs = sum(found.values()) - sum(own.values())
    return Line("FAILED" if own else "held", note=f"{own or 0} in two steps, {theirs} of the frozen model")


def _places(setup: Setup, kind: str, *callbacks: Any) -> dict[str, int]:
    waits = Waits()
    fit(setup, Module(tiny(kind).to(setup.device)), rows_of(batch_of(kind), 12), waits, *callbacks, waits.end,
        max_epochs=1)  # fmt: skip
    return dict(waits.places)
