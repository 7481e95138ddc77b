"""The model card of an adapter: a README.md with method, base, data, metrics and command."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lightning_peft.core.delta_file import CLASS_PATH
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.storage import read_torch
from lightning_peft.interop import serving
from lightning_peft.interop.folder import PeftAdapter
from lightning_peft.reports.parameters import count, repr_short, size

_UNKNOWN = "not recorded"
_USE = (
    "from peft import PeftModel\n"
    'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n\n'
    "from lightning_peft.interop import from_peft\n"
    'method = from_peft(base, "THIS_FOLDER")'
)


@dataclass
class Facts:
    """The facts of a model card; the first three are not in a delta.

    Attributes:
        data: what it was trained on.
        metrics: name of a score -> its value.
        command: the command line that trained it.
        words: of a soft prompt, for each virtual token, the nearest words with their cosines.
    """

    data: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None
    words: Sequence[Sequence[tuple[str, float]]] = ()

    @classmethod
    def of(cls, delta: str | Path) -> "Facts":
        """Return the facts in a Trainer's checkpoint: its data module, its best score, and the configuration beside it.

        A safetensors file says nothing of these.
        """
        delta = Path(delta)
        facts = cls()
        if delta.suffix != ".safetensors":
            checkpoint = read_torch(delta)
            facts.data = _data(checkpoint.get("datamodule_hyper_parameters"))
            facts.metrics = _scores(checkpoint.get("callbacks", {}))
        for folder in delta.resolve().parents[:2]:  # Lightning keeps checkpoints in a folder below the one of the run
            if (folder / "config.yaml").is_file():
                facts.command = shlex.join(["lightning-peft", "fit", "--config", "config.yaml"])
                break
        return facts


def text(
    adapter: PeftAdapter, methods: Sequence[TuningMethod], facts: Facts, name: str, profile: str | None = None
) -> str:
    """Return the model card: YAML for the hub, then a page for a reader."""
    base = adapter.config["base_model_name_or_path"]
    kind = adapter.config["peft_type"]
    front = {"base_model": base} if base else {}
    front |= {"library_name": "peft", "tags": ["lightning-peft", kind.lower().replace("_", "-")]}
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())  # JSON is YAML
    rows = [
        ("method", "; ".join(f"`{repr_short(method)}`, {type(method).paper}" for method in methods)),
        ("base", f"`{base}`" if base else _UNKNOWN),
        ("base weights", f"fingerprint `{adapter.header['fingerprint']}`"),
        ("task", adapter.config["task_type"] or "none that PEFT names"),
        ("tensors", f"{len(adapter.tensors)}, {count(adapter.tensors.values()):,} values, {_bytes(adapter)}"),
        ("data", facts.data or _UNKNOWN),
        ("metrics", ", ".join(f"{key} {value:.4f}" for key, value in facts.metrics.items()) or _UNKNOWN),
        ("written with", ", ".join(f"{package} {number}" for package, number in adapter.header["versions"].items())),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    parts = [f"---\n{head}---\n# {name}", table]
    if facts.command:
        parts.append(f"## Command\n```\n{facts.command}\n```")
    if facts.words:
        parts.append(f"## Nearest words\n{_words(facts.words)}")
    parts.append(f"## Use\n```python\n{_USE}\n```")
    if profile == "vllm":
        served = f"vllm serve {base or 'BASE'} {serving.flags(adapter)} --lora-modules {name}=THIS_FOLDER"
        parts.append(f"## Serve\n```\n{served}\n```")
    return "\n\n".join(parts) + "\n"


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


def _data(parameters: Any) -> str | None:
    """Return the name and arguments of a data module, as Lightning keeps them in a checkpoint."""
    if not isinstance(parameters, Mapping) or not parameters:
        return None
    shown = {str(k): v for k, v in parameters.items() if not str(k).startswith("_") and v is not None}
    kind = str(parameters.get(CLASS_PATH, "data")).rpartition(".")[2]
    return f"{kind}({', '.join(f'{key}={json.dumps(value, default=str)}' for key, value in shown.items())})"


def _scores(callbacks: Mapping[str, Any]) -> dict[str, float]:
    """Return the best score that a ModelCheckpoint has seen, under the name that it went by."""
    found = {}
    for state in callbacks.values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None:
            found[str(state["monitor"])] = float(state["best_model_score"])
    return found
