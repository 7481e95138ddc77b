"""Private names of torch, Lightning and transformers: what uses each, where it is from, and that it is what it was."""

import inspect
import pickletools
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from lightning.pytorch import callbacks, cli, strategies
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import launchers
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.nn.utils import prune
from torch.optim import SGD, lr_scheduler
from torch.utils import _python_dispatch
from torch.utils.data import DataLoader

from tests import private_names
from tests.models import tiny

PACKAGE, INSTALLED = Path(__file__).parents[1] / "lightning_peft", Path(torch.__file__).parents[1]
PYTORCH = "https://github.com/pytorch/pytorch/blob/v2.13.0/"
LIGHTNING = "https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/"
TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/"


def quiet(**kwargs: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **kwargs)


class Use(NamedTuple):
    """The one file that uses a name, the source of the name, and a function that fails when it has changed."""

    file: str
    source: str
    test: Callable[..., None]


USES: dict[str, Use] = {}


def use(file: str, source: str, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(test: Callable[..., None]) -> Callable[..., None]:
        USES.update(dict.fromkeys(names, Use(file, source, test)))
        return test

    return note


@use("core/private_torch.py", f"{PYTORCH}torch/_dynamo/eval_frame.py", "_orig_mod")
def names_in_a_compiled_wrapper() -> None:
    assert list(torch.compile(nn.Linear(2, 2)).state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]


@use("core/private_torch.py", f"{PYTORCH}torch/distributed/fsdp/_common_utils.py", "_fsdp_wrapped_module")
def names_under_fsdp() -> None:
    assert FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"


@use("core/placement.py", "https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/hooks.py", "_hf_hook")
def hook_of_accelerate() -> None:
    module = add_hook_to_module(nn.Linear(2, 2), SequentialHook(AlignDevicesHook("cpu", offload=True)))
    (hook,) = module._hf_hook.hooks
    assert (hook.execution_device, hook.offload, sorted(hook.weights_map)) == ("cpu", True, ["bias", "weight"])
    assert "forward" in vars(module)


WRAPPER = f"{PYTORCH}torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py"


@use("core/private_torch.py", WRAPPER, "_checkpoint_wrapped_module")
def names_under_activation_checkpointing() -> None:
    assert [name for name, _ in checkpoint_wrapper(nn.Linear(2, 2)).named_children()] == ["_checkpoint_wrapped_module"]


@use("core/private_torch.py", f"{PYTORCH}torch/nn/modules/module.py", "_compiled_call_impl")
def compiled_in_place() -> None:
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None


@use("core/private_torch.py", f"{PYTORCH}torch/nn/modules/module.py", "_forward_hooks")
def hooks_are_in_order() -> None:
    module, called = nn.Linear(2, 2), []
    for i in range(2):
        module.register_forward_hook(lambda *_, i=i: called.append(i))
    module(torch.ones(2))
    for hook in module._forward_hooks.values():
        hook()
    assert called == [0, 1, 0, 1]


@use("core/private_torch.py", f"{PYTORCH}torch/nn/modules/module.py", "_forward_pre_hooks")
def hooks_before_are_by_number() -> None:
    module, called = nn.Linear(2, 2), []
    handle = module.register_forward_pre_hook(lambda *_: called.append(1))
    assert list(module._forward_pre_hooks) == [handle.id]
    del module._forward_pre_hooks[handle.id]
    module(torch.ones(2))
    assert called == []


@use("core/private_torch.py", f"{PYTORCH}torch/_C/__init__.pyi.in", "_version")
def writes_are_counted() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


@use("core/private_torch.py", f"{PYTORCH}torch/nn/modules/module.py", "_apply")
def all_moves_go_through_apply() -> None:
    moved = []

    class Watched(nn.Linear):
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Watched":
            moved.append(recurse)
            return super()._apply(fn, recurse)

    module = nn.Sequential(Watched(2, 2))
    for move in (module.half, module.cpu, lambda: module.to_empty(device="cpu")):
        move()
    module._apply(lambda tensor: tensor.float(), recurse=False)
    assert moved == [True] * 3
    assert module[0].weight.dtype is torch.float16


@use("training/ema.py", f"{PYTORCH}aten/src/ATen/native/native_functions.yaml", "_foreach_lerp_")
def tensors_move_together() -> None:
    moving = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_lerp_(moving, [torch.ones(2), torch.ones(3)], 0.5)
    assert [tensor.tolist() for tensor in moving] == [[0.5] * 2, [0.5] * 3]


TRANSFORMS = f"{PYTORCH}torch/_functorch/autograd_function.py"


@use("updates/in_place.py", TRANSFORMS, "_C", "_are_functorch_transforms_active")
def transforms_are_seen() -> None:
    seen = [torch._C._are_functorch_transforms_active()]
    torch.func.vmap(lambda x: seen.append(torch._C._are_functorch_transforms_active()) or x)(torch.ones(2))
    assert seen == [False, True]


@use("updates/in_place.py", f"{PYTORCH}torch/nn/modules/rnn.py", "_is_any_autocast_enabled")
def autocast_is_seen() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch._C._is_any_autocast_enabled()
        with torch.autocast("cpu", enabled=False):
            assert not torch._C._is_any_autocast_enabled()


@use("updates/low_rank_layers.py", f"{PYTORCH}torch/nn/modules/conv.py", "_conv_forward")
def a_layer_convolves_with_another_kernel() -> None:
    host, x = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect"), torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(host._conv_forward(x, 2 * host.weight, host.bias * 2), 2 * host(x))
    assert host._conv_forward(x, host.weight, None).shape == (1, 3, 4, 4)


@use("training/strategy_files.py", f"{PYTORCH}torch/nn/modules/module.py", "_non_persistent_buffers_set")
def transient_buffers() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("made", torch.ones(1), persistent=False)
    assert module._non_persistent_buffers_set == {"made"}


@use("training/param_groups.py", f"{PYTORCH}torch/optim/lr_scheduler.py", "_schedulers", "_last_lr")
def what_schedulers_keep() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    assert vars(lr_scheduler.ChainedScheduler(parts))["_schedulers"] == parts
    assert vars(lr_scheduler.SequentialLR(optimizer, parts, milestones=[1]))["_schedulers"] == parts
    assert all(vars(part)["_last_lr"] == part.get_last_lr() for part in parts)


class Seeing(_python_dispatch.TorchDispatchMode):
    """Keeps the operations that it sees."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", ()), func]
        return func(*args, **kwargs or {})


@use("reports/live_memory.py", f"{PYTORCH}torch/utils/_python_dispatch.py", "_python_dispatch")
def every_operation_is_seen() -> None:
    with Seeing() as mode:
        torch.ones(2).add_(1)
    assert mode.seen == [torch.ops.aten.ones.default, torch.ops.aten.add_.Tensor]


@use("reports/meta_check.py", f"{PYTORCH}aten/src/ATen/native/native_functions.yaml", "_local_scalar_dense")
def reading_a_number_is_an_operation() -> None:
    with Seeing() as mode:
        bool(torch.ones((), dtype=torch.bool))
    assert mode.seen[-1] is torch.ops.aten._local_scalar_dense.default


@use("training/checks.py", f"{LIGHTNING}strategies/launchers/multiprocessing.py", "_MultiProcessingLauncher")
def launchers_that_spawn() -> None:
    for start in ("spawn", "fork"):
        strategy = strategies.DDPStrategy(accelerator=object(), start_method=start)
        strategy.cluster_environment = SimpleNamespace(creates_processes_externally=False)
        strategy._configure_launcher()
        assert isinstance(strategy.launcher, launchers._MultiProcessingLauncher)


@use("training/strategy_files.py", f"{LIGHTNING}strategies/ddp.py", "_ddp_kwargs")
def options_of_ddp() -> None:
    assert strategies.DDPStrategy(static_graph=True)._ddp_kwargs == {"static_graph": True}


@use("training/strategy_files.py", f"{LIGHTNING}strategies/fsdp.py", "_state_dict_type")
def how_fsdp_saves() -> None:
    for kind in ("full", "sharded"):
        assert strategies.FSDPStrategy(state_dict_type=kind)._state_dict_type == kind


@use("training/strategy_files.py", f"{LIGHTNING}strategies/model_parallel.py", "_save_distributed_checkpoint")
def how_fsdp2_saves() -> None:
    for parts in (False, True):
        strategy = strategies.ModelParallelStrategy(save_distributed_checkpoint=parts)
        assert strategy._save_distributed_checkpoint is parts


PARALLEL = f"{LIGHTNING}strategies/model_parallel.py"


@use("training/strategy.py", PARALLEL, "_data_parallel_size", "_process_group_backend")
def what_the_environment_is_set_up_from() -> None:
    kind = strategies.ModelParallelStrategy
    strategy = kind(data_parallel_size=2, process_group_backend="gloo")
    assert (strategy._data_parallel_size, strategy._process_group_backend) == (2, "gloo")
    assert "_setup_device_mesh(\n            self._data_parallel_size," in inspect.getsource(kind.setup_environment)
    strategy._process_group_backend = "other"
    assert strategy._get_process_group_backend() == strategy.process_group_backend == "other"


@use("training/checkpoint_io.py", f"{LIGHTNING}plugins/io/async_plugin.py", "_ensure_setup", "_executor", "_error")
def one_thread_writes() -> None:
    io = AsyncCheckpointIO(TorchCheckpointIO())
    assert io._executor is None
    io._ensure_setup()
    assert io._executor._max_workers == 1
    io._error = KeyError("of the thread")
    with pytest.raises(KeyError, match="of the thread"):
        io.teardown()
    assert io._executor is None


@use("training/place.py", f"{LIGHTNING}loops/fit_loop.py", "_load_combined_loader_states")
def states_of_loaders_are_loaded_once() -> None:
    loop, loaded = quiet(max_steps=2).fit_loop, []
    loop._combined_loader = SimpleNamespace(_load_state_dicts=loaded.append)
    loop._combined_loader_states_to_load, loop.restarting = ["state"], True
    loop._load_combined_loader_states()
    loop._load_combined_loader_states()
    assert loaded == [["state"]]


@use("training/place.py", f"{LIGHTNING}loops/fit_loop.py", "_combined_loader", "_data_fetcher", "_restarting")
def where_a_fit_reads_and_whether_it_restarts() -> None:
    loop = quiet().fit_loop
    assert loop._combined_loader is loop._data_fetcher is None
    loop.load_state_dict(loop.state_dict() | {"epoch_progress": {"total": {"ready": 1}, "current": {"ready": 1}}})
    assert loop._restarting
    assert loop.epoch_loop.restarting
    assert "update_plateau_schedulers=not self.restarting" in inspect.getsource(type(loop).on_advance_end)


@use("training/loader_state.py", f"{PYTORCH}torch/utils/data/dataloader.py", "_iterator")
def workers_that_persist() -> None:
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert loader._iterator is None
    assert list(loader) == [1, 2]
    assert loader._iterator is not None


@use("training/requeue.py", f"{LIGHTNING}trainer/trainer.py", "_signal_connector", "_checkpoint_connector")
def parts_of_a_trainer_that_are_patched() -> None:
    run = quiet()
    assert not inspect.signature(run._signal_connector.register_signal_handlers).parameters
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(L.Trainer)
    assert next(iter(inspect.signature(run._checkpoint_connector.resume_start).parameters)) == "checkpoint_path"
    assert "self.resume_start(checkpoint_path, " in inspect.getsource(type(run._checkpoint_connector))


EPOCH = f"{LIGHTNING}loops/training_epoch_loop.py"


@use("training/epoch_metrics.py", EPOCH, "_results")
def sums_of_metrics() -> None:
    results = quiet().fit_loop.epoch_loop._results
    for value in (1.0, 4.0):
        results.log("training_step", "loss", torch.tensor(value), on_epoch=True, batch_size=2)
    metric = results["training_step.loss"]
    assert (metric.value, metric.cumulated_batch_size, metric.is_tensor, metric.has_reset) == (10, 4, True, False)
    assert metric.meta.is_mean_reduction
    assert (metric.meta.forked_name(False), metric.compute(), metric._computed) == ("loss", 2.5, 2.5)


@use("training/resuming.py", EPOCH, "_val_check_time_interval", "_last_val_time")
def validation_by_the_clock() -> None:
    trainer = quiet(max_epochs=1, limit_train_batches=2, limit_val_batches=1, val_check_interval={"hours": 1})
    assert trainer._val_check_time_interval == 3600
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(BoringModel())
    assert begun <= trainer._last_val_time <= time.monotonic()
    assert quiet()._val_check_time_interval is None


@use("training/requeue.py", EPOCH, "_should_accumulate")
def whether_gradients_are_being_accumulated() -> None:
    loop = quiet(accumulate_grad_batches=2).fit_loop.epoch_loop
    loop.trainer.fit_loop.max_batches, said = 3, []
    for _ in range(3):
        loop.batch_progress.current.ready += 1
        said.append(loop._should_accumulate())
    assert said == [True, False, False]


@use("training/place.py", EPOCH, "_batches_that_stepped", "_should_check_val_fx")
def states_of_the_loops() -> None:
    assert list(inspect.signature(quiet().fit_loop.epoch_loop._should_check_val_fx).parameters) == ["data_fetcher"]
    state = quiet().fit_loop.state_dict()
    assert state["epoch_loop.state_dict"]["_batches_that_stepped"] == 0
    for name in ("epoch_loop.val_loop.batch_progress", "epoch_loop.batch_progress"):
        counts = dict.fromkeys(("ready", "completed", "started", "processed"), 0)
        assert state[name] == {"total": counts, "current": counts, "is_last_batch": False}


class Kept(BoringModel):
    """A model that keeps its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


class Seen(cli.LightningCLI):
    """Keeps what it is given to build."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        self.given, self.model_was_there = (config, callbacks), hasattr(self, "model")
        return super()._instantiate_trainer(config, callbacks)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        before, self.subcommand_given = self.model.configure_optimizers, subcommand
        super()._add_configure_optimizers_method_to_model(subcommand)
        self.optimizer_was_replaced = self.model.configure_optimizers != before


def command_line(*words: str) -> Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse and of the optimizer that is replaced
        kinds = {"model_class": L.LightningModule, "subclass_mode_model": True}
        given = [f"--model={__name__}.Kept", *words]
        return Seen(**kinds, args=given, run=False, save_config_callback=None, trainer_defaults={"logger": False})


@use("commands/trainer.py", f"{LIGHTNING}cli.py", "_instantiate_trainer", "_add_configure_optimizers_method_to_model")
def how_the_command_line_builds() -> None:
    made = command_line("--trainer.max_steps=3", "--optimizer=torch.optim.SGD")
    assert (made.given[0]["max_steps"], made.given[1], made.model_was_there) == (3, [], True)
    assert (made.subcommand_given, made.optimizer_was_replaced) == (None, True)


JSONARGPARSE = "https://github.com/omni-us/jsonargparse/blob/v4.53.0/jsonargparse/"


@use("commands/trainer.py", f"{JSONARGPARSE}_typehints.py", "_actions", "_typehint")
def the_types_that_an_argument_takes() -> None:
    parser = cli.LightningArgumentParser()
    parser.add_argument("--number", type=int | float)
    (action,) = (action for action in parser._actions if action.dest == "number")
    assert set(action._typehint.__args__) == {int, float}
    for kind in (int | float, float | int):
        action._typehint = kind
        assert type(parser.parse_args(["--number=1"]).number) is kind.__args__[0]


@use("core/delta_file.py", f"{LIGHTNING}core/saving.py", "_class_path")
def the_command_line_keeps_the_class() -> None:
    assert command_line().model.hparams["_class_path"] == f"{__name__}.Kept"


@use("training/throughput.py", f"{LIGHTNING}callbacks/throughput_monitor.py", "_update")
def every_stage_counts_by_one_function() -> None:
    kind, counted = callbacks.ThroughputMonitor, ("self._update(", "pl_module.flops_per_batch")
    assert list(inspect.signature(kind._update).parameters) == ["self", "trainer", "pl_module", "batch", "iter_num"]
    assert counted[1] in inspect.getsource(kind._update)
    for stage in ("train", "validation", "test", "predict"):
        assert counted[0] in inspect.getsource(getattr(kind, f"on_{stage}_batch_end"))


@use("core/structure.py", f"{TRANSFORMERS}configuration_utils.py", "_name_or_path")
def where_a_model_was_loaded_from() -> None:
    config = transformers.BertConfig(name_or_path="somebody/bert")
    assert config._name_or_path == config.to_dict()["_name_or_path"] == config.name_or_path == "somebody/bert"


@use("core/structure.py", f"{TRANSFORMERS}configuration_utils.py", "_attn_implementation")
def which_attention_a_model_computes() -> None:
    model = tiny("bert")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name


@use("training/weights.py", f"{TRANSFORMERS}modeling_utils.py", "_init_weights")
def a_buffer_that_is_in_no_file_is_computed() -> None:
    model = tiny("llama")
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary.inv_freq.fill_(torch.nan)
    model._init_weights(rotary)
    assert torch.equal(rotary.inv_freq, before)


def named_in_metadata(folder: Path) -> set[str]:
    """Return what the pickled metadata of a folder name, after their module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        checkpoint.save({"weight": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    operations = list(pickletools.genops((folder / ".metadata").read_bytes()))
    return {part for _, value, _ in operations if isinstance(value, str) for part in value.split()}


@use("core/folder_seal.py", f"{PYTORCH}torch/distributed/checkpoint/filesystem.py", "_StorageInfo")
def where_a_tensor_lies_in_a_folder(tmp_path: Path) -> None:
    assert "_StorageInfo" in named_in_metadata(tmp_path)


@use("core/folder_seal.py", f"{PYTORCH}torch/serialization.py", "_get_layout")
def the_layout_of_a_tensor_is_looked_up(tmp_path: Path) -> None:
    assert "_get_layout" in named_in_metadata(tmp_path)


@use("core/folder_seal.py", f"{PYTORCH}torch/distributed/checkpoint/metadata.py", "_MEM_FORMAT_ENCODING")
def the_memory_format_of_a_tensor_is_kept(tmp_path: Path) -> None:
    assert "_MEM_FORMAT_ENCODING" in named_in_metadata(tmp_path)


@use("core/pruned.py", f"{PYTORCH}torch/nn/utils/prune.py", "_orig")
def a_pruned_weight_is_kept_under_another_name() -> None:
    layer = nn.Linear(2, 2, bias=False)
    prune.identity(layer, "weight")
    assert set(layer.state_dict()) == {"weight_orig", "weight_mask"}


@pytest.mark.parametrize("name", USES)
def test_a_name_is_what_it_was(name: str, tmp_path: Path) -> None:
    takes = inspect.signature(USES[name].test).parameters
    USES[name].test(*[tmp_path] * len(takes))


@pytest.mark.parametrize("name", USES)
def test_its_source_stands_beside_it_and_has_it(name: str) -> None:
    use = USES[name]
    assert use.source in (PACKAGE / use.file).read_text()
    path = use.source.partition("/blob/")[2].partition("/")[2].removeprefix("src/").removesuffix(".in")
    installed = INSTALLED / path.replace("aten/src", "torchgen/packaged")
    assert re.search(rf"\b{name}\b", f"{path} {installed.read_text()}".replace("/", " "))


def test_every_private_name_is_in_the_table_and_used_by_one_file() -> None:
    assert private_names.used() == {name: {use.file} for name, use in USES.items()}


@pytest.mark.parametrize(
    "line",
    [
        "trainer._hidden", "getattr(trainer, '_hidden', None)", "from torch import _hidden",
        "import torch._hidden.other", "from lightning._hidden import other", "open(_hidden=1)",
        "KEYS = ('one._hidden.two',)",
    ],
)  # fmt: skip
def test_a_name_that_is_not_in_the_table_is_found(line: str) -> None:
    own = "class Own:\n    def _own(self): return self._own, other._own\n    _hid = 1"
    assert private_names.used({"core/errors.py": f"{own}\n{line}"}) == {"_hidden": {"core/errors.py"}}


def test_so_is_one_that_a_class_has_from_elsewhere() -> None:
    """An override of the package makes a name its own nowhere, and no other class's name is that of a Trainer."""
    code = (PACKAGE / "core" / "private_torch.py").read_text()
    assert "_apply" in private_names.used({"core/private_torch.py": code})
    more = f"{code}\n    def more(self):\n        return self._parameters\n\nclass Other:\n    _parameters = 1\n"
    assert "_parameters" in private_names.used({"core/private_torch.py": more})
