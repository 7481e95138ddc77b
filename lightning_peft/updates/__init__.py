"""Updates of weight matrices: which matrices, what is added, and how it is folded in."""
