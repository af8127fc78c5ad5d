"""Linear latent action models with an exogenous state: why latent actions fail.

    python linear_lam.py                           the whole study -> results/linear_lam/ (table and figure)
    python linear_lam.py --exo-std 2 --rho 0.3     one case: closed form, exact and mini-batch training
    python linear_lam.py --supervision 10 --json   the same as JSON
    python linear_lam.py --data data/quick         ranks cached embeddings as targets, without training
    python linear_lam.py --teachers runs/latbot-8_drawer-open_s0    what its latents leak, beside theory
    python linear_lam.py --quick                   the study cut to seconds, to see that it runs

Model. o = [s; xi]: endogenous s in R^ds, exogenous xi (the background) in R^dx. s' = s + X a, X with
orthonormal columns, a of std `action_std`; xi' = phi xi + eta, eta of std `exo_std`, correlation `rho` of a_j
with eta_j. A LAM infers z = C o + D o' and predicts A o + B z of o'. Its loss, in sums of squares:

    E|P o' - A o - B z|^2 + supervision * E|a - E z|^2,    P = diag(1 on s, target_leak on xi)

Sources: Zhang et al. 2025 (arXiv 2506.15691) for the linear LAM, arXiv 2605.20223 for the exogenous state;
the derivations are ours. Statements T1 to T7: docs/theory.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import lam_vlm
from common import at_least, fail
from common.dataset import Dataset
from common.figures import BAD, COLOURS, GOOD, plot_split, plot_study
from common.linear_teacher import beside_trained, panels_of
from common.nonlinear_lam import nonlinear
from common.ranking import compare, rank_targets, trained_lams
from common.results import find_runs
from common.shards import atomic_write


@dataclass(frozen=True)
class Args:
    exo_std: float = 2.0
    """std of the background's innovation eta"""
    rho: float = 0.0
    """correlation of a_j with eta_j, -1 to 1"""
    latent_dim: int = 4
    """dimensions of z"""
    supervision: float = 0.0
    """weight of the action loss, in sums of squares: supervision * E|a - E z|^2 beside E|o' - ...|^2"""
    target_leak: float = 1.0
    """share of the background that the target keeps (1: raw frames, 0: the ideal target)"""
    phi: float = 1.0
    """memory of the background: xi' = phi xi + eta, -1 to 1 (1: a random walk)"""
    encoder: Literal["free", "difference"] = "free"
    """free: z = C o + D o'; difference: z = D (o' - o) and the FDM predicts the change alone (A = P)"""
    action_std: float = 1.0
    """std of the action"""
    action_dim: int = 4
    """da"""
    exo_dim: int = 4
    """dx"""
    state_dim: int = 16
    """ds, at least da"""
    restarts: int = 4
    """trainings from different weights; the lowest loss is reported, the losses of all are listed"""
    updates: int = 3000
    """updates of a training"""
    batch_size: int = 512
    """samples per update of the mini-batch training"""
    seed: int = 0
    """seed of the weights and samples"""
    json: bool = False
    """print one JSON object: {"closed_form": {"loss", "r2_action", "leak"}, "trained", "minibatch"}"""
    data: str = ""
    """folder of a data set with actions: rank its cached embeddings, and compare with trained runs"""
    frame_gap: tuple[int, ...] = (1,)
    """with --data: steps between the two frames of a transition; each target is ranked at each of them"""
    tasks: tuple[str, ...] = ()
    """with --data: tasks of the data set, one linear model for all of them; none given: all"""
    teachers: tuple[str, ...] = ()
    """finished runs of latbot.py: what their latents leak, beside linear ones on the same data (T7)"""
    train_episodes: int = 0
    """with --data: fit on only the first N episodes of each task; 0: on all that are not held out"""
    quick: bool = False
    """the study with 20 updates a training, one restart, two scales of the last panel: to see that it runs"""
    out: str = ""
    """folder of tables and figures; empty: results/linear_lam, linear_lam_quick, or with --data its name"""


# -------------------------------------------------------------------------------- population, closed form


@dataclass
class Population:
    """Second moments of a case, do = ds + dx. o and the innovation e = o' - gamma o are uncorrelated."""

    gamma: np.ndarray  # (do, do) best linear prediction of o' from o
    cov_o: np.ndarray  # (do, do)
    cov_e: np.ndarray  # (do, do)
    target: np.ndarray  # (do, do) P
    act: np.ndarray  # (da, do) a = act e
    exo: np.ndarray  # (dx, do) eta = exo e


def population(case: Args) -> Population:
    ds, dx, da = case.state_dim, case.exo_dim, case.action_dim
    x = np.linalg.qr(np.random.default_rng(0).standard_normal((ds, da)))[0]
    cov_s = case.action_std**2 * x @ x.T
    cov_eta = case.exo_std**2 * np.eye(dx)
    cov_a_eta = case.rho * case.action_std * case.exo_std * np.eye(da, dx)
    cov_s_eta = x @ cov_a_eta
    variance = 1.0  # of xi; a random walk has no stationary variance
    if abs(case.phi) < 1:
        variance = case.exo_std**2 / (1 - case.phi**2)
    return Population(
        gamma=np.diag([1.0] * ds + [case.phi] * dx),
        cov_o=np.diag([1.0] * ds + [variance] * dx),
        cov_e=np.block([[cov_s, cov_s_eta], [cov_s_eta.T, cov_eta]]),
        target=np.diag([1.0] * ds + [case.target_leak] * dx),
        act=np.hstack([x.T, np.zeros((da, dx))]),
        exo=np.hstack([np.zeros((dx, ds)), np.eye(dx)]),
    )


def closed_form(case: Args) -> dict[str, float]:
    """Global optimum of a case: loss, r2_action and leak (see `measures`). At a tie it is one of many.

    Whatever o predicts of the target goes into A, so z only matters through the innovation: with the action
    among the targets, T = [P; sqrt(supervision) act], the loss is E|T e - W D e|^2 at rank dz. T e is a
    function of e, so the best W D e is its PCA: the optimum is the sum of the eigenvalues of T cov_e T'
    beyond dz, at D = U' T with U the leading eigenvectors (statements T1, T3 and T4). Encoder `difference`
    has no A to take o away: the same with the covariance of o' - o in place of cov_e (T6).
    """
    p = population(case)
    cov = p.cov_e
    if case.encoder == "difference":
        drift = p.gamma - np.eye(len(p.gamma))  # o' - o = drift o + e
        cov = cov + drift @ p.cov_o @ drift.T
    both = np.vstack([p.target, np.sqrt(case.supervision) * p.act])  # T
    values, vectors = np.linalg.eigh(both @ cov @ both.T)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    dz = min(case.latent_dim, len(values))
    alive = values[:dz] > 1e-12 * max(values[0], 1e-12)
    used = vectors[:, :dz][:, alive].T @ both / np.sqrt(values[:dz][alive])[:, None]  # spans the rows of W D
    return {"loss": float(values[dz:].sum()), **measures(used, case)}


def split_leak(case: Args, motion: int) -> float:
    """Leak into the first `motion` of latent_dim dimensions if these alone predict the action (T7, rho = 0).

    Without correlation each dimension carries an action or a background dimension: the best assignment is
    found by counting. Ties go to the one with more actions among the motion dimensions.
    """
    action_variance = case.action_std**2
    exo_variance = (case.target_leak * case.exo_std) ** 2
    best = []
    for own in range(min(motion, case.action_dim) + 1):  # actions among the motion dimensions
        if motion - own > case.exo_dim:
            continue
        most = min(case.action_dim, case.latent_dim - motion + own)
        for actions in range(own, most + 1):  # actions among all dimensions
            exo = min(case.exo_dim, case.latent_dim - actions)
            gain = action_variance * (actions + case.supervision * own) + exo_variance * exo
            best = max(best, [gain, own])
    return 1 - best[1] / motion


def measures(used: np.ndarray, case: Args) -> dict[str, float]:
    """What the innovation part of z, as far as the model uses it, tells of action and background.

    used: (n, do), any matrix whose rows span those directions of e, e.g. [B; E] D; below 1e-6 of its largest
    variance nothing counts. Invariant to the basis of z and to the part of z that depends on o alone (the
    gauge), with which raw probes mix the leak up. r2_action: share of the action's variance explained, 0 to
    1. leak: mean squared canonical correlation with the part of eta that does not depend on the action, i.e.
    the share of z's (whitened) dimensions that go to the background.
    """
    p = population(case)
    values, vectors = np.linalg.eigh(used @ p.cov_e @ used.T)
    kept = values > 1e-6 * max(values.max(initial=0), 1e-12)
    whiten = (vectors[:, kept] / np.sqrt(values[kept])).T
    z_and_e = whiten @ used @ p.cov_e  # (rank, do): covariance of whitened z with e

    z_and_a = z_and_e @ p.act.T
    r2_action = (z_and_a**2).sum() / (case.action_dim * case.action_std**2)

    a_tells = p.exo @ p.cov_e @ p.act.T / case.action_std**2  # regression of eta on a
    rest = p.exo - a_tells @ p.act  # the part of eta that does not depend on a
    scale, axes = np.linalg.eigh(rest @ p.cov_e @ rest.T)
    alive = scale > 1e-9
    z_and_rest = z_and_e @ rest.T @ axes[:, alive]
    leak = (z_and_rest**2 / scale[alive]).sum() / max(kept.sum(), 1)
    return {"r2_action": float(r2_action), "leak": float(leak)}


# -------------------------------------------------------------------------------- training


def initial_weights(case: Args, restart: int) -> list[np.ndarray]:
    """A, B, C, D, E of one training: a case starts the same whatever it is trained beside."""
    rng = np.random.default_rng([case.seed, restart, 1])
    do, dz, da = case.state_dim + case.exo_dim, case.latent_dim, case.action_dim
    shapes = [(do, do), (do, dz), (dz, do), (dz, do), (da, dz)]
    return [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]


def stack(matrices: list[np.ndarray]) -> Tensor:
    """(n, rows, columns) of n matrices; smaller ones are padded with zeros."""
    rows = max(len(matrix) for matrix in matrices)
    columns = max(matrix.shape[1] for matrix in matrices)
    padded = np.zeros((len(matrices), rows, columns))
    for place, matrix in zip(padded, matrices):
        place[: len(matrix), : matrix.shape[1]] = matrix
    return torch.from_numpy(padded)


def square_root(cov: np.ndarray) -> np.ndarray:
    """R with R R' = cov."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(values.clip(0))


def train(
    cases: list[Args], minibatch: bool = False, tied: bool = False, motion: list[int] | None = None
) -> list[list[dict[str, float]]]:
    """Adam on every case at once: for each case the results of its `restarts`, by rising loss.

    minibatch: on fresh samples of Gaussian o and e at every update, as a user would, instead of the exact
    covariances; the loss reported is exact in both. tied: C = -D while A stays free. motion: only the first
    motion[i] dimensions of z may predict the action (T7); r2_action and leak are then those of these
    dimensions. The cases share nothing but the batch dimension. They must agree in their dimensions but for
    latent_dim, in restarts, updates and batch size. Where a z is shorter than the longest, its padding starts
    at zero and stays there, for it gets no gradient.
    """
    restarts, updates, batch_size = cases[0].restarts, cases[0].updates, cases[0].batch_size
    jobs = [case for case in cases for _ in range(restarts)]  # n trainings
    populations = [population(case) for case in jobs]
    gamma = stack([p.gamma for p in populations])
    P = stack([p.target for p in populations])
    act = stack([p.act for p in populations])
    root_o = stack([square_root(p.cov_o) for p in populations])
    root_e = stack([square_root(p.cov_e) for p in populations])
    weight = torch.tensor([case.supervision for case in jobs], dtype=torch.float64).sqrt()[:, None, None]
    differs = torch.tensor([case.encoder == "difference" for case in jobs])[:, None, None]
    n, do, _ = gamma.shape

    starts = [initial_weights(case, restart) for case in cases for restart in range(restarts)]
    A = stack([start[0] for start in starts]).requires_grad_()  # (n, do, do)
    B = stack([start[1] for start in starts]).requires_grad_()  # (n, do, dz)
    C = stack([start[2] for start in starts]).requires_grad_()  # (n, dz, do)
    D = stack([start[3] for start in starts]).requires_grad_()  # (n, dz, do)
    E = stack([start[4] for start in starts]).requires_grad_()  # (n, da, dz)
    is_motion = torch.ones(n, 1, B.shape[2], dtype=torch.float64)  # dimensions of z that predict the action
    if motion is not None:
        for index in range(n):
            is_motion[index, :, motion[index // restarts] :] = 0

    optimiser = torch.optim.Adam([A, B, C, D, E], 3e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    torch.manual_seed(cases[0].seed)
    for update in range(updates + 1):
        # z = gauge o + D e, for o' = gamma o + e; with --encoder difference z = D (o' - o), and A = P
        FDM = torch.where(differs, P, A)
        gauge = torch.where(differs | tied, -D, C) + D @ gamma
        head = E * is_motion

        # [P o' - A o - B z; sqrt(supervision) (a - E z)] = on_o o + on_e e; (n, do + da, do)
        on_o = torch.cat([P @ gamma - FDM - B @ gauge, -weight * (head @ gauge)], 1) @ root_o
        on_e = torch.cat([P - B @ D, weight * (act - head @ D)], 1) @ root_e
        loss = (on_o**2).sum((1, 2)) + (on_e**2).sum((1, 2))  # the expectation over whitened o and e
        if update == updates:
            break
        if minibatch:
            o, e = torch.randn(2, n, do, batch_size, dtype=torch.float64)
            loss = ((on_o @ o + on_e @ e) ** 2).sum((1, 2)) / batch_size
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        schedule.step()

    used = torch.cat([B, (weight > 0) * E], 1) @ D
    if motion is not None:
        used = torch.diag_embed(is_motion[:, 0]) @ D
    results = []
    for case, job_loss, job_used in zip(jobs, loss.tolist(), used.detach().numpy()):
        results.append({"loss": job_loss, **measures(job_used, case)})
    by_case = [results[start : start + restarts] for start in range(0, n, restarts)]
    return [sorted(trainings, key=lambda result: result["loss"]) for trainings in by_case]


# -------------------------------------------------------------------------------- the bridge to lam_vlm.py


def bridge(args: Args, folder: Path) -> None:
    """Ranks the targets of a data set by linear LAMs, and compares with trained LAMs in runs/.

    Prints action_probe_nmse (lower is better) and leak_probe_r2 of each target, on the held-out episodes of
    lam_vlm.py; writes bridge.csv and bridge.png. A data set without actions has nothing to rank by. Imported
    videos have no twins and no segments: there is no target `clean` and no leak.
    """
    if not (Path(args.data) / "meta.json").exists():
        fail(f"no data set in {args.data}; make it: python collect.py --out {args.data}")
    rows = []
    for gap in args.frame_gap:
        data = Dataset(args.data, args.tasks, frame_gap=gap, train_episodes=args.train_episodes)
        rows += rank_targets(data, lam_vlm.QUICK.latent_dim)
    trained = trained_lams(data, args.train_episodes, asdict(lam_vlm.QUICK))
    for row in rows:
        seeds = trained.get((row["target"], row["frame_gap"]), [])
        if len(args.frame_gap) > 1:
            row["label"] += f", gap {row['frame_gap']}"
        row |= {"trained_nmse": None, "trained_leak": None, "seeds": len(seeds)}
        if seeds:
            row["trained_nmse"] = float(np.mean([nmse for nmse, _ in seeds]))
        if seeds and row["change_leak"] is not None:
            row["trained_leak"] = float(np.mean([leak for _, leak in seeds]))
    rows.sort(key=lambda row: row["change_nmse"])

    save_rows(rows, [name for name in rows[0] if name != "label"], folder / "bridge.csv")
    compare(rows, folder / "bridge.png")


def teachers(args: Args, folder: Path) -> None:
    """split.csv and split.png: what the latents of latbot.py's teachers leak, beside what T7 says."""
    rows = beside_trained(find_runs(args.teachers))
    save_rows(rows, list(rows[0]), folder / "split.csv")
    plot_split(panels_of(rows), folder / "split.png")


def save_rows(rows: list[dict], columns: list[str], path: Path) -> None:
    """Prints a table and writes it as CSV."""
    lines = [[text_of(row[name]) for name in columns] for row in rows]
    print(table(columns, [[value or "–" for value in line] for line in lines]))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(",".join(line) + "\n" for line in [columns, *lines]))


# -------------------------------------------------------------------------------- the study

BASE = Args()
QUICK = replace(BASE, restarts=1, updates=20)  # --quick
TABLE = {  # name: case; printed by closed form and by both trainings
    "exo-std .5": replace(BASE, exo_std=0.5),
    "exo-std .8": replace(BASE, exo_std=0.8),
    "exo-std 1.25": replace(BASE, exo_std=1.25),
    "exo-std 2": replace(BASE, exo_std=2),
    "exo-std .5, latent-dim 6": replace(BASE, exo_std=0.5, latent_dim=6),
    "exo-std .5, latent-dim 8": replace(BASE, exo_std=0.5, latent_dim=8),
    "exo-std 2, rho .3": replace(BASE, exo_std=2, rho=0.3),
    "exo-std 2, rho .6": replace(BASE, exo_std=2, rho=0.6),
    "exo-std 2, rho .9": replace(BASE, exo_std=2, rho=0.9),
    "exo-std 1, rho .3": replace(BASE, exo_std=1, rho=0.3),
    "exo-std 1, rho .6": replace(BASE, exo_std=1, rho=0.6),
    "exo-std 1, rho .9": replace(BASE, exo_std=1, rho=0.9),
    "exo-std 4, target-leak 0": replace(BASE, exo_std=4, target_leak=0),
    "exo-std 4, target-leak .2": replace(BASE, exo_std=4, target_leak=0.2),
    "exo-std 4, target-leak .3": replace(BASE, exo_std=4, target_leak=0.3),
    "exo-std 4, target-leak 0, rho .6": replace(BASE, exo_std=4, target_leak=0, rho=0.6),
    "exo-std 4, target-leak .2, rho .6": replace(BASE, exo_std=4, target_leak=0.2, rho=0.6),
    "exo-std 4, target-leak .3, rho .6": replace(BASE, exo_std=4, target_leak=0.3, rho=0.6),
    "exo-std 2, supervision 2.5": replace(BASE, exo_std=2, supervision=2.5),
    "exo-std 2, supervision 3.5": replace(BASE, exo_std=2, supervision=3.5),
    "exo-std 2, supervision 3.5, difference": replace(BASE, exo_std=2, supervision=3.5, encoder="difference"),
    "exo-std 2, supervision 10": replace(BASE, exo_std=2, supervision=10),
    "exo-std 2, supervision 10, latent-dim 6": replace(BASE, exo_std=2, supervision=10, latent_dim=6),
    "exo-std 2, supervision 1, rho .6": replace(BASE, exo_std=2, supervision=1, rho=0.6),
    "exo-std 2, supervision 10, rho .6": replace(BASE, exo_std=2, supervision=10, rho=0.6),
    "exo-std .837, phi 0": replace(BASE, exo_std=0.7**0.5, phi=0),
    "exo-std .837, phi 0, difference": replace(BASE, exo_std=0.7**0.5, phi=0, encoder="difference"),
    "action-std 2, exo-std 3, supervision 1": replace(BASE, action_std=2, exo_std=3, supervision=1),
    "action-std 2, exo-std 3, supervision 2": replace(BASE, action_std=2, exo_std=3, supervision=2),
}
WIDE = replace(
    BASE, exo_std=2, state_dim=120, exo_dim=8, action_dim=8, latent_dim=8, batch_size=128, updates=1500
)
WIDE_TABLE = {  # sizes of Zhang et al.
    "o of 128, da = dx = 8, exo-std 2, supervision 0.01": replace(WIDE, supervision=0.01),
    "o of 128, da = dx = 8, exo-std 2, supervision 11.6": replace(WIDE, supervision=11.6),
}
MEASURES = {"loss": "loss", "r2_action": "R²(a)", "leak": "leak"}


def numbers(result: dict[str, float]) -> list[str]:
    return [f"{abs(result[name]):.3f}" for name in MEASURES]


def text_of(value: str | float | list | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(text_of(entry) or "–" for entry in value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def study(folder: Path, base: Args) -> None:
    """table.md, every case by closed form and by both trainings; study.png. base: BASE or QUICK."""
    begun = time.time()
    ways = ("closed form", "trained", "mini-batches")
    header = ["case"] + [f"{way}: {name}" for way in ways for name in MEASURES.values()]
    rows = []
    for cases in (TABLE, WIDE_TABLE):
        trained = train(shortened(cases.values(), base))
        once = [replace(case, restarts=1, updates=1500) for case in cases.values()]
        sampled = train(shortened(once, base), minibatch=True)
        for (name, case), exact, samples in zip(cases.items(), trained, sampled):
            rows.append([name, *numbers(closed_form(case)), *numbers(exact[0]), *numbers(samples[0])])
        print(f"{len(rows)} cases, {time.time() - begun:.0f} s", flush=True)
    text = table(header, rows)
    text += f"\nTrained: the lowest loss of {base.restarts} restarts on exact covariances; "
    text += "mini-batches: one training on samples.\n"

    tied = {
        "exo-std .837, phi 0": replace(BASE, exo_std=0.7**0.5, phi=0),
        "exo-std 2, supervision 3.5, phi 0": replace(BASE, exo_std=2, supervision=3.5, phi=0),
        "exo-std 2, supervision 3.5, phi 1": replace(BASE, exo_std=2, supervision=3.5, phi=1),
    }
    text += "\nC = -D with a free A, losses of the restarts:\n\n"
    for name, results in zip(tied, train(shortened(tied.values(), base), tied=True)):
        losses = ", ".join(f"{result['loss']:.2f}" for result in results)
        text += f"- {name}: {losses}\n"

    folder.mkdir(parents=True, exist_ok=True)
    plot_study(study_panels(base), folder / "study.png")
    text += f"\n{time.time() - begun:.0f} s, {torch.get_num_threads()} threads\n"
    atomic_write(folder / "table.md", text)
    print(text + f"{folder}/study.png")


def shortened(cases: Iterable[Args], base: Args) -> list[Args]:
    """The cases with no more restarts and updates than `base`."""
    short = []
    for case in cases:
        restarts, updates = min(case.restarts, base.restarts), min(case.updates, base.updates)
        short.append(replace(case, restarts=restarts, updates=updates))
    return short


def new_panel(title: str, xlabel: str, vline: float | None = None) -> dict:
    """A panel for figures.plot_study: what is drawn in it, and a vertical line."""
    drawn = {"lines": [], "dots": [], "crosses": [], "errorbars": []}
    return {"title": title, "xlabel": xlabel, "vline": vline, **drawn}


def vary(case: Args, name: str, values: Iterable[float]) -> list[Args]:
    """The case with other values of one argument; phi is varied at a constant variance of xi, .7."""
    cases = []
    for value in values:
        if name == "phi":
            case = replace(case, exo_std=(0.7 * (1 - value**2)) ** 0.5)
        cases.append(replace(case, **{name: value}))
    return cases


def sweep(
    panel: dict, case: Args, name: str, curve: list, points: list, dash: str = "-", suffix: str = ""
) -> None:
    """Adds to a panel what one argument does.

    Lines: closed form over `curve`; dots: at `points`, the training of the lowest loss; crosses: leak of
    restarts that stopped 0.1 above the optimum.
    """
    optima = [closed_form(optimum) for optimum in vary(case, name, curve)]
    cases = vary(case, name, points)
    trained = train(cases)
    for measure, color in (("r2_action", GOOD), ("leak", BAD)):
        line = [optimum[measure] for optimum in optima]
        dots = [results[0][measure] for results in trained]
        look = {"color": color, "label": MEASURES[measure] + suffix, "dash": dash}
        panel["lines"].append({"x": curve, "y": line, **look})
        panel["dots"].append({"x": points, "y": dots, "color": color, "label": None, "hollow": False})
    stuck = {"x": [], "y": [], "color": "black", "label": "leak where stuck"}
    for point, optimum, results in zip(points, cases, trained):
        limit = closed_form(optimum)["loss"] + 0.1
        leaks = [result["leak"] for result in results if result["loss"] > limit]
        stuck["x"] += [point] * len(leaks)
        stuck["y"] += leaks
    if stuck["x"]:
        panel["crosses"].append(stuck)


def grid(low: float, high: float) -> list[float]:
    return list(np.linspace(low, high, 120) + 1e-3)  # off the ties


def study_panels(base: Args) -> list[dict]:
    """The panels of study.png, row by row."""
    noise = new_panel("background: a step where it moves\nas much as the action", "exo-std / action-std")
    sweep(noise, base, "exo_std", grid(0, 2), [0.25, 0.5, 0.8, 1.25, 1.6, 2])

    strong = replace(base, exo_std=2)
    correlation = new_panel("background follows the action\n(exo-std 2)", "rho")
    sweep(correlation, strong, "rho", grid(0, 0.99), [0, 0.2, 0.4, 0.6, 0.8, 0.95])

    title = "target that keeps some background\n(exo-std 4: tolerated up to 1/4)"
    leak = new_panel(title, "target-leak", vline=0.25)
    sweep(leak, replace(base, exo_std=4), "target_leak", grid(0, 0.5), [0, 0.1, 0.2, 0.3, 0.4, 0.5])

    dims = new_panel("more dimensions than actions\n(exo-std .5)", "latent-dim")
    sweep(dims, replace(base, exo_std=0.5), "latent_dim", list(range(1, 10)), list(range(1, 9)))

    title = "action supervision: hard threshold,\nand minima where training stops"
    weight = new_panel(title, "supervision", vline=3)
    sweep(weight, strong, "supervision", grid(0, 8), [0, 1, 2, 2.6, 3.5, 4, 5, 6, 7, 8])

    memory = new_panel("background of variance .7, memory phi:\nencoders fed with differences leak", "phi")
    for encoder, dash in (("free", "-"), ("difference", "--")):
        fed = replace(base, encoder=encoder)
        sweep(memory, fed, "phi", grid(-0.9, 0.99), [-0.5, 0, 0.2, 0.5, 0.8, 0.95], dash, f", {encoder}")
    return [noise, correlation, leak, dims, weight, memory, split_panel(strong), nonlinear_panel(base)]


def split_panel(strong: Args) -> dict:
    title = "4 motion dimensions predict the action,\nscene dimensions hold the rest"
    panel = new_panel(title, "scene dimensions")
    scene = list(range(7))
    for supervision, hollow in ((1.0, False), (0.1, True)):
        case = replace(strong, supervision=supervision, updates=min(2000, strong.updates))
        cases = vary(case, "latent_dim", [4 + dimensions for dimensions in scene])
        trained = [results[0]["leak"] for results in train(cases, motion=[4] * len(scene))]
        look = {"color": BAD, "label": f"trained, supervision {supervision:g}", "hollow": hollow}
        panel["dots"].append({"x": scene, "y": trained, **look})
    closed = [split_leak(case, 4) for case in cases]  # the same for both
    panel["lines"].append({"x": scene, "y": closed, "color": BAD, "label": "closed form", "dash": "-"})
    return panel


def nonlinear_panel(base: Args) -> dict:
    panel = new_panel("MLP LAMs, nonlinear observations\n(5 seeds, 95 % CI)", "exo-std")
    scales = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.2])
    if base.updates < 600:  # --quick
        scales = scales[::4]
    tests = nonlinear(scales, seeds=5, updates=min(600, base.updates))
    line = {"color": BAD, "label": "closed form, linear", "dash": "-"}
    panel["lines"].append({"x": scales, "y": tests["linear_leak"].mean(1), **line})
    looks = {
        "leak_raw": {"color": BAD, "label": "MLPs, raw target: leak"},
        "leak_clean": {"color": COLOURS[0], "label": "clean target: leak"},
        "r2_clean": {"color": GOOD, "label": "clean target: R²(a)"},
    }
    for name, look in looks.items():
        half = 2.776 * tests[name].std(1, ddof=1) / 5**0.5  # Student's t, 5 seeds
        panel["errorbars"].append({"x": scales, "y": tests[name].mean(1), "half": half, **look})
    return panel


# -------------------------------------------------------------------------------- program


def parse_args(arguments: list[str]) -> Args:
    case = tyro.cli(Args, args=arguments, description=__doc__, prog="linear_lam.py")
    at_least(0, case, "exo_std", "supervision", "target_leak", "latent_dim", "exo_dim", "seed")
    at_least(1, case, "action_dim", "restarts", "updates", "batch_size")
    if not abs(case.rho) <= 1 or not abs(case.phi) <= 1:
        fail("--rho and --phi lie between -1 and 1")
    if not case.action_std > 0 or case.state_dim < case.action_dim:
        fail("--action-std must be positive and --state-dim at least --action-dim")
    if not case.frame_gap or min(case.frame_gap) < 1:
        fail("--frame-gap takes numbers of steps, each at least 1")
    return case


def asked_for(arguments: list[str]) -> str:
    """--data, one case (any flag that describes one) or the study; flags without effect there are refused."""
    given = {word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    of_data = {"--frame-gap", "--tasks", "--train-episodes"}
    of_case = given - of_data - {"--data", "--teachers", "--out", "--quick"}
    what, foreign = "the study", of_data
    if of_case:
        what, foreign = "one case", of_data | {"--out", "--quick"}
    if "--data" in given:
        what, foreign = "--data", of_case | {"--teachers", "--quick"}
    elif "--teachers" in given:
        what, foreign = "--teachers", of_case | of_data | {"--quick"}
    if given & foreign:
        fail(f"{' '.join(sorted(given & foreign))}: not with {what}")
    return what


def one_case(case: Args) -> None:
    result = {"closed_form": closed_form(case)}
    for way in ("trained", "minibatch"):
        trainings = train([case], minibatch=way == "minibatch")[0]
        losses = [round(training["loss"], 6) for training in trainings]
        result[way] = trainings[0] | {"losses": losses}
    if case.json:
        print(json.dumps(result))
        return
    rows = [[way, *numbers(found)] for way, found in result.items()]
    print(table(["", *MEASURES.values()], rows), end="")
    losses = ", ".join(f"{loss:.3f}" for loss in result["trained"]["losses"])
    print(f"losses of the {case.restarts} restarts: {losses}")


def main(arguments: list[str]) -> None:
    args, what = parse_args(arguments), asked_for(arguments)
    base, folder = BASE, "results/linear_lam"
    if args.quick:
        base, folder = QUICK, "results/linear_lam_quick"
    if what == "--data":
        bridge(args, Path(args.out or f"results/{Path(args.data).absolute().name}"))
    elif what == "--teachers":
        teachers(args, Path(args.out or folder))
    elif what == "one case":
        one_case(args)
    else:
        study(Path(args.out or folder), base)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        fail("interrupted")
