"""The episodes of a folder of clips: an episode each, with the table of actions that lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from common import fail
from common.recordings import Episode, frame_times

CLIPS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


def read_clips(root: Path, numbers: range) -> list[Episode]:
    """An episode a clip, those of the numbers, in the order of their paths."""
    files, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        if os.path.realpath(folder) in seen:  # a link back
            below.clear()
            continue
        seen.add(os.path.realpath(folder))
        names = [name for name in names if not name.startswith(".")]
        files += [Path(folder) / name for name in names if Path(name).suffix.lower() in CLIPS]
    files.sort()
    if not files:
        fail(f"{root} holds no video ({' '.join(CLIPS)}) and no LeRobot data set (meta/info.json)")
    episodes, shapes = [], []
    for index, file in enumerate(files):
        if index not in numbers:
            continue
        times, shape = frame_times(file)
        shapes.append(shape)
        if abs(shape / shapes[0] - 1) > 0.02:
            fail(f"the size of the frames varies: {file} has another width : height than {episodes[0]}")
        fps = (len(times) - 1) / (times[-1] - times[0])
        task = Path(os.path.abspath(file)).parent.name.replace("_", " ")
        steps = np.arange(len(times))
        episodes.append(Episode(index, task, file, "", 0.0, fps, times, steps, *read_actions(file)))
    return episodes


def read_actions(clip: Path) -> tuple[np.ndarray | list | None, list[str]]:
    """Rows of the .npy or .csv beside a clip and names of their columns; None if there is no such file."""
    beside = [clip.with_suffix(suffix) for suffix in (".NPY", ".npy", ".CSV", ".csv")]
    found = {path.suffix.lower(): path for path in beside if path.exists()}
    array, text = found.get(".npy"), found.get(".csv")
    if array:
        try:
            return np.load(array, allow_pickle=False), []
        except (EOFError, OSError, ValueError) as error:
            fail(f"{array} does not read ({error})")
    if not text:
        return None, []
    try:
        rows = [line.split(",") for line in text.read_text("utf-8-sig").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{text} does not read as UTF-8 ({error})")
    if rows and not all(map(is_number, rows[0])):
        return rows[1:], [name.strip(' "') for name in rows[0]]
    return rows, []


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
