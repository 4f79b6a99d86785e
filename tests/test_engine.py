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
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from test_pipeline import call, make_pictures, same_tensors

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


def child(arguments, output, prepare, place):
    torch.set_num_threads(1)
    os.environ |= place
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        if prepare:
            prepare()
        code = train.command_line(arguments)
        file.flush()
    sys.exit(code)


def start(stage, out, *flags, prepare=None, ranks=1):
    """A run of one stage in one process, or in several that are told of each other as torchrun tells them -> (process, file
    with what it says) of each rank."""
    arguments = ["--stage", stage, "--data", out.parent / "data", "--out", out, "--workers", "0", *flags]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        output, place = Path(f"{out}-{rank}.txt"), meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = SERVER.Process(target=child, args=([*map(str, arguments)], str(output), prepare, place if ranks > 1 else {}))
        process.start()
        started.append((process, output))
    return started


def end(started, code=0):
    """Wait for a run's end -> what its first rank said. As torchrun, end the others where that one has failed."""
    for process, output in started:
        process.join(300)
        assert process.exitcode == code, output.read_text()[-3000:]
        if code:
            break
    for process, _ in started:
        process.kill()
    return started[0][1].read_text()


def finish(stage, out, *flags, code=0, prepare=None, ranks=1):
    """A run to its end -> what it said."""
    return end(start(stage, out, *flags, prepare=prepare, ranks=ranks), code)


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
    results = ("standins", "stage1.safetensors", "stage2.safetensors", "tokens")[: STAGES.index(stage) + (stage == "ar")]
    for result in results:
        copy = shutil.copytree if result in ("standins", "tokens") else shutil.copy
        out.mkdir(exist_ok=True)
        copy(base / "base" / result, out / result)
    return out


# ------------------------------------------------------------------------------------- one process, two, shards, parts


def assert_same_run(one, other, stage, digits=1e-5, kinds=("weights", "ema", "buffers", "adam")):
    """Losses, weights, averages, buffers and moments agree to `digits`, relative to the largest value of each tensor."""
    for first, second in zip(log(one, stage), log(other, stage), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name not in ("stage", "used", "psnr", "ssim"):
                assert second[name] == pytest.approx(value, rel=digits, abs=digits), (first["step"], name)
    files = [semtok.TensorFiles(str(last_state(out, stage))) for out in (one, other)]
    assert files[0].shapes == files[1].shapes
    for name in files[0].shapes:
        if not name.startswith(kinds):
            continue
        a, b = (file.get(name).double() for file in files)
        assert (a - b).abs().max() <= digits * max(a.abs().max(), 1e-12), name


TWENTY = ("--steps", "20", "--batch-size", "4", "--log-every", "1", "--save-every", "16")
SHORT = ("--steps", "9", "--batch-size", "4", "--log-every", "2", "--save-every", "3")
WAYS = {"one": ((), 1), "ddp": ((), 2), "fsdp": (("--fsdp",), 2)}  # flags, processes


@pytest.fixture(scope="module")
def twenty(base):
    """The folder of a stage of 20 steps done in one of the WAYS, in float64, and what it said; made once for each."""
    made = {}

    def get(stage, way):
        if (stage, way) not in made:
            out = fresh(base, f"{way}-{stage}", stage)
            flags, ranks = WAYS[way]
            made[stage, way] = out, finish(stage, out, *TWENTY, *flags, prepare=in_float64, ranks=ranks)
        return made[stage, way]

    return get


@pytest.mark.parametrize("stage, way", [
    *((stage, "ddp") for stage in STAGES), ("1", "fsdp"), ("ar", "fsdp"),
    pytest.param("0", "fsdp", marks=pytest.mark.full), pytest.param("2", "fsdp", marks=pytest.mark.full),  # a minute of CI
])
def test_two_processes_are_one(twenty, stage, way):
    """Two gloo processes with DDP or FSDP take the 20 steps that one process takes.

    In float64: in float32 the two differ by the order of sums, which Adam's g / sqrt(v) makes a step of the learning rate
    where the gradient is nearly zero (see the next test). The discriminator joins at step 18.
    """
    (alone, _), (out, said) = twenty(stage, "one"), twenty(stage, way)
    assert "20 steps of 4 on 2 x cpu" in said and "Warning" not in said, said
    assert_same_run(alone, out, stage)
    if stage == "2":
        entries = log(out, "2")
        assert "d_loss" not in entries[16] and entries[18]["d_loss"] > 0
    result = train.RESULTS[stage]
    tensors = [semtok.TensorFiles(str(folder / result)) for folder in (alone, out)]
    assert tensors[0].shapes == tensors[1].shapes
    for name in tensors[0].shapes:  # the export, which one rank writes, has the averaged weights, whole
        assert torch.allclose(tensors[0].get(name), tensors[1].get(name), rtol=1e-4, atol=1e-6), name


def small_parts():
    """Caches in parts of ten pictures."""
    train.PART = 10


def test_two_processes_share_the_caching(base):
    outs = [fresh(base, f"cached-by-{ranks}", "1") for ranks in (1, 2)]
    for ranks, out in zip((1, 2), outs):
        finish("1", out, *SHORT, "--cache", prepare=small_parts, ranks=ranks)
    names = [sorted(path.name for path in (out / "features").iterdir()) for out in outs]
    assert names[0] == names[1] and len(names[0]) > 2
    for name in names[0]:
        one, other = (semtok.TensorFiles(str(out / "features" / name)) for out in outs)
        assert one.metadata == other.metadata and all(torch.allclose(one.get(n), other.get(n), atol=1e-5) for n in one.shapes)


def test_shards_need_processes(base):
    said = finish("ar", fresh(base, "lonely", "ar"), *SHORT, "--fsdp", code=2)
    assert "torchrun --nproc_per_node" in said and "Traceback" not in said
    said = finish("ar", fresh(base, "uneven", "ar"), *SHORT, "--accumulate", "3", code=2)
    assert "a batch of 4 does not divide by 1 processes with --accumulate 3" in said


@pytest.mark.full
def test_two_processes_are_one_in_float32(base):
    """The same in float32, losses and weights, with a plain sum in place of Adam's division."""
    outs = [fresh(base, f"single-{n}", "1") for n in (1, 2)]
    for n, out in zip((1, 2), outs):
        finish("1", out, *TWENTY, prepare=large_epsilon, ranks=n)
    assert_same_run(*outs, "1", kinds=("weights", "ema"))


def large_epsilon():
    """Adam with an epsilon above every sqrt(v) is momentum: it amplifies no rounding."""
    train.torch.optim.AdamW = partial(torch.optim.AdamW, eps=10.0)


@pytest.mark.parametrize("stage, way", [("1", "one"), ("ar", "ddp")])
def test_passes_add_up_to_the_step(base, stage, way):
    """--accumulate 2 is the same step: the contrast sees the whole batch's negatives, the AR loss is a mean over the whole
    batch's masked tokens. Stage 1's entropy of the average code is of a pass, so it is left out on both sides."""
    prepare = partial(in_float64, entropy=False)
    whole, parts = base / f"sum-{stage}", fresh(base, f"parts-{stage}-{way}", stage)
    if not whole.exists():
        finish(stage, fresh(base, whole.name, stage), *TWENTY, prepare=prepare)
    finish(stage, parts, *TWENTY, "--accumulate", "2", prepare=prepare, ranks=WAYS[way][1])
    for out in (whole, parts):
        lines = [json.loads(line) for line in open(out / "log.jsonl")]
        kept = [{k: v for k, v in line.items() if k not in ("quant", "code_entropy")} for line in lines]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(whole, parts, stage)


@pytest.mark.parametrize("first, second", [("fsdp", "one"), ("one", "fsdp")])
def test_shards_resume_on_another_number_of_processes(base, twenty, first, second):
    """A state is whole: what two processes with FSDP have begun, one goes on with, and the other way round."""
    out = base / f"moved-{first}"
    shutil.copytree(twenty("ar", first)[0], out)
    os.remove(last_state(out, "ar"))  # step 20: step 16 is left
    flags, ranks = WAYS[second]
    finish("ar", out, *TWENTY, *flags, "--resume", prepare=in_float64, ranks=ranks)
    assert_same_run(twenty("ar", "one")[0], out, "ar")


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_ends_in_the_same_bits(base, stage, times):
    """SIGKILL at random moments, the third and every fifth after it in the middle of writing a state; --resume each time.
    Weights, averages, optimiser, discriminator, LeCAM's averages, log and result are those of a run in one piece, bit for
    bit."""
    whole, out = (fresh(base, f"{name}-{stage}-{times}", stage) for name in ("whole", "killed"))
    began = time.monotonic()
    finish(stage, whole, *SHORT)
    length, rng, kills = time.monotonic() - began, random.Random(f"{stage} {times}"), 0
    while kills < times:
        writing = partial(killed_while_writing, rng.randint(1, 2)) if kills % 5 == 2 else None
        (process, output), = start(stage, out, *SHORT, "--resume", prepare=writing)
        process.join(300 if writing else rng.uniform(0.1, 0.6) * length)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()[-3000:]
        if process.exitcode == 0:  # it was quicker than this time's moment
            fresh(base, out.name, stage)
            continue
        kills += 1
        assert not writing or list(out.rglob("*.part"))  # a state, or one of the results
    finish(stage, out, *SHORT, "--resume")
    assert not list(out.glob("state-*/*.part"))
    assert [path.name for path in sorted((out / f"state-{stage}").iterdir())] == ["step-0000006.safetensors", "step-0000009.safetensors"]
    same_tensors(last_state(whole, stage), last_state(out, stage))
    result = train.RESULTS[stage]
    same_tensors(whole / result, out / result)
    assert log(whole, stage) == log(out, stage)
    names = semtok.TensorFiles(str(last_state(out, stage))).shapes
    expected = {"0": "buffers/resnet.bn1.running_mean", "2": "buffers/fake_mean"}.get(stage, "adam/step/")
    assert any(name.startswith(expected) for name in names)
    if stage == "2":
        assert {"adam/exp_avg_sq/discriminator.conv_in.weight", "weights/discriminator.conv_in.weight"} <= names.keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_two_processes_stop_together(base, number):
    """Ctrl-C, which reaches every process, and SIGTERM to one of them: the step is finished by all, and saved."""
    out = fresh(base, f"stopped-{number}", "ar")
    long = ("--steps", "5000", "--batch-size", "4", "--log-every", "1", "--save-every", "5000")
    started = start("ar", out, *long, ranks=2)
    deadline = time.monotonic() + 120
    while not ((out / "log.jsonl").exists() and log(out, "ar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process, _ in started[: None if number == signal.SIGINT else 1]:
        os.kill(process.pid, number)
    said = end(started, code=2)
    assert "stopped at step" in said and "--stage ar" in said and "--resume" in said and "Traceback" not in said, said[-2000:]
    step = int(last_state(out, "ar").stem[5:])
    assert log(out, "ar")[-1]["step"] == step < 5000
    said = finish("ar", out, "--steps", step + 1, *long[2:], "--resume", ranks=2)
    assert f"{step + 1}/{step + 1}" in said and log(out, "ar")[-1]["step"] == step + 1


def test_full_disk_keeps_the_old_state(base):
    """A state that does not fit is a sentence; the one before it is untouched, and a run goes on from there."""
    out = fresh(base, "full", "ar")
    finish("ar", out, *SHORT[2:], "--steps", "6")
    before = {path.name: path.read_bytes() for path in (out / "state-ar").iterdir()}
    said = finish("ar", out, *SHORT, "--resume", code=2, prepare=partial(small_files, 1_000_000))
    assert "cannot be written" in said and "free some space" in said and "Traceback" not in said
    assert before == {path.name: path.read_bytes() for path in (out / "state-ar").iterdir()}
    finish("ar", out, *SHORT, "--resume")
    assert last_state(out, "ar").name == "step-0000009.safetensors"


def without_settings():
    """As if states did not say by which flags they were made."""
    train.settings = lambda *_: "{}"


def test_state_of_another_model_is_refused(base):
    out = fresh(base, "other", "1")
    finish("1", out, *SHORT[2:], "--steps", "2")
    said = finish("1", out, *SHORT[2:], "--steps", "4", "--bits", "12", "--resume", code=2, prepare=without_settings)
    assert "state of another model" in said and "--overwrite" in said and "Traceback" not in said


def test_written_files_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    """The file, then its new name: a power cut leaves the old state or the new one."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    train.write_text(str(tmp_path / "file"), "text")
    part, rename, folder = events
    assert part.endswith(".part") and rename == "rename" and folder == str(tmp_path)


# -------------------------------------------------------------------------------------------------------------- health


def broken_latents(first):
    """From step `first` on, latents are not finite."""
    healthy = train.Refining.inputs

    def inputs(self, batch, draws, step):
        latents, *rest = healthy(self, batch, draws, step)
        return latents * (float("nan") if step >= first else 1), *rest

    train.Refining.inputs = inputs


def test_bad_step_changes_nothing(base):
    """The discriminator's first step is of broken pictures: only the average, of the same weights, and the count move."""
    out = fresh(base, "bad", "2")
    finish("2", out, "--steps", "10", "--batch-size", "4", "--save-every", "1", "--log-every", "1", prepare=partial(broken_latents, 9))
    states = [semtok.TensorFiles(str(path)) for path in sorted((out / "state-2").iterdir())]
    assert [state.metadata["skipped"] for state in states] == ["0", "1"] and log(out, "2")[-2]["skipped"] == 1
    assert "d_loss" in log(out, "2")[-2]
    for name in states[0].shapes:
        assert name.startswith("ema/") or torch.equal(states[0].get(name), states[1].get(name)), name
    assert all(not states[1].get(name).any() for name in states[1].shapes if name.startswith("adam/") and "discriminator" in name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_steps_in_a_row_stop_the_run(base, ranks):
    out = fresh(base, f"broken-{ranks}", "2")
    flags = ("--steps", "40", "--batch-size", "4", "--save-every", "2")
    said = finish("2", out, *flags, code=2, prepare=partial(broken_latents, 3), ranks=ranks)
    assert "step 8: " in said and "mse" in said and "loss" in said and "5 last steps" in said, said[-1000:]
    assert str(out / "state-2" / "step-0000006.safetensors") in said and "--lr" in said and "Traceback" not in said
    weights = [semtok.TensorFiles(str(path)) for path in sorted((out / "state-2").iterdir())]
    assert all(torch.isfinite(state.get(name)).all() for state in weights for name in state.shapes)


def make_trainer(base, stage, *flags):
    """A Trainer of a stage in this process, and a batch for it."""
    out = fresh(base, "trainer", stage)
    args = train.parse_arguments(["--stage", stage, "--data", str(base / "data"), "--out", str(out), *flags])
    device = torch.device("cpu")
    pictures = [train.open_pictures(args.data, split, 0, 32, 0) for split in ("train", "val")]
    job = train.Job(args, device, *pictures)
    torch.manual_seed(0)
    trainer = train.Trainer(train.STAGE_CLASSES[stage](job), job.recipe(stage), stage, job)
    dataset = trainer.stage.open_dataset()
    items = [dataset[i, False] for i in range(4)]
    return trainer, [torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*items)]


@pytest.mark.parametrize("flags", [(), ("--checkpoint-activations",), ("--accumulate", "2")], ids=["plain", "checkpointed", "accumulated"])
@pytest.mark.parametrize("stage", ["1", "ar"])
def test_counted_flops_are_the_plan(base, stage, flags):
    """What `mfu` is made of: the FLOPs counted on the first step are those of --dry-run, times the batch."""
    trainer, batch = make_trainer(base, stage, *flags)
    trainer.train_step(batch)
    planned = train.measure_step(train.planned(trainer.job.args), 4).total
    assert trainer.flops == pytest.approx(planned, rel=0.03)  # attention's own kernels pass over their map once more or less


def test_speed_is_logged(base):
    out = fresh(base, "speed", "ar")
    finish("ar", out, *SHORT)
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    assert all(entry["images_per_s"] > 0 and 0 < entry["mfu"] < 1.2 for entry in entries if "loss" in entry)
    assert 1e8 < train.matmul_rate(torch.device("cpu")) < 1e14


@pytest.mark.parametrize("stage, backend", [
    ("ar", "inductor"), ("1", "aot_eager"), pytest.param("1", "inductor", marks=pytest.mark.full),  # minutes of g++
])
def test_compiled_step_is_the_eager_one(base, stage, backend, monkeypatch):
    """One step with --compile: the same losses, gradients (Adam's first moment) and names of the state to 1e-4. `aot_eager`
    is the compiler's own check: the graphs of inductor, without the machine code that takes minutes to make."""
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiler(module, backend=backend, **options))
    if backend == "inductor" and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none here")
    results = []
    for flag in ("--no-compile", "--compile"):
        trainer, batch = make_trainer(base, stage, flag)
        losses = trainer.train_step(batch)
        results.append((losses, trainer.state(), trainer.flops))
    (eager, weights, flops), (compiled, others, counted) = results
    assert weights.keys() == others.keys() and flops == counted
    for name in eager:
        assert torch.allclose(torch.as_tensor(eager[name]), torch.as_tensor(compiled[name]), rtol=1e-4, atol=1e-5), name
    for name in (name for name in weights if name.startswith("adam/exp_avg/")):
        scale = weights[name].abs().max().clamp_min(1e-9)
        assert (weights[name] - others[name]).abs().max() <= 1e-4 * scale + 1e-7, name
