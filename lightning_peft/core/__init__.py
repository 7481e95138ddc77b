"""Grafts, the record of what is tuned, and the delta; no Lightning below here."""
