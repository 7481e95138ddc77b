"""The memory that `lightning-peft check` predicts, against what torch's allocator says of the same step."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import BitFit, FullFineTuning, LinearProbe, LoRA, Method, PromptTuning
from lightning_peft.reports.live_memory import LiveBytes
from lightning_peft.reports.memory import Memory, of_rank
from lightning_peft.reports.preflight import Preflight
from lightning_peft.training.strategy import FullyShard

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable", "ignore:.*use_cache=True")
WORDS, LENGTH = 500, 48
WIDE: dict[str, int] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=WORDS, attention_probs_dropout_prob=0.0, **WIDE)
        )
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(image_size=48, patch_size=8, **WIDE))
    ids: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=WORDS, n_positions=96, **ids))


def row(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 48, 48), "labels": torch.tensor(1)}
    ids = torch.randint(5, WORDS, (LENGTH,))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids if kind == "gpt2" else torch.tensor(1),
    }


class Module(L.LightningModule):
    def __init__(self, kind: str, checkpointing: bool = False) -> None:
        super().__init__()
        self.model = build(kind).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-3)


def checked(kind: str, method: Method, size: int, checkpointing: bool = False, **asked: Any) -> Preflight:
    """Return a preflight that has run, on batches of ``size`` rows."""
    run = Preflight.of(accelerator="cpu", callbacks=[method], **asked)
    found = run.findings(Module(kind, checkpointing), DataLoader([row(kind) for _ in range(4 * size)], size))
    assert all(finding.passes for finding in found), found
    return run


def allocated(kind: str, method: Method, size: int, checkpointing: bool, folder: Path) -> int:
    """Return the peak of the bytes of torch's allocator in two steps of a loop without Lightning."""
    module = Module(kind, checkpointing)
    method.apply(module)
    optimizer = module.configure_optimizers()

    def step() -> None:
        loss = module.training_step(method.prepare(batch), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    batch = torch.utils.data.default_collate([row(kind) for _ in range(size)])
    there = [*module.parameters(), *module.buffers(), *batch.values()]
    now = peak = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}.values())
    # Both steps: of what was allocated before it began, a profile does not say when it is freed.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        step()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


CASES = [
    ("bert", LoRA(backbone_mode="train")),
    ("gpt2", PromptTuning(init="random_uniform", backbone_mode="train")),
    ("vit", LinearProbe(backbone_mode="train")),
    ("bert", FullFineTuning()),
    ("gpt2", FullFineTuning()),
]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "method"), CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_peak_is_that_of_the_allocator(
    kind: str, method: Method, checkpointing: bool, size: int, tmp_path: Path
) -> None:
    """The prediction is drawn on steps of 1 to 3 rows; nothing of the measurement is known to it."""
    predicted = checked(kind, method, size, checkpointing).probe.predicted()
    measured = allocated(kind, method, size, checkpointing, tmp_path)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_rank_of_four_holds_what_torch_shards() -> None:
    """Three other ranks that answer nothing are enough to shard: no collective is waited for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lightning_peft.training.shard_units import units

    module = Module("bert")
    LoRA(r=3, target_modules="all-linear", exclude=".*pooler.*").apply(module)
    sizes = [(p.nbytes, p.requires_grad) for p in module.parameters()]
    whole = Memory(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), 0)
    predicted = of_rank(module, whole, FullyShard(), 4)
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        for unit in units(module):
            fully_shard(unit, mesh=mesh)
        local = {p: p.to_local().nbytes for p in module.parameters()}
        assert predicted.weights == sum(local.values())
        assert predicted.gradients == pytest.approx(sum(n for p, n in local.items() if p.requires_grad), abs=1)
    finally:
        torch.distributed.destroy_process_group()
    assert predicted.weights < whole.weights / 3


def test_what_each_strategy_holds() -> None:
    module, one = Module("bert"), Memory(800, 80, 160, 0, 50)
    module.requires_grad_(False)
    assert of_rank(module, one, "auto", 1) == one
    assert of_rank(module, one, "ddp", 4) == one._replace(communication=80)
    assert of_rank(module, one, DDPStrategy(gradient_as_bucket_view=True), 4) == one
    assert of_rank(module, one, "deepspeed_stage_2", 4) == Memory(800, 20, 40, 0, 50)
    assert of_rank(module, one, "deepspeed_stage_3", 4) == Memory(200, 20, 40, 0, 50)
    offloaded = of_rank(module, one, FullyShard(cpu_offload=True), 4)
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)


def test_copies_kept_for_undoing_count() -> None:
    plain, kept = (checked("bert", method, 8).probe.memory for method in (FullFineTuning(), BitFit()))
    assert kept.weights - plain.weights == kept.gradients


def test_storages_count_once_and_end() -> None:
    weight = torch.ones(256)
    with LiveBytes([weight, weight[:10]]) as live:
        twice = weight * 2
        view = twice[:5]
        del twice
        third = weight * 3
        del view
        third = third + 1
    assert live.start == 1024
    assert live.series == [1024, 2048, 2048, 3072, 3072]


class Tuples(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss


class Large(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["labels"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


def test_batches_that_differ_from_the_rule() -> None:
    """Few rows, many to a step, no mapping, or more than fit."""
    whole = checked("bert", LoRA(), 8)
    assert set(whole.probe.series) == {2, 3, 8}
    accumulated = checked("bert", LoRA(), 8, accumulate_grad_batches=3)
    assert accumulated.probe.memory.total == pytest.approx(whole.probe.memory.total, rel=0.02)
    assert set(checked("bert", LoRA(), 1).probe.series) == {1}
    tuples = Preflight.of(accelerator="cpu", callbacks=[LoRA()])
    rows = DataLoader([tuple(row("bert").values()) for _ in range(32)], 8)
    assert all(finding.passes for finding in tuples.findings(Tuples("bert"), rows))
    assert tuples.probe.memory == whole.probe.memory
    large = Preflight.of(accelerator="cpu", callbacks=[LoRA()])
    found = large.findings(Large("bert"), DataLoader([row("bert") for _ in range(32)], 8))
    failed = next(finding for finding in found if not finding.passes)
    assert failed.seen == "OutOfMemoryError: CUDA out of memory."
    assert large.probe.memory == whole.probe.memory
    assert any(finding.seen.startswith("8 rows:") and "predicted" in finding.seen for finding in found)
