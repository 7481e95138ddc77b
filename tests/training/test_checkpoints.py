"""Delta checkpoints under a Trainer: what the files hold, how they resume, and which files are refused."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors import safe_open

from lightning_peft import BitFit, LoRA, PromptTuning, TuningError, collect, convert, load_delta, save_delta
from lightning_peft.core.delta_file import META, seal
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.core.storage import atomic
from tests.models import tiny
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The dirpath has changed from",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta checkpoint of LoRA(r=2) on the tiny BERT."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, LoRA(r=2), ModelCheckpoint(folder, filename="delta")).fit(Tuned(), loader("bert"))
    return folder / "delta.ckpt"


def refuse(file: Path, words: str, *methods: Any, module: Tuned | None = None) -> None:
    """See that fit and validate refuse a file with these words before anything changes."""
    module = module or Tuned()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    for stage in ("fit", "validate"):
        run = trainer(file.parent, *(methods or [LoRA(r=2)]))
        with pytest.raises(TuningError, match=words):
            getattr(run, stage)(module, loader("bert"), ckpt_path=file)
        now = dict(module.model.named_parameters())
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def changed(file: Path, folder: Path, change: Any) -> Path:
    """Return a copy of a checkpoint with something changed."""
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    meta = {key: value for key, value in checkpoint[META].items() if key not in ("checksums", "seal")}
    checkpoint[META] = seal(meta, checkpoint)
    torch.save(checkpoint, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_file_holds_the_delta_and_all_that_a_resume_needs(saved: Path) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    assert len(checkpoint["state_dict"]) == 10
    assert len(checkpoint["optimizer_states"][0]["state"]) == 10
    meta = checkpoint[META]
    assert meta["methods"] == [
        {"class_path": "lightning_peft.methods.lora.LoRA", "init_args": LoRA(r=2).init_args(), "backbone": "model"}
    ]
    assert meta["backbones"]["model"]["class"] == "BertForSequenceClassification"
    assert meta["backbones"]["model"]["fingerprint"] == fingerprint(
        tiny("bert"), ["classifier.weight", "classifier.bias"]
    )
    assert set(meta["versions"]) == {"torch", "lightning", "transformers", "lightning-peft"}
    assert sorted(meta["optimizers"][0][0]) == sorted(checkpoint["state_dict"])
    assert meta["resume"]["mid_epoch"] is False


@pytest.mark.parametrize("hidden", [32, 512])
def test_weights_only_size(hidden: int, tmp_path: Path) -> None:
    module = Tuned("llama")
    del module.model
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module.model = hf.LlamaForCausalLM(config)
    saving = ModelCheckpoint(tmp_path, filename="delta", save_weights_only=True)
    trainer(tmp_path, LoRA(r=16, target_modules="all-linear"), saving, max_steps=1).fit(module, loader("llama"))
    save_delta(module, tmp_path / "delta.safetensors")
    tensors = sum(tensor.nbytes for tensor in collect(module).values())
    for file in ("delta.ckpt", "delta.safetensors"):
        assert (tmp_path / file).stat().st_size <= 1.05 * tensors + 65536


def test_every_way_of_saving_writes_deltas(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer(tmp_path, LoRA(r=2), saving).fit(Tuned(), loader("bert"))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [file.name for file in files] == ["last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert all(len(torch.load(file, weights_only=True)["state_dict"]) == 10 for file in files)


def test_fit_from_weights_alone_says_what_is_missing(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer(tmp_path, LoRA(r=2), saving).fit(Tuned(), loader("bert"))
    run = trainer(tmp_path, LoRA(r=2), max_epochs=2)
    with pytest.raises(KeyError, match="contains only the model"):
        run.fit(Tuned(), loader("bert"), ckpt_path=tmp_path / "weights.ckpt")


def test_accumulated_gradients_and_a_scheduler_resume(tmp_path: Path) -> None:
    class Scheduled(Tuned):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def run(folder: str, resume: Path | None = None) -> Tuned:
        module = Scheduled(dropout=0.1)
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, LoRA(r=2, dropout=0.2), saving, max_epochs=3, accumulate_grad_batches=2)
        fit.fit(module, loader("bert", shuffle=True), loader("bert"), ckpt_path=resume)
        return module

    whole = run("whole")
    torch.manual_seed(99)
    resumed = run("resumed", tmp_path / "whole" / "epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_asynchronous_saving(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="delta")
    run = trainer(tmp_path, LoRA(r=2), saving, plugins=[AsyncCheckpointIO()])
    run.fit(Tuned(), loader("bert"))
    assert len(torch.load(tmp_path / "delta.ckpt", weights_only=True)["state_dict"]) == 10


def test_asynchronous_saving_removes_the_old_file_when_the_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk, then a full one: there is a whole file at any moment."""
    there: list[list[str]] = []

    def save(checkpoint: Any, path: Path) -> None:
        there.append(sorted(file.name for file in tmp_path.glob("*.ckpt")))
        time.sleep(0.1)
        if len(there) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(checkpoint, path)

    real = torch.save
    monkeypatch.setattr(torch, "save", save)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    run = trainer(tmp_path, LoRA(r=2), saving, plugins=[AsyncCheckpointIO()])
    with pytest.raises(TuningError, match=r"step=3.ckpt could not be written \(ENOSPC"):
        run.fit(Tuned(), loader("bert", rows=12))
    assert there == [[], ["step=1.ckpt"], ["step=2.ckpt"]]
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]
    assert len(torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]) == 10


def test_other_backbone(saved: Path) -> None:
    module = Tuned()
    module.model = tiny("bert", seed=1)
    refuse(saved, "was trained on BertForSequenceClassification.*, not on BertForSequenceClassification", module=module)


def test_other_configuration_of_equal_weights(saved: Path) -> None:
    module = Tuned()
    module.model.config.layer_norm_eps = 1e-3
    refuse(saved, "was trained on BertForSequenceClassification", module=module)


def test_dropout_rates_and_names_may_differ(saved: Path) -> None:
    module = Tuned(dropout=0.3)
    module.model.config._name_or_path = "elsewhere"
    trainer(saved.parent, LoRA(r=2, alpha=16, dropout=0.5)).validate(
        module, loader("bert"), ckpt_path=saved, verbose=False
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LoRA(r=4), "was trained with r=2 of LoRA, which is 4 here"),
        (LoRA(r=2, alpha=8), "was trained with alpha=16.0 of LoRA, which is 8 here"),
        (BitFit(), "was trained with LoRA, but BitFit is applied here"),
    ],
)
def test_other_method_or_arguments(saved: Path, method: Any, words: str) -> None:
    refuse(saved, words, method)


def test_missing_and_unexpected_and_misshapen_tensors(saved: Path, tmp_path: Path) -> None:
    name = "model.bert.encoder.layer.0.attention.self.query.lora.A"

    def drop(checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"][name]

    def add(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name.replace("query", "key")] = torch.zeros(1)

    def reshape(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name] = torch.zeros(3, 32)

    refuse(changed(saved, tmp_path, drop), rf"lacks 1 of 10 tensors of the delta, e\.g\. {name}")
    refuse(changed(saved, tmp_path, add), "has 1 tensors that this module does not train, e.g. .*key.lora.A")
    refuse(changed(saved, tmp_path, reshape), r"of shape \[3, 32\], this module of \[2, 32\]")


def test_full_checkpoint_is_refused_and_can_be_converted(tmp_path: Path) -> None:
    module = Tuned()
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="full"), max_steps=1).fit(module, loader("bert"))
    refuse(tmp_path / "full.ckpt", r"no delta but a full checkpoint \(\d+ tensors\).*lightning_peft\.convert")
    lora = Tuned()
    LoRA(r=2).apply(lora)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    torch.save({"state_dict": lora.state_dict()}, tmp_path / "whole.ckpt")
    twin = Tuned()
    LoRA(r=2).apply(twin)
    convert(twin, tmp_path / "whole.ckpt", tmp_path / "delta.safetensors")
    other = Tuned()
    LoRA(r=2).apply(other)
    load_delta(other, tmp_path / "delta.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), other.parameters(), strict=True))
    with pytest.raises(TuningError, match=r"changed model\.bert"):
        convert(_applied(LoRA(r=2), seed=1), tmp_path / "whole.ckpt", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def _applied(method: LoRA, seed: int) -> Tuned:
    module = Tuned()
    module.model = tiny("bert", seed=seed)
    method.apply(module)
    return module


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file(saved: Path, tmp_path: Path, share: float) -> None:
    content = saved.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(len(content) * share)])
    refuse(tmp_path / "cut.ckpt", "is truncated or damaged")


def test_foreign_files(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil(), protocol=2))
    refuse(tmp_path / "evil.ckpt", "holds more than tensors and plain values, or is damaged")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refuse(tmp_path / "list.ckpt", "holds a list, not a checkpoint")
    refuse(tmp_path / "nowhere.ckpt", "is no file")
    assert not Path("pwned").exists()


def test_prompts_of_another_length(tmp_path: Path) -> None:
    prompt = PromptTuning(num_virtual_tokens=3, init="random_uniform")
    trainer(tmp_path, prompt, ModelCheckpoint(tmp_path, filename="delta")).fit(Tuned(), loader("bert"))
    other = PromptTuning(num_virtual_tokens=4, init="random_uniform")
    refuse(tmp_path / "delta.ckpt", "num_virtual_tokens=3 of PromptTuning, which is 4 here", other)


def test_one_delta_serves_the_module_and_its_bare_backbone(saved: Path, tmp_path: Path) -> None:
    model = tiny("bert")
    LoRA(r=2).apply(model)
    load_delta(model, saved)
    module = Tuned()
    LoRA(r=2).apply(module)
    load_delta(module, saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))
    save_delta(model, tmp_path / "bare.safetensors")
    load_delta(module, tmp_path / "bare.safetensors")
    with safe_open(tmp_path / "bare.safetensors", "pt") as file:
        assert all(name.startswith(("bert.", "classifier.")) for name in file.keys())  # noqa: SIM118 (no mapping)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with atomic(file) as temporary:
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


_WRITER = """
import sys, torch
from lightning_peft.training.checkpoint_io import AtomicCheckpointIO
io, i = AtomicCheckpointIO(), 0
print("ready", flush=True)
while True:
    i += 1
    io.save_checkpoint({"state_dict": {"a": torch.full((2_000_000,), float(i))}}, sys.argv[1])
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "delta.ckpt"
    for wait in (0.05, 0.11, 0.17):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(file)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        while not file.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        tensor = torch.load(file, weights_only=True)["state_dict"]["a"]
        assert bool((tensor == tensor[0]).all())


def test_fingerprint_reads_all_but_what_is_skipped() -> None:
    model = tiny("bert")
    one = fingerprint(model)
    assert one != fingerprint(tiny("bert", seed=1))
    model.bert.encoder.layer[0].intermediate.dense.weight.data[0, 0] += 1
    assert one != fingerprint(model)
    names = ["bert.encoder.layer.0.intermediate.dense.weight"]
    assert fingerprint(model, names) == fingerprint(tiny("bert"), names)
