"""A trained policy as eval.py, and a robot, calls it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import Args, fail
from common.shards import read_json


class Actor:
    """uint8 frames (B, K, H, W, 3), (B, H, W, 3) or (H, W, 3) -> float32 actions (B, A) or (A,) in [-1, 1].

    K is the policy's `frame_stack`, oldest frame first; a single frame stands for the whole stack.
    """

    def __init__(self, network: nn.Module, frame_stack: int, device: str):
        self.network = network.eval().to(device, memory_format=torch.channels_last)
        self.frame_stack = frame_stack
        self.device = device

    def plan(self, frames: np.ndarray, task: str, keys: list[list[int]]) -> np.ndarray:
        """Actions (B, 1, A) of frames (B, K, H, W, 3): a chunk of one, as eval.py asks for."""
        return self(frames)[:, None]

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
        if frames.ndim == 3:
            batch = batch[None]
        if batch.ndim == 4:
            batch = batch[:, None].expand(-1, self.frame_stack, -1, -1, -1)
        obs = batch.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, 3 * K, H, W)
        actions = self.network(obs).clamp(-1, 1).float().cpu().numpy()
        if frames.ndim == 3:
            return actions[0]
        return actions


def read_policy_run(folder: Path, labelled: str | None, args: type[Args]) -> tuple[Args, dict, str]:
    """A finished run's arguments, its summary.json, and the label budget: `labelled`, or its first."""
    if not (folder / "summary.json").exists():
        fail(f"{folder} is no finished run; run the command that makes it again")
    stored, summary = read_json(folder / "args.json"), read_json(folder / "summary.json")
    if unknown := set(stored) - {field.name for field in fields(args)}:
        fail(f"{folder}/args.json has {', '.join(sorted(unknown))}, unknown here: it is of another version")
    budgets = summary["labelled_episodes"]
    if not budgets:
        fail(
            f"{folder} has no policy yet, only stage {' '.join(summary['stages'])}; run it with all --stages"
        )
    labelled = labelled or budgets[0]
    if labelled not in budgets:
        fail(f"{folder} has no decoder for {labelled} labelled episodes; it has {', '.join(budgets)}")
    return args(**stored), summary, labelled
