"""train.py --dry-run: the plan of a run has the paper's sizes, FLOPs that can be checked by hand, and honest memory."""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmdit  # noqa: E402
import train  # noqa: E402


def run(arguments, folder):
    """`train.py ARGUMENTS --dry-run` in a folder, within this process: code, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)  # contextlib.chdir is not in Python 3.10
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train.command_line([*arguments.split(), "--dry-run"])
    finally:
        os.chdir(before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@cache
def printed(arguments):
    """What a dry run prints; the folder that it runs in has nothing in it and stays so."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(arguments, folder)
        assert done.returncode == 0, done.stderr
        assert os.listdir(folder) == []
        return done.stdout


def row(text, name):
    """The numbers of a table's row; a dash is None, the mark of what does not fit is left out."""
    line = next(line for line in text.splitlines() if line.startswith(name + "  "))
    return [None if cell == "-" else float(cell.rstrip("!")) for cell in line[len(name):].split()]


STAGE1, STAGE2 = "--stage 1 --preset paper", "--stage 2 --preset paper"

# ------------------------------------------------------------------------------------------------- parameters and FLOPs


@pytest.mark.parametrize("arguments, name, trained, frozen", [
    (STAGE1, "encoder", 113.6, 0), (STAGE1, "decoder", 2231.4, 0.4), (STAGE1, "VAE encoder", 0, 34.3),
    (STAGE1, "VAE decoder", 0, 49.5), (STAGE1, "SigLIP", 0, 85.8), (STAGE2, "decoder", 2231.7, 0.1),
    (STAGE2, "ResNet-50", 0, 25.56), (STAGE2, "LPIPS' VGG16", 0, 14.71), (STAGE2, "discriminator", 7.43, 0),
])
def test_parameters_in_millions(arguments, name, trained, frozen):
    assert row(printed(arguments), name)[:2] == pytest.approx([trained, frozen], abs=0.1)


@pytest.mark.parametrize("size, ours, paper", [("L", 318.0, 318), ("XL", 746.2, 746), ("XXL", 1269.3, 1200)])
def test_parameters_of_the_transformers(size, ours, paper):
    found = row(printed(f"--stage ar --preset paper --ar-size {size}"), f"AR {size}")
    assert found[:3] == pytest.approx([ours, 0, paper], abs=0.1)


def test_figures_of_the_paper_stand_beside_ours():
    assert row(printed(STAGE1), "encoder")[2] == 113 and row(printed(STAGE1), "decoder")[2] == 2236
    assert "decoder has 2237M before" in printed(STAGE1) and "VAE has 83.8M" in printed(STAGE1)


@pytest.mark.parametrize("arguments, name, tera", [
    (STAGE1, "decoder", 0.79), (STAGE1, "encoder", 0.064), (STAGE1, "VAE encoder", 0.27), (STAGE1, "SigLIP", 0.047),
    (STAGE2, "VAE decoder", 0.62), (STAGE2, "ResNet-50", 2 * 0.008), (STAGE2, "LPIPS' VGG16", 2 * 0.040),  # original, output
    # the floor of sampling is 64 steps of two passes
    *((f"--stage ar --preset paper --ar-size {size}", f"AR {size}", floor / 128) for size, floor in (("L", 21.1), ("XL", 49.7), ("XXL", 82.8))),
])
def test_forward_flops_of_one_picture(arguments, name, tera):
    assert row(printed(arguments), name)[3] == pytest.approx(tera, rel=0.03)


COSTS = {  # of a step with its backward passes, in forward passes of each network
    STAGE1: {"VAE encoder": 1, "SigLIP": 1, "encoder": 3, "alignment": 3, "decoder": 3},  # frozen ones; trained ones
    STAGE2: {
        "VAE encoder": 1, "SigLIP": 1, "encoder": 3, "alignment": 3, "decoder": 3,
        "VAE decoder": 2,  # frozen, gradients flow through
        "ResNet-50": 3 / 2, "LPIPS' VGG16": 3 / 2,  # the original and the output, through which gradients flow
        "discriminator": 8 / 3,  # it judges the decoder's output, then learns from both
    },
    "--stage ar --preset paper --ar-size L": {"AR L": 3},
}


@pytest.mark.parametrize("arguments", COSTS)
def test_a_step_is_the_sum_of_its_networks(arguments):
    text = printed(arguments)
    rows = {name: row(text, name) for name in train.networks(train.planned(train.parse_arguments(arguments.split())))}
    forward = {name: numbers[3] for name, numbers in rows.items() if numbers[3] is not None}
    assert forward.keys() == COSTS[arguments].keys()
    if "stage ar" not in arguments:  # beside the rows, the temperature of the contrast
        assert row(text, "all")[:2] == pytest.approx([sum(numbers[i] for numbers in rows.values()) for i in (0, 1)], abs=0.05)
    assert row(text, "all")[2] == pytest.approx(sum(forward.values()), abs=0.001)
    step = float(re.search(r"with the backward passes ([\d.]+)", text)[1])
    # attention computes its map again on the way back; what stands first in a network passes no gradient on
    assert step == pytest.approx(sum(COSTS[arguments][name] * flops for name, flops in forward.items()), rel=0.02)


def test_bits_per_pixel():
    assert "0.070 bits per pixel" in printed(STAGE1)
    assert "0.500 bits per pixel" in printed("--stage 1 --bits 32")  # 16 tokens, 32 pixels a side


# ------------------------------------------------------------------------------------------------------ memory and time


def test_activations_of_a_block_by_hand():
    """Bytes a token keeps in a block without AdaLN, in widths: per norm, 4 in and 2 out of its cast; queries and keys 8
    into their norm and 8 out; q, k, v and the attention's output 2 each; 8 before the GELU and 8 after: 52."""
    width, tokens = 768, 256
    with torch.device("meta"):
        block = mmdit.JointBlock(width, 12, adaln=False)
        streams = [torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        ropes = [rope.to("meta") for rope in (mmdit.rope_2d(16, 16, 64), mmdit.rope_1d(tokens, 64))]
    cost = train.measure(lambda: sum(stream.sum() for stream in block(*streams, *ropes)), [block], [block])
    kept, copies = cost.parts[block][1], cost.copies
    assert kept == pytest.approx(52 * width * 2 * tokens, rel=0.03)  # softmax sums, means and deviations beside it
    matrices = sum(p.numel() for name, p in block.named_parameters() if "ln_" not in name)
    assert copies == 2 * matrices


def test_checkpointing_keeps_the_inputs_of_blocks_only():
    with torch.device("meta"):
        net = mmdit.MMDiT(8, 768, 12)
        streams = [torch.empty(1, 256, 768, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        ropes = [rope.to("meta") for rope in (mmdit.rope_2d(16, 16, 64), mmdit.rope_1d(256, 64))]
    net.checkpoint_activations = True
    kept = train.measure(lambda: sum(stream.sum() for stream in net(*streams, *ropes)), [net], backward=False).kept
    inputs = 8 * 2 * 256 * 768 * 2  # blocks, streams, tokens, width, bytes
    assert inputs <= kept < inputs + 2 * 2 * 64 * 256 * 4 + 1024  # and once the two rotation tables


def test_memory_adds_up():
    text, gpus = printed(STAGE2), 8
    trained, frozen = (row(text, "all")[i] * 1e6 for i in (0, 1))
    judge = row(text, "discriminator")[0] * 1e6
    expected = {
        "trained weights, float32": 4 * trained, "gradients, float32": 4 * trained, "AdamW, two moments": 8 * trained,
        "EMA": 4 * (trained - judge),  # the discriminator is not averaged
    }
    for name, amount in expected.items():
        assert row(text, name) == pytest.approx([amount / 2**30, amount / gpus / 2**30], abs=0.02)
    assert row(text, "frozen weights, float32") == pytest.approx([4 * frozen / 2**30] * 2, abs=0.02)
    for note in ("", ", checkpointed"):
        parts = [row(text, name) for name in (*expected, "frozen weights, float32", "bfloat16 copies (autocast)", "activations" + note)]
        assert row(text, "total" + note) == pytest.approx([sum(part[i] for part in parts) for i in (0, 1)], abs=0.04)
    assert row(text, "activations, checkpointed")[0] < row(text, "activations")[0]


def test_activations_follow_the_batch_on_a_gpu():
    one, two = (row(printed(f"--stage 1 --gpus {gpus}"), "activations")[0] for gpus in (1, 2))
    assert one == pytest.approx(2 * two, abs=0.02)


def test_what_does_not_fit_is_marked():
    totals = [line for line in printed(STAGE1).splitlines() if line.startswith("total")]
    for line in totals:
        for number, mark in re.findall(r"([\d.]+)(!?)", line):
            assert (float(number) > 78) == bool(mark)
    assert any("!" in line for line in totals)


def test_length_follows_from_flops_and_utilisation():
    text, recipe = printed(STAGE1), train.RECIPES["paper"]["1"]
    step = float(re.search(r"with the backward passes ([\d.]+)", text)[1])
    hours = recipe.steps * recipe.batch_size * step * 1e12 / (0.4 * 989e12) / 3600
    said = [float(n.replace(",", "")) for n in re.findall(r"length.*: ([\d,.]+) GPU-hours", text)]
    assert said[0] == pytest.approx(hours, rel=0.01) and 1.25 < said[1] / said[0] < 1.34
    assert "at 40% of an H100's 989 TFLOP/s" in text
    short, long = (float(re.search(r"length: ([\d.]+)", printed(f"--stage 1 --steps {n}"))[1]) for n in (100, 400))
    assert long == pytest.approx(4 * short, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_it_takes_little_memory_and_time(tmp_path):
    code = (  # VmHWM and not ru_maxrss: that one remembers the size of the process that forked this one
        "import re, sys, time; start = time.process_time(); sys.path.insert(0, sys.argv.pop(1))\n"
        "import train; train.main(sys.argv[1:])\n"
        "usage = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20\n"
        "print('cost', usage, time.process_time() - start)"
    )
    words = [sys.executable, "-c", code, str(ROOT), *STAGE2.split(), "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    gib, seconds = map(float, done.stdout.splitlines()[-1].split()[1:])
    assert gib < 1 and seconds < 60, (gib, seconds)


# ---------------------------------------------------------------------------------------------- files, presets, mistakes


def test_missing_files_come_with_their_commands():
    text = printed(STAGE1)
    assert "missing files: 3" in text  # the VAE comes with --sd35
    gated, free = (line for line in text.splitlines() if "curl" in line)
    assert 'curl -fL --create-dirs -H "Authorization: Bearer $HF_TOKEN"' in gated and "stable-diffusion-3.5-medium" in gated
    assert "Authorization" not in free and "siglip2-base-patch16-256" in free
    assert "--sd35" in text and "--siglip" in text and "--vgg" not in text
    assert all(f"--{flag} is not given" in printed(STAGE2) for flag in ("siglip", "vgg", "lpips", "resnet"))
    assert "stage1.safetensors is missing: make it first with python train.py --stage 1 --preset paper" in printed(STAGE2)
    assert all("--data is not given" in found and "image-net.org" in found for found in (text, printed(STAGE2)))
    assert [word for word in ("vae", "siglip", "vgg16") if f"standins/{word}" in printed("--stage 1")] == ["vae", "siglip"]


def test_missing_files_are_named_before_pictures_are_read(tmp_path, capsys):
    arguments = [*STAGE1.split(), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    assert train.command_line(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in ("--sd35 is not", "--siglip is not", "nowhere is no folder"))


def test_every_address_is_whole():
    for name, address, _, _ in train.WEIGHT_FILES.values():
        assert address.startswith("https://") and address.count("//") == 1 and Path(name).suffix in (".safetensors", ".pth")
    assert {*train.NEEDED["1"], *train.NEEDED["2"]} == {*train.WEIGHT_FILES} == {*train.WEIGHTS}


def test_a_given_path_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "sd.safetensors").touch()
    (tmp_path / "train").mkdir()
    given = "--stage 1 --preset paper --sd35 sd.safetensors --siglip nowhere/model.safetensors --vae vae --data train"
    monkeypatch.chdir(tmp_path)
    vae, siglip = sorted(train.missing_files(train.parse_arguments(given.split()), "1"), reverse=True)
    assert siglip.startswith("--siglip nowhere/model.safetensors is not there") and vae.startswith("--vae vae is not there")


@pytest.mark.parametrize("stage", ["0", "1", "2", "ar"])
def test_tiny_preset(stage):
    text = printed(f"--stage {stage}")
    assert "tiny preset" in text and "seconds on two CPU cores" in text and "curl" not in text
    assert 0 < row(text, "all")[0] < 2 and "!" not in text.split("!:")[0]


def test_all_stages_at_once():
    assert printed("--stage all") == "\n".join(printed(f"--stage {stage}") for stage in ("1", "2", "ar"))


@pytest.mark.parametrize("arguments, sentence", [
    ("--stage 0 --preset paper", "stand-ins for the tiny preset"),
    ("--stage 1 --preset paper --gpus 7", "a batch of 256 does not divide by 7 GPUs"),
])
def test_mistakes_are_one_sentence(tmp_path, arguments, sentence):
    done = run(arguments, tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
