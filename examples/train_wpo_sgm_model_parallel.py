"""Centers over several devices of one process, or one a process under torchrun; one set of weights.

    python examples/train_wpo_sgm_model_parallel.py --device_ids cuda:0 cuda:1
    torchrun --nproc-per-node 2 examples/train_wpo_sgm_model_parallel.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from samegrad.recipes.score_kernel.faces import setup_model_parallel_training
from samegrad.recipes.score_kernel.model import FactorNet
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.splits import open_points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="8gaussians")
    parser.add_argument("--train_kernel_size", type=int, default=100)
    parser.add_argument("--device_ids", nargs="+", default=["cpu", "cpu"], help="devices of one process")
    parser.add_argument("--chunk_size", type=int, help="centers at a time on each device")
    parser.add_argument("--niters", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--stability", type=float, default=0.01)
    args = parser.parse_args()

    device_ids = args.device_ids
    if "WORLD_SIZE" in os.environ:
        cuda = torch.cuda.is_available()
        device_ids = [f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"]
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)  # every rank draws the same samples
    points = open_points(ScoreKernelOptions(data=args.data, train_kernel_size=args.train_kernel_size))
    factornet = FactorNet(points.dim, generator=torch.Generator().manual_seed(0)).to(device_ids[0])
    training_samples = points.train.to(device_ids[0])

    model_parallel, optimizer = setup_model_parallel_training(factornet, points.centers, device_ids, args)
    for step in range(args.niters):
        samples = training_samples[torch.randint(0, len(training_samples), [args.batch_size])]
        optimizer.zero_grad()
        loss = model_parallel.compute_loss(samples, args.stability)
        loss.backward()
        optimizer.step()
        if (step % 100 == 0 or step == args.niters - 1) and int(os.environ.get("RANK", "0")) == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if dist.is_initialized():
        dist.barrier()  # the first rank holds the store that the others leave through
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
