"""Train SemTok: stand-ins (stage 0), flow-matching pre-training (1), one-step refiner (2), masked AR (ar).

    python train.py --stage all                                # the tiny world, from nothing, in minutes
    python train.py --stage 1 --data FOLDER --out runs/mine    # your own pictures, FOLDER/CLASS/picture.jpg
    python train.py --stage 2 --out runs/mine                  # the folder knows its pictures and settings

A run is a folder. The first command writes its settings.json, later ones read it. What is finished is passed
over; what was interrupted goes on, bit for bit on a CPU. The method is in semtok.py and ar.py. Here is what
feeds and drives it, top to bottom:

    recipes     the numbers of each stage; --set NAME=VALUE changes them
    world       the built-in pictures
    data        pictures of folders, the table of tokens, which picture each step sees
    run         a folder, its settings, and the frozen networks
    stages      Pretraining (1, Eq. 6), Refining (2, Eq. 7), Generating (ar, Eq. 8), StandIns (0)
    engine      shards, averaged weights, training states
    training    one_step, the algorithm; train_stage, the loop around it
    command

A stage is a module. `prepare(pictures, labels, rng, step) -> rows, shared` computes everything that needs no
gradient, of uint8 pictures (B, 3, H, W) or of tokens' bits (B, K, d). `rows` has a row for each picture: a
micro-batch is a slice of it. (Stage 0, which also has windows of every third picture, is not divided.)
`shared` is what all micro-batches use. `forward(rows, shared) -> losses` is the rest. `after_step(losses)`
follows a good step. `look() -> picture, figures` shows held-out pictures or samples. `export(metadata)`
writes a result.
"""

import argparse
import collections
import contextlib
import datetime
import difflib
import functools
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
from collections.abc import Callable, Iterator
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import fid
from ar import AR_PRESETS, ARConfig, MaskedAR
from bsq import bits_to_codes, code_usage, codes_to_bits, mean_over_ranks, ranks
from mmdit import TensorFiles, UserError, load_sd35
from semtok import (
    PRESETS, VAE, Decoder, Discriminator, LossWeights, RefinerWeights, ResNet, SemTok, SemTokConfig, SigLIP,
    SigLIPConfig, choose_device, flush, in_batches, key_generator, launched, load_semtok, load_siglip,
    load_vae, lock, number, parse_command, picture_grid, run_command, to_signed, to_uint8, write_picture,
    write_tensors, write_text,
)

# ---------------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. The defaults are the paper's for the tokenizer (section 4.1, appendix A.1); it
    names no warm-up or EMA for the transformer. Raises ValueError."""
    steps: int
    batch_size: int  # of all ranks together
    lr: float  # at its peak: a linear warm-up times a cosine
    weight_decay: float = 1e-3  # of weights of linear layers and convolutions
    warmup: int = 10_000  # steps
    ema: float = 0.9999  # decay of the averaged weights; 0: no average
    flip: bool = True  # mirror half of the pictures
    patience: float = 1.0  # multiplies steps, warm-up and gan_start
    log_every: int = 100  # steps, as for the next two
    save_every: int = 2_000  # training states
    preview_every: int = 5_000  # a picture, and held-out losses

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in POSITIVE and value <= 0 or name in MOST and value > MOST[name]:
                limit = "above 0" if value <= 0 else f"at most {MOST[name]}"
                raise ValueError(f"{name} must be {limit}, not {value}")


@dataclass(frozen=True)
class TokenizerRecipe(LossWeights, Recipe):  # fields of the last base come first: steps, batch_size, lr
    """Stage I: a recipe with the weights of Eq. 6."""


@dataclass(frozen=True)
class RefinerRecipe(RefinerWeights, Recipe):
    """Stage II: a recipe with the weights of Eq. 7."""
    init: Literal["stage1", "scratch"] = "stage1"  # Table 12; scratch still takes SD3.5's decoder
    perceptual: Literal["all", "lpips", "resnet"] = "all"  # of JUDGES (Table 11)
    freeze_encoder: bool = False  # 1: the tokens stay as stage 1 left them
    gan_start: int = 20_000  # the discriminator joins at this step
    discriminator_lr: float = 1e-4  # at its peak: its own warm-up and cosine begin when it joins


@dataclass(frozen=True)
class ARRecipe(Recipe):
    """The masked AR transformer: with what training hides from it (section 4.1, A.2)."""
    least_masked: float = 0.7  # the share of masked tokens is uniform between this and 1
    class_dropout: float = 0.1  # the share of pictures that lose their class
    smoothing: float = 0.01  # of labels


MOST = {"ema": 1, "least_masked": 1, "class_dropout": 1, "smoothing": 1, "patience": 1000}
FOR_ALL = ("flip", "patience", "distill", "contrast")  # set for one stage, they hold for the later ones too
CADENCE = ("log_every", "save_every", "preview_every")
POSITIVE = (*CADENCE, "steps", "batch_size", "lr", "warmup", "patience")
MAY_CHANGE = (*CADENCE, "steps", "patience", "lr", "discriminator_lr", "warmup", "gan_start")  # within a run
TINY_EVERY = {"log_every": 25, "save_every": 400, "preview_every": 400}
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
        # In batches of 16 the paper's lambda_s or lambda_p drown the pixels. With lambda_gan 0.02 the
        # discriminator costs the refiner 1 dB.
        "2": RefinerRecipe(
            1300, 16, 8e-3, warmup=50, lambda_s=0.003, lambda_p=0.002, lambda_gan=0.002, gan_start=900,
            discriminator_lr=5e-4, **TINY_EVERY,
        ),
        # Of 16 tokens, a share of 0.7 masked leaves at most 4 known: late sampling steps would see fewer
        # masks than training ever showed. So high a rate needs the long warm-up: with one of 50 steps, 6e-3
        # cost 0.06 nats a bit.
        "ar": ARRecipe(
            2100, 32, 5e-3, weight_decay=0.03, warmup=200, least_masked=0.0,
            log_every=50, save_every=1000, preview_every=1000,
        ),
    },
}
# The sizes of tiny's stand-ins for published networks, and of its discriminator
TINY_SIGLIP = SigLIPConfig(width=64, depth=2, heads=2, hidden=128, patch=8, grid=4)
TINY_VGG, TINY_RESNET, TINY_DISCRIMINATOR = (8, 8, 16, 24, 24), (8, (1, 1, 1, 1), 10, 32), (8, 3, 4)
TOKENIZER_SIZES = [f.name for f in fields(SemTokConfig) if f.name not in ("vae", "semantic_width")]
AR_SIZES = ["depth", "width", "heads", "group_bits", "guidance"]  # tokenizer and data decide the others


def setting_names(stage: str) -> list[str]:
    """What --set changes in a stage."""
    recipe = [field.name for field in fields(RECIPES["tiny"][stage])]
    return recipe + TOKENIZER_SIZES * (stage != "0") + AR_SIZES * (stage == "ar")


def changed(settings, changes: dict[str, str]):
    """A dataclass with the fields that `changes` names set, each read as its type. Raises UserError."""
    values, numbers = {}, {int: "a whole number of 0 or more", float: "a number of 0 or more"}
    for name, kind in ((field.name, field.type) for field in fields(settings) if field.name in changes):
        text, choices = changes[name], get_args(kind) or ("0", "1")
        try:
            values[name] = {int: int, float: float, bool: lambda text: text == "1"}.get(kind, str)(text)
            fits = 0 <= values[name] <= 2**31 if kind in numbers else text in choices
        except ValueError:
            fits = False
        if not fits:
            needed = numbers.get(kind, f"one of {', '.join(choices)}")
            raise UserError(f"{name}={text} cannot be set: {needed} is needed")
    try:
        return replace(settings, **values)
    except ValueError as error:
        raise UserError(str(error)) from None


# ----------------------------------------------------------------------------------------- the built-in world

DRAWN = {"train": 8_192, "val": 500}  # pictures of the built-in world


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
    The picture depends only on (split, seed, index): a shape in one of nine PAINTS, of random size, place and
    rotation (within 11 degrees), on a muted gradient, stripes or a woven texture."""
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


# -------------------------------------------------------------------------------------- pictures and tokens

IN_MEMORY = 512 * 2**20  # bytes: pictures up to this size are read once and kept


class Pictures(Dataset):
    """The pictures of a split, "train" or "val": item (index, flip) -> ((3, size, size) uint8, label).
    They come from FOLDER/CLASS/**/picture, or else from the built-in world. A damaged one is named and the
    next takes its place. Raises UserError for another layout, or 50 damaged in a row."""

    def __init__(self, folder: str | None, split: str, seed: int, size: int, workers: int = 0):
        self.split, self.seed, self.size, self.workers, self.memory = split, seed, size, workers, None
        self.skipped = torch.zeros(1, dtype=torch.long).share_memory_()  # loader processes count here too
        drawn = [index % len(SHAPES) for index in range(DRAWN[split])]
        world = list(SHAPES), None, drawn, f"{len(drawn)} drawn, seed {seed}"
        found = find_pictures(folder, split) if folder else world
        self.classes, self.paths, self.labels, self.fingerprint = found
        if len(self) * 3 * size**2 <= IN_MEMORY:
            every = [(index, False) for index in range(len(self))]
            loader = DataLoader(self, 64, sampler=every, num_workers=workers)
            pictures, labels = zip(*tqdm(loader, f"{split} pictures", unit="x64", leave=False))
            self.memory, self.labels, self.workers = torch.cat(pictures), torch.cat(labels).tolist(), 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = item
        for place in (near % len(self) for near in range(index, index + 50)):
            try:
                picture = self.memory[place] if self.memory is not None else self.read(place)
                return picture.flip(-1) if flip else picture, self.labels[place]
            except fid.UserError as error:
                self.skipped += 1
                tqdm.write(f"skipped ({int(self.skipped)} so far): {error}", file=sys.stderr)
        raise UserError("50 pictures in a row could not be read: check the folder")

    def read(self, place: int) -> torch.Tensor:
        """A picture as it is, (3, size, size) uint8. Raises fid.UserError."""
        if self.paths is None:
            pixels = draw_shape(self.split, self.seed, place, self.size)[0]
        else:
            pixels = fid.read_picture(self.paths[place], self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def spread(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same `count` pictures every time, over all classes: (N, 3, H, W) uint8 and labels (N,)."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        pictures, labels = zip(*(self[int(place), False] for place in places))
        return torch.stack(pictures), torch.tensor(labels)


def find_pictures(folder: str, split: str) -> tuple[list[str], list[str], list[int], str]:
    """Classes in alphabetical order, paths, labels and fingerprint of a split of FOLDER/CLASS/**/picture.
    Every 50th picture of a class is "val", about 1000 in all at most, and at least one of each class that has
    two or more. Raises UserError for another layout."""
    layout = "FOLDER/CLASS/picture.jpg, one subfolder for each class"
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: give one laid out as {layout}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    others = collections.Counter()  # files that are no pictures, by suffix
    found = {name: fid.list_pictures(os.path.join(folder, name), others) for name in names}
    if others and split == "train" and ranks()[0] == 0:
        kinds = ", ".join(f"{suffix or 'no suffix'} {n}" for suffix, n in others.most_common(5))
        print(f"{others.total()} files are no pictures that are read here: {kinds}", file=sys.stderr)
    if (empty := [name for name in names if not found[name]]) and split == "train" and ranks()[0] == 0:
        print(f"left out, without pictures that are read here: {', '.join(empty)}", file=sys.stderr)
    classes = [name for name in names if found[name]]
    paths, labels, digest = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        files = [os.path.join(name, file) for file in found[name]]
        held_out = set(files[::50][: max(1, 1000 // len(classes))]) if len(files) > 1 else set()
        for file in (file for file in files if (file in held_out) == (split == "val")):
            paths.append(os.path.join(folder, file))
            labels.append(label)  # name and size stand for a picture
            digest.update(os.fsencode(f"{file} {os.lstat(paths[-1]).st_size}\n"))
    if not paths:
        found = f"{folder} has no {split} pictures in {len(names)} subfolders"
        raise UserError(f"{found}: it must be {layout}, with two pictures or more of some class")
    return classes, paths, labels, f"{len(paths)} files, {digest.hexdigest()[:16]}"


def batches_from(step: int, count: int, recipe: Recipe, seed: int) -> Iterator[list[tuple[int, bool]]]:
    """Which of `count` pictures this rank sees in each step from `step` on, by (seed, step): (index, flip).
    Every epoch is a new permutation, and batches run across its end."""
    (rank, world), size, drawn = ranks(), recipe.batch_size, -1
    for step in range(step, recipe.steps):
        batch = []
        for epoch, place in (divmod(seen, count) for seen in range(step * size, (step + 1) * size)):
            if epoch != drawn:
                rng, drawn = np.random.default_rng([seed, epoch]), epoch
                order, flips = rng.permutation(count), rng.integers(0, 2, count)
            batch.append((int(order[place]), bool(flips[place]) and recipe.flip))
        yield batch[rank * size // world : (rank + 1) * size // world]


class Tokens(Dataset):
    """The tokenised training pictures: item (index, flip) -> (bits (K, d) bool, label).
    A table in a mapped .npy file, 1.5 GB for ImageNet with both flips. It is renamed into place when it is
    complete. Another tokenizer or other pictures give another name."""

    def __init__(self, run: "Run", tokenizer: SemTok, fingerprint: str, flip: bool):
        self.shape, self.workers = (tokenizer.config.tokens, tokenizer.config.bits), run.train.workers
        self.kind = np.dtype([("label", "<i4"), ("bits", "u1", -(-math.prod(self.shape) // 8))])
        key = hashlib.sha256(f"{fingerprint} {run.train.fingerprint} {flip}".encode()).hexdigest()[:16]
        path = run.path(f"tokens-{key}.npy")
        there = os.path.isfile(path)
        wait_for_all()  # all ranks decide before rank 0 touches a file
        if not there:
            self.fill(path + ".part", run, tokenizer, flip)
            wait_for_all()
            if ranks()[0] == 0:
                os.replace(path + ".part", path)
            wait_for_all()
        try:
            self.table = np.load(path, mmap_mode="r")  # (N, 1 + flip) rows of label and packed bits
            fits = (self.table.shape, self.table.dtype) == ((len(run.train), 1 + flip), self.kind)
            if not fits or not {*np.unique(self.table["label"])} <= {*range(len(run.train.classes))}:
                raise ValueError("its rows or labels are not those of this run's pictures")
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and it is made again") from None

    @torch.no_grad()
    def fill(self, part: str, run: "Run", tokenizer: SemTok, flip: bool) -> None:
        """Write the table, each rank a range of its rows."""
        (rank, world), count, kind = ranks(), len(run.train), self.kind
        if rank == 0:
            Path(part).unlink(missing_ok=True)  # a link would be followed
            np.lib.format.open_memmap(part, "w+", kind, (count, 1 + flip))
        wait_for_all()
        first, last = count * rank // world, count * (rank + 1) // world
        mine = [(index, False) for index in range(first, last)]
        loader = DataLoader(run.train, 256, sampler=mine, num_workers=self.workers)
        with open(part, "r+b") as file:
            file.seek((first - count) * (1 + flip) * kind.itemsize, os.SEEK_END)
            for pictures, labels in tqdm(loader, "tokenising", unit="x256", leave=False, disable=rank > 0):
                rows, pictures = np.empty((len(labels), 1 + flip), kind), pictures.to(run.device)
                rows["label"] = labels[:, None]
                for flipped in range(1 + flip):
                    codes = in_batches(tokenizer.encode, pictures.flip(-1) if flipped else pictures)
                    bits = codes_to_bits(codes).flatten(1).cpu().numpy()
                    rows["bits"][:, flipped] = np.packbits(bits, axis=1)
                file.write(rows.tobytes())
        flush(part)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        row = self.table[item[0], int(item[1])]
        bits = np.unpackbits(row["bits"], count=math.prod(self.shape)).reshape(self.shape)
        return torch.from_numpy(bits).bool(), int(row["label"])


# ------------------------------------------------------------------------------------------------------ a run

PUBLISHED = {  # in the folder of weights: what each name is
    "sd3.5_medium": "SD3.5-Medium, file or diffusers folder, 5.11 GB",
    "sd3.5_vae": "SD3.5's VAE alone, 168 MB",
    "siglip2-base-patch16-256": "SigLIP 2, file or folder, 1.50 GB",
    "vgg16-397923af": "torchvision's VGG16, 528 MiB",
    "lpips_vgg": "the LPIPS heads for VGG16 (v0.1), 7 kB",
    "resnet50-0676ba61": "torchvision's ResNet-50 (IMAGENET1K_V1), 98 MiB",
}
NEW_RUN = {  # settings.json; "set" has the texts of --set, under "sizes" or a stage
    "preset": "tiny", "seed": 0, "data": None, "pictures": None, "weights": "weights", "ar_size": None,
    "set": {},
}


@dataclass
class Run:
    """A folder, its settings, the options of this command, and the pictures."""
    folder: str
    settings: dict  # as in settings.json
    args: argparse.Namespace
    device: torch.device = torch.device("cpu")
    kept: tuple[str, ...] = ()  # stages with a state or a result that this command does not start again
    train: Pictures | None = None
    val: Pictures | None = None

    def __post_init__(self):
        self.preset, self.tiny = self.settings["preset"], self.settings["preset"] == "tiny"
        self.config = changed(PRESETS[self.preset], self.settings["set"].get("sizes", {}))

    def path(self, name: str) -> str:
        """A file in the run's folder."""
        return os.path.join(self.folder, name)

    def recipe(self, stage: str) -> Recipe:
        """The preset's recipe as --set changes it. Patience multiplies what is counted in steps."""
        recipe = changed(RECIPES[self.preset][stage], self.settings["set"].get(stage, {}))
        counted = {"steps", "warmup", "gan_start"} & asdict(recipe).keys()
        longer = {name: round(getattr(recipe, name) * recipe.patience) for name in counted}
        return replace(recipe, **{name: max(name != "gan_start", count) for name, count in longer.items()})

    def ar_config(self, tokens: SemTokConfig) -> ARConfig:
        """The transformer's sizes, for a tokenizer's tokens and the pictures' classes."""
        preset = AR_PRESETS[(self.settings["ar_size"] or "L") if self.preset == "paper" else self.preset]
        sizes = {name: getattr(tokens, name) for name in ("tokens", "bits", "causal")}
        sizes |= {"classes": len(self.train.classes)} if self.train else {}
        preset = replace(preset, spherical=tokens.quantizer == "bsq", **sizes)
        asked = self.settings["set"].get("sizes", {})
        return changed(preset, {name: asked[name] for name in AR_SIZES if name in asked})

    def described(self, stage: str) -> dict:
        """All that decides a stage's result, by name."""
        facts = {"preset": self.preset, "seed": self.settings["seed"]} | asdict(self.recipe(stage))
        facts |= asdict(self.config) if stage != "0" else {}
        return facts | (asdict(self.ar_config(self.config)) if stage == "ar" else {})

    def command(self, stage: str) -> str:
        """The command of another stage of this run; after the last, of sample.py."""
        usual, folder = self.folder == os.path.join("runs", "tiny"), shlex.quote(self.folder)
        if stage == "sample":
            label = min(1, len(self.train.classes) - 1)
            return f"python sample.py --class {label}{'' if usual else f' --run {folder}'}"
        several, there = launched()[1] > 1, os.environ.get("LOCAL_WORLD_SIZE", 1)
        start = f"torchrun --nproc_per_node={there}" if several else "python"
        return f"{start} train.py --stage {stage}{'' if usual else f' --out {folder}'}"

    def weights(self, *names: str) -> str:
        """The first of these names that is in the folder of weights; tiny has stage 0's. Raises UserError."""
        folder = self.path("standins") if self.tiny else self.settings["weights"]
        how = f"{self.command('0')} makes it" if self.tiny else "see .github/weights.md"
        for name in names:
            with contextlib.suppress(fid.UserError):
                return fid.find_weights(folder, name, "")
        name = names[-1 if self.preset == "paper" else 0]
        return fid.find_weights(folder, name, f"{PUBLISHED[name]}: {how}")

    def parent(self, stage: str) -> str:
        """The fingerprint of the result that a stage is made from, or "". UserError if it is missing."""
        scratch = stage == "1" or stage == "2" and self.recipe(stage).init == "scratch"
        before = "0" if scratch and self.tiny else None if scratch else {"2": "1", "ar": "2"}.get(stage)
        if before is None:
            return ""
        path = self.path(STAGES[before].result)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: make it first with {self.command(before)}")
        return TensorFiles(path).metadata.get("fingerprint", "")

    def check_parent(self, stage: str, path: str, parent: str) -> None:
        """UserError unless `path`, a result or a state, was made from the stage before as it is now."""
        if parent != self.parent(stage):
            again = f"{self.command(stage)} --overwrite makes it again"
            raise UserError(f"{path} was made from another result of the stage before: {again}")


def read_settings(path: str) -> dict:
    """A run's settings.json, or those of a new run where there is none. UserError for a damaged one."""
    if not os.path.exists(path):
        return NEW_RUN
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        texts = [text for part in found["set"].values() for text in part.values()]
        texts += [text for name in ("data", "pictures", "weights") if (text := found[name]) is not None]
        fits = found["preset"] in RECIPES and found["ar_size"] in (None, *AR_PRESETS)
        for part, values in found["set"].items():
            fits &= {*values} <= {*(TOKENIZER_SIZES + AR_SIZES if part == "sizes" else setting_names(part))}
        if not fits or type(found["seed"]) is not int or not {*map(type, texts)} <= {str}:
            raise ValueError("its entries are not those of a run")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or take another --out") from None


def open_run(args: argparse.Namespace) -> tuple[Run, list[str]]:
    """The run in --out, as its settings.json has it and this command changes it, and the stages to train.
    Raises UserError for a change of what was decided when a stage began."""
    path, order = os.path.join(args.out, "settings.json"), list(STAGES)
    old = read_settings(path)
    settings = old | {name: getattr(args, name) for name in NEW_RUN if getattr(args, name, None) is not None}
    settings["set"] = {part: dict(old["set"].get(part, {})) for part in ("sizes", *order)}
    begun = [stage for stage, kind in STAGES.items() if os.path.exists(os.path.join(args.out, kind.result))
             or saved_states(os.path.join(args.out, f"state-{stage}"))]

    # ---- what this command trains, and what --set reaches
    tiny, several = settings["preset"] == "tiny", args.stage == "all"
    scratch = args.changes.get("init", settings["set"]["2"].get("init")) == "scratch"
    stages = order[1 + scratch :] if several else [args.stage]
    first = stages[0] == "1" or scratch and stages[0] == "2"  # what reads tiny's stand-ins
    if tiny and (several or first and not os.path.exists(os.path.join(args.out, StandIns.result))):
        stages = ["0", *stages]
    asked = stages if several else [args.stage]  # a stage 0 that comes along has its own recipe
    for name, text in args.changes.items():
        reached = order[order.index(stages[0]) :] if name in FOR_ALL else asked
        for part in ["sizes"] if name in TOKENIZER_SIZES + AR_SIZES else reached:
            if part == "sizes" or name in setting_names(part):
                settings["set"][part][name] = text

    # ---- what has begun stays as it began
    run, before = Run(args.out, settings, args), Run(args.out, old, args)
    run.kept = tuple(s for s in begun if not args.overwrite or order.index(s) < order.index(stages[0]))
    for stage in run.kept if os.path.exists(path) else ():
        now = run.described(stage) if run.preset == before.preset else {"preset": run.preset}
        states = saved_states(run.path(f"state-{stage}")) if len(now) > 1 else []
        if states and (step := int(states[-1].rpartition("-")[2])) > now["steps"]:
            found = f"stage {stage} stands at step {step} of {now['steps']}"
            raise UserError(f"{found}: ask for more steps, or start again with --overwrite")
        for name, value in before.described(stage).items():
            if now[name] != value and name not in MAY_CHANGE:
                found = f"{args.out} has {name} {value}, and this command asks for {now[name]}"
                raise UserError(f"{found}: take another --out, or start stage {stage} again with --overwrite")
    if missing := set(stages) - RECIPES[run.preset].keys():
        raise UserError(f"stage {missing.pop()} makes tiny's stand-ins; {run.preset} reads published weights")
    if tiny and args.weights:
        raise UserError("--weights is for other presets: tiny makes its own networks, in the run's folder")
    if run.preset != "paper" and run.settings["ar_size"]:
        raise UserError(f"--ar-size {run.settings['ar_size']} is for --preset paper: leave it out")
    parts = launched()[1] * args.accumulate
    for stage in stages:
        if (size := run.recipe(stage).batch_size) % parts:
            found = f"stage {stage}'s batch of {size} does not divide by {parts}"
            raise UserError(f"{found}, the processes times --accumulate: change --batch-size")
    if run.config.image_size < 16:
        raise UserError(f"image_size {run.config.image_size} is too small: SSIM and LPIPS need 16 pixels")
    run.ar_config(run.config)
    return run, stages


# ------------------------------------------------------------------------ the perceptual judges of stage II

@torch.no_grad()
def random_twin(make) -> nn.Module:
    """A small random network for tiny, where a published one cannot be had. It judges edges and textures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):  # without He initialisation activations vanish at this depth
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class Judge:
    """A perceptual loss of Eq. 7: how a run loads its network, how tiny makes a small one, and the loss."""
    load: Callable[[Run], nn.Module]
    make_twin: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]  # network, output, pictures -> ()

    def network(self, run: Run) -> nn.Module:
        """The published network, or tiny's random twin."""
        return (random_twin(self.make_twin) if run.tiny else self.load(run)).to(run.device)


JUDGES = {
    "lpips": Judge(
        lambda run: fid.load_lpips(run.weights("vgg16-397923af"), run.weights("lpips_vgg")),
        lambda: fid.LPIPS(fid.VGG16Features(TINY_VGG), [torch.full((1, w, 1, 1), w**-0.5) for w in TINY_VGG]),
        lambda lpips, output, pictures: lpips(output, pictures).mean(),
    ),
    "resnet": Judge(  # on logits
        lambda run: fid.load_network(ResNet, run.weights("resnet50-0676ba61"), "torchvision's ResNet-50"),
        lambda: ResNet(*TINY_RESNET),
        lambda resnet, output, pictures: F.mse_loss(resnet(output).float(), resnet(pictures).float()),
    ),
}

# ------------------------------------------------ the stages: what each one is fed, its losses, what it shows

def compared(run: Run, redraw, rows: dict, caption: str) -> tuple[Image.Image, dict[str, float]]:
    """Ten held-out pictures and, below them, what `redraw` makes of them; PSNR and SSIM of 200."""
    shown, measured = (run.val.spread(count)[0] for count in (10, 200))
    made = redraw(torch.cat([shown, measured]).to(run.device)).cpu()
    sheet, made = picture_grid({"original": shown} | rows | {caption: made[: len(shown)]}), made[len(shown) :]
    metrics = {"psnr": fid.psnr, "ssim": fid.ssim}
    return sheet, {name: metric(made, measured).mean().item() for name, metric in metrics.items()}


def first_tokenizer(run: Run, stage: str, semantic_width: int) -> SemTok:
    """What a stage starts from: stage 1's tokenizer; or a new one, whose VAE and, from SD3.5, decoder are
    pretrained."""
    if stage == "2" and run.recipe("2").init == "stage1":
        return load_semtok(run.path("stage1.safetensors"), run.device)[0]
    vae, decoder = load_vae(run.weights("sd3.5_vae", "sd3.5_medium"), run.device), None
    config = replace(run.config, semantic_width=semantic_width, vae=vae.config)
    if run.preset == "paper":
        with torch.device("meta"):
            decoder = Decoder(config)
        load_sd35(decoder, run.weights("sd3.5_medium"), run.device)  # straight there: in float32 it is 9 GB
    return SemTok(config, vae, decoder)


class Pretraining(nn.Module):
    """Stage I, Eq. 6: flow matching through the tokens, entropy of the codes, alignment with SigLIP."""

    name, title, result = "1", "flow-matching pre-training", "stage1.safetensors"
    look_for = "samples should show each original's shape and colours"
    caption = "stage 1: 25-step sample"
    rows_before = {}  # of the preview

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.recipe, self.parent = run, run.recipe(self.name), run.parent(self.name)
        # Frozen networks stand in a dict, not among the submodules: never trained, averaged or saved. The
        # VAE is frozen too, but belongs to the tokenizer, and to its file.
        siglip = load_siglip(run.weights("siglip2-base-patch16-256"), run.device).requires_grad_(False)
        self.frozen = {"siglip": siglip}
        self.semtok = first_tokenizer(run, self.name, siglip.config.width)
        self.semtok.decoder.mask_tokens.requires_grad_(False)  # they are used in stage II only

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        return self.semtok.frozen_pass(to_signed(pictures), self.frozen["siglip"], rng)

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        return self.semtok.pretraining_losses(**rows, **shared, weights=self.recipe)

    def after_step(self, losses: dict[str, torch.Tensor]) -> None:
        self.semtok.clamp_temperature()

    def redraw(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> uint8, by 25 steps from fixed noise."""
        rng = key_generator(self.run.device, "look")
        return in_batches(lambda part: self.semtok.reconstruct(part, rng), pictures)

    @torch.no_grad()
    def look(self) -> tuple[Image.Image, dict[str, float]]:
        sheet, figures = compared(self.run, self.redraw, self.rows_before, self.caption)
        pictures = self.run.val.spread(64)[0].to(self.run.device)
        figures |= code_usage(codes_to_bits(self.semtok.encode(pictures)))
        return sheet, figures | self.held_out_losses()

    def held_out_losses(self) -> dict[str, float]:
        """The terms of the loss on a batch of held-out pictures, or as many as there are, each val_NAME. The
        random numbers are its own, and the same every time. The discriminator plays in training only."""
        (rank, world), device = ranks(), self.run.device
        batch = self.run.val.spread(self.recipe.batch_size)
        if not (count := len(batch[0]) // world):
            return {}
        batch = [tensor[rank * count : (rank + 1) * count].to(device) for tensor in batch]
        rows, shared = self.prepare(*batch, key_generator(device, "held out"), step=-1)
        parts = torch.arange(count, device=device).chunk(self.run.args.accumulate)  # in as little memory
        losses = [self.forward({n: tensor[part] for n, tensor in rows.items()}, shared) for part in parts]
        names = [name for name in losses[0] if name.endswith("loss")]
        means = torch.tensor([[float(each[name]) for name in names] for each in losses]).mean(0)
        return {f"val_{name}": mean for name, mean in zip(names, mean_over_ranks(means).tolist())}

    def export(self, metadata: dict[str, str]) -> None:
        write_model(self.run.path(self.result), "semtok-tokenizer", self.semtok, metadata)


class Refining(Pretraining):
    """Stage II, Eq. 7: from mask tokens to latents in one step, judged by pixels, and Eq. 6's other terms."""

    name, title, result = "2", "one-step refiner", "stage2.safetensors"
    look_for = "the refiner's row should have clean edges where stage 1 has grain"
    caption = "stage 2: refiner"

    def __init__(self, run: Run):
        super().__init__(run)
        if self.recipe.init == "stage1":
            pictures = run.val.spread(10)[0].to(run.device)
            self.rows_before = {Pretraining.caption: Pretraining.redraw(self, pictures)}
        self.semtok.start_refiner()
        self.semtok.decoder.requires_grad_(True)
        self.semtok.decoder.x_embedder.requires_grad_(False)  # unused: there are no noisy latents in stage II
        self.semtok.encoder.requires_grad_(not self.recipe.freeze_encoder)
        self.discriminator = Discriminator(*TINY_DISCRIMINATOR if run.tiny else ())
        names = JUDGES if self.recipe.perceptual == "all" else [self.recipe.perceptual]
        self.frozen |= {name: JUDGES[name].network(run) for name in names}
        self.judges = {name: functools.partial(JUDGES[name].loss, self.frozen[name]) for name in names}

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        pictures = to_signed(pictures)
        rows, shared = self.semtok.frozen_pass(pictures, self.frozen["siglip"])
        player = self.discriminator if step >= self.recipe.gan_start else None
        return rows | {"pictures": pictures}, shared | {"discriminator": player}

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        return self.semtok.refiner_losses(**rows, **shared, judges=self.judges, weights=self.recipe)

    def after_step(self, losses: dict[str, torch.Tensor]) -> None:
        super().after_step(losses)
        if "d_real" in losses:
            self.discriminator.remember(losses["d_real"], losses["d_fake"])

    def redraw(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> uint8, in one step."""
        return in_batches(self.semtok.reconstruct, pictures)


class Generating(nn.Module):
    """Section 3.3: the masked AR transformer on the tokens of stage II. Table 5: next-token prediction."""

    name, title, result = "ar", "masked AR", "ar.safetensors"
    look_for = "each picture should show its class at a glance"

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.recipe, self.parent = run, run.recipe("ar"), run.parent("ar")
        tokenizer, _ = load_semtok(run.path("stage2.safetensors"), run.device)
        self.frozen = {"tokenizer": tokenizer.requires_grad_(False)}
        self.ar = MaskedAR(run.ar_config(tokenizer.config))

    def prepare(self, bits: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        return self.ar.hide(bits, labels, rng, self.recipe.least_masked, self.recipe.class_dropout)

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        return self.ar.loss(**rows, **shared, smoothing=self.recipe.smoothing)

    def after_step(self, losses: dict[str, torch.Tensor]) -> None:
        pass  # nothing follows

    @torch.no_grad()
    def look(self) -> tuple[Image.Image, dict[str, float]]:
        tokenizer, config, device = self.frozen["tokenizer"], self.ar.config, self.run.device
        classes = torch.arange(min(20, config.classes), device=device)
        drawn = self.ar.generate(classes, cfg=config.guidance, generator=key_generator(device, "look"))
        pictures = tokenizer.to_pictures(bits_to_codes(drawn, config.spherical))
        sheet = picture_grid({"one sample of each class": pictures})
        pictures, labels = (tensor.to(device) for tensor in self.run.val.spread(500))
        bits = codes_to_bits(in_batches(tokenizer.encode, pictures))
        masked = self.ar.draw_masks(len(bits), self.recipe.least_masked, key_generator(device, "masks"))
        losses = self.ar.loss(bits, labels, masked, masked.sum(1).float().mean())
        return sheet, {"val_nll": losses["nll"].item(), "val_accuracy": losses["accuracy"].item()}

    def export(self, metadata: dict[str, str]) -> None:
        write_model(self.run.path(self.result), "semtok-ar", self.ar, metadata)


class StandIns(nn.Module):
    """Stage 0: small twins of the VAE and of SigLIP, under the published names, where those cannot be had.
    The VAE learns by reconstruction and KL, SigLIP's tower by the sigmoid loss against class names."""

    name, title, result = "0", "stand-ins", "standins/sd3.5_vae.safetensors"
    look_for = "the VAE's row should be as sharp as the originals"
    parent, frozen = "", {}

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.recipe, self.config = run, run.recipe("0"), PRESETS["tiny"]
        self.vae, self.siglip = VAE(self.config.vae), SigLIP(TINY_SIGLIP)
        self.class_names = nn.Embedding(len(run.train.classes), self.config.semantic_width)
        self.siglip_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.siglip_bias = nn.Parameter(torch.tensor([-2.0]))
        for name, layer in self.vae.named_modules():  # PyTorch's default gain learns brightness slowly
            if isinstance(layer, nn.Conv2d) and not name.endswith(("conv2", "proj_out")):  # these are 0
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
                nn.init.zeros_(layer.bias)
        log_variances = self.vae.encoder.conv_out.bias[self.config.vae.latent_channels :]
        nn.init.constant_(log_variances, -6)  # start with little noise
        nn.init.normal_(self.siglip.embeddings.position_embedding.weight, std=0.02)  # not 1

    @torch.no_grad()
    def prepare(self, pictures: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, step: int):
        pictures, (rank, world), config = to_signed(pictures), ranks(), self.config.vae
        # The VAE takes any size. It learns from every third picture: from quarters, in the end from all of it
        side, top, left = pictures.shape[-1], 0, 0
        if step < 0.8 * self.recipe.steps:
            side //= 2
            top, left = np.random.default_rng(step).integers(0, side + 1, 2)
        windows, latents = pictures[::3, :, top : top + side, left : left + side], side // config.factor
        shape = world * len(windows), config.latent_channels, latents, latents
        noise = torch.randn(shape, generator=rng, device=pictures.device).chunk(world)[rank]
        return {"pictures": pictures, "labels": labels, "windows": windows, "noise": noise}, {}

    def forward(self, rows: dict, shared: dict) -> dict[str, torch.Tensor]:
        windows, labels = rows["windows"], rows["labels"]
        moments = self.vae.encoder(windows.contiguous(memory_format=torch.channels_last))
        mean, log_variance = moments.chunk(2, 1)  # (B/3, latent channels, h, w) each
        log_variance = log_variance.clamp(-12, 4)
        reconstruction = self.vae.decoder(mean + (0.5 * log_variance).exp() * rows["noise"])
        kl_loss = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        image = F.normalize(self.siglip(rows["pictures"]).mean((2, 3)), dim=-1)  # (B, C)
        pairs = image @ F.normalize(self.class_names.weight, dim=-1).T  # (B, classes)
        pairs = self.siglip_scale.exp() * pairs + self.siglip_bias
        matches = F.one_hot(labels, pairs.shape[1]) * 2.0 - 1  # SigLIP: each pair is a yes or a no
        siglip_loss = -F.logsigmoid(matches * pairs).sum(1).mean()
        vae_loss = F.mse_loss(reconstruction, windows)
        losses = {"loss": vae_loss + siglip_loss + 1e-4 * kl_loss, "vae_loss": vae_loss, "kl_loss": kl_loss}
        return losses | {"siglip_loss": siglip_loss, "accuracy": (pairs.argmax(1) == labels).float().mean()}

    def after_step(self, losses: dict[str, torch.Tensor]) -> None:
        pass  # nothing follows

    @torch.no_grad()
    def look(self) -> tuple[Image.Image, dict[str, float]]:
        def redraw(pictures):
            return to_uint8(self.vae.decode(self.vae.encode(to_signed(pictures))))

        return compared(self.run, redraw, {}, "VAE")

    @torch.no_grad()
    def export(self, metadata: dict[str, str]) -> None:
        vae, siglip = VAE(self.config.vae), SigLIP(TINY_SIGLIP)
        for copy, trained in ((vae, self.vae), (siglip, self.siglip)):
            copy.load_state_dict({name: full(tensor) for name, tensor in trained.state_dict().items()})
        # With SD3.5's published scale these latents must have variance 1 too: the encoder's last layer is
        # divided by their deviation, the decoder's first multiplied.
        signed = to_signed(self.run.val.spread(200)[0])
        std = vae.encoder(signed).chunk(2, 1)[0].std((0, 2, 3)) * VAE.SCALE  # (channels,)
        for tensor in (vae.encoder.conv_out.weight, vae.encoder.conv_out.bias):
            tensor[: len(std)] /= std.view(-1, *[1] * (tensor.ndim - 1))
        vae.decoder.conv_in.weight *= std.view(1, -1, 1, 1)
        for tensor in (siglip.post_layernorm.weight, siglip.post_layernorm.bias):
            tensor *= 0.25  # larger features would outweigh the pixels in stage I
        if ranks()[0] == 0:
            digest = hashlib.sha256()
            for tensor in (*vae.state_dict().values(), *siglip.state_dict().values()):
                digest.update(tensor.numpy())
            metadata = metadata | {"fingerprint": digest.hexdigest()[:16]}
            tower = self.run.path("standins/siglip2-base-patch16-256")
            write_text(f"{tower}/config.json", '{"num_attention_heads": 2}')
            tensors = siglip.state_dict(prefix="vision_model.")
            write_tensors(f"{tower}/model.safetensors", tensors, metadata)
            write_tensors(self.run.path(self.result), vae.state_dict(), metadata)  # the last: it is finished


STAGES = {stage.name: stage for stage in (StandIns, Pretraining, Refining, Generating)}

# ----------------------------------------------------------------------------------------------------- engine

def wait_for_all() -> None:
    """Every process arrives here before any goes on."""
    if ranks()[1] > 1:
        dist.barrier()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, over float32 weights; on a CPU nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


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
    register_fsdp_forward_method(stage, "look")  # it gathers as forward does


def compile_blocks(stage: nn.Module) -> None:
    """torch.compile in place, under the old names: transformer blocks, and the frozen networks of a step."""
    vae = [stage.semtok.vae.encoder, stage.semtok.vae.decoder] if isinstance(stage, Pretraining) else []
    for network in (*blocks_of(stage), *stage.frozen.values(), *vae):
        network.compile(dynamic=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in one piece, any other as it is. All ranks must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def averaged(stage: nn.Module, average: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside `with`, a stage has its averaged weights, swapped with the live ones."""
    @torch.no_grad()
    def swap():
        for name, mean in average.items():
            live = stage.get_parameter(name)
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)

    swap()
    yield
    if hasattr(stage, "reshard"):
        stage.reshard()  # a pass without gradient leaves the root gathered
    swap()


@torch.no_grad()
def write_model(path: str, kind: str, model: nn.Module, metadata: dict[str, str]) -> None:
    """A checkpoint with its kind, sizes and fingerprint, by rank 0; all ranks call this to gather it."""
    tensors, digest = {}, hashlib.sha256()
    for name, tensor in model.state_dict().items():  # one by one: gathered at once they would fill a GPU
        tensor = full(tensor)
        if ranks()[0] == 0:
            tensors[name] = tensor.cpu().contiguous()
            if not tensors[name].isfinite().all():
                raise UserError(f"{name} is NaN or infinite: start again with --overwrite and a lower --lr")
            digest.update(tensors[name].numpy())
    if ranks()[0] == 0:
        sizes, fingerprint = json.dumps(asdict(model.config)), digest.hexdigest()[:16]
        write_tensors(path, tensors, metadata | {"format": kind, "config": sizes, "fingerprint": fingerprint})


def saved_states(folder: str) -> list[str]:
    """Training states in a folder, oldest first: folders of safetensors shards and a state.json."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(name[5:]), name) for name in names if re.fullmatch(r"step-\d+", name))
    return [os.path.join(folder, name) for _, name in steps]


def shard_sizes(state: str) -> dict[str, int]:
    """The bytes of every shard in a state's folder."""
    return {path.name: path.stat().st_size for path in sorted(Path(state).glob("*.safetensors"))}


def save_state(folder: str, step: int, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Write a training state, whole or not at all: each rank its shards, rank 0 `facts`. Two are kept."""
    path, (rank, world) = os.path.join(folder, f"step-{step:07d}"), ranks()
    part = path + ".part"
    writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=world == 1)
    except dcp.api.CheckpointException as error:
        shutil.rmtree(part, ignore_errors=True)  # it would keep a full disk full
        raise next(iter(error.failures.values()))[0] from None  # what the first rank met
    if rank == 0:
        for name in shard_sizes(part):
            flush(os.path.join(part, name))
        facts = facts | {"step": step, "bytes": shard_sizes(part)}
        write_text(os.path.join(part, "state.json"), json.dumps(facts))
        shutil.rmtree(path, ignore_errors=True)  # a damaged state of this step
        os.replace(part, path)
        flush(folder)
        for old in saved_states(folder)[:-2]:
            shutil.rmtree(old)
    wait_for_all()


def load_state(folder: str, tensors: dict[str, torch.Tensor]) -> dict:
    """Fill the tensors in place from the newest state that is whole; returns its facts, `step` among them.
    Raises UserError when there is none, and when its tensors are others."""
    (rank, world), chosen = ranks(), [None]
    for path in reversed(saved_states(folder) if rank == 0 else ()):
        try:
            facts = json.loads(Path(path, "state.json").read_text(encoding="utf-8"))
            if facts["bytes"] != shard_sizes(path) or int(facts["step"]) != int(path.rpartition("-")[2]):
                raise ValueError("a shard is cut, or its step is another")
            chosen = [(path, facts | {"skipped": int(facts["skipped"]), "parent": str(facts["parent"])})]
            break
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            print(f"falling back to the state before: {path} is not whole ({error})", file=sys.stderr)
    if world > 1:
        dist.broadcast_object_list(chosen)
    if chosen[0] is None:
        raise UserError(f"{folder} holds no whole training state to go on from: start again with --overwrite")
    path, facts = chosen[0]
    logging.disable(logging.ERROR)  # torch would print a traceback beside our sentence
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=world == 1)
    except dcp.api.CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path} is no state of this run ({reason}): start again with --overwrite") from None
    finally:
        logging.disable(logging.NOTSET)
    return facts


# --------------------------------------------------------------------------------------------------- training

BAD_STEPS = 5  # steps in a row that are not finite, after which a run stops


def make_optimizer(stage: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW. Weights of linear layers and convolutions decay; norms, biases, mask tokens and tables do not.
    Each group knows its peak rate and the step at which it joins. Moments are made now, not at the first
    step: a training state has the same tensors before and after the discriminator joins."""
    matrices = {layer.weight for layer in stage.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    members, state = {}, {}
    for name, p in stage.named_parameters():
        if p.requires_grad:
            player = "discriminator" if name.startswith("discriminator.") else ""
            members.setdefault((player, p in matrices), []).append(p)
            state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
            state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    rates = {"": {"rate": "lr", "peak": recipe.lr, "start": 0}}  # rate: its name in the log
    if isinstance(recipe, RefinerRecipe):
        rates["discriminator"] = {
            "rate": "lr_discriminator", "peak": recipe.discriminator_lr, "start": recipe.gan_start,
        }
    groups = [{"params": parameters, "weight_decay": recipe.weight_decay * decays} | rates[player]
              for (player, decays), parameters in members.items()]
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.95), fused=True)
    optimizer.state.update(state)
    return optimizer


class Training:
    """What stands between two steps of a stage: the stage, its data, its optimiser, its averages."""

    def __init__(self, name: str, run: Run):
        """Build all of it, and fill it from the last training state."""
        recipe, device, args = run.recipe(name), run.device, run.args
        torch.manual_seed(run.settings["seed"])
        stage, self.dataset = STAGES[name](run).to(device), run.train
        if name == "ar":  # before its networks are compiled
            self.dataset = Tokens(run, stage.frozen["tokenizer"], stage.parent, recipe.flip)
        for module in stage.modules():
            if hasattr(module, "checkpoint_activations"):
                module.checkpoint_activations = args.checkpoint_activations
        if args.compile:
            compile_blocks(stage)
        if ranks()[1] > 1:
            shard(stage, device)

        # ---- what is trained and averaged; state: live tensors by name, saved and filled in place
        self.run, self.stage, self.step, self.skipped, self.bad_in_a_row = run, stage, 0, 0, 0
        self.parameters = {n: p for n, p in stage.named_parameters() if p.requires_grad}
        self.optimizer, persistent = make_optimizer(stage, recipe), stage.state_dict()
        averages = [n for n in self.parameters if recipe.ema and not n.startswith("discriminator.")]
        self.average = {n: self.parameters[n].detach().clone() for n in averages}
        self.state = {f"buffers/{n}": buffer for n, buffer in stage.named_buffers() if n in persistent}
        self.state |= {f"ema/{n}": mean for n, mean in self.average.items()}
        for n, p in self.parameters.items():
            self.state |= {f"adam/{kind}/{n}": tensor for kind, tensor in self.optimizer.state[p].items()}
            self.state[f"weights/{n}"] = p

        # ---- where it stands
        folder = run.path(f"state-{name}")
        home = Path(os.path.realpath(folder)).parent
        if home != Path(os.path.realpath(run.folder)) and (home / "settings.json").exists():
            raise UserError(f"{folder} is a link into another run, {home}: remove the link")
        wait_for_all()  # all ranks decide before rank 0 touches a file
        if name in run.kept:
            facts = load_state(folder, self.state)
            run.check_parent(name, folder, facts["parent"])
            self.step, self.skipped = facts["step"], facts["skipped"]
        if ranks()[0] == 0:
            again, parts = name not in run.kept, Path(folder).glob("step-*.part")  # of a run that was killed
            for old in (*parts, *(saved_states(folder) if again else ())):
                shutil.rmtree(old)
            if again:
                Path(run.path(stage.result)).unlink(missing_ok=True)


def one_step(training: Training, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The algorithm: one step on this rank's part of a batch -> losses and gradient norms, by name."""
    run, stage, recipe, step = training.run, training.stage, training.stage.recipe, training.step
    accumulate = 1 if stage.name == "0" else run.args.accumulate  # stage 0's windows are fewer

    # ---- learning rates: a linear warm-up times a cosine, from the step at which a player joins
    for group in training.optimizer.param_groups:
        played, length = max(0, step - group["start"]), max(1, recipe.steps - group["start"])
        warm, cosine = min(1.0, (played + 1) / recipe.warmup), 0.5 * (1 + math.cos(math.pi * played / length))
        group["lr"] = group["peak"] * (warm * cosine)

    # ---- everything that needs no gradient, once for all micro-batches
    with autocast(run.device):
        batch = [tensor.to(run.device, non_blocking=True) for tensor in batch]
        rng = key_generator(run.device, run.settings["seed"], stage.name, step)
        rows, shared = stage.prepare(*batch, rng, step)

    # ---- micro-batches: gradients add up on each rank, and the last one averages them over the ranks
    parts = []
    for i in range(accumulate):
        if ranks()[1] > 1:
            stage.set_requires_gradient_sync(i == accumulate - 1)
        with autocast(run.device):
            out = stage({n: tensor.chunk(accumulate)[i] for n, tensor in rows.items()}, shared)
        (out["loss"] / accumulate).backward()
        parts.append({n: value.detach().float() for n, value in out.items()})
    losses = {n: torch.stack([part[n] for part in parts]).mean() for n in parts[0]}

    # ---- parts are clipped apart: the discriminator's large gradients must not shrink the tokenizer's
    clipped = {}
    for n, parameter in training.parameters.items():
        if parameter.grad is not None:
            clipped.setdefault(n.split(".")[0], []).append(parameter)
    for part, members in clipped.items():
        norm = full(nn.utils.get_total_norm([p.grad for p in members], foreach=True))
        nn.utils.clip_grads_with_norm_(members, 1.0, norm, foreach=True)
        losses[f"grad_norm_{part}"] = norm
    means = mean_over_ranks(torch.stack(list(losses.values())))  # one rank's NaN: all skip the step
    losses = dict(zip(losses, means.unbind()))

    # ---- the step, unless a loss or gradient is not finite
    good = bool(means.isfinite().all())
    if good:
        training.optimizer.step()
        stage.after_step(losses)
        if training.average:  # the decay grows, or a short run's average would stay near its initial weights
            decay = min(recipe.ema, (1 + step) / (10 + step))
            live = [training.parameters[n].detach() for n in training.average]
            torch._foreach_lerp_(list(training.average.values()), live, 1 - decay)
    training.optimizer.zero_grad(set_to_none=True)
    training.bad_in_a_row = 0 if good else training.bad_in_a_row + 1
    training.skipped += not good
    training.step += 1
    return losses


def is_finished(name: str, run: Run) -> bool:
    """Whether a stage has its result and no more steps are asked for. UserError for one of another parent."""
    result = run.path(STAGES[name].result)
    if name not in run.kept or not os.path.exists(result):
        return False
    about = TensorFiles(result).metadata
    run.check_parent(name, result, about.get("parent", ""))
    return int(about.get("steps", 0)) == run.recipe(name).steps


def train_stage(name: str, run: Run) -> None:
    """Train one stage from where it stands to its end. Raises UserError when it stops before."""
    recipe, device, (rank, world), started = run.recipe(name), run.device, ranks(), time.time()
    result, states, log = (run.path(file) for file in (STAGES[name].result, f"state-{name}", "log.jsonl"))
    say = print if rank == 0 else (lambda *_: None)
    if is_finished(name, run):
        return say(f"stage {name} is finished: {result}")
    say(f"stage {name}: {STAGES[name].title}, {recipe.steps} x {recipe.batch_size} on {world} x {device}")
    training = Training(name, run)
    stage, dataset, step = training.stage, training.dataset, training.step
    batches = DataLoader(
        dataset, num_workers=dataset.workers, persistent_workers=dataset.workers > 0,
        pin_memory=device.type == "cuda",  # so that copies overlap with steps
        batch_sampler=batches_from(step, len(dataset), recipe, run.settings["seed"]),
    )
    signals = []  # handled after the step under way

    def stopped() -> bool:  # whether one has reached any rank
        return bool(mean_over_ranks(torch.tensor(float(len(signals)))))  # a CPU tensor: no wait for the GPU

    def write_log(**entry):
        if rank == 0:
            with open(log, "a", encoding="utf-8") as file:
                print(json.dumps({"stage": name, "step": training.step} | entry), file=file)

    def look() -> dict[str, float]:  # at held-out pictures, with the averaged weights
        eager = torch.compiler.set_stance("force_eager")  # other batch sizes would fill the compiler's cache
        with averaged(stage, training.average), autocast(device), eager:
            picture, figures = stage.look()
        write_log(**figures)
        if rank == 0:
            write_picture(run.path(f"preview-{name}-{training.step:07d}.png"), picture)
        if figures.get("dead_bits") and training.step > recipe.warmup and rank == 0:
            text = f"{figures['dead_bits']} bits never change: raise lambda_q or lower --lr"
            tqdm.write(f"step {training.step}: codes collapse, {text}")
        return figures

    # ---- the loop: step, log, look, save
    bar = tqdm(batches, f"stage {name}", initial=step, total=recipe.steps, unit="step", disable=rank > 0)
    with bar, contextlib.ExitStack() as at_end:
        for kind in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(kind, lambda kind, _: signals.append(kind))
            at_end.callback(signal.signal, kind, before)
        since = time.time(), step
        for batch in bar:
            losses = one_step(training, batch)
            step, last = training.step, training.step == recipe.steps
            if training.bad_in_a_row == BAD_STEPS:
                broken = ", ".join(n for n, value in losses.items() if not value.isfinite())
                found = f"step {step}: {broken} not finite, and the {BAD_STEPS} last steps were skipped"
                raise UserError(f"{found}: the same command (no --overwrite) goes on, best with a lower --lr")
            if step % recipe.log_every == 0 or last:
                entry = {n: value.item() for n, value in losses.items()}
                entry |= {group["rate"]: group["lr"] for group in training.optimizer.param_groups}
                entry["skipped"] = training.skipped
                now = time.time()
                speed = (step - since[1]) / max(now - since[0], 1e-9)  # including previews and saving
                since = now, step
                write_log(**entry, images_per_s=speed * recipe.batch_size)
                bar.set_postfix(loss=entry["loss"])
            if step % recipe.preview_every == 0 and not last:
                look()
            ends = stopped()
            if step % recipe.save_every == 0 or last or ends:
                facts = {"parent": stage.parent, "skipped": training.skipped}
                save_state(states, step, training.state, facts)
            if ends:
                raise UserError(f"stopped at step {step}, saved: the same command (no --overwrite) goes on")

        # ---- the result
        figures = look()
        about = {"stage": name, "preset": run.preset, "classes": json.dumps(run.train.classes)}
        about |= {"parent": stage.parent, "steps": str(recipe.steps), "figures": json.dumps(figures)}
        about["pictures"] = run.train.fingerprint
        with averaged(stage, training.average):
            stage.export(about)
        if rank == 0:
            write_picture(run.path(f"curves-{name}.png"), draw_curves(log, name))
            for old in saved_states(states)[:-1]:  # the last one stays, for more steps later
                shutil.rmtree(old)
        ends = stopped()
    torch.compiler.reset()  # the next stage's blocks are others
    reached = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if not k.endswith("loss"))
    say(
        f"stage {name} done in {time.time() - started:.0f} s: {reached} on held-out pictures -> {result}\n"
        f"  look at {run.path(f'preview-{name}-{recipe.steps:07d}.png')}: {stage.look_for}\n"
        f"  and at {run.path(f'curves-{name}.png')}{worse_than_before(name, run, figures)}"
    )
    if ends:
        raise UserError(f"stopped after stage {name}, finished: the same command (no --overwrite) goes on")


def worse_than_before(name: str, run: Run, figures: dict[str, float]) -> str:
    """A line for a stage that ends worse than a coin, or than stage 1, on held-out pictures; or ""."""
    recipe, count, found = run.recipe(name), len(run.train), ""
    if figures.get("val_nll", 0) > math.log(2):
        found = "are predicted worse than by a coin, 0.693 nats a bit"
    elif name == "2" and os.path.exists(first := run.path("stage1.safetensors")):
        psnr = json.loads(TensorFiles(first).metadata.get("figures", "{}")).get("psnr", 0)
        found = f"are worse than stage 1's, {psnr:.4g} dB" if figures["psnr"] < psnr else ""
    seen = recipe.steps * recipe.batch_size / count
    advice = "take more pictures" if seen > 20 else "take more steps"
    found = found and f"\n  held-out pictures {found}"
    return found and f"{found}: {count} were trained on, {seen:.0f} times each; {advice}"


HEALTHY = {  # the range of a good run, green in its curves
    "flow_loss": (0, 1), "entropy_loss": (-math.inf, 0), "used": (0.9, 1), "imbalance": (0, 0.2),
    "nll": (0, math.log(2)),
}
# The order of curves: the loss, its terms, held-out pictures, codes; then norms, rates and speed
CURVES = "loss$", "(?!val_).*loss$|nll|accuracy|d_", "val_|psnr|ssim", "used|imbalance|dead_|.*entropy"


def draw_curves(log: str, stage: str) -> Image.Image:
    """What a stage wrote into log.jsonl: a panel for each number over the steps; val_NAME is in NAME's."""
    curves, begun = {"loss": {}}, 2**31  # name -> {step: value}
    # Backwards: the later line of a step counts, and none of what a stage had before it was taken up again
    for line in reversed(Path(log).read_bytes().splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # not ours
            entry = json.loads(line)
            if entry["stage"] == stage and 0 <= entry["step"] <= begun:
                begun = int(entry["step"])
                for name in entry.keys() - {"stage", "step", "skipped"}:
                    if type(value := entry[name]) in (int, float) and abs(value) < 1e30:  # NaN is not
                        curves.setdefault(name, {}).setdefault(begun, value)
    last = max([1, *(step for points in curves.values() for step in points)])

    names = [name for name in curves if len(curves[name]) > 1 or name == "loss"]
    names = [name for name in names if name.removeprefix("val_") not in names or name[:4] != "val_"]
    names.sort(key=lambda name: ([not re.match(kind, name) for kind in CURVES], name))
    sheet = Image.new("RGB", (5 * 280, -(-len(names) // 5) * 120), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        both = [sorted(curves.get(key, {}).items()) for key in (name, f"val_{name}")]
        values, left, top = [y for line in both for _, y in line] or [0], i % 5 * 280 + 68, i // 5 * 120 + 4
        low, high, ends = min(values), max(values), [f"{points[-1][1]:.5g}" for points in both if points]
        pen.text((left, top), f"{name}  {', held out '.join(ends)}", fill="black")

        def height(y):
            return top + 92 - 78 * (min(max(y, low), high) - low) / (high - low or 1)

        if name in HEALTHY and low <= HEALTHY[name][1] and high >= HEALTHY[name][0]:
            worst, best = map(height, HEALTHY[name])
            pen.rectangle((left, best, left + 206, worst), fill="honeydew")
        pen.rectangle((left, top + 14, left + 206, top + 92), outline="lightgrey")
        for points, colour in zip(both, ("steelblue", "darkorange")):
            pen.line([(left + 206 * x / last, height(y)) for x, y in points], fill=colour, width=2)
        for value, offset in ((high, 10), ((low + high) / 2, 48), (low, 85)):
            pen.text((left - 64, top + offset), f"{value:.6g}", fill="grey")
        pen.text((left, top + 93), f"step 0 to {last}", fill="grey")
    return sheet


# ---------------------------------------------------------------------------------------------------- command

def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of this file. Exits with code 2 and one sentence for what it does not know."""
    form = argparse.RawDescriptionHelpFormatter
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="train.py", description=title, formatter_class=form)
    files = (Path(__file__).with_name(f"{name}.py") for name in ("ar", "semtok", "train"))
    source = "".join(file.read_text("utf-8") for file in files)
    meanings = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))  # the comments behind the fields
    sizes = vars(AR_PRESETS["tiny"]) | vars(PRESETS["tiny"])
    values = {stage: sizes | vars(recipe) for stage, recipe in RECIPES["tiny"].items()}
    names = {stage: setting_names(stage) for stage in values}
    lines = [" " * 16 + "".join(f"{stage:<9}" for stage in values)]
    for name in dict.fromkeys(name for stage in names for name in names[stage]):
        cells = (f"{values[stage][name] if name in names[stage] else '':<9}" for stage in values)
        lines.append(f"{name:<16}{''.join(cells)}{meanings.get(name, '')}")
    parser.add_argument_group("--set NAME=VALUE, with tiny's values in each stage", "\n".join(lines))
    add = parser.add_argument
    add("--stage", required=True, choices=[*STAGES, "all"], help="what to train; all: every stage in order")
    add("--out", metavar="FOLDER", help="the run: results, previews, log and states (default: runs/PRESET)")
    remembered = parser.add_argument_group("settings of the run, which its folder remembers").add_argument
    remembered("--preset", choices=list(RECIPES), help="sizes and recipe (default: tiny)")
    remembered("--data", metavar="FOLDER", help="FOLDER/CLASS/picture.jpg; tiny draws shapes without it")
    remembered("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="as listed above")
    for name in ("steps", "batch_size", "lr"):
        about = {"metavar": "N", "help": f"short for --set {name}=N", "type": f"{name}={{}}".format}
        remembered("--" + name.replace("_", "-"), dest="set", action="append", **about)
    remembered("--ar-size", choices=["L", "XL", "XXL"], help="the paper preset's transformer (default: L)")
    remembered("--seed", type=number(int, 0, 2**53), help="of networks, order, noise and masks (default: 0)")
    remembered("--weights", metavar="FOLDER", help="other people's networks (default: weights)")
    add("--overwrite", action="store_true", help="start the stage again, in place of what is there")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--workers", type=number(int, 0, 1024), default=min(4, os.cpu_count()), help="read pictures")
    add("--accumulate", type=number(int, 1, 1024), default=1, metavar="N",
        help="split a batch into N micro-batches: less memory; the entropy loss is then of each")
    add("--checkpoint-activations", action="store_true", help="less memory, up to a third more work")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile networks (default: on CUDA)")
    args = parse_command(parser, arguments)

    args.out = os.path.normpath(args.out or os.path.join("runs", args.preset or "tiny"))
    for name in ("data", "weights"):  # later commands may come from another folder
        if (folder := getattr(args, name)) is not None:
            setattr(args, name, os.path.abspath(folder))
    args.changes = dict(text.partition("=")[::2] for text in args.set)
    named = STAGES if args.stage == "all" else [args.stage]
    known = sorted({name for stage in named for name in setting_names(stage)})
    for name in args.changes.keys() - known:
        near = "".join(f": did you mean {near}?" for near in difflib.get_close_matches(name, known, 1))
        parser.error(f"--set {name} changes nothing in stage {args.stage}{near}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError for what the person at the keyboard can mend."""
    args = parse_arguments(arguments)
    run, stages = open_run(args)
    data = run.settings["data"] or ""
    if data and Path(os.path.realpath(args.out)).is_relative_to(os.path.realpath(data)):
        raise UserError(f"--out {args.out} lies in the pictures' folder {data}: take another --out")
    if not run.tiny and not os.path.isdir(data):
        raise UserError("--data needs a folder, FOLDER/CLASS/picture.jpg: see .github/weights.md")
    run.parent(stages[0])
    world, run.device = launched()[1], choose_device(args.device)
    cuda = run.device.type == "cuda"
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    args.compile = cuda if args.compile is None else args.compile
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a state of one process
    with lock(args.out):
        seed, size = run.settings["seed"], run.config.image_size
        run.train, run.val = (Pictures(data, split, seed, size, args.workers) for split in DRAWN)
        found, recorded = run.train.fingerprint, run.settings["pictures"]
        if run.kept and not args.overwrite and recorded not in (None, found):
            raise UserError(f"{args.out} was begun with other pictures ({recorded}; now {found}): "
                            "give the same --data, take another --out, or start the stage again on these "
                            "with --overwrite")
        wait_for_all()  # every rank has read the settings
        if ranks()[0] == 0:
            content = json.dumps(run.settings | {"pictures": found}, indent=1)
            write_text(run.path("settings.json"), content + "\n")
        for stage in stages:
            train_stage(stage, run)
        if ranks()[0] == 0:
            print(f"next: {run.command({'0': '1', '1': '2', '2': 'ar', 'ar': 'sample'}[stage])}")
    if world > 1:
        dist.destroy_process_group()


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell -> exit code."""
    faults = UserError, fid.UserError, SafetensorError
    advice = "try --checkpoint-activations, --accumulate or more GPUs"
    return run_command("train.py", lambda: main(arguments), faults, advice)


if __name__ == "__main__":
    sys.exit(command_line())
