"""``search``: finds a template for a prompted task, and writes it as a file that the task takes."""

from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.prompt_search import Found, How, search_prompts
from lightning_peft.tasks.prompted import PromptedTask
from lightning_peft.tasks.prompted_classification import PromptedClassification


class Searcher(L.Trainer):
    """A Trainer that searches for prompts."""

    def search(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        how: How = "edits",
        budget: int = 40,
        file: str | None = None,
        width: int = 5,
        seed: int = 0,
        writer: str | None = None,
        out: str = "prompt.yaml",
    ) -> None:
        """Find a better template on the validation rows, and write it and the trace.

        Args:
            model: a PromptedClassification or PromptedGeneration.
            datamodule: its data.
            ckpt_path: accepted so that a configuration of test can be given as it is; not read.
            how: 'edits', 'file', 'mine', 'paraphrase', 'gradient', 'write', 'fill', 'words' or 'gepa'.
            budget: how many templates are asked.
            file: the templates of 'file', the text of 'mine', the paraphrases of 'paraphrase' and 'edits'.
            width: how many edits of the best are asked at a time.
            seed: of what is drawn.
            writer: of 'gepa', the name of a model that litellm knows; of 'fill', the folder or hub id of a T5; None:
                the model of the task itself.
            out: the template file; the trace stands beside it, as .jsonl.
        """
        del ckpt_path
        if not isinstance(model, PromptedTask) or datamodule is None:
            raise TuningError(
                f"search finds templates of prompted tasks, and {type(model).__name__} is none: take "
                "PromptedClassification or PromptedGeneration, with data."
            )
        options: dict[str, Any] = {"file": file, "width": width, "seed": seed, "trainer": self, "writer": writer}
        found = search_prompts(model, datamodule, how, budget, **options)
        words = None
        if isinstance(model, PromptedClassification):
            words = dict(zip(model.labels, model.prompts.options, strict=True))
        _say(found, found.save(out, words))


def _say(found: Found, path: Path) -> None:
    first, best = found.tried[0], found.best
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{found.metric} {first.score:.3f} -> {best.score:.3f}, {len(found.tried)} templates")
    console.print(repr(best.template))
    console.print(f"written: {path} and {path.with_suffix('.jsonl')}")
