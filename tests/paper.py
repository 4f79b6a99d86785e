"""The paper's comparisons in the small world, by hand: what does each ingredient do?

    python tests/paper.py --seeds 0 1 2                       # every entry of ENTRIES; resumable
    python tests/paper.py table3 figure4 figure5              # some of them
    python tests/paper.py figure6 FOLDER --run runs/tiny      # do FOLDER/CLASS/picture form clusters?

An entry trains what it needs with train.py, at one thread a run, as many runs at once as there are cores.
The runs of a seed share its stage 0, as the paper has one VAE and one SigLIP, and what differs only later
starts from the default run of that seed. RESULTS.md and the pictures lie in --out, or with --publish in the
repository.

Scores are of pictures that no training saw: PSNR and SSIM of reconstructions, the share of samples that an
independent classifier recognises, and in the classifier's features Frechet distance (rFD of reconstructions,
gFD of samples), precision and recall; kNN is neighbour_accuracy in the encoder's tokens; likelihood is the
transformer's loss a bit on them, nats that on the pictures which train.py held out. For the last three
columns of locality see its function. Every number is the mean of the seeds, with half their range behind it.
"""

import argparse
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fid  # noqa: E402
import recognise  # noqa: E402
import sample  # noqa: E402
from bsq import codes_to_bits  # noqa: E402
from mmdit import TensorFiles, UserError  # noqa: E402
from semtok import (  # noqa: E402
    SemTok, SigLIP, in_batches, key_generator, load_semtok, load_siglip, picture_grid, run_command, to_signed,
    write_picture, write_tensors, write_text,
)
from train import read_settings, setting_names  # noqa: E402

COST = {"0": 40, "1": 60, "2": 90, "ar": 100, "score": 15}  # for the bar: about the seconds of each


@dataclass(frozen=True)
class Run:
    """A training: what --set changes, the stages it trains itself; earlier ones are the default run's.
    pictures: train on a folder of so many, those held out for its own curves counted."""

    changes: str = ""
    stages: tuple[str, ...] = ("1", "2", "ar")
    pictures: int = 0


RUNS = {
    "default": Run(),
    "neither": Run("distill=0 contrast=0"), "distill": Run("contrast=0"), "contrast": Run("distill=0"),
    "grid": Run("form=2d"), "raster": Run("causal=1"),
    "4 tokens": Run("tokens=4 bits=96"), "8 tokens": Run("tokens=8 bits=48"),
    "32 tokens": Run("tokens=32 bits=12"),
    "bits": Run("bits=40", ("1", "2")),
    "lfq": Run("quantizer=lfq", ("1", "2")),
    "lpips": Run("perceptual=lpips", ("2",)), "resnet": Run("perceptual=resnet", ("2",)),
    "scratch": Run("init=scratch", ("2",)),
    # as many FLOPs, by tests/plan.py, and as many steps as both stages have, and as many of them with the
    # discriminator
    "equal scratch": Run("init=scratch steps=1808 gan_start=1408", ("2",)),
    "long scratch": Run("init=scratch steps=2500 gan_start=2100", ("2",)),
    "groups": Run("group_bits=12", ("ar",)),
    **{f"{count} pictures": Run(pictures=count) for count in (30, 100, 300, 1000, 3000)},
}


@dataclass(frozen=True)
class Table:
    """Rows: name -> (run, scores, the paper's figures in the columns' order). The last is SemTok's choice.
    NONE stands for a figure that the paper does not have."""

    title: str
    columns: str
    paper: str  # what the paper calls the columns
    rows: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class Figure:
    """Scores of a run's samples while one option of sample.py runs through values."""

    title: str
    option: str
    values: tuple
    fixed: str = ""
    run: str = "default"


@dataclass(frozen=True)
class Sheet:
    """A picture of the first seed's runs, caption -> run, drawn by a function of caption -> folder."""

    title: str
    runs: dict[str, str]
    score: str  # what they are trained for
    draw: Callable[[dict[str, Path]], Image.Image]


def drawn(**options) -> str:
    """The name of a score of samples: sample.py's options."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


SAMPLES, REFINED, DIFFUSED, LIKELIHOOD, NONE = drawn(), "stage2", "stage1", "likelihood", math.nan
SCALES = (1, 2, 3, 5, 7, 9, 12, 16)
RECONSTRUCTION = "rFD PSNR SSIM", "rFID PSNR SSIM"
GENERATION = "gFD recognised precision recall", "gFID IS precision recall"
BOTH = "rFD PSNR gFD recognised", "rFID PSNR gFID IS"
# Figure 6 shows clusters and gives no number. The number of semantic losses stands for their order.
ALIGNED = "rFD PSNR gFD recognised kNN", "rFID PSNR gFID IS losses-in-Figure-6"
FORMS = "rFD PSNR gFD recognised precision recall nats", "- - gFID IS precision recall -"
LOCALITY, BUDGET = "zeroed swapped each all-swapped", "PSNR gFD recognised nats zeroed swapped"
FEWER = "PSNR likelihood recognised gFD recall"
SHOWN = ("ring", "star", "heart", "crescent", "arrow")  # classes of the sheets


def sampler_of(folder: Path, *options: str) -> sample.Sampler:
    """What draws the samples of a run, by sample.py's options."""
    return sample.Sampler(sample.parse_arguments(["--npz", "1", "--run", str(folder), *options]),
                          torch.device("cpu"))


def side_by_side(rows: dict[str, list[torch.Tensor]]) -> Image.Image:
    """Captioned rows of several parts, each (N, 3, H, W) uint8, with a white picture between two parts."""
    white = torch.full((1, *next(iter(rows.values()))[0].shape[1:]), 255, dtype=torch.uint8)
    parts = {name: [each for part in row for each in (white, part)][1:] for name, row in rows.items()}
    return picture_grid({name: torch.cat(part) for name, part in parts.items()}, side=64)


def draw_samples(folders: dict[str, Path]) -> Image.Image:
    """Figure 4: six samples of a class and a seed, of one run beside the other."""
    samplers = {caption: sampler_of(folder) for caption, folder in folders.items()}
    rows = {}
    for name in SHOWN:
        made = [s.draw([s.label(name)] * 6, key_generator("cpu", 0, name)) for s in samplers.values()]
        rows[f"{name}: {' / '.join(samplers)}"] = made
    return side_by_side(rows)


def draw_progress(folders: dict[str, Path]) -> Image.Image:
    """Figure 5: one sample of a class, from left to right, of one run beside the other."""
    samplers = {caption: sampler_of(folder, "--steps", "16") for caption, folder in folders.items()}
    rows = {}
    for name in SHOWN:
        parts = []
        for each in samplers.values():
            pictures, known = each.draw_steps([each.label(name)], key_generator("cpu", 0, name), "raster")
            parts.append(pictures[0])
        counts = ", ".join(map(str, known.values()))
        rows[f"{name}, raster order, {counts} tokens: {' / '.join(samplers)}"] = parts
    return side_by_side(rows)


def draw_influence(folders: dict[str, Path]) -> Image.Image:
    """Where each token acts: its mean change of 64 pictures when it is zeroed, the brightest place white."""
    rows = {}
    for caption, folder in folders.items():
        tokenizer, _ = load_semtok(str(folder / "stage2.safetensors"))
        maps = sample.token_maps(tokenizer, recognise.drawn("val", 98, range(64))[0])
        for i, row in enumerate(maps.split(16)):
            rows[f"{caption}, tokens {16 * i} to {16 * i + len(row) - 1}"] = row
    return picture_grid(rows, side=64)


def locality(tokenizer: SemTok, pictures: torch.Tensor) -> dict[str, float]:
    """The share of a token's change that lies in its largest 3 x 3 of 8 x 8 patches, mean over tokens.

    An even change has 9/64 = 0.14. `zeroed`: of the mean change of the pictures (N, 3, H, W) uint8 when the
    token is zeroed. `swapped`: when it becomes another picture's. `each`: zeroed, of each picture's own
    change. `all-swapped`, the control: when all tokens become another picture's."""
    codes = tokenizer.encode(to_signed(pictures))

    def share(changes):  # (M, H, W)
        patches = F.adaptive_avg_pool2d(changes[:, None], 8)
        largest = 9 * F.avg_pool2d(patches, 3, 1).amax((1, 2, 3))
        return (largest / patches.sum((1, 2, 3)).clamp_min(1e-9)).mean().item()

    zeroed, swapped = (torch.stack([*sample.influence(tokenizer, codes, instead)])  # (K, N, H, W)
                       for instead in (torch.zeros_like(codes), codes.roll(1, 0)))
    whole = (tokenizer.reconstruct(pictures).float() - tokenizer.reconstruct(pictures.roll(1, 0))).abs()
    return {"zeroed": share(zeroed.mean(1)), "swapped": share(swapped.mean(1)),
            "each": share(zeroed.flatten(0, 1)), "all-swapped": share(whole.mean((0, 1))[None])}


FORM = {"2D": "grid", "1D": "default"}
ENTRIES = {
    "table3": Table("Form of the tokens", *FORMS, {
        "2D (paper: VQGAN)": ("grid", (REFINED, SAMPLES), (NONE, NONE, 4.62, 254.1, 0.84, 0.49, NONE)),
        "1D, not aligned (FlowMo)":
            ("neither", (REFINED, SAMPLES), (NONE, NONE, 6.68, 280.4, 0.82, 0.45, NONE)),
        "1D, aligned (SemTok)":
            ("default", (REFINED, SAMPLES), (NONE, NONE, 2.77, 293.1, 0.78, 0.60, NONE)),
    }),
    "guidance2d": Figure("guidance scale of 2D tokens, linear schedule", "cfg", SCALES, run="grid"),
    "figure4": Sheet("Samples of both forms", FORM, SAMPLES, draw_samples),
    "figure5": Sheet("Both forms in raster order; an unknown token is its mean under the transformer, by class",
                     FORM, SAMPLES, draw_progress),
    "locality": Table("Share of a token's change in its largest 3 x 3 of 64 patches", LOCALITY, LOCALITY, {
        name: (run, (REFINED,), (NONE,) * 4) for name, run in {
            "2D": "grid", "1D, not aligned": "neither", "1D, 4 tokens": "4 tokens",
            "1D, 8 tokens": "8 tokens", "1D, 32 tokens": "32 tokens", "1D": "default",
        }.items()
    }),
    "maps": Sheet("Where each token acts", FORM | {"1D, 8 tokens": "8 tokens"}, REFINED, draw_influence),
    "budget": Table("The same 384 bits in 4 to 32 tokens", BUDGET, BUDGET, {
        "4 tokens of 96 bits": ("4 tokens", (REFINED, SAMPLES), (NONE,) * 6),
        "8 of 48": ("8 tokens", (REFINED, SAMPLES), (NONE,) * 6),
        "16 of 24": ("default", (REFINED, SAMPLES), (NONE,) * 6),
        "32 of 12": ("32 tokens", (REFINED, SAMPLES), (NONE,) * 6),
    }),
    "fewer": Table("How many pictures does training need?", FEWER, FEWER, {
        name: (run, (REFINED, LIKELIHOOD, SAMPLES), (NONE,) * 5) for name, run in
        ({name: name for name, run in RUNS.items() if run.pictures} | {"8192 pictures": "default"}).items()
    }),
    "table4": Table("Semantic alignment", *ALIGNED, {
        "neither": ("neither", (REFINED, SAMPLES), (1.08, 21.74, 3.83, 271.4, 0)),
        "contrast": ("contrast", (REFINED, SAMPLES), (0.97, 21.86, 2.87, 276.8, 1)),
        "distillation": ("distill", (REFINED, SAMPLES), (1.02, 21.79, 3.55, 264.9, 1)),
        "both": ("default", (REFINED, SAMPLES), (0.88, 22.19, 2.77, 293.1, 2)),
    }),
    "table5": Table("Masked or next-token prediction", *BOTH, {
        "raster": ("raster", (REFINED, SAMPLES), (1.22, 21.07, 3.08, 269.9)),
        "global": ("default", (REFINED, SAMPLES), (0.88, 22.19, 2.77, 293.1)),
    }),
    "table6": Table("Two stages; bits a token (paper: 32 and 18)", *RECONSTRUCTION, {
        "diffusion, 40 bits": ("bits", (DIFFUSED,), (1.03, 21.43, 0.633)),
        "refiner, 40 bits": ("bits", (REFINED,), (0.67, 23.05, 0.684)),
        "diffusion, 24 bits": ("default", (DIFFUSED,), (1.31, 20.48, 0.580)),
        "refiner, 24 bits": ("default", (REFINED,), (0.88, 22.19, 0.639)),
    }),
    "table10": Table("Quantiser", *RECONSTRUCTION, {
        "LFQ": ("lfq", (REFINED,), (1.32, 20.78, 0.564)),
        "BSQ": ("default", (REFINED,), (0.88, 22.19, 0.639)),
    }),
    "table11": Table("Perceptual loss", *RECONSTRUCTION, {
        "LPIPS": ("lpips", (REFINED,), (1.13, 22.73, 0.649)),
        "ResNet": ("resnet", (REFINED,), (0.89, 22.02, 0.622)),
        "LPIPS + ResNet": ("default", (REFINED,), (0.88, 22.19, 0.639)),
    }),
    "table12": Table("Generative pre-training", *RECONSTRUCTION, {
        "only stage 2": ("scratch", (REFINED,), (1.80, 20.54, 0.556)),
        "only stage 2, as much compute as both":
            ("equal scratch", (REFINED,), (1.80, 20.54, 0.556)),
        "only stage 2, as many steps as both":
            ("long scratch", (REFINED,), (1.80, 20.54, 0.556)),
        "stages 1 and 2": ("default", (REFINED,), (0.88, 22.19, 0.639)),
    }),
    "table13": Table("Bitwise classifier", *GENERATION, {
        "2 groups": ("groups", (SAMPLES,), (4.77, 251.4, 0.76, 0.48)),
        "bitwise": ("default", (SAMPLES,), (2.77, 293.1, 0.78, 0.60)),
    }),
    "table14": Table("Order of filling", *GENERATION, {
        "confidence": ("default", (drawn(order="confidence"),), (3.60, 246.8, 0.74, 0.62)),
        "random": ("default", (SAMPLES,), (2.77, 293.1, 0.78, 0.60)),
    }),
    "figure7": Figure("guidance scale, linear schedule", "cfg", SCALES),
    "figure8": Figure("guidance scale, constant schedule", "cfg", SCALES, "--cfg-schedule constant"),
    "figure9": Figure("sampling steps", "steps", (1, 2, 4, 8, 16)),
    "figure10": Figure("top-p", "top_p", (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)),
}


def needs(entry: Table | Figure | Sheet) -> list[tuple[str, str]]:
    """The scores that an entry shows, (run, score); a figure's in the order of its values."""
    if isinstance(entry, Figure):
        return [(entry.run, f"{entry.fixed} {drawn(**{entry.option: v})}".strip()) for v in entry.values]
    if isinstance(entry, Sheet):
        return [(run, entry.score) for run in entry.runs.values()]
    return [(run, score) for run, scores, _ in entry.rows.values() for score in scores]


def stages_of(run: str, scores: list[str]) -> list[str]:
    """The stages that a run trains itself for these scores: the transformer only for samples."""
    samples = any(score not in (REFINED, DIFFUSED) for score in scores)
    return [stage for stage in RUNS[run].stages if stage != "ar" or samples]


class Laboratory:
    """Trains and scores in a folder. Nothing is done twice; scores are kept by checkpoints' fingerprints."""

    def __init__(self, out: Path, count: int, patience: float, bar: tqdm):
        self.out, self.count, self.patience, self.bar = out, count, patience, bar
        self.file, self.lock = out / "scores.json", threading.Lock()
        self.scores = json.loads(self.file.read_text()) if self.file.exists() else {}

    def train(self, out: Path, seed: int, stage: str, changes: str) -> None:
        """train.py on one stage, unless it is finished. Its words go into train.log."""
        if stage != "0" and not (out / "standins").exists():
            shutil.copytree(self.out / f"default-{seed}" / "standins", out / "standins")
        fit = [text for text in changes.split() if text.partition("=")[0] in setting_names(stage)]
        options = ["--stage", stage, "--seed", str(seed), "--set", *fit, f"patience={self.patience}"]
        if count := RUNS[out.name.rpartition("-")[0]].pictures:
            options += ["--data", str(out / "pictures")]
            for i, picture in enumerate(recognise.drawn("train", seed, range(count))[0]):
                path = str(out / f"pictures/{i % 10}/{i:05d}.png")
                write_picture(path, picture_grid({"": picture[None]}, side=1))
        key = f"{out.name} {' '.join(options)}"
        if key not in self.scores:
            command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *options]
            with open(out / "train.log", "a") as log:
                single = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=single)
            if done.returncode:
                raise SystemExit(f"paper.py: {' '.join(command)} failed: see {out / 'train.log'}")
            self.keep(key, {})
        self.bar.update(COST[stage])

    def keep(self, key: str, scores: dict[str, float]) -> None:
        """Note what is done."""
        with self.lock:
            self.scores[key] = scores
            write_text(str(self.file), json.dumps(self.scores, indent=1))

    def run(self, name: str, seed: int, scores: list[str]) -> dict[tuple[str, str], dict[str, float]]:
        """Train a run as far as its scores need it; -> its scores by (run, score)."""
        out, own = self.out / f"{name}-{seed}", RUNS[name]
        out.mkdir(exist_ok=True)
        if name == "default":
            self.train(out, seed, "0", "")
        if own.stages[0] != "1" and "init=scratch" not in own.changes:
            before = f"stage{'2' if own.stages[0] == 'ar' else '1'}.safetensors"
            shutil.copyfile(self.out / f"default-{seed}" / before, out / before)
        for stage in stages_of(name, scores):
            self.train(out, seed, stage, own.changes)
        return {(name, score): self.score(out, seed, score) for score in scores}

    def prepare_judge(self) -> None:
        """The classifier and the held-out pictures (N, 3, 32, 32) that all scores share."""
        path = self.out / "judge.safetensors"
        if not path.exists():
            trained = recognise.classifier(*recognise.drawn("train", 99, range(8000))).state_dict()
            write_tensors(str(path), {name: tensor.contiguous() for name, tensor in trained.items()}, {})
        self.judge = recognise.network().requires_grad_(False).eval()
        self.judge.load_state_dict(load_file(path))
        self.pictures, self.labels = recognise.drawn("val", 98, range(self.count))
        self.features, _ = self.look(self.pictures)

    def look(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, 3, 32, 32) -> features (N, 96): the last maps' means; and the class that is seen (N,)."""
        flat = next(i for i, layer in enumerate(self.judge) if isinstance(layer, torch.nn.Flatten))
        maps = in_batches(self.judge[:flat], to_signed(pictures))
        return maps.mean((2, 3)), self.judge[flat:](maps).argmax(1)

    def distance(self, features: torch.Tensor) -> float:
        """Frechet distance to the held-out pictures' features."""
        statistics = ((f.double().mean(0), f.double().T.cov()) for f in (self.features, features))
        return fid.frechet_distance(*(value for pair in statistics for value in pair))

    @torch.no_grad()
    def score(self, out: Path, seed: int, what: str) -> dict[str, float]:
        """Scores of a run: of "stage1" or "stage2" on held-out pictures, else of samples by these options."""
        path = out / f"{what if what in (REFINED, DIFFUSED) else 'ar'}.safetensors"
        key = f"{out.name} {what} {self.count} {TensorFiles(str(path)).metadata['fingerprint']}"
        if key not in self.scores:
            if what == LIKELIHOOD:
                sampler, rng = sampler_of(out), key_generator("cpu", seed)
                bits = codes_to_bits(in_batches(sampler.tokenizer.encode, self.pictures))
                masked = sampler.ar.draw_masks(len(bits), 0, rng)
                losses = sampler.ar.loss(bits, self.labels, masked, masked.sum(1).float().mean())
                scores = {"likelihood": losses["nll"].item()}
            elif path.stem == "ar":
                sampler = sampler_of(out, *what.split())
                wanted = torch.arange(self.count) % len(sampler.classes)
                made = sampler.draw(wanted.tolist(), key_generator("cpu", seed))
                features, seen = self.look(made)
                right = (seen == wanted).float().mean().item()
                scores = {"gFD": self.distance(features), "recognised": right}
                scores |= zip(("precision", "recall"), fid.precision_recall(self.features, features))
                figures = json.loads(TensorFiles(str(path)).metadata["figures"])
                scores["nats"] = figures["val_nll"]
            else:
                tokenizer, rng = load_semtok(str(path))[0], torch.Generator().manual_seed(seed)
                rng = rng if what == DIFFUSED else None
                made = in_batches(lambda part: tokenizer.reconstruct(part, rng), self.pictures)
                scores = {"rFD": self.distance(self.look(made)[0])}
                for metric in (fid.psnr, fid.ssim):
                    scores[metric.__name__.upper()] = metric(made, self.pictures).mean().item()
                encoded = in_batches(lambda part: before_bits(tokenizer, part), self.pictures)
                scores["kNN"] = neighbour_accuracy(encoded.flatten(1), self.labels)
                scores |= locality(tokenizer, self.pictures[:64]) if what == REFINED else {}
            self.keep(key, scores)
        self.bar.update(COST["score"])
        return self.scores[key]


def verdict(ours: list[np.ndarray], paper: list[float]) -> str:
    """Does SemTok's row, the last, stand to each other row as in the paper? `ours`: each row's seeds."""
    if math.isnan(paper[-1]):
        return "-"
    found = []
    for row, published in zip(ours[:-1], paper[:-1]):
        difference, spread = ours[-1].mean() - row.mean(), (np.ptp(ours[-1]) + np.ptp(row)) / 2
        same = "as the paper" if (difference > 0) == (paper[-1] > published) else "opposite"
        found.append("within the spread" if abs(difference) <= spread else same)
    return ", ".join(found)


def markdown(name: str, table: Table, scores: dict) -> str:
    """A table's Markdown: our figures, the paper's in brackets, and the verdict on each column."""
    columns, published = table.columns.split(), [paper for _, _, paper in table.rows.values()]
    told = ["" if math.isnan(p) else f" ({name})" for name, p in zip(table.paper.split(), published[-1])]
    values = []  # of each row and column, its seeds
    for run, kinds, _ in table.rows.values():
        by_seed = zip(*(scores[run, kind] for kind in kinds))
        seeds = [{k: v for one in several for k, v in one.items()} for several in by_seed]
        values.append([np.array([seed[column] for seed in seeds]) for column in columns])
    lines = [f"**{name}: {table.title}**", "", "| | " + " | ".join(map("".join, zip(columns, told))) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for label, row, paper in zip(table.rows, values, published):
        cells = [f"{v.mean():.3g} ± {np.ptp(v) / 2:.2g}{'' if math.isnan(p) else f' ({p:g})'}"
                 for v, p in zip(row, paper)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    judged = [verdict([row[i] for row in values], [p[i] for p in published]) for i in range(len(columns))]
    last = [f"| last row against each | {' | '.join(judged)} |"] * (set(judged) != {"-"})
    return "\n".join([*lines, *last, ""])


def chart(figure: Figure, scores: dict) -> Image.Image:
    """A panel for each of gFD, recognised, precision, recall over the option's values: mean and range."""
    names, wide, high = ("gFD", "recognised", "precision", "recall"), 250, 190
    sheet = Image.new("RGB", (wide * len(names), high + 20), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), f"{figure.title}, ticks at the values that were run; bars: the seeds' range", "black")
    for number, name in enumerate(names):
        left, top, right, bottom = number * wide + 44, 40, (number + 1) * wide - 10, high - 16
        seeds = np.array([[one[name] for one in scores[key]] for key in needs(figure)])  # (values, seeds)
        low, top_value = seeds.min(), seeds.max()
        across = np.linspace(left + 6, right - 6, len(seeds))
        def height(value):
            return bottom - 6 - (value - low) / ((top_value - low) or 1) * (bottom - top - 12)
        pen.text((left, top - 14), name, fill="black")
        pen.rectangle((left, top, right, bottom), outline="grey")
        for value in (low, (low + top_value) / 2, top_value):
            pen.text((left - 40, height(value) - 6), f"{value:.3g}", fill="black")
            pen.line((left - 3, height(value), left, height(value)), fill="grey")
        for x, value, row in zip(across, figure.values, seeds):
            pen.text((x - 8, bottom + 4), f"{value:g}", fill="black")
            pen.line((x, height(row.min()), x, height(row.max())), fill="steelblue")
        pen.line([*zip(across, height(seeds.mean(1)))], fill="steelblue", width=2)
        pen.text(((left + right) / 2 - 20, bottom + 16), figure.option, fill="grey")
    return sheet


# ---------------------------------------------------------------------------------------- Figure 6


def features(tokenizer: SemTok, siglip: SigLIP, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What Figure 6 compares, of uint8 (B, 3, H, W): the encoder's tokens (B, K, width) just before their
    compression to bits; SigLIP's mean (B, C), which Eq. 2 aligns to; pixels (B, 3, 32, 32)."""
    signed = to_signed(pictures)
    return before_bits(tokenizer, pictures), siglip(signed).mean((2, 3)), F.adaptive_avg_pool2d(signed, 32)


def before_bits(tokenizer: SemTok, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> the encoder's tokens (B, K, width) just before their compression to bits."""
    before = []
    hook = tokenizer.encoder.to_bits.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    tokenizer.encode(to_signed(pictures))
    hook.remove()
    return before[0]


def neighbour_accuracy(features: torch.Tensor, labels: torch.Tensor, k: int = 5) -> float:
    """Leave-one-out: the share of rows (N, D) whose label (N,) their k nearest other rows vote for.
    Distances are Euclidean. Of classes with equal votes the nearest row's wins."""
    distances = torch.cdist(features, features).fill_diagonal_(math.inf)
    nearest = labels[distances.topk(k, largest=False).indices]  # (N, k)
    votes = F.one_hot(nearest) * (1 + 0.1 * 0.5 ** torch.arange(k))[:, None]  # (N, k, classes)
    return (votes.sum(1).argmax(1) == labels).float().mean().item()


def discriminants(features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """LDA: the plane in which classes lie farthest apart for their own spread. Every other row of features
    (N, D) decides it, and the rest are returned in it, (N // 2, 2): those that it was fitted to always look
    well apart. labels (N,) are sorted, so both halves have every class."""
    fitted = features[::2]
    components = torch.linalg.svd(fitted - fitted.mean(0), full_matrices=False)[2][:50]
    fitted, shown = ((half @ components.T).double() for half in (fitted, features[1::2]))  # (., 50)
    means = torch.stack([fitted[labels[::2] == label].mean(0) for label in labels.unique()])
    within = torch.cov((fitted - means[labels[::2]]).T)
    # Shrinkage: without it, directions win in which a few pictures happen to agree.
    within += (0.1 * torch.cov(fitted.T).diagonal().mean() + 1e-9) * torch.eye(len(within))
    directions = scipy.linalg.eigh(torch.cov(means.T).numpy(), within.numpy())[1]  # the best are the last
    return shown.numpy() @ directions[:, [-1, -2]]


def scatter_plot(panels: dict[str, np.ndarray], labels: torch.Tensor, names: list[str]) -> Image.Image:
    """Panels beside each other, title -> points (N, 2), coloured by labels (N,), of at most ten classes."""
    colours = "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 666666 bcbd22 17becf".split()
    sheet, dots = Image.new("RGB", (400 * len(panels), 460), "white"), []
    pen = ImageDraw.Draw(sheet)
    for left, (title, points) in zip(range(10, sheet.width, 400), panels.items()):
        places = (points - points.min(0)) / (np.ptp(points, 0) + 1e-9) * 370 + (left + 5, 40)
        dots += zip(places.tolist(), labels.tolist())
        pen.text((left, 8), title, "black", font_size=16)
    for label, name in enumerate(names):
        x = 15 + label * sheet.width // len(names)
        dots.append(((x, 440), label))
        pen.text((x + 9, 431), name[:12], "black", font_size=14)
    for (x, y), label in dots:
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), f"#{colours[label]}", "white")
    return sheet


@torch.no_grad()
def clusters(folder: Path, run: Path, out: Path, count: int) -> None:
    """Figure 6: classes in stage 2's encoder, in SigLIP and, as the control, in pixels.

    Prints `neighbour_accuracy` in each, draws `discriminants` of each. Pictures are of the first ten
    subfolders, `count` of each. Tokens stand side by side: the paper names no pooling, and in the tiny run
    their mean loses the class."""
    tokenizer, _ = sample.load(str(run), "stage2", torch.device("cpu"))
    settings = read_settings(str(run / "settings.json"))
    weights = run / "standins" if settings["preset"] == "tiny" else settings["weights"]
    siglip = load_siglip(fid.find_weights(str(weights), "siglip2-base-patch16-256", "SigLIP 2: see README"))
    pictures, labels, names = [], [], []
    for owner in sorted(path for path in folder.glob("[!.]*") if path.is_dir())[:10]:
        found = []
        for name in fid.list_pictures(str(owner))[:count]:
            try:
                found.append(sample.read(str(owner / name), tokenizer.config.image_size))
            except fid.UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if len(found) >= 6:
            labels += [len(names)] * len(found)
            names.append(owner.name)
            pictures += found
    if len(names) < 2:
        layout = "at least two classes, FOLDER/CLASS/picture.jpg, each of 6 pictures or more"
        raise UserError(f"{folder} has {len(names)} classes of 6 pictures: give {layout}")
    labels, panels = torch.tensor(labels), {}
    spaces = [features(tokenizer, siglip, batch) for batch in torch.stack(pictures).split(32)]
    for name, parts in zip(("encoder", "SigLIP", "pixels"), zip(*spaces)):
        space = torch.cat(parts).flatten(1)  # (N, D)
        title = f"{name}: 5 nearest neighbours {neighbour_accuracy(space, labels):.1%}"
        panels[title] = discriminants(space, labels)
    print(f"{len(labels)} pictures of {len(names)} classes", *panels, out, sep="\n")
    write_picture(str(out), scatter_plot(panels, labels[1::2], names))


def main() -> None:
    """The command of this file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("entries", nargs="*", metavar="ENTRY",
                        help=f"of {', '.join(ENTRIES)} (default: all of these); or figure6 FOLDER")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="figure6: the run to look into")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--n", type=int, default=1000, help="pictures and samples of each score")
    parser.add_argument("--patience", type=float, default=1.0, help="so many times the default run's steps")
    parser.add_argument("--publish", action="store_true", help="write tests/RESULTS.md and .github/ENTRY.png")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    args = parser.parse_args()
    if args.entries[:1] == ["figure6"]:
        if len(args.entries) != 2:
            raise UserError("figure6 needs one folder: python tests/paper.py figure6 FOLDER")
        return clusters(Path(args.entries[1]), args.run, args.run / "clusters.png", min(args.n, 200))
    args.out = args.out.resolve()  # train.py runs in the repository
    if unknown := [name for name in args.entries if name not in ENTRIES]:
        parser.error(f"{unknown[0]} is none of {', '.join(ENTRIES)}")
    names = args.entries or list(ENTRIES)
    wanted = list(dict.fromkeys(pair for name in names for pair in needs(ENTRIES[name])))
    groups = {run: [score for of, score in wanted if of == run] for run in RUNS}  # default comes first
    groups = {run: scores for run, scores in groups.items() if scores or run == "default"}

    args.out.mkdir(parents=True, exist_ok=True)
    seconds = [sum(map(COST.get, stages_of(run, of))) + COST["score"] * len(of) for run, of in groups.items()]
    total = (COST["0"] + sum(seconds)) * len(args.seeds)
    with tqdm(total=total, unit="s", desc="about") as bar, ThreadPoolExecutor(args.jobs) as pool:
        laboratory = Laboratory(args.out, args.n, args.patience, bar)
        laboratory.prepare_judge()
        torch.set_num_threads(1)  # from here on the runs are the parallelism
        jobs = {}

        def job(run, seed):
            if run != "default":
                jobs["default", seed].result()  # others start from its stages
            return laboratory.run(run, seed, groups[run])

        # The default runs are the first in the queue. The longest of the others start early.
        others = sorted(groups.keys() - {"default"}, key=lambda run: (-len(RUNS[run].stages), run))
        for run in ("default", *others):
            jobs |= {(run, seed): pool.submit(job, run, seed) for seed in args.seeds}
        scores = {}
        for done in jobs.values():
            for key, values in done.result().items():
                scores.setdefault(key, []).append(values)  # in the order of the seeds

    folder, pictures = (ROOT / "tests", ROOT / ".github") if args.publish else (args.out, args.out)
    seeds, parts = " ".join(map(str, args.seeds)), []
    for name in names:
        if isinstance(entry := ENTRIES[name], Table):
            parts.append(markdown(name, entry, scores))
            continue
        folders = {caption: args.out / f"{run}-{args.seeds[0]}" for caption, run in
                   (entry.runs.items() if isinstance(entry, Sheet) else ())}
        drawing = entry.draw(folders) if isinstance(entry, Sheet) else chart(entry, scores)
        write_picture(str(pictures / f"{name}.png"), drawing)
        link = os.path.relpath(pictures / f"{name}.png", folder)
        parts.append(f"**{name}: {entry.title}**\n\n![{entry.title}]({link})\n")
    command = f"python tests/paper.py {' '.join(args.entries)} --seeds {seeds}".replace("  ", " ")
    command += f" --patience {args.patience:g}" * (args.patience != 1)
    head = (f"Written by `{command}`, {datetime.date.today()}.\n\n{args.n} held-out pictures or samples "
            f"each; mean of the seeds {seeds} ± half their range; in brackets the paper's figures.\n")
    write_text(str(folder / "RESULTS.md"), "\n".join(["# The small world's results\n", head, *parts]))
    print(folder / "RESULTS.md")


if __name__ == "__main__":
    sys.exit(run_command("paper.py", main, (UserError, fid.UserError), "lower --n"))
