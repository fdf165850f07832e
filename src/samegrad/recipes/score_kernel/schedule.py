"""The learning rate of every step, known before the first one: a run that is resumed goes on where it was."""

from __future__ import annotations

import torch

from .options import ScoreKernelOptions


def learning_rates(options: ScoreKernelOptions) -> tuple[float, ...]:
    """``options.niters`` rates, as torch's schedulers give them."""
    steps = options.niters
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.lr)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if options.scheduler_type == "one_cycle" and steps > 3:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=options.lr, total_steps=steps, cycle_momentum=False
        )
    elif options.scheduler_type == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    else:
        # Of three steps or fewer a cycle has no middle.
        return (options.lr,) * steps
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        # A scheduler asks that the optimizer has stepped.
        optimizer.step()
        scheduler.step()
    return tuple(rates)
