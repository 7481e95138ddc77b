"""What the files of a package define is found without a list."""

from pathlib import Path

import pytest

from lightning_peft.core.packages import classes_in


def test_the_classes_of_a_kind_in_the_order_of_files_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "b.py").write_text("from .a import First\nclass Third(ValueError): ...\n")
    (folder / "a.py").write_text("class Second(ValueError): ...\nclass Other: ...\nclass First(ValueError): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = classes_in(folder.name, [str(folder)], ValueError)
    assert [kind.__name__ for kind in found] == ["Second", "First", "Third"]
