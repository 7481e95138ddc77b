"""The tutorials run as they stand, in an empty folder; where the model is one of the hub, a tiny one stands in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.images import save_vit
from tests.models import save_tokenizer, tiny
from tests.two_towers import save_model

pytestmark = pytest.mark.slow
TUTORIALS = Path(__file__).parents[1] / "docs/tutorials"
NOTEBOOKS = Path(__file__).parents[1] / "examples/notebooks"
both = pytest.mark.parametrize("kind", ["page", "notebook"])


def run(page: str, folder: Path, instead: dict[str, str] | None = None, kind: str = "page") -> str:
    """Run the blocks of a page in their order, or its notebook in one process, and return what they printed."""
    text = (TUTORIALS / f"{page}.md").read_text()
    if kind == "notebook":
        cells = [c for c in json.loads((NOTEBOOKS / f"{page}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        text = "".join(f"```python\n{''.join(cell['source'])}\n```\n" for cell in cells)
    for old, new in (instead or {}).items():
        assert old in text
        text = text.replace(old, new)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    if kind == "notebook":
        blocks = [("python", "\n".join(_cell(code) for _, code in blocks))]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    printed = ""
    for language, code in blocks:
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, code + ended.stdout + ended.stderr
        printed += ended.stdout
    return printed


def _cell(code: str) -> str:
    """Return a cell as Python without IPython, whose magic ``%%bash`` runs the rest of a cell in a shell."""
    first, _, rest = code.partition("\n")
    return f"import subprocess\nsubprocess.run(['bash', '-euc', {rest!r}], check=True)" if first == "%%bash" else code


@both
def test_own_rows(kind: str, tmp_path: Path) -> None:
    printed = run("own_csv", tmp_path, kind=kind)
    assert '"login"' in (tmp_path / "runs/predictions.jsonl").read_text()
    assert "{0: 'billing', 1: 'delivery', 2: 'login'}" in printed
    assert (tmp_path / "tickets-model/config.json").is_file()


def test_own_trainer(tmp_path: Path) -> None:
    printed = run("own_trainer", tmp_path)
    assert Path(printed.strip().splitlines()[-1]).is_file()


def test_images(tmp_path: Path) -> None:
    save_vit(tmp_path / "vit")
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        for name, colour in (("cats", "red"), ("dogs", "blue")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), colour).save(tmp_path / "images" / split / name / f"{i}.png")
    run(
        "images",
        tmp_path,
        {"google/vit-base-patch16-224-in21k": "vit", "--trainer.max_epochs 10": "--trainer.max_epochs 1"},
    )
    assert list(tmp_path.rglob("*.ckpt"))


@both
def test_clip(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path / "clip")
    known = "--data.data.init_args.colours [red,blue] --data.data.init_args.shapes [star,ring]"
    tiny = {"--config clip_shapes": f"--config clip_shapes {known} --data.data.init_args.shots 2"}
    tiny["--model.model openai/clip-vit-base-patch32"] = "--model.model clip --trainer.max_epochs 1"
    printed = run("clip", tmp_path, tiny, kind)
    assert "test_accuracy" in printed


@both
def test_chat(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "chat-model"
    save_tokenizer(model)
    tiny("llama").save_pretrained(model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    given = "chat-model --trainer.accelerator cpu --trainer.max_epochs 1 --data.max_length 64"
    tiny_run = {"HuggingFaceTB/SmolLM2-135M-Instruct": given, "--max_new_tokens 40": "--max_new_tokens 4"}
    printed = run("chat", tmp_path, tiny_run, kind)
    assert "peft computes the same logits" in printed
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    assert (tmp_path / "whole-model/model.safetensors").is_file()
