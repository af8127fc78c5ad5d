"""common/figures.py: what is drawn where, from made-up rows."""

from pathlib import Path

import numpy as np
import pytest

from common import figures
from common.statistics import aggregate

BEST = {"family": "oracle", "prompt": "best", "layer": 0, "pool": "all"}


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """{file name: matplotlib figure}, in place of files."""
    caught = {}

    def catch(figure, path: Path) -> Path:
        caught[path.name] = figure
        return path

    monkeypatch.setattr(figures, "save_figure", catch)
    return caught


def make_scores(method: str, budgets: tuple[str, ...], success: float, seeds: int = 2) -> list[dict]:
    rows = []
    for labelled in budgets:
        for seed in range(seeds):
            score = success + 0.1 * seed
            rows.append({"method": method, "labelled": labelled, "task": "a", "seed": seed, "success": score})
    return rows


def make_run(variant: str, seed: int = 0, embedding: dict | None = None, **fields: object) -> dict:
    run = {"variant": variant, "default_variant": variant, "seed": seed, "tasks": ["a"], "policy": True}
    run |= {"fdm_sees": "z", "supervision": 0.0, "labelled_episodes": ["2", "8"]}
    return run | {"embedding": embedding} | fields


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 10, 30])
def test_a_row_for_each_method(drawn, count):
    rows = []
    for index in range(count):
        rows += make_scores(f"method{index}", ("2", "16"), 0.02 * index)
    rows += make_scores("bc-all", ("all",), 0.9)
    figures.plot_success(aggregate(rows, "success", []), Path("success.png"))
    axes = drawn["success.png"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"method{index}" for index in range(count)] + ["bc-all"], "the highest on top"
    assert labels(axes) == ["2", "16", "all"]
    means = [points for points in axes.collections if points.get_label() in ("2", "16", "all")]
    two, sixteen, everything = (np.asarray(points.get_offsets()) for points in means)
    assert np.allclose(two[:, 0], [0.02 * index + 0.05 for index in range(count)][::-1])
    assert [round(y) for y in two[:, 1]] == list(range(count))[::-1] and (two[:, 1] > sixteen[:, 1]).all()
    assert everything.tolist() == [[pytest.approx(0.95), count]], "one budget alone stands in the middle"


def test_no_ci_is_said(drawn):
    rows = make_scores("lapo", ("2",), 0.5, seeds=1)
    figures.plot_success(aggregate(rows, "success", []), Path("success.png"))
    assert "no CI" in drawn["success.png"].axes[0].get_xlabel()
    assert figures.plot_success([], Path("none.png")) is None and "none.png" not in drawn


def test_errors_above_1_are_in_the_picture(drawn):
    rows = [row | {"nmse": 2.0} for row in make_scores("lapo", ("2",), 0.5)]
    figures.plot_success(aggregate(rows, "nmse", []), Path("errors.png"), "NMSE")
    axes = drawn["errors.png"].axes[0]
    assert axes.get_xlim()[1] > 2 and axes.get_xlabel().startswith("NMSE")


def tolerance_runs() -> tuple[list[dict], list[dict]]:
    """Three fractions; names that say nothing, for the fraction is a field."""
    rows, runs = [], []
    for name, kept, nmse in (("first", 0.5, 0.9), ("second", 0.0, 0.4), ("third", 0.05, 0.5)):
        rows += make_scores(name, ("2",) if kept else ("2", "16"), 1 - nmse)
        embedding = BEST | {"encoder": name, "background_kept": kept}
        runs.append(make_run(name, embedding=embedding, action_probe_nmse=nmse, leak_probe_r2=nmse / 2))
    return rows, runs


def test_tolerance_curve(drawn):
    """Success, NMSE and leak over the fraction kept; variants that vary something else do not count."""
    rows, runs = tolerance_runs()
    oracle = BEST | {"encoder": "oracle", "background_kept": 0.0}
    others = [
        make_run("z4", embedding=oracle, default_variant="second"),
        make_run("blind", embedding=oracle | {"prompt": "blind"}),
        make_run("noisy", embedding=oracle | {"noise_std": 0.1}),
        make_run("frame", embedding=oracle, fdm_sees="frame"),
        make_run("laom", embedding=oracle, supervision=1.0),
        make_run("vlm", embedding=oracle | {"family": "vlm"}),
    ]
    for run in others:
        rows += make_scores(run["variant"], ("2",), 0.0)
    runs += [run | {"action_probe_nmse": 1.0, "leak_probe_r2": 1.0} for run in others]
    assert figures.target_levels(runs, "background_kept") == {"first": 0.5, "second": 0.0, "third": 0.05}
    figures.plot_tolerance(aggregate(rows, "success", []), runs, {}, Path("tolerance.png"))
    left, right = drawn["tolerance.png"].axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["0", "0.05", "0.5"]
    assert labels(left) == ["2 labelled"], "what one method alone has makes no curve"
    assert np.allclose(left.lines[0].get_ydata(), [0.65, 0.55, 0.15])
    curves = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert curves == {"action probe NMSE": [0.4, 0.5, 0.9], "leak $R^2$": [0.2, 0.25, 0.45]}
    left_out = [row for row in rows if row["method"] != "third"]
    assert figures.plot_tolerance(aggregate(left_out, "success", []), runs, {}, Path("few.png")) is None


def test_tolerance_has_a_row_for_each_way_to_be_worse(drawn):
    """White noise and tremble beside the background that is kept; the clean target begins each curve."""
    rows, runs = (
        make_scores("oracle", ("2",), 0.9),
        [make_run("oracle", embedding=BEST, action_probe_nmse=0.4)],
    )
    for field, levels in (("noise_std", (0.5, 1.0)), ("tremble", (0.25, 4.0)), ("background_kept", (0.1,))):
        for level in levels:
            name = f"{field}{level:g}"
            rows += make_scores(name, ("2",), 0.9 - level / 5)
            embedding = BEST | {field: level, "key": name}
            runs.append(make_run(name, embedding=embedding, action_probe_nmse=0.4 + level / 8))
    linear = {"tremble0.25": {"change_nmse": "0.5", "change_leak": ""}}
    linear["tremble4"] = {"change_nmse": "0.8", "change_leak": ""}
    figures.plot_tolerance(aggregate(rows, "success", []), runs, linear, Path("tolerance.png"))
    noise, noise_probes, tremble, tremble_probes = drawn["tolerance.png"].axes  # one kept fraction: no curve
    assert noise.get_xlabel().startswith("white noise") and tremble.get_xlabel().startswith("tremble")
    assert [label.get_text() for label in noise.get_xticklabels()] == ["0", "0.5", "1"]
    assert np.allclose(noise_probes.lines[0].get_ydata(), [0.4, 0.4625, 0.525])
    closed_form, trained, *_ = tremble_probes.lines
    assert np.allclose(trained.get_ydata(), [0.4, 0.43125, 0.9])
    assert list(closed_form.get_xdata()) == [1, 2] and list(closed_form.get_ydata()) == [0.5, 0.8]
    success = tremble.lines[0].get_ydata()
    assert success[0] > success[1] > success[2]


def test_leak_against_success(drawn):
    """Only methods of the table, and budgets that several of them share; all, if none is shared."""
    rows, runs = tolerance_runs()
    figures.plot_leak(aggregate(rows, "success", []), runs, rows, Path("leak.png"))
    (axes,) = drawn["leak.png"].axes
    assert axes.get_title() == "2 labelled episodes" and labels(axes) == ["first", "second", "third"]
    points = {tuple(np.round(points.get_offsets()[0], 3)) for points in axes.collections}
    assert points == {(0.45, 0.1), (0.2, 0.6), (0.25, 0.5)}

    rows = make_scores("first", ("2",), 0.1) + make_scores("second", ("8",), 0.6)
    figures.plot_leak(aggregate(rows, "success", []), runs, rows, Path("apart.png"))
    titles = [axes.get_title() for axes in drawn["apart.png"].axes]
    assert titles == ["2 labelled episodes", "8 labelled episodes"]
    assert labels(drawn["apart.png"].axes[-1]) == ["first", "second"]

    rows = make_scores("first", ("2",), 0.1) + make_scores("first", ("8",), 0.7)  # each budget its own run
    rows += make_scores("second", ("2", "8"), 0.3)
    own = []
    for name, budget, leak in (("first", "2", 0.4), ("first", "8", 0.1), ("second", "2", 0.0)):
        own.append(make_run(name, labelled_episodes=[budget], leak_probe_r2=leak))
    figures.plot_leak(aggregate(rows, "success", []), own, rows, Path("own.png"))
    two, eight = drawn["own.png"].axes
    assert len(two.collections) == 2 and len(eight.collections) == 1

    one = make_scores("first", ("2",), 0.1)
    assert figures.plot_leak(aggregate(one, "success", []), runs, one, Path("one.png")) is None


def test_heat_map_of_embedding_targets(drawn):
    """Mean over seeds, encoders and prompts down, layers and pools across."""
    about = {"encoder": "vlm", "prompt": "best", "layer": -2, "pool": "text"}
    runs = [
        make_run("best", 0, about, action_probe_nmse=0.5),
        make_run("best", 1, about, action_probe_nmse=0.7),
        make_run("blind", 0, about | {"prompt": "blind", "pool": "last"}, action_probe_nmse=0.8),
        make_run("blind", 1, about | {"prompt": "blind", "pool": "last"}, action_probe_nmse=1.0),
        make_run("oracle", 0, about | {"encoder": "oracle"}, action_probe_nmse=0.3),
        make_run("oracle", 1, about | {"encoder": "oracle"}, action_probe_nmse=0.5),
        make_run("oracle", 2, about | {"encoder": "oracle"}, action_probe_nmse=0.0),  # a seed of its own
        make_run("pixels", 0, None, action_probe_nmse=1.0),
        make_run("longer", 0, about, action_probe_nmse=0.1, lam_updates=2000),  # can not be compared
        make_run("gap", 0, about, action_probe_nmse=0.1, frame_gap=4),
        make_run("view", 0, about, action_probe_nmse=0.1) | {"fdm_sees": "frame"},
        make_run("z4", 0, about, action_probe_nmse=0.1, latent_dim=4),
    ]
    figures.plot_probes(runs, Path("probes.png"))
    axes = drawn["probes.png"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.40", "0.60", "0.90"]
    expected = [[np.nan, 0.4], [np.nan, 0.6], [0.9, np.nan]]
    assert np.allclose(axes.images[0].get_array().filled(np.nan), expected, equal_nan=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "oracle: best",
        "vlm: best",
        "vlm: blind",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer -2, last", "layer -2, text"]
    assert figures.plot_probes(runs[:4], Path("two.png")) is None
    long = [
        "Do not describe background features. " + end for end in ("Focus on the arm.", "Describe the image.")
    ]
    for prompt in long:  # alike in what fits beside the picture
        runs.append(make_run("own", 0, about | {"prompt": prompt}, action_probe_nmse=0.8))
    figures.plot_probes(runs, Path("own.png"))
    assert len(drawn["own.png"].axes[0].get_yticklabels()) == 5


def test_strip_shows_the_same_times(drawn):
    """A success stays in the picture, framed; the times end with the last success."""
    film = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    good = {"title": "good", "film": film[:4], "success_step": 10}  # frames of steps 0, 4, 8, 10
    bad = {"title": "bad", "film": film, "success_step": 0}
    figures.plot_strip([good, bad], 4, Path("strip.png"), columns=3)
    panels = drawn["strip.png"].axes
    assert [panel.get_title() for panel in panels[:3]] == ["step 0", "step 5", "step 10"]
    assert [panel.images[0].get_array()[0, 0, 0] for panel in panels] == [0, 1, 3, 0, 1, 2]
    assert [panel.spines["top"].get_visible() for panel in panels] == [False, False, True] + [False] * 3
    assert [text.get_text() for text in panels[3].texts] == ["bad", "✗ no success"]
    assert figures.plot_strip([], 4, Path("none.png")) is None


def test_curves_of_a_run(drawn):
    rows = [{"stage": "lam", "update": 50, "loss": 1.0, "codebook_loss": 0.3}]
    rows += [{"stage": "lam", "update": 100, "loss": 0.5, "action_probe_nmse": 0.7, "leak_probe_r2": None}]
    rows += [{"stage": "bc", "update": 50, "loss": 0.2}, {"stage": "decoder_2", "update": 50, "loss": 0.1}]
    figures.plot_curves(rows, Path("curves.png"))
    panels = drawn["curves.png"].axes
    assert [axes.get_title() for axes in panels[:-1]] == ["lam", "bc", "decoder_2"]
    assert panels[0].lines[0].get_xydata().tolist() == [[50, 1.0], [100, 0.5]]
    assert labels(panels[0]) == ["loss", "codebook_loss"], "a loss that a fork adds is drawn as well"
    assert panels[0].lines[1].get_xydata().tolist() == [[50, 0.3]]
    assert labels(panels[-1]) == ["action probe NMSE"]
    assert figures.plot_curves([], Path("none.png")) is None


def test_study_panels(drawn):
    panel = {"title": "noise", "xlabel": "exo-std", "vline": 0.25, "crosses": []}
    panel["lines"] = [{"x": [0, 1], "y": [0, 1], "label": "leak", "color": "red", "dash": "--"}]
    panel["dots"] = [{"x": [0.5], "y": [0.4], "color": "red"}]
    panel["errorbars"] = [{"x": [0.5], "y": [0.4], "half": [0.1], "label": "bars", "color": "red"}]
    other = panel | {"crosses": [{"x": [1], "y": [1], "label": "stuck", "color": "black"}], "vline": None}
    figures.plot_study([panel, other, other], Path("study.png"), columns=2)
    first, second, third = drawn["study.png"].axes
    assert first.get_title() == "noise" and labels(first) == ["leak", "bars"]
    assert [line.get_linestyle() for line in first.lines][0] == "--"
    assert list(first.lines[-1].get_xdata()) == [0.25, 0.25] and len(third.lines) == len(first.lines)
    assert sorted(labels(second)) == ["bars", "leak", "stuck"]


def test_bridge_draws_what_agreement_has(drawn):
    rows = []
    for index, label in enumerate(("oracle: best", "clean", "pixels")):
        numbers = {"trained_nmse": 0.5 + 0.1 * index, "change_nmse": 0.4 + 0.1 * index}
        rows.append({"label": label} | numbers | {"trained_leak": None, "change_leak": None})
    figures.plot_bridge(rows, {"change_nmse": 1.0}, Path("bridge.png"))
    (axes,) = drawn["bridge.png"].axes
    assert axes.get_title() == "Spearman 1.00"
    assert [text.get_text() for text in axes.texts] == ["oracle: best", "clean", "pixels"]
    assert axes.lines[0].get_xydata().tolist() == [[0.4, 0.5], [0.5, 0.6], [0.6000000000000001, 0.7]]
    assert figures.plot_bridge(rows, {}, Path("none.png")) is None


def test_preview_and_whole_files(tmp_path):
    """A real PNG, the same bytes each time, and nothing half-written beside it."""
    pictures = [(f"step {step}", np.full((8, 8, 3), step, np.uint8)) for step in (3, 60)]
    rows = [{"task": "reach", "frames": pictures}, {"task": "push", "frames": pictures[:1]}]
    path = figures.plot_preview(rows, tmp_path / "preview.png")
    first = path.read_bytes()
    assert first[:4] == b"\x89PNG" and figures.plot_preview(rows, path).read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["preview.png"]
    assert figures.plot_preview([], tmp_path / "none.png") is None
