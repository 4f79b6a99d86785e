"""The engine under the stages: several processes, sharded weights, parts of a batch, interruptions, bad steps, compiled blocks.

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
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from test_pipeline import call, make_pictures, same_tensors, sentence

import semtok
import train

STAGES = ("0", "1", "2", "ar")
TIMING = ("images_per_s", "mfu")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"])


# ------------------------------------------------------------------------------------------ what is run, and in what way


def in_float64(entropy=True):
    """Everything in double precision, where what is the same sum in another order is the same to many digits."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    if not entropy:
        train.QUANT = 0.0

    def doubled(make, job):
        stage = make(job).double()
        for network in getattr(stage, "frozen", {}).values():
            network.double()
        return stage

    train.STAGE_CLASSES = {name: partial(doubled, make) for name, make in train.STAGE_CLASSES.items()}


def killed_while_writing(number):
    """The `number`-th file of tensors is half written when the process is killed."""
    calls = []

    def write(tensors, path, metadata):
        calls.append(path)
        semtok_save(tensors, path, metadata)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    semtok_save, semtok.save_file = semtok.save_file, write


def small_files(limit):
    """A limit on the size of files stands in for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def child(arguments, output, prepare):
    os.setsid()  # a terminal's Ctrl-C goes to a whole group of processes
    torch.set_num_threads(1)
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        if prepare:
            prepare()
        code = train.command_line(arguments)
        file.flush()
    sys.exit(code)


def start(stage, out, *flags, prepare=None, pictures=None):
    """A run of one stage in a process of its own -> the process and the file with what it says."""
    arguments = ["--stage", stage, "--data", out.parent / "data", "--out", out, "--workers", "0", *flags]
    process = SERVER.Process(target=child, args=([*map(str, arguments)], str(out) + ".txt", prepare))
    process.start()
    return process, Path(str(out) + ".txt")


def finish(stage, out, *flags, code=0, prepare=None):
    """A run to its end -> what it said."""
    process, output = start(stage, out, *flags, prepare=prepare)
    process.join(300)
    assert process.exitcode == code, output.read_text()[-3000:]
    return output.read_text()


def log(out, stage):
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries if entry["stage"] == stage]


def last_state(out, stage):
    return sorted((out / f"state-{stage}").iterdir())[-1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What every stage needs of the ones before it, from a run of two steps on a few pictures."""
    folder = tmp_path_factory.mktemp("engine")
    make_pictures(folder / "data", 14)
    arguments = ["--stage", "all", "--data", folder / "data", "--out", folder / "base", "--steps", "2", "--batch-size", "8"]
    result = call("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    return folder


def fresh(base, name, stage):
    """A folder in which a stage can begin: the results of the stages before it."""
    out = base / name
    shutil.rmtree(out, ignore_errors=True)
    results = ("standins", "stage1.safetensors", "stage2.safetensors", "tokens.safetensors")[: STAGES.index(stage) + (stage == "ar")]
    for result in results:
        copy = shutil.copytree if result == "standins" else shutil.copy
        out.mkdir(exist_ok=True)
        copy(base / "base" / result, out / result)
    return out


# ------------------------------------------------------------------------------------- one process, two, shards, parts


def assert_same_run(one, other, stage, digits=1e-5):
    """Losses, weights, averages, buffers and moments agree to `digits`, relative to the largest value of each tensor."""
    for first, second in zip(log(one, stage), log(other, stage), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name not in ("stage", "used", "psnr", "ssim"):
                assert second[name] == pytest.approx(value, rel=digits, abs=digits), (first["step"], name)
    files = [semtok.TensorFiles(str(last_state(out, stage))) for out in (one, other)]
    assert files[0].shapes == files[1].shapes
    for name in files[0].shapes:
        a, b = (file.get(name).double() for file in files)
        assert (a - b).abs().max() <= digits * max(a.abs().max(), 1e-12), name


TWENTY = ("--steps", "20", "--batch-size", "8", "--log-every", "1")


@pytest.fixture(scope="module")
def alone(base):
    """A stage of 20 steps in one process, in float64; made once for each stage."""
    made = {}

    def get(stage):
        if stage not in made:
            made[stage] = fresh(base, f"alone-{stage}", stage)
            finish(stage, made[stage], *TWENTY, "--processes", "1", prepare=in_float64)
        return made[stage]

    return get


@pytest.mark.parametrize("flags", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(base, alone, stage, flags):
    """Two gloo processes with DDP or FSDP take the 20 steps that one process takes.

    In float64: in float32 the two differ by the order of sums, which Adam's g / sqrt(v) makes a step of the learning rate
    where the gradient is nearly zero (see the next test). The discriminator joins at step 18.
    """
    out = fresh(base, f"two-{stage}{len(flags)}", stage)
    said = finish(stage, out, *TWENTY, "--processes", "2", *flags, prepare=in_float64)
    assert "20 steps of 8 on 2 x cpu" in said and "Warning" not in said
    assert_same_run(alone(stage), out, stage)
    if stage == "2":
        entries = log(out, "2")
        assert "d_loss" not in entries[16] and entries[18]["d_loss"] > 0
    result = train.RESULTS[stage]
    tensors = [semtok.TensorFiles(str(folder / result)) for folder in (alone(stage), out)]
    assert tensors[0].shapes == tensors[1].shapes
    for name in tensors[0].shapes:  # the export, which one rank writes, has the averaged weights, whole
        assert torch.allclose(tensors[0].get(name), tensors[1].get(name), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("stage", ["1", "ar"])
def test_two_processes_are_one_in_float32(base, stage):
    """The same in float32: losses to 1e-5 at every one of 20 steps with a plain sum in place of Adam's division."""
    outs = [fresh(base, f"single-{stage}{n}", stage) for n in (1, 2)]
    for n, out in zip((1, 2), outs):
        finish(stage, out, *TWENTY, "--processes", str(n), prepare=large_epsilon)
    assert_same_run(*outs, stage)


def large_epsilon():
    """Adam with an epsilon above every sqrt(v) is momentum: it amplifies no rounding."""
    train.torch.optim.AdamW = partial(torch.optim.AdamW, eps=10.0)


@pytest.mark.parametrize("stage, flags", [
    ("1", ("--processes", "1")), ("1", ("--processes", "2", "--fsdp")), ("ar", ("--processes", "1")), ("ar", ("--processes", "2")),
])
def test_passes_add_up_to_the_step(base, stage, flags):
    """--accumulate 2 is the same step: the contrast sees the whole batch's negatives, the AR loss is a mean over the whole
    batch's masked tokens. Stage 1's entropy of the average code is of a pass, so it is left out on both sides."""
    prepare = partial(in_float64, entropy=False)
    whole, parts = base / f"whole-{stage}", fresh(base, f"parts-{stage}{len(flags)}", stage)
    if not whole.exists():
        finish(stage, fresh(base, whole.name, stage), *TWENTY, "--processes", "1", prepare=prepare)
    finish(stage, parts, *TWENTY, *flags, "--accumulate", "2", prepare=prepare)
    for out in (whole, parts):
        lines = [json.loads(line) for line in open(out / "log.jsonl")]
        kept = [{k: v for k, v in line.items() if k not in ("quant", "code_entropy")} for line in lines]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(whole, parts, stage)


def test_shards_resume_on_another_number_of_processes(base, alone):
    """A state is whole: what two processes with FSDP have begun, one goes on with, and the other way round."""
    for first, second in ((("--processes", "2", "--fsdp"), ("--processes", "1")), (("--processes", "1"), ("--processes", "2", "--fsdp"))):
        out = fresh(base, "moved", "1")
        finish("1", out, *TWENTY, *first, "--save-every", "8", prepare=in_float64)
        os.remove(last_state(out, "1"))  # step 20: step 16 is left
        finish("1", out, *TWENTY, *second, "--resume", prepare=in_float64)
        assert_same_run(alone("1"), out, "1")
