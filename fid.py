"""FID, sFID, IS, precision, recall, PSNR, SSIM and LPIPS in PyTorch: one file, copy it anywhere.

    python fid.py REFERENCE SAMPLES            # IS, FID, sFID, precision, recall: ADM's protocol
    python fid.py --pairs ORIGINALS RECONS     # rFID, PSNR, SSIM, LPIPS: reconstructions
    python fid.py --save-stats OUT.npz FOLDER  # statistics once, reused

    uint8 pictures -> resize to 299 -> Inception -> pool_3 (N, 2048) ----------> FID, IS, precision, recall
      (N, H, W, 3)   in [-1, 1]                 `-> spatial (N, 17 * 17 * 7) --> sFID
          | in pairs
          +--------> VGG16 -> five maps ---------------------------------------> LPIPS
          `--------------------------------------------------------------------> PSNR, SSIM

The protocol is that of ADM's TensorFlow evaluator (Dhariwal & Nichol 2021), which most papers use. Pictures
are resized by TF1's legacy bilinear. The network is the Inception of 2015 in float32. sFID uses 7 channels of
mixed_6. IS omits the classifier's bias and is the mean over parts of 5000. Precision and recall use k = 3.
One difference: ADM rounds the distances for these two to float16 where they fit, here they stay float64.

An input is a folder of pictures, subfolders included, or an .npz file. The .npz holds uint8 pictures in arr_0
(N, H, W, 3), or statistics in mu and sigma (and mu_s, sigma_s for sFID), or both.

    import torch, fid
    pictures = torch.randint(0, 256, (4, 3, 64, 64))
    noisy = (pictures + 9 * torch.randn(4, 3, 64, 64)).clamp(0, 255)
    print(fid.psnr(noisy, pictures), fid.ssim(noisy, pictures))
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import sys
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image, ImageOps
    from safetensors import safe_open
    from scipy.linalg.lapack import dpstrf
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from tqdm import tqdm
except KeyboardInterrupt:  # Ctrl-C in the seconds that these take
    sys.exit(130)


class UserError(Exception):
    """One sentence for the person at the keyboard: what was found, what was expected, what to do."""


# ------------------------------------------------------------------------------------------------ the metrics


def psnr(images, references, data_range=255.0):
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) -> (B,) float64, infinite for equal pictures.
    data_range: what the values span, 255 for uint8 and 2 for [-1, 1]. ValueError on shapes that differ."""
    if images.shape != references.shape:
        raise ValueError(f"expected one shape (B, 3, H, W), got {[*images.shape]} and {[*references.shape]}")
    error = (images.double() - references.double()).square().mean((1, 2, 3))  # (B,)
    return 10 * torch.log10(data_range**2 / error)


def ssim(images, references, data_range=255.0):
    """Structural similarity (Wang et al. 2004): two (B, 3, H, W) -> (B,) float64; data_range as in psnr.
    The window is Gaussian: 11 x 11, sigma 1.5, never over the border. The mean is over windows and channels.
    ValueError on shapes that differ and on sides under 11 pixels."""
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
    mu: (D,), sigma: (D, D), arrays or tensors -> float, never negative. With S1 = L L^T and S2 = M M^T, the
    root's trace is the sum of the singular values of L^T M. That is faster than a matrix square root, and
    never complex. ValueError on shapes that do not fit together and on values that are not finite."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    shapes = [value.shape for value in (mu1, mu2, sigma1, sigma2)]
    if shapes != 2 * [(mu1.size,)] + 2 * [(mu1.size, mu1.size)]:
        raise ValueError(f"expected means (D,) and covariances (D, D) of one D, got {shapes}")
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold values that are not finite (NaN or infinity)")

    def root(sigma):  # (D, D) -> (D, rank); Cholesky with pivots, since few pictures make sigma singular
        factor, pivots, rank, _ = dpstrf(np.ascontiguousarray(sigma), lower=1)
        return torch.from_numpy(np.tril(factor)[np.argsort(pivots - 1), :rank])

    root_trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum().item()
    shift = mu1 - mu2
    return max(0.0, float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace))


class Moments:
    """Mean and covariance of feature rows that come in batches, in float64.
    The first batch's mean is subtracted from every row, since squares of a large mean would cost digits."""

    count = 0

    def update(self, features):
        """Add rows (B, D) of any float dtype; B may change."""
        rows = features.double()
        if not self.count:
            self.origin = rows.mean(0)  # (D,)
            self.sum, self.products = torch.zeros_like(self.origin), rows.new_zeros(2 * rows.shape[1:])
        rows = rows - self.origin
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def result(self):
        """mu (D,) and sigma (D, D), divided by N - 1, as float64 arrays. Needs two rows or more."""
        mean = self.sum / self.count
        sigma = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        return (self.origin + mean).cpu().numpy(), sigma.cpu().numpy()


def inception_score(features, weight, split_size=5000):
    """Inception score (Salimans et al. 2016) as ADM computes it: no bias, mean over parts of `split_size`.
    features: pool_3 (N, D) in order; weight: the classifier's (classes, D) -> float. The last part may be
    shorter."""
    scores = []
    for part in features.split(split_size):
        log_p = (part.to(weight) @ weight.T).double().log_softmax(1)  # (n, classes): p(class | picture)
        log_mean = log_p.logsumexp(0) - math.log(len(part))  # (classes,): p(class)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(reference, samples, k=3, block=512):
    """Improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator computes them.
    Around each row is a ball that reaches to the k-th neighbour in its own set; its surface counts as inside.
    Precision is the share of samples (M, D) inside the ball of some reference (N, D). Recall is the share of
    references inside the ball of some sample. ValueError if N or M <= k."""
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"expected more than {k} rows, got {len(reference)} and {len(samples)}")
    reference, samples = reference.double(), samples.double()

    def distances(rows, columns):  # squared: (b, D) and (M, D) -> (b, M)
        squares = rows.norm(dim=1).square()[:, None] + columns.norm(dim=1).square()
        return torch.addmm(squares, rows, columns.T, alpha=-2)

    # Equal distances count as inside. The slack is above float64's rounding errors, below real differences.
    slack = 1e-11 * max(x.norm(dim=1).max().square() for x in (reference, samples))

    def share_inside(points, centres):  # squared radii: (N,); k + 1, since each centre is its own nearest
        radii = torch.cat([distances(part, centres).topk(k + 1, largest=False).values[:, -1]
                           for part in centres.split(block)]) + slack
        inside = [(distances(part, centres) <= radii).any(1) for part in points.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


# ----------------------------------------------------------------------------------------------- the networks

VGG_WIDTHS = (64, 128, 256, 512, 512)


class VGG16Features(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015), torchvision's names; widths: of the five stages."""

    def __init__(self, widths=VGG_WIDTHS):
        super().__init__()
        layers, channels = [], 3
        for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # LPIPS does not need the last pool

    def forward(self, x):
        """Normalised pictures (B, 3, H, W), sides >= 16 -> five maps (B, C, h, w): each stage's last ReLU."""
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps + [x]


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 on VGG16 (Zhang et al. 2018), frozen, differentiable in the pictures.
    vgg: a VGG16Features; heads: five tensors (1, C, 1, 1), the weights of the five maps' channels."""

    def __init__(self, vgg, heads):
        super().__init__()
        self.vgg = vgg
        # ImageNet's channel means and deviations, for pictures in [-1, 1] instead of [0, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.detach().float())
        self.requires_grad_(False)

    def forward(self, images, references):
        """Two (B, 3, H, W) in [-1, 1] -> (B,) float32; ValueError unless of one shape, sides >= 16."""
        if images.shape != references.shape or min(images.shape[2:]) < 16:
            raise ValueError(f"expected one shape, sides >= 16, got {images.shape} and {references.shape}")
        distance = 0.0
        maps = [self.vgg((x - self.shift) / self.scale) for x in (images, references)]
        for i, (a, b) in enumerate(zip(*maps)):  # (B, C, h, w); in float32, also under autocast
            # Unit vectors over channels. The clamp keeps the root's gradient finite where all are zero.
            a, b = (y / (y.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)
                    for y in (a.float(), b.float()))
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance


def _inception(x, conv):
    """The 2015 Inception (Szegedy et al. 2016): (B, 3, 299, 299) -> pool_3 (B, 2048), spatial (B, 7, 17, 17).
    conv(x, name, width, kernel, stride=1, padding="same") applies that name's convolution, norm and ReLU."""
    def chain(x, name, *convolutions):
        for i, convolution in enumerate(convolutions, 1):
            x = conv(x, f"{name}_{i}", *convolution)
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # unlike torchvision's

    x = conv(conv(x, "Conv2d_1a_3x3", 32, 3, 2, 0), "Conv2d_2a_3x3", 32, 3, 1, 0)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3), 3, 2)
    x = conv(conv(x, "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3, 1, 0)
    x = F.max_pool2d(x, 3, 2)
    for block, w in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = torch.cat([
            conv(x, f"{block}.branch1x1", 64, 1),
            chain(x, f"{block}.branch5x5", (48, 1), (64, 5)),
            chain(x, f"{block}.branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            conv(average(x), f"{block}.branch_pool", w, 1)], 1)
    x = torch.cat([
        conv(x, "Mixed_6a.branch3x3", 384, 3, 2, 0),
        chain(x, "Mixed_6a.branch3x3dbl", (64, 1), (96, 3), (96, 3, 2, 0)),
        F.max_pool2d(x, 3, 2)], 1)
    for block, w in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = torch.cat([
            conv(x, f"{block}.branch1x1", 192, 1),
            chain(x, f"{block}.branch7x7", (w, 1), (w, (1, 7)), (192, (7, 1))),
            chain(x, f"{block}.branch7x7dbl", (w, 1), (w, (7, 1)), (w, (1, 7)), (w, (7, 1)), (192, (1, 7))),
            conv(average(x), f"{block}.branch_pool", 192, 1)], 1)
        if block == "Mixed_6d":
            spatial = x[:, :7]  # the first channels of branch1x1
    x = torch.cat([
        chain(x, "Mixed_7a.branch3x3", (192, 1), (320, 3, 2, 0)),
        chain(x, "Mixed_7a.branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)),
        F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        parts = [conv(x, f"{block}.branch1x1", 320, 1)]
        for name, y in ((f"{block}.branch3x3_2", conv(x, f"{block}.branch3x3_1", 384, 1)),
                        (f"{block}.branch3x3dbl_3", chain(x, f"{block}.branch3x3dbl", (448, 1), (384, 3)))):
            parts += [conv(y, f"{name}a", 384, (1, 3)), conv(y, f"{name}b", 384, (3, 1))]
        # The last block pools by maximum. It is a mistake in the 2015 graph, and in every published FID.
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([*parts, conv(pooled, f"{block}.branch_pool", 192, 1)], 1)
    return x.mean((2, 3)), spatial


class Inception(nn.Module):
    """FID's Inception, its parameters named as in pytorch-fid's file."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)

        def build(x, name, width, kernel, stride=1, padding="same"):
            block, _, branch = name.rpartition(".")
            if block and not hasattr(self, block):
                self.add_module(block, nn.Module())
            conv = nn.Conv2d(x.shape[1], width, kernel, stride, padding, bias=False)
            self.get_submodule(block).add_module(branch, nn.Sequential(OrderedDict(
                conv=conv, bn=nn.BatchNorm2d(width, eps=1e-3), relu=nn.ReLU(inplace=True))))
            return F.conv2d(x, conv.weight.to("meta"), None, stride, padding)

        _inception(torch.empty(1, 3, 299, 299, device="meta"), build)

    def forward(self, x):
        """(B, 3, 299, 299) in [-1, 1] -> pool_3 (B, 2048), spatial (B, 17 * 17 * 7) for sFID."""
        pool, spatial = _inception(x, lambda x, name, *_: self.get_submodule(name)(x))
        return pool, spatial.permute(0, 2, 3, 1).flatten(1)  # channels last, as in TensorFlow


def prepare(pictures, size=299, resize="adm", device="cpu"):
    """uint8 pictures (B, H, W, 3), array or tensor -> float32 (B, 3, size, size) in [-1, 1], channels-last.
    resize "adm": TF1's legacy bilinear, then (x - 128) / 128. Output row i is read at i * H / size, without
    half a pixel's offset or antialiasing. "pytorch-fid": bilinear with that offset, then 2 x / 255 - 1.
    ValueError for other pictures."""
    x = torch.as_tensor(pictures).to(device)
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[3] != 3:
        raise ValueError(f"pictures are (B, H, W, 3) uint8, not {tuple(x.shape)} {x.dtype}")
    if resize == "pytorch-fid":
        x = x.permute(0, 3, 1, 2).float().div_(255)
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False) * 2 - 1
    else:
        for dim in sorted((1, 2), key=lambda dim: -x.shape[dim]):  # the longer side first needs less memory
            at = torch.arange(size, device=device) * (x.shape[dim] / size)
            low = at.long()
            a, b = (x.index_select(dim, i).float() for i in (low, (low + 1).clamp_max(x.shape[dim] - 1)))
            x = torch.lerp(a, b, (at - low).view((-1, 1, 1) if dim == 1 else (-1, 1)))
        x = (x.permute(0, 3, 1, 2) - 128) / 128
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- reading files

# What is downloaded once: its name in the folder of weights, the start of its sha256, where it comes from.
WEIGHTS = {
    "inception": ("pt_inception-2015-12-05-6726825d", "6726825d", "https://github.com/mseitzer/pytorch-fid/"
                  "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
    "vgg": ("vgg16-397923af", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "heads": ("lpips_vgg", "a78928a0",
              "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"),
}
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not PostScript: it would start a program
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
BATCH_BYTES = 2**25  # of the pixels in a batch; a larger picture is a batch of its own
ARRAY_BYTES = 2**27  # of the largest array of statistics: a covariance of 4096 features in float64


@contextlib.contextmanager
def _reading(path, kind):
    """Every error inside becomes a UserError, as readers raise many kinds. Pipes and devices are refused."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file: expected {kind}")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as {kind} ({reason}): replace or remove it") from error


def find_weights(folder, stem, told):
    """The path FOLDER/STEM.safetensors, else FOLDER/STEM.pth, else the folder FOLDER/STEM.
    Raises UserError if none exists. It ends with `told`: what to do."""
    path = os.path.join(folder, stem)
    for found in (f"{path}.safetensors", f"{path}.pth", path):
        if os.path.exists(found):
            return found
    raise UserError(f"{path}.* is missing ({told})")


def read_tensors(path):
    """Tensors by name (mapped into memory) of a .safetensors or .pth file. Raises UserError."""
    with _reading(path, "tensors by name in .pth or .safetensors"):
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for key, value in tensors.items():
            # A sparse tensor has no storage. A meta or an expanded one claims more bytes than it has.
            if not (isinstance(key, str) and (value.is_floating_point() or value.dtype == torch.int64)
                    and value.device.type == "cpu" and 0 < value.nbytes <= value.untyped_storage().nbytes()):
                raise ValueError(f"{key!r} names no plain tensor")
        return tensors


def check_keys(tensors, expected, path, what):
    """UserError naming keys missing, unexpected, misshapen or not finite; expected: shapes by name."""
    faults = [f"missing {key}" for key in expected if key not in tensors]
    faults += [f"unexpected {key}" for key in tensors if key not in expected]
    for key in expected:
        if key in tensors and tensors[key].shape != tuple(expected[key]):
            faults.append(f"misshapen {key} {tuple(tensors[key].shape)} for {tuple(expected[key])}")
        elif key in tensors and not tensors[key].float().isfinite().all():
            faults.append(f"NaN or infinity in {key}")
    if faults:
        raise UserError(f"{path} is not {what}: {', '.join(faults[:5])}{', ...' if len(faults) > 5 else ''}")


def load_network(make, path, what, tensors=None):
    """The network that make() builds with the weights of a file, or with `tensors` of it, frozen. Raises
    UserError that says the file is not `what` and names the keys that do not fit."""
    tensors = read_tensors(path) if tensors is None else tensors
    with torch.device("meta"):  # spends no time on random weights; buffers too must come from the file
        network = make()
    # Older files lack each norm's `num_batches_tracked`, which only training reads.
    tensors, shapes = ({key: value for key, value in each.items() if not key.endswith("_tracked")}
                       for each in (tensors, network.state_dict()))
    check_keys(tensors, {key: value.shape for key, value in shapes.items()}, path, what)
    network.to_empty(device="cpu").load_state_dict(tensors, strict=False)
    return network.eval().requires_grad_(False)


def load_inception(path):
    """FID's Inception from pytorch-fid's file, frozen. Raises UserError as load_network."""
    network = load_network(Inception, path, "FID's Inception")
    for module in network.modules():  # folded norms and channels-last: about twice as fast on a CPU
        if isinstance(module, nn.Sequential):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)


def load_lpips(vgg_path, heads_path):
    """LPIPS of torchvision's VGG16, any widths, and the official heads (v0.1). UserError as load_network."""
    tensors, heads = read_tensors(vgg_path), read_tensors(heads_path)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    last = [tensors.get(f"features.{i}.bias") for i in (2, 7, 14, 21, 28)]  # each stage's last convolution
    widths = [real if bias is None else bias.numel() for real, bias in zip(VGG_WIDTHS, last)]
    vgg = load_network(lambda: VGG16Features(widths), vgg_path, "VGG16's convolutions", tensors)
    names = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}
    check_keys(heads, names, heads_path, f"the LPIPS heads of a VGG16 with {widths} channels")
    return LPIPS(vgg, [heads[name] for name in names])


def sha256(path):
    """The file's sha256 in hexadecimal."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def list_pictures(folder, others=None):
    """The pictures below a folder, as a sorted list of paths relative to it, empty if there are none.
    Pictures are files with a suffix of PICTURES, in upper case too. Hidden files and folders are left out.
    A link to a folder is followed, unless it leads back into a folder that the path already went through.
    others: a Counter, which counts the other files by suffix. UserError names a folder that cannot be listed.
    """
    found, waiting = [], [("", ())]  # waiting: a path below `folder`, and the real paths that it went through
    while waiting:
        inner, through = waiting.pop()
        path = os.path.join(folder, inner) if inner else folder
        if (real := os.path.realpath(path)) in through:
            continue
        try:
            with os.scandir(path) as entries:
                for entry in (entry for entry in entries if not entry.name.startswith(".")):
                    name = os.path.join(inner, entry.name)
                    if entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry):
                        waiting.append((name, (*through, real)))
                    elif name.lower().endswith(PICTURES):
                        found.append(name)
                    elif others is not None:
                        others[os.path.splitext(name)[1].lower()] += 1
        except OSError as error:
            raise UserError(f"the folder {path} cannot be listed: {error.strerror}") from error
    return sorted(found)


def _check_pixels(path, width, height):
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{path} has {width} x {height} pixels, more than the limit of "
                        f"{Image.MAX_IMAGE_PIXELS}: reduce or remove it")


def read_picture(path, size=None):
    """A picture file of any mode -> contiguous, writable array (H, W, 3) uint8, with size (size, size, 3).
    EXIF turns it, transparency is laid on white, 12 and 16 bits become 8. With `size` it is prepared as ADM
    prepared ImageNet: the shorter side is brought to `size`, then the centre is cut out. UserError for a file
    of none of the FORMATS or broken, for grey values that declare no white (float, 32 bits, signed), and for
    more than PIL.Image.MAX_IMAGE_PIXELS pixels."""
    with _reading(path, "a picture"):
        with open(path, "rb") as file:
            start = file.read(16)
        Image.init()  # Image.open would warn of a large picture, or refuse it without telling its size
        for open_picture, knows in map(Image.OPEN.get, FORMATS):
            if knows(start):
                with open_picture(path) as picture:
                    _check_pixels(path, *picture.size)
                    return _prepared(picture, size)
        raise ValueError(f"it is none of {', '.join(FORMATS)}")


def _prepared(picture, size):
    """An Image as the array that read_picture returns."""
    def centre(picture, longest):  # no side stays longer
        width, height = (min(side, longest) for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    # Grey of more than 8 bits, which Pillow's own conversion would clip. The file declares what is white.
    # Pillow has brought a PPM's values to 16 bits, and older versions call the mode of a 16-bit PNG "I".
    deep, tags = picture.mode[0] in "IF", getattr(picture, "tag_v2", {})  # tags: of a TIFF
    if deep and picture.mode[:4] != "I;16" and f"{picture.format} {picture.mode}" not in ("PNG I", "PPM I"):
        raise ValueError("float, signed or 32-bit grey values declare no white: save it with 8 or 16 bits")
    ImageOps.exif_transpose(picture, in_place=True)
    if size:  # a thin picture, converted or enlarged whole, would take gigabytes
        picture = centre(picture, 16 * min(picture.size))
    if deep:
        values, white = np.asarray(picture, np.float32), 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
        values = np.where(values == picture.info.get("transparency", -1), white, values)
        grey = 255 - 255 / white * values if tags.get(262) == 0 else 255 / white * values  # 0: min is white
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if size:
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = size / min(picture.size)
        sides = [max(size, round(side * scale)) for side in picture.size]
        picture = centre(picture.resize(sides, Image.Resampling.BICUBIC), size)
    return np.array(picture)


@dataclasses.dataclass
class Source:
    """One input: a folder of pictures, or an .npz with pictures (`arr_0`), statistics, or both."""

    path: str
    files: list | None = None  # of a folder: its pictures' paths, sorted
    count: int = 0  # of pictures
    size: tuple | None = None  # (H, W) of every picture that is read
    fit: bool = False  # pictures of another size are resized and cropped; without it they are refused
    statistics: dict = dataclasses.field(default_factory=dict)  # those of MOMENTS that the file holds
    note: dict = dataclasses.field(default_factory=dict)  # how --save-stats made them: n, resize, sha256


def _open_pictures(archive):
    """An npz's `arr_0`: a stream of its pixels, its shape (N, H, W, 3), and whether they lie in Fortran's
    order. ValueError for other arrays."""
    info = archive.getinfo("arr_0.npy")
    stream = archive.open(info)
    version = np.lib.format.read_magic(stream)  # a header after version 1.0 may claim gigabytes
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if not (version == (1, 0) and dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and min(shape) > 0
            and math.prod(shape) == info.file_size - stream.tell()):
        raise ValueError(f"`arr_0` is {dtype} {shape} in {info.file_size} bytes, expected uint8 (N, H, W, 3)")
    _check_pixels(archive.filename, shape[2], shape[1])
    return stream, shape, fortran


def open_source(path, pairs=False):
    """A folder or an .npz as a Source; its pictures are not read yet. pairs: leave out statistics.
    UserError for what is neither, is empty, or holds other arrays."""
    if os.path.isdir(path):
        if not (files := list_pictures(path)):
            raise UserError(f"no pictures under {path}: expected files ending in {', '.join(PICTURES)}")
        return Source(path, files, len(files), read_picture(os.path.join(path, files[0])).shape[:2])
    source, arrays = Source(path), {}
    with _reading(path, "a folder of pictures or an .npz"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if "arr_0" in names:
            source.count, *size, _ = _open_pictures(archive)[1]
            source.size = tuple(size)
        for key in () if pairs else {"made_with", *MOMENTS} & {*names}:
            if archive.getinfo(f"{key}.npy").file_size > ARRAY_BYTES:
                raise ValueError(f"`{key}` has more than {ARRAY_BYTES} bytes")
            arrays[key] = np.lib.format.read_array(io.BytesIO(archive.read(f"{key}.npy")), allow_pickle=False)
        if "made_with" in arrays:
            note = json.loads(str(arrays.pop("made_with")))
            source.note = {"n": int(note["n"]), "resize": str(note["resize"]), "sha256": str(note["sha256"])}
        for mu, sigma in (MOMENTS[:2], MOMENTS[2:]):
            pair = [arrays[key] for key in (mu, sigma) if key in arrays]
            # Below 1e100, squares and sums stay finite. NaN fails the comparison.
            if pair and not (len(pair) == 2 and pair[0].ndim == 1 and pair[1].shape == 2 * pair[0].shape
                             and all(x.dtype.kind == "f" and np.abs(x).max() < 1e100 for x in pair)):
                raise ValueError(f"`{mu}` and `{sigma}` are not finite floats (D,) and (D, D)")
        if not source.count and "mu" not in arrays:
            raise ValueError(f"it holds {names[:5]}, neither `arr_0` nor `mu` and `sigma`")
    source.statistics = arrays
    return source


def read_batches(source, batch_size=64, workers=1, step=1):
    """Yield every step-th picture of a Source in order, uint8 (b, H, W, 3), b <= batch_size.
    `workers` threads decode the next batch meanwhile, so two are in memory. Batches of large pictures are
    smaller, see BATCH_BYTES. UserError for pictures that are broken or of another size."""
    def stream():  # the npz's pictures, one by one
        with _reading(source.path, "an .npz"), zipfile.ZipFile(source.path) as archive:
            member, (count, *shape), fortran = _open_pictures(archive)
            if fortran:  # a picture's bytes lie all over the file
                yield from np.frombuffer(member.read(), np.uint8).reshape(count, *shape, order="F")
                return
            for _ in range(count):
                yield np.frombuffer(member.read(math.prod(shape)), np.uint8).reshape(shape)

    def read(item):
        size = source.size[0] if source.fit else None
        if not source.files:
            return _prepared(Image.fromarray(item), size) if size else item
        picture = read_picture(os.path.join(source.path, item), size)
        if picture.shape[:2] != source.size:
            raise UserError(f"{item} in {source.path} has (H, W) = {picture.shape[:2]}, others "
                            f"{source.size}: --size N brings all to N x N")
        return picture

    pictures = itertools.islice(source.files or stream(), 0, None, step)
    batch_size = max(1, min(batch_size, BATCH_BYTES // (3 * math.prod(source.size))))
    with ThreadPoolExecutor(workers) as pool:
        ahead = pool.map(read, itertools.islice(pictures, batch_size))
        while batch := list(ahead):
            ahead = pool.map(read, itertools.islice(pictures, batch_size))
            yield np.stack(batch)


def match(originals, recons):
    """Match two Sources: folders by path without suffix, an npz by position. Folders drop the other files.
    Returns how many pictures have no partner. Raises UserError where nothing matches."""
    alone = originals.count + recons.count
    if originals.files and recons.files:
        stems = [{os.path.splitext(name)[0]: name for name in source.files} for source in (originals, recons)]
        both = sorted(stems[0].keys() & stems[1].keys())
        for source, stem in zip((originals, recons), stems):
            source.files, source.count = [stem[key] for key in both], len(both)
    if originals.count != recons.count or not recons.count or originals.size != recons.size:
        raise UserError(f"{originals.path} and {recons.path} make no pairs: {originals.count} and "
                        f"{recons.count} pictures, (H, W) = {originals.size} and {recons.size}; see --size")
    return alone - 2 * recons.count


# ------------------------------------------------------------------------------------------------ the command

FEW = 10_000  # with fewer pictures, FID's bias is as large as the differences that papers report


@torch.no_grad()
def measure(source, network, args, rows=None):
    """A Source's statistics, arrays by the names of MOMENTS; appends pool_3 (b, 2048) to `rows`."""
    moments, moments_s = Moments(), Moments()
    batches = read_batches(source, args.batch_size, args.workers) if source.count else ()
    for pictures in tqdm(batches, unit="batch", leave=False, disable=None):
        pool, spatial = network(prepare(pictures, resize=args.resize, device=args.device))
        moments.update(pool)
        moments_s.update(spatial)
        if rows is not None:
            rows.append(pool)
    measured = dict(zip(MOMENTS, (*moments.result(), *moments_s.result()))) if source.count > 1 else {}
    # As in ADM, the file's own statistics come first: they are of more pictures than the file carries.
    return measured | source.statistics


def compare(reference, samples, network, args):
    """IS, FID, sFID, precision and recall of two Sources by name, as far as the inputs allow them."""
    rows, metrics = ([], []), {}
    a, b = measure(reference, network, args, rows[0]), measure(samples, network, args, rows[1])
    if samples.count:
        metrics["IS"] = inception_score(torch.cat(rows[1]), network.fc.weight)
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if mu in a and mu in b:
            if a[mu].shape != b[mu].shape:
                raise UserError(f"{reference.path} has a `{mu}` of {len(a[mu])} numbers, {samples.path} one "
                                f"of {len(b[mu])}: make them anew with one network")
            metrics[name] = frechet_distance(a[mu], a[sigma], b[mu], b[sigma])
    if min(reference.count, samples.count) > 3:
        metrics["Precision"], metrics["Recall"] = precision_recall(torch.cat(rows[0]), torch.cat(rows[1]))
    return metrics


@torch.no_grad()
def compare_pairs(originals, recons, network, lpips, args):
    """rFID, PSNR, SSIM and LPIPS of matched Sources by name, as far as networks and sizes allow them."""
    metrics, functions, side = {}, {"PSNR": psnr}, min(originals.size)
    if side >= 11:
        functions["SSIM"] = ssim
    if side >= 16 and lpips:
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
    values = {name: torch.cat(parts).double() for name, parts in values.items()}
    unequal = values["PSNR"][values["PSNR"].isfinite()]  # of equal pictures it is infinite
    metrics |= {name: each.mean().item() for name, each in (values | {"PSNR": unequal}).items() if len(each)}
    return metrics | {"equal pairs": originals.count - len(unequal)}


def save_statistics(out, source, network, digest, args):
    """Write mu, sigma, mu_s, sigma_s of a Source's pictures to `out`, whole or not at all.
    Up to 10,000 of the pictures, evenly spaced, are written to `arr_0`. ADM's evaluator expects them, and
    precision and recall need them. pytorch-fid reads mu and sigma and ignores the rest."""
    note = {"n": source.count, "resize": args.resize, "sha256": digest}
    step = math.ceil(source.count / FEW)
    shape = (math.ceil(source.count / step), *source.size, 3)
    part = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            arrays = measure(source, network, args) | {"made_with": np.array(json.dumps(note))}
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
        if os.path.exists(part):  # after an error or Ctrl-C
            os.remove(part)


def evaluate(args):
    """Run the command that `args` describe: a report of texts and numbers by name. Raises UserError."""
    sources, warned = [open_source(path, args.pairs) for path in args.inputs], []
    # One input keeps its size, and the other is fitted to it. Statistics hold for one size, so the input that
    # has them keeps it. Otherwise an .npz keeps its size, and of two folders or two .npz files the second.
    keeper, *others = sorted(reversed(sources), key=lambda x: (not x.statistics, x.files is not None))
    size = (args.size, args.size) if args.size else keeper.size
    for source in sources if args.size else others:
        if size and size[0] == size[1] and not source.statistics:
            source.size, source.fit = size, True
    if args.pairs and (alone := match(*sources)):
        warned.append(f"{alone} pictures without a partner are left out")
    jpeg = [any(name.lower().endswith((".jpg", ".jpeg")) for name in x.files or ()) for x in sources]
    if jpeg == [False, True]:
        warned.append("samples: JPEG files, unlike the reference: every metric counts their compression too")
    folders = [x.files for x in sources if args.pairs and x.files]
    if len(folders) == 1:
        warned.append(f"pairs are by position, the folder's in this order: {', '.join(folders[0][:3])}, ...")
    if args.save_stats and (sources[0].statistics or sources[0].count < 2):
        raise UserError(f"{args.inputs[0]} holds one picture, or statistics already: nothing to save")

    paths, absent = {}, {}  # a file for each network, and for each metric without its network a sentence
    wanted = ["inception"] if any(source.count for source in sources) else []
    for name in wanted + ["vgg", "heads"] if args.pairs else wanted:
        stem, _, url = WEIGHTS[name]
        curl = f"`curl -fL --create-dirs -o {os.path.join(args.weights, stem)}.pth {url}`"
        try:
            paths[name] = find_weights(args.weights, stem, curl)
        except UserError:
            absent["rFID" if name == "inception" else "LPIPS"] = f"no {name} weights: {curl}"
    if "rFID" in absent and not args.pairs:
        raise UserError(f"{absent['rFID']}, or name another folder with --weights")
    network = load_inception(paths["inception"]).to(args.device) if "inception" in paths else None
    lpips = load_lpips(paths["vgg"], paths["heads"]).to(args.device) if {"vgg", "heads"} <= {*paths} else None
    hashes = {name: sha256(path) for name, path in paths.items()}
    for note in filter(None, (source.note for source in sources)):
        if (hashes.setdefault("inception", note["sha256"]), args.resize) != (note["sha256"], note["resize"]):
            raise UserError(f"statistics of Inception {note['sha256'][:8]} with --resize {note['resize']} do "
                            f"not go with Inception {hashes['inception'][:8]} and --resize {args.resize}")

    metrics, names, protocol = {}, (), "statistics for FID and sFID"
    if args.save_stats:
        save_statistics(args.save_stats, sources[0], network, hashes["inception"], args)
    elif args.pairs:
        protocol = ("rFID against the originals; PSNR, SSIM on 0..255, mean over pictures, PSNR over those "
                    "that differ; LPIPS v0.1 on VGG16")
        metrics = compare_pairs(*sources, network, lpips, args)
        names = "rFID", "PSNR", "SSIM", "LPIPS", "equal pairs"
        absent |= {"PSNR": "all pairs are equal"}
    else:
        protocol = "FID as ADM's evaluator; gFID where REFERENCE is ADM's reference batch"
        metrics, names = compare(*sources, network, args), ("IS", "FID", "sFID", "Precision", "Recall")

    report = {"protocol": protocol, "resize to 299": args.resize}
    for role, source in zip(("reference", "samples"), sources):
        n = source.note.get("n") if source.statistics else source.count
        size = "{1} x {0} pixels".format(*source.size) if source.size else "no pictures"
        report[role] = (f"{source.path}, {'statistics' if source.statistics else 'pictures'}, "
                        f"N = {n or 'unknown'}, {size}{', others fitted' if source.fit else ''}")
        if n and n < FEW and (args.save_stats or {"FID", "sFID", "rFID"} & metrics.keys()):
            warned.append(f"{role}: fewer than {FEW:,} pictures, FID and sFID come out too high")
    if other := [name for name, digest in hashes.items() if not digest.startswith(WEIGHTS[name][1])]:
        warned.append(f"not the standard weights ({', '.join(other)}): compares with no published number")
    report |= {f"{name} weights": f"sha256 {digest}" for name, digest in hashes.items()}
    too_few = "too few or too small pictures, or no such statistics"
    report |= {name: metrics.get(name, f"not available: {absent.get(name, too_few)}") for name in names}
    return report | {f"warning {i}": warning for i, warning in enumerate(warned, 1)}


def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="fid.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\n    import")[0])

    def fail(message):  # one sentence, without the usage
        raise UserError(f"{message} (see fid.py --help)")

    parser.error = fail
    add = parser.add_argument
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices = [*cuda, "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("inputs", nargs="+", metavar="INPUT", help="REFERENCE SAMPLES, ORIGINALS RECONS, or one to save")
    add("--pairs", action="store_true", help="compare reconstructions with their originals, matched by path")
    add("--save-stats", metavar="OUT.npz", help="write one input's statistics")
    add("--weights", default="weights", metavar="FOLDER", help="the networks' files (default: %(default)s/)")
    add("--resize", choices=["adm", "pytorch-fid"], default="adm", help="to 299 x 299 (default: %(default)s)")
    add("--size", type=int, metavar="N", help="fit pictures to N x N (default: to the other input's size)")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    add("--device", choices=devices, default=devices[0])
    add("--batch-size", type=int, default=16 if devices == ["cpu"] else 128, metavar="B")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="W", help="threads that decode")
    if any(word.endswith("=--") for word in argv or sys.argv):
        fail("an option has the value --")  # older argparse makes a list of it
    args = parser.parse_args(argv)
    if len(args.inputs) != (1 if args.save_stats else 2) or (args.pairs and args.save_stats):
        fail("give REFERENCE SAMPLES, or --pairs ORIGINALS RECONS, or --save-stats OUT.npz FOLDER")
    if not all(n is None or 0 < n <= 4096 for n in (args.batch_size, args.workers, args.size)):
        fail("--batch-size, --size and --workers go from 1 to 4096")
    if out := args.save_stats:
        if not out.endswith(".npz") or (os.path.exists(out) and not os.path.isfile(out)):
            fail(f"cannot write {out}: expected a name that ends in .npz")
        if os.path.exists(out) and os.path.exists(args.inputs[0]) and os.path.samefile(out, args.inputs[0]):
            fail(f"{out} is the input: give another name to write")
    return args


def main(argv=None):
    """The command line. Returns the exit code: 0; 2 after a fault; 130 after Ctrl-C; 141 if nobody reads."""
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default would round convolutions to 10 bits

    def say(name, text, stream):  # newlines and what else a terminal cannot show are escaped
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        print(name, text, file=stream, flush=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries: stderr is for one sentence
            args = parse(argv)
            report = evaluate(args)
        if args.json:
            print(json.dumps(report))
        for name, value in () if args.json else report.items():
            say(f"{name:18s}", value if isinstance(value, str) else f"{value:.6g}", sys.stdout)
        return 0
    except KeyboardInterrupt:
        code, text = 130, "interrupted, nothing was written"
    except BrokenPipeError:  # as of `| head`; what is still buffered would complain at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a bug, not a lack of memory
        code, text = 2, str(error)
        if not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text}".split("\n")[0]
    say("fid.py:", text, sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot encode
    sys.exit(main())
