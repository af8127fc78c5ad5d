"""linear_lam.py --teachers: linear latents against T7, and the table and figure beside runs of latbot.py."""

import csv
import json

import numpy as np
import pytest
from conftest import refusal, run_script
from made_up import make_data
from test_latbot import SMALL

from common import figures
from common.linear_teacher import linear_latents, panels_of
from common.probes import Ridge, r2_score
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
            assert (row[f"linear_{short}"] == "") == (method == "split"), "T7 says nothing without a weight"
        assert row["labelled"] == "2"
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
        return {"labelled": labelled, "latent": latent, "leak": leak, "linear_leak": linear} | dims

    rows = [row("motion", 64, dim, 1.0, dim / 100) for dim in (2, 8, 32)]
    rows += [row("motion", 64, 8, 0.0, 0.5), row("motion", 64, 8, 10.0, 0.6)]
    rows += [row("motion", 2, 2, 1.0, 0.7), row("latent", 8, 0, 1.0, 0.8)]
    figures.plot_split(panels_of(rows), tmp_path / "split.png")
    panels = []
    for axis in drawn[0].axes:
        panels.append({line.get_label(): list(zip(*line.get_data())) for line in axis.lines})
    beside, equal, weight = panels
    assert beside["motion, trained"] == [(2, 0.02), (8, 0.08), (32, 0.32)]
    assert beside["motion, linear (T7)"] == [(2, 0.01), (8, 0.04), (32, 0.16)]
    assert equal["motion, trained"] == [(2, 0.7)] and equal["undivided, trained"] == [(8, 0.8)]
    assert sorted(weight["motion, trained"]) == [(0, 0.5), (1, 0.08), (10, 0.6)]
    assert weight["motion, linear (T7)"] == [(1, 0.04), (10, 0.3)]
