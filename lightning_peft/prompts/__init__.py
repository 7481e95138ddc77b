"""Soft prompts: rows for virtual tokens, and keys and values in every attention."""
