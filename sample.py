"""Use a trained SemTok: pictures of a class, a photo through the tokenizer, sets of samples for evaluation.

    python sample.py --class 1                    # a grid of pictures of class 1, from runs/tiny
    python sample.py --labels 0 star 7            # several classes, a row each
    python sample.py --image photo.jpg            # original | stage-1 sample | stage-2 refiner
    python sample.py --npz 50000                  # class-balanced pictures in ADM's format, for fid.py
    python sample.py --reconstruct FOLDER         # every picture of a folder through the tokenizer, for fid.py --pairs

Section 3.3 and appendix A.2, "Inference". A run's checkpoints describe themselves, so nothing else is asked.
"""

import argparse
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from ar import MaskedAR, load_ar
from bsq import bits_to_codes
from mmdit import UserError
from semtok import (
    PICTURE_SUFFIXES, SemTok, choose_device, load_semtok, picture_grid, read_picture, to_signed, to_uint8, write_file, write_picture,
)

JOBS = ("class", "labels", "image", "npz", "reconstruct")
DRAWING = ("class", "labels", "npz")
BELONGS = {  # which of them an option changes; the others refuse it
    "n": ("class", "labels"), "steps": (*DRAWING, "image"), "seed": (*DRAWING, "image"), "batch_size": ("npz",),
    **dict.fromkeys(("cfg", "cfg_schedule", "top_p", "order", "bfloat16", "compile"), DRAWING),
}
PART = 500  # pictures of --npz that are written at a time: what an interruption can cost


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A random generator on the device that is a function of the key alone."""
    words = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class Sampler:
    """The AR transformer and the refiner of a run, ready to draw: `draw(labels, generator)` -> (B, 3, H, W) uint8."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.ar, metadata = load(load_ar, args.run, "ar.safetensors", "ar", device)
        self.tokenizer, about = load(load_semtok, args.run, "stage2.safetensors", "2", device)
        if metadata["tokenizer"] != about["fingerprint"]:
            raise UserError(
                f"ar.safetensors in {args.run} was trained on another stage2.safetensors than the one beside it: train it "
                "again with python train.py --stage ar --overwrite"
            )
        self.classes = json.loads(metadata["classes"])
        config = self.ar.config
        if config.causal and (args.steps not in (None, config.tokens) or args.order or args.compile):
            raise UserError(
                f"ar.safetensors in {args.run} predicts the next token: it takes {config.tokens} steps from left to right, "
                "each on one token more, so leave out --steps, --order and --compile"
            )
        cuda = device.type == "cuda"
        if cuda if args.bfloat16 is None else args.bfloat16:
            self.ar.bfloat16()
            self.tokenizer.bfloat16()
        if args.compile or (args.compile is None and cuda and args.npz and not config.causal):
            # All steps have the same shapes, so that on CUDA each one's forward is the same CUDA graph: few pictures at once
            # would else wait for Python to launch their kernels.
            self.ar.hidden = torch.compile(self.ar.hidden, mode="reduce-overhead", dynamic=False)
        self.options = {
            "steps": args.steps or config.steps,
            "cfg": float(metadata["guidance"]) if args.cfg is None else args.cfg,
            "cfg_schedule": args.cfg_schedule, "top_p": args.top_p, "order": args.order or "random",
        }

    def label(self, text: str) -> int:
        """A class by number or name. Raises UserError with the range and the names."""
        if text in self.classes:
            return self.classes.index(text)
        if text.isdecimal() and int(text) < len(self.classes):
            return int(text)
        names = ", ".join(self.classes[:20]) + (", ..." if len(self.classes) > 20 else "")
        raise UserError(f"class {text} does not exist here: give 0 to {len(self.classes) - 1} or a name of {names}")

    def pictures(self, bits: torch.Tensor) -> torch.Tensor:
        """bits (B, K, d) -> (B, 3, H, W) uint8, one refiner step."""
        codes = bits_to_codes(bits, self.ar.config.spherical)
        return to_uint8(self.tokenizer.decode(self.tokenizer.refine(codes)))

    def draw(self, labels: list[int], random: torch.Generator, progress: bool = False) -> torch.Tensor:
        """One picture for each label: (B, 3, H, W) uint8."""
        steps = self.ar.generate_steps(torch.tensor(labels, device=self.device), generator=random, **self.options)
        for bits, _ in tqdm(steps, "sampling", unit="step", total=self.options["steps"], disable=not progress, leave=False):
            pass
        return self.pictures(bits)


def load(loader, run: str, name: str, stage: str, device: torch.device) -> tuple[SemTok | MaskedAR, dict[str, str]]:
    """A checkpoint of a run, by `load_ar` or `load_semtok`. Raises UserError saying which command makes it."""
    path = os.path.join(run, name)
    if not os.path.isfile(path):
        extra = "" if os.path.normpath(run) == os.path.join("runs", "tiny") else f" --out {run}"
        raise UserError(f"{path} is missing: make it with python train.py --stage {stage}{extra} (--stage all makes everything)")
    return loader(path, device)


def class_grid(args: argparse.Namespace, device: torch.device) -> str:
    """`--class` and `--labels`: n pictures of each class; returns the picture's path."""
    sampler = Sampler(args, device)
    labels = [sampler.label(text) for text in args.labels or [vars(args)["class"]]]
    count = args.n or (16 if len(labels) == 1 else 8)
    pictures = sampler.draw([label for label in labels for _ in range(count)], generator(device, args.seed), progress=True)
    rows = {f"{label}: {sampler.classes[label]}": row for label, row in zip(labels, pictures.split(count))}
    if len(labels) == 1 and count > 8:  # one class: a block of rows of eight
        (name, row), = rows.items()
        rows = {name if i == 0 else " " * i: part for i, part in enumerate(row.split(8))}
    path = args.out or os.path.join(args.run, f"class-{'-'.join(map(str, labels))}-seed-{args.seed}.png")
    write_picture(path, picture_grid(rows))
    return path


def through(tokenizer: SemTok, pictures: torch.Tensor, random: torch.Generator | None, steps: int = 25) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> uint8, through the tokens: the stage-I sampler when `random` is given, else the refiner."""
    codes = tokenizer.encode(to_signed(pictures))
    return to_uint8(tokenizer.decode(tokenizer.sample(codes, steps, generator=random) if random else tokenizer.refine(codes)))


def photo(args: argparse.Namespace, device: torch.device) -> str:
    """`--image`: original | stage-1 sample | stage-2 refiner side by side; returns the picture's path."""
    models = [load(load_semtok, args.run, f"stage{stage}.safetensors", stage, device)[0] for stage in "12"]
    picture = read_picture(args.image, models[0].config.image_size)[None].to(device)
    steps = args.steps or 25
    panels = [picture, through(models[0], picture, generator(device, args.seed), steps), through(models[1], picture, None)]
    stem = os.path.splitext(os.path.basename(args.image))[0]
    path = args.out or os.path.join(args.run, f"image-{stem}.png")
    write_picture(path, picture_grid({f"original | stage 1, {steps} steps | stage 2, refiner": torch.cat(panels)}, side=256))
    return path


def reconstruct(args: argparse.Namespace, device: torch.device) -> str:
    """`--reconstruct`: every picture below a folder through tokens and refiner, as PNG under the same relative path.
    Pictures that are there already are not made again. Returns the folder."""
    tokenizer, _ = load(load_semtok, args.run, "stage2.safetensors", "2", device)
    found = [
        os.path.relpath(os.path.join(root, name), args.reconstruct)
        for root, _, names in os.walk(args.reconstruct) for name in names if name.lower().endswith(PICTURE_SUFFIXES)
    ]
    if not found:
        raise UserError(f"--reconstruct {args.reconstruct} holds no pictures: give a folder of JPEG or PNG files")
    out, bad = args.out or os.path.join(args.run, "reconstructions"), []
    targets = {name: os.path.join(out, os.path.splitext(name)[0] + ".png") for name in sorted(found)}
    todo = [name for name, target in targets.items() if not os.path.exists(target)]
    bar = tqdm(total=len(todo), desc="reconstructing", unit="picture")
    for start in range(0, len(todo), 32):
        names, pictures = [], []
        for name in todo[start : start + 32]:
            try:
                pictures.append(read_picture(os.path.join(args.reconstruct, name), tokenizer.config.image_size))
                names.append(name)
            except UserError as error:
                bad.append(str(error))
        if pictures:
            for name, output in zip(names, through(tokenizer, torch.stack(pictures).to(device), None)):
                write_picture(targets[name], picture_grid({"": output[None]}, side=output.shape[-1]))
        bar.update(min(32, len(todo) - start))
    bar.close()
    if len(bad) == len(found):
        raise UserError(f"none of the {len(bad)} pictures can be read: {bad[0]}")
    if bad:
        print(f"skipped {len(bad)} of {len(found)} pictures: {'; '.join(bad[:3])}", file=sys.stderr)
    return out


def npz(args: argparse.Namespace, device: torch.device) -> str:
    """`--npz`: N class-balanced pictures as ADM's `arr_0` (N, H, W, 3) uint8. Parts of 500 are kept in OUT.parts until
    all are there, so that the same command goes on after an interruption. Returns the file's path."""
    sampler = Sampler(args, device)
    path = args.out or os.path.join(args.run, f"samples-{args.npz}.npz")
    parts = f"{path}.parts"
    about = {"n": args.npz, "seed": args.seed, "bfloat16": args.bfloat16, "model": fingerprint(args.run)}
    settings = json.dumps(sampler.options | about, sort_keys=True)
    plan = os.path.join(parts, "settings.json")
    if os.path.isfile(plan):
        with open(plan, encoding="utf-8") as file:
            if file.read() != settings:
                raise UserError(f"{parts} holds parts of a run with other settings: delete it, or choose another --out")
    else:
        write_file(plan, lambda temporary: _write_bytes(temporary, settings.encode()))
    labels = [i % len(sampler.classes) for i in range(args.npz)]  # class-balanced, also when interrupted
    count, bar = -(-args.npz // PART), tqdm(total=args.npz, desc="sampling", unit="picture")
    for part in range(count):
        file, wanted = os.path.join(parts, f"{part:05d}.npy"), labels[part * PART : (part + 1) * PART]
        if not os.path.exists(file):
            batches, random = [], generator(device, args.seed, part)
            for start in range(0, len(wanted), args.batch_size):
                batches.append(sampler.draw(wanted[start : start + args.batch_size], random).permute(0, 2, 3, 1).cpu())
                bar.update(len(batches[-1]))
            pictures = torch.cat(batches).numpy()
            write_file(file, lambda temporary, p=pictures: _write_bytes(temporary, p.tobytes()))
        else:
            bar.update(len(wanted))
    bar.close()
    size = sampler.tokenizer.config.image_size

    def join(temporary):
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (args.npz, size, size, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for part in range(count):
                with open(os.path.join(parts, f"{part:05d}.npy"), "rb") as file:
                    shutil.copyfileobj(file, member)

    write_file(path, join)
    shutil.rmtree(parts)
    return path


def fingerprint(run: str) -> list[float]:
    """What tells the checkpoints of a run from those of another training: size and time of writing."""
    files = (os.stat(os.path.join(run, f"{name}.safetensors")) for name in ("ar", "stage2"))
    return [value for file in files for value in (file.st_size, file.st_mtime)]


def _write_bytes(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of this file. Exits with code 2 and one sentence for anything it does not know."""
    parser = argparse.ArgumentParser(
        prog="sample.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw pictures from a trained SemTok, or put pictures through its tokenizer. Prints where the result is.",
        epilog="The default of --cfg is the paper's for its sizes, and for the tiny preset's the best of a sweep.",
    )
    parser.error = lambda message: parser.exit(2, f"sample.py: {message}; --help explains every option\n")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--class", metavar="CLASS", help="a grid of pictures of one class, by number or name")
    what.add_argument("--labels", nargs="+", metavar="CLASS", help="a row of pictures for each of several classes")
    what.add_argument("--image", metavar="FILE", help="a picture through the tokenizer: original | stage 1 | stage 2")
    what.add_argument("--npz", type=_above_zero, metavar="N", help="N class-balanced pictures in ADM's .npz format")
    what.add_argument("--reconstruct", metavar="FOLDER", help="every picture of a folder through the refiner, as PNG")
    add = parser.add_argument
    add("--run", default=os.path.join("runs", "tiny"), metavar="FOLDER", help="train.py's --out (default: runs/tiny)")
    add("--out", metavar="PATH", help="where the result goes (default: into the run's folder)")
    add("--n", type=_above_zero, help="pictures of each class (default: 16 of one class, 8 of each of several)")
    add("--steps", type=_above_zero, help="sampling steps (default: 64, at most one per token; with --image 25)")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--cfg-schedule", default="linear", choices=["linear", "constant"], help="guidance grows with the share predicted, or not")
    add("--top-p", type=_share, default=0.75, help="per bit: values kept until their probability reaches this (default 0.75)")
    add("--order", choices=["random", "confidence"], help="which tokens are filled first (Table 14; default random)")
    add("--seed", type=int, default=0, help="same seed, same device: the same pictures (default 0)")
    add("--batch-size", type=_above_zero, default=64, help="with --npz, pictures drawn at once (default 64)")
    flag = argparse.BooleanOptionalAction
    add("--bfloat16", action=flag, help="draw with networks in bfloat16 (default: on CUDA); photos stay float32")
    add("--compile", action=flag, help="compile the transformer: a slow start, then fast steps (default: with --npz on CUDA)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed} must not be negative")
    asked = next(name for name in JOBS if vars(args)[name] is not None)
    for name, jobs in BELONGS.items():
        if vars(args)[name] != parser.get_default(name) and asked not in jobs:
            fits = ", ".join(f"--{job}" for job in jobs)
            parser.error(f"--{name.replace('_', '-')} changes nothing with --{asked}: it belongs to {fits}")
    return args


def _above_zero(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return float(text)


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError for what the person at the keyboard can mend."""
    args = parse_arguments(arguments)
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, as in training
    job = photo if args.image else npz if args.npz else reconstruct if args.reconstruct else class_grid
    print(job(args, device))


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell: returns the exit code, 2 with one sentence on stderr for a UserError."""
    try:
        main(arguments)
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sample.py: stopped; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
