"""The real commands: a whole tiny run of a few steps, then everything that can be wrong at the keyboard."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
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
STEPS = ("--steps", 6, "--batch-size", 8)


def call(script, *arguments):
    """A command inside this process, which spares the start of an interpreter."""
    out, err = io.StringIO(), io.StringIO()
    command = {"train.py": train.command_line, "sample.py": sample.command_line}.get(script, train.fid.main)
    extra = [] if script == "sample.py" else ["--workers", "0"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command([*map(str, arguments), *extra])
        except SystemExit as stop:  # argparse
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def sentence(result, *words):
    """Exit code 2 and one line on stderr that holds the words, no traceback."""
    lines = result.stderr.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.startswith(("train.py:", "sample.py:"))]
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and len(lines) == 1, result.stderr[-2000:]
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def make_pictures(folder, per_class=30):
    """FOLDER/CLASS/NNN.png: noise, of another brightness in each of three classes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture = np.full((40, 48, 3), 80 * label, np.uint8) + rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i:03d}.png")
    return folder


def same_tensors(one, other):
    """Bit for bit, metadata too (safetensors writes that in any order)."""
    one, other = semtok.TensorFiles(str(one)), semtok.TensorFiles(str(other))
    assert one.shapes == other.shapes and one.metadata == other.metadata
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.shapes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "data", 10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A whole run of a few steps on a small folder, made once: its folder, and what the command said."""
    out = tmp_path_factory.mktemp("run") / "small"
    result = call("train.py", "--stage", "all", "--data", pictures, "--out", out, *STEPS)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result.stdout


# ----------------------------------------------------------------------------------- what a run leaves behind


def test_whole_run_writes_what_it_promises(finished):
    out, said = finished
    for name in ("stage1.safetensors", "stage2.safetensors", "ar.safetensors", "tokens.npy", "standins/vae.safetensors"):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.part"))
    for stage in train.STAGES:
        assert f"stage {stage} done" in said
        assert (out / f"state-{stage}" / "step-0000006" / "state.json").is_file()
        preview, curves = (np.asarray(Image.open(out / f"{name}.png")) for name in (f"preview-{stage}-0000006", f"curves-{stage}"))
        assert preview.shape[1] > 3 * 32 and preview.std() > 5 and curves.std() > 5
    assert f"next: python sample.py --class 1 --run {out}" in said


def test_log_has_every_term(finished):
    entries = [json.loads(line) for line in open(finished[0] / "log.jsonl")]
    codes = {"entropy_loss", "token_entropy", "code_entropy", "distill_loss", "contrast_loss", "grad_norm_semtok"}
    codes |= {"used", "imbalance", "dead_bits"}
    judges = {"lpips_loss", "resnet_loss", "gan_loss", "discriminator_loss", "d_real", "d_fake"}
    terms = {
        "0": {"vae_loss", "kl_loss", "siglip_loss", "accuracy", "grad_norm_vae"},
        "1": codes | {"flow_loss"},
        "2": codes | judges | {"pixel_loss", "grad_norm_discriminator"},
        "ar": {"nll", "accuracy", "grad_norm_ar"},
    }
    for stage, names in terms.items():
        step, *preview, last = (entry for entry in entries if entry["stage"] == stage)
        assert [entry["preview_psnr"] > 0 for entry in preview] == [True] * (stage != "ar"), stage
        assert names | {"loss", "lr", "skipped", "step", "images_per_s", "tflops"} <= step.keys(), stage
        assert ({"val_nll_per_bit", "val_bit_accuracy"} if stage == "ar" else {"psnr", "ssim"}) <= last.keys()
        assert all(np.isfinite(value) for entry in (step, last) for value in entry.values() if value != stage)


def test_checkpoints_describe_themselves(finished):
    about = {}
    for name in ("stage1", "stage2", "ar"):
        with safe_open(finished[0] / f"{name}.safetensors", "pt") as file:
            about[name] = file.metadata()
        assert about[name]["format"] == ("semtok-ar" if name == "ar" else "semtok-tokenizer")
        assert about[name]["preset"] == "tiny" and json.loads(about[name]["classes"]) == list(CLASSES)
        settings = json.loads(about[name]["settings"])
        assert (settings["steps"], settings["batch_size"], settings["seed"], settings["bits"]) == (6, 8, 0, 24)
        assert settings["pictures"].startswith("27 files")  # of ten pictures of a class, one is held out
    assert about["ar"]["tokenizer"] == about["stage2"]["fingerprint"] != about["stage1"]["fingerprint"]
    model, read = semtok.load_semtok(str(finished[0] / "stage2.safetensors"))
    assert read["stage"] == "2" and model.config.tokens * model.config.bits == 384


def test_stand_ins_pass_through_the_real_loaders(finished):
    folder = finished[0] / "standins"
    vae, siglip = semtok.load_vae(str(folder / "vae.safetensors")), semtok.load_siglip(str(folder / "siglip"))
    resnet = train.load_resnet(str(folder / "resnet50.safetensors"))
    lpips = train.fid.load_lpips(str(folder / "vgg16.safetensors"), str(folder / "lpips.safetensors"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert vae.encode(x).shape == (2, 8, 8, 8) and siglip(x).shape == (2, 64, 4, 4)
    assert resnet(x).shape == (2, 10) and (lpips(x, x.flip(0)) > 0).all() and not lpips(x, x).any()


def test_a_finished_stage_says_so_and_an_edited_setting_is_refused(finished, pictures):
    before = (finished[0] / "stage1.safetensors").read_bytes()
    again = ("train.py", "--stage", "1", "--data", pictures, "--out", finished[0], *STEPS)
    result = call(*again, "--set", "log_every=1")  # how often something is written is free
    assert result.returncode == 0 and "is finished" in result.stdout and "--overwrite" in result.stdout
    sentence(call(*again, "--lr", "0.01"), "stage1.safetensors was made with lr 0.003, this run has lr 0.01")
    sentence(call(*again, "--set", "distill=0"), "was made with distill 1.0", "--overwrite")
    sentence(call(*again, "--seed", 1), "was made with seed 0")
    next_stage = ("train.py", "--stage", "ar", "--data", pictures, "--out", finished[0], *STEPS, "--overwrite")
    sentence(call(*next_stage, "--set", "tokens=8"), "stage2.safetensors was made with tokens 16, this run has tokens 8")
    assert (finished[0] / "stage1.safetensors").read_bytes() == before
    assert (finished[0] / "ar.safetensors").exists()


# ---------------------------------------------------------------------------------------- sample.py, each job


def test_each_job_of_sampling(finished, pictures, tmp_path):
    def draw(name, *flags):
        result = call("sample.py", *flags, "--run", finished[0], "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr[-2000:]
        return tmp_path / name

    one, same, other = (
        draw(f"{i}.png", "--class", "fish", "--n", 4, "--steps", 4, "--top-p", 1, "--seed", seed).read_bytes()
        for i, seed in enumerate((0, 0, 1))
    )
    assert one == same != other and Image.open(tmp_path / "0.png").width >= 4 * 32
    panels = np.asarray(Image.open(draw("photo.png", "--image", pictures / "fish" / "003.png", "--steps", 2)))
    assert panels.shape[1] == 3 * 256  # the original, the sampler, the refiner
    arrays = [np.load(draw(f"{i}.npz", "--npz", 7, "--steps", 2))["arr_0"] for i in range(2)]
    assert arrays[0].shape == (7, 32, 32, 3) and arrays[0].dtype == np.uint8 and np.array_equal(*arrays)
    made = draw("recons", "--reconstruct", pictures)
    files = {path.relative_to(made): path.stat().st_mtime_ns for path in made.rglob("*.png")}
    assert len(files) == 30 and Image.open(made / "fish" / "004.png").size == (32, 32)
    draw("recons", "--reconstruct", pictures)
    # not made twice
    assert files == {path.relative_to(made): path.stat().st_mtime_ns for path in made.rglob("*.png")}


def test_progress(finished, tmp_path):
    """Figure 5: a column for each of the steps 1, 2, 4 and 6, a row for each picture and order."""
    draw = ("sample.py", "--class", "fish", "--progress", "--steps", 6, "--run", finished[0])
    result = call(*draw)
    assert result.returncode == 0 and result.stdout.strip() == str(finished[0] / "class-1-progress-seed-0.png"), result.stderr
    assert Image.open(finished[0] / "class-1-progress-seed-0.png").size == (4 * 96, 2 * 2 * (96 + 18))
    assert call(*draw, "--order", "raster", "--n", 3, "--out", tmp_path / "a.png").returncode == 0
    assert Image.open(tmp_path / "a.png").size == (4 * 96, 3 * (96 + 18))
    sentence(call("sample.py", "--npz", 9, "--progress"), "--progress changes nothing with --npz: it belongs to --class, --labels")
    sampler = sample.Sampler(sample.parse_arguments([*map(str, draw[1:])]), torch.device("cpu"))
    shown, known = sampler.draw_steps([1, 2], sample.generator(torch.device("cpu"), 0), "random")
    whole = sampler.draw([1, 2], sample.generator(torch.device("cpu"), 0))
    assert known == {1: 1, 2: 3, 4: 8, 6: 16} and torch.equal(shown[:, -1], whole)  # 16 cos(pi/2 n/6), floored: 15, 13, 8, 0


def test_clusters(finished, tmp_path):
    folder = make_pictures(tmp_path / "data", 8)
    (folder / "fish" / "002.png").write_bytes(b"no picture at all")
    show = ("sample.py", "--run", finished[0], "--clusters")
    result = call(*show, folder, "--out", tmp_path / "a.png")
    assert result.returncode == 0 and "skipped: " in result.stderr, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "23 pictures of 3 classes" and said[3] == "pixels: 5 nearest neighbours 100.0%"  # told by brightness
    assert Image.open(tmp_path / "a.png").size == (1200, 460)
    for wrong in (("--n", 5), ("--siglip", tmp_path / "none"), ("--steps", 3)):
        sentence(call(*show, folder, "--out", tmp_path / "b.png", *wrong))
    sentence(call(*show, folder / "fish"), "has 0 classes of 6 pictures", "FOLDER/CLASS/picture.jpg")
    sentence(call(*show, folder, "--siglip", tmp_path / "none"), "none is missing", "--siglip PATH")
    assert not (tmp_path / "b.png").exists()


def test_neighbours_and_discriminants():
    line = torch.tensor([[0.0], [1], [2.1], [10], [11.2], [3.5]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # the two nearest: 1 2.1 | 0 2.1 | 1 3.5 (equal votes: the nearer, 1) | 11.2 3.5 | 10 3.5 | 2.1 1 (wrong)
    assert sample.neighbour_accuracy(line, labels, k=2) == pytest.approx(5 / 6)
    shuffled = 5 - torch.arange(6)
    assert sample.neighbour_accuracy(line[shuffled], 1 - labels[shuffled], k=4) == sample.neighbour_accuracy(line, labels, k=4)
    rng = np.random.default_rng(0)
    labels = torch.arange(3).repeat_interleave(40)
    noise = torch.from_numpy(rng.normal(size=(120, 80))).float()
    noise[:, 7] += 6.0 * labels  # the one direction that tells the classes
    plane = sample.discriminants(noise, labels)
    assert plane.shape == (60, 2) and abs(np.corrcoef(plane[:, 0], labels[1::2])[0, 1]) > 0.9
    random = sample.discriminants(torch.from_numpy(rng.normal(size=(120, 80))).float(), labels)
    assert abs(np.corrcoef(random[:, 0], labels[1::2])[0, 1]) < 0.5  # held out: noise does not look like classes


@pytest.mark.parametrize("command", [train, sample])
@pytest.mark.parametrize("said", [(), ("Unable to allocate 9 EiB",)])
def test_full_memory_is_one_sentence(command, said, monkeypatch, capsys):
    def fail(_):
        raise MemoryError(*said)

    monkeypatch.setattr(command, "main", fail)
    assert command.command_line([]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and ("--accumulate" in text or "--batch-size" in text)


def test_wrong_and_damaged_checkpoints(finished, pictures, tmp_path):
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
    (run / "stage1.safetensors").write_bytes(first[:1000])
    refine = ("train.py", "--stage", "2", "--out", run, "--overwrite", "--steps", 1)
    sentence(call(*refine), "stage1.safetensors", "safetensors file")
    semtok.write_tensors(str(run / "stage1.safetensors"), {"x": torch.zeros(1)}, {"settings": "[1]"})
    sentence(call("train.py", "--stage", "1", "--out", run, "--data", pictures), "was made with seed None")


def test_torchrun(finished, pictures, tmp_path):
    """The real command: two processes on a CPU are one run, and one of them speaks."""
    for name in ("tokens.npy", "tokens.npy.json", "stage2.safetensors"):
        shutil.copy(finished[0] / name, tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "train.py"]
    arguments = ["--stage", "ar", "--data", pictures, "--out", tmp_path, "--steps", 4, "--batch-size", 4, "--device", "cpu"]
    result = subprocess.run([*map(str, launcher + arguments)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("4 steps of 4 on 2 x cpu") == 1, result.stdout + result.stderr
    assert (tmp_path / "ar.safetensors").exists()


# ------------------------------------------------------------------------------------------------- bad inputs


def test_missing_predecessors_name_their_command(finished, pictures, tmp_path):
    command = f"--data {pictures} --out {tmp_path}"
    asked = ("--data", pictures, "--out", tmp_path)
    sentence(call("train.py", "--stage", "2", *asked), f"python train.py --stage 1 {command}")
    sentence(call("train.py", "--stage", "ar", *asked, "--set", "bits=12"), f"--stage 2 {command} --set bits=12")
    sentence(call("train.py", "--stage", "1", "--preset", "paper"), "siglip2-base-patch16-256.safetensors is missing")
    sentence(call("sample.py", "--class", "1", "--run", tmp_path / "x"), "ar.safetensors is missing", "train.py --stage ar")


def test_bad_folders(tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    for name, words in (("missing", "is no folder"), ("flat", "in 0 subfolders"), ("hollow", "no train pictures in 1")):
        result = call("train.py", "--stage", "1", "--data", tmp_path / name, "--out", tmp_path / "out")
        sentence(result, words, "FOLDER/CLASS/picture")


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path):
    folder = make_pictures(tmp_path / "data", 6)
    (folder / "bird" / "004.png").write_bytes(b"no picture at all")
    whole = (folder / "fish" / "003.png").read_bytes()
    (folder / "fish" / "003.png").write_bytes(whole[: len(whole) // 2])
    train_one = ("train.py", "--stage", "0", "--data", folder, "--out", tmp_path / "out", "--steps", 1, "--batch-size", 4)
    result = call(*train_one)
    assert result.returncode == 0 and "skipped (2 so far)" in result.stderr, result.stderr
    assert "004.png" in result.stderr and "003.png" in result.stderr and "skipped (3" not in result.stderr
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    sentence(call(*train_one, "--overwrite"), "50 pictures in a row could not be read")


@pytest.mark.parametrize("arguments, words", [
    ("--stage 3", "invalid choice"), ("--stage 1 --steps 0", "above 0"), ("--stage 1 --lr fast", "lr=fast"),
    ("--stage 1 --resume --overwrite", "exclude"), ("--stage 1 --device abacus", "abacus"),
    ("--stage 1 --speed 9", "--speed"), ("--stage 1 --seed -1", "at least 0"),
    ("--stage ar --ar-size XL", "--preset paper"),
    ("--stage 0 --set lambda_q=1", "--set lambda_q changes nothing in stage 0"),
    ("--stage 1 --set bits", "bits="),
    ("--stage 1 --set gan_start=5", "gan_start changes nothing"),
    ("--stage 2 --set group_bits=2", "group_bits"),
    ("--stage 1 --set bits=many", "bits=many"), ("--stage 1 --set bits=0", "bits must be at least 1"),
    ("--stage 1 --set quantizer=vq", "one of bsq, lfq"), ("--stage 1 --set causal=2", "one of 0, 1"),
    ("--stage 2 --set init=stage0", "one of stage1, scratch"),
    ("--stage 1 --set lambda_s=nan", "lambda_s=nan"),
    ("--stage 1 --set entropy_group=5", "must divide the 24 bits"),
    ("--stage 1 --set encoder_heads=3", "encoder_heads"),
    ("--stage 1 --set image_size=30", "multiple of 8"), ("--stage ar --set smoothing=2", "at most 1"),
    ("--stage all --set group_bits=5", "group_bits 5"),
    ("--stage ar --set heads=3", "heads 3, doubled"),
    ("--stage ar --set group_bits=0", "group_bits 0"), ("--stage ar --set group_bits=24", "at most 12"),
])
def test_bad_flags_and_settings(arguments, words, tmp_path):
    sentence(call("train.py", *arguments.split(), "--out", tmp_path / "x"), words)
    assert not (tmp_path / "x").exists()


def test_output_that_cannot_be_written(finished, pictures, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence(call("train.py", "--stage", "1", "--data", pictures, "--out", tmp_path / "file" / "run"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"
