"""Heads and side networks on a frozen model, a cache of its features, and the memory of its activations."""
