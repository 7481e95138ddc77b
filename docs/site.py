"""Hooks of mkdocs: a page for each method, the configurations and the API are made from the package itself."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lightning_peft.commands.method_kinds import by_kind
from lightning_peft.commands.tools import row_of
from lightning_peft.core import shipped
from lightning_peft.methods import every_method

ROOT = Path(__file__).parents[1]
_VIT, _CLIP = "google/vit-base-patch16-224-in21k", "openai/clip-vit-base-patch32"
_IMAGES = f"--config image_classification --config digits --model.model {_VIT} --method"
_STREAM = f"--config continual_classification --model.model {_VIT} --method"
_PAIRS = f"--config clip_classification --config clip_shapes --model.model {_CLIP} --method"
RUNS = {
    "CODAPrompt": f"{_STREAM} CODAPrompt --method.num_tasks 5",
    "DAPL": f"--config domain_adaptation --config domain_shapes --model.model {_CLIP} --method DAPL",
    "DualPrompt": f"{_STREAM} DualPrompt --method.num_tasks 5",
    "L2P": f"{_STREAM} L2P",
    "PixelPrompt": f"{_IMAGES} PixelPrompt --method.form over",
    "PrefixLM": "--config causal_lm --model.model gpt2 --method LoRA --trainer.callbacks+=PrefixLM",
    "PromptEnsemble": "--config quickstart --method PromptEnsemble --method.num_prompts 3",
    "RanPAC": f"{_STREAM} RanPAC",
    "TinyTL": f"{_IMAGES} TinyTL",
    "TipAdapter": f"{_PAIRS} TipAdapter --method.num_classes 36",
    "TrainableTokens": "--config quickstart --config trainable_tokens",
    "VPT": f"{_IMAGES} VPT",
    "WARP": "--config cloze_classification --model.model bert-base-uncased --method WARP --method.words '[good, bad]'",
}
"""What is fitted with a method that the task of the quickstart is not for."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages of the methods, those of a kind together, and pages that it does not name."""
    nav: list[Any] = config["nav"]
    (methods,) = [entry["Methods"] for entry in nav if "Methods" in entry]
    methods += [{kind: [{name: page_of(m)} for name, m in of_kind.items()]} for kind, of_kind in by_kind().items()]
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    more = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    (inside,) = [entry["Inside"] for entry in nav if "Inside" in entry]
    inside += [path for path in more if path not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the package."""
    made = {page_of(method): method_page(name, method) for name, method in every_method().items()}
    made |= {"configurations.md": configurations_page(), "api.md": api_page()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave of a link to a file of the repository, which is no page, its text."""
    folder = (ROOT / "docs" / page.file.src_path).parent

    def kept(found: re.Match[str]) -> str:
        target = (folder / found[2].partition("#")[0]).resolve()
        return found[0] if target.is_relative_to(ROOT / "docs") else found[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(((?!https?:|#)[^)]+)\)", kept, markdown)


def page_of(method: type[Any]) -> str:
    """Return the path of a method's page."""
    return f"methods/{method.__module__.rpartition('.')[2]}.md"


def method_page(name: str, method: type[Any]) -> str:
    """Return a method's page: what it is, its source, its arguments, its configuration, and a run."""
    module = inspect.getmodule(method)
    stem = method.__module__.rpartition(".")[2]
    kind, trains, paper = row_of(method)
    scores = _scores(name)
    return "\n\n".join([
        f"# {name}",
        f"{(method.__doc__ or '').splitlines()[0]}",
        f"| kind | trains | paper |\n|---|---|---|\n| {kind} | {trains} | {paper} |",
        "## What it does",
        inspect.getdoc(module) or "",
        "## Use it",
        f"```python\nfrom lightning_peft import {name}\n\ntrainer = L.Trainer(callbacks=[{name}()])\n```",
        f"```\n{run_of(name, method)}\n```",
        f"`--config {stem}` is:",
        f"```yaml\n{(shipped.folder() / 'methods' / f'{stem}.yaml').read_text()}```",
        *(["## Measured", scores] if scores else []),
        "## Arguments",
        f"::: {method.__module__}.{name}\n    options: {{show_root_heading: false, members: false}}",
    ]) + "\n"  # fmt: skip


def run_of(name: str, method: type[Any]) -> str:
    """Return a command line that fits a method, on a task that it is for."""
    begin = _PAIRS if method.advised.optimizer == "SGD" else "--config quickstart --method"  # two towers train by SGD
    return f"lightning-peft fit {RUNS.get(name, f'{begin} {name}')}"


def configurations_page() -> str:
    """Return a page with every configuration that comes with the package."""
    parts = ["# Configurations", "Each is a file for `--config`, by its name; several add up, later ones win."]
    for name, path in shipped.configurations().items():
        parts.append(f"## {name}\n\n```yaml\n{path.read_text()}```")
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Return a page with every public name, by the module that it is of."""
    parts = ["# API", "What `lightning_peft` exports. The methods have pages of their own."]
    for statement in ast.parse((ROOT / "lightning_peft/__init__.pyi").read_text()).body:
        if isinstance(statement, ast.ImportFrom) and not str(statement.module).startswith("lightning_peft.methods"):
            names = [alias.name for alias in statement.names if alias.name[0] != "_"]
            parts += [f"::: {statement.module}.{name}\n    options: {{members: {name[0].islower()}}}" for name in names]
    return "\n\n".join(parts) + "\n"


def _scores(name: str) -> str:
    """Return the rows of the measured results that begin with a method, each below the head of its table."""
    tables = re.findall(r"((?:\|.*\n)+)", (ROOT / "docs/results.md").read_text())
    found = []
    for table in tables:
        head, line, *rows = table.splitlines()
        own = [row for row in rows if re.match(rf"\| `{name}[(`]", row)]
        if own:
            found.append("\n".join([head, line, *own]))
    return "\n\n".join([*found, "From [the measured results](../results.md)."]) if found else ""
