"""Delta files that are damaged or were changed after they were written: none of them loads, by any reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lightning_peft import (
    LoRA,
    TuningError,
    collect,
    from_delta,
    load_delta,
    load_from_checkpoint,
    read_delta,
    save_delta,
)
from lightning_peft.core.delta_file import META, read_checkpoint, seal
from tests.damage import CHANGES, edited, flips
from tests.models import tiny
from tests.modules import Tuned, loader, trainer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a file of each kind, of one run."""
    folder = tmp_path_factory.mktemp("files")
    module = Tuned("bert")
    save = ModelCheckpoint(folder, filename="delta", every_n_train_steps=2, save_on_train_epoch_end=False)
    trainer(folder, LoRA(r=2), save, max_steps=2).fit(module, loader("bert"), loader("bert"))
    return {"safetensors": save_delta(module, folder / "delta.safetensors"), "ckpt": folder / "delta.ckpt"}


def load(file: Path) -> dict[str, torch.Tensor]:
    module = Tuned("bert")
    LoRA(r=2).apply(module)
    load_delta(module, file)
    return collect(module)


def test_a_whole_file_loads(files: dict[str, Path]) -> None:
    one, other = load(files["safetensors"]), load(files["ckpt"])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_no_flipped_bit_loads(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    known, changed = read_delta(files[kind])[0], tmp_path / files[kind].name
    for data in flips(files[kind].read_bytes(), 400):
        changed.write_bytes(data)
        try:
            tensors = read_delta(changed)[0]
        except TuningError:
            continue
        # A bit that no reader looks at, such as one of a zip file's padding, changes nothing.
        assert tensors.keys() == known.keys()
        assert all(torch.equal(tensors[name], known[name]) for name in known)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_changed_file_loads(
    files: dict[str, Path], tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], object]
) -> None:
    copy = edited(files[kind], tmp_path, change)
    for read in (load, read_delta, lambda file: from_delta(file, tiny("bert"))):
        with pytest.raises(TuningError, match="damaged"):
            read(copy)
    if kind == "ckpt":
        with pytest.raises(TuningError, match="damaged"):
            load_from_checkpoint(Tuned, copy)
        with pytest.raises(TuningError, match="damaged"):
            trainer(tmp_path, LoRA(r=2), max_steps=4).fit(Tuned("bert"), loader("bert"), loader("bert"), ckpt_path=copy)


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "lr_schedulers", "global_step"])
def test_what_a_run_resumes_from_is_checked(files: dict[str, Path], tmp_path: Path, part: str) -> None:
    copy = edited(files["ckpt"], tmp_path, lambda c: c.update({part: [1]}))
    with pytest.raises(TuningError, match=f"{part} does not fit its checksum"):
        trainer(tmp_path, LoRA(r=2), max_steps=4).fit(Tuned("bert"), loader("bert"), loader("bert"), ckpt_path=copy)


def test_random_states_are_checked(files: dict[str, Path], tmp_path: Path) -> None:
    copy = edited(files["ckpt"], tmp_path, lambda c: c[META]["resume"]["random"][0]["torch"][7].add_(1))
    with pytest.raises(TuningError, match="the metadata does not fit its checksum"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"class_path": "lightning_peft.methods.nope.Nope"}, "which is not imported: import it first"),
        ({"class_path": "lightning_peft.methods.lora.LoRAMixin"}, "which is not imported: import it first"),
        ({"class_path": "os.system"}, "which is not imported: import it first"),
        ({"init_args": {"rank": 3}}, "arguments that it has not here .*'rank'"),
    ],
)
def test_methods_that_are_not_known_are_one_sentence(
    files: dict[str, Path], tmp_path: Path, entry: dict[str, Any], sentence: str
) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        meta = {key: value for key, value in checkpoint[META].items() if key not in ("checksums", "seal")}
        meta["methods"][0].update(entry)
        checkpoint[META] = seal(meta, checkpoint)

    with pytest.raises(TuningError, match=sentence):
        load_from_checkpoint(Tuned, edited(files["ckpt"], tmp_path, change))


@pytest.mark.parametrize(
    "meta",
    [
        *("text", 3, [], {}, {"format": 2}, {"format": "2"}, {"format": 2, "methods": {}, "backbones": []}),
        {"format": 2, "versions": {}, "methods": [3], "backbones": {}, "checksums": {}},
        {"format": 2, "versions": {}, "methods": [], "backbones": {"": {}}, "checksums": {}},
        {"format": 2, "versions": {}, "methods": [], "backbones": {}, "checksums": {}},
        {"format": 2, "versions": {}, "methods": [], "backbones": {}, "checksums": {"tensors": 3}, "seal": None},
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_malformed_metadata_is_one_sentence(files: dict[str, Path], tmp_path: Path, kind: str, meta: Any) -> None:
    copy = edited(files[kind], tmp_path, lambda c: c.update({META: meta}))
    with pytest.raises(TuningError, match=r"^\S+ (has delta format|is damaged)"):
        load(copy)


def test_deeply_nested_metadata_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "deep.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={META: "[" * 100_000})
    with pytest.raises(TuningError, match="truncated or no safetensors file"):
        load(file)
