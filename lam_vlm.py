"""Latent action learning with vision-language targets: LAM -> behaviour cloning of latent actions -> action decoder.

    python lam_vlm.py                                            LAPO + embedding target (the promptable oracle), quick scale
    python lam_vlm.py --target pixels                            LAPO: the forward model predicts the distracted pixels
    python lam_vlm.py --target clean                             the ideal target: the twin frame without distractors
    python lam_vlm.py --target masked                            MaskLAM: pixels, but only the robot's count in the loss
    python lam_vlm.py --encoder oracle_blind                     embeddings under another prompt (collect.py --prompt blind makes them)
    python lam_vlm.py --method bc --labelled-episodes all        the ceiling; with a number instead of `all`: the floor
    python lam_vlm.py paper --data data/paper --tasks drawer-open --encoder KEY
                                                                 the paper's scale, one GPU

    torchrun --nproc_per_node=4 lam_vlm.py ...                   the same on four GPUs or machines; --batch-size stays that of all together

Reads data/<name>/ (collect.py), writes runs/<name>/. A command that was cut off goes on where it stopped, with the same weights on a CPU.
`load_policy(run_dir)` gives observation -> action.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


@dataclass
class Args:
    data: str = "data/quick"
    """folder of the data set that collect.py wrote"""
    tasks: tuple[str, ...] = ()
    """tasks of the data set to train on, one model for all of them; none given: all"""
    method: Literal["lapo", "bc"] = "lapo"
    """lapo: the three stages; bc: behaviour cloning of the true actions of the labelled episodes"""
    target: Literal["pixels", "clean", "masked", "embedding"] = "embedding"
    """what the forward model predicts of the next frame: it (LAPO), its twin, the robot's pixels of it (MaskLAM), its embedding"""
    encoder: str = "oracle_best"
    """target embedding: key of the embeddings to predict, or an unambiguous beginning of it"""
    fdm_input: Literal["target", "pixels"] = "target"
    """what the forward model starts from: the target's representation of the current frame, or the distracted frame itself"""
    labelled_episodes: tuple[str, ...] = ("4",)
    """label budgets: episodes a task whose true actions may be used, or `all`; each has its decoder, and may be added later"""
    latent_dim: int = 16
    """dimensions of the latent action z"""
    supervision: float = 0.0
    """weight of an action loss in stage 1, a linear head on z for the transitions of the labelled episodes (LAOM); 0: none"""
    frame_gap: int = 1
    """environment steps between the two frames of a transition: MetaWorld runs at 80 Hz, and a step moves the arm by a third of a pixel"""
    idm_horizon: int = 1
    """K of the multi-step IDM: it sees o_t and o_{t+k}, k ~ U{1..K} gaps; the forward model's target stays one gap ahead"""
    frame_stack: int = 1
    """frames in an observation"""
    stages: tuple[Literal["lam", "bc", "decoder"], ...] = ("lam", "bc", "decoder")
    """stages to run, with those that they need; a finished one is skipped"""
    widths: tuple[int, ...] = (32, 64)
    """channels of the convolutional blocks of IDM, policy and picture FDM"""
    res_blocks: int = 1
    """residual blocks after each of them"""
    stem: int = 4
    """stride of the first block; the others have 2"""
    fdm_hidden: int = 512
    """width of the FDM's three MLP blocks (embedding targets)"""
    fdm_dropout: float = 1.0
    """dropout on the FDM's view of the current frame: what it can not know from there, z must tell (1: it sees z alone, DETAIL 4)"""
    lam_updates: int = 1000
    """updates of stage 1"""
    bc_updates: int = 1500
    """updates of stage 2"""
    decoder_updates: int = 2500
    """updates of stage 3"""
    batch_size: int = 128
    """transitions (stage 1) or frames (stages 2 and 3) an update"""
    lr: float = 1e-3
    """peak learning rate of AdamW under a one-cycle schedule (stages 1 and 2)"""
    decoder_lr: float = 1e-3
    """the same for stage 3"""
    weight_decay: float = 1e-2
    """weight decay of AdamW"""
    max_shift: int = 4
    """random shifts of stage 2, in pixels"""
    decoder_noise: float = 0.1
    """Gaussian noise on the decoder's input, in units of the latents' std"""
    decoder_shifts: int = 8
    """randomly shifted copies of each labelled frame that the decoder is trained on"""
    probe_fraction: float = 0.2
    """fraction of the episodes, the last ones, that no stage trains on: the probes are measured there"""
    log_every: int = 50
    """updates between two rows of metrics.jsonl; checkpoints are written at every fourth"""
    resident: Literal["auto", "yes", "no"] = "auto"
    """data on the device as a whole, or read from its files batch by batch; auto: by size"""
    device: str = "auto"
    """cuda, cpu, or auto"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """arithmetic of stages 1 and 2: bfloat16 (autocast; weights stay float32), float32, or auto: bfloat16 where the hardware has it"""
    seed: int = 0
    """seed of weights, batches and the choice of the labelled episodes"""
    arm: str = ""
    """name under which eval.py groups the seeds of one method; empty: named by method and target"""
    out: str = ""
    """folder of the run; empty: runs/<arm>_<tasks>_s<seed>, and the data set's name if that is not quick"""


QUICK = Args()
PAPER = replace(
    QUICK, data="data/paper", labelled_episodes=("32",), latent_dim=128, widths=(96, 192, 192), res_blocks=2, stem=2,
    fdm_hidden=1024, fdm_dropout=0.0,
    lam_updates=100_000, bc_updates=100_000, batch_size=512, lr=1e-4, decoder_lr=3e-4, weight_decay=0.0, probe_fraction=0.02, log_every=500,
)  # fmt: skip
PRESETS = {"quick": QUICK, "paper": PAPER}
CLEAN_DATA = "none"  # meta.json's env.videos where nothing moves in the background
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
MINE = slice(RANK, None, WORLD)  # of every batch


def fail(message: str) -> None:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f"lam_vlm.py: {message}")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} does not read ({error}); delete it and run what wrote it again")


# ------------------------------------------------------------------------------------------------ data


class Column:
    """One array of the data set, over all shards: `column[rows]` is a tensor on the device, whatever holds the rows.

    rows: int64 (B,). Resident columns live on the device. The rows of others are read from their files, which the system caches: a mapping
    would count as this process's memory, page by page.
    """

    def __init__(self, files: list[Path], device: torch.device):
        self.device, self.parts = device, []
        for file in files:
            try:
                self.parts.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                fail(f"{file} does not read ({error}); delete its shard folder and run collect.py again")
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.files = [open(part.filename, "rb", buffering=0) for part in self.parts]
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.whole: Tensor | None = None

    def make_resident(self) -> None:
        self.whole = torch.from_numpy(np.concatenate(self.parts)).to(self.device)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        if self.whole is not None:
            return self.whole[torch.from_numpy(rows).to(self.device)]
        order = np.argsort(rows, kind="stable")
        shard = np.searchsorted(self.ends, rows[order], side="right")
        begins = np.ones(len(rows), bool)  # neighbouring rows of a shard take one read, of at most 512 rows (the system's limit is 1024)
        begins[1:] = (np.diff(rows[order]) != 1) | (np.diff(shard) != 0)
        begins[::512] = True
        begins = np.flatnonzero(begins)
        out = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        buffer = out.reshape(len(rows), -1).view(np.uint8)
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(rows)]):
            part, file, row = self.parts[shard[begin]], self.files[shard[begin]], int(rows[order[begin]] - self.ends[shard[begin]])
            wanted = [buffer[k] for k in order[begin:end]]
            if os.preadv(file.fileno(), wanted, part.offset + (row + len(part)) * buffer.shape[1]) != len(wanted) * buffer.shape[1]:
                fail(f"{part.filename} ends early; delete its shard folder and run collect.py again")
        return torch.from_numpy(out).to(self.device, non_blocking=True)


class Dataset:
    """The columns a run needs, and which rows it may use for what.

    transitions: rows t whose row t + frame_gap is a frame of the same episode; `train` and `held_out` split them by episode, `labelled(n)`
    gives the frames of n training episodes a task, drawn by the seed. `first` and `last` are the bounds of each row's episode.
    """

    def __init__(self, args: Args, device: torch.device):
        root = Path(args.data)
        if not (root / "meta.json").exists():
            known = [str(path.parent) for path in Path("data").glob("*/meta.json")]
            fail(
                f"no data set in {root}"
                + (f" (there are {', '.join(known)})" if known else "")
                + f"; make it: python collect.py --out {root}"
            )
        self.meta = read_json(root / "meta.json")
        if "shards" not in self.meta:
            fail(f"{root} is not finished; run its collect.py command again")
        for task in args.tasks:
            if task not in self.meta["tasks"]:
                fail(f"{root} has no task {task!r}; it has {', '.join(self.meta['tasks'])}")
        tasks = args.tasks or tuple(self.meta["tasks"])
        shards = [fact for fact in self.meta["shards"] if fact["shard"].split("/")[0] in tasks]
        folders = [root / fact["shard"] for fact in shards]
        self.columns = {}
        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = 16 * len(folders) + 100  # columns keep their files open
        if soft < need <= most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))
        names = ["frames", "segments", "actions", "states", "episode"]
        for name in names + (["clean"] if args.method == "lapo" and args.target == "clean" else []):
            self.columns[name] = Column([folder / f"{name}.npy" for folder in folders], device)
        facts, self.embedding = {fact["shard"]: fact["sha256"] for fact in shards}, None
        if args.method == "lapo" and args.target == "embedding":
            key = self.find_key(folders, args.encoder)
            files = [folder / "embeddings" / f"{key}.npy" for folder in folders]
            for file, fact in zip(files, shards):
                about = read_json(file.with_suffix(".json"))
                if about["frames_sha256"] != fact["sha256"]["frames"]:
                    fail(f"{file} was made from other frames than {fact['shard']} holds; delete it and run collect.py again")
                facts[str(file)] = about["sha256"]
            self.columns["embedding"] = Column(files, device)
            self.embedding = {"key": key} | {name: about.get(name) for name in ("encoder", "prompt", "layer", "pool")}
        self.hash = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        episode = np.concatenate([np.asarray(part) for part in self.columns["episode"].parts])
        for name, column in self.columns.items():
            if column.ends[-1] != len(episode):
                fail(f"{name}.npy has {column.ends[-1]} rows in {root}, episode.npy {len(episode)}; damaged: collect it again")
        task_of = np.repeat([tasks.index(fact["shard"].split("/")[0]) for fact in shards], [fact["frames"] for fact in shards])
        self.group = task_of.astype(np.int64) * (episode.max() + 1) + episode  # one number an episode, over all tasks
        starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        length = np.diff(np.append(starts, len(episode)))
        self.first, self.last = np.repeat(starts, length), np.repeat(starts + length - 1, length)
        per_task = self.meta["episodes_per_task"]
        if per_task < 2:
            fail(f"{root} has {per_task} episode a task; at least 2 are needed, one to train on and one for the probes")
        self.n_train = per_task - min(per_task - 1, max(1, round(args.probe_fraction * per_task)))
        moves = np.arange(len(episode)) + args.frame_gap <= self.last
        self.train, self.held_out = np.flatnonzero(moves & (episode < self.n_train)), np.flatnonzero(moves & (episode >= self.n_train))
        self.episode, self.order = episode, np.random.default_rng([args.seed, 7]).permutation(self.n_train)
        for count in args.labelled_episodes:
            if count != "all" and not (count.isdecimal() and 1 <= int(count) <= self.n_train):
                fail(f"--labelled-episodes takes `all` or a number from 1 to {self.n_train} (episodes to train on), not {count!r}")
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        size = sum(column.nbytes for column in self.columns.values())
        share = 0.4 / (1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # ranks of a machine share its memory
        self.resident = args.resident == "yes" or (args.resident == "auto" and size < share * free)
        if self.resident:
            for column in self.columns.values():
                column.make_resident()
        self.prefetch = not self.resident and device.type != "cpu"  # on a CPU the reader would only take a core from the arithmetic
        where = f"resident on {device}" if self.resident else "read from files" + ", prefetched" * self.prefetch
        print(f"data {root}: {', '.join(tasks)}; {self.n_train} episodes a task to train on, {per_task - self.n_train} held out; "
              f"{size / 2**20:.0f} MiB {where}")  # fmt: skip

    @staticmethod
    def find_key(folders: list[Path], wanted: str) -> str:
        keys = sorted({path.stem for folder in folders for path in (folder / "embeddings").glob("*.json")})
        found = [key for key in keys if key == wanted] or [key for key in keys if key.startswith(wanted)]
        if len(found) != 1:
            near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.3)
            have = f"there are {', '.join(found or near or keys)}" if keys else "there are none at all: run collect.py with --encoder"
            fail(f"--encoder {wanted!r} names {'several' if found else 'no'} embeddings; {have}")
        lacking = [folder for folder in folders if not (folder / "embeddings" / f"{found[0]}.json").exists()]
        if lacking:
            fail(f"embeddings {found[0]} are missing in {lacking[0]}; run the collect.py command that makes them again")
        return found[0]

    def labelled(self, count: str) -> np.ndarray:
        """Rows t, with a true action, of the labelled episodes."""
        chosen = self.order if count == "all" else self.order[: int(count)]
        acted = np.flatnonzero(np.arange(len(self.episode)) < self.last)
        return acted[np.isin(self.episode[acted], chosen)]

    def observe(self, rows: np.ndarray, stack: int) -> Tensor:
        """Observation o_t: frames t-stack+1..t, the first repeated before an episode's start. (B, 3*stack, H, W) uint8, channels-last."""
        rows = np.maximum(rows[:, None] + np.arange(1 - stack, 1), self.first[rows][:, None])  # (B, stack)
        frames = self.columns["frames"][rows.reshape(-1)]
        b, (h, w) = len(rows), frames.shape[1:3]
        return frames.view(b, stack, h, w, 3).permute(0, 1, 4, 2, 3).reshape(b, 3 * stack, h, w)

    def observe_pair(self, rows: np.ndarray, ahead: np.ndarray, stack: int) -> tuple[Tensor, Tensor]:
        """What the IDM sees of the transitions rows -> ahead: observe(rows, stack) and observe(ahead, 1), neighbours read together."""
        if stack > 1:
            return self.observe(rows, stack), self.observe(ahead, 1)
        before, after = self.observe(np.concatenate([rows, ahead]), 1).chunk(2)
        return before, after


def batches(make: Callable[[int], tuple], start: int, stop: int, prefetch: bool) -> Iterator[tuple[int, tuple]]:
    """Yields (update, make(update)); with prefetch the next batch is read while this one trains."""
    if not prefetch:
        yield from ((update, make(update)) for update in range(start, stop))
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, start)
        for update in range(start, stop):
            batch, coming = coming.result(), pool.submit(make, min(update + 1, stop - 1))
            yield update, batch


# ------------------------------------------------------------------------------------------------ models


def to_float(frames: Tensor) -> Tensor:
    """uint8 pictures -> float in [-0.5, 0.5], channels-last."""
    return frames.float().div_(255).sub_(0.5).contiguous(memory_format=torch.channels_last)  # in place: memory is what it costs


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu6(self.conv1(F.relu6(x))))


class ConvNet(nn.Module):
    """Residual conv net of LAOM: strided conv and residual blocks per width, ReLU6. (B, C, H, W) -> (B, widths[-1], h, w)."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        layers, stride = [], args.stem
        for width in args.widths:
            layers += [nn.Conv2d(channels, width, max(3, stride), stride, padding=0 if stride > 2 else 1)]
            layers += [ResBlock(width) for _ in range(args.res_blocks)]
            channels, stride = width, 2
        self.layers = nn.Sequential(*layers, nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def cells(self, size: int) -> int:
        """Cells of the output for a picture of size x size."""
        with torch.no_grad():
            return self(torch.zeros(1, self.layers[0].in_channels, size, size)).shape[2:].numel()


class Head(nn.Module):
    """A conv net, flattened, and a linear layer: the IDM, and the policy of stage 2."""

    def __init__(self, channels: int, out: int, size: int, args: Args):
        super().__init__()
        self.net = ConvNet(channels, args)
        self.linear = nn.Linear(self.net.cells(size) * args.widths[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.net(x).flatten(1))


class IDM(Head):
    """Inverse dynamics model: (o_t, o_{t+k}) -> z (B, latent_dim). Fed with the difference, DETAIL 1."""

    def __init__(self, size: int, args: Args):
        super().__init__(3 * args.frame_stack + 3, args.latent_dim, size, args)

    def forward(self, now: Tensor, future: Tensor) -> Tensor:
        now, future = to_float(now), to_float(future)
        return super().forward(torch.cat([now, future.sub_(now[:, -3:]).mul_(4)], 1))


class EmbeddingFDM(nn.Module):
    """Forward model of embeddings: (e_t, z) -> standardised change of e. MLP blocks, z re-injected into each (LAOM's latent FDM)."""

    def __init__(self, dim: int, size: int, args: Args):
        super().__init__()
        hidden, self.dropout = args.fdm_hidden, args.fdm_dropout
        self.stem = nn.Linear(dim, hidden) if args.fdm_input == "target" else Head(3 * args.frame_stack, hidden, size, args)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden + args.latent_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(3)
        )
        self.out = nn.Linear(hidden, dim)

    def forward(self, start: Tensor, z: Tensor) -> Tensor:
        x = self.stem(F.dropout(start, self.dropout, self.training))
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(torch.cat([norm(x), z], 1))
        return self.out(x)


class PictureFDM(nn.Module):
    """Forward model of pictures: (x_t, z) -> standardised change of x (B, 3, H, W). Conv encoder, z on its channels, upsampling decoder."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        self.encoder, self.dropout = ConvNet(channels, args), args.fdm_dropout
        self.stride = args.stem * 2 ** (len(args.widths) - 1)
        self.mix = nn.Conv2d(args.widths[-1] + args.latent_dim, args.widths[-1], 1)
        layers, strides = [], [args.stem] + [2] * (len(args.widths) - 1)
        for width, out, stride in zip(args.widths[::-1], (*args.widths[-2::-1], 3), strides[::-1]):
            layers += [nn.ReLU6(), nn.Conv2d(width, out * stride**2, 1), nn.PixelShuffle(stride)]  # a transposed conv without overlap
        self.decoder = nn.Sequential(*(ResBlock(args.widths[-1]) for _ in range(args.res_blocks)), *layers)

    def forward(self, start: Tensor, z: Tensor) -> Tensor:
        if self.dropout == 1:
            x = z.new_zeros(len(z), self.mix.out_channels, *(side // self.stride for side in start.shape[2:]))
        else:
            x = F.dropout2d(self.encoder(start), self.dropout, self.training)
        x = self.mix(torch.cat([x, z[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1))
        return self.decoder(x)


class LAM(nn.Module):
    """IDM, FDM and the training split's statistics of the target, which the checkpoint thereby carries."""

    def __init__(self, data: Dataset, args: Args):
        super().__init__()
        size, self.args = data.meta["env"]["size"], args
        self.idm = IDM(size, args)
        shape = (data.columns["embedding"].parts[0].shape[1],) if args.target == "embedding" else (3, 1, 1)
        for name in ("mean", "change_mean"):
            self.register_buffer(name, torch.zeros(shape))
        for name in ("std", "change_std"):
            self.register_buffer(name, torch.ones(shape))
        self.register_buffer("latent_std", torch.ones(()))
        self.action_head = nn.Linear(args.latent_dim, 4) if args.supervision else None
        channels = 3 * args.frame_stack if args.fdm_input == "pixels" or args.target in ("pixels", "masked") else 3
        self.fdm = EmbeddingFDM(shape[0], size, args) if args.target == "embedding" else PictureFDM(channels, args)

    def fit_statistics(self, data: Dataset) -> None:
        """Mean and std of target and change, per embedding dimension or colour, over (a sample of) the training transitions."""
        rows, moments = np.sort(np.random.default_rng(0).permutation(data.train)[:10_000]), {"": [], "change_": []}
        for part in np.array_split(rows, -(-len(rows) // 500)):
            now, after = target_picture(data, part, self.args), target_picture(data, part + self.args.frame_gap, self.args)
            axes = 0 if now.ndim == 2 else (0, 2, 3)
            for prefix, values in (("", now), ("change_", after - now)):
                count, values = values[:, 0].numel(), values.cpu().double()
                moments[prefix].append(torch.stack([values.sum(axes), (values**2).sum(axes), torch.full_like(values.sum(axes), count)]))
        for prefix, parts in moments.items():
            total, squares, count = torch.stack(parts).sum(0)
            mean = total / count
            std = ((squares - count * mean**2) / (count - 1)).clamp_min(0).sqrt().reshape(self.mean.shape)
            getattr(self, f"{prefix}mean").copy_(mean.reshape(self.mean.shape))
            getattr(self, f"{prefix}std").copy_(std.clamp_min(0.1 * std.mean() + 1e-6))  # a dimension that never changes is not blown up

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """MSE of the standardised change; masked: over the robot's pixels alone (weight: 0 or 1 / their share). Plus the action loss.

        The target takes no gradient.
        """
        now, future, target_now, target_next, weight, *labelled = batch
        z = self.idm(now, future)
        target = ((target_next - target_now - self.change_mean) / self.change_std).detach()
        start = to_float(now) if self.args.fdm_input == "pixels" or target.ndim == 4 and self.args.target != "clean" else None
        start = (target_now - self.mean) / self.std if start is None else start
        error = (self.fdm(start, z) - target) ** 2
        loss = (error if weight is None else error * weight).mean()
        if labelled:
            before, after, actions = labelled
            loss = loss + self.args.supervision * F.mse_loss(self.action_head(self.idm(before, after)), actions)
        return loss


def target_picture(data: Dataset, rows: np.ndarray, args: Args) -> Tensor:
    """The target representation of the frames: embeddings (B, D) float32 or pictures (B, 3, H, W) in [-0.5, 0.5]."""
    if args.target == "embedding":
        return data.columns["embedding"][rows].float()
    return to_float(data.columns["clean" if args.target == "clean" else "frames"][rows].permute(0, 3, 1, 2))


class Decoder(nn.Module):
    """Action decoder of stage 3: MLP 256-256 from the policy's latent to an action. (B, latent_dim) -> (B, 4)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(z)


def random_shift(frames: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """DrQ's augmentation: edges repeated, then a crop moved by `shifts` (B, 2) in 0..2*pad pixels. (B, C, H, W) uint8 -> the same."""
    b, c, h, w = frames.shape
    y = (torch.arange(h, device=frames.device) + shifts[:, :1] - pad).clamp(0, h - 1)  # (B, H)
    x = (torch.arange(w, device=frames.device) + shifts[:, 1:] - pad).clamp(0, w - 1)
    frames = frames.permute(0, 2, 3, 1)
    shifted = frames[torch.arange(b, device=frames.device)[:, None, None], y[:, :, None], x[:, None, :]]  # (B, H, W, C)
    return shifted.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ probes


def ridge(x: np.ndarray, y: np.ndarray, penalty: float = 1e-3) -> Callable[[np.ndarray], np.ndarray]:
    """Closed-form ridge regression y ~ x on standardised x, with an intercept. x (N, P), y (N, Q); returns x -> prediction of y."""
    mean, std, centre = x.mean(0), x.std(0) + 1e-8, y.mean(0)
    z = (x - mean) / std
    weights = np.linalg.solve(z.T @ z + penalty * len(z) * np.eye(z.shape[1]), z.T @ (y - centre))
    return lambda new: (new - mean) / std @ weights + centre


def r2_score(y: np.ndarray, prediction: np.ndarray) -> float:
    """1 - residual over total variance, both summed over the dimensions of y; nan where y does not vary."""
    total = ((y - y.mean(0)) ** 2).sum()
    return float(1 - ((y - prediction) ** 2).sum() / total) if total > 1e-12 else float("nan")


class Probes:
    """Linear probes of z, fitted on training transitions (at most 10 000) and measured on episodes that no stage trains on.

    action: z -> a_t. MSE and NMSE (MSE / variance, mean over the dimensions that vary) and R^2 per dimension (None where it does not vary).
    leak: the share of the background's next change that z explains after what o_t explains of either is taken out (partial R^2).
    state: z -> change of the true state (18 numbers: hand, gripper, objects), R^2.
    """

    grid = 8  # cells a side in which the background's colour is averaged

    def __init__(self, data: Dataset, args: Args):
        self.args, rng = args, np.random.default_rng(1)
        self.rows = [np.sort(rng.permutation(split)[:10_000]) for split in (data.train, data.held_out)]
        self.data, columns = data, data.columns
        self.actions = [columns["actions"][rows].double().cpu().numpy() for rows in self.rows]
        self.states = [
            (columns["states"][rows + args.frame_gap] - columns["states"][rows])[:, :18].double().cpu().numpy() for rows in self.rows
        ]
        self.leaks = data.meta["env"]["videos"] != CLEAN_DATA
        if self.leaks:
            now, change = zip(*(self.background(rows) for rows in self.rows))
            explained = ridge(now[0], change[0], 1e-2)
            self.now, self.change = now, [c - explained(n) for c, n in zip(change, now)]

    def background(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frame, and the change of the background alone, both as mean colours of grid x grid cells: two float64 (N, 3 * grid^2)."""
        pooled, changes = [], []
        for k in range(0, len(rows), 500):
            part, columns, gap = rows[k : k + 500], self.data.columns, self.args.frame_gap
            now, after = (to_float(columns["frames"][r].permute(0, 3, 1, 2)) for r in (part, part + gap))
            seen = ((columns["segments"][part] == 0) & (columns["segments"][part + gap] == 0))[:, None].float()
            area = F.adaptive_avg_pool2d(seen, self.grid)
            change = F.adaptive_avg_pool2d((after - now) * seen, self.grid) / area.clamp_min(1e-6) * (area > 0.25)
            pooled.append(F.adaptive_avg_pool2d(now, self.grid).flatten(1).cpu())
            changes.append(change.flatten(1).cpu())
        return torch.cat(pooled).double().numpy(), torch.cat(changes).double().numpy()

    def __call__(self, idm: IDM) -> dict[str, float | list | None]:
        return self.measure([encode(idm, self.data, self.args, rows).double().cpu().numpy() for rows in self.rows])

    def measure(self, z: list[np.ndarray]) -> dict[str, float | list | None]:
        """z: latents (N, latent_dim) of self.rows, training and held-out."""
        (a_train, a_test), (s_train, s_test) = self.actions, self.states
        error = ((ridge(z[0], a_train)(z[1]) - a_test) ** 2).mean(0)
        variance = a_test.var(0)
        varies = (variance > 1e-3) & (a_train.var(0) > 1e-3)
        nmse = error[varies] / variance[varies]
        result = {"action_probe_mse": float(error.mean()), "action_probe_nmse": float(nmse.mean()) if varies.any() else None}
        result["action_probe_r2"] = [float(1 - e / v) if ok else None for e, v, ok in zip(error, variance, varies)]
        result["state_probe_r2"] = r2_score(s_test, ridge(z[0], s_train)(z[1]))
        result["leak_probe_r2"] = None
        if self.leaks:
            explained = ridge(self.now[0], z[0], 1e-2)
            rest = [latent - explained(now) for latent, now in zip(z, self.now)]
            result["leak_probe_r2"] = r2_score(self.change[1], ridge(rest[0], self.change[0])(rest[1]))
        return result


@torch.no_grad()
def encode(idm: IDM, data: Dataset, args: Args, rows: np.ndarray) -> Tensor:
    """Latent actions of the transitions rows -> rows + frame_gap (k = 1). (N, latent_dim) float32"""
    parts = [rows[k : k + 512] for k in range(0, len(rows), 512)]
    return torch.cat([idm(*data.observe_pair(r, r + args.frame_gap, args.frame_stack)) for r in parts]).float()


# ------------------------------------------------------------------------------------------------ training


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: dict, device: torch.device | str) -> dict | None:
    """A checkpoint of this very run; None where there is none. A damaged or foreign one is named and refused."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        stored = checkpoint["identity"]
    except Exception as error:  # torch raises half a dozen types on damaged files
        fail(f"checkpoint {path} does not read ({type(error).__name__}); delete it and run again")
    for key, value in identity.items():
        if stored.get(key) != value:
            fail(f"checkpoint {path} belongs to another run ({key}: {stored.get(key)} there, {value} here); choose another --out")
    return checkpoint


class Log:
    """metrics.jsonl, one object a line, and the same numbers as TensorBoard events."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.writer = SummaryWriter(str(folder / "tensorboard")) if RANK == 0 else None

    def rewind(self, stage: str, update: int) -> None:
        """Drops the rows after the checkpoint from which a stage goes on, and a line that a kill cut."""
        if RANK > 0:
            return
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [row for row in rows if row["stage"] != stage or row["update"] <= update]
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def __call__(self, stage: str, update: int, values: dict) -> None:
        if RANK > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": stage, "update": update} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{stage}/{name}", value, update)


@dataclass
class Run:
    """What every stage needs: arguments, data, device, precision, folder, log, and the identity its checkpoints carry."""

    args: Args
    data: Dataset
    device: torch.device
    dtype: torch.dtype
    folder: Path
    log: Log
    identity: dict
    lock: int
    probes: dict = field(default_factory=dict)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()


class Objective(nn.Module):
    """A module and its loss in one forward pass, so that DistributedDataParallel sees it and averages the gradients over the ranks."""

    def __init__(self, module: nn.Module, loss_of: Callable):
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self, batch: tuple) -> Tensor:
        return self.loss_of(batch)


def train(
    run: Run, stage: str, module: nn.Module, updates: int, lr: float, make: Callable, loss_of: Callable,
    probe: Callable | None = None, finish: Callable | None = None,
) -> dict:  # fmt: skip
    """Trains `module` on loss_of(make(rng)) and leaves <stage>.pt: the loop of all three stages. Returns the last probe, if any.

    finish() is called after the last update, before its checkpoint is written.

    Batches, noise and dropout of an update are drawn from [seed, stage, update] alone, so a run that was cut off and goes on sees what the
    uninterrupted one sees. AdamW, one-cycle schedule. A loss that is not finite ends the run; the last good checkpoint stays.
    Under torchrun every rank draws the whole batch and makes its slice; rank 0 alone probes, logs and writes.
    """
    args, path = run.args, run.folder / f"{stage}.pt"
    optimiser = torch.optim.AdamW(module.parameters(), lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, updates + 1)
    start, seconds = 0, 0.0
    checkpoint = load_checkpoint(path, run.identity, run.device)
    if checkpoint is not None:
        module.load_state_dict(checkpoint["module"])
        start, seconds = checkpoint["update"], checkpoint["seconds"]
        if start == updates:
            print(f"{stage}: finished already, {path}")
            return {}
        optimiser.load_state_dict(checkpoint["optimiser"])
        schedule.load_state_dict(checkpoint["schedule"])
        print(f"{stage}: goes on at update {start}")
    run.log.rewind(stage, start)
    number = {"lam": 1, "bc": 2}.get(stage, 3)

    objective = Objective(module, loss_of)
    if WORLD > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=True, broadcast_buffers=False)

    def save(update: int) -> None:
        state = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
        save_checkpoint(path, state | {"update": update, "seconds": seconds + time.time() - begun, "identity": run.identity})

    begun, total, probed = time.time(), torch.zeros((), device=run.device), {}
    draw = lambda update: make(np.random.default_rng([args.seed, number, update]))  # noqa: E731
    module.train()
    with tqdm(total=updates, initial=start, desc=stage, unit="update", smoothing=0.05, mininterval=1, disable=RANK > 0) as bar:
        for update, batch in batches(draw, start, updates, run.data.prefetch):
            torch.manual_seed(1_000_003 * args.seed + 10**7 * number + update + 10**12 * RANK)
            with run.autocast() if number < 3 else nullcontext():  # the decoder is too small to gain from it
                loss = objective(batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
            bar.update()
            done = update + 1
            if done % args.log_every == 0 or done == updates:
                if WORLD > 1:
                    dist.all_reduce(total)
                mean = total.item() / WORLD / ((done - 1) % args.log_every + 1)
                if not np.isfinite(mean):
                    fail(f"{stage}: the loss is {mean} near update {done}; the last good checkpoint, if any, stays; try a lower --lr")
                total.zero_()
                bar.set_postfix(loss=f"{mean:.3g}")
                row = {"loss": mean, "lr": schedule.get_last_lr()[0], "updates_per_second": (done - start) / (time.time() - begun)}
                if probe is not None and (
                    done == updates or done % max(args.log_every, updates // 5 // args.log_every * args.log_every) == 0
                ):
                    module.eval()
                    probed = probe()
                    module.train()
                    row |= probed
                run.log(stage, done, row)
                if done == updates and finish is not None:
                    module.eval()
                    finish()
                if RANK == 0 and (done % (4 * args.log_every) == 0 or done == updates):
                    save(done)
    return probed


# ------------------------------------------------------------------------------------------------ stages


def train_lam(run: Run) -> LAM:
    """Stage 1: IDM and FDM together, from frames alone. Returns the frozen LAM."""
    args, data, gap = run.args, run.data, run.args.frame_gap
    torch.manual_seed(args.seed)
    lam = LAM(data, args).to(run.device, memory_format=torch.channels_last)
    lam.fit_statistics(data)
    labelled = np.intersect1d(data.labelled(args.labelled_episodes[0]), data.train) if args.supervision else None

    def make(rng: np.random.Generator) -> tuple:
        rows, weight = rng.choice(data.train, args.batch_size), None
        ahead = np.minimum(rows + gap * rng.integers(1, args.idm_horizon + 1, args.batch_size), data.last[rows])[MINE]
        if args.target == "masked":
            robot = (data.columns["segments"][rows + gap] == 2)[:, None].float()
            weight = robot[MINE] / robot.mean().clamp_min(1e-6)
        rows = rows[MINE]
        target = target_picture(data, np.concatenate([rows, rows + gap]), args).chunk(2)
        batch = *data.observe_pair(rows, ahead, args.frame_stack), *target, weight
        if args.supervision:
            rows = rng.choice(labelled, args.batch_size)[MINE]
            batch += *data.observe_pair(rows, rows + gap, args.frame_stack), data.columns["actions"][rows]
        return batch

    probes = Probes(data, args) if RANK == 0 else None

    def fit_latent_std() -> None:
        with torch.no_grad():
            lam.latent_std.copy_(encode(lam.idm, data, args, data.train[:: max(1, len(data.train) // 10_000)]).std())

    probe = (lambda: probes(lam.idm)) if probes else None
    probed = train(run, "lam", lam, args.lam_updates, args.lr, make, lam.loss, probe, fit_latent_std)
    lam.eval().requires_grad_(False)
    run.probes = probed or (probes(lam.idm) if probes else {})
    return lam


def train_bc(run: Run, lam: LAM | None) -> Head:
    """Stage 2: policy o_t -> z_t from distracted frames under random shifts; with --method bc o_t -> a_t of the labelled episodes.

    Latents keep their natural scale up to one common factor: standardising each dimension would blow up those that carry only noise.
    """
    args, data = run.args, run.data
    torch.manual_seed(args.seed + 1)
    size = data.meta["env"]["size"]
    policy = Head(3 * args.frame_stack, args.latent_dim if lam else 4, size, args).to(run.device, memory_format=torch.channels_last)
    rows = data.train if lam else data.labelled(args.labelled_episodes[0])
    if lam:
        targets = torch.zeros(len(rows), args.latent_dim, device=run.device)
        mine = slice(len(rows) * RANK // WORLD, len(rows) * (RANK + 1) // WORLD)
        targets[mine] = encode(lam.idm, data, args, rows[mine]) / lam.latent_std
        if WORLD > 1:
            dist.all_reduce(targets)
    else:
        targets = data.columns["actions"][rows]

    def make(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pick = rng.integers(len(rows), size=args.batch_size)[MINE]
        shifts = torch.from_numpy(rng.integers(0, 2 * args.max_shift + 1, (args.batch_size, 2))[MINE]).to(run.device)
        frames = random_shift(data.observe(rows[pick], args.frame_stack), shifts, args.max_shift)
        return frames, targets[torch.from_numpy(pick).to(run.device)]

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(policy(to_float(batch[0])), batch[1])

    train(run, "bc", policy, args.bc_updates, args.lr, make, loss_of)
    return policy.eval().requires_grad_(False)


def train_decoder(run: Run, policy: Head, count: str) -> Decoder:
    """Stage 3: from the frozen policy's latents to the true actions of `count` labelled episodes, with noise on the latents."""
    args, data = run.args, run.data
    torch.manual_seed(args.seed + 2)
    decoder = Decoder(args.latent_dim).to(run.device)
    rows = np.tile(data.labelled(count), args.decoder_shifts)
    shifts = torch.from_numpy(np.random.default_rng([args.seed, 3]).integers(0, 2 * args.max_shift + 1, (len(rows), 2))).to(run.device)
    with torch.no_grad():
        parts = [slice(k, k + 512) for k in range(0, len(rows), 512)]
        shifted = (random_shift(data.observe(rows[part], args.frame_stack), shifts[part], args.max_shift) for part in parts)
        latents = torch.cat([policy(to_float(frames)).float() for frames in shifted])
    actions, scale = data.columns["actions"][rows], args.decoder_noise * latents.std(0)

    def make(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.from_numpy(rng.integers(len(rows), size=args.batch_size)[MINE]).to(run.device)
        noise = torch.from_numpy(rng.standard_normal((args.batch_size, args.latent_dim), np.float32)[MINE]).to(run.device)
        return latents[pick] + scale * noise, actions[pick]

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(decoder(batch[0]), batch[1])

    train(run, f"decoder_{count}", decoder, args.decoder_updates, args.decoder_lr, make, loss_of)
    return decoder.eval()


def load_policy(run_dir: str | Path, labelled: str | None = None, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a finished run: uint8 frames (B, K, H, W, 3), (B, H, W, 3) or (H, W, 3) -> float32 actions (B, 4) or (4,) in [-1, 1].

    K is the policy's `frame_stack`, oldest frame first. `labelled` picks the decoder of a label budget; the first by default. A run that is
    unfinished, damaged or lacks that budget ends the program with one line.
    """
    folder = Path(run_dir)
    try:
        stored, summary = (json.loads((folder / name).read_text()) for name in ("args.json", "summary.json"))
    except (OSError, ValueError) as error:
        fail(f"{folder} is no finished run ({error}); finish it: python lam_vlm.py --out {folder}")
    args = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    need = ("bc",) if args.method == "bc" else ("bc", "decoder")
    if not set(need) <= set(summary["stages"]):
        fail(f"{folder} has no policy yet, only stage {' '.join(summary['stages'])}; run lam_vlm.py with all --stages")
    budgets = summary["labelled_episodes"]
    labelled = labelled or budgets[0]
    if labelled not in budgets:
        fail(f"{folder} has no decoder for {labelled} labelled episodes; it has {', '.join(budgets)}")
    identity = {"run": summary["identity"]}
    policy = Head(3 * args.frame_stack, 4 if args.method == "bc" else args.latent_dim, summary["size"], args)
    policy.load_state_dict(load_checkpoint(folder / "bc.pt", identity, "cpu")["module"])
    decoder = nn.Identity()
    if args.method == "lapo":
        decoder = Decoder(args.latent_dim)
        decoder.load_state_dict(load_checkpoint(folder / f"decoder_{labelled}.pt", identity, "cpu")["module"])
    network = nn.Sequential(policy, decoder).eval().to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def act(frames: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
        single = batch.ndim == 3
        batch = batch[None] if single else batch
        if batch.ndim == 4:  # (B, H, W, 3): an episode's first frame stands for the whole stack
            batch = batch[:, None].expand(-1, args.frame_stack, -1, -1, -1)
        b, _, h, w, _ = batch.shape
        actions = network(to_float(batch.permute(0, 1, 4, 2, 3).reshape(b, -1, h, w))).clamp(-1, 1).float().cpu().numpy()
        return actions[0] if single else actions

    act.frame_stack = args.frame_stack
    return act


# ------------------------------------------------------------------------------------------------ program


def default_arm(args: Args, videos: str) -> str:
    """Name of the method: bc-all, bc-few, lapo, lapo-clean-target, masklam, lapo-<encoder>; -clean-data; laom if supervised."""
    if args.method == "bc":
        return "bc-all" if args.labelled_episodes == ("all",) else "bc-few"
    encoder = args.encoder.rsplit("_r", 1)[0].removesuffix("_L0_all").replace("_", "-").removesuffix("-best")  # the oracle's only cell
    name = {"pixels": "lapo", "clean": "lapo-clean-target", "masked": "lapo-masked", "embedding": f"lapo-{encoder}"}[args.target]
    name = name.replace("lapo", "laom") if args.supervision else "masklam" if args.target == "masked" else name
    return f"{name}-clean-data" if videos == CLEAN_DATA else name


def default_out(args: Args) -> str:
    """Folder of a run: two commands that train something else do not share one."""
    budget = f"-{args.labelled_episodes[0]}" if args.arm == "bc-few" or args.supervision else ""
    name = Path(os.path.abspath(args.data)).name
    return f"runs/{args.arm}{budget}_{'+'.join(args.tasks)}_s{args.seed}" + (f"_{name}" if name != "quick" else "")


def identity_of(args: Args) -> dict:
    """The arguments that decide what is trained, as JSON has them."""
    free = {"stages", "device", "resident", "out", "arm"}
    if args.method == "lapo" and not args.supervision:
        free |= {"labelled_episodes"}  # each budget has its decoder, stages 1 and 2 are shared
    return json.loads(json.dumps({key: value for key, value in asdict(args).items() if key not in free}))


def pick_device(wanted: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Device and precision, printed with their reasons."""
    if wanted == "auto":
        wanted, reason = ("cuda", "a CUDA device is here") if torch.cuda.is_available() else ("cpu", "no GPU found")
    else:
        reason = "--device"
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and wanted == "cuda" else wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {wanted} can not be used: {str(error).splitlines()[0]}")
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # AVX-512 or AMX; elsewhere it is emulated, and slower than float32
        has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    why = "--dtype" if precision != "auto" else "the hardware has it" if has_bf16 else "the hardware has no bfloat16"
    precision = precision if precision != "auto" else "bfloat16" if has_bf16 else "float32"
    print(f"device {device} ({reason}), {precision} ({why}), {torch.get_num_threads()} CPU threads")
    return device, getattr(torch, precision)


def stage_order(stage: str) -> tuple:
    """lam, bc, decoder_2, decoder_16, decoder_all"""
    count = stage.removeprefix("decoder_")
    return stage != "lam", stage != "bc", not count.isdecimal(), int(count) if count.isdecimal() else 0


def curves(folder: Path) -> None:
    """curves.png: loss of each stage, and the probes over stage 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages = sorted({row["stage"] for row in rows}, key=stage_order)
    probes = {"action_probe_nmse": "action probe NMSE", "leak_probe_r2": "leak probe R²", "state_probe_r2": "state probe R²"}
    figure, axes = plt.subplots(1, len(stages) + 1, figsize=(3.2 * (len(stages) + 1), 2.6), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages):
        axis.semilogy(*zip(*[(row["update"], row["loss"]) for row in rows if row["stage"] == stage]))
        axis.set(title=f"{stage}: loss", xlabel="update")
    for key, label in probes.items():
        points = [(row["update"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes[0, -1].plot(*zip(*points), "o-", label=label)
    axes[0, -1].set(title="probes, held-out episodes", xlabel="update of stage 1")
    if axes[0, -1].lines:
        axes[0, -1].legend(fontsize=7)
    figure.savefig(folder / ".tmp_curves.png", dpi=120)
    os.replace(folder / ".tmp_curves.png", folder / "curves.png")
    plt.close(figure)


def parse_args(arguments: list[str]) -> Args:
    preset, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in PRESETS else ("quick", arguments)
    args = tyro.cli(Args, default=PRESETS[preset], args=rest, description=__doc__, prog=f"lam_vlm.py [{'|'.join(PRESETS)}]")
    least = dict.fromkeys(("max_shift", "res_blocks", "seed"), 0)
    least |= dict.fromkeys(("latent_dim", "frame_gap", "idm_horizon", "frame_stack", "stem", "batch_size", "log_every"), 1)
    least |= dict.fromkeys(("lam_updates", "bc_updates", "decoder_updates", "decoder_shifts"), 1)
    for name, bound in least.items():
        if getattr(args, name) < bound:
            fail(f"--{name.replace('_', '-')} must be at least {bound}")
    if not args.supervision >= 0:
        fail("--supervision must be at least 0")
    if not 0 <= args.fdm_dropout <= 1 or not 0 < args.probe_fraction < 1:
        fail("--fdm-dropout is a fraction from 0 to 1, --probe-fraction one between 0 and 1")
    if args.method == "lapo" and args.fdm_input == "pixels" and args.fdm_dropout == 1:
        print("note: --fdm-input pixels changes nothing while --fdm-dropout is 1 (the FDM sees z alone); give a lower one too")
    if (args.method == "bc" or args.supervision) and len(args.labelled_episodes) != 1:
        fail("--method bc and --supervision train on one label budget: give one value to --labelled-episodes")
    if args.method == "bc":
        args.stages = ("bc",)
    return args


def open_run(args: Args) -> Run:
    """Locks runs/<name>/, refuses a folder of other arguments, loads the data, and writes args.json."""
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} can not be divided among {WORLD} ranks")
    device, dtype = pick_device(args.device, args.dtype)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # rank 0 probes while others wait
    args.dtype = str(dtype).removeprefix("torch.")
    data = Dataset(args, device)
    args.tasks = args.tasks or tuple(data.meta["tasks"])
    args.arm = args.arm or default_arm(args, data.meta["env"]["videos"])
    args.out = args.out or default_out(args)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        if RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
    except OSError:
        fail(f"another process is writing {folder}; wait for it, or choose another --out")
    identity = identity_of(args)
    path = folder / "args.json"
    if path.exists():
        stored = read_json(path)
        changed = [f"{key}: {stored.get(key)} there, {value} here" for key, value in identity.items() if stored.get(key) != value]
        if changed:
            fail(f"{folder} is a run with other arguments ({'; '.join(changed)}); choose another --out")
    if WORLD > 1:
        dist.barrier()  # nobody trains before every rank has agreed
    if RANK == 0:
        atomic_write(path, json.dumps(asdict(args), indent=1) + "\n")
    identity = {"run": hashlib.sha256(json.dumps([identity, data.hash]).encode()).hexdigest()[:16], "data": data.hash}
    return Run(args, data, device, dtype, folder, Log(folder), identity, lock)


def summarise(run: Run) -> None:
    """summary.json and curves.png of the stages that are done."""
    from importlib.metadata import version

    args, stages, digests = run.args, {}, {}
    for stage in ("lam", "bc", *sorted((path.stem for path in run.folder.glob("decoder_*.pt")), key=stage_order)):
        checkpoint = load_checkpoint(run.folder / f"{stage}.pt", run.identity, "cpu")
        if checkpoint is None or checkpoint["update"] < getattr(args, f"{stage.split('_')[0]}_updates"):
            continue
        weights, seconds = checkpoint["module"], checkpoint["seconds"]
        stages[stage] = {"seconds": round(seconds, 1), "updates_per_second": round(checkpoint["update"] / max(seconds, 1e-9), 2)}
        stages[stage]["parameters"] = sum(weight.numel() for weight in weights.values())
        digests[stage] = hashlib.sha256(b"".join(name.encode() + w.float().numpy().tobytes() for name, w in weights.items())).hexdigest()
    if args.method == "bc":
        policies = {args.labelled_episodes[0]: ["bc"]} if "bc" in stages else {}
    else:  # one policy a label budget, those of earlier commands included
        policies = {stage.removeprefix("decoder_"): ["bc", stage] for stage in stages if stage.startswith("decoder_")}
    hashes = {
        budget: hashlib.sha256("".join(digests[part] for part in parts).encode()).hexdigest()[:16] for budget, parts in policies.items()
    }
    summary = {
        "arm": args.arm,
        "seed": args.seed,
        "tasks": args.tasks,
        "stages": list(dict.fromkeys(name.split("_")[0] for name in stages)),
    }
    summary |= {"labelled_episodes": list(policies), "policy_hash": hashes} | run.probes
    summary |= {"per_stage": stages, "identity": run.identity["run"], "embedding": run.data.embedding}
    summary |= {"data": args.data, "data_hash": run.data.hash, "size": run.data.meta["env"]["size"], "device": str(run.device)}
    summary |= {"dtype": str(run.dtype), "ranks": WORLD, "threads": torch.get_num_threads()}
    summary |= {"versions": {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "numpy")}}
    atomic_write(run.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    curves(run.folder)
    probes = {key: round(value, 3) for key, value in run.probes.items() if isinstance(value, float)}
    times = ", ".join(f"{name} {facts['seconds']:.0f} s" for name, facts in stages.items())
    print(f"{run.folder}: {times}; {probes or 'no probes'}")


def main(args: Args) -> None:
    run = open_run(args)
    lam = None

    # stage 1: a latent action model from frames alone
    if args.method == "lapo":
        lam = train_lam(run)

    # stage 2: a policy that predicts latent actions from distracted frames (or true ones, --method bc)
    if {"bc", "decoder"} & set(args.stages):
        policy = train_bc(run, lam)

    # stage 3: true actions from the policy's latents, learnt from a handful of labelled episodes
    if "decoder" in args.stages:
        for count in args.labelled_episodes:
            train_decoder(run, policy, count)

    if RANK == 0:
        summarise(run)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks; errors are everybody's
        main(parse_args(sys.argv[1:]))
    except (OSError, torch.OutOfMemoryError) as error:
        fail(f"{error}; what is finished is kept: run the same command again")
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on from the last checkpoint")
