"""Trajectories and the cache of embeddings that collect.py makes. The environment: test_environment.py."""

import ast
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, digests, kill_when, refusal, run_script, start_script
from metaworld.policies import ENV_POLICY_MAP

import collect
from common.distracting_metaworld import DistractingMetaWorld
from common.oracle import Oracle, named_segments, prompt_text
from common.shards import (
    ARRAYS,
    SEGMENTS,
    append_rows,
    check_shard,
    finish_shard,
    sha256,
    start_shard,
    write_json,
)
from common.tasks import INSTRUCTIONS, MT10, OBJECTS, TASKS

pytestmark = pytest.mark.filterwarnings("ignore:Constant.* may be too high")
TINY_RUN = [*TINY, "--prompt", "best", "blind", "--out", "data/tiny"]  # makes the fixture `tiny_data`


def write_shard(folder: Path, arrays: dict[str, np.ndarray], metadata: dict) -> dict:
    """Writes arrays (N, ...), `frames` among them, as the shard <root>/<task>/shard_00000, or nothing.

    Returns shard.json: `metadata` and shard, task, frames (N), sha256 {array: hash}.
    """
    append_rows(start_shard(folder), arrays)
    return finish_shard(folder, metadata)


def read_shards(data: Path) -> list[tuple[dict[str, np.ndarray], dict]]:
    """(arrays, metadata) of every shard of drawer-open, in order."""
    shards = []
    for folder in sorted((data / "drawer-open").glob("shard_*")):
        arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
        shards.append((arrays, json.loads((folder / "shard.json").read_text())))
    assert shards
    return shards


def read_meta(data: Path) -> dict:
    return json.loads((data / "meta.json").read_text())


# ----------------------------------------------------------------------------------- trajectories


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory) -> Path:
    """2 episodes with action noise, from a camera moved backward, without embeddings, by two processes."""
    folder = tmp_path_factory.mktemp("noisy")
    flags = "--camera corner --episodes-per-task 2 --size 32 --noise 0.3 --camera-distance 0.2"
    run = "--shard-episodes 1 --workers 2 --encoder none --out noisy"
    made = run_script("collect.py", *flags.split(), *run.split(), cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "noisy"


KINDS = {
    "frames": (np.uint8, (32, 32, 3)),
    "clean": (np.uint8, (32, 32, 3)),
    "segments": (np.uint8, (32, 32)),
    "actions": (np.float32, (4,)),
    "states": (np.float32, (39,)),
    "rewards": (np.float32, ()),
    "success": (np.bool_, ()),
    "episode": (np.int32, ()),
    "step": (np.int16, ()),
    "video": (np.int32, (2,)),
}


@pytest.mark.parametrize("name", ["tiny_data", "noisy_data"])
def test_arrays_of_the_data_set(name, request):
    data = request.getfixturevalue(name)
    shards = read_shards(data)
    assert [metadata for _, metadata in shards] == read_meta(data)["shards"]
    for index, (arrays, metadata) in enumerate(shards):
        assert metadata["task"] == "drawer-open" and metadata["shard"] == f"drawer-open/shard_{index:05d}"
        for key, (dtype, shape) in KINDS.items():
            assert arrays[key].dtype == dtype and arrays[key].shape == (metadata["frames"], *shape), key
        assert np.abs(arrays["actions"]).max() <= 1 and arrays["segments"].max() < len(SEGMENTS)
        assert metadata["background"] == pytest.approx((arrays["segments"] == 0).mean())
        assert 0.2 < metadata["background"] < 0.7
    first_states = {tuple(arrays["states"][0]) for arrays, _ in shards}
    assert len(first_states) == len(shards)


@pytest.mark.parametrize("name", ["tiny_data", "noisy_data"])
def test_episodes_of_the_data_set(name, request):
    data = request.getfixturevalue(name)
    count = 0
    for arrays, metadata in read_shards(data):
        for episode in range(count, count + metadata["episodes"]):
            rows = np.flatnonzero(arrays["episode"] == episode)
            assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1)), "rows follow each other"
            assert np.array_equal(arrays["step"][rows], np.arange(len(rows))), "each frame once, in order"
            success = arrays["success"][rows]
            assert success.sum() == 5 and success[-5:].all(), "it ends with the fifth frame of success"
            last = rows[-1]
            assert not arrays["actions"][last].any() and arrays["rewards"][last] == 0, "nothing was done then"
            moved = np.abs(np.diff(arrays["video"][rows], axis=0))
            assert (moved == (0, 1)).all(), "one clip, one frame of it a step"
        count += metadata["episodes"]
    assert count == read_meta(data)["episodes_per_task"]


def test_meta_json_says_what_the_data_set_is(tiny_data):
    meta = read_meta(tiny_data)
    assert meta["tasks"] == ["drawer-open"] and meta["episodes"] == {"drawer-open": 5}
    assert meta["size"] == meta["env"]["size"] == 32 and meta["fps"] == 80
    assert meta["arrays"] == list(ARRAYS) and meta["segments"] == list(SEGMENTS)
    assert meta["action"] == {"names": ["x", "y", "z", "gripper"], "low": -1, "high": 1}
    assert meta["instructions"] == {"drawer-open": "open the drawer"}
    assert meta["objects"] == {"drawer-open": "drawer"}
    assert len(meta["clips"]["train"]) == 60 and len(meta["clips"]["test"]) == 30
    assert set(meta["env"]) == set(collect.ENV_FLAGS) and meta["env"]["video_area"] == 1
    assert {"metaworld", "mujoco", "numpy", "pillow", "python"} == set(meta["versions"])
    assert (tiny_data / "preview.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["tiny_data", "noisy_data"])
def test_the_action_stored_is_the_action_executed(name, request):
    """Replayed in the environment of meta.json, the stored actions give what is stored."""
    data = request.getfixturevalue(name)
    meta = read_meta(data)
    arrays, metadata = read_shards(data)[-1]
    env = DistractingMetaWorld("drawer-open", split="train", seed=meta["seed"], **meta["env"])
    episode = int(arrays["episode"][0])
    frame, info = env.reset(options={"episode": episode + collect.NEXT_ATTEMPT * metadata["attempts"][0]})
    for row in np.flatnonzero(arrays["episode"] == episode):
        assert np.array_equal(arrays["frames"][row], frame)
        assert np.array_equal(arrays["clean"][row], info["clean"])
        assert np.array_equal(arrays["states"][row], info["state"])
        assert np.array_equal(arrays["segments"][row], env.segments())
        assert arrays["video"][row].tolist() == [info["clip"], info["clip_frame"]]
        assert arrays["success"][row] == info["success"]
        frame, reward, _, _, info = env.step(arrays["actions"][row])
        assert arrays["rewards"][row] in (np.float32(reward), 0)
    assert meta["camera_pose"] == env.renderer.pose
    env.close()


def test_noise_is_added_to_the_experts_actions(tiny_data, noisy_data):
    expert = ENV_POLICY_MAP["drawer-open-v3"]()
    for data, std in ((tiny_data, 0), (noisy_data, 0.3)):
        arrays, _ = read_shards(data)[0]
        rows = np.flatnonzero(arrays["episode"] == 0)[:-1]
        states = arrays["states"][rows].astype(np.float64)
        wanted = np.clip([expert.get_action(state) for state in states], -1, 1)
        actions = arrays["actions"][rows]
        noise = (actions - wanted)[np.abs(actions) < 1]
        if std == 0:
            assert np.abs(actions - wanted).max() < 1e-6
        else:
            assert 0.2 < noise.std() < 0.4


def test_the_camera_distance_is_in_meta_json(tiny_data, noisy_data):
    near, far = read_meta(tiny_data), read_meta(noisy_data)
    assert (near["env"]["camera_distance"], far["env"]["camera_distance"]) == (0, 0.2)
    shift = np.subtract(far["camera_pose"]["position"], near["camera_pose"]["position"])
    assert np.linalg.norm(shift) == pytest.approx(0.2, abs=1e-4)


def collect_tiny(folder: Path, *flags: object) -> subprocess.CompletedProcess:
    """The command of the fixture `tiny_data`, in another folder."""
    return run_script("collect.py", *TINY_RUN, *flags, cwd=folder)


def test_killed_and_started_again_makes_the_bytes_of_an_uninterrupted_run(tiny_data, tmp_path):
    """kill -9 of two workers between two shards: they die with their parent, the same command goes on."""
    out = tmp_path / "data/tiny"

    def finished() -> int:
        return len(list(out.glob("drawer-open/shard_*")))

    process = start_script("collect.py", *TINY_RUN, "--workers", 2, cwd=tmp_path)
    kill_when(process, lambda: finished() > 0)
    assert finished() > 0 and "shards" not in read_meta(out), "killed before the end"
    leftover = out / "drawer-open/.tmp_shard_00002"  # what a kill in the middle of writing leaves
    leftover.mkdir(exist_ok=True)
    (leftover / "frames.npy").write_bytes(b"half a fi")
    made = collect_tiny(tmp_path, "--workers", 2)
    assert made.returncode == 0, made.stderr
    assert digests(out) == digests(tiny_data)
    assert "5 episodes" in made.stdout


def test_two_ranks_make_the_bytes_of_one(tiny_data, tmp_path):
    """Shards and embeddings are divided among the processes of torchrun; then nothing is left to do."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(ROOT / "collect.py"), *TINY_RUN, "--workers", "1"]
    for words in ("a rank", "nothing left to do"):
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stderr
        assert made.stdout.count("5 episodes") == 1 and words in made.stdout
        assert digests(tmp_path / "data/tiny") == digests(tiny_data)


def test_metaworlds_own_names_are_the_same_data_set(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    made = collect_tiny(tmp_path, "--tasks", "drawer-open-v3")
    assert made.returncode == 0 and "nothing left to do" in made.stdout, made.stderr
    assert digests(tmp_path / "data/tiny") == digests(tiny_data)


def test_shards_have_the_bytes_of_numpy(tmp_path):
    """Whether all rows come at once or bit by bit; dtypes, shapes and checksums are in order."""
    rng = np.random.default_rng(0)
    arrays = {
        "frames": rng.integers(0, 256, (1000, 4, 4, 3), np.uint8),
        "step": np.arange(1000, dtype=np.int16),
    }
    arrays["success"] = arrays["step"] > 7
    whole = write_shard(tmp_path / "reach/shard_00000", arrays, {"episodes": 3})
    folder = tmp_path / "reach/shard_00001"
    temporary = start_shard(folder)
    for start in (0, 7, 99):
        end = {0: 7, 7: 99, 99: 1000}[start]
        append_rows(temporary, {name: array[start:end] for name, array in arrays.items()})
    assert not folder.exists()
    parts = finish_shard(folder, {"episodes": 3})
    assert parts["sha256"] == whole["sha256"] and parts["shard"] == "reach/shard_00001"
    assert (whole["task"], whole["frames"], whole["episodes"]) == ("reach", 1000, 3)
    assert check_shard(folder) == parts and not temporary.exists()
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert (folder / f"{name}.npy").read_bytes() == buffer.getvalue()


# ----------------------------------------------------------------------------------- oracle and cache


@pytest.mark.parametrize(
    "prompt, kept",
    [
        ("best", {"robot", "object", "goal"}),
        ("positive", {"robot", "object", "goal"}),
        ("arm", {"robot"}),
        ("object", {"object", "goal"}),
        ("blind", set(SEGMENTS)),
        ("Focus on the gripper. Do not look at the drawer.", {"robot"}),
        ("Ignore the table.", set(SEGMENTS) - {"table"}),
        ("Don't mention the arm, describe the rest.", set(SEGMENTS) - {"robot"}),
        ("Where is the table?", {"table"}),
        ("Focus on the robot arm and not on the background.", {"robot"}),
        ("Ignore the background, the table and the goal, focus on the robot's hand.", {"robot"}),
        ("Describe the arm without the table but the drawer.", {"robot", "object", "goal"}),
        ("Do not describe the background.", set(SEGMENTS) - {"background"}),
        ("Don\u2019t describe the background. Focus on the robot arm.", {"robot"}),
        ("Ignore everything except the robot arm.", {"robot"}),
        ("Do not describe anything other than the drawer.", {"object", "goal"}),
        ("Describe everything except the background.", set(SEGMENTS) - {"background"}),
        ("Describe everything but the background.", set(SEGMENTS) - {"background"}),
        ("Do not describe anything but the arm.", {"robot"}),
        ("Focus on the robot arm and the objects.", {"robot", "object", "goal"}),
        ("Look at the arm rather than the table. Avoid the background.", {"robot"}),
    ],
)
def test_the_prompt_decides_what_the_oracle_keeps(prompt, kept):
    indices = named_segments(prompt_text(prompt, "drawer"), "drawer")
    assert {SEGMENTS[index] for index in indices} == kept


def test_the_object_is_filled_in_for_each_task():
    assert prompt_text("best", OBJECTS["door-open"]).endswith("Focus on the robot arm and the door.")
    assert prompt_text("{object}!", OBJECTS["reach"]) == "puck!"
    for task in TASKS:
        named = named_segments(prompt_text("best", OBJECTS[task]), OBJECTS[task])
        assert SEGMENTS.index("object") in named


def embed(frames: np.ndarray, segments: np.ndarray, prompt: str, background_kept: float = 0.0) -> np.ndarray:
    """What the oracle makes of frames (N, H, W, 3) of drawer-open: (N, D)."""
    oracle = Oracle(background_kept)
    text = prompt_text(prompt, "drawer")
    return oracle.embed(oracle.prepare(frames, segments, [text], "drawer"))[text, 0, "all"]


@pytest.mark.parametrize(
    "prompt, changed, seen",
    [
        ("best", "background", False),
        ("blind", "background", True),
        ("best", "robot", True),
        ("arm", "object", False),
    ],
)
def test_the_embedding_ignores_what_the_prompt_does_not_name(tiny_data, prompt, changed, seen):
    arrays, _ = read_shards(tiny_data)[0]
    frames, segments = arrays["frames"][:40:8], arrays["segments"][:40:8]
    inverted = np.where((segments == SEGMENTS.index(changed))[..., None], 255 - frames, frames)
    same = np.array_equal(embed(frames, segments, prompt), embed(inverted, segments, prompt))
    assert same != seen


def test_the_oracles_sums_are_exact():
    """Its embedding has the same bytes whatever the order in which a BLAS sums, thus on any machine."""
    rng = np.random.default_rng(0)
    oracle = Oracle()
    features = (rng.integers(0, 256, (3, 32 * 32 * 3)).astype(np.float32) - 128) / 128
    (found,) = oracle.embed({"": features}).values()
    order = rng.permutation(features.shape[1])
    for sums in (features[:, order], oracle.projection[order]), (features[:, ::-1], oracle.projection[::-1]):
        terms = sums[0].astype(np.float64)[:, :, None] * sums[1]
        assert np.array_equal(found, terms.cumsum(1)[:, -1].astype(np.float32))


def test_background_kept_is_the_fraction_that_leaks(tiny_data):
    arrays, _ = read_shards(tiny_data)[0]
    frames, segments = arrays["frames"][:40:8], arrays["segments"][:40:8]
    inverted = np.where((segments == 0)[..., None], 255 - frames, frames)

    def effect(prompt: str, kept: float) -> float:
        return np.abs(embed(frames, segments, prompt, kept) - embed(inverted, segments, prompt, kept)).mean()

    full = effect("blind", 0)
    assert effect("best", 0) == 0
    assert effect("best", 0.5) == pytest.approx(full / 2, rel=0.1)
    assert effect("best", 1) == pytest.approx(full, rel=0.01)


def test_twins_have_nearly_the_same_embedding_under_the_best_prompt(tiny_data):
    """Pixels at the robot's edge mix with the background, so nearly."""
    arrays, _ = read_shards(tiny_data)[0]
    distance = {}
    for prompt in ("best", "blind"):
        distracted = embed(arrays["frames"], arrays["segments"], prompt)
        clean = embed(arrays["clean"], arrays["segments"], prompt)
        distance[prompt] = np.linalg.norm(distracted - clean, axis=1).mean()
    assert 0 < distance["best"] < 0.15 * distance["blind"]


@pytest.mark.parametrize("prompt", ["best", "blind"])
def test_cached_embeddings_are_those_of_the_frames(tiny_data, prompt):
    for arrays, metadata in read_shards(tiny_data):
        path = tiny_data / metadata["shard"] / "embeddings" / f"oracle_{prompt}_L0_all_r1.npy"
        cached = np.load(path, allow_pickle=False)
        record = json.loads(path.with_suffix(".json").read_text())
        expected = embed(arrays["frames"], arrays["segments"], prompt)
        assert np.allclose(cached, expected, atol=0.01) and expected.std() > 0.1
        assert cached.dtype == np.float16 and record["dtype"] == "float16"
        assert record["prompt"] == prompt and record["text"] == prompt_text(prompt, "drawer")
        assert record["frames_sha256"] == metadata["sha256"]["frames"]
        assert record["sha256"] == sha256(path) and record["dim"] == cached.shape[1]


@pytest.fixture
def copy(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data set that a test may damage; its command goes on there, in folder tmp_path."""
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    return tmp_path / "data/tiny"


def test_another_prompt_adds_only_its_own_files(copy, tmp_path):
    files = [path for path in copy.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    made = collect_tiny(tmp_path, "--prompt", "Look at the gripper.")
    assert made.returncode == 0, made.stderr
    added = {path for path in copy.rglob("*") if path.is_file()} - set(before)
    assert len(added) == 6 and len({path.stem for path in added}) == 1
    assert {path.parent.name for path in added} == {"embeddings"}
    for path, (modified, content) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == modified or path.name == "meta.json", path
    for path in added:
        if path.suffix == ".json":
            assert json.loads(path.read_text())["prompt"] == "Look at the gripper."


# ----------------------------------------------------------------------------------- without a simulator


@pytest.fixture
def imported(tiny_data, tmp_path) -> Path:
    """What import_videos.py makes: frames with an episode, a step and a video; no simulator."""
    names = ("frames", "episode", "step", "video")
    shards = []
    for arrays, metadata in read_shards(tiny_data):
        folder = tmp_path / "data/mine" / "pour" / metadata["shard"].split("/")[1]
        arrays = {name: arrays[name] for name in names}
        shards.append(write_shard(folder, arrays, {"episodes": metadata["episodes"]}))
    meta = {"env": None, "tasks": ["pour"], "size": 32, "fps": 30, "arrays": list(names), "action": None}
    meta |= {"episodes": {"pour": 5}, "objects": {"pour": "red cup"}, "instructions": {"pour": "pour water"}}
    write_json(tmp_path / "data/mine/meta.json", meta | {"shards": shards})
    return tmp_path / "data/mine"


def test_embeddings_of_a_data_set_without_simulator(imported, tmp_path):
    before = digests(imported)
    made = run_script("collect.py", "--out", "data/mine", "--encoder", "random", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "data/mine: embeddings random_noprompt_" in made.stdout and "frames/s" not in made.stdout
    after = digests(imported)
    assert {path: after[path] for path in before} == before and (imported / "preview.png").exists()
    for metadata in read_meta(imported)["shards"]:
        (path,) = (imported / metadata["shard"] / "embeddings").glob("*.npy")
        embedding = np.load(path, allow_pickle=False)
        assert len(embedding) == metadata["frames"] and embedding.std() > 0
        assert json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256(path)


def test_the_oracle_is_refused_without_a_simulator(imported, tmp_path):
    before = digests(imported)
    message = refusal(run_script("collect.py", "--out", "data/mine", cwd=tmp_path))
    assert "oracle" in message and "--encoder" in message and digests(imported) == before


def test_an_import_that_was_cut_off_is_refused(imported, tmp_path):
    meta = read_meta(imported)
    del meta["shards"]
    write_json(imported / "meta.json", meta)
    message = refusal(run_script("collect.py", "--out", "data/mine", "--encoder", "random", cwd=tmp_path))
    assert "import_videos.py" in message


# ----------------------------------------------------------------------------------- bad input


BAD_FLAGS = {
    "unknown task": ("--tasks drawr-open", "drawer-open"),
    "unknown encoder": ("--encoder orcale", "oracle"),
    "unknown camera": ("--camera corner9", "corner4"),
    "unknown videos": ("--videos generatd", "generated"),
    "no steps": ("--max-steps 0", "--max-steps"),
    "too many steps": ("--max-steps 501", "500"),
    "no episodes": ("--episodes-per-task 0", "--episodes-per-task"),
    "negative noise": ("--noise -1", "--noise"),
    "negative workers": ("--workers -1", "--workers"),
    "no fraction": ("--background-kept 2", "--background-kept"),
    "no share": ("--video-area 1.5", "--video-area"),
    "no task": ("--tasks", "--tasks is given without a value"),
    "no prompt": ("--prompt", "--prompt is given without a value"),
    "not the oracle": ("--encoder random --background-kept 0.1", "--background-kept is for --encoder oracle"),
    "a clip less than none": ("--clips -1", "--clips"),
    "nowhere": ("--camera-distance nan", "--camera-distance"),
    "expert fails": ("--max-steps 2 --workers 2 --shard-episodes 1 --episodes-per-task 2", "--max-steps"),
}


@pytest.mark.parametrize("flags, hint", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused(flags, hint, tmp_path):
    result = run_script("collect.py", "--size", 16, *flags.split(), "--out", "data/bad", cwd=tmp_path)
    assert hint in refusal(result)


def test_no_opengl_says_what_to_install(tmp_path):
    command = [sys.executable, str(ROOT / "collect.py"), *TINY]
    environ = os.environ | {"MUJOCO_GL": "disable"}  # run_script has loaded mujoco, which reads it
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert "apt-get install" in refusal(result)


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/tiny" in refusal(collect_tiny(tmp_path))


def refused_and_untouched(copy: Path, tmp_path: Path, *flags: object) -> str:
    before = digests(copy)
    message = refusal(collect_tiny(tmp_path, *flags))
    assert digests(copy) == before, "a refused command changed the data set"
    return message


@pytest.mark.parametrize("flag, value", [("seed", 1), ("noise", 0.5), ("size", 48), ("clips", 1)])
def test_other_arguments_into_the_same_folder_are_refused(copy, tmp_path, flag, value):
    message = refused_and_untouched(copy, tmp_path, f"--{flag}", value)
    assert flag in message and "--out" in message


def test_a_data_set_of_an_older_version_is_refused(copy, tmp_path):
    meta = read_meta(copy)
    del meta["arrays"]
    write_json(copy / "meta.json", meta)
    assert "older version" in refused_and_untouched(copy, tmp_path)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_a_damaged_shard_is_named(copy, tmp_path, damage):
    damage(copy / "drawer-open/shard_00001/frames.npy")
    message = refused_and_untouched(copy, tmp_path)
    assert "drawer-open/shard_00001" in message and "frames.npy" in message
    assert "delete that folder" in message


def test_a_damaged_shard_is_made_again(copy, tmp_path, tiny_data):
    shutil.rmtree(copy / "drawer-open/shard_00002")  # as the message says
    assert collect_tiny(tmp_path).returncode == 0
    assert digests(copy) == digests(tiny_data)


@pytest.mark.parametrize(
    "name, named",
    [("meta.json", "meta.json"), ("drawer-open/shard_00001/shard.json", "drawer-open/shard_00001")],
)
def test_a_cut_json_file_is_named(copy, tmp_path, name, named):
    cut(copy / name)
    assert named in refused_and_untouched(copy, tmp_path)


def of_other_frames(path: Path) -> None:
    record = json.loads(path.read_text())
    write_json(path, record | {"frames_sha256": "0" * 64})


@pytest.mark.parametrize(
    "damage, suffix",
    [(of_other_frames, ".json"), (cut, ".json"), (flip_a_byte, ".npy"), (Path.unlink, ".npy")],
)
def test_foreign_and_damaged_embeddings_are_refused(copy, tmp_path, damage, suffix):
    path = copy / "drawer-open/shard_00001/embeddings/oracle_best_L0_all_r1.json"
    damage(path.with_suffix(suffix))
    assert str(path.relative_to(tmp_path)) in refused_and_untouched(copy, tmp_path)


@pytest.mark.parametrize("flags, hint", [(["--layers", 7], "it has 0"), (["--pools", "cls"], "it has all")])
def test_unknown_layers_and_pools_are_refused(copy, tmp_path, flags, hint):
    assert hint in refused_and_untouched(copy, tmp_path, *flags)
    result = run_script("collect.py", "--out", "data/new", *flags, cwd=tmp_path)
    assert hint in refusal(result) and not (tmp_path / "data/new").exists(), "before anything is collected"


def test_a_folder_in_use_is_refused(copy, tmp_path):
    with open(copy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing data/tiny" in refused_and_untouched(copy, tmp_path)
    assert collect_tiny(tmp_path).returncode == 0, "the lock is gone with its holder"


# ----------------------------------------------------------------------------------- arguments


def test_presets():
    assert collect.parse_args([]) == collect.parse_args(["quick"]) == collect.QUICK
    paper = collect.parse_args(["paper", "--videos", "generated", "--seed", "3"])
    assert (paper.tasks, paper.videos, paper.seed) == (MT10, "generated", 3)
    assert (paper.size, paper.episodes_per_task, paper.shard_episodes) == (128, 5000, 500)
    assert collect.QUICK.size == 64
    assert collect.parse_args(["--tasks", "mt10", "reach-v3"]).tasks == MT10
    assert INSTRUCTIONS.keys() == OBJECTS.keys() == set(TASKS)


def test_every_flag_has_help(capsys):
    tree = ast.parse(Path(collect.__file__).read_text())
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    with pytest.raises(SystemExit):
        collect.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(args.body) == 2 * len(collect.Args.__dataclass_fields__)
    for flag, doc in zip(args.body[::2], args.body[1::2], strict=True):
        assert f"--{flag.target.id.replace('_', '-')}" in text
        assert " ".join(doc.value.value.split()) in text


# ------------------------------------------------------------ what a slip of one line would change


def test_each_tasks_prompt_names_its_own_object(monkeypatch, tmp_path):
    asked = {}
    watch = lambda encoder, folder, shard, task, prompts, bar: asked.update({task: prompts}) or []  # noqa: E731
    monkeypatch.setattr(collect, "embed_shard", watch)
    shards = [{"task": task, "shard": f"{task}/shard_00000", "frames": 1} for task in ("door-open", "reach")]
    meta = {"tasks": ["door-open", "reach"], "objects": OBJECTS, "shards": shards}
    collect.embed(collect.parse_args([]), tmp_path, meta)
    assert asked == {task: {"best": prompt_text("best", OBJECTS[task])} for task in ("door-open", "reach")}


OTHER = "--after-success 3 --max-steps 99 --camera corner2 --camera-distance 0.1 --video-step 2"
OTHER += " --video-area 0.5 --shard-episodes 3 --videos none"


def test_every_flag_of_the_trajectories_is_part_of_their_identity():
    words = OTHER.split()
    for flag, value in zip(words[::2], words[1::2]):
        changed = collect.identity(collect.parse_args([flag, value]))
        assert changed != collect.identity(collect.QUICK), flag
