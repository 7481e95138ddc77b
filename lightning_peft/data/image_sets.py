"""Sets of images that methods are compared on, as ``image_sets.yaml`` says of each where its files lie."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near


@dataclass(frozen=True)
class ImageSet:
    """What is known of a set.

    Args:
        folder: where its files lie, below that of all sets.
        classes: how many there are.
        train: the list of its training images; of one file for all splits, that file; '': the folder is a tree of
            images, or the set is on the hub.
        validation: the same for validation; '': that of ``train``.
        test: the same for the test; of a tree, the name of the split.
        images: the folder that paths begin in.
        names: a file of the names of the classes, where rows have others.
        template: the text of a class for models like CLIP.
        group: of the sets that are averaged together.
        tree: whether the folder has a folder for each split, and therein one for each class.
        hub: a copy on the hub: its id as ``dataset``, and the names of its splits where they are other ones.
    """

    folder: str
    classes: int
    train: str = ""
    validation: str = ""
    test: str = ""
    images: str = ""
    names: str = ""
    template: str | None = None
    group: str = ""
    tree: bool = False
    hub: dict[str, str] = field(default_factory=dict)

    def places(self, root: str) -> dict[str, str]:
        """Return the arguments of `ImageClassificationData` that read its files, below the folder of all sets."""
        base = Path(root) / self.folder
        found = {"names": str(base / self.names)} if self.names else {}
        if self.tree:
            return found | {"dataset": str(base), "test": self.test}
        lists = {split: str(base / (vars(self)[split] or self.train)) for split in ("train", "validation", "test")}
        return found | lists | {"images": str(base / self.images)}


@cache
def image_sets() -> dict[str, ImageSet]:
    """Return the sets by name, such as 'vtab-1k/cifar'."""
    found = {}
    for family, facts in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).items():
        shared = {name: value for name, value in facts.items() if name not in ("sets", "under")}
        for name, own in facts["sets"].items():
            folder = facts.get("under", "") + name
            found[f"{family}/{name}"] = ImageSet(**({"folder": folder} | shared | own))
    return found


def image_set(name: str) -> ImageSet:
    """Return what is known of a set.

    Raises:
        TuningError: there is none of that name.
    """
    every = image_sets()
    if name not in every:
        raise TuningError(f"layout={name!r} is no set of images that is known{near(name, every)}.")
    return every[name]


def members(name: str) -> list[str]:
    """Return the names of the sets of a family or of a group of it, or the name itself.

    >>> members("vtab-1k/specialized")
    ['vtab-1k/diabetic_retinopathy', 'vtab-1k/eurosat', 'vtab-1k/patch_camelyon', 'vtab-1k/resisc45']
    >>> len(members("coop")), members("coop/dtd"), members("red")
    (11, ['coop/dtd'], ['red'])
    """
    family = {each: f"{each.partition('/')[0]}/{known.group}" for each, known in image_sets().items()}
    return [each for each, group in family.items() if name in (each.partition("/")[0], group)] or [name]
