"""Latent action learning with vision-language targets (LAPO+VLM).

    python lam_vlm.py                                      LAPO+VLM, target: the promptable oracle's embedding
    python lam_vlm.py --target pixels                      LAPO: the FDM predicts distracted pixels
    python lam_vlm.py --target clean                       the ideal target: the twin, no distractors
    python lam_vlm.py --target masked                      MaskLAM: only pixels of the robot count
    python lam_vlm.py --encoder oracle_blind               embeddings under another prompt
    python lam_vlm.py --method bc --labelled-episodes all  the ceiling; with a number: the floor
    python lam_vlm.py paper --tasks reach --encoder KEY    the paper's scale, one GPU
    torchrun --nproc_per_node=4 lam_vlm.py ...             four GPUs; --batch-size stays that of all together

Reads data/<name>/ (collect.py, import_videos.py), writes runs/<name>/. A command that was cut off goes on
where it stopped, with the same weights on a CPU. `load_policy(run_dir)` gives observation -> action.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import at_least, fail, parse
from common.actor import Actor, read_policy_run
from common.dataset import Dataset, chunks, common_std, random_shift, thinned, to_float
from common.device import average_gradients, mean_over_ranks, pick_device
from common.probes import mean_over_tasks
from common.records import default_folder, load_weights, own_variant
from common.runs import Run, one_cycle
from common.shards import RANK, WORLD


@dataclass
class Args:
    data: str = "data/quick"
    """folder of the data set that collect.py or import_videos.py wrote"""
    tasks: tuple[str, ...] = ()
    """tasks of the data set to train on, one model for all of them; none given: all"""
    method: Literal["lapo", "bc"] = "lapo"
    """lapo: the three stages; bc: stage 2 alone, on the true actions of the labelled episodes"""
    target: Literal["pixels", "clean", "masked", "embedding"] = "embedding"
    """what the FDM predicts: the next frame, its twin, its robot's pixels (MaskLAM), or its embedding"""
    encoder: str = "oracle_best"
    """target embedding: key of the embeddings to predict, or an unambiguous beginning of it"""
    fdm_sees: Literal["z", "target", "frame"] = "z"
    """what the FDM sees besides z: nothing, the target at t, or the frame o_t (LAPO); DETAIL 4"""
    labelled_episodes: tuple[str, ...] = ("4",)
    """label budgets: episodes per task whose true actions may be used, or `all`; each has its decoder"""
    latent_dim: int = 16
    """dimensions of the latent action z"""
    supervision: float = 0.0
    """weight of an action loss in stage 1: a linear head on z, labelled episodes alone (LAOM); 0: none"""
    frame_gap: int = 1
    """steps between the two frames of a transition (DETAIL 5)"""
    idm_horizon: int = 1
    """K of the multi-step IDM: it sees o_t and o_{t+k}, k ~ U{1..K} gaps; the target stays one gap ahead"""
    frame_stack: int = 1
    """frames in an observation"""
    stages: tuple[Literal["lam", "bc", "decoder"], ...] = ("lam", "bc", "decoder")
    """stages to run (bc: the policy), with those that they need; a finished one is skipped"""
    widths: tuple[int, ...] = (32, 64)
    """channels of the convolutional blocks of IDM, policy and picture FDM"""
    res_blocks: int = 1
    """residual blocks after each of them"""
    stem: int = 4
    """stride of the first block; the others have 2"""
    fdm_hidden: int = 512
    """width of the FDM's three MLP blocks (embedding targets)"""
    lam_updates: int = 1000
    """updates of stage 1"""
    bc_updates: int = 1500
    """updates of stage 2"""
    decoder_updates: int = 2500
    """updates of stage 3"""
    batch_size: int = 128
    """transitions (stage 1) or frames (stages 2 and 3) per update"""
    lr: float = 1e-3
    """peak learning rate of AdamW under a one-cycle schedule (stages 1 and 2)"""
    decoder_lr: float = 1e-3
    """the same for stage 3"""
    weight_decay: float = 1e-2
    """weight decay of AdamW"""
    max_shift: int = 4
    """random shifts of the frames of stages 2 and 3, in pixels (DETAIL 7)"""
    decoder_noise: float = 0.1
    """Gaussian noise on the decoder's input, in units of the latents' std"""
    decoder_shifts: int = 8
    """randomly shifted copies of each labelled frame that the decoder is trained on"""
    probe_fraction: float = 0.2
    """fraction of a task's episodes, the last ones, that no stage trains on: the probes are measured there"""
    train_episodes: int = 0
    """train on only the first N episodes of each task; 0: on all that are not held out"""
    device: str = "auto"
    """cuda, cpu, or auto"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """arithmetic of stages 1 and 2, weights stay float32; auto: bfloat16 where the hardware has it"""
    seed: int = 0
    """seed of weights, batches and the choice of the labelled episodes"""
    variant: str = ""
    """name under which eval.py groups the seeds of one method; empty: named by method and target"""
    out: str = ""
    """folder of the run; empty: runs/<variant>_<tasks>_s<seed>, and the data set's name if not quick"""
    export: bool = False
    """also write runs/<name>/latents.parquet: the latent action of every transition"""


QUICK = Args()
PAPER = Args(
    data="data/paper",
    labelled_episodes=("32",),
    latent_dim=128,
    widths=(96, 192, 192),
    res_blocks=2,
    stem=2,
    fdm_hidden=1024,
    lam_updates=100_000,
    bc_updates=100_000,
    batch_size=512,
    lr=1e-4,
    decoder_lr=3e-4,
    weight_decay=0.0,
    probe_fraction=0.02,
)
PRESETS = {"quick": QUICK, "paper": PAPER}


# ---------------------------------------------------------------------------------------- models


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu6(self.conv1(F.relu6(x))))


class ConvNet(nn.Sequential):
    """Residual conv net of LAOM: strided convs, residual blocks. (B, C, S, S) -> (B, width, s, s)"""

    def __init__(self, channels: int, args: Args):
        layers, stride = [], args.stem
        for width in args.widths:
            padding = 0 if stride > 2 else 1
            layers.append(nn.Conv2d(channels, width, max(3, stride), stride, padding))
            layers += [ResBlock(width) for _ in range(args.res_blocks)]
            channels, stride = width, 2
        super().__init__(*layers, nn.ReLU6())


def total_stride(size: int, args: Args) -> int:
    """Frame pixels per pixel of ConvNet's output; refuses frames that it does not divide."""
    stride = args.stem * 2 ** (len(args.widths) - 1)
    if size % stride:
        fail(f"--stem and --widths need frames of a multiple of {stride} px, these have {size}")
    return stride


class ConvEncoder(nn.Module):
    """A conv net, flattened, and a linear layer: (B, C, S, S) -> (B, out)."""

    def __init__(self, channels: int, out: int, size: int, args: Args):
        super().__init__()
        self.net = ConvNet(channels, args)
        with torch.no_grad():
            features = self.net(torch.zeros(1, channels, size, size)).numel()
        self.linear = nn.Linear(features, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.net(x).flatten(1))


class IDM(nn.Module):
    """Inverse dynamics model: (o_t, o_{t+k}) uint8 -> z (B, latent_dim). It sees the difference, DETAIL 1."""

    def __init__(self, size: int, args: Args):
        super().__init__()
        self.encoder = ConvEncoder(3 * args.frame_stack + 3, args.latent_dim, size, args)

    def forward(self, obs: Tensor, future: Tensor) -> Tensor:
        obs, future = to_float(obs), to_float(future)
        difference = 4 * (future - obs)[:, -3:]  # of the newest frames
        return self.encoder(torch.cat([obs, difference], 1))


class EmbeddingFDM(nn.Module):
    """Forward model of embeddings: context (B, hidden), z -> change (B, dim). z enters each block (LAOM)."""

    def __init__(self, dim: int, args: Args):
        super().__init__()
        hidden = args.fdm_hidden
        self.norms = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.norms.append(nn.LayerNorm(hidden))
            first, second = nn.Linear(hidden + args.latent_dim, hidden), nn.Linear(hidden, hidden)
            self.blocks.append(nn.Sequential(first, nn.GELU(), second))
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(torch.cat([norm(x), z], 1))
        return self.out(x)


class PictureFDM(nn.Module):
    """Forward model of pictures: context (B, width, s, s), z -> change (B, 3, S, S). z as channels."""

    def __init__(self, size: int, args: Args):
        super().__init__()
        self.side = size // total_stride(size, args)
        width = args.widths[-1]
        self.mix = nn.Conv2d(width + args.latent_dim, width, 1)
        layers = [ResBlock(width) for _ in range(args.res_blocks)]
        outs = [*args.widths[-2::-1], 3]
        strides = [2] * (len(args.widths) - 1) + [args.stem]
        for out, stride in zip(outs, strides):  # a transposed conv without overlap
            layers += [nn.ReLU6(), nn.Conv2d(width, out * stride**2, 1), nn.PixelShuffle(stride)]
            width = out
        self.decoder = nn.Sequential(*layers)

    def forward(self, context: Tensor, z: Tensor) -> Tensor:
        z = z[:, :, None, None].expand(-1, -1, self.side, self.side)
        return self.decoder(self.mix(torch.cat([context, z], 1)))


class LAM(nn.Module):
    """IDM, FDM, and the training split's statistics of the target, which the checkpoint thereby carries.

    The FDM predicts the standardised change of the target (DETAIL 3) from z and `context` (DETAIL 4).
    """

    def __init__(self, data: Dataset, args: Args):
        super().__init__()
        self.fdm_sees = args.fdm_sees
        self.idm = IDM(data.size, args)
        for name, value in data.statistics().items():  # mean, std, change_mean, change_std
            self.register_buffer(name, value)
        self.register_buffer("latent_std", torch.ones(()))  # set at the end of stage 1

        frame_channels = 3 * args.frame_stack
        if self.mean.ndim == 1:  # a vector a frame: an embedding
            (dim,) = self.mean.shape
            self.fdm = EmbeddingFDM(dim, args)
            start = torch.randn(args.fdm_hidden)
            if args.fdm_sees == "target":
                self.view = nn.Linear(dim, args.fdm_hidden)
            elif args.fdm_sees == "frame":
                self.view = ConvEncoder(frame_channels, args.fdm_hidden, data.size, args)
        else:
            self.fdm = PictureFDM(data.size, args)
            start = torch.randn(args.widths[-1], self.fdm.side, self.fdm.side)
            if args.fdm_sees == "target":
                self.view = ConvNet(3, args)
            elif args.fdm_sees == "frame":
                self.view = ConvNet(frame_channels, args)
        if args.fdm_sees == "z":
            self.start = nn.Parameter(0.02 * start)
        if args.supervision:
            self.action_head = nn.Linear(args.latent_dim, data.action_dim)

    def context(self, obs: Tensor, target_now: Tensor) -> Tensor:
        """What the FDM sees besides z: a learned start (for pictures a map), the target at t, or o_t."""
        if self.fdm_sees == "z":
            return self.start.expand(len(obs), *self.start.shape)
        if self.fdm_sees == "target":
            return self.view((target_now - self.mean) / self.std)
        return self.view(to_float(obs))

    def standardise(self, change: Tensor) -> Tensor:
        return (change - self.change_mean) / self.change_std


class Policy(nn.Module):
    """Policy of stage 2: o_t uint8 -> z_t (--method bc: a_t). It has the IDM's architecture."""

    def __init__(self, out: int, size: int, args: Args):
        super().__init__()
        self.encoder = ConvEncoder(3 * args.frame_stack, out, size, args)

    def forward(self, obs: Tensor) -> Tensor:
        return self.encoder(to_float(obs))


class Decoder(nn.Module):
    """Action decoder of stage 3, an MLP (LAOM): the policy's latent (B, latent_dim) -> action (B, A)."""

    def __init__(self, latent_dim: int, action_dim: int):
        super().__init__()
        layers = [nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(256, action_dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(z)


# ---------------------------------------------------------------------------------------- stages


@torch.no_grad()
def encode(lam: LAM, data: Dataset, rows: np.ndarray) -> Tensor:
    """Latent actions of the transitions rows -> rows + frame_gap. (N, latent_dim) float32"""
    lam.eval()
    latents = [lam.idm(data.observe(part), data.observe(part + data.frame_gap)) for part in chunks(rows)]
    return torch.cat(latents).float()


def train_lam(run: Run, data: Dataset, args: Args) -> LAM:
    """Stage 1: IDM and FDM together, from frames alone. Returns the frozen LAM."""
    torch.manual_seed(args.seed)
    lam = LAM(data, args).to(run.device, memory_format=torch.channels_last)
    optimizer, schedule = one_cycle(lam, args.lr, args.weight_decay, args.lam_updates)
    probes, measured = data.probes(), {}
    gap = args.frame_gap
    if args.supervision:
        labelled = data.labelled_transitions(args.labelled_episodes[0])

    for step in run.steps("lam", lam, optimizer, schedule, args.lam_updates):
        t = step.rng.choice(data.train, args.batch_size)[run.share]
        k = step.rng.integers(1, args.idm_horizon + 1, args.batch_size)[run.share]
        obs, future = data.observe(t), data.observe(np.minimum(t + k * gap, data.last[t]))
        target_now, target_next = data.target(t), data.target(t + gap)
        with run.autocast():
            z = lam.idm(obs, future)
            change = lam.standardise(target_next - target_now)
            error = (lam.fdm(lam.context(obs, target_now), z) - change) ** 2
            if args.target == "masked":
                robot = data.segment(t + gap, "robot")  # (B, 1, H, W)
                error = error * (robot / mean_over_ranks(robot.mean()).clamp_min(1e-6))  # mean over the robot
            fdm_loss = error.mean()
            loss = fdm_loss
            if args.supervision:
                rows = step.rng.choice(labelled, args.batch_size)[run.share]
                z_labelled = lam.idm(data.observe(rows), data.observe(rows + gap))
                action_loss = F.mse_loss(lam.action_head(z_labelled), data.actions(rows))
                loss = loss + args.supervision * action_loss
                step.log(action_loss=action_loss)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(lam)
        optimizer.step()
        schedule.step()
        step.log(loss=loss, fdm_loss=fdm_loss)

        if step.probe_due:
            measured = measure(lam, data, probes)
            step.log(**measured)

    if not run.restored("lam"):
        lam.latent_std.copy_(common_std(encode(lam, data, thinned(data.train))))
    run.finish("lam", **measured)
    return lam


def measure(lam: LAM, data: Dataset, probes: list) -> dict[str, float | list | None]:
    """What common/probes.py finds in the latents, a task at a time, mean over tasks."""
    measured = []
    for of_task, train, held_out in probes:
        z_train, z_test = (encode(lam, data, rows).double().cpu().numpy() for rows in (train, held_out))
        measured.append(of_task.measure(z_train, z_test))
    return mean_over_tasks(measured)


def what_to_clone(data: Dataset, args: Args, lam: LAM | None) -> tuple[np.ndarray, Tensor]:
    """Rows (N,) and the policy's targets there: latents, in their natural scale up to a factor (DETAIL 6)."""
    if lam is None:  # --method bc
        rows = data.labelled(args.labelled_episodes[0])
        return rows, data.actions(rows)
    return data.train, encode(lam, data, data.train) / lam.latent_std


def train_bc(run: Run, data: Dataset, args: Args, rows: np.ndarray, targets: Tensor) -> Policy:
    """Stage 2: policy o_t -> targets (N, D) of the rows (N,), under random shifts of frames (DETAIL 7)."""
    torch.manual_seed(args.seed + 1)
    policy = Policy(targets.shape[1], data.size, args).to(run.device, memory_format=torch.channels_last)
    optimizer, schedule = one_cycle(policy, args.lr, args.weight_decay, args.bc_updates)

    for step in run.steps("bc", policy, optimizer, schedule, args.bc_updates):
        pick = step.rng.integers(len(rows), size=args.batch_size)[run.share]
        shift = run.draw_shift(step.rng, args.batch_size, args.max_shift)
        obs = shift(data.observe(rows[pick]))
        target = targets[run.tensor(pick)]
        with run.autocast():
            loss = F.mse_loss(policy(obs), target)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(policy)
        optimizer.step()
        schedule.step()
        step.log(loss=loss)

    measured = {}
    if args.method == "bc" and not run.restored("bc"):
        measured["policy_nmse"] = data.policy_nmse(lambda rows: policy(data.observe(rows)))
    run.finish("bc", **measured)
    return policy


def train_decoder(run: Run, data: Dataset, args: Args, policy: Policy, budget: str) -> None:
    """Stage 3: from the frozen policy's latents to the true actions of the labelled episodes (DETAIL 8)."""
    rows = np.tile(data.labelled(budget), args.decoder_shifts)
    actions = data.actions(rows)
    shifts = np.random.default_rng([args.seed, 3]).integers(0, 2 * args.max_shift + 1, (len(rows), 2))
    shifts = run.tensor(shifts)
    latents = []
    with torch.no_grad():
        for part in chunks(np.arange(len(rows))):
            obs = random_shift(data.observe(rows[part]), shifts[part], args.max_shift)
            latents.append(policy(obs).float())
    latents = torch.cat(latents)
    noise_std = args.decoder_noise * latents.std(0)
    torch.manual_seed(args.seed + 2)
    decoder = Decoder(latents.shape[1], actions.shape[1]).to(run.device)
    optimizer, schedule = one_cycle(decoder, args.decoder_lr, args.weight_decay, args.decoder_updates)

    stage = f"decoder_{budget}"
    for step in run.steps(stage, decoder, optimizer, schedule, args.decoder_updates):
        pick = step.rng.integers(len(rows), size=args.batch_size)[run.share]
        noise = step.rng.standard_normal((args.batch_size, latents.shape[1]), np.float32)[run.share]
        pick = run.tensor(pick)
        z = latents[pick] + noise_std * run.tensor(noise)
        loss = F.mse_loss(decoder(z), actions[pick])
        optimizer.zero_grad()
        loss.backward()
        average_gradients(decoder)
        optimizer.step()
        schedule.step()
        step.log(loss=loss)

    measured = {}
    if not run.restored(stage):
        measured["policy_nmse"] = data.policy_nmse(lambda rows: decoder(policy(data.observe(rows))))
    run.finish(stage, **measured)


def load_policy(run_dir: str | Path, labelled: str | None = None, device: str = "cpu") -> Actor:
    """The policy of a finished run: observation -> action. `labelled` is the label budget, or the first one.

    A run that is unfinished, damaged or lacks that budget ends the program with one line.
    """
    folder = Path(run_dir)
    args, summary, labelled = read_policy_run(folder, labelled, Args)
    latent_dim = args.latent_dim if args.method == "lapo" else None
    return restore_policy(folder, summary, labelled, args, latent_dim, device)


def restore_policy(
    folder: Path, summary: dict, labelled: str, args: Args, latent_dim: int | None, device: str
) -> Actor:
    """Policy and decoder of a run; without latent_dim a policy of true actions."""
    policy = Policy(latent_dim or summary["action_dim"], summary["size"], args)
    policy.load_state_dict(load_weights(folder, "bc", summary))
    network = nn.Sequential(policy)
    if latent_dim:
        decoder = Decoder(latent_dim, summary["action_dim"])
        decoder.load_state_dict(load_weights(folder, f"decoder_{labelled}", summary))
        network.append(decoder)
    return Actor(network, args.frame_stack, device)


# ---------------------------------------------------------------------------------------- program


def default_variant(args: Args, data: Dataset) -> str:
    """Name of the method: bc-few, lapo, lapo-clean-data-frame, masklam, lapo-oracle-blind, laom, ..."""
    if args.method == "bc":
        return "bc-all" if args.labelled_episodes == ("all",) else "bc-few"
    names = {"pixels": "lapo", "clean": "lapo-clean-target", "masked": "masklam"}
    name = names.get(args.target, f"lapo-{args.target}")
    if args.target == "embedding":
        name = f"lapo-{data.embedding['name']}"
    if args.supervision:
        name = name.replace("lapo", "laom")
    if data.undistracted:
        name += "-clean-data"
    if args.fdm_sees != "z":
        name += f"-{args.fdm_sees}"
    return name


def parse_args(arguments: list[str]) -> Args:
    args = parse(PRESETS, arguments, __doc__)
    at_least(0, args, "seed", "res_blocks", "train_episodes", "supervision", "max_shift", "decoder_noise")
    at_least(0, args, "lr", "decoder_lr", "weight_decay")
    at_least(1, args, "latent_dim", "fdm_hidden", "idm_horizon", "frame_gap", "frame_stack", "stem", "widths")
    at_least(1, args, "batch_size", "lam_updates", "bc_updates", "decoder_updates", "decoder_shifts")
    if not 0 < args.probe_fraction < 1:
        fail("--probe-fraction lies between 0 and 1")
    if (args.method == "bc" or args.supervision) and len(args.labelled_episodes) != 1:
        fail("--method bc and --supervision train on one label budget: give one value to --labelled-episodes")
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} can not be divided among {WORLD} ranks")
    if args.method == "bc":
        args.stages = ("bc",)
        if args.export or args.supervision:
            fail("--export and --supervision are of latent actions, which --method bc has none of")
    if args.target in ("pixels", "masked") and args.fdm_sees == "target":
        args.fdm_sees = "frame"  # one and the same
    return args


def open_run(args: Args) -> tuple[Run, Dataset]:
    """Loads the data, locks runs/<name>/ and refuses it if it holds a run of other arguments."""
    device, dtype = pick_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    target = args.target if args.method == "lapo" else "pixels"
    window = {"frame_gap": args.frame_gap, "frame_stack": args.frame_stack}
    split = {name: getattr(args, name) for name in ("probe_fraction", "seed", "train_episodes")}
    data = Dataset(args.data, args.tasks, target, args.encoder, **window, **split, device=device)
    if data.action_dim is not None:
        for budget in args.labelled_episodes:
            data.labelled(budget)  # refuses one that the data do not have
    elif args.method == "bc" or args.supervision:
        fail(f"{args.data} has no actions, which --method bc and --supervision need")
    args.tasks = data.tasks
    args.variant = args.variant or own_variant(__file__, "lam_vlm", default_variant(args, data))
    if not args.out:  # two commands that train something else do not share a folder
        budget = f"-{args.labelled_episodes[0]}" if args.variant == "bc-few" or args.supervision else ""
        args.out = default_folder(args.variant + budget, args.tasks, args.seed, args.data)
    run = Run(Path(args.out), ("lam", "bc", "decoder"), args.seed, device, dtype)
    aside = ["stages", "device", "out", "variant", "export"]
    if args.method == "lapo" and not args.supervision:
        aside.append("labelled_episodes")  # each budget has its decoder, stages 1 and 2 are shared
    run.claim(args, tuple(aside), data.hash)
    if RANK == 0:
        print(data.describe())
    return run, data


def summarise(run: Run, data: Dataset, args: Args, lam: LAM | None) -> None:
    """summary.json and curves.png of the stages that are done."""
    labelled = {}
    if lam is not None and data.action_dim is not None and not args.supervision:  # z has learnt those actions
        labelled = data.probe_labelled(partial(encode, lam, data), run.budgets(*args.labelled_episodes))
    names = {"script": Path(__file__).stem, "variant": args.variant}
    names["default_variant"] = default_variant(args, data)
    bc_budget = args.labelled_episodes[0] if args.method == "bc" else None
    measured = run.results("lam") | {"labelled_probe_nmse": labelled}
    run.summarise(measured | names | data.record(), bc_budget)


def main(args: Args) -> None:
    run, data = open_run(args)
    lam = None

    # stage 1: a latent action model from frames alone
    if args.method == "lapo":
        lam = train_lam(run, data, args)

    # stage 2: a policy that predicts latent actions from distracted frames (or true ones, --method bc)
    if "bc" in args.stages or "decoder" in args.stages:
        rows, targets = what_to_clone(data, args, lam)
        policy = train_bc(run, data, args, rows, targets)

    # stage 3: true actions from the policy's latents, learnt from a handful of labelled episodes
    if "decoder" in args.stages and data.action_dim is not None:
        for budget in args.labelled_episodes:
            train_decoder(run, data, args, policy, budget)

    if args.export:
        data.export_latents(encode(lam, data, data.transitions), run.folder / "latents.parquet")
    summarise(run, data, args, lam)
    run.close()
    if "decoder" in args.stages and data.action_dim is None:
        fail(f"stage 3 needs actions, and {args.data} has none; stages 1 and 2 are in {run.folder}")


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on from the last checkpoint")
