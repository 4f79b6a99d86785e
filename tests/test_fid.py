"""fid.py against independent formulations and the reference libraries, on random weights, drawn pictures."""

import io
import itertools
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402
from conftest import import_torchvision  # noqa: E402

INCEPTION, VGG, HEADS = (fid.WEIGHTS[name][0] for name in ("inception", "vgg", "heads"))


def drawn(count, height, width=None, seed=0):
    """Smooth coloured pictures, uint8 (count, height, width, 3), each different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width or height), mode="bicubic") * 230 + 12
    noise = 10 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def settle(network, seed=0):
    """Random weights under which signals neither grow nor vanish: He's, with norms close to one."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return network.eval()


def write_folder(folder, pictures, suffix=".png"):
    """Pictures as numbered files, half of them in a subfolder."""
    for i, picture in enumerate(pictures):
        path = Path(folder) / ("a" if i % 2 else "b/c") / f"{i:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return str(folder)


class Small(torch.nn.Module):
    """A stand-in of a few features for tests of what surrounds the network; forward and fc as Inception's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.fc = torch.nn.Linear(48, 12), torch.nn.Linear(12, 10)
        torch.nn.init.normal_(self.fc.weight)
        torch.nn.init.constant_(self.fc.bias, 30)  # a score that used the bias would show it
        self.fc.bias.data[0] = 0

    def forward(self, x):
        maps = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.pool(maps).relu(), maps[:, :9] ** 2


@pytest.fixture
def small(monkeypatch, tmp_path_factory):
    """Put Small in Inception's place; returns the option with the folder where the command finds it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / f"{INCEPTION}.pth").write_bytes(b"small")
    monkeypatch.setattr(fid, "load_inception", lambda path: Small())
    return "--weights", folder


def small_features(pictures):
    """(pool_3, spatial) of Small in float64, without fid's own plumbing."""
    return [x.detach().double().numpy() for x in Small()(fid.prepare(pictures))]


@pytest.fixture(autouse=True)
def no_weights(tmp_path_factory, monkeypatch):
    """No test sees the weights/ that the machine may have."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def call(capsys, *argv):
    """Run the command in this process; returns its report from --json."""
    code = fid.main([*map(str, argv), "--json", "--workers", "1", "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


# ------------------------------------------------------------------------------------------ pictures in pairs

@pytest.mark.parametrize("height, width", [(11, 11), (32, 32), (40, 57)])
@pytest.mark.parametrize("data_range", [255.0, 2.0])
def test_psnr_and_ssim_equal_scikit_image(height, width, data_range):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    a, b = drawn(3, height, width, seed=1), drawn(3, height, width, seed=2)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    if data_range == 2.0:
        a, b = a / 127.5 - 1, b / 127.5 - 1
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnr = [peak_signal_noise_ratio(x, y, data_range=data_range) for x, y in zip(a, b)]
    ssim = [structural_similarity(x, y, data_range=data_range, **options) for x, y in zip(a * 1.0, b * 1.0)]
    images, references = (torch.tensor(x).permute(0, 3, 1, 2) for x in (b, a))
    np.testing.assert_allclose(fid.psnr(images, references, data_range), psnr, rtol=1e-9)
    np.testing.assert_allclose(fid.ssim(images, references, data_range), ssim, rtol=1e-9)


def test_lpips_equals_the_package_in_value_and_gradient(tmp_path):
    """With random VGG16 weights and the official heads, which come with the package."""
    import_torchvision()
    import lpips
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    heads = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    theirs.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False)
    vgg = {f"features.{name.split('.', 1)[1]}": value for name, value in theirs.net.state_dict().items()}
    assert set(vgg) == set(fid.VGG16Features().state_dict())
    torch.save(vgg | {"classifier.0.weight": torch.zeros(4, 4)}, tmp_path / "vgg16.pth")
    ours = fid.load_lpips(tmp_path / "vgg16.pth", heads)
    a, b = (torch.tensor(drawn(2, 64, 48, seed=s)).permute(0, 3, 1, 2) / 127.5 - 1 for s in (3, 4))
    gradients, values = [], []
    for function in (ours, theirs.eval()):
        x = a.clone().requires_grad_()
        values.append(function(x, b).flatten())
        values[-1].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * gradients[1].abs().max().item())
    assert not any(p.requires_grad for p in ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(a, b), values[1].detach(), rtol=0.05, atol=0)
    assert fid.sha256(heads).startswith(fid.WEIGHTS["heads"][1])


def test_lpips_gradient_is_finite_where_features_vanish():
    vgg = fid.VGG16Features((4, 4, 4, 4, 4))
    for parameter in vgg.parameters():
        parameter.data.fill_(-0.1)  # every ReLU closes on white pictures
    distance = fid.LPIPS(vgg, [torch.ones(1, 4, 1, 1)] * 5)
    x = torch.ones(1, 3, 32, 32, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():  # raises at a NaN
        distance(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad.isfinite().all()
    for function, small, other in ((fid.psnr, x, x[..., 1:]), (fid.ssim, x[..., :10], x[..., :10]),
                                   (distance, x[..., :15], x[..., :15])):
        with pytest.raises(ValueError, match="one shape"):
            function(small, other)


def write_lpips(folder):
    """A narrow VGG16 as safetensors and its heads; returns their paths and the heads."""
    torch.manual_seed(5)
    widths, vgg, path = (4, 6, 8, 10, 12), folder / f"{VGG}.safetensors", folder / f"{HEADS}.pth"
    save_file(fid.VGG16Features(widths).state_dict(), vgg)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, path)
    return vgg, path, heads


def test_lpips_loader_reads_sizes_and_names_faults(tmp_path):
    vgg, heads_path, heads = write_lpips(tmp_path)
    assert len(fid.load_lpips(vgg, heads_path).head4[0]) == 12
    state = dict(fid.VGG16Features((4, 6, 8, 10, 12)).state_dict())
    state["features.0.bias"] = torch.zeros(3)
    state["extra.weight"] = state.pop("features.5.weight")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(fid.UserError) as error:
        fid.load_lpips(tmp_path / "bad.pth", heads_path)
    for fault in ("missing features.5.weight", "unexpected extra.weight", "misshapen features.0.bias (3,)"):
        assert fault in str(error.value)
    torch.save(heads | {"lin2.model.1.weight": torch.rand(1, 9, 1, 1)}, tmp_path / "heads2.pth")
    with pytest.raises(fid.UserError, match="lin2.model.1.weight"):
        fid.load_lpips(vgg, tmp_path / "heads2.pth")


# ---------------------------------------------------------------------------------------------- the Inception

def legacy_bilinear(picture, size):
    """TF1's ResizeBilinear without aligned corners, in float64: (H, W, 3) -> (size, size, 3)."""
    for axis in (0, 1):
        length = picture.shape[axis]
        at = np.arange(size) * length / size
        low = at.astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        picture = picture.take(low, axis) * (1 - share) + picture.take(high, axis) * share
    return picture


@pytest.mark.parametrize("height, width, size", [(32, 32, 75), (64, 48, 99), (120, 200, 75), (50, 50, 50)])
def test_resize_is_tf1_legacy_bilinear(height, width, size):
    picture = drawn(1, height, width)[0]
    expected = (legacy_bilinear(picture.astype(np.float64), size) - 128) / 128
    got = fid.prepare(picture[None], size)[0].permute(1, 2, 0)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    if size != height:
        other = fid.prepare(picture[None], size, "pytorch-fid")[0].permute(1, 2, 0).numpy()
        assert np.abs(other - expected).max() > 0.01


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the real widths as pytorch-fid's file, alone in its folder."""
    path = tmp_path_factory.mktemp("real") / f"{INCEPTION}.pth"
    torch.save(settle(fid.Inception()).state_dict(), path)
    return path


def largest_relative(got, expected, floor=0.1):
    """The largest difference relative to the expected value, or to floor x their mean if that is larger."""
    return ((got - expected).abs() / expected.abs().clamp_min(floor * expected.abs().mean())).max().item()


def test_features_equal_pytorch_fid(weights, monkeypatch):
    import_torchvision()
    import pytorch_fid.inception
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url",
                        lambda *_, **__: torch.load(weights, weights_only=True))
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    ours, pictures, maps = fid.load_inception(weights), drawn(3, 96, 80, seed=6), []
    hook = theirs.blocks[2][6].branch1x1.register_forward_hook(lambda *event: maps.append(event[2]))
    with torch.no_grad():
        # Whole pipelines with their resize, then our resize through their network.
        expected = [theirs(torch.tensor(pictures).permute(0, 3, 1, 2) / 255)[0].flatten(1)]
        theirs.resize_input = theirs.normalize_input = False
        expected.append(theirs(fid.prepare(pictures))[0].flatten(1))
        theirs.resize_input = theirs.normalize_input = True
        got = [ours(fid.prepare(pictures, resize=resize)) for resize in ("pytorch-fid", "adm")]
    hook.remove()
    assert expected[0].std(0).mean() > 0.01 * expected[0].mean()  # it sees pictures
    for (pool, spatial), reference, branch in zip(got, expected, maps):
        assert largest_relative(pool, reference) < 1e-4
        assert branch.shape[2:] == (17, 17) and spatial.shape == (3, 2023)
        channels_last = np.ascontiguousarray(branch[:, :7].permute(0, 2, 3, 1).numpy()).reshape(3, -1)
        # Single values after a ReLU come as close to zero as they like.
        assert largest_relative(spatial, torch.tensor(channels_last), floor=1.0) < 1e-4
    assert largest_relative(expected[0], expected[1]) > 1e-3  # and the two resizes do differ


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_weights_are_not_read_whole(tmp_path):
    vgg, heads, _ = write_lpips(tmp_path)
    state = load_file(vgg) | {"classifier.0.weight": torch.ones(2**25)}  # 128 MiB that LPIPS does not use
    torch.save(state, tmp_path / f"{VGG}.pth")
    save_file(state, vgg)
    # VmHWM is this program's peak; getrusage's would start from that of the process that started it.
    code = f"""
import re, fid
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
for vgg in {str(vgg)!r}, {str(vgg.with_suffix(".pth"))!r}:
    fid.load_lpips(vgg, {str(heads)!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**16  # KiB


# ------------------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("count, parts", [(12, (5, 5, 2)), (10, (5, 5)), (3, (3,))])
def test_inception_score_has_no_bias_and_adm_parts(count, parts):
    torch.manual_seed(0)
    features, weight = torch.rand(count, 16), torch.randn(7, 16)
    scores, first = [], 0
    for part in parts:
        logits = features[first : first + part].double().numpy() @ weight.double().numpy().T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))
        first += part
    assert fid.inception_score(features, weight, split_size=5) == pytest.approx(np.mean(scores), rel=1e-6)
    # Probabilities that are zero in float32.
    assert fid.inception_score(torch.eye(4).repeat(3, 1), torch.eye(4) * 1e4) == pytest.approx(4.0)


def test_precision_and_recall_equal_brute_force():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(37, 6)) + 100  # a common offset that the distances must not feel
    samples = generator.normal(size=(29, 6)) * 0.7 + 100.9

    def inside(points, centres):
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(np.sum((centre - other) ** 2) for j, other in enumerate(centres) if j != i)
                if np.sum((point - centre) ** 2) <= others[2]:
                    hits += 1
                    break
        return hits / len(points)

    expected = inside(samples, reference), inside(reference, samples)
    assert 0.2 < min(expected) and max(expected) < 0.98 and expected[0] != expected[1]
    for block in (7, 1024):
        got = fid.precision_recall(torch.tensor(reference), torch.tensor(samples), block=block)
        assert got == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(torch.rand(3, 6), torch.rand(9, 6))


def test_ties_of_precision_and_recall_count_as_inside():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(40, 512, generator=generator)
    fours = rows.repeat(4, 1)  # the third neighbour is a copy: every ball is a point
    assert fid.precision_recall(fours, fours[torch.randperm(160, generator=generator)], block=7) == (1, 1)
    assert fid.precision_recall(fours, torch.cat([fours[:80], fours[:80] + 1]), block=7) == (0.5, 1)
    line = torch.arange(0, 40, 4.0)[:, None]  # its last ball reaches from 36 to 48, where the others begin
    assert fid.precision_recall(line, line + 48, block=3) == (0.1, 0.1)


def statistics(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_frechet_equals_sqrtm():
    generator = np.random.default_rng(1)
    mix = generator.normal(size=(96, 96)) * np.logspace(0, -3, 96)
    one = statistics(generator.normal(size=(400, 96)) @ mix.T)
    mix += 0.1 * generator.normal(size=mix.shape)
    two = statistics(generator.normal(size=(500, 96)) @ mix.T + 0.2)
    root = scipy.linalg.sqrtm(one[1] @ two[1])
    expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1]) + np.trace(two[1]) - 2 * np.trace(root).real
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-6)
    for counts in ((20, 30), (20, 400), (2, 3)):  # rank deficient
        rows = [generator.normal(size=(count, 64)) * np.logspace(0, -2, 64) for count in counts]
        one, two = map(statistics, rows)
        # For centred rows A, B the trace is the sum of the singular values of A B^T, up to the two counts.
        product = (rows[0] - one[0]) @ (rows[1] - two[0]).T / math.sqrt((counts[0] - 1) * (counts[1] - 1))
        root = np.linalg.svd(product, compute_uv=False).sum()
        expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1]) + np.trace(two[1]) - 2 * root
        assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
        assert 0 <= fid.frechet_distance(*one, *one) < 1e-6


def test_frechet_of_degenerate_and_wrong_statistics():
    zero, eye, half = np.zeros(8), np.eye(8), np.diag([1.0] * 4 + [0.0] * 4)
    for one, two in (((zero, 0 * eye), (zero + 1, 0 * eye)), ((zero, 0 * eye), (zero, eye)),
                     ((zero, half), (zero, eye - half))):  # supports at right angles: a product of zero
        assert fid.frechet_distance(*one, *two) == pytest.approx(8)
    # A covariance that float32 made slightly indefinite.
    rough = np.cov(np.random.default_rng(3).normal(size=(5, 8)), rowvar=False).astype(np.float32)
    assert 0 <= fid.frechet_distance(zero, rough, zero, rough) < 1e-5 * np.trace(rough)
    for wrong, fault in (((zero * np.nan, eye), "finite"), ((np.zeros(9), np.eye(9)), "one D")):
        with pytest.raises(ValueError, match=fault):
            fid.frechet_distance(zero, eye, *wrong)


@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_moments_equal_two_passes_with_a_large_mean(mean):
    generator = np.random.default_rng(4)
    rows = generator.normal(size=(1000, 24)) @ generator.normal(size=(24, 24)) + mean
    rows[:300] += 5  # batches that disagree with the whole
    moments = fid.Moments()
    for part in np.split(rows, [1, 8, 8, 300, 999]):
        if len(part):
            moments.update(torch.tensor(part))
    mu, sigma = moments.result()
    centred = rows - rows.mean(0)
    expected = centred.T @ centred / (len(rows) - 1)
    np.testing.assert_allclose(mu, rows.mean(0), rtol=1e-9)
    assert np.abs(sigma - expected).max() < 1e-9 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------- the command: inputs

@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The same 12 pictures as every kind of input, and 9 others as a folder."""
    folder = tmp_path_factory.mktemp("kinds")
    pictures, others = drawn(12, 32, seed=7), drawn(9, 32, seed=8) // 2 + 60
    pool, spatial = small_features(pictures)
    full = dict(zip(fid.MOMENTS, (*statistics(pool), *statistics(spatial))))
    np.savez(folder / "stored.npz", pictures)
    np.savez_compressed(folder / "deflated.npz", arr_0=pictures, arr_1=np.arange(12))
    np.savez(folder / "pytorch-fid.npz", mu=full["mu"], sigma=full["sigma"])
    np.savez(folder / "moments.npz", **full)
    np.savez(folder / "reference-batch.npz", arr_0=pictures, **full)
    paths = {name: str(folder / f"{name}.npz") for name in KINDS if name != "folder"}
    # Files of folders sort differently from their numbers, which statistics must not mind.
    paths["folder"] = write_folder(folder / "pictures", pictures)
    paths["others"] = write_folder(folder / "others", others, ".bmp")
    return paths, pictures, others


KINDS = ("folder", "stored", "deflated", "pytorch-fid", "moments", "reference-batch")


@pytest.mark.parametrize("reference", KINDS)
def test_any_pair_of_kinds_works(reference, kinds, small, capsys):
    pictures_of = {name for name in KINDS if name not in ("pytorch-fid", "moments")}
    for samples in KINDS:
        report = call(capsys, *small, kinds[0][reference], kinds[0][samples])
        missing = {name for name, value in report.items() if str(value).startswith("not available: ")}
        assert {"IS", "FID", "sFID", "Precision", "Recall"} <= set(report)
        assert report["FID"] == pytest.approx(0, abs=1e-6)
        assert ("sFID" in missing) == ("pytorch-fid" in (reference, samples))
        assert ("IS" in missing) == (samples not in pictures_of)
        assert ("Precision" in missing) == ("Recall" in missing) == (not {reference, samples} <= pictures_of)


def test_all_metrics_against_numpy(kinds, small, capsys, tmp_path):
    paths, pictures, others = kinds
    report = call(capsys, *small, paths["folder"], paths["others"], "--batch-size", 4)
    # Folder order is by path: odd numbers in a/, even ones in b/c/.
    others = np.concatenate([others[1::2], others[0::2]])
    (pool, spatial), (pool2, spatial2) = small_features(pictures), small_features(others)
    expected = {}
    for name, one, two in (("FID", pool, pool2), ("sFID", spatial, spatial2)):
        (mu1, sigma1), (mu2, sigma2) = statistics(one), statistics(two)
        root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
        expected[name] = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    logits = pool2 @ Small().fc.weight.detach().double().numpy().T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected["IS"] = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)))
    expected["Precision"], expected["Recall"] = fid.precision_recall(torch.tensor(pool), torch.tensor(pool2))
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=2e-3), name
    assert expected["IS"] > 1.001 and "N = 12, 32 x 32" in report["reference"]
    assert report["inception weights"][7:] == fid.sha256(small[1] / f"{INCEPTION}.pth")
    warned = " ".join(value for name, value in report.items() if name.startswith("warning"))
    assert "not the standard weights (inception)" in warned and "samples: fewer than 10,000" in warned
    other = call(capsys, *small, paths["folder"], paths["others"], "--resize", "pytorch-fid")
    assert abs(other["FID"] / report["FID"] - 1) > 1e-4
    assert (report["resize to 299"], other["resize to 299"]) == ("adm", "pytorch-fid")
    # Statistics in a file go before its pictures, while the manifold is that of the pictures.
    np.savez(tmp_path / "mixed.npz", arr_0=pictures, **dict(zip(fid.MOMENTS, (
        *statistics(pool2), *statistics(spatial2)))))
    mixed = call(capsys, *small, tmp_path / "mixed.npz", paths["others"])
    assert mixed["FID"] == pytest.approx(0, abs=1e-6) and mixed["sFID"] == pytest.approx(0, abs=1e-6)
    assert mixed["Recall"] == report["Recall"] < 1


@pytest.mark.parametrize("wrong", [
    torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2, 8, 8, 3), np.zeros((8, 8, 3), "u1"),
])
def test_features_are_of_uint8_pictures_with_channels_last(wrong):
    with pytest.raises(ValueError, match="uint8"):
        fid.prepare(wrong)


def test_pictures_are_streamed_in_order(tmp_path, monkeypatch):
    import tracemalloc
    pictures = np.random.default_rng(0).integers(0, 256, (1500, 64, 64, 3), dtype=np.uint8)  # 18 MB
    for name, write in (("stored", np.savez), ("deflated", np.savez_compressed)):
        write(tmp_path / f"{name}.npz", pictures)
        source = fid.open_source(str(tmp_path / f"{name}.npz"))
        assert (source.count, source.size) == (1500, (64, 64))
        tracemalloc.start()
        for first, batch in zip(range(0, 1500, 64), fid.read_batches(source, 64)):
            assert np.array_equal(batch, pictures[first : first + 64])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert first == 1472 and peak < 5e6
    few = drawn(10, 16)
    source = fid.open_source(write_folder(tmp_path / "p", few))
    ordered = np.concatenate([few[1::2], few[0::2]])
    assert np.array_equal(np.concatenate(list(fid.read_batches(source, 3, workers=2))), ordered)
    assert np.array_equal(np.concatenate(list(fid.read_batches(source, 3, step=3))), ordered[::3])
    monkeypatch.setattr(fid, "BATCH_BYTES", 4 * few[0].nbytes)  # large pictures come in smaller batches
    assert [len(batch) for batch in fid.read_batches(source, 64)] == [4, 4, 2]


def pictures_of_all_kinds(folder):
    """Picture files of many modes and sizes, one turned by EXIF; their paths in order."""
    folder.mkdir()
    large, tall = (Image.fromarray(drawn(1, height, 130, seed=height)[0]) for height in (90, 260))
    grey, exif, clear = np.asarray(tall.convert("L")), Image.Exif(), large.convert("RGBA")
    exif[0x0112] = 6  # turned by a quarter
    clear.putalpha(large.convert("L"))
    large.save(folder / "a.jpg", exif=exif)
    tall.convert("P").save(folder / "c.gif")
    large.convert("CMYK").save(folder / "d.tif")
    clear.save(folder / "e.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "f.PNG")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "g.tiff")
    tall.resize((32, 32)).save(folder / "h.bmp")
    tall.resize((900, 4)).save(folder / "i.webp")  # a thin one
    return sorted(folder.iterdir())


@pytest.mark.parametrize("pairs", [False, True])
def test_pictures_of_every_kind_are_fitted_to_the_npz(pairs, tmp_path, small, capsys):
    files = pictures_of_all_kinds(tmp_path / "all")
    for picture in (*map(fid.read_picture, files), *(fid.read_picture(path, 32) for path in files)):
        assert picture.dtype == np.uint8 and picture.flags.writeable and picture.flags.c_contiguous
    np.savez(tmp_path / "same.npz", np.stack([fid.read_picture(path, 32) for path in files]))
    argv = [*small, *["--pairs"] * pairs, tmp_path / "all", tmp_path / "same.npz"]
    report = call(capsys, *argv)
    assert report["equal pairs" if pairs else "FID"] == (8 if pairs else pytest.approx(0, abs=1e-6))
    assert not pairs or report["PSNR"] == "not available: all pairs are equal"
    assert "32 x 32 pixels, others fitted" in report["reference"] and "fitted" not in report["samples"]
    smaller = call(capsys, *argv, "--size", 24)
    assert all("24 x 24 pixels, others fitted" in smaller[side] for side in ("reference", "samples"))


def tiff(bits, photometric, kind, data, width):
    """A TIFF of one row. kind: 1 unsigned, 2 signed, 3 float."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1,
               279: len(data), 339: kind}
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4) + data


def test_grey_of_any_depth_is_scaled_by_what_the_file_declares(tmp_path):
    """Not by its largest value. What declares no white is refused by name."""
    sixteen, twelve, path = np.array([0, 16384, 32768, 65535], "<u2"), [0, 1000, 2000, 4095], tmp_path / "x"
    packed = int("".join(f"{value:012b}" for value in twelve), 2).to_bytes(6, "big")
    Image.fromarray(sixteen[None]).save(clear := io.BytesIO(), "PNG", transparency=32768)
    for content, row in {
        b"P5 4 1 65535\n" + np.array([0, 50, 129, 255], ">u2").tobytes(): [0, 0, 1, 1],
        b"P5 4 1 4095\n" + np.array(twelve, ">u2").tobytes(): [0, 62, 125, 255],
        tiff(12, 1, 1, packed, 4): [0, 62, 125, 255], clear.getvalue(): [0, 64, 255, 255],
        tiff(16, 1, 1, sixteen.tobytes(), 4): [0, 64, 128, 255],
        tiff(16, 0, 1, sixteen.tobytes(), 4): [255, 191, 127, 0],
    }.items():
        path.write_bytes(content)
        assert fid.read_picture(path)[0].tolist() == [[value] * 3 for value in row], content[:20]
    for content in (b"Pf 1 1 -1.0\n" + bytes(4), tiff(32, 1, 1, bytes(4), 1), tiff(32, 1, 3, bytes(4), 1),
                    tiff(16, 1, 2, bytes(2), 1)):
        path.write_bytes(content)
        with pytest.raises(fid.UserError, match=f"^{path} .*float, signed or 32-bit .* declare no white"):
            fid.read_picture(path)


def test_the_lister_leaves_out_what_is_hidden_and_never_goes_round(tmp_path):
    folder = tmp_path / "all"
    for name in ("z.PNG", "b/c.jpeg", ".hidden.png", ".hidden/x.png", "text.txt", "../far/d/e.TiF"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, to in (("here", "."), ("here too", "."), ("b/up", ".."), ("far", "../far"), ("again", "b"),
                     ("../far/back", "../all"), ("broken.png", "nothing")):
        (folder / name).symlink_to(to)
    assert fid.list_pictures(str(folder)) == "again/c.jpeg b/c.jpeg broken.png far/d/e.TiF z.PNG".split()
    assert fid.list_pictures(folder / ".hidden") == ["x.png"]  # the folder that is asked for may be hidden
    for path in (folder / "absent", folder / "text.txt"):
        with pytest.raises(fid.UserError, match=f"{path} cannot be listed"):
            fid.list_pictures(path)


@pytest.mark.filterwarnings("error")  # not even Pillow's own
@pytest.mark.parametrize("width", [12, 30])  # above Pillow's limit, and above twice that
def test_the_size_limit_holds_in_the_reader_itself(width, tmp_path, monkeypatch):
    Image.new("L", (width, 9)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", np.zeros((2, 9, width, 3), np.uint8))
    for path, read in ((tmp_path / "a.png", fid.read_picture), (tmp_path / "a.npz", fid.open_source)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(fid.UserError, match=f"^{path} has {width} x 9 pixels, .* 100: [^\n]+$"):
            read(path)
        for limit in (9 * width, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            read(path)


def test_weights_are_the_first_of_three(tmp_path):
    with pytest.raises(fid.UserError, match=rf"^{tmp_path}/net\.\* is missing \(ask for it\)$"):
        fid.find_weights(tmp_path, "net", "ask for it")
    for name in ("net", "net.pth", "net.safetensors"):
        (tmp_path / name).mkdir()
        assert fid.find_weights(str(tmp_path), "net", "") == str(tmp_path / name)


def test_weights_of_the_real_widths_and_their_hash(kinds, weights, capsys, monkeypatch, tmp_path):
    np.savez(tmp_path / "two.npz", kinds[1][:2])
    argv = [str(tmp_path / "two.npz"), str(tmp_path / "two.npz"), "--workers", "1", "--device", "cpu"]
    assert fid.main([*argv, "--weights", str(weights.parent)]) == 0
    out = capsys.readouterr().out
    assert fid.sha256(weights) in out and "not the standard weights" in out
    assert re.search(r"^Precision +not available: too few", out, re.M)
    # Found in weights/, and standard by its hash.
    monkeypatch.setitem(fid.WEIGHTS, "inception", ("known", fid.sha256(weights)[:8], ""))
    Path("weights").mkdir()
    Path("weights/known.pth").symlink_to(weights)
    assert fid.main(argv) == 0
    out = capsys.readouterr().out
    assert fid.sha256(weights) in out and "standard" not in out


# ----------------------------------------------------------------------------------------- the command: pairs

def test_pairs_match_by_path_and_equal_the_functions(tmp_path, small, capsys):
    originals, recons = drawn(6, 40, seed=9), drawn(6, 40, seed=10)
    recons = (0.8 * originals + 0.2 * recons).astype(np.uint8)
    write_folder(tmp_path / "o", originals, ".bmp")
    write_folder(tmp_path / "r", recons[:5])
    Image.fromarray(recons[5]).save(tmp_path / "r/lonely.png")
    lpips = fid.load_lpips(*write_lpips(small[1])[:2])
    report = call(capsys, "--pairs", *small, tmp_path / "o", tmp_path / "r", "--batch-size", 2)
    a, b = (torch.tensor(x[:5]).permute(0, 3, 1, 2) for x in (originals, recons))
    one, two = (statistics(small_features(x[:5])[0]) for x in (originals, recons))
    expected = {"rFID": fid.frechet_distance(*one, *two), "PSNR": fid.psnr(b, a).mean(),
                "SSIM": fid.ssim(b, a).mean(), "LPIPS": lpips(b / 127.5 - 1, a / 127.5 - 1).mean()}
    for name, value in expected.items():
        assert report[name] == pytest.approx(float(value), rel=1e-4), name
    assert report["warning 1"].startswith("2 pictures without a partner") and "N = 5" in report["reference"]


def test_equal_pairs_order_and_compression_are_named(tmp_path, small, capsys):
    """One equal pair leaves JSON valid and the mean finite. An npz in Fortran's order is read."""
    originals = drawn(12, 16, seed=3)
    recons = np.concatenate([originals[:1], originals[1:] ^ 3])
    np.savez(tmp_path / "r.npz", np.asfortranarray(recons))
    (tmp_path / "o").mkdir()
    for i, picture in enumerate(originals):
        Image.fromarray(picture).save(tmp_path / f"o/{i}.png")
    report = call(capsys, "--pairs", tmp_path / "o", tmp_path / "r.npz", "--weights", "no/where")
    order = sorted(range(12), key=str)  # 0, 1, 10, 11, 2
    a, b = (torch.tensor(x).permute(0, 3, 1, 2) for x in (originals[order], recons))
    assert report["equal pairs"] == 1 and report["PSNR"] == pytest.approx(fid.psnr(b, a)[1:].mean().item())
    warned = " ".join(value for name, value in report.items() if name.startswith("warning"))
    assert "by position, the folder's in this order: 0.png, 1.png, 10.png" in warned
    assert "too high" not in warned and "r.npz, pictures, N = 12" in report["samples"]
    jpeg = write_folder(tmp_path / "jpeg", originals, ".jpg")
    assert "samples: JPEG files" in str(call(capsys, *small, tmp_path / "r.npz", jpeg))
    assert "JPEG" not in str(call(capsys, *small, jpeg, tmp_path / "r.npz"))


def test_pairs_without_weights_still_measure(tmp_path, capsys):
    for side in (32, 8):
        np.savez(tmp_path / "o.npz", drawn(3, side))
        np.savez(tmp_path / "r.npz", drawn(3, side) ^ 3)
        report = call(capsys, "--pairs", tmp_path / "o.npz", tmp_path / "r.npz", "--weights", "no/where")
        assert 30 < report["PSNR"] < 60
        assert report["SSIM"] > 0.9 if side == 32 else "too small" in report["SSIM"]
        for name, network in (("rFID", "inception"), ("LPIPS", "heads")):
            stem, _, url = fid.WEIGHTS[network]
            said = f"no {network} weights: `curl -fL --create-dirs -o no/where/{stem}.pth {url}`"
            assert report[name] == f"not available: {said}"


def test_streams_that_are_closed_or_cannot_encode(tmp_path):
    np.savez(tmp_path / "\u00e9.npz", drawn(2, 32))
    argv = ["--pairs", *[tmp_path / "\u00e9.npz"] * 2, "--workers", "1"]
    out, err = command(*argv, PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert r"/\xe9.npz" in out and not err
    process = command(*argv)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
    process.stderr.close()


# ------------------------------------------------------------------------------------ the command: statistics

def test_saved_statistics_are_read_by_everyone(kinds, small, tmp_path, capsys, monkeypatch):
    import_torchvision()
    from pytorch_fid.fid_score import compute_statistics_of_path
    out = str(tmp_path / "saved.npz")
    monkeypatch.setattr(fid, "FEW", 5)
    call(capsys, *small, "--save-stats", out, kinds[0]["stored"], "--batch-size", 4)
    assert os.listdir(tmp_path) == ["saved.npz"]
    pool, spatial = small_features(kinds[1])
    mu, sigma = compute_statistics_of_path(out, None, 1, 2048, "cpu")
    for got, expected in ((mu, pool.mean(0)), (sigma, np.cov(pool, rowvar=False))):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    # ADM's evaluator: arr_0 by its header out of the zip, then the four arrays.
    with zipfile.ZipFile(out) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((4, 32, 32, 3), False, np.uint8)
        assert np.array_equal(np.frombuffer(member.read(), np.uint8).reshape(shape), kinds[1][::3])
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["mu_s"], spatial.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-2, atol=1e-4)
    direct = call(capsys, *small, kinds[0]["folder"], kinds[0]["others"])
    reused = call(capsys, *small, out, kinds[0]["others"])
    for name in ("FID", "sFID", "IS"):
        assert reused[name] == pytest.approx(direct[name], rel=1e-4)
    assert "N = 12" in reused["reference"] and 0 <= reused["Precision"] <= 1  # of the 4 that it carries
    assert "saved.npz, statistics, N = 12" in reused["reference"]
    assert fid.main([out, out, *map(str, small), "--resize", "pytorch-fid"]) == 2
    assert "--resize adm do not go with" in capsys.readouterr().err


def command(*argv, prepare=lambda: None, **options):
    """The real command in its own process group, one thread, with no weights to be found."""
    def start():
        # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    return subprocess.Popen([sys.executable, str(ROOT / "fid.py"), *map(str, argv)], start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | options, preexec_fn=start, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_interrupt_leaves_no_partial_file(weights, tmp_path):
    many = write_folder(tmp_path / "many", np.zeros((3000, 8, 8, 3), np.uint8), ".bmp")
    (saved := tmp_path / "out.npz").write_bytes(b"kept")
    process = command("--weights", weights.parent, "--batch-size=2", "--save-stats", saved, many)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".*.part")) and time.time() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and list(tmp_path.glob(f".out.npz.{process.pid}.part"))  # its own
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "fid.py: interrupted, nothing was written\n"
    assert sorted(os.listdir(tmp_path)) == ["many", "out.npz"]
    assert saved.read_bytes() == b"kept"
    # While it imports: a tqdm of ours stands still, and says when it is reached.
    (tmp_path / "tqdm.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    process = command("--help", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


# ---------------------------------------------------------------------------------- the command: broken input

def bad_npz(folder):
    """Name -> an .npz that is refused."""
    eye, four = np.eye(4), np.zeros(4)
    arrays = {
        "keys": {"images": np.zeros((4, 8, 8, 3), "u1")}, "float": {"arr_0": np.zeros((4, 8, 8, 3), "f4")},
        "channels first": {"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "half": {"mu": four},
        "NaN": {"mu": four * np.nan, "sigma": eye}, "huge": {"mu": four + 1e200, "sigma": eye},
        "text": {"mu": np.array(["a"]), "sigma": np.eye(1)}, "shapes": {"mu": four, "sigma": np.eye(3)},
        "bomb": {"mu": np.zeros(2**25), "sigma": eye}, "objects": {"mu": np.array([{}]), "sigma": eye},
        "note": {"mu": four, "sigma": eye, "made_with": np.array('{"n": "many"}')},
        "list": {"mu": four, "sigma": eye, "made_with": np.array("[" * 5000)},
    }
    for name, members in arrays.items():
        np.savez_compressed(folder / f"{name}.npz", **members)
    pictures = {"descr": "|u1", "shape": (2, 4, 4, 3)}
    forged = {
        "header of garbage": ("arr_0", b"\x93NUMPY\x01\x00\x10\x00" + 16 * b"("),
        "no height": ("arr_0", pictures | {"shape": (2, 0, 4, 3)}),
        "below zero": ("arr_0", pictures | {"shape": (-2, -4, 4, 3)}),
        "many pictures": ("arr_0", pictures | {"shape": (10**12, 4, 4, 3)}),
        "terabytes": ("mu", {"descr": "<f8", "shape": (10**12,)}), "without npy": ("arr_0.x", pictures),
    }
    for name, (key, header) in forged.items():  # one member of 96 bytes, and what its header claims
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as file, file.open(f"{key}.npy", "w") as member:
            if isinstance(header, dict):
                np.lib.format.write_array_header_1_0(member, {"fortran_order": False} | header)
            member.write(bytes(96) if isinstance(header, dict) else header)
    np.savez(folder / "whole.npz", drawn(8, 40))
    (folder / "junk.npz").write_bytes(b"not a zip")
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:9000])
    return {name: folder / f"{name}.npz" for name in (*arrays, *forged, "junk", "cut")}


def bad_weights(folder, weights):
    """Folders of weights where Inception's file is none: folder -> what the sentence says."""
    state, key = fid.read_tensors(weights), "Mixed_7c.branch1x1.bn.weight"
    files = {"nan": (state | {key: state[key] * np.nan}, "NaN"), "list": ([1], "no attribute"),
             "integers": ({1: state[key]}, "1 names no"), "sparse": ({key: state[key].to_sparse()}, "sparse"),
             "meta": ({key: state[key].to("meta")}, "names no"), "junk": (b"no weights", "tensors by name"),
             "expanded": ({key: torch.zeros(1).expand(10**6, 10**6)}, "names no"),
             "other": ({"layer": torch.zeros(1)}, "missing"), "other kind": (b"unread", "missing Conv2d")}
    for name, (content, _) in files.items():
        path = folder / name / f"{INCEPTION}.pth"
        path.parent.mkdir()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    save_file({"conv.weight": torch.zeros(3)}, path.with_suffix(".safetensors"))
    return {folder / name: said for name, (_, said) in files.items()}


def bad_inputs(folder, weights):
    """Name -> (arguments, what the sentence must contain); writes the files that they need to `folder`."""
    good = write_folder(folder / "good", drawn(5, 20))
    (folder / "empty").mkdir()
    write_folder(folder / "one", drawn(1, 20))
    Image.fromarray(drawn(1, 20)[0]).save(Path(write_folder(folder / "wide", drawn(3, 20, 24))) / "z.png")
    broken = "corrupt", "script", "pipe", "loop", "bomb", "name\nof\x1btwo lines", os.fsdecode(b"no\xffutf8")
    for name in broken:
        write_folder(folder / name, drawn(2, 20))
        (folder / name / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "script/z.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")
    Image.new("1", (12_000, 12_000)).save(folder / "bomb/z.png")
    for name, make in (("pipe", os.mkfifo), ("loop", lambda path: path.symlink_to(path))):
        (folder / name / "z.png").unlink()
        make(folder / name / "z.png")
    np.savez(folder / "four.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(folder / "nine.npz", mu=np.zeros(9), sigma=np.eye(9))
    np.savez(folder / "damaged.npz", np.zeros((8, 40, 40, 3), np.uint8))
    raw = bytearray((folder / "damaged.npz").read_bytes())
    raw[9000] ^= 255  # inside the pictures: the zip's checksum notices at the end
    (folder / "damaged.npz").write_bytes(raw)
    (folder / "link.npz").symlink_to("four.npz")
    four, out, real = folder / "four.npz", folder / "out.npz", ["--weights", weights.parent, "--save-stats"]
    return {f"npz {name}": ([path, good], path.name) for name, path in bad_npz(folder).items()} | {
        f"weights {path.name}": (["--weights", path, good, good], said)
        for path, said in bad_weights(folder, weights).items()} | {
        f"pictures {name!a}": (["--pairs", folder / name, folder / name], "z.png") for name in broken} | {
        f"{name} {value}": ([f"--{name}={value}", good, good], f"--{name}") for name, value in (
            ("size", 0), ("size", 10**9), ("workers", -1), ("batch-size", 10**20), ("batch-size", "x"),
            ("device", "abacus"), ("device", "meta"), ("device", "cuda:99"), ("device", "hpu"))} | {
        "no arguments": ([], "required"), "no such option": (["--abacus", good, good], "--abacus"),
        "one input": ([good], "give REFERENCE SAMPLES"), "a device": (["/dev/zero", good], "no file"),
        "nothing there": ([folder / "absent", good], "absent is no file"),
        "empty folder": ([folder / "empty", good], "no pictures under"),
        "one picture to save": (["--save-stats", out, folder / "one"], "one picture"),
        "sizes in one folder": (["--pairs", folder / "wide", folder / "wide"], "(20, 24)"),
        "damaged zip": (["--pairs", folder / "damaged.npz", folder / "damaged.npz"], "damaged.npz"),
        "another dimension": ([folder / "nine.npz", four], "9 numbers"),
        "statistics to save": (["--save-stats", out, four], "statistics already"),
        "no such folder": ([*real, folder / "no/out.npz", good], "No such file"),
        "read only": ([*real, "/proc/out.npz", good], "Error"),
        "a folder as output": (["--save-stats", write_folder(folder / "f.npz", drawn(1, 9)), good], "cannot"),
        "output over input": (["--save-stats", four, folder / "good/../four.npz"], "is the input"),
        "output over a link's input": (["--save-stats", four, folder / "link.npz"], "is the input"),
        "no weights": ([good, good], "curl -fL"),
        "weights not there": (["--weights", folder / "absent", good, good], "another folder with --weights"),
        "pairs of nothing": (["--pairs", good, folder / "corrupt/b"], "no pairs"),
        "unlike pairs": (["--pairs", good, folder / "whole.npz"], "no pairs"),
    }


def check_sentence(name, code, out, err, expected=""):
    """Exit code 2, nothing on stdout, one sentence with the expected text."""
    assert code == 2 and out == "" and re.fullmatch(r"fid\.py: [^\n\x1b]+\n", err), (name, code, out, err)
    assert re.search(expected, err), (name, err)


def snapshot(folder):
    """What must not change: every file below a folder, with the size and time of the regular ones."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_bad_input_is_one_sentence(tmp_path, weights, capfd):
    cases = bad_inputs(tmp_path, weights)
    before, peak = snapshot(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (arguments, expected) in cases.items():
        code = fid.main(["--workers", "1", *map(str, arguments)])
        check_sentence(name, code, *capfd.readouterr(), re.escape(expected))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB
    # The real command, with worker threads, in a file system that is full after 9 kB.
    full = ["--weights", weights.parent, "--save-stats", tmp_path / "out.npz", tmp_path / "good"]
    for arguments, expected in ((full, "File too large"), cases["pictures 'corrupt'"], cases["no weights"]):
        process = command(*arguments, "--workers", "2", prepare=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (9000, 9000)))
        out, err = process.communicate(timeout=60)
        check_sentence(arguments, process.returncode, out, err, expected)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [MemoryError("13 TB"), RuntimeError("Tried to allocate 13 TB")])
def test_lack_of_memory_is_one_sentence(error, kinds, small, capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(np.lib.format, "write_array", fail)
    argv = ["--save-stats", str(tmp_path / "out.npz"), kinds[0]["stored"], *map(str, small), "--workers", "1"]
    check_sentence(error, fid.main(argv), *capsys.readouterr(), "13 TB")
    assert not os.listdir(tmp_path)
    error = ZeroDivisionError()  # a bug keeps its traceback
    with pytest.raises(ZeroDivisionError):
        fid.main(argv)


@pytest.mark.parametrize("cases", [300, pytest.param(5000, marks=pytest.mark.full)])
def test_damaged_files_are_one_sentence_or_succeed(cases, tmp_path, kinds, small, capfd):
    _, heads, tensors = write_lpips(small[1])
    whole = {tmp_path / f"{name}.npz": Path(kinds[0][name]).read_bytes() for name in KINDS[1:]}
    whole |= {heads: heads.read_bytes(), heads.with_suffix(".safetensors"): save(tensors)}
    heads.unlink()
    for case, (path, raw) in zip(range(cases), itertools.cycle(whole.items())):
        rng, broken = np.random.default_rng(case), bytearray(raw)
        for at in rng.integers(len(raw), size=rng.integers(1, 4)):  # bytes are changed, cut out or put in
            broken[at : at + rng.integers(40)] = rng.bytes(rng.integers(40))
        path.write_bytes(broken)
        pairs = ["--pairs", kinds[0]["stored"]] if path.parent == small[1] else [path]
        before, begun = snapshot(tmp_path), time.process_time()
        code = fid.main(["--workers", "1", *map(str, (*small, *pairs, kinds[0]["stored"]))])
        out, err = capfd.readouterr()
        if code:
            check_sentence((case, path), code, out, err)
        assert snapshot(tmp_path) == before
        assert time.process_time() - begun < 20, (case, path)
        path.unlink()
