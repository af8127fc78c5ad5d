"""LatBot: scene and motion latents, a unified decoder, distillation into a student, an action expert.

    python latbot.py --data data/main                              several tasks, each with its instruction
    python latbot.py --data data/main --target embedding           the decoder predicts the oracle's embedding
    python latbot.py --data data/main --backbone llava-hf/llava-1.5-7b-hf

A teacher sees frames t..t+span and makes latents of scene and motion, from which a decoder predicts the frame
at t+span and, on labelled episodes, the actions. A student sees the first frame and the instruction, and
predicts the teacher's latents and the sub-task's words. An expert turns its latents into actions by flow
matching.
After LatBot, arXiv 2511.23034, of which no code is public; what is ours: docs/latbot.md.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import at_least, fail, parse
from common.actor import read_policy_run
from common.backbones import TinyBackbone, VLMBackbone, attended
from common.dataset import Dataset, chunks, common_std, random_shift, thinned, to_float
from common.device import average_gradients, mean_over_ranks, pick_device
from common.probes import mean_over_tasks, r2_score
from common.records import default_folder, load_checkpoint, load_weights, own_variant, save_checkpoint
from common.runs import Run, one_cycle
from common.shards import RANK, WORLD
from common.windows import Domain, Windows
from lam_vlm import ConvNet, total_stride


@dataclass
class Args:
    data: str = "data/quick"
    """folder of the data set that collect.py or import_videos.py wrote"""
    tasks: tuple[str, ...] = ()
    """tasks of the data set to train on, one model for all of them; none given: all"""
    backbone: str = "tiny"
    """of teacher and student: tiny, or hub id or folder of a vision-language model of transformers"""
    target: Literal["pixels", "clean", "masked", "embedding"] = "pixels"
    """whose change until t + span the decoder predicts: frame, twin, the robot's pixels, or embedding"""
    encoder: str = "oracle_best"
    """target embedding: key of the embeddings to predict, or an unambiguous beginning of it"""
    fdm_sees: Literal["frame", "z"] = "frame"
    """what the decoder sees besides the latents: the first frame, or nothing; DETAIL 4"""
    latents: Literal["split", "undivided", "none"] = "split"
    """split: of scene and of motion; undivided: one; none: no teacher, the student learns text alone"""
    motion_dim: int = 8
    """dimensions of the motion latent"""
    scene_dim: int = 64
    """dimensions of the scene latent; an undivided latent has those of both"""
    action_weight: float = 1.0
    """weight of the actions in the teacher's loss, on the labelled episodes; 0: the frame alone"""
    actions_see: Literal["both", "motion"] = "both"
    """latents that the decoder reads actions from: both (published), or that of motion alone (T7)"""
    text: Literal["labelled", "all", "none"] = "labelled"
    """episodes whose sub-tasks, in words, the student learns: labelled, all, none"""
    expert_sees: Literal["both", "motion"] = "both"
    """latents that the expert sees: both, or that of motion alone"""
    student: Literal["trains", "frozen"] = "frozen"
    """whether the student trains on with the expert (published); with --latents none it always does"""
    labelled_episodes: tuple[str, ...] = ("8",)
    """label budget, one: episodes per task whose true actions may be used, or `all`"""
    frames: int = 3
    """frames that the teacher sees of t..t+span"""
    span: int = 8
    """steps between the first frame and the last, and actions in a chunk"""
    tokens: int = 4
    """query tokens of each of scene and motion"""
    width: int = 128
    """width of transformers and expert"""
    heads: int = 2
    """attention heads"""
    blocks: int = 2
    """transformer blocks of backbone and decoder"""
    widths: tuple[int, ...] = (32, 64, 128)
    """channels of the tiny backbone's convolutional blocks"""
    res_blocks: int = 1
    """residual blocks after each of them"""
    stem: int = 4
    """stride of the first block; the others have 2"""
    euler_steps: int = 10
    """steps of the flow from noise to actions"""
    stages: tuple[Literal["teacher", "student", "expert"], ...] = ("teacher", "student", "expert")
    """stages to run, with those that they need; a finished one is skipped"""
    teacher_updates: int = 1000
    """updates of the teacher"""
    student_updates: int = 1500
    """updates of the student"""
    expert_updates: int = 2500
    """updates of the expert"""
    batch_size: int = 64
    """windows per update; of the teacher's a quarter is labelled; the student has a quarter more for text"""
    lr: float = 1e-3
    """peak learning rate of AdamW under a one-cycle schedule"""
    weight_decay: float = 1e-2
    """weight decay of AdamW"""
    max_shift: int = 4
    """random shifts of the frames of teacher and student, in pixels"""
    probe_fraction: float = 0.2
    """fraction of a task's episodes, the last ones, that no stage trains on: the probes are measured there"""
    device: str = "auto"
    """cuda, cpu, or auto"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """arithmetic of teacher and student, weights stay float32; auto: bfloat16 where the hardware has it"""
    seed: int = 0
    """seed of weights, batches and the choice of the labelled episodes"""
    variant: str = ""
    """name under which eval.py groups the seeds of one method; empty: latbot, latbot-oracle, split, ..."""
    out: str = ""
    """folder of the run; empty: runs/<variant>-<budget>_<tasks>_s<seed>, and the data set's name"""
    export: bool = False
    """also write runs/<name>/latents.parquet: the teacher's latents of every window, scene first"""


QUICK = Args()
PAPER = Args(
    data="data/paper",
    backbone="OpenGVLab/InternVL3_5-2B-HF",
    labelled_episodes=("all",),
    frames=16,
    span=16,
    tokens=64,
    motion_dim=64,
    scene_dim=512,
    width=1024,
    heads=16,
    blocks=12,
    student="trains",
    teacher_updates=100_000,
    student_updates=100_000,
    expert_updates=100_000,
    batch_size=256,
    lr=1e-4,
    probe_fraction=0.02,
)
PRESETS = {"quick": QUICK, "paper": PAPER}
PROBES = ("action_probe_nmse", "leak_probe_r2")
TEXT_WEIGHT = 0.5  # of the sub-task's next-token loss (published)
COPIES = 8  # at most: randomly shifted copies of each labelled frame that the expert is trained on
LATENT_NOISE = 0.1  # Gaussian noise on the latents that the expert is trained on, in units of their std


# ---------------------------------------------------------------------------------------- models


def make_backbone(domain: Domain, args: Args, frames: int) -> nn.Module:
    queries, texts = 2 * args.tokens, (domain.instructions, domain.subtasks)
    if args.backbone != "tiny":
        return VLMBackbone(args.backbone, queries, *texts)
    vision = [ConvNet(channels, args) for channels in (3, 6)[: min(frames, 2)]]
    return TinyBackbone(vision, domain.size, queries, *texts, args.width, args.heads, args.blocks, frames)


class Latents(nn.Module):
    """States of the query tokens (B, 2 * tokens, width) -> scene and motion latents, side by side."""

    def __init__(self, width: int, args: Args):
        super().__init__()
        states = args.tokens * width
        self.to_scene, self.to_motion = nn.Linear(states, args.scene_dim), nn.Linear(states, args.motion_dim)

    def forward(self, states: Tensor) -> Tensor:
        scene, motion = states.chunk(2, 1)
        return torch.cat([self.to_scene(scene.flatten(1)), self.to_motion(motion.flatten(1))], 1)


class UnifiedDecoder(nn.Module):
    """First frame and latents -> change of the target and actions. Two streams that exchange in every layer.

    The scene stream holds the first frame's patches and the scene latent, the motion stream a slot for each
    action and the motion latent; an undivided latent stands in both.
    """

    def __init__(self, domain: Domain, target_mean: Tensor, args: Args):
        super().__init__()
        self.args, self.size, width = args, domain.size, args.width
        self.patch = total_stride(domain.size, args)
        side = domain.size // self.patch
        if args.fdm_sees == "frame":
            self.project = nn.Conv2d(3, width, self.patch, self.patch)
        self.place = nn.Parameter(0.02 * torch.randn(side**2, width))
        self.slots = nn.Parameter(0.02 * torch.randn(args.span, width))
        dims = (args.scene_dim, args.motion_dim)
        if args.latents == "undivided":
            dims = (sum(dims), sum(dims))
        self.read_scene, self.read_motion = nn.Linear(dims[0], width), nn.Linear(dims[1], width)
        like = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.scene, self.motion = nn.ModuleList(), nn.ModuleList()
        for _ in range(args.blocks):
            for stream in (self.scene, self.motion):
                stream.append(nn.TransformerDecoderLayer(width, args.heads, 4 * width, dropout=0, **like))
        self.vector = target_mean.ndim == 1
        self.to_target = nn.Linear(width, len(target_mean) if self.vector else 3 * self.patch**2)
        self.to_actions = nn.Linear(width, domain.action_dim)

    def forward(self, first: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """first: (B, 3, H, W) uint8, z: (B, scene_dim + motion_dim) -> change, actions (B, span, A)."""
        z_scene, z_motion = z, z
        if self.args.latents == "split":
            z_scene, z_motion = z.split([self.args.scene_dim, self.args.motion_dim], 1)
        frame = self.place.expand(len(z), -1, -1)
        if self.args.fdm_sees == "frame":
            frame = frame + self.project(to_float(first)).flatten(2).transpose(1, 2)
        scene = torch.cat([frame, self.read_scene(z_scene)[:, None]], 1)
        motion = torch.cat([self.slots.expand(len(z), -1, -1), self.read_motion(z_motion)[:, None]], 1)
        for of_scene, of_motion in zip(self.scene, self.motion):
            seen = scene if self.args.actions_see == "both" else frame
            scene, motion = of_scene(scene, motion), of_motion(motion, seen)  # published: both ways
        actions = self.to_actions(motion[:, :-1])
        if self.vector:
            return self.to_target(scene.mean(1)), actions
        patches = self.to_target(scene[:, :-1]).transpose(1, 2)
        return F.fold(patches, self.size, self.patch, stride=self.patch), actions


class Teacher(nn.Module):
    """Frames t..t+span and the instruction -> latents; the decoder; statistics of the target."""

    def __init__(self, windows: Windows, args: Args):
        super().__init__()
        for name, value in windows.data.statistics().items():  # mean, std, change_mean, change_std
            self.register_buffer(name, value)
        self.backbone = make_backbone(replace(windows.domain, subtasks=[]), args, args.frames)
        self.to_latents = Latents(self.backbone.width, args)
        self.decoder = UnifiedDecoder(windows.domain, self.mean, args)

    def latents(self, frames: Tensor, task: Tensor) -> Tensor:
        """(B, scene_dim + motion_dim), scene first, of windows (B, F, 3, H, W) uint8."""
        states, _, _ = self.backbone(frames, task)
        return self.to_latents(states)


class Student(nn.Module):
    """First frame and instruction -> the teacher's latents, and the sub-task in words."""

    def __init__(self, domain: Domain, args: Args):
        super().__init__()
        self.backbone = make_backbone(domain, args, 1)
        self.to_latents = Latents(self.backbone.width, args)

    def latents(self, first: Tensor, task: Tensor) -> Tensor:
        """(B, scene_dim + motion_dim), as the teacher's would be, of frames (B, 3, H, W) uint8."""
        states, _, _ = self.backbone(first[:, None], task)
        return self.to_latents(states)

    def words(self, first: Tensor, task: Tensor, subtask: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token logits (B, T, words) along the sub-task, and its words (B, T), -100 past their end."""
        _, logits, targets = self.backbone(first[:, None], task, subtask)
        return logits, targets


class Expert(nn.Module):
    """The student's latents -> a chunk of actions: flow matching for the arm, levels for the gripper."""

    def __init__(self, student: Student, domain: Domain, args: Args):
        super().__init__()
        self.student, self.euler_steps = student, args.euler_steps
        dims, arm_dim = args.scene_dim + args.motion_dim, args.span * (domain.action_dim - 1)
        self.register_buffer("latent_mean", torch.zeros(dims))  # of labelled frames, set before training
        self.register_buffer("latent_std", torch.ones(dims))
        self.sees = slice(0, dims)
        if args.expert_sees == "motion":
            self.sees, dims = slice(args.scene_dim, dims), args.motion_dim
        self.flow = mlp(arm_dim + dims + 1, 2 * args.width, arm_dim)
        self.gripper = mlp(dims, 2 * args.width, args.span)
        self.register_buffer("low", torch.zeros(domain.action_dim))
        self.register_buffer("scale", torch.ones(domain.action_dim))
        self.register_buffer("levels", torch.zeros(len(domain.instructions), 2))  # of a task's gripper

    def set_scale(self, windows: Windows, predicted: Tensor, args: Args) -> None:
        """predicted: the student's latents (N, D) of labelled frames."""
        for name in ("low", "scale", "levels"):
            getattr(self, name).copy_(torch.from_numpy(getattr(windows, name)))
        self.latent_mean.copy_(predicted.mean(0))
        self.latent_std.copy_(scale_of(predicted, args))

    def condition(self, predicted: Tensor) -> Tensor:
        """What the expert sees: the student's latents standardised, of them those of --expert-sees."""
        return ((predicted.float() - self.latent_mean) / self.latent_std)[:, self.sees]

    def velocity(self, z: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """z (B, D), noisy (B, span, A - 1), time (B, 1) -> (B, span, A - 1)"""
        return self.flow(torch.cat([noisy.flatten(1), z, time], 1)).view_as(noisy)

    def act(self, z: Tensor, noise: Tensor, task: Tensor) -> Tensor:
        """Actions (B, span, A) of tasks (B,) from noise (B, span, A - 1) by Euler steps of the flow."""
        arm = noise
        for step in range(self.euler_steps):
            time = torch.full((len(z), 1), step / self.euler_steps, device=z.device)
            arm = arm + self.velocity(z, arm, time) / self.euler_steps
        upper = (self.gripper(z) > 0).long()
        arm = (arm + 1) * self.scale[:-1] + self.low[:-1]
        return torch.cat([arm, self.levels[task[:, None], upper][..., None]], 2)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


# ---------------------------------------------------------------------------------------- stages


def train_teacher(run: Run, windows: Windows, args: Args) -> Tensor:
    """Stage 1: latents from which the decoder predicts the target's change and, if labelled, actions.

    Returns those of all windows, `data.transitions`, as the student is to predict them: centred, each latent
    in its natural scale up to one factor. (N, scene_dim + motion_dim)
    """
    torch.manual_seed(args.seed)
    data, span = windows.data, args.span
    teacher = Teacher(windows, args).to(run.device)
    optimizer, schedule = one_cycle(teacher, args.lr, args.weight_decay, args.teacher_updates)

    for step in run.steps("teacher", teacher, optimizer, schedule, args.teacher_updates):
        t = step.rng.choice(data.train, args.batch_size * 3 // 4)[run.share]
        rows = t
        if args.action_weight:
            labelled = step.rng.choice(windows.chunk_rows, args.batch_size // 4)[run.share]
            rows = np.concatenate([t, labelled])
        shift = run.draw_shift(step.rng, args.batch_size, args.max_shift)
        frames = shift(windows.frames(rows).flatten(1, 2)).unflatten(1, (args.frames, 3))
        change = (data.target(t + span) - data.target(t) - teacher.change_mean) / teacher.change_std
        if change.ndim == 4:  # a picture
            change = shift(change)
        with run.autocast():
            latents = teacher.latents(frames, windows.task(rows))
            predicted, actions = teacher.decoder(frames[:, 0], latents)
            error = (predicted[: len(t)] - change) ** 2
            if args.target == "masked":
                robot = shift(data.segment(t + span, "robot"))
                error = error * (robot / mean_over_ranks(robot.mean()).clamp_min(1e-6))  # mean over the robot
            target_loss = error.mean()
            loss = target_loss
            if args.action_weight:
                arm, gripper = windows.chunk(labelled)
                actions = actions[len(t) :]
                arm_loss = F.mse_loss(actions[:, :, :-1], arm)
                gripper_loss = F.binary_cross_entropy_with_logits(actions[:, :, -1].float(), gripper)
                loss = loss + args.action_weight * (arm_loss + gripper_loss)
                step.log(arm_loss=arm_loss, gripper_loss=gripper_loss)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(teacher)
        optimizer.step()
        schedule.step()
        step.log(loss=loss, target_loss=target_loss)

    path, stored, measured = run.folder / "latents.bin", None, {}  # with a large backbone z takes hours
    if run.restored("teacher"):
        stored = load_checkpoint(path, run.identity, run.device)
    if stored:
        z = stored["z"]
    else:
        z = encode(run, teacher, windows, args)
        if RANK == 0:
            save_checkpoint(path, {"z": z, "identity": run.identity})
    if not run.restored("teacher"):
        measured = measure_teacher(z, windows, args)
    run.finish("teacher", **measured)
    trained = z[data.position(data.train)]
    return (z - trained.mean(0)) / scale_of(trained, args)


def train_student(run: Run, windows: Windows, args: Args, latents: Tensor | None) -> Student:
    """Stage 2: the teacher's latents, if any, and the sub-task's words, from first frame and instruction."""
    data = windows.data
    torch.manual_seed(args.seed + 1)
    student = Student(windows.domain, args).to(run.device)
    if latents is None and not windows.domain.subtasks:
        return student  # nothing to learn before the expert
    optimizer, schedule = one_cycle(student, args.lr, args.weight_decay, args.student_updates)

    for step in run.steps("student", student, optimizer, schedule, args.student_updates):
        loss = 0
        t = step.rng.choice(data.train, args.batch_size)[run.share]
        text_rows = step.rng.choice(windows.text_rows, args.batch_size // 4)[run.share]
        shift = run.draw_shift(step.rng, args.batch_size, args.max_shift)
        with run.autocast():
            if latents is not None:
                predicted = student.latents(shift(data.frame(t)), windows.task(t))
                latent_loss, divergence = distillation(predicted, latents[data.position(t)], args)
                loss = loss + latent_loss + divergence
                step.log(latent_loss=latent_loss, divergence=divergence)
            if windows.domain.subtasks:
                first = shift(data.frame(text_rows))
                words = windows.task(text_rows), windows.subtask_of(text_rows)
                logits, targets = student.words(first, *words)
                text_loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
                text_loss = text_loss / mean_over_ranks((targets >= 0).float().sum())
                loss = loss + TEXT_WEIGHT * text_loss
                step.log(text_loss=text_loss)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(student)
        optimizer.step()
        schedule.step()
        step.log(loss=loss)

    measured = {}
    if not run.restored("student"):
        measured = measure_student(student, windows, args, latents)
        measured |= attended(student.backbone, windows, run.folder / "attention.png")
    run.finish("student", **measured)
    return student


def distillation(predicted: Tensor, wanted: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Squared error of latents (B, D), KL(p(predicted) || p(wanted)) of their softmax; mean over latents."""
    errors, divergences = [], []
    for mine, of_teacher in zip(parts_of(predicted.float(), args).values(), parts_of(wanted, args).values()):
        errors.append(F.mse_loss(mine, of_teacher))
        divergences.append(F.kl_div(of_teacher.log_softmax(1), mine.softmax(1), reduction="batchmean"))
    return sum(errors) / len(errors), sum(divergences) / len(divergences)


def train_expert(run: Run, windows: Windows, args: Args, student: Student) -> Expert:
    """Stage 3: actions of the labelled episodes by flow matching on the student's latents."""
    data, budget = windows.data, args.labelled_episodes[0]
    torch.manual_seed(args.seed + 2)
    trains = args.latents == "none" or args.student == "trains"
    expert = Expert(student, windows.domain, args).to(run.device)
    # fixed copies: under fresh shifts a student that trains learns more slowly (docs/latbot.md)
    rows = np.tile(windows.labelled, max(1, min(COPIES, 50_000 // len(windows.labelled))))
    shifts = np.random.default_rng([args.seed, 4]).integers(0, 2 * args.max_shift + 1, (len(rows), 2))

    def predict(pick: np.ndarray) -> Tensor:
        first = random_shift(data.frame(rows[pick]), run.tensor(shifts[pick]), args.max_shift)
        with run.autocast():
            return expert.student.latents(first, windows.task(rows[pick])).float()

    some = np.arange(len(rows))
    if trains:  # its latents will change: for the scale alone
        some = thinned(some)
    with torch.no_grad():
        predicted = torch.cat([predict(part) for part in chunks(some, args.batch_size)])
    expert.set_scale(windows, predicted, args)
    expert.student.requires_grad_(trains)  # a VLM's vision tower as well, as published
    optimizer, schedule = one_cycle(expert, args.lr, args.weight_decay, args.expert_updates)

    stage = f"expert_{budget}"
    for step in run.steps(stage, expert, optimizer, schedule, args.expert_updates):
        pick = step.rng.integers(len(rows), size=args.batch_size)[run.share]
        arm, gripper = windows.chunk(rows[pick])
        noise = step.rng.standard_normal((args.batch_size, *arm.shape[1:]), np.float32)[run.share]
        time = step.rng.random((args.batch_size, 1), np.float32)[run.share]
        noise, time = run.tensor(noise), run.tensor(time)
        z = expert.condition(predict(pick) if trains else predicted[run.tensor(pick)])
        latent_noise = step.rng.standard_normal((args.batch_size, z.shape[1]), np.float32)[run.share]
        z = z + LATENT_NOISE * run.tensor(latent_noise)
        noisy = (1 - time[..., None]) * noise + time[..., None] * arm
        flow_loss = F.mse_loss(expert.velocity(z, noisy, time), arm - noise)
        gripper_loss = F.binary_cross_entropy_with_logits(expert.gripper(z), gripper)
        loss = flow_loss + gripper_loss
        optimizer.zero_grad()
        loss.backward()
        average_gradients(expert)
        optimizer.step()
        schedule.step()
        step.log(loss=loss, flow_loss=flow_loss, gripper_loss=gripper_loss)

    measured = {}
    if not run.restored(stage):
        actor = ChunkActor(expert, data.tasks, run.device)
        measured["policy_nmse"] = data.policy_nmse(partial(first_actions, actor, data))
    run.finish(stage, **measured)
    return expert


def first_actions(actor: ChunkActor, data: Dataset, rows: np.ndarray) -> Tensor:
    """The first action (N, A) of the chunk that is planned at each of the rows, all of one task."""
    frames, task = data.columns["frames"][rows], data.tasks[data.task[rows[0]]]
    return torch.from_numpy(actor.plan(frames[:, None], task, [[int(row)] for row in rows])[:, 0])


# ---------------------------------------------------------------------------------------- probes


@torch.no_grad()
def encode(run: Run, teacher: Teacher, windows: Windows, args: Args) -> Tensor:
    """The teacher's latents of all windows, `data.transitions`, scene first. (N, scene + motion) float32"""
    teacher.eval()
    with run.autocast():
        latents = []
        for part in chunks(windows.data.transitions, args.batch_size):
            latents.append(teacher.latents(windows.frames(part), windows.task(part)).float())
    return torch.cat(latents)


def parts_of(z: Tensor | np.ndarray, args: Args) -> dict[str, Tensor | np.ndarray]:
    """{"scene", "motion"} of latents side by side, or the undivided one as {"latent"}."""
    if args.latents == "undivided":
        return {"latent": z}
    return {"scene": z[:, : args.scene_dim], "motion": z[:, args.scene_dim :]}


def scale_of(z: Tensor, args: Args) -> Tensor:
    """One standard deviation for all dimensions of a latent: (N, D) -> (D,)."""
    return torch.cat([common_std(part).expand(part.shape[1]) for part in parts_of(z, args).values()])


def measure_teacher(latents: Tensor, windows: Windows, args: Args) -> dict[str, float | None]:
    """Action (mean over the chunk) and leak probes of each latent, a task at a time, mean over tasks."""
    data, found = windows.data, []
    for of_task, *splits in data.probes():
        train, held_out = (parts_of(latents[data.position(rows)], args) for rows in splits)
        probed = {}
        for name in train:
            measured = of_task.measure(*(z[name].double().cpu().numpy() for z in (train, held_out)))
            probed |= {f"{name}_{probe}": measured[probe] for probe in PROBES}
        found.append(probed)
    measured, (budget,) = mean_over_tasks(found), args.labelled_episodes
    if args.action_weight:  # the teacher has learnt the labelled episodes' actions
        return measured
    for name, part in parts_of(latents, args).items():
        latents_of = partial(lambda part, rows: part[data.position(rows)], part)
        labelled = data.probe_labelled(latents_of, (budget,))
        measured[f"{name}_labelled_probe_nmse"] = labelled[budget]
    return measured


@torch.no_grad()
def measure_student(student: Student, windows: Windows, args: Args, latents: Tensor | None) -> dict:
    """On held-out episodes: R^2 of the teacher's latents; loss and accuracy of a sub-task's words."""
    student.eval()
    data, result = windows.data, {}
    if latents is not None:
        found = []
        for rows in data.by_task(data.held_out):
            parts = chunks(rows, args.batch_size)
            predicted = [student.latents(data.frame(part), windows.task(part)) for part in parts]
            wanted = parts_of(latents[data.position(rows)].cpu().numpy(), args)
            guesses = parts_of(torch.cat(predicted).float().cpu().numpy(), args)
            pairs = zip(wanted.items(), guesses.values())
            found.append({f"{name}_said_r2": r2_score(truth, guess) for (name, truth), guess in pairs})
        result |= mean_over_tasks(found)
    losses, right = [], []
    for part in chunks(windows.named(data.held_out), args.batch_size):
        logits, targets = student.words(data.frame(part), windows.task(part), windows.subtask_of(part))
        logits, targets = logits[targets >= 0], targets[targets >= 0]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        right.append((logits.argmax(1) == targets).float())
    if right:
        result["text_loss"] = float(torch.cat(losses).mean())
        result["text_accuracy"] = float(torch.cat(right).mean())
    return result


# ---------------------------------------------------------------------------------------- program


class ChunkActor:
    """A finished expert: uint8 frames (B, 1, H, W, 3) of a task -> chunks of actions, see `plan`."""

    frame_stack = 1

    def __init__(self, expert: Expert, tasks: list[str], device: str):
        self.expert, self.tasks, self.device = expert.eval().to(device), tasks, device

    @torch.no_grad()
    def plan(self, frames: np.ndarray, task: str, keys: list[list[int]]) -> np.ndarray:
        """Actions (B, span, A) in [-1, 1]. keys: a seed for each row, which its noise is drawn from."""
        first = torch.from_numpy(np.ascontiguousarray(frames[:, -1])).to(self.device).permute(0, 3, 1, 2)
        shape = self.expert.gripper[-1].out_features, len(self.expert.low) - 1
        noise = np.stack([np.random.default_rng(key).standard_normal(shape, np.float32) for key in keys])
        number = torch.full((len(first),), self.tasks.index(task), device=self.device)
        z = self.expert.condition(self.expert.student.latents(first, number))
        actions = self.expert.act(z, torch.from_numpy(noise).to(self.device), number)
        return actions.clamp(-1, 1).cpu().numpy()


def load_policy(run_dir: str | Path, labelled: str | None = None, device: str = "cpu") -> ChunkActor:
    """The policy of a finished run; what is unfinished, damaged or missing ends the program with one line."""
    folder = Path(run_dir)
    args, summary, labelled = read_policy_run(folder, labelled, Args)
    domain = Domain(**summary["domain"])
    expert = Expert(Student(domain, args), domain, args)
    expert.load_state_dict(load_weights(folder, f"expert_{labelled}", summary))
    return ChunkActor(expert, summary["tasks"], device)


def default_variant(args: Args, data: Dataset) -> str:
    """latbot, latbot-oracle, latbot-text-all, split, actions, undivided, no-latents, ..., -clean-data."""
    teacher, embedding = args.latents != "none", data.embedding or {"name": ""}
    if not teacher:
        name = "no-latents"
    elif args.action_weight:
        name = {"split": "latbot", "undivided": "actions"}[args.latents]
    else:  # of frames alone
        name = args.latents
    parts = {
        f"-{embedding['name']}": teacher and args.target == "embedding",
        f"-{args.target}": teacher and args.target in ("clean", "masked"),
        "-z": teacher and args.fdm_sees == "z",
        f"-text-{args.text}": args.text != "labelled",
        f"-{Path(args.backbone).name}": args.backbone != "tiny",
        "-actions-see-motion": args.actions_see == "motion",
        "-motion": args.expert_sees == "motion",
        "-trains": teacher and args.student == "trains",
        "-clean-data": data.undistracted,
    }
    return name + "".join(part for part, holds in parts.items() if holds)


def parse_args(arguments: list[str]) -> Args:
    args = parse(PRESETS, arguments, __doc__)
    at_least(0, args, "max_shift", "res_blocks", "seed", "action_weight", "lr", "weight_decay")
    at_least(1, args, "motion_dim", "scene_dim", "span", "tokens", "width", "heads", "blocks", "stem")
    at_least(1, args, "euler_steps", "teacher_updates", "student_updates", "expert_updates", "widths")
    at_least(2, args, "frames")
    at_least(4, args, "batch_size")
    if args.frames > args.span + 1:
        fail(f"--frames {args.frames} are more than --span {args.span} has")
    if not 0 < args.probe_fraction < 1:
        fail("--probe-fraction lies between 0 and 1")
    if args.width % args.heads:
        fail(f"--width {args.width} can not be divided among --heads {args.heads}")
    if args.batch_size % (4 * WORLD):
        fail(f"a quarter of --batch-size {args.batch_size} can not be divided among {WORLD} ranks")
    if len(args.labelled_episodes) != 1:
        fail("the teacher trains on one label budget: give one value to --labelled-episodes")
    if args.latents == "none" and (args.export or args.stages == ("teacher",)):
        fail("--latents none has no teacher, and no latents to --export")
    if (args.latents, args.text, args.stages) == ("none", "none", ("student",)):
        fail("--latents none --text none leaves the student nothing to learn before the expert")
    if args.latents != "split" and "motion" in (args.expert_sees, args.actions_see):
        fail("--expert-sees motion and --actions-see motion are for --latents split")
    return args


def open_run(args: Args) -> tuple[Run, Windows]:
    """Loads the data, locks runs/<name>/ and refuses it if it holds a run of other arguments."""
    device, dtype = pick_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    target = "pixels" if args.latents == "none" else args.target
    split = {"probe_fraction": args.probe_fraction, "seed": args.seed}
    data = Dataset(args.data, args.tasks, target, args.encoder, frame_gap=args.span, **split, device=device)
    if (data.action_dim or 0) < 2:
        fail(f"{args.data} has no actions of a hand and a gripper, which the expert needs")
    args.tasks = data.tasks
    args.variant = args.variant or own_variant(__file__, "latbot", default_variant(args, data))
    folder = default_folder(f"{args.variant}-{args.labelled_episodes[0]}", args.tasks, args.seed, args.data)
    args.out = args.out or folder
    windows = Windows(data, args.span, args.frames, args.labelled_episodes[0], args.text)
    run = Run(Path(args.out), ("teacher", "student", "expert"), args.seed, device, dtype)
    run.claim(args, ("stages", "device", "out", "variant", "export"), data.hash)
    if RANK == 0:
        print(data.describe())
    return run, windows


def summarise(run: Run, windows: Windows, args: Args) -> None:
    """summary.json and curves.png of the stages that are done."""
    names = {"script": Path(__file__).stem, "variant": args.variant, "domain": asdict(windows.domain)}
    names["default_variant"] = default_variant(args, windows.data)
    measured = run.results("teacher") | run.results("student")
    probed = "latent" if args.latents == "undivided" else "motion"
    probes = {name: measured.get(f"{probed}_{name}") for name in PROBES}
    run.summarise(measured | probes | names | windows.data.record())


def main(args: Args) -> None:
    run, windows = open_run(args)
    latents = None

    # stage 1: latents of scene and motion, from frames t..t+span
    if args.latents != "none":
        latents = train_teacher(run, windows, args)
        if args.export:
            windows.data.export_latents(latents, run.folder / "latents.parquet")

    # stage 2: the same from the first frame and the instruction alone, and the sub-task's words
    if "student" in args.stages or "expert" in args.stages:
        student = train_student(run, windows, args, latents)

    # stage 3: actions from the student's latents, learnt from the labelled episodes
    if "expert" in args.stages:
        train_expert(run, windows, args, student)
    summarise(run, windows, args)
    run.close()


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on from the last checkpoint")
