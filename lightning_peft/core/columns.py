"""Columns that say of which data the rows are."""

OWNERS = {"messages": "ChatData", "conversations": "ChatData", "chosen": "PreferenceData", "rejected": "PreferenceData"}
"""A column -> the class of data whose rows have it."""
