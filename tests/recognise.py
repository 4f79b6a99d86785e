"""How good are the samples of a run? By hand:

    python tests/recognise.py [--run runs/tiny] [--data FOLDER] [--n 20]

It trains a classifier that shares nothing with the pipeline, an ordinary small convolutional network, on
sharp, blurred and noisy pictures: drawn ones of another seed, or those of --data. It reports its accuracy on
held-out pictures, then what it makes of N samples of each class. Distances between the samples of a class,
beside those between pictures of the class and to the nearest training picture, show a model that has
collapsed or copies.
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
from semtok import key_generator, to_signed  # noqa: E402

SIDE = 32


def drawn(split, seed, indices):
    """Built-in pictures: (N, 3, 32, 32) uint8 and their labels."""
    pictures, labels = zip(*(train.draw_shape(split, seed, int(i), SIDE) for i in indices))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def network(classes=10):
    """Five convolutions; features are what the last layer reads: network[:-1]."""
    def block(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

    torch.manual_seed(1)
    return nn.Sequential(
        *block(3, 24), nn.MaxPool2d(2), *block(24, 48), *block(48, 48), nn.MaxPool2d(2), *block(48, 96),
        *block(96, 96), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, classes),
    ).to(memory_format=torch.channels_last)


def degrade(x, rng):
    """Blur (down to between 7 and 24 pixels a side and back) and coloured noise of a random grain. A person
    still names such a shape, and so must the judge. One trained on sharp pictures alone fails at the least
    blemish."""
    side, grain = (int(torch.randint(low, high, (1,), generator=rng)) for low, high in ((7, 25), (4, 33)))
    x = F.interpolate(F.interpolate(x, (side, side), mode="bilinear", antialias=True), SIDE, mode="bicubic")
    noise = F.interpolate(torch.randn(len(x), 3, grain, grain, generator=rng), SIDE, mode="bilinear")
    return x + 0.2 * torch.rand(len(x), 1, 1, 1, generator=rng) * noise


def classifier(pictures, labels, steps=1000):
    """The judge, trained on pictures (N, 3, 32, 32) uint8."""
    net, rng = network(int(labels.max()) + 1), torch.Generator().manual_seed(0)
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


def spread(rows):
    """The mean distance between rows (N, D), per number."""
    return (torch.pdist(rows).mean() / rows.shape[1] ** 0.5).item()


def main():
    """The command of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/tiny")
    parser.add_argument("--data", help="the folder that the run was trained on, if it was one")
    parser.add_argument("--n", type=int, default=20)
    options, rest = parser.parse_known_args()
    if options.data:
        splits = (train.Pictures(options.data, split, 0, SIDE) for split in ("train", "val"))
        (pictures, labels), (held_out, truth) = ((s.memory, torch.tensor(s.labels)) for s in splits)
    else:
        (pictures, labels), (held_out, truth) = drawn("train", 99, range(8000)), drawn("val", 99, range(1000))
    net = classifier(pictures, labels).requires_grad_(False)
    noisy = degrade(to_signed(held_out), torch.Generator().manual_seed(0))
    for kind, seen in (("", to_signed(held_out)), (", degraded", noisy)):
        share = (net(seen).argmax(1) == truth).float().mean()
        print(f"classifier on held-out real pictures{kind}: {share:.1%}")

    args = sample.parse_arguments(["--class", "0", "--run", options.run, *rest])
    sampler = sample.Sampler(args, torch.device("cpu"))
    wanted = torch.arange(len(sampler.classes)).repeat_interleave(options.n)
    made = sampler.draw(wanted.tolist(), key_generator("cpu", args.seed))
    right = net(to_signed(made)).argmax(1) == wanted
    print(f"recognised samples: {right.float().mean():.1%} of {len(made)}")
    print(f"  {'':10} recognised   mean distance in pixels: samples, pictures   in features: the same")
    every = []
    for label, name in enumerate(sampler.classes):
        own, real = made[wanted == label], pictures[labels == label][: options.n]
        features = [spread(net[:-1](to_signed(x))) for x in (own, real)]
        pixels = [spread(x.float().flatten(1) / 255) for x in (own, real)]
        every.append([*pixels, *features])
        share = right[wanted == label].float().mean()
        print(f"  {name:10} {share:10.1%}   " + "   ".join(f"{x:.3f}" for x in every[-1]))
    pixels, real_pixels, features, real_features = np.mean(every, 0)
    of_pixels, of_features = pixels / real_pixels, features / real_features
    print(f"samples as diverse as pictures: {of_pixels:.2f} in pixels, {of_features:.2f} in features")
    reals = train.Pictures(options.data, "train", 0, SIDE).memory.float().flatten(1) / 255
    nearest = torch.cdist(made.float().flatten(1) / 255, reals).min(1).values / reals.shape[1] ** 0.5
    print(f"to the nearest training picture: median {nearest.median():.3f}, smallest {nearest.min():.3f}")


if __name__ == "__main__":
    main()
