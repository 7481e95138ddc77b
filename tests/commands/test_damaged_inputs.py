"""What ``merge`` and ``import`` are given is checked bit by bit, and where it is damaged nothing is written."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lightning_peft import LoRA, TuningError, read_delta, save_delta
from lightning_peft.cli import main
from lightning_peft.commands.tools import merge_files
from lightning_peft.interop import to_peft
from lightning_peft.interop.wrapped import read_wrapped
from tests.contract import shake
from tests.damage import CHANGES, cuts, edited, flips
from tests.models import save_tokenizer, tiny
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
Change = Callable[[dict[str, Any]], object]
PART = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, deltas of it in both forms, our adapter, another's, and a wrapped checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(folder / "model")
    tiny("bert").save_pretrained(folder / "model")
    module = Tuned("bert")
    module.model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    save = ModelCheckpoint(folder, filename="delta", every_n_train_steps=1, save_on_train_epoch_end=False)
    run = trainer(folder, LoRA(r=2, target_modules=["query"]), save, max_steps=1, limit_val_batches=0)
    run.fit(module, loader("bert"))
    save_delta(module, folder / "delta.safetensors")
    to_peft(module.model, folder / "ours")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    config.base_model_name_or_path = str(folder / "model")
    wrapped = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder / "model"), config)
    shake(wrapped)
    torch.save({"state_dict": {f"net.{n}": t for n, t in wrapped.state_dict().items()}}, folder / "full.ckpt")
    wrapped.save_pretrained(folder / "theirs")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def merged(delta: Path, folder: Path, backbone: Path) -> dict[str, Tensor]:
    merge_files(str(delta), str(folder), str(backbone))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_changed_delta_is_merged(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str, change: Change
) -> None:
    copy = edited(made / f"delta.{kind}", tmp_path, change)
    command(monkeypatch, "merge", copy, tmp_path / "out", "--backbone", made / "model")
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_no_flipped_or_cut_delta_is_merged(made: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"delta.{kind}"
    known = merged(made / file.name, tmp_path / "known", made / "model")
    whole = (made / file.name).read_bytes()
    for i, data in enumerate([*cuts(whole), *flips(whole, 200)]):
        file.write_bytes(data)
        try:
            found = merged(file, tmp_path / str(i), made / "model")
        except TuningError:
            assert not (tmp_path / str(i)).exists()
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in known.items())  # a bit that is not read


def test_no_flipped_bit_of_the_backbone_is_merged(made: Path, tmp_path: Path) -> None:
    """Its fingerprint sees each; the head has values of its own in the delta."""
    known = merged(made / "delta.safetensors", tmp_path / "known", made / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(made / "model" / "config.json")
    whole, refused = (made / "model" / "model.safetensors").read_bytes(), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for i, data in enumerate(flips(whole, 20, begin=header)):
        (tmp_path / "model" / "model.safetensors").write_bytes(data)
        try:
            found = merged(made / "delta.safetensors", tmp_path / str(i), tmp_path / "model")
        except TuningError as error:
            refused += "was trained on BertForSequenceClassification" in str(error)
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in known.items())
    assert refused > 15


def edited_adapter(adapter: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Copy an adapter with other tensors and the header that its file had."""
    from safetensors import safe_open

    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        save_file(tensors, folder / "adapter_model.safetensors", metadata=file.metadata())
    return folder


def swap(tensors: dict[str, Tensor]) -> None:
    other = PART.replace("layer.0", "layer.1")
    tensors[PART], tensors[other] = tensors[other], tensors[PART]


ADAPTER: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "nan": lambda t: t[PART].view(-1)[0].fill_(torch.nan),
    "gone": lambda t: t.pop(PART),
    "more": lambda t: t.update({PART.replace("lora_A", "lora_C"): torch.ones(2)}),
    "integers": lambda t: t.update({PART: t[PART].int()}),
    "another shape": lambda t: t.update({PART: t[PART][:1].clone()}),
    "swap": swap,
    "cast": lambda t: t.update({PART: t[PART].half()}),
    "zero": lambda t: t[PART].zero_(),
}


@pytest.mark.parametrize("change", ADAPTER.values(), ids=ADAPTER)
def test_no_changed_adapter_is_imported(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], object]
) -> None:
    copy = edited_adapter(made / "ours", tmp_path / "adapter", change)
    command(monkeypatch, "import", copy, tmp_path / "out.safetensors", "--backbone", made / "model")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("change", list(ADAPTER)[:5])
def test_of_an_adapter_without_checksums_what_can_be_seen_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """PEFT writes none, so that values which are other numbers of the same kind are those of the adapter."""
    copy = edited_adapter(made / "theirs", tmp_path / "adapter", ADAPTER[change])
    command(monkeypatch, "import", copy, tmp_path / "out.safetensors", "--backbone", made / "model")
    assert not (tmp_path / "out.safetensors").exists()


def test_no_flipped_or_cut_checkpoint_of_a_wrapped_module_is_imported(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = tmp_path / "full.ckpt", made / "theirs" / "adapter_config.json"
    whole = (made / file.name).read_bytes()
    base, known = read_wrapped(made / file.name, config)
    for data in [*cuts(whole), *flips(whole, 300)]:
        file.write_bytes(data)
        try:
            held, found = read_wrapped(file, config)
        except TuningError:
            continue
        assert all(torch.equal(held[name], tensor) for name, tensor in base.items())
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in known.tensors.items())
    data = bytearray(whole)
    data[whole.index(known.tensors[PART].numpy().tobytes()) + 5] ^= 1  # within a value
    file.write_bytes(data)
    with pytest.raises(TuningError, match=r"is damaged: \S+ in it does not fit its checksum: take another copy"):
        read_wrapped(file, config)
    command(monkeypatch, "import", file, tmp_path / "out.safetensors", "--config", config)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_without_checksums_is_told_how_to_get_some(made: Path, tmp_path: Path) -> None:
    config = made / "theirs" / "adapter_config.json"
    held = torch.load(made / "full.ckpt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(held, tmp_path / "full.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(TuningError, match="save it anew if it was written without checksums"):
        read_wrapped(tmp_path / "full.ckpt", config)
    torch.save(torch.load(tmp_path / "full.ckpt", weights_only=True), tmp_path / "anew.ckpt")
    assert (
        read_wrapped(tmp_path / "anew.ckpt", config)[1].tensors.keys()
        == read_wrapped(made / "full.ckpt", config)[1].tensors.keys()
    )


def test_the_inputs_are_whole(made: Path) -> None:
    one, other = (read_delta(made / f"delta.{kind}")[0] for kind in ("safetensors", "ckpt"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
