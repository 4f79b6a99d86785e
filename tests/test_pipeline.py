"""The real commands: a whole tiny run in a few steps, then everything that can be wrong at the keyboard."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402

CLASSES = ("bird", "fish", "house")
STEPS = ("--steps", "6", "--batch-size", "8")


def run(script, *arguments, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def call(script, *arguments):
    """The same command inside this process, which spares the start of an interpreter."""
    out, err = io.StringIO(), io.StringIO()
    extra = {"train.py": ["--workers", "0"], "fid.py": ["--workers", "0"]}.get(script, [])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            commands = {"train.py": train.command_line, "sample.py": sample.command_line, "fid.py": train.fid.main}
            code = commands[script]([*map(str, arguments), *extra])
        except SystemExit as stop:  # argparse
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def sentence(result, *words):
    """Exit code 2 and one line on stderr that holds the words, no traceback."""
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith(("train.py:", "sample.py:"))]
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and len(lines) == 1, result.stderr[-2000:]
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def make_pictures(folder, per_class=30):
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture = np.full((40, 48, 3), 80 * label, np.uint8) + rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pictures):
    """A whole run of a few steps on a small folder, made once."""
    out = tmp_path_factory.mktemp("run") / "small"
    result = run("train.py", "--stage", "all", "--data", pictures, "--out", out, *STEPS)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result


def test_whole_run_writes_what_it_promises(finished):
    out, result = finished
    for name in ("stage1.safetensors", "stage2.safetensors", "ar.safetensors", "log.jsonl", "standins/vae.safetensors"):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.part")) and not (out / ".writable").exists()
    for stage in ("0", "1", "2", "ar"):
        assert f"stage {stage} done" in result.stdout
        assert (out / f"preview-{stage}-0000006.png").is_file() and Image.open(out / f"preview-{stage}-0000006.png").width > 90
    assert "next: python sample.py --class 1 --run" in result.stdout


def test_log_has_every_term(finished):
    entries = [json.loads(line) for line in open(finished[0] / "log.jsonl")]
    terms = {
        "0": {"vae_mse", "vae_kl", "siglip", "vgg", "resnet"},
        "1": {"diff", "distill", "contrast", "quant", "token_entropy", "code_entropy", "used", "imbalance", "dead_bits"},
        "2": {"mse", "lpips", "resnet", "distill", "contrast", "quant", "gan", "d_loss", "d_real", "d_fake", "used"},
        "ar": {"nll", "accuracy"},
    }
    for stage, names in terms.items():
        mine = [entry for entry in entries if entry["stage"] == stage]
        assert names | {"loss", "lr", "grad_norm", "skipped", "step", "images_per_s", "mfu"} <= mine[-2].keys(), stage
        assert all(np.isfinite(value) for entry in mine for value in entry.values() if not isinstance(value, str))
    assert {"psnr", "ssim"} <= entries[-3].keys() | entries[-1].keys() | {k for e in entries if e["stage"] == "2" for k in e}


def test_checkpoints_describe_themselves(finished):
    out = finished[0]
    for name, form in (("stage1", "semtok-tokenizer"), ("stage2", "semtok-tokenizer"), ("ar", "semtok-ar")):
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            about = file.metadata()
        assert about["format"] == form and about["preset"] == "tiny" and json.loads(about["classes"]) == list(CLASSES)
    model, about = semtok.load_semtok(str(out / "stage2.safetensors"))
    assert about["stage"] == "2" and model.config.tokens * model.config.bits == 384


def test_stand_ins_pass_through_the_real_loaders(finished):
    folder = finished[0] / "standins"
    vae, siglip = semtok.load_vae(str(folder / "vae.safetensors")), semtok.load_siglip(str(folder / "siglip"))
    resnet = train.load_resnet(str(folder / "resnet50.safetensors"))
    lpips = train.fid.load_lpips(str(folder / "vgg16.safetensors"), str(folder / "lpips.safetensors"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert vae.encode(x).shape == (2, 8, 8, 8) and siglip(x).shape == (2, 64, 4, 4)
    assert resnet(x).shape == (2, 3) and (lpips(x, x.flip(0)) > 0).all() and not lpips(x, x).any()


def test_finished_stage_says_so_and_keeps_its_result(finished, pictures):
    out = finished[0]
    before = (out / "stage1.safetensors").read_bytes()
    result = call("train.py", "--stage", "1", "--data", pictures, "--out", out, *STEPS)
    assert result.returncode == 0 and "is finished" in result.stdout and "--overwrite" in result.stdout
    assert (out / "stage1.safetensors").read_bytes() == before


def test_samples_are_a_function_of_the_seed(finished, tmp_path):
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run("sample.py", "--class", "1", "--run", finished[0], "--seed", seed, "--n", "4", "--top-p", "1", "--out", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(tmp_path / f"{name}.png")
        files[name] = (tmp_path / f"{name}.png").read_bytes()
    assert files["a"] == files["b"] != files["c"]


def test_labels_by_name_and_every_sampling_flag(finished, tmp_path):
    result = run(
        "sample.py", "--labels", "bird", 2, "--run", finished[0], "--n", 3, "--steps", 5, "--cfg", 2, "--cfg-schedule",
        "constant", "--top-p", 0.9, "--order", "confidence", "--device", "cpu", "--out", tmp_path / "grid.png",
    )
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "grid.png").size == (3 * 96, 2 * (96 + 18))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1", "LA"])
def test_any_photo_goes_through(finished, tmp_path, mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (90, 70), dtype=np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("photo.tiff" if mode in ("CMYK", "I;16") else "photo.png")
    picture.save(path)
    result = call("sample.py", "--image", path, "--run", finished[0], "--steps", 2, "--out", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out.png").size == (3 * 256, 256 + 18)


def test_npz_survives_an_interruption(finished, tmp_path):
    whole, broken = tmp_path / "whole.npz", tmp_path / "broken.npz"
    options = ("--run", finished[0], "--npz", 1100, "--steps", 2, "--cfg", 1, "--batch-size", 250)
    assert run("sample.py", *options, "--out", whole).returncode == 0
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *map(str, options), "--out", str(broken)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (tmp_path / "broken.npz.parts" / "00000.npy").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not broken.exists() and (tmp_path / "broken.npz.parts" / "00000.npy").exists()
    sentence(call("sample.py", *options, "--seed", 5, "--out", broken), "other settings")
    assert run("sample.py", *options, "--out", broken).returncode == 0
    first, second = (np.load(path)["arr_0"] for path in (whole, broken))
    assert first.shape == (1100, 32, 32, 3) and first.dtype == np.uint8 and np.array_equal(first, second)


def test_reconstructions_keep_names_and_are_not_made_twice(finished, pictures, tmp_path):
    out = tmp_path / "recons"
    options = ("--reconstruct", pictures, "--run", finished[0], "--out", out)
    assert call("sample.py", *options).returncode == 0
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(made) == 90 and Image.open(out / "fish" / "004.png").size == (32, 32)
    assert call("sample.py", *options).returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_a_run_is_scored_offline_by_its_own_toys(finished, pictures, tmp_path):
    toys, samples, recons = finished[0] / "standins", tmp_path / "samples.npz", tmp_path / "recons"
    reference = toys / "reference"
    assert sorted(str(path.relative_to(reference)) for path in reference.rglob("*.png")) == [
        f"{name}/{i:05d}.png" for i, name in enumerate(CLASSES)  # every 50th of 30: the first of each class is held out
    ]
    assert call("sample.py", "--npz", 12, "--out", samples, "--run", finished[0], "--steps", 2).returncode == 0
    assert call("sample.py", "--reconstruct", reference, "--out", recons, "--run", finished[0]).returncode == 0

    def score(*arguments):
        result = call("fid.py", "--inception", toys / "inception.safetensors", "--device", "cpu", *arguments)
        assert "FID-50k" not in result.stdout + result.stderr
        return result

    refused = score(pictures, samples)
    assert refused.returncode == 2 and not refused.stdout and "--toy" in refused.stderr
    result = score("--toy", "--json", pictures, samples)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["toy"] and report["protocol"].startswith("TOY") and not report["standard_weights"]
    assert list(report["metrics"]) == ["TOY IS", "TOY FID", "TOY sFID", "TOY Precision", "TOY Recall"]
    assert all(np.isfinite(value) for value in report["metrics"].values()) and report["metrics"]["TOY FID"] > 0
    others = ("--vgg", toys / "vgg16.safetensors", "--heads", toys / "lpips.safetensors")
    result = score("--toy", "--pairs", *others, reference, recons)
    assert result.returncode == 0, result.stderr
    values = dict(re.findall(r"^TOY (rFID|PSNR|SSIM|LPIPS) +([-\d.e]+)$", result.stdout.replace(" \n", "\n"), re.M))
    assert list(values) == ["rFID", "PSNR", "SSIM", "LPIPS"] and all(float(value) > 0 for value in values.values())


# ------------------------------------------------------------------------------------------------------- interruptions


def test_stopping_saves_and_resuming_ends_in_the_same_bytes(finished, pictures, tmp_path):
    """Stage 1 stopped by SIGTERM and gone on with equals stage 1 in one piece, bit for bit."""
    arguments = ["--stage", "1", "--data", pictures, "--steps", "30", "--batch-size", "4"]
    for name in ("whole", "stopped"):
        shutil.copytree(finished[0] / "standins", tmp_path / name / "standins")
    assert run("train.py", *arguments, "--out", tmp_path / "whole").returncode == 0
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments), "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    seen = ""
    while not re.search(r"\| ([2-9]|1\d)/30", seen) and process.poll() is None:  # some steps into the run
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 2 and "stopped at step" in rest and "--resume" in rest, rest
    assert not (tmp_path / "stopped" / "stage1.safetensors").exists()
    sentence(run("train.py", *arguments, "--out", tmp_path / "stopped"), "--resume", "--overwrite")
    result = run("train.py", *arguments, "--out", tmp_path / "stopped", "--resume")
    assert result.returncode == 0, result.stderr
    same_tensors(tmp_path / "whole" / "stage1.safetensors", tmp_path / "stopped" / "stage1.safetensors")
    states = [sorted((tmp_path / name / "state-1").iterdir())[-1] for name in ("whole", "stopped")]
    same_tensors(*states)  # weights, averages, both moments of the optimiser
    assert {n.split("/")[0] for n in semtok.TensorFiles(str(states[0])).shapes} == {"weights", "ema", "adam"}
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "stopped")]
    for entry in logs[0] + logs[1]:
        entry.pop("images_per_s", None)
        entry.pop("mfu", None)
    assert logs[0] == logs[1]


def test_torchrun(finished, pictures, tmp_path):
    """The real command: two processes on a CPU are one run, and one of them speaks."""
    for name in ("standins", "tokens"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    shutil.copy(finished[0] / "stage2.safetensors", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"), "--device", "cpu"]
    arguments = ["--stage", "ar", "--data", pictures, "--out", tmp_path, "--steps", 4, "--batch-size", 4]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("4 steps of 4 on 2 x cpu") == 1, result.stdout + result.stderr
    assert (tmp_path / "ar.safetensors").exists()


def same_tensors(one, other):
    """Bit for bit, metadata too (safetensors writes that in any order)."""
    one, other = semtok.TensorFiles(str(one)), semtok.TensorFiles(str(other))
    assert one.shapes == other.shapes and one.metadata == other.metadata
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.shapes)


def test_damaged_state_falls_back_to_the_one_before(finished, pictures, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    state = tmp_path / "run" / "state-1" / "step-0000006.safetensors"
    damaged = state.with_name("step-0000007.safetensors")
    damaged.write_bytes(state.read_bytes()[:1000])
    result = call("train.py", "--stage", "1", "--data", pictures, "--out", tmp_path / "run", "--steps", 8, "--batch-size", 8, "--resume")
    assert result.returncode == 0 and "falling back" in result.stderr and "stage 1 done" in result.stdout, result.stderr


# ----------------------------------------------------------------------------------------------------------- bad inputs


def test_missing_predecessors_name_their_command(tmp_path, pictures):
    line = sentence(call("train.py", "--stage", "2", "--data", pictures, "--out", tmp_path / "x"), "stage1.safetensors")
    assert f"python train.py --stage 1 --data {pictures} --out {tmp_path / 'x'}" in line
    sentence(call("train.py", "--stage", "ar", "--data", pictures, "--out", tmp_path / "x"), "--stage 2")
    sentence(call("sample.py", "--class", "1", "--run", tmp_path / "x"), "--stage ar")


def test_bad_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    for name, words in (("missing", "is no folder"), ("empty", "no pictures"), ("flat", "no class subfolders"), ("hollow", "no train pictures")):
        sentence(call("train.py", "--stage", "1", "--data", tmp_path / name, "--out", tmp_path / "out"), words, "FOLDER/CLASS")


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path):
    folder = make_pictures(tmp_path / "data", 6)
    (folder / "bird" / "004.png").write_bytes(b"no picture at all")
    whole = (folder / "fish" / "003.png").read_bytes()
    (folder / "fish" / "003.png").write_bytes(whole[: len(whole) // 2])
    result = call("train.py", "--stage", "0", "--data", folder, "--out", tmp_path / "out", "--steps", 1, "--batch-size", 4)
    assert result.returncode == 0 and "skipped 2 of 15 train pictures" in result.stderr, result.stderr
    assert "004.png" in result.stderr and "003.png" in result.stderr
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    sentence(call("train.py", "--stage", "0", "--data", folder, "--out", tmp_path / "out2"), "none of the 15 train pictures")


def test_class_out_of_range_names_the_classes(finished):
    for text in ("3", "-1", "dog"):
        sentence(call("sample.py", f"--class={text}", "--run", finished[0]), "0 to 2", "bird, fish, house")


def test_wrong_and_damaged_checkpoints(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("state-*", "preview-*"))
    run_folder = tmp_path / "run"
    good = (run_folder / "ar.safetensors").read_bytes()
    (run_folder / "ar.safetensors").write_bytes((run_folder / "stage1.safetensors").read_bytes())
    sentence(call("sample.py", "--class", "0", "--run", run_folder), "semtok-tokenizer", "--stage ar")
    for damage in (good[: len(good) // 2], b"<html>sign in</html>", b""):
        (run_folder / "ar.safetensors").write_bytes(damage)
        sentence(call("sample.py", "--class", "0", "--run", run_folder), "ar.safetensors", "safetensors file")
    (run_folder / "ar.safetensors").write_bytes(good)
    (run_folder / "stage2.safetensors").write_bytes((run_folder / "stage1.safetensors").read_bytes())
    sentence(call("sample.py", "--class", "0", "--run", run_folder), "another stage2.safetensors")


@pytest.mark.parametrize("script, arguments, words", [
    ("train.py", ["--stage", "3"], "invalid choice"),
    ("train.py", ["--stage", "1", "--steps", "0"], "above 0"),
    ("train.py", ["--stage", "1", "--lr", "fast"], "--lr"),
    ("train.py", ["--stage", "1", "--resume", "--overwrite"], "exclude"),
    ("train.py", ["--stage", "1", "--device", "abacus"], "abacus"),
    ("sample.py", ["--class", "1", "--device", "meta"], "meta"),
    ("sample.py", ["--image", "photo.jpg", "--cfg-schedule", "constant"], "--cfg-schedule changes nothing with --image: it belongs to --class"),
    ("sample.py", ["--reconstruct", "folder", "--seed", "3"], "--seed changes nothing"),
    ("sample.py", ["--class", "1", "--batch-size", "3"], "--batch-size changes nothing"),
    ("train.py", ["--stage", "1", "--speed", "9"], "--speed"),
    ("sample.py", ["--class", "1", "--order", "raster"], "invalid choice"),
    ("sample.py", ["--class", "1", "--top-p", "1.5"], "at most 1"),
    ("sample.py", ["--class", "1", "--n", "0"], "at least 1"),
    ("sample.py", [], "required"),
])
def test_bad_flags(script, arguments, words, tmp_path):
    sentence(call(script, *arguments), words)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_real_command_exits_with_two_and_writes_nothing(script, tmp_path):
    sentence(run(script, *(["--stage", "3"] if script == "train.py" else ["--class", "1", "--order", "raster"]), cwd=tmp_path), "invalid choice")
    assert not list(tmp_path.iterdir())


def test_compiled_sampling_draws_the_same_pictures(finished, monkeypatch):
    """--compile, as far as the compiler's graphs: one serves all steps, and the pictures are the eager ones."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: compiler(function, backend="aot_eager", **options))
    torch._dynamo.reset()
    pictures, device = [], torch.device("cpu")
    for flag in ("--no-compile", "--compile"):
        sampler = sample.Sampler(sample.parse_arguments(["--class", "1", "--run", str(finished[0]), flag]), device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            pictures.append(sampler.draw([0, 1, 2], sample.generator(device, 7)))
        assert hasattr(sampler.ar.hidden, "_torchdynamo_orig_callable") is (flag == "--compile")
    assert torch.equal(*pictures)


def test_sampling_in_bfloat16(finished):
    """What CUDA does, on a CPU: the same tokens give nearly the same pictures, and new ones can be drawn."""
    device = torch.device("cpu")
    whole, half = (
        sample.Sampler(sample.parse_arguments(["--class", "1", "--run", str(finished[0]), flag]), device)
        for flag in ("--no-bfloat16", "--bfloat16")
    )
    assert {p.dtype for network in (half.ar, half.tokenizer) for p in network.parameters()} == {torch.bfloat16}
    bits = torch.rand(4, 16, 24, generator=sample.generator(device, 0)) < 0.5
    assert (half.pictures(bits).float() - whole.pictures(bits).float()).abs().mean() < 2
    drawn = half.draw([0, 2], sample.generator(device, 7))
    assert drawn.shape == (2, 3, 32, 32) and drawn.dtype == torch.uint8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(finished, pictures, tmp_path):
    sentence(call("sample.py", "--class", "1", "--run", finished[0], "--device", "cuda"), "0 CUDA devices", "--device cpu")
    sentence(call("train.py", "--stage", "1", "--data", pictures, "--out", tmp_path, "--device", "cuda:1"), "--device cpu")


def test_bad_pictures_for_sampling(finished, tmp_path):
    (tmp_path / "note.png").write_text("not a picture")
    sentence(call("sample.py", "--image", tmp_path / "note.png", "--run", finished[0]), "note.png", "cannot be read")
    sentence(call("sample.py", "--image", tmp_path / "none.png", "--run", finished[0]), "does not exist")
    sentence(call("sample.py", "--reconstruct", tmp_path / "none", "--run", finished[0]), "holds no pictures")


def test_output_that_cannot_be_written(finished, pictures, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence(call("train.py", "--stage", "1", "--data", pictures, "--out", tmp_path / "file" / "run"), "cannot be written")
    sentence(call("sample.py", "--class", "1", "--run", finished[0], "--out", tmp_path / "file" / "a.png"), "cannot be written")


def test_full_disk_leaves_nothing_half_written(finished, pictures, tmp_path):
    """A limit on file size stands in for a full disk: the state of stage 1 is larger, its log is not."""
    shutil.copytree(finished[0] / "standins", tmp_path / "run" / "standins")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = run("train.py", "--stage", "1", "--data", pictures, "--out", tmp_path / "run", *STEPS, preexec_fn=limit)
    sentence(result, "cannot be written", "free some space")
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file() and "standins" not in str(path)}
    assert not any(name.endswith(".part") for name in left) and "stage1.safetensors" not in left, left
