"""Folders, hub ids and folders of installed packages are opened in one place, which says in one sentence what fails."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, BertModel

import lightning_peft
from lightning_peft import CoOp, MaPLe, TuningError
from lightning_peft.core import hub
from tests import two_towers
from tests.models import tiny

PACKAGE = Path(lightning_peft.__file__).parent
HERE = "package://some_model/files"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model, with its tokenizer, in a package that can be imported."""
    folder = tmp_path / "some_model" / "files"
    folder.mkdir(parents=True)
    tiny("bert").save_pretrained(folder)
    two_towers.save_tokenizer(folder)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize(
    "method", [CoOp(init="a photo of a", tokenizer=HERE), MaPLe(init="a photo", depth=2, tokenizer=HERE)]
)
def test_a_context_takes_the_tokenizer_of_a_package(method: Any, package: Path) -> None:
    method.apply(tiny("clip"))


def test_everything_opens_from_a_package(package: Path) -> None:
    assert hub.load_config(HERE, hidden_act="relu").hidden_act == "relu"
    assert isinstance(hub.load_model(AutoModel, HERE), BertModel)
    assert hub.load_tokenizer(HERE)("a photo", add_special_tokens=False) == hub.tokenizer_of(
        tiny("clip"), HERE, "a test"
    )("a photo", add_special_tokens=False)


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (lambda name: hub.load_tokenizer(name), r"no tokenizer at '.*' \(.*\): give its folder or hub id\."),
        (lambda name: hub.tokenizer_of(tiny("bert"), name, ""), r"no tokenizer at '.*' \(.*\): give tokenizer=\."),
        (
            lambda name: hub.load_image_processor(name),
            r"'.*' has no image processor \(.*\): give a vision model, or .*",
        ),
        (
            lambda name: hub.load_config(name, "guess"),
            r"no guess can be made of '.*' \(.*\): give a folder or hub id\.",
        ),
        (lambda name: hub.load_model(AutoModel, name), r"no AutoModel can be made of '.*' \(.*\): give a folder .*\."),
    ],
)
def test_an_empty_folder_is_refused_in_one_sentence(opened: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=f"^{said}$") as caught:
        opened(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_nothing_else_opens_what_was_pretrained() -> None:
    calls = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if ".from_pretrained(" in path.read_text()}
    of_peft = {Path("interop/card.py"), Path("interop/check.py")}
    assert calls == {Path("core/hub.py"), *of_peft}, "a reader is shown how PEFT opens an adapter, and a check lets it"
