"""What a run's numbers depend on beside module and data: the device's random state, and settings that round."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA
from lightning_peft.core.delta_file import META
from lightning_peft.core.storage import read_torch
from lightning_peft.reports.findings import resumes
from lightning_peft.training import conditions, random_states
from tests.modules import Tuned, loader, trainer


def test_the_state_of_the_own_gpu_goes_to_the_own_gpu_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {3: torch.tensor([3, 3], dtype=torch.uint8), 0: torch.tensor([0, 0], dtype=torch.uint8)}
    now = {"device": 3}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[now["device"]])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: states.update({now["device"]: state}))
    saved = random_states.random_state()
    now["device"] = 0
    random_states.set_random_state(saved)
    assert states[0].tolist() == [3, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    random_states.set_random_state(saved)  # a CPU goes on with what it has


def test_a_resume_under_other_conditions_says_so(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> None:
        saving = ModelCheckpoint(tmp_path, filename="first", every_n_train_steps=2)
        run = trainer(tmp_path, LoRA(r=2), saving, max_steps=2 if path is None else 3)
        run.fit(Tuned("bert"), loader("bert"), loader("bert"), ckpt_path=path)

    def said() -> list[str]:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            run(tmp_path / "first.ckpt")
        return [str(warning.message) for warning in given if "ran otherwise" in str(warning.message)]

    run()
    saved: dict[str, Any] = read_torch(tmp_path / "first.ckpt")[META]["resume"]["conditions"]
    assert saved == {"devices": "cpu", "ranks": 1, "deterministic": False, "TF32": False, "attention": ["sdpa"]}
    assert said() == []
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic was False and is True" in said()[0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_condition_is_compared() -> None:
    now = {"devices": "H100", "ranks": 2}
    with pytest.warns(UserWarning, match="devices was 'cpu' and is 'H100'; ranks was 1 and is 2"):
        conditions.warn_of_changes({"devices": "cpu", "ranks": 1}, now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditions.warn_of_changes(now, now)
        conditions.warn_of_changes(None, now)  # of a file that says nothing


def test_a_check_says_how_exactly_a_run_resumes() -> None:
    said = [resumes(gpu, sure, ranks) for gpu, sure, ranks in ((False, False, 1), (True, True, 2), (True, False, 1))]
    assert all(finding.passes for finding in said)
    assert [finding.seen.split(":")[0] for finding in said] == [
        "bit for bit, with as many threads",
        "bit for bit as far as torch knows of its kernels, on the same card, with 2 ranks",
        "up to rounding",
    ]
