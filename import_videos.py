"""Your own videos as a data set: a folder of clips, or a LeRobot data set (v2.1 or v3.0).

    python import_videos.py my_clips --out data/mine           a folder of clips, an episode each
    python import_videos.py lerobot_folder --camera wrist      a LeRobot data set, one of its cameras
    python import_videos.py user/name --fps 10 --square pad    the same by its id on the Hugging Face hub

A clip's actions, if there are any, are <clip>.npy or <clip>.csv beside it, a row a frame. Clips in a
subfolder are of a task of its name. Writes data/<name>/ as collect.py does, without what a video has not:
twin, segments, states. A command that was cut off goes on where it stopped, to the same bytes.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import numpy as np
import PIL.Image
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet
import tyro
from tqdm import tqdm

from common import at_least, fail, shards


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
    """frames a second to keep, those nearest in time, with their actions; 0: all frames"""
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
    """processes; 0: one a core"""


@dataclass
class Episode:
    index: int  # in the source
    task: str  # its text
    file: Path  # a video, or a parquet file that holds pictures
    camera: str  # its name in a LeRobot data set; empty: a clip, whose frames are counted
    start: float  # second of the video at which the episode starts
    fps: float  # of the video
    times: np.ndarray  # (N,) seconds of its frames from the start
    steps: np.ndarray  # (N,) their numbers in the source
    actions: np.ndarray | list | None  # (N, A) in the data's own units
    names: list[str]  # (A,) of the actions' dimensions

    def __str__(self) -> str:
        return f"episode {self.index} ({self.file})"


# ---------------------------------------------------------------------------------------- a folder of clips

CLIPS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


def read_clips(root: Path, args: Args) -> list[Episode]:
    """An episode a clip, in the order of their paths."""
    files = sorted(path for path in root.rglob("[!.]*") if path.suffix.lower() in CLIPS)
    if not files:
        fail(f"{root} holds no video ({' '.join(CLIPS)}) and no LeRobot data set (meta/info.json)")
    episodes, shapes = [], []
    for index in range(len(files))[slice(*args.episodes)]:
        file = files[index]
        times, shape = frame_times(file)
        shapes.append(shape)
        if abs(shape / shapes[0] - 1) > 0.02:
            fail(f"the size of the frames varies: {file} has another width : height than {episodes[0]}")
        fps = (len(times) - 1) / (times[-1] - times[0])
        task = file.parent.resolve().name.replace("_", " ")
        steps = np.arange(len(times))
        episodes.append(Episode(index, task, file, "", 0.0, fps, times, steps, *read_actions(file)))
    return episodes


def frame_times(clip: Path) -> tuple[np.ndarray, float]:
    """Seconds (N,) of a clip's frames by its packets, and width / height: nothing is decoded."""
    try:
        with av.open(str(clip)) as video:
            stream = video.streams.video[0]
            packets = [packet for packet in video.demux(stream) if packet.size]
            announced, seconds = stream.frames, float(stream.time_base)
            shape = stream.width / stream.height
    except (av.FFmpegError, IndexError) as error:
        fail(f"{clip} does not decode as a video ({error})")
    if len(packets) < announced:
        fail(f"{clip} ends early: it has {len(packets)} of {announced} frames")
    ticks = [packet.dts if packet.pts is None else packet.pts for packet in packets if not packet.is_discard]
    if len(ticks) < 2:
        fail(f"{clip} has {len(ticks)} frames; an episode needs 2 at least")
    return np.array(sorted(ticks)) * seconds, shape


def read_actions(clip: Path) -> tuple[np.ndarray | list | None, list[str]]:
    """Rows of the .npy or .csv beside a clip and names of their columns; None if there is no such file."""
    array, text = clip.with_suffix(".npy"), clip.with_suffix(".csv")
    if array.exists():
        try:
            return np.load(array, allow_pickle=False), []
        except (EOFError, ValueError) as error:
            fail(f"{array} does not read ({error})")
    if not text.exists():
        return None, []
    rows = [line.split(",") for line in text.read_text("utf-8-sig").splitlines() if line]
    if rows and re.search("[a-df-z]", "".join(rows[0]), re.IGNORECASE):  # 1e-3 is a number
        return rows[1:], [name.strip(' "') for name in rows[0]]
    return rows, []


# ---------------------------------------------------------------------------------------- LeRobot


def read_lerobot(root: Path, args: Args) -> list[Episode]:
    """The episodes of a LeRobot data set; tasks, times and paths are those of its metadata."""
    info = shards.read_json(root / "meta/info.json")
    ending = {"v2.1": "jsonl", "v3.0": "parquet"}.get(info.get("codebase_version"))
    if ending is None:
        fail(f"{root} is LeRobot {info.get('codebase_version')}; v2.1 and v3.0 are understood")
    features = info["features"]
    cameras = [name for name in features if features[name]["dtype"] in ("video", "image")]
    found = [name for name in cameras if args.camera in ("", name, name.rpartition(".")[2])]
    if not found:
        fail(f"{root} has no camera {args.camera!r}; it has {', '.join(cameras)}")
    tasks = read_table(root / f"meta/tasks.{ending}").to_pydict()
    numbers = tasks.pop("task_index")
    (texts,) = tasks.values()  # in v3.0 pandas names their column
    info |= {"camera": found[0], "tasks": dict(zip(numbers, texts))}
    files = sorted(root.glob("meta/episodes/*/*.parquet")) or [root / f"meta/episodes.{ending}"]
    rows = [row for file in files for row in read_table(file).to_pylist()]
    rows = [row for row in rows if row["episode_index"] in range(*args.episodes)]
    rows.sort(key=lambda row: row["episode_index"])
    return [lerobot_episode(root, info, row) for row in rows]


def lerobot_episode(root: Path, info: dict, row: dict) -> Episode:
    """The episode of a row of the metadata. Paths are the data set's own templates."""
    index, fps = row["episode_index"], info["fps"]
    camera, features = info["camera"], info["features"]
    place = {"episode_index": index, "episode_chunk": index // info["chunks_size"], "video_key": camera}
    for key in ("chunk_index", "file_index"):  # of v3.0
        place[key] = row.get(f"data/{key}")
    file = root / info["data_path"].format(**place)
    table = rows_of(file, index, ("frame_index", "timestamp", "task_index", "action"))
    if len(table) != row["length"]:
        fail(f"{file} has {len(table)} rows of episode {index}; the metadata say {row['length']}")
    task = info["tasks"][table["task_index"][0].as_py()]
    steps = table["frame_index"].to_numpy()
    times = np.rint(table["timestamp"].to_numpy() * fps) / fps  # 0.85 s at 20 frames/s is 16.99
    actions, names = None, []
    if "action" in features:
        actions = table["action"].to_pylist()
        names = features["action"].get("names") or []
        if isinstance(names, dict):  # {"motors": ["x", ...]} or {"x": 0, ...}
            names = next((value for value in names.values() if isinstance(value, list)), list(names))
    start = 0.0
    if features[camera]["dtype"] == "video":
        start = row.get(f"videos/{camera}/from_timestamp", 0.0)  # v3.0 joins episodes
        for key in ("chunk_index", "file_index"):
            place[key] = row.get(f"videos/{camera}/{key}")
        file = root / info["video_path"].format(**place)
    if not file.exists():
        fail(f"{file} is missing, which the metadata of {root} name")
    return Episode(index, task, file, camera, start, fps, times, steps, actions, names)


def rows_of(file: Path, episode: int, columns: tuple[str, ...]) -> pyarrow.Table:
    """One episode's rows of a parquet file, which may hold several; columns that it has not are left out."""
    table = read_table(file, ("episode_index", *columns))
    return table.filter(pyarrow.compute.field("episode_index") == episode)


@functools.lru_cache(maxsize=1)  # the next episode is mostly in the same file
def read_table(file: Path, columns: tuple[str, ...] | None = None) -> pyarrow.Table:
    try:
        if file.suffix == ".jsonl":
            return pyarrow.json.read_json(file)
        return pyarrow.parquet.ParquetFile(file).read(columns)
    except FileNotFoundError:
        fail(f"{file} is missing, which is part of the data set")
    except (OSError, pyarrow.ArrowException) as error:
        fail(f"{file} does not read ({error})")


def download(args: Args) -> Path:
    """The folder of a data set of the hub; of its videos, one camera's are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    parts = ["meta/*", "data/*", f"videos/*{args.camera}/*"]
    try:
        return Path(snapshot_download(args.path, repo_type="dataset", allow_patterns=parts))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        fail(f"there is no folder {args.path}, and the hub gives no data set of this name ({reason})")


# ---------------------------------------------------------------------------------------- frames and actions

RESIZER = av.video.reformatter.VideoReformatter()  # held: making one costs more than resizing a frame


def check_actions(episode: Episode, first: Episode) -> None:
    """Makes the actions an array (N, A); refuses what does not fit the frames or the first episode's."""
    if episode.actions is not None:
        try:
            episode.actions = np.array(episode.actions, np.float64).reshape(len(episode.actions), -1)
        except ValueError as error:
            fail(f"{episode}: its actions are no table of numbers ({error})")
        length, width = episode.actions.shape
        if length != len(episode.times):
            fail(f"{episode} has {len(episode.times)} frames but {length} rows of actions; a row a frame")
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
    training = []
    for episodes in tasks.values():
        held_out = min(len(episodes) - 1, max(1, round(probe_fraction * len(episodes))))
        training += episodes[: len(episodes) - held_out]
    if training[0].actions is None:
        return None
    actions = np.concatenate([episode.actions for episode in training])
    low, high = actions.min(axis=0), actions.max(axis=0)
    span = np.where(high > low, high - low, 1)
    for episodes in tasks.values():
        for episode in episodes:
            episode.actions = 2 * (episode.actions - low) / span - 1
    return {"names": training[0].names, "low": low.tolist(), "high": high.tolist()}


def decode(episode: Episode) -> Iterator[tuple[int, av.VideoFrame]]:
    """What the file holds from the episode's start on: (number in the episode, frame)."""
    if episode.file.suffix == ".parquet":
        table = rows_of(episode.file, episode.index, ("timestamp", episode.camera))
        for seconds, cell in zip(table["timestamp"].to_pylist(), table[episode.camera].to_pylist()):
            picture = PIL.Image.open(io.BytesIO(cell["bytes"]))
            yield round(seconds * episode.fps), av.VideoFrame.from_image(picture.convert("RGB"))
        return
    with av.open(str(episode.file)) as video:
        stream = video.streams.video[0]
        stream.codec_context.thread_count = 1  # a process a core is faster
        if not episode.camera:
            yield from enumerate(video.decode(stream))
            return
        video.seek(round(episode.start / stream.time_base), stream=stream)  # to the key frame before it
        for frame in video.decode(stream):
            yield round((frame.time - episode.start) * episode.fps), frame


def read_frames(episode: Episode, size: int, how: str) -> np.ndarray:
    """uint8 (N, size, size, 3). A frame that is missing or of another size ends the program."""
    wanted = episode.steps
    if episode.camera:
        wanted = np.rint(episode.times * episode.fps)
    frames = np.empty((len(wanted), size, size, 3), np.uint8)
    done, shapes = 0, set()
    try:
        for number, frame in decode(episode):
            if number == wanted[done]:
                frames[done] = square(frame, size, how)
                shapes.add(f"{frame.width} x {frame.height}")
                done += 1
            if done == len(wanted):
                break
    except (av.FFmpegError, PIL.UnidentifiedImageError) as error:
        fail(f"{episode} does not decode ({error})")
    if done < len(wanted):
        fail(f"{episode} ends early: it has {done} of {len(wanted)} frames")
    if len(shapes) > 1:
        fail(f"{episode}: the size of its frames varies, {', '.join(sorted(shapes))}")
    return frames


def square(frame: av.VideoFrame, size: int, how: str) -> np.ndarray:
    """uint8 (size, size, 3): one side is resized to `size`, the other one cropped or padded."""
    side = min(frame.width, frame.height)
    if how == "pad":
        side = max(frame.width, frame.height)
    width, height = round(frame.width * size / side), round(frame.height * size / side)
    small = RESIZER.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1).to_image()
    small = small.rotate(frame.rotation, expand=True)  # phones store how they were held
    canvas = PIL.Image.new("RGB", (size, size))
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(canvas)


# ---------------------------------------------------------------------------------------- the data set


def import_shard(folder: Path, episodes: list[Episode], first: int, size: int, how: str) -> dict:
    """Writes episodes of a task, numbered from `first` on in it. Returns the shard's metadata."""
    temporary = shards.start_shard(folder)
    for number, episode in enumerate(episodes, first):
        arrays = {"frames": read_frames(episode, size, how), "step": episode.steps.astype(np.int32)}
        arrays["episode"] = np.full(len(episode.steps), number, np.int32)
        arrays["episode_index"] = np.full(len(episode.steps), episode.index, np.int64)
        if episode.actions is not None:
            arrays["actions"] = episode.actions.astype(np.float32)
        shards.append_rows(temporary, arrays)
    return shards.finish_shard(folder, {"episodes": len(episodes)})


def read_source(args: Args) -> list[Episode]:
    root = Path(args.path)
    if not root.is_dir():
        root = download(args)
    if (root / "meta/info.json").exists():
        episodes = read_lerobot(root, args)
    else:
        episodes = read_clips(root, args)
    if not episodes:
        fail(f"{root} has none of the episodes {args.episodes[0]} to {args.episodes[1]}")
    for episode in episodes:
        check_actions(episode, episodes[0])
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
    return {
        "source": args.path,
        "source_bytes": sum(file.stat().st_size for file in {episode.file for episode in episodes}),
        "camera": episodes[0].camera,
        "env": None,  # no simulator
        "size": args.size,
        "square": args.square,
        "fps": args.fps or round(episodes[0].fps, 3),
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
    there = shards.read_meta(out)
    changed = [key for key in meta if there.get(key) != meta[key]]
    if changed:
        words = "; ".join(f"{key}: {there.get(key)} there, {meta[key]} here" for key in changed)
        fail(f"{out} was made from something else ({words}); choose another --out")


def parse_args(arguments: list[str]) -> Args:
    args = tyro.cli(Args, args=arguments, description=__doc__, prog="import_videos.py")
    at_least(16, args, "size")
    at_least(1, args, "shard_episodes")
    at_least(0, args, "fps", "workers")
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
    print(f"{out}: {len(episodes)} episodes of {', '.join(tasks)}; {frames} frames, {speed:.0f} frames/s")


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: run the same command again")
