"""Few-shot scoring: demonstrations read once against all sequences in full, by number of demonstrations and labels.

    python -m tests.benchmarks.few_shot --rounds 11
    python -m tests.benchmarks.few_shot --rounds 3 --demonstrations 8 --labels 4    # less than a minute

The model has the shape of GPT-2 small, random weights and fp32; a demonstration has 20 tokens, a query 20, a label 2.
In full means one batch of all queries with all labels, where the head sees only the tokens that are scored. The ways
are run by turns; a ratio is taken within a round, and its median over the rounds is shown with the quartiles. All must
give the log-likelihoods of the first within a hundred-thousandth of their size.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor

from lightning_peft.tasks.likelihoods import causal_scores, recomputed_scores
from lightning_peft.tasks.shared_text import prefill
from tests.benchmarks.measure import interleave, ratio, table, versions

TOKENS = 20
"""Tokens of a demonstration, and of a query."""
TOLERANCE = 1e-5


def ways(model: torch.nn.Module, demonstrations: int, labels: int, queries: int) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to score; each gives log p of the labels, [queries, labels]."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    front = torch.randint(vocabulary, (demonstrations * TOKENS,), generator=draw).tolist()
    ids = torch.randint(vocabulary, (queries, TOKENS), generator=draw)
    mask = torch.ones_like(ids)
    words = torch.randint(vocabulary, (labels, 2), generator=draw).tolist()
    every = [words] * queries
    kept = prefill(model, front)
    assert kept is not None

    return {
        "all in full": lambda: recomputed_scores(model, ids, mask, every, front),
        "demonstrations once a batch": lambda: causal_scores(model, ids, mask, every, prefill(model, front)),
        "demonstrations kept": lambda: causal_scores(model, ids, mask, every, kept),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--labels", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config()).eval()
    rows, raw = [], []
    with torch.no_grad():
        for demonstrations in given.demonstrations:
            for labels in given.labels:
                calls = ways(model, demonstrations, labels, given.queries)
                first, *others = calls.values()
                expected = first()
                error = max((other() - expected).abs().max().item() for other in others)
                assert error <= TOLERANCE * max(1.0, expected.abs().max().item()), error
                times = interleave(calls, given.rounds, warm_up=0)
                base = times["all in full"]
                for name, taken in times.items():
                    middle, low, high = ratio(base.cpu, taken.cpu)
                    raw.append([demonstrations, labels, name, statistics.median(taken.cpu), middle, low, high, error])
                    cells = [str(demonstrations), str(labels), name, f"{1000 * statistics.median(taken.cpu):.0f}"]
                    rows.append([*cells, f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{error:.1e}"])
    print(f"GPT-2 small, {given.queries} queries, {given.threads} thread(s), {given.rounds} rounds; {versions()}\n")
    print(table(["demonstrations", "labels", "way", "CPU ms", "times as fast", "largest difference"], rows))
    if given.json:
        given.json.write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
