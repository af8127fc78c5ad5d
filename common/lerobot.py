"""The episodes of a LeRobot data set, v2.1 or v3.0, on disk or of the Hugging Face hub.

Layout: the data set's own meta/info.json, whose path templates are used. v2.1 has a parquet file and a video
an episode; v3.0 joins episodes in files, and meta/episodes says where each one is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common import fail
from common.recordings import Episode, read_table, rows_of
from common.shards import read_json


def read_lerobot(root: Path, camera: str, numbers: range) -> list[Episode]:
    """Episodes of those numbers, as one camera saw them; tasks, times and paths are those of the metadata."""
    info = read_json(root / "meta/info.json")
    ending = {"v2.1": "jsonl", "v3.0": "parquet"}.get(info.get("codebase_version"))
    if ending is None:
        fail(f"{root} is LeRobot {info.get('codebase_version')}; v2.1 and v3.0 are understood")
    tasks = read_table(root / f"meta/tasks.{ending}").to_pydict()
    indices = tasks.pop("task_index")
    texts = tasks.get("task") or next(iter(tasks.values()), [])  # in v3.0 pandas names their column
    info |= {"camera": choose_camera(root, info["features"], camera), "tasks": dict(zip(indices, texts))}
    files = sorted(root.glob("meta/episodes/*/*.parquet")) or [root / f"meta/episodes.{ending}"]
    rows = [row for file in files for row in read_table(file).to_pylist()]
    rows = {row["episode_index"]: row for row in rows if row["episode_index"] in numbers}
    return [lerobot_episode(root, info, rows[index]) for index in sorted(rows)]


def choose_camera(root: Path, features: dict, wanted: str) -> str:
    """The full name of a camera: the first one if none is wanted; a last part is enough."""
    cameras = [name for name in features if features[name]["dtype"] in ("video", "image")]
    found = [name for name in cameras if wanted in ("", name, name.rpartition(".")[2])]
    if not found:
        fail(f"{root} has no camera {wanted!r}; it has {', '.join(cameras)}")
    return found[0]


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


def download(name: str, camera: str) -> Path:
    """The folder of a data set of the hub; of its videos, one camera's are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*"]))
        chosen = choose_camera(root, read_json(root / "meta/info.json")["features"], camera)
        parts = ["meta/*", "data/*", f"videos/*{chosen}/*"]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=parts))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        fail(f"there is no folder {name}, and the hub gives no data set of this name ({reason})")
