"""MMDiT and MMDiT-X transformers with rotary positions, and the weights of Stable Diffusion 3.5 Medium.

SemTok section 3.1 and appendix A.1; Esser et al., "Scaling Rectified Flow Transformers" (2024); the module names are
those of SD3.5's published files, so that a state dict reads like one. This file needs torch and safetensors alone.

    import torch
    from mmdit import MMDiT, rope_1d, rope_2d
    net = MMDiT(depth=2, width=128, heads=2, dual_depth=1, adaln=True)         # the small twin of SD3.5-Medium
    image, tokens, time = torch.randn(1, 64, 128), torch.randn(1, 16, 128), torch.randn(1, 128)
    image, _ = net(image, tokens, rope_2d(8, 8, 64), rope_1d(16, 64), time)    # (1, 64, 128)
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------ rotary positions


def _angles(length: int, count: int, theta: float) -> torch.Tensor:
    # Device and type are named: a model built on the meta device still has real tables, one built in bfloat16 exact ones.
    steps, positions = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (count, length))
    return positions[:, None] * theta ** (-steps / count)  # (length, count)


def _table(angles: torch.Tensor) -> torch.Tensor:
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rope_1d(length: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Rotations of positions 0..length-1 (RoFormer, Su et al. 2021): a table (2, length, head_dim) for `apply_rope`."""
    return _table(_angles(length, head_dim // 2, theta))


def rope_2d(height: int, width: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Rotations on a grid, half of each head by row and half by column: a table (2, height * width, head_dim), tokens row
    by row. head_dim must divide by 4."""
    rows = _angles(height, head_dim // 4, theta)[:, None].expand(-1, width, -1)  # (height, width, head_dim/4)
    columns = _angles(width, head_dim // 4, theta)[None].expand(height, -1, -1)
    return _table(torch.cat([rows, columns], -1).flatten(0, 1))


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate x (..., L, head_dim) by rope (2, L, head_dim): channel i turns with channel i + head_dim/2."""
    cos, sin = rope.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryTable(nn.Module):
    """Holds a `table` of `rope_1d` or `rope_2d` that moves with its model and stays float32 whatever the model is cast to:
    bfloat16's 8 bits of cosine and sine would make every rotation a slightly different one. Not part of the state dict."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .bfloat16() and their like all come down to
        self.table = self.table.to(fn(self.table).device)
        return self


def normed_rotated(qkv: torch.Tensor, heads: int, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm, rope: torch.Tensor):
    """qkv (B, L, 3 width) -> q, k, v, each (B, heads, L, head_dim): q and k RMS-normalised per head, then rotated.

    The two go through as one tensor: at small sizes the number of operations is what takes the time.
    """
    qk, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).split([2, 1])
    weight = torch.stack([q_norm.weight, k_norm.weight])[:, None, None, None]
    qk = F.rms_norm(qk.float(), qk.shape[-1:], eps=q_norm.eps) * weight
    q, k = apply_rope(qk, rope).to(v.dtype)
    return q, k, v[0]


# -------------------------------------------------------------------------------------------------- one stream's half


class AttentionWeights(nn.Module):
    """One stream's projections in an attention: qkv, RMS qk-norm per head and, unless `pre_only`, the way out."""

    def __init__(self, width: int, heads: int, pre_only: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.ln_k = nn.RMSNorm(width // heads, eps=1e-6)
        if not pre_only:
            self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, L, width) -> q, k, v, each (B, heads, L, head_dim), q and k normalised, then rotated."""
        return normed_rotated(self.qkv(x), self.heads, self.ln_q, self.ln_k, rope)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """Softmax attention over (B, heads, L, head_dim), heads merged on the way out: (B, L, width).

    mask: (L, L) bool, True where a row may look at a column. causal: every place sees itself and those before.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """fc1, GELU (tanh form), fc2, four times as wide inside; `hidden` overrides that width."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden or 4 * width)
        self.fc2 = nn.Linear(hidden or 4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) -> (B, L, width)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    """AdaLN's x (1 + scale) + shift on x (B, L, width) with shift and scale (B, 1, width); x when there is none."""
    return x if scale is None else torch.addcmul(shift, x, 1 + scale)


def gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """AdaLN's gate (B, 1, width) on a branch x (B, L, width); x when there is none."""
    return x if gate is None else x * gate


class StreamBlock(nn.Module):
    """One stream's half of a joint block: norms, attention weights, MLP and, with `adaln`, its modulation.

    `dual` adds attn2, the attention of the stream on itself of MMDiT-X. `pre_only` is a last context block: it
    gives keys and values, and nothing leaves it.
    """

    def __init__(self, width: int, heads: int, adaln: bool, dual: bool = False, pre_only: bool = False):
        super().__init__()
        self.chunks, self.pre_only = 2 if pre_only else 9 if dual else 6, pre_only
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = AttentionWeights(width, heads, pre_only)
        if dual:
            self.attn2 = AttentionWeights(width, heads)
        if not pre_only:
            self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.mlp = FeedForward(width)
        if adaln:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))
        self.adaln, self.dual = adaln, dual

    def modulation(self, conditioning: torch.Tensor | None) -> list[torch.Tensor | None]:
        """conditioning (B, width) -> shift, scale, gate of the attention, the same of the MLP, the same of attn2."""
        if not self.adaln:
            return [None] * self.chunks
        return list(self.adaLN_modulation(conditioning)[:, None].chunk(self.chunks, -1))

    def finish(self, x: torch.Tensor, attention: torch.Tensor, m: list[torch.Tensor | None]) -> torch.Tensor:
        """x (B, L, width) and what the attentions found -> x after the residual MLP."""
        x = x + attention
        return x + gated(self.mlp(modulate(self.norm2(x), m[3], m[4])), m[5])


class JointBlock(nn.Module):
    """Two streams that attend to each other, each with its own weights and its own rotation (MMDiT, MMDiT-X)."""

    def __init__(self, width: int, heads: int, adaln: bool, dual: bool = False, pre_only: bool = False):
        super().__init__()
        self.context_block = StreamBlock(width, heads, adaln, pre_only=pre_only)
        self.x_block = StreamBlock(width, heads, adaln, dual=dual)

    def forward(self, x, context, x_rope, context_rope, conditioning=None, mask=None):
        """x (B, L, width), context (B, M, width), ropes, conditioning (B, width) or None, mask (M + L, M + L) of the
        joint attention or None -> the new (x, context), the latter None after a `pre_only` block."""
        x_block, context_block = self.x_block, self.context_block
        xm, cm = x_block.modulation(conditioning), context_block.modulation(conditioning)
        x_norm = x_block.norm1(x)
        x_qkv = x_block.attn(modulate(x_norm, xm[0], xm[1]), x_rope)
        c_qkv = context_block.attn(modulate(context_block.norm1(context), cm[0], cm[1]), context_rope)
        joint = attend(*(torch.cat(pair, 2) for pair in zip(c_qkv, x_qkv)), mask)  # (B, M + L, width)
        from_context, from_x = joint.split([context.shape[1], x.shape[1]], 1)

        attention = gated(x_block.attn.proj(from_x), xm[2])
        if x_block.dual:
            own = attend(*x_block.attn2(modulate(x_norm, xm[6], xm[7]), x_rope))
            attention = attention + gated(x_block.attn2.proj(own), xm[8])
        x = x_block.finish(x, attention, xm)
        if context_block.pre_only:  # nothing leaves it
            return x, None
        return x, context_block.finish(context, gated(context_block.attn.proj(from_context), cm[2]), cm)


class MMDiT(nn.Module):
    """A stack of joint blocks.

    depth, width, heads: sizes. dual_depth: how many first blocks have attn2 (SD3.5-Medium: 13 of 24). adaln: whether
    a conditioning vector modulates the blocks (the decoder's timestep; the encoder has none). context_pre_only: the
    last block's context only feeds the image (SD3.5). checkpoint_activations: recompute blocks in the backward pass.
    """

    def __init__(self, depth, width, heads, dual_depth=0, adaln=False, context_pre_only=False):
        super().__init__()
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, adaln, dual=i < dual_depth, pre_only=context_pre_only and i == depth - 1)
            for i in range(depth)
        )
        self.checkpoint_activations = False
        self.apply(_init_linear)
        if adaln:  # AdaLN-zero (DiT, Peebles and Xie 2023): from scratch, every block starts as the identity
            for block in self.joint_blocks:
                for stream in (block.x_block, block.context_block):
                    nn.init.zeros_(stream.adaLN_modulation[1].weight)

    def forward(self, x, context, x_rope, context_rope, conditioning=None, mask=None):
        """x (B, L, width), context (B, M, width), x_rope (2, L, head_dim), context_rope (2, M, head_dim), conditioning
        (B, width) or None, mask (M + L, M + L) bool of the joint attention or None -> (x, context) of the same shapes;
        with context_pre_only context is None."""
        for block in self.joint_blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, x_rope, context_rope, conditioning, mask, use_reentrant=False)
            else:
                x, context = block(x, context, x_rope, context_rope, conditioning, mask)
        return x, context


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------- what goes around the blocks


class PatchEmbed(nn.Module):
    """Cut latents into patches and project them: (B, channels, H, W) -> (B, H/p * W/p, width), row by row. Latents of any
    float type: they take the weights'."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Flow time t in [0, 1], (B,), -> (B, width): sinusoids of 1000 t, as SD3.5 was trained on, then a small MLP."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.mlp.apply(_init_linear)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """See the class."""
        half = self.frequencies // 2
        scales = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angles = 1000 * t.float()[:, None] * scales
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Image tokens -> latents: (B, h w, width) -> (B, channels, h p, w p), modulated by the conditioning (B, width)."""

    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.patch = patch
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        for layer in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """grid: (h, w), patches per side. See the class."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, -1)
        patches = self.linear(modulate(self.norm_final(x), shift, scale))
        patches = patches.unflatten(-1, (self.patch, self.patch, -1)).unflatten(1, grid)  # (B, h, w, p, q, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------- reading other people's weights


class UserError(Exception):
    """Something the person at the keyboard can mend: one sentence of what was found, what was expected, what to do."""


# What a file seems to be, by keys that only that kind has. Most telling first.
_KINDS = (
    (r"(weights|ema|adam)/.*", "a training state of SemTok"),
    (r"(encoder|decoder)\.joint_blocks\..*", "a SemTok tokenizer"),
    (r"(.*\.)?input_blocks\..*|.*label_emb\..*", "a Stable Diffusion 1, 2 or XL U-Net"),
    (r"down_blocks\.\d+\.attentions\..*", "a diffusers U-Net (Stable Diffusion 1, 2 or XL)"),
    (r"(.*\.)?(double_blocks|single_blocks|single_transformer_blocks)\..*", "a FLUX transformer"),
    (r"(model\.diffusion_model\.)?joint_blocks\.37\..*|transformer_blocks\.37\.attn\.add_q_proj\..*", "SD3.5-Large"),
    (r".*\.x_block\.attn2\..*|transformer_blocks\.\d+\.attn2\..*", "SD3.5-Medium"),
    (r".*joint_blocks\.\d+\..*|transformer_blocks\.\d+\.attn\.add_q_proj\..*", "SD3-Medium (no second attention)"),
    (r"(.*\.)?embeddings\.class_embedding", "a CLIP vision model"),
    (r"(vision_model\.)?embeddings\.patch_embedding\..*|(vision_model\.)?post_layernorm\..*", "a SigLIP vision model"),
    (r"(text_model\.)?embeddings\.token_embedding\..*|text_model\..*", "a text model without a vision tower"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid_block|mid)\..*", "an image autoencoder (VAE)"),
    (r"blocks\.\d+\.attention\.wqkv\..*|.*class_embedding\..*", "a SemTok AR checkpoint"),
    (r"layer1\.0\.conv1\.weight", "a ResNet"),
    (r"features\.\d+\.weight", "a VGG"),
    (r"Mixed_6d\..*", "an Inception network"),
)


def describe_keys(keys) -> str:
    """In a few words, what a state dict with these keys seems to be."""
    for pattern, name in _KINDS:
        if any(re.match(pattern, key) for key in keys):
            return name
    return f"an unknown file (keys such as {', '.join(sorted(keys)[:3]) or 'none at all'})"


def read_json(path: str) -> dict:
    """The table that a model's JSON file holds. Raises UserError for anything else, such as an HTML page."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except ValueError:  # what json and a wrong encoding raise
        entries = None
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not the JSON table that its name promises: download it again")
    return entries


class TensorFiles:
    """Tensors by name out of one safetensors file or a folder of shards, read one at a time and never held.

    `shapes`: name -> shape. `metadata`: of the first file. `get(name)` reads one tensor (CPU). Raises UserError
    for a path that is not there, a folder without safetensors or with two files of the same tensor, and files that are
    truncated or something else.
    """

    def __init__(self, path: str):
        if os.path.isdir(path):
            names = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
            for index in (n for n in sorted(os.listdir(path)) if n.endswith(".safetensors.index.json")):
                names = sorted(set(read_json(os.path.join(path, index)).get("weight_map", {}).values()))
            if not names:
                raise UserError(f"{path} holds no .safetensors file: give the file, or the folder that holds it")
            if len(names) > 1 and any("fp16" in n for n in names):  # a second copy in half precision
                names = [n for n in names if "fp16" not in n] or names
            files = [os.path.join(path, n) for n in names]
        else:
            files = [path]
        self.path, self.shapes, self._file_of, self.metadata = path, {}, {}, None
        for file in files:
            if not os.path.isfile(file):
                raise UserError(f"{file} does not exist: give a .safetensors file, or a folder that holds one")
            if not os.access(file, os.R_OK):
                raise UserError(f"{file} is there, and you have no permission to read it: change that, or give another file")
            try:
                with safe_open(file, "pt") as handle:
                    self.metadata = self.metadata or handle.metadata() or {}
                    for name in handle.keys():
                        if name in self.shapes:  # two models, or two copies of one: reading the last would be a guess
                            raise UserError(f"{file} and {self._file_of[name]} both hold {name}: give one of them")
                        self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                        self._file_of[name] = file
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is no complete safetensors file: {_what_instead(file, error)}") from None

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU. The file is opened for it alone, so that pages read before are given back."""
        with safe_open(self._file_of[name], "pt") as handle:
            return handle.get_tensor(name)


def _what_instead(path: str, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(256)
    size = f"{os.path.getsize(path):,} bytes"
    if start.lstrip()[:1] == b"<":
        return f"it is an HTML page ({size}), probably a login or error page; download it again with your access token"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the file itself with git lfs pull or a direct download"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it is a pickled PyTorch file; the safetensors file of the same model is needed"
    return f"it has {size} and looks truncated or damaged ({str(error).splitlines()[0]}); download it again"


class _Uninitialised(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" and (tensor := kwargs["tensor"]).is_meta:
            return tensor
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """`with blank():` new modules are shapes on the meta device, for `load_recipes` to fill. They are not initialised: without
    values that would change nothing, and PyTorch would import its Python kernels for it, which takes two seconds."""
    with torch.device("meta"), _Uninitialised():
        yield


# A target tensor: the source tensors it is made of, and how.
Recipe = tuple[tuple[str, ...], Callable[..., torch.Tensor]]


def only(*names: str, make: Callable[..., torch.Tensor] | None = None) -> Recipe:
    """The recipe for one target tensor: `make` of the named source tensors; by default the first one as it is."""
    return names, make or (lambda tensor, *_: tensor)


def load_recipes(
    module: nn.Module, source: TensorFiles, recipes: dict[str, Recipe], dropped: str, wanted: str, new: str = r"^$",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Fill a module's parameters, tensor by tensor, from a file with other names. Returns the module.

    recipes: parameter name -> `only(...)`. dropped: regular expression of source keys that are knowingly not used.
    new: regular expression of parameters that the file does not have and that keep their initialisation. wanted: what
    the file should be, for the message. Parameters on the meta device are made real on `device` one at a time, in the
    dtype they were declared with, so the peak is the module plus one tensor; what the file does not have follows them
    there. Raises UserError naming the missing, unexpected and misshapen keys: eight of each, and how many more there are.
    """
    found = f"{source.path} looks like {describe_keys(source.shapes)}"
    targets = module.state_dict()
    used = {name for names, _ in recipes.values() for name in names}
    missing = sorted(used - source.shapes.keys()) + sorted(
        n for n in targets if n not in recipes and not re.match(new, n)
    )
    unexpected = sorted(n for n in source.shapes if n not in used and not re.match(dropped, n))
    unexpected += sorted(n for n in recipes if n not in targets)
    misshapen, dot = [], torch.zeros((), dtype=torch.uint8)  # not on meta, whose first operation imports 70 MB of Python
    for name in recipes.keys() & targets.keys():  # the recipes are run on shapes alone first: nothing is half loaded
        sources, make = recipes[name]
        if source.shapes.keys() >= set(sources):
            try:
                shape = make(*(dot.expand(source.shapes[s]) for s in sources)).shape
            except (RuntimeError, IndexError, ValueError):  # parts that do not even fit each other
                shape = None
            if shape != targets[name].shape:
                parts = ", ".join(f"{s} {source.shapes[s]}" for s in sources)
                misshapen.append(f"{parts} for {name} {tuple(targets[name].shape)}")
    faults = (("lacks", missing), ("has unexpected", unexpected), ("has misshapen", sorted(misshapen)))
    if any(names for _, names in faults):
        told = "; it ".join(f"{kind} {_some(names)}" for kind, names in faults if names)
        raise UserError(f"{found}, and {wanted} is needed: it {told}")
    for name, (sources, make) in recipes.items():
        with torch.no_grad():
            value, target = make(*(source.get(s) for s in sources)), targets[name]
            if target.is_meta:
                owner, _, leaf = name.rpartition(".")
                real = value.to(device, target.dtype, copy=True)
                module.get_submodule(owner).load_state_dict({leaf: real}, strict=False, assign=True)
            else:
                target.copy_(value)
    was_meta = any(tensor.is_meta for tensor in targets.values())
    return module.to(device) if was_meta else module  # with what the file does not have: new parameters, RoPE tables


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --------------------------------------------------------------------------------------------------- SD3.5-Medium

_SINGLE_PREFIX = "model.diffusion_model."


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(weight.chunk(2)[::-1])  # diffusers keeps (scale, shift) where the single file has (shift, scale)


def _diffusers_names(name: str, last: int) -> Recipe:
    """The recipe that makes the single file's `name` (without prefix) out of a diffusers transformer folder."""
    stem, _, leaf = name.rpartition(".")
    plain = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    if stem in plain:
        return only(f"{plain[stem]}.{leaf}")
    if stem == "final_layer.adaLN_modulation.1":
        return only(f"norm_out.linear.{leaf}", make=_swap_halves)
    _, number, block, part = stem.split(".", 3)
    root, x = f"transformer_blocks.{number}.", block == "x_block"
    if part.endswith(".qkv"):
        kinds = [f"{part[:-4]}.to_{i}" for i in "qkv"] if x else [f"attn.add_{i}_proj" for i in "qkv"]
        return only(*(f"{root}{kind}.{leaf}" for kind in kinds), make=lambda *parts: torch.cat(parts))
    if part == "adaLN_modulation.1":
        swapped = not x and int(number) == last
        return only(f"{root}norm1{'' if x else '_context'}.linear.{leaf}", make=_swap_halves if swapped else None)
    if part.startswith("mlp."):
        return only(f"{root}ff{'' if x else '_context'}.{'net.0.proj' if part == 'mlp.fc1' else 'net.2'}.{leaf}")
    attention, _, role = part.partition(".")
    if x:
        role = {"proj": "to_out.0", "ln_q": "norm_q", "ln_k": "norm_k"}[role]
    else:
        role = {"proj": "to_add_out", "ln_q": "norm_added_q", "ln_k": "norm_added_k"}[role]
    return only(f"{root}{attention}.{role}.{leaf}")


def load_sd35(decoder: nn.Module, path: str, device: str | torch.device = "cpu") -> nn.Module:
    """Start a decoder from SD3.5-Medium: the single file `sd3.5_medium.safetensors`, or a diffusers `transformer/`.

    decoder: a module with `x_embedder`, `t_embedder`, `joint_blocks` and `final_layer` of this file. What it has beside
    them (token embedder, mask tokens) keeps its initialisation. Two things change on the way in: SD3.5 predicts
    eps - x_v and Eq. 5 wants x_v - eps, so the last linear layer is negated; and the pooled text that SemTok does not
    have is fed as zeros ONCE, its embedding added to the timestep embedder's last bias, which keeps the pretrained
    function exactly and drops 5.5M parameters. Raises UserError for any other file.
    """
    if os.path.isdir(os.path.join(path, "transformer")):
        path = os.path.join(path, "transformer")
    source = TensorFiles(path)
    single = any("joint_blocks." in key for key in source.shapes)
    prefix = _SINGLE_PREFIX if any(key.startswith(_SINGLE_PREFIX) for key in source.shapes) else ""
    last = len(decoder.joint_blocks) - 1

    def recipe(name: str) -> Recipe:
        return only(prefix + name) if single else _diffusers_names(name, last)

    kept = ("x_embedder.", "t_embedder.", "joint_blocks.", "final_layer.")
    recipes = {name: recipe(name) for name, _ in decoder.named_parameters() if name.startswith(kept)}
    for leaf in ("weight", "bias"):
        name = f"final_layer.linear.{leaf}"
        recipes[name] = only(*recipes[name][0], make=torch.neg)

    def folded_bias(bias, *y):  # y_embedder on the zero vector: its first weight sees only zeros
        _, bias0, weight2, bias2 = (tensor.float() for tensor in y)
        return bias.float() + weight2 @ F.silu(bias0) + bias2

    y_names = [f"y_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    bias = "t_embedder.mlp.2.bias"
    recipes[bias] = only(*recipes[bias][0], *(recipe(n)[0][0] for n in y_names), make=folded_bias)

    # Not used: the position tables (RoPE replaces them), the text embedder (a new Linear(d -> width) does), and what
    # else the single file carries: the VAE (see semtok.load_vae), text encoders, the sampler's tables.
    if single:
        dropped = rf"{re.escape(prefix)}(pos_embed|context_embedder\..*)$|(first_stage_model|text_encoders|model_sampling)\."
    else:
        dropped = r"(pos_embed\.pos_embed|context_embedder\..*)$"
    return load_recipes(
        decoder, source, recipes, dropped, "SD3.5-Medium (sd3.5_medium.safetensors or its transformer folder)",
        new=rf"^(?!({'|'.join(map(re.escape, kept))}))", device=device,
    )


# ----------------------------------------------------------------------- our own checkpoints, which describe themselves


def config_from(config_class: type, entries, path: str):
    """A dataclass of sizes out of a file's JSON table. Raises UserError unless names, types and values fit."""
    hints = typing.get_type_hints(config_class)
    try:
        if not isinstance(entries, dict) or entries.keys() != hints.keys():
            raise ValueError(f"a table of {', '.join(hints)} is needed")
        values = {}
        for name, hint in hints.items():
            value = entries[name]
            if dataclasses.is_dataclass(hint):
                value = config_from(hint, value, path)
            elif isinstance(value, list):
                value = tuple(value)
            elif value not in (typing.get_args(hint) or [value]) or type(value) is not (hint if isinstance(hint, type) else str):
                raise ValueError(f"{name} is {value!r}")
            values[name] = value
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} describes itself wrongly ({error}): make it again with train.py") from None


def load_checkpoint(
    path: str, kind: str, config_class: type, model_class: type, device: str | torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """A model of train.py in eval mode, built by the sizes in its own file, and the file's metadata.

    kind: the `format` that the metadata must name. Raises UserError for any other file.
    """
    source = TensorFiles(path)
    if source.metadata.get("format") != kind:
        found = source.metadata.get("format") or describe_keys(source.shapes)
        raise UserError(f"{path} looks like {found}, and a {kind} is needed: python train.py makes one")
    try:
        entries = json.loads(source.metadata.get("config", ""))
    except ValueError:
        entries = None
    with blank():
        model = model_class(config_from(config_class, entries, path))
    recipes = {name: only(name) for name in model.state_dict()}
    return load_recipes(model, source, recipes, r"^$", f"a {kind}", device=device).eval(), source.metadata
