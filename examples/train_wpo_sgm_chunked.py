"""The document's ten-line loop: an existing script, with centers a few at a time and the gradient of all of them.

    python examples/train_wpo_sgm_chunked.py --data 8gaussians --chunk_size 50
"""

from __future__ import annotations

import argparse

import torch
from torch import optim

from samegrad.recipes.score_kernel.faces import setup_chunked_training
from samegrad.recipes.score_kernel.model import FactorNet
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.splits import open_points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="8gaussians")
    parser.add_argument("--train_kernel_size", type=int, default=100)
    parser.add_argument("--chunk_size", type=int, default=50, help="centers at a time; 0: as many as fit")
    parser.add_argument("--niters", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--stability", type=float, default=0.01)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    points = open_points(ScoreKernelOptions(data=args.data, train_kernel_size=args.train_kernel_size))
    training_samples, centers = points.train.to(args.device), points.centers.to(args.device)
    factornet = FactorNet(points.dim).to(args.device)

    chunked_trainer = setup_chunked_training(factornet, centers, chunk_size=args.chunk_size)
    optimizer = optim.AdamW(chunked_trainer.factornet.parameters(), lr=args.lr)
    for step in range(args.niters):
        randind = torch.randint(0, training_samples.shape[0], [args.batch_size])
        samples = training_samples[randind, :]

        optimizer.zero_grad()
        loss = chunked_trainer.compute_loss(samples, args.stability)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == args.niters - 1:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
