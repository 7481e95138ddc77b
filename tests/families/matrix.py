"""Makes the page of the docs that says which method works on which family: ``python -m tests.families.matrix``.

Each pair is applied, run, trained for a step and removed on a tiny random model. A method works where all that it
trains gets a gradient, changes the output, and is gone afterwards.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import OFT, VPT, Adapter, HiRA, LoReFT, MiSS, PromptTuning, PTuningV2, SHiRA, TuningError
from lightning_peft.core.method import TuningMethod
from tests.contract import shake
from tests.families.builders import Built
from tests.families.more import WHOLE, build_any
from tests.families.test_families import METHODS, loss

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MORE: dict[str, TuningMethod] = {
    "parallel": Adapter(form="parallel", bottleneck=2),
    "prompt_tuning": PromptTuning(num_virtual_tokens=2, init="random_uniform"),
    "p_tuning_v2": PTuningV2(num_virtual_tokens=2),
    "vpt": VPT(num_virtual_tokens=2, dropout=0.0),
    "miss": MiSS(r=2),
    "shira": SHiRA(r=2),
    "hira": HiRA(r=2),
    "oft": OFT(block_size=4),
    "loreft": LoReFT(r=2),
}
COLUMNS: dict[str, TuningMethod] = METHODS | MORE
MARKS = {"works": "+", "refused": "-", "fails": "!"}


class Outcome(NamedTuple):
    """What became of a method on a family: how it ended, and the sentence or the reason."""

    end: Literal["works", "refused", "fails"]
    why: str = ""


def outcome(build: Callable[[], Built], method: TuningMethod) -> Outcome:
    """Try a method on a new model."""
    model, batch = build()
    try:
        return _tried(model, batch, method)
    except TuningError as refused:
        return Outcome("refused", str(refused).replace(type(model).__name__, "the model"))
    except Exception as error:
        return Outcome("fails", f"{type(error).__name__}: {error}".splitlines()[0][:160])


def _tried(model: nn.Module, batch: dict[str, Any], method: TuningMethod) -> Outcome:
    with torch.no_grad():
        before = loss(model, batch)[1]
    method.apply(model)
    shake(model, 0.05)
    error, live = loss(model, dict(method.prepare(batch)))
    error.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None]
    method.remove(model)
    with torch.no_grad():
        after = loss(model, batch)[1]
    if not trained or _same(live, before):
        return Outcome("fails", "it changes nothing")
    if not torch.equal(after, before):
        return Outcome("fails", "the model is another one when it has been removed")
    return (
        Outcome("fails", f"{len(dead)} of {len(trained)} got no gradient, e.g. {dead[0]}") if dead else Outcome("works")
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)


def table(families: Iterable[str] = WHOLE) -> dict[str, dict[str, Outcome]]:
    """Return family -> method -> what became of it."""
    return {
        family: {name: outcome(lambda family=family: build_any(family), method) for name, method in COLUMNS.items()}
        for family in families
    }


def page(rows: dict[str, dict[str, Outcome]]) -> str:
    """Return the page of the docs."""
    names = list(COLUMNS)
    lines = [
        "# Which method works on which family",
        "",
        "Made by `python -m tests.families.matrix`: each method with its defaults on a tiny model of random weights.",
        "`+`: it works, that is, all that it trains gets a gradient and changes the output, and it can be removed.",
        "`-`: it is refused in a sentence, below. `!`: it does not work, for the reason below. The package reads no",
        "such table: it finds blocks, heads, attentions and feed-forward layers by their structure.",
        "The architectures of timm have [a page of their own](timm.md).",
        "",
        f"| family | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    lines += [f"| {family} | {' | '.join(MARKS[row[n].end] for n in names)} |" for family, row in rows.items()]
    works = [sum(row[name].end == "works" for row in rows.values()) for name in names]
    lines += [f"| of {len(rows)} | {' | '.join(map(str, works))} |", ""]
    for end, title in (("refused", "What is said where a method is refused"), ("fails", "What does not work")):
        told = _told(rows, end)
        lines += [f"## {title}", "", *told, ""] if told else []
    return "\n".join(lines).rstrip() + "\n"


def _told(rows: dict[str, dict[str, Outcome]], end: str) -> list[str]:
    """Return a line for each method and sentence, with its families."""
    said: dict[tuple[str, str], list[str]] = {}
    for family, row in rows.items():
        for name, found in row.items():
            if found.end == end:
                said.setdefault((name, found.why), []).append(family)
    order = list(COLUMNS)
    return [
        f"- **{name}** on {', '.join(families)}: {why.replace('<', '&lt;')}"
        for (name, why), families in sorted(said.items(), key=lambda item: order.index(item[0][0]))
    ]


if __name__ == "__main__":
    PAGE.write_text(page(table(sys.argv[1:] or WHOLE)), encoding="utf-8")
