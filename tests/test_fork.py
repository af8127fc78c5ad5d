"""The forks of docs/fork.md: each is applied to a copy of the repository, trains, and is small."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run_script

FORKS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
TRAIN = "--stages lam --lam-updates 30 --batch-size 8 --labelled-episodes 1 --device cpu --out run".split()


def changed_lines(diff: str) -> int:
    lines = [line for line in diff.splitlines() if not line.startswith(("+++", "---"))]
    return sum(line.startswith(("+", "-")) for line in lines)


@pytest.fixture
def forked(tmp_path, tiny_data):
    """forked(diff) -> a copy of the code with the diff applied and a data set in data/quick."""

    def apply(diff: str) -> Path:
        (tmp_path / "common").mkdir()
        for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
        shutil.copytree(tiny_data, tmp_path / "data/quick")
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
        return tmp_path

    return apply


def run(folder: Path, script: str, *arguments: str) -> None:
    result = run_script(folder / script, *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr


def metrics(folder: Path) -> dict:
    return json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])


def test_there_are_three_of_at_most_fifteen_changed_lines():
    assert len(FORKS) == 3 and all(0 < changed_lines(diff) <= 15 for diff in FORKS)


def test_a_new_target(forked):
    folder = forked(FORKS[0])
    run(folder, "lam_vlm.py", "--target", "states", *TRAIN)
    weights = json.loads((folder / "run/summary.json").read_text())
    assert weights["variant"] == "lapo-states" and metrics(folder)["loss"] > 0


def test_a_vq_bottleneck_logs_its_two_losses(forked):
    folder = forked(FORKS[1])
    run(folder, "lam_vlm.py", *TRAIN)
    row = metrics(folder)
    assert (
        row["codebook_loss"] == pytest.approx(row["commitment_loss"], rel=0.02) and row["codebook_loss"] > 0
    )
    total = row["fdm_loss"] + row["codebook_loss"] + 0.25 * row["commitment_loss"]
    assert row["loss"] == pytest.approx(total, rel=1e-3)


def test_a_new_encoder(forked):
    folder = forked(FORKS[2])
    arguments = json.loads((folder / "data/quick/meta.json").read_text())
    assert arguments["tasks"] == ["drawer-open"]
    run(folder, "collect.py", *TINY, "--encoder", "edges", "--out", "data/quick")
    run(folder, "lam_vlm.py", "--encoder", "edges", *TRAIN)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["embedding"]["encoder"] == "edges" and summary["variant"] == "lapo-edges"
