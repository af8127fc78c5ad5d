"""Your own videos as a data set: a folder of clips, or a LeRobot data set (v2.1 or v3.0).

    python import_videos.py my_clips --out data/mine           a folder of clips, an episode each
    python import_videos.py lerobot_folder --camera wrist      a LeRobot data set, one of its cameras
    python import_videos.py user/name --fps 10 --square pad    the same by its id on the Hugging Face hub

A clip's actions, if there are any, are <clip>.npy or <clip>.csv beside it, a row per frame. Clips in a
subfolder are of a task of its name. Writes data/<name>/ as collect.py does, without what a video has not:
twin, segments, states. A command that was cut off goes on where it stopped, to the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from common import at_least, differences, fail, shards
from common.clip_folder import read_clips
from common.lerobot import download, read_lerobot
from common.recordings import Episode, read_frames


@dataclass
class Args:
    path: tyro.conf.Positional[str]
    """folder of clips or of a LeRobot data set, or the id of one on the Hugging Face hub"""
    out: str = "data/mine"
    """folder of the data set to write"""
    size: int = 64
    """side of the square frames in pixels"""
    square: Literal["crop", "pad"] = "crop"
    """crop: the middle of the picture; pad: all of it between black bars"""
    fps: float = 0.0
    """frames per second to keep, those nearest in time, with the actions there (positions); 0: all"""
    episodes: tuple[int, int] = (0, 1_000_000_000)
    """episodes to take, by the source's numbers: the first, and the one after the last"""
    camera: str = ""
    """camera of a LeRobot data set; `wrist` is short for observation.images.wrist; empty: the first"""
    object: str = ""
    """what {object} in a prompt stands for; empty: the task's text"""
    probe_fraction: float = 0.2
    """fraction of a task's episodes, the last ones, that are held out: they do not set the actions' scale"""
    shard_episodes: int = 5
    """episodes a shard: what a killed run loses at most, for each worker"""
    workers: int = 0
    """processes; 0: one per core"""


# ---------------------------------------------------------------------------------------- actions


def check_actions(episode: Episode, first: Episode) -> None:
    """Makes the actions an array (N, A); refuses what does not fit the frames or the first episode's."""
    try:
        episode.actions = np.array(episode.actions, np.float64).reshape(len(episode.actions), -1)
    except (TypeError, ValueError) as error:
        fail(f"{episode}: its actions are no table of numbers ({error})")
    length, width = episode.actions.shape
    if length != len(episode.times):
        fail(f"{episode} has {len(episode.times)} frames but {length} rows of actions; a row per frame")
    if not np.isfinite(episode.actions).all():
        fail(f"{episode}: its actions are not finite")
    if len(episode.names) != width:
        episode.names = [f"action_{column}" for column in range(width)]
    if episode.names != first.names:
        fail(f"{episode} has actions {episode.names}, {first} {first.names}; all must have the same")


def subsample(episode: Episode, first: Episode, fps: float) -> None:
    """Keeps the frames nearest to 0, 1, 2 ... / fps seconds after the first, and their actions; 0: all."""
    if fps == 0 and abs(episode.fps / first.fps - 1) > 0.05:
        fail(f"{episode} has {episode.fps:.3g} frames/s, {first} {first.fps:.3g}; choose one rate by --fps")
    if fps > 1.05 * episode.fps:
        fail(f"--fps {fps:g} is more than the {episode.fps:.3g} frames/s of {episode}")
    if fps > 0:
        times = episode.times - episode.times[0]
        wanted = np.arange(int(times[-1] * fps + 1e-6) + 1) / fps
        between = (times[1:] + times[:-1]) / 2
        kept = np.unique(np.searchsorted(between, wanted + 1e-6))  # of two that are as near, the later
        episode.times, episode.steps = episode.times[kept], episode.steps[kept]
        if episode.actions is not None:
            episode.actions = episode.actions[kept]


def scale_actions(tasks: dict[str, list[Episode]], probe_fraction: float) -> dict | None:
    """Scales actions to [-1, 1] by their range in the training episodes; held-out ones may lie beyond.

    Returns their names and range in the data's own units, or None without actions.
    """
    labelled = [episode for episode in sum(tasks.values(), []) if episode.actions is not None]
    if not labelled:
        return None
    training = []
    for name, episodes in tasks.items():
        count = len(episodes) - shards.held_out_episodes(len(episodes), probe_fraction)
        training += [episode.actions for episode in episodes[:count] if episode.actions is not None]
        if all(episode.actions is None for episode in episodes[count:]):
            print(f"{name}: no held-out episode has actions, so there are no probes and no errors of them")
    if not training:
        fail("only held-out episodes have actions: of each task the last ones, in the order of their paths")
    actions = np.concatenate(training)
    low, high = actions.min(axis=0), actions.max(axis=0)
    span = np.where(high > low, high - low, 1)
    for episode in labelled:
        episode.actions = 2 * (episode.actions - low) / span - 1
    return {"names": labelled[0].names, "low": low.tolist(), "high": high.tolist()}


# ---------------------------------------------------------------------------------------- the data set


def import_shard(folder: Path, episodes: list[Episode], first: int, size: int, how: str) -> dict:
    """Writes episodes of a task, numbered from `first` on in it. Returns the shard's metadata."""
    temporary = shards.start_shard(folder)
    for number, episode in enumerate(episodes, first):
        arrays = {"frames": read_frames(episode, size, how), "step": episode.steps.astype(np.int32)}
        arrays["episode"] = np.full(len(episode.steps), number, np.int32)
        arrays["episode_index"] = np.full(len(episode.steps), episode.index, np.int64)
        if episode.names:  # others of the data set have actions: nan stands for those that this one lacks
            arrays["actions"] = np.full((len(episode.steps), len(episode.names)), np.nan, np.float32)
        if episode.actions is not None:
            arrays["actions"] = episode.actions.astype(np.float32)
        shards.append_rows(temporary, arrays)
    return shards.finish_shard(folder, {"episodes": len(episodes)})


def read_source(args: Args) -> list[Episode]:
    root = Path(args.path)
    if not root.is_dir():
        root = download(args.path, args.camera)
    if (root / "meta/info.json").exists():
        episodes = read_lerobot(root, args.camera, range(*args.episodes))
    elif args.camera:
        fail("--camera is for LeRobot data sets; a clip has one")
    else:
        episodes = read_clips(root, range(*args.episodes))
    if not episodes:
        fail(f"{root} has none of the episodes {args.episodes[0]} to {args.episodes[1]}")
    labelled = [episode for episode in episodes if episode.actions is not None]
    for episode in labelled:
        check_actions(episode, labelled[0])
    for episode in episodes:
        if labelled:  # a clip without actions among others that have some
            episode.names = labelled[0].names
        subsample(episode, episodes[0], args.fps)
    return episodes


def group_by_task(episodes: list[Episode]) -> tuple[dict[str, list[Episode]], dict[str, str]]:
    """Episodes and text of each task, by the name of its folder: letters, digits and hyphens."""
    tasks, texts = {}, {}
    for text in dict.fromkeys(episode.task for episode in episodes):
        name = re.sub("[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "task"
        while name in tasks:  # by another text like this one
            name += "-2"
        tasks[name] = [episode for episode in episodes if episode.task == text]
        texts[name] = text
    return tasks, texts


def describe(args: Args, tasks: dict[str, list[Episode]], texts: dict[str, str], action: dict | None) -> dict:
    """meta.json but for the shards."""
    arrays = ["frames", "step", "episode", "episode_index"]
    if action is not None:
        arrays.append("actions")
    episodes = sum(tasks.values(), [])
    rows = hashlib.sha256()
    for episode in episodes:
        rows.update(os.fsencode(episode.file.name) + episode.steps.tobytes())
        rows.update(b"" if episode.actions is None else episode.actions.tobytes())
    return {
        "source": args.path,
        "source_bytes": sum(file.stat().st_size for file in {episode.file for episode in episodes}),
        "source_rows": rows.hexdigest()[:16],  # names, frames that are kept, actions
        "camera": episodes[0].camera,
        "env": None,  # no simulator
        "size": args.size,
        "square": args.square,
        "fps": round(min(args.fps or episodes[0].fps, episodes[0].fps), 3),
        "episode_range": list(args.episodes),
        "shard_episodes": args.shard_episodes,
        "probe_fraction": args.probe_fraction,
        "tasks": list(tasks),
        "instructions": texts,
        "objects": {name: args.object or text for name, text in texts.items()},
        "episodes": {name: len(mine) for name, mine in tasks.items()},
        "arrays": arrays,
        "action": action,
    }


def start_data_set(out: Path, meta: dict) -> None:
    """Writes meta.json, or refuses to go on with another one."""
    if not (out / "meta.json").exists():
        shards.write_json(out / "meta.json", meta)
    changed = differences(shards.read_meta(out), meta)
    if changed:
        fail(f"{out} was made from something else ({changed}); choose another --out")


def parse_args(arguments: list[str]) -> Args:
    args = tyro.cli(Args, args=arguments, description=__doc__, prog="import_videos.py")
    at_least(16, args, "size")
    at_least(1, args, "shard_episodes")
    at_least(0, args, "fps", "workers", "episodes")
    if not 0 < args.probe_fraction < 1:
        fail("--probe-fraction is a fraction between 0 and 1")
    return args


def main(args: Args) -> None:
    out = Path(args.out)

    # 1. The source: where its episodes are, and their actions.
    episodes = read_source(args)
    tasks, texts = group_by_task(episodes)
    action = scale_actions(tasks, args.probe_fraction)

    # 2. What the data set is. The lock is held until the end.
    lock = shards.lock_folder(out)
    meta = describe(args, tasks, texts, action)
    start_data_set(out, meta)

    # 3. The shards that are missing.
    jobs, done = [], []
    for task, mine in tasks.items():
        for first in range(0, len(mine), args.shard_episodes):
            folder = out / task / f"shard_{first // args.shard_episodes:05d}"
            if folder.exists():
                done.append(shards.check_shard(folder))
            else:
                part = mine[first : first + args.shard_episodes]
                jobs.append((import_shard, folder, part, first, args.size, args.square))
    workers = max(1, min(args.workers or os.cpu_count() or 1, len(jobs)))
    frames = sum(len(episode.steps) for episode in episodes)
    start, old = time.time(), sum(shard["frames"] for shard in done)
    with tqdm(total=frames, initial=old, desc="import", unit="frame") as bar:
        for shard in shards.parallel(workers, jobs):
            done.append(shard)
            bar.update(shard["frames"])
    meta["versions"] = {name: version(name) for name in ("av", "numpy", "pillow", "pyarrow")}
    meta["shards"] = sorted(done, key=lambda shard: shard["shard"])
    shards.write_json(out / "meta.json", meta)
    os.close(lock)
    speed = (frames - old) / (time.time() - start)
    labels = "no actions"
    if action:
        known = sum(episode.actions is not None for episode in episodes)
        labels = f"actions {', '.join(action['names'])}"
        if known < len(episodes):
            labels += f" of {known} alone"
    what = f"{len(episodes)} episodes of {', '.join(tasks)}; {labels}"
    print(f"{out}: {what}; {frames} frames, {speed:.0f} frames/s")


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: run the same command again")
