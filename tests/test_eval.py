"""eval.py: statistics against hand values and scipy; rollouts, resume, locks and refusals with stand-ins for environment and policy."""

import ast
import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import eval as ev
from eval import Args, iqm, probability_of_improvement, probability_of_improvement_ci, stratified_bootstrap_ci

# The stand-ins check eval.py: a frame carries (episode, time), the policy answers with what it saw first and last in its stack, and the
# environment refuses an action that does not come from its own frames, K steps deep, oldest first. Episode e succeeds at step 5 + e % 7,
# every third one never, unless the policy is "good". The reward depends on the lane in the batch, as a real policy's rounding may.
STANDINS = {
    "collect.py": """
import os, pathlib, time
import numpy as np

LOG = []  # (task, episode) of each reset, and "open" for each environment that is

class DistractingMetaWorld:
    def __init__(self, task, videos="generated", split="train", size=64, camera="corner2", camera_distance=0.0, max_steps=200, seed=0):
        assert split == "test" and videos == "none", "the environment is not that of the data set, or not its test split"
        self.task, self.size, self.max_steps, self.seed = task, size, max_steps, seed
        pathlib.Path(f"worker{os.getpid()}.pid").touch()
        LOG.append("open")

    def observe(self):
        frame = np.full((self.size, self.size, 3), (10 * self.time) % 256, np.uint8)
        frame[0, 0] = (self.episode, self.time, 7)
        info = {"episode": self.episode, "goal": self.episode + 100, "clip": 3, "clip_frame": 40 + self.time}
        return frame, info | {"success": self.success}

    def reset(self, seed=None, options=None):
        LOG.append((self.task, options["episode"]))
        self.episode, self.time, self.success = options["episode"], 0, False
        return self.observe()

    def step(self, action):
        if os.environ.get("FAIL") == str(self.episode):
            raise RuntimeError("boom\\nsecond line")
        time.sleep(float(os.environ.get("SLEEP", 0)))
        expected = np.array([self.episode, max(self.time - 2, 0), self.time]) / 255
        assert action.shape == (4,) and np.allclose(action[:3], expected), f"{action} is not {expected}"
        self.time += 1
        self.success |= self.time == 5 + self.episode % 7 and (self.episode % 3 > 0 or action[3] > 0.5)
        frame, info = self.observe()
        return frame, 0.5 + self.seed + action[3] % 0.5, False, self.time >= self.max_steps, info

    def close(self):
        LOG.remove("open")
""",
    "lam_vlm.py": """
import numpy as np

class Policy:
    frame_stack = 3
    shape = None

    def __init__(self, good):
        self.good = good

    def __call__(self, frames):
        assert frames.dtype == np.uint8 and self.shape in (None, frames.shape), "the batch has changed its shape"
        self.shape = frames.shape
        first, last = frames[:, 0, 0, 0], frames[:, -1, 0, 0]
        lane = np.arange(len(frames)) / 64
        seen = [last[:, 0] / 255, first[:, 1] / 255, last[:, 1] / 255]
        return np.stack([*seen, self.good + lane], axis=1).astype(np.float32)

def load_policy(run_dir, labelled=None, device="cpu"):
    return Policy("lapo-clean" in str(run_dir) and labelled == "16")
""",
}


def make_run(arm: str, seed: int = 0, tasks=("reach",), labelled=("2",), stages=("lam", "bc", "decoder"), **summary) -> None:
    folder = Path("runs") / f"{arm}-s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    args = {"data": "data/tiny", "tasks": list(tasks), "seed": seed, "labelled_episodes": list(labelled), "arm": arm}
    hashes = {budget: f"hash{seed}" for budget in labelled} if stages[-1] == ("decoder" if "lam" in stages else "bc") else {}
    summary = {"stages": list(stages), "policy_hash": hashes, **summary, **args}
    del summary["data"]
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary))


def make_data() -> None:
    Path("data/tiny").mkdir(parents=True)
    Path("data/tiny/meta.json").write_text(json.dumps({"env": {"videos": "none", "size": 8, "max_steps": 20}, "tasks": ["reach"]}))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A working folder with a data set's meta.json and stand-ins in eval.py; the value is the log of resets."""
    monkeypatch.chdir(tmp_path)
    modules = {}
    for source in STANDINS.values():
        exec(source, module := {})
        modules |= module
    monkeypatch.setattr(ev, "DistractingMetaWorld", modules["DistractingMetaWorld"])
    monkeypatch.setattr(ev, "load_policy", modules["load_policy"])
    monkeypatch.setattr(ev, "ENVS", {})
    ev.make_policy.cache_clear()
    make_data()
    return modules["LOG"]


def evaluate(**arguments) -> None:
    ev.main(Args(**{"episodes": 12, "envs": 5, "workers": 1, "out": "results/tiny", **arguments}))


def rows_of(run: str) -> list[dict]:
    with open(f"runs/{run}/rollouts.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(*patterns: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for pattern in patterns for path in sorted(Path().glob(pattern))}


def refusal(**arguments) -> str:
    """The one line with which an evaluation ends."""
    with pytest.raises(SystemExit) as stop:
        evaluate(**arguments)
    message = str(stop.value)
    assert message.startswith("eval.py: ") and "\n" not in message
    return message


# ---------------------------------------------------------------- statistics


def test_iqm_by_hand_and_against_scipy():
    assert iqm([[0, 0, 1, 1]]) == 0.5
    assert iqm([[0, 2, 3, 100]]) == 2.5  # the outlier is cut
    assert iqm([[1.0], [2.0], [6.0]]) == 3.0  # a quarter of three entries, rounded down, is none
    assert iqm([[9, 1, 2, 3, 4, 5, 6, 100]]) == 4.5  # 3 4 5 6
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (3, 1), (2, 3), (3, 10), (5, 7), (4, 13)]:
        scores = rng.random(shape)
        assert iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=None), abs=1e-14)
        assert np.allclose(iqm(scores, axis=-1), scipy.stats.trim_mean(scores, 0.25, axis=1), atol=1e-14)


def test_ci_by_hand():
    assert stratified_bootstrap_ci([[0.3, 0.3], [0.3, 0.3]]) == pytest.approx((0.3, 0.3))
    coin = [[0.0], [1.0]]  # replicates of the mean: 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert stratified_bootstrap_ci(coin, statistic=np.mean) == (0.0, 1.0)
    assert stratified_bootstrap_ci(coin, statistic=np.mean, level=0.4) == (0.5, 0.5)
    assert stratified_bootstrap_ci(coin, statistic=np.mean, level=0.52) == (0.0, 1.0)


def test_ci_resamples_within_each_task():
    """Two runs, one bad and one good at every task: resampling whole runs gives (0, 1), within tasks Binomial(20, 1/2) / 20."""
    low, high = stratified_bootstrap_ci([[0.0] * 10, [1.0] * 10], statistic=np.mean)
    assert (low, high) == pytest.approx(scipy.stats.binom.ppf([0.025, 0.975], 20, 0.5) / 20)


def test_ci_keeps_tasks_apart():
    """Tasks of different difficulty without spread between runs leave nothing uncertain."""
    assert stratified_bootstrap_ci([[0.0, 0.5, 1.0]] * 3, statistic=np.mean) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(("statistic", "naive"), [(iqm, lambda x: scipy.stats.trim_mean(x, 0.25, axis=None)), (np.mean, np.mean)])
def test_ci_against_a_naive_loop(statistic, naive):
    scores = np.random.default_rng(1).random((4, 6))
    rng, replicates = np.random.default_rng(2), []
    for _ in range(4000):
        replicates.append(naive(np.stack([scores[rng.choice(4, 4), task] for task in range(6)], axis=1)))
    expected = np.quantile(replicates, [0.025, 0.975])
    assert np.allclose(stratified_bootstrap_ci(scores, statistic=statistic), expected, atol=0.015)


def test_ci_follows_its_seed_level_and_chunks():
    scores = np.random.default_rng(3).random((3, 10))
    assert stratified_bootstrap_ci(scores, seed=1) == stratified_bootstrap_ci(scores, seed=1) != stratified_bootstrap_ci(scores, seed=2)
    low, high = stratified_bootstrap_ci(scores, level=0.95)
    inner_low, inner_high = stratified_bootstrap_ci(scores, level=0.5)
    assert low < inner_low < iqm(scores) < inner_high < high
    many = stratified_bootstrap_ci(np.tile(scores, (1, 200)), reps=2001)  # in several chunks
    assert low < many[0] < many[1] < high


@pytest.mark.parametrize("statistic", [iqm, np.mean])
def test_ci_covers_the_truth(statistic):
    """Success rates of 20 fair episodes: the true IQM and mean are 1/2. Five runs make the percentile interval a little narrow."""
    rng = np.random.default_rng(4)
    intervals = [stratified_bootstrap_ci(rng.binomial(20, 0.5, (5, 10)) / 20, reps=1000, statistic=statistic) for _ in range(100)]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.85 <= covered <= 0.99, covered
    assert np.mean([high - low for low, high in intervals]) < 0.1


def test_one_run_gives_no_ci():
    assert stratified_bootstrap_ci([[0.1, 0.9, 0.4]]) is None
    assert probability_of_improvement_ci([[0.1]], [[0.2], [0.3]]) is None


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([[1, 2], [3]], "ragged"),
        ({"reach": [1, 2]}, "ragged"),
        ([0.1, 0.2], "runs, tasks"),
        (0.5, "runs, tasks"),
        (np.zeros((2, 2, 2)), "runs, tasks"),
    ]
    + [([[0.1, np.nan], [0.2, 0.3]], "NaN"), ([[None, 0.1]], "NaN"), (np.zeros((0, 3)), "empty"), ([], "empty"), ([["a", "b"]], "numbers")],
)
def test_bad_scores_are_refused(scores, reason):
    for function in (stratified_bootstrap_ci, lambda x: probability_of_improvement(x, [[0.0, 0.0]])):
        with pytest.raises(ValueError, match=reason) as error:
            function(scores)
        assert "\n" not in str(error.value)


def test_swapped_axes_are_refused():
    tasks = ["reach", "push", "door-open"]
    scores = np.random.default_rng(5).random((2, 3))
    assert stratified_bootstrap_ci(scores, tasks=tasks) == stratified_bootstrap_ci(scores)
    with pytest.raises(ValueError, match="swap"):
        stratified_bootstrap_ci(scores.T, tasks=tasks)
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(scores, scores.T)
    with pytest.raises(ValueError, match="NaN"):  # which a sort would move to the end, and the trimming hide
        iqm([[0.1, 0.2, 0.3, np.nan]])


def test_probability_of_improvement():
    assert probability_of_improvement([[1], [2]], [[0], [2]]) == 0.625  # won, lost, won, tied
    assert probability_of_improvement([[1, 0], [1, 0]], [[0, 0], [0, 1]]) == 0.625  # 1 on the first task, 1/4 on the second
    rng = np.random.default_rng(6)
    x, y = rng.integers(5, size=(4, 3)), rng.integers(5, size=(6, 3))
    expected = np.mean([scipy.stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 24 for t in range(3)])
    assert probability_of_improvement(x, y) == pytest.approx(expected)
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    coin, half = [[0.0], [1.0]], [[0.5], [0.5]]
    assert probability_of_improvement_ci(coin, half) == (0.0, 1.0)
    assert probability_of_improvement_ci(coin, half, level=0.4) == (0.5, 0.5)


# ---------------------------------------------------------------- rollouts


def test_rows_of_every_episode(lab):
    make_run("lapo", tasks=("reach", "push"), labelled=("16", "2"))
    evaluate(seed=4)
    rows = rows_of("lapo-s0")
    assert [(r["task"], r["labelled"], int(r["episode"])) for r in rows] == [
        (t, b, e) for t in ("push", "reach") for b in ("2", "16") for e in range(12)
    ]
    for row in rows:
        episode = int(row["episode"])
        steps = 20 if episode % 3 == 0 else 5 + episode % 7
        assert row["success"] == str(int(episode % 3 > 0)) and row["first_success_step"] == ("" if episode % 3 == 0 else str(steps))
        assert float(row["return"]) == pytest.approx((4.5 + episode % 5 / 64) * steps, rel=1e-5)  # it ends at its first success
        assert (row["goal"], row["clip"], row["clip_start"], row["eval_seed"]) == (str(episode + 100), "3", "40", "4")
        assert row["policy_hash"] == "hash0"
    assert len(lab) == len(set(lab)) * 2 == 48


def test_films_hold_what_happened(lab):
    make_run("lapo", labelled=("16", "2"))
    evaluate(media=3)
    assert {path.name for path in Path("runs/lapo-s0/rollouts").iterdir()} == {
        f"reach_labelled2_seed0_episode{e}.{end}" for e in range(3) for end in ("gif", "npy")
    }
    film = np.load("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode1.npy", allow_pickle=False)
    assert film[:, 0, 0, :2].tolist() == [[1, 0], [1, 4], [1, 6]]  # (episode, step), the last one the success
    assert film.shape == (3, 8, 8, 3) and film.dtype == np.uint8
    assert Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode1.gif").read_bytes()[:3] == b"GIF"


def test_nothing_is_repeated_and_more_episodes_run_only_the_missing_ones(lab):
    make_run("lapo", labelled=("2", "16"))
    evaluate(episodes=3)
    evaluate(episodes=12)
    assert sorted(lab) == sorted([("reach", episode) for episode in range(12)] * 2)
    grown = files("runs/*/rollouts.csv", "runs/*/rollouts/*", "results/tiny/scores.csv", "results/tiny/*.png")
    evaluate(episodes=12)
    evaluate(episodes=12, envs=7)
    assert len(lab) == 24 and files(*grown) == grown
    for path in grown:
        Path(path).unlink()
    evaluate(episodes=12)
    assert len(lab) == 48 and files(*grown) == grown
    evaluate(episodes=12, seed=1)  # other episodes: all of them
    assert len(lab) == 72 and len(rows_of("lapo-s0")) == 48


def test_a_missing_film_is_made_again(lab):
    make_run("lapo")
    evaluate(media=0)
    assert not Path("results/tiny/strip.png").exists() and not Path("runs/lapo-s0/rollouts").exists()
    before = rows_of("lapo-s0")
    evaluate(media=2)
    assert Path("results/tiny/strip.png").exists() and sorted(lab)[:4] == [("reach", 0), ("reach", 0), ("reach", 1), ("reach", 1)]
    assert len(lab) == 14 and rows_of("lapo-s0") == before


def test_a_budget_added_later_keeps_the_rows_of_the_others(lab):
    make_run("lapo", labelled=("16",))
    evaluate()
    make_run("lapo", labelled=("2", "16"))
    evaluate()
    assert len(lab) == 24 and [row["labelled"] for row in rows_of("lapo-s0")] == ["2"] * 12 + ["16"] * 12
    assert Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode0.gif").exists(), "films show the lowest budget"


def test_rows_of_an_older_policy_are_dropped(lab, capsys):
    make_run("lapo")
    make_run("lapo-clean")
    evaluate()
    make_run("lapo", policy_hash={"2": "new"})
    Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode9.npy").touch()  # a film of the older policy
    evaluate()
    assert "runs/lapo-s0/rollouts.csv: dropped 12 episodes of an older policy" in capsys.readouterr().out
    assert {row["policy_hash"] for row in rows_of("lapo-s0")} == {"new"} and len(rows_of("lapo-s0")) == 12
    assert {row["policy_hash"] for row in rows_of("lapo-clean-s0")} == {"hash0"}
    assert len(lab) == 36
    assert not Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode9.npy").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-4],  # torn in its last line, but still of the right number of fields
        lambda text: text.replace("task,", "name,", 1),
        lambda text: text + text.splitlines(keepends=True)[-1],  # an episode twice
        lambda text: text.replace(",1,", ",", 1),
        lambda text: text.replace("hash0", "hash0\0\x1a,", 1),
        lambda text: "PK\x03\x04\n",
        lambda text: "",
    ],
)
def test_a_damaged_table_is_named_and_refused(lab, damage):
    make_run("lapo")
    evaluate()
    path = Path("runs/lapo-s0/rollouts.csv")
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    assert "runs/lapo-s0/rollouts.csv is damaged" in refusal()
    assert path.read_bytes() == before and len(lab) == 12


def test_a_policy_that_gives_nan_is_refused(lab, monkeypatch):
    make_run("lapo")

    def policy(frames):
        return np.full((len(frames), 4), np.nan, np.float32)

    policy.frame_stack = 1
    monkeypatch.setattr(ev, "load_policy", lambda *_, **__: policy)
    with pytest.raises(ValueError, match="not finite at step 1"):
        evaluate()
    assert not Path("runs/lapo-s0/rollouts.csv").exists()


def test_a_folder_in_use_is_refused(lab):
    make_run("lapo")
    for folder in (Path("runs/lapo-s0"), Path("results/tiny")):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".eval.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert f"another eval.py is writing to {folder}" in refusal()
    assert not lab
    evaluate()
    evaluate()  # its own locks are gone


def test_unknown_unfinished_and_foreign_runs_are_refused(lab):
    assert "no finished run in runs/" in refusal()
    make_run("lapo")
    make_run("masklam")
    assert "'lap-s0'; nearest: lapo-s0" in refusal(runs=("lap-s0",))
    Path("runs/lapo-s0/summary.json").rename("runs/lapo-s0/unfinished")
    assert "no finished run 'lapo-s0'" in refusal(runs=("lapo-s0",))
    Path("runs/lapo-s0/summary.json").write_text('{"arm": ')
    assert "runs/lapo-s0/summary.json" in refusal(runs=("lapo-s0",))
    Path("runs/lapo-s0/summary.json").write_text('{"arm": "lapo"}')
    assert "runs/lapo-s0/summary.json" in refusal(runs=("runs/lapo-s0",))
    evaluate(runs=("masklam-s0",))


def test_runs_that_only_share_a_name_are_refused(lab):
    make_run("lapo")
    Path("runs/lapo-s0").rename("runs/first")
    make_run("lapo")
    assert "runs/first and runs/lapo-s0 are both arm 'lapo' with seed 0" in refusal()
    evaluate(runs=("first", "runs/first"))
    args = json.loads(Path("runs/lapo-s0/args.json").read_text())
    make_run("lapo", seed=1)
    Path("runs/lapo-s1/args.json").write_text(json.dumps(args | {"data": "data/other"}))
    assert "are both arm 'lapo' with different data" in refusal(runs=("lapo-s0", "lapo-s1"))


@pytest.mark.parametrize(
    ("name", "command"),
    [("quick", "python collect.py"), ("paper", "python collect.py paper"), ("mine", "python collect.py --out data/mine")],
)
def test_missing_data_names_its_command(lab, name, command):
    make_run("lapo")
    args = json.loads(Path("runs/lapo-s0/args.json").read_text())
    Path("runs/lapo-s0/args.json").write_text(json.dumps(args | {"data": f"data/{name}"}))
    assert refusal().endswith(f"make it with: {command}")


# ---------------------------------------------------------------- tables and command line


def test_scores_report_and_figures(lab, capsys):
    for seed in range(3):
        make_run("lapo", seed, labelled=("2", "16"), action_probe_nmse=0.9 + 0.01 * seed, leak_probe_r2=0.4)
        make_run("lapo-clean", seed, labelled=("2", "16"), action_probe_nmse=0.5, leak_probe_r2=0.1)
    make_run("bc", labelled=("all",), stages=("bc",))
    make_run("probed", stages=("lam",), action_probe_nmse=0.77, leak_probe_r2=0.2, state_probe_r2=0.3)
    make_run("undecoded", stages=("lam", "bc"), action_probe_nmse=0.66)
    evaluate()
    with open("results/tiny/scores.csv", newline="") as file:
        scores = list(csv.DictReader(file))
    assert list(scores[0]) == ["method", "task", "seed", "episodes", "success", "labelled"] and len(scores) == 13
    for row in scores:
        good = row["method"] == "lapo-clean" and row["labelled"] == "16"
        assert float(row["success"]) == (1.0 if good else 8 / 12) and row["episodes"] == "12"
    report = Path("results/tiny/report.md").read_text()
    assert report in capsys.readouterr().out
    lines = [re.sub(r" *\| *", "|", line).strip("|") for line in report.splitlines()]
    assert "lapo|2|0.91|0.40|0.67 [0.67, 0.67]|0.67 [0.67, 0.67]|0.67|3" in lines
    assert "lapo-clean|16|0.50|0.10|1.00 [1.00, 1.00]|1.00 [1.00, 1.00]|1.00|3" in lines
    assert "bc|all|–|–|0.67|0.67|0.67|1 (no CI)" in lines
    assert "lapo-clean|16|1.00 [1.00, 1.00]" in lines and "lapo-clean|2|0.50 [0.50, 0.50]" in lines  # probability of improvement
    assert lines.index("undecoded|0.66|–|–|1") < lines.index("probed|0.77|0.20|0.30|1"), "best target first"
    assert "One run gives no CI" in report
    for name in ("success", "strip", "leak_vs_success"):
        assert Path(f"results/tiny/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_only_seeds_common_to_all_tasks_count(lab):
    make_run("lapo", 0, tasks=("reach", "push"))
    make_run("lapo", 1, tasks=("reach",))
    make_run("other", 0, tasks=("reach",))
    make_run("other", 1, tasks=("push",))
    evaluate(media=0)
    report = Path("results/tiny/report.md").read_text()
    assert "lapo (2 labelled): only seeds common to all its tasks are counted: [0]." in report
    assert "other (2 labelled): only seeds common to all its tasks are counted: none, left out." in report
    assert "| 1 (no CI) |" in report


def test_runs_with_probes_alone_need_no_environment(lab):
    make_run("probed", stages=("lam",), action_probe_nmse=0.77)
    evaluate()
    assert not lab and "0.77" in Path("results/tiny/report.md").read_text()
    assert Path("results/tiny/scores.csv").read_text() == "method,task,seed,episodes,success,labelled\n"


def test_presets_and_bad_values():
    assert ev.parse([]) == ev.parse(["quick"]) == ev.PRESETS["quick"]
    assert ev.parse(["--episodes", "5"]).episodes == 5
    paper = ev.parse(["paper", "--device", "cpu", "--runs", "a", "b"])
    assert (paper.out, paper.episodes, paper.runs) == ("results/paper", ev.PRESETS["paper"].episodes, ("a", "b"))
    for flag in ("episodes", "envs"):
        with pytest.raises(SystemExit, match=f"--{flag} must be at least 1"):
            ev.parse([f"--{flag}", "0"])


def test_every_flag_has_help(capsys):
    body = next(
        node.body for node in ast.parse(Path(ev.__file__).read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    with pytest.raises(SystemExit):
        ev.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(ev.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        assert f"--{flag.target.id}" in text and doc.value.value in text
    assert "python eval.py paper" in text


# ---------------------------------------------------------------- real processes


def launch(*arguments: str, **environment: str) -> subprocess.Popen:
    for name, source in STANDINS.items():
        Path(name).write_text(source)
    Path("eval.py").write_bytes(Path(ev.__file__).read_bytes())
    return subprocess.Popen(
        [sys.executable, "eval.py", "--envs", "5", "--out", "results/tiny", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_and_resumed_equals_uninterrupted(lab, tmp_path, monkeypatch):
    results = ("runs/*/rollouts.csv", "runs/*/rollouts/*.*", "results/tiny/scores.csv", "results/tiny/*.png")
    make_run("lapo", labelled=("2", "16"))
    make_run("lapo-clean", labelled=("2", "16"))
    evaluate(episodes=20)
    expected = files(*results)

    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    make_data()
    make_run("lapo", labelled=("2", "16"))
    make_run("lapo-clean", labelled=("2", "16"))
    process = launch("--episodes", "20", "--workers", "2", SLEEP="0.01")
    table, deadline = Path("runs/lapo-s0/rollouts.csv"), time.time() + 60
    while not table.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert "another eval.py is writing to" in refusal()
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = table.read_text().splitlines()
    assert 1 < len(done) < 41 and set(done) < set(expected["runs/lapo-s0/rollouts.csv"].decode().splitlines())
    workers = [int(path.stem[6:]) for path in Path().glob("worker*.pid")]
    assert len(workers) == 2
    deadline = time.time() + 10
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    orphans = [pid for pid in workers if alive(pid)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, "the workers outlive their parent"

    process = launch("--episodes", "20", "--workers", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert files(*results) == expected


def test_a_failing_worker_ends_with_one_line(lab):
    make_run("lapo")
    process = launch("--episodes", "10", "--workers", "2", FAIL="7")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "\neval.py: runs/lapo-s0, reach, 2 labelled, episodes 5-9: RuntimeError: boom (--workers 1 shows the trace)\n" in errors


def test_an_unknown_run_ends_with_status_1(lab):
    make_run("lapo")
    process = launch("--runs", "lap")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (1, "", "eval.py: no finished run 'lap'; nearest: lapo-s0\n")


def test_heat_map_of_embedding_targets(lab, monkeypatch):
    """Mean over seeds, encoders and prompts down, layers and pools across; drawn anew or removed each time."""
    for seed, nmse in ((0, 0.5), (1, 0.7)):
        about = {"encoder": "vlm", "prompt": "best", "layer": -2, "pool": "text"}
        make_run("best", seed, stages=("lam",), action_probe_nmse=nmse, embedding=about)
    make_run("blind", stages=("lam",), action_probe_nmse=0.9, embedding=about | {"prompt": "blind", "pool": "last"})
    make_run("oracle", stages=("lam",), action_probe_nmse=0.4, embedding=about | {"encoder": "oracle"})
    make_run("pixels", stages=("lam",), action_probe_nmse=1.0, embedding=None)
    drawn = []
    monkeypatch.setattr(ev, "save_figure", lambda figure, path: drawn.append((path.name, figure)))
    evaluate()
    (name, figure) = drawn[0]
    axes = figure.axes[0]
    assert name == "probes.png" and [text.get_text() for text in axes.texts] == ["0.40", "0.60", "0.90"]
    expected = [[np.nan, 0.4], [np.nan, 0.6], [0.9, np.nan]]
    assert np.allclose(axes.images[0].get_array().filled(np.nan), expected, equal_nan=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["oracle: best", "vlm: best", "vlm: blind"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer -2, last", "layer -2, text"]


def test_tolerance_curve(lab, monkeypatch):
    """Success, NMSE and leak over the fraction kept, from 0 (the oracle itself) on; other arms of the same target do not count."""
    about = {"prompt": "best", "layer": 0, "pool": "all"}
    for kept, nmse in (("", 0.4), ("-a0.05", 0.5), ("-a0.5", 0.9)):
        budgets = ("2",) if kept else ("2", "16")  # what one method alone has makes no curve, no panel
        target = about | {"encoder": f"oracle{kept}"}
        make_run(f"lapo-oracle{kept}", labelled=budgets, embedding=target, action_probe_nmse=nmse, leak_probe_r2=nmse / 2)
    make_run("z4", embedding=about | {"encoder": "oracle"}, action_probe_nmse=1.0, leak_probe_r2=1.0)
    drawn = {}
    monkeypatch.setattr(ev, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    evaluate()
    left, right = drawn["tolerance.png"].axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["0", "0.05", "0.5"]
    assert [panel.get_title() for panel in drawn["leak_vs_success.png"].axes] == ["2 labelled episodes"]
    assert [line.get_label() for line in left.lines] == ["2 labelled"] and len(left.lines[0].get_ydata()) == 3
    assert {line.get_label(): list(line.get_ydata()) for line in right.lines} == {
        "action probe NMSE": [0.4, 0.5, 0.9],
        "leak $R^2$": [0.2, 0.25, 0.45],
    }


def test_figures_show_what_the_table_has(lab, monkeypatch):
    """No figure needs a method that the table leaves out, or a label budget that several methods share."""
    about = {"prompt": "best", "layer": 0, "pool": "all"}
    for kept, budget in (("", "2"), ("-a0.05", "8"), ("-a0.5", "16")):
        target = about | {"encoder": f"oracle{kept}"}
        make_run(f"lapo-oracle{kept}", labelled=(budget,), embedding=target, action_probe_nmse=0.5, leak_probe_r2=0.1)
    for seed, task in enumerate(("reach", "push")):
        make_run("other", seed, tasks=(task,), leak_probe_r2=0.2)  # no seed has both tasks
    make_run("bc", labelled=("all",), stages=("bc",))
    drawn = {}
    monkeypatch.setattr(ev, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    evaluate(media=0)
    assert [panel.get_title() for panel in drawn["leak_vs_success.png"].axes] == [f"{n} labelled episodes" for n in (2, 8, 16)]
    assert [line.get_label() for line in drawn["tolerance.png"].axes[0].lines] == [f"{n} labelled" for n in (2, 8, 16)]
    assert "lapo-oracle-a0.5" in (names := [text.get_text() for text in drawn["leak_vs_success.png"].axes[-1].get_legend().get_texts()])
    assert "other" not in names
    drawn.clear()
    evaluate(media=0, labelled=("all",))
    assert "success.png" in drawn and not {"leak_vs_success.png", "tolerance.png"} & set(drawn)


def test_many_methods_get_a_row_each(lab, monkeypatch):
    for i in range(len(ev.COLOURS) + 1):
        make_run("lapo-clean" if i == 4 else f"arm{i}", labelled=("2", "16"))  # lapo-clean alone is perfect, with 16
    drawn = {}
    monkeypatch.setattr(ev, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    evaluate(media=0)
    axes = drawn["success.png"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    two, sixteen = (np.asarray(points.get_offsets()) for points in axes.collections)
    assert len(names) == len(two) == len(sixteen) == 9 and len(set(names)) == 9
    assert {names[round(y)]: x for x, y in sixteen} == {name: 1.0 if name == "lapo-clean" else 8 / 12 for name in names}


def test_label_budgets_are_chosen(lab):
    make_run("lapo", labelled=("2", "8", "16"))
    evaluate(labelled=("16", "2"))
    assert {row["labelled"] for row in rows_of("lapo-s0")} == {"2", "16"}
    assert "no run has a decoder for --labelled 4; there are 2, 8, 16" in refusal(labelled=("4",))
