"""Reports for people: tables of parameters, memory, checks before a run, and its results."""
