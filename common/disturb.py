"""Disturbances of embeddings, for the question how steady a target must be.

A real vision-language model's features tremble with what it does not look at; the oracle's do not. Each
disturbance belongs to a frame: it depends on (task, episode, step) or on the frame's pixels, and is never
drawn again. Its unit is the standard deviation s (D,) of the embedding's change from one frame to the next,
over the first shard of the task.

    noise     e + noise_std * s * n,  n ~ N(0, 1): a control, for no pixel shows it to an inverse model
    tremble   e + tremble * s * v,    v: a random ViT of the whole frame, projected to D numbers of change 1
    bfloat16  e rounded to 8 significant bits, as a model gives it that computes in bfloat16
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Disturbance:
    noise_std: float = 0.0
    tremble: float = 0.0
    bfloat16: bool = False

    def suffix(self) -> str:
        """What an encoder's name gets; empty without a disturbance."""
        parts = []
        if self.noise_std:
            parts.append(f"-noise{self.noise_std:g}")
        if self.tremble:
            parts.append(f"-tremble{self.tremble:g}")
        if self.bfloat16:
            parts.append("-bf16")
        return "".join(parts)


def change_std(embedding: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """(N, D), (N,) -> (D,): standard deviation of the change from a frame to the next of its episode."""
    change = np.diff(embedding.astype(np.float64), axis=0)
    same_episode = episode[1:] == episode[:-1]
    return change[same_episode].std(axis=0).astype(np.float32)


def frame_noise(task: str, episode: np.ndarray, step: np.ndarray, dim: int) -> np.ndarray:
    """(N,), (N,) -> (N, dim) float32 from N(0, 1): one generator a frame, seeded by its task, episode and
    step."""
    task_seed = zlib.crc32(task.encode())
    noise = np.empty((len(episode), dim), np.float32)
    for row, (number, time) in enumerate(zip(episode.tolist(), step.tolist(), strict=True)):
        rng = np.random.default_rng([task_seed, number, time])
        noise[row] = rng.standard_normal(dim, np.float32)
    return noise


def projection(inputs: int, outputs: int) -> np.ndarray:
    """(inputs, outputs) float32: the same random matrix each time."""
    matrix = np.random.default_rng(0).standard_normal((inputs, outputs), np.float32)
    return matrix / np.float32(np.sqrt(inputs))


def tremble_of(
    features: np.ndarray, first_features: np.ndarray, first_episode: np.ndarray, dim: int
) -> np.ndarray:
    """A random ViT's features (N, F) -> (N, dim), whose change has std 1 over the first shard, (M, F) with
    its episodes (M,)."""
    matrix = projection(features.shape[1], dim)
    first = first_features @ matrix
    unit = np.maximum(change_std(first, first_episode), 1e-12)
    return (features @ matrix - first.mean(axis=0)) / unit


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16 numbers, ties to even, as float32. Finite numbers only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    last_kept_bit = (bits >> 16) & 1
    rounded = (bits + np.uint32(0x7FFF) + last_kept_bit) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
