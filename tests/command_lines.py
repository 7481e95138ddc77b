"""Wrong command lines, drawn from right ones, and what is wrong with what the console script makes of them.

``PYTHONPATH=. python -m tests.command_lines`` runs all of them in one process and prints those that are not refused in
one sentence of our own; ``tests/test_command_lines.py`` runs a few of them in the gate.
"""

import contextlib
import io
import random
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from lightning_peft.cli import main
from tests.models import save_tokenizer, tiny

WORDS = ("good film", "bad film", "good music", "bad music", "good people", "bad people", "good water", "bad water")
BASE: dict[str, Any] = {
    "seed_everything": 1,
    "model": {"class_path": "TextClassification", "init_args": {"model": "model", "lr": 0.01}},
    "data": {
        "class_path": "TextClassificationData",
        "init_args": {"train": "train.csv", "max_length": 16, "batch_size": 4, "validation_share": 0.25},
    },
    "method": {"class_path": "LoRA", "init_args": {"r": 2}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    },
}
NUMBERS = ("null", "-1", ".nan", "-.inf", "1" + 30 * "0", "x", "ü😀", "[]", "{}", "[[1]]", "{a: 1}", "true", "''")
WORDS_FOR = ("null", "-1", "x", "ü😀", "[]", "{}", "[[1]]", "{a: 1}", "''", "'../..'", '"\\0"', "x" * 5000)
NUMBER_FIELDS = {
    "model.init_args.lr": "null",
    "model.init_args.weight_decay": "",
    "model.init_args.warmup": "",
    "model.init_args.head_lr": "null",
    "data.init_args.max_length": "",
    "data.init_args.batch_size": "",
    "data.init_args.validation_share": "",
    "data.init_args.num_workers": "",
    "data.init_args.seed": "",
    "method.init_args.r": "",
    "method.init_args.alpha": "",
    "method.init_args.dropout": "",
    "trainer.max_epochs": "null",
    "trainer.accumulate_grad_batches": "",
    "trainer.limit_train_batches": "null 1000000000000000000000000000000",
    "trainer.gradient_clip_val": "null 1000000000000000000000000000000",
    "trainer.check_val_every_n_epoch": "null 1000000000000000000000000000000",
    "trainer.log_every_n_steps": "null 1000000000000000000000000000000",
    "trainer.devices": "",
    "trainer.num_nodes": "",
    "seed_everything": "null true",
}
"""A number that is asked for -> the values among `NUMBERS` that are right all the same."""
WORD_FIELDS = {
    "model.class_path": "",
    "model.init_args.model": "",
    "model.init_args.dtype": "",
    "data.class_path": "",
    "data.init_args.train": "",
    "data.init_args.text": "",
    "data.init_args.label": "",
    "method.class_path": "",
    "method.init_args.target_modules": "null",
    "method.init_args.layers": "null -1",
    "method.init_args.rank_pattern": "{}",
    "method.init_args.exclude": "null",
    "method.init_args.backbone": "null ''",
    "trainer.accelerator": "",
    "trainer.strategy": "",
    "trainer.precision": "null",
    "trainer.callbacks": "null [] {}",
    "trainer.logger": "null []",
    "ckpt_path": "null",
    "optimizer": "null",
}
METHOD_FIELDS = {
    "PromptTuning": ("num_virtual_tokens", "init", "num_prompts"),
    "PrefixTuning": ("num_virtual_tokens", "mid_dim", "positions"),
    "IA3": ("target_modules", "feedforward_modules"),
    "Adapter": ("bottleneck_dim", "variant"),
    "BitFit": ("biases",),
    "DiffPruning": ("sparsity",),
    "PartialK": ("k",),
}


class Case(NamedTuple):
    """A wrong command line.

    Attributes:
        name: what is wrong with it.
        words: what follows the name of the script.
        files: name of a file -> its text, written before.
    """

    name: str
    words: tuple[str, ...]
    files: dict[str, str] = {}  # noqa: RUF012 (never changed)


def with_value(path: str, value: str) -> Case:
    """Return the case of a file of arguments in which one has another value, given as YAML."""
    config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASE))
    *parents, last = path.split(".")
    holder = config
    for parent in parents:
        holder = holder.setdefault(parent, {})
    holder[last] = yaml.safe_load(value)
    text = yaml.safe_dump(config, allow_unicode=True)
    return Case(f"{path}: {value[:40]}", ("fit", "--config", "case.yaml"), {"case.yaml": text})


def cases() -> list[Case]:
    """Return all wrong command lines, always the same ones."""
    found = [
        with_value(path, value)
        for fields, values in ((NUMBER_FIELDS, NUMBERS), (WORD_FIELDS, WORDS_FOR))
        for path, right in fields.items()
        for value in values
        if value not in right.split(" ")
    ]
    return [*found, *_lines(), *_structures(), *_files()]


def _lines() -> Iterator[Case]:
    fit = ("fit", "--config", "tiny.yaml")
    given = [
        ("--trainer.strategy", "ddp_spawn"),
        ("--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"),
        ("--trainer.strategy", "ddp_fork", "--trainer.devices", "2"),
        ("--trainer.strategy", "ddp_notebook", "--trainer.devices", "2"),
        ("--trainer.accumulate_grad_batches", "0"),
        ("--trainer.accumulate_grad_batches", "-3"),
        ("--ckpt_path", "train.csv"),
        ("--ckpt_path", "tiny.yaml"),
        ("--ckpt_path", "model"),
        ("--ckpt_path", "model/model.safetensors"),
        ("--ckpt_path", "nowhere.ckpt"),
        ("--ckpt_path", "best"),
        ("--ckpt_path", "empty.ckpt"),
        ("--method.rank", "4"),
        ("--method", "Lora"),
        ("--method", "LoRA", "--method.target_modules", "[query"),
        ("--method", "LoRA", "--method.target_modules", "("),
        ("--method", "LoRA", "--method.layers", "[99]"),
        ("--method", "LightningModule"),
        ("--method", "os.system"),
        ("--method", "torch.nn.Linear"),
        ("--model", "LoRA"),
        ("--model", "torch.nn.Linear"),
        ("--model", "TextClassification", "--model.model"),
        ("--data", "LoRA"),
        ("--data", "no.such.Class"),
        ("--trainer", "3"),
        ("--trainer.nosuch", "3"),
        ("--trainer.max_epochs",),
        ("--trainer.callbacks", "NoSuchCallback"),
        ("--trainer.callbacks+=NoSuchCallback",),
        ("--trainer.logger", "WandbLogger"),
        ("--trainer.logger", "NoLogger"),
        ("--trainer.accelerator", "tpu"),
        ("--trainer.accelerator", "gpu"),
        ("--trainer.precision", "17"),
        ("--trainer.profiler", "none"),
        ("--optimizer", "NoSuch"),
        ("--optimizer", "SGD", "--optimizer.lr", "null"),
        ("--optimizer", "SGD", "--optimizer.lr", "-1"),
        ("--optimizer", "SGD", "--optimizer.lr", "x"),
        ("--lr_scheduler", "NoSuch"),
        ("--config", "nowhere.yaml"),
        ("--config", "train.csv"),
        ("--config", "model"),
        ("--config", ""),
        ("--config",),
        ("--nosuch",),
        ("nosuch",),
        ("--", "x"),
        ("--data.init_args.train",),
        ("--data.train", ""),
        ("--data.train", "."),
        ("--data.train", "model/model.safetensors"),
        ("--data.dataset", "no/such"),
        ("--data.dataset", "made://nosuch"),
        ("--model.model", "no/such"),
        ("--model.model", ""),
        ("--model.model", "train.csv"),
        ("--model.model", "package://nosuch/model"),
        ("--model.model", "package://"),
        ("--model.model", "s3://bucket/model"),
        ("--method.r", "null"),
        ("--method.alpha", "null"),
        ("--method.dropout", "null"),
        ("--seed_everything", "-5"),
        ("--print_config=nosuch",),
        ("--trainer.default_root_dir", "train.csv"),
        ("--trainer.callbacks+=SafeRequeue", "--trainer.callbacks.every_minutes", "-1"),
        ("--trainer.callbacks+=EarlyStopping",),
        ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "nosuch"),
        (
            "--trainer.callbacks+=EarlyStopping",
            "--trainer.callbacks.monitor=val_loss",
            "--trainer.callbacks.patience=-1",
        ),
        ("--trainer.callbacks+=LearningRateMonitor",),
        ("--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "x"),
        (
            "--trainer.enable_checkpointing=true",
            "--trainer.callbacks+=ModelCheckpoint",
            "--trainer.callbacks.monitor=no",
        ),
        ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "{nosuch"),
        ("--trainer.val_check_interval", "1000"),
        ("--trainer.val_check_interval", "00:00:01"),
        ("--trainer.val_check_interval", "00:00:00:00"),
        ("--trainer.max_time", "1h"),
        ("--trainer.max_time", "00:00:00:00"),
        ("--trainer.max_time", "{lightyears: 1}"),
        ("--trainer.limit_train_batches", "0.001"),
        ("--trainer.limit_val_batches", "1.5"),
        ("--trainer.min_epochs", "5", "--trainer.max_epochs", "1"),
        ("--optimizer", "SGD", "--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "nosuch"),
        ("--optimizer", "SparseAdam"),
        ("--ckpt_path", "hpc"),
        ("--ckpt_path", "s3://bucket/file.ckpt"),
        ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", "train.csv"),
        ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "-1"),
        ("--trainer.callbacks+=DeltaEMA", "--trainer.callbacks.decay", "2"),
        ("--trainer.callbacks+=DeltaGuard", "--trainer.callbacks.action", "shout"),
        ("--trainer.limit_train_batches", "0"),
        ("--trainer.val_check_interval", "0"),
        ("--trainer.devices", "0"),
        ("--trainer.strategy", "fsdp"),
        ("--trainer.strategy", "deepspeed"),
        ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "train.csv"),
        ("--trainer.plugins", "x"),
        ("--trainer.inference_mode", "null"),
        ("--lr_scheduler", "StepLR"),
        ("--optimizer", "SGD", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "0"),
        ("--optimizer", "SGD", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "null"),
        ("--optimizer", "Adam", "--optimizer.betas", "[2,3]"),
        ("--method", "PromptTuning", "--method.num_virtual_tokens", "1000000"),
        ("--method", "LoRA", "--method.rank_pattern", "{query: null}"),
        ("--method", "LoRA", "--method.rank_pattern", "&a {query: *a}"),
        ("--model.dtype", "float64"),
        ("--model", "CausalLM"),
        ("--model", "TokenClassification"),
        ("--data", "CausalLMData"),
        ("--data", "ImageData"),
        ("--data.text", "[text,text,text]"),
        ("--data.bucket", "null"),
    ]
    yield from (Case(" ".join(words)[:60], (*fit, *words)) for words in given)
    for words in [
        ("fit",),
        ("fit", "--model", "TextClassification"),
        ("fit", "--model", "TextClassification", "--model.model", "model"),
        ("fitt", "--config", "tiny.yaml"),
        ("FIT",),
        ("",),
        ("--config", "tiny.yaml", "fit"),
        ("info",),
        ("info", "nowhere.ckpt"),
        ("info", "train.csv"),
        ("info", "model"),
        ("info", "."),
        ("info", "empty.ckpt"),
        ("info", "model/model.safetensors"),
        ("info", "a", "b", "c"),
        ("info", "--nosuch"),
        ("info", ""),
        ("info", "x" * 5000),
        ("configs", "show", "nosuch"),
        ("configs", "x"),
        ("test", "--config", "tiny.yaml", "--ckpt_path", "best"),
        ("submit", "--config", "", "--dry-run"),
        ("check", "--config", "tiny.yaml", "--trainer.accumulate_grad_batches", "0"),
        ("merge", "nowhere.ckpt", "out"),
        ("merge", "train.csv", "out"),
        ("merge", "nowhere.ckpt", "tiny.yaml"),
        ("merge", "model/model.safetensors"),
        ("import", "model", "out.safetensors"),
        ("import", "nowhere", "out.safetensors"),
        ("import", "nowhere", "out.txt"),
        ("import", "train.csv", "out.safetensors", "--config", "tiny.yaml"),
        ("export", "nowhere.ckpt", "out"),
        ("export", "train.csv", "out", "--to", "nosuch"),
        ("export", "train.csv", "out"),
        ("templates", "nowhere.yaml"),
        ("templates", "train.csv"),
        ("templates", "tiny.yaml"),
        ("templates", "model"),
        ("plot", "nowhere.csv", "out"),
        ("plot", "train.csv", "out"),
        ("plot", "empty.ckpt", "out"),
        ("methods", "NoSuch"),
        ("methods", "--nosuch"),
        ("submit",),
        ("submit", "--config", "nowhere.yaml"),
        ("submit", "--config", "tiny.yaml", "--nodes", "0"),
        ("submit", "--config", "tiny.yaml", "--gpus", "x"),
        ("submit", "--config", "tiny.yaml", "--name", "bash"),
        ("validate", "--config", "tiny.yaml", "--ckpt_path", "train.csv"),
        ("test", "--config", "tiny.yaml", "--ckpt_path", "train.csv"),
        ("test", "--config", "tiny.yaml", "--ckpt_path", "."),
        ("predict", "--config", "tiny.yaml", "--ckpt_path", "empty.ckpt"),
        ("check", "--config", "tiny.yaml", "--method.r", "null"),
        ("check", "--config", "tiny.yaml", "--meta", "x"),
    ]:
        yield Case(" ".join(words) or "nothing", words)


def _structures() -> Iterator[Case]:
    whole = yaml.safe_dump(BASE)
    texts = {
        "recursive mapping": f"{whole}\nmodel: &a\n  class_path: *a\n",
        "recursive arguments": "model: &a\n  class_path: TextClassification\n  init_args: *a\n",
        "recursive list": "trainer:\n  callbacks: &a\n    - *a\n",
        "recursive root": "&a\ntrainer: *a\n",
        "recursive method": "method: &m\n  class_path: LoRA\n  init_args:\n    rank_pattern: *m\n",
        "billion laughs": "a: &a [1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
        + "trainer: {callbacks: *g}\n",
        "unknown anchor": "trainer: *nowhere\n",
        "tag": "trainer: !!python/object/apply:os.system ['true']\n",
        "tab": "trainer:\n\tmax_epochs: 1\n",
        "unclosed": "trainer: {max_epochs: 1\n",
        "two documents": "trainer: {max_epochs: 1}\n---\ntrainer: {max_epochs: 2}\n",
        "list at the root": "- trainer\n- model\n",
        "word at the root": "trainer\n",
        "number at the root": "3\n",
        "null keys": "null: 3\n",
        "number as key": "3: 4\n",
        "mapping as key": "{a: 1}: 4\n",
        "dotted keys": "trainer.max_epochs.x: 3\n",
        "nested subcommand": "fit:\n  fit:\n    fit: 3\n",
        "deep": "trainer: " + "[" * 3000 + "]" * 3000 + "\n",
        "deep mapping": "".join(f"{'  ' * i}a:\n" for i in range(300)),
        "unicode key": "trainér: {max_epochs: 1}\n",
        "byte": "trainer: \x07\n",
        "empty": "",
        "trainer is a list": "trainer: [1, 2]\n",
        "trainer is null": "trainer: null\n",
        "model is a list": "model: [TextClassification]\n",
        "method is a list": "method: [LoRA, BitFit]\n",
        "method is a number": "method: 3\n",
        "method with dict": "method: {class_path: LoRA, init_args: [1]}\n",
        "method with odd key": "method: {class_path: LoRA, init_args: {r: 2}, other: 3}\n",
        "two levels": "method: {class_path: {class_path: LoRA}}\n",
        "callback is a method's argument": "trainer: {callbacks: [{r: 3}]}\n",
        "callback without class": "trainer: {callbacks: [{init_args: {}}]}\n",
        "callback is null": "trainer: {callbacks: [null]}\n",
        "callback of another kind": "trainer: {callbacks: [{class_path: TextClassification}]}\n",
        "checkpoint": "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: 3, mode: up}}]}\n",
        "checkpoint top k": "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: -7}}]}\n",
        "strategy of another kind": "trainer: {strategy: {class_path: LoRA}}\n",
        "plugins": "trainer: {plugins: [nosuch]}\n",
        "seed": "seed_everything: {a: 1}\n",
    }
    for name, text in texts.items():
        yield Case(name, ("fit", "--config", "tiny.yaml", "--config", "case.yaml"), {"case.yaml": text})
        if name.startswith(("recursive", "list at", "deep", "billion")):
            yield Case(f"{name} alone", ("check", "--config", "case.yaml"), {"case.yaml": text})


def _files() -> Iterator[Case]:
    draw = random.Random(0)
    fit = ("fit", "--config", "tiny.yaml")
    for kind, fields in METHOD_FIELDS.items():
        for field in fields:
            for value in draw.sample(NUMBERS, 3):
                yield Case(f"{kind}.{field}: {value[:20]}", (*fit, "--method", kind, f"--method.{field}={value}"))
    texts = {
        "no header": "",
        "one column": "text\ngood\n",
        "unlike rows": "text,label\ngood\nbad,bad,bad\n",
        "one class": "text,label\n" + "good film,good\n" * 8,
        "binary": "\x00\x01\x02,\x03\n\x04,\x05\n",
        "unclosed quote": 'text,label\n"good,good\n',
        "float labels": "text,label\n" + "a,0.5\nb,1.5\n" * 4,
        "two rows": "text,label\na,x\nb,y\n",
    }
    for name, text in texts.items():
        yield Case(f"rows: {name}", (*fit, "--data.train", "case.csv"), {"case.csv": text})
    for name, text in {
        "empty": "",
        "no json": "{",
        "list": "[1]",
        "numbers": "1\n2\n",
        "nested": '{"text": {}}',
    }.items():
        yield Case(f"json: {name}", (*fit, "--data.train", "case.jsonl"), {"case.jsonl": text})


def workspace(folder: Path) -> None:
    """Write a tiny model, rows to train on, and a right file of arguments."""
    save_tokenizer(folder / "model")
    tiny("bert").save_pretrained(folder / "model")
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{text},{text.split()[0]}\n" for text in WORDS * 4))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "empty.ckpt").write_text("")


class Late(BaseException):
    """A command that does not end."""


class Ended(NamedTuple):
    """How a command has ended."""

    code: int | None
    printed: str
    error: BaseException | None


def run(case: Case, folder: Path, seconds: int = 60) -> Ended:
    """Run the console script in this process, in ``folder``."""
    for name, text in case.files.items():
        (folder / name).write_text(text)
    out = io.StringIO()
    before = sys.argv, signal.signal(signal.SIGALRM, _late), torch.get_default_dtype()
    sys.argv = ["lightning-peft", *case.words]
    signal.alarm(seconds)
    code: int | None = 0
    error: BaseException | None = None
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as raised:
        code, error = None, raised
    finally:
        signal.alarm(0)
        sys.argv = before[0]
        signal.signal(signal.SIGALRM, before[1])
        torch.set_default_dtype(before[2])
    return Ended(code, out.getvalue(), error)


def problem(ended: Ended) -> str:
    """Return what is wrong with how a wrong command line has ended; '' for nothing."""
    lines = [line for line in ended.printed.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if ended.error is not None:
        return f"raised {type(ended.error).__name__}: {str(ended.error)[:200]}"
    if ended.code == 0:
        return "was accepted"
    if "Traceback" in ended.printed:
        return f"has a traceback, {last[:200]}"
    if "--debug shows where" in last or FOREIGN.search(last):
        return f"is another library's: {last[:300]}"
    if ended.code != 2:
        return f"has exit code {ended.code}: {last[:200]}"
    if not re.search(r"[.?)!]$", last) or (": " not in last and "; it has " not in last and "Did you mean" not in last):
        return f"names no remedy: {last[:200]}"
    return ""


FOREIGN = re.compile(
    r"Parser key|Does not validate|Problem with given|Expected a|Not a valid|Given value|validation failed"
    r"|unrecognized arguments|Unable to load|Unexpected (class|import)|mapping values|while (parsing|scanning)"
)
"""Words of jsonargparse, argparse and PyYAML."""


def _late(*_: Any) -> None:
    raise Late


def report() -> int:
    """Run all cases and print those that end wrongly."""
    every, wrong = cases(), 0
    chosen = [case for case in every if not sys.argv[1:] or re.search(sys.argv[1], case.name)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workspace(folder)
        for case in chosen:
            ended = run(case, folder)
            said = problem(ended)
            wrong += bool(said)
            shown = (ended.printed.strip().splitlines() or [""])[-1][:160]
            print(f"{'WRONG' if said else 'ok'}\t{case.name[:70]}\t{said or shown}", flush=True)
    print(f"{wrong} of {len(chosen)} end wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(report())
