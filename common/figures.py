"""Every picture of the project; nothing here is needed to understand anything.

Each plot_*(rows, path) takes plain rows, writes a PNG whole or not at all, and returns its path, or None
where there is too little to draw. Scripts import this file late: matplotlib takes a second.

table: entries of common.statistics.aggregate, sorted by label budget; runs: args.json and summary.json of
each.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no screen

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from common.shards import atomic_write  # noqa: E402

# Okabe and Ito: colour-blind-safe
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vP*X"
GOOD, BAD = "#009E73", "#D55E00"
AXES = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE = AXES | {"axes.grid": True, "grid.alpha": 0.3}


def look(index: int) -> dict[str, str]:
    """Colour and marker number `index`; 64 pairs."""
    turn, colour = divmod(index, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(colour + turn) % len(MARKERS)]}


def save_figure(figure: plt.Figure, path: Path) -> Path:
    png = io.BytesIO()
    box = None if figure.get_layout_engine() else "tight"  # constrained fits as well, and twice costs twice
    figure.savefig(png, dpi=150, bbox_inches=box, format="png", metadata={"Software": None})
    plt.close(figure)
    atomic_write(path, png.getvalue())
    return path


def in_order(values: Collection) -> list:
    """Each value once, in the order in which they come."""
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------------------------------- results of eval.py


@plt.rc_context(STYLE | {"axes.grid.axis": "x"})
def plot_success(
    table: list[dict], path: Path, label: str = "success", lower_is_better: bool = False
) -> Path | None:
    """IQM with CI: a row per method, the best on top; a colour per label budget; faint dots: single runs."""
    if not table:
        return None
    budgets = in_order(entry["labelled"] for entry in table)
    scores, own_budgets = defaultdict(list), defaultdict(list)
    for entry in table:
        scores[entry["method"]].append(entry["iqm"])
        own_budgets[entry["method"]].append(entry["labelled"])
    methods = sorted(scores, key=lambda method: (np.mean(scores[method]), method), reverse=lower_is_better)

    step = 0.8 / len(budgets)
    height = len(methods) * (0.16 + 0.11 * len(budgets))
    figure, axes = plt.subplots(figsize=(7, 0.7 + height))
    for row in range(0, len(methods), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    for index, budget in enumerate(budgets):
        style = look(index)
        entries = [entry for entry in table if entry["labelled"] == budget]
        places = []
        for entry in entries:
            own = own_budgets[entry["method"]]
            above = (len(own) - 1) / 2 - own.index(budget)  # the lowest budget on top
            places.append(methods.index(entry["method"]) + step * above)
        colour = style["color"]
        for entry, place in zip(entries, places):
            single_runs = entry["matrix"].mean(axis=1)
            heights = np.full(len(single_runs), place)
            axes.scatter(single_runs, heights, s=10, color=colour, alpha=0.35, linewidths=0)
            if entry["iqm_ci"]:
                axes.plot(entry["iqm_ci"], [place, place], color=colour, linewidth=1.5, alpha=0.8)
        iqms = [entry["iqm"] for entry in entries]
        axes.scatter(iqms, places, s=24, label=budget, zorder=3, **style)
    highest = max(entry["matrix"].max() for entry in table)
    axes.set_xlim(-0.03, max(1.03, 1.03 * highest))
    axes.set_ylim(-0.5, len(methods) - 0.5)
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", length=0)
    what = "IQM (one run: no CI)"
    if any(entry["iqm_ci"] for entry in table):
        what = "IQM with 95 % CI"
    axes.set_xlabel(f"{label}, {what}; faint: a run's mean")
    outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes.legend(title="labelled episodes", alignment="left", **outside)
    return save_figure(figure, path)


def shared_budgets(table: list[dict], methods: Collection[str]) -> list[str]:
    """Label budgets that several of these methods have, one alone shows nothing; all, if none is."""
    count = Counter(entry["labelled"] for entry in table if entry["method"] in methods)
    shared = [budget for budget in count if count[budget] > 1]
    return shared or list(count)


@plt.rc_context(STYLE)
def plot_leak(table: list[dict], runs: list[dict], scores: list[dict], path: Path) -> Path | None:
    """How much of the background a run's latents explain, against its success; a panel per label budget.

    scores: rows of scores.csv. Only methods of the table are shown.
    """
    methods = sorted({entry["method"] for entry in table})
    lams = []
    for run in runs:
        if run["policy"] and run["variant"] in methods and run.get("leak_probe_r2") is not None:
            lams.append(run)
    if len(lams) < 2:
        return None
    budgets = shared_budgets(table, {run["variant"] for run in lams})
    handles = {}
    size = (1 + 3.2 * len(budgets), 3.2)
    figure, panels = plt.subplots(1, len(budgets), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, budget in zip(panels[0], budgets):
        for run in [run for run in lams if budget in run["labelled_episodes"]]:
            own = (run["variant"], run["seed"], budget)
            success = []
            for row in scores:
                of = (row["method"], row["seed"], row["labelled"])
                if of == own and row["task"] in run["tasks"]:
                    success.append(row["success"])
            if success:
                style = look(methods.index(run["variant"]))
                style |= {"s": 45, "alpha": 0.8, "linewidths": 0, "clip_on": False}
                point = axes.scatter(run["leak_probe_r2"], np.mean(success), **style)
                handles[run["variant"]] = point
        axes.set(title=f"{budget} labelled episodes", ylim=(-0.03, 1.03), ylabel="success")
        axes.set_xlabel("leak $R^2$ (background explained)")
        axes.label_outer()
    leaks = [run["leak_probe_r2"] for run in lams]
    panels[0, 0].set_xlim(min(-0.05, *leaks), max(0.2, *leaks))  # leaks of nearly 0 lie together
    names = sorted(handles)
    columns = -(-len(names) // 14)
    points = [handles[name] for name in names]
    outside = {"loc": "center left", "bbox_to_anchor": (1.03, 0.5), "ncols": columns}
    panels[0, -1].legend(points, names, fontsize=8, **outside)
    return save_figure(figure, path)


LEVELS = {  # in what a target may differ from the oracle's best: the field of its embedding, the axis' label
    "background_kept": "fraction of the background kept in the target",
    "noise_std": "white noise on the target, in std of its change",
    "tremble": "tremble of the target with the frame, in std of its change",
}


def target_levels(runs: list[dict], field: str) -> dict[str, float]:
    """{variant: level} of runs that differ in one of LEVELS and in nothing else.

    These are runs with the oracle's best prompt and the name that lam_vlm.py gives by itself. What the
    forward model sees, and supervision, are part of that name: of such groups the largest is taken.
    """
    others = {*LEVELS, "bfloat16"} - {field}
    groups = defaultdict(dict)
    for run in runs:
        embedding = run.get("embedding") or {}
        is_oracle = embedding.get("family") == "oracle" and embedding.get("prompt") == "best"
        altered = any(embedding.get(name) for name in others)
        if is_oracle and not altered and run["variant"] == run.get("default_variant"):
            group = run.get("fdm_sees"), run.get("supervision")
            groups[group][run["variant"]] = embedding.get(field, 0)
    return max(groups.values(), key=len, default={})


@plt.rc_context(STYLE)
def plot_tolerance(table: list[dict], runs: list[dict], linear: dict[str, dict], path: Path) -> Path | None:
    """What a target must deliver: success and probes against each of LEVELS, a row a level.

    linear: rows of linear_lam.py's bridge.csv by target, drawn beside the trained ones.
    """
    methods = {entry["method"] for entry in table}
    mine = [run for run in runs if run["variant"] in methods]
    levels = {}
    for field in LEVELS:
        found = target_levels(mine, field)
        if len(set(found.values())) >= 3:
            levels[field] = found
    if not levels:
        return None
    size = (9, 3.2 * len(levels))
    figure, panels = plt.subplots(len(levels), 2, figsize=size, layout="constrained", squeeze=False)
    for (field, level_of), (left, right) in zip(levels.items(), panels):
        draw_success_of_levels(left, table, level_of)
        draw_probes_of_levels(right, runs, level_of, linear)
        ticks = sorted(set(level_of.values()))
        for axes in (left, right):  # the levels span decades: evenly spaced
            axes.set_xticks(range(len(ticks)), [f"{level:g}" for level in ticks])
            axes.set(ylim=(-0.03, 1.03), xlabel=LEVELS[field])
            axes.legend(fontsize=8)
    return save_figure(figure, path)


def draw_success_of_levels(axes: plt.Axes, table: list[dict], level_of: dict[str, float]) -> None:
    """IQM with CI, a line a label budget."""
    ticks = sorted(set(level_of.values()))
    budgets = shared_budgets(table, level_of)
    for index, budget in enumerate(budgets):
        entries = [entry for entry in table if entry["method"] in level_of and entry["labelled"] == budget]
        entries.sort(key=lambda entry: level_of[entry["method"]])
        offset = 0.06 * (index - (len(budgets) - 1) / 2)
        places = [ticks.index(level_of[entry["method"]]) + offset for entry in entries]
        style = look(index)
        axes.plot(places, [entry["iqm"] for entry in entries], label=f"{budget} labelled", **style)
        for place, entry in zip(places, entries):
            if entry["iqm_ci"]:
                axes.plot([place, place], entry["iqm_ci"], color=style["color"], alpha=0.6)
    axes.set_ylabel("success, IQM with 95 % CI")


def draw_probes_of_levels(
    axes: plt.Axes, runs: list[dict], level_of: dict[str, float], linear: dict[str, dict]
) -> None:
    """Probes of each run as dots, their means as lines; those of linear models, in closed form, dashed."""
    ticks = sorted(set(level_of.values()))
    targets = {}
    for run in runs:
        if run["variant"] in level_of and run["embedding"].get("key") in linear:
            targets[ticks.index(level_of[run["variant"]])] = linear[run["embedding"]["key"]]
    probes = {  # and their columns of bridge.csv
        "action_probe_nmse": ("action probe NMSE", "change_nmse"),
        "leak_probe_r2": ("leak $R^2$", "change_leak"),
    }
    for index, (name, (label, column)) in enumerate(probes.items()):
        points = [(place, float(row[column])) for place, row in sorted(targets.items()) if row[column]]
        if points:
            axes.plot(*zip(*points), "--", color=COLOURS[index], label=f"{label}, linear closed form")
        by_place = defaultdict(list)
        for run in runs:
            if run["variant"] in level_of and run.get(name) is not None:
                by_place[ticks.index(level_of[run["variant"]])].append(run[name])
        for place, values in by_place.items():
            spread = np.full(len(values), place)
            axes.scatter(spread, values, s=12, color=COLOURS[index], alpha=0.5, linewidths=0)
        places = sorted(by_place)
        axes.plot(places, [np.mean(by_place[place]) for place in places], label=label, **look(index))


@plt.rc_context({"axes.grid": False})
def plot_probes(runs: list[dict], path: Path) -> Path | None:
    """Action-probe NMSE of embedding targets, mean over runs: encoder and prompt by layer and pool.

    Over the tasks and seeds that all targets have. Runs of other settings of stage 1 or other data can not be
    compared: of those, what has the most targets. Fewer than three are no picture.
    """
    same = ("data", "train_episodes", "fdm_sees", "latent_dim", "supervision", "idm_horizon", "lr")
    settings = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        embedding = run.get("embedding")
        if embedding and run.get("action_probe_nmse") is not None:
            updates = run.get("lam_updates", run.get("teacher_updates"))  # of latbot.py: the teacher's
            name = embedding["encoder"], embedding["prompt"]
            layer = f"layer {embedding['layer']}, {embedding['pool']}"
            other = str([run.get(setting) for setting in same])
            setting = settings[updates, run.get("frame_gap", run.get("span")), other]
            setting[name, layer][*run["tasks"], run["seed"]] = run["action_probe_nmse"]
    none = (0, 0, ""), {}
    (updates, gap, _), values = max(settings.items(), key=lambda item: len(item[1]), default=none)
    if len(values) < 3:
        return None
    shared = set.intersection(*map(set, values.values()))
    if not shared:
        return None
    names = sorted({name for name, _ in values})
    layers = sorted({layer for _, layer in values})
    grid = np.full((len(names), len(layers)), np.nan)
    for (name, layer), found in values.items():
        grid[names.index(name), layers.index(layer)] = np.mean([found[which] for which in shared])

    size = (4 + 0.8 * len(layers), 1.5 + 0.35 * len(names))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    picture = axes.imshow(grid, vmin=0.4, vmax=1, cmap="viridis_r", aspect="auto")
    middle = {"ha": "center", "va": "center"}
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black"
            if value > 0.7:
                colour = "white"
            axes.text(x, y, f"{value:.2f}", color=colour, fontsize=8, **middle)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right", fontsize=8)
    labels = [f"{encoder}: {textwrap.shorten(prompt, 40)}" for encoder, prompt in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set_title(f"{updates} updates of stage 1, frame gap {gap}", fontsize=9)
    figure.colorbar(picture, label="action-probe NMSE")
    return save_figure(figure, path)


@plt.rc_context(AXES)
def plot_strip(strips: list[dict], stride: int, path: Path, columns: int = 8) -> Path | None:
    """Films of the same episode, a row each, at the same times.

    strips: rows {"title", "film" (T, H, W, 3) uint8, a frame every `stride` steps and the last one,
    "success_step" (0: none)}.
    """
    if not strips:
        return None
    ends = [strip["success_step"] for strip in strips if strip["success_step"]]
    if not ends:
        ends = [(len(strip["film"]) - 1) * stride for strip in strips]
    steps = np.linspace(0, max(ends), columns).round().astype(int)
    size = (1.1 * columns, 1.16 * len(strips))
    figure, axes = plt.subplots(len(strips), columns, figsize=size, squeeze=False)
    for line, strip in zip(axes, strips):
        film, success = strip["film"], strip["success_step"]
        for panel, step in zip(line, steps):
            succeeded = 0 < success <= step
            frame = film[min(round(step / stride), len(film) - 1)]
            faded = 1.0
            if succeeded:
                frame = film[-1]  # the frame of the success stays
            if 0 < success < step:
                faded = 0.4
            panel.imshow(frame, alpha=faded)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(visible=succeeded, color=GOOD, linewidth=2)
        outcome, colour = "✗ no success", BAD
        if success:
            outcome, colour = f"✓ success at step {success}", GOOD
        beside = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
        line[0].text(-0.08, 0.62, strip["title"], fontsize=9, **beside)
        line[0].text(-0.08, 0.36, outcome, fontsize=8, color=colour, **beside)
    for panel, step in zip(axes[0], steps):
        panel.set_title(f"step {step}", fontsize=8)
    figure.subplots_adjust(wspace=0.04, hspace=0.06)
    return save_figure(figure, path)


# ---------------------------------------------------------------------------------------- a run, a data set


@plt.rc_context(STYLE)
def plot_curves(rows: list[dict], path: Path) -> Path | None:
    """Losses of each stage, and the probes over stage 1. rows: those of metrics.jsonl."""
    stages = in_order(row["stage"] for row in rows)
    if not stages:
        return None
    probes = {"action_probe_nmse": "action probe NMSE", "leak_probe_r2": "leak $R^2$"}
    probes["state_probe_r2"] = "state $R^2$"
    probed = any(row.get(key) is not None for row in rows for key in probes)
    count = len(stages) + probed
    figure, axes = plt.subplots(1, count, figsize=(3.2 * count, 2.6), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages):
        mine = [row for row in rows if row["stage"] == stage]
        names = in_order(name for row in mine for name in row if name.endswith("loss"))
        for index, name in enumerate(names):
            updates = [row["update"] for row in mine if name in row]
            losses = [row[name] for row in mine if name in row]
            axis.semilogy(updates, losses, color=COLOURS[index % len(COLOURS)], label=name)
        axis.set(title=stage, xlabel="update")
        axis.legend(fontsize=7)
    if not probed:
        return save_figure(figure, path)
    last = axes[0, -1]
    for index, (key, label) in enumerate(probes.items()):
        measured = [row for row in rows if row.get(key) is not None]
        if measured:
            updates = [row["update"] for row in measured]
            values = [row[key] for row in measured]
            last.plot(updates, values, label=label, markersize=4, **look(index))
    last.set(title="probes, held-out episodes", xlabel="update of stage 1")
    last.legend(fontsize=7)
    return save_figure(figure, path)


@plt.rc_context({"axes.grid": False})
def plot_preview(rows: list[dict], path: Path) -> Path | None:
    """Pictures of a data set, a row a task. rows: {"task", "frames": [(title, (H, W, 3) uint8), ...]}."""
    if not rows:
        return None
    columns = max(len(row["frames"]) for row in rows)
    size = (1.5 * columns, 1.6 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for line, row in zip(axes, rows):
        for axis, (title, picture) in zip(line, row["frames"]):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=7)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row["task"], fontsize=8)
    return save_figure(figure, path)


@plt.rc_context(AXES)
def plot_attention(frames: np.ndarray, maps: np.ndarray, path: Path) -> Path:
    """Frames (N, H, W, 3) uint8, above, and attention maps (N, s, s) on them, below."""
    figure, axes = plt.subplots(2, len(frames), figsize=(1.6 * len(frames), 3.3), squeeze=False)
    size = frames.shape[1]
    for (above, below), frame, attention in zip(axes.T, frames, maps):
        above.imshow(frame)
        below.imshow(frame, alpha=0.4)
        below.imshow(attention, extent=(0, size, size, 0), alpha=0.6, cmap="magma", interpolation="nearest")
        above.axis("off")
        below.axis("off")
    return save_figure(figure, path)


# ---------------------------------------------------------------------------------------- linear_lam.py


def plot_study(panels: list[dict], path: Path, columns: int = 4) -> Path:
    """Panels, row by row: {"title", "xlabel", "vline" (x or None), "lines", "dots", "crosses", "errorbars"}.

    Each of the four is a list of {"x", "y", "color", "label" (optional)}; lines have a "dash", dots may be
    "hollow" (larger, so that both kinds show), errorbars have "half", half their length.
    """
    lines = -(-len(panels) // columns)
    size = (3.75 * columns, 3 * lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axis, panel in zip(axes.flat, panels):
        for line in panel["lines"]:
            style = {"color": line["color"], "label": line["label"], "linewidth": 1.5}
            axis.plot(line["x"], line["y"], line["dash"], **style)
        for dots in panel["dots"]:
            style = {"color": dots["color"], "label": dots.get("label"), "markersize": 4}
            if dots.get("hollow"):
                style |= {"markerfacecolor": "none", "markersize": 8}
            axis.plot(dots["x"], dots["y"], "o", **style)
        for crosses in panel["crosses"]:
            style = {"color": crosses["color"], "label": crosses.get("label"), "markersize": 5}
            axis.plot(crosses["x"], crosses["y"], "x", **style)
        for bars in panel.get("errorbars", []):
            style = {"color": bars["color"], "label": bars["label"], "markersize": 4, "linewidth": 1}
            axis.errorbar(bars["x"], bars["y"], bars["half"], fmt="o", **style)
        if panel["vline"] is not None:
            axis.axvline(panel["vline"], color="grey", linestyle=":", linewidth=1)
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylim=(-0.04, 1.04))
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return save_figure(figure, path)


@plt.rc_context(STYLE)
def plot_split(panels: dict[str, tuple[str, float, list]], path: Path) -> Path:
    """Leak of the latents of latbot.py's teachers, a dot each, and of linear ones, lines; a row per budget.

    panels: {title: (xlabel, below which x is linear, [(x, row of beside_trained)])}, see `linear_teacher`.
    """
    budgets = in_order([row["labelled"] for _, _, points in panels.values() for _, row in points])
    shape, size = (len(budgets), len(panels)), (4 * len(panels) + 2.5, 3.2 * len(budgets))
    figure, axes = plt.subplots(*shape, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for line, budget in zip(axes, budgets):
        for axis, (title, (label, threshold, points)) in zip(line, panels.items()):
            points = [point for point in points if point[1]["labelled"] == budget]
            for latent, colour in {"motion": BAD, "scene": COLOURS[0], "latent": "black"}.items():
                draw_leaks(axis, [point for point in points if point[1]["latent"] == latent], colour)
            values = sorted({x for x, _ in points})
            axis.set_xscale("symlog", linthresh=threshold)
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
            axis.set(title=title, xlabel=label, ylabel=f"leak $R^2$, {budget} labelled")
            axis.label_outer()
    handles = {}  # each label once
    for axis in axes.flat:
        handles |= {line.get_label(): line for line in axis.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return save_figure(figure, path)


def draw_leaks(axis: plt.Axes, points: list[tuple[float, dict]], colour: str) -> None:
    """Trained and linear leak of one latent over x, seeds averaged in the lines."""
    if not points:
        return
    latent = points[0][1]["latent"]
    name = {"latent": "undivided"}.get(latent, latent)
    for sees, fill in {"both": colour, "motion": "none"}.items():
        dots = [(value, row["leak"]) for value, row in points if row["actions_see"] == sees]
        if dots:
            label = f"{name}, trained" if sees == "both" else f"{name}, actions from motion alone"
            axis.plot(*zip(*dots), "o", color=colour, markerfacecolor=fill, markersize=5, label=label)
    linear = defaultdict(list)
    for value, row in points:
        if row["linear_leak"] is not None:
            linear[value].append(row["linear_leak"])
    if linear:
        line = sorted((value, float(np.mean(leaks))) for value, leaks in linear.items())
        axis.plot(*zip(*line), "-", color=colour, linewidth=1, label=f"{name}, linear (T7)")


@plt.rc_context(AXES)
def plot_bridge(rows: list[dict], agreement: dict[str, float], path: Path) -> Path | None:
    """Probes of linear LAMs in closed form against those of trained LAMs, a target each.

    rows: {"label", "trained_nmse", "change_nmse", "trained_leak", "change_leak"}; agreement:
    {"change_nmse": rank correlation, "change_leak": ...}; what is not in it is not drawn.
    """
    names = {"nmse": "action-probe NMSE", "leak": "leak $R^2$"}
    measures = [measure for measure in names if f"change_{measure}" in agreement]
    if not measures:
        return None
    size = (5 * len(measures), 4)
    figure, axes = plt.subplots(1, len(measures), figsize=size, squeeze=False, layout="constrained")
    for axis, measure in zip(axes[0], measures):
        rows = sorted(rows, key=lambda row: row[f"trained_{measure}"])
        x = [row[f"change_{measure}"] for row in rows]
        y = [row[f"trained_{measure}"] for row in rows]
        width, height = max(x) - min(x), max(y) - min(y)
        arrow = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
        text_y = -np.inf
        axis.plot(x, y, "o", color=GOOD, markersize=5)
        for row, point in zip(rows, zip(x, y)):
            text_y = max(point[1], text_y + 0.055 * height)  # labels one above the other
            text = (point[0] + 0.06 * width, text_y)
            axis.annotate(row["label"], point, text, fontsize=7, va="center", arrowprops=arrow)
        axis.set_xlim(right=min(x) + 1.5 * width)
        axis.set(
            xlabel=f"{names[measure]}, linear LAM in closed form", ylabel=f"{names[measure]}, trained LAM"
        )
        axis.set_title(f"Spearman {agreement[f'change_{measure}']:.2f}")
    return save_figure(figure, path)
