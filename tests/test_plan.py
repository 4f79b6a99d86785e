"""train.py --dry-run: the paper's sizes, FLOPs that can be checked by hand, and honest memory."""

import os
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

import paper
from test_pipeline import ROOT, call

STAGE1, STAGE2, AR = ("--stage 1 --preset paper", "--stage 2 --preset paper", "--stage ar --preset paper --ar-size L")


@cache
def printed(arguments):
    """What a dry run prints, made once."""
    result = call("train.py", *arguments.split(), "--dry-run")
    assert result.returncode == 0, result.stderr
    return result.stdout


def row(text, name):
    """The numbers of a table's row; a dash is None."""
    line = next(line for line in text.splitlines() if line.startswith(name + "  "))
    cells = re.findall(r"-(?=\s|$)|[\d.]+(?:e-\d+)?", line[len(name):])
    return [None if cell == "-" else float(cell) for cell in cells]


@pytest.mark.parametrize("arguments, name, trained, frozen, tera", [  # parameters in millions, TFLOP of a picture
    (STAGE1, "semtok.encoder", 113.6, 0, 0.064), (STAGE1, "semtok.decoder", 2231.4, 0.4, 0.79),
    (STAGE1, "semtok.vae.encoder", 0, 34.3, 0.27), (STAGE1, "semtok.vae.decoder", 0, 49.5, None),
    (STAGE1, "siglip", 0, 85.8, 0.047), (STAGE2, "semtok.decoder", 2231.7, 0.1, 0.79),
    (STAGE2, "semtok.vae.decoder", 0, 49.5, 0.62), (STAGE2, "resnet", 0, 25.56, 2 * 0.008),  # original, output
    (STAGE2, "lpips", 0, 14.71, 2 * 0.040), (STAGE2, "discriminator", 7.43, 0, 3 * 0.050),
    (AR, "ar", 318.0, 0, 21.1 / 128),  # sampling is 64 steps of two passes
])
def test_parameters_and_forward_flops(arguments, name, trained, frozen, tera):
    found = row(printed(arguments), name)
    assert found[:2] == pytest.approx([trained, frozen], abs=0.1)
    assert found[3] == (tera and pytest.approx(tera, rel=0.03))


def test_figures_of_the_paper_stand_beside_ours():
    assert row(printed(STAGE1), "semtok.encoder")[2] == 113 and row(printed(STAGE1), "semtok.decoder")[2] == 2236
    assert "decoder has 2237M before" in printed(STAGE1) and "0.070 bits per pixel" in printed(STAGE1)
    assert row(printed(AR), "ar")[2] == 318


TRAINED = {"semtok.encoder": 3, "semtok.w_x": 3, "semtok.w_z": 3, "semtok.decoder": 3}
FROZEN = {"semtok.vae.encoder": 1, "siglip": 1}
COSTS = {  # of a step with its backward passes, in forward passes of each network
    STAGE1: FROZEN | TRAINED, AR: {"ar": 3},
    STAGE2: FROZEN | TRAINED | {
        "semtok.vae.decoder": 2,  # frozen, gradients flow through
        "resnet": 3 / 2, "lpips": 3 / 2,  # the original and the output, through which gradients flow
        "discriminator": 8 / 3,  # it judges the decoder's output, then learns from both
    },
}


@pytest.mark.parametrize("arguments", COSTS)
def test_a_step_is_the_sum_of_its_networks(arguments):
    text = printed(arguments)
    forward = {name: row(text, name)[3] for name in COSTS[arguments]}
    assert row(text, "all")[3] == pytest.approx(sum(forward.values()), rel=0.001)
    step = float(re.search(r"with the backward passes: ([\d.]+)", text)[1])
    # attention computes its map again on the way back; what stands first in a network passes no gradient on
    expected = sum(COSTS[arguments][name] * flops for name, flops in forward.items())
    assert step == pytest.approx(expected, rel=0.02)


def test_stage_1_of_the_paper():
    text = printed(STAGE1)
    assert row(text, "all")[3] == pytest.approx(1.177, abs=0.001) and "passes: 2.918 TFLOP" in text
    assert row(text, "activations") == [pytest.approx(47.09, abs=0.1)]
    assert row(text, "activations, checkpointed") == [pytest.approx(3.54, abs=0.05)]


@pytest.mark.parametrize("arguments", [STAGE1, STAGE2, AR])
def test_memory_and_length_add_up(arguments):
    text = printed(arguments)
    trained, frozen = row(text, "all")[:2]
    million = 4e6 / 2**30
    assert row(text, "trained weights, float32") == [pytest.approx(trained * million / 8, rel=0.001)]
    assert row(text, "AdamW, two moments") == [pytest.approx(2 * trained * million / 8, rel=0.001)]
    assert row(text, "frozen weights, float32") == [pytest.approx(frozen * million, rel=0.001)]
    fixed = ("trained weights, float32", "frozen weights, float32", "gradients, float32", "AdamW, two moments",
             "averaged weights", "bfloat16 copies")
    for note in ("", ", checkpointed"):
        total = sum(row(text, name)[0] for name in (*fixed, f"activations{note}"))
        assert row(text, f"total{note}")[0] == pytest.approx(total, rel=0.002)
        assert bool(re.search(f"total{note}  .*more than the 78", text)) == (total > 78)
    work, steps = float(re.search(r"passes: ([\d.]+)", text)[1]), re.search(r": ([\d,]+) steps of (\d+)", text)
    count = int(steps[1].replace(",", "")) * int(steps[2])
    hours = float(re.search(r"length: ([\d.]+) GPU-hours", text)[1])
    assert hours == pytest.approx(work * 1e12 * count / (0.4 * 989e12) / 3600, rel=0.002)


def test_it_takes_little_memory_and_time(tmp_path):
    """The real command, in an empty folder that stays empty: missing files are named, with where to get them."""
    # VmHWM: the maximum that getrusage knows is inherited from the process that started this one
    code = """import sys, train; sys.exit(train.command_line(sys.argv[1:]) or
           print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]))"""
    command, place = [sys.executable, "-c", code, *AR.split(), "--dry-run"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 600_000 and os.listdir(tmp_path) == []
    assert "stage2.safetensors is missing: make it first with python train.py --stage 2 --preset paper" in done.stdout
    assert "--data needs a folder" in done.stdout
    for name in ("sd3.5_medium.safetensors", "siglip2-base-patch16-256.safetensors"):
        assert name in printed(STAGE1) and name in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("stage", ["0", "1", "2", "ar"])
def test_tiny_preset(stage):
    text = printed(f"--stage {stage} --set batch_size=4")
    assert "tiny preset" in text and row(text, "all")[0] > 0 and "1 GPUs" in text


@pytest.mark.parametrize("arguments, sentence", [
    ("--stage 0 --preset paper", "paper reads real weights"),
    ("--stage 1 --preset paper --gpus 7", "a batch of 256 does not divide by 7 processes"),
    ("--stage 1 --set bits=x", "bits=x cannot be set"), ("--stage 1 --set group_bits=2", "changes nothing in stage 1"),
    ("--stage 1 --set quantizer=vq", "one of bsq, lfq"), ("--stage ar --set group_bits=7", "group_bits 7"),
    ("--stage 1 --set lr=nan", "lr=nan cannot be set"), ("--stage 1 --ar-size L", "add --preset paper"),
])
def test_mistakes_are_one_sentence(arguments, sentence):
    result = call("train.py", *arguments.split(), "--dry-run")
    assert result.returncode == 2 and result.stdout == "" and sentence in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


def test_gpus_are_for_the_plan():
    result = call("train.py", *"--stage 1 --gpus 2".split())
    assert result.returncode == 2 and "--gpus is for --dry-run" in result.stderr


def test_the_reading_order_points_at_the_lines_it_names():
    rows = re.findall(r"^\| \d \| `(\w+\.py)` (\d+)-(\d+)(?:, `\w+\.py`)? \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 7
    for name, first, last, what in rows:
        lines = (ROOT / name).read_text().splitlines()
        assert re.match(r"# --|def |class |@", lines[int(first) - 1]), (name, first, lines[int(first) - 1])
        assert int(last) == len(lines) or lines[int(last) - 1].startswith("# --"), (name, last)
        for defined in re.findall(r"`(\w+)`", what):
            assert any(re.match(rf"(def|class) {defined}\b", line) for line in lines[int(first) - 1 : int(last)]), defined


def test_what_the_ablations_say_of_their_figures():
    low, high, between = (np.array(seeds) for seeds in ([1.0, 1.2], [2.0, 2.2], [1.1, 2.1]))
    for ours, published, said in (
        ([low, high], [3, 4], "as the paper"), ([high, low], [3, 4], "opposite"), ([high, low], [4, 3], "as the paper"),
        ([between, high], [3, 4], "within the spread"), ([low, high, high], [5, 3, 4], "opposite, within the spread"),
    ):
        assert paper.verdict(ours, published) == said
    every = {need: [] for entry in paper.ENTRIES.values() for need in paper.needs(entry)}
    for (run, score), seeds in every.items():
        for seed in range(2):
            sizes = dict.fromkeys(("rFD", "PSNR", "SSIM", "kNN", "gFD", "recognised", "precision", "recall"), 1.0 + seed)
            seeds.append({name: value + (run == "default") for name, value in sizes.items()})
    text = paper.markdown("table14", paper.ENTRIES["table14"], every)
    assert "| confidence | 2.5 ± 0.5 (3.6) | 2.5 ± 0.5 (246.8) |" in text and text.count("within the spread") == 4
    for name, entry in paper.ENTRIES.items():
        if isinstance(entry, paper.Figure):
            assert paper.chart(entry, every).size == (1000, 210)
        else:
            assert "nan" not in paper.markdown(name, entry, every)
