"""A kernel score model with learned local precision matrices (document 002)."""
