"""Two gloo processes that split layers between them compute what one computes, and write the same delta."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_peft import FullyShard, LoRA, TuningError, load_delta
from lightning_peft.core.delta_file import read_delta
from lightning_peft.training import tensor_parallel as plans
from tests import tensor_parallel
from tests.contract import assert_near, assert_same
from tests.fresh import ROOT
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer
from tests.processes import TORCHRUN
from tests.tensor_parallel import CASES, REFUSED, descend

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    "ignore:The dirpath has changed from",
    "ignore:.*is an Enum subclass and is now natively supported",
)

IN_GROUPS = ("plan of transformers", "biases and a head", "by hand", "on the meta device")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both ranks for all cases, which share one process group."""
    return results(tmp_path_factory.mktemp("ranks"), 2)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two groups of two ranks, between which units are sharded, for some cases."""
    return results(tmp_path_factory.mktemp("groups"), 4, *IN_GROUPS)


def results(folder: Path, count: int, *names: str) -> Path:
    ranks = f"--nproc-per-node={count}"
    command = [sys.executable, *TORCHRUN[:-1], ranks, "-m", "tests.tensor_parallel", str(folder), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    (folder / "said.txt").write_text(ended.stderr)
    tensor_parallel.Meta.folder = folder / "llama"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_two_ranks_are_one(ranks: Path, tmp_path: Path, name: str) -> None:
    """Losses, gradients, and the delta after two clipped steps of momentum; it has whole tensors and loads on one."""
    assert_all_are_one(ranks, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", tensor_parallel.METHODS)
def test_other_methods_are_right_or_refused(ranks: Path, tmp_path: Path, name: str) -> None:
    """What adds to whole tensors just works; what adds to split ones says what to take instead."""
    failed, refused = (ranks / f"{name}.0.{end}" for end in ("failed", "refused"))
    assert not failed.exists(), failed.read_text()
    if refused.exists():
        assert re.search("take LoRA, or FullyShard without|use strategy='ddp' or one device", refused.read_text())
        return
    one = descend(tmp_path, name, "auto")
    both = [torch.load(ranks / name / f"{rank}.pt") for rank in (0, 1)]
    assert_same(both[0][2], both[1][2])
    assert_near(tensor_parallel.delta_of(one), both[0][2], 1e-5)
    torch.testing.assert_close(both[0][0], one.losses, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_GROUPS)
def test_two_groups_are_one(groups: Path, tmp_path: Path, name: str) -> None:
    """Tensors are split in the groups, and what a group has between them; the groups see the same rows here."""
    assert_all_are_one(groups, tmp_path, name)
    if name in tensor_parallel.RESUMED:
        assert_same(*torch.load(groups / name / "resumed.3.pt"))


def assert_all_are_one(ranks: Path, tmp_path: Path, name: str) -> None:
    failed = ranks / f"{name}.0.failed"
    assert not failed.exists(), failed.read_text()
    assert (ranks / name / "1.pt").exists(), (ranks / "said.txt").read_text()
    one = descend(tmp_path, name, "auto")
    both = [torch.load(ranks / name / f"{rank}.pt") for rank in (0, 1)]
    for losses, gradients, delta in both:
        torch.testing.assert_close(losses, one.losses, rtol=0, atol=1e-5)
        assert len(gradients) == 2
        for mine, theirs in zip(one.gradients, gradients, strict=True):
            assert_near(mine, theirs, 1e-5)
        assert_near(tensor_parallel.delta_of(one), delta, 1e-5)
    norm = torch.nn.utils.get_total_norm(list(one.gradients[0].values()))
    assert norm > 2 * tensor_parallel.CLIP
    assert_same(both[0][2], both[1][2])
    file = ranks / name / "epoch=0.ckpt"
    assert_same(read_delta(file)[0], both[0][2])
    written = read_delta(tmp_path / "epoch=0.ckpt")[1]["backbones"]["model"]["fingerprint"]
    assert read_delta(file)[1]["backbones"]["model"]["fingerprint"] == written
    module_class, kind, method, _ = CASES[name]
    if module_class is not tensor_parallel.Meta:
        alone = module_class(kind)
        method.apply(alone)
        load_delta(alone, file)
        with torch.no_grad():
            rows = method.prepare(batch(kind))
            near = one.model.eval()(**rows).logits - alone.model.eval()(**rows).logits
        method.remove(alone)
        assert near.abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", tensor_parallel.RESUMED)
def test_resumed_runs_are_the_uninterrupted(ranks: Path, tmp_path: Path, name: str) -> None:
    """On two ranks, and on one that reads the file of two."""
    whole, resumed = torch.load(ranks / name / "resumed.0.pt")
    assert_same(whole, resumed)
    one = descend(tmp_path, name, "auto", ranks / f"{name}, 2 epochs" / "epoch=0.ckpt", epochs=2)
    assert_near(tensor_parallel.delta_of(one), whole, 1e-5)


@pytest.mark.slow
def test_ranks_of_a_group_drop_out_alike(ranks: Path) -> None:
    """They were seeded differently."""
    first, second = (torch.load(ranks / "dropout" / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    assert_same(first[2], second[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_says_so(ranks: Path, name: str) -> None:
    said = (ranks / f"{name}.txt").read_text()
    assert re.search(REFUSED[name][-1], said)


class Two:
    """Stands for a group of two ranks."""

    def __getitem__(self, _: str) -> "Two":
        return self

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("settings", "plan", "match"),
    [
        ({"num_key_value_heads": 1}, "auto", "num_key_value_heads=1 of LlamaForCausalLM cannot be split"),
        ({"intermediate_size": 63}, {"up_proj": "colwise"}, "has 63 outputs, which cannot be split"),
        ({"intermediate_size": 63}, {"down_proj": "rowwise"}, "has 63 inputs, which cannot be split"),
    ],
)
def test_what_does_not_divide(settings: dict[str, int], plan: plans.Plan, match: str) -> None:
    config = tiny("llama").config
    config.update(settings)
    model = type(tiny("llama"))(config)
    with pytest.raises(TuningError, match=match):
        plans.parallelize(model, Two(), plan)


def test_tied_weights_and_tables_of_words_stay_whole() -> None:
    model = tiny("llama")
    assert plans._own_plan(model, "")["lm_head"] == "colwise_gather_output"
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not {"lm_head", "model.embed_tokens"} & plans._own_plan(model, "").keys()


def test_a_strategy_without_a_plan(tmp_path: Path) -> None:
    fit = trainer(tmp_path, LoRA(), strategy=ModelParallelStrategy(1, 1, process_group_backend="gloo"))
    module = Tuned("llama")
    module._trainer, module._device_mesh = fit, Two()
    from lightning_peft.training import strategy

    assert strategy.goes_first(module)
    with pytest.raises(TuningError, match="tensor_parallel_size=2 needs a plan"):
        strategy.split(module, fit)


@pytest.mark.parametrize("size", [0, 2, 3])
def test_groups_that_the_processes_do_not_fill(tmp_path: Path, size: int) -> None:
    chosen = FullyShard(process_group_backend="gloo", tensor_parallel_size=size)
    with pytest.raises(TuningError, match=f"tensor_parallel_size={size} does not divide 1 nodes of 1 processes"):
        trainer(tmp_path, LoRA(), strategy=chosen).fit(Tuned("llama"), loader("llama"))
