"""A codebook of vectors, for latents that are discrete."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.device import average, from_rank_0

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


def shares(codes: Tensor, codebook: int) -> Tensor:
    """How often each code (B, codes) is each entry, (codes, entries), over all ranks."""
    return average(F.one_hot(codes, codebook).float().mean(0))


def perplexity(share: Tensor) -> Tensor:
    """exp of the entropy of shares (..., entries): 1 if a code is always the same, at most the entries."""
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum(-1))
