"""The engine under the stages: several processes, micro-batches, interruptions, damaged states, bad steps.

Runs are children of a server that has imported torch once, so that twenty kills take seconds.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from test_pipeline import call, make_pictures, same_tensors

import semtok
import train

STAGES = ("0", "1", "2", "ar")
TIMING = ("images_per_s", "tflops")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])
TWENTY = ("--steps", "20", "--batch-size", "4", "--set", "log_every=1", "save_every=16")
THIRDS = {"0": ("--batch-size", "6")}  # the VAE learns from every third picture of a share
SHORT = ("--steps", "9", "--batch-size", "4", "--set", "log_every=2", "save_every=3")


def in_float64():
    """Everything in double precision: the same sum in another order is the same to many digits."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double

    for kind in train.STAGES.values():
        def doubled(self, job, make=kind.__init__):
            make(self, job)
            for network in (self, *getattr(self, "frozen", {}).values()):
                network.double()

        if kind is not train.Refining:  # it calls its base class's
            kind.__init__ = doubled


def killed_while_writing():
    """The first state is half written when the process is killed."""
    checksums = train.checksums

    def cut(folder):
        if folder.endswith(".part"):
            shard = next(Path(folder).glob("*.safetensors"))
            os.truncate(shard, shard.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return checksums(folder)

    train.checksums = cut


def small_files():
    """A limit on the size of files stands in for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def stopped_in_step_nine():
    """SIGTERM while the last step of SHORT is under way."""
    healthy = train.Generating.prepare

    def prepare(self, bits, labels, rng, step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return healthy(self, bits, labels, rng, step)

    train.Generating.prepare = prepare


def broken_latents(first):
    """From step `first` on, latents are not finite."""
    healthy = train.Refining.prepare

    def prepare(self, pictures, labels, rng, step):
        rows, shared = healthy(self, pictures, labels, rng, step)
        return rows | {"latents": rows["latents"] * (float("nan") if step >= first else 1)}, shared

    train.Refining.prepare = prepare


def child(arguments, output, prepare, place):
    torch.set_num_threads(1)
    os.environ |= place
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits it ignored
    train.measure = lambda *_: {"flops": 1e9, "activations": 0, "stage": torch.nn.Module()}  # seconds of every start
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        if prepare:
            prepare()
        code = train.command_line(arguments)
        file.flush()
    sys.exit(code)


def start(stage, out, *flags, prepare=None, ranks=1):
    """A run of one stage in one process, or in several as torchrun starts them -> (process, output) of each."""
    arguments = ["--stage", stage, "--data", out.parent / "data", "--out", out, "--workers", "0", *flags]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(ranks)):
        output, place = f"{out}-{rank}.txt", {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        place = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
        process = SERVER.Process(target=child, args=([*map(str, arguments)], output, prepare, place))
        process.start()
        started.append((process, Path(output)))
    return started


def finish(stage, out, *flags, code=0, started=None, **how):
    """A run to its end -> what its first rank said. As torchrun, end the others where that one has failed."""
    started = started or start(stage, out, *flags, **how)
    for process, output in started:
        process.join(300)
        assert process.exitcode == code, output.read_text()[-3000:]
        if code:
            break
    for process, _ in started:
        process.kill()
    said = started[0][1].read_text()
    assert "Traceback" not in said, said[-3000:]
    return said


def log(out, stage):
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries if entry["stage"] == stage]


def states(out, stage):
    return sorted(path for path in (out / f"state-{stage}").iterdir() if path.suffix != ".part")


def state_like(path, other):
    """The tensors of a state that any number of ranks has written, in the shapes of one that one rank has."""
    source = semtok.TensorFiles(str(other))
    tensors = {name: torch.zeros_like(source.get(name)) for name in source.shapes}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What every stage needs of the ones before it, from a run of two steps on a few pictures."""
    folder = tmp_path_factory.mktemp("engine")
    make_pictures(folder / "data", 14)
    arguments = ["--stage", "all", "--data", folder / "data", "--out", folder / "base"]
    result = call("train.py", *arguments, "--steps", "2", "--batch-size", "8")
    assert result.returncode == 0, result.stderr
    return folder


def fresh(base, name, stage):
    """A folder in which a stage can begin: the results of the stages before it."""
    out = base / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for result in ("standins", "stage1.safetensors", "stage2.safetensors")[: STAGES.index(stage)]:
        copy = shutil.copytree if result == "standins" else shutil.copy
        copy(base / "base" / result, out / result)
    return out


# -------------------------------------------------------------------------- one process, two, and micro-batches


def assert_same_run(one, other, stage, free=("used", "imbalance", "dead_bits"), digits=1e-5):
    """Losses, weights, averages, buffers, moments and results agree, relative to each tensor's largest value."""
    for first, second in zip(log(one, stage), log(other, stage), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"stage", *free}:
            assert second[name] == pytest.approx(first[name], rel=digits, abs=digits), (first["step"], name)
    alone, several = states(one, stage)[-1], states(other, stage)[-1]
    source = semtok.TensorFiles(str(alone))
    for name, b in state_like(several, alone).items():
        a = source.get(name)
        assert (a - b).abs().max() <= digits * max(a.abs().max(), 1e-9), name  # a key's bias has no gradient
    results = [semtok.TensorFiles(str(out / train.STAGES[stage].result)) for out in (one, other)]
    assert results[0].shapes == results[1].shapes
    for name in results[0].shapes:
        assert torch.allclose(results[0].get(name), results[1].get(name), rtol=1e-4, atol=1e-6), name


@pytest.fixture(scope="module")
def alone(base):
    """The folder of a stage of 20 steps in one process, in float64; made once."""
    made = {}

    def get(stage):
        if stage not in made:
            made[stage] = fresh(base, f"alone-{stage}", stage)
            finish(stage, made[stage], *TWENTY, *THIRDS.get(stage, ()), prepare=in_float64)
        return made[stage]

    return get


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(base, alone, stage):
    """Two gloo processes take the steps that one takes, with FSDP2; the discriminator joins at step 14.

    In float64: in float32 Adam makes a step of the learning rate of rounding where a gradient is nearly zero."""
    out = fresh(base, f"two-{stage}", stage)
    said = finish(stage, out, *TWENTY, *THIRDS.get(stage, ()), prepare=in_float64, ranks=2)
    assert "on 2 x cpu" in said and "Warning" not in said, said
    assert_same_run(alone(stage), out, stage)
    if stage == "2":
        assert "discriminator_loss" not in log(out, "2")[13] and log(out, "2")[14]["discriminator_loss"] > 0


@pytest.mark.parametrize("stage, ranks", [("1", 1), ("ar", 2)])
def test_micro_batches_add_up_to_the_step(base, stage, ranks):
    """The contrast sees the whole batch's negatives, the AR loss is a mean over all masked tokens. The entropy of the
    average code is a micro-batch's, so it is left out here."""
    changes = TWENTY + (("lambda_q=0",) if stage == "1" else ())
    outs = [fresh(base, f"micro-{stage}-{n}", stage) for n in (1, 2)]
    finish(stage, outs[0], *changes, prepare=in_float64)
    finish(stage, outs[1], *changes, "--accumulate", "2", prepare=in_float64, ranks=ranks)
    assert_same_run(*outs, stage, ("entropy_loss", "code_entropy", "used", "imbalance", "dead_bits"))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(base, alone, ranks):
    out = fresh(base, f"moved-{ranks[0]}", "ar")
    finish("ar", out, *TWENTY, prepare=in_float64, ranks=ranks[0])
    shutil.rmtree(states(out, "ar")[-1])  # step 20: step 16 is left
    (out / "ar.safetensors").unlink()
    finish("ar", out, *TWENTY, "--resume", prepare=in_float64, ranks=ranks[1])
    assert [entry["step"] for entry in log(out, "ar")] == [*range(1, 21), 20]
    assert_same_run(alone("ar"), out, "ar")


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_ends_in_the_same_bits(base, stage, times):
    """SIGKILL at random moments, every third in the middle of writing a state; then --resume. Bit for bit."""
    whole, out = (fresh(base, f"{name}-{stage}-{times}", stage) for name in ("whole", "killed"))
    began = time.monotonic()
    finish(stage, whole, *SHORT)
    length, rng, kills = time.monotonic() - began, random.Random(f"{stage} {times}"), 0
    while kills < times:
        writing = killed_while_writing if kills % 3 == 2 else None
        (process, output), = start(stage, out, *SHORT, "--resume", prepare=writing)
        process.join(300 if writing else rng.uniform(0.1, 0.6) * length)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()[-3000:]
        if process.exitcode == 0:  # it was quicker than this time's moment
            fresh(base, out.name, stage)
            continue
        kills += 1
        assert not writing or list(out.rglob("*.part"))
    finish(stage, out, *SHORT, "--resume")
    assert [path.name for path in states(out, stage)] == ["step-0000006", "step-0000009"]
    same_tensors(*(next(states(folder, stage)[-1].glob("*.safetensors")) for folder in (whole, out)))
    same_tensors(whole / train.STAGES[stage].result, out / train.STAGES[stage].result)
    assert log(whole, stage) == log(out, stage)
    names = {"2": {"adam/exp_avg_sq/discriminator.conv_in.weight", "buffers/fake_mean"}}.get(stage, {"skipped"})
    assert names <= semtok.TensorFiles(str(states(out, stage)[-1])).shapes.keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_two_processes_stop_together(base, number):
    """Ctrl-C, which reaches every process, and SIGTERM to one of them: all finish the step, and it is saved."""
    out = fresh(base, f"stopped-{number}", "ar")
    long = ("--batch-size", "4", "--set", "log_every=1", "save_every=5000", "--steps")
    started = start("ar", out, *long, "5000", ranks=2)
    deadline = time.monotonic() + 120
    while not ((out / "log.jsonl").exists() and log(out, "ar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process, _ in started[: None if number == signal.SIGINT else 1]:
        os.kill(process.pid, number)
    said = finish("ar", out, code=2, started=started)
    assert "stopped at step" in said and f"--out {out}" in said
    again = said.partition("go on with python train.py ")[2].splitlines()[0].split()
    assert again[:2] == ["--stage", "ar"] and again[-1] == "--resume" and "batch_size=4" in again and "steps=5000" in again
    step = int(states(out, "ar")[-1].name[5:])
    assert log(out, "ar")[-1]["step"] == step < 5000
    finish("ar", out, *long, step + 1, "--resume", ranks=2)
    assert log(out, "ar")[-1]["step"] == step + 1


def test_a_signal_in_the_last_step_stops_before_the_next_stage(base):
    out = fresh(base, "last", "ar")
    assert "stopped at step 9" in finish("ar", out, *SHORT, code=2, prepare=stopped_in_step_nine)
    assert not (out / "ar.safetensors").exists()
    assert "done in" in finish("ar", out, *SHORT, "--resume")


@pytest.mark.parametrize("how", ["bit", "truncated", "no json"])
def test_a_damaged_state_falls_back_to_the_one_before(base, how):
    """And a log.jsonl that was cut, or has a foreign line, stops nothing."""
    out = fresh(base, "damaged", "ar")
    finish("ar", out, *SHORT)
    before, shard = log(out, "ar"), next(states(out, "ar")[-1].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= how == "bit"
    shard.write_bytes(content[: len(content) // (2 if how == "truncated" else 1)])
    if how == "no json":
        (shard.parent / "state.json").unlink()
    (out / "ar.safetensors").unlink()
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe not ours\n{"stage": "ar", "st')
    said = finish("ar", out, *SHORT, "--resume")
    assert "falling back to the state before" in said and "step-0000009" in said
    assert log(out, "ar") == before


def test_full_disk_keeps_the_old_state(base):
    out = fresh(base, "full", "ar")
    finish("ar", out, "--batch-size", "4", "--steps", "6", "--set", "save_every=3")
    before = {path: path.read_bytes() for path in (out / "state-ar").rglob("*") if path.is_file()}
    said = finish("ar", out, *SHORT, "--resume", code=2, prepare=small_files)
    assert said.count("free some space") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    finish("ar", out, *SHORT, "--resume")
    assert states(out, "ar")[-1].name == "step-0000009"


def test_another_run_is_refused(base):
    """Other settings by name, fewer steps, a batch that does not divide, and a second run in the folder."""
    out = fresh(base, "other", "ar")
    said = finish("ar", out, *SHORT, "--accumulate", "3", code=2)
    assert "a batch of 4 does not divide by 1 processes with --accumulate 3" in said
    with train.lock(str(out)):
        assert "another run is at work" in finish("ar", out, *SHORT, code=2)
    finish("ar", out, *SHORT)
    for flags in (("weight_decay=0.5",), ("group_bits=2",), ("--seed", "1")):
        said = finish("ar", out, *SHORT, *flags, "--resume", code=2)
        assert flags[0].lstrip("-").partition("=")[0] in said and "--overwrite" in said
    assert "stands at step 9 of 6" in finish("ar", out, "--batch-size", "4", "--steps", "6", "--resume", code=2)


def test_written_files_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    train.write_text(str(tmp_path / "file"), "text")
    part, renamed, folder = events
    assert part.endswith(".part") and renamed == "rename" and folder == str(tmp_path)


# ----------------------------------------------------------------------------------------------------- health


def test_a_bad_step_changes_nothing(base):
    """The discriminator's first step is of broken pictures: only the averages and the count move."""
    out = fresh(base, "bad", "2")
    flags = ("--steps", "10", "--batch-size", "4", "--set", "log_every=1", "save_every=1", "gan_start=9")
    finish("2", out, *flags, prepare=partial(broken_latents, 9))
    before, after = (semtok.TensorFiles(str(path)) for path in states(out, "2"))
    assert (int(before.get("skipped")), int(after.get("skipped"))) == (0, 1)
    assert "discriminator_loss" in log(out, "2")[-3]  # a preview's figure and the last ones follow
    for name in before.shapes:
        assert name.startswith(("ema/", "skipped")) or torch.equal(before.get(name), after.get(name)), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_steps_in_a_row_stop_the_run(base, ranks):
    out = fresh(base, f"broken-{ranks}", "2")
    flags = ("--steps", "40", "--batch-size", "4", "--set", "save_every=2")
    said = finish("2", out, *flags, code=2, prepare=partial(broken_latents, 3), ranks=ranks)
    assert "step 8: " in said and "pixel_loss" in said and "5 last steps" in said and "--lr" in said, said[-1000:]
    assert str(out / "state-2" / "step-0000006") in said


@pytest.mark.parametrize("flag", ["--checkpoint-activations", "--compile"])
def test_other_ways_to_run_take_the_same_steps(base, flag, monkeypatch):
    """Recomputed blocks, and compiled ones by the compiler's own check of its graphs, aot_eager."""
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiler(module, backend="aot_eager"))
    logs = []
    for flags in ((), (flag,)):
        out = fresh(base, f"way{len(logs)}{flag}", "ar")
        train.main(["--stage", "ar", "--data", str(base / "data"), "--out", str(out), "--workers", "0",
                    *SHORT[:4], *flags, "--set", "log_every=1"])
        logs.append(log(out, "ar"))
    for plain, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm_ar"):
            if name in plain:
                assert other[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), (plain["step"], name)
