"""Interquartile mean, stratified bootstrap and probability of improvement of success rates, in plain numpy.

After Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice". Scores are matrices (runs,
tasks).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

REPS = 50_000  # bootstrap replicates
# Methods that the others are compared with, and each of these with those after it.
BASELINES = ("lapo", "lapo-frame", "bc-few", "no-latents", "lapo-pooled", "bc-few-pooled")


def checked(scores: ArrayLike, tasks: Sequence[str] | None = None) -> np.ndarray:
    """Scores (runs, tasks) as a float array, or a ValueError of one line.

    tasks: their names; give them, for no shape alone tells that axes are swapped.
    """
    try:
        scores = np.asarray(scores, dtype=float)
    except (ValueError, TypeError):
        raise ValueError("the scores are ragged or not numbers: every task needs as many runs") from None
    if scores.size == 0 or np.isnan(scores).any():
        raise ValueError(f"the scores of shape {scores.shape} are empty or contain NaN")
    if scores.ndim != 2:
        raise ValueError(f"expected a matrix (runs, tasks), got shape {scores.shape}")
    if tasks is not None and len(tasks) != scores.shape[1]:
        raise ValueError(f"expected {len(tasks)} tasks, got scores {scores.shape}; did you swap the axes?")
    return scores


# ---------------------------------------------------------------------------------------- statistics
# Of one matrix (runs, tasks) or of many, (..., runs, tasks) -> (...).


def mean(scores: ArrayLike) -> np.ndarray:
    return np.mean(scores, axis=(-2, -1))


def iqm(scores: ArrayLike) -> np.ndarray:
    """Interquartile mean: of the middle 50 % of all runs and tasks (section 4.3). ValueError on NaN.

    A quarter of them, rounded down, is cut on either side, as in scipy.stats.trim_mean(scores, 0.25,
    axis=None).
    """
    scores = np.asarray(scores, dtype=float)
    if np.isnan(scores).any():  # a sort would move it to the end, and the cut hide it
        raise ValueError("the scores contain NaN")
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    count = ordered.shape[-1]
    cut = count // 4
    return ordered[..., cut : count - cut].mean(axis=-1)


def win_rate(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for a run of x and one of y on the same task, mean over tasks (Mann-Whitney).

    x: (..., runs, tasks), y: (..., other runs, the same tasks).
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"expected scores of the same tasks, got {x.shape[-1]} and {y.shape[-1]} tasks")
    x, y = x[..., :, None, :], y[..., None, :, :]  # all pairs of runs
    wins = (x > y) + 0.5 * (x == y)
    return wins.mean(axis=(-3, -2, -1))


def iqm_difference(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    return iqm(x) - iqm(y)


def mean_difference(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    return mean(x) - mean(y)


def iqm_ratio(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    return ratio(iqm(x), iqm(y))


def mean_ratio(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    return ratio(mean(x), mean(y))


def ratio(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """x / y; inf over 0, but 1 of 0 over 0."""
    x, y = np.asarray(x), np.asarray(y)
    return np.divide(x, y, out=np.where(x > 0, np.inf, 1.0), where=y > 0)


# ---------------------------------------------------------------------------------------- bootstrap


def replicates(scores: np.ndarray, reps: int, seed: list[int], pooled: bool) -> Iterator[np.ndarray]:
    """`reps` replicates of a matrix (runs, tasks), (B, runs, tasks) at a time.

    Each one draws, for each task by itself, as many runs as there are, with replacement. pooled: a run is
    one model for all tasks; then whole runs are drawn, the same ones for every task.
    """
    rng = np.random.default_rng(seed)
    runs, tasks = scores.shape
    columns = 1 if pooled else tasks
    for start in range(0, reps, 1000):  # bounds the memory
        drawn = rng.integers(runs, size=(min(1000, reps - start), runs, columns))
        yield scores[drawn, np.arange(tasks)]


def stratified_bootstrap_ci(
    *matrices: ArrayLike,
    statistic: Callable = iqm,
    pooled: Sequence[bool] = (False, False),
    reps: int = REPS,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval (section 4.1) of statistic(scores), or of statistic(x, y), such as `win_rate`.

    Matrices (runs, tasks) are resampled independently of each other; `pooled` says of each how (see
    `replicates`). None if one of them has a single run. ValueError: see `checked`.
    """
    matrices = [checked(scores) for scores in matrices]
    if min(len(scores) for scores in matrices) == 1:
        return None
    draws = []
    for index, scores in enumerate(matrices):
        draws.append(replicates(scores, reps, [seed, index], pooled[index]))
    values = np.concatenate([statistic(*drawn) for drawn in zip(*draws, strict=True)])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")  # no inf - inf
    return float(low), float(high)


# ---------------------------------------------------------------------------------------- tables


def budget_order(labelled: str) -> tuple:
    """Sorts label budgets by size, "all" last."""
    if labelled.isdigit():
        return 0, int(labelled), ""
    return 1, 0, labelled


def aggregate(rows: list[dict], measure: str, runs: list[dict]) -> list[dict]:
    """An entry for each method and label budget: IQM and mean of its matrix (runs, tasks) with their CIs.

    rows: method, labelled, task, seed and the measure (None: not measured). The runs of a matrix are the
    seeds that all its tasks have, `dropped` are the others; where none is left, matrix, iqm and mean are
    None. Sorted by label budget, the highest first. runs: what is known of the runs, for `pooled` (see
    `replicates`).
    """
    pooled_methods = {run["variant"] for run in runs if len(run["tasks"]) > 1}
    groups = defaultdict(dict)
    for row in rows:
        if row[measure] is not None:
            groups[row["method"], row["labelled"]][row["task"], row["seed"]] = row[measure]
    table = []
    for (method, labelled), scores in groups.items():
        tasks = sorted({task for task, _ in scores})
        all_seeds = sorted({seed for _, seed in scores})
        seeds = [seed for seed in all_seeds if all((task, seed) in scores for task in tasks)]
        dropped = [seed for seed in all_seeds if seed not in seeds]
        entry = {"method": method, "labelled": labelled, "tasks": tasks, "seeds": seeds, "dropped": dropped}
        entry |= dict.fromkeys(("matrix", "iqm", "iqm_ci", "mean", "mean_ci"))
        entry["pooled"] = method in pooled_methods
        if seeds:
            matrix = checked([[scores[task, seed] for task in tasks] for seed in seeds], tasks)
            pooled = [entry["pooled"]]
            entry |= {"matrix": matrix, "iqm": float(iqm(matrix)), "mean": float(mean(matrix))}
            entry["iqm_ci"] = stratified_bootstrap_ci(matrix, statistic=iqm, pooled=pooled)
            entry["mean_ci"] = stratified_bootstrap_ci(matrix, statistic=mean, pooled=pooled)
        table.append(entry)
    table.sort(key=entry_order)
    return table


def entry_order(entry: dict) -> tuple:
    if not entry["seeds"]:
        return budget_order(entry["labelled"]), 0, 0, entry["method"]
    return budget_order(entry["labelled"]), -entry["iqm"], -entry["mean"], entry["method"]


def compare(table: list[dict]) -> list[dict]:
    """Each method against each of BASELINES with the same label budget. table: see `aggregate`.

    Seeds choose the labelled episodes, and tasks differ in difficulty: those that both have are compared. A
    row has method, base, labelled, tasks, seeds; ratio and difference of iqm and mean, and win_rate, each
    with its CI.
    """
    rows = []
    for index, base in enumerate(BASELINES):
        for y in table:
            for x in table:
                if y["method"] != base or x["method"] in BASELINES[index:] or x["labelled"] != y["labelled"]:
                    continue
                common = {name: [each for each in x[name] if each in y[name]] for name in ("tasks", "seeds")}
                if common["tasks"] and common["seeds"]:
                    names = {"method": x["method"], "base": base, "labelled": x["labelled"]}
                    rows.append(names | common | versus(x, y, **common))
    return rows


def versus(x: dict, y: dict, tasks: list[str], seeds: list[int]) -> dict:
    """What `compare` says of two entries of a table on some of their tasks and seeds."""
    matrices = []
    for entry in (x, y):
        rows = [entry["seeds"].index(seed) for seed in seeds]
        columns = [entry["tasks"].index(task) for task in tasks]
        matrices.append(entry["matrix"][np.ix_(rows, columns)])
    pooled = (x["pooled"], y["pooled"])
    row = {}
    for statistic in (iqm_ratio, iqm_difference, mean_ratio, mean_difference, win_rate):
        name = statistic.__name__
        row[name] = float(statistic(*matrices))
        row[f"{name}_ci"] = stratified_bootstrap_ci(*matrices, statistic=statistic, pooled=pooled)
    return row
