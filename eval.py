"""Roll out every policy on unseen backgrounds, goals and seeds; make statistics, tables and pictures of the success.

    python eval.py                               every finished run in runs/ -> results/quick
    python eval.py --runs RUN RUN --episodes 5   two runs, five episodes a task
    python eval.py paper                         the paper's scale -> results/paper; every flag has its own value there

Per-episode rows are kept in runs/<name>/rollouts.csv: a killed evaluation goes on where it stopped, more --episodes
roll out the missing ones only, rows of an older policy of the run are dropped. results/<name>/ gets report.md,
scores.csv, success.png, strip.png, leak_vs_success.png and tolerance.png; gifs are in runs/<name>/rollouts/.
Statistics follow Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (rliable), in plain numpy.
"""

import csv
import difflib
import fcntl
import functools
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike
from tqdm import tqdm

from collect import DistractingMetaWorld
from lam_vlm import load_policy


@dataclass
class Args:
    runs: tuple[str, ...] = ()
    """run folders to evaluate, by name or path; none given: every finished run in runs/"""
    episodes: int = 50
    """episodes for each run, task and label budget"""
    labelled: tuple[str, ...] = ()
    """label budgets to roll out, of those that a run has; none given: all"""
    seed: int = 0
    """seed of the evaluation's goals, clips and start frames (never those of the training data)"""
    envs: int = 5
    """environments stepped in lockstep with one batched policy call"""
    workers: int = 0
    """processes (0: one per core; 1: all in this process, which shows the full trace of an error)"""
    device: str = "cpu"
    """torch device of the policies"""
    media: int = 2
    """recorded episodes of each run and task, at the run's lowest label budget (0: no gif and no strip)"""
    out: str = "results/quick"
    """folder of the report, the scores and the figures"""


PRESETS = {"quick": Args(), "paper": Args(episodes=100, device="cuda", media=1, out="results/paper")}
COLUMNS = "task labelled eval_seed episode goal clip clip_start success first_success_step return policy_hash".split()
SCORES = "method task seed episodes success labelled".split()
FILM_STRIDE = 4  # environment steps between recorded frames: MetaWorld runs at 80 Hz, so 20 frames a second

# ---------------------------------------------------------------- statistics


def checked(scores: ArrayLike, tasks: Sequence[str] | None = None, ndim: tuple[int, ...] = (2,)) -> np.ndarray:
    """Scores as a float array, or a ValueError of one line."""
    try:
        scores = np.asarray(scores, dtype=float)
    except (ValueError, TypeError):
        raise ValueError("the scores are ragged or not numbers: every task needs the same number of runs") from None
    if scores.size == 0 or np.isnan(scores).any():
        raise ValueError(f"the scores of shape {scores.shape} are empty or contain NaN")
    if scores.ndim not in ndim:
        raise ValueError(f"expected a matrix (runs, tasks), got shape {scores.shape}")
    if tasks is not None and len(tasks) != scores.shape[1]:
        raise ValueError(f"expected (runs, tasks) with {len(tasks)} tasks, got {scores.shape}; did you swap the axes?")
    return scores


def iqm(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Interquartile mean, the mean of the middle 50 % (Agarwal et al. 2021, section 4.3), of all runs x tasks or along the last axis (-1).

    A quarter of the entries, rounded down, is cut on either side, as in scipy.stats.trim_mean(scores, 0.25, axis). ValueError on NaN.
    """
    scores = np.sort(checked(scores, ndim=(1, 2)), axis=axis)  # axis=None flattens
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def stratified_bootstrap_ci(
    scores: ArrayLike, reps: int = 50_000, level: float = 0.95, seed: int = 0, statistic: Callable = iqm, tasks: Sequence[str] | None = None
) -> tuple[float, float] | None:
    """Percentile interval of a statistic of a (runs, tasks) matrix (Agarwal et al. 2021, section 4.1); None for one run.

    `statistic` maps (replicates, runs * tasks) to (replicates,) with axis=-1: iqm, np.mean, np.median. ValueError on ragged, empty, NaN or
    not two-dimensional scores, or if axis 1 does not fit the names in `tasks`: give them, for no shape alone tells that axes are swapped.
    """
    return bootstrap(lambda x: statistic(x.reshape(len(x), -1), axis=-1), [checked(scores, tasks)], reps, level, seed)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run of x and one of y on the same task, mean over tasks (Mann-Whitney; Agarwal et al. 2021).

    x: (runs, tasks), y: (other runs, the same tasks). ValueError as above."""
    return float(win_rate(checked(x), checked(y)))


def probability_of_improvement_ci(x: ArrayLike, y: ArrayLike, reps: int = 50_000, level: float = 0.95, seed: int = 0) -> tuple | None:
    """Percentile interval of the above: x and y are resampled independently. None if either has one run."""
    return bootstrap(win_rate, [checked(x), checked(y)], reps, level, seed)


def win_rate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"expected (runs, tasks) of the same tasks, got {x.shape[-1]} and {y.shape[-1]} tasks")
    x, y = x[..., :, None, :], y[..., None, :, :]  # all pairs of runs
    return (x > y).mean(axis=(-3, -2, -1)) + 0.5 * (x == y).mean(axis=(-3, -2, -1))


def bootstrap(statistic: Callable, matrices: list[np.ndarray], reps: int, level: float, seed: int) -> tuple[float, float] | None:
    """A replicate draws, in each (runs, tasks) matrix and each task of it independently, as many runs as there are, with replacement."""
    if min(map(len, matrices)) == 1:
        return None
    rng, values, chunk = np.random.default_rng(seed), [], max(1, 2_000_000 // np.prod([m.size for m in matrices]))  # bounds the memory
    for start in range(0, reps, chunk):
        draws = [rng.integers(len(m), size=(min(chunk, reps - start), *m.shape)) for m in matrices]
        values.append(statistic(*(m[draw, np.arange(m.shape[1])] for m, draw in zip(matrices, draws, strict=True))))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---------------------------------------------------------------- runs and files


def find_runs(names: Sequence[str]) -> list[dict]:
    """One dict a run: its args.json and summary.json, `name`, `dir` and `policy` (False: only probes to list)."""
    known = sorted(path.parent for path in Path("runs").glob("*/summary.json"))
    if not names and not known:
        raise SystemExit("eval.py: no finished run in runs/; make one with: python lam_vlm.py")
    runs = {}
    for name in names or known:
        folder = next((path for path in (Path(name), "runs" / Path(name)) if (path / "summary.json").exists()), None)
        if folder is None:
            near = ", ".join(difflib.get_close_matches(Path(name).name, [path.name for path in known], cutoff=0))
            raise SystemExit(f"eval.py: no finished run '{name}'; nearest: {near or 'none, runs/ is empty'}")
        if folder.resolve() in runs:  # given twice
            continue
        run = read_json(folder / "args.json", "data") | read_json(folder / "summary.json", "arm", "seed", "tasks", "stages")
        run |= {"name": folder.resolve().name, "dir": folder}
        run["policy"] = bool(run.get("policy_hash"))  # of each label budget
        run["labelled_episodes"] = sorted(map(str, run.get("labelled_episodes", ())), key=budget_order)
        for other in runs.values():  # a row of the table may not mix runs that only share a name
            shared = all(set(run[key]) & set(other[key]) for key in ("tasks", "labelled_episodes"))
            twice = run["seed"] == other["seed"] and shared
            if run["policy"] and other["policy"] and run["arm"] == other["arm"] and (twice or run["data"] != other["data"]):
                what = f"seed {run['seed']}" if twice else "different data"
                raise SystemExit(f"eval.py: {other['dir']} and {folder} are both arm '{run['arm']}' with {what}; choose with --runs")
        runs[folder.resolve()] = run
    return list(runs.values())


def read_json(path: Path, *keys: str) -> dict:
    try:
        content = json.loads(path.read_text())
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"eval.py: {path} is missing, damaged or foreign: {type(error).__name__} {error}") from None


def budget_order(labelled: str) -> tuple:
    """Label budgets by size, "all" last."""
    return (not labelled.isdigit(), int(labelled) if labelled.isdigit() else 0, labelled)


def row_key(row: dict) -> tuple:
    return row["task"], budget_order(row["labelled"]), int(row["eval_seed"]), int(row["episode"])


def read_rollouts(run: dict) -> dict[tuple, dict]:
    """runs/<name>/rollouts.csv as {key: row}; drops the rows, and films, of an older policy; refuses a damaged file."""
    path, rows = run["dir"] / "rollouts.csv", {}
    try:
        text = path.read_bytes().decode() if path.exists() else csv_text(COLUMNS, [])
        lines = csv.reader(text.splitlines(), strict=True)
        if next(lines, None) != COLUMNS or not text.endswith("\n"):
            raise ValueError("foreign header or cut line")
        for number, values in enumerate(lines, start=2):
            row = dict(zip(COLUMNS, values, strict=True))
            if row_key(row) in rows or not np.isfinite(float(row["return"])) or row["success"] != str(int(row["first_success_step"] != "")):
                raise ValueError(f"line {number}")
            rows[row_key(row)] = row
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"eval.py: {path} is damaged ({error}); move it away and its episodes are rolled out again") from None
    fresh = {key: row for key, row in rows.items() if row["policy_hash"] == run["policy_hash"].get(row["labelled"])}
    if len(fresh) < len(rows):
        print(f"{path}: dropped {len(rows) - len(fresh)} episodes of an older policy")
        for film in (run["dir"] / "rollouts").glob("*_seed*"):
            film.unlink()
    return fresh


def csv_text(columns: list[str], rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def atomic_write(path: Path, data: bytes | str) -> None:
    """Whenever it is killed, `path` is the old file or the new one, never a part. Only for folders that this process has locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"eval.py: cannot write {path}: {error.strerror}") from None


def lock(folder: Path, stack: ExitStack) -> None:
    """Hold a folder until the stack closes; the kernel lets go of it however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.flock(stack.enter_context((folder / ".eval.lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"eval.py: another eval.py is writing to {folder}; wait for it, or choose other --runs and --out") from None


# ---------------------------------------------------------------- rollouts


class Block(NamedTuple):
    """Episodes of one run, task and label budget, stepped in lockstep: the unit of work, and the most that a kill can lose."""

    run: dict
    task: str
    labelled: str
    env: str  # arguments of the environment, as JSON
    args: Args
    episodes: list[int]
    filmed: list[int]  # those that are recorded


ENVS: dict[tuple, DistractingMetaWorld] = {}  # of one task and data set: a process keeps them from block to block


def make_env(task: str, env: str, seed: int, lane: int) -> DistractingMetaWorld:
    if ENVS and next(iter(ENVS))[:3] != (task, env, seed):
        close_envs()
    if (task, env, seed, lane) not in ENVS:
        ENVS[task, env, seed, lane] = DistractingMetaWorld(task, split="test", seed=seed, **json.loads(env))
    return ENVS[task, env, seed, lane]


def close_envs() -> None:
    while ENVS:
        ENVS.popitem()[1].close()


@functools.lru_cache(maxsize=1)
def make_policy(run_dir: str, policy_hash: str, labelled: str, device: str) -> Callable:
    return load_policy(run_dir, labelled=labelled, device=device)


def roll_out_block(block: Block) -> tuple[list[dict], dict[int, np.ndarray]]:
    """Rows, and {episode: film (T, H, W, 3) uint8}. An episode ends at its first success or at the step limit.

    Episode e always has lane e % envs and the batch always its full size (a free lane is black, a finished one keeps its last frames): an
    episode's result must not depend on which others were left to do, and a network may round by batch size.
    """
    torch.set_num_threads(1)  # the processes share the cores
    run, args = block.run, block.args
    policy = make_policy(str(run["dir"]), run["policy_hash"][block.labelled], block.labelled, args.device)
    lanes = {episode: episode % args.envs for episode in block.episodes}
    envs = {lane: make_env(block.task, block.env, args.seed, lane) for lane in lanes.values()}
    rows, films, returns, frames = {}, {}, defaultdict(float), None
    for episode, lane in lanes.items():
        frame, info = envs[lane].reset(options={"episode": episode})
        frames = np.zeros((args.envs, policy.frame_stack, *frame.shape), np.uint8) if frames is None else frames
        frames[lane] = frame  # at the start, the first frame K times
        films[episode] = [frame]
        start = (block.task, block.labelled, args.seed, episode, info["goal"], info["clip"], info["clip_frame"])
        rows[episode] = dict(zip(COLUMNS[:7], map(str, start), strict=True))
    step = 0
    while lanes:
        actions, step = policy(frames), step + 1
        if not np.isfinite(actions).all():
            raise ValueError(f"the policy's action is not finite at step {step}")
        for episode, lane in list(lanes.items()):
            frame, reward, _, truncated, info = envs[lane].step(actions[lane])
            frames[lane] = np.concatenate([frames[lane, 1:], frame[None]])
            returns[episode] += float(reward)
            success = bool(info["success"])
            if episode in block.filmed and (step % FILM_STRIDE == 0 or success or truncated):
                films[episode].append(frame)
            if success or truncated:
                end = (str(int(success)), str(step) if success else "", f"{returns[episode]:.6g}", run["policy_hash"][block.labelled])
                rows[episode] |= dict(zip(COLUMNS[-4:], end, strict=True))
                del lanes[episode]
    return list(rows.values()), {episode: np.stack(films[episode]) for episode in block.filmed}


def plan_blocks(run: dict, rows: dict[tuple, dict], args: Args) -> list[Block]:
    """What is missing of the run: episodes without a row, or without the film that they should have."""
    meta = Path(run["data"]) / "meta.json"
    if not meta.exists():
        command = {"quick": "collect.py", "paper": "collect.py paper"}.get(meta.parent.name, f"collect.py --out {run['data']}")
        raise SystemExit(f"eval.py: no {meta}, the data set of {run['dir']}; make it with: python {command}")
    env = json.dumps(read_json(meta, "env")["env"])  # the environment of the data set, so that training and evaluation cannot drift apart
    blocks = []
    for task in run["tasks"]:
        for labelled in run["labelled_episodes"]:
            media = args.media if labelled == run["labelled_episodes"][0] else 0
            filmed = {e for e in range(min(media, args.episodes)) if not film_path(run, task, args.seed, e).exists()}
            todo = filmed | {e for e in range(args.episodes) if (task, budget_order(labelled), args.seed, e) not in rows}
            for start in range(0, args.episodes, args.envs):
                if episodes := sorted(todo & set(range(start, start + args.envs))):
                    blocks.append(Block(run, task, labelled, env, args, episodes, sorted(filmed & set(episodes))))
    return blocks


def film_path(run: dict, task: str, seed: int, episode: int) -> Path:
    """Films are of the lowest label budget; one with a lower budget may come later."""
    return run["dir"] / "rollouts" / f"{task}_labelled{run['labelled_episodes'][0]}_seed{seed}_episode{episode}.npy"


def save_film(path: Path, film: np.ndarray) -> None:
    """A gif (twice the size, real time, its last frame held for a second), then the .npy from which strip.png is drawn."""
    gif = np.concatenate([film, film[-1:].repeat(20, axis=0)]).repeat(2, axis=1).repeat(2, axis=2)
    atomic_write(path.with_suffix(".gif"), iio.imwrite("<bytes>", gif, extension=".gif", duration=50, loop=0))
    npy = io.BytesIO()
    np.save(npy, film, allow_pickle=False)
    atomic_write(path, npy.getvalue())


def roll_out(runs: list[dict], args: Args) -> tuple[dict[str, dict], int]:
    """Roll out what is missing; returns {run: its rows} and the number of episodes done now. Films are written before their rows, all rows
    sorted after each block: whenever it is killed, the same command makes the same files."""
    rows = {run["dir"]: read_rollouts(run) for run in runs}
    blocks = [block for run in runs for block in plan_blocks(run, rows[run["dir"]], args)]
    blocks.sort(key=lambda block: (block.task, block.env))  # so that a process builds the environments of a task once
    count = sum(len(block.episodes) for block in blocks)
    with tqdm(total=count, desc="rollouts", unit="episode", smoothing=0, disable=not blocks) as bar:
        for block, (new, films) in run_blocks(blocks, args.workers):
            for episode, film in films.items():
                save_film(film_path(block.run, block.task, args.seed, episode), film)
            mine = rows[block.run["dir"]]
            mine |= {row_key(row): row for row in new}
            atomic_write(block.run["dir"] / "rollouts.csv", csv_text(COLUMNS, [mine[key] for key in sorted(mine)]))
            bar.update(len(new))
    return rows, count


def run_blocks(blocks: list[Block], workers: int) -> Iterator[tuple[Block, tuple]]:
    """(block, result) in the order of completion. A block that fails ends the program with one line."""
    if workers == 1 or not blocks:
        yield from ((block, roll_out_block(block)) for block in blocks)
        return close_envs()  # a renderer that is left to the interpreter's exit complains
    workers = min(workers or len(os.sched_getaffinity(0)), len(blocks))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    futures = {pool.submit(roll_out_block, block): block for block in blocks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except Exception as error:
        block, line = futures[future], str(error).strip().split("\n")[0]
        what = f"{block.run['dir']}, {block.task}, {block.labelled} labelled, episodes {block.episodes[0]}-{block.episodes[-1]}"
        raise SystemExit(f"eval.py: {what}: {type(error).__name__}: {line} (--workers 1 shows the trace)") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # a block in hand may take minutes
            process.terminate()


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()  # if it is killed, its workers would wait for ever for their next block
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------- tables


def score_rows(runs: list[dict], rows: dict[Path, dict], args: Args) -> list[dict]:
    """The rows of scores.csv: success over the episodes asked for, by run, label budget and task."""
    scores = []
    for run, labelled, task in [(r, labelled, task) for r in runs for labelled in r["labelled_episodes"] for task in r["tasks"]]:
        keys = [(task, budget_order(labelled), args.seed, episode) for episode in range(args.episodes)]
        success = float(np.mean([int(rows[run["dir"]][key]["success"]) for key in keys]))
        scores.append(dict(zip(SCORES, (run["arm"], task, run["seed"], args.episodes, success, labelled), strict=True)))
    return sorted(scores, key=lambda row: (row["method"], budget_order(row["labelled"]), row["task"], row["seed"]))


def summarise(scores: list[dict], runs: list[dict]) -> tuple[list[dict], list[str]]:
    """One entry for every method and label budget, from its (runs, tasks) matrix over the seeds common to its tasks; and remarks."""
    table, notes, cells = [], [], defaultdict(lambda: defaultdict(dict))
    for row in scores:
        cells[row["method"], row["labelled"]][row["task"]][row["seed"]] = row["success"]
    for (method, labelled), tasks in cells.items():
        seeds = sorted(set.intersection(*map(set, tasks.values())))
        if len(seeds) < len(set().union(*tasks.values())):
            notes.append(f"{method} ({labelled} labelled): only seeds common to all its tasks are counted: {seeds or 'none, left out'}.")
        if not seeds:
            continue
        matrix = np.array([[by_seed[seed] for by_seed in tasks.values()] for seed in seeds])
        mine = [run for run in runs if run["policy"] and run["arm"] == method and run["seed"] in seeds]
        entry = {"method": method, "labelled": labelled, "tasks": list(tasks), "matrix": matrix, "iqm": float(iqm(matrix))}
        entry |= {"iqm_ci": stratified_bootstrap_ci(matrix, tasks=list(tasks))}
        entry |= {"mean_ci": stratified_bootstrap_ci(matrix, tasks=list(tasks), statistic=np.mean)}
        table.append(entry | {"nmse": probe(mine, "action_probe_nmse"), "leak": probe(mine, "leak_probe_r2")})
    if len({tuple(entry["tasks"]) for entry in table}) > 1:
        notes.append("The methods were run on different tasks: their IQM and mean cannot be compared.")
    if any(len(entry["matrix"]) == 1 for entry in table):
        notes.append("One run gives no CI: the spread between training seeds is unknown.")
    lams = [run for run in runs if "lam" in run["stages"] and run.get("target") == "embedding"]
    if any(str(run.get("encoder")).startswith("oracle") for run in lams):
        notes.append("Encoder `oracle` answers the prompt from the simulator's segmentation: an upper bound, not a VLM.")
    return sorted(table, key=lambda e: (budget_order(e["labelled"]), -e["iqm"], -e["matrix"].mean(), e["method"])), notes


def probe(runs: list[dict], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return float(np.mean(values)) if values else None


PROBES = ("action_probe_nmse", "leak_probe_r2", "state_probe_r2")


def rank_targets(runs: list[dict]) -> dict[str, list[dict]]:
    """{method: its runs without a policy}, by their mean action-probe NMSE."""
    methods = defaultdict(list)
    for run in runs:
        if not run["policy"]:
            methods[run["arm"]].append(run)
    order = {method: probe(mine, "action_probe_nmse") for method, mine in methods.items()}
    return dict(sorted(methods.items(), key=lambda item: (order[item[0]] is None, order[item[0]], item[0])))


def number(value: float | None, interval: tuple[float, float] | None = None) -> str:
    return ("–" if value is None else f"{value:.2f}") + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * len(header), *rows)) + "\n"


def make_report(table: list[dict], notes: list[str], runs: list[dict], facts: dict[str, str]) -> str:
    title = "Success on unseen backgrounds, goals and seeds" if table else "Targets by the probes of stage 1"
    text, tasks = f"# {title}\n\n", sorted({task for e in table for task in e["tasks"]})
    rows, better = [], []
    for e in table:
        per_task = dict(zip(e["tasks"], e["matrix"].mean(axis=0), strict=True))
        cells = [e["method"], e["labelled"], number(e["nmse"]), number(e["leak"]), number(e["iqm"], e["iqm_ci"])]
        cells += [number(e["matrix"].mean(), e["mean_ci"]), *(number(per_task.get(task)) for task in tasks)]
        rows.append([*cells, str(len(e["matrix"])) + ("" if e["iqm_ci"] else " (no CI)")])
        for base in table:
            if base["method"] == "lapo" != e["method"] and e["nmse"] is not None and all(e[k] == base[k] for k in ("labelled", "tasks")):
                x, y = e["matrix"], base["matrix"]
                better.append([e["method"], e["labelled"], number(probability_of_improvement(x, y), probability_of_improvement_ci(x, y))])
    if rows:
        text += markdown_table(["method", "labelled", "probe NMSE", "leak R²", "success IQM", "mean", *tasks, "n runs"], rows)
        text += "Brackets: 95 % stratified-bootstrap CI (50 000 replicates, runs resampled within each task; Agarwal et al. 2021).\n"
        text += "IQM: mean of the middle half of all runs x tasks. Probes: on held-out episodes, mean over the runs.\n\n"
    if better:
        text += "## Probability of improvement over lapo\n\n" + markdown_table(["method", "labelled", "P [95 % CI]"], better)
    if probed := rank_targets(runs):
        rows = [[method, *(number(probe(mine, name)) for name in PROBES), str(len(mine))] for method, mine in probed.items()]
        text += "## Runs without a policy, best target first\n\n"
        text += markdown_table(["method", "probe NMSE", "leak R²", "state R²", "n runs"], rows)
    if notes:
        text += "## Remarks\n\n" + "".join(f"- {note}\n" for note in notes) + "\n"
    return text + "## Facts\n\n" + "".join(f"- {name}: {value}\n" for name, value in facts.items())


def gather_facts(runs: list[dict], args: Args, rolled_out: int, seconds: float) -> dict[str, str]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")), platform.machine())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "episodes": f"{args.episodes} for each run, task and label budget (seed {args.seed}), to the first success or the step limit",
        "runs": ", ".join(run["name"] for run in runs),
        "data": ", ".join(sorted({str(run["data"]) for run in runs})),
        "commit": git.stdout.strip() or "none",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "mujoco", "metaworld", "numpy")),
        "hardware": f"{model}, {os.cpu_count()} cores, policies on {args.device}",
        "time": f"{seconds:.0f} s, {rolled_out} episodes rolled out now",
    }


# ---------------------------------------------------------------- figures

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe and Ito: colour-blind-safe
MARKERS = "osD^vP*X"
GOOD, BAD = "#009E73", "#D55E00"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}


def look(table: list[dict], method: str) -> dict[str, str]:
    """Colour and marker of a method, the same in every figure."""
    place = sorted({e["method"] for e in table}).index(method)
    return {"color": COLOURS[place % 8], "marker": MARKERS[(place + place // 8) % 8]}


def shared_budgets(table: list[dict], methods: Collection[str]) -> list[str]:
    """Label budgets that several of these methods have, for one alone makes no curve and shows no relation; all, if none is shared."""
    count = Counter(e["labelled"] for e in table if e["method"] in methods)  # the table has a row for each method and budget
    return sorted([budget for budget in count if count[budget] > 1] or count, key=budget_order)


def save_figure(figure: plt.Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)
    atomic_write(path, png.getvalue())


@plt.rc_context(STYLE)
def draw_success(table: list[dict], path: Path) -> None:
    """IQM with CI against the label budget; faint dots are single runs, a dashed line marks what all labels give.

    More methods than there are colours get a row each, the best at the top, and the budgets the colours.
    """
    budgets, methods = sorted({e["labelled"] for e in table}, key=budget_order), sorted({e["method"] for e in table})
    label = "success, IQM with 95 % CI" if any(e["iqm_ci"] for e in table) else "success, IQM (one run: no CI)"
    if len(methods) > len(COLOURS):
        methods = list(dict.fromkeys(e["method"] for e in table))[::-1]  # the table is sorted by budget and success
        figure, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(methods)))
        for i, budget in enumerate(budgets):
            mine = [e for e in table if e["labelled"] == budget]
            y = [methods.index(e["method"]) + 0.6 * (0.5 - (i + 0.5) / len(budgets)) for e in mine]
            axes.scatter([e["iqm"] for e in mine], y, s=20, color=COLOURS[i % 8], marker=MARKERS[i % 8], label=f"{budget} labelled")
            for at, e in zip(y, mine, strict=True):
                if e["iqm_ci"]:
                    axes.plot(e["iqm_ci"], [at, at], color=COLOURS[i % 8], alpha=0.6)
        axes.set(yticks=range(len(methods)), yticklabels=methods, ylim=(-0.6, len(methods) - 0.4), xlim=(-0.03, 1.03), xlabel=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
        return save_figure(figure, path)
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(budgets), 4))
    for i, method in enumerate(methods):
        style, entries = look(table, method), [e for e in table if e["method"] == method]  # the table is sorted by budget
        dodge = 0.5 * ((i + 0.5) / len(methods) - 0.5)  # intervals side by side
        for e in entries:
            x = budgets.index(e["labelled"]) + dodge
            axes.scatter([x] * len(e["matrix"]), e["matrix"].mean(axis=1), s=12, color=style["color"], alpha=0.35, linewidths=0)
            if e["iqm_ci"]:
                axes.plot([x, x], e["iqm_ci"], color=style["color"], linewidth=2, alpha=0.8, solid_capstyle="round")
            if e["labelled"] == "all" and len(budgets) > 1:
                axes.axhline(e["iqm"], color=style["color"], linestyle="--", linewidth=1, alpha=0.6, zorder=0)
        axes.plot([budgets.index(e["labelled"]) + dodge for e in entries], [e["iqm"] for e in entries], **style, linewidth=1, label=method)
    axes.set(xticks=range(len(budgets)), xticklabels=budgets, xlabel="labelled episodes", ylim=(-0.03, 1.03))
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    axes.set_ylabel(label)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


@plt.rc_context(STYLE)
def draw_leak(table: list[dict], runs: list[dict], scores: list[dict], path: Path) -> None:
    """How much of the background a run's latents explain, against its success; a panel for each label budget."""
    shown = {e["method"] for e in table}  # not all: --labelled leaves some out, and so does a seed that the tasks do not share
    lams = [run for run in runs if run["policy"] and run["arm"] in shown and run.get("leak_probe_r2") is not None]
    if len(lams) < 2:
        return
    budgets, handles = shared_budgets(table, {run["arm"] for run in lams}), {}
    figure, panels = plt.subplots(1, len(budgets), figsize=(1 + 3.2 * len(budgets), 3.2), sharey=True, squeeze=False)
    for axes, budget in zip(panels[0], budgets, strict=True):
        for run in (run for run in lams if budget in run["labelled_episodes"]):
            mine = [row for row in scores if (row["method"], row["seed"], row["labelled"]) == (run["arm"], run["seed"], budget)]
            success = np.mean([row["success"] for row in mine if row["task"] in run["tasks"]])
            style = look(table, run["arm"])
            handles[run["arm"]] = axes.scatter(run["leak_probe_r2"], success, s=45, alpha=0.8, linewidths=0, clip_on=False, **style)
        axes.set(title=f"{budget} labelled episodes", xlabel="leak $R^2$ (background explained)", ylabel="success", ylim=(-0.03, 1.03))
        axes.label_outer()
    columns = math.ceil(len(handles) / 12)
    panels[0, -1].legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.03, 0.5), ncols=columns)
    save_figure(figure, path)


@plt.rc_context(STYLE)
def draw_tolerance(table: list[dict], runs: list[dict], path: Path) -> None:
    """How clean a target must be: success and probes against the fraction of the background that the oracle's best prompt lets through."""
    kept, shown = {}, {e["method"] for e in table}
    for run in runs:
        about = run.get("embedding") or {}
        name, _, alpha = str(about.get("encoder")).partition("-a")
        default_arm = run["arm"] == f"lapo-{about.get('encoder')}"  # other arms of the same target vary something else
        if name == "oracle" and about.get("prompt") == "best" and run["arm"] in shown and default_arm:
            kept.setdefault(run["arm"], float(alpha or 0))
    if len(set(kept.values())) < 3:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    place = {alpha: x for x, alpha in enumerate(sorted(set(kept.values())))}  # even steps: the fractions span decades
    budgets = shared_budgets(table, kept)
    for i, budget in enumerate(budgets):
        mine = sorted((e for e in table if e["method"] in kept and e["labelled"] == budget), key=lambda e: kept[e["method"]])
        x = [place[kept[e["method"]]] + 0.06 * (i - (len(budgets) - 1) / 2) for e in mine]
        left.plot(x, [e["iqm"] for e in mine], MARKERS[i % 8] + "-", color=COLOURS[i % 8], label=f"{budget} labelled")
        for at, e in zip(x, mine, strict=True):
            if e["iqm_ci"]:
                left.plot([at, at], e["iqm_ci"], color=COLOURS[i % 8], alpha=0.6)
    for i, (name, label) in enumerate((("action_probe_nmse", "action probe NMSE"), ("leak_probe_r2", "leak $R^2$"))):
        points = [(place[kept[run["arm"]]], run[name]) for run in runs if run["arm"] in kept and run.get(name) is not None]
        right.scatter(*zip(*points), s=12, color=COLOURS[i], alpha=0.5, linewidths=0)
        means = [np.mean([value for at, value in points if at == x]) for x in sorted({at for at, _ in points})]
        right.plot(sorted({at for at, _ in points}), means, "o-", color=COLOURS[i], label=label)
    for axes in (left, right):
        axes.set(xticks=list(place.values()), xticklabels=[f"{alpha:g}" for alpha in place], ylim=(-0.03, 1.03))
        axes.set_xlabel("fraction of the background kept in the target")
        axes.legend(fontsize=8)
    left.set_ylabel("success, IQM with 95 % CI")
    save_figure(figure, path)


@plt.rc_context({"axes.grid": False})
def draw_probes(runs: list[dict], path: Path) -> None:
    """Heat map of the action-probe NMSE of all embedding targets: encoder and prompt x layer and pool, mean over seeds."""
    cells = defaultdict(list)
    for run in runs:
        if (about := run.get("embedding")) and run.get("action_probe_nmse") is not None:
            where = f"{about['encoder']}: {textwrap.shorten(about['prompt'], 40)}", f"layer {about['layer']}, {about['pool']}"
            cells[where].append(run["action_probe_nmse"])
    if len(cells) < 2:
        return
    rows, columns = (sorted({cell[k] for cell in cells}) for k in (0, 1))
    grid = np.array([[np.mean(cells.get((row, column), np.nan)) for column in columns] for row in rows])
    figure, axes = plt.subplots(figsize=(4 + 0.8 * len(columns), 1.5 + 0.35 * len(rows)), layout="constrained")
    picture = axes.imshow(grid, vmin=0.4, vmax=1, cmap="viridis_r", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.7 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(picture, label="action-probe NMSE")
    save_figure(figure, path)


@plt.rc_context(STYLE | {"axes.grid": False})
def draw_strip(table: list[dict], runs: list[dict], rows: dict[Path, dict], args: Args, path: Path, columns: int = 8) -> None:
    """One episode (same goal, same background) by each method's first run at its lowest label budget, at the same times."""
    task, strips = table[0]["tasks"][0], []
    for method in dict.fromkeys(e["method"] for e in table):
        run = min((run for run in runs if run["arm"] == method and task in run["tasks"]), key=lambda run: run["seed"], default=None)
        if run and args.media and film_path(run, task, args.seed, 0).exists():
            film = np.load(film_path(run, task, args.seed, 0), allow_pickle=False)
            row = rows[run["dir"]][task, budget_order(run["labelled_episodes"][0]), args.seed, 0]
            strips.append((f"{method} ({row['labelled']} labelled)", film, int(row["first_success_step"] or 0)))
    if not strips:
        return
    last = max(success or (len(film) - 1) * FILM_STRIDE for _, film, success in strips if success or not any(s for *_, s in strips))
    steps = np.linspace(0, last, columns).round().astype(int)
    figure, axes = plt.subplots(len(strips), columns, figsize=(1.1 * columns, 1.16 * len(strips)), squeeze=False)
    for line, (name, film, success) in zip(axes, strips, strict=True):
        for panel, step in zip(line, steps, strict=True):
            over = 0 < success <= step  # the frame of the success stays, faded
            panel.imshow(film[-1 if over else min(round(step / FILM_STRIDE), len(film) - 1)], alpha=0.4 if 0 < success < step else 1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(visible=bool(over), color=GOOD, linewidth=2)
            if line[0] is axes[0, 0]:
                panel.set_title(f"step {step}", fontsize=8)
        outcome, colour = (f"✓ success at step {success}", GOOD) if success else ("✗ no success", BAD)
        line[0].text(-0.08, 0.62, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
        line[0].text(-0.08, 0.36, outcome, transform=line[0].transAxes, ha="right", va="center", fontsize=8, color=colour)
    figure.subplots_adjust(wspace=0.04, hspace=0.06)
    save_figure(figure, path)


# ---------------------------------------------------------------- main


def parse(arguments: Sequence[str]) -> Args:
    preset, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in PRESETS else ("quick", arguments)
    args = tyro.cli(Args, default=PRESETS[preset], args=rest, description=__doc__, prog=f"eval.py [{'|'.join(PRESETS)}]")
    for name, least in {"episodes": 1, "envs": 1, "workers": 0, "media": 0, "seed": 0}.items():
        if getattr(args, name) < least:
            raise SystemExit(f"eval.py: --{name} must be at least {least}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("eval.py: torch finds no CUDA device; add --device cpu")
    return args


def main(args: Args) -> None:
    start, out, runs = time.time(), Path(args.out), find_runs(args.runs)
    if args.labelled:
        have = sorted({budget for run in runs for budget in run["labelled_episodes"]}, key=budget_order)
        for run in runs:
            run["labelled_episodes"] = [budget for budget in run["labelled_episodes"] if budget in args.labelled]
        if have and not any(run["labelled_episodes"] for run in runs):
            raise SystemExit(f"eval.py: no run has a decoder for --labelled {' '.join(args.labelled)}; there are {', '.join(have)}")
    with ExitStack() as locks:
        for folder in (out, *(run["dir"] for run in runs)):
            lock(folder, locks)

        # every run with a policy plays the same episodes: test clips and goals, one seed
        with_policy = [run for run in runs if run["policy"] and run["labelled_episodes"]]
        rows, rolled_out = roll_out(with_policy, args)

        # success of each run and task; then IQM, mean and CIs over (runs x tasks) of each method and label budget
        scores = score_rows(with_policy, rows, args)
        table, notes = summarise(scores, runs)
        atomic_write(out / "scores.csv", csv_text(SCORES, scores))

        for name in ("success.png", "leak_vs_success.png", "tolerance.png", "strip.png", "probes.png"):
            (out / name).unlink(missing_ok=True)  # of other runs; not all of them are drawn each time
        draw_probes(runs, out / "probes.png")
        if table:
            draw_success(table, out / "success.png")
            draw_leak(table, runs, scores, out / "leak_vs_success.png")
            draw_tolerance(table, runs, out / "tolerance.png")
            draw_strip(table, with_policy, rows, args, out / "strip.png")
        report = make_report(table, notes, runs, gather_facts(runs, args, rolled_out, time.time() - start))
        atomic_write(out / "report.md", report)
        print(report)


if __name__ == "__main__":
    try:
        plt.switch_backend("Agg")  # needs no screen
        main(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("eval.py: stopped; the same command goes on from here") from None
