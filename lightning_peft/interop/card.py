"""The model card of an adapter: a README.md with method, base, data, metrics and command."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lightning_peft.core.method import TuningMethod
from lightning_peft.interop import serving
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.facts import Facts
from lightning_peft.interop.task_types import AUTO_CLASSES
from lightning_peft.reports.parameters import count, repr_short, size

_UNKNOWN = "not recorded"


def text(
    adapter: PeftAdapter, methods: Sequence[TuningMethod], facts: Facts, name: str, profile: str | None = None
) -> str:
    """Return the model card: YAML for the hub, then a page for a reader."""
    base, place = adapter.config["base_model_name_or_path"], ""
    if base and Path(base).is_absolute():  # of this machine, which is nobody else's concern
        place, base = Path(base).name, None
    kind = adapter.config["peft_type"]
    front = {"base_model": base} if base else {}
    front |= {"library_name": "peft", "tags": ["lightning-peft", kind.lower().replace("_", "-")]}
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())  # JSON is YAML
    rows = [
        ("method", "; ".join(f"`{repr_short(method)}`, {type(method).paper}" for method in methods)),
        ("base", f"`{base}`" if base else f"a folder `{place}`" if place else _UNKNOWN),
        ("base weights", f"fingerprint `{adapter.header['fingerprint']}`"),
        ("task", adapter.config["task_type"] or "none that PEFT names"),
        ("tensors", f"{len(adapter.tensors)}, {count(adapter.tensors.values()):,} values, {_bytes(adapter)}"),
        ("data", facts.data or _UNKNOWN),
        ("metrics", ", ".join(f"{key} {value:.4f}" for key, value in facts.metrics.items()) or _UNKNOWN),
        ("classes", ", ".join(facts.classes) or _UNKNOWN),
        ("learning rates", ", ".join(f"{part} {rate:g}" for part, rate in facts.rates.items()) or _UNKNOWN),
        ("epochs", str(facts.epochs or _UNKNOWN)),
        ("written with", ", ".join(f"{package} {number}" for package, number in adapter.header["versions"].items())),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    parts = [f"---\n{head}---\n# {name}", table]
    if facts.command:
        parts.append(f"## Command\n```\n{facts.command}\n```")
    if facts.words:
        parts.append(f"## Nearest words\n{_words(facts.words)}")
    parts.append(f"## Use\n```python\n{_use(adapter, facts)}\n```")
    if profile == "vllm":
        served = f"vllm serve {base or 'BASE'} {serving.flags(adapter)} --lora-modules {name}=THIS_FOLDER"
        parts.append(f"## Serve\n```\n{served}\n```")
    return "\n\n".join(parts) + "\n"


def _use(adapter: PeftAdapter, facts: Facts) -> str:
    """Return the lines of Python that open the adapter, by PEFT and by this package."""
    auto = AUTO_CLASSES.get(adapter.config["task_type"] or "")
    if auto is None:
        lines = ["from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "THIS_FOLDER")']
    else:
        names = f", id2label={dict(enumerate(facts.classes))!r}" if facts.classes else ""
        lines = [f"from peft import AutoPeft{auto.removeprefix('Auto')}"]
        lines += [f'model = AutoPeft{auto.removeprefix("Auto")}.from_pretrained("THIS_FOLDER"{names})']
    ours = ["from lightning_peft.interop import from_peft", 'method = from_peft(base, "THIS_FOLDER")']
    return "\n".join([*lines, "", *ours])


def _words(words: Sequence[Sequence[tuple[str, float]]]) -> str:
    """Return a table of the words nearest to each virtual token."""
    lines = ["| token | nearest words (cosine) |", "|---:|---|"]
    for i, near in enumerate(words):
        shown = ", ".join(f"{_code(word)} ({cosine:.2f})" for word, cosine in near)
        lines.append(f"| {i} | {shown} |")
    return "\n".join(lines)


def _code(word: str) -> str:
    """Return a word of a vocabulary, which may be any text, so that Markdown shows it as it is."""
    return f"<code>{escape(word).replace('|', '&#124;')}</code>"


def _bytes(adapter: PeftAdapter) -> str:
    return size(sum(tensor.nbytes for tensor in adapter.tensors.values()))
