"""Which methods of a backbone compute now: one object, which all grafts of a backbone ask."""


class Switch:
    """Knows the methods that rest, by the names of their owners; a copy of the backbone has one of its own.

    A graft whose owner rests returns what it gets, so that its host computes as if it were not there.
    """

    def __init__(self) -> None:
        self.off: frozenset[str] = frozenset()
