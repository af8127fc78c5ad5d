"""report.md of eval.py: tables of success, of comparisons, of action errors and of probes, as text.

Each section is Markdown, empty where there is nothing to say.
runs: list of dicts, args.json and summary.json of each; table: entries of `aggregate` that have runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.records import code_version
from common.statistics import aggregate, budget_order, compare

PACKAGES = ("torch", "mujoco", "metaworld", "numpy")
ERROR_MEASURES = {
    "nmse": "NMSE: squared error over the action's variance",
    "r2": "R²: 1 - NMSE",
    "rmse": "Root of the mean squared error, in the action's own units",
}
PROBES = ("action_probe_nmse", "leak_probe_r2", "state_probe_r2")
PROBE_COLUMNS = ["method", "tasks", "labelled", "seed", "latent", "action_nmse", "leak_r2"]


def make_report(
    table: list[dict], errors: list[dict], runs: list[dict], notes: list[str], evaluation: dict[str, str]
) -> str:
    """errors: rows of errors.csv with rmse, and of the dimension "all"; evaluation: how it was made."""
    text = success_section(table) + comparison_section(table)
    text += error_section(errors, runs) + latent_section(runs) + probe_section(runs)
    if notes:
        text += "## Remarks\n\n" + "".join(f"- {note}\n" for note in notes) + "\n"
    origin = origin_of(runs) | evaluation
    return text + "## Where it comes from\n\n" + "".join(f"- {name}: {origin[name]}\n" for name in origin)


def number(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """0.52 [0.41, 0.60]"""
    if value is None:
        return "–"
    text = f"{value:z.2f}"  # z: no -0.00
    if interval:
        text += f" [{interval[0]:z.2f}, {interval[1]:z.2f}]"
    return text


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def count_of(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return "1 (no CI)"
    return str(len(seeds))


def probe(runs: list[dict], name: str) -> float | None:
    """Mean of a probe over the runs that have it."""
    values = [run[name] for run in runs if run.get(name) is not None]
    if not values:
        return None
    return float(np.mean(values))


def add_probes(table: list[dict], runs: list[dict]) -> None:
    for entry in table:
        mine = []
        for run in runs:
            same = run["variant"] == entry["method"] and run["seed"] in entry["seeds"]
            if run["policy"] and same and entry["labelled"] in run["labelled_episodes"]:
                mine.append(run)
        for name in PROBES:
            entry[name] = probe(mine, name)


def probe_rows(runs: list[dict]) -> list[dict]:
    """The rows of probes.csv, one for each latent of a run: z, or the names that its summary has."""

    def order(run: dict) -> tuple:
        budgets = [budget_order(budget) for budget in run["labelled_episodes"]]
        return run["variant"], run["tasks"], run["seed"], budgets

    rows = []
    for run in sorted(runs, key=order):
        latents = [key.removesuffix(PROBES[0]) for key in run if key.endswith(PROBES[0])]
        for latent in latents:
            nmse, leak = (run.get(latent + name) for name in PROBES[:2])
            if (latent == "" and len(latents) > 1) or (nmse is None and leak is None):
                continue  # the one that is cloned, which has a name as well; or nothing was probed
            row = {"method": run["variant"], "tasks": " ".join(run["tasks"]), "seed": run["seed"]}
            row["labelled"] = " ".join(run["labelled_episodes"])
            rows.append(row | {"latent": latent.rstrip("_") or "z", "action_nmse": nmse, "leak_r2": leak})
    return rows


def remarks(summary: list[dict], runs: list[dict]) -> list[str]:
    """What a reader of the tables must know. summary: the table, and the entries that it leaves out."""
    notes = []
    for entry in summary:
        if entry["dropped"]:
            seeds = entry["seeds"] or "none, left out"
            what = f"{entry['method']} ({entry['labelled']} labelled)"
            notes.append(f"{what}: only seeds common to all its tasks are counted: {seeds}.")
    if len({tuple(entry["tasks"]) for entry in summary if entry["seeds"]}) > 1:
        notes.append("The methods were run on different tasks: their IQM and mean cannot be compared.")
    if len({tuple(entry["seeds"]) for entry in summary if entry["seeds"]}) > 1:
        why = "seeds choose the labelled episodes. Comparisons are made on common seeds"
        notes.append(f"The methods have different seeds: their IQM and mean cannot be compared, for {why}.")
    if any(len(entry["seeds"]) == 1 for entry in summary):
        notes.append("One run gives no CI: the spread between training seeds is unknown.")
    if any(len(entry["seeds"]) in (2, 3) for entry in summary):
        held = "with two runs about 80 % of them hold the truth, with three 85 %"
        whole = (
            "of one task, or of one model for all, 50 and 75 %: no more than the lowest and the highest run"
        )
        notes.append(f"So few runs make the 95 % intervals too narrow: {held} (six tasks; {whole}).")
    pooled = sorted({entry["method"] for entry in summary if entry["pooled"]})
    if pooled:
        how = "whole runs are resampled, the same ones for all tasks"
        notes.append(f"One model for several tasks ({', '.join(pooled)}): {how}.")
    rolled_out = [run for run in runs if run["policy"] and run["env"] is not None]
    without = sorted({run["variant"] for run in rolled_out if run["env"]["videos"] == "none"})
    if without and len(without) < len({run["variant"] for run in rolled_out}):
        notes.append(f"Trained and rolled out without distractors: {', '.join(without)}.")
    arithmetic = defaultdict(set)
    for run in rolled_out:
        arithmetic[str(run.get("dtype")).removeprefix("torch.")].add(run["variant"])
    if len(arithmetic) > 1:
        each = [f"in {dtype} {', '.join(sorted(methods))}" for dtype, methods in sorted(arithmetic.items())]
        notes.append(f"The runs were not all trained in the same arithmetic: {'; '.join(each)}.")
    probed = defaultdict(set)
    for run in runs:
        if not run["policy"]:
            probed[run["variant"]].add((*run["tasks"], run["seed"]))
    if len({frozenset(each) for each in probed.values()}) > 1:
        notes.append("The runs without a policy differ in tasks or seeds: their probes cannot be compared.")
    notes += [f"{run['mixture']}: their probes are in one row." for run in runs if "mixture" in run]
    embeddings = [run.get("embedding") or {} for run in runs]
    upper = "an upper bound, not a VLM"
    if any(embedding.get("family") == "oracle" for embedding in embeddings):
        notes.append(f"The oracle answers the prompt from the simulator's segmentation: {upper}.")
    if any(embedding.get("blank") == "oracle" for embedding in embeddings):
        notes.append(f"Encoders named -blank see frames blanked by the simulator's segmentation: {upper}.")
    return notes


def success_section(table: list[dict]) -> str:
    if not table:
        return ""
    tasks = sorted({task for entry in table for task in entry["tasks"]})
    rows = []
    for entry in table:
        probes = [number(entry["action_probe_nmse"]), number(entry["leak_probe_r2"])]
        success = [number(entry["iqm"], entry["iqm_ci"]), number(entry["mean"], entry["mean_ci"])]
        by_task = dict(zip(entry["tasks"], entry["matrix"].mean(axis=0)))
        of_tasks = [number(by_task.get(task)) for task in tasks]
        rows.append(
            [entry["method"], entry["labelled"], *probes, *success, *of_tasks, count_of(entry["seeds"])]
        )
    header = ["method", "labelled", "probe NMSE", "leak R²", "success IQM", "mean", *tasks, "n runs"]
    text = "# Success on unseen backgrounds and goals\n\n" + markdown_table(header, rows)
    text += "Brackets: 95 % stratified-bootstrap CI (50 000 replicates; runs are resampled in each task).\n"
    text += "The test episodes are the same in all runs: what these few happen to be is not in it.\n"
    text += (
        "IQM: mean of runs x tasks without the lowest and the highest quarter, each rounded down: of 6 the\n"
        "middle 4, of 18 the middle 10. Probes: on held-out episodes, mean over runs.\n\n"
    )
    return text


def comparison_section(table: list[dict]) -> str:
    lines = []
    for row in compare(table):
        line = [row["method"], row["base"], row["labelled"], str(len(row["tasks"])), str(len(row["seeds"]))]
        for name in ("iqm_ratio", "iqm_difference", "mean_ratio", "mean_difference", "win_rate"):
            line.append(number(row[name], row[f"{name}_ci"]))
        lines.append(line)
    if not lines:
        return ""
    header = ["method", "against", "labelled", "tasks", "seeds", "IQM: ratio", "difference", "mean: ratio"]
    text = "## Against the baselines\n\n" + markdown_table([*header, "difference", "P(better)"], lines)
    text += "On the tasks and seeds that both have; runs are resampled independently. 0 over 0 counts as 1.\n"
    text += "P(better): probability that a run of the method beats one of the other on the same task.\n\n"
    return text


def error_section(errors: list[dict], runs: list[dict]) -> str:
    """A table for each measure: methods and label budgets down, the action's dimensions across."""
    if not errors:
        return ""
    text = "# Action error on held-out episodes\n\n"
    text += "The data are videos without a simulator: nothing was rolled out, and this is no success rate.\n"
    text += "IQM over runs x tasks with 95 % stratified-bootstrap CI.\n\n"
    for measure, title in ERROR_MEASURES.items():
        dimensions = list(dict.fromkeys(row["dimension"] for row in errors if measure in row))
        texts, seeds = defaultdict(dict), {}
        for dimension in dimensions:
            rows = [row for row in errors if row["dimension"] == dimension]
            for entry in aggregate(rows, measure, runs):
                if entry["seeds"]:
                    key = entry["method"], entry["labelled"]
                    texts[key][dimension] = number(entry["iqm"], entry["iqm_ci"])
                    seeds[key] = entry["seeds"]
        lines = []
        for method, labelled in sorted(texts, key=lambda key: (budget_order(key[1]), key[0])):
            of_dimensions = [texts[method, labelled].get(dimension, "–") for dimension in dimensions]
            lines.append([method, labelled, *of_dimensions, count_of(seeds[method, labelled])])
        header = ["method", "labelled", *dimensions, "n runs"]
        text += f"## {title}\n\n" + markdown_table(header, lines)
    return text


def latent_section(runs: list[dict]) -> str:
    """The latents of methods that have several, mean over runs."""
    found = defaultdict(list)
    for row in probe_rows(runs):
        if row["latent"] != "z":
            found[row["method"], row["labelled"], row["latent"]].append(row)
    if not found:
        return ""
    lines = []
    for names, rows in found.items():
        probes = [number(probe(rows, name)) for name in ("action_nmse", "leak_r2")]
        lines.append([*names, *probes, str(len(rows))])
    header = ["method", "labelled", "latent", "probe NMSE", "leak R²", "n runs"]
    return "# Probes of each latent\n\n" + markdown_table(header, lines)


def probe_section(runs: list[dict]) -> str:
    """Runs without a policy: their targets, the best first."""
    methods = defaultdict(list)
    for run in runs:
        if not run["policy"]:
            methods[run["variant"]].append(run)
    if not methods:
        return ""
    rows = []
    for method, mine in methods.items():
        rows.append([method, *(probe(mine, name) for name in PROBES), len(mine)])
    rows.sort(key=lambda row: (row[1] is None, row[1], row[0]))
    lines = [[method, *map(number, probes), str(count)] for method, *probes, count in rows]
    header = ["method", "probe NMSE", "leak R²", "state R²", "n runs"]
    return "# Runs without a policy, best target first\n\n" + markdown_table(header, lines)


def origin_of(runs: list[dict]) -> dict[str, str]:
    """Where the numbers come from: the runs and their data, this code and this machine."""
    commits = [{stage.get("commit") for stage in run.get("per_stage", {}).values()} for run in runs]
    trained_at = sorted(set().union(*commits) - {None})
    if unnamed := sum(not each - {None} for each in commits):
        trained_at.append(f"{unnamed} runs do not say")
    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(": ")[1]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "runs": ", ".join(run["dir"].name for run in runs),
        "data": ", ".join(sorted({run["data"] for run in runs})),
        "trained at": ", ".join(trained_at),
        "report written at": code_version(),
        "versions": ", ".join(versions),
        "hardware": f"{processor}, {os.cpu_count()} cores",
    }
