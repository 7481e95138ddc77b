"""Images that a text or a JSON file lists with their classes, as sets of images come.

Lines ``path class`` (VTAB-1k; FGVC-Aircraft, whose paths lack ``.jpg``), an object of paths with their classes (the
lists of VPT's code), or one of the splits, each a list of ``[path, number, name]`` (those of CoOp's code).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from lightning_peft.core.errors import TuningError

SUFFIXES = (".txt", ".json")
_SPLITS = {"validation": "val"}


def listed(file: str, split: str, images: str | None = None) -> Dataset:
    """Return the images of a split, undecoded, and their classes, as ``image`` and ``label``.

    Args:
        file: the list.
        split: 'train', 'validation', 'test' or 'predict'.
        images: the folder that paths begin in; None: that of the list.

    Raises:
        TuningError: the file is no such list, or has nothing of the split.
    """
    path = Path(file)
    base = Path(images) if images is not None else path.parent
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [line.split(maxsplit=1) for line in _lines(text)]
        if isinstance(content, dict) and "train" in content and isinstance(content["train"], list):
            return _of_splits(content, split, base, file)
        pairs = content.items() if isinstance(content, dict) else content
        return _rows(base, [(str(name), label) for name, label in pairs])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, TuningError):
            raise
        raise TuningError(
            f"{split}={file!r} is no list of images ({str(error).splitlines()[0]}): write lines of a path and a class, "
            "or JSON of paths with their classes."
        ) from None


def renamed(rows: Dataset, label: str, names: str) -> Dataset:
    """Return rows whose classes are called as a file of lines ``class name`` says, such as 'n01440764 tench'.

    Raises:
        TuningError: the file lacks a class.
    """
    path = Path(names)
    called = dict(line.split(maxsplit=1) for line in _lines(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    feature = rows.features[label]
    known: list[str] = feature.names if isinstance(feature, ClassLabel) else sorted({str(each) for each in rows[label]})
    missing = [each for each in known if each not in called]
    if missing:
        raise TuningError(f"names={names!r} has no line for class {missing[0]!r}: write '{missing[0]} NAME'.")
    numbers = rows[label][:] if isinstance(feature, ClassLabel) else [known.index(str(each)) for each in rows[label]]
    named = ClassLabel(names=[called[each] for each in known])
    return rows.remove_columns(label).add_column(label, numbers).cast_column(label, named)


def _of_splits(content: Mapping[str, Any], split: str, base: Path, file: str) -> Dataset:
    name = _SPLITS.get(split, split)
    if name not in content:
        raise TuningError(f"{split}={file!r} has no {name!r}: it has {', '.join(map(repr, content))}.")
    names = {int(number): str(called) for own in content.values() for _, number, called in own}
    order = {number: place for place, number in enumerate(sorted(names))}
    rows = [(str(path), order[int(number)]) for path, number, _ in content[name]]
    return _rows(base, rows, ClassLabel(names=[names[number] for number in sorted(names)]))


def _rows(base: Path, pairs: Iterable[tuple[str, Any]], classes: ClassLabel | None = None) -> Dataset:
    pairs = list(pairs)
    labels = [label for _, label in pairs]
    if classes is None and all(str(label).lstrip("-").isdigit() for label in labels):
        labels = [int(label) for label in labels]
    kind = classes or Value("int64" if all(isinstance(label, int) for label in labels) else "string")
    features = Features({"image": ImageFeature(decode=False), "label": kind})
    paths = [str(base / (name if Path(name).suffix else f"{name}.jpg")) for name, _ in pairs]
    return Dataset.from_dict({"image": [{"path": path, "bytes": None} for path in paths], "label": labels}, features)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
