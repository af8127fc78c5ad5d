"""eval.py: rollouts, resume, locks and refusals with stand-ins for environment and policy; videos."""

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import ROOT, run_script
from made_up import LENGTH, flags, make_data

import eval as ev
from common.report import remarks
from common.results import check_clips
from common.shards import hash_of, lock_folder
from common.video_clips import Clips
from eval import Args

# The stand-ins check eval.py: a frame carries (episode, time), the policy answers with what it saw first and
# last in its stack, and the environment refuses an action that is not made of its own frames, K steps deep,
# oldest first. Episode e succeeds at step 5 + e % 7, every third one never, unless the policy is "good". The
# reward depends on the place in the batch, as a real policy's rounding may.
STANDINS = {
    "common/distracting_metaworld.py": """
import os, pathlib, time
import numpy as np

LOG = []  # (task, episode) of each reset, and "open" for each environment that is

class DistractingMetaWorld:
    def __init__(self, task, videos="generated", split="train", size=64, max_steps=200, seed=0):
        assert split == "test" and videos == "none", "not the data set's environment, or not its test split"
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

    def plan(self, frames, task, keys):
        assert frames.dtype == np.uint8 and self.shape in (None, frames.shape), "the batch changed its shape"
        self.shape = frames.shape
        first, last = frames[:, 0, 0, 0], frames[:, -1, 0, 0]
        place = np.arange(len(frames)) / 64
        seen = [last[:, 0] / 255, first[:, 1] / 255, last[:, 1] / 255]
        return np.stack([*seen, self.good + place], axis=1).astype(np.float32)[:, None]

def load_policy(run_dir, labelled=None, device="cpu"):
    return Policy("lapo-clean" in str(run_dir) and labelled == "16")
""",
}


ENV = {"videos": "none", "size": 8, "max_steps": 20}


def make_run(
    variant: str,
    seed: int = 0,
    tasks=("reach",),
    labelled=("2",),
    stages=("lam", "bc", "decoder"),
    data="data/tiny",
    **summary,
) -> None:
    folder = Path("runs") / f"{variant}-s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    args = {"data": data, "probe_fraction": 0.2, "tasks": list(tasks), "labelled_episodes": list(labelled)}
    hashes = {}
    if stages[-1] == ("decoder" if "lam" in stages else "bc"):
        hashes = {budget: f"hash{seed}" for budget in labelled}
    names = {"variant": variant, "default_variant": variant, "seed": seed, "tasks": list(tasks)}
    names["env"] = None if data == "data/videos" else ENV
    what = {"stages": list(stages), "policy_hash": hashes, "labelled_episodes": list(hashes)}
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(names | what | summary))


def make_meta() -> None:
    meta = {"env": ENV, "tasks": ["reach"], "arrays": ["frames"]}
    Path("data/tiny").mkdir(parents=True)
    Path("data/tiny/meta.json").write_text(json.dumps(meta))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the meta.json of a data set, and stand-ins in eval.py; the value is the log of resets."""
    monkeypatch.chdir(tmp_path)
    modules = {}
    for source in STANDINS.values():
        exec(source, module := {})
        modules |= module
    monkeypatch.setattr(ev, "DistractingMetaWorld", modules["DistractingMetaWorld"])
    monkeypatch.setattr(ev, "loader", lambda run_dir: modules["load_policy"])
    monkeypatch.setattr(ev, "ENVS", {})
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    ev.open_policy.cache_clear()
    make_meta()
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


# ---------------------------------------------------------------------------------------- rollouts


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
        assert row["success"] == str(int(episode % 3 > 0)) and row["first_success_step"] == (
            "" if episode % 3 == 0 else str(steps)
        )
        assert float(row["return"]) == pytest.approx(
            (4.5 + episode % 5 / 64) * steps, rel=1e-5
        )  # it ends at its first success
        assert (row["goal"], row["clip"], row["clip_start"], row["eval_seed"]) == (
            str(episode + 100),
            "3",
            "40",
            "4",
        )
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
    path = Path("runs/lapo-s0/rollouts.csv")
    first = rows_of("lapo-s0")[0]["return"]
    path.write_text(path.read_text().replace(f",{first},", ",0.25,", 1))
    before = rows_of("lapo-s0")  # as another device may have given them
    assert before[0]["return"] == "0.25"
    evaluate(media=2)
    assert Path("results/tiny/strip.png").exists() and sorted(lab)[:4] == [
        ("reach", 0),
        ("reach", 0),
        ("reach", 1),
        ("reach", 1),
    ]
    assert len(lab) == 14 and rows_of("lapo-s0") == before


def test_films_are_made_again_with_their_rows(lab):
    """As eval.py advises: rows of another --execute are moved away, whose films stay."""
    make_run("lapo")
    evaluate(media=2)
    film = Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode0.npy")
    expected = film.read_bytes()
    film.write_bytes(b"of another policy")
    Path("runs/lapo-s0/rollouts.csv").unlink()
    evaluate(media=2)
    assert film.read_bytes() == expected


def test_a_budget_added_later_keeps_the_rows_of_the_others(lab):
    make_run("lapo", labelled=("16",))
    evaluate()
    make_run("lapo", labelled=("2", "16"))
    evaluate()
    assert len(lab) == 24 and [row["labelled"] for row in rows_of("lapo-s0")] == ["2"] * 12 + ["16"] * 12
    assert Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode0.gif").exists(), (
        "films show the lowest budget"
    )


def test_rows_of_an_older_policy_are_dropped(lab, capsys):
    make_run("lapo")
    make_run("lapo-clean")
    evaluate()
    make_run("lapo", policy_hash={"2": "new"})
    Path("runs/lapo-s0/rollouts/reach_labelled2_seed0_episode9.npy").touch()  # a film of the older policy
    evaluate()
    assert "runs/lapo-s0/rollouts.csv: dropped 12 episodes of another policy" in capsys.readouterr().out
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

    class Policy:
        frame_stack = 1

        def plan(self, frames, task, keys):
            return np.full((len(frames), 1, 4), np.nan, np.float32)

    monkeypatch.setattr(ev, "loader", lambda run_dir: lambda *_, **__: Policy())
    with pytest.raises(ValueError, match="not finite at step 1"):
        evaluate()
    assert not Path("runs/lapo-s0/rollouts.csv").exists()


def test_a_folder_in_use_is_refused(lab):
    make_run("lapo")
    for folder in (Path("runs/lapo-s0"), Path("results/tiny")):
        handle = lock_folder(folder)
        assert f"another process is writing {folder}" in refusal()
        os.close(handle)
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
    Path("runs/lapo-s0/summary.json").write_text('{"variant": ')
    assert "runs/lapo-s0/summary.json" in refusal(runs=("lapo-s0",))
    Path("runs/lapo-s0/summary.json").write_text('{"arm": "lapo", "seed": 0}')  # of an older version
    assert "runs/lapo-s0/summary.json has no variant" in refusal(runs=("runs/lapo-s0",))
    evaluate(runs=("masklam-s0",))


def test_runs_that_only_share_a_name_are_refused(lab):
    make_run("lapo")
    Path("runs/lapo-s0").rename("runs/first")
    make_run("lapo")
    assert "runs/first and runs/lapo-s0 are both variant 'lapo' with seed 0" in refusal()
    evaluate(runs=("first", "runs/first"))
    make_run("lapo", seed=4, script="my_lam")
    assert "are both variant 'lapo', of different scripts" in refusal(runs=("lapo-s0", "lapo-s4"))
    shutil.copytree("data/tiny", "data/other")
    make_run("lapo", seed=1, data="data/other")
    assert "are both variant 'lapo' with different data" in refusal(runs=("lapo-s0", "lapo-s1"))
    for seed, lr in ((2, 0.1), (3, 0.2)):
        make_run("lapo", seed)
        args = json.loads(Path(f"runs/lapo-s{seed}/args.json").read_text())
        Path(f"runs/lapo-s{seed}/args.json").write_text(json.dumps(args | {"lr": lr}))
    evaluate(runs=("lapo-s0", "lapo-s2"))  # an older run does not know the flag
    assert "'lapo' with other arguments (lr: 0.1 there, 0.2 here)" in refusal(runs=("lapo-s2", "lapo-s3"))
    env = {"videos": "none", "size": 8, "max_steps": 20}
    made = [("a", 20, "1"), ("a", 20, "1"), ("b", 20, "1"), ("a", 30, "1"), ("a", 20, "2")]
    for seed, (shards_hash, steps, revision) in enumerate(made):
        embedding = {"revision": revision, "sha256": f"rounded otherwise {seed}", "text": f"task {seed}"}
        what = {"shards_hash": shards_hash, "env": env | {"max_steps": steps}, "embedding": embedding}
        make_run("anew", seed, **what)
    evaluate(runs=("anew-s0", "anew-s1"))
    for seed, name in ((2, "shards_hash"), (3, "env"), (4, "revision")):
        expected = f"data/tiny was made anew between them ({name})"
        assert expected in refusal(runs=("anew-s0", f"anew-s{seed}"))
    make_run("apart", 0, tasks=("reach",))
    make_run("apart", 1, tasks=("reach", "push"))
    assert "one model of several tasks and one of a single task" in refusal(runs=("apart-s0", "apart-s1"))
    for seed, lr in ((0, 0.1), (1, 0.2)):
        make_run("probed", seed, stages=("lam",))
        args = json.loads(Path(f"runs/probed-s{seed}/args.json").read_text())
        Path(f"runs/probed-s{seed}/args.json").write_text(json.dumps(args | {"lr": lr}))
    evaluate(runs=("probed-s0", "probed-s1"))
    report = Path("results/tiny/report.md").read_text()
    assert "'probed' with other arguments (lr: 0.1 there, 0.2 here)" in report


def test_other_test_clips_are_refused(lab):
    """A clip that came into the folder moves the cut: one that was trained on would be tested on."""
    env = {"videos": "generated", "size": 8, "max_steps": 20}
    names = Clips("generated", "test", 8).names
    check_clips({"env": env, "test_clips": hash_of(names)})
    make_run("lapo", env=env, test_clips=hash_of(names[1:]))
    assert "generated has other test clips than when the data of runs/lapo-s0" in refusal()


def test_what_is_rolled_out_needs_no_data_set(lab):
    """The report of runs whose files were kept can be made anywhere."""
    make_run("lapo")
    evaluate()
    expected = files("results/tiny/scores.csv", "runs/*/rollouts.csv")
    shutil.rmtree("data")
    evaluate()
    assert files("results/tiny/scores.csv", "runs/*/rollouts.csv") == expected


@pytest.mark.parametrize(
    "scale, flags",
    {
        "main": "",
        "hard": "--seed 1",
        "mt10": "",
        "univla": "--episodes 20",
        "latbot": "--episodes 20",
        "views": "",
        "encoders": "",
        "motion": "",
    }.items(),
)
def test_committed_scores_are_those_of_the_committed_rollouts(scale, flags, tmp_path, monkeypatch):
    """And the report can be made without any data set."""
    monkeypatch.setattr(ev, "plot_results", lambda *_: None)
    runs = map(str, sorted((ROOT / f"results/{scale}/runs").iterdir()))
    ev.main(ev.parse_args(["--media", "0", *flags.split(), "--out", str(tmp_path), "--runs", *runs]))
    command = f"eval.py --media 0 {flags} --out results/{scale} --runs results/{scale}/runs/*"
    for table in ("scores.csv", "probes.csv"):
        committed = ROOT / f"results/{scale}" / table
        assert (tmp_path / table).read_text() == committed.read_text(), f"python {command}"
    assert lasting(tmp_path / "report.md") == lasting(ROOT / f"results/{scale}/report.md"), command


def lasting(report: Path) -> list[str]:
    """Its lines without those on when and where it was written."""
    passing = ("- date:", "- report written at:", "- versions:", "- hardware:", "- time:")
    return [line for line in report.read_text().splitlines() if not line.startswith(passing)]


# ---------------------------------------------------------------------------------------- videos

VIDEO = ["frames", "actions", "episode", "step"]
HELD_OUT = 4  # the last of five episodes
BIAS = {"lapo": 0.1, "bc-few": 0.2, "bc-all": 0.05}


@pytest.fixture
def videos(lab, monkeypatch) -> dict:
    """A data set of videos, actions (task, episode, step) -> (4,); policies whose errors are known.

    They predict x exactly, y by its held-out mean, z with a bias that grows with the seed; w never moves.
    """
    root = make_data(Path("data/videos"), arrays=VIDEO)
    meta = json.loads((root / "meta.json").read_text())
    meta["action"] = {"names": ["x", "y", "z", "w"], "low": [-1, -2, -3, 0], "high": [1, 2, 5, 1]}
    (root / "meta.json").write_text(json.dumps(meta))
    actions = {}
    for shard in root.glob("*/shard_*"):
        labels = np.load(shard / "actions.npy")
        labels[:, 3] = 0.5
        np.save(shard / "actions.npy", labels)
        for frame, action in zip(np.load(shard / "frames.npy"), labels):
            actions[tuple(frame[0, 0].tolist())] = action

    def load_policy(run_dir, labelled=None, device="cpu"):
        variant, _, seed = Path(run_dir).name.rpartition("-s")

        def policy(frames):
            predicted = []
            for first, newest in zip(frames[:, 0, 0, 0], frames[:, -1, 0, 0]):
                task, episode, step = newest.tolist()
                assert first.tolist() == [task, episode, max(step - 2, 0)], "not its own frames, oldest first"
                assert episode == HELD_OUT and step < LENGTH + HELD_OUT - 1, (
                    "the last frame has no true action"
                )
                steps = [actions[task, episode, number] for number in range(LENGTH + HELD_OUT - 1)]
                x, y, z, w = actions[task, episode, step]
                predicted.append([x, np.mean(steps, axis=0)[1], z + BIAS[variant] * (1 + int(seed)), w])
            return np.array(predicted, np.float32)

        plan = lambda frames, task, keys: policy(frames)[:, None]  # noqa: E731
        return types.SimpleNamespace(plan=plan, frame_stack=3)

    monkeypatch.setattr(ev, "loader", lambda run_dir: load_policy)
    return actions


def test_videos_give_action_errors_and_no_success(lab, videos):
    for seed in range(2):
        make_run("lapo", seed, ("reach", "push"), ("16", "2"), data="data/videos", action_probe_nmse=0.5)
        make_run("bc-few", seed, ("reach",), ("2",), ("bc",), data="data/videos")
        make_run("bc-all", seed, ("reach",), ("all",), ("bc",), data="data/videos")
    evaluate()
    assert not lab and not list(Path("runs").glob("*/rollouts*")), "nothing can be rolled out"
    assert Path("results/tiny/scores.csv").read_text() == "method,task,seed,episodes,success,labelled\n"
    assert not Path("results/tiny/success.png").exists()
    with open("results/tiny/errors.csv", newline="") as file:
        errors = list(csv.DictReader(file))
    assert list(errors[0]) == ["method", "task", "seed", "labelled", "dimension", "nmse", "r2"]
    assert len(errors) == 4 * 2 * (2 * 2 + 1 + 1), (
        "dimensions x seeds x (lapo's tasks x budgets, bc-few, bc-all)"
    )
    for row in errors:
        task = ("reach", "push").index(row["task"])
        z = [videos[task, HELD_OUT, step][2] for step in range(LENGTH + HELD_OUT - 1)]
        bias = BIAS[row["method"]] * (1 + int(row["seed"]))
        expected = {"x": 0.0, "y": 1.0, "z": bias**2 / np.var(z)}
        if row["dimension"] == "w":
            assert row["nmse"] == row["r2"] == "", "what does not move has no NMSE"
        else:
            assert float(row["nmse"]) == pytest.approx(expected[row["dimension"]], rel=1e-4, abs=1e-6)
            assert float(row["r2"]) == pytest.approx(1 - float(row["nmse"]))

    report = Path("results/tiny/report.md").read_text()
    assert report.startswith("# Action error on held-out episodes\n") and "Success on" not in report
    lines = [re.sub(r" *\| *", "|", line).strip("|") for line in report.splitlines()]
    titles = [line for line in lines if line.startswith("method|")]
    assert titles == ["method|labelled|x|y|z|w|all|n runs"] * 2 + ["method|labelled|x|y|z|w|n runs"]
    few = [line.split("|") for line in lines if line.startswith("bc-few|2|")]
    rmse = 4 * (0.2 + 0.4) / 2  # half the range of z's own units, times the mean bias
    assert few[2][4] == f"{rmse:.2f} [{4 * 0.2:.2f}, {4 * 0.4:.2f}]" and few[0][5] == "–"
    assert few[0][2].startswith("0.00") and few[1][2].startswith("1.00") and few[0][-1] == "2"
    order = [line.split("|")[0] for line in lines if re.match(r"[a-z-]+\|(2|16|all)\|", line)][:4]
    assert order == ["bc-few", "lapo", "lapo", "bc-all"], "by label budget"
    assert "One model for several tasks (lapo)" in report
    assert Path("results/tiny/errors.png").exists()

    make_run("probed", stages=("lam",), action_probe_nmse=0.77)
    evaluate(runs=("probed-s0",))
    assert not Path("results/tiny/errors.csv").exists() and not Path("results/tiny/errors.png").exists()


def test_pooled_runs_are_said_and_resampled_whole(lab):
    for seed in range(2):
        make_run("lapo", seed, tasks=("reach", "push"))
        make_run("apart", seed)
        make_run("apart", seed + 2, tasks=("push",))
    evaluate(media=0)
    report = Path("results/tiny/report.md").read_text()
    assert "One model for several tasks (lapo): whole runs are resampled" in report


def test_a_real_policy_of_videos(tmp_path):
    """lam_vlm.py's own run, evaluated by its own command: episodes and policy come from their files."""
    make_data(tmp_path / "data/videos", arrays=VIDEO)
    trained = run_script(
        "lam_vlm.py", *flags(data="data/videos", target="pixels", out="runs/lapo"), cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    found = run_script("eval.py", "--out", "results/tiny", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    with open(tmp_path / "results/tiny/errors.csv", newline="") as file:
        errors = list(csv.DictReader(file))
    assert {(row["task"], row["labelled"]) for row in errors} == {
        (task, labelled) for task in ("reach", "push") for labelled in ("1", "2")
    }
    assert len(errors) == 16 and all(0.2 < float(row["nmse"]) < 20 for row in errors), "random data"
    meta = (tmp_path / "data/videos/meta.json").read_text()
    (tmp_path / "data/videos/meta.json").write_text(meta.replace('"frames of', '"other frames of'))
    again = run_script("eval.py", "--out", "results/tiny", cwd=tmp_path)
    assert "data/videos was made anew since runs/lapo was trained on it" in conftest.refusal(again)


# ---------------------------------------------------------------------------------------- tables, flags


def test_scores_report_and_figures(lab, capsys):
    for seed in range(3):
        make_run("lapo", seed, labelled=("2", "16"), action_probe_nmse=0.9 + 0.01 * seed, leak_probe_r2=0.4)
        make_run("lapo-clean", seed, labelled=("2", "16"), action_probe_nmse=0.5, leak_probe_r2=0.1)
    make_run("bc", labelled=("all",), stages=("bc",), per_stage={"bc": {"commit": "abc"}, "older": {}})
    make_run("probed", stages=("lam",), action_probe_nmse=0.77, leak_probe_r2=0.2, state_probe_r2=0.3)
    make_run("undecoded", stages=("lam", "bc"), action_probe_nmse=0.66)
    evaluate()
    with open("results/tiny/scores.csv", newline="") as file:
        scores = list(csv.DictReader(file))
    assert (
        list(scores[0]) == ["method", "task", "seed", "episodes", "success", "labelled"] and len(scores) == 13
    )
    for row in scores:
        good = row["method"] == "lapo-clean" and row["labelled"] == "16"
        assert float(row["success"]) == (1.0 if good else 8 / 12) and row["episodes"] == "12"
    report = Path("results/tiny/report.md").read_text()
    assert report in capsys.readouterr().out
    lines = [re.sub(r" *\| *", "|", line).strip("|") for line in report.splitlines()]
    assert "lapo|2|0.91|0.40|0.67 [0.67, 0.67]|0.67 [0.67, 0.67]|0.67|3" in lines
    assert "lapo-clean|16|0.50|0.10|1.00 [1.00, 1.00]|1.00 [1.00, 1.00]|1.00|3" in lines
    assert "bc|all|–|–|0.67|0.67|0.67|1 (no CI)" in lines
    better = 2 * "1.50 [1.50, 1.50]|0.33 [0.33, 0.33]|"  # ratio and difference of IQM and mean
    better += "1.00 [1.00, 1.00]"  # P(better)
    assert f"lapo-clean|lapo|16|1|3|{better}" in lines, "on one task, three seeds"
    assert any(line.startswith("lapo-clean|lapo|2|1|3|1.00 [1.00, 1.00]|0.00") for line in lines)
    assert lines.index("undecoded|0.66|–|–|1") < lines.index("probed|0.77|0.20|0.30|1"), "best target first"
    assert "One run gives no CI" in report and "- trained at: abc, 8 runs do not say\n" in report
    assert "So few runs make" in report and "have different seeds" in report
    for name in ("success", "strip", "leak_vs_success"):
        assert Path(f"results/tiny/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_probes_of_each_latent(lab):
    """probes.csv: latents by name where a method has several, else z; the one cloned is not said twice."""
    names = {"ti_action_probe_nmse": 0.9, "ti_leak_probe_r2": 0.2, "tc_action_probe_nmse": 0.5}
    for seed in (0, 1):
        more = names | {"tc_leak_probe_r2": 0.1 * seed, "action_probe_nmse": 0.5, "leak_probe_r2": 0.1 * seed}
        make_run("univla", seed, tasks=("reach", "push"), **more)
    make_run("lapo", 0, action_probe_nmse=0.25, leak_probe_r2=None)
    make_run("bc", 0, stages=("bc",))
    evaluate(media=0)
    assert Path("results/tiny/probes.csv").read_text() == (
        "method,tasks,labelled,seed,latent,action_nmse,leak_r2\n"
        "lapo,reach,2,0,z,0.25,\n"
        "univla,reach push,2,0,ti,0.9,0.2\nunivla,reach push,2,0,tc,0.5,0.0\n"
        "univla,reach push,2,1,ti,0.9,0.2\nunivla,reach push,2,1,tc,0.5,0.1\n"
    )
    report = Path("results/tiny/report.md").read_text()
    assert "| univla | 2 | ti | 0.90 | 0.20 | 2 |\n| univla | 2 | tc | 0.50 | 0.05 | 2 |\n" in report


def test_probes_are_those_of_the_label_budget(lab):
    """Where labels train the latents, each budget is a run of its own, with the same name and seed."""
    for budget, nmse in (("2", 0.8), ("16", 0.4)):
        make_run("latbot", 0, labelled=(budget,), action_probe_nmse=nmse, motion_action_probe_nmse=nmse)
        Path("runs/latbot-s0").rename(f"runs/latbot-{budget}-s0")
    evaluate(media=0)
    rows = Path("results/tiny/report.md").read_text().splitlines()
    assert [row[:23] for row in rows if row.startswith("| latbot | ")] == [
        "| latbot | 2 | 0.80 | –",
        "| latbot | 16 | 0.40 | ",
        "| latbot | 2 | motion |",
        "| latbot | 16 | motion ",
    ]
    probes = Path("results/tiny/probes.csv").read_text()
    assert "latbot,reach,2,0,motion,0.8," in probes and "latbot,reach,16,0,motion,0.4," in probes


def test_only_seeds_common_to_all_tasks_count(lab):
    make_run("lapo", 0, tasks=("push",))
    Path("runs/lapo-s0").rename("runs/lapo-push-s0")
    make_run("lapo", 0, tasks=("reach",))
    make_run("lapo", 1, tasks=("reach",))
    make_run("other", 0, tasks=("reach",))
    make_run("other", 1, tasks=("push",))
    evaluate(media=0)
    report = Path("results/tiny/report.md").read_text()
    assert "lapo (2 labelled): only seeds common to all its tasks are counted: [0]." in report
    assert "other (2 labelled): only seeds common to all its tasks are counted: none, left out." in report
    assert "| 1 (no CI) |" in report


def test_what_cannot_be_compared_is_said():
    def run(variant: str, videos: str, seed: int, policy: bool) -> dict:
        data = {"env": {"videos": videos}} if policy else {}
        return {"variant": variant, "seed": seed, "tasks": ["reach"], "policy": policy} | data

    rolled_out = [run("lapo", "generated", 0, True), run("lapo-clean-data", "none", 0, True)]
    (note,) = remarks([], rolled_out)
    assert note == "Trained and rolled out without distractors: lapo-clean-data."
    assert not remarks([], rolled_out[1:]), "all of them"
    probed = [run("a", "", 0, False), run("b", "", 0, False)]
    assert not remarks([], probed)
    (note,) = remarks([], [*probed, run("b", "", 1, False)])
    assert "differ in tasks or seeds" in note
    (note,) = remarks([], [probed[0] | {"embedding": {"family": "oracle", "blank": "none"}}])
    assert note.startswith("The oracle answers") and "not a VLM" in note
    (note,) = remarks([], [probed[0] | {"embedding": {"family": "llava", "blank": "oracle"}}])
    assert note.startswith("Encoders named -blank") and "not a VLM" in note


def test_runs_with_probes_alone_need_no_environment(lab):
    make_run("probed", stages=("lam",), action_probe_nmse=0.77)
    evaluate()
    assert not lab and "0.77" in Path("results/tiny/report.md").read_text()
    assert Path("results/tiny/scores.csv").read_text() == "method,task,seed,episodes,success,labelled\n"


def test_presets_and_bad_values():
    assert ev.parse_args([]) == ev.parse_args(["quick"]) == ev.PRESETS["quick"]
    assert ev.parse_args(["--episodes", "5"]).episodes == 5
    paper = ev.parse_args(["paper", "--device", "cpu", "--runs", "a", "b"])
    assert (paper.out, paper.episodes, paper.runs) == (
        "results/paper",
        ev.PRESETS["paper"].episodes,
        ("a", "b"),
    )
    for flag in ("episodes", "envs"):
        with pytest.raises(SystemExit, match=f"--{flag} must be at least 1"):
            ev.parse_args([f"--{flag}", "0"])
    with pytest.raises(SystemExit, match="--device tpu9 can not be used"):
        ev.parse_args(["--device", "tpu9"])


def test_every_flag_has_help(capsys):
    body = next(
        node.body
        for node in ast.parse(Path(ev.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    with pytest.raises(SystemExit):
        ev.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(ev.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        assert f"--{flag.target.id}" in text and doc.value.value in text
    assert "python eval.py paper" in text


# ---------------------------------------------------------------------------------------- real processes


def launch(*arguments: str, **environment: str) -> subprocess.Popen:
    shutil.copytree(ROOT / "common", "common", dirs_exist_ok=True)
    for name, source in STANDINS.items():
        Path(name).write_text(source)
    shutil.copy(ROOT / "eval.py", "eval.py")
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
    kept = ("runs/*/rollouts.csv", "runs/*/rollouts/*.*", "results/tiny/scores.csv", "results/tiny/*.png")
    make_run("lapo", labelled=("2", "16"))
    make_run("lapo-clean", labelled=("2", "16"))
    evaluate(episodes=20)
    expected = files(*kept)

    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    make_meta()
    make_run("lapo", labelled=("2", "16"))
    make_run("lapo-clean", labelled=("2", "16"))
    process = launch("--episodes", "20", "--workers", "2", SLEEP="0.01")
    table, deadline = Path("runs/lapo-s0/rollouts.csv"), time.time() + 60
    while not table.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert "another process is writing" in refusal()
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
    assert files(*kept) == expected


def test_a_failing_worker_shows_its_trace_and_what_it_did(lab):
    make_run("lapo")
    process = launch("--episodes", "10", "--workers", "2", FAIL="7")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" in errors and "in step" in errors
    assert "RuntimeError: boom" in errors
    assert "in runs/lapo-s0, reach, 2 labelled, episodes 5-9" in errors


def test_an_unknown_run_ends_with_status_1(lab):
    make_run("lapo")
    process = launch("--runs", "lap")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (
        1,
        "",
        "eval.py: no finished run 'lap'; nearest: lapo-s0\n",
    )


def test_label_budgets_are_chosen(lab):
    make_run("lapo", labelled=("2", "8", "16"))
    evaluate(labelled=("16", "2"))
    assert {row["labelled"] for row in rows_of("lapo-s0")} == {"2", "16"}
    for wanted in (("4",), ("2", "4")):
        assert "no run has a decoder for --labelled 4; there are 2, 8, 16" in refusal(labelled=wanted)


def test_chunks_are_executed_in_part(lab, monkeypatch):
    """A policy of chunks is asked every --execute steps, its noise keyed by seed, task, episode and step."""
    asked, executed = [], []

    class Env:
        def __init__(self, task, **arguments):
            self.info = {"goal": 0, "clip": 0, "clip_frame": 0, "success": False}

        def reset(self, options):
            self.episode, self.steps = options["episode"], 0
            return np.zeros((8, 8, 3), np.uint8), self.info

        def step(self, action):
            self.steps += 1
            if self.episode == 0:
                executed.append(float(action[0]))
            return np.zeros((8, 8, 3), np.uint8), 0.0, False, self.steps == 10, self.info

        def close(self):
            pass

    monkeypatch.setattr(ev, "DistractingMetaWorld", Env)

    class Policy:
        frame_stack = 1

        def plan(self, frames, task, keys):
            asked.append((task, [tuple(key) for key in keys]))
            chunk = np.arange(8)[None, :, None] / 8 * np.ones((len(frames), 1, 4))
            return chunk.astype(np.float32)

    monkeypatch.setattr(ev, "loader", lambda run_dir: lambda *_, **__: Policy())
    make_run("latbot", script="latbot", span=8)
    evaluate(episodes=2, envs=2, execute=3)
    reach = ev.TASKS.index("reach")
    assert asked[0] == ("reach", [(0, reach, 0, 0), (0, reach, 1, 0)])
    assert asked[1] == ("reach", [(0, reach, 0, 3), (0, reach, 1, 3)])
    assert [8 * value for value in executed] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    hashes = {row["policy_hash"] for row in rows_of("latbot-s0")}
    assert hashes == {"hash0-x3"}, "what is executed is part of the policy"
    first = len(asked)
    evaluate(episodes=2, envs=2, execute=3)
    assert len(asked) == first, "nothing is left to do"
    kept = Path("runs/latbot-s0/rollouts.csv").read_bytes()
    assert "is of --execute 3" in refusal(episodes=2, envs=2, execute=20)
    assert Path("runs/latbot-s0/rollouts.csv").read_bytes() == kept
    Path("runs/latbot-s0/rollouts.csv").unlink()
    evaluate(episodes=2, envs=2, execute=20)
    assert [keys[0][3] for _, keys in asked[first:]][:2] == [0, 8], "a chunk has eight"


# ------------------------------------------------------------ what a slip of one line would change


def test_runs_of_one_task_are_each_played_in_their_own_environment(lab):
    for steps in (20, 10):
        make_run(f"lapo{steps}", env={"videos": "none", "size": 8, "max_steps": steps})
    evaluate(episodes=1, media=0)
    for steps in (20, 10):  # episode 0 never succeeds; its reward is 0.5 a step
        assert float(rows_of(f"lapo{steps}-s0")[0]["return"]) == steps / 2


def test_errors_are_measured_on_the_episodes_that_the_run_held_out(lab, videos, monkeypatch):
    seen = []
    watch = lambda policy, data, task, held_out: seen.append({*data.episode[held_out]}) or []  # noqa: E731
    monkeypatch.setattr(ev, "action_errors", watch)
    make_run("lapo", data="data/videos")
    path = Path("runs/lapo-s0/args.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"probe_fraction": 0.4}))
    evaluate()
    assert seen == [{HELD_OUT - 1, HELD_OUT}]


def test_data_made_anew_between_two_tasks_is_refused(lab):
    for seed, steps in ((0, 20), (1, 30)):
        env = {"videos": "none", "size": 8, "max_steps": steps}
        make_run("anew", seed, tasks=(("reach", "push")[seed],), env=env, shards_hash=str(seed))
    assert "data/tiny was made anew between them (env)" in refusal()


def test_probes_of_one_seed_twice_are_said(lab):
    make_run("probed", stages=("lam",), action_probe_nmse=0.5)
    Path("runs/probed-s0").rename("runs/first")
    make_run("probed", stages=("lam",), action_probe_nmse=0.7)
    evaluate()
    assert "both variant 'probed' with seed 0" in Path("results/tiny/report.md").read_text()
