"""Use a trained SemTok: pictures of a class, a photo through the tokenizer, sets of samples for evaluation.

    python sample.py --class 1              # a grid of pictures of class 1, from runs/tiny
    python sample.py --labels 0 star 7      # several classes
    python sample.py --class 4 --progress   # decoded after 1, 2, 4, ... steps, in random and raster order
    python sample.py --image A.jpg B.jpg    # original | stage-1 sample | stage-2 refiner, a row each
    python sample.py --image A.jpg --tokens # where each token acts
    python sample.py --image A.jpg --keep 8 --class star    # 8 tokens of a picture, the rest drawn anew
    python sample.py --npz 50000            # class-balanced pictures in ADM's format, for fid.py
    python sample.py --reconstruct FOLDER   # every picture of a folder through the tokens, for fid.py --pairs

Section 3.3 and appendix A.2, "Inference". The checkpoints hold sizes and class names: only --run is needed.

    labels (B,) -> ar.generate_steps -> bits (B, K, d) -> refiner -> VAE -> uint8 (B, 3, H, W)
    uint8 (B, 3, H, W) -> SemTok.reconstruct -> uint8 (B, 3, H, W)

`torchrun --nproc_per_node=N -- sample.py ...` divides --npz and --reconstruct among N processes.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import fid
from ar import load_ar
from bsq import bits_to_codes, codes_to_bits, index_to_bits
from mmdit import UserError
from semtok import (
    SemTok, choose_device, in_batches, key_generator, launched, load_semtok, lock, number, parse_command,
    picture_grid, run_command, target_of, write_file, write_picture, write_text,
)

def load(run: str, name: str, device: torch.device, before: dict | None = None) -> tuple[nn.Module, dict]:
    """The model "stage1", "stage2" or "ar" of a run, and its metadata. before: the metadata of the result
    that it must have been made from. Raises UserError for a missing file, and if it was made from another."""
    path = os.path.join(run, f"{name}.safetensors")
    command = f"python train.py --stage {name.removeprefix('stage')}"
    if os.path.normpath(run) != os.path.join("runs", "tiny"):
        command += f" --out {shlex.quote(run)}"
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: make it with {command} (--stage all makes everything)")
    model, metadata = (load_ar if name == "ar" else load_semtok)(path, device)
    if before and metadata["parent"] != before["fingerprint"]:
        earlier = {"ar": "stage2", "stage2": "stage1"}[name]
        raise UserError(f"{path} was made from another {earlier}.safetensors than the one beside it: "
                        f"{command} --overwrite makes it again")
    return model, metadata


class Sampler:
    """The AR transformer and the refiner of a run, ready to draw by the options of a command."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.device, self.batch_size = device, args.batch_size
        self.tokenizer, about = load(args.run, "stage2", device)
        self.ar, metadata = load(args.run, "ar", device, about)
        self.classes, config = json.loads(metadata["classes"]), self.ar.config
        ordered = args.order not in (None, "raster")
        if config.causal and (args.steps not in (None, config.tokens) or ordered or args.compile):
            raise UserError(
                f"ar.safetensors in {args.run} predicts the next token: it takes {config.tokens} steps from "
                "left to right, each on one token more, so leave out --steps, --order and --compile"
            )
        self.options = {
            "steps": args.steps or config.steps, "cfg": config.guidance if args.cfg is None else args.cfg,
            "cfg_schedule": args.cfg_schedule, "top_p": args.top_p,
            "order": args.order or ("raster" if config.causal else "random"),
        }
        cuda = device.type == "cuda"
        half = cuda if args.bfloat16 is None else args.bfloat16
        if half:
            self.ar.bfloat16()
            self.tokenizer.decoder.bfloat16()
            self.tokenizer.vae.decoder.bfloat16()
        if args.compile or (args.compile is None and cuda and args.npz and not config.causal):
            # All steps have the same shapes, so one CUDA graph serves them. Small batches would else wait for
            # Python to launch their kernels.
            self.ar.hidden = torch.compile(self.ar.hidden, mode="reduce-overhead", dynamic=False)
        self.settings = self.options | {  # all that decides the pictures of a set
            "seed": args.seed, "batch_size": args.batch_size, "bfloat16": half, "device": device.type,
            "ar": metadata["fingerprint"], "tokenizer": about["fingerprint"],
        }

    def label(self, text: str) -> int:
        """A class by number or name. Raises UserError with the range and the names."""
        if text in self.classes:
            return self.classes.index(text)
        if text.isdecimal() and len(text) < 10 and int(text) < len(self.classes):
            return int(text)
        if text.casefold() in (folded := [name.casefold() for name in self.classes]):
            return folded.index(text.casefold())
        names, last = ", ".join(self.classes[:20]), len(self.classes) - 1
        raise UserError(f"class {text} does not exist here: give 0 to {last}, or a name such as {names}")

    def draw(self, labels: list[int], random: torch.Generator, progress: bool = False) -> torch.Tensor:
        """One picture for each label, in batches: (B, 3, H, W) uint8 on the CPU."""
        pictures, total = [], min(self.options["steps"], self.ar.config.tokens)
        for batch in torch.tensor(labels, device=self.device).split(self.batch_size):
            steps = self.ar.generate_steps(batch, generator=random, **self.options)
            for bits, _ in tqdm(steps, "sampling", total, unit="step", disable=not progress, leave=False):
                pass
            codes = bits_to_codes(bits, self.ar.config.spherical)
            pictures.append(self.tokenizer.to_pictures(codes).cpu())
        return torch.cat(pictures)

    @torch.no_grad()
    def draw_steps(self, labels: list[int], random: torch.Generator, order: str) -> tuple[torch.Tensor, dict]:
        """Figure 5: a picture for each label after 1, 2, 4, ... steps and the last: (B, S, 3, H, W) uint8.
        Also each of these steps' number of known tokens. A token that is still masked is decoded as the mean
        of its code under the transformer. A next-token model looks one token ahead only: there it is zero."""
        pictures, known, config = [], {}, self.ar.config
        group = torch.arange(2**config.group_bits, device=self.device)
        group = bits_to_codes(index_to_bits(group, config.group_bits), spherical=False)  # (2^g, g) of +-1
        for batch in torch.tensor(labels, device=self.device).split(self.batch_size):
            steps = self.ar.generate_steps(batch, generator=random, **self.options | {"order": order})
            shown = []
            for step, (bits, masked) in enumerate(steps, 1):
                if step & (step - 1) == 0 or not masked.any():  # a power of two, or the last
                    known[step] = int((~masked[0]).sum())
                    codes = bits_to_codes(bits, config.spherical)
                    mean = torch.zeros_like(codes)
                    if not config.causal:
                        odds = self.ar(bits, batch, masked).softmax(-1)  # (B, K, d / g, 2^g)
                        mean = ((odds @ group).flatten(-2) * codes.abs().amax()).to(codes.dtype)
                    codes = torch.where(masked[..., None], mean, codes)
                    shown.append(self.tokenizer.to_pictures(codes).cpu())
            pictures.append(torch.stack(shown, 1))
        return torch.cat(pictures), known


def class_grid(args: argparse.Namespace, device: torch.device) -> str:
    """`--class` and `--labels`: n pictures of each class, with `--progress` a row each; returns the path."""
    sampler = Sampler(args, device)
    labels = list(dict.fromkeys(sampler.label(text) for text in args.labels or [vars(args)["class"]]))
    count = args.n or (2 if args.progress else 16 if len(labels) == 1 else 8)
    if len(labels) * count > (256 if args.progress else 4096):
        raise UserError(f"{len(labels) * count:,} pictures are no grid to look at: lower --n, or use --npz")
    every = [label for label in labels for _ in range(count)]
    rows, both = {}, args.progress and not args.order and not sampler.ar.config.causal
    for order in ("random", "raster") if both else (sampler.options["order"],):
        random, told = key_generator(device, args.seed), ""
        if args.progress:
            pictures, known = sampler.draw_steps(every, random, order)
            columns = (f"step {step}: {tokens}" for step, tokens in known.items())
            told = f", {order} order: tokens known after\n{' | '.join(columns)}"
        else:
            pictures = sampler.draw(every, random, progress=True)
        for label, block in zip(labels, pictures.split(count)):
            for i, row in enumerate(block if args.progress else block.split(8)):
                # captions are dict keys, so blank ones differ in length
                rows[" " * len(rows) if i else f"{label}: {sampler.classes[label]}{told}"] = row
    asked = re.sub(r"[^\w-]+", "_", "-".join(args.labels or [vars(args)["class"]]))[:100]
    name = f"class-{asked}{'-progress' * args.progress}-seed-{args.seed}.png"
    path = args.out or os.path.join(args.run, name)
    write_picture(path, picture_grid(rows))
    return path


def read(path: str, size: int) -> torch.Tensor:
    """A picture file -> (3, size, size) uint8. Raises fid.UserError."""
    return torch.from_numpy(fid.read_picture(path, size)).permute(2, 0, 1)


def photo(args: argparse.Namespace, device: torch.device) -> str:
    """`--image` (Figures 3, 11): original | stage-1 sample | stage-2 refiner; returns the picture's path."""
    first, about = load(args.run, "stage1", device)
    second, about = load(args.run, "stage2", device, about)
    rows, steps = {}, args.steps or 25
    if " drawn," in about.get("pictures", ""):
        print("this tokenizer has seen the shapes alone that train.py draws: a photo keeps little more than "
              "its colours", file=sys.stderr)
    for path in args.image:
        picture = read(path, first.config.image_size)[None].to(device)
        sampled = first.reconstruct(picture, key_generator(device, args.seed), steps)
        caption = f"{len(rows) + 1}. {Path(path).name}\noriginal | stage 1, {steps} steps | stage 2, refiner"
        rows[caption] = torch.cat([picture, sampled, second.reconstruct(picture)])
    return write_sheet(args, rows)


def write_sheet(args: argparse.Namespace, rows: dict[str, torch.Tensor], what: str = "") -> str:
    """Write the sheet that --image asks for, named by its first photo and its folder; returns the path."""
    name = "-".join(Path(args.image[0]).absolute().with_suffix("").parts[-2:]).strip("/-")
    out = args.out or os.path.join(args.run, f"image-{name}{what}.png")
    write_picture(out, picture_grid(rows, side=256))
    return out


def complete(args: argparse.Namespace, device: torch.device) -> str:
    """`--image --keep N --class C`: each photo | N of its tokens | four completions; returns the path."""
    sampler, rows = Sampler(args, device), {}
    tokenizer, config = sampler.tokenizer, sampler.ar.config
    if config.causal:
        raise UserError(f"ar.safetensors in {args.run} predicts the next token: --keep needs a masked one")
    if args.keep >= config.tokens:
        raise UserError(f"--keep {args.keep} leaves nothing to draw: keep fewer than {config.tokens} tokens")
    label = torch.tensor([sampler.label(vars(args)["class"])] * 4, device=device)
    for path in args.image:
        random = key_generator(device, args.seed, len(rows))
        picture = read(path, tokenizer.config.image_size)[None].to(device)
        codes = tokenizer.encode(picture)  # (1, K, d)
        masked = torch.rand(codes.shape[:2], generator=random, device=device).argsort(-1) >= args.keep
        start = codes_to_bits(codes).expand(4, -1, -1), masked.expand(4, -1)
        bits = sampler.ar.generate(label, generator=random, known=start, **sampler.options)
        alone = codes.masked_fill(masked[..., None], 0)
        every = torch.cat([codes, alone, bits_to_codes(bits, config.spherical)])
        told = f"all tokens | {args.keep} of them | the others drawn: {sampler.classes[int(label[0])]}"
        made = torch.cat([picture, tokenizer.to_pictures(every)])
        rows[f"{len(rows) + 1}. {Path(path).name}\noriginal | {told}"] = made
    return write_sheet(args, rows, f"-keep-{args.keep}")


def show_tokens(args: argparse.Namespace, device: torch.device) -> str:
    """`--image --tokens`: a map for each token of where it acts on these photos; returns the path."""
    tokenizer, _ = load(args.run, "stage2", device)
    pictures = torch.stack([read(path, tokenizer.config.image_size) for path in args.image])
    maps = token_maps(tokenizer, pictures.to(device))
    side = math.ceil(len(maps) ** 0.5)
    told = f"where each of {len(maps)} tokens acts, mean of {len(pictures)} pictures, brightest place white"
    rows = {told * (i == 0) or " " * i: row for i, row in enumerate(maps.split(side))}
    return write_sheet(args, rows, "-tokens")


def influence(tokenizer: SemTok, codes: torch.Tensor, instead: torch.Tensor) -> Iterator[torch.Tensor]:
    """What does one token do? For each token k in turn, codes[:, k] becomes instead[:, k], both (N, K, d).
    Yields how far each pixel of the refiner's pictures moves: (N, H, W), mean over colours, 0..255."""
    def pictures(codes):
        return in_batches(tokenizer.to_pictures, codes).float()

    whole = pictures(codes)
    for token in range(codes.shape[1]):
        edited = codes.clone()
        edited[:, token] = instead[:, token]
        yield (pictures(edited) - whole).abs().mean(1)


def token_maps(tokenizer: SemTok, pictures: torch.Tensor) -> torch.Tensor:
    """Where each token acts: the mean change of pictures (N, 3, H, W) when it is zeroed, its brightest place
    white: (K, 3, H, W) uint8."""
    codes = tokenizer.encode(pictures)
    maps = torch.stack([change.mean(0) for change in influence(tokenizer, codes, torch.zeros_like(codes))])
    maps = 255 * maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-9)
    return maps.to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def claim(folder: str, settings: dict) -> None:
    """Write the settings of a command into a folder's settings.json. Only the same command goes on in it.

    Raises UserError when it holds files of other settings, or of unknown ones."""
    path, text = Path(folder, "settings.json"), json.dumps(settings, sort_keys=True)
    held = {*os.listdir(folder)} - {".lock"} if os.path.isdir(folder) else ()
    if all(name.startswith(f"{path.name}.") for name in held):  # empty, or being written
        write_text(str(path), text)
    if not path.is_file() or path.read_text() != text:
        raise UserError(f"{folder} holds files made with other settings: delete it, or choose another --out")


def npz(args: argparse.Namespace, device: torch.device) -> str:
    """`--npz`: N class-balanced pictures as ADM's `arr_0` (N, H, W, 3) uint8; returns the file's path.

    Parts of 500 lie in OUT.parts until all are there, so the same command goes on after an interruption."""
    sampler, (rank, world, _) = Sampler(args, device), launched()
    path = args.out or os.path.join(args.run, f"samples-{args.npz}.npz")
    folder, side = f"{path}.parts", sampler.tokenizer.config.image_size
    with lock(folder):  # another command of the same name would take the parts away
        claim(folder, sampler.settings | {"n": args.npz})
        labels = (np.arange(args.npz) % len(sampler.classes)).tolist()  # balanced
        parts = {Path(folder, f"{i:09d}.rgb"): labels[i : i + 500] for i in range(0, args.npz, 500)}

        def is_whole(file):
            return file.is_file() and file.stat().st_size == len(parts[file]) * side * side * 3

        mine = list(enumerate(parts))[rank::world]
        for i, file in tqdm(mine, "sampling", unit="x500", disable=rank > 0):
            if not is_whole(file):
                pictures = sampler.draw(parts[file], key_generator(device, args.seed, i), progress=rank == 0)
                content = pictures.permute(0, 2, 3, 1).numpy().tobytes()
                write_file(str(file), lambda temporary, content=content: Path(temporary).write_bytes(content))

        def join(temporary):
            with zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (args.npz, side, side, 3)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for file in parts:
                        with open(file, "rb") as pictures:
                            shutil.copyfileobj(pictures, member)

        if rank == 0:
            left, since = 0, time.time()
            while missing := [file for file in parts if not is_whole(file)]:
                if len(missing) != left:
                    left, since = len(missing), time.time()
                    print(f"waiting for {left} parts of the other processes", file=sys.stderr)
                if time.time() - since > 3600:
                    raise UserError(f"the other processes made none of {left} missing parts in an hour: "
                                    "the same command makes what is missing")
                time.sleep(0.2)
            write_file(path, join)
            shutil.rmtree(folder)
    return path


def reconstruct(args: argparse.Namespace, device: torch.device) -> str:
    """`--reconstruct`: every picture below a folder through tokens and refiner; returns the results' folder.

    They are PNGs under the same relative paths. Batches that are there already are not made again."""
    (tokenizer, metadata), (rank, world, _) = load(args.run, "stage2", device), launched()
    source, size = Path(args.reconstruct), tokenizer.config.image_size
    out = args.out or os.path.join(args.run, "reconstructions")
    if Path(out).resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies in the folder that --reconstruct reads: choose another --out")
    targets, bad = {}, []
    for name in fid.list_pictures(args.reconstruct):
        path, target = source / name, Path(out, name).with_suffix(".png")
        if target in targets:  # fid.py --pairs could not tell them apart either
            raise UserError(f"{targets[target]} and {path} would both become {target}: rename one")
        targets[target] = path
    if not targets:
        raise UserError(f"--reconstruct {source} holds no pictures: give a folder of JPEG or PNG files")
    claim(out, {"tokenizer": metadata["fingerprint"], "pictures": str(source.resolve())})
    batches = [list(targets)[i : i + 32] for i in range(0, len(targets), 32)]
    mine = batches[rank::world]
    for batch in tqdm(mine, "reconstructing", unit="x32", disable=rank > 0):
        if all(target.exists() for target in batch):
            continue
        pictures = {}
        for target in batch:
            try:
                pictures[target] = read(str(targets[target]), size)
            except fid.UserError as error:
                bad.append(str(error))
        if pictures:
            outputs = tokenizer.reconstruct(torch.stack(list(pictures.values())).to(device))
            for target, output in zip(pictures, outputs):
                write_picture(str(target), picture_grid({"": output[None]}, side=size))
    if bad and len(bad) == sum(map(len, mine)):
        raise UserError(f"none of the {len(bad)} pictures can be read: {bad[0]}")
    if bad:
        print(f"skipped {len(bad)} of {sum(map(len, mine))} pictures: {'; '.join(bad[:3])}", file=sys.stderr)
    return out


# ------------------------------------------------------------------------------------------------ the command

JOBS = {
    "keep": complete, "tokens": show_tokens,  # with others
    "class": class_grid, "labels": class_grid, "image": photo, "npz": npz, "reconstruct": reconstruct,
}
WITH = {"keep": {"keep", "image", "class"}, "tokens": {"tokens", "image"}}
DRAWING = ("class", "labels", "npz", "keep")
USED_BY = {  # the jobs in which an option changes something; the others refuse it
    "n": ("class", "labels"), "progress": ("class", "labels"),
    "steps": (*DRAWING, "image"), "seed": (*DRAWING, "image"),
    **dict.fromkeys(("batch_size", "cfg", "cfg_schedule", "top_p", "order", "bfloat16", "compile"), DRAWING),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of this file. Exits with code 2 and one sentence for anything it does not know."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Draw pictures from a trained SemTok, or put pictures through its tokens. "
        "The result's path is printed. Without --out it lies in the run's folder.",
    )
    what, count = parser.add_argument_group("one of these"), number(int, 1, 10**9)
    what.add_argument("--class", metavar="CLASS", help="a grid of pictures of one class, by number or name")
    what.add_argument("--labels", nargs="+", metavar="CLASS", help="the same for several classes")
    what.add_argument("--image", nargs="+", metavar="FILE", help="original | stage 1 | stage 2, a row each")
    what.add_argument("--npz", type=count, metavar="N", help="N class-balanced pictures in ADM's .npz format")
    what.add_argument("--reconstruct", metavar="FOLDER", help="each picture below it through the tokens")
    extra = parser.add_argument_group("with --image").add_argument
    extra("--tokens", action="store_const", const=True, help="a map of each token: where it acts")
    extra("--keep", type=count, metavar="N", help="and --class: keep N tokens, draw the others in this class")
    add, flag, runs = parser.add_argument, argparse.BooleanOptionalAction, os.path.join("runs", "tiny")
    add("--run", default=runs, metavar="FOLDER", help="train.py's --out (default: runs/tiny)")
    add("--out", metavar="PATH", help="the file, or with --reconstruct the folder, to write")
    add("--progress", action="store_true", help="with --class, --labels: after 1, 2, 4, ... steps")
    add("--n", type=count, help="pictures of each class (default: 16 of one, else 8, with --progress 2)")
    add("--steps", type=number(int, 1, 10_000), help="default: 64, at most one a token; with --image 25")
    add("--cfg", type=number(float, 0, 1000), help="guidance scale; 1 is none (default: the preset's)")
    add("--cfg-schedule", choices=["linear", "constant"], default="linear",
        help="guidance grows with the share of tokens that are known, or stays (default: linear)")
    add("--top-p", type=number(float, 0, 1), default=0.75,
        help="per bit, the likelier value alone if its probability reaches this (default: 0.75)")
    add("--order", choices=["random", "raster", "confidence"],
        help="of filling tokens (Table 14; default: random, with --progress random and raster)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="decides the pictures (default: 0)")
    add("--batch-size", type=count, default=64, help="pictures drawn at once (default: 64)")
    add("--bfloat16", action=flag, help="draw with networks in bfloat16 (default: on CUDA)")
    add("--compile", action=flag, help="a slow start, then fast steps (default: with --npz on CUDA)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parse_command(parser, arguments)
    given = [name for name in JOBS if vars(args)[name] is not None]
    if not given or {*given} != WITH.get(given[0], {given[0]}):
        jobs = "--class, --labels, --image, --npz, --reconstruct, --image --tokens, --image --keep --class"
        parser.error(f"give one of {jobs}")
    args.job = given[0]
    for name, jobs in USED_BY.items():
        if vars(args)[name] != parser.get_default(name) and args.job not in jobs:
            flag, fits = name.replace("_", "-"), ", ".join(f"--{job}" for job in jobs)
            parser.error(f"--{flag} changes nothing with --{args.job}: it belongs to {fits}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError for what the person at the keyboard can mend."""
    args = parse_arguments(arguments)
    if args.out and args.job != "reconstruct":
        target_of(args.out)  # refused before any work
    path = JOBS[args.job](args, choose_device(args.device))
    if launched()[0] == 0:
        print(path)


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell -> exit code."""
    return run_command("sample.py", lambda: main(arguments), (UserError, fid.UserError), "lower --batch-size")


if __name__ == "__main__":
    sys.exit(command_line())
