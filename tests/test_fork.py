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
    """forked(diff) -> a copy of the code with the diff applied, if any, and a data set in data/quick."""

    def apply(diff: str | None) -> Path:
        (tmp_path / "common").mkdir()
        for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
        shutil.copytree(tiny_data, tmp_path / "data/quick")
        if diff:
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


def test_a_copy_of_a_script_has_runs_of_its_own_and_eval_takes_its_policy(forked):
    folder = forked(None)
    copy = (folder / "lam_vlm.py").read_text().replace("256", "32")  # a decoder of another width
    (folder / "my_lam.py").write_text(copy)
    tiny = "--lam-updates 2 --bc-updates 2 --decoder-updates 2 --batch-size 8 --labelled-episodes 1".split()
    for script in ("lam_vlm.py", "my_lam.py"):
        run(folder, script, *tiny, "--device", "cpu")
    names = {path.parent.name for path in folder.glob("runs/*/summary.json")}
    assert names == {"lapo-oracle_drawer-open_s0", "my_lam-lapo-oracle_drawer-open_s0"}
    run(folder, "eval.py", "--episodes", "1", "--envs", "1", "--media", "0", "--workers", "1")
    scores = (folder / "results/quick/scores.csv").read_text()
    assert "\nlapo-oracle,drawer-open,0," in scores and "\nmy_lam-lapo-oracle,drawer-open,0," in scores

    (folder / "my_lam.py").unlink()
    result = run_script(folder / "eval.py", "--episodes", "2", "--media", "0", cwd=folder)
    refusal = result.stderr.strip().splitlines()[-1]
    why = "was trained by my_lam.py, which is not beside eval.py"
    assert refusal == f"eval.py: runs/my_lam-lapo-oracle_drawer-open_s0 {why}"
    run(folder, "eval.py", "--episodes", "1", "--media", "0")  # a table needs no script
