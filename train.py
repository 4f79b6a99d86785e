"""Train SemTok: stand-ins (stage 0), flow-matching pre-training (1), one-step refiner (2), masked AR (ar).

    python train.py --stage all                    # the tiny world, from nothing, on two CPU cores in minutes
    python train.py --stage 1 --data FOLDER        # your own pictures: FOLDER/CLASS/picture.jpg
    python train.py --stage 1 --preset paper --data IMAGENET/train --sd35 FILE --siglip FILE ...

Section 3.2 and 3.3, Eq. 6 and 7, appendix A. The models themselves are in semtok.py and ar.py. In this file, from top to
bottom: recipes; pictures; several processes; the networks that only training needs; a run's settings and files; caches; THE
PAPER'S STAGES, one class each, which can be read first and alone; stage 0's stand-ins; the loop that all stages share; the
plan of a run (--dry-run); the command line.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import fid
from ar import AR_PRESETS, GUIDANCE, ARConfig, MaskedAR, ar_metadata
from bsq import bits_to_codes, code_usage, codes_to_bits, gather, mean_over_ranks
from mmdit import TensorFiles, UserError, load_sd35
from semtok import (
    PICTURE_SUFFIXES, PRESETS, VAE, Decoder, SemTok, SemTokConfig, SigLIP, SigLIPConfig, choose_device, load_semtok, load_siglip,
    load_vae, picture_grid, read_picture, to_signed, to_uint8, tokenizer_metadata, whole_batch, write_file, write_picture,
    write_tensors,
)

# -------------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. The defaults are the paper's numbers: section 4.1, appendix A.1 and A.2."""

    steps: int
    batch_size: int  # over all ranks
    lr: float
    weight_decay: float = 1e-3
    warmup: int = 10_000
    ema: float = 0.9999
    gan_start: int = 20_000  # stage 2: iterations before the discriminator joins
    discriminator_lr: float = 1e-4
    semantic: float = 0.05  # lambda_s
    perceptual: float = 0.1  # lambda_p
    least_masked: float = 0.7  # masked AR: the share of masked tokens is uniform between this and 1
    log_every: int = 100
    save_every: int = 2_000  # training state, for --resume
    preview_every: int = 5_000


RECIPES = {
    "paper": {
        "1": Recipe(200_000, 256, 5e-5),
        "2": Recipe(100_000, 64, 5e-5),
        "ar": Recipe(800_000, 2048, 2e-4, weight_decay=0.03),
    },
    "tiny": {
        "0": Recipe(800, 24, 1e-3, warmup=30, ema=0.0, log_every=25, save_every=400, preview_every=400),
        "1": Recipe(400, 16, 3e-3, warmup=50, log_every=25, save_every=200, preview_every=200),
        # In batches of 16 the paper's weights drown the pixels: lambda_s 0.05 or lambda_p 0.1 cost 2.3 dB after 400 steps.
        "2": Recipe(
            700, 16, 5e-3, warmup=50, gan_start=630, semantic=0.003, perceptual=0.01,
            log_every=25, save_every=350, preview_every=350,
        ),
        # Of 16 tokens, a share of 0.7 masked leaves at most 4 known: sampling would end where training never was.
        # The longer warm-up bears the higher rate; after 50 steps of it 6e-3 costs 0.06 nats a bit.
        "ar": Recipe(
            3000, 32, 5e-3, weight_decay=0.03, warmup=200, least_masked=0.0, log_every=50, save_every=1000, preview_every=1000,
        ),
    },
}
TINY_SIGLIP = SigLIPConfig(width=64, depth=2, heads=2, hidden=128, patch=8, grid=4)
TINY_VGG, TINY_RESNET, TINY_DISCRIMINATOR = (8, 8, 16, 24, 24), (8, (1, 1, 1, 1)), (16, 3, 4)
QUANT, GAN = 0.0025, 0.1  # lambda_q, lambda_G (section 4.1)
PERCEPTUAL_TERMS = {"lpips": ("lpips",), "resnet": ("resnet",), "both": ("lpips", "resnet")}  # Table 11
LECAM = 0.001
STAGES = ("0", "1", "2", "ar")
BELONGS = {  # flags of the paper's ablations, and the stages that they change (with --from-scratch, see belongs)
    "no_distill": ("1", "2"), "no_contrast": ("1", "2"),  # Table 4
    "order": ("1", "ar"),  # Table 5
    "quantizer": ("1",),  # Table 10
    "bits": ("1",),
    "perceptual": ("2",),  # Table 11
    "from_scratch": ("2",),  # Table 12
    "freeze_encoder": ("2",),
    "ar_size": ("ar",), "bit_groups": ("ar",),  # Table 13
    "cache": ("1", "2"),  # no ablation: it belongs to stages all the same
}
LARGEST_GROUP = 12  # bits of --bit-groups that one softmax decides: 4096 logits
WEIGHTS = ("sd35", "vae", "siglip", "vgg", "lpips", "resnet")
STAND_INS = {
    "vae": "standins/vae.safetensors", "siglip": "standins/siglip", "vgg": "standins/vgg16.safetensors",
    "lpips": "standins/lpips.safetensors", "resnet": "standins/resnet50.safetensors",
}
RESULTS = {"0": STAND_INS["vae"], "1": "stage1.safetensors", "2": "stage2.safetensors", "ar": "ar.safetensors"}
NAMES = {"0": "stand-ins", "1": "flow-matching pre-training", "2": "one-step refiner", "ar": "masked AR"}

# ------------------------------------------------------------------------------------------------------------- pictures

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow", "bar")
DRAWN = {"train": 8_192, "val": 500}  # pictures of the built-in world


def _corners(name: str) -> np.ndarray:
    """The outline of a shape of about unit radius round the origin, y pointing down: (corners, 2)."""
    def polygon(corners, radius, start=-90.0):
        angles = np.radians(start + 360 * np.arange(corners) / corners)
        return radius * np.stack([np.cos(angles), np.sin(angles)], 1)

    if name == "star":
        return np.stack([polygon(5, 1.1), polygon(5, 0.46, -54)], 1).reshape(10, 2)
    if name == "cross":
        quarter = np.array([(-0.33, -1), (0.33, -1), (0.33, -0.33)])
        turns = [np.array([[0, -1], [1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, 1], [-1, 0]])]
        return np.concatenate([quarter] + [quarter @ turn.T for turn in turns])
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return np.stack([np.sin(t) ** 3, -y - 0.1], 1)
    if name == "arrow":
        return np.array([(0, -1.1), (0.85, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.85, -0.1)])
    if name == "bar":
        return np.array([(-1.1, -0.33), (1.1, -0.33), (1.1, 0.33), (-1.1, 0.33)])
    return {"square": polygon(4, 1, 45), "triangle": polygon(3, 1.1)}.get(name, polygon(48, 0.92))


_OUTLINES = {name: _corners(name) for name in SHAPES}


def draw_shape(split: str, seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """Picture `index` of the built-in world: (size, size, 3) uint8 and its class, index % 10 of SHAPES.

    A function of (split, seed, index) alone; `split`, "train" or "val", is part of the random key, so the two are
    disjoint. One shape of random colour, size, place and rotation (within 17 degrees) on a gradient, stripes or a woven
    texture, of moderate contrast: easy enough to be learned in minutes.
    """
    rng = np.random.default_rng([list(DRAWN).index(split), seed, index])
    label, kind, direction = index % len(SHAPES), rng.integers(3), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size] / (size - 1) - 0.5
    along = np.cos(direction) * columns + np.sin(direction) * rows
    across = np.cos(direction) * rows - np.sin(direction) * columns
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 2) * axis + rng.uniform())) for axis in (along, across)]
    pattern = (along, 0.3 * np.sin(2 * np.pi * (rng.uniform(2, 3) * along + rng.uniform())), 0.3 * waves[0] * waves[1])[kind]
    base, colour = rng.uniform(80, 175, 3), rng.uniform(30, 225, 3)
    while np.abs(colour - base).sum() < 160:  # a shape that can be seen
        colour = rng.uniform(30, 225, 3)
    background = base + pattern[..., None] * rng.uniform(-40, 40, 3)

    radius, angle = rng.uniform(0.38, 0.44), rng.uniform(-0.3, 0.3)
    centre = rng.uniform(radius * 0.95, 1 - radius * 0.95, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (4 * size, 4 * size))  # four times too large, then averaged: smooth edges

    def fill(corners, ink):
        places = (corners @ rotation.T * radius + centre) * (4 * size)
        ImageDraw.Draw(mask).polygon([tuple(place) for place in places], fill=ink)

    fill(_OUTLINES[SHAPES[label]], 255)
    if SHAPES[label] == "ring":
        fill(_OUTLINES["circle"] * 0.5, 0)
    if SHAPES[label] == "crescent":
        fill(_OUTLINES["circle"] * 0.8 - (0, 0.42), 0)  # on its back: flipped, it is still one of its kind
    cover = np.asarray(mask.reduce(4), np.float64)[..., None] / 255
    return (background * (1 - cover) + colour * cover).clip(0, 255).round().astype(np.uint8), label


class DrawnShapes:
    """The built-in pictures of one split, "train" or "val": `read(index)` -> ((3, size, size) uint8, label)."""

    classes = list(SHAPES)

    def __init__(self, split: str, seed: int, size: int):
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return DRAWN[self.split]

    def fingerprint(self) -> str:
        """What a cache remembers its pictures by."""
        return f"{len(self)} drawn for {self.split}, seed {self.seed}, side {self.size}"

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """See the class."""
        picture, label = draw_shape(self.split, self.seed, index, self.size)
        return torch.from_numpy(picture).permute(2, 0, 1), label


class PictureFolder:
    """FOLDER/CLASS/**/picture: `read(index)` -> ((3, size, size) uint8, label); UserError for a picture that is damaged.

    Classes are the subfolders in alphabetical order. Every 50th picture of a class (at most 1000 in all) is held out
    as "val". Raises UserError for a folder that is missing, empty or without class subfolders.
    """

    def __init__(self, folder: str, split: str, size: int):
        layout = "laid out as FOLDER/CLASS/picture.jpg, one subfolder for each class"
        if not os.path.isdir(folder):
            raise UserError(f"--data {folder} is no folder: give one {layout}")
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            inside = "pictures but no class subfolders" if any(map(_is_picture, os.listdir(folder))) else "no pictures"
            raise UserError(f"--data {folder} holds {inside}: it must be {layout}")
        self.folder, self.size, self.paths, self.labels = folder, size, [], []
        room = max(1, 1000 // len(self.classes))
        for label, name in enumerate(self.classes):
            walk = os.walk(os.path.join(folder, name))
            found = sorted(os.path.join(root, file) for root, _, files in walk for file in filter(_is_picture, files))
            held_out = set(found[::50][:room]) if len(found) > 1 else set()
            chosen = [path for path in found if (path in held_out) == (split == "val")]
            self.paths += chosen
            self.labels += [label] * len(chosen)
        if not self.paths:
            raise UserError(f"--data {folder} has no {split} pictures in its {len(self.classes)} subfolders: it must be {layout}")

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """See DrawnShapes: of every file its path below the folder, its size and the time of its last change."""
        found = hashlib.sha256()
        for path, label in zip(self.paths, self.labels):
            about = os.stat(path) if os.path.exists(path) else None  # a link to nowhere is skipped when it is read
            stamp = about and (about.st_size, about.st_mtime_ns)
            found.update(f"{os.path.relpath(path, self.folder)} {label} {stamp}\n".encode())
        return f"{len(self)} files, side {self.size}, {found.hexdigest()[:16]}"

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """See the class."""
        return read_picture(self.paths[index], self.size), self.labels[index]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


class InMemory:
    """Pictures read once: pictures (N, 3, size, size) uint8, labels (N,), classes by name."""

    def __init__(self, pictures: torch.Tensor, labels: list[int], classes: list[str]):
        self.pictures, self.labels, self.classes = pictures, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """See DrawnShapes: of the pixels and labels themselves."""
        found = hashlib.sha256(self.pictures.numpy())
        found.update(str(self.labels).encode())
        return f"{len(self)} pictures, {found.hexdigest()[:16]}"

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """See DrawnShapes."""
        return self.pictures[index], self.labels[index]


class Flipped(Dataset):
    """What the loader sees of a source: item (index, flip) -> ((3, size, size) uint8, label).

    A picture that cannot be read is named and replaced by the next; 50 in a row are a UserError.
    """

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = item
        for attempt in range(50):
            try:
                picture, label = self.source.read((index + attempt) % len(self.source))
                return picture.flip(-1) if flip else picture, label
            except UserError as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        raise UserError("50 pictures in a row could not be read: check the folder given as --data")


class _OrText(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return self.source.read(index)
        except UserError as error:
            return str(error), -1

    @staticmethod
    def together(items):  # one tensor: each by itself would take a loader process as long to hand over as to draw
        good, texts = [item for item in items if item[1] >= 0], [text for text, label in items if label < 0]
        pictures = [torch.stack([picture for picture, _ in good])] if good else []
        return pictures, [label for _, label in good], texts


MEMORY = 512 * 2**20  # a set of pictures up to this size is read once and kept


def open_pictures(folder: str | None, split: str, seed: int, size: int, workers: int):
    """The built-in pictures or a folder's, as a source with `classes`, `len` and `read`; kept in memory when small.

    When they are read once, damaged ones are dropped, counted and a few named; when all are, that is a UserError.
    """
    source = PictureFolder(folder, split, size) if folder else DrawnShapes(split, seed, size)
    if len(source) * 3 * size**2 > MEMORY:
        return source
    loader = DataLoader(_OrText(source), batch_size=64, num_workers=workers, collate_fn=_OrText.together)
    progress = tqdm(loader, desc=f"{'reading' if folder else 'drawing'} {split} pictures", unit="x64", leave=False)
    pictures, labels, bad = (sum(parts, []) for parts in zip(*progress))
    if bad:
        named = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        if not pictures:
            raise UserError(f"none of the {len(bad)} {split} pictures in {folder} can be read: {named}")
        print(f"skipped {len(bad)} of {len(source)} {split} pictures: {named}", file=sys.stderr)
    return InMemory(torch.cat(pictures), labels, source.classes)


class Schedule:
    """Which pictures each step sees, a function of (seed, step) alone: batches of (index, flip) from `first` on.

    Every epoch is a new permutation, and every picture of it comes once; batches run across the end of an epoch. Each
    rank gets its own slice of the global batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, first: int, last: int):
        self.count, self.batch_size, self.seed, self.first, self.last = count, batch_size, seed, first, last
        self.rank, self.ranks = ranks()

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        epoch = -1
        for step in range(self.first, self.last):
            batch = []
            for number in range(step * self.batch_size, (step + 1) * self.batch_size):
                if number // self.count != epoch:
                    epoch = number // self.count
                    rng = np.random.default_rng([self.seed, epoch])
                    order, flips = rng.permutation(self.count), rng.integers(0, 2, self.count)
                batch.append((int(order[number % self.count]), bool(flips[number % self.count])))
            share = self.batch_size // self.ranks
            yield batch[self.rank * share : (self.rank + 1) * share]


# ---------------------------------------------------------------------------------------------- several processes at once


def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are): (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Every process arrives here before any goes on."""
    if ranks()[1] > 1:
        dist.barrier()


PATIENCE = datetime.timedelta(hours=2)  # how long ranks wait for one that writes a large state or validates


class Draws:
    """A step's random numbers, a function of (seed, stage, step) alone. They are drawn for the global batch and cut to
    the rows of part number `part` of `parts` equal ones, so that the number of processes, and of passes in which each
    goes through its share, changes nothing; and resuming has no state to restore."""

    def __init__(self, seed: int, stage: str, step: int, device: torch.device, part: int = 0, parts: int = 1):
        key = int.from_bytes(hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()[:7], "big")
        self.generator, self.device = torch.Generator(device).manual_seed(key), device
        self.part, self.parts = part, parts

    def _rows(self, draw, shape: tuple[int, ...]) -> torch.Tensor:
        rows = draw(shape[0] * self.parts, *shape[1:], generator=self.generator, device=self.device)
        return rows[self.part * shape[0] :][: shape[0]]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, first dimension the part's batch."""
        return self._rows(torch.randn, shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), first dimension the part's batch."""
        return self._rows(torch.rand, shape)


# ------------------------------------------------------------------------------------- networks that only training needs


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block, the stride in its 3x3 (torchvision's form): (B, channels_in, H, W) -> (B, 4 width, ...)."""

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels_in != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(hidden)))))
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-50 (He et al. 2016) under torchvision's names: pictures (B, 3, H, W) in [-1, 1] -> logits (B, classes).

    size: the side that pictures are resized to (224 for ImageNet's weights).
    """

    def __init__(self, width: int = 64, layers: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000, size: int = 224):
        super().__init__()
        self.size = size
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        channels = width
        for i, blocks in enumerate(layers):
            inner, stage = width * 2**i, []
            for j in range(blocks):
                stage.append(Bottleneck(channels, inner, stride=2 if i and not j else 1))
                channels = 4 * inner
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, classes)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if pictures.shape[-1] != self.size:
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        x = (pictures * 0.5 + 0.5 - self.mean) / self.std
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Discriminator(nn.Module):
    """MaskBiT's "VQGAN+" discriminator (Weber et al. 2024): pictures (B, 3, H, W) -> logits (B, 1, map, map)."""

    def __init__(self, base: int = 128, stages: int = 4, map_size: int = 16):
        super().__init__()
        self.conv_in = nn.Conv2d(3, base, 5, padding=2)
        widths = [base] + [base * 2**i for i in range(stages)]  # doubling from the second stage on
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, width // 4), width) for width in widths[1:])
        self.mix, self.conv_out = nn.Conv2d(widths[-1], widths[-1], 1), nn.Conv2d(widths[-1], 1, 5, padding=2)
        self.map_size = map_size
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", blur[:, None] * blur, persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = F.leaky_relu(self.conv_in(pictures), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            x = F.conv2d(x, self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])
            x = F.leaky_relu(norm(x), 0.1)
        x = F.adaptive_max_pool2d(x, self.map_size)
        return self.conv_out(F.leaky_relu(self.mix(x), 0.1))


def load_resnet(path: str) -> ResNet:
    """ResNet-50 from torchvision's `resnet50-0676ba61.pth` or a safetensors file of the same keys, frozen; its sizes are
    read off the shapes. Raises fid.UserError for another file."""
    tensors, metadata = fid.read_tensors(path)
    layers = tuple(len({k.split(".")[1] for k in tensors if k.startswith(f"layer{i}.")}) for i in range(1, 5))
    width, classes = (len(tensors.get(name, ())) for name in ("conv1.weight", "fc.weight"))
    resnet = ResNet(width or 64, layers, classes or 1000, int(metadata.get("input_size", 224)))
    def read(state):  # files differ in whether they keep num_batches_tracked, which nothing reads
        return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}

    tensors, expected = read(tensors), read(resnet.state_dict())
    fid.check_keys(tensors, {name: tensor.shape for name, tensor in expected.items()}, path, "torchvision's ResNet-50")
    resnet.load_state_dict(tensors, strict=False)
    return resnet.requires_grad_(False).eval()


def lecam(real: torch.Tensor, fake: torch.Tensor, real_mean: torch.Tensor, fake_mean: torch.Tensor) -> torch.Tensor:
    """LeCAM's regulariser (Tseng et al. 2021): each side's logits held near the other side's running mean."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


# ------------------------------------------------------------------------------- a run: its settings, files and networks


@dataclass
class Job:
    """One invocation: settings, where it writes, what it reads."""

    args: argparse.Namespace
    device: torch.device
    train: object  # picture sources
    val: object

    def network(self, name: str) -> nn.Module:
        """A frozen network, "vae", "siglip", "lpips" or "resnet", from its file."""
        files = self.weights
        if name == "vae":
            network = load_vae(files["vae"], device=self.device)
        elif name == "siglip":
            network = load_siglip(files["siglip"], device=self.device)
        elif name == "lpips":
            network = fid.load_lpips(files["vgg"], files["lpips"])
        else:
            network = load_resnet(files["resnet"])
        return network.requires_grad_(False).to(self.device)

    def tokenizer(self, stage: str) -> tuple[SemTok, dict[str, str]]:
        """The tokenizer that an earlier stage has made, and its file's metadata."""
        return load_semtok(need(self.path(RESULTS[stage]), stage, self), self.device)

    def new_tokenizer(self, siglip: SigLIP) -> SemTok:
        """A tokenizer to be trained from its start: its VAE and, with --sd35, its decoder are pretrained, the rest is new."""
        vae = self.network("vae")
        config = replace(tokenizer_config(self.args), semantic_width=siglip.config.width, vae=vae.config)
        decoder = None
        if "sd35" in self.weights:
            with torch.device("meta"):
                decoder = Decoder(config)
            load_sd35(decoder, self.weights["sd35"], self.device)  # straight there: in float32 it is 9 GB
        return SemTok(config, vae, decoder).to(self.device)

    @property
    def weights(self) -> dict[str, str]:
        """Where the frozen networks are: vae, siglip, vgg, lpips, resnet and sd35, as far as given or stood in for."""
        given = {name: getattr(self.args, name) for name in WEIGHTS if getattr(self.args, name)}
        if "sd35" in given:
            given.setdefault("vae", given["sd35"])
        return {name: self.path(file) for name, file in STAND_INS.items() if self.args.preset == "tiny"} | given

    def recipe(self, stage: str) -> Recipe:
        """The preset's recipe for a stage, changed by --steps, --batch-size, --lr, --log-every and --save-every."""
        recipe, args = RECIPES[self.args.preset][stage], self.args
        if args.steps:  # a shorter run keeps its proportions
            share = args.steps / recipe.steps
            warmup, gan_start = math.ceil(recipe.warmup * share), round(recipe.gan_start * share)
            recipe = replace(recipe, steps=args.steps, warmup=warmup, gan_start=gan_start)
        changes = {name: getattr(args, name) for name in ("batch_size", "lr", "log_every", "save_every")}
        return replace(recipe, **{name: value for name, value in changes.items() if value})

    @property
    def workers(self) -> int:
        """Loader processes: none when the pictures are in memory."""
        return 0 if isinstance(self.train, InMemory) else self.args.workers

    def path(self, name: str) -> str:
        """A file in the run's folder."""
        return os.path.join(self.args.out, name)

    def held_out(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same held-out pictures every time, spread over the classes: (N, 3, H, W) uint8 and labels (N,)."""
        picks = np.linspace(0, len(self.val) - 1, min(count, len(self.val))).round().astype(int)
        pictures, labels = zip(*(self.val.read(int(i)) for i in picks))
        return torch.stack(pictures).to(self.device), torch.tensor(labels, device=self.device)


def tokenizer_config(args: argparse.Namespace) -> SemTokConfig:
    """The sizes of a new tokenizer: the preset's, changed by --bits, --quantizer and --order."""
    config = PRESETS[args.preset]
    return replace(
        config, bits=args.bits or config.bits, quantizer=args.quantizer or config.quantizer, causal=args.order == "raster"
    )


def ar_size(args: argparse.Namespace) -> str:
    """The transformer's size, by name: the tiny preset has one, the paper three."""
    return "tiny" if args.preset == "tiny" else args.ar_size or "L"


def ar_config(args: argparse.Namespace, tokens: SemTokConfig, classes: int = 1000) -> ARConfig:
    """The sizes of a transformer on a tokenizer's tokens, changed by --ar-size, --bit-groups and --order, which is by
    default the tokenizer's own. Raises UserError for groups that its bits cannot form."""
    bits, groups = tokens.bits, args.bit_groups or tokens.bits
    if bits % groups or bits // groups > LARGEST_GROUP:
        fits = [str(n) for n in range(1, bits + 1) if bits % n == 0 and bits // n <= LARGEST_GROUP]
        raise UserError(
            f"--bit-groups {groups} does not cut the tokenizer's {bits} bits into equal groups of at most {LARGEST_GROUP}, "
            f"which a softmax can still hold: choose {', '.join(fits)}"
        )
    return replace(
        AR_PRESETS[ar_size(args)], tokens=tokens.tokens, bits=bits, classes=classes, group_bits=bits // groups,
        spherical=tokens.quantizer == "bsq", causal=tokens.causal if args.order is None else args.order == "raster",
    )


def asked_for(args: argparse.Namespace) -> list[str]:
    """The stages of --stage, in order; with --from-scratch there is no stage 1."""
    if args.stage != "all":
        return [args.stage]
    return ["2", "ar"] if args.from_scratch else ["1", "2", "ar"]


def belongs(args: argparse.Namespace, name: str, stage: str) -> bool:
    """Whether a flag of BELONGS changes a stage: what makes a tokenizer belongs to stage 1, or to a stage 2 without it."""
    return stage in BELONGS[name] or (stage == "2" and bool(args.from_scratch) and "1" in BELONGS[name])


def settings(args: argparse.Namespace, stage: str) -> str:
    """The flags of BELONGS that were given and change a stage, as JSON: what its checkpoints say of how they were made."""
    given = {name: getattr(args, name) for name in BELONGS if belongs(args, name, stage) and name != "cache"}
    return json.dumps({name: value for name, value in given.items() if value not in (None, False)})


def flags(given: dict) -> list[str]:
    """Settings as they stand on the command line."""
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items()]


def check_settings(path: str, args: argparse.Namespace, stage: str) -> None:
    """Raises UserError when a file of a stage, its result or a state, was made with other flags than this run's."""
    before = TensorFiles(path).metadata.get("settings", "{}")
    if before != settings(args, stage):
        then, now = (" ".join(flags(json.loads(text))) or "no flag of the kind" for text in (before, settings(args, stage)))
        raise UserError(
            f"{path} was made with {then}, and this run has {now}: give the same flags, or another --out, or --overwrite"
        )


def command(args: argparse.Namespace, stage: str) -> str:
    """The command line that runs another stage of the same run."""
    parts = [f"python train.py --stage {stage}"]
    if args.preset != "tiny":
        parts.append(f"--preset {args.preset}")
    if args.data:
        parts.append(f"--data {args.data}")
    if args.out != os.path.join("runs", args.preset):
        parts.append(f"--out {args.out}")
    return " ".join(parts + flags(json.loads(settings(args, stage))))


def need(path: str, stage: str, job: Job) -> str:
    """path, if the earlier stage has made it; else a UserError that says which command does."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: make it first with {command(job.args, stage)}")
    return path


# ---------------------------------------------------------------------------------------------- caches of what is frozen


PART = 1024  # pictures of a cache in one file: what an interruption can cost
EXACT_CACHE = 4 * 2**30  # a cache of frozen features up to this size is float32 and holds SigLIP's too


class Cache(Dataset):
    """What frozen networks make of every training picture and of its mirror image: item (index, flip) -> {name: row}.

    In a folder, in parts of PART pictures. The processes share the parts that are missing, and each writes one at a time,
    so that memory is bounded and an interrupted run goes on where it was; then all are mapped into memory, not read.
    Raises UserError for a cache of other pictures or networks, unless the run may --overwrite it.
    """

    @torch.no_grad()
    def __init__(self, folder: str, job: Job, about: dict[str, str], make):
        """about: what the rows depend on beside the pictures. make: pictures (B, 3, H, W) uint8, labels (B,) -> {name:
        (B, ...)}."""
        self.count, (rank, processes) = len(job.train), ranks()
        about = {"format": "semtok-cache", "pictures": job.train.fingerprint()} | about
        starts = range(0, self.count, PART)
        paths = {start: os.path.join(folder, f"part-{start // PART:05d}.safetensors") for start in starts}
        missing = [start for start in starts if not _is_part(paths[start], about, job.args.overwrite)][rank::processes]
        wait_for_all()  # all have seen what is there before any adds to it

        def batches():
            for start in missing:
                part = range(start, min(start + PART, self.count))
                yield from ([(index, False) for index in part[at : at + 64]] for at in range(0, len(part), 64))

        workers, own = job.workers if missing else 0, torch.Generator()  # not the global one, which initialises networks
        loader = iter(DataLoader(Flipped(job.train), batch_sampler=batches(), num_workers=workers, generator=own))
        for start in tqdm(missing, f"caching {folder}", unit=f"x{PART}", leave=False, disable=rank > 0):
            rows, length = {}, min(PART, self.count - start)
            for _ in range(0, length, 64):
                pictures, labels = next(loader)
                pictures = pictures.to(job.device)
                made = make(torch.cat([pictures, pictures.flip(-1)]), labels.repeat(2))
                for name, values in made.items():  # (2 B, ...) -> (B, 2, ...)
                    rows.setdefault(name, []).append(values.cpu().unflatten(0, (2, -1)).transpose(0, 1))
            write_tensors(paths[start], {name: torch.cat(parts) for name, parts in rows.items()}, about)
        wait_for_all()
        files = [TensorFiles(path) for path in paths.values()]
        self.parts = [{name: file.get(name) for name in file.shapes} for file in files]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, bool]) -> dict[str, torch.Tensor]:
        index, flip = item
        return {name: rows[index % PART, int(flip)] for name, rows in self.parts[index // PART].items()}


def _is_part(path: str, about: dict[str, str], overwrite: bool) -> bool:
    """Whether a file is a whole part of this very cache; UserError when it is of another one that must be kept."""
    try:
        found = TensorFiles(path).metadata
    except UserError:  # not there, or damaged
        return False
    changed = [name for name in about if found.get(name) != about[name]]
    if changed and not overwrite:
        raise UserError(
            f"{os.path.dirname(path)} is stale, its {' and '.join(changed)} being others than now: make it again with "
            "--overwrite, which starts the stage again, or delete the folder"
        )
    return not changed


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """What tells one network's weights from another's."""
    found = hashlib.sha256()
    for tensor in tensors.values():
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:16]


class Featured(Dataset):
    """Pictures with what a cache holds of them: item (index, flip) -> (picture, label, latents[, SigLIP features])."""

    def __init__(self, pictures: Flipped, cache: Cache):
        self.pictures, self.cache = pictures, cache

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, bool]) -> tuple:
        rows = self.cache[item]
        return *self.pictures[item], *(rows[name] for name in ("latents", "x_sig") if name in rows)


def pictures_and_features(job: Job, vae: VAE, siglip: SigLIP) -> Dataset:
    """The training pictures; with --cache each comes with its latents and SigLIP features out of OUT/features.

    SigLIP features of the paper's size would fill 1 TB for ImageNet to save 2% of a step's FLOPs, where latents save 9%: a
    cache above EXACT_CACHE bytes holds latents alone, in float16 (84 GB), which rounds them by up to 2^-11 = 0.05%, and
    on CUDA by nothing, because they come out of a bfloat16 convolution. A smaller one is float32 and holds both.
    """
    pictures = Flipped(job.train)
    if not job.args.cache:
        return pictures
    side = PRESETS[job.args.preset].image_size // vae.config.factor
    numbers = vae.config.latent_channels * side**2 + siglip.config.width * siglip.config.grid**2  # of one picture
    exact = 2 * 4 * numbers * len(job.train) <= EXACT_CACHE
    networks = {"vae": vae, "siglip": siglip} if exact else {"vae": vae}

    def make(batch, labels):
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.type == "cuda"):  # as in a step
            signed = to_signed(batch)
            if not exact:
                return {"latents": vae.encode(signed).half()}
            return {"latents": vae.encode(signed).float(), "x_sig": siglip(signed).float()}

    about = {name: digest(network.state_dict()) for name, network in networks.items()}
    return Featured(pictures, Cache(job.path("features"), job, about, make))


class Tokens(Dataset):
    """Tokenised pictures out of a cache: item (index, flip) -> (bits (K, d) bool, label)."""

    def __init__(self, cache: Cache, shape: tuple[int, int]):
        self.cache, self.shape = cache, shape

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        row = self.cache[item]
        bits = np.unpackbits(row["bits"].numpy(), count=self.shape[0] * self.shape[1])
        return torch.from_numpy(bits.reshape(self.shape)).bool(), int(row["labels"])


def tokenise(tokenizer: SemTok, fingerprint: str, job: Job) -> Tokens:
    """The tokens of every training picture and of its mirror image, their bits packed, in OUT/tokens. See Cache."""
    def make(pictures, labels):
        bits = codes_to_bits(tokenizer.encode(to_signed(pictures))).flatten(1)
        return {"bits": torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=1)), "labels": labels.int()}

    cache = Cache(job.path("tokens"), job, {"tokenizer": fingerprint}, make)
    return Tokens(cache, (tokenizer.config.tokens, tokenizer.config.bits))


# -------------------------------------------------------------- the paper's stages: what each one feeds, loses and shows


class Tokenizing(nn.Module):
    """What stages I and II share: the tokenizer that they train, and SigLIP, frozen, to which it is aligned. A stage adds its
    `stage`, its `players`, and the methods `inputs`, `forward`, `reconstruct` and `preview`."""

    averaged, stage = ("semtok.",), ""

    def __init__(self, job: Job, semtok: SemTok | None = None):
        """semtok: the one to go on with; by default a new one."""
        super().__init__()
        self.job = job
        # Frozen networks stand in a dict, not among the submodules: never trained, averaged, saved or put in train mode.
        self.frozen = {"siglip": job.network("siglip")}
        self.semtok = semtok or job.new_tokenizer(self.frozen["siglip"])

    def open_dataset(self) -> Dataset:
        """What the loader reads, computed first when it is cached."""
        return pictures_and_features(self.job, self.semtok.vae, self.frozen["siglip"])

    @torch.no_grad()
    def features(self, batch) -> tuple[torch.Tensor, ...]:
        """A batch of the loader, (pictures, labels) or of Featured -> normalised latents (B, channels, h, w), SigLIP
        features (B, C, g, g), pictures (B, 3, H, W) in [-1, 1]; what the cache does not hold is computed."""
        pictures, _, *cached = batch
        pictures, *cached = (part.to(self.job.device, non_blocking=True) for part in (pictures, *cached))
        pictures, cached = to_signed(pictures), [rows.float() for rows in cached]
        latents = cached[0] if cached else self.semtok.vae.encode(pictures)
        return latents, cached[1] if len(cached) > 1 else self.frozen["siglip"](pictures), pictures

    def together(self, parts: list[tuple]) -> list[tuple]:
        """To the arguments of forward for each part of a step is added what the contrast needs: what `semtok.whole_batch`
        makes of the SigLIP features of all parts of all ranks, with the part's first row in it."""
        features = [part[1] for part in parts]
        everyone, first = whole_batch(torch.cat(features))
        return [(*part, (everyone, first + i * len(own))) for i, (part, own) in enumerate(zip(parts, features))]

    def semantic_loss(self, out: dict) -> torch.Tensor:
        """lambda_s L_sem of Eq. 6 and 7 from a step's `contrast` and `distill`. Either can be left out (Table 4): its weight
        is then 0, and its value is still measured. Adds both weights to out, for the log."""
        scale, args = self.job.recipe(self.stage).semantic, self.job.args
        weights = {"contrast": 0.0 if args.no_contrast else scale, "distill": 0.0 if args.no_distill else scale}
        out |= {f"{name}_weight": torch.full_like(out[name].detach(), weight) for name, weight in weights.items()}
        return sum(weight * out[name] for name, weight in weights.items())

    def validate(self) -> dict[str, float]:
        """Fidelity on held-out pictures."""
        pictures, _ = self.job.held_out(200)
        return fidelity(self.reconstruct(pictures), pictures)

    def export(self, figures: dict[str, float]) -> str:
        """Write the tokenizer with everything that sample.py needs to know; returns its path."""
        path, tensors, job = self.job.path(RESULTS[self.stage]), self.semtok.state_dict(), self.job
        metadata = tokenizer_metadata(
            self.semtok, stage=self.stage, preset=job.args.preset, classes=json.dumps(job.train.classes),
            figures=json.dumps(figures), fingerprint=digest(tensors), settings=settings(job.args, self.stage),
        )
        write_tensors(path, tensors, metadata)
        return path


class Pretraining(Tokenizing):
    """Stage I, Eq. 6: flow matching through the tokens, entropy of the codes, alignment with SigLIP."""

    stage, players = "1", ()

    def __init__(self, job: Job):
        super().__init__(job)
        self.semtok.decoder.mask_tokens.requires_grad_(False)  # they join in stage II

    def inputs(self, batch, draws: Draws, step: int) -> tuple:
        """A batch of the loader -> the arguments of forward."""
        latents, x_sig, _ = self.features(batch)
        return latents, x_sig, draws.normal(*latents.shape), draws.uniform(len(latents))  # t is uniform in [0, 1]

    def forward(
        self, latents: torch.Tensor, x_sig: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, batch=None
    ) -> dict[str, torch.Tensor]:
        """Normalised latents (B, channels, h, w), SigLIP features (B, C, g, g), noise like the latents, times t (B,) ->
        losses and codes. For a part of a larger batch, `batch`: see `together`."""
        out = self.semtok(latents, x_sig, noise, t, batch)
        return out | {"loss": out["diff"] + QUANT * out["quant"] + self.semantic_loss(out)}  # Eq. 6

    def reconstruct(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> uint8, through the tokens and the 25-step sampler, with fixed noise."""
        rng = torch.Generator(self.job.device).manual_seed(0)
        def through(part):
            return to_uint8(self.semtok.decode(self.semtok.sample(self.semtok.encode(to_signed(part)), generator=rng)))
        return in_batches(through, pictures)

    def preview(self) -> Image.Image:
        """Held-out pictures over their 25-step samples."""
        pictures, _ = self.job.held_out(10)
        return picture_grid({"original": pictures, "stage 1: 25-step sample": self.reconstruct(pictures)})


class Refining(Tokenizing):
    """Stage II, Eq. 7: one step from mask tokens to the latent, judged in pixels; Eq. 6's other terms stay."""

    stage, players = "2", ("discriminator.",)

    def __init__(self, job: Job):
        super().__init__(job, None if job.args.from_scratch else job.tokenizer("1")[0])
        self.first_samples = None  # stage 1's row of the preview: drawn once, before anything moves
        self.semtok.train().start_refiner()
        self.semtok.vae.requires_grad_(False)
        self.semtok.encoder.requires_grad_(not job.args.freeze_encoder)
        self.semtok.decoder.x_embedder.requires_grad_(False)  # nothing noisy comes in any more
        self.discriminator = Discriminator() if job.args.preset == "paper" else Discriminator(*TINY_DISCRIMINATOR)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        # Only now, when everything that is trained has been initialised alike, whichever terms are asked for.
        self.perceptual = PERCEPTUAL_TERMS[job.args.perceptual or "both"]
        self.frozen |= {name: job.network(name) for name in self.perceptual}
        self.lecam_decay = 0.999 ** (1 / job.args.accumulate)  # of a pass: 0.999 a step
        self.gan_start = job.recipe("2").gan_start

    def inputs(self, batch, draws: Draws, step: int) -> tuple:
        """A batch of the loader -> the arguments of forward."""
        return *self.features(batch), step >= self.gan_start

    def forward(
        self, latents: torch.Tensor, x_sig: torch.Tensor, pictures: torch.Tensor, adversarial: bool, batch=None
    ) -> dict[str, torch.Tensor]:
        """Normalised latents (B, channels, h, w) and SigLIP features (B, C, g, g) of pictures (B, 3, H, W) in [-1, 1], and
        whether the discriminator has joined -> losses and codes. For a part of a larger batch, `batch`: see `together`."""
        out = self.semtok(latents, x_sig, batch=batch)
        output = self.semtok.vae.decode(out.pop("latents")).float()  # (B, 3, H, W)
        out["mse"] = F.mse_loss(output, pictures)
        if "lpips" in self.perceptual:
            out["lpips"] = self.frozen["lpips"](output, pictures).mean()
        if "resnet" in self.perceptual:
            with torch.no_grad():
                wanted = self.frozen["resnet"](pictures)
            out["resnet"] = F.mse_loss(self.frozen["resnet"](output).float(), wanted.float())  # of logits
        loss = out["mse"] + self.job.recipe("2").perceptual * sum(out[name] for name in self.perceptual)
        loss = loss + QUANT * out["quant"] + self.semantic_loss(out)
        if adversarial:
            loss = loss + self.adversarial_losses(pictures, output, out)
        return out | {"loss": loss}

    def adversarial_losses(self, real: torch.Tensor, output: torch.Tensor, out: dict) -> torch.Tensor:
        """Hinge losses of both players in one graph; adds `gan`, `d_loss`, `d_real`, `d_fake` to out, returns their sum.

        The generator is judged by a discriminator whose weights stand still, the discriminator sees detached
        pictures, so one backward pass gives each player its own gradient.
        """
        self.discriminator.requires_grad_(False)
        out["gan"] = -self.discriminator(output).float().mean()
        self.discriminator.requires_grad_(True)
        on_real, on_fake = self.discriminator(real).float(), self.discriminator(output.detach()).float()
        for mean, logits in ((self.real_mean, on_real), (self.fake_mean, on_fake)):
            mean.lerp_(mean_over_ranks(logits.detach().mean()), 1 - self.lecam_decay)
        hinge = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        out["d_loss"] = hinge + LECAM * lecam(on_real, on_fake, self.real_mean, self.fake_mean)
        out["d_real"], out["d_fake"] = on_real.mean().detach(), on_fake.mean().detach()
        return GAN * out["gan"] + out["d_loss"]

    def reconstruct(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> uint8, through the tokens and the refiner's one step."""
        def through(part):
            return to_uint8(self.semtok.decode(self.semtok.refine(self.semtok.encode(to_signed(part)))))
        return in_batches(through, pictures)

    def preview(self) -> Image.Image:
        """Held-out pictures over stage 1's samples (unless this run began without a stage 1) and the refiner's output."""
        pictures, _ = self.job.held_out(10)
        if self.job.args.from_scratch:
            return picture_grid({"original": pictures, "stage 2 from scratch": self.reconstruct(pictures)})
        if self.first_samples is None:
            stage1, _ = load_semtok(self.job.path("stage1.safetensors"), self.job.device)
            rng = torch.Generator(self.job.device).manual_seed(0)
            codes = stage1.encode(to_signed(pictures))
            self.first_samples = to_uint8(stage1.decode(stage1.sample(codes, generator=rng)))
        rows = {"stage 1: 25-step sample": self.first_samples, "stage 2: refiner": self.reconstruct(pictures)}
        return picture_grid({"original": pictures} | rows)


class Generating(nn.Module):
    """The masked AR transformer of section 3.3 on the tokens of stage II, which are computed first; next-token prediction
    when it or its tokenizer is sequential (Table 5)."""

    averaged, players = ("ar.",), ()

    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        tokenizer, metadata = job.tokenizer("2")
        self.frozen, self.fingerprint = {"tokenizer": tokenizer.requires_grad_(False)}, metadata["fingerprint"]
        self.ar = MaskedAR(ar_config(job.args, tokenizer.config, len(job.train.classes)))

    def open_dataset(self) -> Dataset:
        """What the loader reads: tokens, computed first."""
        return tokenise(self.frozen["tokenizer"], self.fingerprint, self.job)

    def inputs(self, batch, draws: Draws, step: int) -> tuple:
        """(bits, labels) of the loader -> the arguments of forward: classes dropped, masks drawn."""
        bits, labels = (part.to(self.job.device, non_blocking=True) for part in batch)
        labels = labels.masked_fill(draws.uniform(len(labels)) < 0.1, self.ar.config.classes)
        return bits, labels, self.masks(bits, draws)

    def masks(self, bits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Which tokens of bits (B, K, d) are to be predicted: (B, K) bool. In next-token prediction, all."""
        if self.ar.config.causal:
            return torch.ones_like(bits[..., 0])
        return draw_masks(*bits.shape[:2], self.job.recipe("ar").least_masked, draws)

    def together(self, parts: list[tuple]) -> list[tuple]:
        """The arguments of forward for each part of a step, with the mean number of masked tokens over all of them."""
        tokens = mean_over_ranks(torch.stack([masked.sum() for *_, masked in parts]).float().mean())
        return [(*part, tokens) for part in parts]

    def forward(
        self, bits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """bits (B, K, d), labels (B,), masked (B, K), tokens () as in `MaskedAR.loss` -> losses."""
        return self.ar.loss(bits, labels, masked, tokens=tokens)

    def preview(self) -> Image.Image:
        """One sample of each class (of the first 20)."""
        tokenizer, config = self.frozen["tokenizer"], self.ar.config
        labels = torch.arange(min(20, config.classes), device=self.job.device)
        rng = torch.Generator(self.job.device).manual_seed(0)
        bits = self.ar.generate(labels, cfg=self.guidance(), generator=rng)
        pictures = to_uint8(tokenizer.decode(tokenizer.refine(bits_to_codes(bits, config.spherical))))
        return picture_grid({"one sample of each class": pictures})

    def guidance(self) -> float:
        """The guidance scale that suits this size, linear schedule."""
        return GUIDANCE[ar_size(self.job.args)]

    def validate(self) -> dict[str, float]:
        """Bits of held-out pictures' masked tokens: nats a bit, share guessed right."""
        pictures, labels = self.job.held_out(500)
        bits = codes_to_bits(in_batches(self.frozen["tokenizer"].encode, to_signed(pictures)))
        losses = self.ar.loss(bits, labels, self.masks(bits, Draws(0, "validation", 0, self.job.device)))
        return {"val_nll_per_bit": losses["nll"].item(), "val_bit_accuracy": losses["accuracy"].item()}

    def export(self, figures: dict[str, float]) -> str:
        """Write `ar.safetensors`; returns its path."""
        path, job = self.job.path("ar.safetensors"), self.job
        metadata = ar_metadata(
            self.ar, classes=json.dumps(job.train.classes), tokenizer=self.fingerprint, preset=job.args.preset,
            guidance=self.guidance(), figures=json.dumps(figures), settings=settings(job.args, "ar"),
        )
        write_tensors(path, self.ar.state_dict(), metadata)
        return path


def draw_masks(batch: int, tokens: int, least: float, draws: Draws) -> torch.Tensor:
    """Random masks (B, K) bool, each of a ratio uniform in [least, 1.0] (section 4.1: least = 0.7), at least one token."""
    ratio = least + (1 - least) * draws.uniform(batch, 1)
    return draws.uniform(batch, tokens).argsort(-1).argsort(-1) < (ratio * tokens).ceil().clamp_min(1)


def fidelity(outputs: torch.Tensor, pictures: torch.Tensor) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of uint8 pictures (N, 3, H, W) against the originals."""
    return {"psnr": fid.psnr(outputs, pictures).mean().item(), "ssim": fid.ssim(outputs, pictures).mean().item()}


def in_batches(function, tensor: torch.Tensor, size: int = 64) -> torch.Tensor:
    """function applied to slices of a long tensor, joined again."""
    return torch.cat([function(part) for part in tensor.split(size)])


# ---------------------------------------------------------------------------------------------------- stage 0: stand-ins


class StandIns(nn.Module):
    """Stage 0: toy-sized twins of the networks that cannot be had offline, trained side by side on the pictures.

    A VAE (reconstruction + KL), a SigLIP tower (sigmoid loss against class-name embeddings), a VGG16 and a ResNet
    (classification). They are saved under the real files' key names and read back by the real loaders. At the end come a
    toy of FID's Inception and the held-out pictures as files, so that `fid.py --toy` can score the run offline.
    """

    averaged, players = (), ("vae.", "siglip", "vgg", "resnet.")

    def __init__(self, job: Job):
        super().__init__()
        config, classes = PRESETS["tiny"], len(job.train.classes)
        self.job = job
        self.vae, self.siglip = VAE(config.vae), SigLIP(TINY_SIGLIP)
        self.class_names = nn.Embedding(classes, config.semantic_width)
        self.siglip_scale, self.siglip_bias = nn.Parameter(torch.tensor([10.0]).log()), nn.Parameter(torch.tensor([-2.0]))
        self.vgg, self.vgg_head = fid.VGG16Features(TINY_VGG), nn.Linear(TINY_VGG[-1], classes)
        self.resnet = ResNet(*TINY_RESNET, classes, config.image_size)
        nn.init.constant_(self.vae.encoder.conv_out.bias[config.vae.latent_channels :], -6)  # start with little noise
        nn.init.normal_(self.siglip.embeddings.position_embedding.weight, std=0.02)  # PyTorch's 1.0 would drown the patches
        for layer in self.vgg.features:
            if isinstance(layer, nn.Conv2d):  # no batch norm: thirteen layers deep, it starts only with He's gain
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def open_dataset(self) -> Dataset:
        """What the loader reads."""
        return Flipped(self.job.train)

    def inputs(self, batch, draws: Draws, step: int) -> tuple:
        """(pictures, labels) of the loader -> the arguments of forward."""
        pictures, device, config = to_signed(batch[0].to(self.job.device)), self.job.device, self.vae.config
        # The VAE is convolutional: it learns from windows of every third picture of the global batch at a tenth of the
        # cost, then from the whole ones.
        third = slice(-draws.part * len(pictures) % 3, None, 3)
        share = math.ceil(len(pictures) * draws.parts / 3) / draws.parts
        windows = pictures[third]
        if step < 0.8 * self.job.recipe("0").steps:
            side = pictures.shape[-1] // 2
            top, left = np.random.default_rng(step).integers(0, side + 1, 2)
            windows = windows[..., top : top + side, left : left + side]
        shape = (len(pictures), config.latent_channels, *(side // config.factor for side in windows.shape[2:]))
        # Batch norm makes one thing of a batch: all ranks put the same half of the pictures of all through the ResNet.
        classified, classes = (gather(tensor)[: max(8, len(tensor) * ranks()[1] // 2)] for tensor in batch)
        return (
            pictures, batch[1].to(device), windows, draws.normal(*shape)[third], share, to_signed(classified.to(device)),
            classes.to(device),
        )

    def together(self, parts: list[tuple]) -> list[tuple]:
        """The arguments of forward for each part of a step: none has to know of the others."""
        return parts

    def forward(
        self, pictures: torch.Tensor, labels: torch.Tensor, windows: torch.Tensor, noise: torch.Tensor, share: float,
        classified: torch.Tensor, classes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """pictures (B, 3, H, W) in [-1, 1], labels (B,), windows (about B / 3, 3, h, w) for the VAE, noise like their
        latents, share: windows of the global batch over its number of parts; classified (half of all ranks' B, 3, H, W)
        and classes for the ResNet -> losses."""
        mean, log_variance = self.vae.encoder(windows.contiguous(memory_format=torch.channels_last)).chunk(2, 1)
        log_variance = log_variance.clamp(-12, 4)
        reconstruction = self.vae.decoder(mean + (0.5 * log_variance).exp() * noise)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean((1, 2, 3)).sum() / share
        image = F.normalize(self.siglip(pictures).mean((2, 3)), dim=-1)
        pairs = self.siglip_scale.exp() * image @ F.normalize(self.class_names.weight, dim=-1).T + self.siglip_bias
        matches = F.one_hot(labels, pairs.shape[1]) * 2.0 - 1  # SigLIP: every (picture, text) pair is a yes or a no
        vgg = self.vgg_head(self.vgg(pictures)[-1].mean((2, 3)))
        losses = {
            "vae_mse": (reconstruction - windows).square().mean((1, 2, 3)).sum() / share,
            "vae_kl": kl,
            "siglip": -F.logsigmoid(matches * pairs).sum(1).mean(),
            "vgg": F.cross_entropy(vgg, labels, label_smoothing=0.1),
            # smoothing keeps the logits small: the perceptual loss of stage 2 is the distance between two of them
            "resnet": F.cross_entropy(self.resnet(classified), classes, label_smoothing=0.1),
        }
        weights = {"vae_mse": 1.0, "vae_kl": 1e-4}
        return losses | {"loss": sum(weights.get(name, 1.0) * value for name, value in losses.items())}

    def preview(self) -> Image.Image:
        """Held-out pictures and what the VAE makes of them."""
        pictures, _ = self.job.held_out(10)
        return picture_grid({"original": pictures, "VAE": to_uint8(self.vae.decode(self.vae.encode(to_signed(pictures))))})

    def validate(self) -> dict[str, float]:
        """VAE fidelity and ResNet accuracy on held-out pictures."""
        pictures, labels = self.job.held_out(200)
        signed = to_signed(pictures)
        figures = fidelity(to_uint8(self.vae.decode(self.vae.encode(signed))), pictures)
        guesses = {"resnet": self.resnet(signed), "vgg": self.vgg_head(self.vgg(signed)[-1].mean((2, 3)))}
        return figures | {f"{name}_accuracy": (g.argmax(1) == labels).float().mean().item() for name, g in guesses.items()}

    @staticmethod
    def scale_(layer: nn.Module, factor: float | torch.Tensor) -> None:
        """Multiply a last layer's weight and bias."""
        layer.weight *= factor
        layer.bias *= factor

    def export(self, figures: dict[str, float]) -> str:
        """Write the networks as the real files look, and the held-out pictures; returns the folder."""
        pictures, _ = self.job.held_out(200)
        with torch.no_grad():  # SD3.5's published shift and scale must whiten these latents too: fold the scale in
            std = self.vae.encoder(to_signed(pictures)).chunk(2, 1)[0].std((0, 2, 3)) * VAE.SCALE  # (channels,)
            for tensor in (self.vae.encoder.conv_out.weight, self.vae.encoder.conv_out.bias):
                tensor[: len(std)] /= std.view(-1, *[1] * (tensor.ndim - 1))
            self.vae.decoder.conv_in.weight *= std.view(1, -1, 1, 1)
            # ... and hold logits and features to the size at which lambda_p and lambda_s leave room for the pixels
            self.scale_(self.resnet.fc, 0.5 / self.resnet(to_signed(pictures)).std())
            self.scale_(self.siglip.post_layernorm, 0.25)
        folder = self.job.path("standins")
        os.makedirs(os.path.join(folder, "siglip"), exist_ok=True)
        toy = {"toy": "trained by train.py --stage 0"}
        heads = {f"lin{i}.model.1.weight": torch.full((1, w, 1, 1), 1.0 / w**0.5) for i, w in enumerate(TINY_VGG)}
        write_text(os.path.join(folder, "siglip", "config.json"), json.dumps({"num_attention_heads": 2}))
        write_tensors(os.path.join(folder, "siglip", "model.safetensors"), self.siglip.state_dict(prefix="vision_model."), toy)
        write_tensors(os.path.join(folder, "vgg16.safetensors"), self.vgg.state_dict(), toy)
        write_tensors(os.path.join(folder, "lpips.safetensors"), heads, toy)
        resnet = toy | {"input_size": str(self.resnet.size)}
        write_tensors(os.path.join(folder, "resnet50.safetensors"), self.resnet.state_dict(), resnet)
        inception = train_inception(self.job)
        size = {"input_size": str(inception.input_size)}
        write_tensors(os.path.join(folder, "inception.safetensors"), inception.state_dict(), toy | size)
        write_reference(os.path.join(folder, "reference"), self.job.val)
        write_tensors(os.path.join(folder, "vae.safetensors"), self.vae.state_dict(), toy)  # last: it says that all is there
        return folder


@torch.enable_grad()
def train_inception(job: Job) -> fid.Inception:
    """A toy of FID's Inception that tells the run's classes apart, after 30 steps with 24 pictures, in a few seconds.

    On its own after the other stand-ins, since nothing but `fid.py --toy` reads it. Steps are as few as stage 0's."""
    seed, steps, dataset = job.args.seed, min(30, job.recipe("0").steps), Flipped(job.train)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = fid.Inception(1 / 8, len(job.train.classes), input_size=75).to(job.device).train()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)  # ReLUs mostly open: with zeros, thirty steps teach this depth next to nothing
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for step in tqdm(range(steps), "toy Inception", unit="step", leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pictures, labels = zip(*(dataset[int(index), False] for index in rng.integers(0, len(dataset), 24)))
        x = fid.prepare(torch.stack(pictures).permute(0, 2, 3, 1), network.input_size, device=job.device)
        loss = F.cross_entropy(network.logits(x), torch.tensor(labels, device=job.device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def write_reference(folder: str, source) -> None:
    """A source's pictures as FOLDER/CLASS/NUMBER.png, as the networks see them: what `sample.py --reconstruct` and `fid.py`
    compare with. What was in the folder goes. Raises UserError when the disk refuses."""
    try:
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        for name in source.classes:
            os.makedirs(os.path.join(folder, name))
        for index in range(len(source)):
            picture, label = source.read(index)
            path = os.path.join(folder, source.classes[label], f"{index:05d}.png")
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): free some space or choose another --out") from None


# ------------------------------------------------------------------------------------------------------------- the loop


def write_text(path: str, text: str) -> None:
    """A text file, whole or not at all."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    write_file(path, write)


CPU_ATTENTION = {  # FlopCounterMode knows the attention of GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
}
BAD_STEPS = 5  # steps in a row with a loss or gradient that is not finite, after which a run stops


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks in a network: what is sharded, and compiled, one by one."""
    return [block for part in network.modules() for block in getattr(part, "joint_blocks", getattr(part, "blocks", ()))]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has cut up, in one piece, for which all ranks must ask; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, for work that needs no other rank."""
    return tensor.detach().to_local() if hasattr(tensor, "full_tensor") else tensor.detach()


def cut_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The opposite of `whole`: value, which every rank has, on the device of tensor and cut as tensor is."""
    value = value.to(tensor.device, copy=True)
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def averaged_twin(stage: nn.Module, sharded: bool) -> nn.Module:
    """A second stage for previews, validation and export, always in eval mode: its averaged parameters (`stage.averaged`)
    are copies, and all else is the stage's own. With `sharded` all that is trained is on the meta device instead."""
    kept = [value for name, value in vars(stage).items() if not name.startswith("_")]  # what is no module, such as the job
    tensors = {id(thing): thing for thing in (*kept, *stage.parameters(), *stage.buffers())}
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad and (sharded or name.startswith(stage.averaged)):
            copied = parameter.detach().to("meta") if sharded else parameter.detach().clone()
            tensors[id(parameter)] = nn.Parameter(copied, requires_grad=False)
    return copy.deepcopy(stage, tensors).eval()


def shard(stage: nn.Module, device: torch.device) -> None:
    """FSDP2 (Zhao et al. 2023) in place: every rank keeps its rows of what is trained, block by block and then the rest,
    and gathers a block when it runs. Weights and moments stay float32; on CUDA what is gathered is bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if device.type == "cuda" else None
    # The inputs are not cast: times and rotations would lose what they need, and autocast casts the rest.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device.type, (ranks()[1],)), "mp_policy": policy}
    for block in blocks_of(stage):
        fully_shard(block, **options)
    fully_shard(stage, ignored_params={p for p in stage.parameters() if not p.requires_grad}, **options)


def compile_blocks(stage: nn.Module) -> None:
    """torch.compile in place, under the old names: every transformer block and every frozen network of a training step."""
    frozen = [network for name, network in getattr(stage, "frozen", {}).items() if name != "tokenizer"]
    vae = [stage.semtok.vae.encoder, stage.semtok.vae.decoder] if hasattr(stage, "semtok") else []
    for network in (*blocks_of(stage), *frozen, *vae):
        network.compile(dynamic=False)


class Trainer:
    """What one stage's training consists of besides its module: optimiser, averaged weights, step, state on disk."""

    def __init__(self, stage: nn.Module, recipe: Recipe, name: str, job: Job):
        self.stage, self.recipe, self.name, self.job, self.step = stage, recipe, name, job, 0
        self.sharded, self.passes, self.wrapped, self.flops = job.args.fsdp, job.args.accumulate, None, 0
        for module in stage.modules():
            if hasattr(module, "checkpoint_activations"):
                module.checkpoint_activations = job.args.checkpoint_activations
        self.twin = averaged_twin(stage, self.sharded)
        if job.args.compile:
            compile_blocks(stage)
        if self.sharded:
            shard(stage, job.device)
        self.parameters = {n: p for n, p in stage.named_parameters() if p.requires_grad}
        copies = self.parameters if self.sharded else dict(self.twin.named_parameters())
        averaged = [n for n in self.parameters if n.startswith(stage.averaged)]
        self.ema = {n: copies[n].detach().clone() if self.sharded else copies[n].detach() for n in averaged}
        persistent = stage.state_dict().keys()
        self.buffers = {n: b for n, b in stage.named_buffers() if n in persistent}
        # Players are clipped apart: one's large gradients must not shrink another's.
        owner = {n: next((p for p in stage.players if n.startswith(p)), "") for n in self.parameters}
        self.players = {
            player: [self.parameters[n] for n in owner if owner[n] == player] for player in dict.fromkeys(owner.values())
        }
        groups = []
        for lr, adversary in ((recipe.lr, False), (recipe.discriminator_lr, True)):
            for decay in (recipe.weight_decay, 0.0):  # matrices decay; biases, norms and single embeddings do not
                members = [
                    p for n, p in self.parameters.items()
                    if (p.ndim > 1) == (decay > 0) and (owner[n] == "discriminator.") == adversary
                ]
                groups.append({"params": members, "base_lr": lr, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], recipe.lr, betas=(0.9, 0.95), fused=True)
        # Counted where the gradients are: asking for them each step would make the host wait for the GPU.
        self.skipped, self.bad_in_a_row = (torch.zeros((), dtype=torch.long, device=job.device) for _ in range(2))

    def autocast(self):
        """bfloat16 for what bears it, on CUDA."""
        return torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.device.type == "cuda")

    def wrap(self) -> nn.Module:
        """The stage as the ranks share its step: under DDP, which averages their gradients, or as it is, when it is alone
        or FSDP does that. Stage 2's discriminator is unknown to DDP, which waits for every gradient, until it joins."""
        if ranks()[1] == 1 or self.sharded:
            return self.stage
        waiting = self.players.get("discriminator.", []) if self.step < getattr(self.stage, "gan_start", 0) else []
        for parameter in waiting:
            parameter.requires_grad_(False)
        wrapped = DistributedDataParallel(self.stage, gradient_as_bucket_view=True)
        for parameter in waiting:
            parameter.requires_grad_(True)
        return wrapped

    def count(self, piece, draws: Draws, arguments: tuple) -> int:
        """FLOPs of one pass, from a piece of the loader's batch there and back, by running it once for nothing. What
        `--checkpoint-activations` computes twice is counted once, as model FLOPs are (PaLM, Chowdhery et al. 2022)."""
        before, recomputed = [b.clone() for b in self.buffers.values()], 0
        # compiled networks would hide their operations; naming the compiler costs seconds of imports
        eager = torch.compiler.set_stance("force_eager") if self.job.args.compile else contextlib.nullcontext()
        with eager, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            with self.autocast():
                self.stage.inputs(piece, draws, self.step)  # the frozen networks, as far as they are not cached
                loss = self.stage(*arguments)["loss"]
            if self.job.args.checkpoint_activations:
                runs = counter.get_flop_counts().items()
                recomputed = sum(sum(run.values()) for name, run in runs if re.search(r"blocks\.\d+$", name))
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(self.buffers.values(), before):
            buffer.copy_(old)
        return counter.get_total_flops() - recomputed

    def clip(self) -> dict[str, torch.Tensor]:
        """Scale each player's gradients down to norm 1; returns the norms as they were."""
        norms = {}
        for player, parameters in self.players.items():
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
                nn.utils.clip_grads_with_norm_(parameters, 1.0, norm, foreach=True)
                norms["_".join(["grad_norm", player.strip(".")]).strip("_")] = norm
        return norms

    def train_step(self, batch) -> dict:
        """One optimiser step and the averaging; returns what the stage returned, averaged over its parts and the ranks, and
        the gradient norms. A step whose loss or gradients are not finite changes no weight, moment or buffer."""
        recipe, passes, (rank, count) = self.recipe, self.passes, ranks()
        warm = min(1.0, (self.step + 1) / recipe.warmup)
        factor = warm * 0.5 * (1 + math.cos(math.pi * self.step / recipe.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        pieces = list(zip(*(tensor.chunk(passes) for tensor in batch)))

        def draws(part: int) -> Draws:
            return Draws(self.job.args.seed, self.name, self.step, self.job.device, rank * passes + part, count * passes)

        with self.autocast():
            parts = [self.stage.inputs(piece, draws(i), self.step) for i, piece in enumerate(pieces)]
        if self.wrapped is None or self.step == getattr(self.stage, "gan_start", None):
            self.wrapped = None  # the old one's hooks go with it
            self.flops = self.count(pieces[0], draws(0), parts[0]) * passes
            self.wrapped = self.wrap()
        if passes > 1:
            with self.autocast():
                parts = self.stage.together(parts)
        before = [b.clone() for b in self.buffers.values()]
        outs = [self.forward_backward(arguments, last=i == passes - 1) for i, arguments in enumerate(parts)]
        losses = {name: torch.stack([out[name].float() for out in outs]).mean(0) for name in outs[0] if name != "codes"}
        losses |= self.clip()
        values = mean_over_ranks(torch.stack(list(losses.values())))  # so that all ranks see what broke on one
        losses = dict(zip(losses, values.unbind()))
        decisive = torch.stack([value for name, value in losses.items() if name == "loss" or name.startswith("grad_norm")])
        bad = ~decisive.isfinite().all()
        self.optimizer.found_inf = bad.to(torch.float32)  # the fused optimiser's way to skip without asking the device
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(self.buffers.values(), before):
            buffer.copy_(torch.where(bad, old, buffer))
        self.skipped += bad
        self.bad_in_a_row.add_(1).mul_(bad)
        if self.ema:
            decay = min(recipe.ema, (1 + self.step) / (10 + self.step))  # warmed up, or a short run keeps its initial weights
            live = [own_rows(self.parameters[n]) for n in self.ema]
            torch._foreach_lerp_([own_rows(average) for average in self.ema.values()], live, 1 - decay)
        self.step += 1
        if "codes" in outs[0]:
            losses["codes"] = torch.cat([out["codes"] for out in outs])
        return losses | {"lr": self.optimizer.param_groups[0]["lr"], "skipped": self.skipped}

    def forward_backward(self, arguments: tuple, last: bool) -> dict[str, torch.Tensor]:
        """One pass; gradients add up on each rank, and with the last pass of a step they are averaged over the ranks."""
        waits = contextlib.nullcontext()
        if self.sharded:
            self.stage.set_requires_gradient_sync(last)
        elif self.wrapped is not self.stage and not last:
            waits = self.wrapped.no_sync()
        with waits:
            with self.autocast():
                out = self.wrapped(*arguments)
            (out["loss"] / self.passes).backward()
        return {name: value.detach() for name, value in out.items()}

    def stop_when_broken(self, losses: dict) -> None:
        """Raises UserError after BAD_STEPS steps in a row that were not finite. This waits for the device."""
        if self.bad_in_a_row < BAD_STEPS:
            return
        broken = ", ".join(n for n, v in losses.items() if n != "codes" and not torch.as_tensor(v).isfinite().all())
        states = saved_states(self.job.path(f"state-{self.name}"))
        good = f"the last good training state is {states[-1]}" if states else "no training state has been saved yet"
        raise UserError(
            f"step {self.step}: {broken} not finite, and the {int(self.bad_in_a_row)} last steps were skipped for it; {good}: "
            f"go on from there with --resume and a lower --lr"
        )

    @torch.no_grad()
    def show(self, what: str, *arguments):
        """stage.preview, stage.validate or stage.export with averaged weights, in eval mode, on rank 0. All ranks call
        this: under FSDP they gather the weights for it."""
        if self.sharded:
            for name, parameter in self.parameters.items():
                self._put(name, whole(self.ema.get(name, parameter)))
        if ranks()[0] > 0:
            return None
        with self.autocast():
            shown = getattr(self.twin, what)(*arguments)
        if self.sharded:
            for name in self.parameters:
                self._put(name, self.twin.get_parameter(name).to("meta"))
        return shown

    def _put(self, name: str, value: torch.Tensor) -> None:
        if ranks()[0] == 0:
            owner, _, leaf = name.rpartition(".")
            setattr(self.twin.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))

    # ---- the state on disk, for --resume

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a training state holds, by its name in the file."""
        tensors = {f"weights/{n}": p for n, p in self.parameters.items()} | {f"ema/{n}": p for n, p in self.ema.items()}
        tensors |= {f"buffers/{n}": b for n, b in self.buffers.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam/{kind}/{name}": value for kind, value in self.optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def save(self) -> None:
        """Write the training state, in one piece however many ranks there are; the last two are kept. Rank 0 writes; all
        ranks call this: under FSDP they gather what is written."""
        rank, folder, tensors = ranks()[0], self.job.path(f"state-{self.name}"), {}
        if rank > 0 and not self.sharded:
            return
        for name, tensor in self.state().items():
            tensor = whole(tensor)
            if rank == 0:
                tensors[name] = tensor.cpu()
        if rank == 0:
            metadata = {"format": "semtok-state", "stage": self.name, "step": str(self.step), "skipped": str(int(self.skipped))}
            metadata["settings"] = settings(self.job.args, self.name)
            write_tensors(os.path.join(folder, f"step-{self.step:07d}.safetensors"), tensors, metadata)
            for old in saved_states(folder)[:-2]:
                os.remove(old)

    @torch.no_grad()
    def load(self) -> None:
        """Go on from the newest state that is whole. Raises UserError when there is none, or it is of another model."""
        folder = self.job.path(f"state-{self.name}")
        for path in reversed(saved_states(folder)):
            try:
                source = TensorFiles(path)
                break
            except UserError as error:
                if ranks()[0] == 0:
                    print(f"falling back to the state before: {error}", file=sys.stderr)
        else:
            raise UserError(f"{folder} holds no training state to resume: start with {command(self.job.args, self.name)}")
        check_settings(path, self.job.args, self.name)
        mine, theirs = self.state(), {n: s for n, s in source.shapes.items() if not n.startswith("adam/")}
        if different := sorted(set(theirs.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in mine.items()}):
            raise UserError(
                f"{path} is the state of another model, in {different[0][0]} for one: resume with the flags that it was started "
                "with, or start again with --overwrite"
            )
        for name, tensor in mine.items():
            tensor.copy_(cut_like(source.get(name), tensor))
        for name, parameter in self.parameters.items():
            moments = {k: f"adam/{k}/{name}" for k in ("exp_avg", "exp_avg_sq") if f"adam/{k}/{name}" in source.shapes}
            if moments:
                state = {kind: cut_like(source.get(key), parameter) for kind, key in moments.items()}
                count = source.get(f"adam/step/{name}").to(parameter.device, copy=True)
                self.optimizer.state[parameter] = state | {"step": count}
        self.step = int(source.metadata["step"])
        self.skipped.fill_(int(source.metadata["skipped"]))


def saved_states(folder: str) -> list[str]:
    """Training states in a folder, oldest first."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, n) for n in names if re.fullmatch(r"step-\d+\.safetensors", n)]


class Log:
    """`log.jsonl`: one line every few steps with everything that was measured, all stages of a run in one file."""

    def __init__(self, job: Job, stage: str, step: int):
        self.path, self.stage, self.since = job.path("log.jsonl"), stage, (time.time(), step)
        lines = []
        if os.path.isfile(self.path):
            with open(self.path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
        # what a stopped run logged after the state it resumes from is about to be logged again, as is its validation
        entries = map(json.loads, lines)
        kept = [line for line, e in zip(lines, entries) if e["stage"] != stage or (e["step"] <= step and "loss" in e)]
        if kept != lines or not os.path.isfile(self.path):
            write_text(self.path, "".join(kept))

    def steps_per_second(self, step: int) -> float:
        """Since the last call, or the start: all that a step takes, previews and states among it."""
        (then, first), self.since = self.since, (time.time(), step)
        return (step - first) / (self.since[0] - then)

    def write(self, entry: dict) -> None:
        """Append one line."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage} | entry) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}): free some space, then go on with --resume") from None


def remove_parts(folder: str) -> None:
    """Delete the half-written states that a killed process has left: only one run at a time writes in a folder."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.endswith(".part"):
            os.remove(os.path.join(folder, name))


def run_stage(name: str, job: Job) -> None:
    """Train one stage from where it stands to its end: data, step, average, log, preview, state, result."""
    args, recipe, (rank, count) = job.args, job.recipe(name), ranks()
    result, states = job.path(RESULTS[name]), saved_states(job.path(f"state-{name}"))
    say = print if rank == 0 else (lambda *_: None)
    if not args.resume and not args.overwrite:
        if os.path.exists(result):
            check_settings(result, args, name)
            return say(f"stage {name} ({NAMES[name]}) is finished: {result}. --resume trains it further, --overwrite starts again")
        if states:
            raise UserError(f"stage {name} stopped before its end: --resume goes on from {states[-1]}, --overwrite starts again")
    if recipe.batch_size % (count * args.accumulate):
        passes = f" with --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise UserError(f"a batch of {recipe.batch_size} does not divide by {count} processes{passes}: change --batch-size")
    if args.fsdp and not dist.is_initialized():
        raise UserError("--fsdp cuts the weights up among processes, and there is one: start it with torchrun --nproc_per_node N")
    started = time.time()
    wait_for_all()  # whoever removes or writes files below has been seen by all to find them as they were
    torch.manual_seed(args.seed)
    say(f"stage {name}: {NAMES[name]}, {recipe.steps} steps of {recipe.batch_size} on {count} x {job.device}")
    stage = STAGE_CLASSES[name](job).to(job.device)
    dataset = stage.open_dataset()  # before its networks are compiled or cut up
    trainer = Trainer(stage, recipe, name, job)
    if args.resume and states:
        trainer.load()
    elif rank == 0:
        for old in states:
            os.remove(old)
    if rank == 0:
        remove_parts(job.path(f"state-{name}"))
    log = Log(job, name, trainer.step) if rank == 0 else None
    stop, rate = StopSignal(), matmul_rate(job.device)
    batches = DataLoader(
        dataset, num_workers=job.workers, persistent_workers=job.workers > 0,
        pin_memory=job.device.type == "cuda",  # else every batch's copy would wait for the steps that are under way
        batch_sampler=Schedule(len(dataset), recipe.batch_size, args.seed, trainer.step, recipe.steps),
    )
    with stop, tqdm(batches, f"stage {name}", initial=trainer.step, total=recipe.steps, unit="step", disable=rank > 0) as bar:
        for batch in bar:
            out = trainer.train_step(batch)
            step, stopped = trainer.step, stop.everywhere()
            last = step == recipe.steps
            if step % recipe.log_every == 0 or last or job.device.type == "cpu":
                trainer.stop_when_broken(out)
            if step % recipe.log_every == 0 or last:
                entry = measured(out)
                if rank == 0:
                    speed = log.steps_per_second(step)
                    health = {"images_per_s": speed * recipe.batch_size, "mfu": speed * trainer.flops / rate}
                    log.write(entry | {"step": step} | health)
                    bar.set_postfix_str(" ".join(f"{k}={entry[k]:.3g}" for k in SHOWN[name] if k in entry))
                    if entry.get("dead_bits", 0) > 0 or entry.get("used", 1) < 0.01:
                        share = f"{entry['used']:.1%} of codes used, {entry['dead_bits']} dead bits"
                        bar.write(f"step {step}: the codebook is collapsing: {share}")
            if step % recipe.preview_every == 0 or last:
                picture = trainer.show("preview")
                if rank == 0:
                    write_picture(job.path(f"preview-{name}-{step:07d}.png"), picture)
            if step % recipe.save_every == 0 or last or stopped:
                trainer.save()
            if stopped and not last:
                if rank > 0:
                    sys.exit(2)
                raise UserError(f"stopped at step {step} with its state saved: go on with {command(args, name)} --resume")
    figures = trainer.show("validate")
    if rank == 0:
        log.write({"step": trainer.step} | figures)
    path = trainer.show("export", figures)
    if rank == 0:
        shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
        following = dict(zip(STAGES, STAGES[1:])).get(name)
        run = "" if args.out == os.path.join("runs", "tiny") else f" --run {args.out}"
        after = command(args, following) if following else f"python sample.py --class 1{run}"
        say(f"stage {name} done in {time.time() - started:.0f} s: {shown} on held-out pictures -> {path}; next: {after}")
    wait_for_all()


class StopSignal:
    """Inside `with`, Ctrl-C and SIGTERM only leave a note; `everywhere` tells all processes of it at the same step."""

    def __init__(self):
        self.noted = False

    def __enter__(self):
        def note(*_):
            self.noted = True
        self.handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def everywhere(self) -> bool:
        """Whether any process has been told to stop."""
        if ranks()[1] == 1:
            return self.noted
        note = torch.tensor(float(self.noted))  # on the CPU, by gloo: no wait for the GPU
        dist.all_reduce(note, dist.ReduceOp.MAX)
        return bool(note)


SHOWN = {  # the terms that fit beside the progress bar
    "0": ("vae_mse", "siglip", "vgg", "resnet"),
    "1": ("loss", "diff", "distill", "contrast", "used"),
    "2": ("loss", "mse", "lpips", "resnet", "d_loss", "used"),
    "ar": ("loss", "nll", "accuracy"),
}
STAGE_CLASSES = {"0": StandIns, "1": Pretraining, "2": Refining, "ar": Generating}


def measured(out: dict) -> dict[str, float]:
    """What a step returned as plain numbers for the log; the codes of all ranks become the codebook's usage. All ranks
    call this."""
    names = [name for name in out if name != "codes"]
    values = torch.stack([torch.as_tensor(out[name], dtype=torch.float32, device=out["loss"].device) for name in names])
    entry = dict(zip(names, values.tolist()))
    if "codes" not in out:
        return entry
    return entry | code_usage(gather(codes_to_bits(out["codes"]).to(torch.uint8)).bool())  # gloo gathers no bool


@functools.cache
def matmul_rate(
    device: torch.device, dtype: torch.dtype | None = None, shape: tuple[int, int, int] | None = None
) -> float:
    """FLOP/s of a matrix product (m, k) x (k, n), shape (m, k, n): the best of a few. By default of a square one as
    training does it, float32 on a CPU, bfloat16 on CUDA."""
    cuda = device.type == "cuda"
    dtype, rates = dtype or (torch.bfloat16 if cuda else torch.float32), []
    m, k, n = shape or 3 * (8192 if cuda else 768,)
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(*sides, generator=own, device=device, dtype=dtype) for sides in ((m, k), (k, n)))
    for _ in range(6):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        rates.append(2 * m * k * n / (time.perf_counter() - start))
    return max(rates)


# --------------------------------------------------------------------------------------------------- the plan of a run

_SD35 = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/resolve/main/"
_SIGLIP = "https://huggingface.co/google/siglip2-base-patch16-256/resolve/main/"
WEIGHT_FILES = {  # other people's weights, by flag: the name to save as, where it is, its size, whether it is gated
    "sd35": ("sd3.5_medium.safetensors", _SD35 + "sd3.5_medium.safetensors", "5.11 GB", True),
    "vae": ("sd3.5_vae.safetensors", _SD35 + "vae/diffusion_pytorch_model.safetensors", "168 MB", True),
    # its size is computed, not looked up: 375,234,050 float32 numbers, text tower included
    "siglip": ("siglip2-base-patch16-256.safetensors", _SIGLIP + "model.safetensors", "1.50 GB", False),
    "vgg": (fid.VGG[0], fid.VGG[2], "528 MiB", False),
    "lpips": (fid.HEADS[0], fid.HEADS[2], "7 kB", False),
    "resnet": ("resnet50-0676ba61.pth", "https://download.pytorch.org/models/resnet50-0676ba61.pth", "98 MiB", False),
}
NEEDED = {"0": (), "1": ("sd35", "vae", "siglip"), "2": ("siglip", "vgg", "lpips", "resnet"), "ar": ()}
PUBLISHED = {  # parameters in millions, by the paper, and of the VAE by SD3.5's file
    "encoder": 113, "decoder": 2236, "AR L": 318, "AR XL": 746, "AR XXL": 1200, "VAE encoder": 34.3, "VAE decoder": 49.5,
}
PEAK, UTILISATION = 989e12, 0.4  # FLOP/s: an H100's dense bfloat16, and the share of it that a transformer may reach
CPU_PEAK, CPU_UTILISATION = 92e9, 0.25  # of two cores on large float32 products, and what the tiny stages got: 14% to 35%
CARD = 78 * 2**30  # bytes: what a GPU of "80 GB" leaves to a program


def missing_files(args: argparse.Namespace, stage: str) -> list[str]:
    """What a stage reads and does not find: a sentence each, with the command that gets it. Empty when all is there."""
    sentences, weights, tiny = [], Job(args, None, None, None).weights, args.preset == "tiny"
    needed = ("sd35", *NEEDED[stage]) if stage == "2" and args.from_scratch else NEEDED[stage]
    unused = {"lpips": ("resnet",), "resnet": ("vgg", "lpips")}.get(args.perceptual, ())
    for flag in (name for name in needed if name not in unused):
        path, (name, address, size, gated) = weights.get(flag), WEIGHT_FILES[flag]
        if (path and os.path.exists(path)) or (tiny and not path) or (flag == "vae" and path == weights.get("sd35")):
            continue  # the VAE comes with --sd35
        if tiny and not getattr(args, flag):
            sentences.append(f"{path} is missing: {command(args, '0')} makes it, which stage 1 runs by itself")
            continue
        state = f"{path} is not there" if path else "is not given"
        token, terms = ('-H "Authorization: Bearer $HF_TOKEN" ', " (accept the terms on its page first)") if gated else ("", "")
        sentences.append(
            f"--{flag} {state} ({WEIGHTS_HELP[flag]}): get {size}{terms} with\n"
            f"    curl -fL --create-dirs {token}-o weights/{name} {address}\n  and add --{flag} weights/{name}"
        )
    earlier = {"2": None if args.from_scratch else "1", "ar": "2"}.get(stage)
    result = os.path.join(args.out, RESULTS[earlier]) if earlier else args.out
    if earlier and not os.path.isfile(result):
        sentences.append(f"{result} is missing: make it first with {command(args, earlier)}")
    if not tiny and not os.path.isdir(args.data or ""):
        state = f"{args.data} is no folder" if args.data else "is not given"
        sentences.append(
            f"--data {state} (ImageNet-1k's training pictures, a folder for each class): get 138 GiB (sign in and accept the "
            "terms first)\n    from https://image-net.org/download.php, unpack them with\n"
            "    mkdir -p imagenet/train && tar -xf ILSVRC2012_img_train.tar -C imagenet/train && (cd imagenet/train &&\n"
            '    for file in *.tar; do mkdir "${file%.tar}" && tar -xf "$file" -C "${file%.tar}" && rm "$file"; done)\n'
            "  and add --data imagenet/train"
        )
    return sentences


class Planned(Job):
    """A job on the meta device, where tensors have shapes and no values. Nothing is read but the sizes of a given SigLIP."""

    weights = {}  # in place of Job's: no file is to be loaded

    def __init__(self, args: argparse.Namespace):
        classes = argparse.Namespace(classes=SHAPES if args.preset == "tiny" else range(1000))
        super().__init__(args, torch.device("meta"), classes, None)

    def network(self, name: str) -> nn.Module:
        """A frozen network of the published size, or of the stand-in's."""
        tiny, config, given = self.args.preset == "tiny", PRESETS[self.args.preset], self.args.siglip
        if name == "vae":
            network = VAE(config.vae)
        elif name == "siglip":
            found = given and os.path.exists(given)  # another tower may have other sizes
            network = load_siglip(given, device="meta") if found else SigLIP(TINY_SIGLIP if tiny else SigLIPConfig())
        elif name == "lpips":
            widths = TINY_VGG if tiny else fid.VGG_WIDTHS
            network = fid.LPIPS(fid.VGG16Features(widths), [torch.empty(1, width, 1, 1) for width in widths])
        else:
            network = ResNet(*TINY_RESNET, len(SHAPES), config.image_size) if tiny else ResNet()
        return network.requires_grad_(False).to("meta")

    def tokenizer(self, stage: str) -> tuple[SemTok, dict[str, str]]:
        """A new tokenizer for the one that an earlier stage will make."""
        return self.new_tokenizer(self.network("siglip")).eval(), {"fingerprint": ""}

    def batch(self, size: int) -> tuple[torch.Tensor, ...]:
        """What the loader brings."""
        config, labels = tokenizer_config(self.args), torch.empty(size, dtype=torch.long)
        if self.args.stage == "ar":
            return torch.empty(size, config.tokens, config.bits, dtype=torch.bool), labels
        pictures = torch.empty(size, 3, config.image_size, config.image_size, dtype=torch.uint8)
        side = config.image_size // config.vae.factor
        return pictures, labels, *[torch.empty(size, config.vae.latent_channels, side, side)] * self.args.cache


def planned(args: argparse.Namespace) -> nn.Module:
    """The stage of args.stage on the meta device, made, frozen and joined by its own class."""
    with torch.device("meta"):
        return STAGE_CLASSES[args.stage](Planned(args)).to("meta")  # rotary tables and new embedders were made on the CPU


def networks(stage: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """The networks of a stage, by the names that people know them by."""
    if isinstance(stage, StandIns):
        return {
            "VAE": (stage.vae.encoder, stage.vae.decoder), "SigLIP": (stage.siglip,), "VGG16": (stage.vgg, stage.vgg_head),
            "ResNet": (stage.resnet,),
        }
    semtok = stage.frozen["tokenizer"] if isinstance(stage, Generating) else stage.semtok
    found = {
        "VAE encoder": (semtok.vae.encoder,), "encoder": (semtok.encoder,), "alignment": (semtok.w_x, semtok.w_z),
        "decoder": (semtok.decoder,), "VAE decoder": (semtok.vae.decoder,),
    }
    names = {"siglip": "SigLIP", "lpips": "LPIPS' VGG16", "resnet": "ResNet-50"}
    found |= {names[name]: (network,) for name, network in stage.frozen.items() if name in names}
    if isinstance(stage, Refining):
        found["discriminator"] = (stage.discriminator,)
    if isinstance(stage, Generating):
        found[f"AR {ar_size(stage.job.args)}"] = (stage.ar,)
    return found


class Autocast(torch.overrides.TorchFunctionMode):
    """CUDA's autocast for the meta device, which has none: matrix products and convolutions take bfloat16, norms and
    resizing float32, attention the kernel that keeps no L x L map. `copies`: the weights that it cast, by parameter and
    by whether it was being trained (a discriminator changes that within a step); `storages`: where they are."""

    def __init__(self):
        super().__init__()
        self.copies, self.storages = {}, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run a function of torch with its tensors cast as autocast casts them."""
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*map(self._half, args), None, True)[0]
        if function in (F.linear, F.conv2d):
            args = tuple(map(self._half, args))
        elif function in (F.layer_norm, F.rms_norm, F.group_norm, F.interpolate):
            args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
        return function(*args, **(kwargs or {}))

    def _half(self, value):
        if not isinstance(value, nn.Parameter):
            return value.bfloat16() if isinstance(value, torch.Tensor) else value
        if (key := (value, value.requires_grad)) not in self.copies:  # once a step: no activation
            self.copies[key] = value.bfloat16()
            self.storages.add(self.copies[key].untyped_storage()._cdata)
        return self.copies[key]


@dataclass
class Cost:
    """What a step takes: FLOPs of its forward passes and in all; bytes that they keep for the backward pass, and of the
    weights' bfloat16 copies that live as long; of some modules, FLOPs forward and bytes kept."""

    forward: int
    total: int
    kept: int
    copies: int
    parts: dict[nn.Module, tuple[int, int]]


def measure(step, owners: list[nn.Module], parts: Iterable[nn.Module] = (), backward: bool = True) -> Cost:
    """Run step() -> loss, and back, on the meta device. owners: the modules whose weights are no activations."""
    weights = {t.untyped_storage()._cdata for owner in owners for t in (*owner.parameters(), *owner.buffers())}
    kept, size, sums, opened, hooks = {}, 0, {part: (0, 0) for part in parts}, [], []
    with FlopCounterMode(display=False) as counter, Autocast() as autocast:
        def keep(tensor):
            nonlocal size
            storage = tensor.untyped_storage()  # views of one tensor are kept once
            if (place := storage._cdata) not in weights and place not in kept:
                kept[place] = tensor  # so that no other takes its place
                size += 0 if place in autocast.storages else storage.nbytes()
            return tensor

        def enter(*_):
            opened.append((counter.get_total_flops(), size))

        def leave(part, *_):
            now, then = (counter.get_total_flops(), size), opened.pop()
            sums[part] = tuple(had + after - before for had, after, before in zip(sums[part], now, then))

        for part in sums:
            hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step()
        forward = counter.get_total_flops()
        for hook in hooks:  # the backward pass may run blocks again
            hook.remove()
        if backward:
            loss.backward()
        copies = sum(c.nbytes for (_, t), c in autocast.copies.items() if t or c.untyped_storage()._cdata in kept)
        return Cost(forward, counter.get_total_flops(), size, copies, sums)


def measure_step(stage: nn.Module, batch: int, checkpointed: bool = False) -> Cost:
    """The cost of a training step of a planned stage on `batch` pictures, every loss joined; checkpointed: forward alone."""
    for module in stage.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = checkpointed
    name, last = stage.job.args.stage, stage.job.recipe(stage.job.args.stage).steps - 1
    draws = Draws(0, name, last, torch.device("cpu"))
    draws.device = stage.job.device

    def step():
        return stage(*stage.inputs(stage.job.batch(batch), draws, last))["loss"]

    parts = [module for modules in networks(stage).values() for module in modules]
    owners = [stage, *getattr(stage, "frozen", {}).values()]
    with torch.device("meta"):
        return measure(step, owners, [*parts, *blocks_of(stage)], backward=not checkpointed)


def plan(args: argparse.Namespace) -> str:
    """What --dry-run prints: parameters, FLOPs, memory, length and missing files of a run, from a step of the stage itself
    on the meta device. Raises UserError for a run that could not start."""
    if args.stage == "all":
        return "\n\n".join(plan(argparse.Namespace(**vars(args) | {"stage": stage})) for stage in asked_for(args))
    if args.stage not in RECIPES[args.preset]:
        raise UserError(f"stage {args.stage} makes stand-ins for the tiny preset; the paper preset reads the real weights")
    name, paper, config = args.stage, args.preset == "paper", tokenizer_config(args)
    recipe = Job(args, None, None, None).recipe(name)
    gpus, side = args.gpus or (8 if paper else 1), config.image_size
    (large, flop), (room, byte) = ((1e12, "TFLOP"), (2**30, "GiB")) if paper else ((1e9, "GFLOP"), (2**20, "MiB"))
    if recipe.batch_size % (gpus * args.accumulate):
        passes = f" with --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise UserError(f"a batch of {recipe.batch_size} does not divide by {gpus} GPUs{passes}: change --batch-size or --gpus")
    batch = recipe.batch_size // gpus // args.accumulate
    stage = planned(args)
    cost, lean = measure_step(stage, batch), measure_step(stage, batch, checkpointed=True)
    blocks = [block for block in blocks_of(stage) if any(p.requires_grad for p in block.parameters())]
    lines = [
        f"stage {name}, {NAMES[name]}, {args.preset} preset: {recipe.steps:,} steps of {recipe.batch_size} pictures of "
        f"{side} x {side}, {batch} a GPU{' and pass' * (args.accumulate > 1)}, GPUs: {gpus}",
        f"{config.tokens} tokens of {config.bits} bits: {config.bits_per_pixel:.3f} bits per pixel", "",
        f"{'network':16}{'trained, M':>12}{'frozen, M':>12}{'published':>12}{'forward, ' + flop:>18}",
    ]

    def sizes(modules) -> tuple[int, int]:  # parameters: trained, frozen
        parameters = {p: p.numel() for module in modules for p in module.parameters()}
        trained = sum(count for p, count in parameters.items() if p.requires_grad)
        return trained, sum(parameters.values()) - trained

    for label, modules in networks(stage).items():
        flops = sum(cost.parts[module][0] for module in modules)
        shown = f"{flops / batch / large:.4f}" if flops else "-"  # those of previews alone
        figures = *(count / 1e6 for count in sizes(modules)), PUBLISHED.get(label, "-") if paper else "-", shown
        lines.append("{:16}{:12.2f}{:12.2f}{:>12}{:>18}".format(label, *figures))
    trained, frozen = sizes([stage, *getattr(stage, "frozen", {}).values()])
    lines.append(f"{'all':16}{trained / 1e6:12.2f}{frozen / 1e6:12.2f}{'':12}{cost.forward / batch / large:18.4f}")
    lines.append(f"FLOPs of one picture in a step: forward as above, with the backward passes {cost.total / batch / large:.4f} {flop}")
    if paper and name != "ar":  # SD3.5's pooled-text embedder, 2048 -> width -> width, ends as a bias: see load_sd35
        folded = (2048 + 1 + config.decoder_width + 1) * config.decoder_width
        whole, vae = ((sum(sizes([part])) + more) / 1e6 for part, more in ((stage.semtok.decoder, folded), (stage.semtok.vae, 0)))
        lines.append(f"the decoder has {whole:.0f}M before SD3.5's pooled-text embedder is folded; the VAE has {vae:.1f}M")

    averaged = sum(p.numel() for n, p in stage.named_parameters() if p.requires_grad and n.startswith(stage.averaged))
    block = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    rows = [  # bytes on a GPU: under DDP, under FSDP
        ("trained weights, float32", 4 * trained, 4 * trained / gpus), ("frozen weights, float32", 4 * frozen, 4 * frozen),
        ("gradients, float32", 4 * trained, 4 * trained / gpus),  # DDP's with gradient_as_bucket_view, else twice
        ("AdamW, two moments", 8 * trained, 8 * trained / gpus),
        ("EMA", 4 * averaged, 4 * averaged / gpus),
        ("bfloat16 copies (autocast)", cost.copies, 2 * 4 * block),  # FSDP gathers two blocks, weights and gradients
    ]
    fixed = [sum(row[i] for row in rows) for i in (1, 2)]
    again = max((cost.parts[b][1] for b in blocks), default=0)  # checkpointed, one block at a time is there in full
    for note, kept in (("", cost.kept), (", checkpointed", lean.kept + again)):
        rows += [(f"activations{note}", kept, kept), (f"total{note}", fixed[0] + kept, fixed[1] + kept)]
    lines += ["", f"{f'memory of a GPU, {byte}':28}{'DDP':>12}{'FSDP':>12}"]
    for label, *amounts in rows:
        marks = ["!" if label.startswith("total") and amount > CARD else " " for amount in amounts]
        lines.append(f"{label:28}{''.join(f'{amount / room:12.2f}{mark}' for amount, mark in zip(amounts, marks))}".rstrip())
    lines += [
        "!: more than a GPU of 80 GB has. Activations are what a step on the meta device saves for the backward pass (types",
        "as autocast's, attention fused). The CUDA context, workspaces and fragments, a few GiB, come on top. FSDP shards",
        "what is trained.", "",
    ]
    recomputed = sum(cost.parts[b][0] for b in blocks)
    for note, flops in (("", cost.total), (", checkpointed", cost.total + recomputed)):
        work = recipe.steps * recipe.batch_size * flops / batch
        hours, seconds = work / (PEAK * UTILISATION) / 3600, work / (CPU_PEAK * CPU_UTILISATION)
        took = f"{hours:,.4g} GPU-hours, {hours / gpus:,.3g} hours on {gpus} GPU{'s' * (gpus > 1)}"
        lines.append(f"length{note}: {took if paper else f'{seconds:,.3g} seconds on two CPU cores'}")
    if paper:
        lines.append(f"  at {UTILISATION:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s, dense bfloat16; a floor for convolutions, which reach less")
    else:
        lines.append(f"  at {CPU_UTILISATION:.0%} of the {CPU_PEAK / 1e9:.0f} GFLOP/s that they reach on large products: the right order, not more")
    missing = missing_files(args, name)
    return "\n".join([*lines, "", f"missing files: {len(missing) or 'none'}", *(f"- {sentence}" for sentence in missing)])


# ----------------------------------------------------------------------------------------------------- the command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of this file. Exits with code 2 and one sentence for anything it does not know."""
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train SemTok, stage by stage. Results, previews (PNG), log.jsonl and training state go to --out.",
        epilog="""stages
  0    small stand-ins for SD3.5's VAE, SigLIP, VGG and ResNet, which cannot be shipped (tiny preset only;
       stage 1 runs it by itself when they are missing)
  1    the tokenizer by flow matching                      -> stage1.safetensors
  2    the tokenizer's decoder as a one-step refiner       -> stage2.safetensors
  ar   the masked autoregressive transformer on its tokens -> ar.safetensors
  all  the three in order

examples
  python train.py --stage all                       the built-in pictures, on a laptop
  python train.py --stage all --data my/pictures    my/pictures/CLASS/any.jpg
  python train.py --stage 1 --resume                go on after an interruption
then: python sample.py --class 1""",
    )
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; --help explains every option\n")
    add = parser.add_argument
    add("--stage", required=True, choices=[*STAGES, "all"], help="what to train, see below")
    add("--preset", default="tiny", choices=list(RECIPES), help="sizes and recipe; tiny (default) is the paper's system in small")
    add("--data", metavar="FOLDER", help="pictures in class subfolders; the tiny preset draws shapes when there is none")
    add("--out", metavar="FOLDER", help="the run's folder (default: runs/PRESET)")
    add("--steps", type=_positive(int), help="optimiser steps instead of the recipe's; warm-up and GAN start keep their share")
    add("--batch-size", type=_positive(int), help="pictures per step over all ranks")
    add("--lr", type=_positive(float), help="peak learning rate")
    add("--seed", type=int, default=0, help="everything random follows from it (default 0)")
    add("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--log-every", type=_positive(int), help="steps between lines of log.jsonl, instead of the recipe's")
    add("--save-every", type=_positive(int), help="steps between training states, which --resume goes on from")
    add("--workers", type=int, default=min(4, cores), help="processes that read pictures (default: one per core, up to 4)")
    add("--resume", action="store_true", help="go on from the last training state")
    add("--overwrite", action="store_true", help="start again although there is a result or a state")
    add(
        "--cache", action="store_true", help="stages 1, 2: compute latents (and, when small, SigLIP features) of all pictures "
        "once, in OUT/features; the AR stage's tokens are always cached",
    )
    add("--bits", type=_positive(int), help="bits per token d instead of the preset's (the paper trains 18 and 32)")
    add("--ar-size", choices=["L", "XL", "XXL"], help="the transformer's size in the paper preset (default L)")
    add(
        "--checkpoint-activations", action="store_true",
        help="recompute blocks in the backward pass: much less memory, about a third more work",
    )
    add(
        "--accumulate", type=_positive(int), default=1, metavar="N",
        help="go through each process's share of the batch in N passes, for less memory; the same step, but that the "
        "entropy of the average code and, in stage 0, batch norms are of a pass",
    )
    add("--fsdp", action="store_true", help="cut weights, gradients and moments up among the processes, for models too large for one")
    add(
        "--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the networks: a slow start, then faster steps (default: on CUDA)",
    )
    ablations = parser.add_argument_group("ablations", "what the paper's tables compare; flags of another stage are refused")
    ablation = ablations.add_argument
    ablation("--no-distill", action="store_true", help="stages 1, 2: weight 0 for the distillation term (Table 4)")
    ablation("--no-contrast", action="store_true", help="stages 1, 2: weight 0 for the contrastive term (Table 4)")
    ablation(
        "--order", choices=["global", "raster"], help="stage 1: raster makes the encoder's token stream causal; stage ar: "
        "raster predicts the next token, global masked ones; default global, in stage ar the tokenizer's (Table 5)",
    )
    ablation("--quantizer", choices=["bsq", "lfq"], help="stage 1: lfq is the sign without the sphere (Table 10; default bsq)")
    ablation("--perceptual", choices=list(PERCEPTUAL_TERMS), help="stage 2: the perceptual terms (Table 11; default both)")
    ablation(
        "--from-scratch", action="store_true", help="stage 2: without stage 1, whose flags it then takes; the decoder still "
        "starts from --sd35 (Table 12)",
    )
    ablation("--freeze-encoder", action="store_true", help="stage 2: the encoder, so also the tokens, stay stage 1's")
    ablation(
        "--bit-groups", type=_positive(int), metavar="N", help="stage ar: groups that a token's bits form, one softmax each; "
        "Table 13 compares 18 and 2 of 18 bits (default: one a bit)",
    )
    add("--dry-run", action="store_true", help="print the plan of the run (sizes, FLOPs, memory, hours, missing files) and stop")
    add("--gpus", type=_positive(int), help="in a --dry-run, how many GPUs share the batch (default: 8 for paper, 1 for tiny)")
    for name in WEIGHTS:
        add(f"--{name}", metavar="PATH", help=WEIGHTS_HELP[name])
    args = parser.parse_args(arguments)
    args.out = os.path.normpath(args.out or os.path.join("runs", args.preset))
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    for name, stages in BELONGS.items():
        given = getattr(args, name) not in (None, False)
        if given and not any(belongs(args, name, stage) for stage in asked_for(args)):
            if not (name == "bits" and args.dry_run):  # the plan of a later stage asks what its tokens will be
                flag, = flags({name: getattr(args, name)})
                also = " (and to 2 with --from-scratch)" if "1" in stages and "2" not in stages else ""
                parser.error(f"{flag} changes nothing in stage {args.stage}: it belongs to stage {' and '.join(stages)}{also}")
    if args.ar_size and args.preset == "tiny":
        parser.error(f"--ar-size {args.ar_size} is one of the paper preset's: add --preset paper, or leave it out")
    if args.from_scratch and args.freeze_encoder:
        parser.error("--from-scratch and --freeze-encoder exclude each other: that encoder would never be trained")
    return args


WEIGHTS_HELP = {
    "sd35": "SD3.5-Medium, single file or diffusers folder: starts the decoder, and gives the VAE",
    "vae": "the VAE alone, when it is not in --sd35",
    "siglip": "SigLIP or SigLIP 2, file or folder",
    "vgg": "torchvision's VGG16, for LPIPS",
    "lpips": "the LPIPS heads for VGG16 (v0.1)",
    "resnet": "torchvision's ResNet-50 (IMAGENET1K_V1)",
}


def _positive(kind):
    def parse(text: str):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError for what the person at the keyboard can mend."""
    args = parse_arguments(arguments)
    if args.dry_run:
        return print(plan(args))
    if args.stage == "all":
        ar_config(args, tokenizer_config(args))  # groups that do not fit are refused now, not after two stages
    device = join_group(args.device) if "WORLD_SIZE" in os.environ else choose_device(args.device)  # torchrun sets it
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if ranks()[0] == 0:  # a read-only folder is found out before the work, not after
        write_text(os.path.join(args.out, ".writable"), "")
        os.remove(os.path.join(args.out, ".writable"))
    wanted = asked_for(args)
    if args.preset == "paper" and (missing := missing_files(args, wanted[0])):
        raise UserError("; ".join(" ".join(text.split()) for text in missing))
    size = PRESETS[args.preset].image_size
    train, val = (open_pictures(args.data, split, args.seed, size, args.workers) for split in ("train", "val"))
    job = Job(args, device, train, val)
    begins = wanted[0] == ("2" if args.from_scratch else "1")
    if begins and args.preset == "tiny" and not all(os.path.exists(path) for path in job.weights.values()):
        wanted = ["0"] + wanted

    for stage in wanted:
        run_stage(stage, job)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_group(name: str | None) -> torch.device:
    """Join the processes that torchrun has started, by what it has put into the environment: over NCCL, each on its own
    GPU, or with gloo on CPUs. Returns this process's device. Raises UserError when there are fewer GPUs than processes."""
    device = choose_device(name)
    if device.type == "cuda":
        place, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= here:
            raise UserError(f"torchrun has started more processes than this machine's {here} GPUs: give it --nproc_per_node {here}")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def report(error: BaseException) -> int:
    """Say in one sentence on stderr why this process stops; returns its exit code. An error of the program's own is raised
    again."""
    if ranks()[0] > 0:
        if isinstance(error, KeyboardInterrupt):
            return 130
        time.sleep(20)  # rank 0 has mostly stopped for the same reason, and its end is this process's end
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted; what has been saved is whole: go on with --resume"
    elif isinstance(error, torch.OutOfMemoryError):
        text = f"the GPU's memory ran out ({str(error).split('.')[0]}): --checkpoint-activations, --accumulate and --fsdp need less"
    elif isinstance(error, (UserError, fid.UserError)):
        # an error out of a loader's worker carries its whole traceback: the last line is the sentence
        text = str(error).strip().splitlines()[-1].removeprefix("mmdit.UserError: ")
    else:
        raise error
    print(f"train.py: {text}", file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else 2


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell: returns the exit code, 2 with one sentence on stderr for a UserError."""
    try:
        main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
