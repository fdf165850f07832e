"""Work done on several gloo processes at once, each a rank."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int], dict[str, Any]]
# Ranks that wait for each other forever are an error that a test is to show, and soon.
_TIMEOUT = datetime.timedelta(seconds=45)


def on_ranks(work: Work, count: int, backend: str = "gloo") -> list[dict[str, Any]]:
    """What ``work(rank)`` found on each of ``count`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_on_rank, args=(work, r, count, port, backend, results)) for r in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count
    found = dict(results.get() for _ in processes)
    return [found[rank] for rank in range(count)]


def on_two_ranks(work: Work) -> dict[str, Any]:
    """What ``work(0)`` found, run beside ``work(1)``."""
    return on_ranks(work, 2)[0]


def _on_rank(work: Work, rank: int, count: int, port: int, backend: str, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=count, timeout=_TIMEOUT)
    results.put((rank, work(rank)))
    dist.barrier()
    dist.destroy_process_group()
