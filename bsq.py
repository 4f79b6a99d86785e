"""Binary spherical quantisation (BSQ): a codebook of 2^d corners of the unit sphere that is never stored.

    z (..., d) --z/|z|--> u (..., d) --sign(u)/sqrt(d)--> codes (..., d) --> bits (..., d) --> index (...)
                             |        <-- gradient, unchanged --
                             '--> entropy_loss, Eq. 4: each token sure of its code, all together unsure

SemTok section 3.1, Eq. 3 and 4; Zhao et al., "Image and Video Tokenization with Binary Spherical
Quantization" (2024). `spherical=False` is LFQ (Yu et al. 2023; Table 10). This file needs torch alone.

    import torch
    from bsq import BSQ, bits_to_index, codes_to_bits
    quantizer = BSQ(bits=18)
    codes, u = quantizer(torch.randn(2, 256, 18))     # corners of the sphere
    loss = quantizer.entropy_loss(u)["entropy_loss"]  # Eq. 4, a negative number
    index = bits_to_index(codes_to_bits(codes))       # Eq. 3, (2, 256) int64
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def codes_to_bits(codes: torch.Tensor) -> torch.Tensor:
    """The bits of quantised vectors: 1 where a channel is positive. (..., d) float -> (..., d) bool."""
    return codes > 0


def bits_to_codes(bits: torch.Tensor, spherical: bool = True) -> torch.Tensor:
    """The quantised vectors of bits, +-1/sqrt(d) (LFQ: +-1). (..., d) bool or 0/1 -> (..., d) float32."""
    signs = bits.float() * 2 - 1
    return signs * bits.shape[-1] ** -0.5 if spherical else signs


def bits_to_index(bits: torch.Tensor) -> torch.Tensor:
    """Eq. 3: the FIRST channel is the LEAST significant bit. (..., d <= 63) -> (...) int64."""
    if bits.shape[-1] > 63:
        raise ValueError(f"codes of {bits.shape[-1]} bits have no number in int64: keep the bits themselves")
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def index_to_bits(index: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `bits_to_index`: (...) int64 -> (..., bits) bool."""
    return (index.long()[..., None] >> torch.arange(bits, device=index.device) & 1).bool()


def code_usage(bits: torch.Tensor) -> dict[str, float]:
    """The health of a codebook on bits (..., d).
    used: distinct codes, as a share of min(tokens, 2^d). imbalance: mean over bits of |share of ones - 0.5|.
    dead_bits: how many never change."""
    flat = bits.reshape(-1, bits.shape[-1])
    share = flat.float().mean(0)
    distinct = len(bits_to_index(flat).unique() if flat.shape[-1] <= 63 else flat.unique(dim=0))
    return {
        "used": distinct / min(len(flat), 2 ** flat.shape[-1]),
        "imbalance": (share - 0.5).abs().mean().item(),
        "dead_bits": int(((share == 0) | (share == 1)).sum()),
    }


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) without torch.distributed."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of equal shapes over all ranks, each of which must call this.
    Backward: the derivative by this rank's value counts as 1, not 1/ranks, as FSDP divides gradients by ranks
    once more. Exact where every rank's loss is the same function of the mean (Eq. 4)."""
    if ranks()[1] == 1:
        return value
    mean = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean)
    return mean / ranks()[1] + (value - value.detach())


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows (B, ...) of every rank, in the order of the ranks: (ranks * B, ...), without gradient."""
    if ranks()[1] == 1:
        return rows
    everyone = [torch.empty_like(rows) for _ in range(ranks()[1])]
    dist.all_gather(everyone, rows.contiguous())
    return torch.cat(everyone)


class BSQ(nn.Module):
    """The quantiser of Eq. 3 and its entropy loss, Eq. 4. It has no parameters.
    bits: d. group_size: how many bits share one joint distribution, a table of 2^group_size numbers, in the
    second entropy (BSQ at 18 bits: 1; FlowMo: 9). spherical: False is LFQ, here without its commitment loss.
    """

    def __init__(self, bits: int, group_size: int = 1, spherical: bool = True):
        super().__init__()
        if bits % group_size:
            raise ValueError(f"entropy groups of {group_size} bits do not divide {bits}: choose a divisor")
        self.bits, self.group_size, self.spherical = bits, group_size, spherical
        self.magnitude = bits**-0.5 if spherical else 1.0

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z (..., d) -> codes (..., d) and u (..., d), z on the sphere; float32."""
        u = F.normalize(z.float(), dim=-1) if self.spherical else z.float()
        corner = torch.where(u > 0, self.magnitude, -self.magnitude)  # torch.sign(0) is 0, which is no corner
        # Straight-through: the gradient goes to u, without bsq-vit's 1/sqrt(d). The bracket is exactly zero,
        # so the codes are exactly corners.
        return corner + (u - u.detach()), u

    def entropy_loss(self, u: torch.Tensor) -> dict[str, torch.Tensor]:
        """Eq. 4 on u (..., d), in nats: `entropy_loss` = `token_entropy` - `code_entropy`.
        A token picks corner c with probability q(c|u) ~ exp(-tau |u - c|^2), that is exp(2 tau c.u), with
        tau = 1. It factorises: bit i is 1 with probability p_i = sigmoid(4 m u_i), m the magnitude of a
        channel. So the first term, the mean entropy of q, is exactly the sum of its bits'. On the sphere it
        hardly moves: for 24 bits it is 16.55 or 16.56, whatever u. For the second, the entropy of the mean q,
        stands the sum over groups of bits, an upper bound. The mean of all ranks' losses is never positive;
        near 0, codes collapse."""
        logits = (4 * self.magnitude) * u.float().reshape(-1, self.bits)  # (N, d)
        p = logits.sigmoid()
        token_entropy = (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).sum(-1).mean()

        joint = p.new_ones(len(p), self.bits // self.group_size, 1)
        for one in p.reshape(len(p), -1, self.group_size, 1).unbind(2):  # (N, d/g, 1), bit i of each group
            joint = torch.cat([joint * (1 - one), joint * one], -1)  # (N, d/g, 2^(i+1)): it doubles the table
        average = mean_over_ranks(joint.mean(0))  # (d/g, 2^g)
        code_entropy = -torch.xlogy(average, average.clamp_min(1e-30)).sum()
        entropy_loss = token_entropy - code_entropy
        return {"entropy_loss": entropy_loss, "token_entropy": token_entropy, "code_entropy": code_entropy}
