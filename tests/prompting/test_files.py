"""Wordings in YAML files: those that are shipped, and files that are none."""

from pathlib import Path

import pytest

from lightning_peft import TuningError
from lightning_peft.data import synthetic
from lightning_peft.prompting.instruction_files import instructions_of, read_instructions

FILES = sorted((Path(__file__).parents[2] / "configs/prompting").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_wordings(file: Path) -> None:
    found = read_instructions(file)
    assert len(found.templates) == 10
    assert len({template.text for template in found.templates}) == 10
    assert 1 <= sum(template.inverse for template in found.templates) <= 3
    rows = synthetic.load({"opinions": "opinions", "topics": "sentences"}[found.task])["train"]
    for template in found.templates:
        template.check_columns([*rows.column_names, "answer"])
    assert {row[{"opinions": "label", "topics": "topic"}[found.task]] for row in rows} == set(found.words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "holds no mapping"),
        ("a: [", "is no YAML file"),
        ("task: x", "x.yaml: instructions have no templates"),
        ("task: x\ntemplates: {a: '{b.c}'}", "x.yaml: x has 1 templates"),
        ("task: !!python/object/apply:os.system ['true']", "is no YAML file"),
        ("task: x\ntemplates: {a: b}\nwords: {1: 2}", "x has 1 templates where 10 are asked for"),
    ],
)
def test_mistakes(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(TuningError, match=message):
        read_instructions(path)
    with pytest.raises(TuningError, match="is no file: give the path of a YAML file"):
        read_instructions(tmp_path / "none.yaml")


def test_templates_of_an_argument() -> None:
    assert [template.name for template in instructions_of("{a}").templates] == [""]
    assert [template.name for template in instructions_of(["{a}", "{b}"]).templates] == ["1", "2"]


def test_listed_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_peft.cli import main

    monkeypatch.setattr("sys.argv", ["lightning-peft", "templates", str(FILES[0])])
    main()
    shown = capsys.readouterr().out
    found = read_instructions(FILES[0])
    assert all(template.name in shown for template in found.templates)
    assert shown.count("no, inverse") == 2
