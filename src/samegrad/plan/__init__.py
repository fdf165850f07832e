"""Footprint and budget to a ladder of plans, and the words that explain it."""
