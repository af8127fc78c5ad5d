"""UniVLA's latent actions: vector-quantised codes, first what language does not explain, then the task's.

    python univla.py                               pixels' patches, word embeddings; the quick data set
    python univla.py --data data/main              several tasks in one model
    python univla.py --features facebook/dinov2-with-registers-base --text google-t5/t5-base
    python univla.py --fdm-sees z                  the decoder sees the codes alone, not o_t
    python univla.py --cloned ti                   the policy clones the task-irrelevant codes of stage 1
    python univla.py paper --data data/paper       the published sizes, GPUs

Stage 1 (ti) gives the instruction to encoder and decoder: what is left for the codes is task-irrelevant.
Stage 2 (tc) has no instruction, keeps that codebook frozen, and learns task-centric codes beside it. Then a
policy clones the latents that are quantised to them (or the codes), and is decoded to actions by a handful
of labelled episodes, as in lam_vlm.py.
After Bu et al., arXiv 2505.06111; where this departs: docs/univla.md.
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

import lam_vlm
from common import at_least, fail, parse
from common.actor import Actor, read_policy_run
from common.backbones import transformer
from common.codebook import Codebook, LatentNorm, perplexity, shares
from common.dataset import Dataset, chunks, common_std, thinned
from common.device import average_gradients, pick_device
from common.probes import mean_over_tasks
from common.records import default_folder, own_variant
from common.runs import Run, one_cycle
from common.shards import RANK, WORLD
from common.tokens import Tokens
from lam_vlm import restore_policy, train_bc, train_decoder


@dataclass
class Args:
    data: str = "data/quick"
    """folder of the data set that collect.py or import_videos.py wrote"""
    tasks: tuple[str, ...] = ()
    """tasks of the data set to train on, one model for all of them; none given: all"""
    features: str = "pixels"
    """pixels: 8 x 8 patches of colours; or hub id or folder of a DINOv2, whose patch tokens are predicted"""
    text: str = "words"
    """instruction of stage 1: words (learnt embeddings), none, or hub id or folder of a text encoder"""
    fdm_sees: Literal["frame", "z"] = "frame"
    """what the decoder sees besides the codes: the tokens of o_t (published), or nothing; DETAIL 4"""
    cloned: Literal["tc", "ti"] = "tc"
    """codes that the policy clones: task-centric, or the task-irrelevant ones (then stage 2 is left out)"""
    clone_as: Literal["latent", "code"] = "latent"
    """the policy regresses the latents before they are quantised, or predicts the codes"""
    labelled_episodes: tuple[str, ...] = ("4",)
    """label budgets: episodes per task whose true actions may be used, or `all`; each has its decoder"""
    frame_gap: int = 1
    """steps between the two frames of a transition"""
    codes: int = 4
    """codes per transition, in each of the two sets"""
    codebook: int = 16
    """entries of a codebook"""
    code_dim: int = 128
    """dimensions of an entry"""
    width: int = 96
    """width of the transformers"""
    heads: int = 2
    """attention heads"""
    blocks: tuple[int, int] = (2, 2)
    """transformer blocks of the encoder and of the decoder"""
    stages: tuple[Literal["ti", "tc", "bc", "decoder"], ...] = ("ti", "tc", "bc", "decoder")
    """stages to run, with those that they need; a finished one is skipped"""
    lam_updates: int = 1000
    """updates of stage 1, and of stage 2"""
    lam_batch: int = 64
    """transitions per update of stages 1 and 2"""
    lam_lr: float = 1e-3
    """peak learning rate of stages 1 and 2, AdamW under a one-cycle schedule"""
    widths: tuple[int, ...] = (32, 64)
    """channels of the policy's convolutional blocks"""
    res_blocks: int = 1
    """residual blocks after each of them"""
    stem: int = 4
    """stride of the policy's first block; the others have 2"""
    bc_updates: int = 1500
    """updates of the policy"""
    decoder_updates: int = 2500
    """updates of the action decoder"""
    batch_size: int = 128
    """frames per update of policy and action decoder"""
    lr: float = 1e-3
    """peak learning rate of the policy"""
    decoder_lr: float = 1e-3
    """peak learning rate of the action decoder"""
    probe_fraction: float = 0.2
    """fraction of a task's episodes, the last ones, that no stage trains on: the probes are measured there"""
    device: str = "auto"
    """cuda, cpu, or auto"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """arithmetic of training, weights stay float32; auto: bfloat16 where the hardware has it"""
    seed: int = 0
    """seed of weights, batches and the choice of the labelled episodes"""
    variant: str = ""
    """name under which eval.py groups the seeds of one method; empty: univla, univla-z, univla-ti, ..."""
    out: str = ""
    """folder of the run; empty: runs/<variant>_<tasks>_s<seed>, and the data set's name if not quick"""
    export: bool = False
    """also write runs/<name>/latents.parquet: the latent action of every transition"""


QUICK = Args()
PAPER = Args(
    data="data/paper",
    features="facebook/dinov2-with-registers-base",
    text="google-t5/t5-base",
    labelled_episodes=("32",),
    frame_gap=8,
    width=768,
    heads=12,
    blocks=(12, 12),
    lam_updates=100_000,
    lam_batch=512,
    lam_lr=1e-4,
    widths=(96, 192, 192),
    res_blocks=2,
    stem=2,
    bc_updates=100_000,
    batch_size=512,
    lr=1e-4,
    decoder_lr=3e-4,
    probe_fraction=0.02,
)
PRESETS = {"quick": QUICK, "paper": PAPER}
WARMUP = 0.2  # share of the updates of stages 1 and 2 before latents are quantised
LAST_RESTART = 0.8  # share of the updates up to which entries that died start again
CLIP = 0.1  # bound of the gradient's norm in stages 1 and 2
WEIGHT_DECAY = 1e-2
PROBES = ("action_probe_nmse", "leak_probe_r2")


# ---------------------------------------------------------------------------------------- models


class Instruction(nn.Module):
    """Word numbers (B, L), or states of a frozen text encoder (B, L, D) -> tokens (B, L, width)."""

    def __init__(self, tokens: Tokens, width: int):
        super().__init__()
        if tokens.words:
            self.project = nn.Embedding(tokens.words, width)
        else:
            self.project = nn.Linear(tokens.text_dim, width)
        self.place = places(tokens.texts.shape[1], width)

    def forward(self, text: Tensor) -> Tensor:
        return self.project(text) + self.place


def places(*shape: int) -> nn.Parameter:
    """Learnt places of tokens, and queries."""
    return nn.Parameter(0.1 * torch.randn(*shape))


class Encoder(nn.Module):
    """Inverse model: tokens of o_t, o_{t+k}, their change (B, N, D) -> states of the queries (B, Q, width).

    Block-causal in the order instruction, o_t, o_{t+k}, queries: each sees itself and those before.
    """

    def __init__(self, tokens: Tokens, args: Args):
        super().__init__()
        patches, dim = tokens.shape
        self.project = nn.Linear(dim, args.width)
        self.project_change = nn.Linear(dim, args.width)
        self.place = places(2, patches, args.width)  # and time
        self.blocks = transformer(args.width, args.heads, args.blocks[0])

    def forward(
        self, now: Tensor, after: Tensor, change: Tensor, queries: Tensor, instruction: Tensor
    ) -> Tensor:
        first = self.project(now) + self.place[0]
        second = self.project(after) + self.project_change(change) + self.place[1]
        parts = [instruction, first, second, queries.expand(len(now), -1, -1)]
        order = torch.cat([torch.full((part.shape[1],), number) for number, part in enumerate(parts)])
        hidden = (order[:, None] < order[None]).to(now.device)  # (T, T): what comes later is not seen
        return self.blocks(torch.cat(parts, 1), mask=hidden)[:, -len(queries) :]


class TokenDecoder(nn.Module):
    """Forward model: codes {set: (B, codes, code_dim)}, tokens of o_t or nothing -> change (B, N, D)."""

    def __init__(self, tokens: Tokens, args: Args, sets: tuple[str, ...]):
        super().__init__()
        patches, dim = tokens.shape
        self.sees_frame = args.fdm_sees == "frame"
        if self.sees_frame:
            self.project = nn.Linear(dim, args.width)
        self.project_codes = nn.ModuleDict({name: nn.Linear(args.code_dim, args.width) for name in sets})
        self.code_place = nn.ParameterDict({name: places(args.codes, args.width) for name in sets})
        self.place = places(patches, args.width)
        self.blocks = transformer(args.width, args.heads, args.blocks[1])
        self.out = nn.Linear(args.width, dim)

    def forward(self, now: Tensor, codes: dict[str, Tensor], instruction: Tensor) -> Tensor:
        patches = self.place.expand(len(now), -1, -1)
        if self.sees_frame:
            patches = patches + self.project(now)
        parts = [patches, instruction]
        for name, project in self.project_codes.items():
            parts.append(project(codes[name]) + self.code_place[name])
        states = self.blocks(torch.cat(parts, 1))
        return self.out(states[:, : patches.shape[1]])


class LAM(nn.Module):
    """Stage 1: task-irrelevant codes (TI), with the instruction. Stage 2, given stage 1: TI and TC, without.

    Of stage 1 the queries and the codebook, which is frozen, are kept; encoder and decoder start again.
    """

    def __init__(self, tokens: Tokens, args: Args, stage_1: LAM | None = None):
        super().__init__()
        for name, value in tokens.statistics().items():  # mean, std, change_mean, change_std
            self.register_buffer(name, value)
        self.tokens = tokens  # no module, so not in the checkpoint
        sets = ("ti",) if stage_1 is None else ("ti", "tc")
        self.encoder = Encoder(tokens, args)
        self.decoder = TokenDecoder(tokens, args, sets)
        self.queries = nn.ParameterDict({name: places(args.codes, args.width) for name in sets})
        self.to_latents = nn.ModuleDict({name: nn.Linear(args.width, args.code_dim) for name in sets})
        self.books = nn.ModuleDict({name: Codebook(args.codebook, args.code_dim) for name in sets})
        self.instruction = None
        if stage_1 is not None:
            self.books["ti"].load_state_dict(stage_1.books["ti"].state_dict())
            self.books["ti"].requires_grad_(False)
            self.queries["ti"].data.copy_(stage_1.queries["ti"])
            self.norm = LatentNorm(encode(stage_1, thinned(tokens.data.train, 1000))["ti"])
        elif args.text != "none":
            self.instruction = Instruction(tokens, args.width)

    def embed_instruction(self, rows: np.ndarray) -> Tensor:
        """The instruction's tokens (B, L, width) of each row; L = 0 without one."""
        if self.instruction is None:
            return self.mean.new_zeros(len(rows), 0, self.encoder.project.out_features)
        return self.instruction(self.tokens.text(rows))

    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of o_t and o_{t+k} and their change, each standardised, (B, N, D)."""
        now, after = (self.tokens.patches(rows + gap) for gap in (0, self.tokens.data.frame_gap))
        change = (after - now - self.change_mean) / self.change_std
        return (now - self.mean) / self.std, (after - self.mean) / self.std, change

    def latents(self, now: Tensor, after: Tensor, change: Tensor, instruction: Tensor) -> dict[str, Tensor]:
        """{"ti", "tc": (B, codes, code_dim)} before quantisation, float32."""
        queries = torch.cat([self.queries[name] for name in self.to_latents])  # not values(), which sorts
        states = self.encoder(now, after, change, queries, instruction).float().chunk(len(self.queries), 1)
        with torch.autocast(now.device.type, enabled=False):  # codes are not to depend on the arithmetic
            latents = {name: head(state) for (name, head), state in zip(self.to_latents.items(), states)}
            if "tc" in latents:
                latents["ti"] = self.norm(latents["ti"])
        return latents

    def quantise(self, latents: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The latents' entries; codebook and commitment loss, summed over the sets."""
        found = {name: book(latents[name]) for name, book in self.books.items()}
        entries = {name: entry for name, (entry, _, _) in found.items()}
        codebook_loss = sum(loss for _, loss, _ in found.values())  # a frozen one's has no gradient
        commitment_loss = sum(loss for _, _, loss in found.values())
        return entries, codebook_loss, commitment_loss


# ---------------------------------------------------------------------------------------- stages


def train_lam(run: Run, tokens: Tokens, args: Args, stage_1: LAM | None = None) -> LAM:
    """Stage 1 ("ti") or, given it, stage 2 ("tc"): codes from which the change of the tokens is predicted."""
    stage, number = ("ti", 0) if stage_1 is None else ("tc", 3)
    torch.manual_seed(args.seed + number)
    lam = LAM(tokens, args, stage_1).to(run.device)
    optimizer, schedule = one_cycle(lam, args.lam_lr, WEIGHT_DECAY, args.lam_updates)

    for step in run.steps(stage, lam, optimizer, schedule, args.lam_updates):
        t = step.rng.choice(tokens.data.train, args.lam_batch)[run.share]
        now, after, change = lam.observe(t)
        with run.autocast():
            instruction = lam.embed_instruction(t)
            latents = lam.latents(now, after, change, instruction)
            if step.update < WARMUP * args.lam_updates:  # the decoder gets the latents as they are
                entries = latents
                codebook_loss = commitment_loss = torch.zeros((), device=run.device)
                usage = torch.zeros(args.codes, args.codebook, device=run.device)
            else:
                entries, codebook_loss, commitment_loss = lam.quantise(latents)
                usage = shares(lam.books[stage].nearest(latents[stage]), args.codebook)
            fdm_loss = F.mse_loss(lam.decoder(now, entries, instruction), change)
            loss = fdm_loss + codebook_loss + 0.25 * commitment_loss
        optimizer.zero_grad()
        loss.backward()
        average_gradients(lam)
        nn.utils.clip_grad_norm_(lam.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step.update < LAST_RESTART * args.lam_updates:
            lam.books[stage].restart(latents[stage], usage)
        step.log(loss=loss, fdm_loss=fdm_loss, codebook_loss=codebook_loss, commitment_loss=commitment_loss)
        step.log(perplexity=perplexity(usage).mean(), unused=(usage.sum(0) == 0).sum())

    measured = {}
    if not run.restored(stage):
        measured = measure(lam, args)
    run.finish(stage, **measured)
    return lam


@torch.no_grad()
def encode(lam: LAM, rows: np.ndarray) -> dict[str, Tensor]:
    """`LAM.latents` of the transitions rows -> rows + frame_gap, (N, codes, code_dim) each."""
    lam.eval()
    found = [lam.latents(*lam.observe(part), lam.embed_instruction(part)) for part in chunks(rows)]
    return {name: torch.cat([latents[name] for latents in found]) for name in lam.books}


def measure(lam: LAM, args: Args) -> dict[str, float | None]:
    """What the codes of each set are worth, a task at a time, mean over tasks.

    Probes of latents and of their entries; perplexity of a code; gain: by how much the held-out loss grows
    if the set's codes are those of another transition of the task.
    """
    measured = []
    for of_task, *splits in lam.tokens.data.probes():
        train, held_out = (encode(lam, rows) for rows in splits)
        found = gains(lam, splits[1], held_out)
        for name, book in lam.books.items():
            pairs = {name: (train[name], held_out[name])}
            pairs[f"{name}_quantised"] = tuple(book.entries[book.nearest(z)].detach() for z in pairs[name])
            for kind, pair in pairs.items():
                probed = of_task.measure(*(z.flatten(1).double().cpu().numpy() for z in pair))
                found |= {f"{kind}_{probe}": probed[probe] for probe in PROBES}
            usage = shares(book.nearest(held_out[name]), args.codebook)
            found[f"{name}_perplexity"] = float(perplexity(usage).mean())
        measured.append(found)
    return mean_over_tasks(measured)


@torch.no_grad()
def gains(lam: LAM, rows: np.ndarray, latents: dict[str, Tensor]) -> dict[str, float]:
    """{set_gain: growth of the loss, in shares of it}, of the transitions rows, all of one task."""
    entries = {name: book.entries[book.nearest(latents[name])] for name, book in lam.books.items()}
    others = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))

    def loss(entries: dict[str, Tensor]) -> float:
        total = 0.0
        for part in chunks(np.arange(len(rows))):
            now, _, change = lam.observe(rows[part])
            codes = {name: found[part] for name, found in entries.items()}
            error = lam.decoder(now, codes, lam.embed_instruction(rows[part])) - change
            total += float(error.square().mean((1, 2)).sum())
        return total / len(rows)

    whole = loss(entries)
    shuffled = {name: loss(entries | {name: found[others]}) for name, found in entries.items()}
    return {f"{name}_gain": value / whole - 1 for name, value in shuffled.items()}


def latents_or_codes(lam: LAM, rows: np.ndarray, args: Args, kind: str) -> Tensor:
    """Of the cloned set, kind latent: (N, codes * code_dim); kind code: one-hot, (N, codes * codebook)."""
    latents = encode(lam, rows)[args.cloned]
    if kind == "code":
        codes = lam.books[args.cloned].nearest(latents)
        return F.one_hot(codes, args.codebook).float().flatten(1)
    return latents.flatten(1)


def policy_targets(lam: LAM, data: Dataset, args: Args) -> Tensor:
    """The policy's targets (N, D) at the training rows; latents are centred and divided by one std."""
    targets = latents_or_codes(lam, data.train, args, args.clone_as)
    if args.clone_as == "latent":
        targets = (targets - targets.mean(0)) / common_std(targets)
    return targets


def load_policy(run_dir: str | Path, labelled: str | None = None, device: str = "cpu") -> Actor:
    """The policy of a finished run: observation -> action; as lam_vlm.load_policy."""
    folder = Path(run_dir)
    args, summary, labelled = read_policy_run(folder, labelled, Args)
    width = args.codes * args.code_dim
    if args.clone_as == "code":
        width = args.codes * args.codebook
    return restore_policy(folder, summary, labelled, policy_args(args), width, device)


# ---------------------------------------------------------------------------------------- program


def policy_args(args: Args) -> lam_vlm.Args:
    """What stages 2 and 3 of lam_vlm.py take; what is no flag here is its default."""
    names = ("widths", "res_blocks", "stem", "bc_updates", "decoder_updates", "batch_size", "lr", "seed")
    values = {name: getattr(args, name) for name in (*names, "decoder_lr")}
    return lam_vlm.Args(weight_decay=WEIGHT_DECAY, **values)


def default_variant(args: Args, data: Dataset) -> str:
    """univla, univla-z, univla-no-language, univla-ti, univla-code, ..., -clean-data."""
    parts = {
        f"-{Path(args.features).name}": args.features != "pixels",
        "-z": args.fdm_sees == "z",
        "-no-language": args.text == "none",
        f"-{Path(args.text).name}": args.text not in ("words", "none"),
        "-ti": args.cloned == "ti",
        "-code": args.clone_as == "code",
        "-clean-data": data.undistracted,
    }
    return "univla" + "".join(part for part, holds in parts.items() if holds)


def parse_args(arguments: list[str]) -> Args:
    args = parse(PRESETS, arguments, __doc__)
    at_least(0, args, "seed", "res_blocks", "lr", "lam_lr", "decoder_lr")
    at_least(1, args, "frame_gap", "codes", "code_dim", "width", "heads", "stem", "lam_batch", "batch_size")
    at_least(1, args, "lam_updates", "bc_updates", "decoder_updates", "blocks", "widths")
    at_least(2, args, "codebook")
    if not 0 < args.probe_fraction < 1:
        fail("--probe-fraction lies between 0 and 1")
    if args.export and args.cloned == "tc" and args.stages == ("ti",):
        fail("--export writes the task-centric latents, which --stages ti does not make; add --cloned ti")
    if args.width % args.heads:
        fail(f"--width {args.width} can not be divided among --heads {args.heads}")
    for name in ("batch_size", "lam_batch"):
        if getattr(args, name) % WORLD:
            fail(f"--{name.replace('_', '-')} can not be divided among {WORLD} ranks")
    return args


def open_run(args: Args) -> tuple[Run, Tokens]:
    """Loads the data, locks runs/<name>/ and refuses it if it holds a run of other arguments."""
    device, dtype = pick_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    split = {"probe_fraction": args.probe_fraction, "seed": args.seed}
    data = Dataset(args.data, args.tasks, frame_gap=args.frame_gap, **split, device=device)
    if data.action_dim is not None:
        for budget in args.labelled_episodes:
            data.labelled(budget)  # refuses one that the data do not have
    args.tasks = data.tasks
    args.variant = args.variant or own_variant(__file__, "univla", default_variant(args, data))
    args.out = args.out or default_folder(args.variant, args.tasks, args.seed, args.data)
    tokens = Tokens(data, args.features, args.text)
    run = Run(Path(args.out), ("ti", "tc", "bc", "decoder"), args.seed, device, dtype)
    aside = ("stages", "device", "out", "variant", "export", "labelled_episodes")
    run.claim(args, aside, data.hash)
    if RANK == 0:
        print(data.describe())
    return run, tokens


def summarise(run: Run, data: Dataset, args: Args, lam: LAM) -> None:
    """summary.json and curves.png of the stages that are done; a codebook that collapsed is said."""
    names = {"script": Path(__file__).stem, "variant": args.variant}
    names["default_variant"] = default_variant(args, data)
    stage_1 = {f"stage_1_{name}": value for name, value in run.results("ti").items()}
    measured = run.results("ti") | run.results("tc")
    probes = {name: measured.get(f"{args.cloned}_{name}") for name in PROBES}
    if data.action_dim is not None and args.cloned in lam.books:
        for kind in ("latent", "code"):  # which to clone
            latents_of = partial(latents_or_codes, lam, args=args, kind=kind)
            budgets = run.budgets(*args.labelled_episodes)
            probes[f"labelled_probe_nmse_{kind}"] = data.probe_labelled(latents_of, budgets)
    run.summarise(stage_1 | measured | probes | names | data.record())
    for name, value in measured.items():
        if RANK == 0 and name.endswith("perplexity") and value < 1.5:
            print(f"the codebook has collapsed: {name} {value:.2f}")
        if RANK == 0 and name.endswith("gain") and value < 0.001:
            print(f"the codes say nothing of the change: {name} {value:.4f}")


def main(args: Args) -> None:
    run, tokens = open_run(args)
    data = tokens.data

    # stage 1: codes of what the instruction does not explain
    lam = train_lam(run, tokens, args)

    # stage 2: codes of the task beside them
    if args.cloned == "tc" and (args.stages != ("ti",) or run.results("tc")):
        lam = train_lam(run, tokens, args, lam)

    # stage 3: a policy that predicts latent actions from distracted frames, as in lam_vlm.py
    if "bc" in args.stages or "decoder" in args.stages:
        targets = policy_targets(lam, data, args)
        policy = train_bc(run, data, policy_args(args), data.train, targets)

    # stage 4: true actions from the policy's output, learnt from a handful of labelled episodes
    if "decoder" in args.stages and data.action_dim is not None:
        for budget in args.labelled_episodes:
            train_decoder(run, data, policy_args(args), policy, budget)

    if args.export:
        latents = encode(lam, data.transitions)[args.cloned].flatten(1)
        data.export_latents(latents, run.folder / "latents.parquet")
    summarise(run, data, args, lam)
    run.close()
    if "decoder" in args.stages and data.action_dim is None:
        fail(f"the action decoder needs actions, and {args.data} has none; the rest is in {run.folder}")


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on from the last checkpoint")
