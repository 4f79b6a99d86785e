"""The real commands: a whole tiny run of a few steps, then everything that can be wrong at the keyboard."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ar  # noqa: E402
import bsq  # noqa: E402
import mmdit  # noqa: E402
import paper  # noqa: E402
import sample  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402

CLASSES = ("bird", "fish", "house")


def call(script, *arguments):
    """A command inside this process, which spares the start of an interpreter."""
    out, err = io.StringIO(), io.StringIO()
    words = [*map(str, arguments), *([] if script == "sample.py" else ["--workers", "0"])]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(script.removesuffix(".py")).command_line(words)
        except SystemExit as stop:  # argparse
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def sentence(result, *words):
    """Exit code 2 and one line on stderr that holds the words, no traceback."""
    lines = result.stderr.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.startswith(("train.py:", "sample.py:", "plan.py:"))]
    assert result.returncode == 2 and len(lines) == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    for word in words:
        assert str(word) in lines[0], lines[0]


def make_pictures(folder, per_class=30):
    """FOLDER/CLASS/NNN.png: noise, of another brightness in each of three classes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(80 * label)).save(folder / name / f"{i:03d}.png")
    return folder


def same_tensors(one, other):
    """Bit for bit, metadata too (safetensors writes that in any order)."""
    one, other = mmdit.TensorFiles(str(one)), mmdit.TensorFiles(str(other))
    assert one.shapes == other.shapes and one.metadata == other.metadata
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.shapes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "data", 10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A whole run of six steps a stage, made once: its folder, and what the command said."""
    out = tmp_path_factory.mktemp("run") / "small"
    steps = ("--steps", 6, "--batch-size", 8, "--set", "gan_start=3")
    result = call("train.py", "--stage", "all", "--data", pictures, "--out", out, *steps)
    assert result.returncode == 0, result.stderr[-2000:]
    return out, result.stdout


# ----------------------------------------------------------------------------------- what a run leaves behind


def test_a_whole_run_writes_what_it_promises_and_its_results_describe_themselves(finished):
    out, said = finished
    assert len(list(out.glob("tokens-*.npy"))) == 1 and not list(out.rglob("*.part"))
    for name, stage in train.STAGES.items():
        assert f"stage {name} done" in said and (out / stage.result).is_file()
        assert [path.name for path in (out / f"state-{name}").iterdir()] == ["step-0000006"]
        for kind in (f"preview-{name}-0000006", f"curves-{name}"):
            image = np.asarray(Image.open(out / f"{kind}.png"))
            assert image.shape[1] > 3 * 32 and image.std() > 5
    assert said.count("next: ") == 1 and "next: python sample.py --class 1" in said  # after the last stage
    settings = json.loads((out / "settings.json").read_text())
    assert settings["preset"] == "tiny" and settings["pictures"].startswith("27 files")  # 3 are held out
    assert settings["set"]["ar"] == {"steps": "6", "batch_size": "8"}
    assert settings["set"]["2"] == settings["set"]["1"] | {"gan_start": "3"}
    keys = "format config fingerprint classes pictures stage preset parent steps figures"
    prints = [mmdit.TensorFiles(str(out / "standins" / "sd3.5_vae.safetensors")).metadata["fingerprint"]]
    for name in ("stage1", "stage2", "ar"):
        about = mmdit.TensorFiles(str(out / f"{name}.safetensors")).metadata
        assert about.keys() == {*keys.split()} and about["preset"] == "tiny" and about["steps"] == "6"
        assert about["format"] == ("semtok-ar" if name == "ar" else "semtok-tokenizer")
        assert json.loads(about["classes"]) == list(CLASSES) and json.loads(about["config"])["bits"] == 24
        assert about["parent"] == prints[-1] and about["fingerprint"] not in prints
        prints.append(about["fingerprint"])
    model, read = semtok.load_semtok(str(out / "stage2.safetensors"))
    assert read["fingerprint"] == prints[2] != "" and model.config.tokens * model.config.bits == 384
    assert read["stage"] == "2" and json.loads(read["figures"])["psnr"] > 0


def test_log_has_every_term(finished):
    entries = [json.loads(line) for line in open(finished[0] / "log.jsonl")]
    codes = "entropy_loss token_entropy code_entropy distill_loss contrast_loss grad_norm_semtok "
    held_out = " val_loss val_entropy_loss val_distill_loss val_contrast_loss"
    judges = "lpips_loss resnet_loss gan_loss discriminator_loss d_real d_fake grad_norm_discriminator "
    for stage, terms, figures in (
        ("0", "vae_loss kl_loss siglip_loss accuracy grad_norm_vae", "psnr ssim"),
        ("1", codes + "flow_loss", "psnr ssim used imbalance dead_bits val_flow_loss" + held_out),
        ("2", codes + judges + "pixel_loss", "psnr ssim used imbalance dead_bits val_pixel_loss "
         "val_lpips_loss val_resnet_loss" + held_out),
        ("ar", "nll accuracy grad_norm_ar", "val_nll val_accuracy"),
    ):
        step, look = (entry for entry in entries if entry["stage"] == stage)
        assert {*terms.split(), "loss", "lr", "skipped", "images_per_s"} <= step.keys(), stage
        assert look.keys() == {*figures.split(), "stage", "step"} and step["step"] == look["step"] == 6
        assert all(np.isfinite(value) for entry in (step, look) for value in entry.values() if value != stage)


def test_pictures_to_numbers_and_back(finished):
    model, pictures = semtok.load_semtok(str(finished[0]))[0], torch.randint(256, (3, 3, 32, 32)).byte()
    codes, index = model.encode(pictures), model.tokenize(pictures)
    assert torch.equal(model.encode(semtok.to_signed(pictures)), codes) and index.dtype == torch.int64
    assert torch.equal(index, bsq.bits_to_index(codes > 0)) and index.shape == (3, 16)
    assert torch.equal(model.detokenize(index), model.reconstruct(pictures))
    changes = [*sample.influence(model, codes, codes.roll(1, 0))]
    assert len(changes) == 16 and {change.shape for change in changes} == {(3, 32, 32)}
    assert max(change.max() for change in changes) > 0
    assert not any(change.any() for change in sample.influence(model, codes, codes.clone()))
    for wrong in (pictures.int(), pictures[:, :1], pictures.permute(0, 2, 3, 1), pictures[..., :16]):
        with pytest.raises(ValueError, match="pictures"):
            model.encode(wrong)
    first = semtok.load_semtok(str(finished[0] / "stage1.safetensors"))[0]
    with pytest.raises(ValueError, match="stage 1 and cannot refine"):
        first.reconstruct(pictures)
    first.start_refiner()
    assert first.reconstruct(pictures).shape == pictures.shape


@pytest.mark.parametrize("name, load", [("stage2", semtok.load_semtok), ("ar", ar.load_ar)])
def test_checkpoints_outlive_a_new_field(finished, tmp_path, name, load):
    """A file from before a size existed is read with its default; a size that we do not know is named."""
    source = mmdit.TensorFiles(str(finished[0] / f"{name}.safetensors"))
    tensors, sizes = {n: source.get(n) for n in source.shapes}, json.loads(source.metadata["config"])
    path = str(tmp_path / "other.safetensors")
    fewer = {key: value for key, value in sizes.items() if key not in ("causal", "form")}
    semtok.write_tensors(path, tensors, source.metadata | {"config": json.dumps(fewer)})
    models = load(path)[0], load(str(source.path))[0]
    assert models[0].config == models[1].config
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))
    semtok.write_tensors(path, tensors, source.metadata | {"config": json.dumps(sizes | {"colours": 3})})
    with pytest.raises(mmdit.UserError, match="colours"):
        load(path)


def test_stand_ins_pass_through_the_real_loaders(finished):
    folder, x = finished[0] / "standins", torch.rand(2, 3, 32, 32) * 2 - 1
    assert semtok.load_vae(str(folder / "sd3.5_vae.safetensors")).encode(x).shape == (2, 8, 8, 8)
    assert semtok.load_siglip(str(folder / "siglip2-base-patch16-256"))(x).shape == (2, 64, 4, 4)


def test_a_finished_stage_says_so_and_an_edited_setting_is_refused(finished, tmp_path):
    out, before = finished[0], (finished[0] / "settings.json").read_bytes()
    again = ("train.py", "--stage", "1", "--out", out)
    for same in ((), ("--steps", 6, "--set", "bits=24", "distill=1")):
        result = call(*again, *same)
        assert result.returncode == 0 and "is finished" in result.stdout, result.stderr
    (out / "settings.json").write_bytes(before)
    generate = ("train.py", "--stage", "ar", "--out", out, "--overwrite")
    sentence(call(*again, "--set", "distill=0"), "has distill 1.0, and this command asks for 0.0")
    sentence(call(*again, "--seed", 1), "has seed 0, and this command asks for 1", "--out", "--overwrite")
    sentence(call(*again, "--preset", "base"), "has preset tiny, and this command asks for base")
    sentence(call(*again, "--steps", 3), "stands at step 6 of 3: ask for more")
    sentence(call(*generate, "--set", "tokens=8"), "has tokens 16, and this command asks for 8")
    other = make_pictures(tmp_path / "other", 2)
    sentence(call(*again, "--data", other), "was begun with other pictures (27 files", "now 3 files")
    (out / "settings.json").write_bytes(before)
    assert all((out / stage.result).exists() for stage in train.STAGES.values())


def test_each_next_command_runs_as_printed(finished, tmp_path, monkeypatch):
    """In a folder with a blank, and beside published weights, here garbage: the bits of `--stage all`."""
    monkeypatch.chdir(tmp_path)
    for name in train.PUBLISHED:
        semtok.write_text(f"weights/{name}.safetensors", "garbage")
    semtok.write_text("a run/settings.json", (finished[0] / "settings.json").read_text())
    command, commands = "python train.py --stage 0 --out 'a run'", []
    while command:
        _, script, *arguments = shlex.split(command)
        result = call(script, *arguments)
        assert result.returncode == 0, result.stderr[-2000:]
        commands.append(command)
        command = result.stdout.partition("next: ")[2].strip()
    assert commands[-1] == "python sample.py --class 1 --run 'a run'" and len(commands) == 5
    assert Image.open(result.stdout.strip()).size == (8 * 96, 2 * 96 + 18)
    for stage in train.STAGES.values():
        same_tensors(finished[0] / stage.result, tmp_path / "a run" / stage.result)


# ---------------------------------------------------------------------------------------- sample.py, each job


def test_each_job_of_sampling(finished, pictures, tmp_path):
    def draw(name, *flags):
        result = call("sample.py", *flags, "--run", finished[0], "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr[-2000:]
        return tmp_path / name

    options = ("--class", "fish", "--n", 4, "--steps", 4, "--top-p", 1, "--seed")
    drawn = [draw(f"{i}.png", *options, seed).read_bytes() for i, seed in enumerate((0, 0, 1))]
    assert drawn[0] == drawn[1] != drawn[2] and Image.open(tmp_path / "0.png").width >= 4 * 32
    panels = Image.open(draw("photo.png", "--image", pictures / "fish" / "003.png", "--steps", 2))
    assert panels.width == 3 * 256  # the original, the sampler, the refiner
    photos = ("--image", pictures / "fish" / "003.png", pictures / "fish" / "004.png")
    assert Image.open(draw("maps.png", *photos, "--tokens")).size == (4 * 256, 4 * 256 + 23)
    kept = Image.open(draw("kept.png", *photos, "--keep", 5, "--class", "fish"))
    assert kept.size == (7 * 256, 2 * (256 + 46))  # original, reconstruction, five tokens, four completions
    sentence(call("sample.py", *photos, "--class", 0, "--run", finished[0]), "give one of --class")
    sentence(call("sample.py", *photos, "--keep", 16, "--class", 0, "--run", finished[0]), "fewer than 16")
    arrays = [np.load(draw(f"{i}.npz", "--npz", 7, "--steps", 2))["arr_0"] for i in range(2)]
    assert arrays[0].shape == (7, 32, 32, 3) and arrays[0].dtype == np.uint8 and np.array_equal(*arrays)
    with mock.patch("fcntl.lockf", side_effect=BlockingIOError):
        sentence(call("sample.py", "--npz", 7, "--run", finished[0], "--out", tmp_path / "2.npz"), "at work")
    draw("2.npz", "--npz", 7, "--steps", 2)
    times = []
    for _ in range(2):  # the second time nothing is made
        made = draw("recons", "--reconstruct", pictures)
        times.append({path.relative_to(made): path.stat().st_mtime_ns for path in made.rglob("*.png")})
    assert times[0] == times[1] and len(times[0]) == 30
    assert Image.open(made / "fish" / "004.png").size == (32, 32)


def test_progress(finished, tmp_path):
    """Figure 5: a column for each of the steps 1, 2, 4 and 6, a row for each picture and order."""
    draw = ("sample.py", "--class", "fish", "--progress", "--steps", 6, "--run", finished[0])
    result, path = call(*draw), finished[0] / "class-fish-progress-seed-0.png"
    assert result.returncode == 0 and result.stdout.strip() == str(path), result.stderr
    assert Image.open(path).size == (4 * 96, 2 * (2 * 96 + 36))
    assert call(*draw, "--order", "raster", "--n", 3, "--out", tmp_path / "a.png").returncode == 0
    assert Image.open(tmp_path / "a.png").size == (4 * 96, 3 * 96 + 36)
    sentence(call("sample.py", "--npz", 9, "--progress"),
             "--progress changes nothing with --npz: it belongs to --class, --labels")
    sampler = sample.Sampler(sample.parse_arguments([*map(str, draw[1:])]), torch.device("cpu"))
    shown, known = sampler.draw_steps([1, 2], semtok.key_generator("cpu", 0), "random")
    whole = sampler.draw([1, 2], semtok.key_generator("cpu", 0))
    assert known == {1: 1, 2: 3, 4: 8, 6: 16}  # 16 cos(pi/2 n/6), floored: 15, 13, 8, 0
    assert torch.equal(shown[:, -1], whole)
    assert sampler.label("FISH") == sampler.label("1") == 1
    with pytest.raises(mmdit.UserError, match=r"class 9{100}\.\.\. does not exist"):
        sampler.label("9" * 5000)


def test_clusters(finished, tmp_path, capsys):
    """Figure 6, which tests/paper.py draws."""
    folder = make_pictures(tmp_path / "data", 8)
    (folder / "fish" / "002.png").write_bytes(b"no picture at all")
    paper.clusters(folder, finished[0], tmp_path / "a.png", 200)
    (count, *_, pixels, _), skipped = (text.splitlines() for text in capsys.readouterr())
    assert count == "23 pictures of 3 classes" and skipped[0].startswith("skipped: ")
    assert pixels == "pixels: 5 nearest neighbours 100.0%"  # told by brightness
    assert Image.open(tmp_path / "a.png").size == (1200, 460)
    with pytest.raises(mmdit.UserError, match="has 0 classes of 6 pictures: give .* FOLDER/CLASS/picture"):
        paper.clusters(folder / "fish", finished[0], tmp_path / "b.png", 200)


@pytest.mark.parametrize("command", [train, sample])
@pytest.mark.parametrize("said", ["", "Unable to allocate 9 EiB"])
def test_full_memory_is_one_sentence(command, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "main", mock.Mock(side_effect=MemoryError(said)))
    assert command.command_line([]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and ("--accumulate" in text or "--batch-size" in text)


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "full", "x"), "free some space"),
    (OSError(errno.EACCES, "no", "x"), "permissions"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--workers 0"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space"), "--workers 0"),
    (mmdit.UserError("Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
                     "last):\n  File x\nmmdit.UserError: check the folder\n"), "train.py: check the folder"),
    (mmdit.UserError(f"class \x1b[2J{'x' * 5000} is not there"), f"[2J{'x' * 93}... is not there"),
    (mmdit.UserError("a b " * 50_000 + "take another"), "take another"),
])
def test_advice_fits_the_error(error, words, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", mock.Mock(side_effect=error))
    assert train.command_line([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and "Caught" not in said and len(said) < 2000, said
    assert ("free some" in said) == ("free some" in words) and "GPUs" not in said and "\x1b" not in said


def test_streams_that_are_closed_or_cannot_encode(finished, tmp_path):
    """Nobody reads any more: quiet. A name that ASCII has no letters for is escaped."""
    draw = [sys.executable, ROOT / "sample.py", "--class", "0", "--n", "1", "--run", finished[0]]
    for out, code, said in (("a.png", 141, None), ("\u00e9.png", 0, rb"/\xe9.png")):
        reader, writer = os.pipe()
        with open(reader, "rb") as reading, open(writer, "wb") as writing:
            if said is None:
                reading.close()
            done = subprocess.run([*draw, "--out", tmp_path / out], stdout=writing, stderr=subprocess.PIPE,
                                  env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=100)
            writing.close()
            assert done.returncode == code and b"rror" not in done.stderr, done.stderr
            assert (tmp_path / out).exists() and (said is None or said in reading.read())


def test_wrong_and_damaged_checkpoints(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("state-*", "preview-*"))
    draw = ("sample.py", "--class", "0", "--run", run)
    good, first = ((run / f"{name}.safetensors").read_bytes() for name in ("ar", "stage1"))
    (run / "ar.safetensors").write_bytes(first)
    sentence(call(*draw), "semtok-tokenizer")
    for damage in (good[: len(good) // 2], b"<html>sign in</html>", b""):
        (run / "ar.safetensors").write_bytes(damage)
        sentence(call(*draw), "ar.safetensors", "safetensors file")
    (run / "ar.safetensors").write_bytes(good)
    (run / "stage2.safetensors").write_bytes(first)
    sentence(call(*draw), "stage2.safetensors")
    sentence(call("train.py", "--stage", "ar", "--out", run), "was made from another result", "--overwrite")
    refine = ("train.py", "--stage", "2", "--out", run, "--overwrite")
    semtok.write_tensors(str(run / "stage1.safetensors"), {"x": torch.zeros(1)}, {"fingerprint": "f"})
    sentence(call(*refine), "stage1.safetensors", "semtok-tokenizer")
    (run / "stage1.safetensors").write_bytes(first[:1000])
    sentence(call(*refine), "stage1.safetensors", "safetensors file")


def test_torchrun(finished, tmp_path):
    """The real command: two processes on a CPU are one run, and one of them speaks."""
    for name in ("settings.json", "stage2.safetensors"):
        shutil.copy(finished[0] / name, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "train.py"]
    command += ["--stage", "ar", "--out", tmp_path, "--device", "cpu", "--workers", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.count(" on 2 x cpu") == 1, said
    assert (tmp_path / "ar.safetensors").exists()
    two, one = (next(folder.glob("tokens-*.npy")) for folder in (tmp_path, finished[0]))
    bits = [np.load(path)["bits"] for path in (two, one)]
    assert two.name == one.name and np.unpackbits(bits[0] ^ bits[1]).sum() <= 2  # sums in another order


# ------------------------------------------------------------------------------------------------- bad inputs


def test_missing_predecessors_and_bad_folders(pictures, tmp_path):
    for stage, before in (("2", "1"), ("ar", "2")):
        sentence(call("train.py", "--stage", stage, "--data", pictures, "--out", tmp_path),
                 f"stage{before}.s", f"make it first with python train.py --stage {before} --out {tmp_path}")
    sentence(call("sample.py", "--class", "1", "--run", tmp_path / "x"), "stage2.safetensors is missing",
             f"python train.py --stage 2 --out {tmp_path / 'x'}")
    paper = ("train.py", "--stage", "1", "--preset", "paper", "--out", tmp_path, "--weights", tmp_path)
    sentence(call(*paper), "--data needs a folder")
    sentence(call(*paper, "--data", pictures), tmp_path / "siglip2-base-patch16-256", "weights.md")
    for folder in ("flat", "hollow/cat"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    asked, layout = ("train.py", "--stage", "1", "--out", tmp_path / "out", "--data"), "FOLDER/CLASS/picture"
    sentence(call(*asked, tmp_path / "missing"), "is no folder", layout)
    sentence(call(*asked, tmp_path / "flat"), "in 0 subfolders", layout)
    sentence(call(*asked, tmp_path / "hollow"), "no train pictures in 1", layout)
    sentence(call(*asked, tmp_path), "lies in the pictures' folder")


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path):
    folder = make_pictures(tmp_path / "data", 6)
    (folder / "bird" / "004.png").write_bytes(b"no picture at all")
    whole = (folder / "fish" / "003.png").read_bytes()
    (folder / "fish" / "003.png").write_bytes(whole[: len(whole) // 2])
    train_one = ("train.py", "--stage", "0", "--out", tmp_path / "out")
    for name in ("bird/a.HEIC", "fish/b.heic", "fish/notes"):
        (folder / name).touch()
    result = call(*train_one, "--data", folder, "--steps", 1, "--batch-size", 4)
    assert result.returncode == 0 and "skipped (2 so far)" in result.stderr, result.stderr
    assert all(name in result.stderr for name in ("004.png", "003.png")) and "(3 so" not in result.stderr
    assert "3 files are no pictures that are read here: .heic 2, no suffix 1\n" in result.stderr
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    sentence(call(*train_one, "--overwrite"), "50 pictures in a row could not be read")


@pytest.mark.parametrize("arguments, words", [
    ("--stage 3", "invalid choice"), ("--stage 1 --steps 0", "above 0"), ("--stage 1 --lr fast", "lr=fast"),
    ("--stage 1 --device abacus", "abacus"), ("--stage 1 --speed 9", "--speed"),
    ("--stage 1 --seed -1", "at least 0"), ("--stage 1 --accumulate 3", "16 does not divide by 3"),
    ("--stage ar --ar-size XL", "--preset paper"), ("--stage 1 --weights w", "tiny makes its own networks"),
    ("--stage 0 --preset paper", "paper reads published weights"),
    ("--stage 0 --set lambda_q=1", "--set lambda_q changes nothing in stage 0"),
    ("--stage 1 --set gan_start=5", "gan_start changes nothing"), ("--stage 1 --set bits", "bits="),
    ("--stage 2 --set group_bits=2", "group_bits"), ("--stage 1 --set bits=0", "bits must be at least 1"),
    ("--stage 1 --set causal=2", "one of 0, 1"), ("--stage 1 --set lambda_s=nan", "lambda_s=nan"),
    ("--stage 2 --set init=stage0", "one of stage1, scratch"), ("--stage ar --set smoothing=2", "at most 1"),
    ("--stage 1 --set entropy_group=5", "divide the 24"), ("--stage 1 --set encoder_heads=3", "encoder_"),
    ("--stage 1 --set image_size=30", "multiple of 8"), ("--stage ar --set heads=3", "heads 3, doubled"),
    ("--stage 1 --set image_size=8", "image_size 8 is too small"), ("--stage 1 --accumulate=--", "value --"),
    ("--stage 1 --set patience=1e9", "1000"), ("--stage 1 --set encoder_depth=999", "at most 100"),
    ("--stage 1 --set token=3", "did you mean tokens?"),
    ("--stage all --set group_bits=5", "group_bits 5"), ("--stage ar --set group_bits=24", "at most 12"),
])
def test_bad_flags_and_settings(arguments, words, tmp_path):
    sentence(call("train.py", *arguments.split(), "--out", tmp_path / "x"), words)
    assert not (tmp_path / "x").exists()


def test_no_rank_stays_silent_and_waiting_has_an_end(finished, pictures, tmp_path, monkeypatch, capsys):
    """What another rank alone meets is said, and rank 0 does not wait for ever for another rank's parts."""
    with mock.patch.object(semtok, "ranks", lambda: (1, 2)), mock.patch("time.sleep") as sleep:
        assert semtok.run_command("x.py", lambda: Path(tmp_path, "none").read_text(), (), "") == 2
    assert "none" in capsys.readouterr().err and sleep.mock_calls == [mock.call(20)]
    clock = iter(range(0, 10**6, 2000))
    monkeypatch.setattr(sample, "launched", lambda: (0, 2, 0))
    with mock.patch("time.sleep"), mock.patch("time.time", lambda: next(clock)):
        made = ("--npz", 501, "--steps", 1, "--out", tmp_path / "a.npz")
        result = call("sample.py", *made, "--run", finished[0])
    assert result.returncode == 2 and "waiting for 1 parts" in result.stderr and "in an hour" in result.stderr
    (tmp_path / "bad").mkdir()
    for i in range(33):  # rank 0 has all but the last
        (tmp_path / f"bad/{i:02d}.png").write_bytes(b"no picture")
    made = ("--reconstruct", tmp_path / "bad", "--out", tmp_path / "r")
    sentence(call("sample.py", *made, "--run", finished[0]),
             "none of the 32 pictures can be read")


def test_help_says_what_every_setting_is():
    text = call("train.py", "--help").stdout
    assert re.search(r"\n +lr +0.001 +0.003 +0.008 +0.005 +at its peak", text)
    assert re.search(r"\n +lambda_q +0.0025 +0.0025 +of the entropy loss, Eq. 4", text)
    assert all(f"\n  {name} " in text for stage in train.STAGES for name in train.setting_names(stage))


def test_captions_stand_above_their_columns():
    black = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    rows = {"Übung\na | b | c": black, " ": black}
    with mock.patch.object(semtok.ImageDraw.ImageDraw, "text") as text:
        sheet = semtok.picture_grid(rows | {"x" * 10**6: rows[" "]}, side=80)
    said = [(call.args[0], call.args[1]) for call in text.mock_calls]
    assert said[:4] == [((4, 3), "Ubung"), ((4, 21), "a"), ((84, 21), "b"), ((164, 21), "c")]
    assert len(said) == 5 and len(said[4][1]) == sheet.width == 240 and sheet.height == 3 * 80 + 3 * 18


def test_only_files_are_replaced(finished, pictures, tmp_path):
    target, link, pipe, folder = (tmp_path / name for name in ("target", "link", "pipe", "folder"))
    semtok.write_text(str(target), "old")
    link.symlink_to(target)
    semtok.write_text(str(link), "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    folder.mkdir()
    with contextlib.suppress(PermissionError):  # for root alone
        os.mknod(tmp_path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    others = {path: path.lstat() for path in tmp_path.iterdir() if path not in (target, link)}
    for path in others:
        with pytest.raises(mmdit.UserError, match="is no ordinary file"):
            semtok.write_text(str(path), "new")
    sentence(call("sample.py", "--class", "1", "--steps", 1, "--run", finished[0], "--out", pipe), pipe)
    sentence(call("train.py", "--stage", "1", "--data", pictures, "--out", target / "run"), target)
    assert {path: path.lstat() for path in others} == others and target.read_text() == "new"
    assert set(tmp_path.iterdir()) == {target, link, *others}
