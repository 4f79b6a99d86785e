"""fid.py against independent formulations and the reference libraries, on random weights and drawn pictures."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402


def import_torchvision():
    """torchvision's wheel on a CPU-only torch imports only once its compiled operators have been declared."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        names = ["nms", "qnms"]
        for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
            names += [name, f"_{name}_backward"]
        for name in names:
            library.define(f"{name}(Tensor a) -> Tensor")
        import_torchvision.library = library  # the declarations last as long as this object
    import torchvision
    return torchvision


def drawn(count, height, width=None, seed=0):
    """Smooth coloured pictures, uint8 (count, height, width, 3), each different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width or height), mode="bicubic") * 230 + 12
    noise = 10 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def settle(network, seed=0):
    """Random weights under which signals neither grow nor vanish: He's initialisation and norms close to one.

    Norms measured on pictures would be closer still, but amplify rounding errors from layer to layer."""
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


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The path of a toy Inception, an eighth of every width, that works on 75 pixels."""
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    network = settle(fid.Inception(multiplier=1 / 8, classes=10))
    with torch.no_grad():
        # Classes that tell pictures apart: logits without what all pictures share, of a deviation of one.
        pool = network(fid.prepare(drawn(12, 32, seed=11), 75))[0]
        shared = F.normalize(pool.mean(0), dim=0)
        network.fc.weight.sub_((network.fc.weight @ shared)[:, None] * shared)
        network.fc.weight.div_((pool @ network.fc.weight.T).std())
        network.fc.bias.copy_(torch.linspace(-30, 30, 10))  # a score that used the bias would show it
    save_file(network.state_dict(), path, {"toy": "random", "input_size": "75"})
    return str(path)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """No test sees the weights that the machine may have."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "nothing"))


def call(capsys, *argv):
    """Run the command in this process; returns its report from --json."""
    code = fid.main([*map(str, argv), "--json", "--workers", "0", "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


# ------------------------------------------------------------------------------------------------ pictures in pairs

@pytest.mark.parametrize("height, width", [(11, 11), (32, 32), (40, 57)])
@pytest.mark.parametrize("data_range", [255.0, 2.0])
def test_psnr_and_ssim_equal_scikit_image(height, width, data_range):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    a, b = drawn(3, height, width, seed=1), drawn(3, height, width, seed=2)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    if data_range == 2.0:
        a, b = a / 127.5 - 1, b / 127.5 - 1
    psnr = [peak_signal_noise_ratio(x, y, data_range=data_range) for x, y in zip(a, b)]
    ssim = [structural_similarity(x, y, data_range=data_range, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                  use_sample_covariance=False) for x, y in zip(a.astype(float), b.astype(float))]
    images, references = (torch.tensor(x).permute(0, 3, 1, 2) for x in (b, a))
    np.testing.assert_allclose(fid.psnr(images, references, data_range), psnr, rtol=1e-9)
    np.testing.assert_allclose(fid.ssim(images, references, data_range), ssim, rtol=1e-9)


def test_psnr_and_ssim_refuse_what_does_not_fit():
    x = torch.zeros(1, 3, 10, 32)
    assert fid.psnr(x, x).isinf().all()
    with pytest.raises(ValueError, match="at least 11"):
        fid.ssim(x, x)
    for function in (fid.psnr, fid.ssim):
        with pytest.raises(ValueError, match="one shape"):
            function(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


@pytest.fixture(scope="module")
def reference_lpips():
    """The lpips package: random VGG16 (torchvision's initialisation), the official heads that come with it."""
    import_torchvision()
    import lpips
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


def torchvision_names(reference):
    """The package's VGG16 weights under torchvision's names, which its slices keep as numbers."""
    return {f"features.{name.split('.', 1)[1]}": value for name, value in reference.net.state_dict().items()}


def test_lpips_equals_the_package_in_value_and_gradient(reference_lpips, tmp_path):
    import lpips
    vgg = torchvision_names(reference_lpips)
    assert set(vgg) == set(fid.VGG16Features().state_dict())
    classifier = {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}
    torch.save(vgg | classifier, tmp_path / "vgg16.pth")
    heads = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    ours = fid.load_lpips(tmp_path / "vgg16.pth", heads)
    a, b = (torch.tensor(drawn(2, 64, 48, seed=s)).permute(0, 3, 1, 2) / 127.5 - 1 for s in (3, 4))
    gradients, values = [], []
    for function in (ours, reference_lpips):
        x = a.clone().requires_grad_()
        values.append(function(x, b).flatten())
        values[-1].sum().backward()
        gradients.append(x.grad)
    assert values[0].shape == (2,)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * gradients[1].abs().max().item())
    assert not any(p.requires_grad for p in ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(a, b), values[1].detach(), rtol=0.05, atol=0)
    assert fid._sha256(heads).startswith(fid.HEADS[1])


def test_vgg_has_torchvision_layers():
    torchvision = import_torchvision()
    with torch.device("meta"):
        theirs = torchvision.models.vgg16().features.state_dict()
    ours = fid.VGG16Features().features.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_lpips_gradient_is_finite_where_features_vanish():
    vgg = fid.VGG16Features((4, 4, 4, 4, 4))
    for parameter in vgg.parameters():
        parameter.data.fill_(-0.1)  # every ReLU closes on white pictures
    distance = fid.LPIPS(vgg, [torch.ones(1, 4, 1, 1)] * 5)
    x = torch.ones(1, 3, 32, 32, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():  # raises at the first NaN
        distance(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad.isfinite().all()


def write_toy_lpips(folder):
    """A toy VGG16 as safetensors and its heads, with other widths than the real ones; returns their paths."""
    torch.manual_seed(5)
    widths = (4, 6, 8, 10, 12)
    save_file(fid.VGG16Features(widths).state_dict(), folder / "vgg.safetensors")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg.safetensors", folder / "heads.pth", heads


def test_lpips_loader_reads_sizes_and_names_faults(tmp_path):
    vgg, heads_path, heads = write_toy_lpips(tmp_path)
    assert fid.load_lpips(vgg, heads_path).widths == (4, 6, 8, 10, 12)
    state = dict(fid.VGG16Features((4, 6, 8, 10, 12)).state_dict())
    state["features.0.bias"] = torch.zeros(3)
    state["extra.weight"] = state.pop("features.5.weight")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(fid.UserError) as error:
        fid.load_lpips(tmp_path / "bad.pth", heads_path)
    for fault in ("missing features.5.weight", "unexpected extra.weight", "misshapen features.0.bias (3,) for (4,)"):
        assert fault in str(error.value)
    torch.save(heads | {"lin2.model.1.weight": torch.rand(1, 9, 1, 1)}, tmp_path / "heads2.pth")
    with pytest.raises(fid.UserError, match="lin2.model.1.weight"):
        fid.load_lpips(vgg, tmp_path / "heads2.pth")


# ---------------------------------------------------------------------------------------------------- the Inception

def legacy_bilinear(picture, size):
    """TF1's ResizeBilinear without aligned corners, pixel by pixel in float64: (H, W, 3) -> (size, size, 3)."""
    height, width, _ = picture.shape
    result = np.zeros((size, size, 3))
    for i in range(size):
        y = i * height / size
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(size):
            x = j * width / size
            left, right = int(x), min(int(x) + 1, width - 1)
            above = picture[top, left] * (1 - x + left) + picture[top, right] * (x - left)
            below = picture[bottom, left] * (1 - x + left) + picture[bottom, right] * (x - left)
            result[i, j] = above * (1 - y + top) + below * (y - top)
    return result


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
def real_shape(tmp_path_factory):
    """Random weights in the real widths: (path of a .pth, pytorch-fid's network with the same weights)."""
    import_torchvision()
    import pytorch_fid.inception
    path = tmp_path_factory.mktemp("real") / "random.pth"
    torch.save(settle(fid.Inception()).state_dict(), path)
    original = pytorch_fid.inception.load_state_dict_from_url
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, weights_only=True)
    try:
        return str(path), pytorch_fid.inception.InceptionV3([3]).eval()
    finally:
        pytorch_fid.inception.load_state_dict_from_url = original


def largest_relative(got, expected, floor=0.1):
    """The largest difference relative to each expected value, values under floor x mean relative to floor x mean."""
    return ((got - expected).abs() / expected.abs().clamp_min(floor * expected.abs().mean())).max().item()


def test_features_equal_pytorch_fid(real_shape):
    path, theirs = real_shape
    network, info = fid.load_inception(path)
    assert not info["toy"] and not info["standard"]
    ours, pictures, maps = network.for_evaluation(), drawn(3, 96, 80, seed=6), []
    hook = theirs.blocks[2][6].branch1x1.register_forward_hook(lambda *event: maps.append(event[2]))
    with torch.no_grad():
        # Whole pipelines with their resize, then our resize through their network.
        expected = [theirs(torch.tensor(pictures).permute(0, 3, 1, 2) / 255)[0].flatten(1)]
        theirs.resize_input = theirs.normalize_input = False
        expected.append(theirs(fid.prepare(pictures))[0].flatten(1))
        theirs.resize_input = theirs.normalize_input = True
        got = [ours(fid.prepare(pictures, resize=resize)) for resize in ("pytorch-fid", "adm")]
    hook.remove()
    assert expected[0].std(0).mean() > 0.01 * expected[0].mean()  # the comparison sees pictures, not constants
    for (pool, spatial), reference, branch in zip(got, expected, maps):
        assert largest_relative(pool, reference) < 1e-4
        assert branch.shape[2:] == (17, 17)
        channels_last = np.ascontiguousarray(branch[:, :7].permute(0, 2, 3, 1).numpy()).reshape(3, -1)
        assert spatial.shape == (3, 2023)
        # Single values after a ReLU come as close to zero as they like.
        assert largest_relative(spatial, torch.tensor(channels_last), floor=1.0) < 1e-4
    assert largest_relative(expected[0], expected[1]) > 1e-3  # and the two resizes do differ


def test_toy_trains_from_75_pixels_unfused():
    torch.manual_seed(0)
    network = fid.Inception(multiplier=1 / 8, classes=2)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    x = fid.prepare(drawn(16, 75), 75)
    labels = torch.arange(16) % 2
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(network.logits(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert network.Mixed_7c.branch_pool.bn.num_batches_tracked == 12
    network.eval()
    with torch.no_grad():
        before = network(x)
        after = network.for_evaluation()(x)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)  # the stem then takes four pictures at a time
        try:
            parts = network(x)
        finally:
            torch.set_num_threads(threads)
    for one, two, three in zip(before, after, parts):
        assert largest_relative(two, one) < 1e-4 and largest_relative(three, one) < 1e-4
    assert network(fid.prepare(drawn(1, 90), 90))[0].shape == (1, 256)
    with pytest.raises(ValueError, match="7 channels"):
        fid.Inception(multiplier=1 / 64)


def test_inception_loader_names_faults(tmp_path, toy):
    state = {name: tensor.clone() for name, tensor in fid.read_tensors(toy)[0].items()}
    state["surprise"] = torch.zeros(1)
    del state["Mixed_6a.branch3x3.bn.bias"]
    state["Mixed_7b.branch1x1.bn.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(fid.UserError) as error:
        fid.load_inception(tmp_path / "bad.pth")
    for fault in ("missing Mixed_6a.branch3x3.bn.bias", "unexpected surprise",
                  "misshapen Mixed_7b.branch1x1.bn.bias (5,)"):
        assert fault in str(error.value)
    (tmp_path / "junk.pth").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("junk.pth", "list.pth", "missing.safetensors"):
        with pytest.raises(fid.UserError, match=name):
            fid.load_inception(tmp_path / name)
    torch.save({f"layer{i}": torch.zeros(1) for i in range(12)}, tmp_path / "many.pth")
    with pytest.raises(fid.UserError, match="unexpected layer0, layer1, layer10, layer11, layer2 and 7 more"):
        fid.load_inception(tmp_path / "many.pth")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_weights_are_not_read_whole(tmp_path):
    state = {name: tensor.clone() for name, tensor in fid.VGG16Features((4, 4, 4, 4, 4)).state_dict().items()}
    state["classifier.0.weight"] = torch.ones(2**25)  # 128 MiB that LPIPS does not use
    torch.save(state, tmp_path / "vgg.pth")
    save_file(state, tmp_path / "vgg.safetensors")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, 4, 1, 1) for i in range(5)}, tmp_path / "heads.pth")
    # VmHWM is this program's peak; getrusage's would start from that of the process that started it.
    code = f"""
import re, fid
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
for kind in ("pth", "safetensors"):
    fid.load_lpips({str(tmp_path)!r} + "/vgg." + kind, {str(tmp_path)!r} + "/heads.pth")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**15  # KiB


# ------------------------------------------------------------------------------------------------------- statistics

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


def test_inception_score_of_certain_predictions_is_finite():
    score = fid.inception_score(torch.eye(4).repeat(3, 1), torch.eye(4) * 1e4)  # float32 probabilities of exactly 0
    assert score == pytest.approx(4.0)


def test_precision_and_recall_equal_brute_force():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(37, 6)) + 100  # a common offset that float32 distances must not feel
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
        got = fid.precision_recall(torch.tensor(reference).float(), torch.tensor(samples).float(), block=block)
        assert got == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="at least 4"):
        fid.precision_recall(torch.rand(3, 6), torch.rand(9, 6))


def statistics(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_frechet_equals_sqrtm():
    generator = np.random.default_rng(1)
    mix = generator.normal(size=(96, 96)) * np.logspace(0, -3, 96)
    one = statistics(generator.normal(size=(400, 96)) @ mix.T)
    two = statistics(generator.normal(size=(500, 96)) @ (mix + 0.1 * generator.normal(size=mix.shape)).T + 0.2)
    root = scipy.linalg.sqrtm(one[1] @ two[1])
    expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1]) + np.trace(two[1]) - 2 * np.trace(root).real
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counts", [(20, 30), (20, 400), (2, 3)])
def test_frechet_of_rank_deficient_statistics(counts):
    generator = np.random.default_rng(2)
    rows = [generator.normal(size=(count, 64)) * np.logspace(0, -2, 64) for count in counts]
    one, two = map(statistics, rows)
    # With centred rows A, B: tr (S1 S2)^(1/2) is the sum of the singular values of A B^T, up to the two counts.
    product = (rows[0] - one[0]) @ (rows[1] - two[0]).T / math.sqrt((counts[0] - 1) * (counts[1] - 1))
    root = np.linalg.svd(product, compute_uv=False).sum()
    expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1]) + np.trace(two[1]) - 2 * root
    got = fid.frechet_distance(*one, *two)
    assert got == pytest.approx(expected, rel=1e-6)
    for same in (one, two):
        assert 0 <= fid.frechet_distance(*same, *same) < 1e-6


def test_frechet_of_degenerate_and_wrong_statistics():
    zero, eye = np.zeros(8), np.eye(8)
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, 0 * eye) == pytest.approx(8)
    assert fid.frechet_distance(zero, 0 * eye, zero, eye) == pytest.approx(8)
    # Supports at right angles: the product is exactly zero.
    half = np.diag([1.0] * 4 + [0.0] * 4)
    assert fid.frechet_distance(zero, half, zero, eye - half) == pytest.approx(8)
    # A covariance that float32 made slightly indefinite.
    rows = np.random.default_rng(3).normal(size=(5, 8))
    rough = np.cov(rows, rowvar=False).astype(np.float32)
    assert 0 <= fid.frechet_distance(zero, rough, zero, rough) < 1e-5 * np.trace(rough)
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(zero * np.nan, eye, zero, eye)
    with pytest.raises(ValueError, match="one D"):
        fid.frechet_distance(zero, eye, np.zeros(9), np.eye(9))


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


# ----------------------------------------------------------------------------------------------- the command: inputs

def toy_features(toy, pictures, resize="adm"):
    """(pool_3, spatial) in float64 by the unfolded network, without fid's own plumbing."""
    network = fid.load_inception(toy)[0]
    with torch.no_grad():
        pool, spatial = network(fid.prepare(pictures, 75, resize))
    return pool.double().numpy(), spatial.double().numpy(), network


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, toy):
    """The same 12 pictures as every kind of input, and 9 others as a folder."""
    folder = tmp_path_factory.mktemp("kinds")
    pictures, others = drawn(12, 32, seed=7), drawn(9, 32, seed=8) // 2 + 60
    pool, spatial, _ = toy_features(toy, pictures)
    full = dict(zip(fid.MOMENTS, (*statistics(pool), *statistics(spatial))))
    np.savez(folder / "stored.npz", pictures)
    np.savez_compressed(folder / "deflated.npz", arr_0=pictures, arr_1=np.arange(12))
    np.savez(folder / "pytorch-fid.npz", mu=full["mu"], sigma=full["sigma"])
    np.savez(folder / "moments.npz", **full)
    np.savez(folder / "reference-batch.npz", arr_0=pictures, **full)
    paths = {name: str(folder / f"{name}.npz") for name in
             ("stored", "deflated", "pytorch-fid", "moments", "reference-batch")}
    # Files of folders sort differently from their numbers, which statistics must not mind.
    paths["folder"] = write_folder(folder / "pictures", pictures)
    paths["others"] = write_folder(folder / "others", others, ".bmp")
    return paths, pictures, others


KINDS = ("folder", "stored", "deflated", "pytorch-fid", "moments", "reference-batch")


@pytest.mark.parametrize("samples", KINDS)
@pytest.mark.parametrize("reference", KINDS)
def test_any_pair_of_kinds_works(reference, samples, kinds, toy, capsys):
    pictures_of = {name for name in KINDS if name not in ("pytorch-fid", "moments")}
    report = call(capsys, "--toy", "--inception", toy, kinds[0][reference], kinds[0][samples])
    metrics = {name.removeprefix("TOY "): value for name, value in report["metrics"].items()}
    missing = {name for name, value in metrics.items() if value is None}
    assert list(metrics) == ["IS", "FID", "sFID", "Precision", "Recall"]
    assert metrics["FID"] == pytest.approx(0, abs=1e-4)
    assert ("sFID" in missing) == ("pytorch-fid" in (reference, samples))
    assert ("IS" in missing) == (samples not in pictures_of)
    assert ("Precision" in missing) == ("Recall" in missing) == (not {reference, samples} <= pictures_of)
    assert missing == set(report["reasons"])


def test_all_metrics_against_numpy(kinds, toy, capsys):
    paths, pictures, others = kinds
    report = call(capsys, "--toy", "--inception", toy, paths["folder"], paths["others"], "--batch-size", 4)
    # Folder order is by path: odd numbers in a/, even ones in b/c/.
    others = np.concatenate([others[1::2], others[0::2]])
    (pool, spatial, network), (pool2, spatial2, _) = toy_features(toy, pictures), toy_features(toy, others)
    expected = {}
    for name, one, two in (("FID", pool, pool2), ("sFID", spatial, spatial2)):
        (mu1, sigma1), (mu2, sigma2) = statistics(one), statistics(two)
        root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
        expected[name] = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    logits = pool2 @ network.fc.weight.detach().double().numpy().T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected["IS"] = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)))
    for name, value in expected.items():
        assert report["metrics"][f"TOY {name}"] == pytest.approx(value, rel=2e-3), name
    assert expected["IS"] > 1.02
    precision, recall = fid.precision_recall(torch.tensor(pool).float(), torch.tensor(pool2).float())
    assert (report["metrics"]["TOY Precision"], report["metrics"]["TOY Recall"]) == pytest.approx((precision, recall))
    assert [side["n"] for side in report["sides"]] == [12, 9]
    assert report["weights_sha256"]["inception"] == fid._sha256(toy)
    assert "TF1" in report["resize"] and "toy" in report["protocol"].lower()
    assert any("10,000" in warning for warning in report["warnings"])
    other = call(capsys, "--toy", "--inception", toy, paths["folder"], paths["others"], "--resize", "pytorch-fid")
    assert abs(other["metrics"]["TOY FID"] / report["metrics"]["TOY FID"] - 1) > 1e-4
    assert "pytorch-fid" in other["resize"]


def test_statistics_in_a_file_go_before_its_pictures(kinds, toy, capsys, tmp_path):
    pool, spatial, _ = toy_features(toy, kinds[2])
    of_others = dict(zip(fid.MOMENTS, (*statistics(pool), *statistics(spatial))))
    np.savez(tmp_path / "mixed.npz", arr_0=kinds[1], **of_others)
    report = call(capsys, "--toy", "--inception", toy, tmp_path / "mixed.npz", kinds[0]["others"])
    assert report["metrics"]["TOY FID"] == pytest.approx(0, abs=1e-4)
    assert report["metrics"]["TOY sFID"] == pytest.approx(0, abs=1e-3)
    assert report["metrics"]["TOY Recall"] < 1  # while the manifold is that of arr_0


def test_npz_is_streamed(tmp_path):
    import tracemalloc
    pictures = np.random.default_rng(0).integers(0, 256, (1500, 64, 64, 3), dtype=np.uint8)  # 18 MB
    for name, save in (("stored", np.savez), ("deflated", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", pictures)
        source = fid.open_source(str(tmp_path / f"{name}.npz"))
        assert (source.count, source.size) == (1500, (64, 64))
        tracemalloc.start()
        for first, batch in zip(range(0, 1500, 64), fid.read_batches(source, 64)):
            assert np.array_equal(batch, pictures[first : first + 64])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert first == 1472 and peak < 5e6


def test_workers_decode_in_order(tmp_path):
    pictures = drawn(10, 16)
    source = fid.open_source(write_folder(tmp_path / "p", pictures))
    ordered = np.concatenate([pictures[1::2], pictures[0::2]])
    assert np.array_equal(np.concatenate(list(fid.read_batches(source, 3, workers=2))), ordered)


def test_sizes_that_differ_are_said(kinds, toy, capsys, tmp_path):
    np.savez(tmp_path / "small.npz", drawn(5, 24, 20))
    report = call(capsys, "--toy", "--inception", toy, kinds[0]["folder"], tmp_path / "small.npz")
    assert any("32 x 32" in warning and "20 x 24" in warning for warning in report["warnings"])


def test_real_shaped_weights_are_named_by_hash(kinds, real_shape, capsys, monkeypatch, tmp_path):
    np.savez(tmp_path / "two.npz", kinds[1][:2])
    argv = ["--inception", real_shape[0], str(tmp_path / "two.npz"), str(tmp_path / "two.npz")]
    assert fid.main([*argv, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    digest = fid._sha256(real_shape[0])
    assert digest in out and "not the standard weights" in out and "FID-50k" not in out and "TOY" not in out
    assert re.search(r"^Precision +not available: they need 4 pictures", out, re.M)
    monkeypatch.setattr(fid, "INCEPTION", ("x", digest[:8], "y"))
    report = call(capsys, *argv)
    assert report["standard_weights"] and not any("standard" in warning for warning in report["warnings"])
    assert "ADM" in report["protocol"] and "FID-50k" not in report["protocol"]


def test_fid_50k_is_said_for_that_alone(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(40, 4))
    mu, sigma = statistics(rows)
    note = {"n": 50_000, "size": [256, 256], "sha256": "6726825d", "resize": "adm", "toy": False, "standard": True}
    texts = {}
    for name, change in (("real", {}), ("few", {"n": 49_999}), ("other", {"standard": False}), ("none", None)):
        extra = {} if change is None else {"made_with": np.array(json.dumps(note | change))}
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma, **extra)
        texts[name] = call(capsys, tmp_path / f"{name}.npz", tmp_path / f"{name}.npz")["protocol"]
    assert [name for name, text in texts.items() if "FID-50k" in text] == ["real"]


# ------------------------------------------------------------------------------------------------- the command: pairs

def test_pairs_match_by_path_and_equal_the_functions(tmp_path, toy, capsys):
    originals, recons = drawn(6, 40, seed=9), drawn(6, 40, seed=10)
    recons = (0.8 * originals + 0.2 * recons).astype(np.uint8)
    write_folder(tmp_path / "o", originals, ".bmp")
    write_folder(tmp_path / "r", recons[:5])
    Image.fromarray(recons[5]).save(tmp_path / "r/lonely.png")
    vgg, heads, _ = write_toy_lpips(tmp_path)
    report = call(capsys, "--pairs", "--toy", "--inception", toy, "--vgg", vgg, "--heads", heads,
                  tmp_path / "o", tmp_path / "r", "--batch-size", 2)
    a, b = (torch.tensor(x[:5]).permute(0, 3, 1, 2) for x in (originals, recons))
    lpips = fid.load_lpips(vgg, heads)
    one, two = (statistics(toy_features(toy, x[:5])[0]) for x in (originals, recons))
    expected = {"rFID": fid.frechet_distance(*one, *two), "PSNR": fid.psnr(b, a).mean().item(),
                "SSIM": fid.ssim(b, a).mean().item(), "LPIPS": lpips(b / 127.5 - 1, a / 127.5 - 1).mean().item()}
    assert list(report["metrics"]) == [f"TOY {name}" for name in expected]
    for name, value in expected.items():
        assert report["metrics"][f"TOY {name}"] == pytest.approx(value, rel=1e-4), name
    unmatched = " ".join(report["warnings"])
    assert "lonely.png" in unmatched and "00005.bmp" in unmatched and [s["n"] for s in report["sides"]] == [5, 5]


def test_pairs_without_weights_still_measure(tmp_path, capsys):
    originals = drawn(3, 32)
    np.savez(tmp_path / "o.npz", originals)
    np.savez(tmp_path / "r.npz", originals ^ 3)
    assert fid.main(["--pairs", str(tmp_path / "o.npz"), str(tmp_path / "r.npz")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^PSNR +\d\d\.\d+", out, re.M) and re.search(r"^SSIM +0\.9\d+", out, re.M)
    for name, known in (("rFID", fid.INCEPTION), ("LPIPS", fid.VGG), ("LPIPS", fid.HEADS)):
        assert re.search(rf"^{name} +not available: .*curl .*{re.escape(known[2])}", out, re.M)
    assert "matched by position" in out
    report = call(capsys, "--pairs", tmp_path / "o.npz", tmp_path / "o.npz")
    assert report["metrics"]["PSNR"] is None and "3 pictures equal" in report["reasons"]["PSNR"]


def test_pairs_of_tiny_pictures_say_what_is_missing(tmp_path, capsys):
    np.savez(tmp_path / "o.npz", drawn(3, 8))
    np.savez(tmp_path / "r.npz", drawn(3, 8, seed=1))
    report = call(capsys, "--pairs", tmp_path / "o.npz", tmp_path / "r.npz")
    assert report["metrics"]["PSNR"] > 0 and "11 x 11" in report["reasons"]["SSIM"]


# -------------------------------------------------------------------------------------------- the command: statistics

def test_saved_statistics_are_read_by_everyone(kinds, toy, tmp_path, capsys, monkeypatch):
    import_torchvision()
    from pytorch_fid.fid_score import compute_statistics_of_path
    out = str(tmp_path / "saved.npz")
    monkeypatch.setattr(fid, "FEW", 5)
    call(capsys, "--toy", "--inception", toy, "--save-stats", out, kinds[0]["stored"])
    assert os.listdir(tmp_path) == ["saved.npz"]
    pool, spatial, _ = toy_features(toy, kinds[1])
    mu, sigma = compute_statistics_of_path(out, None, 1, 2048, "cpu")
    for got, expected in ((mu, pool.mean(0)), (sigma, np.cov(pool, rowvar=False))):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    # ADM's evaluator: arr_0 by its header out of the zip, then the four arrays.
    with zipfile.ZipFile(out) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((5, 32, 32, 3), False, np.uint8)
        assert np.array_equal(np.frombuffer(member.read(), np.uint8).reshape(shape), kinds[1][[0, 2, 4, 7, 9]])
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["mu_s"], spatial.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-2, atol=1e-4)
    direct = call(capsys, "--toy", "--inception", toy, kinds[0]["folder"], kinds[0]["others"])
    reused = call(capsys, "--toy", "--inception", toy, out, kinds[0]["others"])
    for name in ("TOY FID", "TOY sFID", "TOY IS"):
        assert reused["metrics"][name] == pytest.approx(direct["metrics"][name], rel=1e-4)
    assert reused["sides"][0]["n"] == 12
    assert 0 <= reused["metrics"]["TOY Precision"] <= 1  # of the 5 pictures that it carries


def command(*argv):
    """The real command in its own process group, one thread, with no weights to be found."""
    environment = os.environ | {"TORCH_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "fid.py"), *map(str, argv)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_interrupt_leaves_no_partial_file(kind, toy, tmp_path):
    many = tmp_path / "many.npz"
    if kind == "npz":
        np.savez(many, np.zeros((40_000, 8, 8, 3), np.uint8))
    else:
        many = write_folder(tmp_path / "many", np.zeros((3000, 8, 8, 3), np.uint8), ".bmp")
        (tmp_path / "out.npz").write_bytes(b"kept")
    before = sorted(os.listdir(tmp_path))
    process = command("--toy", "--inception", toy, "--save-stats", tmp_path / "out.npz", many, "--batch-size", 2,
                      "--workers", 2)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".*.part")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None and list(tmp_path.glob(".*.part"))
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert sorted(os.listdir(tmp_path)) == before
    assert kind == "npz" or (tmp_path / "out.npz").read_bytes() == b"kept"


# ---------------------------------------------------------------------------------------------- the command: bad input

def bad_inputs(folder, toy):
    """Name -> (arguments, what the sentence must contain), with the files that they need written to `folder`."""
    good = write_folder(folder / "good", drawn(5, 20))
    (folder / "empty").mkdir()
    write_folder(folder / "one", drawn(1, 20))
    write_folder(folder / "sizes", drawn(3, 20))
    Image.fromarray(drawn(1, 24)[0]).save(folder / "sizes/z.png")
    write_folder(folder / "corrupt", drawn(3, 20))
    (folder / "corrupt/z.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "good16.png")
    (folder / "deep").mkdir()
    shutil.move(folder / "good16.png", folder / "deep/x.png")
    (folder / "junk.npz").write_bytes(b"not a zip")
    np.savez(folder / "whole.npz", np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8))
    damaged = bytearray((folder / "whole.npz").read_bytes())
    damaged[9000] ^= 255  # inside the pictures: the zip's checksum notices at the end
    (folder / "damaged.npz").write_bytes(damaged)
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:9000])
    np.savez(folder / "keys.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(folder / "float.npz", np.zeros((4, 8, 8, 3), np.float32))
    np.savez(folder / "shape.npz", np.zeros((4, 3, 8, 8), np.uint8))
    np.savez(folder / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez(folder / "four.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(folder / "nine.npz", mu=np.zeros(9), sigma=np.eye(9))
    np.savez(folder / "half.npz", mu=np.zeros(9))
    state = fid.read_tensors(toy)[0]
    state["Mixed_7c.branch1x1.bn.weight"] = state["Mixed_7c.branch1x1.bn.weight"] * np.nan
    save_file(state, folder / "nan.safetensors", {"toy": "random", "input_size": "75"})
    state = {"conv.weight": torch.zeros(3)}
    save_file(state, folder / "other.safetensors")
    toys = ["--toy", "--inception", toy]
    return {
        "nothing there": ([folder / "absent", good], "nothing at"),
        "empty folder": ([*toys, folder / "empty", good], "no pictures under"),
        "one picture": ([*toys, good, folder / "one"], "one picture"),
        "one picture to save": ([*toys, "--save-stats", folder / "out.npz", folder / "one"], "one picture"),
        "sizes in one folder": ([*toys, folder / "sizes", good], "24 x 24"),
        "corrupt picture": ([*toys, good, folder / "corrupt"], "z.jpg"),
        "16 bits": ([*toys, good, folder / "deep"], "8 bits"),
        "not a zip": ([*toys, good, folder / "junk.npz"], "junk.npz"),
        "damaged zip": ([*toys, good, folder / "damaged.npz"], "damaged.npz"),
        "cut zip": ([*toys, good, folder / "cut.npz"], "cut.npz"),
        "no known keys": ([*toys, good, folder / "keys.npz"], "images"),
        "floats": ([*toys, good, folder / "float.npz"], "float32"),
        "channels first": ([*toys, good, folder / "shape.npz"], "(4, 3, 8, 8)"),
        "NaN statistics": ([folder / "nan.npz", folder / "four.npz"], "NaN"),
        "NaN features": (["--toy", "--inception", folder / "nan.safetensors", good, good], "NaN"),
        "another dimension": ([folder / "nine.npz", folder / "four.npz"], "9 numbers"),
        "mu alone": ([folder / "half.npz", folder / "four.npz"], "sigma"),
        "statistics to save": ([*toys, "--save-stats", folder / "out.npz", folder / "four.npz"], "statistics already"),
        "no such folder": ([*toys, "--save-stats", folder / "no/out.npz", good], "cannot write"),
        "weights of another kind": (["--inception", folder / "other.safetensors", good, good], "missing Conv2d_1a_3x3"),
        "no weights": ([good, good], "curl -L"),
        "weights not there": (["--inception", folder / "absent.pth", good, good], "absent.pth"),
        "toy without the flag": (["--inception", toy, good, good], "--toy"),
        "toy without a file": (["--toy", good, good], "--inception"),
        "toy with nothing toy": (["--toy", folder / "four.npz", folder / "four.npz"], "--toy"),
        "pairs of nothing": (["--pairs", good, folder / "deep"], "16"),
        "unlike pairs": (["--pairs", good, folder / "whole.npz"], "by position"),
        "no such device": ([*toys, good, good, "--device", "abacus"], "--device abacus"),
        "no device": ([*toys, good, good, "--device", "meta"], "--device meta"),
        "absent device": ([*toys, good, good, "--device", "cuda:99"], "--device cuda:99"),
    }


BAD = ("nothing there", "empty folder", "one picture", "one picture to save", "sizes in one folder", "corrupt picture",
       "16 bits", "not a zip", "damaged zip", "cut zip", "no known keys", "floats", "channels first", "NaN statistics",
       "NaN features", "another dimension", "mu alone", "statistics to save", "no such folder",
       "weights of another kind", "no weights", "weights not there", "toy without the flag", "toy without a file",
       "toy with nothing toy", "pairs of nothing", "unlike pairs", "no such device", "no device", "absent device")
OWN_PROCESS = ("empty folder", "sizes in one folder", "corrupt picture", "damaged zip", "NaN features", "no weights")


@pytest.fixture(scope="module")
def bad(tmp_path_factory, toy):
    """The bad inputs, written once: (folder, cases)."""
    folder = tmp_path_factory.mktemp("bad")
    cases = bad_inputs(folder, toy)
    assert set(cases) == set(BAD)
    return folder, cases


def check_sentence(name, code, out, err, expected):
    """Exit code 2, nothing on stdout, one sentence with the expected text besides progress bars."""
    said = [line for line in re.split(r"[\r\n]", err) if line.strip() and "img/s" not in line and "|" not in line]
    assert code == 2 and out == "" and len(said) == 1, err
    assert expected in said[0] and "Traceback" not in err
    assert name != "toy without a file" or said[0].startswith("TOY ")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, bad, capsys):
    folder, cases = bad
    code = fid.main(["--device", "cpu", *map(str, cases[name][0]), "--workers", "0"])
    check_sentence(name, code, *capsys.readouterr(), cases[name][1])
    assert not list(folder.glob("out.npz")) and not list(folder.glob(".*"))


@pytest.fixture(scope="module")
def outcomes(bad):
    """Some bad inputs through the real command and its worker processes, two at a time."""
    def run(name):
        process = command(*bad[1][name][0], "--workers", "2")
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err, bad[1][name][1]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(OWN_PROCESS, pool.map(run, OWN_PROCESS)))


@pytest.mark.parametrize("name", OWN_PROCESS)
def test_bad_input_to_the_real_command(name, outcomes):
    check_sentence(name, *outcomes[name])


# --------------------------------------------------------------------------------------------------- the file itself

def test_every_line_of_a_toy_run_says_so(kinds, toy):
    process = command("--toy", "--inception", toy, kinds[0]["folder"], kinds[0]["others"], "--workers", "1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    lines = [line for line in re.split(r"[\r\n]", out + err) if line.strip(" \x1b[A")]
    assert len(lines) > 10 and all(line.startswith("TOY ") for line in lines)
    assert "FID-50k" not in out + err


def test_example_runs_from_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "fid.py", tmp_path)
    example = [line.strip() for line in fid.__doc__.splitlines() if line.startswith("    ") and "fid.py" not in line]
    assert len(example) == 3
    done = subprocess.run([sys.executable, "-c", "\n".join(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("tensor(") == 2, done.stderr


def test_help_tells_how_to_use_it():
    process = command("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for word in ("--pairs ORIGINALS RECONS", "--save-stats", "--inception", "--toy", "arr_0", "mu, sigma"):
        assert word in out
