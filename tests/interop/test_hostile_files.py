"""Files of others whose metadata are of any shape: each is refused in one sentence, by every reader.

Their checksums are made anew, since whoever writes such a file can do that, too.
"""

import contextlib
import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_peft import LoRA, TuningError, from_delta, load_from_checkpoint, save_delta
from lightning_peft.commands.tools import info
from lightning_peft.core.delta_file import META, read_delta, seal
from lightning_peft.interop import from_peft, to_peft
from lightning_peft.interop.folder import check_config, read_adapter
from tests.models import tiny
from tests.modules import Tuned, loader, trainer

SHAPES: tuple[Any, ...] = (None, 3, "x", [], [3], {"x": 3})
"""A value of each shape that a file can hold."""
DEEP: Any = 3
for _ in range(400):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a delta in both forms and an adapter that says nothing of us."""
    folder = tmp_path_factory.mktemp("hostile")
    module = Tuned("bert")
    save = ModelCheckpoint(folder, filename="delta", every_n_train_steps=1, save_on_train_epoch_end=False)
    trainer(folder, LoRA(r=2, target_modules=["query"]), save, max_steps=1).fit(module, loader("bert"), loader("bert"))
    save_delta(module.model, folder / "delta.safetensors")
    to_peft(module.model, folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def placed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that puts a value at a place of metadata; '' is the root of the last step."""

    def change(meta: dict[str, Any]) -> None:
        *steps, last = path.split("/")
        holder: Any = meta
        for step in steps:
            holder = (
                holder[int(step)]
                if isinstance(holder, list)
                else next(iter(holder.values()))
                if step == "*"
                else holder[step]
            )
        holder[int(last) if isinstance(holder, list) else last] = copy.deepcopy(value)

    return change


def metadata() -> Iterator[tuple[str, Any]]:
    wrong: dict[str, tuple[Any, ...]] = {
        "format": (None, "2", 3, [2]),
        "versions": (None, 3, "x", []),
        "methods": (None, 3, "x", {}, [3], [None], [{}], [[]], {"x": 3}),
        "backbones": (None, 3, "x", [], {"": 3}, {"": {}}, {"": []}),
        "left_out": (None, 3, "x", {}),
        "methods/0/class_path": (None, 3, [], "", "x", "os.system", "lightning_peft.methods", "a.b.c", "..", "\0"),
        "methods/0/init_args": (None, 3, "x", [], {"x": 3}),
        "methods/0/backbone": (None, 3, [], "nowhere"),
        "methods/0/init_args/r": (None, "x", [], 0, -1, 10**30, 1.5, {"x": 3}),
        "methods/0/init_args/alpha": (None, "x", float("nan"), float("inf"), [], 1e300),
        "methods/0/init_args/dropout": (None, "x", 2.0, -1),
        "methods/0/init_args/target_modules": (3, {"x": 3}, [3], "(", "(((\\w|\\.){1,500}){1,500}){1,500}!", ["x"]),
        "methods/0/init_args/exclude": (3, [], "(", "x"),
        "methods/0/init_args/layers": ("x", 3, [99], ["x"]),
        "methods/0/init_args/rank_pattern": (3, [], "x", {"x": "y"}, {"query": 10**30}),
        "backbones/*/class": (None, 3, []),
        "backbones/*/name_or_path": (None, 3, []),
        "backbones/*/parameters": (None, "x", [], True),
        "backbones/*/config": (None, 3, "x", []),
        "backbones/*/fingerprint": (None, 3, "", "x", ":", ":::", "float32:a:b:c:d"),
    }
    yield from ((path, value) for path, values in wrong.items() for value in values)


def config() -> Iterator[tuple[str, Any]]:
    texts = ("peft_type", "bias")
    numbers = ("r", "lora_alpha", "lora_dropout")
    names = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
    yield from ((key, value) for key in texts for value in SHAPES)
    yield from ((key, value) for key in numbers for value in (None, "x", [], {"x": 3}, -1, float("nan"), True))
    yield from ((key, value) for key in names for value in (3, {"x": 3}, [3], [[]], [None]))
    yield from (
        (key, value) for key in ("rank_pattern", "alpha_pattern") for value in (3, "x", [3], {"x": "y"}, {"x": -1})
    )
    yield from (("layers_to_transform", value) for value in ("x", ["x"], {"x": 3}, 1.5))
    yield from (("auto_mapping", value) for value in (3, "x", [3], {"base_model_class": 3}))
    yield from (("base_model_name_or_path", value) for value in (3, [3], {"x": 3}))
    yield from (
        ("target_modules", value) for value in ("(", r"(([a-z_\.0-9])+)+!", r"((\w{1,500}){1,500}){1,500}!", "x")
    )
    yield "rank_pattern", {"(": 2}
    yield "modules_to_save", ["("]
    yield from (("init_lora_weights", value) for value in (3, [], {"x": 3}, "pissa"))
    yield from (("unknown", value) for value in (3, DEEP, "x" * 100_000))


def refused(*readers: Callable[[], Any]) -> None:
    """See that a reader refuses a file in one sentence, and that none says anything else."""
    said = []
    for read in readers:
        try:
            read()
        except TuningError as error:
            said.append(str(error))
    assert said
    assert not any("\n" in sentence or len(sentence) > 1000 for sentence in said), said


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.core.pattern.SECONDS", 0.05)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("path", "value"), list(metadata()), ids=lambda value: str(value)[:40])
def test_metadata_of_a_delta(written: Path, tmp_path: Path, path: str, value: Any) -> None:
    with safe_open(written / "delta.safetensors", "pt") as opened:
        meta = json.loads(opened.metadata()[META])
    tensors = load_file(written / "delta.safetensors")
    meta = {key: entry for key, entry in meta.items() if key not in ("checksums", "seal")}
    placed(path, value)(meta)
    file = tmp_path / "delta.safetensors"
    save_file(tensors, file, metadata={META: json.dumps(seal(meta, {"state_dict": tensors}))})
    refused(lambda: info(str(file)), lambda: from_delta(file, tiny("bert")), lambda: from_delta(file))


CHECKPOINTS: dict[str, tuple[Any, ...]] = {
    "state_dict": (None, 3, [], {"x": 3}, {3: 3}, {"x": None}),
    "optimizer_states": (None, 3, {}),
    "loops": (None, 3, []),
    "hyper_parameters": (3, [], "x"),
    "callbacks": (None, 3, []),
    "epoch": (None, "x", []),
    "pytorch-lightning_version": (None, 3, []),
    f"{META}/resume": (None, 3, {}, {"mid_epoch": 3, "random": []}, {"mid_epoch": True, "random": [3]}),
    f"{META}/resume/random": (None, [{}], [{"torch": 3, "numpy": [], "python": []}]),
}


@pytest.mark.parametrize(
    ("path", "value"), [(p, v) for p, values in CHECKPOINTS.items() for v in values], ids=lambda value: str(value)[:40]
)
def test_a_checkpoint(written: Path, tmp_path: Path, path: str, value: Any) -> None:
    checkpoint = torch.load(written / "delta.ckpt", weights_only=True)
    meta = checkpoint[META] = {key: v for key, v in checkpoint[META].items() if key not in ("checksums", "seal")}
    placed(path, value)(checkpoint)
    tensors = checkpoint["state_dict"]
    meta |= seal(
        meta,
        checkpoint
        | {"state_dict": tensors if isinstance(tensors, dict) and "x" not in tensors and 3 not in tensors else {}},
    )
    torch.save(checkpoint, tmp_path / "delta.ckpt")
    refused(lambda: read_delta(tmp_path / "delta.ckpt"), lambda: load_from_checkpoint(Tuned, tmp_path / "delta.ckpt"))


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("key", "value"), list(config()), ids=lambda value: str(value)[:40])
def test_the_configuration_of_an_adapter(written: Path, tmp_path: Path, key: str, value: Any) -> None:
    given = json.loads((written / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(given | {key: value}))
    (tmp_path / "adapter_model.safetensors").symlink_to(written / "adapter" / "adapter_model.safetensors")
    refused(lambda: from_peft(tiny("bert"), tmp_path))


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {r"((\w{1,500}){1,500}){1,500}!": 2}),
        ("alpha_pattern", {r"(([a-z_\.0-9])+)+!": 2}),
        ("modules_to_save", [r"((\w{1,500}){1,500}){1,500}!"]),
        ("exclude_modules", r"(([a-z_\.0-9])+)+!"),
    ],
)
def test_a_pattern_of_an_adapter_ends(written: Path, tmp_path: Path, key: str, value: Any) -> None:
    given = json.loads((written / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(given | {key: value}))
    (tmp_path / "adapter_model.safetensors").symlink_to(written / "adapter" / "adapter_model.safetensors")
    begin = time.thread_time()
    with contextlib.suppress(TuningError):  # it takes too long
        from_peft(tiny("bert"), tmp_path)
    assert time.thread_time() - begin < 8


def test_no_flipped_bit_of_our_own_adapter_loads(tmp_path: Path) -> None:
    model = tiny("bert")
    LoRA(r=2, target_modules=["query"]).apply(model)
    folder, draw = to_peft(model, tmp_path / "adapter"), random.Random(0)
    known = read_adapter(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(400):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(data)
            try:
                adapter = read_adapter(folder)
                check_config(adapter)
            except TuningError:
                continue
            assert adapter.tensors.keys() == known.tensors.keys()
            assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in known.tensors.items())
            free = {
                "base_model_name_or_path",
                "inference_mode",
                "peft_version",
                "revision",
                "task_type",
                "auto_mapping",
            }
            assert all(adapter.config[key] == value for key, value in known.config.items() if key not in free)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite(written: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(written / "adapter" / "adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((written / "adapter" / "adapter_config.json").read_bytes())
    with pytest.raises(TuningError, match=r"has NaN or infinity in .*take another"):
        from_peft(tiny("bert"), tmp_path)


def test_an_alpha_that_was_changed_after_the_export(tmp_path: Path) -> None:
    model = tiny("bert")
    LoRA(r=2).apply(model)
    file = to_peft(model, tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 17}))
    with pytest.raises(TuningError, match=r"was changed after it was exported: adapter_config\.json does not fit"):
        from_peft(tiny("bert"), tmp_path / "adapter")
