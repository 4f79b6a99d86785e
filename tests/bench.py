"""Measurements run by hand, one section per function, chosen on the command line: `python tests/bench.py metrics`.

Needs what the tests need. Prints what was measured, on how many cores, and ratios; pin the process (taskset) to keep
other work out of the numbers. On a busy machine set OMP_WAIT_POLICY=PASSIVE, or waiting threads are counted as work and
take turns from working ones. A new section is one more function with a docstring, listed in SECTIONS."""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


def timed(function):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def cpu_seconds():
    """Of this process and of its children that have ended: what a busy machine stretches less than the clock."""
    return sum(os.times()[:4])


def report(name, seconds, unit=""):
    """Print the median and the spread of some timings; returns the median."""
    middle = statistics.median(seconds)
    print(f"  {name:52s} {middle:8.2f} s{unit}   ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} runs)")
    return middle


def write_pictures(folder, count, size, source=None):
    """`count` JPEGs of size x size: crops of the photos in `source`, or drawn ones."""
    from PIL import Image
    from test_fid import drawn
    photos = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")) \
        if source else []
    for i in range(count):
        if photos:
            picture = Image.open(photos[i % len(photos)]).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
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
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        theirs = pytorch_fid.inception.InceptionV3([3])
        ours = fid.load_inception(weights)[0].for_evaluation()
        files = sorted(Path(folder).glob("*.jpg"))
        args = argparse.Namespace(batch_size=16, workers=cores, resize="pytorch-fid", device="cpu", mark="")
        source = fid.open_source(folder)

        def run_theirs():
            return pytorch_fid.fid_score.get_activations(files, theirs, 50, 2048, "cpu", cores)

        def run_ours():
            return torch.cat([pool for _, pool, _ in fid.read_features(source, ours, args, None)]).numpy()

        print(f"Inception features of {len(files)} JPEGs of 256 x 256, decoding included, float32, {cores} cores")
        resizes = {"pytorch-fid": None, "fid.py, its resize": "pytorch-fid", "fid.py, ADM's resize": "adm"}
        clock, cpu, features = ({name: [] for name in resizes} for _ in range(3))
        for _ in range(options.runs):  # in turns, so that a neighbour on the machine disturbs all alike
            for name, args.resize in resizes.items():
                before = cpu_seconds()
                spent, features[name] = timed(run_ours if args.resize else run_theirs)
                clock[name].append(spent)
                cpu[name].append(cpu_seconds() - before)
        for name, values in clock.items():
            report(name, values)
            ratios = [statistics.median(one / two for one, two in zip(seconds["pytorch-fid"], seconds[name]))
                      for seconds in (clock, cpu)]
            print(f"  {'':52s} best {len(files) / min(values):.2f} img/s; x pytorch-fid, median of rounds: "
                  f"{ratios[0]:.2f} by the clock, {ratios[1]:.2f} in CPU seconds ({statistics.median(cpu[name]):.1f} s)")
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


SECTIONS = {"metrics": metrics}


def main():
    """Choose sections on the command line and run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS, help="what to measure")
    parser.add_argument("--runs", type=int, default=3, help="timings of each thing (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=200, help="metrics: pictures to read (default %(default)s)")
    parser.add_argument("--photos", metavar="FOLDER", help="metrics: make them of these photos, not of drawn shapes")
    parser.add_argument("--features", type=int, default=4000, help="metrics: rows for precision and recall")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in options.sections:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
