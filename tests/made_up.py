"""A made-up data set in collect.py's layout, and every flag of lam_vlm.py spelt out for it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.dataset import Dataset

TASKS = ("reach", "push")
SIZE, EPISODES, LENGTH, GAP = 16, 5, 9, 2  # the last episode is held out; episode e has LENGTH + e frames
LABEL_ORDERS = [np.random.default_rng([seed, 7]).permutation(EPISODES - 1).tolist() for seed in range(6)]
ARRAYS = ["frames", "clean", "segments", "actions", "states", "episode", "step"]
FLAGS = dict(
    method="lapo",
    target="embedding",
    encoder="made_up",
    fdm_sees="target",
    labelled_episodes=("1", "2"),
    latent_dim=5,
    idm_horizon=2,
    frame_gap=GAP,
    frame_stack=2,
    stages=("lam", "bc", "decoder"),
    widths=(4, 8),
    res_blocks=1,
    stem=2,
    fdm_hidden=16,
    lam_updates=4,
    bc_updates=4,
    decoder_updates=4,
    batch_size=8,
    lr=1e-3,
    decoder_lr=1e-3,
    weight_decay=1e-2,
    max_shift=2,
    decoder_noise=0.1,
    decoder_shifts=2,
    probe_fraction=0.2,
    device="cpu",
    seed=0,
)


def flags(**changes: object) -> list[str]:
    """The script's defaults may change, the tests do not."""
    words = []
    for name, value in (FLAGS | changes).items():
        words.append(f"--{name.replace('_', '-')}")
        words += map(str, value if isinstance(value, tuple) else (value,))
    return words


def never(name: str, episode: int) -> bool:
    return False


def make_episode(
    task: int, episode: int, length: int, other: Callable[[str, int], bool]
) -> dict[str, np.ndarray]:
    """Random content; a frame's first pixel holds (task, episode, step), the background is the left half."""

    def draw(name: str) -> np.random.Generator:
        return np.random.default_rng([task, episode, int(other(name, episode)), *name.encode()])

    arrays = {
        name: draw(name).integers(0, 256, (length, SIZE, SIZE, 3), np.uint8) for name in ("frames", "clean")
    }
    arrays["frames"][:, 0, 0] = [(task, episode, step) for step in range(length)]
    arrays["segments"] = draw("segments").integers(1, 5, (length, SIZE, SIZE), np.uint8)
    arrays["segments"][:, :, : SIZE // 2] = 0
    arrays["actions"] = draw("actions").uniform(-1, 1, (length, 4)).astype(np.float32)
    arrays["states"] = draw("states").normal(size=(length, 39)).astype(np.float32)
    arrays["episode"] = np.full(length, episode, np.int32)
    arrays["step"] = np.arange(length, dtype=np.int16)
    arrays["embedding"] = draw("embedding").normal(size=(length, 6)).astype(np.float16)
    return arrays


def make_data(
    root: Path,
    other: Callable[[str, int], bool] = never,
    length: int = LENGTH,
    episodes: int = EPISODES,
    arrays: list[str] = ARRAYS,
) -> Path:
    """Two tasks, two episodes a shard. other(array, episode): whether that part is drawn from another seed.

    arrays: those that the data set has; without segments it is one of videos, without a simulator.
    """
    shards = []
    for task, first in itertools.product(range(len(TASKS)), range(0, episodes, 2)):
        numbers = range(first, min(first + 2, episodes))  # no two episodes of a task have the same length
        made = [make_episode(task, episode, length + episode, other) for episode in numbers]
        name = f"{TASKS[task]}/shard_{first // 2:05d}"
        folder = root / name
        (folder / "embeddings").mkdir(parents=True)
        for array in arrays:
            np.save(folder / f"{array}.npy", np.concatenate([episode[array] for episode in made]))
        np.save(
            folder / "embeddings/made_up_L0.npy", np.concatenate([episode["embedding"] for episode in made])
        )
        record = {"frames_sha256": f"frames of {name}", "sha256": f"embeddings of {name}"}
        record |= {"encoder": "made-up", "prompt": "best", "layer": 0, "pool": "all"}
        (folder / "embeddings/made_up_L0.json").write_text(json.dumps(record))
        frames = sum(length + episode for episode in numbers)
        shards.append(
            {"shard": name, "task": TASKS[task], "frames": frames, "sha256": {"frames": f"frames of {name}"}}
        )
    env = {"videos": "generated", "size": SIZE} if "segments" in arrays else None
    meta = {"tasks": list(TASKS), "size": SIZE, "arrays": arrays, "env": env, "shards": shards, "fps": 80}
    meta["instructions"] = {"reach": "reach the goal", "push": "push the puck to the goal"}
    meta["action"] = {"names": list("xyzg"), "low": [-1] * 4, "high": [1] * 4}
    if "actions" not in arrays:
        meta["action"] = None
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def policy_nmse(data: Dataset, act: Callable[[np.ndarray], np.ndarray]) -> float:
    """Of the actions act(rows) on the held-out episodes, all dimensions of which vary."""
    errors = []
    for task in range(len(TASKS)):
        of_task = (data.task == task) & (data.episode == EPISODES - 1)
        rows = np.flatnonzero(of_task & (np.arange(len(of_task)) < data.last))  # the last has no action
        truth = data.columns["actions"][rows]
        errors.append(((act(rows) - truth) ** 2).mean(0) / truth.var(0))
    return np.mean(errors)
