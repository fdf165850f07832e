"""Is the planned step the plain step? Gradients, loss and buffers, against the numerical contract."""
