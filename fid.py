"""FID, sFID, Inception score, precision, recall, PSNR, SSIM and LPIPS from PyTorch alone: one file, copy it anywhere.

    python fid.py REFERENCE SAMPLES            # IS, FID, sFID, precision, recall: ADM's protocol
    python fid.py --pairs ORIGINALS RECONS     # rFID, PSNR, SSIM, LPIPS: reconstructions
    python fid.py --save-stats OUT.npz FOLDER  # statistics once, reused

The protocol is that of ADM's TensorFlow evaluator (Dhariwal & Nichol 2021, "guided-diffusion"), which most tables of
generated ImageNet pictures mean: uint8 pictures, TF1's legacy bilinear resize to 299, the Inception network of 2015
in float32, the mean and covariance (N - 1) of pool_3 for FID and of 17 x 17 x 7 channels of mixed_6 for sFID, IS
without the classifier's bias in parts of 5000, precision and recall with k = 3. One knowing difference: ADM takes
the distances of precision and recall in float16 where they fit, this file in float32.

    import torch, fid
    pictures = torch.randint(0, 256, (4, 3, 64, 64)); noisy = (pictures + 9 * torch.randn(4, 3, 64, 64)).clamp(0, 255)
    print(fid.psnr(noisy, pictures), fid.ssim(noisy, pictures))
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from scipy.linalg.lapack import dpstrf
from torch import nn
from tqdm import tqdm

PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
VGG_WIDTHS = (64, 128, 256, 512, 512)
FEW = 10_000  # below this many pictures FID's bias is of the size of the differences that papers report

# What is downloaded once: the name in torch hub's cache, the start of the file's sha256, where it comes from.
INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "6726825d",
             "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth")
VGG = ("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
HEADS = ("lpips_vgg.pth", "a78928a0",
         "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")

RESIZES = {"adm": "TF1's legacy bilinear, as ADM", "pytorch-fid": "pytorch-fid's half-pixel bilinear, unlike ADM"}
PROTOCOLS = {
    "compare": "{fid} by {network}; a gFID where REFERENCE is ADM's reference batch",
    "pairs": "rFID by {network}, of reconstructions against their own originals; PSNR and SSIM on 0..255, mean over "
             "pictures; LPIPS v0.1 on VGG16",
    "stats": "statistics for FID and sFID by {network}",
    "toy": "toy networks stand in for FID's Inception and VGG16: comparable with scores by the same files, nothing else",
}


class UserError(Exception):
    """One sentence for the person at the keyboard: what was found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------- pictures in pairs

def _check_pairs(images, references, smallest):
    """Raise ValueError unless both are (B, 3, H, W) of one shape with sides of at least `smallest` pixels."""
    shapes = tuple(images.shape), tuple(references.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][1] != 3 or min(shapes[0][2:]) < smallest:
        raise ValueError(f"expected two tensors of one shape (B, 3, H, W), H and W at least {smallest}, got "
                         f"{shapes[0]} and {shapes[1]}")


def psnr(images, references, data_range=255.0):
    """Peak signal-to-noise ratio of each picture in dB, in float64.

    images, references: (B, 3, H, W) of any dtype whose values span `data_range` (255 for uint8, 2 for [-1, 1]).
    Returns (B,), infinite where the two are equal. Average over pictures, not over pixels, as papers do.
    Raises ValueError on shapes that differ."""
    _check_pairs(images, references, 1)
    error = (images.double() - references.double()).square().mean((1, 2, 3))  # (B,)
    return 10 * torch.log10(data_range**2 / error)


def ssim(images, references, data_range=255.0):
    """Structural similarity of each picture (Wang et al. 2004), in float64.

    Gaussian window of 11 taps and sigma 1.5, biased covariances, mean over the channels and over the positions where
    the window fits: what skimage's structural_similarity gives for gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False. images, references: (B, 3, H, W) whose values span `data_range`. Returns (B,).
    Raises ValueError on shapes that differ or sides under 11 pixels."""
    _check_pairs(images, references, 11)
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    taps = (taps / taps.sum()).tolist()

    def blur(x):  # separable, valid positions only: (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        x = sum(tap * x[:, :, i : i + x.shape[2] - 10] for i, tap in enumerate(taps))
        return sum(tap * x[..., i : i + x.shape[3] - 10] for i, tap in enumerate(taps))

    a, b = images.double(), references.double()
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a + b * b) - mean_a**2 - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return similarity.mean((1, 2, 3))


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015) under torchvision's key names, `features.N.weight/bias`.

    widths: channels of the five stages; others than the default are for toy files."""

    def __init__(self, widths=VGG_WIDTHS):
        super().__init__()
        layers, channels = [], 3
        for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # LPIPS never needs the last pool

    def forward(self, x):
        """(B, 3, H, W) normalised pictures, H and W at least 16 -> five maps, the last ReLU of each stage."""
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps + [x]


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 on VGG16 (Zhang et al. 2018), frozen, differentiable in the pictures.

    vgg: a VGG16Features; heads: five tensors (1, C, 1, 1), the linear weights on the five maps."""

    def __init__(self, vgg, heads):
        super().__init__()
        self.vgg, self.widths = vgg, tuple(head.shape[1] for head in heads)
        # ImageNet's channel means and deviations, carried over from [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.detach().float())
        self.requires_grad_(False)

    def forward(self, images, references):
        """images, references: (B, 3, H, W) in [-1, 1], sides of at least 16 -> distances (B,) in float32.

        Raises ValueError on shapes that differ or smaller sides."""
        _check_pairs(images, references, 16)
        distance = 0.0
        maps = [self.vgg((x - self.shift) / self.scale) for x in (images, references)]
        for i, (a, b) in enumerate(zip(*maps)):  # (B, C, h, w), half precision under autocast: the rest is float32
            # Channel vectors of length one; the clamp keeps the root's gradient finite where a vector is all zero.
            a, b = (y / (y.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)
                    for y in (a.float(), b.float()))
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance


# ------------------------------------------------------------------------------------------- the Inception network

# The 2015 Inception (Szegedy et al. 2016) as FID uses it. A step is a max pool ("reduce" halves the map, "maximum"
# keeps it), a convolution (name, width, kernel, stride, padding; the last two default to 1 and "same"), or a list of
# branches, each a list of steps, whose outputs are concatenated. Kernel "average" is 1 x 1 after an average pool.

def _block_a(pool):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [("branch_pool", pool, "average")]]


def _block_c(inner):
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", inner, 1), ("branch7x7_2", inner, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, (7, 1)), ("branch7x7dbl_3", inner, (1, 7)),
             ("branch7x7dbl_4", inner, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            [("branch_pool", 192, "average")]]


def _block_e(*pool):
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [[("branch3x3_2a", 384, (1, 3))], [("branch3x3_2b", 384, (3, 1))]]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [[("branch3x3dbl_3a", 384, (1, 3))], [("branch3x3dbl_3b", 384, (3, 1))]]],
            [*pool]]


STEM = [("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "reduce",
        ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "reduce"]
BLOCKS = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": [[("branch3x3", 384, 3, 2, 0)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
                 ["reduce"]],
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, 0)],
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                  ("branch7x7x3_4", 192, 3, 2, 0)],
                 ["reduce"]],
    # The last block pools by maximum: a slip of the 2015 graph that every published FID contains.
    "Mixed_7b": _block_e(("branch_pool", 192, "average")), "Mixed_7c": _block_e("maximum", ("branch_pool", 192, 1)),
}


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU: (B, channels, H, W) -> (B, width, H', W')."""

    def __init__(self, channels, width, kernel, stride=1, padding="same"):
        super().__init__()
        self.average, kernel = kernel == "average", 1 if kernel == "average" else kernel
        if padding == "same":
            padding = tuple(side // 2 for side in kernel) if isinstance(kernel, tuple) else kernel // 2
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        x = self.conv(x)
        if self.average:
            # The graph pools before its 1 x 1 convolution. The two commute, even with a bias, since the padding is left
            # out of the averages (unlike torchvision's); here there are fewer channels to pool.
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.relu_(self.bn(x))

    def fold(self):
        """For evaluation: merge the norm into the convolution, worked out in float64."""
        gain = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()  # (width,)
        bias = self.bn.bias.double() - gain * self.bn.running_mean.double()
        weight = self.conv.weight.double() * gain[:, None, None, None]
        self.conv.weight, self.conv.bias = (nn.Parameter(x.float(), requires_grad=False) for x in (weight, bias))
        self.bn = nn.Identity()


def _build(parent, steps, channels, multiplier):
    """Add the convolutions of `steps`, their widths times `multiplier`, to `parent`; returns the channels that come out."""
    for step in steps:
        if isinstance(step, list):
            channels = sum(_build(parent, branch, channels, multiplier) for branch in step)
        elif isinstance(step, tuple):
            name, width, *shape = step
            width = max(1, round(width * multiplier))
            parent.add_module(name, ConvNorm(channels, width, *shape))
            channels = width
    return channels


def _run(parent, steps, x):
    """(B, channels, H, W) through `steps` with the convolutions of `parent`."""
    for step in steps:
        if isinstance(step, list):
            x = torch.cat([_run(parent, branch, x) for branch in step], 1)
        elif isinstance(step, tuple):
            x = parent.get_submodule(step[0])(x)
        else:
            x = F.max_pool2d(x, 3, stride=2) if step == "reduce" else F.max_pool2d(x, 3, stride=1, padding=1)
    return x


class Inception(nn.Module):
    """FID's Inception under the key names of pytorch-fid's file, its widths times `multiplier`.

    Inception() is the real architecture; Inception(1/8, classes=10) a toy to train with `logits`. A toy is saved with
    safetensors and the metadata {"toy": "anything", "input_size": "75"}, so that it announces itself. input_size: the
    side that evaluation resizes pictures to. Raises ValueError where Mixed_6d.branch1x1 has fewer than the 7 channels
    that sFID reads, and under 75 pixels, where the pools run out of map."""

    def __init__(self, multiplier=1.0, classes=1008, input_size=299):
        super().__init__()
        if round(192 * multiplier) < 7 or input_size < 75:
            raise ValueError(f"sFID reads 7 channels of Mixed_6d.branch1x1 and the pools need 75 pixels, got "
                             f"{round(192 * multiplier)} channels and {input_size} pixels")
        self.input_size = input_size
        channels = _build(self, STEM, 3, multiplier)
        for name, block in BLOCKS.items():
            self.add_module(name, nn.Module())
            channels = _build(self.get_submodule(name), [block], channels, multiplier)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1], sides of at least 75 -> pool_3 (B, 2048), spatial (B, h * w * 7) for sFID."""
        # The stem's maps are large: on a CPU a few pictures at a time stay in its caches, 7% faster overall. One thread
        # gets PyTorch's slow convolution for batches under 16, and the norms of training want the whole batch.
        few = x.device.type == "cpu" and torch.get_num_threads() > 1 and not self.training
        x = torch.cat([_run(self, STEM, part) for part in x.split(4 if few else len(x))])
        for name, block in BLOCKS.items():
            x = _run(self.get_submodule(name), [block], x)
            if name == "Mixed_6d":  # its output begins with branch1x1; ADM flattens channels last
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.mean((2, 3)), spatial

    def logits(self, x):
        """(B, 3, H, W) in [-1, 1], sides of at least 75 -> class logits (B, classes); for training a toy."""
        return self.fc(self(x)[0])

    def for_evaluation(self):
        """Freeze, fold the batch norms and turn to channels-last, about twice as fast on CPU; returns self."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self.to(memory_format=torch.channels_last)


def prepare(pictures, size=299, resize="adm", device="cpu"):
    """uint8 pictures (B, H, W, 3), array or tensor -> float32 (B, 3, size, size) in [-1, 1], channels-last.

    resize "adm" is TF1's legacy bilinear, pixel i read at i * H / size with no half-pixel offset and no antialiasing,
    then (x - 128) / 128; "pytorch-fid" is that project's half-pixel bilinear, then 2 x / 255 - 1."""
    x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).contiguous().float()  # (B, 3, H, W)
    if resize == "pytorch-fid":
        x = F.interpolate(x / 255, (size, size), mode="bilinear", align_corners=False) * 2 - 1
    else:
        # align_corners reads pixel i at i * (in - 1) / (out - 1): with one more pixel in and out, TF1's i * in / out.
        x = F.pad((x - 128) / 128, (0, 1, 0, 1), mode="replicate")  # scaled first: there are fewer pixels yet
        x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)[..., :size, :size]
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ weights from files

def _listed(names, most=5):
    """A few names out of many, for a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_tensors(path):
    """The tensors by name and the metadata of a .safetensors or .pth file; UserError where it is neither.

    They are views of the file mapped into memory: what nobody copies out is not read. Only .pth files older than
    PyTorch 1.6 (no zip inside) have to be read whole."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {path} ({error}): give a .pth or .safetensors file") from error
    except Exception as error:  # torch.load raises a different type for each way of not being a weights file
        raise UserError(f"{path} is not a weights file that loads safely ({type(error).__name__}): expected tensors "
                        "by name in .pth or .safetensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no plain table of tensors: expected a state dict of tensors by name")
    return tensors, {}


def check_keys(tensors, expected, path, what):
    """UserError naming the missing, unexpected and misshapen keys; expected: shapes by name."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    faults = {"missing": expected.keys() - shapes.keys(), "unexpected": shapes.keys() - expected.keys(),
              "misshapen": {f"{key} {shapes[key]} for {tuple(expected[key])}" for key in shapes.keys() & expected.keys()
                            if shapes[key] != tuple(expected[key])}}
    if any(faults.values()):
        faults = "; ".join(f"{name} {_listed(sorted(keys))}" for name, keys in faults.items() if keys)
        raise UserError(f"{path} is not {what}: {faults}")


def load_inception(path):
    """Read Inception weights, sizes taken from the tensors' shapes. Returns (Inception in eval mode, description).

    description: path, sha256, standard (it is pytorch-fid's file), toy (other widths, or it says so itself).
    Raises UserError naming the keys of a file of another kind."""
    tensors, metadata = read_tensors(path)
    tensors = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}  # never read
    multiplier = len(tensors.get("Conv2d_1a_3x3.conv.weight", range(32))) / 32
    classes, side = len(tensors.get("fc.weight", range(1008))), metadata.get("input_size", "299")
    try:
        network = Inception(multiplier, classes, int(side))
    except ValueError as error:  # too narrow for sFID, or a side that is no number
        raise UserError(f"{path} cannot be FID's Inception: {error}") from error
    expected = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    check_keys(tensors, expected, path, "FID's Inception")
    network.load_state_dict(tensors, strict=False)  # checked above; strict would ask for num_batches_tracked
    digest = _sha256(path)
    toy = "toy" in metadata or (multiplier, classes, network.input_size) != (1, 1008, 299)
    standard = digest.startswith(INCEPTION[1])
    return network.eval(), {"path": str(path), "sha256": digest, "standard": standard, "toy": toy}


def load_lpips(vgg_path, heads_path):
    """Read LPIPS from torchvision's VGG16 file and the official heads (vgg.pth, v0.1), or toy files of other widths.

    The classifier's tensors of the VGG16 file are dropped: LPIPS reads the convolutions only. Returns a frozen LPIPS.
    Raises UserError naming the keys of files of another kind."""
    tensors, heads = read_tensors(vgg_path)[0], read_tensors(heads_path)[0]
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    last = [tensors.get(f"features.{i}.weight") for i in (2, 7, 14, 21, 28)]  # the last convolution of each stage
    widths = tuple(real if weight is None else len(weight) for real, weight in zip(VGG_WIDTHS, last))
    vgg = VGG16Features(widths)
    check_keys(tensors, {k: v.shape for k, v in vgg.state_dict().items()}, vgg_path, "VGG16's convolutions")
    names = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}
    check_keys(heads, names, heads_path, f"the LPIPS heads of a VGG16 with {widths} channels")
    vgg.load_state_dict(tensors)
    return LPIPS(vgg, [heads[name] for name in names])


def _sha256(path):
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _find(given, known):
    """The path given, else the known file in torch hub's cache; None and the download command where neither is."""
    name, _, url = known
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if given is not None and not os.path.isfile(given):
        raise UserError(f"no weights file at {given}: check the path")
    if given is not None or os.path.isfile(cached):
        return given or cached, None
    return None, f"no {name} at hand: get it with `curl -L --create-dirs -o {cached} {url}`"


# ---------------------------------------------------------------------------------------------------- the statistics

class Moments:
    """Running mean and covariance of feature rows in float64 (Chan et al. 1983), exact for means of any size.

    Each batch is centred on its own mean before its products are summed, so nothing large is ever subtracted."""

    def __init__(self):
        self.count = 0

    def update(self, features):
        """Add rows (B, D), any float dtype, on any device that has float64; B may differ from call to call."""
        features = features.double()
        if self.count == 0:
            self.mean = torch.zeros_like(features[0])  # (D,)
            self.scatter = features.new_zeros(features.shape[1], features.shape[1])  # sum of (x - mean)(x - mean)^T
        here, total = len(features), self.count + len(features)
        step = features.mean(0) - self.mean
        # The shift between the old and the batch's mean enters as one more row.
        rows = torch.cat([features - features.mean(0), step[None] * math.sqrt(self.count * here / total)])
        self.scatter.addmm_(rows.T, rows)
        self.mean += step * (here / total)
        self.count = total

    def result(self):
        """(mu (D,), sigma (D, D)) as float64 arrays, sigma divided by N - 1; ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, got {self.count}")
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


def _root(sigma):
    """L (D, rank) with L L^T = sigma, by Cholesky with pivots, which stops at the rank of a singular sigma."""
    factor, pivots, rank, _ = dpstrf(np.ascontiguousarray(sigma), lower=1)
    factor = np.tril(factor)[:, :rank]
    return torch.from_numpy(factor[np.argsort(pivots - 1)])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians (Heusel et al. 2017): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu: (D,), sigma: (D, D) symmetric, arrays or tensors. Returns a float, never negative. With S1 = L L^T the trace of
    the root is the sum of the roots of the eigenvalues of the symmetric L^T S2 L: many times faster than a matrix
    square root, and nothing turns complex when a covariance is singular.
    Raises ValueError on shapes that do not fit together and on values that are not finite."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    size = len(np.atleast_1d(mu1))
    if mu1.shape != (size,) or mu2.shape != (size,) or sigma1.shape != (size, size) or sigma2.shape != (size, size):
        raise ValueError(f"expected means (D,) and covariances (D, D) of one D, got {mu1.shape}, {sigma1.shape} and "
                         f"{mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold values that are not finite (NaN or infinity)")
    left = _root(sigma1)  # (D, rank)
    root_trace = 0.0
    if left.shape[1]:
        squares = torch.linalg.eigvalsh(left.T @ torch.from_numpy(sigma2) @ left)  # (rank,), ascending
        if squares[0] > 1e-12 * squares[-1]:
            root_trace = squares.sqrt().sum().item()
        else:  # rounding noise among the squares would enter by its root; singular values are slower and free of it
            right = _root(sigma2)
            root_trace = torch.linalg.svdvals(left.T @ right).sum().item() if right.shape[1] else 0.0
    shift = mu1 - mu2
    return max(0.0, float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace))


def inception_score(features, weight, split_size=5000):
    """Inception score (Salimans et al. 2016) the way ADM takes it: without the bias, mean over parts of `split_size`.

    features: pool_3 rows (N, D) in their order; weight: (classes, D) of the classifier. A shorter last part counts as
    much as the others. Returns exp(mean divergence between p(class | picture) and p(class)), a float."""
    scores = []
    for part in features.split(split_size):
        log_p = (part.to(weight) @ weight.T).double().log_softmax(1)  # (n, classes)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def _squared_distances(rows, columns):
    """(N, D) and (M, D) -> (N, M) squared distances."""
    squares = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return squares.addmm_(rows, columns.T, alpha=-2).clamp_min_(0)


def precision_recall(reference, samples, k=3, block=1024, progress=None):
    """Improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator computes them.

    A feature's ball reaches to its k-th neighbour in its own set; precision is the share of samples inside some
    reference ball, recall the share of references inside some sample ball. reference: (N, D), samples: (M, D)
    float32 tensors; `block` rows at a time bound the memory to block x max(N, M). progress: a label for a bar.
    Returns (precision, recall), floats. Raises ValueError with fewer than k + 1 rows on a side."""
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision and recall with k = {k} need at least {k + 1} pictures on both sides, got "
                         f"{len(reference)} and {len(samples)}")
    centre = reference.mean(0)  # distances do not see it, float32 keeps more digits without it
    reference, samples = reference - centre, samples - centre
    with tqdm(total=2 * len(reference) + len(samples), desc=progress, disable=progress is None, leave=False) as bar:
        radii = []
        for features in (reference, samples):
            rows = []
            for part in features.split(block):
                # The nearest of the set is the feature itself, hence k + 1.
                rows.append(_squared_distances(part, features).topk(k + 1, largest=False).values[:, -1])
                bar.update(len(part))
            radii.append(torch.cat(rows))
        found = []  # per block of references: is it inside some sample's ball?
        covered = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        for part, radius in zip(reference.split(block), radii[0].split(block)):
            distances = _squared_distances(part, samples)  # (b, M)
            covered |= (distances <= radius[:, None]).any(0)
            found.append((distances <= radii[1]).any(1))
            bar.update(len(part))
    return covered.double().mean().item(), torch.cat(found).double().mean().item()


# -------------------------------------------------------------------------------------------------- what is measured

@dataclasses.dataclass
class Source:
    """One input: a folder of pictures, an npz with pictures (`arr_0`), with statistics, or with both."""

    path: str
    files: list | None  # of a folder: paths below it, sorted
    count: int  # pictures it holds, 0 for statistics alone
    size: tuple | None  # (H, W) of the pictures
    statistics: dict = dataclasses.field(default_factory=dict)  # those of MOMENTS that the file holds
    made_with: dict = dataclasses.field(default_factory=dict)  # --save-stats' note on its making

    @property
    def n(self):
        """Pictures behind the statistics, None where a file does not say; pictures held where it has none."""
        return self.made_with.get("n") if self.statistics else self.count


def _pixels(size):
    """(H, W) as people write it, width first."""
    return f"{size[1]} x {size[0]} pixels"


def _decode(paths, size=None):
    """Picture files as uint8 (b, H, W, 3), or a sentence on the first fault: exceptions leave workers as tracebacks."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                if picture.mode.startswith(("I", "F")):
                    return f"{path} has pixels of type {picture.mode}: expected 8 bits per channel"
                pictures.append(np.asarray(picture.convert("RGB")))
        except Exception as error:  # Pillow raises a different type for each way a file can be broken
            return f"{path} cannot be decoded as a picture ({error}): replace or remove it"
        size = size or pictures[0].shape[:2]
        if pictures[-1].shape[:2] != size:
            return (f"{path} has {_pixels(pictures[-1].shape)} where the folder's first picture has {_pixels(size)}: "
                    "all pictures of a folder must have one size, resize them first")
    return np.stack(pictures)


def _picture_shape(member, path):
    """Read the header of an open `arr_0.npy`; returns (N, H, W, 3), UserError for any other array."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UserError(f"{path} has an `arr_0` of {dtype} {shape}{' in Fortran order' if fortran else ''}: expected "
                        "uint8 pictures (N, H, W, 3) in C order, values 0 to 255")
    return shape


def open_source(path):
    """Look at an input, a folder (searched through, sorted) or an .npz, without reading its pictures: a Source.

    Raises UserError where it is neither, is empty, or holds arrays other than the formats have."""
    if os.path.isdir(path):
        files = sorted(os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path)
                       for name in names if name.lower().endswith(PICTURES) and not name.startswith("."))
        if not files:
            raise UserError(f"no pictures under {path}: expected files ending in {', '.join(PICTURES)}")
        first = _decode([os.path.join(path, files[0])])
        if isinstance(first, str):
            raise UserError(first)
        return Source(path, files, len(files), first.shape[1:3])
    if not os.path.isfile(path):
        raise UserError(f"nothing at {path}: expected a folder of pictures or an .npz file")
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            shape, names = (0, None, None), arrays.files
            if "arr_0" in names:
                with archive.open("arr_0.npy") as member:
                    shape = _picture_shape(member, path)
            statistics = {key: arrays[key] for key in MOMENTS if key in names}
            made_with = json.loads(str(arrays["made_with"])) if "made_with" in names else {}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole .npz file ({error}): make or download it again") from error
    for keys in (MOMENTS[:2], MOMENTS[2:]):
        if statistics.keys() & set(keys):
            mu, sigma = found = [statistics.get(key, np.array("absent")) for key in keys]
            if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
                kinds = " and ".join(f"`{key}` {value.dtype} {value.shape}" for key, value in zip(keys, found))
                raise UserError(f"{path} has {kinds}: expected floats (D,) and (D, D)")
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise UserError(f"{path} has NaN or infinite values in `{keys[0]}` or `{keys[1]}`: make it anew")
    if not shape[0] and "mu" not in statistics:
        raise UserError(f"{path} holds {_listed(names) or 'nothing'}: expected pictures in `arr_0` or statistics in "
                        "`mu` and `sigma`")
    return Source(path, None, shape[0], shape[1:3] if shape[0] else made_with.get("size"), statistics, made_with)


def read_batches(source, batch_size=64, workers=0):
    """Yield a Source's pictures in order as uint8 arrays (b, H, W, 3), never more than a few batches in memory.

    Folders are decoded in `workers` processes (0: in this one); npz files are streamed out of the zip.
    Raises UserError for a picture that cannot be decoded or has another size, and for a broken zip."""
    if source.files is not None:
        paths = [os.path.join(source.path, name) for name in source.files]
        # The batches are arrays, which cross by pipe: containers often lack the shared memory that tensors would take.
        for batch in torch.utils.data.DataLoader(
                paths, batch_size, num_workers=min(workers, math.ceil(source.count / batch_size)),
                collate_fn=functools.partial(_decode, size=source.size)):
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
        return
    try:
        with zipfile.ZipFile(source.path) as archive, archive.open("arr_0.npy") as member:
            count, *sides = _picture_shape(member, source.path)
            for first in range(0, count, batch_size):
                shape = (min(batch_size, count - first), *sides)
                pixels = bytearray(member.read(math.prod(shape)))
                if len(pixels) < math.prod(shape):
                    raise EOFError(f"it ends before picture {first + shape[0]}")
                yield np.frombuffer(pixels, np.uint8).reshape(shape)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{source.path} is not a whole .npz file ({error}): make or download it again") from error


@torch.no_grad()
def read_features(source, network, args, label):
    """Yield (pictures uint8 (b, H, W, 3), pool_3 (b, D), spatial (b, D')) for all pictures of a Source.

    network: an Inception, or None for pictures alone, the others then None. args: the command line (batch_size,
    workers, resize, device, mark). label: the bar's, None for no bar. Raises UserError on features that are NaN."""
    with tqdm(total=source.count, desc=f"{args.mark}{label}", unit="img", disable=label is None, leave=False) as bar:
        for pictures in read_batches(source, args.batch_size, args.workers):
            pool = spatial = None
            if network is not None:
                pool, spatial = network(prepare(pictures, network.input_size, args.resize, args.device))
                if not (pool.isfinite().all() and spatial.isfinite().all()):
                    raise UserError(f"the network gave NaN or infinite features for {source.path}: its weights are "
                                    "damaged or not those of FID's Inception")
            yield pictures, pool, spatial
            bar.update(len(pictures))


def needs_network(source, features):
    """Whether `measure` passes over a Source's pictures: its statistics do not cover what is asked for."""
    return source.count > 0 and (features or not {"mu", "mu_s"} <= set(source.statistics))


def measure(source, network, args, label, features):
    """One side's mu, sigma, mu_s, sigma_s by name, from its file where it holds them, else from one pass.

    features: also keep pool_3 (N, D) under "features". What cannot be had from the source is left out."""
    measured = {}
    if needs_network(source, features):
        moments, moments_s = Moments(), Moments()
        for _, pool, spatial in read_features(source, network, args, label):
            if features and not moments.count:
                measured["features"] = pool.new_empty(source.count, pool.shape[1])
            if features:
                measured["features"][moments.count : moments.count + len(pool)] = pool
            moments.update(pool)
            moments_s.update(spatial)
        if source.count > 1:
            measured |= dict(zip(MOMENTS, (*moments.result(), *moments_s.result())))
    return measured | source.statistics  # ADM too prefers the file's own, made from more pictures than it carries


# ------------------------------------------------------------------------------------------------------ the commands

def compare(reference, samples, network, args):
    """IS, FID, sFID, precision and recall of two Sources. Returns (metrics by name, why others are missing by name)."""
    metrics, why = {}, {}
    manifold = min(reference.count, samples.count) > 3
    a = measure(reference, network, args, "reference", manifold)
    b = measure(samples, network, args, "samples", samples.count > 0)
    if samples.count:
        metrics["IS"] = inception_score(b["features"], network.fc.weight)
    else:
        why["IS"] = f"{samples.path} holds statistics and no pictures"
    for name, (mu, sigma) in (("FID", MOMENTS[:2]), ("sFID", MOMENTS[2:])):
        without = [source.path for source, side in ((reference, a), (samples, b)) if mu not in side]
        if without:
            why[name] = f"no `{mu}`, `{sigma}` and no pictures in {_listed(without)}"
            continue
        if len(a[mu]) != len(b[mu]):
            raise UserError(f"{reference.path} has a `{mu}` of {len(a[mu])} numbers and {samples.path} one of "
                            f"{len(b[mu])}: both must come from the same network, make them anew from pictures")
        metrics[name] = frechet_distance(a[mu], a[sigma], b[mu], b[sigma])
    if manifold:
        metrics["Precision"], metrics["Recall"] = precision_recall(
            a["features"], b["features"], progress=f"{args.mark}precision, recall")
    else:
        why["Precision"] = why["Recall"] = (f"they need 4 pictures on both sides, {reference.path} holds "
                                            f"{reference.count} and {samples.path} {samples.count}")
    return metrics, why


def match_pairs(originals, recons):
    """Match two Sources of pictures, folders by path without extension, else by position.

    Returns (originals, recons, warnings), cut down to the pairs in one order. Raises UserError where nothing matches,
    names are ambiguous, counts (npz) or sizes differ, or a side holds no pictures."""
    pair, warnings = [originals, recons], []
    for source in pair:
        if not source.count:
            raise UserError(f"{source.path} holds statistics only: --pairs compares picture with picture")
    if originals.files and recons.files:
        stems = [{os.path.splitext(name)[0]: name for name in source.files} for source in pair]
        both = sorted(stems[0].keys() & stems[1].keys())
        for source, stem in zip(pair, stems):
            if twice := sorted(set(source.files) - set(stem.values())):
                raise UserError(f"{source.path} holds {_listed(twice)} again with another extension: keep one of each")
            if alone := sorted(stem.keys() - set(both)):
                warnings.append(f"{len(alone)} of {source.count} pictures in {source.path} are unmatched and left out: "
                                f"{_listed([stem[key] for key in alone])}")
        if not both:
            raise UserError(f"no picture of {recons.path} ({recons.files[0]}, ...) is named as one of {originals.path} "
                            f"({originals.files[0]}, ...): --pairs matches paths below the folders without extension")
        pair = [dataclasses.replace(source, files=[stem[key] for key in both], count=len(both))
                for source, stem in zip(pair, stems)]
    elif originals.count != recons.count:
        raise UserError(f"{originals.path} holds {originals.count} pictures and {recons.path} {recons.count}: an .npz "
                        "is matched by position and needs as many on both sides")
    else:
        warnings.append("matched by position, since an .npz holds no names")
    if originals.size != recons.size:
        raise UserError(f"{originals.path} has {_pixels(originals.size)} and {recons.path} {_pixels(recons.size)}: "
                        "--pairs needs one size, resize and crop the originals first")
    return *pair, warnings


@torch.no_grad()
def compare_pairs(originals, recons, network, lpips, args):
    """rFID, PSNR, SSIM, LPIPS of matched Sources in one pass; network and lpips may be None. Returns as `compare`."""
    why, moments, values = {}, (Moments(), Moments()), {"PSNR": []}
    for name, least, wanted in (("SSIM", 11, True), ("LPIPS", 16, lpips is not None)):
        if wanted and min(originals.size) >= least:
            values[name] = []
        elif wanted:
            why[name] = f"it needs {least} x {least} pixels, these have {_pixels(originals.size)}"
    for original, recon in zip(read_features(originals, network, args, "pairs"),
                               read_features(recons, network, args, None)):
        a, b = (torch.as_tensor(each[0]).to(args.device).permute(0, 3, 1, 2) for each in (original, recon))
        values["PSNR"].append(psnr(b, a))
        if "SSIM" in values:
            values["SSIM"].append(ssim(b, a))
        if "LPIPS" in values:
            values["LPIPS"].append(lpips(b / 127.5 - 1, a / 127.5 - 1))
        if network is not None:
            moments[0].update(original[1])
            moments[1].update(recon[1])
    metrics = {name: torch.cat(parts).double().mean().item() for name, parts in values.items()}
    if math.isinf(metrics["PSNR"]):
        why["PSNR"] = f"infinite, {int(torch.cat(values['PSNR']).isinf().sum())} pictures equal their originals exactly"
    if network is not None and originals.count > 1:
        metrics["rFID"] = frechet_distance(*moments[0].result(), *moments[1].result())
    elif network is not None:
        why["rFID"] = "a covariance needs at least two pairs"
    return metrics, why


def save_statistics(out, source, network, info, args):
    """Write mu, sigma, mu_s, sigma_s of a Source's pictures to `out`, whole or not at all.

    Up to 10,000 of them, evenly spaced, go along as `arr_0`: ADM's evaluator insists on pictures in a reference batch,
    and precision and recall need them. pytorch-fid reads mu and sigma and ignores the rest."""
    kept, position = min(FEW, source.count), 0
    chosen = {i * source.count // kept for i in range(kept)}
    made_with = {"n": source.count, "size": source.size, "resize": args.resize}
    made_with |= {key: info[key] for key in ("sha256", "standard", "toy")}
    part = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.{os.getpid()}.part")
    moments, moments_s = Moments(), Moments()
    try:
        with open(part, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (kept, *source.size, 3)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for pictures, pool, spatial in read_features(source, network, args, "statistics"):
                        moments.update(pool)
                        moments_s.update(spatial)
                        for i, picture in enumerate(pictures, position):
                            if i in chosen:
                                member.write(picture.tobytes())
                        position += len(pictures)
                arrays = (*moments.result(), *moments_s.result(), np.array(json.dumps(made_with)))
                for key, array in zip((*MOMENTS, "made_with"), arrays):
                    with archive.open(f"{key}.npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        if os.path.exists(part):  # an error or Ctrl-C on the way
            os.remove(part)


def check_agreement(sources, info, args):
    """UserError unless the network in use and those that statistics files note are one, with one resize, and --toy."""
    seen = [(source.path, source.made_with) for source in sources if source.made_with]
    seen += [(info["path"], info | {"resize": args.resize})] if info else []
    for path, note in seen:
        for key in ("sha256", "resize"):
            if note[key] != seen[0][1][key]:
                raise UserError(f"{seen[0][0]} goes with {key} {seen[0][1][key][:12]} and {path} with "
                                f"{note[key][:12]}: numbers of different networks or resizes cannot be compared")
    toy = [path for path, note in seen if note["toy"]]
    if toy and not args.toy:
        raise UserError(f"{toy[0]} is of a toy network, not of FID's Inception: give --toy to score with it anyway")
    if args.toy and not toy:
        raise UserError("--toy was given, but no toy network is in use: leave it out or give a toy with --inception")


def find_weights(args, needed):
    """Load what a command needs: (Inception or None, its description or {}, LPIPS or None, sha256s, why not)."""
    network, info, lpips, hashes, why = None, {}, None, {}, {}
    if args.toy and needed and not args.inception:
        raise UserError("--toy scores with a stand-in network: give its file with --inception, such as "
                        "standins/inception.safetensors in the folder of a tiny run")
    path, command = _find(args.inception, INCEPTION)
    if needed and path:
        network, info = load_inception(path)
        network.for_evaluation().to(args.device)
        hashes["inception"] = info["sha256"]
    elif needed and not args.pairs:
        raise UserError(f"{command}, or give --inception PATH")
    if args.pairs:
        why = {} if path else {"rFID": command}
        (vgg, vgg_command), (heads, heads_command) = _find(args.vgg, VGG), _find(args.heads, HEADS)
        if vgg and heads:
            lpips = load_lpips(vgg, heads).to(args.device)
            if lpips.widths != VGG_WIDTHS and not args.toy:
                raise UserError(f"{vgg} is a toy of VGG16 with {lpips.widths} channels: give --toy to use it anyway")
            hashes |= {"vgg": _sha256(vgg), "heads": _sha256(heads)}
        else:
            why["LPIPS"] = "; ".join(filter(None, (vgg_command, heads_command)))
    return network, info, lpips, hashes, why


def evaluate(args):
    """Run the command that the parsed `args` hold. Returns the report that `show` prints. Raises UserError."""
    sources, warnings = [open_source(path) for path in args.inputs], []
    if args.pairs:
        *sources, warnings = match_pairs(*sources)
        needed, names = True, ("rFID", "PSNR", "SSIM", "LPIPS")
    elif args.save_stats:
        needed, names = True, ()
        if sources[0].statistics:
            raise UserError(f"{sources[0].path} holds statistics already: --save-stats takes pictures")
    else:
        needed = sources[1].count > 0 or needs_network(sources[0], False)
        names = ("IS", "FID", "sFID", "Precision", "Recall")
    lone = [source.path for source in sources if source.count == 1 and not source.statistics]
    if lone and not args.pairs:
        raise UserError(f"{lone[0]} holds one picture: a covariance needs at least two")
    network, info, lpips, hashes, why = find_weights(args, needed or args.inception)  # one named by hand must fit too
    if info or not args.pairs:
        check_agreement(sources, info, args)
    metrics, reasons = {}, {}
    if args.pairs:
        metrics, reasons = compare_pairs(*sources, network, lpips, args)
    elif args.save_stats:
        save_statistics(args.save_stats, sources[0], network, info, args)
    else:
        metrics, reasons = compare(*sources, network, args)
    few = [f"{source.path}: {source.n:,}" for source in sources if source.n is not None and source.n < FEW]
    if few:
        warnings.append(f"fewer than {FEW:,} pictures ({_listed(few)}): FID and sFID come out too high, compare them "
                        "only with numbers of the same N")
    sizes = [tuple(source.size) for source in sources if source.size]
    if len(set(sizes)) > 1:
        warnings.append(f"the reference has {_pixels(sizes[0])} and the samples have {_pixels(sizes[1])}")
    notes = [info] if info else [source.made_with for source in sources]
    standard = all(note.get("standard") for note in notes)
    if info and not standard and not args.toy:
        warnings.append("these are not the standard weights, so that nothing here compares with published numbers")
    # The name that papers use is kept for the one protocol that they mean by it.
    faithful = standard and args.resize == "adm"
    kind = "toy" if args.toy else "pairs" if args.pairs else "stats" if args.save_stats else "compare"
    protocol = PROTOCOLS[kind].format(
        fid="FID-50k" if faithful and sources[-1].n == 50_000 else "FID",
        network="ADM's evaluator" if faithful else "ADM's evaluator but for the weights or the resize")
    return {"protocol": args.mark + protocol, "toy": args.toy,
            "sides": [{"path": source.path, "n": source.n, "size": source.size} for source in sources],
            "weights_sha256": hashes, "standard_weights": standard, "resize": RESIZES[args.resize],
            "metrics": {args.mark + name: metrics.get(name) for name in names}, "reasons": why | reasons,
            "warnings": warnings}


def show(report, args):
    """Print a report: one line of JSON, or a table whose every line says TOY where a toy network was at work."""
    if args.json:
        finite = {name: value if value is not None and math.isfinite(value) else None
                  for name, value in report["metrics"].items()}
        print(json.dumps(report | {"metrics": finite}))
        return
    rows = [("protocol", report["protocol"].removeprefix(args.mark)), ("resize", report["resize"])]
    for name, side in zip(("reference", "samples"), report["sides"]):
        count = "N not recorded" if side["n"] is None else f"N = {side['n']:,}"
        rows.append((name, ", ".join([side["path"], count] + ([_pixels(side["size"])] if side["size"] else []))))
    rows += [(f"{name} weights", f"sha256 {digest}") for name, digest in report["weights_sha256"].items()]
    for name, value in report["metrics"].items():
        name = name.removeprefix(args.mark)
        reason = report["reasons"].get(name, "")
        rows.append((name, f"not available: {reason}" if value is None else f"{value:.6g} {reason}"))
    rows += [("warning", warning) for warning in report["warnings"]]
    rows += [("written", args.save_stats)] if args.save_stats else []
    for name, text in rows:
        print(f"{args.mark}{name:18s} {text}".rstrip())


def parse(argv):
    """The command line as a namespace, with `mark` ("TOY " or "") that begins every line of output."""
    parser = argparse.ArgumentParser(
        prog="fid.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\n    import")[0],
        epilog="An input is a folder of pictures of one size (searched through), an .npz with uint8 pictures in\n"
               "arr_0 (N, H, W, 3), an .npz with statistics in mu, sigma (and mu_s, sigma_s for sFID), or one with\n"
               "both. The exit code is 2 on unusable input.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="REFERENCE SAMPLES, ORIGINALS RECONS with --pairs, or one to save")
    add("--pairs", action="store_true", help="compare reconstructions with their originals, matched by path")
    add("--save-stats", metavar="OUT.npz", help="write one input's statistics, for this file, pytorch-fid and ADM")
    add("--resize", choices=list(RESIZES), default="adm", help="how pictures become 299 x 299 (default %(default)s)")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    add("--inception", metavar="PATH", help=f"Inception weights (default: {INCEPTION[0]} in torch hub's cache)")
    add("--vgg", metavar="PATH", help=f"VGG16 of LPIPS (default: {VGG[0]} in torch hub's cache)")
    add("--heads", metavar="PATH", help=f"LPIPS heads, the official vgg.pth (default: {HEADS[0]} in torch hub's cache)")
    add("--toy", action="store_true", help="allow toy weights; every line says TOY, the numbers compare with nothing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda where there is one, here %(default)s")
    add("--batch-size", type=int, default=128 if device == "cuda" else 16, metavar="B",
        help="pictures at a time (default: 128 on cuda, 16 on cpu, whose caches it suits)")
    add("--workers", type=int, default=min(8, cores), metavar="W",
        help="processes that decode pictures (default %(default)s; 0: none)")
    args = parser.parse_args(argv)
    if len(args.inputs) != (1 if args.save_stats else 2) or (args.pairs and args.save_stats):
        parser.error("give REFERENCE SAMPLES, or --pairs ORIGINALS RECONS, or --save-stats OUT.npz FOLDER")
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size starts at 1, --workers at 0")
    args.mark = "TOY " if args.toy else ""
    return args


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    args = parse(argv)
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default would round convolutions to 10 bits
    try:
        folder = os.path.dirname(args.save_stats or "") or "."
        if args.save_stats and not (args.save_stats.endswith(".npz") and os.path.isdir(folder)):
            raise UserError(f"cannot write {args.save_stats}: expected a name ending in .npz in a folder that exists")
        try:
            torch.zeros(1, device=args.device).item()
        except (RuntimeError, AssertionError) as error:  # no such name, none in this machine, none in this build of torch
            raise UserError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}): give cpu, or cuda "
                            "or cuda:N where there is one") from error
        show(evaluate(args), args)
    except UserError as error:
        print(f"{args.mark}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.mark}interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
