"""Environment, trajectories, oracle and cache of collect.py, and what they rely on in MetaWorld and MuJoCo. Backgrounds: test_videos.py."""

import ast
import fcntl
import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, digests, kill_when, refusal, run_script, start_script
from gymnasium.utils.env_checker import check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

import collect
from collect import MT10, SEGMENTS, Clips, DistractingMetaWorld, Oracle, episode_rng, expert_episode, named_segments, prompt_text

SIZE = 32
pytestmark = pytest.mark.filterwarnings("ignore:Constant.* may be too high", "ignore:.*alternative render modes")


@pytest.fixture
def make_env():
    """Builds environments of 32 px (camera corner, no distractors unless asked for) and closes them at the test's end."""
    made = []

    def make(task: str = "drawer-open", **kwargs) -> DistractingMetaWorld:
        made.append(DistractingMetaWorld(task, **{"videos": "none", "size": SIZE, "camera": "corner"} | kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def random_actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)).astype(np.float32)


def play(env: DistractingMetaWorld, episode: int, steps: int = 6) -> list[np.ndarray]:
    """Frame and state at each step of an episode under fixed actions."""
    seen = [env.reset(options={"episode": episode})] + [env.step(action)[::4] for action in random_actions(steps)]
    return [array for frame, info in seen for array in (frame, info["state"])]


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def inside(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask whose eight neighbours are in it too: there nothing but background is seen."""
    n, padded = len(mask), np.pad(mask, 1)
    return np.min([padded[y : y + n, x : x + n] for y in range(3) for x in range(3)], axis=0)


def shards(data: Path) -> list[tuple[dict[str, np.ndarray], dict]]:
    """(arrays, facts) of every shard of drawer-open, in order."""
    folders = sorted((data / "drawer-open").glob("shard_*"))
    assert folders
    return [
        (
            {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in collect.ARRAYS},
            json.loads((folder / "shard.json").read_text()),
        )
        for folder in folders
    ]


# ------------------------------------------------------------------------------------------------ what we rely on in other packages


def test_metaworld_ignores_the_seed_of_reset_but_not_seed():
    env = ALL_V3_ENVIRONMENTS["drawer-open-v3"]()
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    states = []
    for seed, reset_seed in ((1, 7), (1, 8), (2, 7)):
        env.seed(seed)
        states.append(env.reset(seed=reset_seed)[0])
    assert np.array_equal(states[0], states[1]), "reset(seed=) counts now: reconsider DistractingMetaWorld.reset"
    assert not np.array_equal(states[0], states[2])


@pytest.mark.parametrize("task", ["drawer-open", "pick-place"])
def test_an_episode_does_not_depend_on_those_before_it(make_env, task):
    env = make_env(task, videos="generated")
    first, other, again = play(env, 3), play(env, 5), play(env, 3)
    assert equal(first, again) and equal(first, play(make_env(task, videos="generated"), 3))
    assert not equal(first, other)


def test_two_environments_do_not_corrupt_each_others_frames(make_env):
    """A, B, A, also for segments; through gymnasium's own renderer this fails (paper_facts 8)."""
    a = make_env()
    frames, classes = [a.reset(options={"episode": 0})[0]], [a.segments()]
    for action in random_actions(4):
        frames.append(a.step(action)[0])
        classes.append(a.segments())
    b = make_env("door-open", size=48)
    b.reset()
    seen = [a.reset(options={"episode": 0})[0]]
    b.step(np.zeros(4, np.float32))
    seen_classes = [a.segments()]
    for action in random_actions(4):
        seen.append(a.step(action)[0])
        b.step(action)
        seen_classes.append(a.segments())
    assert equal(frames, seen) and equal(classes, seen_classes)


def test_closing_an_environment_leaves_the_others_frames_alone(make_env):
    a, b = make_env(), make_env("door-open")
    expected = play(b, 0) + [b.segments()]
    play(a, 0)
    b.reset()  # b's context is current when a's is freed
    a.close()
    assert equal(expected, play(b, 0) + [b.segments()])
    dropped = make_env.__closure__[0].cell_contents.pop(0)  # an environment that is not closed but collected
    del a, dropped
    gc.collect()
    assert equal(expected, play(b, 0) + [b.segments()])


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4", "topview"])
def test_frames_are_upright_and_not_mirrored(make_env, camera):
    """Drawer and goal marker are drawn where the camera's pose says, with the world's up pointing up in the picture."""
    env = make_env("drawer-open", size=96, camera=camera)
    env.reset(options={"episode": 0})
    pose, classes = env.renderer.pose, env.segments()
    right, up, backward = np.array(pose["rotation"]).T
    if up[2] < 0:  # the camera is upside down; an upright picture is turned by 180 degrees
        right, up = -right, -up
    focal = 48 / np.tan(np.deg2rad(pose["fovy"]) / 2)
    expected, shown = [], []
    for point, name in ((env.inner.data.body("drawer_link").xpos, "object"), (env.inner.data.site("goal").xpos, "goal")):
        ray = point - pose["position"]
        expected.append(48 + focal * np.array([-(ray @ up), ray @ right]) / -(ray @ backward))  # row, column
        shown.append(np.argwhere(classes == SEGMENTS.index(name)).mean(0) + 0.5)
    error = lambda points: np.abs(points - np.array(expected)).max()  # noqa: E731
    assert error(np.array(shown)) < 1.5
    for flip in ((-1, 1), (1, -1), (-1, -1)):  # the two points tell every wrong orientation from the right one
        assert error(48 + (np.array(shown) - 48) * flip) > 3


@pytest.mark.parametrize(
    "task, camera", [("drawer-open", "corner4"), ("reach", "corner"), ("window-open", "corner4"), ("push", "behindGripper")]
)
def test_drawing_what_never_moves_once_changes_no_byte(make_env, task, camera):
    env = make_env(task, camera=camera)
    renderer, data, layered = env.renderer, env.inner.data, task in ("drawer-open", "reach")  # a window's glass is transparent
    for episode in range(2):
        env.reset(options={"episode": episode})
        for action in random_actions(6):
            env.step(action)
            pictures = *(picture.copy() for picture in renderer(data)), renderer.segments(data)
            assert renderer.layered == layered
            renderer.layered = False
            assert equal(pictures, [*renderer(data), renderer.segments(data)])
            renderer.layered = layered
    assert (renderer.fixed_depth < 1).mean() > 0.2


@pytest.mark.parametrize("task", ["reach", "button-press-topdown", "window-open"])
def test_scripted_experts_succeed(make_env, task):
    env = make_env(task, size=16, max_steps=200)
    dropped = [expert_episode(env, slot, noise=0.0, after_success=1)[1] for slot in range(5)]
    assert sum(count == 0 for count in dropped) >= 4, dropped


# ------------------------------------------------------------------------------------------------ environment


def test_gymnasium_accepts_the_environment(make_env):
    env = make_env(videos="generated")
    check_env(env)
    assert np.array_equal(env.reset(seed=3)[0], env.render())


@pytest.mark.parametrize("task", MT10)
def test_every_task_of_mt10(make_env, task):
    env = make_env(task, videos="generated")
    frame, info = env.reset(options={"episode": 0})
    for _ in range(2):
        assert env.observation_space.contains(frame) and frame.shape == (SIZE, SIZE, 3)
        assert info["clean"].shape == frame.shape and info["clean"].dtype == np.uint8
        assert info["mask"].shape == (SIZE, SIZE) and info["mask"].dtype == bool
        assert info["state"].shape == (39,) and info["state"].dtype == np.float32
        assert info["success"] is False and (info["episode"], info["goal"]) == (0, 0)
        assert 0.2 < info["mask"].mean() < 0.6  # camera corner: about 40 % of the picture
        classes = env.segments()
        for name in ("background", "table", "robot", "object"):
            assert (classes == SEGMENTS.index(name)).any(), f"no {name} is seen"
        frame, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert isinstance(reward, float) and terminated is False and truncated is False


@pytest.mark.parametrize("camera", ["corner", "corner2", "behindGripper"])
def test_only_the_background_is_replaced_and_by_the_clip(make_env, camera):
    env = make_env(camera=camera, videos="generated", size=48)
    clips, before = Clips("generated", "train", 48), None
    _, info = env.reset(options={"episode": 1})
    for action in random_actions(8):
        frame, _, _, _, info = env.step(action)
        clean, mask, video = info["clean"], info["mask"], clips[info["clip"]][info["clip_frame"]]
        assert np.array_equal(frame[~mask], clean[~mask])
        assert np.array_equal(frame[inside(mask)], video[inside(mask)]) and inside(mask).mean() > 0.15
        assert np.abs(frame[mask].astype(int) - clean[mask]).mean() > 10, "the twin has the video too"
        assert np.isin(SEGMENTS.index("background"), env.segments()[mask]) and not (env.segments()[~mask] == 0).any()
        assert before is None or abs(info["clip_frame"] - before) == 1, "one frame of the video a step"
        before = info["clip_frame"]


def test_less_distraction(make_env):
    """A still picture, one clip, and a video that shows in some cells alone, those of a quarter being among those of a half."""
    still, one = make_env(videos="generated", video_step=0), make_env(videos="generated", clips=1)
    clips, frames = set(), set()
    for episode in range(8):
        clips.add(one.reset(options={"episode": episode})[1]["clip"])
        still.reset(options={"episode": episode})
        info = [still.step(action)[4] for action in random_actions(3)]
        frames.add(len({step["clip_frame"] for step in info}))
    assert clips == {0} and frames == {1}
    assert len({make_env(videos="generated", clips=1, split="test").reset(options={"episode": e})[1]["clip"] for e in range(8)}) > 3
    masks = {}
    for area in (0.0, 0.25, 0.5, 1.0):
        frame, info = make_env(videos="generated", video_area=area).reset(options={"episode": 0})
        masks[area] = info["mask"]
        assert np.array_equal(frame[~info["mask"]], info["clean"][~info["mask"]])
        cells = np.zeros((8, 8), bool)
        cells[tuple(np.argwhere(info["mask"]).T * 8 // SIZE)] = True
        assert cells.sum() <= 64 * area
    assert masks[0.0].sum() == 0 < masks[0.25].sum() < masks[0.5].sum() < masks[1.0].sum()
    assert not (masks[0.25] & ~masks[0.5]).any() and not (masks[0.5] & ~masks[1.0]).any()


def test_without_videos_there_is_nothing_but_the_twin(make_env):
    frame, info = make_env().reset(options={"episode": 0})
    assert np.array_equal(frame, info["clean"]) and (info["clip"], info["clip_frame"]) == (-1, -1)
    distracted, other = make_env(videos="generated").reset(options={"episode": 0})
    assert np.array_equal(info["clean"], other["clean"]) and not np.array_equal(frame, distracted)


def test_success_is_success_at_any_step_so_far(make_env):
    env, now, expert = make_env("reach", size=16), [], ENV_POLICY_MAP["reach-v3"]()
    inner_step = env.inner.step

    def step(action: np.ndarray) -> tuple:
        result = inner_step(action)
        now.append(bool(result[-1]["success"]))
        return result

    env.inner.step = step
    _, info = env.reset(options={"episode": 0})
    ever = []
    while len(now) < 120:
        away = len(now) > 80
        action = np.array([-1, -1, 1, 0]) if away else expert.get_action(info["state"].astype(np.float64))
        *_, info = env.step(action)
        ever.append(info["success"])
    assert ever == [any(now[: k + 1]) for k in range(len(now))]
    assert not now[0] and any(now) and not now[-1], "the episode must fail, succeed and fail again for this test to say anything"
    assert env.reset()[1]["success"] is False


def test_the_step_limit_truncates_and_never_terminates(make_env):
    env = make_env(max_steps=3)
    for _ in range(2):
        env.reset()
        assert [env.step(action)[2:4] for action in random_actions(3)] == [(False, False), (False, False), (False, True)]


def test_actions_are_clipped(make_env):
    env = make_env()
    states = []
    for scale in (1, 7):
        env.reset(options={"episode": 0})
        states.append(env.step(scale * np.array([1, -1, 1, -1], np.float32))[4]["state"])
    assert equal(states[:1], states[1:])


def test_episode_and_goal_are_chosen_explicitly(make_env):
    env = make_env(videos="generated")
    seen = {}
    for episode, goal in ((4, 4), (9, 9), (4, 9)):
        _, info = env.reset(options={"episode": episode, "goal": goal})
        assert (info["episode"], info["goal"]) == (episode, goal)
        seen[episode, goal] = info["state"], (info["clip"], info["clip_frame"])
    assert np.array_equal(seen[4, 9][0], seen[9, 9][0]) and not np.array_equal(seen[4, 9][0], seen[4, 4][0])
    assert seen[4, 9][1] == seen[4, 4][1] != seen[9, 9][1]
    _, info = env.reset(options={"episode": 4})
    assert info["goal"] == 4 and np.array_equal(info["state"], seen[4, 4][0])
    assert env.reset()[1]["episode"] == 5
    assert env.reset(seed=1)[1]["episode"] == 0


def test_training_and_test_have_no_goal_and_no_clip_in_common(make_env):
    goals, clips = {"train": [], "test": []}, {}
    for split in goals:
        for seed in (0, 1):
            env = make_env(videos="generated", size=16, split=split, seed=seed)
            goals[split] += [tuple(env.reset(options={"episode": episode})[1]["state"][4:7]) for episode in range(4)]
        clips[split] = set(env.clips.names)
    assert len({*goals["train"], *goals["test"]}) == 16
    assert clips["train"] and clips["test"] and not clips["train"] & clips["test"]


def test_episode_rng():
    draw = lambda *key: int(episode_rng(*key).integers(2**31))  # noqa: E731
    keys = [(0, "reach", 0), (1, "reach", 0), (0, "push", 0), (0, "reach", 1), (0, "reach", 0, "test")]
    assert draw(0, "reach", 0) == draw(0, "reach", 0, "train") and len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == GOLDEN_DRAWS, "every data set ever made would come out different"


GOLDEN_DRAWS = [1118621336, 811605164, 246113598, 1844406700, 2110678296]


def test_the_camera_moves_backward(make_env):
    near, far = make_env(videos="generated"), make_env(videos="generated", camera_distance=0.3)
    shift = np.subtract(far.renderer.pose["position"], near.renderer.pose["position"])
    assert np.allclose(shift, 0.3 * np.array(near.renderer.pose["rotation"])[:, 2], atol=1e-5)
    assert far.renderer.pose["rotation"] == near.renderer.pose["rotation"]
    sizes = []
    for env in (near, far):
        env.reset(options={"episode": 0})
        sizes.append((env.segments() == SEGMENTS.index("object")).sum())
    assert 0 < sizes[1] < 0.9 * sizes[0], "what is farther away is smaller"


# ------------------------------------------------------------------------------------------------ trajectories


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory) -> Path:
    """2 episodes with action noise, from a camera moved backward, collected without embeddings by two processes."""
    folder = tmp_path_factory.mktemp("noisy")
    data, run = "--camera corner --episodes-per-task 2 --size 32 --noise 0.3 --camera-distance 0.2", "--shard-episodes 1 --workers 2"
    made = run_script("collect.py", *data.split(), *run.split(), "--encoder", "none", "--out", "noisy", cwd=folder)
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
    meta, slot = json.loads((data / "meta.json").read_text()), 0
    assert meta["tasks"] == ["drawer-open"] and [f"drawer-open/shard_{k:05d}" for k in range(len(meta["shards"]))] == [
        facts["shard"] for facts in meta["shards"]
    ]
    for (arrays, facts), listed in zip(shards(data), meta["shards"], strict=True):
        assert facts == listed
        for key, (dtype, shape) in KINDS.items():
            assert arrays[key].dtype == dtype and arrays[key].shape == (facts["frames"], *shape), key
        assert np.abs(arrays["actions"]).max() <= 1 and arrays["segments"].max() < len(SEGMENTS)
        assert facts["background"] == pytest.approx((arrays["segments"] == 0).mean()) and 0.2 < facts["background"] < 0.7
        for episode in range(facts["episodes"]):
            rows = np.flatnonzero(arrays["episode"] == slot + episode)
            assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1)), "an episode's rows follow each other"
            assert np.array_equal(arrays["step"][rows], np.arange(len(rows))), "each frame once, in order"
            success = arrays["success"][rows]
            assert success.sum() == 5 and success[-5:].all(), "the episode ends with the fifth frame of success"
            assert not arrays["actions"][rows[-1]].any() and arrays["rewards"][rows[-1]] == 0, "nothing was done after the last frame"
            assert (np.abs(np.diff(arrays["video"][rows], axis=0)) == (0, 1)).all(), "one clip, one frame of it a step"
        slot += facts["episodes"]
    assert slot == meta["episodes_per_task"] and len({tuple(a["states"][0]) for a, _ in shards(data)}) == len(shards(data))


@pytest.mark.parametrize("name", ["tiny_data", "noisy_data"])
def test_the_action_stored_is_the_action_executed(name, request):
    """Replayed in the environment that meta.json describes, the stored actions give the stored frames, twins, states and rewards."""
    data = request.getfixturevalue(name)
    meta = json.loads((data / "meta.json").read_text())
    arrays, facts = shards(data)[-1]
    env = DistractingMetaWorld("drawer-open", split="train", seed=meta["seed"], **meta["env"])
    slot = int(arrays["episode"][0])
    frame, info = env.reset(options={"episode": slot + 1_000_000 * facts["attempts"][0]})
    for row in np.flatnonzero(arrays["episode"] == slot):
        assert np.array_equal(arrays["frames"][row], frame) and np.array_equal(arrays["clean"][row], info["clean"])
        assert np.array_equal(arrays["states"][row], info["state"]) and np.array_equal(arrays["segments"][row], env.segments())
        assert arrays["video"][row].tolist() == [info["clip"], info["clip_frame"]] and arrays["success"][row] == info["success"]
        frame, reward, _, _, info = env.step(arrays["actions"][row])
        assert arrays["rewards"][row] in (np.float32(reward), 0)
    assert meta["camera_pose"] == env.renderer.pose
    env.close()


def test_noise_is_added_to_the_experts_actions(tiny_data, noisy_data):
    expert = ENV_POLICY_MAP["drawer-open-v3"]()
    for data, std in ((tiny_data, 0), (noisy_data, 0.3)):
        arrays, _ = shards(data)[0]
        rows = np.flatnonzero((arrays["episode"] == 0) & (arrays["step"] < (arrays["episode"] == 0).sum() - 1))
        wanted = np.clip([expert.get_action(state) for state in arrays["states"][rows].astype(np.float64)], -1, 1)
        noise = (arrays["actions"][rows] - wanted)[np.abs(arrays["actions"][rows]) < 1]
        if std == 0:
            assert np.abs(arrays["actions"][rows] - wanted).max() < 1e-6
        else:
            assert 0.2 < noise.std() < 0.4


def test_the_camera_distance_is_in_meta_json(tiny_data, noisy_data):
    near, far = (json.loads((data / "meta.json").read_text()) for data in (tiny_data, noisy_data))
    assert (near["env"]["camera_distance"], far["env"]["camera_distance"]) == (0, 0.2)
    shift = np.subtract(far["camera_pose"]["position"], near["camera_pose"]["position"])
    assert np.linalg.norm(shift) == pytest.approx(0.2, abs=1e-4)


def collect_tiny(folder: Path, *flags: object):
    """The command of the fixture `tiny_data`, in another folder."""
    return run_script("collect.py", *TINY, "--prompt", "best", "blind", "--out", "data/tiny", *flags, cwd=folder)


def test_killed_with_two_workers_and_started_again_makes_the_bytes_of_one_uninterrupted_worker(tiny_data, tmp_path):
    """kill -9 between two shards: the workers die with their parent, the same command goes on, every file is that of `tiny_data`."""
    out, flags = tmp_path / "data/tiny", ["--workers", 2, *TINY, "--prompt", "best", "blind", "--out", "data/tiny"]
    done = lambda: len(list(out.glob("drawer-open/shard_*")))  # noqa: E731
    kill_when(start_script("collect.py", *flags, cwd=tmp_path), lambda: done() > 0)
    assert done() > 0 and "shards" not in json.loads((out / "meta.json").read_text()), "killed before the end"
    (out / "drawer-open/.tmp_shard_00002").mkdir(exist_ok=True)  # what a kill in the middle of writing leaves
    (out / "drawer-open/.tmp_shard_00002/frames.npy").write_bytes(b"half a fi")
    made = run_script("collect.py", *flags, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert digests(out) == digests(tiny_data)
    assert "5 episodes" in made.stdout and "frames/s" in made.stdout


def test_two_ranks_make_the_bytes_of_one(tiny_data, tmp_path):
    """Shards and embeddings are divided among the processes of torchrun; a second command finds nothing left to do."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "collect.py"]
    command = [sys.executable, *launcher, *TINY, "--workers", 1, "--prompt", "best", "blind", "--out", "data/tiny"]
    for fact in ("a rank", "nothing left to do"):
        made = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert made.returncode == 0 and made.stdout.count("5 episodes") == 1 and fact in made.stdout, made.stderr
        assert digests(tmp_path / "data/tiny") == digests(tiny_data)


# ------------------------------------------------------------------------------------------------ oracle and cache


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
    ],
)
def test_the_prompt_decides_what_the_oracle_keeps(prompt, kept):
    assert {SEGMENTS[index] for index in named_segments(prompt_text(prompt, "drawer-open"), "drawer-open")} == kept


def test_the_object_is_filled_in_for_each_task():
    assert prompt_text("best", "door-open").endswith("Focus on the robot arm and the door.")
    assert prompt_text("{object}!", "reach") == "puck!"
    assert set(collect.OBJECTS) == set(collect.TASKS)
    for task in collect.TASKS:
        assert SEGMENTS.index("object") in named_segments(prompt_text("best", task), task)


def test_the_embedding_ignores_what_the_prompt_does_not_name(tiny_data):
    arrays, _ = shards(tiny_data)[0]
    frames, classes = arrays["frames"][:40:8], arrays["segments"][:40:8]

    def embed(pictures: np.ndarray, prompt: str, background_kept: float = 0.0) -> np.ndarray:
        text = prompt_text(prompt, "drawer-open")
        return Oracle(background_kept)(pictures, [text], classes, "drawer-open")[text, 0, "all"]

    for kept, name, prompt in (
        (False, "background", "best"),
        (True, "background", "blind"),
        (True, "robot", "best"),
        (False, "object", "arm"),
    ):
        changed = np.where((classes == SEGMENTS.index(name))[..., None], 255 - frames, frames)
        assert np.array_equal(embed(frames, prompt), embed(changed, prompt)) != kept, (name, prompt)
    changed = np.where((classes == 0)[..., None], 255 - frames, frames)
    effect = [np.abs(embed(frames, "best", a) - embed(changed, "best", a)).mean() for a in (0, 0.5, 1)]
    full = np.abs(embed(frames, "blind") - embed(changed, "blind")).mean()
    assert effect[0] == 0 and effect[1] == pytest.approx(full / 2, rel=0.1) and effect[2] == pytest.approx(full, rel=0.01)


def test_twins_have_nearly_the_same_embedding_under_the_best_prompt(tiny_data):
    """Pixels at the robot's edge mix with the background, so nearly."""
    arrays, _ = shards(tiny_data)[0]
    distance = {}
    for prompt in ("best", "blind"):
        text = prompt_text(prompt, "drawer-open")
        twins = [Oracle()(arrays[name], [text], arrays["segments"], "drawer-open")[text, 0, "all"] for name in ("frames", "clean")]
        distance[prompt] = np.linalg.norm(twins[0] - twins[1], axis=1).mean()
    assert 0 < distance["best"] < 0.15 * distance["blind"]


def test_cached_embeddings_are_those_of_the_frames(tiny_data):
    for (arrays, facts), folder in zip(shards(tiny_data), sorted((tiny_data / "drawer-open").glob("shard_*")), strict=True):
        for prompt in ("best", "blind"):
            path = folder / "embeddings" / f"oracle_{prompt}_L0_all_r1.npy"
            cached, about = np.load(path, allow_pickle=False), json.loads(path.with_suffix(".json").read_text())
            text = prompt_text(prompt, "drawer-open")
            expected = Oracle()(arrays["frames"], [text], arrays["segments"], "drawer-open")[text, 0, "all"]
            assert cached.dtype == np.float16 and np.allclose(cached, expected, atol=0.01) and expected.std() > 0.1
            assert (about["prompt"], about["text"], about["frames_sha256"]) == (prompt, text, facts["sha256"]["frames"])
            assert about["sha256"] == collect.sha256(path) and about["dim"] == cached.shape[1]


@pytest.fixture
def copy(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data set that a test may damage; the command that made it goes on there, in the folder tmp_path."""
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    return tmp_path / "data/tiny"


def test_another_prompt_adds_only_its_own_files(copy, tmp_path):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}
    made = run_script("collect.py", *TINY, "--prompt", "Look at the gripper.", "--out", "data/tiny", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    added = {path for path in copy.rglob("*") if path.is_file()} - set(before)
    assert len(added) == 6 and {path.parent.name for path in added} == {"embeddings"} and len({path.stem for path in added}) == 1
    for path, (modified, content) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == modified or path.name == "meta.json", path
    about = json.loads(min(path for path in added if path.suffix == ".json").read_text())
    assert about["prompt"] == "Look at the gripper."


# ------------------------------------------------------------------------------------------------ bad input


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
    "a clip less than none": ("--clips -1", "--clips"),
    "expert fails": ("--max-steps 2 --workers 2 --shard-episodes 1 --episodes-per-task 2", "--max-steps"),
}


@pytest.mark.parametrize("flags, hint", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused(flags, hint, tmp_path):
    assert hint in refusal(run_script("collect.py", "--size", 16, *flags.split(), "--out", "data/bad", cwd=tmp_path))


def test_no_opengl_says_what_to_install(tmp_path):
    result = run_script("collect.py", *TINY, cwd=tmp_path, MUJOCO_GL="disable")
    assert "apt-get install" in refusal(result)


def refused_and_untouched(copy: Path, tmp_path: Path, *flags: object) -> str:
    before = digests(copy)
    message = refusal(collect_tiny(tmp_path, *flags))
    assert digests(copy) == before, "a refused command changed the data set"
    return message


@pytest.mark.parametrize(
    "flags, hint", [(["--seed", 1], "seed"), (["--noise", 0.5], "noise"), (["--size", 48], "size"), (["--clips", 1], "clips")]
)
def test_other_arguments_into_the_same_folder_are_refused(copy, tmp_path, flags, hint):
    message = refused_and_untouched(copy, tmp_path, *flags)
    assert hint in message and "--out" in message


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
    assert "drawer-open/shard_00001" in message and "frames.npy" in message and "delete that folder" in message


def test_a_damaged_shard_is_made_again(copy, tmp_path, tiny_data):
    shutil.rmtree(copy / "drawer-open/shard_00002")  # as the message says
    assert collect_tiny(tmp_path).returncode == 0
    assert digests(copy) == digests(tiny_data)


@pytest.mark.parametrize("name", ["meta.json", "drawer-open/shard_00001/shard.json"])
def test_a_cut_json_file_is_named(copy, tmp_path, name):
    cut(copy / name)
    assert str(Path(name).parent if "shard.json" in name else name) in refused_and_untouched(copy, tmp_path)


def of_other_frames(path: Path) -> None:
    path.write_text(path.read_text().replace(json.loads(path.read_text())["frames_sha256"], "0" * 64))


@pytest.mark.parametrize("damage, suffix", [(of_other_frames, ".json"), (cut, ".json"), (flip_a_byte, ".npy"), (Path.unlink, ".npy")])
def test_foreign_and_damaged_embeddings_are_refused(copy, tmp_path, damage, suffix):
    path = copy / "drawer-open/shard_00001/embeddings/oracle_best_L0_all_r1.json"
    damage(path.with_suffix(suffix))
    assert str(path.relative_to(tmp_path)) in refused_and_untouched(copy, tmp_path)


@pytest.mark.parametrize("flags, hint", [(["--layers", 7], "it has 0"), (["--pools", "cls"], "it has all")])
def test_unknown_layers_and_pools_are_refused(copy, tmp_path, flags, hint):
    assert hint in refused_and_untouched(copy, tmp_path, *flags)


def test_a_folder_in_use_is_refused(copy, tmp_path):
    with open(copy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing data/tiny" in refused_and_untouched(copy, tmp_path)
    assert collect_tiny(tmp_path).returncode == 0, "the lock is gone with its holder"


# ------------------------------------------------------------------------------------------------ arguments


def test_presets():
    assert collect.parse_args([]) == collect.parse_args(["quick"]) == collect.QUICK
    paper = collect.parse_args(["paper", "--videos", "generated", "--seed", "3"])
    assert (paper.tasks, paper.videos, paper.seed) == (MT10, "generated", 3)
    assert (
        (paper.size, paper.episodes_per_task)
        == (collect.PAPER.size, collect.PAPER.episodes_per_task)
        != (
            collect.QUICK.size,
            collect.QUICK.episodes_per_task,
        )
    )
    assert collect.parse_args(["--tasks", "mt10", "reach"]).tasks == MT10


def test_every_flag_has_help(capsys):
    body = next(
        node.body for node in ast.parse(Path(collect.__file__).read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    with pytest.raises(SystemExit):
        collect.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(collect.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        assert f"--{flag.target.id.replace('_', '-')}" in text and doc.value.value in text
