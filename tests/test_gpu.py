"""Ready for a GPU, as far as a CPU can show it: what is compiled, one code a picture, who waits for whom.

The last part runs train.py's own steps and sample.py's own Sampler on a CUDA device that is not there: under
FakeTensorMode tensors have shapes, types and devices, but no values. Autograd's engine needs a real device:
gradients are made up on this one, and the backward passes run in the same way on the CPU.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plan  # it puts the repository on Python's path

import ar
import bench
import sample
import semtok
import train


CPU, CUDA, aten = torch.device("cpu"), torch.device("cuda:0"), torch.ops.aten


def bfloat16(*_, enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled)


# -------------------------------------------------------------------------------------------- torch.compile

class Compiler:
    """A backend of torch.compile that counts the graphs it is given, and how many of them each call runs."""

    def __init__(self):
        self.made, self.ran, self.calls, self.steps, self.last = 0, 0, [], {}, None

    def __call__(self, graph, _):
        self.made += 1
        return lambda *inputs: setattr(self, "ran", self.ran + 1) or graph.forward(*inputs)

    def counted(self, function, kind):
        def call(*arguments, **options):
            before = self.ran
            if kind == "reduce-overhead" and self.last is not None:  # a CUDA graph overwrites its last output
                self.last.fill_(torch.nan)
            try:
                self.last = function(*arguments, **options)
                return self.last
            finally:  # a recomputation ends early, by an exception
                self.calls.append((kind, self.ran - before))
        return call

    def watch(self, patch, only=""):
        """Fill `steps` with the calls and new graphs of every step of train.py, and of the look after it."""
        compile_module, take_step = nn.Module.compile, train.one_step

        def compile(module, dynamic):
            if (kind := type(module).__name__).endswith(only):
                compile_module(module, backend=self, dynamic=dynamic)
                module._compiled_call_impl = self.counted(module._compiled_call_impl, kind)

        def one_step(training, batch):
            made, self.calls, stage = self.made, [], training.stage
            losses = take_step(training, batch)
            passes = len(train.blocks_of(stage)) * (1 + training.run.args.checkpoint_activations)
            self.steps[stage.name, training.step] = self.calls, self.made - made, passes
            self.calls = self.steps.setdefault((stage.name, "look"), ([], 0, 0))[0]
            return losses

        patch.setattr(nn.Module, "compile", compile)
        patch.setattr(train, "one_step", one_step)
        patch.setattr(train, "DRAWN", {"train": 32, "val": 20})

    def check(self, *stages):
        """From a stage's second step on, each block is one graph, whole; what look calls is not compiled."""
        assert self.steps.keys() == {(stage, step) for stage in stages for step in (*range(1, 7), "look")}
        for (stage, step), (calls, made, passes) in self.steps.items():
            found = Counter(kind for kind, _ in calls)
            assert {graphs for _, graphs in calls} <= {int(step != "look")}, (stage, step, Counter(calls))
            assert step == "look" or found["JointBlock"] + found["Block"] == passes, (stage, step, found)
            assert step in (1, 2) or not made, f"step {step} of stage {stage}: {made} graphs made again"
        assert self.made == sum(made for _, made, _ in self.steps.values())  # none while it looks


def train_all(out, *flags):
    flags = *flags, "--steps", "6", "--set", "preview_every=3", "log_every=2", "gan_start=3", "batch_size=6"
    with torch._dynamo.config.patch(recompile_limit=5):  # the kinds of blocks of stage 2
        train.main(["--stage", "all", "--out", str(out), "--workers", "0", "--compile", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of every stage, compiled; made once: its folder, and what the compiler counted."""
    torch.set_num_threads(1)
    out, compiler = tmp_path_factory.mktemp("gpu") / "run", Compiler()
    with pytest.MonkeyPatch.context() as patch:
        compiler.watch(patch)
        train_all(out)
    return out, compiler


def test_every_step_runs_compiled_blocks(finished):
    finished[1].check(*train.STAGES)
    kinds = Counter(kind for kind, _ in finished[1].steps["2", 6][0])
    assert kinds == Counter(JointBlock=5, VAEEncoder=1, SigLIP=1, VAEDecoder=1, LPIPS=1, ResNet=2)


def one_of_two(rank, out, place):
    """Stages 2 and ar as on CUDA, under autocast and gathered in bfloat16, and with recomputed blocks."""
    torch.set_num_threads(1)
    os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    policy, compiler, half = train.MixedPrecisionPolicy, Compiler(), (torch.bfloat16, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        compiler.watch(patch, only="Block")
        patch.setattr(train, "autocast", bfloat16)
        patch.setattr(train, "MixedPrecisionPolicy", lambda *_, **kept: policy(*half, **kept))
        train_all(out, "--checkpoint-activations")
    compiler.check("2", "ar")


def test_two_processes_run_compiled_blocks(finished, tmp_path):
    later = shutil.ignore_patterns("state-2", "state-ar", "stage2.*", "ar.*")
    out = shutil.copytree(finished[0], tmp_path / "run", ignore=later)
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    torch.multiprocessing.start_processes(one_of_two, (out, place), 2, start_method="forkserver")


@pytest.mark.parametrize("job, calls", [("--npz 10", 3 * 4), ("--labels 0 1 --progress --n 2", 2 * (4 + 3))])
def test_sampling_is_two_graphs_whose_output_is_read_at_once(finished, job, calls, monkeypatch):
    """10 pictures as 4, 4 and 2."""
    compiler, compile, drawn, path = Compiler(), torch.compile, [], finished[0] / "drawn"
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: compiler.counted(
        compile(function, backend=compiler, dynamic=dynamic), mode))
    for flag in ("--no-compile", "--compile"):
        sample.main(f"{job} {flag} --batch-size 4 --steps 4 --run {finished[0]} --out {path}".split())
        drawn.append(path.read_bytes())
    torch.compiler.reset()
    assert compiler.made <= 2 and compiler.calls == [("reduce-overhead", 1)] * calls
    assert drawn[0] == drawn[1]


# -------------------------------------------------------------- what is float32 wherever bfloat16 is used

def test_a_picture_has_one_code(finished, monkeypatch):
    """Bit for bit: under autocast, in the table of tokens, in validation, in sample.py's bfloat16.
    And without TF32, which train.py allows: 0.015% of bits would differ, and 0.003% by the batch."""
    monkeypatch.setattr(train, "DRAWN", {"train": 32, "val": 20})
    run, _ = train.open_run(train.parse_arguments(["--stage", "ar", "--out", str(finished[0])]))
    run.train, run.val = (train.Pictures(None, split, 0, 32) for split in train.DRAWN)
    training, tokenizer = train.Training("ar", run), semtok.load_semtok(run.path("stage2.safetensors"))[0]
    pictures, held_out = (semtok.to_signed(p.spread(32)[0]) for p in (run.train, run.val))
    codes, of_held_out = tokenizer.encode(pictures), tokenizer.encode(held_out)
    table, seen, kinds = torch.stack([training.dataset[i, False][0] for i in range(32)]), [], set()
    with bfloat16(), torch.no_grad():
        assert not torch.equal(tokenizer.quantise(tokenizer.vae.encode(pictures))[1], codes)  # it matters
        monkeypatch.setattr(semtok.SemTok, "quantise", lambda *given, real=semtok.SemTok.quantise: kinds.add(
            (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)) or real(*given))
        monkeypatch.setattr(train, "codes_to_bits", lambda codes: seen.append(codes) or codes > 0)
        training.stage.look()
        assert torch.equal(tokenizer.encode(pictures), codes)
    assert torch.equal(table, codes > 0) and torch.equal(seen[0], of_held_out)
    assert kinds == {("highest", False)}
    arguments = sample.parse_arguments(["--class", "1", "--run", run.folder, "--bfloat16"])
    sampler = sample.Sampler(arguments, CPU)
    assert torch.equal(sampler.tokenizer.encode(pictures), codes)
    for name in ("vae.encoder", "encoder", "vae.decoder", "decoder"):
        types = {p.dtype for p in sampler.tokenizer.get_submodule(name).parameters()}
        assert types == {torch.float32 if "encoder" in name else torch.bfloat16}, name


def test_similarities_are_float32_under_autocast(monkeypatch):
    model, logits, loss = semtok.SemTok(semtok.PRESETS["tiny"]), [], F.cross_entropy
    model.log_t.data.fill_(100.0).log_()
    x, codes, features = torch.randn(8, 16, 64), torch.randn(8, 16, 24).sign(), torch.randn(8, 64, 4, 4)
    monkeypatch.setattr(F, "cross_entropy", lambda found, place: logits.append(found) or loss(found, place))
    for enabled in (False, True):
        with bfloat16(enabled=enabled):
            model.alignment_losses(x, codes, features, torch.arange(8), F.normalize(x[:, 0], dim=-1))
    assert logits[1].dtype == torch.float32 and torch.equal(*logits)


# -------------------------------------------------------------------------- a CUDA device that is not there

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.convolution, aten.native_layer_norm, aten.native_group_norm}
Random = type("Random", (torch.Generator,), {"device": CUDA})


class Waits(TorchDispatchMode):
    """Notes in `found` where the host waits for the GPU: for values, and for copies but of pinned memory.
    Refuses what CUDA's kernels refuse and FakeTensorMode does not: two floating types in one operation."""

    found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
        if function is aten._local_scalar_dense.default:
            return self.found.append("item") or True
        devices = {t.device.type for t in tensors if t.ndim}  # an index may be on the CPU
        floats = {t.dtype for t in tensors if t.is_floating_point() and t.is_cuda}
        assert function.overloadpacket not in PRODUCTS or len(floats) < 2, f"{function} of {floats}"
        out = function(*args, **kwargs)
        copied = function is aten._to_copy.default and out.device != tensors[0].device
        if len(devices) > 1 or copied and not (out.is_cuda and kwargs.get("non_blocking")):
            self.found.append(f"to {out.device.type}")
        return out


@pytest.fixture
def waits(monkeypatch):
    """Fake tensors, and what they lack for CUDA on a CPU build: the device's guard, autocast, Module.to."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib/libc10.so"))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own, guards[1] = guards[1], guards[1] or guards[14]  # CUDA's, else the meta device's, which does nothing

    def move(module, function, recurse=True):
        for child in module.children():
            child._apply(function)
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else nn.Parameter(function(p.detach()), p.requires_grad)
        module._buffers.update({n: function(b) for n, b in module._buffers.items() if b is not None})
        return module

    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode(), Waits() as mode:
        yield mode.found
    guards[1] = own


def take_a_step(waits, patch, device, preset, stage, *flags):
    """A step in which all play, and a look: without files, of a preset's sizes but for fewer blocks."""
    few = ["--set", "encoder_depth=1", "decoder_depth=3", "decoder_dual_depth=1", "depth=2"]
    args = train.parse_arguments(["--stage", "all", "--preset", preset, "--out", "none", *few, *flags])
    run, key = plan.Planned("none", train.open_run(args)[0].settings, args, device), torch.Generator()
    config, tower = run.config, train.TINY_SIGLIP if run.tiny else semtok.SigLIPConfig()
    shape, euler = (3, config.image_size, config.image_size), semtok.euler
    run.val = SimpleNamespace(spread=lambda n: (  # ten pictures, or three
        torch.zeros(10 if n == 10 else 3, *shape, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)))
    for name, judge in list(train.JUDGES.items()):
        patch.setitem(train.JUDGES, name, replace(judge, load=lambda _, judge=judge: judge.make_twin()))
    for module, name, stand_in in (
        (train, "load_vae", lambda *_: semtok.VAE(config.vae).to(device)),
        (train, "load_siglip", lambda *_: semtok.SigLIP(tower).to(device)),
        (train, "load_sd35", lambda decoder, *_: decoder.to_empty(device=device)),
        (train, "load_semtok", lambda *_: (train.first_tokenizer(run, "1", tower.width).to(device), {})),
        (train, "key_generator", lambda *_: Random() if device == CUDA else key),
        (train, "picture_grid", lambda rows: [row.cpu() for row in rows.values()]), (ar.ARConfig, "steps", 2),
        (train, "code_usage", lambda bits: {}), (train, "Tokens", lambda *_: None),
        (semtok, "euler", lambda velocity, x, _: euler(velocity, x, 2)),
    ):
        patch.setattr(module, name, stand_in)

    training = train.Training(stage, run)
    if device == CUDA:
        patch.setattr(torch.Tensor, "backward", lambda _: [
            setattr(p, "grad", torch.zeros_like(p)) for p in training.parameters.values()])
    training.step = training.stage.recipe.steps - 1
    batch = torch.zeros(6, *((config.tokens, config.bits) if stage == "ar" else shape), dtype=torch.uint8)
    waits.clear()
    losses = train.one_step(training, [batch.bool() if stage == "ar" else batch, torch.zeros(6).long()])
    assert waits == ["item"] and {value.device for value in losses.values()} == {device}
    with train.autocast(device):
        training.stage.look()


@pytest.mark.parametrize("preset, stage", [(p, s) for p in train.RECIPES for s in train.RECIPES[p]])
def test_a_step_waits_once(waits, preset, stage, monkeypatch):
    """For whether it is good. CPU tensors, and types that CUDA's autocast leaves unequal, are errors."""
    with torch.no_grad():
        take_a_step(waits, monkeypatch, CUDA, preset, stage)


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_backward_pass_waits_for_nothing(waits, stage, monkeypatch):
    monkeypatch.setattr(train, "autocast", bfloat16)
    take_a_step(waits, monkeypatch, CPU, "tiny", stage, "--checkpoint-activations", "--accumulate", "2")


@pytest.mark.parametrize("size", ["L", "XL", "XXL"])
def test_sampling_waits_for_its_end(waits, size, monkeypatch):
    few = replace(semtok.PRESETS["paper"], encoder_depth=1, decoder_depth=3, decoder_dual_depth=1)
    models = {"ar": ar.MaskedAR(replace(ar.AR_PRESETS[size], depth=2)), "stage2": semtok.SemTok(few)}
    about = {"classes": "[]", "parent": "", "fingerprint": ""}
    monkeypatch.setattr(sample, "load", lambda run, name, device, *_: (models[name].to(device), about))
    for order in ("random", "raster", "confidence"):
        arguments = ["--class", "1", "--steps", "3", "--batch-size", "2", "--order", order]
        sampler = sample.Sampler(sample.parse_arguments(arguments), CUDA)
        waits.clear()
        sampler.draw([1, 2, 3], Random())
        assert waits == ["to cuda", "to cpu", "to cpu"] and sampler.ar.head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- the first hour

def test_the_first_hour_in_small(tmp_path):
    """The command itself, where no GPU is seen: every part in the order of the hour, and all of them pass."""
    table = tmp_path / "new" / "table.md"
    command = [sys.executable, bench.__file__, "gpu", "--table", str(table)]
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | no_gpu, cwd=tmp_path, capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    names = [row[0].partition(",")[0] for row in rows[2:]]
    assert done.returncode == 0 and {row[-1] for row in rows[2:-1]} == {"pass"}, done.stdout + done.stderr
    assert names == ["tiny"] * 7 + ["AR-tiny", "fid.py", "kill -9", "minutes in all"]
    assert float(rows[-1][1]) < 60


def test_the_first_hour_goes_on_after_a_failure(tmp_path, monkeypatch):
    def full(folder):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench, "HOUR", [(full,), (lambda _: iter([("slow", "1", "2", False)]),), (full,)])
    with pytest.raises(SystemExit, match="1"):
        bench.gpu(SimpleNamespace(table=str(tmp_path / "table.md")))
    table = (tmp_path / "table.md").read_text()
    assert "| full  | OutOfMemoryError |  | FAIL |\n| slow | 1 | 2 | FAIL |\n| full  |" in table
