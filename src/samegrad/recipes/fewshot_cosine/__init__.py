"""Few-shot classification with a cosine transformer: whole episodes, exact BatchNorm, inside a memory budget."""
