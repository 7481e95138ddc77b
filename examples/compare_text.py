"""Compare the text methods on tasks with known answers, between the frozen model and full fine-tuning.

The rows are about a made-up valley (`made://`), the models are the tiny ones of ``pretrain_tiny.py``, which have read
its corpus. Every method of a task has the same data, number of steps and schedule. Its learning rate had the lowest
validation loss with seed 0 among some, which ``--rates`` tries again; the scores are those of the test split with seeds
1, 2 and 3 after the last step, which draw initial values; the order of the rows is the same. The share of the gap is
``(method - frozen) / (full - frozen)``.

    python examples/pretrain_tiny.py       # the models, once
    python examples/compare_text.py        # all tables, below half an hour on one core
    python examples/compare_text.py --tasks opinions --methods WARP --seeds 1 --rates 3e-3 1e-2 3e-2
"""

import argparse
import csv
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from torchmetrics.text import SacreBLEUScore

import lightning_peft
from lightning_peft import data as sources
from lightning_peft import tasks
from lightning_peft.data import synthetic, synthetic_zh

Built = tuple[L.LightningModule, L.LightningDataModule]
HEAD_RATE = 1e-2
"""The learning rate of a new head, whatever the method."""
OPINIONS = {"bad": "bad", "good": "good"}
TOPICS = {"animal": "dog", "food": "bread", "place": "river"}


@dataclass
class Entry:
    """A method: its name in `lightning_peft`, arguments, learning rate, a template of its own."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-2
    template: str | None = None


@dataclass
class Problem:
    """A task: the model it needs, its score, how many steps each method has, how it is built, and who takes part."""

    model: str
    score: str
    steps: int
    build: Callable[[str, str | None], Built]
    methods: dict[str, Entry]
    frozen: str | None
    """The method that stands for the frozen model; None: the model as it is, before any step."""
    prompts: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """What a frozen model and a written prompt reach: label -> model and arguments of a prompted task."""


def opinions(model: str, template: str | None) -> Built:
    """Good or bad, said in a gap right behind the text: 'the soup in lund was not dull . [MASK] .'."""
    data = sources.ClozeClassificationData(
        tokenizer=model, dataset="made://opinions", template=template or "{text} {mask} .", verbalizer=OPINIONS,
        max_length=64,
    )  # fmt: skip
    return tasks.ClozeClassification(model, data.verbalizer, data.label_names, lead=data.lead), data


def topics(model: str, template: str | None) -> Built:
    """What a sentence is about, said by one word of its kind: 'ana likes the red fox . [MASK] .'."""
    data = sources.ClozeClassificationData(
        tokenizer=model, dataset="made://sentences", template=template or "{text} {mask} .", verbalizer=TOPICS,
        label="topic", max_length=64,
    )  # fmt: skip
    return tasks.ClozeClassification(model, data.verbalizer, data.label_names, lead=data.lead), data


def zh_opinions(model: str, template: str | None) -> Built:
    """Good or bad in Chinese, said by two characters at two masks: '河村的鱼汤不难吃。[MASK][MASK]。'."""
    data = sources.ClozeClassificationData(
        tokenizer=model, dataset="made://zh_opinions", template=template or "{text}{mask}。",
        verbalizer=synthetic_zh.SUMMARY, multi_token=True, max_length=64,
    )  # fmt: skip
    return tasks.ClozeClassification(model, data.verbalizer, data.label_names, lead=data.lead), data


def zh_facts(model: str, template: str | None) -> Built:
    """Who keeps which animal in Chinese, one character each: '王安[MASK]。'."""
    data = sources.KnowledgeProbingData(
        tokenizer=model, dataset="made://zh_facts", template=template or "{sub}{obj}。", max_length=32, batch_size=8
    )
    return tasks.KnowledgeProbing(model, data.candidates, lead=data.lead), data


def facts(model: str, template: str | None) -> Built:
    """Who keeps which animal, without the words that ask for it; nobody who is asked about is learnt from."""
    data = sources.KnowledgeProbingData(
        tokenizer=model, dataset="made://facts", template=template or "{sub} {obj} .", max_length=32, batch_size=8
    )
    return tasks.KnowledgeProbing(model, data.candidates), data


def tags(model: str, _: str | None = None) -> Built:
    """Persons, towns and foods in sentences."""
    data = sources.TokenClassificationData(tokenizer=model, dataset="made://tags", max_length=64)
    return tasks.TokenClassification(model, data.label_names), data


def descriptions(model: str, _: str | None = None) -> Built:
    """The sentence that tells a table of facts, by a causal model."""
    data = sources.CausalLMData(
        tokenizer=model, dataset="made://descriptions", prompt="source", separator=" = ", target="target"
    )
    return tasks.CausalLM(model, generate="test", max_new_tokens=24), data


def pairs(model: str, _: str | None = None) -> Built:
    """The same by an encoder-decoder."""
    data = sources.Seq2SeqData(tokenizer=model, dataset="made://descriptions", max_length=64, max_target_length=32)
    return tasks.Seq2Seq(model, generate="test", max_new_tokens=24), data


FULL = Entry("FullFineTuning", lr=1e-3)
BETWEEN = "{text} {v:8} {mask} ."


def cloze(words: dict[str, str], encoder_lr: float) -> dict[str, Entry]:
    """Return the methods for a gap in a text."""
    return {
        "WARP(8)": Entry("WARP", {"words": list(words.values())}, template=BETWEEN),
        "PromptTuning(8)": Entry("PromptTuning", {"num_virtual_tokens": 8}),
        "PTuning(8)": Entry("PTuning", lr=encoder_lr, template=BETWEEN),
        "PTuningV2(8)": Entry("PTuningV2", {"num_virtual_tokens": 8}, 1e-1),
        "FullFineTuning": FULL,
    }


def shots(*templates: str, count: int = 8) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what the causal model is asked, alone and behind solved rows."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for template in templates:
        shown = template.replace("{text} ", "").replace("{answer}", "___")
        found[f"gpt2, '{shown}', no examples"] = ("gpt2", {"templates": template})
        some = {"templates": template, "demonstrations": count, "select": "balanced"}
        found[f"gpt2, '{shown}', {count} examples"] = ("gpt2", some)
    return found


WRITTEN = {
    "PrefixTuning(8)": Entry("PrefixTuning", {"num_virtual_tokens": 8, "mid_dim": 128}, 3e-3),
    "PromptTuning(8)": Entry("PromptTuning", {"num_virtual_tokens": 8}, 1e-1),
    "LoRA(r=4)": Entry("LoRA", {"r": 4}, 1e-2),
    "FullFineTuning": Entry("FullFineTuning", lr=3e-3),
}
TOLD = {"templates": "{source} = {answer}"}
PROBLEMS = {
    "topics": Problem(
        "bert",
        "accuracy",
        300,
        topics,
        cloze(TOPICS, 3e-3),
        None,
        {
            "bert, 'the [MASK] .'": ("bert", {"templates": "{text} the {mask} ."}),
            "bert, 'the [MASK] .', calibrated": ("bert", {"templates": "{text} the {mask} .", "calibrate": True}),
            **shots("{text} the {answer}"),
        },
    ),
    "tags": Problem(
        "bert",
        "f1",
        200,
        tags,
        {
            "LinearProbe": Entry("LinearProbe", lr=1e-2),
            "PromptTuning(8)": Entry("PromptTuning", {"num_virtual_tokens": 8}, 1e-1),
            "PTuningV2(8)": Entry("PTuningV2", {"num_virtual_tokens": 8}, 3e-1),
            "PrefixTuning(8)": Entry("PrefixTuning", {"num_virtual_tokens": 8}, 1e-3),
            "LoRA(r=4)": Entry("LoRA", {"r": 4}, 1e-2),
            "BitFit": Entry("BitFit", lr=3e-2),
            "FullFineTuning": FULL,
        },
        "LinearProbe",
    ),
    "opinions": Problem(
        "bert",
        "accuracy",
        500,
        opinions,
        cloze(OPINIONS, 1e-3),
        None,
        {
            "bert, 'all in all it was [MASK] .'": ("bert", {"templates": "{text} all in all it was {mask} ."}),
            **shots("{text} all in all it was {answer}"),
        },
    ),
    "zh_opinions": Problem(
        "bert_zh",
        "accuracy",
        300,
        zh_opinions,
        {
            "PromptTuning(8)": Entry("PromptTuning", {"num_virtual_tokens": 8}),
            "FullFineTuning": FULL,
        },
        None,
    ),
    "zh_facts": Problem(
        "bert_zh",
        "p_at_1",
        400,
        zh_facts,
        {
            "PTuning(6)": Entry("PTuning", lr=1e-2, template="{v:2}{sub}{v:2}{obj}{v:2}"),
            "PromptTuning(6)": Entry("PromptTuning", {"num_virtual_tokens": 6}),
            "FullFineTuning": FULL,
        },
        None,
    ),
    "descriptions": Problem(
        "gpt2",
        "bleu",
        300,
        descriptions,
        WRITTEN,
        None,
        {
            "gpt2, no examples": ("gpt2", TOLD),
            "gpt2, 3 examples": ("gpt2", {**TOLD, "demonstrations": 3, "separator": "\n"}),
        },
    ),
    "pairs": Problem("t5_lm", "bleu", 300, pairs, WRITTEN, None),
    "facts": Problem(
        "bert",
        "p_at_1",
        400,
        facts,
        {
            "PTuning(6)": Entry("PTuning", lr=1e-2, template="{v:2} {sub} {v:2} {obj} {v:2}"),
            "PromptTuning(6)": Entry("PromptTuning", {"num_virtual_tokens": 6}),
            "FullFineTuning": FULL,
        },
        None,
        {"bert, 'NAME keeps a [MASK] .'": ("bert", {"template": "{sub} keeps a {obj} ."})},
    ),
}


def trainer(steps: int = 1, *callbacks: L.Callback) -> L.Trainer:
    """Return a trainer that is silent and writes nothing."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def run(
    problem: Problem, entry: Entry | None, lr: float, seed: int, models: Path, steps: int, tests: bool = True
) -> dict[str, Any]:
    """Train once, and return test score or validation loss; without a method, that of the model as it is."""
    L.seed_everything(seed, verbose=False)
    start, trained = time.perf_counter(), 0
    task, data = problem.build(str(models / problem.model), entry.template if entry else None)
    runner = trainer(steps)
    if entry is not None:
        task.lr, task.head_lr = lr, HEAD_RATE
        extra = {"template": entry.template} if entry.template else {}
        runner = trainer(steps, getattr(lightning_peft, entry.method)(**entry.arguments, **extra))
        runner.fit(task, data)
        trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    (scores,) = (runner.test if tests else runner.validate)(task, data, verbose=False)
    return {
        "lr": lr,
        "seed": seed,
        **({"test": scores[f"test_{problem.score}"]} if tests else {"val_loss": scores["val_loss"]}),
        "trained": trained,
        "seconds": round(time.perf_counter() - start, 1),
    }


def prompted(name: str, kind: str, arguments: dict[str, Any], models: Path, seed: int) -> dict[str, Any]:
    """Return the test score of a frozen model and a written prompt; the seed draws the demonstrations."""
    L.seed_everything(seed, verbose=False)
    start, model = time.perf_counter(), str(models / kind)
    task: Any
    data: Any
    if name in ("opinions", "topics"):
        column, words, rows = ("label", OPINIONS, name) if name == "opinions" else ("topic", TOPICS, "sentences")
        data = sources.TextClassificationData(tokenizer=model, dataset=f"made://{rows}", label=column, max_length=64)
        task = tasks.PromptedClassification(model, words=words, seed=seed, **arguments)
        (scores,) = trainer().test(task, data, verbose=False)
        score = scores["test_accuracy"]
    elif name == "facts":
        task, data = facts(model, arguments["template"])
        (scores,) = trainer().test(task, data, verbose=False)
        score = scores["test_p_at_1"]
    else:
        task = tasks.PromptedGeneration(model, target="target", max_new_tokens=24, seed=seed, **arguments)
        data = sources.Seq2SeqData(tokenizer=model, dataset="made://descriptions", max_length=64, bucket=False)
        texts = [path[0].strip() for batch in trainer().predict(task, data) for path in batch["text"]]
        right = [[row["target"]] for row in synthetic.load("descriptions")["test"]]
        score = SacreBLEUScore()(texts, right).item()
    return {"seed": seed, "test": score, "trained": 0, "seconds": round(time.perf_counter() - start, 1)}


def compare(name: str, given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Run one task: the frozen model, its prompts, and each method at its best learning rate."""
    problem = PROBLEMS[name]
    steps = given.steps or problem.steps

    def add(label: str, what: str, row: dict[str, Any]) -> dict[str, Any]:
        keep({"task": name, "score": problem.score, "method": label, "what": what, "steps": steps, **row})
        return row

    if problem.frozen is None:
        add("frozen", "frozen", run(problem, None, 0.0, 0, given.models, 1))
    for label, (kind, arguments) in problem.prompts.items():
        for seed in given.seeds if arguments.get("demonstrations") else given.seeds[:1]:
            add(label, "prompt", prompted(name, kind, arguments, given.models, seed))
    for label, entry in problem.methods.items():
        if given.methods and entry.method not in given.methods:
            continue
        best = entry.lr
        if given.rates:
            tried = {
                lr: add(label, "choice", run(problem, entry, lr, 0, given.models, steps, tests=False))["val_loss"]
                for lr in given.rates
            }
            best = min(tried, key=lambda lr: tried[lr])
        for seed in given.seeds:
            add(label, "test", run(problem, entry, best, seed, given.models, steps))


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows of one task as a table in Markdown, the frozen model first, the best last."""
    problem = PROBLEMS[name]
    scored: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] == name and row["what"] != "choice":
            scored.setdefault(row["method"], []).append(row)
    means = {label: statistics.mean(row["test"] for row in own) for label, own in scored.items()}
    low, high = means.get(problem.frozen or "frozen"), means.get("FullFineTuning")
    lines = [f"| {name}, {problem.model} | {problem.score} | share of the gap | trained | learning rate |"]
    lines.append("|---|---|---:|---:|---|")
    for label in sorted(means, key=lambda label: means[label]):
        own = scored[label]
        spread = f" ± {statistics.stdev(row['test'] for row in own):.3f}" if len(own) > 1 else ""
        share = ""
        if low is not None and high is not None and high > low and own[0]["what"] != "prompt":
            share = f"{(means[label] - low) / (high - low):.2f}"
        rate = f"{own[0]['lr']:g}" if own[0].get("lr") else ""
        shown = label if own[0]["what"] != "test" else f"`{label}`"
        lines.append(f"| {shown} | {means[label]:.3f}{spread} | {share} | {own[0]['trained']:,} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Run the tasks that are asked for, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/tiny"), help="what pretrain_tiny.py has made")
    parser.add_argument("--tasks", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", help="only these, by their names in lightning_peft")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to choose from by the validation loss")
    parser.add_argument("--steps", type=int, help="of every method; by default each task has its own number")
    parser.add_argument("--rows", type=Path, default=Path("runs/compare_text.json"), help="all runs: .json or .csv")
    given = parser.parse_args()
    be_quiet()
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    missing = [name for name in given.tasks if not (given.models / PROBLEMS[name].model / "config.json").is_file()]
    if missing:
        parser.error(f"{given.models} has no model for {', '.join(missing)}: run python examples/pretrain_tiny.py")
    for name in given.tasks:
        compare(name, given, keep)
        write(rows, given.rows)
    print("\n" + "\n\n".join(table(name, rows) for name in given.tasks))


def be_quiet() -> None:
    """Compute in one thread, and print results alone."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for noise in (".*does not have many workers", ".*LeafSpec", ".*srun"):
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write all runs, as JSON or CSV by the ending of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
