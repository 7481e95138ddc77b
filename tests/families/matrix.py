"""Makes the page of the docs that says which method works on which family: ``python -m tests.families.matrix``.

Each pair is applied, run, trained for a step, merged if it can be, and removed on a tiny random model. A method works
where all that it trains gets a gradient, changes the output, is in the weights after a merge, and is gone after that.
With ``--kept FILE`` the rows are kept in a file as they come; those that it has are not made again, but for those of
families that are named.
"""

import argparse
import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import TuningError, merge
from lightning_peft.core.graft import grafts
from lightning_peft.core.method import TuningMethod
from tests.contract import shake
from tests.contracts import contracts
from tests.families.builders import Built
from tests.families.every import WHOLE, build_any
from tests.families.test_families import MERGED, METHODS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MORE: dict[str, TuningMethod] = {name: method for kind in contracts().values() for name, method in kind.on_families}
COLUMNS: dict[str, TuningMethod] = METHODS | MORE
_FIRST = ("logits", "logits_per_image", "start_logits", "prediction_outputs", "pred_masks", "predicted_depth")
"""What of a model's output is looked at, if it has that; else its first tensor."""
MARKS = {"works": "+", "refused": "-", "fails": "!"}


class Outcome(NamedTuple):
    """What became of a method on a family: how it ended, and the sentence or the reason."""

    end: Literal["works", "refused", "fails"]
    why: str = ""


def outcome(built: Built, method: TuningMethod, merges: bool = False) -> Outcome:
    """Try a method on a model and a batch; ``merges``: its effect is to be in the weights after a merge."""
    model, batch = built
    try:
        return _tried(model, batch, method, merges)
    except TuningError as refused:
        return Outcome("refused", str(refused).replace(type(model).__name__, "the model"))
    except Exception as error:
        return Outcome("fails", f"{type(error).__name__}: {error}".splitlines()[0][:160])


def _tried(model: nn.Module, batch: dict[str, Any], method: TuningMethod, merges: bool) -> Outcome:
    before = _without_gradients(model, batch)
    method.apply(model)
    shake(model, 0.05)
    model.train().eval()
    error, live = _run(model, dict(method.prepare(batch)))
    penalty = method.penalty(model)
    (error if penalty is None else error + penalty.sum()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None]
    model.train().eval().zero_grad()
    apart = _merged(model, batch) if merges else None
    method.remove(model)
    after = _without_gradients(model, batch)
    if not trained or _same(live, before):
        return Outcome("fails", "it changes nothing")
    if apart is not None and not torch.allclose(apart, live, rtol=1e-3, atol=1e-3):
        return Outcome("fails", "merged it computes something else")
    if not torch.equal(after, before):
        return Outcome("fails", "the model is another one when it has been removed")
    why = f"{len(dead)} of {len(trained)} got no gradient, e.g. {dead[0]}" if dead else ""
    return Outcome("fails", why) if dead else Outcome("works")


def _merged(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """Return what a merged copy gives; None where merging is refused, as of tied weights."""
    # A state that a model keeps, as RecurrentGemma does, can be copied without a graph.
    _without_gradients(model, batch)
    try:
        return _without_gradients(merge(copy.deepcopy(model)), batch)
    except TuningError:
        return None


def _without_gradients(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return what a model gives."""
    with torch.no_grad():
        given = _run(model, batch)[1]
    model.train().eval()  # as between two epochs: LeViT keeps its biases until a change of mode
    return given


def _run(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, or noise times all that the model gives, and its first result."""
    torch.manual_seed(7)
    out = model(**batch)
    given = list(_results(out))
    first = next((out[name] for name in _FIRST if name in out), given[0]) if isinstance(out, Mapping) else given[0]
    error = out.get("loss") if isinstance(out, Mapping) else None
    if error is None:
        noise = torch.Generator().manual_seed(3)
        parts = [(each.clamp(-50, 50) * torch.randn(each.shape, generator=noise)).mean() for each in given]
        error = torch.stack(parts).sum()
    return error.mean(), first


def _results(out: Any) -> Iterator[Tensor]:
    """Yield the tensors of numbers in what a model gives, but for losses and caches."""
    if isinstance(out, Tensor):
        yield from [out] if out.is_floating_point() else []
    elif isinstance(out, Mapping):
        for name, value in out.items():
            yield from () if name in ("loss", "loss_dict", "losses", "past_key_values") else _results(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _results(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)


def row(family: str) -> dict[str, Outcome]:
    """Return method -> what became of it on a family, whose model is built anew after what did not work."""
    built, found = build_any(family), {}
    for name, method in COLUMNS.items():
        found[name] = outcome(built, method, name in MERGED)
        if found[name].end == "fails" or list(grafts(built[0])):
            built = build_any(family)
    return found


def table(kept: Path | None = None, anew: Iterable[str] = ()) -> dict[str, dict[str, Outcome]]:
    """Return family -> method -> what became of it.

    Args:
        kept: a file of rows that were made before, to which those are added that are made now.
        anew: families whose rows are made again.
    """
    lines = kept.read_text(encoding="utf-8").splitlines() if kept is not None and kept.exists() else []
    rows = {family: {name: Outcome(*found) for name, found in said.items()} for family, said in map(json.loads, lines)}
    for family in WHOLE:
        if family not in rows or family in set(anew):
            rows[family] = row(family)
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([family, rows[family]]) + "\n")
    return {family: rows[family] for family in WHOLE}


def page(rows: dict[str, dict[str, Outcome]]) -> str:
    """Return the page of the docs."""
    names = list(COLUMNS)
    lines = [
        "# Which method works on which family",
        "",
        "Made by `python -m tests.families.matrix`: each method with its defaults on a tiny model of random weights.",
        "`+`: it works, that is, all that it trains gets a gradient and changes the output, it is in the weights after",
        "a merge, and it can be removed.",
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="those whose rows are made again though they were kept")
    parser.add_argument("--kept", type=Path, help="a file of rows (JSON lines)")
    given = parser.parse_args()
    PAGE.write_text(page(table(given.kept, given.families)), encoding="utf-8")
