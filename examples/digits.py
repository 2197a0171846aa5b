"""Train the summary's sequence network on scikit-learn's 8x8 digits: `python examples/digits.py`.

Nine layers, so that both mergings and the splitting take part. Needs scikit-learn.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import focalnet_kernels as fk


def make_network() -> fk.SequenceFocalNet:
    return fk.SequenceFocalNet(
        image_size=8,
        patch_size=2,
        num_classes=10,
        dim=32,
        depth=9,
        num_contexts=2,
        hidden_dim=64,
        dropout=0.1,
        in_chans=1,
    )


def split_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (n, 1, 8, 8) in [-1, 1], labels) to train on, and a quarter of all to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=digits.target)
    return (images[train], labels[train]), (images[test], labels[test])


def train(epochs: int, seed: int, batch: int = 64, peak_rate: float = 3e-3) -> float:
    """The accuracy on the test images after `epochs` over the others."""
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = split_digits(seed)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels))[: steps * batch].view(steps, batch):
            optimizer.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        return (network(test_images).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    accuracy = train(arguments.epochs, arguments.seed)
    print(f"test accuracy {accuracy:.1%} after {arguments.epochs} epochs, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
