"""Full-batch training in partitions, with a model that trains itself: the document's second program, exact.

    python examples/train_autoencoder_native.py --output runs/native

Same seed, same weights, history and files as train_autoencoder_gradient_accumulation.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from samegrad.recipes.autoencoder.data import fit_principal, principal_mse
from samegrad.recipes.autoencoder.documented import MemoryEfficientAutoencoder
from samegrad.recipes.autoencoder.options import AutoencoderOptions
from samegrad.recipes.autoencoder.results import row_errors, write_results
from samegrad.recipes.autoencoder.splits import open_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", "--num_epochs", type=int, default=300)
    parser.add_argument("--learning_rate", "--lr", type=float, default=1e-3)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--accumulation_steps", type=int, default=6)
    parser.add_argument("--latent_dim", type=int, default=50)
    parser.add_argument("--hidden", type=int, help="width of the hidden layers; the document's rule without it")
    parser.add_argument("--train_fraction", type=float, default=0.5)
    parser.add_argument("--layer_for_activation", type=int, default=18)
    parser.add_argument("--patch_rows", type=int, default=20_000)
    parser.add_argument("--data_root", type=Path)
    parser.add_argument("--random_seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/autoencoder_native"))
    asked = parser.parse_args()

    splits = open_splits(
        AutoencoderOptions(
            data_root=asked.data_root,
            layer_for_activation=asked.layer_for_activation,
            patch_rows=asked.patch_rows,
            train_fraction=asked.train_fraction,
            random_seed=asked.random_seed,
        )
    )
    seeded = torch.Generator().manual_seed(asked.random_seed)
    model = MemoryEfficientAutoencoder(
        splits.train.shape[1], asked.latent_dim, hidden=asked.hidden, generator=seeded
    ).to(asked.device)
    history = model.train_with_accumulation(
        splits.train,
        splits.validation,
        num_epochs=asked.epochs,
        learning_rate=asked.learning_rate,
        patience=asked.patience,
        accumulation_steps=asked.accumulation_steps,
        random_seed=asked.random_seed,
    )

    errors = row_errors(lambda rows: model.predict_in_batches(rows, batch_size=4096), splits.test, partition_rows=4096)
    pca = principal_mse(fit_principal(splits.train, asked.latent_dim), splits.test)
    print(f"{len(history.train_losses)} epochs, best validation loss {min(history.validation_losses):.6f}")
    print(f"test MSE {errors.mean():.6f} (std of rows {errors.std():.6f}), PCA of the same rank {pca:.6f}")
    asked.output.mkdir(parents=True, exist_ok=True)
    for path in write_results(model, asked.output, test=splits.test, errors=errors, pca_test_mse=pca):
        print(path)


if __name__ == "__main__":
    main()
