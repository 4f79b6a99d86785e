"""How good are the samples of a built-in run? Run by hand: python tests/recognise.py [--run runs/tiny] [--n 20]

Trains a classifier that shares nothing with the pipeline (an ordinary small convolutional network) on drawn pictures of
another seed, sharp and blurred and noisy ones, reports its accuracy on held-out ones, then what it makes of N samples of each class; also the distances
between samples of a class and to the nearest training picture, so that a collapsed or copying model shows.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample  # noqa: E402
import train  # noqa: E402
from semtok import to_signed  # noqa: E402


def drawn(split, seed, indices):
    pictures, labels = zip(*(train.draw_shape(split, seed, int(i), 32) for i in indices))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def network():
    def block(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

    torch.manual_seed(1)
    return nn.Sequential(
        *block(3, 24), nn.MaxPool2d(2), *block(24, 48), *block(48, 48), nn.MaxPool2d(2), *block(48, 96), *block(96, 96),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, 10),
    ).to(memory_format=torch.channels_last)


def degrade(x, rng):
    """Blur (down to between 7 and 24 pixels a side and back) and coloured noise of a random grain: a person still names
    such a shape, and so must the judge; one trained on sharp pictures alone is thrown by the least blemish."""
    side, grain = (int(torch.randint(low, high, (1,), generator=rng)) for low, high in ((7, 25), (4, 33)))
    x = F.interpolate(F.interpolate(x, (side, side), mode="bilinear", antialias=True), 32, mode="bicubic")
    noise = F.interpolate(torch.randn(len(x), 3, grain, grain, generator=rng), 32, mode="bilinear")
    return x + 0.2 * torch.rand(len(x), 1, 1, 1, generator=rng) * noise


def classifier(steps=1000):
    net, rng = network(), torch.Generator().manual_seed(0)
    pictures, labels = drawn("train", 99, range(8000))
    pictures = to_signed(pictures).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        at = torch.randint(len(pictures), (64,), generator=rng)
        x = degrade(pictures[at], rng) if step % 4 else pictures[at]
        F.cross_entropy(net(x), labels[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/tiny")
    parser.add_argument("--n", type=int, default=20)
    options, rest = parser.parse_known_args()
    with torch.enable_grad():
        net = classifier()
    pictures, labels = drawn("val", 99, range(1000))
    for kind, seen in (("", to_signed(pictures)), (", degraded", degrade(to_signed(pictures), torch.Generator().manual_seed(0)))):
        print(f"classifier on held-out real pictures{kind}: {(net(seen).argmax(1) == labels).float().mean():.1%}")
    args = sample.parse_arguments(["--class", "0", "--run", options.run, *rest])
    sampler = sample.Sampler(args, torch.device("cpu"))
    wanted = torch.arange(10).repeat_interleave(options.n)
    made = sampler.draw(wanted.tolist(), sample.generator(torch.device("cpu"), args.seed))
    right = net(to_signed(made)).argmax(1) == wanted
    print(f"recognised samples: {right.float().mean():.1%} of {len(made)}")
    for label, name in enumerate(sampler.classes):
        own = made[wanted == label].float().flatten(1) / 255
        print(f"  {name:10s} {right[wanted == label].float().mean():6.1%}   mean distance between samples "
              f"{torch.pdist(own).mean() / own.shape[1] ** 0.5:.3f}, smallest {torch.pdist(own).min() / own.shape[1] ** 0.5:.3f}")
    reals, _ = drawn("train", 0, range(train.DRAWN["train"]))
    reals = reals.float().flatten(1) / 255
    nearest = torch.cdist(made.float().flatten(1) / 255, reals).min(1).values / reals.shape[1] ** 0.5
    print(f"distance to the nearest training picture: median {nearest.median():.3f}, smallest {nearest.min():.3f}")


if __name__ == "__main__":
    main()
