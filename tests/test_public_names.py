"""The stub is the one list of public names: type checkers read it, and so does the package."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft.methods import every_method
from lightning_peft.training.mixin import MethodMixin, TunedBy

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", lightning_peft.__all__)
def test_every_name_is_where_the_stub_says(name: str) -> None:
    assert getattr(lightning_peft, name).__name__ == name
    assert name in dir(lightning_peft)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_peft' has no attribute 'LoRa'"):
        lightning_peft.LoRa  # noqa: B018


@pytest.mark.parametrize(("name", "method"), every_method().items())
def test_every_method_and_its_mixin_are_public(name: str, method: type[lightning_peft.Method]) -> None:
    assert getattr(lightning_peft, name) is method
    mixin = getattr(lightning_peft, f"{name}Mixin")
    assert issubclass(mixin, MethodMixin)
    assert issubclass(mixin, TunedBy[method])
    assert mixin.default_method is method
    assert pickle.loads(pickle.dumps(mixin)) is mixin


@pytest.mark.slow
def test_the_wheel_has_the_stub(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"lightning_peft/__init__.pyi", "lightning_peft/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())
