"""What a data set is on disk: write, check, lock, read; and how its shards are divided among processes.

data/<name>/meta.json                         what the data set is, and its shards with their checksums
data/<name>/<task>/shard_00000/<array>.npy    a row per frame, see ARRAYS
data/<name>/<task>/shard_00000/shard.json     the shard's own part of meta.json
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np

from common import fail

SEGMENTS = ("background", "table", "robot", "object", "goal")  # classes of segments.npy
ARRAYS = ("frames", "clean", "segments", "actions", "states", "rewards", "success")  # a row per frame
ARRAYS += ("episode", "step", "video")  # where it comes from
RANK = int(os.environ.get("RANK", 0))  # of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------------ files


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: temporary file beside it, fsync, rename."""
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        fail(f"{path} does not read ({error}); delete it and run what wrote it again")
    return content


def hash_of(content: dict | list) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder: Path) -> int:
    """Locks an output folder until this process ends, however it ends; a second process gets one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        fail(f"{folder} can not be written ({error.strerror}); choose another --out")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing {folder}; wait for it, or choose another --out")
    return handle


# ------------------------------------------------------------------------------------------------ shards


def start_shard(folder: Path) -> Path:
    """An empty temporary folder, to be filled by `append_rows` and renamed to `folder` by `finish_shard`."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def append_rows(temporary: Path, arrays: dict[str, np.ndarray]) -> None:
    """Appends rows (n, ...) of each array to <name>.npy, which then has the bytes of np.save of all its rows.

    A shard may be larger than memory; numpy leaves room in the header for a larger number of rows.
    """
    for name, rows in arrays.items():
        path = temporary / f"{name}.npy"
        length = len(rows)
        if path.exists():
            length += len(np.load(path, mmap_mode="r", allow_pickle=False))
        path.touch()
        header = {"shape": (length, *rows.shape[1:]), "fortran_order": False}
        header["descr"] = np.lib.format.dtype_to_descr(rows.dtype)
        with open(path, "r+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(0, os.SEEK_END)
            file.write(rows.tobytes())


def finish_shard(folder: Path, metadata: dict) -> dict:
    """Syncs the temporary folder, adds shard.json and renames it. Returns what shard.json holds."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    hashes = {}
    for path in sorted(temporary.glob("*.npy")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        hashes[path.stem] = sha256(path)
    frames = len(np.load(temporary / "frames.npy", mmap_mode="r", allow_pickle=False))
    task = folder.parent.name
    place = {"shard": f"{task}/{folder.name}", "task": task}
    metadata = place | {"frames": frames} | metadata | {"sha256": hashes}
    write_json(temporary / "shard.json", metadata)
    os.rename(temporary, folder)
    return metadata


def held_out_episodes(episodes: int, probe_fraction: float) -> int:
    """How many of a task's episodes, the last ones, are held out: at least one, and never all."""
    return min(episodes - 1, max(1, round(probe_fraction * episodes)))


def check_shard(folder: Path) -> dict:
    """shard.json of a finished shard; one that was damaged since is named and refused."""
    remedy = "delete that folder and run the same command again"
    try:
        metadata = json.loads((folder / "shard.json").read_text())
        hashes = metadata["sha256"]
        damaged = [name for name in hashes if sha256(folder / f"{name}.npy") != hashes[name]]
    except (OSError, ValueError, KeyError) as error:
        fail(f"shard {folder} does not read ({error}); {remedy}")
    if damaged:
        fail(f"shard {folder}: {damaged[0]}.npy is damaged (checksum); {remedy}")
    return metadata


def read_meta(root: Path) -> dict:
    """meta.json of the data set data/<name>."""
    try:
        meta = json.loads((root / "meta.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{root / 'meta.json'} does not read ({error}); delete the folder, or choose another --out")
    if "arrays" not in meta:
        fail(f"{root} was made by an older version of this program; make it again in another folder")
    return meta


# ------------------------------------------------------------------------------------------------ processes


def wait_for_all_ranks() -> None:
    """A barrier, under torchrun; the ranks share the folder of the data set."""
    if WORLD == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest shard may take long
    dist.barrier()


def wait_and_exit(parent: int) -> None:
    multiprocessing.connection.wait([parent])
    os._exit(1)


def die_with_parent() -> None:
    """Run by every worker: a worker must not go on writing after a kill -9 of its parent."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=wait_and_exit, args=(parent,), daemon=True).start()


def parallel(workers: int, jobs: list[tuple]) -> Iterator:
    """Yields function(*arguments) of each job (function, *arguments), in the order in which they end.

    workers: processes that are spawned, and end with this one; 1: this process does it itself.
    """
    if workers == 1:
        for function, *arguments in jobs:
            yield function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=die_with_parent) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            fail("a worker died (out of memory?); run the command again, with fewer --workers")
        finally:
            pool.shutdown(cancel_futures=True)
