"""Writes what collect.py made as a user's own folder: an .mp4 and an .npy of actions for each episode.

    python tests/as_videos.py data/clean my_videos

The proof of import_videos.py: what comes back must be the frames, within the codec's error, and the probes of
a LAM that was trained on it those of the collected data (docs/own_videos.md).
"""

import sys
from pathlib import Path

import av
import numpy as np

from common.shards import read_meta


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264 at a quality at which the codec's error is a few grey levels."""
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        video.mux(stream.encode())


def main(source: Path, out: Path) -> None:
    meta = read_meta(source)
    for shard in meta["shards"]:
        names = ("frames", "actions", "episode")
        frames, actions, episode = (np.load(source / shard["shard"] / f"{name}.npy") for name in names)
        folder = out / shard["task"]
        folder.mkdir(parents=True, exist_ok=True)
        for number in np.unique(episode):
            rows = episode == number
            write_clip(folder / f"{number:05d}.mp4", frames[rows], meta["fps"])
            np.save(folder / f"{number:05d}.npy", actions[rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
