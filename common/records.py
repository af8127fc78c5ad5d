"""What a run writes: checkpoints and metrics."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import fail
from common.shards import atomic_write


def code_version() -> str:
    """The commit of this code, `-dirty` where a .py file differs from it; `none` outside a git checkout."""
    git = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    commit = git(["git", "describe", "--always"]).stdout.strip()
    if commit and git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode:
        commit += "-dirty"
    return commit or "none"


def save_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: dict, device: torch.device | str) -> dict | None:
    """A checkpoint of this run; None where there is none. A damaged or foreign one is named and refused."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        stored = checkpoint["identity"]
    except Exception as error:  # torch raises half a dozen types on damaged files
        fail(f"checkpoint {path} does not read ({type(error).__name__}); delete it and run again")
    for key, value in identity.items():
        if stored.get(key) != value:
            there = f"{key}: {stored.get(key)} there, {value} here"
            fail(f"checkpoint {path} belongs to another run ({there}); choose another --out")
    return checkpoint


def load_weights(folder: Path, stage: str, summary: dict) -> dict[str, Tensor]:
    """The weights of a stage of a finished run, those that its summary tells of."""
    path = folder / f"{stage}.pt"
    checkpoint = load_checkpoint(path, {"run": summary["identity"]}, "cpu")
    if checkpoint is None:
        fail(f"{path} is missing: the run was not trained here; run the command that makes it again")
    weights = checkpoint["module"]
    if not checkpoint["finished"] or hash_weights(weights) != summary["per_stage"][stage]["sha256"]:
        fail(f"{path} is not what {folder}/summary.json tells of: run the command that makes the run again")
    return weights


class Log:
    """metrics.jsonl, one object a line, and the same numbers as TensorBoard events. Rank 0 alone writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.open_events()

    def open_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def rows(self) -> list[dict]:
        """All rows; a line that a kill cut is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rewind(self, stage: str, update: int) -> None:
        """Drops the rows after the checkpoint from which a stage goes on."""
        kept = [row for row in self.rows() if row["stage"] != stage or row["update"] <= update]
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.writer.close()
        for events in (self.folder / "tensorboard").glob("events*"):
            events.unlink()
        self.open_events()
        for row in kept:
            self.show(**row)

    def write(self, stage: str, update: int, **values: float | list | None) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": stage, "update": update} | values) + "\n")
        self.show(stage, update, **values)

    def show(self, stage: str, update: int, **values: float | list | None) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{stage}/{name}", value, update)


def hash_weights(weights: dict[str, Tensor]) -> str:
    """sha256 over names and values, which a policy's hash is made of."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def stage_order(path: Path, names: tuple[str, ...]) -> tuple:
    """Sorts checkpoints: lam, bc, decoder_2, decoder_16, decoder_all."""
    name, _, budget = path.stem.partition("_")
    if budget.isdecimal():
        return names.index(name), int(budget)
    return names.index(name), float("inf")


def finished_stages(folder: Path, names: tuple[str, ...], identity: dict) -> dict[str, dict]:
    """{stage: seconds, updates_per_second, parameters, commit, trained_on, sha256} of finished ones."""
    stages = {}
    for path in sorted(folder.glob("*.pt"), key=lambda path: stage_order(path, names)):
        checkpoint = load_checkpoint(path, identity, "cpu")
        if checkpoint["finished"]:
            weights, seconds = checkpoint["module"], checkpoint["seconds"]
            stages[path.stem] = {
                "seconds": round(seconds, 1),
                "updates_per_second": round(checkpoint["update"] / max(seconds, 1e-9), 2),
                "parameters": checkpoint["parameters"],
                "commit": checkpoint.get("commit", "none"),
                "trained_on": checkpoint.get("trained_on"),
                "sha256": hash_weights(weights),
            }
    return stages


def policy_stages(stages: dict[str, dict], bc_budget: str | None) -> dict[str, list[str]]:
    """{label budget: stages of its policy}: bc and the budget's decoder, or its expert alone.

    Where true actions were cloned, of the label budget `bc_budget`, it is the stage bc alone.
    """
    policies = {}
    if bc_budget is not None:
        policies[bc_budget] = ["bc"]
    for stage in stages:
        kind, _, budget = stage.partition("_")
        if kind == "decoder":
            policies[budget] = ["bc", stage]
        if kind == "expert":
            policies[budget] = [stage]
    return policies


def own_variant(file: str, original: str, variant: str) -> str:
    """The variant; in a copy of a script behind the copy's name, for its runs are none of the original's."""
    script = Path(file).stem
    return variant if script == original else f"{script}-{variant}"


def default_folder(variant: str, tasks: tuple[str, ...], seed: int, data: str) -> str:
    """runs/<variant>_<tasks>_s<seed>, and the data set's name if that is not quick."""
    folder = f"runs/{variant}_{'+'.join(tasks)}_s{seed}"
    name = Path(os.path.abspath(data)).name
    if name != "quick":
        folder += f"_{name}"
    return folder
