"""Updates of weight matrices: which matrices, what is added, and how it is taken into the weights."""
