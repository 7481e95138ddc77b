"""The label of tokens that are no targets."""

IGNORED = -100
"""What ``torch.nn.functional.cross_entropy`` leaves out, and transformers and their collators use for it."""
