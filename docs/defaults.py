"""An extension of griffe, which reads the package for the site: a field with bounds is shown with its default."""

from typing import Any

import griffe

BOUNDS = "lightning_peft.core.arguments"


class Defaults(griffe.Extension):
    """Show ``r: int = natural(8)`` as ``r: int = 8``."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Put the default of a field in the place of the call that declares it."""
        declared = attr.value
        if isinstance(declared, griffe.ExprCall) and declared.canonical_path.startswith(f"{BOUNDS}."):
            default = declared.arguments[0]
            attr.value = default.value if isinstance(default, griffe.ExprKeyword) else default
