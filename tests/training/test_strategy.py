"""Sharded strategies in one process: what is gathered, what is planned, what is read, and what is refused."""

import enum
import os
import pickle
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_peft import BitFit, FullyShard, LoRA, PromptTuning, TuningError, collect, load_delta
from lightning_peft.core import anatomy, select, sharded
from lightning_peft.core.delta import metadata
from lightning_peft.core.delta_file import read_checkpoint, read_delta
from lightning_peft.core.graft import grafts
from lightning_peft.training import checks, patches, strategy_files
from lightning_peft.training.shard_units import plan, wrap_policy
from lightning_peft.training.weights import files_of, on_meta
from tests.contract import assert_near, assert_same
from tests.models import meta, tiny
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    "ignore:It is recommended to use `self.log",
    "ignore:FSDP is switching to use `NO_SHARD`",
    "ignore:When using ``NO_SHARD``",
    "ignore:The dirpath has changed from",
    "ignore:.*is an Enum subclass and is now natively supported",
)


def gloo(**options: Any) -> FullyShard:
    return FullyShard(process_group_backend="gloo", **options)


class Late(Tuned):
    """Builds its backbone in configure_model: on the meta device, or sharded by the user's own hand, or plainly."""

    def __init__(self, how: str, folder: Path | None = None, kind: str = "llama") -> None:
        super().__init__(kind, optimizer="SGD", lr=0.1)
        self.how, self.folder = how, folder
        self.built, self.model = self.model, None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.how == "meta":
            with torch.device("meta"):
                config = hf.AutoConfig.from_pretrained(self.folder)
                self.model = hf.AutoModelForCausalLM.from_config(config)
            self.model.config._name_or_path = str(self.folder)
        else:
            self.model = self.built
        self.built = None
        torch.manual_seed(1)  # building drew numbers, or not
        if self.how == "sharded":
            for block in self.model.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def fitted(
    module: L.LightningModule, method: Any, folder: Path, kind: str = "llama", callbacks: Any = None, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(1)
    callbacks = [method] if callbacks is None else [method, callbacks]
    # Lightning's own sampler would shuffle under strategies of several processes.
    trainer(folder, *callbacks, use_distributed_sampler=False, **options).fit(module, loader(kind))
    return {name: sharded.whole(tensor).detach().clone() for name, tensor in collect(module).items()}


@pytest.mark.parametrize("how", ["meta", "sharded", "plain"])
def test_a_backbone_that_is_built_late(tmp_path: Path, how: str) -> None:
    """The meta-device backbone gets its weights part by part, and trains as one that was loaded."""
    tiny("llama").save_pretrained(tmp_path / "llama")
    method = LoRA(r=2, target_modules="all-linear")
    one = fitted(Late("plain"), method, tmp_path)
    module = Late(how, tmp_path / "llama")
    other = fitted(module, LoRA(r=2, target_modules="all-linear"), tmp_path, strategy=gloo())
    assert not on_meta(module)
    assert all(sharded.is_part(p) for p in module.parameters())
    assert_near(one, other, 1e-6)


def test_a_meta_backbone_whose_files_are_not_here(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path / "llama")
    with pytest.raises(TuningError, match="no safetensors files on this machine"):
        fitted(Late("meta", tmp_path / "llama"), LoRA(), tmp_path, strategy=gloo())


def test_a_meta_backbone_whose_files_lack_a_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("llama").save_pretrained(tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TuningError, match=r"lack model\.norm\.weight"):
        fitted(Late("meta", tmp_path / "llama"), LoRA(), tmp_path, strategy=gloo())


def test_files_in_several_parts(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    files = files_of(str(tmp_path / "llama"))
    assert len(set(files.values())) > 1
    assert set(files) >= {name for name, _ in tiny("llama").named_parameters()}
    one = fitted(Late("plain"), LoRA(r=2), tmp_path)
    assert_near(one, fitted(Late("meta", tmp_path / "llama"), LoRA(r=2), tmp_path, strategy=gloo()), 1e-6)


def test_a_checkpoint_gathers_the_delta_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []

    def whole(tensor: Any) -> Any:
        gathered.append(tensor.numel() * tensor.element_size())
        return real(tensor)

    real = sharded.whole
    monkeypatch.setattr(sharded, "whole", whole)
    module = Tuned("bert")
    saving = ModelCheckpoint(tmp_path, filename="delta", save_weights_only=True)
    fit = trainer(tmp_path, LoRA(r=2), saving, strategy=gloo(), max_steps=1)
    fit.fit(module, loader("bert"))
    delta = sum(t.numel() * t.element_size() for t in collect(module).values())
    assert sum(gathered) == delta
    gathered.clear()
    fit.save_checkpoint(tmp_path / "all.ckpt")
    moments = 2 * delta + 4 * len(collect(module))  # Adam counts the steps of each tensor
    assert sum(gathered) == delta + moments


def test_the_plan_of_a_model_that_fits_nowhere() -> None:
    """70 B parameters on the meta device, planned in seconds."""
    began = time.monotonic()
    config = hf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, dtype=torch.bfloat16, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = meta(config, hf.AutoModelForCausalLM).bfloat16()
    LoRA(r=16).apply(model)
    module = nn.ModuleDict({"model": model})
    rows = plan(module, ranks=16)
    assert len(rows) == 81
    total = sum(p.nbytes for p in model.parameters())
    assert total > 140e9
    assert sum(gathered for _, gathered, _ in rows) == total
    assert sum(kept for _, _, kept in rows) == pytest.approx(total / 16, rel=0.001)
    assert rows[0][0] == "model.model.layers.0"
    assert time.monotonic() - began < 60


def test_units_hold_every_parameter_once() -> None:
    for kind in ("bert", "gpt2", "t5", "vit"):
        module = nn.ModuleDict({"model": tiny(kind)})
        rows = plan(module, ranks=2)
        assert sum(row[1] for row in rows) == sum(p.nbytes for p in module.parameters())
        assert all(row[2] <= row[1] for row in rows)


def test_groups_of_one_need_no_plan(tmp_path: Path) -> None:
    parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    one = fitted(Tuned("bert", optimizer="SGD"), LoRA(r=2), tmp_path, "bert")
    assert_near(one, fitted(Tuned("bert", optimizer="SGD"), LoRA(r=2), tmp_path, "bert", strategy=parallel), 1e-6)


def test_validating_and_predicting_from_any_form(tmp_path: Path) -> None:
    """A file and a folder, read by FSDP2 and by one device."""
    scores = []
    for folder in (False, True):
        saving = ModelCheckpoint(tmp_path / str(folder), filename="delta")
        torch.manual_seed(1)
        fit = trainer(tmp_path, LoRA(r=2), saving, strategy=gloo(save_distributed_checkpoint=folder), max_epochs=1)
        fit.fit(Tuned("bert"), loader("bert"))
        path = tmp_path / str(folder) / "delta.ckpt"
        assert path.is_dir() is folder
        for chosen in ("auto", gloo()):
            run = trainer(tmp_path, LoRA(r=2), strategy=chosen)
            scores += run.validate(Tuned("bert"), loader("bert"), ckpt_path=path, verbose=False)
            assert len(run.predict(Tuned("bert"), loader("bert"), ckpt_path=path)) == 3
    assert all(score["val_loss"] == pytest.approx(scores[0]["val_loss"], abs=1e-6) for score in scores)


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="delta")
    fit = trainer(tmp_path, LoRA(r=2), saving, strategy=gloo(save_distributed_checkpoint=True), max_steps=1)
    fit.fit(Tuned("bert"), loader("bert"))
    (part,) = (tmp_path / "delta.ckpt").glob("*.distcp")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(TuningError, match="lacks a part or is damaged"):
        trainer(tmp_path, LoRA(r=2)).validate(Tuned("bert"), loader("bert"), ckpt_path=tmp_path / "delta.ckpt")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["metadata", "value"])
def test_nothing_in_a_folder_is_executed(tmp_path: Path, where: str) -> None:
    folder, ran = tmp_path / "delta.ckpt", tmp_path / "ran"
    save({"state_dict": {"a": torch.ones(2), "b": Evil(ran) if where == "value" else 3}}, checkpoint_id=folder)
    torch.save({}, folder / "meta.pt")
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(TuningError, match=r"lacks a part or is damaged \((it names posix\.mkdir|CheckpointException)"):
        read_checkpoint(folder)
    assert not ran.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_no_flipped_bit_of_a_folder_loads(tmp_path: Path) -> None:
    folder, draw = tmp_path / "delta.ckpt", random.Random(0)
    fit = trainer(
        tmp_path,
        LoRA(r=2),
        ModelCheckpoint(tmp_path, filename="delta"),
        strategy=gloo(save_distributed_checkpoint=True),
        max_steps=1,
    )
    fit.fit(Tuned("bert"), loader("bert"))
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert {path.name for path in files} >= {".metadata", "meta.pt", "checksums.json"}
    known = read_checkpoint(folder)
    assert known["optimizer_states"][0]["state"]
    for _ in range(400):
        path = draw.choice(list(files))
        data = bytearray(files[path])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(TuningError, match="lacks a part or is damaged"):
            read_checkpoint(folder)
        path.write_bytes(files[path])
    for path in files:
        path.unlink()
        if path.name != "checksums.json":
            with pytest.raises(TuningError, match=r"lacks a part or is damaged|is no file"):
                read_checkpoint(folder)
        path.write_bytes(files[path])


@pytest.mark.parametrize("precision", ["bf16-true", "32-true", "bf16-mixed"])
def test_half_precision_is_for_the_frozen(tmp_path: Path, precision: str) -> None:
    module = Tuned("bert")
    saving = ModelCheckpoint(tmp_path, filename="delta")
    fit = trainer(tmp_path, BitFit(), saving, strategy=gloo(), precision=precision, max_steps=2)
    fit.fit(module, loader("bert"))
    frozen = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {frozen}
    delta = torch.load(tmp_path / "delta.ckpt", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Tuned("bert")
    run = trainer(tmp_path, LoRA(r=2), strategy=gloo())
    run.validate(module, loader("bert"), verbose=False)
    assert "configure_model" not in vars(module)
    assert "process_dataloader" not in vars(run.strategy)


class Stopped(Tuned):
    """Fails in its first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("stopped")


@pytest.mark.parametrize("kind", [Tuned, Stopped])
def test_after_a_run_the_delta_is_saved_still(tmp_path: Path, kind: type[Tuned]) -> None:
    module, run = kind("bert"), trainer(tmp_path, LoRA(r=2), strategy=gloo(), precision="bf16-true", max_steps=1)
    with pytest.raises(ValueError, match="stopped") if kind is Stopped else nullcontext():
        run.fit(module, loader("bert"))
    hooks = {name for name, value in vars(run.strategy).items() if isinstance(value, partial)}
    assert hooks == {"connect", "lightning_module_state_dict", "optimizer_state"}
    assert not {"convert_module", "clip_grad_by_norm"} & vars(run.precision_plugin).keys()
    assert "configure_model" not in vars(module)
    run.save_checkpoint(tmp_path / "delta.ckpt")
    assert len(read_delta(tmp_path / "delta.ckpt")[0]) == 10
    patches.restore(run)
    assert not {name for name, value in vars(run.strategy).items() if isinstance(value, partial)}


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {"cpu_offload": True},
        {"activation_checkpointing": True},
        {"cpu_offload": True, "activation_checkpointing": True, "reshard_after_forward": False, "param_dtype": "32"},
    ],
    ids=["offload", "checkpointing", "all"],
)
def test_options_that_save_memory_change_nothing(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    ran: list[int] = []
    module = Tuned(kind, optimizer="SGD")
    (blocks,) = anatomy.block_lists(module.model).values()
    inner = next(child for child in blocks[0].modules() if isinstance(child, nn.Linear))
    inner.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    one = fitted(Tuned(kind, optimizer="SGD"), LoRA(r=2), tmp_path, kind, gradient_clip_val=0.01)
    other = fitted(module, LoRA(r=2), tmp_path, kind, gradient_clip_val=0.01, strategy=gloo(**options))
    assert_near(one, other, 1e-6)
    steps = len(loader(kind))
    assert len(ran) == steps * (2 if options.get("activation_checkpointing") else 1)
    assert not any(getattr(child, "gradient_checkpointing", False) for child in module.modules())


def test_a_backbone_that_cannot_compute_activations_anew(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="cannot compute activations anew"):
        fitted(Tuned("resnet"), BitFit(), tmp_path, "resnet", strategy=gloo(activation_checkpointing=True))


def test_offloaded_parts_stay_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no part of a unit goes to the device of the computation."""
    module, chosen = Tuned("bert", optimizer="SGD"), gloo(cpu_offload=True)
    fitted(module, LoRA(r=2), tmp_path, "bert", strategy=chosen)
    monkeypatch.setattr(FullyShard, "root_device", torch.device("meta"))
    chosen.model = module
    chosen.model_to_device()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert {b.device.type for b in module.buffers()} == {"meta"}


def test_a_static_graph_takes_no_accumulation(tmp_path: Path) -> None:
    chosen = DDPStrategy(static_graph=True, process_group_backend="gloo")
    with pytest.raises(TuningError, match="static_graph=True learns from the first backward pass"):
        fitted(Tuned("bert"), LoRA(r=2), tmp_path, "bert", strategy=chosen, accumulate_grad_batches=2)


class Buckets(L.Callback):
    """Keeps the sizes of what each backward pass sends, in bytes; the first backward pass tells DDP the order."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, self.sent)

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append([])

    def sent(self, _: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.steps[-1].append(bucket.buffer().nbytes)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


@pytest.mark.parametrize(("r", "count"), [(2, 1), (30, 1), (400, 2)])
def test_a_tiny_delta_travels_in_one_piece(tmp_path: Path, r: int, count: int) -> None:
    """Under DDP as it comes: one all-reduce below 1 MiB, in which latency is all that counts, and two to 26 MiB."""

    class Wide(Tuned):
        def __init__(self) -> None:
            super().__init__()
            self.model = hf.LlamaForCausalLM(
                hf.LlamaConfig(
                    hidden_size=400, intermediate_size=400, num_hidden_layers=2, num_attention_heads=4,
                    vocab_size=100, bos_token_id=1, eos_token_id=2,
                )
            )  # fmt: skip

    module, buckets = Wide(), Buckets()
    fitted(module, LoRA(r=r), tmp_path, strategy=DDPStrategy(process_group_backend="gloo"), callbacks=buckets)
    delta = sum(tensor.nbytes for tensor in collect(module).values())
    assert (delta < 2**20) is (count == 1)
    assert all(sum(step) == delta for step in buckets.steps)
    assert [len(step) for step in buckets.steps[1:]] == [count] * 2


def test_deepspeed_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises((MisconfigurationException, ImportError), match=r"[Dd]eep[Ss]peed"):
        trainer(tmp_path, strategy="deepspeed_stage_2")


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class Engine(DeepSpeedStrategy):
    """Stands for DeepSpeed with ZeRO-3, which empties parameters and writes a folder; here in one process."""

    def __init__(self, module: L.LightningModule) -> None:
        self.connect(module)
        self.values: dict[nn.Parameter, torch.Tensor] = {}

    def empty(self) -> None:
        for parameter in self.lightning_module.parameters():
            self.values[parameter], parameter.data = parameter.data, torch.empty(0)
            parameter.ds_status = Status.NOT_AVAILABLE

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        assert all(p.ds_status is Status.NOT_AVAILABLE for p in parameters)
        for p in parameters:
            p.data, p.ds_status = self.values[p], Status.AVAILABLE
        yield
        for p in parameters:
            p.data, p.ds_status = torch.empty(0), Status.NOT_AVAILABLE

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Path(filepath).mkdir()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return {"strict": self.lightning_module.strict_loading}

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def barrier(self, *_: Any, **__: Any) -> None:
        pass

    is_global_zero = True


def test_what_deepspeed_has_emptied_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder holds the whole delta as a file, which other strategies read; the backbone is known by all of it."""
    module = Tuned("bert")
    LoRA(r=2).apply(module)
    live = {name: tensor.clone() for name, tensor in collect(module).items()}
    engine = Engine(module)
    library = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=engine.gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    expected = metadata(module)
    engine.empty()
    select.backbone_of(module)._lightning_peft.fingerprints.clear()
    assert {tensor.numel() for tensor in collect(module).values()} == {0}
    strategy_files._deepspeed_save_checkpoint(engine, {}, tmp_path / "saved")
    tensors, meta = read_delta(tmp_path / "saved")
    assert_same(tensors, live)
    assert meta["backbones"]["model"]["fingerprint"] == expected["backbones"]["model"]["fingerprint"]
    assert {tensor.numel() for tensor in collect(module).values()} == {0}
    assert strategy_files._load_without_frozen(engine, tmp_path / "saved") == {"strict": False}
    assert module.strict_loading
    other = Tuned("bert")
    LoRA(r=2).apply(other)
    load_delta(other, tmp_path / "saved")
    assert_same(collect(other), live)
    with (tmp_path / "saved" / "delta.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(TuningError, match=r"is damaged \(delta\.safetensors does not fit its checksum"):
        strategy_files._load_without_frozen(engine, tmp_path / "saved")
    with pytest.raises(TuningError, match="is of DeepSpeed, which alone can go on from it"):
        trainer(tmp_path, LoRA(r=2)).fit(Tuned("bert"), loader("bert"), ckpt_path=tmp_path / "saved")


def test_the_optimizer_of_deepspeed_is_left_to_it() -> None:
    """Its tensors are no parameters, and gradients are not where autograd has put them."""
    module = Tuned("bert")
    LoRA(r=2).apply(module)
    module._trainer = SimpleNamespace(strategy=Engine(module))
    checks.check_optimizers(module, [])
    checks.note_gradients(module, torch.optim.SGD(module.parameters()))
    checks.check_gradients(module)
    module._trainer = None
    with pytest.raises(TuningError, match="stands in no optimizer group"):
        checks.check_optimizers(module, [])


class OnCPU(FSDPStrategy):
    """FSDP as Lightning has it, but for the device, which it wants to be a GPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self.kwargs["device_id"] = torch.device("cpu")
        policy = self.kwargs.pop("auto_wrap_policy")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, **self.kwargs_here())

    def kwargs_here(self) -> dict[str, Any]:
        return {"device_id": torch.device("cpu"), "mixed_precision": self.mixed_precision_config}


@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(num_virtual_tokens=2, init="random_uniform"), BitFit()])
def test_units_of_fsdp_are_uniform(method: Any) -> None:
    """Every unit that the policy makes has one dtype and one requires_grad, grafts and a bf16 backbone apart."""
    for kind in ("bert", "gpt2"):
        model = tiny(kind).bfloat16()
        method.apply(model)
        units = [m for m in model.modules() if wrap_policy(m, False, 1) and next(m.parameters(), None) is not None]
        assert any(place.graft in units for place in grafts(model)) or type(method) is BitFit
        for unit in units:
            assert len({(p.dtype, p.requires_grad) for p in unit.parameters()}) == 1
        method.remove(model)


def test_the_delta_of_flat_units(tmp_path: Path) -> None:
    """One step and a sharded checkpoint's tensors under FSDP, on one process."""
    module = Tuned("bert", optimizer="SGD")
    chosen = OnCPU(process_group_backend="gloo")
    fit = trainer(tmp_path, LoRA(r=2), strategy=chosen, max_steps=1)
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.update(trainer.strategy.lightning_module_state_dict())

    fit.callbacks.append(Look())
    fit.fit(module, loader("bert"))
    alone = Tuned("bert", optimizer="SGD")
    LoRA(r=2).apply(alone.model)
    assert set(seen) == set(collect(alone))
    assert {name: tensor.shape for name, tensor in seen.items()} == {n: t.shape for n, t in collect(alone).items()}


def test_equal_state_for_equal_runs(tmp_path: Path) -> None:
    """Momentum goes from a file of one device into parts and back."""

    class Momentum(Tuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def fit(folder: str, chosen: Any, ckpt_path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(1)
        module = Momentum("bert")
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, LoRA(r=2), saving, strategy=chosen, max_epochs=2, use_distributed_sampler=False)
        run.fit(module, loader("bert"), ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / "epoch=1.ckpt", weights_only=True)

    one, parts = fit("one", "auto"), fit("parts", gloo())
    assert_near(one["state_dict"], parts["state_dict"], 1e-6)
    crossed = [
        fit("crossed", gloo(), tmp_path / "one" / "epoch=0.ckpt"),
        fit("back", "auto", tmp_path / "parts" / "epoch=0.ckpt"),
    ]
    for other in (parts, *crossed):
        assert_near(one["state_dict"], other["state_dict"], 1e-6)
        mine, theirs = (c["optimizer_states"][0]["state"] for c in (one, other))
        assert mine.keys() == theirs.keys()
        for number, state in mine.items():
            assert_near(state, theirs[number], 1e-5)
    assert_same(one["loops"]["fit_loop"]["epoch_progress"], parts["loops"]["fit_loop"]["epoch_progress"])
