"""Measurements run by hand, one section per function: `python tests/bench.py metrics`.

`ar`, `stages` and `decode` set times against the floor: FLOPs over the rate of a matrix product measured in
the same run, in turns with what it is compared with. On CUDA they have the paper's sizes, on a CPU sizes that
fit into minutes. It needs what the tests need. Pin the process (taskset) to keep other work out of the
numbers. On a busy machine set OMP_WAIT_POLICY=PASSIVE, or waiting threads are counted as work.

`gpu` is the first hour on a new card: what should be seen before anything long is started, each with what the
plan expects, into a Markdown table. On a CPU the tiny preset stands in for the paper's, to test this file."""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import plan  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def timed(function):
    """(seconds, result) of one call, until the GPU, where there is one, is done too."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def cpu_seconds():
    """Of this process and its children that have ended: a busy machine stretches it less than the clock."""
    return sum(os.times()[:4])


def report(name, seconds, unit=""):
    """Print the median and the spread of some timings; returns the median."""
    middle = statistics.median(seconds)
    spread = f"({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} runs)"
    print(f"  {name:52s} {middle:8.2f} s{unit}   {spread}")
    return middle


def write_pictures(folder, count, size, source=None):
    """`count` JPEGs of size x size: crops of the photos in `source`, or drawn ones."""
    from PIL import Image
    from test_fid import drawn
    import fid
    photos = fid.list_pictures(source) if source else []
    for i in range(count):
        if photos:
            picture = Image.fromarray(fid.read_picture(str(Path(source, photos[i % len(photos)])), size))
        else:
            picture = Image.fromarray(drawn(1, size, seed=i)[0])
        picture.save(Path(folder) / f"{i:05d}.jpg", quality=95)


def metrics(options):
    """fid.py against pytorch-fid on one folder, and its Frechet distance against scipy.linalg.sqrtm."""
    import scipy.linalg
    from test_fid import import_torchvision, settle
    import_torchvision()
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import fid

    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(folder, options.pictures, 256, options.photos)
        weights = os.path.join(folder, "random.pth")
        torch.save(settle(fid.Inception()).state_dict(), weights)
        state = torch.load(weights, weights_only=True)
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
        theirs = pytorch_fid.inception.InceptionV3([3])
        ours = fid.load_inception(weights)
        files = sorted(Path(folder).glob("*.jpg"))
        source = fid.open_source(folder)

        def run_theirs():
            return pytorch_fid.fid_score.get_activations(files, theirs, 50, 2048, "cpu", cores)

        def run_ours(resize):
            batches = fid.read_batches(source, 16, cores)
            with torch.no_grad():
                rows = [ours(fid.prepare(pictures, resize=resize))[0] for pictures in batches]
                return torch.cat(rows).numpy()

        print(f"Inception features of {len(files)} JPEGs of 256 x 256, with decoding, float32, {cores} cores")
        resizes = {"pytorch-fid": None, "fid.py, its resize": "pytorch-fid", "fid.py, ADM's resize": "adm"}
        clock, cpu, features = ({name: [] for name in resizes} for _ in range(3))
        for _ in range(options.runs):  # in turns, so that a neighbour on the machine disturbs all alike
            for name, resize in resizes.items():
                before = cpu_seconds()
                spent, features[name] = timed(partial(run_ours, resize) if resize else run_theirs)
                clock[name].append(spent)
                cpu[name].append(cpu_seconds() - before)
        for name, values in clock.items():
            report(name, values)
            ratios = [statistics.median(one / two for one, two in zip(seconds["pytorch-fid"], seconds[name]))
                      for seconds in (clock, cpu)]
            print(f"  {'':52s} best {len(files) / min(values):.2f} img/s; x pytorch-fid, median of rounds: "
                  f"{ratios[0]:.2f} by the clock, {ratios[1]:.2f} in CPU seconds "
                  f"({statistics.median(cpu[name]):.1f} s)")
        expected, got = features["pytorch-fid"], features["fid.py, its resize"]
        floor = np.maximum(expected, 0.1 * expected.mean())  # a ReLU's output may be zero
        print(f"  largest relative difference of features: {np.max(np.abs(got - expected) / floor):.1e}")

    print(f"Frechet distance in 2048 dimensions, float64, {cores} cores")
    generator = np.random.default_rng(0)
    spectrum = np.arange(1, 2049) ** -0.9  # eigenvalues that fall like those of pool_3 features of photos
    turn = np.linalg.qr(generator.normal(size=(2048, 2048)))[0]
    cases = {}
    for name, count in (("10,000 pictures", 10_000), ("1,000 pictures: rank deficient", 1_000)):
        rows = [generator.normal(size=(count, 2048)) * np.sqrt(spectrum) @ turn for _ in range(2)]
        cases[name] = [(x.mean(0) + 0.01 * i, np.cov(x, rowvar=False)) for i, x in enumerate(rows)]
    for name, (one, two) in cases.items():
        slow, root = timed(lambda: scipy.linalg.sqrtm(one[1] @ two[1]))
        expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1]) - 2 * np.trace(root).real
        fast = []
        for _ in range(options.runs):
            spent, got = timed(lambda: fid.frechet_distance(*one, *two))
            fast.append(spent)
        print(f"  {name}")
        report("scipy.linalg.sqrtm", [slow])
        middle = report("fid.frechet_distance", fast)
        print(f"  {'':52s} {slow / middle:8.2f} x sqrtm, relative difference {abs(got / expected - 1):.1e}")

    print(f"Precision and recall, 2 x {options.features} features of 2048 numbers, float32, {cores} cores")
    one, two = torch.rand(2, options.features, 2048).unbind()
    report("fid.precision_recall", [timed(lambda: fid.precision_recall(one, two))[0]])


# ------------------------------------------------------------------------------------- time over the floor


def flops(function):
    """FLOPs of one call (matrix products, attention, convolutions)."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
    # the counter knows CUDA's kinds of attention alone
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_attention = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    eager = torch.compiler.set_stance("force_eager")  # compiled networks would hide their operations
    with eager, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        function()
    return counter.get_total_flops()


def product_rate(dtype, shape):
    """FLOP/s of one matrix product (m, k) x (k, n), shape (m, k, n)."""
    m, k, n = shape
    a, b = torch.ones(m, k, device=DEVICE, dtype=dtype), torch.ones(k, n, device=DEVICE, dtype=dtype)
    return 2 * m * k * n / min(timed(lambda: a @ b)[0] for _ in range(6))


def over_floor(cases, dtype, shape, runs):
    """Time `cases`, name -> (function, its FLOPs, pictures), in turns, each right after the rate of a matrix
    product (m, k) x (k, n), shape (m, k, n); on CUDA a square one of 8192, since smaller ones are too short.

    Prints seconds, pictures a second, time over the floor and share of the rate, medians over the rounds, and
    the share of the best rate that the best round reaches, which other work disturbs least."""
    seconds, rates = {name: [] for name in cases}, {name: [] for name in cases}
    shape = 3 * (8192,) if CUDA else shape
    for function, *_ in cases.values():
        function()  # compilers and caches are warm
    for _ in range(runs):
        for name, (function, *_) in cases.items():
            rates[name].append(product_rate(dtype, shape))  # anew, not out of the cache
            seconds[name].append(timed(function)[0])
    every = [speed / 1e9 for speeds in rates.values() for speed in speeds]
    print(f"  matrix products {shape[:2]} x {shape[1:]}, {dtype}: {statistics.median(every):,.0f} GFLOP/s "
          f"({min(every):,.0f} to {max(every):,.0f})")
    for name, (_, work, pictures) in cases.items():
        middle = report(name, seconds[name])
        share = statistics.median(work / spent / speed for spent, speed in zip(seconds[name], rates[name]))
        best = work / 1e9 / min(seconds[name]) / max(every)
        print(f"  {'':52s} {work / 1e12:.3f} TFLOP, {pictures / middle:.2f} images/s; {1 / share:.2f} x "
              f"the floor, {share:.2f} of the rate, {best:.2f} of the best one")


@contextlib.contextmanager
def clocks(*places):
    """While open, functions, each (owner, name), add the seconds they take to a dict, by name."""
    spent = {name: 0.0 for _, name in places}
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            def clocked(*arguments, _original=getattr(owner, name), _name=name, **options):
                seconds, result = timed(lambda: _original(*arguments, **options))
                spent[_name] += seconds
                return result
            stack.enter_context(mock.patch.object(owner, name, clocked))
        yield spent


def ar(options):
    """AR-L: forward, training step and sampling with guidance, against the rate of its qkv product."""
    import ar
    import train
    large, product = ar.AR_PRESETS["L"], (8 * 257, 1024, 3 * 1024)

    def inputs(batch):
        bits, masked = (torch.rand(batch, large.tokens, n, device=DEVICE) < 0.5 for n in (large.bits, 1))
        return bits, torch.arange(batch, device=DEVICE), masked[..., 0]

    def forward(stance):
        with torch.no_grad(), torch.compiler.set_stance(stance):
            model(*eight)

    eight = inputs(8)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"AR-L forward, batch 8 of 257 positions, {dtype}")
        model = ar.MaskedAR(large).to(DEVICE, dtype).eval()
        for block in train.blocks_of(model):
            block.compile(dynamic=False)
        work = flops(lambda: model(*eight))
        cases = {"eager": "force_eager", "compiled": "default"}
        timings = {name: (partial(forward, stance), work, 8) for name, stance in cases.items()}
        over_floor(timings, dtype, product, options.runs)

    dtype = torch.bfloat16 if CUDA else torch.float32
    steps, batches = (64, (1, 8, 64)) if CUDA else (4, (1, 4))
    print(f"AR-L sampling, {steps} steps with guidance, {dtype}")
    model, cases = ar.MaskedAR(large).to(DEVICE, dtype).eval(), {}
    if CUDA:  # as sample.py
        model.hidden = torch.compile(model.hidden, mode="reduce-overhead", dynamic=False)
    for batch in batches:
        draw = partial(model.generate, torch.arange(batch, device=DEVICE), steps=steps, cfg=6.0)
        cases[f"batch {batch}"] = draw, flops(draw), batch
    over_floor(cases, dtype, product, options.runs)
    for name, (draw, *_) in cases.items():
        with clocks((model, "hidden")) as spent:
            whole, _ = timed(draw)
        print(f"  {name}: {whole / spent['hidden'] - 1:.1%} above the time of its forwards")


def decode(options):
    """The refiner: codes -> pictures, the decoder's one step and the VAE."""
    import semtok
    config, batches = semtok.PRESETS["paper"], (1, 8, 64)
    if not CUDA:
        config, batches = replace(config, decoder_depth=4, decoder_dual_depth=2), (1, 4)
    dtype = torch.bfloat16 if CUDA else torch.float32
    model, cases = semtok.SemTok(config).requires_grad_(False).to(DEVICE, dtype).eval(), {}
    print(f"Refiner, {config.decoder_depth} blocks and SD3.5's VAE, 256 x 256, {dtype}")

    def pictures(codes):
        return model.decode(model.refine(codes))

    for batch in batches:
        codes = torch.randn(batch, config.tokens, config.bits, device=DEVICE).sign() / config.bits**0.5
        draw = partial(pictures, codes)
        cases[f"batch {batch}"] = draw, flops(draw), batch
    over_floor(cases, dtype, (2048, 1536, 3 * 1536), options.runs)


def stages(_):
    """60 steps of each stage of the tiny preset by train.py itself: its log's speed, the plan's FLOPs."""
    import train
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--stage", "all", "--out", folder, "--steps", "60", "--set", "log_every=30"])
        entries = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
        run, _ = train.open_run(train.parse_arguments(["--stage", "all", "--out", folder]))
        run = plan.Planned(run.folder, run.settings, run.args)
    rate = product_rate(torch.bfloat16 if CUDA else torch.float32, 3 * ((8192,) if CUDA else (768,)))
    for entry in entries:
        if entry["step"] == 60 and "loss" in entry:
            with plan.without_files(run):
                work = plan.measure(entry["stage"], run, 8)[1] / 8  # FLOPs of a picture
            share, speed = entry["images_per_s"] * work / rate, f"{entry['images_per_s']:8.1f} images/s"
            print(f"  stage {entry['stage']:3s} {speed}, {share:.1%} of the rate of matrix products")


# ------------------------------------------------------------------------------------ the first hour on a GPU

# LEAST: the share of the peak that the plan counts on
PRESET, LEAST = ("paper", plan.UTILISATION) if CUDA else ("tiny", 0.001)
# By a CPU: the stages of README's default run; of 8 steps on 64 pictures
REACHED = dict(zip(("0", "1", "2", "ar"), (30.0, 20.0, 25.6, 0.418) if CUDA else (13.3, 10.3, 11.9, 0.68)))


def small_world(folder):
    """The tiny preset, all stages, as train.py runs it here: on CUDA in bfloat16 and compiled."""
    import train
    few = [] if CUDA else ["--steps", "8", "--workers", "0"]
    with mock.patch.dict(train.DRAWN, {} if CUDA else {"train": 64, "val": 20}):
        train.main(["--stage", "all", "--out", f"{folder}/tiny", *few])
    entries = [json.loads(line) for line in open(f"{folder}/tiny/log.jsonl")]
    for stage, expected in REACHED.items():
        name, unit, room = ("val_nll", "nats", 0.02) if stage == "ar" else ("psnr", "dB", 0.5)
        found = next(entry[name] for entry in reversed(entries) if entry["stage"] == stage and name in entry)
        good = found <= expected + room if stage == "ar" else found >= expected - room
        yield f"tiny, stage {stage}", f"{found:.3f} {unit}", f"{expected} {unit}, room {room}", good


def training_speed(folder, name, *flags):
    """Steps of a stage with random weights, all players in: memory and FLOP/s against plan and peak."""
    import train
    count, warm = (20, 3) if CUDA else (2, 1)
    args = train.parse_arguments(["--preset", PRESET, "--stage", name, "--out", f"{folder}/none", *flags])
    run = plan.Planned(args.out, train.open_run(args)[0].settings, args, DEVICE)
    size, on_cpu = run.recipe(name).batch_size, plan.Planned(args.out, run.settings, args)
    with plan.without_files(on_cpu):
        stage, work, forward, *kept = plan.measure(name, on_cpu, size // args.accumulate)
    work += plan.recomputed(stage, forward) * args.checkpoint_activations
    expected = sum(plan.held(stage, 1).values()) + kept[args.checkpoint_activations]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with plan.without_files(run), mock.patch.object(train, "Tokens", lambda *_: None):
        training = train.Training(name, run)
    training.step, batch = run.recipe(name).steps - count, plan.zeros(name, run, size)
    batch[0].random_(0, 2 if name == "ar" else 256)
    seconds = [timed(partial(train.one_step, training, batch))[0] for _ in range(count)]
    speed, peak = work * args.accumulate / statistics.median(seconds[warm:]), peak_rate()
    least = LEAST * args.compile if CUDA else LEAST  # the plan is of compiled blocks
    used = torch.cuda.max_memory_allocated() if CUDA else 0  # unknown
    how = f"{'' if args.compile else 'not '}compiled" + ", checkpointed" * args.checkpoint_activations
    yield (
        f"{PRESET}, stage {name}, {size // args.accumulate} at once, {how}",
        f"{used / 2**30:.1f} GiB, {speed / 1e12:.3g} TFLOP/s, {speed / peak:.1%} of {peak / 1e12:.3g}",
        f"{expected / 2**30:.1f} GiB, {least:.1%}",
        used < 1.1 * expected and speed > least * peak and not training.skipped,
    )


def peak_rate():
    """FLOP/s that a card is sold with; of a CPU, those of a matrix product."""
    return plan.CARDS["paper"][1] if CUDA else product_rate(torch.float32, (768, 768, 768))


def sampling_speed(_, size):
    """Pictures of a transformer with random weights, by sample.py's Sampler."""
    import ar
    import sample
    import semtok
    about, (count, batch) = {"classes": "[]", "parent": "", "fingerprint": ""}, (512, 64) if CUDA else (8, 4)
    with DEVICE:
        networks = {"ar": ar.MaskedAR(ar.AR_PRESETS[size]), "stage2": semtok.SemTok(semtok.PRESETS[PRESET])}
    with mock.patch.object(sample, "load", lambda _, name, device, *__: (networks[name].to(device), about)):
        arguments = sample.parse_arguments(["--npz", str(count), "--batch-size", str(batch)])
        sampler = sample.Sampler(arguments, DEVICE)
    bits = torch.zeros(1, sampler.ar.config.tokens, sampler.ar.config.bits, dtype=torch.bool, device=DEVICE)
    classes, masked = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.ones_like(bits[..., 0])
    steps, random = min(sampler.options["steps"], bits.shape[1]), torch.Generator(DEVICE)
    sampler.draw([0] * batch, random)  # compilers are warm
    work = 2 * steps * flops(lambda: networks["ar"](bits, classes, masked))  # with guidance: two passes
    spent, most = timed(lambda: sampler.draw([0] * count, random))[0] / count, work / peak_rate() / LEAST
    told = f"{1e3 * most:.4g} ms: {work / 1e12:.3g} TFLOP at {LEAST:.1%}"
    yield f"AR-{size}, {count} pictures", f"{1e3 * spent:.4g} ms a picture", told, spent < most


def fid_speed(folder):
    """fid.py's features of pictures, read out of files: as on the CPU, and how fast."""
    from test_fid import settle
    import fid
    import semtok
    count = 512 if CUDA else 8
    os.makedirs(f"{folder}/pictures")
    write_pictures(f"{folder}/pictures", count, 256)
    network, source, features = settle(fid.Inception()), fid.open_source(f"{folder}/pictures"), {}
    options = SimpleNamespace(batch_size=64, workers=len(os.sched_getaffinity(0)), resize="adm")
    with semtok.without_tf32():  # as fid.py's command
        for options.device in ("cpu", *["cuda", "cuda"] * CUDA):  # twice: cuDNN is warm
            network.to(options.device)
            features[options.device] = rows = []
            spent, _ = timed(partial(fid.measure, source, network, options, rows))
    expected, got = (torch.cat(features[device]).cpu() for device in ("cpu", DEVICE.type))
    off = ((got - expected).abs() / expected.clamp(min=0.1 * expected.mean())).max().item()
    told = f"{count / spent:.0f} a second, features off by {off:.1e} of the CPU's"
    yield f"fid.py, {count} pictures", told, "1e-4", off < 1e-4


def killed(folder):
    """kill -9 after the first training state; the same command goes on from it."""
    out, last = f"{folder}/killed", 400 if CUDA else 60
    script = str(Path(__file__).resolve().parents[1] / "train.py")
    command = [sys.executable, script, "--stage", "0", "--out", out, "--steps", str(last), "--workers", "0"]
    command += ["--set", "save_every=20", "log_every=10", f"preview_every={last}"]
    process = subprocess.Popen(command)
    while process.poll() is None and not any(Path(out).glob("state-0/step-*[0-9]")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    first, then = process.wait(), subprocess.run(command).returncode
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    begun = [entry["step"] for entry in lines].count(10)
    good = (first, then, begun, lines[-1]["step"]) == (-signal.SIGKILL, 0, 1, last)
    told = f"step 10 seen {begun} times, the last step is {lines[-1]['step']}"
    yield "kill -9, then the same command", told, f"1, {last}", good


BOTH = ("--checkpoint-activations", "--compile")
HOUR = [  # small batches take the same memory as the recipes', with as many pictures at once
    (small_world,),
    *((training_speed, "1", "--set", "batch_size=64", "--accumulate", "8", *flags) for flags in (
        ("--no-compile",), BOTH[1:], (BOTH[0], "--no-compile"), BOTH)),
    (training_speed, "2", "--accumulate", "8", *BOTH),
    (training_speed, "ar", "--set", "batch_size=512", "--accumulate", "4", *BOTH),
    *((sampling_speed, size) for size in ("L", "XL", "XXL")), (fid_speed,), (killed,),
] if CUDA else [
    (small_world,), *((training_speed, *case, "--no-compile") for case in (
        ("1",), ("2", "--accumulate", "2", BOTH[0]), ("ar",))),
    (sampling_speed, "tiny"), (fid_speed,), (killed,),
]


def gpu(options):
    """All of HOUR, one after the other, into a table. Exits with 1 when something failed."""
    import semtok

    semtok.choose_device(None)  # TF32, as the commands have it
    card, start, failed = torch.cuda.get_device_name() if CUDA else "a CPU, in small", time.time(), 0
    os.makedirs(os.path.dirname(options.table) or ".", exist_ok=True)
    with open(options.table, "w") as table, tempfile.TemporaryDirectory() as folder:
        def write(*cells):
            line = f"| {' | '.join(cells)} |"
            print(line, flush=True)
            print(line, file=table, flush=True)

        write(f"{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}", "measured", "expected", "")
        write(*4 * ["---"])
        for part, *arguments in HOUR:
            try:
                rows = list(part(folder, *arguments))
            except (Exception, SystemExit) as error:  # such as full memory: the others are still of use
                traceback.print_exc()
                rows = [(f"{part.__name__} {' '.join(arguments)}", type(error).__name__, "", False)]
            for *cells, good in rows:
                failed += not good
                write(*cells, "pass" if good else "FAIL")
            gc.collect()
            torch.compiler.reset()
            if CUDA:
                torch.cuda.empty_cache()
        write("minutes in all", f"{(time.time() - start) / 60:.1f}", "60", "")
    if failed:
        sys.exit(1)


SECTIONS = {"metrics": metrics, "ar": ar, "stages": stages, "decode": decode, "gpu": gpu}


def main():
    """Choose sections on the command line and run them one after the other."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("sections", nargs="+", choices=SECTIONS, help="what to measure")
    parser.add_argument("--runs", type=int, default=3, help="timings of each thing (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=200, help="metrics: pictures to read")
    parser.add_argument("--photos", metavar="FOLDER", help="metrics: made of these photos")
    parser.add_argument("--features", type=int, default=4000, help="metrics: rows for precision and recall")
    default = os.path.join("runs", "gpu", "first-hour.md")
    parser.add_argument("--table", metavar="PATH", default=default, help="gpu: (default %(default)s)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in options.sections:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
