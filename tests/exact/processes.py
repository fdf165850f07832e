"""Work done on several processes at once, each a rank."""

from __future__ import annotations

import datetime
import faulthandler
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int], dict[str, Any]]
# Ranks that wait for each other forever are an error that a test is to show, and soon.
_TIMEOUT = datetime.timedelta(seconds=60)

# DistributedDataParallel imports dynamo, which takes longer than torch itself.
_PRELOADED = ["torch._dynamo", "torch.distributed", "samegrad.exact.mapped", __name__]


def on_ranks(work: Work, count: int, backend: str = "gloo") -> list[dict[str, Any]]:
    """What ``work(rank)`` found on each of ``count`` ranks."""
    context = _context(backend)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        # A file to meet at, since a port that is free now may be another's in a moment.
        meeting = Path(folder) / "ranks"
        arguments = (work, count, meeting, backend, results)
        processes = [context.Process(target=_on_rank, args=(rank, *arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=240) for _ in processes)
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    failed = [text for text in found.values() if isinstance(text, str)]
    assert not failed, "\n".join(failed)
    return [found[rank] for rank in range(count)]


def _context(backend: str) -> Any:
    """How ranks start: from a process that has imported what all of them need, or each anew where they use cards."""
    if backend == "nccl":
        # What is forked from a process that has asked for cards cannot use them.
        return mp.get_context("spawn")
    mp.set_forkserver_preload(_PRELOADED)
    return mp.get_context("forkserver")


def on_two_ranks(work: Work) -> dict[str, Any]:
    """What ``work(0)`` found, run beside ``work(1)``."""
    return on_ranks(work, 2)[0]


def here() -> torch.device:
    """Where this rank's model is: its own card under NCCL."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _on_rank(rank: int, work: Work, count: int, meeting: Path, backend: str, results: Any) -> None:
    torch.set_num_threads(1)
    # Where ranks wait for each other, each is to say where.
    faulthandler.dump_traceback_later(_TIMEOUT.total_seconds() * 0.7)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(meeting), count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        results.put((rank, work(rank)))
    except BaseException:
        results.put((rank, f"rank {rank}:\n{traceback.format_exc()}"))
        raise
    dist.barrier()
    dist.destroy_process_group()
