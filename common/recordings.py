"""An episode of recorded video: where its frames are, and the frames, decoded and square."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet

from common import fail

RESIZER = av.video.reformatter.VideoReformatter()  # held: making one costs more than resizing a frame


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


def frame_times(clip: Path) -> tuple[np.ndarray, float]:
    """Seconds (N,) of a clip's frames by its packets, and width / height: nothing is decoded."""
    try:
        with av.open(str(clip)) as video:
            stream = video.streams.video[0]
            packets = [packet for packet in video.demux(stream) if packet.size]
            announced, seconds = stream.frames, float(stream.time_base)
            shape, length = stream.width / stream.height, (video.duration or 0) / av.time_base
    except (av.FFmpegError, IndexError) as error:
        fail(f"{clip} does not decode as a video ({error})")
    if len(packets) < announced:
        fail(f"{clip} ends early: it has {len(packets)} of {announced} frames")
    ticks = [packet.dts if packet.pts is None else packet.pts for packet in packets if not packet.is_discard]
    if len(ticks) < 2:
        fail(f"{clip} has {len(ticks)} frames; an episode needs 2 at least")
    if None in ticks:
        fail(f"{clip} does not say when its frames are shown")
    times = np.array(sorted(ticks)) * seconds
    if not announced and times[-1] < 0.9 * length - 1:  # mkv and webm announce their length alone
        fail(f"{clip} ends early: its frames last {times[-1]:.1f} of {length:.1f} s")
    return times, shape


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


def check_time(frame: av.VideoFrame, seconds: float, episode: Episode) -> None:
    """A decoder may leave a broken frame out without a word; then all later ones are another's."""
    if frame.pts is not None and abs(frame.time - seconds) > 1e-4:
        fail(f"{episode} does not decode: the frame of {seconds:.3f} s is of {frame.time:.3f} s")


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
        stream.codec_context.thread_count = 1  # a process per core is faster
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
                if not episode.camera:
                    check_time(frame, episode.times[done], episode)
                frames[done] = square(frame, size, how)
                shapes.add(f"{frame.width} x {frame.height}")
                done += 1
            if done == len(wanted):
                break
    except (av.FFmpegError, OSError) as error:  # of pictures OSError
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
