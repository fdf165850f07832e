"""Checkpoints and run folders that survive kill -9: saved whole or not at all, verified when loaded."""

from samegrad.store.folder import RunFolder
from samegrad.store.optimizer_state import optimizer_to_tensors, tensors_into_optimizer
from samegrad.store.random_state import rng_from_tensors, rng_to_tensors
from samegrad.store.resume import Checkpoint, check_step, load_checkpoint, model_into
from samegrad.store.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "RunFolder",
    "check_step",
    "load_checkpoint",
    "model_into",
    "optimizer_to_tensors",
    "rng_from_tensors",
    "rng_to_tensors",
    "save_checkpoint",
    "tensors_into_optimizer",
]
