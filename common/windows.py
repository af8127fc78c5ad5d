"""Windows of frames, words and actions: what latbot.py sees of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import fail
from common.dataset import Dataset
from common.tasks import language_motion


@dataclass
class Domain:
    """What the models have to know of the data; stored in summary.json."""

    size: int
    action_dim: int
    instructions: list[str]  # of the tasks
    subtasks: list[str]  # in words


class Windows:
    """Windows t..t+span of a data set: their frames, instructions, sub-tasks and chunks of actions.

    The last action dimension is the gripper's, which has two levels in a task; the others are normalised by
    their quantiles. Both are of the labelled episodes.
    """

    def __init__(self, data: Dataset, span: int, frames: int, budget: str, text: str):
        self.data = data
        self.span = span
        self.offsets = np.linspace(0, span, frames).round().astype(int)
        self.labelled = data.labelled(budget)  # rows with an action
        self.chunk_rows = data.labelled_transitions(budget)  # those with a whole chunk of them
        self.text_rows = data.train if text == "all" else self.chunk_rows  # those whose sub-task is learnt
        subtasks = [] if text == "none" else self.name_subtasks()
        instructions = [data.meta["instructions"][task] for task in data.tasks]
        self.domain = Domain(data.size, data.action_dim, instructions, subtasks)
        actions = data.columns["actions"][self.labelled]
        low, high = np.quantile(actions, [0.01, 0.99], axis=0)
        self.low, self.scale = low, np.where(high > low, (high - low) / 2, 1)
        self.middle = np.zeros(len(data.tasks))
        self.levels = np.zeros((len(data.tasks), 2))
        for task in range(len(data.tasks)):
            gripper = actions[data.task[self.labelled] == task, -1]
            self.middle[task] = (gripper.min() + gripper.max()) / 2
            upper = gripper > self.middle[task]
            self.levels[task] = gripper[~upper].mean()
            if upper.any():
                self.levels[task, 1] = gripper[upper].mean()

    def name_subtasks(self) -> list[str]:
        """What the robot does in each window, in words, by one rule for all tasks; the distinct ones."""
        if "states" not in self.data.columns:
            fail(f"{self.data.root} has no states to name sub-tasks by; add --text none")
        rows = np.concatenate([self.data.train, self.data.held_out])
        now, later = (self.data.columns["states"][rows + ahead] for ahead in (0, self.span))
        names = np.full(len(self.data.task), "", dtype=object)
        names[rows] = [language_motion(*pair) for pair in zip(now, later)]
        subtasks = sorted(set(names[self.text_rows]))
        number = {name: index for index, name in enumerate(subtasks)}
        self.subtask = np.array([number.get(name, -1) for name in names])
        return subtasks

    def named(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows whose sub-task is one that the student learns."""
        if not self.domain.subtasks:
            return rows[:0]
        return rows[self.subtask[rows] >= 0]

    def frames(self, rows: np.ndarray) -> Tensor:
        """(B, F, 3, H, W) uint8"""
        frames = self.data.frame((rows[:, None] + self.offsets).reshape(-1))
        return frames.reshape(len(rows), len(self.offsets), *frames.shape[1:])

    def task(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.data.task[rows]).to(self.data.device)

    def subtask_of(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.subtask[rows]).to(self.data.device)

    def chunk(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The arm's actions (B, span, A - 1) in quantiles, and the gripper's (B, span): 1 on its upper level.

        Past the end of an episode its last action is repeated.
        """
        last = self.data.last[rows] - 1
        steps = np.minimum(rows[:, None] + np.arange(self.span), last[:, None])
        actions = self.data.columns["actions"][steps.reshape(-1)].reshape(*steps.shape, -1)
        arm = ((actions - self.low) / self.scale - 1)[..., :-1].astype(np.float32)
        gripper = (actions[..., -1] > self.middle[self.data.task[rows], None]).astype(np.float32)
        return torch.from_numpy(arm).to(self.data.device), torch.from_numpy(gripper).to(self.data.device)
