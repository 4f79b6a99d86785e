"""SemTok: pictures to 256 semantic 1D tokens of d bits, and back. The tokenizer of the paper and its losses.

    pictures (B, 3, 256, 256)                       |                        <-- VAE decode -- latents
        |  VAE (frozen)             SigLIP (frozen) |                                            ^
    latents (B, 16, 32, 32)      features (B, C, g, g)                              1 step (stage II) or
        |                                  |  Eq. 2: w_x(x) like the features       25 of a flow (stage I)
    Encoder, Eq. 1: x (B, 256, w) ---------+  and w_z(codes) like their mean                     |
                    z (B, K, d) --BSQ, Eq. 3--> codes (B, K, d) --------------------> Decoder, Eq. 5 and 7

Section 3.1 and 3.2, Eq. 1 to 7, appendix A.1. It needs bsq.py and mmdit.py. Optimiser and data: train.py.

    import torch
    from semtok import PRESETS, SemTok
    model = SemTok(PRESETS["tiny"])                          # PRESETS["paper"] is the same with other numbers
    codes = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)   # pictures in [-1, 1] -> (2, tokens, bits)
    pictures = model.decode(model.refine(codes))             # one step; model.sample(codes) takes 25
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from bsq import (
    BSQ, bits_to_codes, bits_to_index, codes_to_bits, gather, index_to_bits, mean_over_ranks, ranks,
)
from mmdit import (
    FinalLayer, MMDiT, PatchEmbed, RotaryTable, TensorFiles, TimestepEmbedder, UserError, attend,
    feed_forward, from_keys, load_checkpoint, load_tensors, named, renamed, rope_1d, rope_2d,
)

# ------------------------------------------------------------------------------------------------- pictures

def to_signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], the range of every network here. Floats are in [-1, 1] already.
    ValueError for another type."""
    if pictures.is_floating_point():
        return pictures
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures are uint8 in 0..255 or float in [-1, 1], not {pictures.dtype}")
    return pictures.float() / 127.5 - 1


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, clamped and rounded: what is saved, and what metrics are measured on."""
    return (pictures.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)


def picture_grid(rows: dict[str, torch.Tensor], side: int = 96) -> Image.Image:
    """Captioned rows of pictures (N, 3, H, W) uint8 as one image, enlarged to about `side` pixels each.
    A caption may have several lines; "a | b | c" names the columns. A row whose caption is blank goes on with
    the one before."""
    factor, letters = max(1, round(side / next(iter(rows.values())).shape[-1])), max(11, side // 16)
    strips = [row.cpu().permute(2, 0, 3, 1).flatten(1, 2).numpy() for row in rows.values()]  # (H, N W, 3)
    strips = [strip.repeat(factor, 0).repeat(factor, 1) for strip in strips]  # without smoothing
    lines, high, width = [caption.strip().splitlines() for caption in rows], letters + 7, strips[0].shape[0]
    height = sum(high * len(told) + len(strip) for told, strip in zip(lines, strips))
    sheet, top = Image.new("RGB", (max(strip.shape[1] for strip in strips), height), "white"), 0
    for told, strip in zip(lines, strips):
        for line in told:
            line = unicodedata.normalize("NFKD", line[: sheet.width])  # Pillow's font has no umlauts
            line = "".join(letter for letter in line if not unicodedata.combining(letter))
            for column, text in enumerate(line.split(" | ")):
                ImageDraw.Draw(sheet).text((4 + column * width, top + 3), text, "black", font_size=letters)
            top += high
        sheet.paste(Image.fromarray(strip), (0, top))
        top += len(strip)
    return sheet


# --------------------------------------------------- atomic writes, seeded generators, the command line


def target_of(path: str) -> str:
    """The file that a path, or a link, stands for. UserError for a folder, a device or a pipe."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no ordinary file and will not be replaced: choose another path")
    return path


def write_file(path: str, write) -> None:
    """Call write(temporary path), flush to disk, then rename to path. A link stays one: its target changes.
    Raises OSError, and UserError as `target_of` does."""
    path = target_of(path)
    temporary, folder = f"{path}.{os.getpid()}.part", os.path.dirname(path)
    for left in glob.glob(f"{glob.escape(path)}.*.part"):
        if not re.fullmatch(r"\.\d{1,9}\.part", left.removeprefix(path)):
            continue  # a stranger's
        try:
            os.kill(int(left.split(".")[-2]), 0)  # asks whether the process lives
        except ProcessLookupError:
            os.remove(left)
        except PermissionError:
            continue  # it lives, and is another user's
    try:
        os.makedirs(folder, exist_ok=True)
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors writes private files
        flush(temporary)
        os.replace(temporary, path)
        flush(folder)  # the new name is in it
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def flush(path: str) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not os.path.isdir(path):  # for a folder, CIFS, sshfs and Windows cannot
            raise
    finally:
        os.close(number)


def write_tensors(path: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file by `write_file`."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(cpu, temporary, metadata))


def write_text(path: str, text: str) -> None:
    """A text file by `write_file`."""
    write_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_picture(path: str, picture: Image.Image) -> None:
    """A PNG by `write_file`."""
    write_file(path, lambda temporary: picture.save(temporary, "PNG"))


def in_batches(function, tensor: torch.Tensor, size: int = 64) -> torch.Tensor:
    """function applied to slices of a long tensor, joined again."""
    return torch.cat([function(part) for part in tensor.split(size)])


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """One command at a time writes in a folder; the kernel frees the lock when its owner dies. UserError.
    Where the system or the file system knows no such lock, a line says so."""
    os.makedirs(folder, exist_ok=True)
    with open(target_of(os.path.join(folder, ".lock")), "a") as file:
        try:  # not flock: the loader's processes would inherit that lock, and outlive a killed run
            if launched()[0] == 0:
                import fcntl  # Windows has none
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is at work in {folder}: wait or change --out") from None
        except (ImportError, OSError) as error:
            print(f"{folder} cannot be locked ({error}): let no other run write there", file=sys.stderr)
        yield


def key_generator(device: str | torch.device, *key) -> torch.Generator:
    """Random numbers on a device that follow from the key alone, such as (seed, "stage 1", step)."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def launched() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as torchrun sets them; (0, 1, 0) without it. UserError when
    only some of its variables are there: left over in a shell, they would make a part of the work."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    texts = (given.get(name, "") for name in names[:3])
    rank, world, local = (int(text) if text.isdecimal() else -1 for text in texts)
    if len(given) < len(names) or not 0 <= rank < world or local < 0:
        found = ", ".join(f"{name}={text[:20]}" for name, text in given.items())
        raise UserError(f"torchrun's variables do not fit ({found}): unset them, or start with torchrun")
    return rank, world, local


def run_command(name: str, main, faults: tuple, memory_advice: str) -> int:
    """Call main() for a shell -> exit code: 0; 130 after Ctrl-C; 141 where nobody reads any more; 2, with one
    sentence on stderr, for what a person can mend: `faults`, full memory, a full disk. Other errors are bugs
    and are raised again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot encode
    try:
        main()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        text, code = "interrupted; saved work is whole: the same command (no --overwrite) goes on", 130
    except BrokenPipeError:  # as of `| head`; what is still buffered would complain at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except faults as error:
        text, code = str(UserError(error)) or "a damaged file", 2
    except (OSError, MemoryError, RuntimeError) as error:
        text, code = (str(error).strip() or "memory is full").splitlines()[-1], 2
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "free some space" if full else "change the path or its permissions"
            text += f": {advice}; what has been saved is whole"
        elif re.search(r"^DataLoader worker|shared memory|</torch_", text):  # killed, or /dev/shm is small
            text += ": try --workers 0"
        elif isinstance(error, MemoryError) or "memory" in text:
            text += f": {memory_advice}"
        else:
            raise
        text = str(UserError(text))
    if ranks()[0] > 0:
        time.sleep(20)  # rank 0 has mostly stopped for the same reason, and its end is this process's end
    print(f"{name}: {text}", file=sys.stderr)
    return code


def parse_command(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments as a namespace. What the parser does not know is one sentence and exit code 2."""
    said = f"{parser.prog}: {{}}; --help explains every option\n"
    parser.error = lambda message: parser.exit(2, said.format(UserError(message)))
    if any(word.endswith("=--") for word in arguments or sys.argv):
        parser.error("an option has the value --")  # of which older versions make a list
    return parser.parse_args(arguments)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, by default CUDA where there is one; under torchrun each process has its own GPU.
    UserError for one that is not there. Matrix products left in float32 then run in TF32."""
    name, (_, world, local_rank) = name or ("cuda" if torch.cuda.is_available() else "cpu"), launched()
    known = ["cpu", *["cuda"] * torch.cuda.is_available()]
    known += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = f"cuda:{local_rank}" if world > 1 and name in known[1:] else name
    if name not in known:
        raise UserError(f"--device {name} is not there: use {' or '.join(known)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    torch.set_float32_matmul_precision("high")
    return torch.device(name)


def number(kind: type, least: float, most: float):
    """What argparse reads an int or a float in [least, most] with."""
    def number(text: str):
        if not least <= kind(text) <= most:  # NaN is not in it
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:,} and at most {most:,}")
        return kind(text)
    return number


# ----------------------------------------------------------------------------------------- the VAE of SD3.5


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE. blocks: residual blocks per level of the encoder; the decoder has one more."""
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 16

    @property
    def factor(self) -> int:
        """Pixels per latent, a side."""
        return 2 ** (len(self.channels) - 1)


def _group_norm(channels: int) -> nn.GroupNorm:
    # Published sizes have 32 groups. Small ones have 1, or a picture's brightness would get lost.
    return nn.GroupNorm(32 if channels >= 128 else 1, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, channels_in, H, W) -> (B, channels_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = _group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)
        nn.init.zeros_(self.conv2.weight)  # trained from scratch, a block starts as its shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class AttentionBlock(nn.Module):
    """Single-head attention over all places: (B, channels, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


def _level(channels_in: int, channels_out: int, blocks: int) -> nn.Sequential:
    widths = [channels_in] + [channels_out] * blocks
    return named(block=nn.Sequential(*(ResnetBlock(*pair) for pair in zip(widths, widths[1:]))))


def _middle(width: int) -> nn.Sequential:
    first, attention, second = ResnetBlock(width, width), AttentionBlock(width), ResnetBlock(width, width)
    return named(block_1=first, attn_1=attention, block_2=second)


class VAEEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 2 * latent_channels, H/f, W/f): means, then log-variances."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = widths[:1] + widths
        self.down = nn.Sequential(*(_level(*pair, config.blocks) for pair in zip(before, widths)))
        for level, width in zip(self.down[:-1], widths):  # padded on the right and below only, as SD does
            conv = nn.Conv2d(width, width, 3, stride=2)
            level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv)
        self.mid, self.norm_out = _middle(widths[-1]), _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(x))))))


class VAEDecoder(nn.Module):
    """Latents (B, latent_channels, H/f, W/f), not normalised -> pictures (B, 3, H, W), about [-1, 1]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        # up[0] is the FULL resolution: the list is built in that order and walked backwards
        before = widths[1:] + widths[-1:]
        self.up = nn.ModuleList(_level(*pair, config.blocks + 1) for pair in zip(before, widths))
        for level, width in zip(self.up[1:], widths[1:]):
            conv = nn.Conv2d(width, width, 3, padding=1)
            level.upsample = named(nearest=nn.Upsample(scale_factor=2.0), conv=conv)
        self.norm_out, self.conv_out = _group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion 3 and 3.5 (Esser et al. 2024): 34.3M + 49.5M parameters."""

    SHIFT, SCALE = 0.0609, 1.5305  # published: normalised latents = (latents - SHIFT) * SCALE

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, self.encoder, self.decoder = config, VAEEncoder(config), VAEDecoder(config)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalised posterior means (B, latent_channels, H/f, W/f)."""
        dtype = self.encoder.conv_in.weight.dtype
        moments = self.encoder(pictures.to(dtype, memory_format=torch.channels_last))  # up to twice as fast
        return (moments.chunk(2, 1)[0] - self.SHIFT) * self.SCALE

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, latent_channels, h, w) -> (B, 3, f h, f w), not clamped to [-1, 1]."""
        latents, dtype = latents / self.SCALE + self.SHIFT, self.decoder.conv_in.weight.dtype
        return self.decoder(latents.to(dtype, memory_format=torch.channels_last))


_VAE_DIFFUSERS_WORDS = {  # parts of the single file's keys -> diffusers'; the number behind up_blocks differs
    "mid.block_1.": "mid_block.resnets.0.", "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.", "mid.attn_1.": "mid_block.attentions.0.",
    "down.": "down_blocks.", "up.": "up_blocks.", ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0.",
    "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out",
}


def _vae_diffusers_name(name: str, levels: int) -> str:
    # diffusers' decoder starts at the lowest resolution
    name = renamed(name, _VAE_DIFFUSERS_WORDS)
    return re.sub(r"(?<=up_blocks\.)\d", lambda number: str(levels - 1 - int(number[0])), name)


def _config_beside(path: str) -> dict:
    # The config.json in a folder, or in that of a file; empty without one.
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if not os.path.isfile(file):
        return {}
    try:
        with open(file, encoding="utf-8") as content:
            return dict(json.loads(content.read(1 << 24)))
    except (ValueError, TypeError, RecursionError):  # no JSON, such as an HTML page; no table; too deep
        raise UserError(f"{file} is not the JSON table that its name promises: download it again") from None


def load_vae(path: str, device: str | torch.device = "cpu") -> VAE:
    """The VAE out of sd3.5_medium.safetensors, a diffusers vae/ folder (or its parent), or its own file.
    Sizes are read off the shapes. FLUX's VAE has the same ones; only its config.json tells them apart."""
    wanted = "the VAE of SD3 or SD3.5 (sd3.5_medium.safetensors, or the model's vae folder)"
    source = TensorFiles(path, "vae", "first_stage_model.")
    entries = _config_beside(source.path)
    shift, scale = entries.get("shift_factor"), entries.get("scaling_factor")
    if "scaling_factor" in entries and (shift, scale) != (VAE.SHIFT, VAE.SCALE):
        found = f"shift_factor {shift!r:.40} and scaling_factor {scale!r:.40}"
        raise source.unlike(wanted, f"it has {found} in place of {VAE.SHIFT} and {VAE.SCALE}")
    diffusers = any("down_blocks." in key for key in source.shapes)
    pattern = r"encoder\.down(?:_blocks)?\.(\d)\.(?:block|resnets)\.(\d)\.conv1\.weight"
    with source.building(wanted):
        latents = source.shapes["decoder.conv_in.weight"][1]
        blocks = {m.groups(): s[0] for key, s in source.shapes.items() if (m := re.fullmatch(pattern, key))}
        channels = tuple(width for (_, number), width in sorted(blocks.items()) if number == "0")
        vae = VAE(VAEConfig(channels, len(blocks) // len(channels), latents))

    def as_convolution(weight):  # attention's projections are Linear in diffusers, 1x1 convolutions here
        return weight[:, :, None, None] if weight.ndim == 2 else weight

    mapping = {}
    for name in vae.state_dict():
        theirs = _vae_diffusers_name(name, len(channels)) if diffusers else name
        mapping[name] = from_keys(theirs, make=as_convolution)
    return load_tensors(vae, source, mapping, wanted, device=device)


# ------------------------------------------------------------------------------------ SigLIP's vision tower


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP or SigLIP 2 vision tower (the default is base-patch16-256)."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    grid: int = 16
    margin: int = 0  # pixels right and below that no patch covers: 384 - 27 * 14 = 6 in so400m-patch14-384


class SigLIPLayer(nn.Module):
    """A pre-norm transformer layer: (B, L, width) -> (B, L, width)."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = feed_forward(width, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.layer_norm1(x)
        projected = (self.self_attn[f"{name}_proj"](normed) for name in "qkv")
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        x = x + self.self_attn["out_proj"](attend(q, k, v))
        return x + self.mlp(self.layer_norm2(x))


class SigLIP(nn.Module):
    """SigLIP's vision tower (Zhai et al. 2023; SigLIP 2, Tschannen et al. 2025) up to its patch features."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.config, self.side = config, config.grid * config.patch + config.margin
        patches = nn.Conv2d(3, config.width, config.patch, config.patch)
        positions = nn.Embedding(config.grid**2, config.width)
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": positions})
        self.encoder = named(layers=nn.Sequential(*(SigLIPLayer(config) for _ in range(config.depth))))
        self.post_layernorm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], resized if need be -> patch features (B, width, grid, grid)."""
        side, grid = self.side, self.config.grid
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
        patches = self.embeddings["patch_embedding"](pictures.to(self.post_layernorm.weight.dtype))
        x = patches.flatten(2).transpose(1, 2) + self.embeddings["position_embedding"].weight
        return self.post_layernorm(self.encoder(x)).transpose(1, 2).unflatten(2, (grid, grid))


_SIGLIP_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 16}  # published widths -> heads; so400m is 1152


def load_siglip(path: str, device: str | torch.device = "cpu") -> SigLIP:
    """The vision tower of a SigLIP or SigLIP 2 file or folder (of fixed resolution), text tower or not.
    Heads, and pixels that the patches leave over, come from a config.json beside it, else from a table."""
    wanted = "the vision tower of SigLIP or SigLIP 2 (such as siglip2-base-patch16-256, no NaFlex)"
    source, entries = TensorFiles(path, prefix="vision_model."), _config_beside(path)
    with source.building(wanted):
        patches = source.shapes["embeddings.patch_embedding.weight"]
        if len(patches) != 4:
            raise ValueError("it takes pictures of any size")  # NaFlex
        width, _, patch, _ = patches
        grid = math.isqrt(source.shapes["embeddings.position_embedding.weight"][0])
        hidden = source.shapes["encoder.layers.0.mlp.fc1.weight"][0]
        depth = sum(key.endswith(".layer_norm1.weight") for key in source.shapes)
        model = str(entries.get("model_type", entries.get("_class_name", "siglip")))
        entries = entries.get("vision_config", entries) if model.startswith("siglip") else {}
        heads = entries.get("num_attention_heads", _SIGLIP_HEADS.get(width))
        size = entries.get("image_size", 384 if (patch, grid) == (14, 27) else 0)
        if type(heads) is not int or heads < 1 or width % heads:
            raise ValueError(f"it is {width} wide and its heads are unknown: put its config.json beside it")
        tower = SigLIP(SigLIPConfig(width, depth, heads, hidden, patch, grid, int(size) % patch))
    mapping = {name: from_keys(name) for name in tower.state_dict()}
    unused = r"head\.|embeddings\.position_ids$"  # SemTok pools by the mean
    return load_tensors(tower, source, mapping, wanted, unused, device)


# ---------------------------------------------------------------------------------- SemTok: sizes and presets


@dataclass(frozen=True)
class SemTokConfig:
    """Sizes, by default the paper's (Table 8, 2^18 codes). ValueError for what cannot be."""
    image_size: int = 256  # pixels a side
    tokens: int = 256  # K
    bits: int = 18  # d, bits of a token
    patch: int = 2  # latents a side
    encoder_depth: int = 8
    encoder_width: int = 768
    encoder_heads: int = 12
    decoder_depth: int = 24
    decoder_width: int = 1536
    decoder_heads: int = 24
    decoder_dual_depth: int = 13  # blocks with a second attention, MMDiT-X
    semantic_width: int = 768  # C of SigLIP
    quantizer: Literal["bsq", "lfq"] = "bsq"  # LFQ is the sign without the sphere (Table 10)
    entropy_group: int = 1  # bits with a joint distribution in Eq. 4: see BSQ
    causal: bool = False  # Table 5's "raster": a token sees the picture and the tokens before it
    form: Literal["1d", "2d"] = "1d"  # 2d, our control for Table 3: token i attends to itself and patch i
    vae: VAEConfig = field(default_factory=VAEConfig)

    def __post_init__(self):
        sizes = {name: value for name, value in vars(self).items() if type(value) is int}
        for name, value in (sizes | {"vae.blocks": self.vae.blocks}).items():
            least = 0 if name == "decoder_dual_depth" else 1
            most = 100 if name.endswith(("depth", "blocks")) else 8192
            if not least <= value <= most:
                raise ValueError(f"{name} must be at least {least} and at most {most}, not {value}")
        if self.image_size % (side := self.vae.factor * self.patch):
            raise ValueError(f"image_size {self.image_size} is no multiple of {side}, a patch's pixels")
        if self.tokens + self.grid**2 > 8192:  # masks are allocated even on the meta device
            raise ValueError("tokens and patches together must be at most 8192")
        if self.form == "2d" and (self.tokens != self.grid**2 or self.causal):
            raise ValueError(f"form=2d has a token for each patch: set tokens={self.grid**2} and causal=0")
        if self.bits % self.entropy_group:
            raise ValueError(f"entropy_group {self.entropy_group} must divide the {self.bits} bits")
        if self.encoder_width % (4 * self.encoder_heads) or self.decoder_width % (4 * self.decoder_heads):
            raise ValueError("4 x encoder_heads must divide encoder_width, and so for the decoder")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.vae.factor // self.patch


PRESETS = {
    "paper": SemTokConfig(),
    "base": SemTokConfig(  # one GPU, a day: half the tokens, a decoder from scratch
        tokens=128, encoder_depth=6, encoder_width=512, encoder_heads=8,
        decoder_depth=10, decoder_width=640, decoder_heads=10, decoder_dual_depth=2,
    ),
    "tiny": SemTokConfig(
        image_size=32, tokens=16, bits=24, encoder_depth=2, encoder_width=64, encoder_heads=4,
        decoder_depth=3, decoder_width=64, decoder_heads=4, decoder_dual_depth=2,
        semantic_width=64, vae=VAEConfig(channels=(16, 16, 32), blocks=1, latent_channels=8),
    ),
}


@dataclass(frozen=True)
class LossWeights:
    """The weights of Eq. 6 (section 4.1). Table 4 sets `distill` or `contrast` to 0."""
    lambda_q: float = 0.0025  # of the entropy loss, Eq. 4
    lambda_s: float = 0.05  # of the semantic alignment, Eq. 2
    distill: float = 1.0  # a part of the alignment
    contrast: float = 1.0  # the other part of the alignment


@dataclass(frozen=True)
class RefinerWeights(LossWeights):
    """The weights of Eq. 7 (section 4.1), and of LeCAM (MaskBiT)."""
    lambda_p: float = 0.1  # of each perceptual loss
    lambda_gan: float = 0.1  # of the decoder's adversarial loss
    lambda_lecam: float = 0.001  # of the discriminator's regulariser


class Encoder(MMDiT):
    """Eq. 1: latents and K learnable mask tokens through an MMDiT without timestep -> x and z."""

    def __init__(self, config: SemTokConfig):
        width, head_dim = config.encoder_width, config.encoder_width // config.encoder_heads
        super().__init__(config.encoder_depth, width, config.encoder_heads)
        self.x_embedder = PatchEmbed(config.vae.latent_channels, config.patch, width)
        self.mask_tokens = nn.Parameter(torch.randn(config.tokens, width, device="cpu") * 0.02)
        self.norm_out = nn.LayerNorm(width, eps=1e-6)
        self.to_bits = nn.Linear(width, config.bits)
        self.x_rope = RotaryTable(rope_2d(config.grid, config.grid, head_dim))
        self.z_rope = RotaryTable(token_rope(config, head_dim))
        self.register_buffer("mask", token_mask(config), persistent=False)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latents (B, channels, h, w) -> x (B, h w / p^2, width), z (B, K, d)."""
        x, z = self.x_embedder(latents), self.mask_tokens.expand(len(latents), -1, -1)
        x, z = super().forward(x, z, self.x_rope.table, self.z_rope.table, mask=self.mask)
        return x, self.to_bits(self.norm_out(z))


def token_rope(config: SemTokConfig, head_dim: int) -> torch.Tensor:
    """The tokens' rotations (2, K, head_dim): of a sequence, or of the patches that they belong to."""
    two = config.form == "2d"
    return rope_2d(config.grid, config.grid, head_dim) if two else rope_1d(config.tokens, head_dim)


def token_mask(config: SemTokConfig) -> torch.Tensor | None:
    """What K tokens, then grid^2 patches see in the encoder: (K + grid^2, K + grid^2) bool; None: everything.
    causal (SelfTok, Wang et al. 2025; Table 5): a token sees the image, itself and earlier tokens.
    2d: a token sees itself and its own patch. In both, patches see no token, or one token would reach another
    through them."""
    tokens, total = config.tokens, config.tokens + config.grid**2
    if config.form == "1d" and not config.causal:
        return None
    mask = torch.ones(total, total, dtype=torch.bool, device="cpu")
    mask[tokens:, :tokens] = False
    if config.causal:
        mask[:tokens, :tokens] = mask[:tokens, :tokens].tril()
    else:
        mask[:tokens] = torch.eye(tokens, dtype=torch.bool, device="cpu").repeat(1, 2)
    return mask


class Decoder(MMDiT):
    """The MMDiT-X of SD3.5-Medium on SemTok's tokens: Eq. 5's velocity, or in one step Eq. 7's latents.
    2231M parameters; 2237M with SD3.5's embedder of pooled text, which `load_sd35` folds."""

    def __init__(self, config: SemTokConfig):
        width, head_dim = config.decoder_width, config.decoder_width // config.decoder_heads
        sizes = config.decoder_depth, width, config.decoder_heads, config.decoder_dual_depth
        super().__init__(*sizes, adaln=True, context_pre_only=True)
        self.grid = (config.grid, config.grid)
        self.x_embedder = PatchEmbed(config.vae.latent_channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.final_layer = FinalLayer(width, config.patch, config.vae.latent_channels)
        # SD3.5 has neither of the next two, so no file fills them: made on the CPU even if the rest is not
        self.token_embedder = nn.Linear(config.bits, width, device="cpu")
        if config.quantizer == "bsq":  # its channels are +-1/sqrt(d): start as if they were +-1
            self.token_embedder.weight.data *= config.bits**0.5
        self.mask_tokens = nn.Parameter(torch.randn(config.grid**2, width, device="cpu") * 0.02)
        self.x_rope = RotaryTable(rope_2d(*self.grid, head_dim))
        self.z_rope = RotaryTable(token_rope(config, head_dim))

    def forward(self, codes: torch.Tensor, noisy: torch.Tensor | None = None, t: torch.Tensor | None = None):
        """codes (B, K, d), noisy x_t (B, channels, h, w), t (B,) -> the velocity x_v - eps, like x_t.
        Without x_t and t, stage II: mask tokens stand for x_t, t is 1, and the output is the latent."""
        if noisy is None:
            x, t = self.mask_tokens.expand(len(codes), -1, -1), codes.new_ones(len(codes))
        else:
            x = self.x_embedder(noisy)
        context = self.token_embedder(codes.to(self.token_embedder.weight.dtype))
        conditioning = self.t_embedder(t)
        x, _ = super().forward(x, context, self.x_rope.table, self.z_rope.table, conditioning)
        return self.final_layer(x, conditioning, self.grid)


# ------------------------------------------------------- judges of stage II: ResNet-50 and the discriminator


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block, stride in the 3x3 (torchvision): (B, c, H, W) -> (B, 4 width, ...)."""

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity()
        if stride != 1 or channels_in != 4 * width:
            shortcut = nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(hidden)))))
        return F.relu(hidden + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-50 (He et al. 2016), torchvision's names: (B, 3, H, W) in [-1, 1], resized -> (B, classes)."""

    def __init__(self, width: int = 64, layers=(3, 4, 6, 3), classes: int = 1000, size: int = 224):
        super().__init__()
        self.size, channels = size, width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for i, blocks in enumerate(layers):
            inner, stage = width * 2**i, []
            for j in range(blocks):
                stage.append(Bottleneck(channels, inner, stride=2 if i and not j else 1))
                channels = 4 * inner
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.shape[-1] != self.size:
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        x = pictures * 0.5 + 0.5  # ImageNet's channel means and deviations are of [0, 1]
        moments = zip(x.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        x = torch.stack([(channel - mean) / std for channel, mean, std in moments], 1)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Discriminator(nn.Module):
    """MaskBiT's "VQGAN+" discriminator (Weber et al. 2024): (B, 3, H, W) -> logits (B, 1, map, map).
    It remembers the running means of its logits on real and on decoded pictures, for LeCAM."""

    def __init__(self, base: int = 128, stages: int = 4, map_size: int = 16):
        super().__init__()
        self.conv_in, self.map_size = nn.Conv2d(3, base, 5, padding=2), map_size
        widths = [base] + [base * 2**i for i in range(stages)]  # doubling from the second stage on
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, width // 4), width) for width in widths[1:])
        self.mix = nn.Conv2d(widths[-1], widths[-1], 1)
        self.conv_out = nn.Conv2d(widths[-1], 1, 5, padding=2)
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", blur[:, None] * blur, persistent=False)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv_in(pictures), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            blur = self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4)
            x = F.leaky_relu(norm(F.conv2d(x, blur, stride=2, padding=1, groups=x.shape[1])), 0.1)
        x = F.adaptive_max_pool2d(x, self.map_size)
        return self.conv_out(F.leaky_relu(self.mix(x), 0.1))

    def losses(self, output: torch.Tensor, real: torch.Tensor, lambda_lecam: float) -> dict:
        """Hinge losses of both players on pictures (B, 3, H, W) in [-1, 1], and the mean logits.
        One backward pass serves both: gan_loss has this network's weights detached and reaches the decoder
        alone; the hinge loss has the output detached and reaches this network alone."""
        detached = {name: p.detach() for name, p in self.named_parameters()}
        gan_loss = -torch.func.functional_call(self, detached, (output,)).float().mean()
        on_real, on_fake = self(real).float(), self(output.detach()).float()  # (B, 1, map, map)
        hinge_loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        d_real, d_fake = (mean_over_ranks(logits.mean()) for logits in (on_real, on_fake))
        penalty = lecam_loss(d_real, d_fake, self.real_mean, self.fake_mean)
        losses = {"gan_loss": gan_loss, "discriminator_loss": hinge_loss + lambda_lecam * penalty}
        return losses | {"d_real": d_real, "d_fake": d_fake}

    @torch.no_grad()
    def remember(self, d_real: torch.Tensor, d_fake: torch.Tensor) -> None:
        """After a step: move the running means towards its mean logits ()."""
        self.real_mean.lerp_(d_real, 0.001)
        self.fake_mean.lerp_(d_fake, 0.001)


def lecam_loss(real: torch.Tensor, fake: torch.Tensor, real_mean: torch.Tensor, fake_mean: torch.Tensor):
    """LeCAM (Tseng et al. 2021) as in MaskBiT: a side's mean logit () stays near the other's running mean."""
    return F.relu(real - fake_mean).square() + F.relu(real_mean - fake).square()


# ----------------------------------------------------------------------------------------------------- SemTok


class SemTok(nn.Module):
    """VAE (frozen), encoder, quantiser, decoder, and the alignment's two projections.
    vae, decoder: loaded ones, in place of new ones of the config's sizes."""

    def __init__(self, config: SemTokConfig, vae: VAE | None = None, decoder: Decoder | None = None):
        super().__init__()
        self.config, side = config, config.grid * config.patch
        self.latent_shape = (config.vae.latent_channels, side, side)  # of one picture
        self.vae = (vae or VAE(config.vae)).requires_grad_(False)
        self.encoder = Encoder(config)
        self.quantizer = BSQ(config.bits, config.entropy_group, spherical=config.quantizer == "bsq")
        self.decoder = decoder or Decoder(config)
        self.refines = True  # False: loaded from a file of stage 1, whose mask tokens are not trained
        self.w_x = nn.Linear(config.encoder_width, config.semantic_width)
        # w_z reads all tokens, flattened: their mean would leave only d numbers.
        self.w_z = nn.Linear(config.tokens * config.bits, config.semantic_width)
        # Eq. 2's temperature t, which multiplies. Its shape is (1,): FSDP cannot shard a scalar
        self.log_t = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents (B, channels, h, w) -> x (B, grid^2, encoder width), codes (B, K, d), u (B, K, d)."""
        x, z = self.encoder(latents)
        return x, *self.quantizer(z)

    @torch.no_grad()
    def frozen_pass(self, pictures: torch.Tensor, siglip: SigLIP, rng=None) -> tuple[dict, dict]:
        """Computes everything that needs no gradient, of this rank's pictures (B, 3, H, W) in [-1, 1].
        Returns rows, one for each picture: `latents` (B, channels, h, w), `features` (B, C, g, g), `positive`
        (B,), the place of its own features in `candidates`; with rng also Eq. 5's `noise`, like the latents,
        and times `t` (B,), uniform in [0, 1]. And what they share: `candidates` (ranks * B, C), the pooled
        features of all ranks."""
        # In slices: all pictures of many micro-batches at once would take more than the rest of a step
        latents, features = (in_batches(network, pictures, 16) for network in (self.vae.encode, siglip))
        rank, world = ranks()
        pooled = F.normalize(features.float().mean((2, 3)), dim=-1)  # (B, C); P of Eq. 2 is the mean
        positive = torch.arange(len(pictures), device=pictures.device) + rank * len(pictures)
        rows = {"latents": latents, "features": features, "positive": positive}
        if rng is not None:  # drawn for the global batch and cut: the number of ranks changes nothing
            total = world * len(latents)
            noise = torch.randn(total, *self.latent_shape, generator=rng, device=latents.device)
            t = torch.rand(total, generator=rng, device=latents.device)
            rows |= {"noise": noise.chunk(world)[rank], "t": t.chunk(world)[rank]}
        return rows, {"candidates": gather(pooled)}

    def pretraining_losses(self, latents, features, positive, noise, t, candidates, weights) -> dict:
        """Stage I, Eq. 6, on the results of `frozen_pass` with rng. weights: LossWeights.
        Returns `loss` and its terms, scalars."""
        x, codes, u = self.quantise(latents)
        times = t[:, None, None, None]
        noisy = times * noise + (1 - times) * latents  # Eq. 5: x_t (B, channels, h, w)
        velocity = self.decoder(codes, noisy, t)
        flow_loss = F.mse_loss(velocity.float(), latents - noise)  # Eq. 5: the target is x_v - eps
        regulariser, terms = self.regularisers(x, codes, u, features, positive, candidates, weights)
        return {"loss": flow_loss + regulariser, "flow_loss": flow_loss} | terms

    def refiner_losses(
        self, latents, features, positive, pictures, candidates, judges: dict, weights: RefinerWeights,
        discriminator: Discriminator | None = None,
    ) -> dict:
        """Stage II, Eq. 7, on the results of `frozen_pass` and the pictures (B, 3, H, W) in [-1, 1].
        judges: the perceptual losses, name -> a callable (output, pictures) -> (). discriminator: once it has
        joined. Returns `loss` and its terms, scalars, and the discriminator's mean logits."""
        x, codes, u = self.quantise(latents)
        output = self.vae.decode(self.decoder(codes)).float()  # mask tokens for x_t, t = 1: (B, 3, H, W)
        pixel_loss = F.mse_loss(output, pictures)
        perceptual = {f"{name}_loss": judge(output, pictures) for name, judge in judges.items()}
        regulariser, terms = self.regularisers(x, codes, u, features, positive, candidates, weights)
        loss = pixel_loss + weights.lambda_p * sum(perceptual.values()) + regulariser  # Eq. 7
        if discriminator is not None:
            players = discriminator.losses(output, pictures, weights.lambda_lecam)
            loss = loss + weights.lambda_gan * players["gan_loss"] + players["discriminator_loss"]
            terms |= players
        return {"loss": loss, "pixel_loss": pixel_loss} | perceptual | terms

    def regularisers(self, x, codes, u, features, positive, candidates, weights) -> tuple[torch.Tensor, dict]:
        """Eq. 4 and 2, the terms that both stages share: their weighted sum in Eq. 6 and 7, and each."""
        terms = self.alignment_losses(x, codes, features, positive, candidates)
        terms |= self.quantizer.entropy_loss(u)
        semantic_loss = weights.distill * terms["distill_loss"] + weights.contrast * terms["contrast_loss"]
        return weights.lambda_q * terms["entropy_loss"] + weights.lambda_s * semantic_loss, terms

    def alignment_losses(self, x, codes, features, positive, candidates) -> dict[str, torch.Tensor]:
        """Eq. 2: x (B, grid^2, encoder width), codes (B, K, d), `frozen_pass`'s results -> two scalars.
        Its u is `candidates` here, and its t exp(log_t)."""
        grid, targets = self.config.grid, features.float()
        if targets.shape[-1] != grid:
            targets = F.interpolate(targets, (grid, grid), mode="bilinear", antialias=True)
        distill_loss = F.mse_loss(self.w_x(x).float(), targets.flatten(2).transpose(1, 2))

        with torch.autocast(codes.device.type, enabled=False):  # bfloat16 moves these logits by up to 0.2
            v = F.normalize(self.w_z(codes.flatten(1).to(self.w_z.weight.dtype)).float(), dim=-1)
            similarity = self.log_t.float().exp() * v @ candidates.T  # (B, ranks * B)
        # Eq. 2 is printed without its minus sign. To maximise the log ratio is to minimise this (InfoNCE).
        return {"distill_loss": distill_loss, "contrast_loss": F.cross_entropy(similarity, positive)}

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep Eq. 2's temperature exp(log_t) at 100 or below, as CLIP does, after a step of the optimiser.
        A clamp in the forward pass would give no gradient above the limit."""
        self.log_t.clamp_(max=math.log(100))

    @torch.no_grad()
    def start_refiner(self) -> None:
        """Stage II's mask tokens start as the embedding of nearly zero noise. At t = 1 stage I's decoder
        predicts x_v - eps from eps: with eps near 0, about the mean latent for these tokens."""
        self.refines = True
        embedder = self.decoder.x_embedder
        noise = 0.1 * torch.randn(1, *self.latent_shape)  # not zero: mask tokens differ from the start
        self.decoder.mask_tokens.copy_(embedder(noise.to(embedder.proj.weight))[0])

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W), uint8 or in [-1, 1] -> codes (B, K, d): +-1/sqrt(d) (LFQ: +-1).
        In float32 alone: by bfloat16 or TF32 some bits would differ, and depend on the rest of the batch.
        Raises ValueError for another shape or type."""
        pictures, side = to_signed(pictures), self.config.image_size
        if pictures.shape[1:] != (3, side, side):
            raise ValueError(f"pictures (B, 3, {side}, {side}) are needed, not {tuple(pictures.shape)}")
        with torch.autocast(pictures.device.type, enabled=False), without_tf32():
            return self.quantise(self.vae.encode(pictures))[1]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, channels, h, w) -> pictures (B, 3, H, W) in [-1, 1]."""
        return self.vae.decode(latents).clamp(-1, 1)

    @torch.no_grad()
    def refine(self, codes: torch.Tensor) -> torch.Tensor:
        """Eq. 7, stage II: codes (B, K, d) -> latents in one step, the same every time. ValueError for a
        file of stage I, whose mask tokens are not trained."""
        if not self.refines:
            raise ValueError("this tokenizer is of stage 1 and cannot refine: take sample(codes), or stage 2")
        return self.decoder(codes)

    def to_pictures(self, codes: torch.Tensor) -> torch.Tensor:
        """Stage II: codes (B, K, d) -> pictures (B, 3, H, W) uint8."""
        return to_uint8(self.decode(self.refine(codes)))

    def tokenize(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures as `encode` takes them -> token numbers (B, K) int64, Eq. 3. ValueError above 63 bits."""
        return bits_to_index(codes_to_bits(self.encode(pictures)))

    def detokenize(self, index: torch.Tensor) -> torch.Tensor:
        """Stage II: token numbers (B, K) int64 -> pictures (B, 3, H, W) uint8."""
        bits = index_to_bits(index, self.config.bits)
        return self.to_pictures(bits_to_codes(bits, self.quantizer.spherical))

    @torch.no_grad()
    def sample(self, codes: torch.Tensor, steps: int = 25, generator=None) -> torch.Tensor:
        """Stage I: codes (B, K, d) -> latents, by Euler steps of the flow from t = 1 (noise) to 0."""
        noise = torch.randn(len(codes), *self.latent_shape, generator=generator, device=codes.device)
        return euler(lambda x, t: self.decoder(codes, x, t.expand(len(x))), noise, steps)

    def reconstruct(self, pictures: torch.Tensor, generator=None, steps: int = 25) -> torch.Tensor:
        """Pictures as `encode` takes them -> uint8; with a generator by `steps` of stage I, else stage II."""
        codes = self.encode(pictures)
        if generator is None:
            return self.to_pictures(codes)
        return to_uint8(self.decode(self.sample(codes, steps, generator)))


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, CUDA's products and convolutions of float32 keep all digits."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def euler(velocity, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Follow dx/dt = -velocity(x, t), which estimates x_v - eps (Eq. 5), from noise x (B, ...) to t = 0."""
    times = torch.linspace(1, 0, steps + 1, device=x.device)
    for now, following in zip(times[:-1], times[1:]):
        x = x + (now - following) * velocity(x, now).to(x.dtype)
    return x


def load_semtok(path: str, device: str | torch.device = "cpu") -> tuple[SemTok, dict[str, str]]:
    """A tokenizer of train.py, the file or its run's folder (stage 2 if it is there), and its metadata.
    Raises UserError."""
    if os.path.isdir(path):
        files = [os.path.join(path, f"stage{stage}.safetensors") for stage in (2, 1)]
        path = next(filter(os.path.isfile, files), files[0])
    model, metadata = load_checkpoint(path, "semtok-tokenizer", SemTokConfig, SemTok, device)
    model.refines = metadata.get("stage") != "1"
    return model, metadata
