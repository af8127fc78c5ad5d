"""Linear latent action models with an exogenous state: why latent actions fail, in closed form and by training.

    python linear_lam.py                                            the whole study -> results/linear_lam/ (table and figure)
    python linear_lam.py --exo-std 2 --rho 0.3 --latent-dim 4       one case: closed form, exact-covariance and mini-batch training
    python linear_lam.py --exo-std 2 --supervision 10 --json        the same as JSON
    python linear_lam.py --data data/quick                          ranks cached embeddings as targets of lam_vlm.py without training it

Model. o = [s; xi]: endogenous s in R^ds, exogenous xi in R^dx. s' = s + X a, X with orthonormal columns, a of std `action_std`;
xi' = phi xi + eta, eta of std `exo_std`, correlation `rho` between a_j and eta_j. A LAM infers z = C o + D o' and predicts A o + B z of o';
loss E|P o' - A o - B z|^2 + supervision * E|a - E z|^2, sums of squares, P = diag(1 on s, target_leak on xi).
Sources: Zhang et al. 2025 (arXiv 2506.15691) for the linear LAM, arXiv 2605.20223 for the exogenous state; the derivations are ours.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import lam_vlm


@dataclass(frozen=True)
class Args:
    exo_std: float = 2.0
    """std of the background's innovation eta"""
    rho: float = 0.0
    """correlation of a_j with eta_j, -1 to 1"""
    latent_dim: int = 4
    """dimensions of z"""
    supervision: float = 0.0
    """weight of the action loss, in units of sums of squares: supervision * E|a - E z|^2 beside E|o' - ...|^2"""
    target_leak: float = 1.0
    """share of the background that the target keeps (1: raw frames, 0: the ideal target)"""
    phi: float = 1.0
    """memory of the background: xi' = phi xi + eta, -1 to 1 (1: a random walk)"""
    encoder: Literal["free", "difference"] = "free"
    """free: z = C o + D o'; difference: z = D (o' - o) and the FDM predicts the change alone (A = P), as shared augmentation forces"""
    action_std: float = 1.0
    """std of the action"""
    action_dim: int = 4
    """da"""
    exo_dim: int = 4
    """dx"""
    state_dim: int = 16
    """ds, at least da"""
    restarts: int = 4
    """trainings from different weights; the one of the lowest loss is reported, the losses of all are listed"""
    updates: int = 3000
    """updates of a training"""
    batch_size: int = 512
    """samples an update of the mini-batch training"""
    seed: int = 0
    """seed of the weights and samples"""
    json: bool = False
    """print one JSON object: {"closed_form": {"loss", "r2_action", "leak"}, "trained": {...}, "minibatch": {...}}"""
    data: str = ""
    """folder of a data set of collect.py: fit the linear LAM to each of its cached embeddings, and compare with trained runs in runs/"""
    out: str = "results/linear_lam"
    """folder of the study's table and figure"""


def fail(message: str) -> None:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f"linear_lam.py: {message}")


def checked(case: Args) -> Args:
    for name, least in {"exo_std": 0, "supervision": 0, "target_leak": 0, "latent_dim": 0, "exo_dim": 0, "action_dim": 1}.items():
        if not getattr(case, name) >= least:
            fail(f"--{name.replace('_', '-')} must be at least {least}")
    if not abs(case.rho) <= 1 or not abs(case.phi) <= 1:
        fail("--rho and --phi lie between -1 and 1")
    if not case.action_std > 0 or case.state_dim < case.action_dim:
        fail("--action-std must be positive and --state-dim at least --action-dim")
    if min(case.restarts, case.updates, case.batch_size) < 1 or case.seed < 0:
        fail("--restarts, --updates and --batch-size must be at least 1, --seed at least 0")
    return case


# ------------------------------------------------------------------------------------------------ population and closed form


@dataclass
class Population:
    """Second moments of a case, do = ds + dx. o and the innovation e = o' - gamma o are uncorrelated; a = act e, eta = the last dx of e."""

    gamma: np.ndarray  # (do, do) best linear prediction of o' from o
    cov_o: np.ndarray  # (do, do)
    cov_e: np.ndarray  # (do, do)
    target: np.ndarray  # (do, do) P
    act: np.ndarray  # (da, do)

    @staticmethod
    def of(case: Args) -> Population:
        ds, dx, da = case.state_dim, case.exo_dim, case.action_dim
        x = np.linalg.qr(np.random.default_rng(0).standard_normal((ds, da)))[0]
        shared = case.rho * case.action_std * case.exo_std * np.eye(da, dx)  # E a eta^T
        cov_e = np.block([[case.action_std**2 * x @ x.T, x @ shared], [(x @ shared).T, case.exo_std**2 * np.eye(dx)]])
        variance = case.exo_std**2 / (1 - case.phi**2) if abs(case.phi) < 1 else 1.0  # a random walk has no stationary variance
        return Population(
            gamma=np.diag([1.0] * ds + [case.phi] * dx),
            cov_o=np.diag([1.0] * ds + [variance] * dx),
            cov_e=cov_e,
            target=np.diag([1.0] * ds + [case.target_leak] * dx),
            act=np.hstack([x.T, np.zeros((da, dx))]),
        )


def closed_form(case: Args) -> dict[str, float]:
    """Global optimum of a case: loss, r2_action and leak (see `measures`). Where action and background tie, it is one of many.

    Whatever o predicts of the target goes into A, so z only matters through the innovation: with the action among the targets, T =
    [P; sqrt(supervision) act], the loss is E|T e - W D e|^2 at rank dz. T e is a function of e, so the best W D e is its PCA: the optimum
    is the sum of the eigenvalues of T cov_e T' beyond dz, at D = U' T with U the leading eigenvectors (statements T1, T3 and T4).
    Encoder `difference` has no A to take o away: the same with the covariance of o' - o in place of cov_e (T6).
    """
    p = Population.of(case)
    both = np.vstack([p.target, np.sqrt(case.supervision) * p.act])
    drift = p.gamma - np.eye(len(p.gamma))
    moves = p.cov_e + (drift @ p.cov_o @ drift.T if case.encoder == "difference" else 0)
    values, vectors = np.linalg.eigh(both @ moves @ both.T)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    dz = min(case.latent_dim, len(values))
    used = vectors[:, :dz] @ vectors[:, :dz].T @ both
    return {"loss": float(values[dz:].sum()), **measures(used, case)}


def split_leak(case: Args, motion: int) -> float:
    """Leak into the first `motion` of latent_dim dimensions where these alone predict the action (T7), for rho = 0.

    Without correlation each dimension carries an action or a background dimension: the best assignment is found by counting.
    """
    gains = {}
    for own in range(min(motion, case.action_dim) + 1):  # actions among the motion dimensions
        if motion - own <= case.exo_dim:
            for actions in range(own, min(case.action_dim, case.latent_dim - motion + own) + 1):
                exo = min(case.exo_dim, case.latent_dim - actions)
                gain = case.action_std**2 * (actions + case.supervision * own) + (case.target_leak * case.exo_std) ** 2 * exo
                gains[gain, own] = 1 - own / motion
    return gains[max(gains)]


def measures(used: np.ndarray, case: Args) -> dict[str, float]:
    """What the innovation part of z, as far as the model uses it, tells of action and background.

    used: (n, do), any matrix whose rows span those directions of e, e.g. [B; sqrt(supervision) E] D. Invariant to the basis of z and to
    the part of z that depends on o alone (the gauge), with which raw probes mix the leak up.
    r2_action: share of the action's variance explained, 0 to 1. leak: mean squared canonical correlation with the part of eta that does
    not depend on the action, i.e. the share of z's (whitened) dimensions that go to the background.
    """
    p = Population.of(case)
    values, vectors = np.linalg.eigh(used @ p.cov_e @ used.T)
    kept = values > 1e-6 * max(values.max(initial=0), 1e-12)
    white = (vectors[:, kept] / np.sqrt(values[kept])).T @ used @ p.cov_e  # (rank, do): covariance of whitened z with e
    r2 = ((white @ p.act.T) ** 2).sum() / (case.action_dim * case.action_std**2)
    rest = np.hstack([np.zeros((case.exo_dim, case.state_dim)), np.eye(case.exo_dim)])
    rest = rest - rest @ p.cov_e @ p.act.T / case.action_std**2 @ p.act  # eta minus what the action tells of it
    scale, axes = np.linalg.eigh(rest @ p.cov_e @ rest.T)
    alive = scale > 1e-9
    leak = ((white @ rest.T @ axes[:, alive]) ** 2 / scale[alive]).sum() / max(kept.sum(), 1)
    return {"r2_action": float(r2), "leak": float(leak)}


# ------------------------------------------------------------------------------------------------ training


def train(cases: list[Args], minibatch: bool = False, tied: bool = False, motion: list[int] | None = None) -> list[list[dict[str, float]]]:
    """Adam on every case at once (they only share the batch dimension): for each case its `restarts`, by rising loss.

    minibatch: on fresh samples of Gaussian o and e at every update, as a user would, instead of the exact covariances; the loss reported is
    exact in both. tied: C = -D while A stays free. motion: only the first motion[i] dimensions of z may predict the action (T7); r2_action
    and leak are then those of these dimensions. The cases must agree in their dimensions but for latent_dim, and in updates and batch size.
    """
    first = cases[0]
    jobs = [(case, restart) for case in cases for restart in range(case.restarts)]
    tensor = lambda arrays: torch.from_numpy(np.stack(arrays))  # noqa: E731
    pops = [Population.of(case) for case, _ in jobs]
    gamma, target, act = (tensor([getattr(p, name) for p in pops]) for name in ("gamma", "target", "act"))
    roots = [tensor([square_root(getattr(p, name)) for p in pops]) for name in ("cov_o", "cov_e")]
    weight = tensor([np.full((1, 1), np.sqrt(case.supervision)) for case, _ in jobs])
    change = tensor([np.full((1, 1), case.encoder == "difference") for case, _ in jobs])
    n, do, da, dz = len(jobs), gamma.shape[1], act.shape[1], max(1, *(case.latent_dim for case in cases))
    exists = tensor([(np.arange(dz) < case.latent_dim).astype(float) for case, _ in jobs])  # (n, dz)
    seen = exists if motion is None else tensor([(np.arange(dz) < motion[k // first.restarts]).astype(float) for k in range(n)])

    def draw(case: Args, restart: int) -> list[np.ndarray]:
        """Initial a, b, c, d, e, padded to dz: a case starts the same whatever it is trained beside."""
        rng, k = np.random.default_rng([case.seed, restart, 1]), case.latent_dim
        drawn = [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in ((do, do), (do, k), (k, do), (k, do), (da, k))]
        sizes = (do, do), (do, dz), (dz, do), (dz, do), (da, dz)
        return [np.pad(x, [(0, rows - x.shape[0]), (0, columns - x.shape[1])]) for x, (rows, columns) in zip(drawn, sizes)]

    a, b, c, d, e = (tensor(weights).requires_grad_() for weights in zip(*(draw(*job) for job in jobs)))
    optimiser = torch.optim.Adam([a, b, c, d, e], 3e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, first.updates)
    torch.manual_seed(first.seed)

    def residuals() -> tuple[Tensor, Tensor]:
        """What multiplies o and e in [P o' - A o - B z; sqrt(supervision) (a - E z)], (n, do + da, do) each."""
        dd = d * exists[..., None]
        cc = torch.where(change | torch.tensor(tied), -dd, c * exists[..., None])
        aa = torch.where(change, target, a)
        gauge = cc + dd @ gamma
        on_o = torch.cat([target @ gamma - aa - b @ gauge, -weight * ((e * seen[:, None]) @ gauge)], 1)
        on_e = torch.cat([target - b @ dd, weight * (act - (e * seen[:, None]) @ dd)], 1)
        return on_o, on_e

    def loss_of(sampled: bool) -> Tensor:
        parts = [residual @ root for residual, root in zip(residuals(), roots)]
        if not sampled:
            return sum((part**2).sum((1, 2)) for part in parts)
        noise = torch.randn(2, n, do, first.batch_size, dtype=torch.float64)
        return ((parts[0] @ noise[0] + parts[1] @ noise[1]) ** 2).sum((1, 2)) / first.batch_size

    for _ in range(first.updates):
        optimiser.zero_grad()
        loss_of(minibatch).sum().backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        losses = loss_of(sampled=False).tolist()
        heads = torch.cat([b, weight * e], 1) * exists[:, None] if motion is None else torch.diag_embed(seen)
        used = (heads @ d).numpy()
    results = [{"loss": loss, **measures(u, case)} for loss, u, (case, _) in zip(losses, used, jobs)]
    ends = np.cumsum([0] + [case.restarts for case in cases])
    return [sorted(results[i:j], key=lambda result: result["loss"]) for i, j in zip(ends, ends[1:])]


def square_root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(values.clip(0))


# ------------------------------------------------------------------------------------------------ the nonlinear check


def mlp(x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
    """N networks at once: x (N, B, in) -> (N, B, out), tanh between the layers."""
    for k, (w, b) in enumerate(weights):
        x = torch.baddbmm(b, x, w)
        x = torch.tanh(x) if k < len(weights) - 1 else x
    return x


def nonlinear(scales: np.ndarray, seeds: int, updates: int = 1500) -> dict[str, np.ndarray]:
    """MLP LAMs on random nonlinear observations o = f(s, xi), for each background scale and seed: {name: (scales, seeds)}.

    da = dx = dz = 2, ds = 4; xi is drawn anew at every step with std `scale`; f is a random tanh network to 16 numbers, one a seed.
    linear_leak is that of the closed form, innovation PCA of o; leak and r2 are of MLP IDM and FDM trained on o' (raw) or f(s', 0) (clean).
    z's share of o is taken out by holding o fixed: 64 states, 64 (a, eta) each. r2: action explained by z, leak: as in `measures`.
    """
    da, ds, do, hidden, batch = 2, 4, 16, 64, 128
    jobs = [(float(scale), seed, clean) for scale in scales for seed in range(seeds) for clean in (False, True)]
    n = len(jobs)
    scale, clean = (torch.tensor([job[k] for job in jobs], dtype=torch.float32)[:, None, None] for k in (0, 2))
    f, own = [], [np.random.default_rng(seed) for seed in range(seeds)]
    for fan_in, fan_out in ((ds + da, 32), (32, do)):
        drawn = [r.standard_normal((fan_in, fan_out)).astype(np.float32) / fan_in**0.5 for r in own]
        f.append((torch.from_numpy(np.stack([drawn[seed] for _, seed, _ in jobs])), torch.zeros(n, 1, fan_out)))
    torch.manual_seed(0)

    def sample(states: int, repeats: int) -> tuple[Tensor, ...]:
        """o, o', the target's o and o' and [a, eta / scale], `repeats` transitions from each of `states` states."""
        s, xi = (torch.randn(n, states, 1, d).expand(-1, -1, repeats, -1).reshape(n, -1, d) for d in (ds, da))
        noise = torch.randn(n, states * repeats, 2 * da)
        moved = s + torch.nn.functional.pad(0.5 * noise[..., :da], (0, ds - da))
        see = lambda s, xi: mlp(torch.cat([s, scale * xi], 2), f)  # noqa: E731
        now, after = see(s, xi), see(moved, noise[..., da:])
        target = [torch.where(clean > 0, see(x, 0 * xi), o) for x, o in ((s, now), (moved, after))]
        return now, after, *target, noise

    def layers(*widths: int) -> list[tuple[Tensor, Tensor]]:
        shapes = zip(widths, widths[1:])
        return [((torch.randn(n, i, o) / i**0.5).requires_grad_(), torch.zeros(n, 1, o, requires_grad=True)) for i, o in shapes]

    idm, fdm = layers(2 * do, hidden, hidden, da), layers(do + da, hidden, hidden, do)
    optimiser = torch.optim.Adam([w for layer in idm + fdm for w in layer], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    infer = lambda now, after: mlp(torch.cat([now, 2 * (after - now)], 2), idm)  # noqa: E731
    for _ in range(updates):
        now, after, target_now, target_after, _ = sample(batch, 1)
        z = infer(now, after)
        loss = ((mlp(torch.cat([target_now, z], 2), fdm) - (target_after - target_now)) ** 2).mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    def probe(z: Tensor, noise: Tensor) -> np.ndarray:
        """(n, 2): squared correlations of z, whitened within each state, with a and with eta."""
        z, noise = (x.reshape(n, 64, 64, -1).double() for x in (z, noise))
        z, noise = z - z.mean(2, keepdim=True), noise - noise.mean(2, keepdim=True)
        q, basis = (torch.linalg.qr(x)[0] for x in (z, noise))
        shared = (q.mT @ basis) ** 2  # (n, 64, dz, 2 da)
        return torch.stack([shared[..., :da].sum((2, 3)) / da, shared[..., da:].sum((2, 3)) / da], 2).mean(1).numpy()

    with torch.no_grad():
        now, after, _, _, noise = sample(64, 64)
        found = probe(infer(now, after), noise)
        past, future, *_ = sample(4096, 1)
        past, future = past.double(), future.double()
        past, future = past - past.mean(1, keepdim=True), future - future.mean(1, keepdim=True)
        innovation = future - past @ torch.linalg.lstsq(past, future).solution
        top = torch.linalg.eigh(innovation.mT @ innovation)[1][..., -da:]
        linear = probe(after.double() @ top, noise)
    shaped = lambda values: values.reshape(len(scales), seeds, 2)  # noqa: E731
    return {
        "linear_leak": shaped(linear[:, 1])[..., 0],
        "leak_raw": shaped(found[:, 1])[..., 0],
        "leak_clean": shaped(found[:, 1])[..., 1],
        "r2_clean": shaped(found[:, 0])[..., 1],
    }


# ------------------------------------------------------------------------------------------------ the bridge to lam_vlm.py


def bridge(args: Args, folder: Path) -> None:
    """Ranks the targets of a data set by linear LAMs in closed form, and compares the ranking with that of trained LAMs in runs/.

    Targets: every cached embedding, and frames and twins as 16 x 16 pictures. Prints action_probe_nmse (lower is better) and leak_probe_r2
    of each, on the held-out episodes of lam_vlm.py, and writes bridge.csv and bridge.png. Two variants: z has to tell all of the target's
    change (change: as beside an FDM that sees z alone), or what its linear prediction from the target leaves (innovation).
    """
    if not (Path(args.data) / "meta.json").exists():
        fail(f"no data set in {args.data}; make it: python collect.py --out {args.data}")
    lam_args = replace(lam_vlm.QUICK, data=args.data, target="pixels", labelled_episodes=("1",))  # pixels: loads no embeddings
    data = lam_vlm.Dataset(lam_args, torch.device("cpu"))
    probes = lam_vlm.Probes(data, lam_args)
    shards = [Path(args.data) / fact["shard"] for fact in data.meta["shards"]]
    keys = sorted({path.stem for shard in shards for path in (shard / "embeddings").glob("*.json")})
    frames, clean = (small(np.concatenate([np.load(shard / f"{name}.npy") for shard in shards])) for name in ("frames", "clean"))
    seen = [np.hstack([frames[rows], 4 * (frames[rows + 1] - frames[rows])]) for rows in probes.rows]
    gram = seen[0].T @ seen[0] + 0.1 * len(seen[0]) * seen[0].var(0).mean() * np.eye(seen[0].shape[1])
    trained, rows = trained_lams(args.data), []
    for name in [*keys, "clean", "pixels"]:
        begun = time.time()
        picture = {"clean": clean, "pixels": frames}.get(name)
        target = (
            picture if picture is not None else np.concatenate([np.load(s / "embeddings" / f"{name}.npy") for s in shards]).astype(float)
        )
        about = lam_vlm.read_json(shards[0] / "embeddings" / f"{name}.json") if picture is None else {}
        row = {"target": name, "label": f"{about['encoder']}: {about['prompt']}" if about else name}
        for variant in ("change", "innovation"):
            z = linear_latents(target, probes.rows, seen, gram, lam_args.latent_dim, variant == "innovation")
            found = probes.measure(z)
            row |= {f"{variant}_nmse": found["action_probe_nmse"], f"{variant}_leak": found["leak_probe_r2"]}
        row |= {"seconds": time.time() - begun, "trained_nmse": None, "trained_leak": None, "seeds": 0}
        if trained.get(name):
            nmse, leak = np.array(trained[name], float).T
            row |= {"trained_nmse": nmse.mean(), "trained_leak": leak.mean(), "seeds": len(nmse)}
        rows.append(row)
    rows.sort(key=lambda row: row["change_nmse"])
    columns = [column for column in rows[0] if column != "label"]
    cell = lambda value: f"{value:.3f}" if isinstance(value, float) else "–" if value is None else str(value)  # noqa: E731
    print(table(columns, [[cell(row[column]) for column in columns] for row in rows]))
    folder.mkdir(parents=True, exist_ok=True)
    lam_vlm.atomic_write(
        folder / "bridge.csv",
        "\n".join(",".join("" if row[c] is None else cell(row[c]) for c in columns) for row in [dict(zip(columns, columns)), *rows]) + "\n",
    )
    both = [row for row in rows if row["seeds"]]
    if len(both) < 3:
        print(f"{len(both)} of these targets has trained LAMs in runs/; train some (lam_vlm.py --stages lam --encoder KEY) to compare")
        return
    agreement = {}
    for measure in ("nmse", "leak"):
        for variant in ("change", "innovation"):
            agreement[measure, variant] = spearman(*([row[f"{prefix}_{measure}"] for row in both] for prefix in (variant, "trained")))
            print(f"Spearman of {variant}_{measure} with trained LAMs: {agreement[measure, variant]:.2f} "
                  f"({len(both)} targets, {min(row['seeds'] for row in both)} to {max(row['seeds'] for row in both)} seeds)")  # fmt: skip
    draw_bridge(both, agreement, folder / "bridge.png")


def linear_latents(
    target: np.ndarray, rows: list[np.ndarray], seen: list[np.ndarray], gram: np.ndarray, latent_dim: int, innovation: bool
) -> list[np.ndarray]:
    """The linear LAM of a target in closed form: z (N, latent_dim) of the transitions in `rows`, training and held-out.

    PCA of the target's change, or of what o_t does not tell of it; then z as a ridge regression from `seen`, features of both frames
    (`gram`: their regularised second moments over the training transitions): the encoder never sees the target.
    """
    now, change = target[rows[0]], target[rows[0] + 1] - target[rows[0]]
    change = change - (lam_vlm.ridge(now, change, 1e-2)(now) if innovation else change.mean(0))
    leading = np.linalg.eigh(change.T @ change)[1][:, ::-1][:, :latent_dim]
    weights = np.linalg.solve(gram, seen[0].T @ (change @ leading))
    return [features @ weights for features in seen]


def small(pictures: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, 768), mean colours of 16 x 16 cells around 0."""
    n, size = pictures.shape[:2]
    if size % 16:
        fail(f"the frames are {size} pixels wide; the bridge needs a multiple of 16")
    cells = np.concatenate(
        [p.reshape(len(p), 16, size // 16, 16, size // 16, 3).mean((2, 4)) for p in np.array_split(pictures, n // 500 + 1)]
    )
    return cells.reshape(n, -1) / 255 - 0.5


def trained_lams(data: str) -> dict[str, list[tuple[float, float]]]:
    """{target: (action_probe_nmse, leak_probe_r2) of every finished stage 1 in runs/}, on this data set and with default settings."""
    stage_1 = "method fdm_input latent_dim supervision frame_gap idm_horizon frame_stack widths res_blocks stem fdm_hidden".split()
    stage_1 += "fdm_dropout lam_updates batch_size lr weight_decay probe_fraction".split()
    quick, found = lam_vlm.identity_of(lam_vlm.QUICK), {}
    for path in sorted(Path("runs").glob("*/summary.json")):
        summary, args = lam_vlm.read_json(path), lam_vlm.read_json(path.with_name("args.json"))
        default = all(args.get(key) == quick[key] for key in stage_1)
        if args["data"] == data and "lam" in summary["stages"] and default and args["target"] != "masked":
            target = summary["embedding"]["key"] if args["target"] == "embedding" else args["target"]
            found.setdefault(target, []).append((summary["action_probe_nmse"], summary["leak_probe_r2"]))
    return found


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    rank = lambda v: [(np.less(v, i).sum() + np.less_equal(v, i).sum()) / 2 for i in v]  # noqa: E731
    return float(np.corrcoef(rank(np.array(x)), rank(np.array(y)))[0, 1])


# ------------------------------------------------------------------------------------------------ the study

BASE = Args()
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
WIDE = replace(BASE, exo_std=2, state_dim=120, exo_dim=8, action_dim=8, latent_dim=8, batch_size=128, updates=1500)
WIDE_TABLE = {f"o of 128, da = dx = 8, exo-std 2, supervision {w}": replace(WIDE, supervision=w) for w in (0.01, 11.6)}  # Zhang et al.


def numbers(result: dict[str, float] | None) -> list[str]:
    return [f"{abs(result[name]):.3f}" for name in ("loss", "r2_action", "leak")] if result else ["–"] * 3


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * len(header), *rows))


def study(folder: Path) -> None:
    """results/linear_lam/: table.md, every case by closed form and by both trainings; study.png, the panels."""
    begun, rows = time.time(), []
    folder.mkdir(parents=True, exist_ok=True)
    header = ["case"] + [f"{way}: {name}" for way in ("closed form", "trained", "mini-batches") for name in ("loss", "R²(a)", "leak")]
    for cases in (TABLE, WIDE_TABLE):
        exact = train(list(cases.values()))
        sampled = train([replace(case, restarts=1, updates=1500) for case in cases.values()], minibatch=True)
        for (name, case), full, samples in zip(cases.items(), exact, sampled):
            rows.append([name, *numbers(closed_form(case)), *numbers(full[0]), *numbers(samples[0])])
        print(f"{len(rows)} cases, {time.time() - begun:.0f} s", flush=True)
    text = table(header, rows) + "\nTrained: the lowest loss of 4 restarts on exact covariances; mini-batches: one training on samples.\n"
    tied = train(
        [replace(BASE, exo_std=0.7**0.5, phi=0), *(replace(BASE, exo_std=2, supervision=3.5, phi=phi) for phi in (0, 1))], tied=True
    )
    text += "\nC = -D with a free A, losses of the restarts:\n\n"
    for name, results in zip(("exo-std .837, phi 0", "exo-std 2, supervision 3.5, phi 0", "exo-std 2, supervision 3.5, phi 1"), tied):
        text += f"- {name}: {', '.join(format(result['loss'], '.2f') for result in results)}\n"
    draw(folder / "study.png")
    text += f"\n{time.time() - begun:.0f} s, {torch.get_num_threads()} threads\n"
    lam_vlm.atomic_write(folder / "table.md", text)
    print(text + f"{folder}/study.png")


GOOD, BAD = "#009E73", "#D55E00"  # colour-blind-safe


def sweep(axis, values: np.ndarray, case_of: Callable[[float], Args], points: np.ndarray, encoders: tuple[str, ...] = ("free",)) -> None:
    """Lines: closed form over `values`; dots: at `points`, the training of the lowest loss; crosses: restarts 0.1 above the optimum."""
    for encoder, dash in zip(encoders, ("-", "--")):
        lines = [closed_form(replace(case_of(value), encoder=encoder)) for value in values]
        cases = [replace(case_of(point), encoder=encoder) for point in points]
        trained = train(cases)
        for measure, colour, label in (("r2_action", GOOD, "R²(a)"), ("leak", BAD, "leak")):
            name = label if len(encoders) == 1 else f"{label}, {encoder}"
            axis.plot(values, [line[measure] for line in lines], dash, color=colour, label=name, linewidth=1.5)
            axis.plot(points, [results[0][measure] for results in trained], "o", color=colour, markersize=4)
        optima = [closed_form(case)["loss"] for case in cases]
        stuck = [(point, r["leak"]) for point, results, best in zip(points, trained, optima) for r in results if r["loss"] > best + 0.1]
        if stuck:
            axis.plot(*zip(*stuck), "x", color="black", markersize=5, label="leak where stuck")


def draw(path: Path) -> None:
    """The panels of study.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained", sharey=True)
    (noise, correlation, leak, dims), (weight, memory, split, mlps) = axes
    grid = lambda low, high: np.linspace(low, high, 120) + 1e-3  # noqa: E731  (off the ties)
    sweep(noise, grid(0, 2), lambda v: replace(BASE, exo_std=v), np.array([0.25, 0.5, 0.8, 1.25, 1.6, 2]))
    noise.set(title="background: a step where it moves\nas much as the action", xlabel="exo-std / action-std")
    sweep(correlation, grid(0, 0.99), lambda v: replace(BASE, exo_std=2, rho=v), np.array([0, 0.2, 0.4, 0.6, 0.8, 0.95]))
    correlation.set(title="background follows the action\n(exo-std 2)", xlabel="rho")
    sweep(leak, grid(0, 0.5), lambda v: replace(BASE, exo_std=4, target_leak=v), np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5]))
    leak.axvline(0.25, color="grey", linestyle=":", linewidth=1)
    leak.set(title="target that keeps some background\n(exo-std 4: tolerated up to 1/4)", xlabel="target-leak")
    sizes = np.arange(1, 10)
    sweep(dims, sizes, lambda v: replace(BASE, exo_std=0.5, latent_dim=int(v)), sizes[:8])
    dims.set(title="more dimensions than actions\n(exo-std .5)", xlabel="latent-dim")
    sweep(weight, grid(0, 8), lambda v: replace(BASE, exo_std=2, supervision=v), np.array([0, 1, 2, 2.6, 3.5, 4, 5, 6, 7, 8]))
    weight.axvline(3, color="grey", linestyle=":", linewidth=1)
    weight.set(title="action supervision: hard threshold,\nand minima where training stops", xlabel="supervision")
    sweep(
        memory,
        grid(-0.9, 0.99),
        lambda v: replace(BASE, exo_std=(0.7 * (1 - v**2)) ** 0.5, phi=v),
        np.array([-0.5, 0, 0.2, 0.5, 0.8, 0.95]),
        ("free", "difference"),
    )
    memory.set(title="background of variance .7, memory phi:\nencoders fed with differences leak", xlabel="phi")
    scene = np.arange(7)
    for supervision, fill, size in ((1.0, BAD, 4), (0.1, "none", 8)):
        cases = [replace(BASE, exo_std=2, supervision=supervision, latent_dim=4 + int(d), updates=2000) for d in scene]
        trained = [results[0]["leak"] for results in train(cases, motion=[4] * len(cases))]
        split.plot(scene, trained, "o", color=BAD, markerfacecolor=fill, markersize=size, label=f"trained, supervision {supervision:g}")
    split.plot(scene, [split_leak(case, 4) for case in cases], "-", color=BAD, label="closed form")
    split.set(title="4 motion dimensions predict the action,\nscene dimensions hold the rest", xlabel="scene dimensions")
    scales = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.2])
    tests = nonlinear(scales, 5, 600)
    mlps.plot(scales, tests["linear_leak"].mean(1), "-", color=BAD, label="closed form, linear")
    for name, colour, label in (
        ("leak_raw", BAD, "MLPs, raw target: leak"),
        ("leak_clean", "#0072B2", "clean target: leak"),
        ("r2_clean", GOOD, "clean target: R²(a)"),
    ):
        half = 2.776 * tests[name].std(1, ddof=1) / 5**0.5  # Student's t, 5 seeds
        mlps.errorbar(scales, tests[name].mean(1), half, fmt="o", color=colour, markersize=4, linewidth=1, label=label)
    mlps.set(title="MLP LAMs, nonlinear observations\n(5 seeds, 95 % CI)", xlabel="exo-std")
    for axis in axes.flat:
        axis.legend(fontsize=7, loc="center right" if axis is weight else "best")
        axis.set_ylim(-0.04, 1.04)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_bridge(rows: list[dict], agreement: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, measure, label in zip(axes, ("nmse", "leak"), ("action-probe NMSE", "leak R²")):
        points = sorted((row[f"trained_{measure}"], row[f"change_{measure}"], row["label"]) for row in rows)
        span = [max(values) - min(values) for values in list(zip(*points))[:2]]
        height = -np.inf
        for y, x, name in points:
            height = max(y, height + 0.055 * span[0])  # labels one above the other
            axis.plot(x, y, "o", color=GOOD, markersize=5)
            grey = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
            axis.annotate(name, (x, y), (x + 0.06 * span[1], height), fontsize=7, va="center", arrowprops=grey)
        axis.set(
            xlabel=f"{label}, linear LAM in closed form",
            ylabel=f"{label}, trained LAM",
            title=f"Spearman {agreement[measure, 'change']:.2f}",
        )
        axis.set_xlim(right=min(x for _, x, _ in points) + 1.5 * span[1])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_args(arguments: list[str]) -> Args:
    return checked(tyro.cli(Args, args=arguments, description=__doc__, prog="linear_lam.py"))


def main(args: Args, whole_study: bool) -> None:
    if args.data:
        return bridge(args, Path(args.out))
    if whole_study:
        return study(Path(args.out))
    result = {"closed_form": closed_form(args)}
    for way in ("trained", "minibatch"):
        runs = train([args], minibatch=way == "minibatch")[0]
        result[way] = runs[0] | {"losses": [round(run["loss"], 6) for run in runs]}
    if args.json:
        print(json.dumps(result))
    else:
        print(table(["", "loss", "R²(a)", "leak"], [[way, *numbers(found)] for way, found in result.items()]), end="")
        print(f"losses of the {args.restarts} restarts: " + ", ".join(f"{loss:.3f}" for loss in result["trained"]["losses"]))


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]), whole_study=sys.argv[1:2] in ([], ["--out"]))
    except KeyboardInterrupt:
        fail("interrupted")
