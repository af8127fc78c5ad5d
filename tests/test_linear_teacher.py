"""linear_lam.py --teachers: linear latents against T7, and the table and figure beside runs of latbot.py."""

import csv
import json

import numpy as np
import pytest
from conftest import refusal, run_script
from made_up import make_data
from test_latbot import SMALL

from common import figures
from common.dataset import Dataset
from common.linear_teacher import LinearTeacher, beyond, linear_latents, panels_of
from common.probes import Ridge, r2_score
from common.shards import SEGMENTS
from common.windows import Windows
from linear_lam import Args, split_leak

TEACHER = [*SMALL.split(), "--data", "data/made", "--stages", "teacher"]


@pytest.fixture(scope="module")
def population():
    """(change (N, 8), actions (N, 4), background (N, 4)): four actions of std 1, background of std 2."""
    rng = np.random.default_rng(0)
    actions, background = rng.normal(size=(40_000, 4)), 2 * rng.normal(size=(40_000, 4))
    change = np.hstack([actions, background]) @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    return change, actions, background


@pytest.mark.parametrize("supervision", [1, 10])
@pytest.mark.parametrize("scene", range(7))
def test_the_motion_latent_leaks_as_t7_says(population, supervision, scene):
    """It is clean at any weight as soon as both latents have room for the background."""
    change, actions, background = population
    weight = supervision * actions.shape[1] / change.shape[1]  # of means, not of sums of squares
    weights = linear_latents(change, actions, weight, scene, 4)[:, scene:]
    z = np.hstack([change, actions]) @ weights
    leak = 1 - r2_score(z, Ridge(actions, z)(actions))  # what is not action is background
    expected = split_leak(Args(exo_std=2, supervision=supervision, latent_dim=4 + scene), 4)
    assert leak == pytest.approx(expected, abs=0.02)
    assert np.cov(z.T) == pytest.approx(np.eye(4), abs=0.02)


def test_an_undivided_latent_leaks_what_it_has_to_spare(population):
    change, actions, background = population
    z = np.hstack([change, actions]) @ linear_latents(change, actions, 5.0, 6, 0)
    assert r2_score(z, Ridge(background, z)(background)) == pytest.approx(1 / 3, abs=0.02)
    assert r2_score(actions, Ridge(z, actions)(z)) > 0.99


def test_a_motion_latent_of_fewer_dimensions_than_actions_takes_the_leading_ones(population):
    change, actions, background = population
    actions = actions * [3, 2, 1, 1]
    z = np.hstack([change, actions]) @ linear_latents(change, actions, 1.0, 6, 2)[:, 6:]
    assert r2_score(actions[:, :2], Ridge(z, actions[:, :2])(z)) > 0.99
    assert r2_score(background, Ridge(z, background)(z)) < 0.01


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Frames whose left half is the robot, moved by the actions, and whose right half a random background."""
    root = make_data(tmp_path_factory.mktemp("moving"), length=30, episodes=20)
    rng = np.random.default_rng(0)
    of_action, of_background = rng.normal(size=(3, 16 * 8 * 3)), rng.normal(size=(6, 16 * 8 * 3))
    for folder in sorted(root.glob("*/shard_*")):
        episode = np.load(folder / "episode.npy")
        frames = np.zeros((len(episode), 16, 16, 3))
        actions = np.zeros((len(episode), 4), np.float32)
        actions[:, :3] = rng.uniform(-1, 1, (len(episode), 3))
        for number in np.unique(episode):
            here = episode == number
            before = np.roll(actions[here, :3], 1, axis=0)
            before[0] = 0
            frames[here, :, :8] = (before.cumsum(0) @ of_action).reshape(-1, 16, 8, 3)
            frames[here, :, 8:] = (2 * rng.normal(size=(here.sum(), 6)) @ of_background).reshape(-1, 16, 8, 3)
        np.save(folder / "frames.npy", (128 + 4 * frames).clip(0, 255).astype(np.uint8))
        np.save(folder / "actions.npy", actions)
        segments = np.full((len(episode), 16, 16), SEGMENTS.index("robot"), np.uint8)
        segments[:, :, 8:] = SEGMENTS.index("background")
        np.save(folder / "segments.npy", segments)
    return root


@pytest.mark.parametrize("fdm_sees", ["frame", "z"])
@pytest.mark.parametrize("budget", ["all", "8"])
def test_a_linear_teacher_of_frames(moving, fdm_sees, budget):
    """Its motion latent is the robot, what room the scene latent has goes to the background."""
    data = Dataset(str(moving), frame_gap=2)
    teacher = LinearTeacher(Windows(data, span=2, frames=3, budget=budget, text="none"), fdm_sees)
    assert (teacher.change_dim, teacher.action_dim) == (16 * 16 * 3, 2 * 3)
    found = teacher.measure(1.0, scene_dim=6, motion_dim=6)
    assert found["scene"]["leak_probe_r2"] > 0.7 and abs(found["motion"]["leak_probe_r2"]) < 0.05
    assert found["motion"]["action_probe_nmse"] < 0.1 and found["scene"]["action_probe_nmse"] > 0.9
    (undivided,) = teacher.measure(1.0, 6, 0).values()
    assert undivided["leak_probe_r2"] > 0.2
    with pytest.raises(SystemExit, match="more than change and actions have"):
        teacher.measure(1.0, 768, 8)


def test_what_the_first_frame_tells_is_taken_out_by_other_episodes():
    """Fitted on the same rows, frames of many dimensions would tell noise."""
    rng = np.random.default_rng(0)
    first, noise, episode = (
        rng.normal(size=(400, 200)),
        rng.normal(size=(400, 3)),
        np.repeat(np.arange(20), 20),
    )
    assert (
        beyond(first, noise, episode).var() > 0.95 and (noise - Ridge(first, noise, 0.1)(first)).var() < 0.6
    )
    few = first[:, :10]
    assert beyond(few, few[:, :3], episode).var() < 0.05
    with pytest.raises(SystemExit, match="one episode"):
        beyond(few, few, np.zeros(400))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/made and three teachers of latbot.py."""
    folder = tmp_path_factory.mktemp("teachers")
    make_data(folder / "data/made")
    kinds = {"split": [], "no weight": ["--action-weight", 0], "undivided": ["--latents", "undivided"]}
    for name, flags in kinds.items():
        result = run_script("latbot.py", *TEACHER, *flags, "--out", f"runs/{name}", cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_trained_teachers_beside_linear_ones(trained):
    result = run_script("linear_lam.py", "--teachers", "split", "no weight", "undivided", cwd=trained)
    assert result.returncode == 0, result.stderr
    with open(trained / "results/linear_lam/split.csv", newline="") as file:
        rows = {(row["method"], row["latent"]): row for row in csv.DictReader(file)}
    scene, motion = ("scene", "motion")
    assert set(rows) == {("latbot", scene), ("latbot", motion), ("split", scene), ("split", motion)} | {
        ("actions", "latent")
    }
    for (method, latent), row in rows.items():
        folder = {"latbot": "split", "split": "no weight", "actions": "undivided"}[method]
        summary = json.loads((trained / "runs" / folder / "summary.json").read_text())
        for short, probe in (("leak", "leak_probe_r2"), ("nmse", "action_probe_nmse")):
            assert float(row[short]) == pytest.approx(summary[f"{latent}_{probe}"], abs=6e-4)
        assert (row["linear_leak"] == "") == (method == "split"), "T7 says nothing without a weight"
        assert (row["labelled"], row["actions_see"]) == ("2", "both")
    assert (rows["actions", "latent"]["scene_dim"], rows["actions", "latent"]["motion_dim"]) == ("8", "0")
    linear = {row["linear_leak"] for row in rows.values() if row["linear_leak"]}
    assert len(linear) == 3, "each latent has its own"
    assert (trained / "results/linear_lam/split.png").stat().st_size > 10_000


def test_what_is_no_teacher_is_refused(trained, tmp_path):
    flags = [
        "--data",
        "data/made",
        "--stages",
        "lam",
        "--target",
        "pixels",
        "--lam-updates",
        2,
        "--out",
        "runs/lam",
    ]
    small = ["--widths", 4, 8, "--stem", 2, "--batch-size", 8, "--latent-dim", 3]
    assert run_script("lam_vlm.py", *flags, *small, cwd=trained).returncode == 0
    line = refusal(run_script("linear_lam.py", "--teachers", "runs/lam", cwd=trained))
    assert "runs/lam is no run of latbot.py with a teacher" in line
    assert "no finished run" in refusal(run_script("linear_lam.py", "--teachers", "none", cwd=trained))


def test_other_data_than_those_of_training_are_refused(trained):
    path = trained / "runs/split/summary.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"shards_hash": "another"}))
    line = refusal(run_script("linear_lam.py", "--teachers", "split", cwd=trained))
    path.write_text(before)
    assert "data/made is not what runs/split was trained on" in line


def test_a_panel_holds_what_varies_there(tmp_path, monkeypatch):
    """Dots of trained latents and lines of linear ones, where the other dimensions are the usual ones."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))

    def row(latent: str, scene: int, motion: int, weight: float, leak: float, labelled: str = "all") -> dict:
        dims = {"scene_dim": scene, "motion_dim": motion, "action_weight": weight}
        linear = leak / 2 if weight else None
        names = {"labelled": labelled, "latent": latent, "actions_see": "both"}
        return names | {"leak": leak, "linear_leak": linear} | dims

    rows = [row("motion", 64, dim, 1.0, dim / 100) for dim in (2, 8, 32)]
    rows += [row("motion", 64, 8, 0.0, 0.5), row("motion", 64, 8, 10.0, 0.6)]
    rows += [row("motion", 2, 2, 1.0, 0.7), row("latent", 8, 0, 1.0, 0.8)]
    rows += [row("motion", 64, 8, 1.0, 0.9) | {"actions_see": "motion"}]
    rows[-1]["linear_leak"] = 0.04
    figures.plot_split(panels_of(rows), tmp_path / "split.png")
    panels = []
    for axis in drawn[0].axes:
        panels.append({line.get_label(): list(zip(*line.get_data())) for line in axis.lines})
    beside, equal, weight = panels
    assert beside["motion, trained"] == [(2, 0.02), (8, 0.08), (32, 0.32)]
    assert beside["motion, actions from motion alone"] == [(8, 0.9)]
    assert beside["motion, linear (T7)"] == [(2, 0.01), (8, 0.04), (32, 0.16)]
    assert equal["motion, trained"] == [(2, 0.7)] and equal["undivided, trained"] == [(8, 0.8)]
    assert sorted(weight["motion, trained"]) == [(0, 0.5), (1, 0.08), (10, 0.6)]
    assert weight["motion, linear (T7)"] == [(1, 0.04), (10, 0.3)]

    only = [row("motion", 64, 8, 0.0, 0.5)]  # nothing that theory says
    figures.plot_split(panels_of(only), tmp_path / "split.png")
    assert all("linear" not in line.get_label() for axis in drawn[1].axes for line in axis.lines)
