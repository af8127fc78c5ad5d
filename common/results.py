"""What eval.py finds and keeps on disk: finished runs, and of each its rollouts.csv and its films.

Whatever is missing, damaged or foreign ends the program with one line; nothing of it is overwritten.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from common import differences, fail
from common.shards import atomic_write, hash_of, read_json
from common.statistics import budget_order
from common.video_clips import Clips

COLUMNS = ["task", "labelled", "eval_seed", "episode", "goal", "clip", "clip_start"]
COLUMNS += ["success", "first_success_step", "return", "policy_hash"]
# Arguments in which the runs of a method may differ.
BY_RUN = ("seed", "tasks", "labelled_episodes", "stages", "data", "out", "variant")
BY_RUN += ("device", "dtype", "export")

# ---------------------------------------------------------------------------------------- runs


def find_runs(names: Sequence[str]) -> list[dict]:
    """args.json and summary.json of each run, with `dir`, `policy` (False: only probes), a policy's `env`."""
    finished = sorted(path.parent for path in Path("runs").glob("*/summary.json"))
    if not names and not finished:
        fail("no finished run in runs/; make one with: python lam_vlm.py")
    runs = {}
    for name in names or finished:
        folder = find_folder(name, finished)
        if folder.resolve() not in runs:  # one may be given twice
            run = read_run(folder)
            for other in runs.values():
                why = mixture(run, other)
                if why and run["policy"]:
                    fail(f"{why}; choose with --runs")
                if why:  # of probes alone, a remark
                    run["mixture"] = why
            runs[folder.resolve()] = run
    return list(runs.values())


def find_folder(name: str | Path, finished: list[Path]) -> Path:
    for folder in (Path(name), "runs" / Path(name)):
        if (folder / "summary.json").exists():
            return folder
    near = difflib.get_close_matches(Path(name).name, [path.name for path in finished], cutoff=0)
    fail(f"no finished run '{name}'; nearest: {', '.join(near) or 'none, runs/ is empty'}")


def read_run(folder: Path) -> dict:
    summary = read_json(folder / "summary.json")
    for key in ("variant", "seed", "tasks", "stages", "labelled_episodes", "policy_hash", "env"):
        if key not in summary:
            why = f"has no {key}: it is foreign, or of an older version"
            fail(f"{folder}/summary.json {why}; train that run again, or choose others with --runs")
    args = read_json(folder / "args.json")
    run = args | summary
    run["dir"] = folder
    run["trained"] = {name: value for name, value in args.items() if name not in BY_RUN}
    run["policy"] = bool(run["policy_hash"])  # one of each label budget
    if missing := set(map(str, run["labelled_episodes"])) - set(run["policy_hash"]):
        fail(f"{folder}/summary.json is damaged: no policy_hash for {', '.join(missing)} labelled episodes")
    run["labelled_episodes"] = sorted(map(str, run["labelled_episodes"]), key=budget_order)
    return run


def mixture(run: dict, other: dict) -> str:
    """Why a row of a table may not mix the two, which share no more than a name; empty if it may."""
    if run["policy"] != other["policy"] or run["variant"] != other["variant"]:
        return ""
    both = f"{other['dir']} and {run['dir']} are both variant '{run['variant']}'"
    shared_tasks = set(run["tasks"]) & set(other["tasks"])
    shared_budgets = set(run["labelled_episodes"]) & set(other["labelled_episodes"])
    if run["seed"] == other["seed"] and shared_tasks and (shared_budgets or not run["policy"]):
        return f"{both} with seed {run['seed']}"
    if run.get("script", "lam_vlm") != other.get("script", "lam_vlm"):
        return f"{both}, of different scripts"
    if run["data"] != other["data"]:
        return f"{both} with different data"
    if (len(run["tasks"]) > 1) != (len(other["tasks"]) > 1):
        return f"{both}, one model of several tasks and one of a single task"
    both_have = {name: value for name, value in run["trained"].items() if name in other["trained"]}
    changed = differences(other["trained"], both_have)
    if changed:
        return f"{both} with other arguments ({changed}); name one by --variant"
    mine, theirs = made_of(run), made_of(other)
    same_tasks = set(run["tasks"]) == set(other["tasks"])
    for name in mine.keys() & theirs.keys():
        if mine[name] != theirs[name] and (same_tasks or name != "shards_hash"):
            return f"{both}, and {run['data']} was made anew between them ({name}); train the older again"
    return ""


def made_of(run: dict) -> dict:
    """How a run's data were made; not an embedding's bytes, whose last digits two machines need not share."""
    embedding = dict(run.get("embedding") or {})
    for name in ("sha256", "frames_sha256", "text"):  # of the first task's first shard
        embedding.pop(name, None)
    return embedding | {name: run[name] for name in ("env", "shards_hash") if name in run}


def check_clips(run: dict) -> None:
    """Refuses a folder of backgrounds that has changed: its test clips may have been those of training."""
    env = run["env"]
    if run.get("test_clips") and env["videos"] != "none":
        names = Clips(env["videos"], "test", env["size"]).names
        if hash_of(names) != run["test_clips"]:
            fail(f"{env['videos']} has other test clips than when the data of {run['dir']} were collected")


def choose_budgets(runs: list[dict], wanted: tuple[str, ...]) -> None:
    """Leaves of each run the label budgets that --labelled names."""
    have = {budget for run in runs for budget in run["labelled_episodes"]}
    missing = [budget for budget in wanted if budget not in have]
    if have and missing:
        budgets = ", ".join(sorted(have, key=budget_order))
        fail(f"no run has a decoder for --labelled {' '.join(missing)}; there are {budgets}")
    for run in runs:
        run["labelled_episodes"] = [budget for budget in run["labelled_episodes"] if budget in wanted]


def read_bridge(out: Path) -> dict[str, dict]:
    """{target: row} of the bridge.csv that linear_lam.py may have written there, gap 1."""
    path = out / "bridge.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["target"]: row for row in csv.DictReader(file) if row["frame_gap"] == "1"}


# ---------------------------------------------------------------------------------------- episodes


def row_key(row: dict) -> tuple:
    return row["task"], row["labelled"], int(row["eval_seed"]), int(row["episode"])


def parse_rollouts(text: str) -> dict[tuple, dict]:
    """The text of rollouts.csv as {key: row}. ValueError or csv.Error on any damage."""
    lines = list(csv.reader(text.splitlines(), strict=True))
    if not text.endswith("\n") or lines[0] != COLUMNS:
        raise ValueError("foreign header or cut line")
    rows = {}
    for number, values in enumerate(lines[1:], start=2):
        row = dict(zip(COLUMNS, values, strict=True))
        success = str(int(row["first_success_step"] != ""))
        if row["success"] != success or not np.isfinite(float(row["return"])) or row_key(row) in rows:
            raise ValueError(f"line {number}")
        rows[row_key(row)] = row
    return rows


def read_rollouts(run: dict) -> dict[tuple, dict]:
    """runs/<name>/rollouts.csv as {key: row}, without the rows, and films, of an older policy."""
    path = run["dir"] / "rollouts.csv"
    if not path.exists():
        return {}
    try:
        rows = parse_rollouts(path.read_bytes().decode())
    except (ValueError, csv.Error) as error:
        fail(f"{path} is damaged ({error}); move it away and its episodes are rolled out again")
    fresh = {}
    for key, row in rows.items():
        wanted = run["policy_hash"].get(row["labelled"], "")
        policy, _, executed = row["policy_hash"].partition("-x")
        if row["policy_hash"] == wanted:
            fresh[key] = row
        elif policy == wanted.partition("-x")[0]:
            fail(f"{path} is of --execute {executed}: repeat that, or move the file away")
    if len(fresh) < len(rows):
        print(f"{path}: dropped {len(rows) - len(fresh)} episodes of another policy")
        for film in (run["dir"] / "rollouts").glob("*_seed*"):
            film.unlink()
    return fresh


def csv_text(columns: list[str], rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_rollouts(run_dir: Path, rows: dict[tuple, dict]) -> None:
    ordered = sorted(rows, key=lambda key: (key[0], budget_order(key[1]), *key[2:]))
    atomic_write(run_dir / "rollouts.csv", csv_text(COLUMNS, [rows[key] for key in ordered]))


def film_path(run_dir: Path, task: str, labelled: str, seed: int, episode: int) -> Path:
    return run_dir / "rollouts" / f"{task}_labelled{labelled}_seed{seed}_episode{episode}.npy"


def save_film(path: Path, film: np.ndarray) -> None:
    """A gif (twice the size, real time, its last frame held for a second), then the .npy for strip.png."""
    path.parent.mkdir(exist_ok=True)
    held = np.concatenate([film, film[-1:].repeat(20, axis=0)])
    large = held.repeat(2, axis=1).repeat(2, axis=2)
    atomic_write(
        path.with_suffix(".gif"), iio.imwrite("<bytes>", large, extension=".gif", duration=50, loop=0)
    )
    npy = io.BytesIO()
    np.save(npy, film, allow_pickle=False)
    atomic_write(path, npy.getvalue())
