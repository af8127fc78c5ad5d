"""Roll out every policy on unseen backgrounds and goals; success as numbers, tables and pictures.

    python eval.py                               every finished run in runs/ -> results/quick
    python eval.py --runs RUN RUN --episodes 5   two runs, five episodes per task
    python eval.py paper                         the paper's scale -> results/paper

Per-episode rows are kept in runs/<name>/rollouts.csv: a killed evaluation goes on where it stopped, more
--episodes roll out the missing ones only, rows of an older policy are dropped. results/<name>/ gets
report.md, scores.csv, probes.csv and figures, runs/<name>/rollouts/ the films. Where the data are videos
without a simulator there is nothing to roll out: errors.csv and the report have the policies' action errors
on held-out episodes instead. IQM, stratified bootstrap and comparisons: common/statistics.py.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import at_least, fail, parse
from common.actor import Actor
from common.dataset import Dataset, chunks
from common.device import usable
from common.distracting_metaworld import DistractingMetaWorld
from common.probes import VARIES
from common.report import PROBE_COLUMNS, add_probes, make_report, probe_rows, remarks
from common.results import (
    check_clips,
    choose_budgets,
    csv_text,
    film_path,
    find_runs,
    read_bridge,
    read_rollouts,
    row_key,
    save_film,
    save_rollouts,
)
from common.shards import atomic_write, lock_folder, parallel, read_json
from common.statistics import aggregate, budget_order
from common.tasks import TASKS


@dataclass
class Args:
    runs: tuple[str, ...] = ()
    """run folders to evaluate, by name or path; none given: every finished run in runs/"""
    episodes: int = 50
    """episodes for each run, task and label budget"""
    labelled: tuple[str, ...] = ()
    """label budgets to evaluate, of those that a run has; none given: all"""
    seed: int = 0
    """seed of the evaluation's goals, clips and start frames (never those of the training data)"""
    envs: int = 5
    """environments stepped together with one batched policy call, which rounds by its size: keep to one"""
    workers: int = 0
    """processes (0: one per core; 1: all in this process)"""
    execute: int = 4
    """actions of a chunk that are executed before the policy is asked again (latbot.py)"""
    device: str = "cpu"
    """torch device of the policies"""
    media: int = 2
    """recorded episodes of each run and task, at the run's lowest label budget (0: no gif and no strip)"""
    out: str = "results/quick"
    """folder of the report, the scores and the figures"""


QUICK = Args()
PAPER = replace(QUICK, episodes=100, device="cuda", media=1, out="results/paper")
PRESETS = {"quick": QUICK, "paper": PAPER}
SCORES = ["method", "task", "seed", "episodes", "success", "labelled"]  # of scores.csv
ERRORS = ["method", "task", "seed", "labelled", "dimension", "nmse", "r2"]  # of errors.csv
FIGURES = ("success", "leak_vs_success", "tolerance", "strip", "probes", "errors")
FILM_STRIDE = 4  # environment steps between recorded frames: MetaWorld runs at 80 Hz, so 20 frames a second

# ---------------------------------------------------------------------------------------- rollouts


@dataclass
class Block:
    """Episodes of one run, task and label budget, stepped together: the unit of work, all a kill can lose."""

    run_dir: Path
    task: str
    labelled: str
    policy_hash: str
    env: dict  # arguments of the data's environment, so that training and evaluation cannot drift apart
    args: Args
    episodes: list[int]
    filmed: list[int]  # those that are recorded


ENVS: dict[str, list[DistractingMetaWorld]] = {}  # of one task: a process keeps them from block to block


def open_envs(block: Block) -> list[DistractingMetaWorld]:
    args = block.args
    key = json.dumps([block.task, block.env, args.seed])
    if key not in ENVS:
        close_envs()
        ENVS[key] = []
        for _ in range(min(args.envs, args.episodes)):
            ENVS[key].append(DistractingMetaWorld(block.task, split="test", seed=args.seed, **block.env))
    return ENVS[key]


def close_envs() -> None:
    """A renderer that is left to the interpreter's exit complains."""
    while ENVS:
        _, envs = ENVS.popitem()
        for env in envs:
            env.close()


@functools.lru_cache(maxsize=1)
def open_policy(run_dir: Path, labelled: str, policy_hash: str, device: str) -> Actor:
    """The policy, of class Actor or with the same `plan`. policy_hash: for the cache alone.

    policy.plan(frames uint8 (B, frame_stack, H, W, 3), task, keys) -> actions (B, span, A)
    """
    return loader(run_dir)(run_dir, labelled=labelled, device=device)


def loader(run_dir: Path) -> Callable[..., Actor]:
    """load_policy of the script that trained the run, one of ours or a copy (older runs name none)."""
    script = read_json(run_dir / "summary.json").get("script", "lam_vlm")
    if not Path(__file__).with_name(f"{script}.py").exists():
        fail(f"{run_dir} was trained by {script}.py, which is not beside eval.py")
    return importlib.import_module(script).load_policy


def roll_out_block(block: Block) -> tuple[Block, list[dict], dict[int, np.ndarray]]:
    """`play` in a worker; an error says where it was."""
    torch.set_num_threads(1)  # the processes share the cores
    try:
        return play(block)
    except Exception as error:
        episodes = f"episodes {block.episodes[0]}-{block.episodes[-1]}"
        error.add_note(f"in {block.run_dir}, {block.task}, {block.labelled} labelled, {episodes}")
        raise


def play(block: Block) -> tuple[Block, list[dict], dict[int, np.ndarray]]:
    """The block, its rows, and {episode: film (T, H, W, 3) uint8}. An episode ends at its first success.

    Episode e is always played by environment e % envs, and the batch always has its full size (a free place
    is black, a finished episode keeps its last frames): an episode's result must not depend on which others
    were left to do, and a network may round by batch size (DETAIL 13).
    """
    args = block.args
    policy = open_policy(block.run_dir, block.labelled, block.policy_hash, args.device)
    envs = open_envs(block)
    batch = None  # (envs, frame_stack, H, W, 3), the newest frame last
    rows, films = {}, {}
    for episode in block.episodes:
        index = episode % args.envs
        frame, info = envs[index].reset(options={"episode": episode})
        if batch is None:
            batch = np.zeros((args.envs, policy.frame_stack, *frame.shape), np.uint8)
        batch[index] = frame  # at the start, the first frame K times
        films[episode] = [frame]
        row = {"task": block.task, "labelled": block.labelled, "eval_seed": args.seed, "episode": episode}
        row |= {"goal": info["goal"], "clip": info["clip"], "clip_start": info["clip_frame"]}
        row |= {"success": 0, "first_success_step": "", "policy_hash": block.policy_hash}
        rows[episode] = row

    returns = dict.fromkeys(block.episodes, 0.0)
    playing = list(block.episodes)
    number = {episode % args.envs: episode for episode in block.episodes}
    task_number = TASKS.index(block.task)
    plan, step = [], 0
    while playing:
        if not plan:
            keys = [[args.seed, task_number, number.get(index, 0), step] for index in range(args.envs)]
            chunk = policy.plan(batch, block.task, keys)  # (envs, span, A)
            plan = list(chunk.swapaxes(0, 1)[: args.execute])
        actions = plan.pop(0)
        step += 1
        if not np.isfinite(actions).all():
            raise ValueError(f"the policy's action is not finite at step {step}")
        for episode in list(playing):
            index = episode % args.envs
            frame, reward, _, truncated, info = envs[index].step(actions[index])
            batch[index] = np.concatenate([batch[index, 1:], frame[None]])
            returns[episode] += float(reward)
            success = bool(info["success"])
            if step % FILM_STRIDE == 0 or success or truncated:
                films[episode].append(frame)
            if success:
                rows[episode] |= {"success": 1, "first_success_step": step}
            if success or truncated:
                rows[episode]["return"] = f"{returns[episode]:.6g}"
                playing.remove(episode)
    films = {episode: np.stack(films[episode]) for episode in block.filmed}
    return block, list(rows.values()), films


def plan_blocks(run: dict, rows: dict[tuple, dict], args: Args) -> list[Block]:
    """What is missing of the run: episodes without a row, or without the film that they should have."""
    blocks = []
    for task in run["tasks"]:
        for labelled in run["labelled_episodes"]:
            lowest = labelled == run["labelled_episodes"][0]
            filmed, missing = set(), set()
            for episode in range(args.episodes):
                film = film_path(run["dir"], task, labelled, args.seed, episode)
                if (task, labelled, args.seed, episode) not in rows:
                    missing.add(episode)  # a film that is there is of another policy
                if lowest and episode < args.media and (episode in missing or not film.exists()):
                    filmed.add(episode)
            for start in range(0, args.episodes, args.envs):
                here = set(range(start, start + args.envs))
                episodes = sorted((missing | filmed) & here)
                if episodes:
                    policy_hash = run["policy_hash"][labelled]
                    what = (run["dir"], task, labelled, policy_hash, run["env"], args)
                    blocks.append(Block(*what, episodes, sorted(filmed & here)))
    if blocks:
        check_clips(run)
        loader(run["dir"])  # refuses before anything is rolled out
    return blocks


def roll_out(runs: list[dict], args: Args) -> tuple[dict[Path, dict], int]:
    """Rolls out what is missing; returns {run folder: its rows} and the number of episodes done now.

    Films are written before their rows, and all rows sorted after each block: whenever it is killed, the same
    command makes the same files.
    """
    rows = {run["dir"]: read_rollouts(run) for run in runs}
    blocks = []
    for run in runs:
        blocks += plan_blocks(run, rows[run["dir"]], args)
    blocks.sort(key=lambda block: (block.task, json.dumps(block.env)))  # environments are built once per task
    count = sum(len(block.episodes) for block in blocks)
    workers = min(args.workers or len(os.sched_getaffinity(0)), max(1, len(blocks)))
    jobs = [(roll_out_block, block) for block in blocks]
    with tqdm(total=count, desc="rollouts", unit="episode", smoothing=0, disable=not blocks) as bar:
        for block, new_rows, films in parallel(workers, jobs):
            for episode, film in films.items():
                save_film(film_path(block.run_dir, block.task, block.labelled, args.seed, episode), film)
            played = {row_key(row): row for row in new_rows}
            rows[block.run_dir] = played | rows[block.run_dir]  # what is played again for its film stays
            save_rollouts(block.run_dir, rows[block.run_dir])
            bar.update(len(new_rows))
    close_envs()
    return rows, count


# ---------------------------------------------------------------------------------------- action errors


def error_rows(runs: list[dict], device: str) -> list[dict]:
    """The rows of errors.csv, with rmse and the dimension "all"."""
    rows = []
    for run in runs:
        for labelled in run["labelled_episodes"]:
            policy = open_policy(run["dir"], labelled, run["policy_hash"][labelled], device)
            split = {"probe_fraction": run["probe_fraction"]}
            data = Dataset(run["data"], tuple(run["tasks"]), frame_stack=policy.frame_stack, **split)
            if run.get("shards_hash", data.shards_hash) != data.shards_hash:
                fail(f"{run['data']} was made anew since {run['dir']} was trained on it; train that again")
            for task, held_out in zip(data.tasks, data.by_task(data.held_out_actions)):
                names = {"method": run["variant"], "task": task, "seed": run["seed"], "labelled": labelled}
                if len(held_out):
                    rows += [names | row for row in action_errors(policy, data, task, held_out)]
    return rows


def action_errors(policy: Actor, data: Dataset, task: str, held_out: np.ndarray) -> list[dict]:
    """The policy against the true actions of the episodes that training held out: a row per dimension.

    nmse: squared error over the action's variance, None where it hardly varies; r2: 1 - nmse; rmse: in the
    action's own units (the data set has them scaled to [-1, 1]). Dimension "all": mean of those that vary.
    """
    predictions = []
    for part in chunks(held_out):
        stack = data.stacked(part)
        frames = data.columns["frames"][stack.reshape(-1)]
        frames = frames.reshape(*stack.shape, *frames.shape[1:])
        predictions.append(policy.plan(frames, task, [[int(row)] for row in part])[:, 0])
    actions = data.columns["actions"][held_out].astype(float)
    mse = ((np.concatenate(predictions) - actions) ** 2).mean(axis=0)
    variance = actions.var(axis=0)

    info = data.meta["action"]
    span = np.subtract(info["high"], info["low"])
    half_range = np.where(span > 0, span, 1) / 2  # as import_videos.py scales them
    rows = []
    for index, name in enumerate(info["names"]):
        row = {"dimension": name, "nmse": None, "r2": None}
        if variance[index] > VARIES:
            row["nmse"] = float(mse[index] / variance[index])
            row["r2"] = 1 - row["nmse"]
        row["rmse"] = float(np.sqrt(mse[index]) * half_range[index])
        rows.append(row)
    measured = [row["nmse"] for row in rows if row["nmse"] is not None]
    if measured:
        nmse = float(np.mean(measured))
        rows.append({"dimension": "all", "nmse": nmse, "r2": 1 - nmse})
    return rows


# ---------------------------------------------------------------------------------------- scores


def score_rows(runs: list[dict], rows: dict[Path, dict], args: Args) -> list[dict]:
    """The rows of scores.csv: success over the episodes asked for, by run, label budget and task."""
    scores = []
    for run in runs:
        for labelled in run["labelled_episodes"]:
            for task in run["tasks"]:
                successes = []
                for episode in range(args.episodes):
                    row = rows[run["dir"]][task, labelled, args.seed, episode]
                    successes.append(int(row["success"]))
                score = {"method": run["variant"], "task": task, "seed": run["seed"], "labelled": labelled}
                scores.append(score | {"episodes": args.episodes, "success": float(np.mean(successes))})
    scores.sort(key=lambda row: (row["method"], budget_order(row["labelled"]), row["task"], row["seed"]))
    return scores


# ---------------------------------------------------------------------------------------- program


def collect_strips(table: list[dict], runs: list[dict], rows: dict[Path, dict], args: Args) -> list[dict]:
    """One episode (same goal, same background) by each method's first run at its lowest label budget."""
    strips = []
    if not args.media or not table:
        return strips
    task = table[0]["tasks"][0]
    for method in dict.fromkeys(entry["method"] for entry in table):
        mine = [run for run in runs if run["variant"] == method and task in run["tasks"]]
        if not mine:
            continue
        run = min(mine, key=lambda run: run["seed"])
        labelled = run["labelled_episodes"][0]
        path = film_path(run["dir"], task, labelled, args.seed, 0)
        row = rows[run["dir"]][task, labelled, args.seed, 0]
        strip = {"title": f"{method} ({labelled} labelled)", "film": np.load(path, allow_pickle=False)}
        strips.append(strip | {"success_step": int(row["first_success_step"] or 0)})
    return strips


def plot_results(
    table: list[dict], error_table: list[dict], scores: list[dict], runs: list[dict], strips: list, out: Path
) -> None:
    from common import figures  # here: matplotlib takes a second to import

    for name in FIGURES:  # of other runs; not all of them are drawn each time
        (out / f"{name}.png").unlink(missing_ok=True)
    figures.plot_success(table, out / "success.png")
    figures.plot_leak(table, runs, scores, out / "leak_vs_success.png")
    figures.plot_tolerance(table, runs, read_bridge(out), out / "tolerance.png")
    figures.plot_strip(strips, FILM_STRIDE, out / "strip.png")
    figures.plot_probes(runs, out / "probes.png")
    label = "action NMSE (lower is better)"
    figures.plot_success(error_table, out / "errors.png", label, lower_is_better=True)


def parse_args(arguments: list[str]) -> Args:
    args = parse(PRESETS, arguments, __doc__)
    at_least(1, args, "episodes", "envs", "execute")
    at_least(0, args, "workers", "media", "seed")
    usable(args.device)
    return args


def main(args: Args) -> None:
    begun = time.time()
    out = Path(args.out)
    runs = find_runs(args.runs)
    for run in runs:  # how much of a chunk is executed is part of the policy
        if "span" in run:  # latbot.py or a copy
            executed = min(args.execute, run["span"])
            run["policy_hash"] = {budget: f"{of}-x{executed}" for budget, of in run["policy_hash"].items()}
    if args.labelled:
        choose_budgets(runs, args.labelled)
    policies = [run for run in runs if run["policy"] and run["labelled_episodes"]]
    simulated = [run for run in policies if run["env"] is not None]
    videos = [run for run in policies if run["env"] is None]
    with ExitStack() as locks:
        for folder in (out, *(run["dir"] for run in runs)):
            locks.callback(os.close, lock_folder(folder))

        # every policy of the simulator plays the same episodes: test clips and goals, one seed
        rows, rolled_out = roll_out(simulated, args)
        scores = score_rows(simulated, rows, args)
        atomic_write(out / "scores.csv", csv_text(SCORES, scores))
        atomic_write(out / "probes.csv", csv_text(PROBE_COLUMNS, probe_rows(runs)))

        # where there is no simulator: the policy's actions against the true ones of held-out episodes
        errors = error_rows(videos, args.device)
        (out / "errors.csv").unlink(missing_ok=True)
        if errors:
            each = [row for row in errors if row["dimension"] != "all"]
            atomic_write(out / "errors.csv", csv_text(ERRORS, each))

        # IQM, mean and CIs over (runs x tasks) of each method and label budget
        entries = aggregate(scores, "success", runs)
        error_entries = aggregate([row for row in errors if row["dimension"] == "all"], "nmse", runs)
        notes = remarks(entries + error_entries, runs)
        table = [entry for entry in entries if entry["seeds"]]
        error_table = [entry for entry in error_entries if entry["seeds"]]
        add_probes(table, runs)

        strips = collect_strips(table, simulated, rows, args)
        plot_results(table, error_table, scores, runs, strips, out)
        evaluation = {"device": args.device}
        evaluation["time"] = f"{time.time() - begun:.0f} s, {rolled_out} episodes rolled out now"
        if table:
            episodes = f"{args.episodes} a run, task and label budget, until success; seed {args.seed}"
            evaluation["episodes"] = episodes
        report = make_report(table, errors, runs, notes, evaluation)
        atomic_write(out / "report.md", report)
        print(report)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from here")
