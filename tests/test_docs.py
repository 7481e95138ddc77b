"""The documentation is in step with the code: the picture of the floors, and the paths that pages point to."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_the_picture_of_the_floors_is_that_of_the_imports() -> None:
    draw = runpy.run_path(str(ROOT / "docs/draw_floors.py"))["draw"]
    assert (ROOT / "docs/floors.svg").read_text() == draw(), "run: python docs/draw_floors.py"


def test_the_notebooks_are_the_tutorials() -> None:
    made = runpy.run_path(str(ROOT / "docs/notebooks.py"))
    for page in made["PAGES"]:
        kept = (ROOT / f"examples/notebooks/{page}.ipynb").read_text(encoding="utf-8")
        assert kept == made["written"](page), "run: python docs/notebooks.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:core|training|methods|tasks|data|tests|docs|configs)/[a-z_./]+\.(?:py|md|yaml))`", page.read_text()
    )
    places = [ROOT, ROOT / "lightning_peft"]
    made_up = {"methods/new.py", "configs/methods/new.yaml", "tests/methods/test_new.py"}
    assert [file for file in named if file not in made_up and not any((p / file).exists() for p in places)] == []
