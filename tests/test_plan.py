"""train.py --dry-run: the paper's sizes, FLOPs that can be checked by hand, and honest memory."""

import contextlib
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

STAGE1, STAGE2, AR = ("--stage 1 --preset paper", "--stage 2 --preset paper", "--stage ar --preset paper --ar-size L")


def run(arguments):
    """`train.py ARGUMENTS --dry-run` within this process: code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train.command_line([*arguments.split(), "--dry-run"])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@cache
def printed(arguments):
    """What a dry run prints, made once."""
    code, out, err = run(arguments)
    assert code == 0, err
    return out


def row(text, name):
    """The numbers of a table's row; a dash is None."""
    line = next(line for line in text.splitlines() if line.startswith(name + "  "))
    cells = re.findall(r"-(?=\s|$)|[\d.]+(?:e-\d+)?", line[len(name):])
    return [None if cell == "-" else float(cell) for cell in cells]


@pytest.mark.parametrize("arguments, name, trained, frozen", [
    (STAGE1, "semtok.encoder", 113.6, 0), (STAGE1, "semtok.decoder", 2231.4, 0.4), (STAGE1, "semtok.vae.encoder", 0, 34.3),
    (STAGE1, "semtok.vae.decoder", 0, 49.5), (STAGE1, "siglip", 0, 85.8), (STAGE2, "semtok.decoder", 2231.7, 0.1),
    (STAGE2, "resnet", 0, 25.56), (STAGE2, "lpips", 0, 14.71), (STAGE2, "discriminator", 7.43, 0),
    (AR, "ar", 318.0, 0),
])
def test_parameters_in_millions(arguments, name, trained, frozen):
    assert row(printed(arguments), name)[:2] == pytest.approx([trained, frozen], abs=0.1)


def test_figures_of_the_paper_stand_beside_ours():
    assert row(printed(STAGE1), "semtok.encoder")[2] == 113 and row(printed(STAGE1), "semtok.decoder")[2] == 2236
    assert "decoder has 2237M before" in printed(STAGE1) and "0.070 bits per pixel" in printed(STAGE1)
    assert row(printed(AR), "ar")[2] == 318


@pytest.mark.parametrize("arguments, name, tera", [
    (STAGE1, "semtok.decoder", 0.79), (STAGE1, "semtok.encoder", 0.064), (STAGE1, "semtok.vae.encoder", 0.27), (STAGE1, "siglip", 0.047),
    (STAGE2, "semtok.vae.decoder", 0.62), (STAGE2, "resnet", 2 * 0.008),  # original, output
    (STAGE2, "lpips", 2 * 0.040), (AR, "ar", 21.1 / 128),  # sampling is 64 steps of two passes
])
def test_forward_flops_of_one_picture(arguments, name, tera):
    assert row(printed(arguments), name)[3] == pytest.approx(tera, rel=0.03)


COSTS = {  # of a step with its backward passes, in forward passes of each network
    STAGE1: {"semtok.vae.encoder": 1, "siglip": 1, "semtok.encoder": 3, "semtok.w_x": 3, "semtok.w_z": 3, "semtok.decoder": 3},  # frozen ones; trained ones
    STAGE2: {
        "semtok.vae.encoder": 1, "siglip": 1, "semtok.encoder": 3, "semtok.w_x": 3, "semtok.w_z": 3, "semtok.decoder": 3,
        "semtok.vae.decoder": 2,  # frozen, gradients flow through
        "resnet": 3 / 2, "lpips": 3 / 2,  # the original and the output, through which gradients flow
        "discriminator": 8 / 3,  # it judges the decoder's output, then learns from both
    },
    AR: {"ar": 3},
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
        total = sum(row(text, name)[0] for name in fixed) + row(text, f"activations{note}")[0]
        assert row(text, f"total{note}")[0] == pytest.approx(total, rel=0.002)
        line = next(line for line in text.splitlines() if line.startswith(f"total{note}  "))
        assert ("more than the 78" in line) == (total > 78)
    work, steps = float(re.search(r"passes: ([\d.]+)", text)[1]), re.search(r": ([\d,]+) steps of (\d+)", text)
    count = int(steps[1].replace(",", "")) * int(steps[2])
    hours = float(re.search(r"length: ([\d.]+) GPU-hours", text)[1])
    assert hours == pytest.approx(work * 1e12 * count / (0.4 * 989e12) / 3600, rel=0.002)


def test_it_takes_little_memory_and_time(tmp_path):
    """The real command, in an empty folder that stays empty: missing files are named, with where to get them."""
    # VmHWM: the maximum that getrusage knows is inherited from the process that started this one
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import train; sys.exit(train.command_line() or print(" \
        "open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]))"
    command = [sys.executable, "-c", code, ROOT, *AR.split(), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
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
    code, out, err = run(arguments)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1, err
