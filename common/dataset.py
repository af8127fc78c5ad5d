"""A data set as tensors: transitions, splits by episode, labelled episodes, what the probes measure."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from common import fail
from common.probes import VARIES, Probes, background_change, labelled_probe, mean_over_tasks, nmse
from common.shards import RANK, SEGMENTS, atomic_write, hash_of, held_out_episodes, read_json, read_meta

SAMPLE = 10_000  # transitions that probes and statistics are fitted on, at most


class Column:
    """One array of a data set over all its shards, memory-mapped: `column[rows]` for rows int64 (B,)."""

    def __init__(self, files: list[Path]):
        self.maps = []
        for file in files:
            try:
                self.maps.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                fail(f"{file} does not read ({error}); delete its shard folder and make it again")
        self.ends = np.cumsum([len(array) for array in self.maps])
        self.shape = self.maps[0].shape[1:]
        self.dtype = np.result_type(*{array.dtype for array in self.maps})  # embeddings: float16, or float32
        self.nbytes = sum(array.nbytes for array in self.maps)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        shard = np.searchsorted(self.ends, rows, side="right")
        values = np.empty((len(rows), *self.shape), self.dtype)
        for index in np.unique(shard):
            here = shard == index
            first = self.ends[index] - len(self.maps[index])
            values[here] = self.maps[index][rows[here] - first]
        return values

    def whole(self) -> np.ndarray:
        return np.concatenate(self.maps)


class Dataset:
    """The arrays that a run needs, and which rows it may use for what. A row is a frame.

    A transition t goes from row t to row t + frame_gap of the same episode; `train` and `held_out` split the
    transitions by episode. `first` and `last` are the bounds of each row's episode. Parameters are flags of
    the scripts; root: data/<name>. Whatever is missing, cut or foreign ends the program with one line.
    """

    def __init__(
        self,
        root: str,
        tasks: tuple[str, ...] = (),
        target: str = "pixels",
        encoder: str = "",
        frame_gap: int = 1,
        frame_stack: int = 1,
        probe_fraction: float = 0.2,
        seed: int = 0,
        train_episodes: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.root = Path(root)
        if not (self.root / "meta.json").exists():
            known = ", ".join(str(path.parent) for path in Path("data").glob("*/meta.json"))
            there = f" (there are {known})" if known else ""
            fail(f"no data set in {root}{there}; make it: python collect.py --out {root}")
        self.meta = read_meta(self.root)
        if "shards" not in self.meta:
            fail(f"{root} is not finished; run the command that makes it again")
        self.size = self.meta["size"]
        env = self.meta["env"]  # None: of videos
        self.undistracted = env is not None and env["videos"] == "none"
        known = self.meta["tasks"]
        wanted = [task if task in known else task.removesuffix("-v3") for task in tasks] or known
        self.tasks = tuple(dict.fromkeys(wanted))
        for task in self.tasks:
            if task not in known:
                fail(f"{root} has no task {task!r}; it has {', '.join(known)}")
        scaled_by = self.meta.get("probe_fraction", probe_fraction)  # of videos: whose range is the actions'
        if scaled_by != probe_fraction and self.meta["action"]:
            fail(
                f"{root} holds out {scaled_by:g} of a task's episodes, by which its actions are scaled, not "
                f"{probe_fraction:g}: add --probe-fraction {scaled_by:g}, or import it anew"
            )
        self.target_kind = target
        self.frame_gap = frame_gap
        self.frame_stack = frame_stack
        self.device = torch.device(device)
        self.shards = [shard for shard in self.meta["shards"] if shard["task"] in self.tasks]
        self.open_columns(encoder)
        self.split(probe_fraction, seed, train_episodes)

    def open_columns(self, encoder: str) -> None:
        """Memory-maps the arrays, copies them to a GPU if they fit there, and hashes what they hold."""
        folders = [self.root / shard["shard"] for shard in self.shards]
        names = ["frames", "episode", "step", "episode_index", "actions", "states", "segments"]
        needs = {"clean": "clean", "masked": "segments"}.get(self.target_kind, "frames")
        if needs not in self.meta["arrays"]:
            fail(f"{self.root} has no {needs}: --target {self.target_kind} is for data of the simulator")
        names = [name for name in {*names, needs} if name in self.meta["arrays"]]
        self.columns = {
            name: Column([folder / f"{name}.npy" for folder in folders]) for name in sorted(names)
        }
        hashes = {shard["shard"]: shard["sha256"] for shard in self.shards}
        self.shards_hash = hash_of(hashes)  # whatever the target is
        self.embedding = None  # what the cache says of the target embedding
        if self.target_kind == "embedding":
            key, records = find_embeddings(self.root, self.shards, encoder)
            self.embedding = {"key": key, "name": embedding_name(records[0])} | records[0]
            self.columns["embedding"] = Column([folder / "embeddings" / f"{key}.npy" for folder in folders])
            for shard, record in zip(self.shards, records):
                hashes[f"{shard['shard']}/{key}"] = record["sha256"]
        self.action_dim = None
        if "actions" in self.columns:
            (self.action_dim,) = self.columns["actions"].shape
        self.hash = hash_of(hashes)

        for name, column in self.columns.items():
            if len(column) != len(self.columns["frames"]):
                rows = f"{len(column)} rows, frames.npy {len(self.columns['frames'])}"
                fail(f"{name}.npy of {self.root} has {rows}; damaged: make it again")
        self.resident = {}
        self.nbytes = sum(column.nbytes for column in self.columns.values())
        if self.device.type == "cuda" and self.nbytes < 0.4 * torch.cuda.mem_get_info(self.device)[0]:
            for name, column in self.columns.items():
                self.resident[name] = torch.from_numpy(column.whole()).to(self.device)

    def split(self, probe_fraction: float, seed: int, train_episodes: int) -> None:
        """Episodes to train on, held-out ones, and the order in which episodes are labelled (DETAIL 9)."""
        frames = [shard["frames"] for shard in self.shards]
        tasks = [self.tasks.index(shard["task"]) for shard in self.shards]
        self.task = np.repeat(tasks, frames)
        self.episode = self.columns["episode"].whole().astype(np.int64)
        number = self.task * (self.episode.max() + 1) + self.episode  # one number per episode, over all tasks
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        length = np.diff(np.append(starts, len(number)))
        self.first = np.repeat(starts, length)
        self.last = self.first + np.repeat(length - 1, length)

        has_actions = np.zeros(len(starts), bool)
        if self.action_dim is not None:
            has_actions = np.isfinite(self.columns["actions"][starts]).all(1)
        self.has_actions = np.repeat(has_actions, length)  # of videos some episodes may have none

        self.n_train, self.n_held_out, self.label_order = [], [], []  # by task
        first_held_out = []
        for index, task in enumerate(self.tasks):
            episodes = int(self.episode[self.task == index].max()) + 1
            if episodes < 2:
                fail(
                    f"{self.root} has {episodes} episode of {task}; at least 2 are needed, one for the probes"
                )
            n_held_out = held_out_episodes(episodes, probe_fraction)
            n_train = episodes - n_held_out
            if train_episodes > n_train:
                there = f"the {n_train} of {task} in {self.root}"
                fail(f"--train-episodes {train_episodes} are more than {there}")
            first_held_out.append(n_train)
            self.n_train.append(train_episodes or n_train)
            self.n_held_out.append(n_held_out)
            order = np.random.default_rng([seed, 7]).permutation(self.n_train[-1])
            of_task = starts[self.task[starts] == index]
            self.label_order.append(order[self.has_actions[of_task][order]])
        is_train = self.episode < np.array(self.n_train)[self.task]
        is_held_out = self.episode >= np.array(first_held_out)[self.task]
        rows = np.arange(len(self.episode))
        has_next = rows + self.frame_gap <= self.last
        self.transitions = np.flatnonzero(has_next)
        self.train = np.flatnonzero(has_next & is_train)
        self.held_out = np.flatnonzero(has_next & is_held_out)
        self.held_out_actions = np.flatnonzero((rows < self.last) & is_held_out & self.has_actions)
        for index, task in enumerate(self.tasks):
            for part in (self.train, self.held_out):
                if not (self.task[part] == index).any():
                    fail(f"{self.root} has no episodes of {task} longer than a gap of {self.frame_gap} steps")

    def describe(self) -> str:
        where = f"on {self.device}" if self.resident else "memory-mapped"
        episodes = f"{sum(self.n_train)} episodes to train on, {sum(self.n_held_out)} held out"
        text = f"data {self.root}: {', '.join(self.tasks)}; {episodes}; {self.nbytes / 2**20:.0f} MiB {where}"
        if "segments" not in self.columns:
            text += "; without segments there is no leak probe"
        if self.action_dim is not None and not self.has_actions.all():
            text += f"; {sum(map(len, self.label_order))} of those to train on have actions"
        return text

    def record(self) -> dict:
        """What summary.json says of the data."""
        return {
            "data": str(self.root),
            "env": self.meta["env"],
            "tasks": self.tasks,
            "shards_hash": self.shards_hash,
            "test_clips": hash_of(self.meta["clips"]["test"]) if "clips" in self.meta else None,
            "embedding": self.embedding,
            "size": self.size,
            "action_dim": self.action_dim,
        }

    def labelled(self, budget: str) -> np.ndarray:
        """Rows t, with a true action, of a label budget: a number of training episodes per task, or `all`."""
        most = min(map(len, self.label_order))
        if budget != "all" and not (budget.isdecimal() and 1 <= int(budget) <= most):
            valid = f"`all` or a number from 1 to {most} (episodes to train on, with actions)"
            fail(f"--labelled-episodes takes {valid}, not {budget!r}")
        rows = np.flatnonzero(np.arange(len(self.episode)) < self.last)
        chosen = np.zeros(len(rows), bool)
        for task, order in enumerate(self.label_order):
            count = len(order) if budget == "all" else int(budget)
            chosen |= (self.task[rows] == task) & np.isin(self.episode[rows], order[:count])
        return rows[chosen]

    def labelled_transitions(self, budget: str) -> np.ndarray:
        """Those of `labelled` that have an o_{t + gap}; a budget without any is refused."""
        rows = np.intersect1d(self.labelled(budget), self.train)
        if not len(rows):
            gap = f"a gap of {self.frame_gap} steps"
            fail(f"{self.root}: none of the {budget} labelled episodes of a task is longer than {gap}")
        return rows

    def position(self, rows: np.ndarray) -> Tensor:
        """Where transitions `rows` stand in `transitions`, on the device. (N,) int64"""
        return torch.from_numpy(np.searchsorted(self.transitions, rows)).to(self.device)

    def column(self, name: str, rows: np.ndarray) -> Tensor:
        """Rows (B,) of an array, on the device."""
        if self.resident:
            return self.resident[name][torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(self.columns[name][rows]).to(self.device, non_blocking=True)

    def frame(self, rows: np.ndarray, name: str = "frames") -> Tensor:
        """(B, 3, H, W) uint8, channels-last."""
        return self.column(name, rows).permute(0, 3, 1, 2)

    def stacked(self, rows: np.ndarray) -> np.ndarray:
        """(B, stack): the rows of the frames up to each row; the first of its episode is repeated."""
        back = np.arange(1 - self.frame_stack, 1)
        return np.maximum(rows[:, None] + back, self.first[rows][:, None])

    def observe(self, rows: np.ndarray) -> Tensor:
        """Observation o_t, (B, 3 * stack, H, W) uint8: frames up to t; the first one is repeated."""
        frames = self.frame(self.stacked(rows).reshape(-1))
        return frames.reshape(len(rows), -1, self.size, self.size)

    def target(self, rows: np.ndarray) -> Tensor:
        """What the FDM predicts: embeddings (B, D) float32, or pictures (B, 3, H, W) in [-0.5, 0.5]."""
        if self.target_kind == "embedding":
            return self.column("embedding", rows).float()
        if self.target_kind == "clean":
            return to_float(self.frame(rows, "clean"))
        return to_float(self.frame(rows))

    def actions(self, rows: np.ndarray) -> Tensor:
        """(B, A) float32 in [-1, 1]."""
        return self.column("actions", rows)

    def segment(self, rows: np.ndarray, name: str) -> Tensor:
        """(B, 1, H, W) float: 1 on the pixels of one of SEGMENTS."""
        return (self.column("segments", rows) == SEGMENTS.index(name))[:, None].float()

    def statistics(self) -> dict[str, Tensor]:
        """mean, std of the target and change_mean, change_std of its change, over training transitions.

        Per embedding dimension (D,), or per colour (3, 1, 1).
        """
        rows = np.sort(np.random.default_rng(0).permutation(self.train)[:SAMPLE])
        return change_statistics(self.target, rows, self.frame_gap)

    def probes(self) -> list[tuple[Probes, np.ndarray, np.ndarray]]:
        """For each task: its probes, and the training and held-out transitions whose latents they take.

        A task at a time, for probes of all of them at once would read the task off the latents. Of episodes
        with actions alone, if there are some to fit on and some to measure on.
        """
        found = []
        for splits in zip(self.by_task(self.train), self.by_task(self.held_out)):
            labelled = [rows[self.has_actions[rows]] for rows in splits]
            if all(map(len, labelled)):
                splits = labelled
            found.append(self.probes_of(*splits))
        return found

    def by_task(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[self.task[rows] == task] for task in range(len(self.tasks))]

    def probes_of(self, train: np.ndarray, held_out: np.ndarray) -> tuple[Probes, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        rows = [np.sort(rng.permutation(split)[:SAMPLE]) for split in (train, held_out)]
        arrays = {}
        if all(self.has_actions[split].all() for split in rows):
            arrays["actions"] = [self.mean_action(split) for split in rows]
        if "states" in self.columns:
            states = self.columns["states"]
            changes = [states[split + self.frame_gap] - states[split] for split in rows]
            arrays["states"] = [
                change[:, :18].astype(np.float64) for change in changes
            ]  # hand, gripper, objects
        if "segments" in self.columns and not self.undistracted:
            arrays["background"] = [self.background(split) for split in rows]
        return Probes(**arrays), *rows

    def probe_labelled(
        self, encode: Callable[[np.ndarray], Tensor], budgets: Sequence[str]
    ) -> dict[str, float | None]:
        """{budget: action probe of its labelled episodes alone}, mean over tasks: what may choose.

        encode: transitions (N,) -> their latents (N, ...).
        """
        found = {}
        for budget in budgets:
            measured = []
            for rows in self.by_task(np.intersect1d(self.labelled(budget), self.transitions)):
                value = None  # where these episodes are all shorter than the gap
                if len(rows):
                    z = encode(rows).flatten(1).double().cpu().numpy()
                    value = labelled_probe(z, self.mean_action(rows), self.first[rows])
                measured.append({budget: value})
            found |= mean_over_tasks(measured)
        return found

    @torch.no_grad()
    def policy_nmse(self, act: Callable[[np.ndarray], Tensor]) -> float | None:
        """NMSE of a policy's actions on the held-out episodes, mean over tasks. act: rows (N,) -> (N, A)."""
        measured = []
        for rows in self.by_task(self.held_out_actions):
            if not len(rows):
                return None
            truth = self.columns["actions"][rows].astype(np.float64)
            guess = torch.cat([act(part) for part in chunks(rows)]).clamp(-1, 1).double().cpu().numpy()
            measured.append({"policy_nmse": nmse(guess - truth, truth, truth.var(0) > VARIES)})
        return mean_over_tasks(measured)["policy_nmse"]

    def mean_action(self, rows: np.ndarray) -> np.ndarray:
        """The label of the action probe: mean action between the two frames, float64 (N, A)."""
        actions = [self.columns["actions"][rows + step] for step in range(self.frame_gap)]
        return np.mean(actions, axis=0, dtype=np.float64)

    def background(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the leak probe sees of the transitions: the frames, and the change of the background alone."""
        frames, changes = [], []
        for part in chunks(rows):
            after = part + self.frame_gap
            background = self.segment(part, "background") * self.segment(after, "background")
            frame, next_frame = to_float(self.frame(part)), to_float(self.frame(after))
            pooled, change = background_change(frame, next_frame, background)
            frames.append(pooled)
            changes.append(change)
        return np.concatenate(frames), np.concatenate(changes)

    def export_latents(self, latents: Tensor, path: Path) -> None:
        """Writes the latents (N, latent_dim) of all transitions, with keys that join a LeRobot data set."""
        if RANK > 0:
            return
        rows = self.transitions
        episode = self.columns.get("episode_index", self.columns["episode"])
        columns = {
            "episode_index": episode[rows].astype(np.int64),
            "frame_index": self.columns["step"][rows].astype(np.int64),
            "task": [self.tasks[index] for index in self.task[rows]],
            "latent_action": list(latents.cpu().numpy()),
        }
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        atomic_write(path, buffer.getvalue())


def find_embeddings(root: Path, shards: list[dict], wanted: str) -> tuple[str, list[dict]]:
    """The one key of cached embeddings that begins with `wanted`, and each shard's json."""
    folders = [root / shard["shard"] / "embeddings" for shard in shards]
    keys = sorted({path.stem for folder in folders for path in folder.glob("[!.]*.json")})
    if not keys:
        fail(f"{root} has no embeddings; make them: python collect.py --out {root} --encoder ...")
    found = [key for key in keys if key.startswith(wanted)]
    if wanted in keys:
        found = [wanted]
    if not found:
        near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.3) or keys
        fail(f"--encoder {wanted!r} names no embeddings; there are {', '.join(near)}")
    if len(found) > 1:
        fail(f"--encoder {wanted!r} names several embeddings; there are {', '.join(found)}")

    records = []
    for shard, folder in zip(shards, folders):
        path = folder / f"{found[0]}.json"
        if not path.exists():
            fail(f"{folder.parent} lacks embeddings {found[0]}; run the collect.py command that makes them")
        records.append(read_json(path))
        if records[-1]["frames_sha256"] != shard["sha256"]["frames"]:
            npy = path.with_suffix(".npy")
            fail(f"{npy} was made from other frames than {shard['shard']} holds; delete it and make it again")
    return found[0], records


def embedding_name(record: dict) -> str:
    """oracle, oracle-blind, llava-1.5-7b-hf-L-2-text, ...: for the names of runs."""
    name = record["encoder"]
    if record["prompt"] not in ("best", "noprompt"):
        name += f"-{record['prompt']}"
    if (record["layer"], record["pool"]) != (0, "all"):  # the oracle has these alone
        name += f"-L{record['layer']}-{record['pool']}"
    return re.sub("[^A-Za-z0-9.]+", "-", name)[:60].strip("-")


def chunks(rows: np.ndarray, size: int = 128) -> list[np.ndarray]:
    """Parts of the rows. In parts of 512 a CPU encodes 1.5 times slower: activations exceed its caches."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def thinned(rows: np.ndarray, count: int = SAMPLE) -> np.ndarray:
    """About `count` of the rows, evenly."""
    return rows[:: max(1, len(rows) // count)]


def to_float(frames: Tensor) -> Tensor:
    """uint8 pictures -> float in [-0.5, 0.5], channels-last."""
    return frames.float().div_(255).sub_(0.5).contiguous(memory_format=torch.channels_last)


def common_std(latents: Tensor) -> Tensor:
    """One standard deviation for all dimensions of (N, D), each about its own mean; above 0."""
    return (latents - latents.mean(0)).square().mean().sqrt().clamp_min(1e-6)


def random_shift(frames: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """DrQ's augmentation of (B, C, H, W): edges repeated, a crop moved by `shifts` (B, 2) in 0..2*pad."""
    b, c, h, w = frames.shape
    y = (torch.arange(h, device=frames.device) + shifts[:, :1] - pad).clamp(0, h - 1)  # (B, H)
    x = (torch.arange(w, device=frames.device) + shifts[:, 1:] - pad).clamp(0, w - 1)
    first = h * torch.arange(b, device=frames.device)[:, None, None]
    pixel = (first + y[:, :, None]) * w + x[:, None, :]  # (B, H, W), among all pixels of the batch
    shifted = frames.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, pixel.flatten())
    return shifted.view(b, h, w, c).permute(0, 3, 1, 2)


class Moments:
    """Running mean and std of values (B, D), or of pictures (B, 3, H, W) per colour."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0, 0

    def add(self, values: Tensor) -> None:
        axes = [0, *range(2, values.ndim)]
        values = values.double()
        self.count += values[:, 0].numel()
        self.total = self.total + values.sum(axes, keepdim=True)[0]
        self.squares = self.squares + (values**2).sum(axes, keepdim=True)[0]

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """float32. The std is at least a tenth of its mean: what never changes is not blown up."""
        mean = self.total / self.count
        variance = (self.squares - self.count * mean**2) / (self.count - 1)
        std = variance.clamp_min(0).sqrt()
        return mean.float(), std.clamp_min(0.1 * std.mean() + 1e-6).float()


def change_statistics(
    values: Callable[[np.ndarray], Tensor], rows: np.ndarray, gap: int
) -> dict[str, Tensor]:
    """mean, std of the values of rows, and change_mean, change_std of their change over the gap."""
    now, change = Moments(), Moments()
    for part in chunks(rows):
        value, after = values(part), values(part + gap)
        now.add(value)
        change.add(after - value)
    (mean, std), (change_mean, change_std) = now.mean_std(), change.mean_std()
    return {"mean": mean, "std": std, "change_mean": change_mean, "change_std": change_std}
