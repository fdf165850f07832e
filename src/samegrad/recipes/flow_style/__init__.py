"""Style transfer by a learnt flow between latents, judged by sorted patches of the whole logical batch."""
