"""Background clips: Clips(videos, split, size)[i] is a video, uint8 (T, size, size, 3).

The embedded ones (generated_clips.py), DAVIS-2017, or a folder of video files and of folders of frames.
"""

from __future__ import annotations

import difflib
import fcntl
import glob
import itertools
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import av
import numpy as np
import pooch
from PIL import Image, ImageOps, ImageSequence

from common import fail
from common.generated_clips import GENERATED_CLIPS, generated_clip

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".gif")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
MAX_CLIP_FRAMES = 1000  # a longer video is cut here
CACHE_BYTES = 256 * 2**20  # decoded clips that a process keeps in memory
DAVIS_URL = "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip"
DAVIS_LISTS = {"train": "ImageSets/2017/train.txt", "test": "ImageSets/2017/val.txt"}  # 60 and 30 clips


class Clips:
    """Background clips of a split: clips[i] is uint8 (T, size, size, 3), read-only, decoded when asked for.

    videos: "generated", "davis", or the path of a folder of clips or of a DAVIS archive; split: "train" or
    "test". Bad input ends the program with one line.
    """

    cache: OrderedDict[tuple, np.ndarray] = OrderedDict()  # least recently used first

    def __init__(self, videos: str, split: str, size: int):
        self.split = split
        self.size = size
        self.generated = videos == "generated"
        if self.generated:
            self.root = None
            self.names = [f"{split}-{index:02d}" for index in range(GENERATED_CLIPS[split])]
            return
        self.root = Path(videos).expanduser()
        if videos == "davis":
            self.root = davis_archive()
        if not self.root.exists():
            near = difflib.get_close_matches(videos.lower(), ("generated", "davis", "none"), 1)
            hint = ""
            if near and "/" not in videos:
                hint = f"; did you mean {near[0]!r}?"
            fail(f"--videos {videos!r} is neither generated, davis or none nor an existing path{hint}")
        self.pictures = list_clips(self.root, split)
        self.names = list(self.pictures)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        key = (self.root, self.split, name, self.size)
        if key not in self.cache:
            if self.generated:
                frames = generated_clip(self.split, self.names.index(name), self.size)
            else:
                frames = read_clip(self.root, name, self.pictures[name], self.size)
            frames.flags.writeable = False
            self.cache[key] = frames
            while len(self.cache) > 1 and sum(clip.nbytes for clip in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]


def davis_archive() -> Path:
    """The official DAVIS-2017 archive in the cache folder, downloaded if it is not there."""
    pooch.get_logger().setLevel("WARNING")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lam_vlm"
    final = cache / DAVIS_URL.rsplit("/", 1)[1]
    if final.exists():
        return final
    unchecked = cache / f"{final.name}.unchecked"
    hint = "run again, or give a local archive or folder with --videos PATH"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's download
            if final.exists():
                return final
            download = pooch.HTTPDownloader(progressbar=True, timeout=30)
            pooch.retrieve(DAVIS_URL, None, unchecked.name, cache, downloader=download)
            if not is_whole_zip(unchecked):
                unchecked.unlink()
                fail(f"what came from {DAVIS_URL} is not a whole zip archive and was deleted; {hint}")
            unchecked.rename(final)
    except OSError as error:  # no network, a server that refuses, a full disk
        reason = " ".join(str(error).split())
        fail(f"cannot download {DAVIS_URL} ({reason}); {hint}")
    return final


def is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile and zlib raise their own errors on damaged data
        return False


class Files:
    """The files of a folder or of a zip archive, by their names relative to it."""

    def __init__(self, root: Path):
        self.root = root
        self.archive = None
        if root.is_file():
            self.archive = zipfile.ZipFile(root)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        if self.archive:
            self.archive.close()

    def names(self) -> list[str]:
        if self.archive:
            return self.archive.namelist()
        return glob.glob("**/*", root_dir=self.root, recursive=True)  # leaves hidden files out

    def open(self, name: str) -> IO[bytes]:
        if self.archive:
            return self.archive.open(name)
        return open(self.root / name, "rb")


def list_clips(root: Path, split: str) -> dict[str, list[str]]:
    """{clip: its pictures in order} of a split in a folder or DAVIS archive; a video has no pictures."""
    if root.is_file() and not zipfile.is_zipfile(root):
        fail(f"--videos {root} is neither a folder of clips nor a DAVIS archive (.zip)")
    if root.name == "JPEGImages":
        fail(f"--videos {root} holds the same clips in several sizes: give the folder above, that of DAVIS")
    with Files(root) as files:
        names = sorted(files.names(), key=by_number)
        official = []
        for name in names:
            if name.endswith(DAVIS_LISTS[split]):
                with files.open(name) as stream:
                    official = stream.read().decode().split()

    clips: dict[str, list[str]] = {}
    for name in names:
        folder, ending = os.path.dirname(name), os.path.splitext(name)[1].lower()
        if ending in VIDEO_ENDINGS:
            clips[name] = []
        elif ending in PICTURE_ENDINGS and folder:
            clips.setdefault(folder, []).append(name)

    davis = {}
    for folder, pictures in clips.items():
        if os.path.dirname(folder).endswith("JPEGImages/480p"):
            davis[os.path.basename(folder)] = pictures
    if davis:
        return official_split(root, split, official, davis)
    if root.is_file():
        fail(f"the archive {root} has no folder JPEGImages/480p: it is not DAVIS-2017 at 480p")
    if len(clips) < 2:
        videos, pictures = " ".join(VIDEO_ENDINGS), " ".join(PICTURE_ENDINGS)
        fail(
            f"{len(clips) or 'no'} clip in {root}, at least 2 are needed (no test clip is a training clip): "
            f"video files ({videos}) or one sub-folder of frames ({pictures}) for each clip"
        )
    ordered = sorted(clips)
    cut = round(len(ordered) * 2 / 3)  # leaves at least one on either side
    chosen = {"train": ordered[:cut], "test": ordered[cut:]}[split]
    return {name: clips[name] for name in chosen}


def official_split(root: Path, split: str, official: list[str], davis: dict) -> dict[str, list[str]]:
    """The clips of DAVIS that its own list names."""
    if not official:
        fail(f"{root} has the frames of DAVIS but no {DAVIS_LISTS[split]}, which names the {split} clips")
    for name in official:
        if name not in davis:
            fail(f"{root} has no frames of the DAVIS clip {name!r}, named in {DAVIS_LISTS[split]}")
    return {name: davis[name] for name in official}


def by_number(name: str) -> list[str | int]:
    """Sorts frame 2 before frame 10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"([0-9]+)", name)]


def read_clip(root: Path, name: str, pictures: list[str], size: int) -> np.ndarray:
    """Frames of a clip, uint8 (T, size, size, 3): a video is never held at its full size."""
    frames = []
    try:
        if pictures:
            images = read_pictures(root, pictures, 2 * size)
        elif name.lower().endswith(".gif"):
            images = ImageSequence.Iterator(Image.open(root / name))
        else:
            images = read_video(root / name)
        for image in itertools.islice(images, MAX_CLIP_FRAMES):
            frames.append(to_square(image, size))
    except Exception as error:  # decoders raise errors of every kind on damaged data
        if pictures:
            name = pictures[len(frames)]
        fail(f"cannot decode {root / name} ({error}); delete or replace it and run again")
    if not frames:
        fail(f"the video {root / name} has no frames; delete or replace it and run again")
    return np.stack(frames)


def read_video(path: Path) -> Iterator[Image.Image]:
    with av.open(path) as video:
        for frame in video.decode(video=0):
            yield frame.to_image().rotate(frame.rotation, expand=True)  # phones store how they were held


def read_pictures(root: Path, names: list[str], side: int) -> Iterator[Image.Image]:
    with Files(root) as files:
        for name in names:
            with files.open(name) as stream, Image.open(stream) as image:
                image.draft("RGB", (side, side))  # a JPEG is decoded no larger than needed
                yield ImageOps.exif_transpose(image)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Centre crop, antialiased resize: uint8 (size, size, 3)."""
    side = min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return np.asarray(square)
