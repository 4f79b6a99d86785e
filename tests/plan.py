"""What a stage takes, before it is started: parameters, FLOPs, memory, disk, hours, missing files.

    python tests/plan.py --preset paper --stage 1 --gpus 8      # no weights, no pictures, no GPU are needed

It runs one step of the very stage that train.py trains, under PyTorch's FakeTensorMode: shapes without
values, with the types of CUDA's autocast. It takes train.py's options of what is trained, --gpus, and
--memory, for which it says the smallest --accumulate that fits. Of the tiny preset some steps are timed here.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fid  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402

CARDS = {  # by preset, a GPU to plan for: its name, dense bfloat16 FLOP/s, bytes that it leaves us
    "paper": ("an H100", 989e12, 78 * 2**30), "base": ("an RTX 4090", 165e12, 22 * 2**30),
}
UTILISATION = 0.4  # our share of the FLOP/s
DISK = 2e9  # bytes a second that a disk writes
PARTS = {  # of the stages, as the code names them: millions of parameters in the paper, of the VAE in SD3.5
    "semtok.vae.encoder": 34.3, "siglip": "-", "semtok.encoder": 113, "semtok.w_x": "-", "semtok.w_z": "-",
    "semtok.decoder": 2236, "semtok.vae.decoder": 49.5, "lpips": "-", "resnet": "-", "discriminator": "-",
    "tokenizer": "-", "ar": "-", "vae.encoder": "-", "vae.decoder": "-",
}
PAPER_AR = {"L": 318, "XL": 746, "XXL": 1200}


@contextlib.contextmanager
def as_on_cuda():
    """Inside `with`, what CUDA's autocast does: norms and resizing take float32, attention is
    memory-efficient. No TorchFunctionMode, since one is off in backward passes, which may recompute."""
    def attend(q, k, v, mask=None, is_causal=False):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, mask, True, is_causal=is_causal)[0]

    def in_float32(function):
        def cast(*args, **kwargs):
            return function(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
        return cast

    casts = {n: in_float32(getattr(F, n)) for n in ("layer_norm", "rms_norm", "group_norm", "interpolate")}
    with mock.patch.multiple(F, scaled_dot_product_attention=attend, **casts):
        yield


class Planned(train.Run):
    """A run that notes what is missing and goes on, since networks of the published sizes stand for files."""

    def __post_init__(self):
        super().__post_init__()
        self.missing = {}  # what was asked for -> a sentence
        self.train = SimpleNamespace(classes=[""] * (10 if self.tiny else 1000))
        self.val = SimpleNamespace(spread=lambda count: (torch.zeros(1), None))

    def ask(self, read, *names: str) -> str:
        try:
            return read(*names)
        except (fid.UserError, train.UserError) as error:
            self.missing[names] = str(error)
            return "missing"

    def weights(self, *names):
        return self.ask(super().weights, *names)

    def parent(self, stage):
        return self.ask(super().parent, stage)


@contextlib.contextmanager
def without_files(run: Planned):
    """Inside `with`, train.py makes networks without values where it would read them out of files."""
    def build(make, *sizes):
        with torch.device(run.device):
            network = make(*sizes)
        on_cpu = run.device.type == "cpu"  # and fake tensors cannot move
        return network if on_cpu else network.to(run.device)  # with what is made on the CPU everywhere

    def network(judge, run):
        made = build(judge.make_twin) if run.tiny else build(judge.load, run)
        return made.requires_grad_(False).eval()

    def lpips(*_):
        return fid.LPIPS(fid.VGG16Features(), [torch.zeros(1, width, 1, 1) for width in fid.VGG_WIDTHS])

    def load_sd35(decoder, *_):
        decoder.load_state_dict(build(semtok.Decoder, run.config).state_dict(), assign=True)

    tower = train.TINY_SIGLIP if run.tiny else semtok.SigLIPConfig()
    loaders = {
        "load_vae": lambda *_: build(semtok.VAE, run.config.vae), "load_sd35": load_sd35,
        "load_siglip": lambda *_: build(semtok.SigLIP, tower),
        "load_semtok": lambda *_: (build(semtok.SemTok, run.config), {}),
    }
    with (
        mock.patch.multiple(train, **loaders), mock.patch.object(train.Judge, "network", network),
        mock.patch.multiple(fid, load_network=lambda make, *_: make(), load_lpips=lpips),
        mock.patch.object(train.Pretraining, "redraw", lambda *_: None),  # of the preview
    ):
        yield


def zeros(name: str, run: Planned, count: int) -> list[torch.Tensor]:
    """What a step of a stage is given: pictures (count, 3, H, W) or bits (count, K, d), labels (count,)."""
    side, tokens = run.config.image_size, (run.config.tokens, run.config.bits)
    shape, kind = (tokens, torch.bool) if name == "ar" else ((3, side, side), torch.uint8)
    return [torch.zeros(count, *shape, dtype=kind), torch.zeros(count, dtype=torch.long)]


def measure(name: str, run: Planned, batch: int) -> tuple:
    """What a stage's last step costs on `batch` pictures, by FakeTensorMode: shapes without values.

    Returns the stage; FLOPs of all passes, and of each module's forward passes; bytes kept for the backward
    pass, as it is and checkpointed: the inputs of all blocks and the inside of one."""
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
        stage = train.STAGES[name](run)
        blocks, parts = train.blocks_of(stage), dict(stage.named_modules()) | stage.frozen
        for module in (*blocks, *(parts[part] for part in PARTS if part in parts)):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        for layer in (part for part in parts.values() if isinstance(part, (nn.Linear, nn.Conv2d))):
            for parameter in layer.parameters():  # the plan counts autocast's copies apart
                parameter.data = parameter.data.bfloat16()
        for root in (stage, *stage.frozen.values()):
            weights |= {t.untyped_storage()._cdata for t in (*root.parameters(), *root.buffers())}
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), as_on_cuda(), saved:
            step = stage.prepare(*zeros(name, run, batch), torch.Generator(), stage.recipe.steps - 1)
            stage(*step)["loss"].backward()
        flops, activations = so_far()
        within = [inside[block] for block in blocks if block in inside] or [0]
        lean = activations + sum(s.nbytes() for s in inputs.values()) - sum(within) + max(within)
    return stage, flops, forward, activations, lean


def count(*modules: nn.Module) -> list[int]:
    """How many parameters are trained, how many frozen."""
    parameters = {p for module in modules for p in module.parameters()}
    return [sum(p.numel() for p in parameters if p.requires_grad == trained) for trained in (True, False)]


def recomputed(stage: nn.Module, forward: dict) -> int:
    """The FLOPs that checkpointing adds, of `measure`'s."""
    return sum(forward[block] for block in train.blocks_of(stage) if count(block)[0])


def held(stage: nn.Module, gpus: int) -> dict[str, int]:
    """The bytes on each of some GPUs by what they are, but for activations."""
    trained, frozen = count(stage, *stage.frozen.values())
    largest, own = max((count(block)[0] for block in train.blocks_of(stage)), default=0), 4 * trained / gpus
    return {
        "trained weights, float32": own, "frozen weights, float32": 4 * frozen, "gradients, float32": own,
        "AdamW, two moments": 2 * own, "averaged weights": own * bool(stage.recipe.ema),
        # of all weights, or where they are sharded of two blocks, with their gradients
        "bfloat16 copies": 2 * trained if gpus == 1 else 8 * largest,
    }


class Alive(TorchDispatchMode):
    """The bytes of all tensors that are alive: `now`, and at most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0  # sizes: of storages, since views share one

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it calls again with this rank's part
        if function is torch.ops.aten._local_scalar_dense.default:
            return True  # the step was good
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    weakref.finalize(storage, self.set, storage._cdata, 0)
                    self.set(storage._cdata, storage.nbytes())
        return out

    def set(self, key, size):
        self.now += size - self.sizes.pop(key, 0)
        self.peak = max(self.peak, self.now)
        if size:
            self.sizes[key] = size


@contextlib.contextmanager
def one_rank(run: Planned, name: str, gpus: int):
    """Inside `with`, (a stage's Training, Alive) of one of `gpus` ranks, under FakeTensorMode on the CPU: its
    bytes are a GPU's, since what is built on the CPU moves there. The rank is not rank 0, which writes."""
    alive, policy, resize = Alive(), train.MixedPrecisionPolicy, torch.UntypedStorage.resize_

    def resized(storage, size):  # FSDP2 frees and takes what it gathers
        alive.set(storage._cdata, size)
        return resize(storage, size)

    def tokenise(run, tokenizer, *_):  # one of its batches
        semtok.in_batches(tokenizer.encode, semtok.to_signed(zeros("2", run, 256)[0]))

    if gpus > 1:
        dist.init_process_group("fake", rank=1, world_size=gpus, store=FakeStore())
        mesh = dist.init_device_mesh("cpu", (gpus,))  # it needs values
    with (
        contextlib.ExitStack() as at_end, without_files(run), mock.patch.multiple(
            train, Tokens=tokenise, autocast=lambda _: torch.autocast("cpu", torch.bfloat16),
            MixedPrecisionPolicy=lambda *_, **kept: policy(torch.bfloat16, torch.float32, **kept),
        ),
        mock.patch.object(nn.Module, "to", lambda module, *_: module),
        mock.patch.object(torch.UntypedStorage, "resize_", resized),
    ):
        if gpus > 1:
            at_end.callback(dist.destroy_process_group)
            at_end.enter_context(mock.patch.object(dist, "init_device_mesh", lambda *_: mesh))
        with FakeTensorMode(), as_on_cuda(), alive:
            yield train.Training(name, run), alive


def seconds_here(run: Planned, name: str) -> float:
    """A stage's seconds on this CPU, by a few real steps, without start-up and previews."""
    recipe, seconds = run.recipe(name), []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "Tokens", lambda *_: None):
        training = train.Training(name, Planned(folder, run.settings, run.args))
        batch = zeros(name, run, recipe.batch_size)
        batch[0].random_(0, 2 if name == "ar" else 256)
        for training.step in range(6):
            start = time.perf_counter()
            train.one_step(training, batch)
            seconds.append(time.perf_counter() - start)
    return recipe.steps * statistics.median(seconds[2:])


def plan(run: Planned, name: str, gpus: int, memory: float | None) -> float:
    """Print what a stage takes: parameters, FLOPs, memory, disk, length and missing files.

    memory: GiB of a GPU. Returns the stage's seconds on this CPU, for the tiny preset, else 0."""
    config, recipe, paper = run.config, run.recipe(name), run.preset == "paper"
    card, peak, room = CARDS.get(run.preset, CARDS["base"])
    card, room = ("this GPU", memory * 2**30) if memory else (card, room)
    batch = recipe.batch_size // (gpus * run.args.accumulate)
    stage, flops, forward, activations, checkpointed = measure(name, run, batch)
    bits = config.tokens * config.bits / config.image_size**2  # Table 1's compression
    print(
        f"stage {name}, {stage.title}, {run.preset} preset: {recipe.steps:,} steps of {recipe.batch_size} "
        f"pictures of {config.image_size} x {config.image_size}, {batch} at once on each of {gpus} GPUs\n"
        f"{config.tokens} tokens of {config.bits} bits: {bits:.3f} bits per pixel\n\n"
        f"{'network':20}{'trained, M':>12}{'frozen, M':>12}{'published':>12}{'forward, TFLOP a picture':>28}"
    )

    found = dict(stage.named_modules()) | stage.frozen
    rows = {part: (*count(found[part]), forward.get(found[part], 0)) for part in PARTS if part in found}
    trained, frozen = count(stage, *stage.frozen.values())
    rows["all"] = trained, frozen, sum(work for *_, work in rows.values())
    told = (PARTS | {"ar": PAPER_AR[run.settings["ar_size"] or "L"]}) if paper else {}
    for part, (ours, theirs, work) in rows.items():
        tera = f"{work / batch / 1e12:.4g}" if work else "-"
        print(f"{part:20}{ours / 1e6:12.2f}{theirs / 1e6:12.2f}{told.get(part, '-'):>12}{tera:>28}")
    print(f"with the backward passes: {flops / batch / 1e12:.4g} TFLOP a picture")
    if paper and name != "ar":
        pooled = (2048 + 1 + config.decoder_width + 1) * config.decoder_width
        before = (sum(count(stage.semtok.decoder)) + pooled) / 1e6
        print(f"the decoder has {before:.0f}M before SD3.5's pooled-text embedder becomes a bias")

    print("\nGiB on a GPU, what is trained sharded; context and fragments come on top, a few GiB")
    sizes = held(stage, gpus)
    fixed = sum(sizes.values())
    with one_rank(run, name, gpus) as (_, alive):
        sizes["start-up, at most"] = alive.peak
    for note, kept in (("", activations), (", checkpointed", checkpointed)):
        sizes |= {f"activations{note}": kept, f"total{note}": fixed + kept}
    for label, amount in sizes.items():
        over = ""
        if "total" in label and amount > room:
            parts = (n for n in range(2, batch + 1) if batch % n == 0)
            parts = (n * run.args.accumulate for n in parts if fixed + (amount - fixed) / n <= room)
            fits = next((f"--accumulate {n} fits" for n in parts), "no --accumulate fits")
            over = f"  more than the {room / 2**30:.0f} of {card}: {fits}"
        print(f"{label:28}{amount / 2**30:12.4g}{over}")
    state = 4 * trained * (4 if recipe.ema else 3)
    print(
        f"\non disk: two training states of {state / 2**30:.3g} GiB while it trains, one when it is done\n"
        f"a state is written every {recipe.save_every:,} steps: {state / gpus / 1e9:.3g} GB by each rank, at "
        f"{DISK / 1e9:.0f} GB/s {state / gpus / DISK:.2g} s, or {state / DISK:.2g} s where all share a disk"
    )
    seconds = seconds_here(run, name) if run.tiny else 0
    if run.tiny:
        print(f"length on this CPU: {seconds / 60:.1f} minutes, without start-up and previews")
    else:
        print(f"length at {UTILISATION:.0%} of a GPU's {peak / 1e12:.0f} TFLOP/s")
    for note, work in (("", flops), (", checkpointed", flops + recomputed(stage, forward))) * (not run.tiny):
        hours = recipe.steps * recipe.batch_size * work / batch / (peak * UTILISATION) / 3600
        print(f"length{note}: {hours:.4g} GPU-hours, {hours / gpus:.3g} hours on {gpus} GPUs")
    # the whole of SD3.5 has its VAE too
    lacks = [said for n, said in run.missing.items() if not any({*other} < {*n} for other in run.missing)]
    print(f"\nmissing: {len(lacks) or 'nothing'}", *lacks, sep="\n- ", end="\n\n")
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """The command of this file. Raises UserError."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gpus", type=int, help="how many share the batch (paper: 8; else 1)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU (paper: an H100's 78; else 22)")
    options, rest = parser.parse_known_args(arguments)
    args = train.parse_arguments(rest)
    found, stages = train.open_run(args)
    gpus = options.gpus or (8 if found.preset == "paper" else 1)
    seconds = []
    for stage in stages:
        run, parts = Planned(found.folder, found.settings, args), gpus * args.accumulate
        size = run.recipe(stage).batch_size
        if gpus < 1 or size % parts:
            parts = f"{gpus} GPUs times --accumulate {args.accumulate}"
            raise train.UserError(f"stage {stage}'s batch of {size} does not divide by {parts}")
        if not run.tiny and not os.path.isdir(run.settings["data"] or ""):
            run.missing["data",] = "--data needs a folder, FOLDER/CLASS/picture.jpg: see README"
        with without_files(run):
            seconds.append(plan(run, stage, gpus, options.memory))
    if len(stages) > 1 and found.tiny:
        print(f"all stages on this CPU: {sum(seconds) / 60:.1f} minutes, without start-up and previews")


def command_line(arguments: list[str] | None = None) -> int:
    """`main` for a shell -> exit code."""
    return semtok.run_command("plan.py", lambda: main(arguments), (train.UserError,), "it takes 0.6 GB")


if __name__ == "__main__":
    sys.exit(command_line())
