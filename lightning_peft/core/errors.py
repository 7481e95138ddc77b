"""The one exception of the package."""


class TuningError(ValueError):
    """A mistake that the user can mend: its message gives the value, the rule and the remedy in one sentence."""
