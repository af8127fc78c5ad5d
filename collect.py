"""Trajectories of Distracting MetaWorld with and without a moving background, and embeddings of their frames.

    python collect.py                                      quick: drawer-open, 80 episodes, oracle embeddings
    python collect.py paper --videos davis                 MT10, 5000 episodes per task, DAVIS backgrounds
    python collect.py --videos my_clips/ --out data/clips  video files or folders of frames as backgrounds
    python collect.py --prompt blind                       adds the embeddings of another prompt
    python collect.py --out data/mine --encoder <hub id>   also of clips that import_videos.py imported
    torchrun --nproc_per_node=4 collect.py ...             divides the shards among processes or machines

A command that was cut off goes on where it stopped. The files are equal, byte for byte, whatever the number
of workers and interruptions. What they hold: common/shards.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from common import at_least, differences, fail, parse, shards
from common.distracting_metaworld import DistractingMetaWorld
from common.encoders import embed_shard, encoder_config, make_encoder
from common.oracle import PROMPTS, Encoder, named_segments, prompt_text
from common.shards import ARRAYS, RANK, SEGMENTS, WORLD, wait_for_all_ranks
from common.tasks import INSTRUCTIONS, OBJECTS, task_names
from common.video_clips import Clips


@dataclass
class Args:
    tasks: tuple[str, ...] = ("drawer-open",)
    """MetaWorld tasks, with or without "-v3"; `mt10` stands for the ten of MT10"""
    episodes_per_task: int = 80
    """episodes per task (lam_vlm.py keeps the last fifth for its probes: 64 + 16)"""
    videos: str = "generated"
    """backgrounds: generated, davis, none (no distractors), or a path: folder of clips or DAVIS archive"""
    clips: int = 0
    """train on the first so many clips alone; 0: on all (the unseen ones of the evaluation stay all)"""
    video_step: int = 1
    """video frames that pass in an environment step; 0: a still picture for the whole episode"""
    video_area: float = 1.0
    """share of the background that shows the video, 0 to 1: of 8 x 8 squares, in a fixed random order"""
    size: int = 64
    """side of the frames in pixels"""
    camera: str = "corner4"
    """camera of MetaWorld: corner, corner2, corner3, corner4, topview, behindGripper, gripperPOV"""
    camera_distance: float = 0.0
    """metres that the camera is moved backward, for a wider view"""
    max_steps: int = 150
    """step limit of an episode, 500 at most"""
    after_success: int = 5
    """frames of an episode from its first success on, at least 1"""
    noise: float = 0.0
    """std of the Gaussian noise added to the expert's actions; the action stored is the action executed"""
    shard_episodes: int = 5
    """episodes a shard: what a killed run loses at most, for each worker"""
    workers: int = 0
    """processes; 0: one per core"""
    seed: int = 0
    """seed of goals, backgrounds and noise"""
    out: str = "data/quick"
    """folder of the data set"""
    encoder: str = "oracle"
    """oracle, none, random (a ViT never trained: a floor), otter:<CLIP>, or a hub id or local folder of a
    VLM, DINOv2, CLIP or SigLIP"""
    prompt: tuple[str, ...] = ("best",)
    """prompts: presets (best, positive, arm, object, blind) or texts of your own; {object} is filled in"""
    layers: tuple[int, ...] = ()
    """layers to export; none given: the encoder's default"""
    pools: tuple[str, ...] = ()
    """token pools to export; none given: the encoder's default"""
    background_kept: float = 0.0
    """oracle only: fraction of what the prompt does not name that leaks into the embedding, 0 to 1"""
    otter_temperature: float = 0.07
    """otter only: temperature of the softmax over patches"""
    trust_remote_code: bool = False
    """Molmo only: run the Python code that comes with the model, on this machine and with your rights"""
    model_revision: str = ""
    """commit or branch of a hub id; none given: a pinned commit for Molmo, main for others"""
    encoder_batch: int = 0
    """images a batch of an encoder with weights; 0: a guess, halved when memory runs out"""
    encoder_size: int = 0
    """side in pixels that frames are resized to before the encoder; 0: one that gives 64 image tokens"""
    split_tiles: bool = True
    """let processors cut a frame into tiles; --no-split-tiles shows it whole, in fewer tokens"""
    blank: Literal["none", "oracle"] = "none"
    """oracle: any encoder on frames in which the oracle has blanked what the prompt does not name"""
    noise_std: float = 0.0
    """disturbs embeddings by white noise, fixed per frame, in units of the std of their change"""
    tremble: float = 0.0
    """disturbs embeddings by a random ViT of the whole frame, in units of the std of their change"""
    bfloat16: bool = False
    """rounds embeddings to bfloat16"""


QUICK = Args()
PAPER = replace(
    QUICK,
    tasks=("mt10",),
    episodes_per_task=5000,
    videos="davis",
    size=128,
    max_steps=500,
    camera_distance=0.6,
    shard_episodes=500,  # lam_vlm.py maps every file, and an open file is a scarce good
    out="data/paper",
)
PRESETS = {"quick": QUICK, "paper": PAPER}
ENV_FLAGS = ("videos", "clips", "video_step", "video_area", "size", "camera", "camera_distance", "max_steps")


# ----------------------------------------------------------------------------------- the expert's episodes

MAX_ATTEMPTS = 20  # an expert that fails this often in a row is a fault, not bad luck
NEXT_ATTEMPT = 1_000_000  # added to the episode's number for other chances
DTYPES = {"rewards": np.float32, "success": np.bool_, "step": np.int16, "video": np.int32}


def expert_episode(
    env: DistractingMetaWorld, episode: int, noise: float, after_success: int
) -> tuple[dict[str, np.ndarray], int]:
    """An episode in which the scripted expert succeeds, arrays (N, ...), and the failures before it.

    A failed episode is dropped and tried again with other chances (DETAIL 11).
    """
    from metaworld.policies import ENV_POLICY_MAP

    warnings.filterwarnings("ignore", message="Constant")  # the experts' raw actions leave [-1, 1]
    expert = ENV_POLICY_MAP[f"{env.task}-v3"]()
    for attempt in range(MAX_ATTEMPTS):
        arrays = roll_out(env, expert, episode + attempt * NEXT_ATTEMPT, noise, after_success)
        if arrays["success"][-1]:
            arrays["episode"] = np.full(len(arrays["frames"]), episode, np.int32)
            return arrays, attempt
    limits = f"less --noise, or more --max-steps than {env.max_steps}"
    fail(f"the expert of {env.task} failed {MAX_ATTEMPTS} times on episode {episode}: {limits}")


def roll_out(
    env: DistractingMetaWorld, expert: object, episode: int, noise: float, after_success: int
) -> dict[str, np.ndarray]:
    """Arrays of an episode that ends when `after_success` frames have shown success, or at the step limit.

    A row is a frame and the action that was executed there. The last row's action and reward are zero.
    """
    rows = {name: [] for name in ARRAYS if name != "episode"}
    frame, info = env.reset(options={"episode": episode})
    frames_left, truncated = after_success, False
    while True:
        rows["frames"].append(frame)
        rows["clean"].append(info["clean"])
        rows["segments"].append(env.segments())
        rows["states"].append(info["state"])
        rows["success"].append(info["success"])
        rows["step"].append(env.steps)
        rows["video"].append((info["clip"], info["clip_frame"]))
        if truncated or frames_left <= 0:
            break
        action = np.clip(expert.get_action(info["state"].astype(np.float64)).astype(np.float32), -1, 1)
        action = np.clip(action + noise * env.rng.standard_normal(4, np.float32), -1, 1).astype(np.float32)
        frame, reward, _, truncated, info = env.step(action)
        frames_left -= info["success"]
        rows["actions"].append(action)
        rows["rewards"].append(reward)
    rows["actions"].append(np.zeros(4, np.float32))
    rows["rewards"].append(0)
    return {name: np.asarray(values, DTYPES.get(name)) for name, values in rows.items()}


def collect_shard(folder: Path, env_args: dict, noise: float, after_success: int, episodes: range) -> dict:
    """Collects episodes of a task into `folder`, which appears whole or not at all. Returns its metadata."""
    env = cached_env(json.dumps(env_args))
    temporary = shards.start_shard(folder)
    attempts, background, pixels = [], 0, 0
    for episode in episodes:
        arrays, failed = expert_episode(env, episode, noise, after_success)
        shards.append_rows(temporary, arrays)
        attempts.append(failed)
        background += int((arrays["segments"] == SEGMENTS.index("background")).sum())
        pixels += arrays["segments"].size
    metadata = {"episodes": len(episodes), "attempts": attempts, "background": background / pixels}
    return shards.finish_shard(folder, metadata)


@cache
def cached_env(arguments: str) -> DistractingMetaWorld:
    """One environment per task and process: building one costs more than resetting it."""
    return DistractingMetaWorld(**json.loads(arguments))


# ----------------------------------------------------------------------------------- the data set


def start_data_set(args: Args, out: Path) -> None:
    """Writes meta.json, or refuses arguments other than those there, and removes what a killed run left."""
    path = out / "meta.json"
    if not path.exists():
        wanted = identity(args)
        shards.write_json(path, wanted | description(args, wanted["env"]))
    meta = shards.read_meta(out)
    if meta["env"] is None:  # of import_videos.py
        if "shards" not in meta:
            fail(f"{out} is not imported to its end; run import_videos.py again")
        if args.encoder == "oracle":
            fail(f"{out} was not simulated, and the oracle needs the simulator; choose another --encoder")
        return
    changed = differences(meta, identity(args))
    if changed:
        fail(f"{out} was collected with other arguments ({changed}); choose another --out")
    for leftover in out.glob("*/.tmp_*"):  # this process holds the lock
        shutil.rmtree(leftover)


def identity(args: Args) -> dict:
    """What decides every byte of the trajectories."""
    clips = {"train": [], "test": []}
    if args.videos != "none":
        clips = {split: Clips(args.videos, split, args.size).names for split in clips}
    if args.clips > 0:
        clips["train"] = clips["train"][: args.clips]
    return {
        "env": {name: getattr(args, name) for name in ENV_FLAGS},
        "seed": args.seed,
        "noise": args.noise,
        "after_success": args.after_success,
        "tasks": list(args.tasks),
        "episodes_per_task": args.episodes_per_task,
        "shard_episodes": args.shard_episodes,
        "clips": clips,
    }


def description(args: Args, env_args: dict) -> dict:
    """What the readers of a data set need to know besides."""
    env = cached_env(json.dumps({"task": args.tasks[0], "seed": args.seed, **env_args}))
    versions = {name: version(name) for name in ("metaworld", "mujoco", "numpy", "pillow")}
    return {
        "size": args.size,
        "fps": env.metadata["render_fps"],  # environment steps per second
        "arrays": list(ARRAYS),
        "segments": list(SEGMENTS),
        "action": {"names": ["x", "y", "z", "gripper"], "low": -1, "high": 1},
        "episodes": dict.fromkeys(args.tasks, args.episodes_per_task),
        "instructions": {task: INSTRUCTIONS[task] for task in args.tasks},
        "objects": {task: OBJECTS[task] for task in args.tasks},
        "camera_pose": env.renderer.pose,
        "versions": versions | {"python": sys.version.split()[0]},
    }


def share_of_this_rank(all_shards: list) -> list:
    """The shards that this process of torchrun works on; without torchrun all."""
    return all_shards[RANK::WORLD]


def collect(args: Args, out: Path, meta: dict) -> dict:
    """Makes every missing shard, and lists them all in meta.json with counts and checksums. Returns meta."""
    plan = []  # of all shards
    for task in args.tasks:
        for first in range(0, args.episodes_per_task, args.shard_episodes):
            end = min(first + args.shard_episodes, args.episodes_per_task)
            folder = out / task / f"shard_{first // args.shard_episodes:05d}"
            plan.append((folder, task, range(first, end)))

    jobs, total, done = [], 0, 0  # episodes
    for folder, task, episodes in share_of_this_rank(plan):
        total += len(episodes)
        if folder.exists():
            done += shards.check_shard(folder)["episodes"]
        else:
            env_args = {"task": task, "seed": args.seed, **meta["env"]}
            jobs.append((collect_shard, folder, env_args, args.noise, args.after_success, episodes))
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, min(args.workers or cores, len(jobs)))
    start, frames = time.time(), 0
    with tqdm(total=total, initial=done, desc="collect", unit="episode", disable=RANK > 0) as bar:
        for metadata in shards.parallel(workers, jobs):
            frames += metadata["frames"]
            bar.set_postfix_str(f"{frames / (time.time() - start):.0f} frames/s")
            bar.update(metadata["episodes"])
    speed = "nothing left to do"
    if jobs:
        speed = f"{frames / (time.time() - start):.0f} frames/s" + " a rank" * (WORLD > 1)
    wait_for_all_ranks()

    meta["shards"] = [shards.read_json(folder / "shard.json") for folder, _, _ in plan]
    meta["shards"].sort(key=itemgetter("shard"))
    if RANK == 0:
        shards.write_json(out / "meta.json", meta)
        print(f"{out}: {summary(meta, out)}, {speed}")
    return meta


def summary(meta: dict, out: Path) -> str:
    made = meta["shards"]
    episodes = sum(shard["episodes"] for shard in made)
    failed = sum(sum(shard["attempts"]) for shard in made)
    frames = sum(shard["frames"] for shard in made)
    background = sum(shard["background"] * shard["frames"] for shard in made) / frames
    mebibytes = sum(path.stat().st_size for path in out.rglob("*.npy")) / 2**20
    success = episodes / (episodes + failed)
    text = f"{episodes} episodes, {frames} frames, expert success {success:.1%}"
    return f"{text}, background {background:.0%} of the area, {mebibytes:.0f} MiB"


def preview(meta: dict, out: Path) -> None:
    """preview.png: a row per task; frames and their twins at three moments of the first episode."""
    from common.figures import plot_preview  # here: workers need no matplotlib

    rows = []
    for task in meta["tasks"]:
        folder = out / task / "shard_00000"
        episode = np.load(folder / "episode.npy", mmap_mode="r", allow_pickle=False)
        last = int((episode == episode[0]).sum()) - 1
        pictures = []
        for step in (last // 6, last // 2, last):
            for name, title in (("frames", "distracted"), ("clean", "clean twin")):
                if name in meta["arrays"]:
                    array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                    pictures.append((f"{title}, step {step}", array[step]))
        rows.append({"task": task, "frames": pictures})
    plot_preview(rows, out / "preview.png")


def encoder_of(args: Args) -> Encoder:
    names = ("layers", "pools", "background_kept", "otter_temperature", "trust_remote_code", "model_revision")
    names += ("split_tiles", "blank", "noise_std", "tremble", "bfloat16")
    flags = {name: getattr(args, name) for name in names}
    return make_encoder(args.encoder, batch=args.encoder_batch, size=args.encoder_size, **flags)


def embed(args: Args, out: Path, meta: dict) -> None:
    """Caches the embeddings of every frame, a file per shard and key; what is there already is kept."""
    encoder = encoder_of(args)
    if RANK == 0 and (encoder.family == "oracle" or encoder.blank != "none"):
        for prompt in args.prompt:
            if prompt in PROMPTS:
                continue
            object = meta["objects"][meta["tasks"][0]]
            kept = named_segments(prompt_text(prompt, object), object)
            print(f"the oracle takes {prompt!r} to ask for {', '.join(SEGMENTS[index] for index in kept)}")
    mine = share_of_this_rank(meta["shards"])
    images = sum(shard["frames"] for shard in mine)
    with tqdm(total=images, desc=f"embed {encoder.name}", unit="image", disable=RANK > 0) as bar:
        for shard in mine:
            task = shard["task"]
            prompts = {prompt: prompt_text(prompt, meta["objects"][task]) for prompt in args.prompt}
            keys = embed_shard(encoder, out / shard["shard"], shard, task, prompts, bar)
    wait_for_all_ranks()
    if RANK == 0:
        print(f"{out}: embeddings {', '.join(keys)}")


# ----------------------------------------------------------------------------------- the command line


def parse_args(arguments: list[str]) -> Args:
    args = parse(PRESETS, arguments, __doc__)
    for name in ("tasks", "prompt"):
        if not getattr(args, name):
            fail(f"--{name} is given without a value")
    args.tasks = task_names(args.tasks)
    at_least(0, args, "workers", "noise", "seed", "clips", "video_step", "noise_std", "tremble")
    at_least(0, args, "encoder_batch", "encoder_size", "camera_distance", "otter_temperature")
    at_least(1, args, "episodes_per_task", "max_steps", "after_success", "shard_episodes")
    at_least(16, args, "size")
    for name in ("background_kept", "video_area"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} is a fraction, 0 to 1")
    if args.background_kept and args.encoder not in ("oracle", "none"):
        fail("--background-kept is for --encoder oracle")
    if args.otter_temperature <= 0:
        fail("--otter-temperature must be positive")
    return args


def main(args: Args) -> None:
    out = Path(args.out)
    encoder_config(args.encoder, args.trust_remote_code, args.model_revision)  # a wrong name fails here
    if args.encoder == "oracle":
        encoder_of(args)  # so do wrong layers and pools of one that loads in no time

    # 1. What the data set is. Rank 0 locks the folder until the end, and the others wait for meta.json.
    if RANK == 0:
        lock = shards.lock_folder(out)
        start_data_set(args, out)
    wait_for_all_ranks()
    meta = shards.read_meta(out)

    # 2. Trajectories of the scripted expert: distracted frames and their clean twins.
    if meta["env"] is not None:
        meta = collect(args, out, meta)
    if RANK == 0 and not (out / "preview.png").exists():
        preview(meta, out)

    # 3. What an encoder makes of the distracted frames.
    if args.encoder != "none":
        embed(args, out, meta)
    if RANK == 0:
        os.close(lock)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: run the same command again")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail("the disk is full; what is finished is kept: make room and run the same command again")
