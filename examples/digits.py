"""Train the summary's sequence network on scikit-learn's 8x8 digits: `python examples/digits.py`.

Nine layers, so that both mergings and the splitting take part. Needs scikit-learn.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import focalnet_kernels as fk

ADAMW = partial(torch.optim.AdamW, weight_decay=0.05)


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


def draw_batches(count: int, epochs: int, batch: int = 64) -> Tensor:
    """Indices (steps, batch): all images in another order in every epoch, those that fill no batch left out."""
    steps = count // batch
    return torch.cat([torch.randperm(count)[: steps * batch].view(steps, batch) for _ in range(epochs)])


def optimize(
    network: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batches: Tensor,
    optimizer: Callable = ADAMW,
    peak_rate: float = 3e-3,
) -> Iterator[Tensor]:
    """Trains while it is iterated over: a step for each batch, whose loss `loss_of` computes and which is given."""
    optimizer = optimizer(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=len(batches))
    for chosen in batches:
        optimizer.zero_grad()
        loss = loss_of(chosen)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    network.eval()
    with torch.inference_mode():
        return (network(images).argmax(1) == labels).float().mean().item()


def train(epochs: int, seed: int) -> float:
    """The accuracy on the test images after `epochs` over the others."""
    torch.manual_seed(seed)
    (images, labels), test = split_digits(seed)
    network = make_network()

    def loss_of(chosen: Tensor) -> Tensor:
        return F.cross_entropy(network(images[chosen]), labels[chosen])

    for _ in optimize(network, loss_of, draw_batches(len(labels), epochs)):
        pass
    return accuracy(network, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = train(arguments.epochs, arguments.seed)
    print(f"test accuracy {found:.1%} after {arguments.epochs} epochs, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
