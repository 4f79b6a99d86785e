"""Train SemTok: stand-ins (stage 0), flow-matching pre-training (1), one-step refiner (2), masked AR (ar).

    python train.py --stage all                    # the tiny world, from nothing, on two CPU cores in minutes
    python train.py --stage 1 --data FOLDER        # your own pictures: FOLDER/CLASS/picture.jpg
    python train.py --stage all --preset base --data IMAGENET/train    # one GPU, a day; paper: eight, days

The models and the method are in semtok.py and ar.py. This file is the engineering around them, top to bottom:

    recipes     the numbers of each stage; --set NAME=VALUE changes any of them
    pictures    the built-in world, folders, tokens, which picture each step sees
    judges      what stage II is judged by: ResNet-50, the discriminator
    job         what one command asks for, and the frozen networks
    stages      Pretraining (1, Eq. 6), Refining (2, Eq. 7), Generating (ar, Eq. 8), StandIns (0)
    engine      ranks and shards, averaged weights, training states, the log
    loop        train_stage: every stage goes through it
    plan        --dry-run
    command

A stage is a module. `prepare(pictures, labels, rng, step) -> rows, shared` makes all that needs no gradient,
of uint8 pictures (B, 3, H, W) or of tokens' bits (B, K, d), and `forward(rows, shared) -> losses` the rest.
`rows` has a row for each picture of this rank, so a micro-batch is a slice of it. All ranks call `preview()`
-> a picture, its figures by name, `validate()` -> held-out figures, and `export(metadata)`, which writes.
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import glob
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fid
from ar import AR_PRESETS, ARConfig, MaskedAR
from bsq import bits_to_codes, code_usage, codes_to_bits, gather, mean_over_ranks, ranks
from mmdit import TensorFiles, UserError, load_sd35
from semtok import (
    PICTURE_SUFFIXES, PRESETS, VAE, Decoder, LossWeights, SemTok, SemTokConfig, SigLIP, SigLIPConfig,
    choose_device, flush, load_semtok, load_siglip, load_vae, picture_grid, read_picture, to_signed, to_uint8,
    write_picture, write_tensors, write_text,
)

# ---------------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. The defaults are the paper's (section 4.1, appendix A.1). ValueError."""

    steps: int
    batch_size: int  # of all ranks together
    lr: float  # at its peak: a linear warm-up times a cosine over all steps
    weight_decay: float = 1e-3
    warmup: int = 10_000
    ema: float = 0.9999
    flip: bool = True  # mirror half of the pictures
    patience: float = 1.0  # so many times the steps
    log_every: int = 100
    save_every: int = 2_000  # training state, for --resume
    preview_every: int = 5_000

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in POSITIVE and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
            if name in SHARES and value > 1:
                raise ValueError(f"{name} is a share: it must be at most 1, not {value}")


@dataclass(frozen=True)
class TokenizerRecipe(LossWeights, Recipe):  # fields come from right to left: Recipe's are first
    """Stage I: a recipe with the weights of Eq. 6."""


@dataclass(frozen=True)
class RefinerRecipe(TokenizerRecipe):
    """Stage II: with those of Eq. 7 as well."""

    init: Literal["stage1", "scratch"] = "stage1"  # Table 12; scratch still takes the decoder of --sd35
    perceptual: Literal["both", "lpips", "resnet"] = "both"  # Table 11
    freeze_encoder: bool = False
    lambda_p: float = 0.1
    lambda_gan: float = 0.1
    lambda_lecam: float = 0.001
    gan_start: int = 20_000  # the step at which the discriminator joins; never, if it is `steps` or more
    discriminator_lr: float = 1e-4


@dataclass(frozen=True)
class ARRecipe(Recipe):
    """The masked AR transformer: with what training hides from it (section 4.1)."""

    least_masked: float = 0.7  # the share of masked tokens is uniform between this and 1
    class_dropout: float = 0.1
    smoothing: float = 0.01


CADENCE = ("log_every", "save_every", "preview_every")  # they only say how often something is written
POSITIVE = (*CADENCE, "steps", "batch_size", "lr", "warmup", "patience")
SHARES = ("least_masked", "class_dropout", "smoothing")
SHARED = ("flip", "patience", "distill", "contrast")  # beside sizes: set for one stage, meant for all
ON_RESUME = (*CADENCE, "steps", "patience", "lr", "warmup", "gan_start", "discriminator_lr")  # may change
TINY_EVERY = {"log_every": 25, "save_every": 400, "preview_every": 200}
RECIPES = {
    "paper": {
        "1": TokenizerRecipe(200_000, 256, 5e-5),
        "2": RefinerRecipe(100_000, 64, 5e-5),
        "ar": ARRecipe(800_000, 2048, 2e-4, weight_decay=0.03),
    },
    "base": {  # one GPU of 24 GB, a day
        "1": TokenizerRecipe(40_000, 128, 2e-4, warmup=2_000),
        "2": RefinerRecipe(12_000, 64, 1e-4, warmup=1_000, gan_start=4_000),
        "ar": ARRecipe(150_000, 128, 4e-4, weight_decay=0.03, warmup=5_000),
    },
    "tiny": {
        "0": Recipe(1100, 24, 1e-3, warmup=30, ema=0.0, **TINY_EVERY),
        "1": TokenizerRecipe(1200, 16, 3e-3, warmup=50, **TINY_EVERY),
        # In batches of 16 the paper's lambda_s or lambda_p drown the pixels. The discriminator plays only at
        # a rate of its own, and with lambda_gan 0.02 it costs the refiner 1 dB.
        "2": RefinerRecipe(
            1300, 16, 8e-3, warmup=50, lambda_s=0.003, lambda_p=0.002, lambda_gan=0.002, gan_start=900,
            discriminator_lr=2e-3, **TINY_EVERY,
        ),
        # Of 16 tokens, a share of 0.7 masked leaves at most 4 known: sampling would end beyond all training.
        # So high a rate needs the long warm-up: with one of 50 steps, 6e-3 cost 0.06 nats a bit.
        "ar": ARRecipe(
            2100, 32, 5e-3, weight_decay=0.03, warmup=200, least_masked=0.0,
            log_every=50, save_every=1000, preview_every=1000,
        ),
    },
}
# The tiny preset's stand-ins for published networks, and its discriminator: the arguments of their classes.
TINY_SIGLIP = SigLIPConfig(width=64, depth=2, heads=2, hidden=128, patch=8, grid=4)
TINY_VGG, TINY_RESNET, TINY_DISCRIMINATOR = (8, 8, 16, 24, 24), (8, (1, 1, 1, 1), 10), (8, 3, 4)
TOKENIZER_FIELDS = [f.name for f in fields(SemTokConfig) if f.name not in ("vae", "semantic_width")]
AR_FIELDS = ["depth", "width", "heads", "group_bits", "guidance"]  # tokenizer and data decide the others


def setting_names(stage: str) -> list[str]:
    """What --set changes in a stage."""
    names = [field.name for field in fields(RECIPES["tiny"][stage])]
    return names + TOKENIZER_FIELDS * (stage != "0") + AR_FIELDS * (stage == "ar")


def changed(settings, changes: dict[str, str]):
    """A dataclass with the fields that `changes` names set, each read as its type. Raises UserError."""
    values, numbers = {}, {int: "a whole number of 0 or more", float: "a number of 0 or more"}
    for name, kind in ((field.name, field.type) for field in fields(settings) if field.name in changes):
        text, choices = changes[name], get_args(kind) or ("0", "1")
        try:
            values[name] = kind(text) if kind in numbers else text == "1" if kind is bool else text
            fits = 0 <= values[name] < 2**31 if kind in numbers else text in choices
        except ValueError:
            fits = False
        if not fits:
            needed = numbers.get(kind, f"one of {', '.join(choices)}")
            raise UserError(f"{name}={text} cannot be set: {needed} is needed")
    try:
        return replace(settings, **values)
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------------------- pictures

DRAWN = {"train": 8_192, "val": 500}  # pictures of the built-in world
IN_MEMORY = 512 * 2**20  # bytes: pictures up to this size are read once and kept


def polygon(corners: int, radius: float, start: float = -90.0) -> np.ndarray:
    """The corners of a regular polygon, the first at `start` degrees: (corners, 2), y pointing down."""
    angles = np.radians(start + 360 * np.arange(corners) / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


_turn = 2 * np.pi * np.arange(48) / 48
_heart = 5 * np.cos(2 * _turn) + 2 * np.cos(3 * _turn) + np.cos(4 * _turn) - 13 * np.cos(_turn)
OUTLINES = {  # a shape for each class, of about unit radius round the origin
    "circle": polygon(48, 0.92), "ring": polygon(48, 0.92),
    "square": polygon(4, 1, 45), "triangle": polygon(3, 1.1),
    "star": np.stack([polygon(5, 1.1), polygon(5, 0.42, -54)], 1).reshape(10, 2),
    "cross": np.array([
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1),
        (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ]),
    "heart": np.stack([np.sin(_turn) ** 3, _heart / 16 - 0.1], 1), "crescent": polygon(48, 0.92),
    "arrow": np.array([
        (0, -1.1), (0.85, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.85, -0.1),
    ]),
    "bar": np.array([(-1.1, -0.33), (1.1, -0.33), (1.1, 0.33), (-1.1, 0.33)]),
}
# The crescent lies on its back: flipped, it is still one of its kind.
HOLES = {"ring": polygon(48, 0.46), "crescent": polygon(48, 0.736) - (0, 0.42)}
SHAPES = tuple(OUTLINES)
PAINTS = np.array([  # red, orange, yellow, green, cyan, blue, purple, white, black
    (215, 60, 55), (225, 135, 45), (215, 200, 60), (70, 170, 75), (60, 175, 190), (55, 80, 200),
    (160, 70, 185), (225, 225, 220), (45, 45, 50),
])


def draw_shape(split: str, seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """Picture `index` of the built-in world: (size, size, 3) uint8 and its class, index % 10 of SHAPES.

    By (split, seed, index) alone: a shape in one of nine PAINTS, of random size, place and rotation (within
    11 degrees), on a muted gradient, stripes or a woven texture."""
    rng = np.random.default_rng([list(DRAWN).index(split), seed, index])
    label, kind, direction = index % len(SHAPES), rng.integers(3), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size] / (size - 1) - 0.5
    along = np.cos(direction) * columns + np.sin(direction) * rows
    across = np.cos(direction) * rows - np.sin(direction) * columns
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 2) * axis + rng.uniform())) for axis in (along, across)]
    stripes = np.sin(2 * np.pi * (rng.uniform(2, 3) * along + rng.uniform()))
    pattern = (along, 0.3 * stripes, 0.3 * waves[0] * waves[1])[kind]
    base, colour = rng.uniform(80, 175) + rng.uniform(-25, 25, 3), None
    while colour is None or np.abs(colour - base).sum() < 160:  # a shape that can be seen
        colour = PAINTS[rng.integers(len(PAINTS))] + rng.uniform(-12, 12, 3)
    background = base + pattern[..., None] * rng.uniform(-25, 25, 3)

    radius, angle = rng.uniform(0.38, 0.44), rng.uniform(-0.2, 0.2)
    centre = rng.uniform(radius * 0.95, 1 - radius * 0.95, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (4 * size, 4 * size))  # four times too large, blurred, averaged: soft edges
    for outlines, ink in ((OUTLINES, 255), (HOLES, 0)):
        if SHAPES[label] in outlines:
            corners = (outlines[SHAPES[label]] @ rotation.T * radius + centre) * (4 * size)
            ImageDraw.Draw(mask).polygon([*map(tuple, corners)], fill=ink)
    cover = np.asarray(mask.filter(ImageFilter.GaussianBlur(2)).reduce(4), np.float64)[..., None] / 255
    return (background * (1 - cover) + colour * cover).clip(0, 255).round().astype(np.uint8), label


class Pictures(Dataset):
    """The pictures of a split, "train" or "val": item (index, flip) -> ((3, size, size) uint8, label).

    They come from FOLDER/CLASS/**/picture, or else from the built-in world. A damaged one is named and the
    next takes its place. Raises UserError for another layout, or 50 damaged in a row."""

    def __init__(self, folder: str | None, split: str, seed: int, size: int, workers: int = 0):
        self.split, self.seed, self.size, self.workers, self.memory = split, seed, size, workers, None
        self.skipped = torch.zeros(1, dtype=torch.long).share_memory_()  # loader processes count here too
        drawn = [index % len(SHAPES) for index in range(DRAWN[split])]
        found = list(SHAPES), None, drawn, f"{len(drawn)} drawn, seed {seed}"
        found = find_pictures(folder, split) if folder else found
        self.classes, self.paths, self.labels, self.fingerprint = found
        if len(self) * 3 * size**2 <= IN_MEMORY:
            every = [(index, False) for index in range(len(self))]
            loader = DataLoader(self, 64, sampler=every, num_workers=workers, generator=torch.Generator())
            pictures, labels = zip(*tqdm(loader, f"{split} pictures", unit="x64", leave=False))
            self.memory, self.labels, self.workers = torch.cat(pictures), torch.cat(labels).tolist(), 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = item
        for place in (number % len(self) for number in range(index, index + 50)):
            try:
                if self.memory is not None:
                    picture = self.memory[place]
                elif self.paths is not None:
                    picture = read_picture(self.paths[place], self.size)
                else:
                    drawn = draw_shape(self.split, self.seed, place, self.size)[0]
                    picture = torch.from_numpy(drawn).permute(2, 0, 1)
                return picture.flip(-1) if flip else picture, self.labels[place]
            except UserError as error:
                self.skipped += 1
                tqdm.write(f"skipped ({int(self.skipped)} so far): {error}", file=sys.stderr)
        raise UserError("50 pictures in a row could not be read: check the folder")

    def spread(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same `count` pictures every time, over all classes: (N, 3, H, W) uint8 and labels (N,)."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        pictures, labels = zip(*(self[int(place), False] for place in places))
        return torch.stack(pictures), torch.tensor(labels)


def find_pictures(folder: str, split: str) -> tuple[list[str], list[str], list[int], str]:
    """Classes in alphabetical order, paths, labels and fingerprint of a split of FOLDER/CLASS/**/picture.

    Every 50th picture of a class is "val", at most 1000 in all, but one of each class that has two. Raises
    UserError for another layout."""
    layout = "FOLDER/CLASS/picture.jpg, one subfolder for each class"
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: give one laid out as {layout}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    paths, labels, digest = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        walk = os.walk(os.path.join(folder, name))  # not glob, which goes round in links
        files = [os.path.join(root, file) for root, _, found in walk for file in found if file[0] != "."]
        found = sorted(path for path in files if path.lower().endswith(PICTURE_SUFFIXES))
        held_out = set(found[::50][: max(1, 1000 // len(classes))]) if len(found) > 1 else set()
        chosen = [path for path in found if (path in held_out) == (split == "val")]
        paths += chosen
        labels += [label] * len(chosen)
    if not paths:
        where = f"in {len(classes)} subfolders"
        raise UserError(f"{folder} has no {split} pictures {where}: it must be {layout}")
    for path in paths:  # a picture's size and time of change stand for it
        stamp = os.lstat(path)
        about = f"{os.path.relpath(path, folder)} {stamp.st_size} {stamp.st_mtime_ns}\n"
        digest.update(os.fsencode(about))
    return classes, paths, labels, f"{len(paths)} files, {digest.hexdigest()[:16]}"


def schedule(count: int, recipe: Recipe, seed: int, first: int) -> Iterator[list[tuple[int, bool]]]:
    """Which of `count` pictures this rank sees in each step from `first` on, by (seed, step): (index, flip).

    Every epoch is a new permutation, and batches run across its end."""
    (rank, world), size, drawn = ranks(), recipe.batch_size, -1
    for step in range(first, recipe.steps):
        batch = []
        for epoch, place in (divmod(number, count) for number in range(step * size, (step + 1) * size)):
            if epoch != drawn:
                rng, drawn = np.random.default_rng([seed, epoch]), epoch
                order, flips = rng.permutation(count), rng.integers(0, 2, count)
            batch.append((int(order[place]), bool(flips[place]) and recipe.flip))
        yield batch[rank * size // world : (rank + 1) * size // world]


class Tokens(Dataset):
    """The tokenised training pictures: item (index, flip) -> (bits (K, d) bool, label).

    A table in a mapped .npy file, of both flips: 1.5 GB for ImageNet. The .json beside it says what it was
    made of and how far. A table of anything else is made again."""

    PART = 256  # pictures between two notes of progress: an interruption costs one part

    @torch.no_grad()
    def __init__(self, path: str, tokenizer: SemTok, fingerprint: str, job: "Job", flip: bool):
        self.shape, self.workers = (tokenizer.config.tokens, tokenizer.config.bits), job.train.workers
        (rank, world), count, done = ranks(), len(job.train), 0
        about = {"tokenizer": fingerprint, "pictures": job.train.fingerprint, "flip": flip, "count": count}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            found = json.loads(Path(path + ".json").read_text())
            if found == found | about and len(np.load(path, mmap_mode="r")) == count:
                done = found["done"]
        wait_for_all()  # every rank has read it before rank 0 writes
        if not done and rank == 0:
            Path(path + ".json").unlink(missing_ok=True)  # it tells of the table that goes
            kind = np.dtype([("label", "<i4"), ("bits", "u1", -(-math.prod(self.shape) // 8))])
            np.lib.format.open_memmap(path, "w+", kind, (count, 1 + flip)).flush()
        wait_for_all()
        self.table = np.load(path, mmap_mode="r+")  # each rank fills its rows of every part
        parts = [range(count)[start : start + self.PART] for start in range(done, count, self.PART)]
        shares = [[(index, False) for index in part[rank::world] or part[:1]] for part in parts]
        own = torch.Generator()  # not the global one, which initialises networks
        loader = DataLoader(job.train, batch_sampler=shares, num_workers=self.workers, generator=own)
        bar = tqdm(loader, "tokenising", unit=f"x{self.PART}", leave=False, disable=rank > 0)
        for part, share, (pictures, labels) in zip(parts, shares, bar):
            rows, signed = [index for index, _ in share], to_signed(pictures.to(job.device))
            for flipped in range(1 + flip):
                codes = in_batches(tokenizer.encode, signed.flip(-1) if flipped else signed)
                bits = codes_to_bits(codes).flatten(1).cpu().numpy()
                self.table["bits"][rows, flipped] = np.packbits(bits, axis=1)
                self.table["label"][rows, flipped] = labels.numpy()
            self.table.flush()
            wait_for_all()
            if rank == 0:
                write_text(path + ".json", json.dumps(about | {"done": part.stop}))
        wait_for_all()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        row = self.table[item[0], int(item[1])]
        bits = np.unpackbits(row["bits"], count=math.prod(self.shape)).reshape(self.shape)
        return torch.from_numpy(bits).bool(), int(row["label"])


def in_batches(function, tensor: torch.Tensor, size: int = 64) -> torch.Tensor:
    """function applied to slices of a long tensor, joined again."""
    return torch.cat([function(part) for part in tensor.split(size)])


# ----------------------------------------------------------------------------------------- judges of stage II

class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block, stride in the 3x3 (torchvision): (B, c, H, W) -> (B, 4 width, ...)."""

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity()
        if stride != 1 or channels_in != 4 * width:
            shortcut = nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(hidden)))))
        return F.relu(hidden + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-50 (He et al. 2016), torchvision's names: (B, 3, H, W) in [-1, 1], resized -> (B, classes)."""

    def __init__(self, width: int = 64, layers=(3, 4, 6, 3), classes: int = 1000, size: int = 224):
        super().__init__()
        self.size, channels = size, width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
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
        if pictures.shape[-1] != self.size:
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        x = (pictures * 0.5 + 0.5 - self.mean) / self.std
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def load_resnet(path: str) -> ResNet:
    """torchvision's ResNet-50, from .pth or .safetensors, of any width. Raises fid.UserError."""
    tensors, metadata = fid.read_tensors(path)
    layers = tuple(len({k.split(".")[1] for k in tensors if k.startswith(f"layer{i}.")}) for i in range(1, 5))
    width, classes = (tensors[name].numel() if name in tensors else 0 for name in ("bn1.weight", "fc.bias"))
    side = metadata.get("input_size", "224")
    sizes = width or 64, layers, classes or 1000, int(side) if re.fullmatch(r"[1-9]\d{,2}", side) else 224
    with torch.device("meta"):  # they are believed once they fit the tensors
        expected = ResNet(*sizes).state_dict()
    tensors, expected = (  # files differ in whether they keep this counter, which nothing reads
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (tensors, expected)
    )
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    fid.check_keys(tensors, shapes, path, "torchvision's ResNet-50")
    resnet = ResNet(*sizes)
    resnet.load_state_dict(tensors, strict=False)
    return resnet.requires_grad_(False).eval()


class Discriminator(nn.Module):
    """MaskBiT's "VQGAN+" discriminator (Weber et al. 2024): (B, 3, H, W) -> logits (B, 1, map, map)."""

    def __init__(self, base: int = 128, stages: int = 4, map_size: int = 16):
        super().__init__()
        self.conv_in, self.map_size = nn.Conv2d(3, base, 5, padding=2), map_size
        widths = [base] + [base * 2**i for i in range(stages)]  # doubling from the second stage on
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, width // 4), width) for width in widths[1:])
        self.mix = nn.Conv2d(widths[-1], widths[-1], 1)
        self.conv_out = nn.Conv2d(widths[-1], 1, 5, padding=2)
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", blur[:, None] * blur, persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv_in(pictures), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            blur = self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4)
            x = F.leaky_relu(norm(F.conv2d(x, blur, stride=2, padding=1, groups=x.shape[1])), 0.1)
        x = F.adaptive_max_pool2d(x, self.map_size)
        return self.conv_out(F.leaky_relu(self.mix(x), 0.1))


def lecam_loss(real: torch.Tensor, fake: torch.Tensor, real_mean: torch.Tensor, fake_mean: torch.Tensor):
    """LeCAM (Tseng et al. 2021) as in MaskBiT: a side's mean logit () stays near the other's running mean."""
    return F.relu(real - fake_mean).square() + F.relu(real_mean - fake).square()


# ------------------------------------------------------------------------------- job: what a command asks for

WEIGHTS = {  # other people's networks, by flag: file name, what it is, size. README says how to get them.
    "sd35": ("sd3.5_medium.safetensors", "SD3.5-Medium, file or diffusers folder: the decoder", "5.11 GB"),
    "vae": ("sd3.5_vae.safetensors", "the VAE alone, when it is not in --sd35", "168 MB"),
    "siglip": ("siglip2-base-patch16-256.safetensors", "SigLIP or SigLIP 2, file or folder", "1.50 GB"),
    "vgg": (fid.VGG[0], "torchvision's VGG16, for LPIPS", "528 MiB"),
    "lpips": (fid.HEADS[0], "the LPIPS heads for VGG16 (v0.1)", "7 kB"),
    "resnet": ("resnet50-0676ba61.pth", "torchvision's ResNet-50 (IMAGENET1K_V1)", "98 MiB"),
}
HUB = os.path.join(torch.hub.get_dir(), "checkpoints")  # where torchvision puts its files
STAND_INS = {  # stage 0's twins of them
    "vae": "standins/vae.safetensors", "siglip": "standins/siglip", "vgg": "standins/vgg16.safetensors",
    "lpips": "standins/lpips.safetensors", "resnet": "standins/resnet50.safetensors",
}


@dataclass
class Job:
    """One command: its arguments, its device, what it reads. `planned`: networks have sizes and no values."""

    args: argparse.Namespace
    device: torch.device
    train: Pictures | None = None
    val: Pictures | None = None
    planned: bool = False

    def __post_init__(self):
        self.tiny = self.args.preset == "tiny"  # stage 0's stand-ins take the place of published networks
        self.config = changed(PRESETS[self.args.preset], self.args.changes)  # the tokenizer's sizes

    def path(self, name: str) -> str:
        """A file in the run's folder."""
        return os.path.join(self.args.out, name)

    def recipe(self, stage: str) -> Recipe:
        """The preset's recipe, changed by --set. Warm-up and GAN start keep their share of the steps."""
        preset, changes = RECIPES[self.args.preset][stage], dict(self.args.changes)
        asked = changed(preset, changes)
        changes["steps"] = str(max(1, round(asked.steps * asked.patience)))
        share = int(changes["steps"]) / preset.steps
        for name in {"warmup", "gan_start"} & asdict(preset).keys() - changes.keys():
            changes[name] = str(max(1, round(getattr(preset, name) * share)))
        return changed(preset, changes)

    def ar_config(self, tokens: SemTokConfig) -> ARConfig:
        """The transformer's sizes, changed by --set, for a tokenizer's tokens and the pictures' classes."""
        sizes = {name: getattr(tokens, name) for name in ("tokens", "bits", "causal")}
        sizes |= {"classes": len(self.train.classes)} if self.train else {}
        preset = replace(AR_PRESETS[self.args.ar_size], spherical=tokens.quantizer == "bsq", **sizes)
        return changed(preset, {name: text for name, text in self.args.changes.items() if name in AR_FIELDS})

    def settings(self, stage: str) -> dict:
        """All that decides a stage's result, by name: what results and states carry, and what is compared."""
        sizes = asdict(self.config) | asdict(self.ar_config(self.config)) | asdict(self.recipe(stage))
        found = {name: sizes[name] for name in setting_names(stage)}
        return {"seed": self.args.seed, "pictures": self.train.fingerprint} | found

    def weights(self, name: str) -> str:
        """Where a frozen network's file is: as given, tiny's stand-in, in weights/, in torch hub's cache."""
        if given := getattr(self.args, name):
            return given
        if name == "vae" and os.path.exists(self.weights("sd35")):
            return self.weights("sd35")
        if self.tiny and name in STAND_INS:
            return self.path(STAND_INS[name])
        wanted, cached = (os.path.join(folder, WEIGHTS[name][0]) for folder in ("weights", HUB))
        return cached if os.path.exists(cached) and not os.path.exists(wanted) else wanted

    def network(self, name: str) -> nn.Module:
        """A frozen network, "vae", "siglip", "lpips" or "resnet", out of its file; planned, of its sizes."""
        tiny, file, widths = self.tiny, self.weights, TINY_VGG if self.tiny else fid.VGG_WIDTHS
        make = {
            "vae": lambda: VAE(self.config.vae),
            "siglip": lambda: SigLIP(TINY_SIGLIP if tiny else SigLIPConfig()),
            "lpips": lambda: fid.LPIPS(fid.VGG16Features(widths), [torch.zeros(1, w, 1, 1) for w in widths]),
            "resnet": lambda: ResNet(*TINY_RESNET, size=self.config.image_size) if tiny else ResNet(),
        }
        load = {
            "vae": lambda: load_vae(file("vae"), device=self.device),
            "siglip": lambda: load_siglip(file("siglip"), device=self.device),
            "lpips": lambda: fid.load_lpips(file("vgg"), file("lpips")).to(self.device),
            "resnet": lambda: load_resnet(file("resnet")).to(self.device),
        }
        return (make if self.planned else load)[name]().requires_grad_(False).eval()

    def new_tokenizer(self, siglip: SigLIP) -> SemTok:
        """A tokenizer at its start. Its VAE and, from SD3.5, its decoder are pretrained; the rest is new."""
        vae, decoder = self.network("vae"), None
        config = replace(self.config, semantic_width=siglip.config.width, vae=vae.config)
        if not self.planned and self.args.preset == "paper":
            with torch.device("meta"):
                decoder = Decoder(config)
            load_sd35(decoder, self.weights("sd35"), self.device)  # straight there: in float32 it is 9 GB
        return SemTok(config, vae, decoder)

    def tokenizer(self, stage: str) -> tuple[SemTok, dict[str, str]]:
        """The tokenizer of an earlier stage, and its metadata. UserError for other sizes than those asked."""
        if self.planned:
            return self.new_tokenizer(self.network("siglip")), {"fingerprint": ""}
        path = self.path(STAGES[stage].result)
        model, metadata = load_semtok(path, self.device)
        sizes = {name: getattr(self.config, name) for name in TOKENIZER_FIELDS}
        check_settings(path, asdict(model.config), sizes)
        return model, metadata

    def command(self, stage: str = "") -> str:
        """This command line again; or that of a stage of this run, with the settings that stages share."""
        args, shared = self.args, {*TOKENIZER_FIELDS, *AR_FIELDS, *SHARED}
        kept = shared.intersection(setting_names(stage)) if stage else args.changes
        usual = {"preset": "tiny", "data": None, "out": os.path.join("runs", args.preset), "seed": 0}
        usual |= {"ar_size": "L" if args.preset == "paper" else args.preset, "accumulate": 1, "device": None}
        text = f"python train.py --stage {stage or args.stage}"
        for name, value in (usual | dict.fromkeys(WEIGHTS)).items():
            if getattr(args, name) != value:
                text += f" --{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}"
        text += " --checkpoint-activations" * args.checkpoint_activations
        sets = [f"{name}={value}" for name, value in args.changes.items() if name in kept]
        return " ".join([text, *["--set"] * bool(sets), *sets])

    def missing(self, stage: str) -> list[str]:
        """A sentence for each thing that a stage reads and does not find."""
        recipe = self.recipe(stage)
        scratch = getattr(recipe, "init", "") == "scratch"
        judges = {"lpips": ["vgg", "lpips"], "resnet": ["resnet"], "both": ["vgg", "lpips", "resnet"]}
        earlier = None if scratch else {"2": "1", "ar": "2"}.get(stage)
        vae = "sd35" if self.args.preset == "paper" else "vae"
        needed = [vae] * (stage == "1" or scratch) + ["siglip"] * (stage in "12")
        needed += judges.get(getattr(recipe, "perceptual", ""), [])
        sentences = []
        for name in needed:
            path, (_, about, size) = self.weights(name), WEIGHTS[name]
            if not os.path.exists(path):
                how = f"({about}, {size}): README says how to get it; or give --{name} PATH"
                if path.startswith(self.path("standins")):
                    how = f"(a small stand-in): {self.command('0')} makes it"
                sentences.append(f"{path} is missing {how}")
        if earlier and not os.path.isfile(result := self.path(STAGES[earlier].result)):
            sentences.append(f"{result} is missing: make it first with {self.command(earlier)}")
        if not self.tiny and not os.path.isdir(self.args.data or ""):
            sentences.append("--data needs a folder, FOLDER/CLASS/picture.jpg: README says how to get one")
        return sentences


def check_settings(path: str, found: dict, asked: dict, free: tuple[str, ...] = ()) -> None:
    """Raises UserError naming the first setting, but for free ones, in which a file is of another run."""
    for name, value in asked.items():
        if name not in free and found.get(name) != value:
            advice = "ask for the same with --set, take another --out, or start again with --overwrite"
            was = f"{path} was made with {name} {found.get(name)}"
            raise UserError(f"{was}, this run has {name} {value}: {advice}")


# ------------------------------------------------ the stages: what each one is fed, its losses, what it shows

class Pretraining(nn.Module):
    """Stage I, Eq. 6: flow matching through the tokens, entropy of the codes, alignment with SigLIP."""

    stage, title, result = "1", "flow-matching pre-training", "stage1.safetensors"
    look_for = "samples should show each original's shape and colours"
    caption = "stage 1: 25-step sample"
    before = {}  # rows of the preview

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.recipe = job, job.recipe(self.stage)
        # Frozen networks stand in a dict, not among the submodules: never trained, averaged or saved. The
        # VAE is frozen too, but belongs to the tokenizer, and to its file.
        self.frozen = {"siglip": job.network("siglip")}
        if getattr(self.recipe, "init", "") == "stage1":
            self.semtok = job.tokenizer("1")[0]
        else:
            self.semtok = job.new_tokenizer(self.frozen["siglip"])
        self.semtok.decoder.mask_tokens.requires_grad_(False)  # they join in stage II

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        rows, shared = self.semtok.prepare(to_signed(pictures), self.frozen["siglip"])
        return rows | self.semtok.draw_noise(rows["latents"], rng), shared

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        return self.semtok.pretraining_losses(**rows, **shared, weights=self.recipe)

    def reconstruct(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> uint8: stage I's 25-step samples, with fixed noise, or the refiner's step."""
        rng = torch.Generator(self.job.device).manual_seed(0) if self.stage == "1" else None
        return in_batches(lambda part: self.semtok.reconstruct(part, rng), pictures)

    @torch.no_grad()
    def preview(self) -> tuple[Image.Image, dict[str, float]]:
        pictures, _ = self.job.val.spread(10)
        made = self.reconstruct(pictures.to(self.job.device)).cpu()
        rows = {"original": pictures} | self.before | {self.caption: made}
        return picture_grid(rows), {"preview_psnr": fid.psnr(made, pictures).mean().item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        pictures, _ = self.job.val.spread(200)
        made = self.reconstruct(pictures.to(self.job.device)).cpu()
        return {metric.__name__: metric(made, pictures).mean().item() for metric in (fid.psnr, fid.ssim)}

    def export(self, metadata: dict[str, str]) -> None:
        write_model(self.job.path(self.result), "semtok-tokenizer", self.semtok, metadata)


class Refining(Pretraining):
    """Stage II, Eq. 7: from mask tokens to latents in one step, judged by pixels, and Eq. 6's other terms."""

    stage, title, result = "2", "one-step refiner", "stage2.safetensors"
    look_for = "the refiner's row should have clean edges where stage 1 has grain"
    caption = "stage 2: refiner"

    def __init__(self, job: Job):
        super().__init__(job)
        if not job.planned and self.recipe.init == "stage1":
            pictures, rng = job.val.spread(10)[0].to(job.device), torch.Generator(job.device).manual_seed(0)
            self.before = {Pretraining.caption: self.semtok.reconstruct(pictures, rng)}
        self.semtok.train().start_refiner()
        self.semtok.vae.eval()
        self.semtok.decoder.requires_grad_(True)
        self.semtok.decoder.x_embedder.requires_grad_(False)  # nothing noisy comes in any more
        self.semtok.encoder.requires_grad_(not self.recipe.freeze_encoder)
        self.discriminator = Discriminator(*TINY_DISCRIMINATOR if job.tiny else ())
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        terms = ("lpips", "resnet") if self.recipe.perceptual == "both" else (self.recipe.perceptual,)
        self.frozen |= {name: job.network(name) for name in terms}

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        pictures = to_signed(pictures)
        rows, shared = self.semtok.prepare(pictures, self.frozen["siglip"])
        return rows | {"pictures": pictures}, shared | {"adversarial": step >= self.recipe.gan_start}

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        recipe, real = self.recipe, rows["pictures"]
        latents, out = self.semtok.refiner_losses(
            rows["latents"], rows["features"], rows["positive"], shared["candidates"], recipe
        )
        output = self.semtok.vae.decode(latents).float()  # (B, 3, H, W)
        out["pixel_loss"] = F.mse_loss(output, real)
        if lpips := self.frozen.get("lpips"):
            out["lpips_loss"] = lpips(output, real).mean()
        if resnet := self.frozen.get("resnet"):  # of logits
            out["resnet_loss"] = F.mse_loss(resnet(output).float(), resnet(real).float().detach())
        perceptual_loss = sum(out[f"{name}_loss"] for name in ("lpips", "resnet") if name in self.frozen)
        loss = out["pixel_loss"] + recipe.lambda_p * perceptual_loss + out.pop("regulariser")  # Eq. 7
        if shared["adversarial"]:
            out |= self.adversarial_losses(real, output)
            loss = loss + recipe.lambda_gan * out["gan_loss"] + out["discriminator_loss"]
        return out | {"loss": loss}

    def adversarial_losses(self, real: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hinge losses of both players on pictures (B, 3, H, W) in [-1, 1], and mean logits.

        Detached weights judge the generator; the discriminator sees detached pictures. So one backward pass
        gives each player its own gradient."""
        detached = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        gan_loss = -torch.func.functional_call(self.discriminator, detached, (output,)).float().mean()
        on_real, on_fake = self.discriminator(real).float(), self.discriminator(output.detach()).float()
        hinge_loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        d_real, d_fake = (mean_over_ranks(logits.mean()) for logits in (on_real, on_fake))
        penalty = lecam_loss(d_real, d_fake, self.real_mean.clone(), self.fake_mean.clone())
        decay = 0.999 ** (1 / self.job.args.accumulate)  # 0.999 a step
        self.real_mean.lerp_(d_real.detach(), 1 - decay)
        self.fake_mean.lerp_(d_fake.detach(), 1 - decay)
        discriminator_loss = hinge_loss + self.recipe.lambda_lecam * penalty
        means = {"d_real": d_real, "d_fake": d_fake}
        return {"gan_loss": gan_loss, "discriminator_loss": discriminator_loss} | means


class Generating(nn.Module):
    """Section 3.3: the masked AR transformer on the tokens of stage II. Table 5: next-token prediction."""

    stage, title, result = "ar", "masked AR", "ar.safetensors"
    look_for = "each picture should show its class at a glance"

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.recipe = job, job.recipe("ar")
        tokenizer, metadata = job.tokenizer("2")
        self.fingerprint = metadata["fingerprint"]
        self.frozen = {"tokenizer": tokenizer.requires_grad_(False)}
        self.ar = MaskedAR(job.ar_config(tokenizer.config))

    def prepare(self, bits: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        return self.ar.prepare(bits, labels, rng, self.recipe.least_masked, self.recipe.class_dropout)

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        return self.ar.loss(**rows, **shared, smoothing=self.recipe.smoothing)

    @torch.no_grad()
    def preview(self) -> tuple[Image.Image, dict[str, float]]:
        tokenizer, config = self.frozen["tokenizer"], self.ar.config
        labels = torch.arange(min(20, config.classes), device=self.job.device)
        rng = torch.Generator(labels.device).manual_seed(0)
        bits = self.ar.generate(labels, cfg=config.guidance, generator=rng)
        latents = tokenizer.refine(bits_to_codes(bits, config.spherical))
        return picture_grid({"one sample of each class": to_uint8(tokenizer.decode(latents))}), {}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        pictures, labels = (tensor.to(self.job.device) for tensor in self.job.val.spread(500))
        bits = codes_to_bits(in_batches(self.frozen["tokenizer"].encode, to_signed(pictures)))
        rng = step_generator(0, "validation", 0, bits.device)
        masked = self.ar.draw_masks(len(bits), self.recipe.least_masked, rng)
        losses = self.ar.loss(bits, labels, masked, masked.sum(1).float().mean())
        return {"val_nll_per_bit": losses["nll"].item(), "val_bit_accuracy": losses["accuracy"].item()}

    def export(self, metadata: dict[str, str]) -> None:
        metadata = metadata | {"tokenizer": self.fingerprint}
        write_model(self.job.path(self.result), "semtok-ar", self.ar, metadata)


class StandIns(nn.Module):
    """Stage 0: small twins of the networks that cannot be had offline, under the real files' key names.

    A VAE (reconstruction + KL) and a SigLIP tower (sigmoid loss against class names) are trained. VGG16 and
    ResNet stay random, which judges pictures almost as well (Zhang et al. 2018, section 4)."""

    stage, title, result = "0", "stand-ins", STAND_INS["vae"]
    look_for = "the VAE's row should be as sharp as the originals"
    caption, before, frozen = "VAE", {}, {}
    preview, validate = Pretraining.preview, Pretraining.validate

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.recipe, self.config = job, job.recipe("0"), PRESETS["tiny"]
        classes = len(SHAPES) if job.planned else len(job.train.classes)
        self.vae, self.siglip = VAE(self.config.vae), SigLIP(TINY_SIGLIP)
        self.class_names = nn.Embedding(classes, self.config.semantic_width)
        self.siglip_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.siglip_bias = nn.Parameter(torch.tensor([-2.0]))
        for name, layer in self.vae.named_modules():  # gain 1: PyTorch's start finds the brightness late
            if isinstance(layer, nn.Conv2d) and not name.endswith(("conv2", "proj_out")):  # these are 0
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
                nn.init.zeros_(layer.bias)
        log_variances = self.vae.encoder.conv_out.bias[self.config.vae.latent_channels :]
        nn.init.constant_(log_variances, -6)  # start with little noise
        nn.init.normal_(self.siglip.embeddings.position_embedding.weight, std=0.02)  # 1.0 drowns the patches

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        pictures, (rank, world), config = to_signed(pictures), ranks(), self.config.vae
        # The VAE is convolutional. It learns from windows of every third picture, then from whole ones.
        side, top, left = pictures.shape[-1], 0, 0
        if step < 0.8 * self.recipe.steps:
            side //= 2
            top, left = np.random.default_rng(step).integers(0, side + 1, 2)
        windows, place = pictures[::3, :, top : top + side, left : left + side], side // config.factor
        shape = world * len(windows), config.latent_channels, place, place
        noise = torch.randn(shape, generator=rng, device=pictures.device).chunk(world)[rank]
        return {"pictures": pictures, "labels": labels, "windows": windows, "noise": noise}, {}

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        windows, labels = rows["windows"], rows["labels"]
        moments = self.vae.encoder(windows.contiguous(memory_format=torch.channels_last))
        mean, log_variance = moments.chunk(2, 1)
        log_variance = log_variance.clamp(-12, 4)
        reconstruction = self.vae.decoder(mean + (0.5 * log_variance).exp() * rows["noise"])
        kl_loss = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        image = F.normalize(self.siglip(rows["pictures"]).mean((2, 3)), dim=-1)
        pairs = image @ F.normalize(self.class_names.weight, dim=-1).T
        pairs = self.siglip_scale.exp() * pairs + self.siglip_bias
        matches = F.one_hot(labels, pairs.shape[1]) * 2.0 - 1  # SigLIP: each pair is a yes or a no
        siglip_loss = -F.logsigmoid(matches * pairs).sum(1).mean()
        vae_loss = F.mse_loss(reconstruction, windows)
        losses = {"loss": vae_loss + siglip_loss + 1e-4 * kl_loss, "vae_loss": vae_loss, "kl_loss": kl_loss}
        return losses | {"siglip_loss": siglip_loss, "accuracy": (pairs.argmax(1) == labels).float().mean()}

    def reconstruct(self, pictures: torch.Tensor) -> torch.Tensor:
        return to_uint8(self.vae.decode(self.vae.encode(to_signed(pictures))))

    @torch.no_grad()
    def export(self, metadata: dict[str, str]) -> None:
        vae, siglip = VAE(self.config.vae), SigLIP(TINY_SIGLIP)
        for copy, trained in ((vae, self.vae), (siglip, self.siglip)):
            copy.load_state_dict({name: full(tensor) for name, tensor in trained.state_dict().items()})
        signed = to_signed(self.job.val.spread(200)[0])
        # SD3.5's published shift and scale must whiten these latents too: both ends of the VAE are scaled.
        std = vae.encoder(signed).chunk(2, 1)[0].std((0, 2, 3)) * VAE.SCALE  # (channels,)
        for tensor in (vae.encoder.conv_out.weight, vae.encoder.conv_out.bias):
            tensor[: len(std)] /= std.view(-1, *[1] * (tensor.ndim - 1))
        vae.decoder.conv_in.weight *= std.view(1, -1, 1, 1)
        torch.manual_seed(self.job.args.seed)  # a resumed run makes the same
        vgg, resnet = fid.VGG16Features(TINY_VGG), ResNet(*TINY_RESNET, size=self.config.image_size)
        for layer in vgg.features:
            if isinstance(layer, nn.Conv2d):  # no batch norm: so deep, it sees only with He's gain
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for _ in range(50):  # its batch norms' running statistics settle
            resnet(signed)
        # Logits and features of this size leave room for the pixels beside lambda_p and lambda_s.
        for layer, factor in ((resnet.fc, 0.5 / resnet.eval()(signed).std()), (siglip.post_layernorm, 0.25)):
            layer.weight *= factor
            layer.bias *= factor
        heads = {f"lin{i}.model.1.weight": torch.full((1, w, 1, 1), w**-0.5) for i, w in enumerate(TINY_VGG)}
        about = metadata | {"input_size": str(self.config.image_size)}
        if ranks()[0] == 0:
            write_text(self.job.path(STAND_INS["siglip"] + "/config.json"), '{"num_attention_heads": 2}')
            for path, tensors in {
                STAND_INS["siglip"] + "/model.safetensors": siglip.state_dict(prefix="vision_model."),
                STAND_INS["vgg"]: vgg.state_dict(), STAND_INS["lpips"]: heads,
                STAND_INS["resnet"]: resnet.state_dict(), STAND_INS["vae"]: vae.state_dict(),  # the last
            }.items():
                write_tensors(self.job.path(path), tensors, about)


STAGES = {stage.stage: stage for stage in (StandIns, Pretraining, Refining, Generating)}

# ----------------------------------------------------------------------------------------------------- engine

def wait_for_all() -> None:
    """Every process arrives here before any goes on."""
    if ranks()[1] > 1:
        dist.barrier()


def step_generator(seed: int, stage: str, step: int, device: torch.device) -> torch.Generator:
    """A step's random numbers, by (seed, stage, step) alone, so that a resumed run has none to restore."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(key)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks in a network: what is sharded, compiled and recomputed one by one."""
    found = (getattr(part, "joint_blocks", getattr(part, "blocks", ())) for part in network.modules())
    return [block for blocks in found for block in blocks]


def shard(stage: nn.Module, device: torch.device) -> None:
    """FSDP2 (Zhao et al. 2023) in place: each rank keeps its rows of what is trained, and gathers a block to
    run it. Weights and moments stay float32; on CUDA what is gathered is bfloat16."""
    half = torch.bfloat16 if device.type == "cuda" else None
    # Inputs are not cast: times and rotations would lose digits that they need. Autocast casts the rest.
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    options = {"mesh": dist.init_device_mesh(device.type, (ranks()[1],)), "mp_policy": policy}
    frozen = {p for p in stage.parameters() if not p.requires_grad}
    for block in blocks_of(stage):
        if not frozen.issuperset(block.parameters()):
            fully_shard(block, **options)
    fully_shard(stage, ignored_params=frozen, **options)
    for method in ("preview", "validate"):  # they gather as forward does
        register_fsdp_forward_method(stage, method)


def compile_blocks(stage: nn.Module) -> None:
    """torch.compile in place, under the old names: transformer blocks, and the frozen networks of a step."""
    frozen = [network for name, network in getattr(stage, "frozen", {}).items() if name != "tokenizer"]
    vae = [stage.semtok.vae.encoder, stage.semtok.vae.decoder] if hasattr(stage, "semtok") else []
    for network in (*blocks_of(stage), *frozen, *vae):
        network.compile(dynamic=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in one piece, for which all ranks must ask; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def averaged(stage: nn.Module, average: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside `with`, a stage is in eval mode and has its averaged weights, swapped with the live ones."""
    @torch.no_grad()
    def swap():
        for name, mean in average.items():
            live = stage.get_parameter(name)
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)

    swap()
    stage.eval()
    yield
    if hasattr(stage, "reshard"):
        stage.reshard()  # a pass without gradient leaves the root gathered
    swap()
    stage.train()


@torch.no_grad()
def write_model(path: str, kind: str, model: nn.Module, metadata: dict[str, str]) -> None:
    """A checkpoint with its kind, sizes and fingerprint, by rank 0; all ranks call this to gather it."""
    tensors, digest = {}, hashlib.sha256()
    for name, tensor in model.state_dict().items():  # one by one: whole, they fill a GPU
        tensor = full(tensor)
        if ranks()[0] == 0:
            tensors[name] = tensor.cpu().contiguous()
            if not tensors[name].isfinite().all():
                raise UserError(f"{name} is NaN or infinite: go on from an earlier state, or --overwrite")
            digest.update(tensors[name].numpy())
    if ranks()[0] == 0:
        sizes, fingerprint = json.dumps(asdict(model.config)), digest.hexdigest()[:16]
        about = {"format": kind, "config": sizes, "fingerprint": fingerprint}
        write_tensors(path, tensors, metadata | about)


def saved_states(folder: str) -> list[str]:
    """Training states in a folder, oldest first: folders of safetensors shards and a state.json."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step-*[0-9]")))  # not .part


def checksums(folder: str) -> dict[str, str]:
    """The sha256 of every shard in a state's folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def save_state(folder: str, step: int, tensors: dict[str, torch.Tensor], settings: dict) -> None:
    """Write a training state, whole or not at all: each rank its shards, rank 0 a table. Two are kept."""
    path = os.path.join(folder, f"step-{step:07d}")
    part, (rank, world) = path + ".part", ranks()
    writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=world == 1)
    if rank == 0:
        about = {"step": step, "settings": settings, "sha256": checksums(part)}
        write_text(os.path.join(part, "state.json"), json.dumps(about))
        for name in about["sha256"]:
            flush(os.path.join(part, name))
        shutil.rmtree(path, ignore_errors=True)  # damaged, or load_state would have gone on from it
        os.replace(part, path)
        flush(folder)
        for old in saved_states(folder)[:-2]:
            shutil.rmtree(old)
    wait_for_all()


def load_state(folder: str, tensors: dict[str, torch.Tensor], settings: dict) -> int:
    """Fill the tensors in place from the newest state that is whole; returns its step.

    Raises UserError when there is none, and when it was made with other settings."""
    (rank, world), chosen = ranks(), [None]
    for path in reversed(saved_states(folder) if rank == 0 else []):
        try:
            about = json.loads(Path(path, "state.json").read_text(encoding="utf-8"))
            if about["sha256"] != checksums(path):
                raise ValueError("a shard is damaged")
            if not path.endswith(f"-{about['step']:07d}"):
                raise ValueError("its step is another")
            chosen = [(path, about["step"], dict(about["settings"]))]
            break
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"falling back to the state before: {path} is not whole ({error})", file=sys.stderr)
    if world > 1:
        dist.broadcast_object_list(chosen)
    if chosen[0] is None:
        raise UserError(f"{folder} holds no whole training state to resume: start again with --overwrite")
    path, step, found = chosen[0]
    check_settings(path, found, settings, ON_RESUME)
    logging.disable(logging.ERROR)  # torch would print a traceback beside our sentence
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=world == 1)
    except dcp.api.CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path} is no state of this run ({reason}): start again with --overwrite") from None
    logging.disable(logging.NOTSET)
    return step


def prune_log(path: str, stage: str, step: int) -> None:
    """Drop from log.jsonl what a stage logged after the step that it goes on from, and damaged lines."""
    kept = []
    for line in Path(path).read_bytes().splitlines() if os.path.exists(path) else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            again = not {"loss", "preview_psnr"} & {*entry}  # a result's figures, which are written once more
            if entry["stage"] != stage or (entry["step"] <= step and not again):
                kept.append(json.dumps(entry) + "\n")
    write_text(path, "".join(kept))


# --------------------------------------------------------------------------------------------------- the loop

BAD_STEPS = 5  # steps in a row that are not finite, after which a run stops


def is_finished(name: str, job: Job) -> bool:
    """Whether a stage has its result, by the settings of this run. UserError when a person must decide."""
    args, result, states = job.args, job.path(STAGES[name].result), saved_states(job.path(f"state-{name}"))
    if os.path.exists(result) and not args.overwrite:
        found, asked, metadata = {}, job.settings(name), TensorFiles(result).metadata
        with contextlib.suppress(KeyError, TypeError, ValueError):  # none, or damaged: of another run
            found = dict(json.loads(metadata["settings"]))
        if not (args.resume and states):
            check_settings(result, found, asked, CADENCE)
            return True
        # load_state compares; what may change then, such as more steps, lets the stage go on
        return all(found.get(key) == asked[key] for key in asked.keys() - set(CADENCE))
    if states and not (args.resume or args.overwrite):
        how = f"--resume goes on from {states[-1]}, --overwrite starts again"
        raise UserError(f"stage {name} stopped before its end: {how}")
    return False


def micro_batch(recipe: Recipe, world: int, accumulate: int) -> int:
    """The pictures that a rank has at once. Raises UserError for a batch that does not divide."""
    size, left = divmod(recipe.batch_size, world * accumulate)
    if left:
        parts = f"{world} processes with --accumulate {accumulate}"
        raise UserError(f"a batch of {recipe.batch_size} does not divide by {parts}: change --batch-size")
    return size


def make_optimizer(stage: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW. Weights of linear layers and convolutions decay; norms, biases and embeddings do not.

    The discriminator has its own learning rate. Moments are made at once: a training state has the same names
    before and after the discriminator joins."""
    matrices = {layer.weight for layer in stage.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    groups, state = {}, {}
    for name, p in stage.named_parameters():
        if p.requires_grad:
            lr = recipe.discriminator_lr if name.startswith("discriminator.") else recipe.lr
            decay = recipe.weight_decay if p in matrices else 0.0
            group = groups.setdefault((lr, decay), {"params": [], "base_lr": lr, "weight_decay": decay})
            group["params"].append(p)
            state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
            state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizer = torch.optim.AdamW(groups.values(), recipe.lr, betas=(0.9, 0.95), fused=True)
    optimizer.state.update(state)
    return optimizer


def train_stage(name: str, job: Job) -> None:
    """Train one stage from where it stands to its end. Raises UserError when it stops before."""
    args, recipe, device, (rank, world) = job.args, job.recipe(name), job.device, ranks()
    started, say = time.time(), print if rank == 0 else (lambda *_: None)
    result, states, log = (job.path(file) for file in (STAGES[name].result, f"state-{name}", "log.jsonl"))
    settings = job.settings(name)
    if is_finished(name, job):
        return say(f"stage {name} is finished: {result}. --overwrite starts it again")
    wait_for_all()  # whoever changes files below has been seen by all to find them as they were
    title = STAGES[name].title
    say(f"stage {name}: {title}, {recipe.steps} steps of {recipe.batch_size} on {world} x {device}")

    cost = measure(name, job, recipe.batch_size)
    accumulate = args.accumulate if name != "0" else 1  # its windows are of every third picture, and small
    held = cost["checkpointed" if args.checkpoint_activations else "activations"] / world / accumulate
    # 16 bytes a parameter: itself, its gradient, two moments
    needed = held + 16 * sum(p.numel() for p in cost["stage"].parameters())
    if device.type == "cpu" and needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        lack = f"needs some {needed / 2**30:,.0f} GiB of memory, and {there / 2**30:,.0f} are here"
        raise UserError(f"stage {name} {lack}: lower --batch-size or its sizes, or raise --accumulate")

    # ---- the stage, its data, its optimiser, its averages
    torch.manual_seed(args.seed)
    stage, dataset = STAGES[name](job).to(device), job.train
    if name == "ar":  # before its networks are compiled
        tokenizer = stage.frozen["tokenizer"]
        dataset = Tokens(job.path("tokens.npy"), tokenizer, stage.fingerprint, job, recipe.flip)
    for module in stage.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        compile_blocks(stage)
    if world > 1:
        shard(stage, device)
    parameters = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    players = {}  # clipped apart: the large gradients of one must not shrink those of another
    for n, parameter in parameters.items():
        players.setdefault(n.split(".")[0], []).append(parameter)
    optimizer = make_optimizer(stage, recipe)
    # weights that have an average: not the discriminator's, with which nobody draws
    tracked = {n: p for n, p in parameters.items() if recipe.ema and not n.startswith("discriminator.")}
    average, persistent = {n: p.detach().clone() for n, p in tracked.items()}, stage.state_dict()
    buffers = {n: b for n, b in stage.named_buffers() if n in persistent}
    # Bad steps are counted where the gradients are: asking for them would make the host wait for the GPU.
    skipped, bad_in_a_row = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))
    state = {"skipped": skipped}  # one flat dict of live tensors, saved and filled in place
    for kind, tensors in {"weights": parameters, "ema": average, "buffers": buffers}.items():
        state |= {f"{kind}/{n}": tensor for n, tensor in tensors.items()}
    for n, parameter in parameters.items():
        state |= {f"adam/{kind}/{n}": tensor for kind, tensor in optimizer.state[parameter].items()}

    # ---- where it stands
    step = 0
    if args.resume and saved_states(states):
        step = load_state(states, state, settings)
        if step > recipe.steps:
            raise UserError(f"{states} stands at step {step} of {recipe.steps}: ask for more, or --overwrite")
    elif rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    if rank == 0:
        prune_log(log, name, step)
    batches = DataLoader(
        dataset, num_workers=dataset.workers, persistent_workers=dataset.workers > 0,
        pin_memory=device.type == "cuda",  # else each copy waits for the steps that are under way
        batch_sampler=schedule(len(dataset), recipe, args.seed, step),
    )
    teraflops = cost["flops"] / world / 1e12  # a step's, of each rank
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def write_log(**entry):
        if rank == 0 and entry:
            with open(log, "a", encoding="utf-8") as file:
                print(json.dumps({"stage": name, "step": step} | entry), file=file)

    # ---- the loop
    bar = tqdm(batches, f"stage {name}", initial=step, total=recipe.steps, unit="step", disable=rank > 0)
    # signals, obeyed once the step under way is saved; when and where the log last looked
    noted, since = [], (time.time(), step)
    with bar, contextlib.ExitStack() as at_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, lambda number, _: noted.append(number))
            at_end.callback(signal.signal, number, handler)
        for batch in bar:
            warm = min(1.0, (step + 1) / recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
            old_buffers = [buffer.clone() for buffer in buffers.values()]  # put back if the step is bad
            with autocast():
                batch = [tensor.to(device, non_blocking=True) for tensor in batch]
                rows, shared = stage.prepare(*batch, step_generator(args.seed, name, step, device), step)

            # micro-batches: gradients add up on each rank, and the last one averages them over the ranks
            outs = []
            for i in range(accumulate):
                if world > 1:
                    stage.set_requires_gradient_sync(i == accumulate - 1)
                with autocast():
                    out = stage({n: tensor.chunk(accumulate)[i] for n, tensor in rows.items()}, shared)
                (out["loss"] / accumulate).backward()
                outs.append({n: value.detach() for n, value in out.items()})
            losses = {n: torch.stack([out[n].float() for out in outs]).mean() for n in out if n != "codes"}
            for player, members in players.items():
                if gradients := [p.grad for p in members if p.grad is not None]:
                    norm = full(nn.utils.get_total_norm(gradients, foreach=True))
                    nn.utils.clip_grads_with_norm_(members, 1.0, norm, foreach=True)
                    losses[f"grad_norm_{player}"] = norm
            values = mean_over_ranks(torch.stack(list(losses.values())))  # all ranks see what one broke
            losses = dict(zip(losses, values.unbind()))

            # the step, which a loss or gradient that is not finite makes a step of nothing
            decisive = torch.stack([value for n, value in losses.items() if n == "loss" or "grad_norm" in n])
            bad = ~decisive.isfinite().all()
            # As GradScaler sets it: the fused AdamW reads it on the device, and skips the step.
            optimizer.found_inf = bad.to(torch.float32)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for buffer, old in zip(buffers.values(), old_buffers):
                buffer.copy_(torch.where(bad, old, buffer))
            skipped += bad
            bad_in_a_row.add_(1).mul_(bad)
            if average:
                # a decay that grows: else a short run's average would stay near its initial weights
                decay = min(recipe.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.values()), list(tracked.values()), 1 - decay)
            step += 1

            # look, log, save
            stopped = bool(mean_over_ranks(torch.tensor(float(len(noted)))))  # by gloo: no wait for the GPU
            last = step == recipe.steps
            look = step % recipe.log_every == 0 or last
            if (look or device.type == "cpu") and bad_in_a_row >= BAD_STEPS:
                broken = ", ".join(n for n, value in losses.items() if not value.isfinite())
                good = "".join(f"go on from {path} with --resume" for path in saved_states(states)[-1:])
                raise UserError(
                    f"step {step}: {broken} not finite, and the {int(bad_in_a_row)} last steps were skipped: "
                    f"{good or 'start again'} and a lower --lr"
                )
            if look:
                entry = {n: value.item() for n, value in losses.items()}
                entry |= {"lr": optimizer.param_groups[0]["lr"], "skipped": int(skipped)}
                if "codes" in out:
                    bits = codes_to_bits(torch.cat([out["codes"] for out in outs]))
                    entry |= code_usage(gather(bits.to(torch.uint8)).bool())  # gloo gathers no bool
                    if entry["dead_bits"] and step > recipe.warmup and rank == 0:
                        dead = f"{entry['dead_bits']} of {bits.shape[-1]} bits never change"
                        tqdm.write(f"step {step}: codes collapse ({dead}): raise lambda_q or lower --lr")
                (then, first), since = since, (time.time(), step)
                speed = (step - first) / (since[0] - then)  # with all that a step takes, previews and states
                entry |= {"images_per_s": speed * recipe.batch_size, "tflops": speed * teraflops}
                bar.set_postfix(loss=entry["loss"])
                write_log(**entry)
            if step % recipe.preview_every == 0 or last:
                with averaged(stage, average), autocast():
                    picture, figures = stage.preview()
                write_log(**figures)
                if rank == 0:
                    write_picture(job.path(f"preview-{name}-{step:07d}.png"), picture)
            if step % recipe.save_every == 0 or last or stopped:
                save_state(states, step, state, settings)
            if stopped:
                raise UserError(f"stopped at step {step}, saved: go on with {job.command()} --resume")

    # ---- the result
    with averaged(stage, average):
        with autocast():
            figures = stage.validate()
        write_log(**figures)
        about = {"stage": name, "preset": args.preset, "classes": json.dumps(job.train.classes)}
        stage.export(about | {"settings": json.dumps(settings), "figures": json.dumps(figures)})
    if rank == 0:
        write_picture(job.path(f"curves-{name}.png"), draw_curves(log, name))
    reached = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
    following = {"0": "1", "1": "2", "2": "ar"}.get(name)
    say(
        f"stage {name} done in {time.time() - started:.0f} s: {reached} on held-out pictures -> {result}\n"
        f"  look at {job.path(f'preview-{name}-{step:07d}.png')}: {stage.look_for}\n"
        f"  and at {job.path(f'curves-{name}.png')}\n"
        f"  next: {job.command(following) if following else f'python sample.py --class 1 --run {args.out}'}"
    )
    wait_for_all()


def draw_curves(log: str, stage: str) -> Image.Image:
    """What a stage wrote into log.jsonl: a panel for each number, over the steps."""
    entries = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    curves = {}  # name -> [(step, value)]
    for entry in (entry for entry in entries if entry["stage"] == stage):
        for name in entry.keys() - {"stage", "step", "skipped"}:
            curves.setdefault(name, []).append((entry["step"], entry[name]))
    last = entries[-1]["step"]
    curves = {name: curves[name] for name in sorted(curves) if len(curves[name]) > 1 or name == "loss"}
    sheet = Image.new("RGB", (5 * 230, -(-len(curves) // 5) * 120), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, points) in enumerate(curves.items()):
        steps, values = np.array([point for point in points if math.isfinite(point[1])] or [(0, 0)]).T
        (low, high), left, top = (values.min(), values.max()), number % 5 * 230 + 8, number // 5 * 120 + 4
        heights = (values - low) / (high - low or 1)
        pen.text((left, top), f"{name}  {values[-1]:.4g}", fill="black")
        pen.rectangle((left, top + 14, left + 210, top + 92), outline="lightgrey")
        pen.line([*zip(left + 210 * steps / last, top + 92 - 78 * heights)], fill="steelblue", width=2)
        pen.text((left, top + 93), f"step 0 to {last}; {low:.3g} to {high:.3g}", fill="grey")
    return sheet


# --------------------------------------------------------------------------------------------------- the plan

CARDS = {  # by preset, a GPU to plan for: its name, dense bfloat16 FLOP/s, bytes that it leaves us
    "paper": ("an H100", 989e12, 78 * 2**30), "base": ("an RTX 4090", 165e12, 22 * 2**30),
}
UTILISATION = 0.4  # our share of the FLOP/s
PARTS = {  # of the stages, as the code names them: millions of parameters in the paper, of the VAE in SD3.5
    "semtok.vae.encoder": 34.3, "siglip": "-", "semtok.encoder": 113, "semtok.w_x": "-", "semtok.w_z": "-",
    "semtok.decoder": 2236, "semtok.vae.decoder": 49.5, "lpips": "-", "resnet": "-", "discriminator": "-",
    "tokenizer": "-", "ar": "-", "vae.encoder": "-", "vae.decoder": "-",
}
PAPER_AR = {"L": 318, "XL": 746, "XXL": 1200}


class AsOnCUDA(torch.overrides.TorchFunctionMode):
    """What CUDA's autocast does: norms and resizing take float32, attention is memory-efficient."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            return attend(*args, kwargs.get("attn_mask"), True, is_causal=kwargs.get("is_causal", False))[0]
        if function in (F.layer_norm, F.rms_norm, F.group_norm, F.interpolate):
            args = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        return function(*args, **kwargs)


def measure(name: str, job: Job, batch: int) -> dict:
    """What a stage's last step costs on `batch` pictures, by FakeTensorMode: shapes without values.

    Returns `stage`; `flops` of all passes; `forward`, those of a module's forward passes; bytes kept for the
    backward pass: `activations`, and `checkpointed`, with the inputs of all blocks and the inside of one."""
    weights, kept, inputs, opened, forward, inside = set(), {}, {}, [], {}, {}

    def keep(tensor, among=kept):  # storages, since views of one tensor are kept once
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            among[storage._cdata] = storage
        return tensor

    def so_far():
        return np.array([counter.get_total_flops(), sum(s.nbytes() for s in kept.values())], dtype=object)

    def enter(module, args):
        for tensor in args if module in blocks else ():
            keep(tensor, inputs) if isinstance(tensor, torch.Tensor) else None
        opened.append(so_far())

    def leave(module, *_):
        flops, inside[module] = so_far() - opened.pop()
        forward[module] = forward.get(module, 0) + flops

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        stage = STAGES[name](replace(job, planned=True, device=torch.device("cpu")))
        blocks, parts = blocks_of(stage), dict(stage.named_modules()) | stage.frozen
        for module in (*blocks, *(parts[part] for part in PARTS if part in parts)):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        for layer in (part for part in parts.values() if isinstance(part, (nn.Linear, nn.Conv2d))):
            for parameter in layer.parameters():  # the plan counts autocast's copies apart
                parameter.data = parameter.data.bfloat16()
        for root in (stage, *stage.frozen.values()):
            weights |= {t.untyped_storage()._cdata for t in (*root.parameters(), *root.buffers())}
        side, config, labels = job.config.image_size, job.config, torch.zeros(batch, dtype=torch.long)
        shape = (config.tokens, config.bits) if name == "ar" else (3, side, side)
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), AsOnCUDA(), saved:
            data = torch.zeros(batch, *shape, dtype=torch.bool if name == "ar" else torch.uint8)
            step = stage.prepare(data, labels, torch.Generator(), stage.recipe.steps - 1)
            stage(*step)["loss"].backward()
        flops, activations = so_far()
        within = [inside[block] for block in blocks if block in inside] or [0]
        lean = activations + sum(s.nbytes() for s in inputs.values()) - sum(within) + max(within)
    sizes = {"activations": activations, "checkpointed": lean}
    return {"stage": stage, "flops": flops, "forward": forward} | sizes


def plan(job: Job, name: str) -> None:
    """Print what a stage takes (--dry-run): parameters, FLOPs, memory, length and missing files."""
    args, config, recipe, missing = job.args, job.config, job.recipe(name), job.missing(name)
    paper, (card, peak, room) = args.preset == "paper", CARDS.get(args.preset, CARDS["base"])
    gpus = args.gpus or (8 if paper else 1)
    batch = micro_batch(recipe, gpus, args.accumulate)
    cost = measure(name, job, batch)
    stage, forward, flops = cost["stage"], cost["forward"], cost["flops"]

    def sizes(*modules) -> list[int]:  # parameters: trained, frozen
        parameters = {p for module in modules for p in module.parameters()}
        return [sum(p.numel() for p in parameters if p.requires_grad == trained) for trained in (True, False)]

    print(
        f"stage {name}, {stage.title}, {args.preset} preset: {recipe.steps:,} steps of {recipe.batch_size} "
        f"pictures of {config.image_size} x {config.image_size}, {batch} at once on each of {gpus} GPUs\n"
        f"{config.tokens} tokens of {config.bits} bits: {config.bits_per_pixel:.3f} bits per pixel\n\n"
        f"{'network':20}{'trained, M':>12}{'frozen, M':>12}{'published':>12}{'forward, TFLOP a picture':>28}"
    )
    found = dict(stage.named_modules()) | stage.frozen
    rows = {part: (sizes(found[part]), forward.get(found[part], 0)) for part in PARTS if part in found}
    rows["all"] = sizes(stage, *stage.frozen.values()), sum(work for _, work in rows.values())
    for part, ((trained, frozen), work) in rows.items():
        known = (PAPER_AR[args.ar_size] if part == "ar" else PARTS.get(part, "-")) if paper else "-"
        tera = f"{work / batch / 1e12:.4g}" if work else "-"
        print(f"{part:20}{trained / 1e6:12.2f}{frozen / 1e6:12.2f}{known:>12}{tera:>28}")
    print(f"with the backward passes: {flops / batch / 1e12:.4g} TFLOP a picture")
    if paper and name != "ar":
        pooled = (2048 + 1 + config.decoder_width + 1) * config.decoder_width
        before = (sum(sizes(stage.semtok.decoder)) + pooled) / 1e6
        print(f"the decoder has {before:.0f}M before SD3.5's pooled-text embedder becomes a bias")

    print("\nGiB on a GPU, what is trained sharded; context and fragments come on top, a few GiB")
    blocks = {block: sum(sizes(block)) for block in blocks_of(stage) if sizes(block)[0]}
    own = 4 * trained / gpus
    memory = {
        "trained weights, float32": own, "frozen weights, float32": 4 * frozen, "gradients, float32": own,
        "AdamW, two moments": 2 * own, "averaged weights": own * bool(recipe.ema),
        # of all weights, or where they are sharded of two blocks, with their gradients
        "bfloat16 copies": 2 * trained if gpus == 1 else 8 * max(blocks.values(), default=0),
    }
    fixed = sum(memory.values())
    for note, kept in (("", cost["activations"]), (", checkpointed", cost["checkpointed"])):
        memory |= {f"activations{note}": kept, f"total{note}": fixed + kept}
    for label, amount in memory.items():
        over = f"  more than the {room / 2**30:.0f} of {card}" * ("total" in label and amount > room)
        print(f"{label:28}{amount / 2**30:12.4g}{over}")
    print(f"\nlength at {UTILISATION:.0%} of {card}'s {peak / 1e12:.0f} TFLOP/s")
    for note, work in (("", flops), (", checkpointed", flops + sum(forward[block] for block in blocks))):
        hours = recipe.steps * recipe.batch_size * work / batch / (peak * UTILISATION) / 3600
        print(f"length{note}: {hours:.4g} GPU-hours, {hours / gpus:.3g} hours on {gpus} GPUs")
    print(f"\nmissing: {len(missing) or 'nothing'}", *missing, sep="\n- ", end="\n\n")


# ------------------------------------------------------------------------------------------------ the command

def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of this file. Exits with code 2 and one sentence for what it does not know."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.partition("\n")[0])
    for stage in STAGES:
        parser.add_argument_group(f"stage {stage}, --set changes", ", ".join(setting_names(stage)))
    said = "train.py: {}; --help explains every option\n"  # in one line, whatever was typed
    parser.error = lambda message: parser.exit(2, said.format(" ".join(message.split())))
    add = parser.add_argument
    add("--stage", required=True, choices=[*STAGES, "all"], help="what to train; all: 1, 2 and ar in order")
    add("--preset", default="tiny", choices=list(RECIPES), help="sizes and recipe (default: tiny)")
    add("--data", metavar="FOLDER", help="pictures in class subfolders; tiny draws shapes when there is none")
    add("--out", metavar="FOLDER", help="results, previews, log and states (default: runs/PRESET)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings below")
    for name in ("steps", "batch_size", "lr"):
        about = {"metavar": "N", "help": f"short for --set {name}=N", "type": f"{name}={{}}".format}
        add("--" + name.replace("_", "-"), dest="set", action="append", **about)
    add("--ar-size", choices=["L", "XL", "XXL"], help="the paper preset's transformer, by name (default L)")
    add("--seed", type=int, default=0, help="everything random follows from it (default 0)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="processes to read pictures")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches: less memory, entropy of each")
    add("--gpus", type=int, help="in a --dry-run, how many share the batch (paper: 8; else 1)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile networks (default: on CUDA)")
    for flag, about in {
        "--resume": "go on from the last training state", "--overwrite": "start again all the same",
        "--checkpoint-activations": "less memory, about a third more work",
        "--dry-run": "only print the plan: sizes, FLOPs, memory, hours, missing files",
    }.items():
        add(flag, action="store_true", help=about)
    for name, (_, about, size) in WEIGHTS.items():
        add(f"--{name}", metavar="PATH", help=f"{about}, {size} (default: in weights/)")
    args = parser.parse_args(arguments)

    for name, least in {"seed": 0, "workers": 0, "accumulate": 1, "gpus": 1}.items():
        if (number := getattr(args, name)) is not None and not least <= number < 2**53:
            parser.error(f"--{name} {number} must be at least {least}")
    args.out = os.path.normpath(args.out or os.path.join("runs", args.preset))
    args.changes = dict(text.partition("=")[::2] for text in args.set)
    args.stages = ["1", "2", "ar"] if args.stage == "all" else [args.stage]
    if args.stage == "all" and args.changes.get("init") == "scratch":
        args.stages = ["2", "ar"]  # Table 12
    known = sorted({name for stage in args.stages for name in setting_names(stage)})
    for name in args.changes.keys() - known:
        parser.error(f"--set {name} changes nothing in stage {args.stage}, which has {', '.join(known)}")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.gpus and not args.dry_run:
        parser.error("--gpus is for --dry-run: torchrun's --nproc_per_node decides how many train")
    if args.ar_size and args.preset != "paper":
        parser.error(f"--ar-size {args.ar_size} is the paper preset's: add --preset paper, or leave it out")
    args.ar_size = args.ar_size or ("L" if args.preset == "paper" else args.preset)
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError for what the person at the keyboard can mend."""
    args = parse_arguments(arguments)
    job, stages, several = Job(args, torch.device("cpu")), args.stages, "WORLD_SIZE" in os.environ  # torchrun
    if job.tiny and (stages[0] == "1" or args.changes.get("init") == "scratch"):
        stages = ["0"] * (not all(os.path.exists(job.weights(name)) for name in STAND_INS)) + stages
    for stage in stages:  # what does not fit is refused now, not after two stages
        if stage not in RECIPES[args.preset]:
            raise UserError(f"stage {stage} makes tiny's stand-ins; {args.preset} reads real weights")
        micro_batch(job.recipe(stage), args.gpus or int(os.environ.get("WORLD_SIZE", 1)), args.accumulate)
    job.ar_config(job.config)
    if args.dry_run:
        return [plan(job, stage) for stage in args.stages]
    if missing := job.missing(stages[0]):
        raise UserError("; ".join(missing))
    job.device = choose_device(args.device)
    cuda = job.device.type == "cuda"
    if cuda and several:
        job.device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(job.device)
    if several:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    args.compile = cuda if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, for what autocast leaves in float32
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a state of one process
    with lock(args.out):
        size = job.config.image_size
        job.train, job.val = (Pictures(args.data, split, args.seed, size, args.workers) for split in DRAWN)
        for stage in stages:
            train_stage(stage, job)
    if several:
        dist.destroy_process_group()


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """One run at a time writes in a folder; the kernel frees the lock when its owner dies. UserError."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as file:
        if ranks()[0] == 0:
            try:  # not flock: the loader's processes would inherit that lock, and outlive a killed run
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is at work in {folder}: wait or change --out") from None
            for left in glob.glob(f"{glob.escape(folder)}/**/*.part", recursive=True):  # by a killed run
                if os.path.isdir(left):
                    shutil.rmtree(left)
                elif os.path.exists(left):  # it was not in one of the folders
                    os.remove(left)
        yield


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell -> exit code: 2, and one sentence on stderr, for what a person can mend."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        text, code = "interrupted; what has been saved is whole: go on with --resume", 130
    except (UserError, fid.UserError) as error:
        # An error out of a loader's worker carries its whole traceback. The last line is the sentence.
        text, code = str(error).strip().splitlines()[-1].removeprefix("mmdit.UserError: "), 2
    except (OSError, MemoryError, SafetensorError, dcp.api.CheckpointException, RuntimeError) as error:
        reason = (str(error).strip() or "memory is full").splitlines()[-1]
        advice = "free some space or change the path; what has been saved is whole, --resume goes on"
        if isinstance(error, MemoryError) or "memory" in str(error):
            advice = "try --checkpoint-activations, --accumulate or more GPUs"
        elif isinstance(error, RuntimeError):
            raise  # a bug
        text, code = f"{reason}: {advice}", 2
    if ranks()[0] > 0:
        time.sleep(20)  # rank 0 has mostly stopped for the same reason, and its end is this process's end
    else:
        print(f"train.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(command_line())
