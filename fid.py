"""FID, sFID, IS, precision, recall, PSNR, SSIM and LPIPS from PyTorch alone: one file, copy it anywhere.

    python fid.py REFERENCE SAMPLES            # IS, FID, sFID, precision, recall: ADM's protocol
    python fid.py --pairs ORIGINALS RECONS     # rFID, PSNR, SSIM, LPIPS: reconstructions
    python fid.py --save-stats OUT.npz FOLDER  # statistics once, reused

    uint8 pictures -> resize to 299 -> Inception -> pool_3 (N, 2048) ----------> FID, IS, precision, recall
      (N, H, W, 3)   in [-1, 1]                 `-> spatial (N, 17 * 17 * 7) --> sFID
          | in pairs
          +--------> VGG16 -> five maps ---------------------------------------> LPIPS
          `--------------------------------------------------------------------> PSNR, SSIM

The protocol is that of ADM's TensorFlow evaluator (Dhariwal & Nichol 2021), which most tables mean. It
resizes by TF1's legacy bilinear. The network is the Inception of 2015 in float32. Covariances divide by
N - 1. sFID takes 7 channels of mixed_6. IS leaves out the classifier's bias and averages parts of 5000.
Precision and recall take k = 3. One difference: ADM rounds their distances to float16 where they fit.

    import torch, fid
    pictures = torch.randint(0, 256, (4, 3, 64, 64))
    noisy = (pictures + 9 * torch.randn(4, 3, 64, 64)).clamp(0, 255)
    print(fid.psnr(noisy, pictures), fid.ssim(noisy, pictures))
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from scipy.linalg.lapack import dpstrf
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm


class UserError(Exception):
    """One sentence for the person at the keyboard: what was found, what was expected, what to do."""


# ------------------------------------------------------------------------------------------------ the metrics


def psnr(images, references, data_range=255.0):
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) -> (B,) float64, infinite where the two are equal.

    Values span `data_range`, 255 for uint8, 2 for [-1, 1]. Papers average over pictures.
    Raises ValueError on shapes that differ.
    """
    if images.shape != references.shape:
        raise ValueError(f"expected one shape (B, 3, H, W), got {[*images.shape]} and {[*references.shape]}")
    error = (images.double() - references.double()).square().mean((1, 2, 3))  # (B,)
    return 10 * torch.log10(data_range**2 / error)


def ssim(images, references, data_range=255.0):
    """Structural similarity of each picture (Wang et al. 2004), in float64.

    The window is Gaussian, 11 taps, sigma 1.5; covariances are biased. The mean is over channels and
    positions where the window fits. Two (B, 3, H, W) whose values span `data_range` -> (B,).
    Raises ValueError on shapes that differ and on sides under 11 pixels.
    """
    if images.shape != references.shape or min(images.shape[2:]) < 11:
        raise ValueError(f"expected one shape, sides >= 11, got {[*images.shape]} and {[*references.shape]}")
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    taps = (taps / taps.sum()).tolist()

    def blur(x):  # rows, then columns: (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        x = sum(tap * x[:, :, i : i + x.shape[2] - 10] for i, tap in enumerate(taps))
        return sum(tap * x[..., i : i + x.shape[3] - 10] for i, tap in enumerate(taps))

    a, b = images.double(), references.double()
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a + b * b) - mean_a**2 - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians (Heusel et al. 2017): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu: (D,), sigma: (D, D) symmetric, arrays or tensors. Returns a float, never negative.
    With S1 = L L^T and S2 = M M^T, the trace of the root is the sum of the singular values of L^T M. That is
    faster than a matrix square root, and a singular covariance makes nothing complex.
    Raises ValueError on shapes that do not fit together and on values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    shapes = [value.shape for value in (mu1, mu2, sigma1, sigma2)]
    if shapes != 2 * [(mu1.size,)] + 2 * [(mu1.size, mu1.size)]:
        raise ValueError(f"expected means (D,) and covariances (D, D) of one D, got {shapes}")
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold values that are not finite (NaN or infinity)")

    def root(sigma):  # Cholesky with pivots stops at the rank of a singular sigma: (D, rank)
        factor, pivots, rank, _ = dpstrf(np.ascontiguousarray(sigma), lower=1)
        return torch.from_numpy(np.tril(factor)[np.argsort(pivots - 1), :rank])

    root_trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum().item()
    shift = mu1 - mu2
    return max(0.0, float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace))


class Moments:
    """Running mean and covariance of feature rows in float64 (Chan et al. 1983), exact for means of any size.

    Each batch is centred on its own mean before its products are summed, so nothing large is ever subtracted.
    """

    def __init__(self):
        self.count = 0

    def update(self, features):
        """Add rows (B, D) of any float dtype; B may differ from call to call."""
        features = features.double()
        if self.count == 0:
            self.mean = torch.zeros_like(features[0])  # (D,)
            self.scatter = features.new_zeros(2 * features.shape[1:])  # (D, D) sum of (x - mean)(x - mean)^T
        here, total = len(features), self.count + len(features)
        step = features.mean(0) - self.mean
        # The shift between the old mean and the batch's enters as one more row.
        rows = torch.cat([features - features.mean(0), step[None] * math.sqrt(self.count * here / total)])
        self.scatter.addmm_(rows.T, rows)
        self.mean += step * (here / total)
        self.count = total

    def result(self):
        """mu (D,) and sigma (D, D), over N - 1, as float64 arrays; ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, got {self.count}")
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


def inception_score(features, weight, split_size=5000):
    """Inception score (Salimans et al. 2016) as ADM takes it: no bias, mean over parts of `split_size`.

    features: pool_3 rows (N, D) in order; weight: (classes, D) of the classifier. A shorter last part counts
    in full. Returns exp(mean divergence between p(class | picture) and p(class)), a float.
    """
    scores = []
    for part in features.split(split_size):
        log_p = (part.to(weight) @ weight.T).double().log_softmax(1)  # (n, classes)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(reference, samples, k=3, block=512):
    """Improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator computes them.

    A feature's ball reaches to its k-th neighbour in its own set, the rim included. Precision is the share of
    samples inside some reference ball, recall the share of references inside some sample ball.
    reference: (N, D), samples: (M, D). Raises ValueError with k rows or fewer on a side.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"expected more than {k} rows, got {len(reference)} and {len(samples)}")
    reference, samples = reference.double(), samples.double()

    def distances(rows, columns):  # squared: (b, D) and (M, D) -> (b, M)
        squares = (x.norm(dim=1).square() for x in (rows, columns))
        return torch.addmm(next(squares)[:, None] + next(squares), rows, columns.T, alpha=-2)

    def radii(features):  # the nearest of its own set is the feature itself, hence k + 1
        return torch.cat([distances(part, features).topk(k + 1, largest=False).values[:, -1]
                          for part in features.split(block)])

    # Equal distances are a tie, and inside: the slack is above float64's rounding, below real differences.
    slack = 1e-11 * max(x.norm(dim=1).max().square() for x in (reference, samples))
    reference_radii, sample_radii = radii(reference) + slack, radii(samples) + slack
    covered = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    found = []  # per block of references: is it inside some sample's ball?
    for part, radius in zip(reference.split(block), reference_radii.split(block)):
        between = distances(part, samples)  # (b, M)
        covered |= (between <= radius[:, None]).any(0)
        found.append((between <= sample_radii).any(1))
    return covered.double().mean().item(), torch.cat(found).double().mean().item()


# ----------------------------------------------------------------------------------------------- the networks

VGG_WIDTHS = (64, 128, 256, 512, 512)


class VGG16Features(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015) by torchvision's names; widths: of the five stages."""

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
        """(B, 3, H, W) normalised pictures, sides of 16 or more -> five maps, the last ReLU of each stage."""
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps + [x]


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 on VGG16 (Zhang et al. 2018), frozen, differentiable in the pictures.

    vgg: a VGG16Features; heads: five tensors (1, C, 1, 1), the linear weights on the five maps.
    """

    def __init__(self, vgg, heads):
        super().__init__()
        self.vgg = vgg
        # ImageNet's channel means and deviations, carried over from [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.detach().float())
        self.requires_grad_(False)

    def forward(self, images, references):
        """Twice (B, 3, H, W) in [-1, 1] -> (B,) float32; ValueError unless of one shape, sides >= 16."""
        if images.shape != references.shape or min(images.shape[2:]) < 16:
            raise ValueError(f"expected one shape, sides >= 16, got {images.shape} and {references.shape}")
        distance = 0.0
        maps = [self.vgg((x - self.shift) / self.scale) for x in (images, references)]
        for i, (a, b) in enumerate(zip(*maps)):  # (B, C, h, w); float32 from here, also under autocast
            # Unit vectors of channels; the clamp keeps the root's gradient finite where a vector is all zero.
            a, b = (y / (y.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)
                    for y in (a.float(), b.float()))
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance


# The 2015 Inception (Szegedy et al. 2016) as FID uses it, in steps. A step is a pool, a convolution (name,
# width, kernel, stride 1, padding "same"), or a list of branches, each a list of steps, to concatenate.


def _block_a(pool):
    return [[[("branch1x1", 64, 1)],
             [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
             [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
             ["average", ("branch_pool", pool, 1)]]]


def _block_c(inner):
    return [[[("branch1x1", 192, 1)],
             [("branch7x7_1", inner, 1), ("branch7x7_2", inner, (1, 7)), ("branch7x7_3", 192, (7, 1))],
             [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, (7, 1)),
              ("branch7x7dbl_3", inner, (1, 7)), ("branch7x7dbl_4", inner, (7, 1)),
              ("branch7x7dbl_5", 192, (1, 7))],
             ["average", ("branch_pool", 192, 1)]]]


def _block_e(pool):
    return [[[("branch1x1", 320, 1)],
             [("branch3x3_1", 384, 1), [[("branch3x3_2a", 384, (1, 3))], [("branch3x3_2b", 384, (3, 1))]]],
             [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
              [[("branch3x3dbl_3a", 384, (1, 3))], [("branch3x3dbl_3b", 384, (3, 1))]]],
             [pool, ("branch_pool", 192, 1)]]]


BLOCKS = {
    "": [("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "reduce",
         ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "reduce"],
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": [[[("branch3x3", 384, 3, 2, 0)],
                  [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
                  ["reduce"]]],
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": [[[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, 0)],
                  [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                   ("branch7x7x3_4", 192, 3, 2, 0)],
                  ["reduce"]]],
    # The last block pools by maximum: a slip of the 2015 graph that every published FID contains.
    "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("maximum"),
}
POOLS = {"reduce": nn.MaxPool2d(3, 2), "maximum": nn.MaxPool2d(3, 1, 1),
         "average": nn.AvgPool2d(3, 1, 1, count_include_pad=False)}  # unlike torchvision's


def _conv_norm(channels, width, kernel, stride=1, padding="same"):
    """Convolution, batch norm, ReLU: (B, channels, H, W) -> (B, width, H', W')."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(channels, width, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(width, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Inception(nn.Module):
    """FID's Inception under the names of pytorch-fid's file."""

    def __init__(self):
        super().__init__()
        channels = 3
        for name, steps in BLOCKS.items():
            if name:
                self.add_module(name, nn.Module())
            channels = self._build(self.get_submodule(name), steps, channels)
        self.fc = nn.Linear(channels, 1008)

    def _build(self, parent, steps, channels):
        """Add the convolutions of `steps` to `parent`; returns the channels that come out."""
        for step in steps:
            if isinstance(step, list):
                channels = sum(self._build(parent, branch, channels) for branch in step)
            elif isinstance(step, tuple):
                parent.add_module(step[0], _conv_norm(channels, *step[1:]))
                channels = step[1]
        return channels

    def _run(self, parent, steps, x):
        """(B, channels, H, W) through `steps` with the convolutions of `parent`."""
        for step in steps:
            if isinstance(step, list):
                x = torch.cat([self._run(parent, branch, x) for branch in step], 1)
            elif isinstance(step, tuple):
                x = parent.get_submodule(step[0])(x)
            else:
                x = POOLS[step](x)
        return x

    def forward(self, x):
        """(B, 3, 299, 299) in [-1, 1] -> pool_3 (B, 2048), spatial (B, 17 * 17 * 7) for sFID."""
        for name, steps in BLOCKS.items():
            x = self._run(self.get_submodule(name), steps, x)
            if name == "Mixed_6d":  # its output begins with branch1x1; ADM flattens channels last
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.mean((2, 3)), spatial

    def for_evaluation(self):
        """Freeze, fold the batch norms, turn to channels-last: about twice as fast on CPU. Returns self."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)


def prepare(pictures, size=299, resize="adm", device="cpu"):
    """uint8 pictures (B, H, W, 3), array or tensor -> float32 (B, 3, size, size) in [-1, 1], channels-last.

    resize "adm": TF1's legacy bilinear reads pixel i at i * H / size, no half-pixel offset, no antialiasing;
    then (x - 128) / 128. resize "pytorch-fid": that project's half-pixel bilinear; then 2 x / 255 - 1.
    """
    x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).contiguous().float()  # (B, 3, H, W)
    if resize == "pytorch-fid":
        x = F.interpolate(x / 255, (size, size), mode="bilinear", align_corners=False) * 2 - 1
    else:
        # align_corners reads pixel i at i * (in - 1) / (out - 1); one more pixel in and out makes it TF1's.
        x = F.pad((x - 128) / 128, (0, 1, 0, 1), mode="replicate")
        x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)[..., :size, :size]
    return x.contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------- reading weights

# What is downloaded once: the file's name, the start of its sha256, where it comes from.
INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "6726825d", "https://github.com/mseitzer/pytorch-fid/"
             "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth")
VGG = ("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
HEADS = ("lpips_vgg.pth", "a78928a0",
         "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")


def read_tensors(path):
    """Tensors by name (mapped into memory) and metadata of a .safetensors or .pth file, else UserError."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("it holds other things than tensors")
    except Exception as error:  # torch.load raises another type for each way of not being a weights file
        raise UserError(f"{path} is no readable weights file ({type(error).__name__}): expected tensors by "
                        "name in .pth or .safetensors") from error
    return tensors, {}


def check_keys(tensors, expected, path, what):
    """UserError naming the missing, unexpected and misshapen keys; expected: shapes by name."""
    faults = [f"missing {key}" for key in expected if key not in tensors]
    faults += [f"unexpected {key}" for key in tensors if key not in expected]
    faults += [f"misshapen {key} {tuple(tensors[key].shape)} for {tuple(expected[key])}" for key in expected
               if key in tensors and tensors[key].shape != tuple(expected[key])]
    if faults:
        raise UserError(f"{path} is not {what}: {', '.join(faults[:5])}{', ...' if len(faults) > 5 else ''}")


def load_inception(path):
    """Read FID's Inception from pytorch-fid's file: (Inception, sha256); UserError for another kind."""
    with torch.device("meta"):  # no time for random weights
        network = Inception()
    tensors, wanted = ({key: value.float() for key, value in each.items() if "num_batches_tracked" not in key}
                       for each in (read_tensors(path)[0], network.state_dict()))  # that count nobody reads
    check_keys(tensors, {key: value.shape for key, value in wanted.items()}, path, "FID's Inception")
    network.load_state_dict(tensors, strict=False, assign=True)
    return network.eval(), sha256(path)


def load_lpips(vgg_path, heads_path):
    """Read LPIPS from torchvision's VGG16 and the official heads (vgg.pth, v0.1); widths are read off.

    Raises UserError naming the keys of files of another kind.
    """
    tensors, heads = read_tensors(vgg_path)[0], read_tensors(heads_path)[0]
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    last = [tensors.get(f"features.{i}.weight") for i in (2, 7, 14, 21, 28)]  # each stage's last convolution
    widths = tuple(real if weight is None else len(weight) for real, weight in zip(VGG_WIDTHS, last))
    vgg = VGG16Features(widths)
    check_keys(tensors, {k: v.shape for k, v in vgg.state_dict().items()}, vgg_path, "VGG16's convolutions")
    names = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}
    check_keys(heads, names, heads_path, f"the LPIPS heads of a VGG16 with {widths} channels")
    vgg.load_state_dict(tensors)
    return LPIPS(vgg, [heads[name] for name in names])


def sha256(path):
    """The file's sha256 in hexadecimal."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def find_weights(given, known):
    """(The path given, else of the known file in weights/ or torch hub's cache, or None; how to get it)."""
    paths = [given] if given else ["weights/" + known[0], f"{torch.hub.get_dir()}/checkpoints/{known[0]}"]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if given and not path:
        raise UserError(f"no weights file at {given}: check the path")
    return path, f"get it by `curl -fL --create-dirs -o weights/{known[0]} {known[2]}`"


# -------------------------------------------------------------------------------------------- reading sources

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # never PostScript, which starts a program
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclasses.dataclass
class Source:
    """One input: a folder of pictures, an npz with pictures (`arr_0`), with statistics, or with both."""

    path: str
    files: list | None = None  # of a folder: paths below it, sorted
    count: int = 0  # pictures it holds
    size: tuple | None = None  # (H, W) that they are read at
    fit: bool = False  # whether pictures of other sizes are resized and cropped; else they are refused
    statistics: dict = dataclasses.field(default_factory=dict)  # those of MOMENTS that the file holds
    made_with: dict = dataclasses.field(default_factory=dict)  # --save-stats' note: n, size, resize, sha256

    @property
    def n(self):
        """Pictures behind the statistics, None where the file does not say; else pictures held."""
        return self.made_with.get("n") if self.statistics else self.count


def read_picture(path):
    """A picture file of any mode as RGB: turned as EXIF says, transparency on white, 16 bits reduced to 8."""
    if not os.path.isfile(path):  # nor wait for a named pipe
        raise UserError(f"{path} is no regular file: replace or remove it")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # Pillow's own conversion would clip it
            grey = np.asarray(picture, np.float32)
            grey = grey / (257 if deep or grey.max() > 255 else 1)  # 65535 / 257 = 255
            picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:  # Pillow raises another type for each way a file can be broken
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it") from error


def fit_picture(picture, size):
    """An Image -> uint8 (*size, 3), a square, as ADM prepared ImageNet: box halvings, bicubic, the centre."""

    def centre(picture, width, height):
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    side, shorter = size[0], min(picture.size)
    if picture.size != (side, side):
        # A thin picture, enlarged whole, would take gigabytes.
        picture = centre(picture, *(min(x, 16 * shorter) for x in picture.size))
        while min(picture.size) >= 2 * side:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = side / min(picture.size)
        sides = [max(side, round(x * scale)) for x in picture.size]
        picture = centre(picture.resize(sides, Image.Resampling.BICUBIC), side, side)
    return np.asarray(picture)


@contextlib.contextmanager
def _open_npz(path):
    """The zip at `path`; what fails inside, and zip and numpy raise many types, becomes one UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no usable .npz file ({error}): make or download it again") from error


def _open_array(archive, key):
    """Open `key`.npy: (stream of its values, shape, dtype); ValueError where its header is wrong."""
    info = archive.getinfo(f"{key}.npy")
    member = archive.open(info)
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    stored = info.file_size - member.tell()
    if dtype.hasobject or min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"`{key}` is {dtype} {shape} in {stored} bytes")
    if key == "arr_0" and (fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3):
        raise ValueError(f"`arr_0` is {dtype} {shape}, expected uint8 (N, H, W, 3) in C order")
    return member, shape, dtype


def open_source(path):
    """Look at a folder (searched through) or an .npz without reading its pictures: a Source.

    Raises UserError where it is neither, is empty, or holds arrays other than the formats have.
    """
    source = Source(path)
    if os.path.isdir(path):
        source.files = sorted(
            os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path)
            for name in names if name.lower().endswith(PICTURES) and not name.startswith("."))
        if not source.files:
            raise UserError(f"no pictures under {path}: expected files ending in {', '.join(PICTURES)}")
        source.count = len(source.files)
        source.size = read_picture(os.path.join(path, source.files[0])).size[::-1]
        return source
    if not os.path.isfile(path):
        raise UserError(f"nothing at {path}: expected a folder of pictures or an .npz file")
    arrays = source.statistics
    with _open_npz(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        for key in sorted({"arr_0", "made_with", *MOMENTS} & set(names)):
            member, shape, dtype = _open_array(archive, key)
            if key == "arr_0":
                source.count, source.size = shape[0], shape[1:3]
            else:
                arrays[key] = np.frombuffer(member.read(), dtype).reshape(shape)
        if "made_with" in arrays:
            source.made_with = note = json.loads(str(arrays.pop("made_with")))
            source.size = tuple(note["size"])
            kinds = [type(x) for x in (note["n"], *source.size, note["resize"], note["sha256"])]
            if kinds != 3 * [int] + 2 * [str]:
                raise ValueError(f"`made_with` is {note}")
        for mu, sigma in (MOMENTS[:2], MOMENTS[2:]):
            found = [arrays[key] for key in (mu, sigma) if key in arrays]
            shapes = [array.shape for array in found]
            if found and (len(found) < 2 or len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0] or not all(
                    array.dtype.kind == "f" and np.isfinite(array).all() for array in found)):
                raise ValueError(f"`{mu}`, `{sigma}` are {shapes}, expected floats (D,), (D, D), none NaN")
    if not source.count and "mu" not in arrays:
        raise UserError(f"{path} holds {names[:5]}: expected `arr_0` or `mu` and `sigma`")
    return source


def read_batches(source, batch_size=64, workers=1, step=1):
    """Yield every step-th picture of a Source in order, uint8 (b, H, W, 3), two batches in memory at most.

    `workers` threads decode the next batch of a folder meanwhile; an npz is streamed out of the zip.
    Raises UserError for a picture that cannot be decoded or has another size, and for a broken zip.
    """
    if source.files is None:
        with _open_npz(source.path) as archive:
            member, (count, *sides), _ = _open_array(archive, "arr_0")
            for first in range(0, count, batch_size):
                shape = (min(batch_size, count - first), *sides)
                pictures = np.frombuffer(bytearray(member.read(math.prod(shape))), np.uint8).reshape(shape)
                if source.fit:
                    pictures = np.stack([fit_picture(Image.fromarray(x), source.size) for x in pictures])
                yield pictures[-first % step :: step]
        return

    def read(name):
        picture = read_picture(os.path.join(source.path, name))
        if not source.fit and picture.size[::-1] != source.size:
            raise UserError(f"{name} in {source.path} has (H, W) = {picture.size[::-1]}, others "
                            f"{source.size}: --size N brings all to N x N")
        return fit_picture(picture, source.size) if source.fit else np.asarray(picture)

    files = source.files[::step]
    with ThreadPoolExecutor(workers) as pool:
        ahead = pool.map(read, files[:batch_size])
        for first in range(batch_size, len(files) + batch_size, batch_size):
            batch, ahead = ahead, pool.map(read, files[first : first + batch_size])
            yield np.stack(list(batch))


def match_sizes(sources, side):
    """Set the size that pictures are fitted to: side x side, or without `side` that of the other Source.

    Of two Sources, one with statistics keeps its size, else an npz, else the second.
    """
    keeper, *others = sorted(reversed(sources), key=lambda x: (not x.statistics, x.files is not None))
    size = (side, side) if side else keeper.size
    for source in sources if side else others:
        if size and size[0] == size[1] and not source.statistics:
            source.size, source.fit = size, True


# ------------------------------------------------------------------------------------------------ the command

FEW = 10_000  # below this many pictures FID's bias is of the size of the differences that papers report
KNOWN = {"inception": INCEPTION, "vgg": VGG, "heads": HEADS}
RESIZES = {"adm": "TF1's legacy bilinear, as ADM", "pytorch-fid": "pytorch-fid's bilinear, unlike ADM"}


@torch.no_grad()
def measure(source, network, args, rows=None):
    """A Source's statistics by name, its file's before those of its pictures; appends pool_3 to `rows`."""
    moments, moments_s = Moments(), Moments()
    batches = read_batches(source, args.batch_size, args.workers) if source.count else ()
    total = math.ceil(source.count / args.batch_size)
    for pictures in tqdm(batches, source.path, total, leave=False, disable=not total):
        pool, spatial = network(prepare(pictures, resize=args.resize, device=args.device))
        if not (pool.isfinite().all() and spatial.isfinite().all()):
            raise UserError(f"the network gives NaN or infinity for {source.path}: its weights are damaged")
        moments.update(pool)
        moments_s.update(spatial)
        if rows is not None:
            rows.append(pool)
    measured = dict(zip(MOMENTS, (*moments.result(), *moments_s.result()))) if source.count > 1 else {}
    return measured | source.statistics  # ADM too prefers the file's, made from more pictures than it carries


def compare(reference, samples, network, args):
    """IS, FID, sFID, precision and recall of two Sources: by name the value, or why there is none."""
    rows, metrics = ([], []), {"IS": f"not available: {samples.path} holds no pictures"}
    a, b = measure(reference, network, args, rows[0]), measure(samples, network, args, rows[1])
    if samples.count:
        metrics["IS"] = inception_score(torch.cat(rows[1]), network.fc.weight)
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        metrics[name] = f"not available: a side has neither `{mu}` nor two pictures"
        if mu in a and mu in b:
            if a[mu].shape != b[mu].shape:
                raise UserError(f"{reference.path} has a `{mu}` of {len(a[mu])} numbers, {samples.path} one "
                                f"of {len(b[mu])}: make them anew with one network")
            metrics[name] = frechet_distance(a[mu], a[sigma], b[mu], b[sigma])
    metrics["Precision"] = metrics["Recall"] = "not available: a side has fewer than 4 pictures"
    if min(reference.count, samples.count) > 3:
        metrics["Precision"], metrics["Recall"] = precision_recall(torch.cat(rows[0]), torch.cat(rows[1]))
    return metrics


def match_pairs(originals, recons):
    """Cut two folders down to the pictures whose paths without extension agree; npz files match by position.

    Returns sentences on what is left out. Raises UserError where nothing matches or a match is not unique.
    """
    left_out = []
    if originals.files and recons.files:
        stems = [{os.path.splitext(name)[0]: name for name in source.files} for source in (originals, recons)]
        both = sorted(stems[0].keys() & stems[1].keys())
        if not both:
            raise UserError(f"{recons.path} and {originals.path} share no path, extensions aside, such as "
                            f"{recons.files[0]}: --pairs needs equal names")
        for source, stem in zip((originals, recons), stems):
            if twice := sorted(set(source.files) - set(stem.values())):
                raise UserError(f"{source.path} holds {twice[0]} with another extension too: keep one")
            if alone := [stem[key] for key in sorted(stem.keys() - set(both))]:
                left_out.append(f"{len(alone)} unmatched in {source.path} left out: {', '.join(alone[:5])}")
            source.files, source.count = [stem[key] for key in both], len(both)
    elif originals.count != recons.count or not recons.count:
        raise UserError(f"{originals.path} holds {originals.count} pictures, {recons.path} {recons.count}: "
                        "an npz matches by position and needs as many on both sides")
    if originals.size != recons.size:
        raise UserError(f"the pairs have (H, W) = {originals.size} and {recons.size}: give --size N")
    return left_out


@torch.no_grad()
def compare_pairs(originals, recons, network, lpips, args):
    """rFID, PSNR, SSIM, LPIPS of matched Sources by name, without those that the networks or sizes forbid."""
    metrics, functions = {}, {"PSNR": psnr}
    if min(originals.size) >= 11:
        functions["SSIM"] = ssim
    if min(originals.size) >= 16 and lpips:
        functions["LPIPS"] = lambda recon, original: lpips(recon / 127.5 - 1, original / 127.5 - 1)
    if originals.count > 1 and network:
        a, b = measure(originals, network, args), measure(recons, network, args)
        metrics["rFID"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    values = {name: [] for name in functions}
    batches = (read_batches(source, args.batch_size, args.workers) for source in (originals, recons))
    for pictures in zip(*batches):
        original, recon = (torch.as_tensor(x).to(args.device).permute(0, 3, 1, 2) for x in pictures)
        for name, function in functions.items():
            values[name].append(function(recon, original))
    metrics |= {name: torch.cat(parts).double().mean().item() for name, parts in values.items()}
    if math.isinf(metrics["PSNR"]):
        equal = torch.cat(values["PSNR"]).isinf().sum()
        metrics["PSNR"] = f"infinite: {equal} pictures equal their originals"
    return metrics


def save_statistics(out, source, network, digest, args):
    """Write mu, sigma, mu_s, sigma_s of a Source's pictures to `out`, whole or not at all.

    Up to 10,000 pictures, evenly spaced, go along as `arr_0`: ADM's evaluator insists on them, and precision
    and recall need them. pytorch-fid reads mu and sigma and ignores the rest.
    """
    made_with = {"n": source.count, "size": source.size, "resize": args.resize, "sha256": digest}
    step = math.ceil(source.count / FEW)
    shape = (math.ceil(source.count / step), *source.size, 3)
    part = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            arrays = measure(source, network, args) | {"made_with": np.array(json.dumps(made_with))}
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for pictures in read_batches(source, args.batch_size, args.workers, step):
                    member.write(pictures.tobytes())
        os.replace(part, out)
    finally:
        if os.path.exists(part):  # an error or Ctrl-C on the way
            os.remove(part)


def load_networks(args, needed):
    """(Inception or None, LPIPS or None, sha256s by name, why --pairs may lack a metric by name)."""
    (inception, order), (vgg, vgg_order), (heads, heads_order) = (
        find_weights(getattr(args, name), known) for name, known in KNOWN.items())
    network, lpips, hashes = None, None, {}
    if needed and inception:
        network, hashes["inception"] = load_inception(inception)
        network.for_evaluation().to(args.device)
    elif needed and not args.pairs:
        raise UserError(f"no Inception weights: {order}, or give --inception PATH")
    if args.pairs and vgg and heads:
        lpips = load_lpips(vgg, heads).to(args.device)
        hashes |= {"vgg": sha256(vgg), "heads": sha256(heads)}
    missing = {"rFID": "needs two pairs or more" if inception else order,
               "SSIM": "needs 11 x 11 pixels or more",
               "LPIPS": "needs 16 x 16 pixels or more" if lpips else heads_order if vgg else vgg_order}
    return network, lpips, hashes, {name: f"not available: {reason}" for name, reason in missing.items()}


def evaluate(args):
    """Run the command that the parsed `args` hold. Returns what is printed, by name. Raises UserError."""
    sources = [open_source(path) for path in args.inputs]
    for source in sources if args.pairs else ():
        source.statistics, source.made_with = {}, {}  # pairs are of pictures alone
    match_sizes(sources, args.size)
    warnings = match_pairs(*sources) if args.pairs else []
    if args.save_stats and (sources[0].statistics or sources[0].count < 2):
        raise UserError(f"{args.inputs[0]} holds one picture, or statistics already: nothing to save")
    network, lpips, hashes, missing = load_networks(args, any(source.count for source in sources))
    for note in filter(None, (source.made_with for source in sources)):
        if (hashes.setdefault("inception", note["sha256"]), args.resize) != (note["sha256"], note["resize"]):
            raise UserError(f"statistics of Inception {note['sha256'][:8]} with --resize {note['resize']} do "
                            f"not go with Inception {hashes['inception'][:8]} and --resize {args.resize}")
    metrics, other = {}, [name for name, digest in hashes.items() if not digest.startswith(KNOWN[name][1])]
    if args.save_stats:
        protocol = "statistics for FID and sFID"
        save_statistics(args.save_stats, sources[0], network, hashes["inception"], args)
    elif args.pairs:
        protocol = "rFID against the originals; PSNR, SSIM on 0..255, mean over pictures; LPIPS v0.1 on VGG16"
        values = missing | compare_pairs(*sources, network, lpips, args)
        metrics = {name: values[name] for name in ("rFID", "PSNR", "SSIM", "LPIPS")}
    else:
        # The name that papers use is kept for the one protocol that they mean by it.
        published = "inception" in hashes and not other and args.resize == "adm" and sources[1].n == 50_000
        name = "FID-50k" if published else "FID"
        protocol = f"{name} as ADM's evaluator; gFID where REFERENCE is ADM's reference batch"
        metrics = compare(*sources, network, args)
    if other:
        warnings.append(f"not the standard weights ({', '.join(other)}): compares with no published number")
    if few := [f"{source.path}: {source.n}" for source in sources if source.n and source.n < FEW]:
        warnings.append(f"fewer than {FEW:,} pictures ({', '.join(few)}): FID and sFID come out too high")
    if len({source.size for source in sources if source.size}) > 1:
        warnings.append("the two sides have pictures of different sizes")
    report = {"protocol": protocol, "resize": RESIZES[args.resize]}
    for name, source in zip(("reference", "samples"), sources):
        report[name] = f"{source.path}, N = {source.n or 'unknown'}"
        report[name] += ", {1} x {0} pixels".format(*source.size) if source.size else ""
        report[name] += ", others resized and cropped to it" if source.fit else ""
    report |= {f"{name} weights": f"sha256 {digest}" for name, digest in hashes.items()}
    return report | metrics | {f"warning {i}": warning for i, warning in enumerate(warnings, 1)}


def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="fid.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\n    import")[0],
        epilog="An input is a folder of pictures (searched through), an .npz with uint8 pictures in arr_0\n"
               "(N, H, W, 3), with statistics in mu, sigma (and mu_s, sigma_s for sFID), or with both.")

    def fail(message):  # one sentence, without the usage
        raise UserError(f"{message} (see fid.py --help)")

    parser.error = fail
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="REFERENCE SAMPLES, ORIGINALS RECONS, or one to save")
    add("--pairs", action="store_true", help="compare reconstructions with their originals, matched by path")
    add("--save-stats", metavar="OUT.npz", help="write one input's statistics")
    add("--resize", choices=list(RESIZES), default="adm", help="how pictures become 299 x 299 (%(default)s)")
    add("--size", type=int, metavar="N", help="fit pictures to N x N (default: to the other side's)")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    for name, known in KNOWN.items():
        add(f"--{name}", metavar="PATH", help=f"default: {known[0]} in weights/ or torch hub's cache")
    add("--device", default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--batch-size", type=int, default=128 if device == "cuda" else 16, metavar="B")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="W", help="threads that decode")
    args = parser.parse_args(argv)
    if len(args.inputs) != (1 if args.save_stats else 2) or (args.pairs and args.save_stats):
        parser.error("give REFERENCE SAMPLES, or --pairs ORIGINALS RECONS, or --save-stats OUT.npz FOLDER")
    if min(args.batch_size, args.workers, args.size or 1) < 1 or args.size == 0:
        parser.error("--batch-size, --size and --workers start at 1")
    if out := args.save_stats:
        if not out.endswith(".npz") or os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
            parser.error(f"cannot write {out}: expected a name ending in .npz in a folder that exists")
        if os.path.realpath(out) == os.path.realpath(args.inputs[0]):
            parser.error(f"{out} is the input: give another name to write")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:  # unknown, or none here
        parser.error(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})")
    return args


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after a fault, 130 after Ctrl-C."""
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default would round convolutions to 10 bits
    try:
        args = parse(argv)
        report = evaluate(args)
        if args.json:
            print(json.dumps(report))
        for name, value in () if args.json else report.items():
            print(f"{name:18s} {value if isinstance(value, str) else format(value, '.6g')}")
        return 0
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a bug, not a lack of memory
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(kind + str(error).split("\n")[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
