"""Runs: a folder, its stages, and the loop over their updates. No method is in here.

for step in run.steps("lam", lam, optimizer, schedule, updates):
    ...                              one update, written out by the script
    step.log(loss=loss)
run.finish("lam")
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from platform import python_version

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from common import differences, fail
from common.dataset import random_shift
from common.device import Means
from common.records import (
    Log,
    code_version,
    finished_stages,
    hash_weights,
    load_checkpoint,
    policy_stages,
    save_checkpoint,
)
from common.shards import RANK, WORLD, hash_of, lock_folder, read_json, write_json
from common.statistics import budget_order

LOG_EVERY = 50  # updates between two rows of metrics.jsonl
CHECKPOINT_EVERY = 200  # updates between two checkpoints; a multiple of LOG_EVERY
PROBE_TIMES = 5  # times that a stage measures its probes


class Step:
    """Update number `update`. `rng` draws its batch; `probe_due`: the stage measures its probes now."""

    def __init__(self, update: int, rng: np.random.Generator, probe_due: bool):
        self.update = update
        self.rng = rng
        self.probe_due = probe_due
        self.values = {}

    def log(self, **values: Tensor | float | list | None) -> None:
        """Scalars by name. Log tensors: a row has their mean since the last one, and the last of a number."""
        self.values |= values


@dataclass
class Training:
    """What the checkpoint of a stage holds."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    updates: int
    seconds: float
    before: str = ""  # sha256 of the previous stage's weights
    sha256: str = ""  # of the weights, once finished
    finished: bool = False
    results: dict = field(default_factory=dict)


class Run:
    """A folder runs/<name>/ that this process holds, and the training of its stages.

    stages: the names of the script's stages, in order. What an update draws comes from (seed, stage, update)
    alone (DETAIL 10): a run that was cut off and goes on sees what the uninterrupted one sees.
    Under torchrun every rank draws the whole batch and takes its `share`; rank 0 alone writes.
    """

    def __init__(
        self, folder: Path, stages: tuple[str, ...], seed: int, device: torch.device, dtype: torch.dtype
    ):
        self.folder = folder
        self.stages = stages
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.training: dict[str, Training] = {}
        self.commit = code_version()
        self.machine = {"device": str(device), "ranks": WORLD, "threads": torch.get_num_threads()}
        self.machine |= {"numpy": np.__version__, "python": python_version(), "torch": str(torch.__version__)}
        self.share = slice(RANK, None, WORLD)  # this rank's part of a batch that every rank draws as a whole
        self.lock = self.log = None
        if RANK == 0:
            self.lock = lock_folder(folder)
            self.log = Log(folder)

    def claim(self, args: object, aside: tuple[str, ...], data_hash: str) -> None:
        """Writes args.json; refuses a folder that holds a run of other arguments, and names what differs.

        aside: fields that do not decide what is trained. Defaults are no part of the identity, so that a new
        flag does not lock out older runs.
        """
        identity, defaults = (json.loads(json.dumps(asdict(each))) for each in (args, type(args)()))
        for name in aside:
            del identity[name]
        path = self.folder / "args.json"
        if path.exists():
            changed = differences(defaults | read_json(path), identity)
            if changed:
                fail(f"{self.folder} is a run with other arguments ({changed}); choose another --out")
        chosen = {key: value for key, value in identity.items() if value != defaults[key]}
        self.identity = {"run": hash_of([self.stages, chosen, data_hash]), "data": data_hash}
        if WORLD > 1:
            dist.barrier()  # nobody trains before every rank has agreed
        if RANK == 0:
            write_json(path, asdict(args))

    def autocast(self) -> torch.autocast | nullcontext:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def draw_shift(self, rng: np.random.Generator, batch: int, pad: int) -> Callable[[Tensor], Tensor]:
        """`random_shift` with this rank's shifts of a batch: row i moves alike in every call."""
        shifts = self.tensor(rng.integers(0, 2 * pad + 1, (batch, 2))[self.share])
        return lambda frames: random_shift(frames, shifts[: len(frames)], pad)

    def steps(
        self, stage: str, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler, updates: int
    ) -> Iterator[Step]:
        """The updates of a stage that are still to do. After each one it logs, saves, and stops on NaN.

        Each update logs a tensor `loss`; if it is not finite the run ends, the last good checkpoint stays.
        stage: one of `stages`, or NAME_BUDGET of one of them; `finish` ends it, when the script has done what
        follows the last update.
        """
        number = 1 + self.stages.index(stage.split("_")[0])
        training = Training(module, optimizer, schedule, updates, seconds=0.0)
        for name, earlier in self.training.items():
            if self.stages.index(name.split("_")[0]) + 1 < number:
                training.before = earlier.sha256
        self.training[stage] = training
        start = self.resume(stage, training)
        if training.finished:
            return
        probe_every = max(LOG_EVERY, updates // PROBE_TIMES // LOG_EVERY * LOG_EVERY)
        begun, seconds_before = time.time(), training.seconds
        means = Means()
        bar = tqdm(total=updates, initial=start, desc=stage, unit="update", mininterval=1, disable=RANK > 0)
        for update in range(start, updates):
            done = update + 1
            last = done == updates
            # for what draws from torch: dropout, a codebook's restarts
            torch.manual_seed(1_000_003 * self.seed + 10**7 * number + update + 10**12 * RANK)
            rng = np.random.default_rng([self.seed, number, update])
            step = Step(update, rng, probe_due=last or done % probe_every == 0)
            module.train()
            yield step

            bar.update()
            means.add(step.values)
            if done % LOG_EVERY and not last:
                continue
            row = means.take()
            if not np.isfinite(row["loss"]):
                bar.close()
                kept = "the last good checkpoint, if any, stays; try a lower --lr"
                fail(f"{stage}: the loss is {row['loss']} near update {done}; {kept}")
            bar.set_postfix(loss=f"{row['loss']:.3g}")
            seconds = time.time() - begun
            training.seconds = seconds_before + seconds
            speed = {"lr": schedule.get_last_lr()[0], "updates_per_second": (done - start) / seconds}
            if RANK == 0:
                self.log.write(stage, done, **row, **speed)
            if done % CHECKPOINT_EVERY == 0 and not last:
                self.save(stage, done)
        bar.close()

    def resume(self, stage: str, training: Training) -> int:
        """Loads the stage's checkpoint, if there is one; the number of updates that are done."""
        checkpoint = load_checkpoint(self.folder / f"{stage}.pt", self.identity, self.device)
        update = 0
        if checkpoint is not None:
            if checkpoint.get("after", training.before) != training.before:
                why = "an earlier stage has changed since it was trained"
                fail(f"{self.folder / stage}.pt: {why}; delete it and run again")
            training.module.load_state_dict(checkpoint["module"])
            training.optimizer.load_state_dict(checkpoint["optimizer"])
            training.schedule.load_state_dict(checkpoint["schedule"])
            training.seconds = checkpoint["seconds"]
            training.finished = checkpoint["finished"]
            training.results = checkpoint["results"]
            update = checkpoint["update"]
            state = f"goes on at update {update}"
            if training.finished:
                state = f"finished already, by code {checkpoint.get('commit', 'none')}"
            if RANK == 0:
                print(f"{stage}: {state}")
        if RANK == 0 and not training.finished:
            self.log.rewind(stage, update)
        return update

    def save(self, stage: str, update: int) -> None:
        """Writes <stage>.pt."""
        if RANK > 0:
            return
        training = self.training[stage]
        content = {
            "module": training.module.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
            "update": update,
            "seconds": training.seconds,
            "parameters": sum(weight.numel() for weight in training.module.parameters()),
            "commit": self.commit,
            "trained_on": self.machine,
            "finished": training.finished,
            "after": training.before,
            "results": training.results,
            "identity": self.identity,
        }
        save_checkpoint(self.folder / f"{stage}.pt", content)

    def restored(self, stage: str) -> bool:
        """Before `finish`: whether an earlier command did the stage; its checkpoint has what was measured."""
        return self.training[stage].finished

    def budgets(self, *more: str) -> list[str]:
        """Label budgets that have a decoder here, from earlier commands too, and `more`."""
        there = [path.stem.partition("_")[2] for path in self.folder.glob("decoder_*.pt")]
        return sorted({*there, *more}, key=budget_order)

    def results(self, stage: str) -> dict:
        """What `finish` stored, also in an earlier process; empty of a stage that is not finished."""
        if stage in self.training:
            return self.training[stage].results
        return (load_checkpoint(self.folder / f"{stage}.pt", self.identity, "cpu") or {}).get("results", {})

    def finish(self, stage: str, **results: object) -> None:
        """Freezes the module and writes the stage's last checkpoint with `results`; stored ones are kept."""
        training = self.training[stage]
        training.module.eval().requires_grad_(False)
        training.sha256 = hash_weights(training.module.state_dict())
        if not training.finished:
            training.finished = True
            training.results = results
            self.save(stage, training.updates)
        del training.module, training.optimizer, training.schedule  # a large one is gone with its stage

    def summarise(self, fields: dict, bc_budget: str | None = None) -> None:
        """summary.json and curves.png: the script's fields, finished stages, policies."""
        if RANK > 0:
            return
        from common.figures import plot_curves  # takes a second

        stages = finished_stages(self.folder, self.stages, self.identity)
        hashes, errors = {}, {}
        for budget, names in policy_stages(stages, bc_budget).items():
            weights = "".join(stages[name]["sha256"] for name in names)
            hashes[budget] = hashlib.sha256(weights.encode()).hexdigest()[:16]
            errors[budget] = self.results(names[-1]).get("policy_nmse")
        summary = fields | {
            "seed": self.seed,
            "stages": list(dict.fromkeys(stage.split("_")[0] for stage in stages)),
            "labelled_episodes": list(hashes),
            "policy_hash": hashes,
            "policy_nmse": errors,
            "per_stage": stages,
            "identity": self.identity["run"],
            "data_hash": self.identity["data"],
            "dtype": str(self.dtype),
        }
        write_json(self.folder / "summary.json", summary)
        plot_curves(self.log.rows(), self.folder / "curves.png")
        times = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in stages.items())
        probes = {key: round(value, 3) for key, value in fields.items() if isinstance(value, float)}
        print(f"{self.folder}: {times}; {probes or 'no probes'}")

    def close(self) -> None:
        """Lets go of the folder and of the other ranks."""
        if RANK == 0:
            self.log.writer.close()
            os.close(self.lock)
        if WORLD > 1 and dist.is_initialized():
            dist.destroy_process_group()


def one_cycle(module: nn.Module, lr: float, weight_decay: float, updates: int) -> tuple[AdamW, OneCycleLR]:
    """AdamW under a one-cycle schedule with peak `lr`."""
    optimizer = AdamW(module.parameters(), lr, weight_decay=weight_decay, fused=True)
    return optimizer, OneCycleLR(optimizer, lr, updates + 1)
