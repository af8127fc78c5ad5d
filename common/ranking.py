"""Ranks the targets of a data set without training: a linear latent action model of each, in closed form."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common import fail
from common.dataset import Column, Dataset, Moments, find_embeddings
from common.probes import Ridge, mean_over_tasks
from common.shards import read_json

GRID = 16  # the linear encoder sees frames as GRID x GRID squares


def rank_targets(data: Dataset, latent_dim: int) -> list[dict]:
    """A row a target: probes of the linear LAM that predicts it, on held-out episodes.

    Targets: cached embeddings, twins, distracted frames. The probes come twice: z has to tell all of the
    target's change (change: as beside an FDM that sees z alone), or what the target's linear prediction from
    itself leaves (innovation). leak is None for data without segments.
    """
    if data.action_dim is None:
        fail(f"{data.root} has no actions; without them there is nothing to rank targets by")
    for array, loss in {"clean": "target `clean`", "segments": "leak"}.items():
        if array not in data.meta["arrays"]:
            print(f"{data.root} has no {array}: ranked without {loss}")
    tasks = data.probes()
    train, held_out = (np.concatenate(rows) for rows in list(zip(*tasks))[1:])
    view_train, view_test = (view(data, rows, (0, data.frame_gap)) for rows in (train, held_out))
    penalty = 0.1 * len(view_train) * view_train.var(0).mean()
    gram = view_train.T @ view_train + penalty * np.eye(view_train.shape[1])

    rows = []
    for name, (label, column) in targets_of(data).items():
        begun = time.time()
        now, after = features(column, train), features(column, train + data.frame_gap)
        scale = change_scale(after - now, colours=len(column.shape) > 1)
        now, after = now / scale, after / scale
        row = {"target": name, "label": label, "frame_gap": data.frame_gap}
        changes = {"change": after - now - (after - now).mean(0), "innovation": innovation(now, after)}
        for variant, change in changes.items():
            weights = linear_encoder(change, view_train, gram, latent_dim)
            measured = measure(tasks, view_train @ weights, view_test @ weights)
            row[f"{variant}_nmse"] = measured["action_probe_nmse"]
            row[f"{variant}_r2"] = measured["action_probe_r2"]
            row[f"{variant}_leak"] = measured["leak_probe_r2"]
        row["seconds"] = time.time() - begun
        rows.append(row)
    if rows[0]["change_nmse"] is None:
        fail(f"no action of {data.root} varies; there is nothing to rank targets by")
    return rows


def targets_of(data: Dataset) -> dict[str, tuple[str, Column]]:
    """{target: (label, its array)}"""
    folders = [data.root / shard["shard"] for shard in data.shards]
    keys = sorted({path.stem for folder in folders for path in folder.glob("embeddings/[!.]*.json")})
    targets = {}
    for key in keys:
        _, records = find_embeddings(data.root, data.shards, key)
        column = Column([folder / "embeddings" / f"{key}.npy" for folder in folders])
        targets[key] = (f"{records[0]['encoder']}: {records[0]['prompt']}", column)
    for name, array in {"clean": "clean", "pixels": "frames"}.items():
        if array in data.meta["arrays"]:
            targets[name] = (name, Column([folder / f"{array}.npy" for folder in folders]))
    return targets


def features(column: Column, rows: np.ndarray) -> np.ndarray:
    """Embeddings as they are; pictures as mean colours of GRID x GRID squares, around 0. (N, D) float64"""
    if len(column.shape) == 1:
        return column[rows].astype(float)
    size = column.shape[0]
    if size % GRID:
        fail(f"the frames are {size} pixels wide; the bridge needs a multiple of {GRID}")
    pooled = []
    for part in np.array_split(rows, len(rows) // 500 + 1):
        squares = column[part].reshape(len(part), GRID, size // GRID, GRID, size // GRID, 3)
        pooled.append(squares.mean((2, 4)).reshape(len(part), -1))
    return np.concatenate(pooled) / 255 - 0.5


def view(data: Dataset, rows: np.ndarray, offsets: Sequence[int]) -> np.ndarray:
    """What a linear encoder sees: the first frame and differences, as the IDM of lam_vlm.py. (N, V)"""
    first, *later = (features(data.columns["frames"], rows + offset) for offset in offsets)
    return np.hstack([first] + [4 * (frame - first) for frame in later])


def measure(tasks: list[tuple], z_train: np.ndarray, z_held_out: np.ndarray) -> dict:
    """Means of the probes over `tasks`, of Dataset.probes; z (N, dz): the rows of one after another."""
    splits = []
    for z, rows in zip((z_train, z_held_out), list(zip(*tasks))[1:]):
        splits.append(np.split(z, np.cumsum([len(of_task) for of_task in rows])[:-1]))
    return mean_over_tasks([probes.measure(*z) for (probes, *_), *z in zip(tasks, *splits)])


def change_scale(change: np.ndarray, colours: bool) -> np.ndarray:
    """What stage 1 divides a target's change (N, D) by: std of each dimension or colour, floored. (D,)"""
    moments, dims = Moments(), change.shape[1]
    if colours:
        change = change.reshape(-1, 3)
    moments.add(torch.from_numpy(change))
    std = moments.mean_std()[1].double().numpy()
    return np.tile(std, dims // len(std))


def innovation(now: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What the target at t does not tell of its own change. (N, D)"""
    change = after - now
    return change - Ridge(now, change, 1e-2)(now)


def linear_encoder(change: np.ndarray, views: np.ndarray, gram: np.ndarray, latent_dim: int) -> np.ndarray:
    """The linear LAM of a target's change (N, D) in closed form: weights (V, dz), z = views @ weights.

    PCA of the change; then z as a ridge regression from the frames (views: (N, V), `gram`: their regularised
    second moments), for the encoder never sees the target.
    """
    vectors = np.linalg.eigh(change.T @ change)[1]
    leading = vectors[:, ::-1][:, :latent_dim]
    return np.linalg.solve(gram, views.T @ (change @ leading))


def trained_lams(
    data: Dataset, train_episodes: int, default: dict
) -> dict[tuple, list[tuple[float, float | None]]]:
    """{(target, frame gap): (action_probe_nmse, leak_probe_r2) of each finished stage 1 in runs/}.

    Of runs on the same tasks and episodes of this data set; default: the arguments that they have.
    """
    names = ["method", "fdm_sees", "latent_dim", "supervision", "idm_horizon", "frame_stack", "widths"]
    names += ["res_blocks", "stem", "fdm_hidden", "lam_updates", "batch_size", "lr", "weight_decay"]
    names += ["probe_fraction"]
    default = json.loads(json.dumps(default))  # tuples become lists, as in args.json
    found = {}
    for path in sorted(Path("runs").rglob("summary.json")):
        summary, args = read_json(path), read_json(path.with_name("args.json"))
        if Path(args["data"]).resolve() != data.root.resolve() or tuple(args["tasks"]) != data.tasks:
            continue
        if args.get("train_episodes", 0) != train_episodes:
            continue
        if summary.get("shards_hash", data.shards_hash) != data.shards_hash:
            continue  # collected anew since
        if summary.get("script", "lam_vlm") != "lam_vlm" or "lam" not in summary["stages"]:
            continue
        if any(args.get(name) != default[name] for name in names):
            continue
        target = args["target"]
        if target == "embedding":
            target = summary["embedding"]["key"]
        probes = summary["action_probe_nmse"], summary["leak_probe_r2"]
        found.setdefault((target, args["frame_gap"]), []).append(probes)
    return found


def compare(rows: list[dict], path: Path) -> None:
    """Rank correlations of linear with trained LAMs, printed and drawn."""
    from common.figures import plot_bridge

    both = [row for row in rows if row["seeds"]]
    if len(both) < 3:
        advice = "train some (lam_vlm.py --stages lam --encoder KEY) to compare"
        print(f"{len(both)} of these targets has trained LAMs in runs/; {advice}")
        return
    seeds = [row["seeds"] for row in both]
    count = f"{len(both)} targets, {min(seeds)} to {max(seeds)} seeds"
    agreement = {}  # {column: Spearman correlation}
    for column in ("change_nmse", "innovation_nmse", "change_leak", "innovation_leak"):
        linear = [row[column] for row in both]
        trained = [row[f"trained_{column.split('_')[1]}"] for row in both]
        if None not in linear:
            agreement[column] = spearman(linear, trained)
            print(f"Spearman of {column} with trained LAMs: {agreement[column]:.2f} ({count})")
    plot_bridge(both, agreement, path)


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = []
    for values in (np.array(x), np.array(y)):
        below = (values[:, None] > values).sum(1)
        up_to = (values[:, None] >= values).sum(1)
        ranks.append((below + up_to) / 2)
    return float(np.corrcoef(*ranks)[0, 1])
