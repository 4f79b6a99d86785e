"""The engine under the stages: several processes, micro-batches, interruptions, damaged states, bad steps.

Runs are children of a server that has imported torch once, so that twenty kills take seconds.
"""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from test_pipeline import call, make_pictures, same_tensors

import semtok
import train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STAGES = ("0", "1", "2", "ar")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch._dynamo"])  # which FSDP2 imports late
LONG = ("--steps", "12", "--batch-size", "4", "--set", "log_every=1", "save_every=8")
SHORT = ("--steps", "9", "--batch-size", "4", "--set", "log_every=2", "save_every=3")
ALSO = {"0": ("batch_size=6",), "2": ("gan_start=2",)}  # the VAE learns from every third picture of a share


def in_float64():
    """Everything in double precision: the same sum in another order is the same to many digits."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def signalled(number, stage, moment, end=""):
    """A signal, twice, just before a function of a stage or of train.py, if its last argument ends so."""
    owner = train if hasattr(train, moment) else train.STAGES[stage]
    healthy = getattr(owner, moment)

    def interrupted(*given):
        for _ in range(2 * str(given[-1]).endswith(end)):
            os.kill(os.getpid(), number)
        return healthy(*given)

    if number != signal.SIGTERM or os.environ.get("RANK") != "0":  # it reaches one of two processes
        setattr(owner, moment, interrupted)


def stopped_clock():
    time.time = lambda: 0.0


def broken_latents(*steps):
    """In these steps latents are not finite."""
    def prepare(self, pictures, labels, rng, step, healthy=train.Refining.prepare):
        rows, shared = healthy(self, pictures, labels, rng, step)
        return rows | {"latents": rows["latents"] * (math.nan if step in steps else 1)}, shared

    train.Refining.prepare = prepare


def child(arguments, output, hooks, place):
    torch.set_num_threads(1)
    os.environ |= place
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits it ignored
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    for hook in hooks:
        hook()
    sys.exit(train.command_line(arguments))


def start(stage, out, *flags, hooks=(), ranks=1):
    """A run in one process, or in several as torchrun starts them -> (process, output) of each."""
    arguments = ["--stage", stage, "--data", out.parent / "data", "--out", out, "--workers", "0", *flags]
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in map(str, range(ranks)):
        place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        given = [*map(str, arguments)], f"{out}-{rank}.txt", hooks, dict(place) if ranks > 1 else {}
        started.append((SERVER.Process(target=child, args=given), Path(given[1])))
        started[-1][0].start()
    return started


def finish(stage, out, *flags, code=0, **how):
    """A run to its end -> what its first rank said. As torchrun, end the others where that one failed."""
    started = start(stage, out, *flags, **how)
    for process, output in started[: 1 if code else None]:
        process.join(300)
        assert process.exitcode == code, output.read_text()[-3000:]
    for process, _ in started:
        process.kill()
    said = started[0][1].read_text()
    assert "Traceback" not in said and said.count("train.py: ") == (code == 2), said[-3000:]
    return said


def log(out, stage):
    """What a stage wrote, without its speed: the last line of each step and kind, losses or figures."""
    last = {}
    for line in open(out / "log.jsonl", "rb"):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            entry.pop("images_per_s", None)
            if entry.pop("stage") == stage:
                last[entry["step"], "loss" in entry] = entry
    return [last[key] for key in sorted(last)]


def states(out, stage):
    return [int(path.rpartition("-")[2]) for path in train.saved_states(f"{out}/state-{stage}")]


def newest(out, stage, name="*.safetensors"):
    """A file of the newest state."""
    return next(Path(train.saved_states(f"{out}/state-{stage}")[-1]).glob(name))


def result(out, stage):
    return semtok.TensorFiles(str(out / train.STAGES[stage].result))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps on a few pictures: what every stage needs of the ones before it."""
    folder = tmp_path_factory.mktemp("engine")
    make_pictures(folder / "data", 52)  # of each class two are held out: a batch that two processes can halve
    finish("all", folder / "base", "--steps", "2", "--batch-size", "8")
    return folder


def fresh(base, name, stage=None):
    """A copy of the base run, or of what a stage begins with: the results of the stages before it."""
    late = ("standins", "stage1.*", "stage2.*", "ar.*")[STAGES.index(stage or "ar") + (not stage) :]
    late += ("state-*", "settings.json", "*.jsonl", "*.png", "*.npy") if stage else ()
    shutil.rmtree(base / name, ignore_errors=True)
    return shutil.copytree(base / "base", base / name, ignore=shutil.ignore_patterns(*late))


def opened(stage, out, *flags):
    """The run that a command would train, and its stages."""
    return train.open_run(train.parse_arguments([*map(str, ("--stage", stage, "--out", out, *flags))]))


# ------------------------------------------------------------------- one process, two, and micro-batches


def assert_same_run(one, other, stage, free=()):
    """Losses, weights, averages, buffers, moments and results agree, relative to each tensor's largest."""
    for first, second in zip(log(one, stage), log(other, stage), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {*free}:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), (first["step"], name)
    source = semtok.TensorFiles(str(newest(one, stage)))  # of one rank; several have a file each
    tensors = {name: torch.zeros_like(source.get(name)) for name in source.shapes}
    train.load_state(f"{other}/state-{stage}", tensors)
    for name, b in tensors.items():
        a = source.get(name)
        assert (a - b).abs().max() <= 1e-5 * max(a.abs().max(), 1e-9), name  # a key's bias has no gradient
    one, other = result(one, stage), result(other, stage)
    assert one.shapes == other.shapes
    assert all(torch.allclose(one.get(n), other.get(n), rtol=1e-4, atol=1e-6) for n in one.shapes)


def alone(base, stage, *changes):
    """The folder of a stage of 12 steps in one process, in float64; made once."""
    out = base / "-".join(("alone", stage, *changes))
    if not out.exists():
        finish(stage, fresh(base, out.name, stage), *LONG, *changes, hooks=[in_float64])
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(base, stage):
    """Two gloo processes take the steps that one takes, with FSDP2; the discriminator joins at step 2.

    In float64: in float32 Adam makes a step of the rate of rounding where a gradient is nearly zero."""
    out, changes = fresh(base, f"two-{stage}", stage), ALSO.get(stage, ())
    said = finish(stage, out, *LONG, *changes, hooks=[in_float64], ranks=2)
    assert "on 2 x cpu" in said and "Warning" not in said, said
    assert_same_run(alone(base, stage, *changes), out, stage)
    played = [entry["step"] for entry in log(out, stage) if entry.get("discriminator_loss", 0) > 0]
    assert played == ([*range(3, 13)] if stage == "2" else [])


ENTROPIES = ("entropy_loss", "val_entropy_loss", "code_entropy")


@pytest.mark.parametrize("stage, ranks, changes", [("1", 1, ("lambda_q=0",)), ("ar", 2, ())])
def test_micro_batches_add_up_to_the_step(base, stage, ranks, changes):
    """The contrast sees the whole batch's negatives, the AR loss is a mean over all masked tokens. The
    entropy of the average code is a micro-batch's, so it is left out here."""
    out = fresh(base, f"micro-{stage}", stage)
    finish(stage, out, *LONG, *changes, "--accumulate", "2", hooks=[in_float64], ranks=ranks)
    assert_same_run(alone(base, stage, *changes), out, stage, ENTROPIES)


@pytest.mark.parametrize("number, ranks, others", [
    (signal.SIGINT, 1, 2), (signal.SIGINT, 2, 1), (signal.SIGTERM, 2, 1),
])
def test_stopped_it_goes_on_with_another_number_of_processes(base, number, ranks, others):
    """Ctrl-C twice, or SIGTERM to one of two processes: all finish the step, and it is saved."""
    out = fresh(base, f"stopped-{number}-{ranks}", "ar")
    hooks, flags = [in_float64, partial(signalled, number, "ar", "prepare", "9")], (*LONG, "--overwrite")
    said = finish("ar", out, *flags, hooks=hooks, ranks=ranks, code=2)
    assert "stopped at step 10, saved: the same command (no --overwrite) goes on" in said
    assert states(out, "ar") == [8, 10] and not (out / "ar.safetensors").exists()
    finish("ar", out, *LONG, hooks=[in_float64], ranks=others)
    assert_same_run(alone(base, "ar"), out, "ar")


# ---------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_ends_in_the_same_bits(base, stage, times):
    """SIGKILL at random moments, every third in writing the second state; the same command goes on."""
    whole, out = (fresh(base, f"{name}-{stage}-{times}", stage) for name in ("whole", "killed"))
    began, flags = time.monotonic(), (*SHORT, *ALSO.get(stage, ()))
    finish(stage, whole, *flags)
    length, rng, kills = time.monotonic() - began, random.Random(f"{stage} {times}"), 0
    while kills < times:
        writing = [partial(signalled, signal.SIGKILL, stage, "shard_sizes", "6.part")] * (kills % 3 == 2)
        (process, output), = start(stage, out, *flags, hooks=writing)
        process.join(300 if writing else rng.uniform(0.1, 0.6) * length)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()[-3000:]
        if process.exitcode == 0:  # it was quicker than this time's moment
            fresh(base, out.name, stage)
            continue
        kills += 1
        assert not writing or list(out.rglob("*.part"))
    finish(stage, out, *flags)
    for file in (newest, lambda out, stage: out / train.STAGES[stage].result):
        same_tensors(file(whole, stage), file(out, stage))
    assert len({newest(folder, stage, "state.json").read_text() for folder in (whole, out)}) == 1
    assert log(whole, stage) == log(out, stage)


@pytest.mark.parametrize("asked, stage, moment, end, following", [
    ("all", "2", "prepare", "1", "ar"), ("all", "2", "look", "", "ar"), ("all", "2", "save_state", "", "ar"),
    ("all", "2", "export", "", "ar"), ("all", "0", "prepare", "1", "1"),
])
def test_a_signal_near_the_end_stops_before_the_next_stage(base, asked, stage, moment, end, following):
    """The stage may have its result by then. The same command goes on with the next."""
    out, flags = fresh(base, f"last-{stage}-{moment}", stage), ("--steps", "2", "--batch-size", "8")
    hook = partial(signalled, signal.SIGTERM, stage, moment, end)
    assert "stopped a" in finish(asked, out, *flags, code=2, hooks=[hook])
    assert states(out, stage) == [2] and not log(out, following) and not states(out, following)
    assert f"stage {following} done" in finish(asked, out, *flags)


@pytest.mark.parametrize("how", ["truncated", "no json"])
def test_a_damaged_state_falls_back_to_the_one_before(base, how):
    """And a log.jsonl that was cut, or has a foreign line, stops nothing."""
    whole, out = fresh(base, "undamaged", "ar"), fresh(base, "damaged", "ar")
    finish("ar", whole, *SHORT)
    finish("ar", out, *SHORT, code=2, hooks=[partial(signalled, signal.SIGTERM, "ar", "prepare", "8")])
    if how == "truncated":
        os.truncate(newest(out, "ar"), 9999)
    else:
        newest(out, "ar", "state.json").unlink()
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe not ours\n{"stage": "ar", "st\n')
    said = finish("ar", out, *SHORT)
    assert "falling back to the state before" in said and "step-0000009" in said
    assert states(out, "ar") == [9] and log(out, "ar") == log(whole, "ar")
    same_tensors(whole / "ar.safetensors", out / "ar.safetensors")


def test_written_files_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.replace
    note = lambda number: events.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda number: (note(number), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    train.write_text(str(tmp_path / "file"), "text")
    part, renamed, folder = events
    assert part.endswith(".part") and renamed == "rename" and folder == str(tmp_path)


def test_states_are_ordered_by_number(tmp_path):
    for step in (9_999_998, 9_999_999, 10_000_000):
        train.save_state(str(tmp_path), step, {"a": torch.tensor([step])}, {"parent": "", "skipped": 0})
    assert [path.rpartition("-")[2] for path in train.saved_states(str(tmp_path))] == ["9999999", "10000000"]
    assert train.load_state(str(tmp_path), state := {"a": torch.tensor([0])})["step"] == state["a"] == 10**7


# ----------------------------------------------------------------------------- a folder that knows itself


def test_more_steps_reopen_a_finished_stage(base):
    """It goes on from its one state, which a full disk leaves as it is. The discriminator, which joined at
    step 3, plays on."""
    out, flags = fresh(base, "longer", "2"), (*SHORT[2:], "log_every=1", "gan_start=3")
    finish("2", out, *flags, "--steps", "6")
    assert states(out, "2") == [6] and result(out, "2").metadata["steps"] == "6"
    files = [path for path in (out / "state-2").rglob("*") if path.is_file()]
    before, log_before = [path.read_bytes() for path in files], (out / "log.jsonl").read_bytes()
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))  # of a file, for that of a disk
    assert "free some space" in finish("2", out, "--steps", "9", code=2, hooks=[full])
    assert [path.read_bytes() for path in files] == before and not list(out.rglob("*.part"))
    finish("2", out, "--steps", "9")
    assert states(out, "2") == [9] and result(out, "2").metadata["steps"] == "9"
    assert (out / "log.jsonl").read_bytes().startswith(log_before)
    both = [(entry["step"], "discriminator_loss" in entry) for entry in log(out, "2") if "loss" in entry]
    assert both == [(step, step > 3) for step in range(1, 10)]
    assert "stands at step 9 of 8" in finish("2", out, "--steps", "8", code=2)


@pytest.mark.parametrize("stage, earlier", [("2", "1"), ("ar", "2")])
def test_another_earlier_result_is_refused(base, stage, earlier):
    """For a stage that is finished, and for one half-way."""
    out = fresh(base, f"retrained-{stage}")
    file, path = result(out, earlier), out / train.STAGES[earlier].result
    tensors = {name: file.get(name) for name in file.shapes}
    semtok.write_tensors(str(path), tensors, file.metadata | {"fingerprint": "another"})
    for found in (train.STAGES[stage].result, f"state-{stage}"):
        said = finish(stage, out, code=2)
        assert f"{found} was made from another result of the stage before" in said and "--overwrite" in said
        (out / train.STAGES[stage].result).unlink(missing_ok=True)
    finish(stage, out, "--overwrite")


def test_what_is_fixed_and_what_may_change(base):
    out = fresh(base, "settled")
    fixed = {"--seed 1": "seed 0", "--preset base": "preset tiny", "--batch-size 4": "batch_size 8"}
    fixed |= {"--set flip=0": "flip True", "--set bits=12": "bits 24", "--set depth=9": "depth"}
    for flags, found in fixed.items():
        with pytest.raises(train.UserError, match=f"^{out} has {found}.* asks for .*--out.*--overwrite$"):
            opened("ar", out, *flags.split())
    for name in train.MAY_CHANGE:
        assert getattr(opened("2", out, "--set", f"{name}=7")[0].recipe("2"), name) == 7
    patient = opened("2", out, "--set", "patience=3", "gan_start=5", "steps=7")[0].recipe("2")
    assert (patient.steps, patient.gan_start, patient.warmup) == (21, 15, 150)
    settings = json.loads((out / "settings.json").read_text())
    assert "is finished" in finish("2", out, "--set", "log_every=1", "lr=0.5")
    settings["set"]["2"] |= {"log_every": "1", "lr": "0.5"}
    assert json.loads((out / "settings.json").read_text()) == settings


def test_other_pictures_are_accepted_with_overwrite(base, tmp_path):
    """By the stage that starts again, whatever the stages before it saw."""
    out, other = fresh(base, "accepted"), make_pictures(tmp_path / "other", 4)
    flags = ("--stage", "ar", "--data", other, "--out", out, "--steps", "2", "--batch-size", "8")
    assert "start the stage again on these with --overwrite" in call("train.py", *flags).stderr
    done = call("train.py", *flags, "--overwrite")
    assert done.returncode == 0, done.stderr


def test_a_later_command_knows_the_folder(base, tmp_path, monkeypatch):
    few = ("--steps", 1, "--batch-size", 4)
    monkeypatch.chdir(base)
    run = ("--data", "data", "--out", tmp_path / "run", "--set", "flip=0", *few)
    assert all(call("train.py", "--stage", stage, *run).returncode == 0 for stage in "01")
    monkeypatch.chdir(tmp_path)
    assert call("train.py", "--stage", "2", "--out", "run", *few).returncode == 0
    classes = semtok.TensorFiles("run/stage2.safetensors").metadata["classes"]
    assert json.loads(classes) == sorted(os.listdir(base / "data"))
    run, stages = opened("ar", "run")
    several = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "4"}
    several["LOCAL_WORLD_SIZE"] = "2"
    with mock.patch.dict(os.environ, several):
        assert run.command("2") == "torchrun --nproc_per_node=2 train.py --stage 2 --out run"
    assert stages == ["ar"] and not any(run.recipe(s).flip for s in STAGES) and run.recipe("ar").steps == 2100
    (tmp_path / "begun" / "state-0" / "step-0000001").mkdir(parents=True)  # stage 0 was stopped half-way
    assert opened("1", "begun")[1] == ["0", "1"]


def test_another_run_is_refused(base):
    out = fresh(base, "other", "ar")
    assert "batch of 4 does not divide by 3" in finish("ar", out, *SHORT, "--accumulate", "3", code=2)
    with train.lock(str(out)):
        assert "another run is at work" in finish("ar", out, *SHORT, code=2)
    (out / "state-ar").symlink_to(base / "base" / "state-ar")
    assert "is a link into another run" in finish("ar", out, *SHORT, "--overwrite", code=2)
    assert states(base / "base", "ar") == [2]


@pytest.mark.parametrize("lacks", [None, errno.ENOLCK, errno.ENOSYS])
def test_systems_without_locks_or_flushed_folders(tmp_path, lacks, monkeypatch, capsys):
    """Windows has no fcntl, NFS without its daemon no lock; CIFS flushes files alone."""
    def lockf(*_):
        raise OSError(lacks, "no locks")

    def fsync(number, healthy=os.fsync):
        healthy(number)
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "a folder")

    monkeypatch.setitem(sys.modules, "fcntl", lacks and SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4))
    monkeypatch.setattr(os, "fsync", fsync)
    with train.lock(str(tmp_path)):
        train.write_text(str(tmp_path / "file"), "text")
    assert "cannot be locked" in capsys.readouterr().err and (tmp_path / "file").read_text() == "text"


def test_the_table_of_tokens_is_checked_and_never_written_through_a_link(base):
    out = fresh(base, "table", "ar")
    finish("ar", out, *SHORT)
    table, film = next(out.glob("tokens-*.npy")), base / "film"
    whole = table.read_bytes()
    film.write_text("film")
    for damage in (b"", whole[:-99], whole[:-99] + b"\x7f" * 99):
        table.write_bytes(damage)
        assert f"{table} is damaged" in finish("ar", out, "--steps", "12", code=2)
    table.unlink()
    Path(f"{table}.part").symlink_to(film)
    finish("ar", out, "--steps", "12")
    assert table.read_bytes() == whole and film.read_text() == "film"


def test_nothing_of_strangers_is_deleted(base, tmp_path):
    """A run deletes its stage's states and what it left half-written, also on another disk, and no more."""
    out = fresh(base, "strangers", "2")
    for link, target in {"linked": "else", "state-1": "else", "state-2": "disk"}.items():
        (out / link).symlink_to(tmp_path / target)
    places = (out, tmp_path / "disk", out / "below", out / "state-ar", tmp_path / "else")
    kept = [place / name for place in places for name in ("a.part", "settings.json.mine.part")]
    kept += [place / "step-0000001.part" / "a" for place in places[2:]]
    own = [tmp_path / "disk" / name / "a" for name in ("step-0000001.part", "step-0000009")]
    for path in kept + own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    finish("2", out, "--steps", "1", "--overwrite")
    assert all(path.exists() for path in kept) and not any(path.exists() for path in own)
    assert states(out, "2") == [1]


# ----------------------------------------------------------------------------------------------- health


@pytest.mark.parametrize("stage", ["1", "2"])
def test_looking_at_held_out_pictures_changes_nothing(base, stage):
    """Nor does a clock that stands still."""
    outs = [fresh(base, f"looked{every}-{stage}", stage) for every in (1, 100)]
    for out, every in zip(outs, (1, 100)):
        finish(stage, out, *SHORT, f"preview_every={every}", hooks=[stopped_clock])
    for name in result(outs[0], stage).shapes:
        assert torch.equal(*(result(out, stage).get(name) for out in outs)), name
    looks = [[entry for entry in log(out, stage) if "val_loss" in entry] for out in outs]
    assert [len(entries) for entries in looks] == [9, 1] and looks[0][-1] == looks[1][0]


def test_a_stage_that_ends_worse_than_before_says_so(base):
    run, _ = opened("2", fresh(base, "worse"), "--steps", "400")
    run.train = train.Pictures(str(base / "data"), "train", 0, 32)
    psnr = json.loads(result(base / "base", "1").metadata["figures"])["psnr"]
    for name, figures, words in (
        ("2", {"psnr": psnr - 1}, f"worse than stage 1's, {psnr:.4g} dB: 150 .* 21 times each; .* pictures$"),
        ("ar", {"val_nll": 0.7}, "worse than by a coin.*: 150 .* 0 times each; take more steps$"),
        ("2", {"psnr": psnr + 1}, "^$"), ("ar", {"val_nll": 0.69}, "^$"), ("1", {"psnr": 0.0}, "^$"),
    ):
        assert re.search(words, train.worse_than_before(name, run, figures)), (name, figures)


def test_curves_are_in_the_order_of_their_meaning_and_no_log_stops_them(tmp_path):
    """Losses, held-out pictures, codes, then norms and speed."""
    order = "loss flow_loss nll psnr val_flow_loss code_entropy used grad_norm_semtok images_per_s lr".split()
    lines = [{"stage": "1", "step": step} | {name: step + 16.0 for name in order} for step in (1, 2, 3)]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, lines)))
    with mock.patch.object(train.ImageDraw.ImageDraw, "text") as text:
        train.draw_curves(str(tmp_path / "log"), "1")
    said = [call.args[1] for call in text.mock_calls]
    order.remove("val_flow_loss")  # it stands beside flow_loss
    assert [words.split()[0] for words in said if "  " in words] == order and {"17", "18", "19"} <= {*said}
    assert [words for words in said if "held out" in words] == ["flow_loss  19, held out 19"]
    whole = train.draw_curves(str(tmp_path / "log"), "1").tobytes()
    for values, healthy in (((17, 19), False), ((1, 0.5), True)):  # of nll: a coin has 0.69
        (tmp_path / "nll").write_text("\n".join(json.dumps({"stage": "ar", "step": i, "nll": value})
                                                for i, value in enumerate(values)))
        colours = train.draw_curves(str(tmp_path / "nll"), "ar").getcolors(10**6)
        assert ((240, 255, 240) in [colour for _, colour in colours]) == healthy
    for odd in ('{"stage": "1", "step": 3, "loss": {}, "lr": [[]], "used": 1%s}' % ("0" * 500), "[" * 99_999,
                '{"stage": "1", "step": 1e999, "psnr": 1}', '{"stage": "1", "step": "x"}', "7",
                '{"stage": "1", "step": 3, "loss": NaN, "lr": 1e308, "nll": null, "used": "x"}'):
        (tmp_path / "odd").write_text((tmp_path / "log").read_text() + f"\n{odd}\n")
        assert train.draw_curves(str(tmp_path / "odd"), "1").tobytes() == whole, odd[:60]
    (tmp_path / "odd").write_text(odd)
    assert train.draw_curves(str(tmp_path / "odd"), "1").width > 1000


def test_steps_one_by_one(base, monkeypatch):
    """The discriminator joins at step 5 and warms up to its own peak; the generator's rate goes on as it was.
    Step 8 is bad and changes no weight, average, moment or buffer of either player."""
    monkeypatch.setattr(train.Refining, "prepare", train.Refining.prepare)  # and put back
    broken_latents(8)
    numbers = ("batch_size=4", "steps=12", "warmup=5", "gan_start=5", "lr=0.01", "discriminator_lr=0.002")
    run, _ = opened("2", fresh(base, "steps", "2"), "--set", *numbers)
    run.train, run.val = (train.Pictures(str(base / "data"), split, 0, 32) for split in train.DRAWN)
    training, recipe = train.Training("2", run), run.recipe("2")
    weights = {"d": "weights/discriminator.conv_in.weight", "g": "weights/semtok.w_x.weight"}
    places = train.batches_from(0, len(run.train), recipe, 0)
    for step, batch in enumerate(torch.utils.data.DataLoader(run.train, batch_sampler=places)):
        old = {name: tensor.detach().clone() for name, tensor in training.state.items()}
        losses = train.one_step(training, batch)
        assert ("discriminator_loss" in losses) == (step >= 5) and losses["loss"].isfinite() == (step != 8)
        moved = {name for name in old if not torch.equal(training.state[name], old[name])}
        assert {weights["g"], "ema" + weights["g"][7:]} <= moved if step != 8 else not moved
        assert {weights["d"], "buffers/discriminator.fake_mean"}.isdisjoint(moved) == (step < 5 or step == 8)
        for group in training.optimizer.param_groups:
            joined = group["params"][0] in set(training.stage.discriminator.parameters())
            played, length, peak = (step - 5, 7, 0.002) if joined else (step, 12, 0.01)
            rate = peak * min(1, (played + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * played / length))
            assert played < 0 or group["lr"] == pytest.approx(rate)
    assert (training.step, training.skipped, training.bad_in_a_row) == (12, 1, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_steps_in_a_row_stop_the_run(base, ranks):
    out = fresh(base, f"broken-{ranks}", "2")
    said = finish("2", out, *SHORT, code=2, hooks=[partial(broken_latents, *range(2, 7))], ranks=ranks)
    assert "step 7: " in said and "pixel_loss" in said and "5 last steps" in said and "--lr" in said, said
    assert states(out, "2") == [3, 6]  # a running stage keeps two
    finish("2", out, *SHORT, "--lr", "0.001")
    assert states(out, "2") == [9] and log(out, "2")[-1]["skipped"] == 4


@pytest.mark.parametrize("flag", ["--checkpoint-activations", "--compile"])
def test_other_ways_to_run_take_the_same_steps(base, flag, monkeypatch):
    """Recomputed blocks, and compiled ones by the compiler's own check of its graphs, aot_eager."""
    compiler, logs = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiler(module, backend="aot_eager"))
    for flags in ((), (flag,)):
        out = fresh(base, f"way{len(logs)}{flag}", "ar")
        done = call("train.py", "--stage", "ar", "--data", base / "data", "--out", out, *SHORT, *flags)
        assert done.returncode == 0, done.stderr
        logs.append(log(out, "ar"))
    for plain, other in zip(*logs, strict=True):
        for name in plain.keys() & {"loss", "grad_norm_ar"}:
            assert other[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), (plain["step"], name)
