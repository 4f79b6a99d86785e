"""The masked autoregressive transformer on SemTok's tokens: class -> bits, in a few bidirectional steps.

    bits (B, K, d) --Linear, or mask embedding--> (B, K, width) --.      .--> next step: a few more bits known
    label (B,) --embedding--> class token (B, 1, width) ---------- blocks --> logits (B, K, d, 2) --> bits
                        '---- one shared AdaLN ---------------------'

SemTok section 3.3, Eq. 8, appendix A.2, Table 9. LlamaGen blocks (RMSNorm, SwiGLU, RoPE; Sun et al. 2024)
without the causal mask, with qk-norm. The infinite-vocabulary classifier (Han et al. 2025) makes a two-way
choice per bit. It needs bsq.py and mmdit.py beside it.

    import torch
    from ar import AR_PRESETS, MaskedAR
    model = MaskedAR(AR_PRESETS["tiny"])
    bits = model.generate(torch.tensor([1, 1, 7]), steps=8, cfg=3.0)   # (3, tokens, bits) bool
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bsq import bits_to_codes, bits_to_index, index_to_bits, ranks
from mmdit import RotaryTable, attend, load_checkpoint, modulate, normed_rotated, rope_1d


@dataclass(frozen=True)
class ARConfig:
    """Sizes, by default of SemTok-AR-L on ImageNet with 2^18 codes. ValueError for what cannot be."""
    depth: int = 24
    width: int = 1024
    heads: int = 16
    group_bits: int = 1  # bits decided by one softmax: 1 is bitwise; 9 is Table 13's "2 groups" of 18
    guidance: float = 6.0  # with the linear schedule; L's, XL's and XXL's: best in appendix A.2
    classes: int = 1000
    tokens: int = 256  # K
    bits: int = 18  # d, bits of a token
    spherical: bool = True  # the tokens' codes: +-1/sqrt(d) (BSQ) or +-1 (LFQ)
    causal: bool = False  # Table 5's "raster": next-token prediction from left to right in place of masks

    def __post_init__(self):
        for name in ("depth", "width", "heads", "classes", "tokens", "bits"):
            value, most = getattr(self, name), {"depth": 100, "classes": 10**6}.get(name, 8192)
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}, not {value}")
        if self.width % (2 * self.heads):
            raise ValueError(f"heads {self.heads}, doubled, must divide the width {self.width}")
        if not 1 <= self.group_bits <= 12 or self.bits % self.group_bits:
            raise ValueError(f"group_bits {self.group_bits} must divide the {self.bits} bits, at most 12")
        if not 0 <= self.guidance <= 1000:
            raise ValueError(f"guidance {self.guidance} is not between 0 and 1000")

    @property
    def steps(self) -> int:
        """Sampling steps by default: 64, at most one a token; one a token in next-token prediction."""
        return self.tokens if self.causal else min(64, self.tokens)


AR_PRESETS = {
    "L": ARConfig(),
    "XL": ARConfig(depth=36, width=1280, heads=20, guidance=5.3),
    "XXL": ARConfig(depth=24, width=2048, heads=32, guidance=4.9),
    "base": ARConfig(depth=14, width=768, heads=12, tokens=128),
    "tiny": ARConfig(depth=4, width=128, heads=2, tokens=16, bits=24, classes=10, guidance=9.0),
}


class Attention(nn.Module):
    """Self-attention with RMS qk-norm and RoPE (2, L, head_dim): (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = normed_rotated(self.wqkv(x), self.heads, self.q_norm, self.k_norm, rope)
        return self.wo(attend(q, k, v, causal=self.causal))


class SwiGLU(nn.Module):
    """LlamaGen's feed-forward: w2(silu(w1 x) * w3 x), (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int):
        super().__init__()
        multiple = 256 if width >= 512 else 32  # 8/3 widths inside, rounded up
        hidden = math.ceil(8 * width / 3 / multiple) * multiple
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x (B, L, width) -> the same. Its AdaLN is the shared (B, 6, width) plus a table of its own."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = SwiGLU(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table)[:, :, None].unbind(1)
        x = torch.addcmul(x, self.attention(modulate(self.attention_norm(x), shift1, scale1), rope), gate1)
        return torch.addcmul(x, self.feed_forward(modulate(self.ffn_norm(x), shift2, scale2)), gate2)


class MaskedAR(nn.Module):
    """theta of Eq. 8: known tokens and a mask -> the distribution of every bit of every token.
    With config.causal it is Table 5's next-token transformer: its input is the class, then tokens 0 to K - 2,
    and position i predicts token i. It ignores the mask."""

    def __init__(self, config: ARConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.token_embedding = nn.Linear(config.bits, width)
        if not config.causal:
            self.mask_embedding = nn.Parameter(torch.randn(width, device="cpu") * 0.02)
        self.class_embedding = nn.Embedding(config.classes + 1, width)  # the last is guidance's null class
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))  # shared by all blocks
        self.blocks = nn.ModuleList(Block(width, config.heads, config.causal) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, config.bits // config.group_bits * 2**config.group_bits)
        self.rope = RotaryTable(rope_1d(config.tokens + 1, width // config.heads))
        self.checkpoint_activations = False
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for layer in (self.modulation, self.final_modulation, self.head):  # AdaLN-zero; even odds
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def hidden(self, bits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """bits (B, K, d), labels (B,) with `classes` for none, masked (B, K) -> features (B, K, width)."""
        codes = bits_to_codes(bits, self.config.spherical).to(self.token_embedding.weight.dtype)
        if self.config.causal:
            x = self.token_embedding(codes[:, :-1])  # the last token predicts nothing
        else:
            tokens, mask = self.token_embedding(codes), self.mask_embedding.to(codes.dtype)
            x = torch.where(masked[..., None], mask, tokens)
        class_token = self.class_embedding(labels)  # (B, width)
        x = torch.cat([class_token[:, None].to(x.dtype), x], 1)  # (B, 1 + K, width), causal (B, K, width)
        rope = self.rope.table[:, : x.shape[1]]
        modulation = self.modulation(class_token).unflatten(-1, (6, -1))
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, rope, use_reentrant=False)
            else:
                x = block(x, modulation, rope)
        shift, scale = self.final_modulation(class_token)[:, None].chunk(2, -1)
        return modulate(self.norm(x if self.config.causal else x[:, 1:]), shift, scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Features (..., width) -> float32 logits (..., d / g, 2^g), g = `group_bits`: two per bit for 1."""
        return self.head(hidden).float().unflatten(-1, (-1, 2**self.config.group_bits))

    def forward(self, bits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """bits (B, K, d), labels (B,), masked (B, K) bool -> logits (B, K, d / g, 2^g)."""
        return self.logits(self.hidden(bits, labels, masked))

    @torch.no_grad()
    def hide(self, bits, labels, rng: torch.Generator, least_masked=0.7, class_dropout=0.1):
        """Section 3.3 and 4.1: which tokens a training step hides, and which pictures lose their class.
        bits (B, K, d), labels (B,): this rank's. Returns a row for each picture, the arguments of `loss`; and
        what all share, `masked_per_picture` (), the global batch's mean. All is drawn for the global batch
        and cut to this rank's rows: the number of ranks changes nothing."""
        rank, world = ranks()
        dropped = torch.rand(world * len(bits), generator=rng, device=bits.device) < class_dropout
        masked = self.draw_masks(world * len(bits), least_masked, rng)
        labels = labels.masked_fill(dropped.chunk(world)[rank], self.config.classes)
        rows = {"bits": bits, "labels": labels, "masked": masked.chunk(world)[rank]}
        return rows, {"masked_per_picture": masked.sum(1).float().mean()}

    def draw_masks(self, count: int, least: float, rng: torch.Generator) -> torch.Tensor:
        """Masks (count, K) that hide a share uniform in [least, 1], at least one token; if causal, all."""
        if self.config.causal:
            return torch.ones(count, self.config.tokens, dtype=torch.bool, device=rng.device)
        share = least + (1 - least) * torch.rand(count, 1, generator=rng, device=rng.device)
        keys = torch.rand(count, self.config.tokens, generator=rng, device=rng.device)
        places = keys.argsort(-1).argsort(-1)  # of each token in a random order
        return places < (share * self.config.tokens).ceil().clamp_min(1)

    def loss(self, bits, labels, masked, masked_per_picture: torch.Tensor, smoothing: float = 0.01) -> dict:
        """Eq. 8's likelihood on the results of `hide`: cross-entropy of MASKED tokens, in nats a bit.
        Returns `loss` with label smoothing, `nll` without it, and `accuracy` on masked groups of bits. All
        micro-batches divide by the batch's mean, so averaging their losses gives the batch's loss."""
        logits = self(bits, labels, masked)
        targets = bits_to_index(bits.unflatten(-1, (-1, self.config.group_bits)))  # (B, K, d / g)
        weight = masked[..., None].float()
        divisor = len(bits) * masked_per_picture * targets.shape[-1]  # groups of bits that are masked

        def mean(values):
            return (values.view_as(targets) * weight).sum() / divisor

        flat = logits.flatten(0, -2), targets.flatten()
        smooth = F.cross_entropy(*flat, reduction="none", label_smoothing=smoothing)
        plain = F.cross_entropy(*flat, reduction="none").detach()
        loss, nll = (mean(values) / self.config.group_bits for values in (smooth, plain))
        return {"loss": loss, "nll": nll, "accuracy": mean((logits.argmax(-1) == targets).float())}

    @torch.no_grad()
    def generate_steps(
        self, labels: torch.Tensor, steps: int | None = None, cfg: float = 1.0, cfg_schedule: str = "linear",
        top_p: float = 0.75, order: str = "random", generator: torch.Generator | None = None,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Eq. 8: fill K masked tokens in steps; after each, yields bits (B, K, d), masked (B, K), both bool.
        labels (B,) int64. cfg, cfg_schedule: see `guidance`. top_p: see `sample_groups`. order: "random";
        "raster" (Figure 5), from left to right; or "confidence" (Table 14): the tokens whose drawn bits are
        surest. A causal model always fills one token a step from left to right. known: (bits, masked) to
        start from, for inpainting, with as many masked tokens in each row. A causal model takes K steps, no
        "confidence" and nothing known. ValueError for what cannot be.
        """
        config, device, confident = self.config, labels.device, order == "confidence"
        steps = config.steps if steps is None else steps
        if order not in ("random", "raster", "confidence"):
            raise ValueError(f"order {order!r} is none of random, raster and confidence")
        if config.causal and (steps != config.tokens or confident or known):
            raise ValueError(f"a next-token model draws all {config.tokens} tokens, one a step, in order")
        bits = torch.zeros(len(labels), config.tokens, config.bits, dtype=torch.bool, device=device)
        masked, left = torch.ones_like(bits[..., 0]), config.tokens  # left: tokens to draw
        if known:
            (bits, masked), left = known, int(known[1][0].sum())
            if (masked.sum(1) != left).any():
                raise ValueError(f"as many tokens must be masked in each row, not {masked.sum(1).tolist()}")
        everywhere = torch.arange(config.tokens, device=device).expand_as(masked)
        keys = everywhere / config.tokens  # a token's turn, below 1
        if not config.causal and order != "raster":
            keys = torch.rand(masked.shape, generator=generator, device=device)
        sequence = (keys + ~masked).argsort(-1)  # a known token's key is 1 or more: never reached
        counts = [1] * left if config.causal else fill_counts(left, steps)

        passes = 1 if cfg == 1 else 2  # with the class; guided, also without
        conditions = torch.cat([labels, torch.full_like(labels, config.classes)][:passes])
        rows, filled = torch.arange(len(labels), device=device)[:, None], 0
        for count in counts:
            filled += count
            seen = bits[:, :filled] if config.causal else bits  # a causal model ignores later tokens
            hidden = self.hidden(seen.repeat(passes, 1, 1), conditions, masked.repeat(passes, 1))
            places = everywhere if confident else sequence[:, filled - count : filled]
            with_class, *rest = (self.logits(part[rows, places]) for part in hidden.chunk(passes))
            without = rest[0] if rest else with_class
            scale = guidance(cfg, (config.tokens - left + filled) / config.tokens, cfg_schedule)
            logits = without + scale * (with_class - without)  # (B, places, d / g, 2^g)
            drawn, confidence = sample_groups(logits, top_p, generator)  # (B, places, d / g), (B, places)
            drawn = index_to_bits(drawn, config.group_bits).flatten(-2)
            if confident:
                places = confidence.masked_fill(~masked, -math.inf).topk(count, -1).indices
                drawn = drawn[rows, places]
            bits, masked = bits.clone(), masked.clone()  # do not change what was yielded
            bits[rows, places], masked[rows, places] = drawn, False
            yield bits, masked

    def generate(self, labels: torch.Tensor, **options) -> torch.Tensor:
        """The last bits (B, K, d) of `generate_steps`."""
        for bits, _ in self.generate_steps(labels, **options):
            pass
        return bits


def fill_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens each step fills: after step n of N, floor(K cos(pi/2 n/N)) stay masked (MaskGIT).
    Every step fills at least one, so there are never more than K steps."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    counts, left = [], tokens
    for n in range(1, steps + 1):
        stay = math.floor(tokens * math.cos(math.pi / 2 * n / steps)) if n < steps else 0
        if left:
            counts.append(min(left, max(1, left - stay)))
            left -= counts[-1]
    return counts


def guidance(scale: float, share: float, schedule: str) -> float:
    """The guidance scale when this share of the tokens is predicted, this step's counted."""
    return {"linear": 1 + (scale - 1) * share, "constant": scale}[schedule]


def sample_groups(logits: torch.Tensor, top_p: float, generator: torch.Generator | None = None):
    """Nucleus sampling for each group of bits, logits (..., groups, V): the likeliest values are kept until
    their probability reaches top_p, and one of them is drawn. Of one bit the likelier value is taken if its
    probability reaches top_p; else 0 or 1 by their probabilities. Returns values (..., groups) int64 and
    their log probability without this filter, summed over groups (...)."""
    probabilities, values = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities  # the mass of all likelier values
    kept = torch.where(before < top_p, probabilities, 0.0)
    kept[..., 0] = probabilities[..., 0]  # for top_p = 0
    edges = kept.cumsum(-1)
    draw = torch.rand(edges.shape[:-1] + (1,), generator=generator, device=logits.device) * edges[..., -1:]
    choice = (draw >= edges).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    chosen = probabilities.gather(-1, choice).clamp_min(1e-30).log()
    return values.gather(-1, choice)[..., 0], chosen[..., 0].sum(-1)


def load_ar(path: str, device: str | torch.device = "cpu") -> tuple[MaskedAR, dict[str, str]]:
    """A transformer from train.py's `ar.safetensors`, and its metadata. Raises UserError."""
    return load_checkpoint(path, "semtok-ar", ARConfig, MaskedAR, device)
