"""tests/plan.py: the paper's sizes, FLOPs that can be checked by hand, and honest memory. tests/paper.py."""

import os
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import paper
import plan
import train
from test_pipeline import ROOT, call, sentence

STAGE1, STAGE2, AR = (f"--preset paper --stage {stage}" for stage in ("1", "2", "ar"))


@cache
def printed(arguments):
    """What the plan prints, made once."""
    result = call("plan.py", *arguments.split())
    assert result.returncode == 0, result.stderr
    return result.stdout


def row(arguments, name):
    """The numbers of a table's row; a dash is None."""
    line = next(line for line in printed(arguments).splitlines() if line.startswith(name + "  "))
    cells = re.findall(r"-(?=\s|$)|[\d.]+(?:e-\d+)?", line[len(name):])
    return [None if cell == "-" else float(cell) for cell in cells]


@pytest.mark.parametrize("arguments, name, trained, frozen, published, tera", [  # millions; TFLOP a picture
    (STAGE1, "semtok.encoder", 113.6, 0, 113, 0.064), (STAGE1, "semtok.decoder", 2231.4, 0.4, 2236, 0.79),
    (STAGE1, "semtok.vae.encoder", 0, 34.3, 34.3, 0.27), (STAGE1, "semtok.vae.decoder", 0, 49.5, 49.5, None),
    (STAGE1, "siglip", 0, 85.8, None, 0.047), (STAGE1, "all", 2349.1, 170.1, None, 1.177),
    (STAGE2, "semtok.decoder", 2231.7, 0.1, 2236, 0.79), (STAGE2, "semtok.vae.decoder", 0, 49.5, 49.5, 0.62),
    (STAGE2, "resnet", 0, 25.56, None, 2 * 0.008), (STAGE2, "lpips", 0, 14.71, None, 2 * 0.040),
    (STAGE2, "discriminator", 7.43, 0, None, 3 * 0.050),
    (AR, "ar", 318.0, 0, 318, 21.1 / 128),  # sampling is 64 steps of two passes
])
def test_parameters_and_forward_flops(arguments, name, trained, frozen, published, tera):
    found = row(arguments, name)
    assert found[:2] == pytest.approx([trained, frozen], abs=0.1) and found[2] == published
    assert found[3] == (tera and pytest.approx(tera, rel=0.03))


FROZEN = {"semtok.vae.encoder": 1, "siglip": 1}
TRAINED = {f"semtok.{name}": 3 for name in ("encoder", "w_x", "w_z", "decoder")}
COSTS = {  # of a step with its backward passes, in forward passes of each network
    STAGE1: FROZEN | TRAINED, AR: {"ar": 3},
    STAGE2: FROZEN | TRAINED | {
        "semtok.vae.decoder": 2,  # frozen, gradients flow through
        "resnet": 3 / 2, "lpips": 3 / 2,  # the original and the output, through which gradients flow
        "discriminator": 8 / 3,  # it judges the decoder's output, then learns from both
    },
}


@pytest.mark.parametrize("arguments", COSTS)
def test_a_step_is_the_sum_of_its_networks_and_memory_and_length_add_up(arguments):
    text, forward = printed(arguments), {name: row(arguments, name)[3] for name in COSTS[arguments]}
    trained, frozen, _, whole = row(arguments, "all")
    assert whole == pytest.approx(sum(forward.values()), rel=0.001)
    work = float(re.search(r"with the backward passes: ([\d.]+)", text)[1])
    # attention computes its map again on the way back; what stands first in a network passes no gradient on
    expected = sum(COSTS[arguments][name] * flops for name, flops in forward.items())
    assert work == pytest.approx(expected, rel=0.02)
    gib, share = 4e6 / 2**30, trained / 8  # of a million float32; what is trained is sharded
    sizes = {"trained weights, float32": share, "gradients, float32": share, "AdamW, two moments": 2 * share}
    sizes |= {"averaged weights": share, "frozen weights, float32": frozen}
    for name, millions in sizes.items():
        assert row(arguments, name) == [pytest.approx(millions * gib, rel=0.001)]
    for note in ("", ", checkpointed"):
        total = sum(row(arguments, name)[0] for name in (*sizes, "bfloat16 copies", f"activations{note}"))
        assert row(arguments, f"total{note}")[0] == pytest.approx(total, rel=0.002)
        assert bool(re.search(f"total{note}  .*more than the 78", text)) == (total > 78)
    if arguments == AR:  # 2048 / 8 = 256 at once
        most, fixed = row(arguments, "total")[0], total - row(arguments, "activations, checkpointed")[0]
        assert fixed + (most - fixed) / 2 < 78 < most and "of an H100: --accumulate 2 fits" in text
    assert row(arguments, "start-up, at most") < row(arguments, "total, checkpointed")
    steps, batch = re.search(r": ([\d,]+) steps of (\d+)", text).groups()
    hours = work * 1e12 * int(steps.replace(",", "")) * int(batch) / (0.4 * 989e12) / 3600
    assert float(re.search(r"length: ([\d.]+) GPU-hours", text)[1]) == pytest.approx(hours, rel=0.002)
    assert f"states of {4 * trained * gib:.3g} GiB" in text


FEW = "--set encoder_depth=2 decoder_depth=6 decoder_dual_depth=3"


@pytest.mark.parametrize("arguments, gpus", [
    (f"{STAGE1} {FEW} --checkpoint-activations", 8), (f"{STAGE2} {FEW}", 8),
    (f"--preset base --stage 1 {FEW} --accumulate 8", 1),
])
def test_what_lives_on_a_gpu_is_what_the_plan_counts(arguments, gpus):
    """From the first allocation over a step to the checkpoint, which gathers one tensor at a time."""
    planned, args = f"{arguments} --gpus {gpus}", train.parse_arguments([*arguments.split(), "--out", "none"])
    run = plan.Planned("none", train.open_run(args)[0].settings, args)
    with plan.one_rank(run, args.stage, gpus) as (training, alive):
        start, training.step = alive.peak, training.stage.recipe.steps - 2
        for _ in range(1 + (gpus > 1)):  # in the first, whole tensors' shapes seem alive in FSDP2
            alive.peak = alive.now
            train.one_step(training, plan.zeros(args.stage, run, training.stage.recipe.batch_size // gpus))
        step, before = alive.peak, alive.now
        if gpus > 1:  # others than rank 0 gather what it writes
            alive.peak = before
            with train.averaged(training.stage, training.average):
                training.stage.export({})
            assert 2**25 < alive.peak - before < 2**28  # of 2.5 GB
    total = row(planned, "total" + ", checkpointed" * args.checkpoint_activations)[0] * 2**30
    told = row(planned, "start-up, at most")
    assert told == [pytest.approx(start / 2**30, rel=0.03)]  # garbage may live a while
    assert 0.85 * total < step < 1.05 * total, (start, step, total)


def test_the_tiny_preset_is_timed_here_and_a_card_may_be_named():
    text = printed("--stage all --preset tiny")
    parts = [float(minutes) for minutes in re.findall(r"length on this CPU: ([\d.]+) minutes", text)]
    total = float(re.search(r"all stages on this CPU: ([\d.]+) minutes", text)[1])
    assert len(parts) == 4 and 0 < total == pytest.approx(sum(parts), abs=0.21) and "GPU-hours" not in text
    assert "more than the 5 of this GPU: no --accumulate fits" in printed(f"{STAGE1} --memory 5")


def test_it_takes_little_memory_and_names_what_is_missing(tmp_path):
    """The real command, in an empty folder that stays empty."""
    # VmHWM: the maximum that getrusage knows is inherited from the process that started this one
    code = """import sys, plan; sys.exit(plan.command_line(sys.argv[1:]) or
           print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]))"""
    command, place = [sys.executable, "-c", code, *AR.split()], {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) < 600_000, done.stderr
    assert os.listdir(tmp_path) == []
    for text, missing in (
        (done.stdout, "data needs|stage2.safetensors is missing: make it first with python train.py --st"),
        (printed(STAGE1), "data needs|sd3.5_medium|siglip2-base-patch16-256"),
        (printed(STAGE2), "data needs|stage1.safetensors|siglip2-base|vgg16-397923|lpips_vgg|resnet50-067"),
    ):
        names = missing.split("|")
        assert f"missing: {len(names)}\n" in text and all(name in text for name in names)
    told = (ROOT / ".github" / "weights.md").read_text()
    assert all(f"{name}." in told for name in train.PUBLISHED)
    assert "decoder has 2237M before" in printed(STAGE1) and "0.070 bits per pixel" in printed(STAGE1)
    sizes = [row(STAGE1, f"activations{note}")[0] for note in ("", ", checkpointed")]
    assert sizes == pytest.approx([47.09, 3.54], rel=0.005) and "passes: 2.918 TFLOP" in printed(STAGE1)


def test_other_presets_and_mistakes():
    text = printed("--stage all --set batch_size=4")
    assert text.count("tiny preset") == 4 and text.count("on each of 1 GPUs") == 4
    lpips = printed(f"{STAGE2} --set perceptual=lpips init=scratch --gpus 16")
    assert "lpips" in lpips and "resnet" not in lpips and "sd3.5_medium" in lpips and "stage1.s" not in lpips
    for arguments, words in (
        ("--stage 0 --preset paper", "paper reads published weights"),
        (f"{STAGE1} --gpus 7", "batch of 256 does not divide by 7 GPUs"),
        ("--stage 1 --gpus -1", "does not divide by -1"), ("--stage 1 --set bits=x", "bits=x cannot be set"),
    ):
        result = call("plan.py", *arguments.split())
        sentence(result, words)
        assert result.stdout == "" and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- tests/paper.py


def test_neighbours_and_discriminants():
    line, labels = torch.tensor([[0.0], [1], [2.1], [10], [11.2], [3.5]]), torch.tensor([0, 0, 0, 1, 1, 1])
    # the two nearest: 1 2.1 | 0 2.1 | 1 3.5 (equal votes: the nearer, 1) | 11.2 3.5 | 10 3.5 | 2.1 1 (wrong)
    assert paper.neighbour_accuracy(line, labels, k=2) == pytest.approx(5 / 6)
    turned = paper.neighbour_accuracy(line.flip(0), 1 - labels.flip(0), k=4)
    assert turned == paper.neighbour_accuracy(line, labels, k=4)
    labels, rng = torch.arange(3).repeat_interleave(40), np.random.default_rng(0)
    told, noise = torch.from_numpy(rng.normal(size=(2, 120, 80))).float()
    told[:, 7] += 6.0 * labels  # the one direction that tells the classes
    planes = [paper.discriminants(features, labels) for features in (told, noise)]
    kept, lost = (abs(np.corrcoef(plane[:, 0], labels[1::2])[0, 1]) for plane in planes)
    assert planes[0].shape == (60, 2) and kept > 0.9 and lost < 0.5  # held out, noise shows no classes


def test_what_the_ablations_say_of_their_figures():
    low, high, between = (np.array(seeds) for seeds in ([1.0, 1.2], [2.0, 2.2], [1.1, 2.1]))
    for ours, published, said in (
        ([low, high], [3, 4], "as the paper"), ([high, low], [3, 4], "opposite"),
        ([high, low], [4, 3], "as the paper"), ([between, high], [3, 4], "within the spread"),
        ([low, high, high], [5, 3, 4], "opposite, within the spread"),
    ):
        assert paper.verdict(ours, published) == said
    every = {need: [] for entry in paper.ENTRIES.values() for need in paper.needs(entry)}
    scores = ("rFD", "PSNR", "SSIM", "kNN", "gFD", "recognised", "precision", "recall", "nats", "likelihood",
              *paper.LOCALITY.split())
    for (run, _), seeds in every.items():
        seeds += [dict.fromkeys(scores, 1.0 + seed + (run == "default")) for seed in range(2)]
    text = paper.markdown("table14", paper.ENTRIES["table14"], every)
    assert "| confidence | 2.5 ± 0.5 (3.6) | 2.5 ± 0.5 (246.8) |" in text
    assert text.count("within the spread") == 4
    for name, entry in paper.ENTRIES.items():
        if isinstance(entry, paper.Figure):
            assert paper.chart(entry, every).size == (1000, 210)
        elif isinstance(entry, paper.Table):
            assert "nan" not in paper.markdown(name, entry, every)


class Grid:
    """A tokenizer of 32 x 32 pictures whose 16 tokens each hold the mean of one patch, or of all."""

    def __init__(self, alone):
        self.alone = alone

    def encode(self, pictures):
        return F.avg_pool2d(pictures.float().mean(1), 8).flatten(1)[..., None] / 255  # (N, 16, 1)

    def to_pictures(self, codes):
        codes = codes if self.alone else codes.mean(1, keepdim=True).expand_as(codes)
        pixels = codes.unflatten(1, (4, 4))[..., 0].repeat_interleave(8, 1).repeat_interleave(8, 2)
        return (255 * pixels)[:, None].expand(-1, 3, -1, -1)

    def reconstruct(self, pictures):
        return self.to_pictures(self.encode(pictures))


@pytest.mark.parametrize("alone, share", [(True, 1.0), (False, 9 / 64)])
def test_locality_of_a_patch_and_of_a_whole_picture(alone, share):
    pictures = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    found = paper.locality(Grid(alone), pictures)
    assert [found[name] for name in ("zeroed", "swapped", "each")] == pytest.approx([share] * 3, abs=1e-4)
    assert found["all-swapped"] < 0.3
