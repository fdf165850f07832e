"""A plan applied, and the loop that runs it."""
