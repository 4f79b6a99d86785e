"""MMDiT and MMDiT-X transformers with rotary positions, and the weights of Stable Diffusion 3.5 Medium.

    x (B, L, width), patches of a picture          context (B, M, width), tokens
    |'-- norm, AdaLN -- qkv --.                    .-- qkv -- norm, AdaLN --'|
    |                         RoPE, joint attention                          |
    + <------- gate, proj ----'  (B, M + L, width) '---- proj, gate -------> +
    + <------- gate, attn2: x on itself; MMDiT-X's first blocks              |
    + <------- gate, MLP                                     MLP, gate ----> +     depth times

With AdaLN, a conditioning vector (B, width) makes every shift, scale and gate. SemTok section 3.1; Esser et
al. 2024 (SD3). Modules have the names of SD3.5's files. This file needs torch and safetensors alone.

    import torch
    from mmdit import MMDiT, rope_1d, rope_2d
    net = MMDiT(depth=2, width=128, heads=2, dual_depth=1, adaln=True)      # a small SD3.5-Medium
    image, tokens, time = torch.randn(1, 64, 128), torch.randn(1, 16, 128), torch.randn(1, 128)
    image, _ = net(image, tokens, rope_2d(8, 8, 64), rope_1d(16, 64), time) # (1, 64, 128)
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------- rotary positions


def _angles(length: int, pairs: int) -> torch.Tensor:  # (length, pairs)
    # On the CPU in float32, whatever the defaults: the meta device keeps no values, bfloat16 rounds them
    positions, i = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (length, pairs))
    return positions[:, None] * 10000.0 ** (-i / pairs)


def _rotations(angles: torch.Tensor) -> torch.Tensor:  # of pairs (L, head_dim/2): (2, L, head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rope_1d(length: int, head_dim: int) -> torch.Tensor:
    """Rotations of positions 0..length-1 (RoFormer, Su et al. 2021): cos and sin, (2, length, head_dim)."""
    return _rotations(_angles(length, head_dim // 2))


def rope_2d(height: int, width: int, head_dim: int) -> torch.Tensor:
    """Rotations on a grid: the first half of the pairs turns by row, the second by column.
    Returns (2, height * width, head_dim)."""
    rows, columns = _angles(height, head_dim // 4), _angles(width, head_dim // 4)
    return _rotations(torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], -1))


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate x (..., L, head_dim) by rope (2, L, head_dim): channel i turns with channel i + head_dim/2.
    Halves (a, b) become (a cos - b sin, b cos + a sin); the table holds (-sin, sin)."""
    cos, sin = rope.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryTable(nn.Module):
    """A `table` outside of checkpoints. It stays float32 when its model is cast: bfloat16 has only 8 bits."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .bfloat16() all come down to
        self.table = self.table.to(fn(self.table).device)
        return self


# ------------------------------------------------------------------------------------------ the transformer


def normed_rotated(qkv: torch.Tensor, heads: int, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm, rope: torch.Tensor):
    """qkv (B, L, 3 width) -> q, k, v (B, heads, L, head_dim), q and k RMS-normalised per head and rotated."""
    qkv = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, head_dim)
    qk, v = qkv.split([2, 1])  # q and k as one tensor: small models are bound by kernel launches
    weight = torch.stack([q_norm.weight, k_norm.weight])[:, None, None, None]
    qk = F.rms_norm(qk.float(), qk.shape[-1:], eps=q_norm.eps) * weight
    q, k = apply_rope(qk, rope).to(v.dtype)
    return q, k, v[0]


def attend(q, k, v, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """Softmax attention: q, k, v (B, heads, L, head_dim), mask (L, L), True where seen -> (B, L, width)."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)


class AttentionWeights(nn.Module):
    """One stream's qkv, qk-norm and, unless pre_only, projection out: x (B, L, width) -> q, k, v as above."""

    def __init__(self, width: int, heads: int, pre_only: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q, self.ln_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        if not pre_only:
            self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normed_rotated(self.qkv(x), self.heads, self.ln_q, self.ln_k, rope)


def named(**parts: nn.Module) -> nn.Sequential:
    """Modules one after the other, under the names that published files give them."""
    return nn.Sequential(OrderedDict(parts))


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Linear, GELU (its tanh form), linear: (B, L, width) -> the same."""
    return named(fc1=nn.Linear(width, hidden), gelu=nn.GELU("tanh"), fc2=nn.Linear(hidden, width))


def modulate(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    """AdaLN's x (1 + scale) + shift: x (B, L, width), shift and scale (B, 1, width) or None for x itself."""
    return x if scale is None else torch.addcmul(shift, x, 1 + scale)


def gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """AdaLN's gate (B, 1, width), or None for x itself, on a branch x (B, L, width)."""
    return x if gate is None else x * gate


class StreamBlock(nn.Module):
    """One stream's half of a joint block. dual: with attn2, MMDiT-X's attention of the stream on itself.
    pre_only: SD3.5's last context block, which gives keys and values and has no output."""

    def __init__(self, width: int, heads: int, adaln: bool, dual: bool = False, pre_only: bool = False):
        super().__init__()
        self.dual, self.pre_only = dual, pre_only
        self.chunks = 2 if pre_only else 9 if dual else 6
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = AttentionWeights(width, heads, pre_only)
        if dual:
            self.attn2 = AttentionWeights(width, heads)
        if not pre_only:
            self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.mlp = feed_forward(width, 4 * width)
        if adaln:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulations(self, conditioning: torch.Tensor | None) -> tuple[tuple, tuple, tuple]:
        """(B, width) -> shift, scale, gate of the attention, of the MLP and of attn2, each (B, 1, width).
        What the block lacks is None; without conditioning all nine are."""
        chunks = (None,) * 9
        if conditioning is not None:
            made = self.adaLN_modulation(conditioning)[:, None].chunk(self.chunks, -1)
            chunks = made + chunks[self.chunks :]
        return chunks[:3], chunks[3:6], chunks[6:]

    def residual_mlp(self, x: torch.Tensor, shift, scale, gate) -> torch.Tensor:
        """x (B, L, width) -> x plus its gated MLP."""
        return x + gated(self.mlp(modulate(self.norm2(x), shift, scale)), gate)


class JointBlock(nn.Module):
    """Two streams that attend to each other, each with its own weights and rotations. forward: as MMDiT's."""

    def __init__(self, width: int, heads: int, adaln: bool, dual: bool, pre_only: bool):
        super().__init__()
        self.context_block = StreamBlock(width, heads, adaln, pre_only=pre_only)
        self.x_block = StreamBlock(width, heads, adaln, dual=dual)

    def forward(self, x, context, x_rope, context_rope, conditioning=None, mask=None):
        x_block, context_block = self.x_block, self.context_block
        (shift, scale, gate), mlp, (shift2, scale2, gate2) = x_block.modulations(conditioning)
        (c_shift, c_scale, c_gate), c_mlp, _ = context_block.modulations(conditioning)
        x_norm, c_norm = x_block.norm1(x), context_block.norm1(context)  # (B, L, width), (B, M, width)
        x_qkv = x_block.attn(modulate(x_norm, shift, scale), x_rope)  # three of (B, heads, L, head_dim)
        c_qkv = context_block.attn(modulate(c_norm, c_shift, c_scale), context_rope)  # with M in place of L
        q, k, v = (torch.cat(pair, 2) for pair in zip(c_qkv, x_qkv))  # (B, heads, M + L, head_dim)
        from_context, from_x = attend(q, k, v, mask).split([context.shape[1], x.shape[1]], 1)
        attention = gated(x_block.attn.proj(from_x), gate)  # (B, L, width)
        if x_block.dual:
            own = attend(*x_block.attn2(modulate(x_norm, shift2, scale2), x_rope))  # (B, L, width)
            attention = attention + gated(x_block.attn2.proj(own), gate2)
        x = x_block.residual_mlp(x + attention, *mlp)
        if context_block.pre_only:
            return x, None
        context = context + gated(context_block.attn.proj(from_context), c_gate)  # (B, M, width)
        return x, context_block.residual_mlp(context, *c_mlp)


class MMDiT(nn.Module):
    """A stack of joint blocks, the first `dual_depth` with attn2 (SD3.5-Medium: 13 of 24).
    adaln: a conditioning vector modulates them. context_pre_only: the last gives no context back (SD3.5)."""

    def __init__(self, depth, width, heads, dual_depth=0, adaln=False, context_pre_only=False):
        super().__init__()
        last = depth - 1 if context_pre_only else None
        blocks = (JointBlock(width, heads, adaln, i < dual_depth, i == last) for i in range(depth))
        self.joint_blocks = nn.ModuleList(blocks)
        self.checkpoint_activations = False  # True: the backward pass recomputes the blocks
        self.apply(_init_linear)
        if adaln:  # AdaLN-zero (DiT, Peebles and Xie 2023): every block starts as the identity
            for name, parameter in self.named_parameters():
                if "adaLN_modulation" in name:
                    nn.init.zeros_(parameter)

    def forward(self, x, context, x_rope, context_rope, conditioning=None, mask=None):
        """x (B, L, width), context (B, M, width), x_rope (2, L, head_dim), context_rope (2, M, head_dim),
        conditioning (B, width), mask (M + L, M + L) -> (x, context), or (x, None) if context_pre_only."""
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.joint_blocks:
            inputs = x, context, x_rope, context_rope, conditioning, mask
            x, context = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x, context


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Latents (B, channels, H, W) of any float type -> projected patches (B, H/p * W/p, width)."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Flow time t (B,) in [0, 1] -> (B, width): 256 sinusoids of 1000 t, as in SD3.5, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.mlp.apply(_init_linear)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = 1000 * t.float()[:, None] * torch.exp(steps * (-math.log(10000) / 128))  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], -1)  # (B, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Patches (B, h w, width), conditioning (B, width), grid (h, w) -> (B, channels, h p, w p), as in DiT."""

    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.patch = patch
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, -1)
        patches = self.linear(modulate(self.norm_final(x), shift, scale))  # (B, h w, p p c)
        patches = patches.unflatten(-1, (self.patch, self.patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, c)
        patches = patches.permute(0, 5, 1, 3, 2, 4)  # (B, c, h, p, w, p)
        return patches.flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------------------------------- reading weights


class UserError(Exception):
    """One sentence for the person at the keyboard: what was found, what was expected, what to do."""

    def __str__(self) -> str:  # in one line of readable length, whatever names of files or typed words hold
        text = super().__str__()
        if "Original Traceback" in text:  # from a loader's worker: the last line is the message
            text = re.sub(r"^\w+\.UserError: ", "", text.strip().splitlines()[-1])
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        text = re.sub(r"(\S{100})\S{156,}", r"\1...", text)  # a name of a file has up to 255 characters
        return text if len(text) <= 2000 else f"{text[:1000]} ... {text[-500:]}"


_KINDS = {  # part of a key -> the kind of file that has such keys; the first match counts
    "encoder.joint_blocks.": "a SemTok tokenizer", "final_modulation.": "a SemTok transformer",
    "input_blocks.": "a Stable Diffusion 1, 2 or XL U-Net",
    "_blocks.0.attentions.": "a diffusers U-Net (Stable Diffusion 1, 2 or XL)",
    "single_": "a FLUX transformer", "_blocks.37.": "SD3.5-Large", ".attn2.": "SD3.5-Medium",
    "context_embedder.": "SD3-Medium (no second attention)",
    "class_embedding": "a CLIP vision model", "patch_embedding": "a SigLIP vision model",
    "token_embedding": "a text model without a vision tower", "coder.conv_in.": "an image autoencoder (VAE)",
}

_DISGUISES = {  # how a file begins that is no safetensors file -> what it is, and what to do
    rb"\s*<": "an HTML page, of a login or an error; download it again with your access token",
    rb"version https://git-lfs": "a git-lfs pointer; fetch the file itself with git lfs pull",
    rb"PK|\x80": "a pickled PyTorch file; the safetensors file of the same model is needed",
}


class TensorFiles:
    """The tensors of a safetensors file, or of a folder of them. Only `get` reads values. Raises UserError.
    path: a file, a folder, or a folder with a subfolder `part`. prefix: how the names of the model begin in a
    file of several models. shapes: name without prefix -> shape. file_of: full name -> file."""

    def __init__(self, path: str, part: str = "", prefix: str = ""):
        path = Path(path, part) if os.path.isdir(Path(path, part)) else Path(path)
        files = sorted(path.glob("*.safetensors")) if os.path.isdir(path) else [path]
        if not files:
            raise UserError(f"{path} holds no .safetensors file: give the file, or the folder that holds it")
        self.path, self.metadata, self.file_of, shapes = path, {}, {}, {}
        for file in files:
            with self.opened(file) as handle:
                self.metadata = self.metadata or handle.metadata() or {}
                for name in sorted(handle.keys()):
                    if name in shapes:  # two models, or two copies of one
                        raise UserError(f"{file} and {self.file_of[name]} both hold {name}: give one of them")
                    shapes[name], self.file_of[name] = tuple(handle.get_slice(name).get_shape()), file
        self.prefix = prefix = prefix if any(name.startswith(prefix) for name in shapes) else ""
        self.shapes = {name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)}

    @contextlib.contextmanager
    def opened(self, file: Path) -> Iterator:
        """The open file. Raises UserError when it is missing, damaged or something else in disguise."""
        if not (os.path.isfile(file) and os.access(file, os.R_OK)):
            raise UserError(f"{file} does not exist or may not be read: give a .safetensors file")
        try:
            with safe_open(file, "pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            with open(file, "rb") as content:
                start = content.read(256)
            damage = f"{os.path.getsize(file):,} bytes, truncated or damaged ({error}); download it again"
            what = next((text for pattern, text in _DISGUISES.items() if re.match(pattern, start)), damage)
            raise UserError(f"{file} is no complete safetensors file: it is {what}") from None

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. The file is closed again: while open, it keeps in memory what was read."""
        name = self.prefix + name
        with self.opened(self.file_of[name]) as handle:
            tensor = handle.get_tensor(name)
        if tensor.is_complex() or tensor.element_size() < 2:
            raise UserError(f"{self.path} has {tensor.dtype} in {name}: 16 to 64 bit numbers are needed")
        return tensor

    def unlike(self, expected: str, reason: str) -> UserError:
        """The error for a file of another kind: what it looks like, what is needed, and the reason."""
        kinds = [kind for part, kind in _KINDS.items() if any(part in key for key in self.file_of)]
        unknown = f"an unknown file (keys such as {', '.join(sorted(self.file_of)[:3]) or 'none at all'})"
        return UserError(f"{self.path} looks like {[*kinds, unknown][0]}, and {expected} is needed: {reason}")

    @contextlib.contextmanager
    def building(self, expected: str) -> Iterator[None]:
        """Build a model inside it, by sizes that the file gives, on the meta device. Any error becomes a
        UserError."""
        try:
            with torch.device("meta"):
                yield
        except Exception as error:
            reason = f"it lacks {self.prefix}{error.args[0]}" if type(error) is KeyError else str(error)
            raise self.unlike(expected, reason) from None


def from_keys(*keys: str, make: Callable[..., torch.Tensor] = lambda tensor: tensor) -> tuple:
    """How `load_tensors` makes one tensor: by `make`, of the tensors that have these keys in the file."""
    return keys, make


def load_tensors(module, source: TensorFiles, mapping: dict, expected: str, unused=r"^$", device="cpu"):
    """Fill a module, best built on the meta device, from a file, tensor by tensor; returns it on `device`.
    mapping: name in the module -> `from_keys(...)`; other names keep their initialisation. unused: a pattern
    of keys to pass over. Raises UserError naming all missing, unexpected and misshapen keys."""
    targets = module.state_dict()
    used = {key for keys, _ in mapping.values() for key in keys}
    missing, misshapen = used - source.shapes.keys(), set()
    unexpected = {key for key in source.shapes.keys() - used if not re.match(unused, key)}
    for name, (keys, make) in mapping.items():  # shapes alone: nothing is read before all of it fits
        if missing.isdisjoint(keys):
            shape = None
            with contextlib.suppress(Exception):  # the parts may not even fit each other
                shape = make(*(torch.empty(source.shapes[key], device="meta") for key in keys)).shape
            if shape != targets[name].shape:
                parts = f" {source.prefix}".join(f"{key} {source.shapes[key]}" for key in keys)
                misshapen.add(f"{parts} for {name} {tuple(targets[name].shape)}")
    faults = []
    for fault, keys in (("lacks", missing), ("has unexpected", unexpected), ("has misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            faults.append(f"it {fault} {', '.join(source.prefix + key for key in sorted(keys)[:8])}{more}")
    if faults:
        raise source.unlike(expected, "; ".join(faults))
    tensors = {}
    for name, (keys, make) in mapping.items():  # each a copy: a view would keep the file in memory
        tensors[name] = make(*map(source.get, keys)).to(device, targets[name].dtype, copy=True)
    module.load_state_dict(tensors, strict=False, assign=True)
    return module.to(device)


def config_from(config_class: type, entries):
    """A dataclass of sizes out of a JSON table. A missing size takes its default: files outlive a new field.
    ValueError for an unknown name, a wrong type or value; TypeError and others for what is no table."""
    hints, values = typing.get_type_hints(config_class), dict(entries)
    for name, value in entries.items():
        if name not in hints:
            raise ValueError(f"this version knows no size {name!r:.40}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = config_from(hint, value)
        elif hint == tuple[int, ...] and type(value) is list and {*map(type, value)} == {int}:
            values[name] = tuple(value)
        elif type(value) is not hint and value not in typing.get_args(hint):
            raise ValueError(f"its {name} cannot be {value!r:.40}")
    return config_class(**values)


def load_checkpoint(path: str, kind: str, config_class: type, model_class: type, device):
    """A model of train.py, built by the sizes that its own file gives, and the file's metadata.
    kind: the metadata's `format`. Raises UserError for any other file."""
    source, expected = TensorFiles(path), f"a {kind}, which python train.py makes,"
    with source.building(expected):
        if source.metadata.get("format") != kind:
            raise ValueError(f"its format is {source.metadata.get('format')}")
        texts = {name: source.metadata[name] for name in ("config", "classes", "fingerprint", "parent")}
        config, classes = config_from(config_class, json.loads(texts["config"])), json.loads(texts["classes"])
        count = getattr(config, "classes", len(classes))  # a tokenizer may have any number
        if type(classes) is not list or {*map(type, classes)} - {str} or len(classes) != count:
            raise ValueError(f"its classes are no list of {count} names")
        model = model_class(config)
    mapping = {name: from_keys(name) for name in model.state_dict()}
    return load_tensors(model, source, mapping, expected, device=device), source.metadata


def renamed(name: str, words: dict[str, str]) -> str:
    """A key of one layout in the words of another, replaced in the table's order."""
    for old, new in words.items():
        name = name.replace(old, new)
    return name


# --------------------------------------------------------------------------------------------- SD3.5-Medium

_DIFFUSERS_WORDS = {  # the single file's words -> diffusers'; * stands for q, k and v
    "x_embedder.": "pos_embed.", "t_embedder.mlp.": "time_text_embed.timestep_embedder.linear_",
    "y_embedder.mlp.": "time_text_embed.text_embedder.linear_", ".linear_0.": ".linear_1.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.", "final_layer.linear.": "proj_out.",
    "joint_blocks.": "transformer_blocks.", "context_block.adaLN_modulation.1.": "norm1_context.linear.",
    "context_block.attn.qkv.": "attn.add_*_proj.", "context_block.attn.ln_": "attn.norm_added_",
    "context_block.attn.proj.": "attn.to_add_out.", "context_block.mlp.": "ff_context.",
    "x_block.adaLN_modulation.1.": "norm1.linear.", "x_block.mlp.": "ff.", "x_block.attn": "attn",
    ".fc1.": ".net.0.proj.", ".fc2.": ".net.2.", ".qkv.": ".to_*.", ".ln_": ".norm_",
    "attn.proj.": "attn.to_out.0.", "attn2.proj.": "attn2.to_out.0.",
}


def _from_diffusers(name: str, last: int) -> tuple:
    name = renamed(name, _DIFFUSERS_WORDS)
    if "*" in name:
        return from_keys(*(name.replace("*", part) for part in "qkv"), make=lambda *parts: torch.cat(parts))
    if name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):  # (scale, shift) there
        return from_keys(name, make=lambda tensor: torch.cat(tensor.chunk(2)[::-1]))
    return from_keys(name)


def load_sd35(decoder: nn.Module, path: str, device: str | torch.device = "cpu") -> nn.Module:
    """Start a decoder from SD3.5-Medium: its single file, or a diffusers `transformer/` folder.
    SD3.5 predicts eps - x_v and Eq. 5 needs x_v - eps, so the last linear layer is negated. SemTok has no
    pooled text, so the embedder of it (5.5M parameters) goes: its output for zeros joins the last bias of the
    timestep embedder. What SD3.5 lacks keeps its initialisation. Raises UserError for any other file."""
    source = TensorFiles(path, "transformer", "model.diffusion_model.")
    diffusers = any(key.startswith("transformer_blocks.") for key in source.shapes)
    last = len(decoder.joint_blocks) - 1
    published = (lambda name: _from_diffusers(name, last)) if diffusers else from_keys  # by our own names

    def folded(*tensors):
        bias, bias0, weight2, bias2 = (tensor.double() for tensor in tensors)  # float32 sums differ by CPU
        return bias + weight2 @ F.silu(bias0) + bias2

    pretrained = ("x_embedder.", "t_embedder.", "joint_blocks.", "final_layer.")
    mapping = {name: published(name) for name in decoder.state_dict() if name.startswith(pretrained)}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        mapping[name] = from_keys(*published(name)[0], make=torch.neg)
    text = ("y_embedder.mlp.0.bias", "y_embedder.mlp.2.weight", "y_embedder.mlp.2.bias")
    keys = [published(name)[0][0] for name in ("t_embedder.mlp.2.bias", *text)]
    mapping["t_embedder.mlp.2.bias"] = from_keys(*keys, make=folded)
    # Not needed: positions (there is RoPE), the embedder of text, and the weight that would only see zeros
    unused = r"pos_embed|context_embedder|model_sampling|.*(y_embedder.mlp.0|text_embedder.linear_1).weight"
    expected = "SD3.5-Medium (sd3.5_medium.safetensors or its transformer folder)"
    return load_tensors(decoder, source, mapping, expected, unused, device)
