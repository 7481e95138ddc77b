"""Pictures of scale, offline: Prompt-Tuning's four ablations and chains of thought, on tiny models of four sizes.

The models are those of ``pretrain_tiny.py`` in four widths, trained when they are needed. Of the encoder-decoder each
has read with gaps (`t5`), and has gone on to write (`t5_lm`) for a tenth of the way or for all of it. A prompt of 20
words of the vocabulary on the model that writes is what each ablation changes in one respect (Lester et al. 2021,
section 3.2 and figure 3); full fine-tuning stands beside it. A causal model that reads Chinese answers sums at once or
step by step (Wei et al. 2022, figure 4). What has been run of a size stands in ``results.csv`` and is not run again.

    python -m examples.scaling                          # runs/scaling: 20 minutes of one core
    python -m examples.scaling --parts thought          # chains of thought alone
    python -m examples.scaling --steps 20 --tuned 3 --sizes 16 32    # to see that it runs
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import transformers as hf

from examples.compare_text import Built, Entry, Problem, be_quiet, run
from examples.pretrain_tiny import train
from lightning_peft.data import Seq2SeqData
from lightning_peft.reports.plots import plot
from lightning_peft.reports.rows import read_rows, write_rows
from lightning_peft.tasks import PromptedGeneration, Seq2Seq

SIZES = {16: 1, 32: 1, 64: 2, 96: 3}
"""Width -> blocks of the encoder and of the decoder, or of the one stack."""
STEPS = 2000
"""Batches that each model reads; the adapted one half as many more."""
PROMPT = {"num_virtual_tokens": 20, "init": "sampled_vocab"}
PROMPTS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "length": {f"{n} tokens": ({"num_virtual_tokens": n}, "t5_lm") for n in (1, 5, 20, 100)},
    "start": {name: ({"init": name}, "t5_lm") for name in ("sampled_vocab", "random_uniform")},
    "objective": {"gaps": ({}, "t5"), "gaps, sentinel before targets": ({}, "t5 sentinel"), "writing": ({}, "t5_lm")},
    "adaptation": {"none": ({}, "t5"), "a tenth": ({}, "t5_lm_tenth"), "all": ({}, "t5_lm")},
}
"""Ablation -> what is varied -> arguments other than those of `PROMPT`, and the model."""
THOUGHT = {"step by step": "问：{question}\n答：", "at once": "问：{question}\n答：答案是"}


def model(folder: Path, kind: str, width: int, steps: int) -> Path:
    """Return the folder of a model of a width, which is trained if it is not there."""
    place = folder / f"{kind}_{width}"
    if not (place / "config.json").is_file():
        start = model(folder, "t5", width, steps) if kind.startswith("t5_lm") else None
        share = {"t5_lm": 2, "t5_lm_tenth": 20}.get(kind, 1)
        train(kind.removesuffix("_tenth"), place, max(steps // share, 1), width, SIZES[width], start=start)
    return place


def pairs(folder: str, _: str | None, sentinel: bool) -> Built:
    """The sentence that tells a table of facts, by an encoder-decoder; behind its first sentinel if asked."""
    data = Seq2SeqData(
        tokenizer=folder, dataset="made://descriptions", max_length=64, max_target_length=32, sentinel=sentinel
    )
    return Seq2Seq(folder, generate="test", max_new_tokens=24), data


def prompts(folder: Path, width: int, steps: int, tuned: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what each ablation has found at one size with one seed, and what full fine-tuning has."""
    full = Entry("FullFineTuning", lr=3e-3)
    cases = {
        (ablation, label): (Entry("PromptTuning", PROMPT | other, 1e-1), kind)
        for ablation, varied in PROMPTS.items()
        for label, (other, kind) in varied.items()
    } | {(ablation, "full fine-tuning"): (full, "t5_lm") for ablation in PROMPTS}
    found: dict[str, float] = {}
    for (ablation, label), (entry, kind) in cases.items():
        plain, sentinel = kind.removesuffix(" sentinel"), kind.endswith("sentinel")
        place = model(folder, plain, width, steps)
        if (key := repr((entry, kind))) not in found:
            problem = Problem(place.name, "bleu", tuned, partial(pairs, sentinel=sentinel), {}, None)
            found[key] = run(problem, entry, entry.lr, seed, folder, tuned)["test"]
        yield {"dataset": ablation, "method": label, "metric": "bleu", "value": found[key]} | columns(place, seed)


def thought(folder: Path, width: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield how many sums one size gets right, step by step and at once; nothing is drawn here."""
    place = model(folder, "gpt2_zh", width, steps)
    for label, template in THOUGHT.items():
        task = PromptedGeneration(str(place), template, language="zh", answer="number", max_new_tokens=30)
        data = Seq2SeqData(
            tokenizer=str(place), dataset="made://zh_sums", source="question", target="answer", max_length=128
        )
        runner = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (scores,) = runner.test(task, data, verbose=False)
        value = scores["test_exact_match"]
        yield {"dataset": "sums in Chinese", "method": label, "metric": "accuracy", "value": value} | columns(place, 1)


def columns(place: Path, seed: int) -> dict[str, Any]:
    """Return the columns that say which model and seed a row is of."""
    network = hf.AutoModel.from_pretrained(place)
    return {"seed": seed, "model": place.name, "backbone_parameters": sum(p.numel() for p in network.parameters())}


def main() -> None:
    """Run what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--parts", nargs="+", default=["thought", "prompts"], choices=["thought", "prompts"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=STEPS, help="batches that each model reads")
    parser.add_argument("--tuned", type=int, default=300, help="steps that each method has")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of the prompts; the pictures show means")
    given = parser.parse_args()
    be_quiet()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    L.seed_everything(1, verbose=False)
    for part in given.parts:
        file = given.folder / part / "results.csv"
        for width, seed in product(given.sizes, given.seeds if part == "prompts" else [1]):
            rows = read_rows(file) if file.is_file() else []
            if (width, seed) not in {(int(row["model"].rpartition("_")[2]), row["seed"]) for row in rows}:
                wanted = (given.folder, width, given.steps)
                new = prompts(*wanted, given.tuned, seed) if part == "prompts" else thought(*wanted)
                write_rows(file, list(new))
        print(*plot(str(file), str(file.parent)), sep="\n")


if __name__ == "__main__":
    main()
