"""Rows 1 to 6: what must hold."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import lightning_peft as lp
from gpu.models import Line, Setup, close, tuned

R: dict[str, Any] = {"init": "random_uniform"}
METHODS: dict[str, tuple[str, Any]] = {
    "LoRA": ("llama", lp.LoRA(r=4)),
    "LoRA, DoRA": ("llama", lp.LoRA(r=4, use_dora=True, dropout=0.1)),
    "IA3": ("llama", lp.IA3()),
    "PromptTuning": ("llama", lp.PromptTuning(num_virtual_tokens=4, **R)),
    "PrefixTuning": ("llama", lp.PrefixTuning(num_virtual_tokens=4, mid_dim=8)),
    "PromptEnsemble": ("llama", lp.PromptEnsemble(num_prompts=2, num_virtual_tokens=4, **R)),
    "PTuning": ("bert", lp.PTuning(num_virtual_tokens=4)),
    "PTuningV2": ("bert", lp.PTuningV2(num_virtual_tokens=4)),
    "Adapter": ("bert", lp.Adapter(bottleneck=4)),
    "BitFit": ("bert", lp.BitFit()),
    "DiffPruning": ("bert", lp.DiffPruning()),
    "LadderSideTuning": ("bert", lp.LadderSideTuning()),
    "SideTuning": ("bert", lp.SideTuning()),
    "LinearProbe": ("bert", lp.LinearProbe()),
    "MLPHead": ("bert", lp.MLPHead()),
    "PartialK": ("bert", lp.PartialK(k=1)),
    "FullFineTuning": ("bert", lp.FullFineTuning()),
    "VPT": ("vit", lp.VPT(num_virtual_tokens=4)),
    "L2P": ("vit", lp.L2P()),
    "TinyTL": ("resnet", lp.TinyTL()),
    "CoOp": ("clip", lp.CoOp(num_virtual_tokens=4)),
    "DAPL": ("clip", lp.DAPL(num_virtual_tokens=3, num_domain_tokens=2)),
    "CoCoOp": ("clip", lp.CoCoOp(num_virtual_tokens=4, init=None)),
    "MaPLe": ("clip", lp.MaPLe(init=None, depth=2)),
    "IVLP": ("clip", lp.IVLP(init=None, num_virtual_tokens=3, num_image_tokens=5, depth=2)),
}
"""Each method with the model that it tunes here. WARP needs a tokenizer."""
PRECISIONS = ("32-true", "bf16-true", "16-mixed")


def batch_of(setup: Setup, kind: str) -> dict[str, Tensor]:
    """Return four rows for a small model."""
    if kind == "llama":
        return setup.texts(4, 12)
    labels = torch.tensor([0, 1, 1, 0], device=setup.device)
    if kind == "bert":
        return setup.texts(4, 12) | {"labels": labels}
    return {"pixel_values": torch.randn(4, 3, 16, 16, device=setup.device), "labels": labels}


def model_of(setup: Setup, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small model."""
    torch.manual_seed(0)
    if kind == "llama":
        return Setup(True, setup.until).llama("small", dtype)
    return getattr(setup, kind)(dtype)


class Module(L.LightningModule):
    """A model that reads batches by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows_of(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return the rows of a batch, one by one, repeated."""
    size = len(next(iter(batch.values())))
    return [{name: value[i % size].cpu() for name, value in batch.items()} for i in range(count)]


def fit(setup: Setup, module: L.LightningModule, rows: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    """Train on batches of four rows."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    resume = options.pop("ckpt_path", None)
    options = quiet | {"accelerator": setup.device, "devices": 1, "enable_checkpointing": False} | options
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(rows, 4), ckpt_path=resume)
    return trainer


def one_step(setup: Setup) -> Iterator[Line]:
    """The package is imported, and LoRA learns something."""
    model = tuned(model_of(setup, "llama"), lp.LoRA(r=4))
    batch = setup.texts(4, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    yield Line("LoRA, three steps", "held" if losses[2] < losses[0] else "FAILED", note=f"{losses[0]} to {losses[2]}")


def every_method_in_every_precision(setup: Setup) -> Iterator[Line]:
    """Losses are finite, what is trained is fp32 and on the device, and the device is the run's."""
    for name, (kind, method) in METHODS.items():
        odd = []
        for precision in PRECISIONS if setup.gpu else PRECISIONS[:2]:
            module = Module(model_of(setup, kind))
            done = fit(setup, module, rows_of(batch_of(setup, kind), 8), copy.deepcopy(method), precision=precision,
                       max_steps=2)  # fmt: skip
            trained = [p for p in module.parameters() if p.requires_grad]
            fine = bool(trained) and all(bool(p.isfinite().all()) for p in trained)
            fine &= not method.keep_fp32 or all(p.dtype is torch.float32 for p in trained)
            odd += [] if fine and done.global_step == 2 else [precision]
        yield Line(name, "FAILED" if odd else "held", note=", ".join(odd) or "three precisions" * setup.gpu)


def start_remove_merge(setup: Setup) -> Iterator[Line]:
    """LoRA starts as the frozen model, leaves it behind, and is the same when merged, whatever TF32 does."""
    batch = setup.texts(4, 12)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        model = model_of(setup, "llama").eval()
        method = lp.LoRA(r=4)
        with torch.no_grad():
            bare = model(**batch).logits
            method.apply(model)
            yield close(f"start is frozen, {precision}", model(**batch).logits, bare, 0.0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            live = model(**batch).logits
            merged = lp.merge(copy.deepcopy(model))(**batch).logits
            yield close(f"merged is live, {precision}", merged, live, 1e-4 if precision == "highest" else 1e-2)
            method.remove(model)
            yield close(f"removed is frozen, {precision}", model(**batch).logits, bare, 0.0)
    torch.set_float32_matmul_precision("highest")


def resume(setup: Setup) -> Iterator[Line]:
    """A run that is resumed inside an epoch, with dropout, ends as one that was not stopped."""
    rows = rows_of(batch_of(setup, "bert"), 24)

    def run(folder: Path, path: Path | None, sure: bool) -> dict[str, Tensor]:
        torch.manual_seed(0 if path is None else 9)
        module = Module(setup.bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))
        if path is None:
            torch.save(module.state_dict(), folder / "start.pt")
        module.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        fit(setup, module, rows, lp.LoRA(r=4, dropout=0.1), saving, max_steps=6, ckpt_path=path,
            enable_checkpointing=True, deterministic=sure)  # fmt: skip
        return {name: tensor.cpu() for name, tensor in lp.collect(module).items()}

    for sure in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            straight = run(Path(folder), None, sure)
            resumed = run(Path(folder), Path(folder) / "step=4.ckpt", sure)
        apart = max((straight[name] - resumed[name]).abs().max().item() for name in straight)
        verdict = "held" if apart == 0 or not sure else "FAILED"
        yield Line("resume, " + ("deterministic" if sure else "as by default"), verdict, note=f"{apart:.1e} apart")
    torch.use_deterministic_algorithms(False)


def prefixes(setup: Setup) -> Iterator[Line]:
    """A prompt is the words before the text, and sdpa gives what eager attention gives, by each of its kernels."""
    kernels = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for name, make in (
        ("prefix", lambda: lp.PrefixTuning(num_virtual_tokens=4, mid_dim=None)),
        ("prompt", lambda: lp.PromptTuning(num_virtual_tokens=4, **R)),
    ):
        batch, outputs = setup.texts(2, 16), {}
        dtype = torch.bfloat16 if setup.gpu else torch.float32
        for way in ("eager", *(kernels if setup.gpu else kernels[:1])):
            model = model_of(setup, "llama", dtype).eval()
            model.set_attn_implementation("eager" if way == "eager" else "sdpa")  # type: ignore[operator]
            torch.manual_seed(1)
            method = make()
            method.apply(model)
            try:
                with torch.no_grad(), sdpa_kernel(kernels if way == "eager" else [way]):
                    outputs[str(way)] = model(**batch).logits
            except RuntimeError as error:
                yield Line(f"{name}, {way}", "left out", note=str(error)[:80])
        for way, out in list(outputs.items())[1:]:
            yield close(
                f"{name}, {way.rpartition('.')[2]} is eager", out, outputs["eager"], 3e-2 if setup.gpu else 1e-4
            )
    yield _concatenated(setup)


def _concatenated(setup: Setup) -> Line:
    model, batch = model_of(setup, "llama").eval(), setup.texts(2, 12)
    method = lp.PromptTuning(num_virtual_tokens=4, **R)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    method.apply(model)
    with torch.no_grad():
        rows, ids = method.rows(model), batch["input_ids"]
        ours = model(input_ids=ids).logits
        method.remove(model)
        whole = torch.cat((rows.expand(len(ids), -1, -1), table(ids)), 1)
        return close("prompt is concatenated", ours, model(inputs_embeds=whole).logits[:, 4:], 1e-4)


def synchronizes_nothing(setup: Setup) -> Iterator[Line]:
    """A training step of each method waits for the GPU nowhere."""
    if not setup.gpu:
        yield Line("synchronizes nothing", "left out", note="no GPU")
        return
    for name, (kind, method) in METHODS.items():
        model, batch = model_of(setup, kind), batch_of(setup, kind)
        batch.pop("attention_mask", None)  # transformers asks whether it has padding
        own = copy.deepcopy(method)
        own.apply(model.train())
        given = dict(own.prepare(batch))
        given.pop("attention_mask", None)
        model(**given).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**given).loss.backward()
            yield Line(name)
        except RuntimeError as error:
            yield Line(name, "FAILED", note=str(error)[:200])
        finally:
            torch.cuda.set_sync_debug_mode("default")
