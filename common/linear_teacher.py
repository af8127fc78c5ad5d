"""The linear form of latbot.py's teacher on a data set, in closed form: what T7 says that its latents leak.

Latents z = D view, a decoder that is linear in them and in the first frame o (statements: docs/theory.md):

    E|change - P o - W z|^2 / p + action_weight * E|actions - Q o - V z_motion|^2 / q

view: the window's frames. change: of the target, standardised (p dimensions). actions: the window's (q), in
quantiles, without the gripper. Frames and pictures are seen as squares of mean colours. What view and o tell
of change and actions are ridge regressions, of actions fitted on the labelled episodes. The actions are read
from the motion latent alone, as with `--actions-see motion`; where latbot.py's streams exchange, as
published, they can be read from either, and no theory says which.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from common import fail
from common.dataset import Column, Dataset
from common.probes import Ridge
from common.ranking import GRID, features, measure, view
from common.shards import read_json
from common.windows import Windows

PENALTY = 0.1  # of the ridge regressions
FOLDS = 4  # of episodes: what o tells of the others is never fitted on an episode itself


def linear_latents(
    change: np.ndarray, actions: np.ndarray, action_weight: float, scene_dim: int, motion_dim: int
) -> np.ndarray:
    """Weights (p + q, scene_dim + motion_dim), scene first: z = [change, actions] @ weights is white.

    change (N, p), actions (N, q): what the view tells of them beyond o. Both terms as one target make z
    their PCA (T1, T4), however it is split; the motion latent is that part of it from which the actions are
    read. motion_dim 0: one undivided latent, from all of which they are.
    This is the optimum if motion_dim is 0 or q. If it is less, only the leading actions count, which is not
    quite the best (against gradient descent: loss within 1 %, but for weights far below 1). If it is more,
    the spare dimensions may hold anything.
    """
    p, q = change.shape[1], actions.shape[1]
    kept = np.eye(q)
    if 0 < motion_dim < q:
        leading = np.linalg.eigh(actions.T @ actions)[1][:, -motion_dim:]
        kept = leading @ leading.T
    to_target = np.zeros((p + q, p + q))  # [change, actions] -> what is predicted, in units of the loss
    to_target[:p, :p] = np.eye(p) / p**0.5
    to_target[p:, p:] = kept * (action_weight / q) ** 0.5
    target = np.hstack([change, actions]) @ to_target
    values, vectors = np.linalg.eigh(target.T @ target / len(target))
    dims = scene_dim + motion_dim
    scale = np.sqrt(values[-dims:].clip(1e-12))
    whiten, read = vectors[:, -dims:] / scale, vectors[:, -dims:] * scale  # to z and back
    needed = read[p:].T @ read[p:]
    return to_target @ whiten @ np.linalg.eigh(needed)[1]  # ascending: the motion's come last


class LinearTeacher:
    """What the frames of the windows of a data set tell of change and actions, by ridge regressions."""

    def __init__(self, windows: Windows, fdm_sees: str):
        data = windows.data
        self.tasks = data.probes()
        train, held_out = (np.concatenate(rows) for rows in list(zip(*self.tasks))[1:])
        target = target_of(data)
        change = features(target, train + windows.span) - features(target, train)
        std = data.statistics()["change_std"].double().flatten().cpu().numpy()  # of a dimension, or a colour
        change /= np.tile(std, change.shape[1] // len(std))
        self.change_dim = change.shape[1]
        actions = windows.chunk(windows.chunk_rows)[0].flatten(1).double().cpu().numpy()
        self.action_dim = actions.shape[1]
        views = [view(data, rows, windows.offsets) for rows in (train, held_out)]
        tell_change = Ridge(views[0], change, PENALTY)
        tell_actions = Ridge(view(data, windows.chunk_rows, windows.offsets), actions, PENALTY)
        told = [np.hstack([tell_change(seen), tell_actions(seen)]) for seen in views]
        if fdm_sees == "frame":
            first = [seen[:, : 3 * GRID**2] for seen in views]
            told[1] = told[1] - Ridge(first[0], told[0], PENALTY)(first[1])
            told[0] = beyond(first[0], told[0], data.first[train])
        self.train, self.held_out = (both - told[0].mean(0) for both in told)

    def measure(self, action_weight: float, scene_dim: int, motion_dim: int) -> dict[str, dict]:
        """{"scene": probes, "motion": probes}, means over tasks; motion_dim 0: {"latent": ...}, undivided."""
        if scene_dim + motion_dim > self.change_dim + self.action_dim:
            fail(f"{scene_dim + motion_dim} dimensions are more than change and actions have")
        change, actions = np.split(self.train, [self.change_dim], axis=1)
        weights = linear_latents(change, actions, action_weight, scene_dim, motion_dim)
        parts = {"latent": weights}
        if motion_dim:
            parts = {"scene": weights[:, :scene_dim], "motion": weights[:, scene_dim:]}
        z = {name: (self.train @ part, self.held_out @ part) for name, part in parts.items()}
        return {name: measure(self.tasks, *splits) for name, splits in z.items()}


def beside_trained(runs: list[dict]) -> list[dict]:
    """A row for each latent of the teachers of runs of latbot.py: its leak, trained and linear.

    runs: as find_runs reads them; their data set must be there. linear_leak: None where theory does not say
    what is in it: of a split without a weight on the actions, or with more motion dimensions than actions.
    The action probe has no such line: it depends on what z holds of o, which the loss leaves open (T1).
    """
    rows, made = [], {}
    for run in runs:
        if "teacher" not in run["stages"] or run["latents"] == "none":
            fail(f"{run['dir']} is no run of latbot.py with a teacher")
        same = ("data", "tasks", "target", "encoder", "span", "frames", "probe_fraction", "seed", "fdm_sees")
        (budget,) = read_json(run["dir"] / "args.json")["labelled_episodes"]  # the summary's: of policies
        key = str([run[name] for name in same] + [budget])
        if key not in made:
            made[key] = linear_teacher(run, budget)
        dims, names = [run["scene_dim"], run["motion_dim"]], ["scene", "motion"]
        if run["latents"] == "undivided":
            dims, names = [sum(dims), 0], ["latent"]
        linear, actions = {}, made[key].action_dim
        if names == ["latent"] or (run["action_weight"] and run["motion_dim"] <= actions):
            linear = made[key].measure(run["action_weight"], *dims)
        for name in names:
            row = {"method": run["variant"], "labelled": budget, "seed": run["seed"], "latent": name}
            row |= {"scene_dim": dims[0], "motion_dim": dims[1], "action_weight": run["action_weight"]}
            row["actions_see"] = run.get("actions_see", "both")
            row |= {"nmse": run[f"{name}_action_probe_nmse"], "leak": run[f"{name}_leak_probe_r2"]}
            rows.append(row | {"linear_leak": linear.get(name, {}).get("leak_probe_r2")})
    return rows


def panels_of(rows: list[dict]) -> dict[str, tuple[str, float, list]]:
    """For figures.plot_split: what varies in a panel, at the values of the others that most rows have."""
    usual, split = {}, [row for row in rows if row["latent"] != "latent"]
    for name in ("scene_dim", "motion_dim", "action_weight"):
        usual[name] = Counter(row[name] for row in split or rows).most_common(1)[0][0]
    beside, equal, weight = [], [], []
    for row in rows:
        differs = {name for name in usual if row[name] != usual[name]}
        undivided = row["latent"] == "latent"
        if differs <= {"motion_dim"} and not undivided:
            beside.append((row["motion_dim"], row))
        if differs <= {"action_weight"} and not undivided:
            weight.append((row["action_weight"], row))
        if "action_weight" not in differs and (undivided or row["scene_dim"] == row["motion_dim"]):
            equal.append((row["scene_dim"], row))
    return {
        f"beside {usual['scene_dim']} dimensions of the scene": ("motion dimensions", 2, beside),
        "both of one size; undivided": ("dimensions of a latent", 2, equal),
        f"{usual['motion_dim']} and {usual['scene_dim']} dimensions": ("weight of the actions", 0.1, weight),
    }


def linear_teacher(run: dict, budget: str) -> LinearTeacher:
    split = {"probe_fraction": run["probe_fraction"], "seed": run["seed"]}
    target = (tuple(run["tasks"]), run["target"], run["encoder"])
    data = Dataset(run["data"], *target, frame_gap=run["span"], **split)
    if data.shards_hash != run["shards_hash"]:
        fail(f"{run['data']} is not what {run['dir']} was trained on")
    if "segments" not in data.columns:
        fail(f"{run['data']} has no segments, so there is no leak to compare")
    return LinearTeacher(Windows(data, run["span"], run["frames"], budget, "none"), run["fdm_sees"])


def beyond(first: np.ndarray, told: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """told (N, T) without what first frames (N, F) tell of it, fitted on other episodes (N,) than theirs."""
    rest, fold = np.empty_like(told), np.unique(episode, return_inverse=True)[1] % FOLDS
    if not fold.any():
        fail("one episode to train on is too few: what its first frames tell is to be fitted on another")
    for number in range(FOLDS):
        here = fold == number
        rest[here] = told[here] - Ridge(first[~here], told[~here], PENALTY)(first[here])
    return rest


def target_of(data: Dataset) -> Column:
    columns = {"pixels": "frames", "clean": "clean", "embedding": "embedding"}
    if data.target_kind not in columns:
        fail(f"the linear teacher predicts {', '.join(columns)}, not {data.target_kind}")
    return data.columns[columns[data.target_kind]]
