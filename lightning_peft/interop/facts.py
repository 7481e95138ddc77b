"""The facts of a model card: what a checkpoint knows of the run that made it, without a path of the machine."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lightning_peft.core.delta_file import CLASS_PATH, META, read_delta
from lightning_peft.core.storage import is_safetensors, read_torch
from lightning_peft.reports.tuning_report import COMMAND
from lightning_peft.tasks.optimizer import rates_of_groups


@dataclass
class Facts:
    """The facts of a model card, most of which no delta holds.

    Attributes:
        data: what it was trained on.
        metrics: name of a score -> its value.
        command: the command line that trained it.
        words: of a soft prompt, for each virtual token, the nearest words with their cosines.
        classes: the names of the classes, in the order of the logits.
        rates: name of a part, 'delta' or 'head' -> its highest learning rate.
        epochs: after how many epochs it was saved.
    """

    data: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None
    words: Sequence[Sequence[tuple[str, float]]] = ()
    classes: Sequence[str] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    epochs: int | None = None

    @classmethod
    def of(cls, delta: str | Path) -> "Facts":
        """Return the facts in a Trainer's checkpoint, and the configuration beside it.

        A safetensors file knows the classes alone.
        """
        delta = Path(delta)
        if is_safetensors(delta):
            return cls(classes=classes_of(read_delta(delta)[1])) if delta.is_file() else cls()
        checkpoint = read_torch(delta)
        groups = [group for one in checkpoint.get("optimizer_states", ()) for group in one["param_groups"]]
        facts = cls(
            data=_data(checkpoint.get("datamodule_hyper_parameters")),
            metrics=_scores(checkpoint.get("callbacks", {})),
            classes=classes_of(checkpoint.get(META, {})),
            rates=rates_of_groups(groups),
            epochs=checkpoint["epoch"] + 1 if "epoch" in checkpoint else None,
        )
        facts.command = checkpoint.get(COMMAND)
        for folder in delta.resolve().parents[:2]:  # Lightning keeps checkpoints in a folder below the one of the run
            if facts.command is None and (folder / "config.yaml").is_file():
                facts.command = shlex.join(["lightning-peft", "fit", "--config", "config.yaml"])
        return facts

    def as_plain(self) -> dict[str, Any]:
        """Return what is known of the run as plain values, for the header of a file."""
        known: dict[str, Any] = {"data": self.data, "command": self.command, "epochs": self.epochs}
        known |= {"metrics": dict(self.metrics), "classes": list(self.classes), "rates": dict(self.rates)}
        return {name: value for name, value in known.items() if value}


def classes_of(meta: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes in the metadata of a delta; none where they are numbered alone."""
    for backbone in meta.get("backbones", {}).values():
        names = backbone["config"].get("id2label") or {}
        ordered = [str(names[key]) for key in sorted(names, key=int)]
        if ordered and ordered != [f"LABEL_{i}" for i in range(len(ordered))]:
            return ordered
    return []


def without_folder(value: Any) -> Any:
    """Return a value with the paths of this machine in it cut to their last names.

    >>> without_folder({"train": "/home/me/rows.csv", "text": "a/b"})
    {'train': 'rows.csv', 'text': 'a/b'}
    """
    if isinstance(value, Mapping):
        return {key: without_folder(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folder(one) for one in value]
    if isinstance(value, (str, PurePath)) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _data(parameters: Any) -> str | None:
    """Return the name and arguments of a data module, as Lightning keeps them in a checkpoint."""
    if not isinstance(parameters, Mapping) or not parameters:
        return None
    shown = {str(k): v for k, v in parameters.items() if not str(k).startswith("_") and v is not None}
    kind = str(parameters.get(CLASS_PATH, "data")).rpartition(".")[2]
    given = {key: json.dumps(without_folder(value), default=str) for key, value in shown.items()}
    return f"{kind}({', '.join(f'{key}={value}' for key, value in given.items())})"


def _scores(callbacks: Mapping[str, Any]) -> dict[str, float]:
    """Return the best score that a ModelCheckpoint has seen, under the name that it went by."""
    found = {}
    for state in callbacks.values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None:
            found[str(state["monitor"])] = float(state["best_model_score"])
    return found
