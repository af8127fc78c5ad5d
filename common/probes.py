"""Linear probes: what a latent action tells of the true action, of the state, and of the background.

All are fitted on training transitions and measured on held-out episodes. z: float64 (N, latent_dim).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

GRID = 8  # squares per side in which the background's colour is averaged
VARIES = 1e-3  # an action dimension of less variance is left out


class Ridge:
    """Closed-form ridge regression y ~ x on standardised x, with an intercept. x (N, P), y (N, Q) float64."""

    def __init__(self, x: np.ndarray, y: np.ndarray, penalty: float = 1e-3):
        self.mean = x.mean(0)
        self.std = x.std(0) + 1e-8
        self.intercept = y.mean(0)
        z = (x - self.mean) / self.std
        gram = z.T @ z + penalty * len(z) * np.eye(z.shape[1])
        self.weights = np.linalg.solve(gram, z.T @ (y - self.intercept))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.std @ self.weights + self.intercept


def r2_score(y: np.ndarray, prediction: np.ndarray) -> float:
    """1 - residual over total variance, both summed over the dimensions of y; nan where y does not vary."""
    total = ((y - y.mean(0)) ** 2).sum()
    if total <= 1e-12:
        return float("nan")
    return float(1 - ((y - prediction) ** 2).sum() / total)


def nmse(error: np.ndarray, truth: np.ndarray, varies: np.ndarray) -> float | None:
    """Squared error (N, A) over the variance, mean over the dimensions that vary (A,); None if none does."""
    if not varies.any():
        return None
    return float(((error[:, varies] ** 2).mean(0) / truth[:, varies].var(0)).mean())


def action_probe(z_train: np.ndarray, a_train: np.ndarray, z_test: np.ndarray, a_test: np.ndarray) -> dict:
    """z -> a_t: MSE, NMSE (MSE / variance, mean over dimensions that vary; 1: z says nothing), R^2 of each.

    a: (N, A). NMSE is None where no dimension varies, R^2 where its dimension does not.
    """
    error = Ridge(z_train, a_train)(z_test) - a_test
    mse, variance = (error**2).mean(0), a_test.var(0)
    varies = (variance > VARIES) & (a_train.var(0) > VARIES)
    r2 = [None] * len(mse)
    for dimension in np.flatnonzero(varies):
        r2[dimension] = float(1 - mse[dimension] / variance[dimension])
    measured = {"action_probe_mse": float(mse.mean()), "action_probe_nmse": nmse(error, a_test, varies)}
    return measured | {"action_probe_r2": r2}


def labelled_probe(z: np.ndarray, a: np.ndarray, episode: np.ndarray) -> float | None:
    """NMSE of the action probe where few episodes have actions: each left out once, of (N,). None for one."""
    error, episodes = np.zeros_like(a), np.unique(episode)
    if len(episodes) < 2:
        return None
    for number in episodes:
        out = episode == number
        error[out] = Ridge(z[~out], a[~out])(z[out]) - a[out]
    return nmse(error, a, a.var(0) > VARIES)


class Probes:
    """The probes of a data set: pairs of arrays, training and held-out transitions; what it lacks is None.

    actions (N, A); states: change of the true state (N, S); background: see `LeakProbe`.
    """

    def __init__(
        self, actions: list | None = None, states: list | None = None, background: list | None = None
    ):
        self.actions = actions
        self.states = states
        self.leak = None
        if background is not None:
            self.leak = LeakProbe(*background[0], *background[1])

    def measure(self, z_train: np.ndarray, z_test: np.ndarray) -> dict[str, float | list | None]:
        result = dict.fromkeys(("action_probe_mse", "action_probe_nmse", "action_probe_r2"))
        if self.actions is not None:
            result = action_probe(z_train, self.actions[0], z_test, self.actions[1])
        result |= {"state_probe_r2": None, "leak_probe_r2": None}
        if self.states is not None:
            result["state_probe_r2"] = r2_score(self.states[1], Ridge(z_train, self.states[0])(z_test))
        if self.leak is not None:
            result["leak_probe_r2"] = self.leak(z_train, z_test)
        return result


def mean_over_tasks(measured: list[dict]) -> dict[str, float | list | None]:
    """What was measured on each task, its mean: None where a task has none; lists entry by entry."""

    def mean(values: tuple) -> float | list | None:
        if isinstance(values[0], list):
            return [mean(entries) for entries in zip(*values)]
        return None if None in values else float(np.mean(values))

    return {name: mean(tuple(found[name] for found in measured)) for name in measured[0]}


class LeakProbe:
    """Share of the background's next change that z explains beyond what o_t explains (partial R^2).

    now: the frames, change: the change of the background alone, of training and held-out transitions, both as
    mean colours of GRID x GRID squares (N, 3 * GRID^2); see `background_change`.
    """

    def __init__(
        self, now_train: np.ndarray, change_train: np.ndarray, now_test: np.ndarray, change_test: np.ndarray
    ):
        self.now_train, self.now_test = now_train, now_test
        explained = Ridge(now_train, change_train, 1e-2)
        self.change_train = change_train - explained(now_train)
        self.change_test = change_test - explained(now_test)

    def __call__(self, z_train: np.ndarray, z_test: np.ndarray) -> float:
        explained = Ridge(self.now_train, z_train, 1e-2)
        rest_train = z_train - explained(self.now_train)
        rest_test = z_test - explained(self.now_test)
        return r2_score(self.change_test, Ridge(rest_train, self.change_train)(rest_test))


def background_change(now: Tensor, after: Tensor, background: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the leak probe sees of frames (B, 3, H, W): two float64 (B, 3 * GRID^2).

    background: (B, 1, H, W), 1 where both frames show it. A square that shows little of it counts as 0.
    """
    area = F.adaptive_avg_pool2d(background, GRID)
    change = F.adaptive_avg_pool2d((after - now) * background, GRID) / area.clamp_min(1e-6) * (area > 0.25)
    now = F.adaptive_avg_pool2d(now, GRID)
    return now.flatten(1).double().cpu().numpy(), change.flatten(1).double().cpu().numpy()
