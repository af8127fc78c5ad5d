"""A codebook of vectors, for latents that are discrete."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.device import from_rank_0, mean_over_ranks

MOMENTUM = 0.1  # weight of a batch in running means
RESTART = 20  # updates after which an entry that was never chosen is replaced


class Codebook(nn.Module):
    """Vector quantiser: z (B, codes, dim) -> the nearest entries, with a straight-through gradient."""

    def __init__(self, entries: int, dim: int):
        super().__init__()
        self.entries = nn.Parameter(torch.randn(entries, dim))
        self.register_buffer("idle", torch.full((entries,), RESTART))  # updates since it was chosen

    def nearest(self, z: Tensor) -> Tensor:
        """(B, codes) int64"""
        return torch.cdist(z.float().flatten(0, 1), self.entries).argmin(1).view(z.shape[:2])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries, codebook loss and commitment loss."""
        entries = self.entries[self.nearest(z)]
        codebook_loss = F.mse_loss(entries, z.detach())
        commitment_loss = F.mse_loss(z, entries.detach())
        return z + (entries - z).detach(), codebook_loss, commitment_loss

    @torch.no_grad()
    def restart(self, z: Tensor, share: Tensor) -> None:
        """Replaces entries that were idle for RESTART updates by outputs of this batch (of rank 0).

        share: (codes, entries), see `shares`.
        """
        self.idle.copy_(torch.where(share.sum(0) > 0, 0, self.idle + 1))
        dead = self.idle >= RESTART
        pick = torch.randint(z.shape[0] * z.shape[1], dead.shape).to(z.device)
        outputs = from_rank_0(z.float().flatten(0, 1)[pick])
        self.entries.copy_(torch.where(dead[:, None], outputs, self.entries))
        self.idle.masked_fill_(dead, 0)


class LatentNorm(nn.Module):
    """Moves latents (B, codes, dim) to where a frozen codebook is: to the mean and std of `like`.

    like: (N, codes, dim), latents that the codebook was learnt with. Each code has its mean, and one std for
    all its dimensions. In training it is the batch (of this rank) that is moved, else what batches were on
    average. Without this the latents of a new encoder, which hardly differ at first, all fall to one entry.
    """

    def __init__(self, like: Tensor):
        super().__init__()
        mean, std = moments(like)
        self.register_buffer("to_mean", mean)
        self.register_buffer("to_std", std)
        self.register_buffer("mean", torch.zeros_like(mean))
        self.register_buffer("std", torch.ones_like(std))

    def forward(self, z: Tensor) -> Tensor:
        mean, std = self.mean, self.std
        if self.training:
            mean, std = moments(z)
            self.mean.lerp_(mean_over_ranks(mean.detach()), MOMENTUM)
            self.std.lerp_(mean_over_ranks(std.detach()), MOMENTUM)
        return (z - mean) / std * self.to_std + self.to_mean


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (codes, dim) and one std per code (codes, 1) of latents (B, codes, dim)."""
    mean = z.mean(0)
    variance = (z - mean).square().mean((0, 2))[:, None]
    return mean, (variance + 1e-12).sqrt()  # inside the root, else a variance of 0 has no gradient


def shares(codes: Tensor, codebook: int) -> Tensor:
    """How often each code (B, codes) is each entry, (codes, entries), over all ranks."""
    return mean_over_ranks(F.one_hot(codes, codebook).float().mean(0))


def perplexity(share: Tensor) -> Tensor:
    """exp of the entropy of shares (..., entries): 1 if a code is always the same, at most the entries."""
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum(-1))
