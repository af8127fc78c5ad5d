"""The environment of common/distracting_metaworld.py, and what it relies on in MetaWorld and MuJoCo."""

import gc
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from collect import expert_episode
from common.distracting_metaworld import DistractingMetaWorld, background_index, episode_rng
from common.shards import SEGMENTS
from common.tasks import INSTRUCTIONS, MT10, OBJECTS, TASKS, task_name
from common.video_clips import Clips

SIZE = 32
pytestmark = pytest.mark.filterwarnings(
    "ignore:Constant.* may be too high", "ignore:.*alternative render modes"
)


@pytest.fixture
def make_env():
    """Builds environments of 32 px (camera corner, no distractors unless asked for), closed at the end."""
    made = []

    def make(task: str = "drawer-open", **kwargs) -> DistractingMetaWorld:
        defaults = {"videos": "none", "size": SIZE, "camera": "corner"}
        made.append(DistractingMetaWorld(task, **defaults | kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def random_actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)).astype(np.float32)


def play(env: DistractingMetaWorld, episode: int, steps: int = 6) -> list[np.ndarray]:
    """Frame and state at each step of an episode under fixed actions."""
    frame, info = env.reset(options={"episode": episode})
    seen = [frame, info["state"]]
    for action in random_actions(steps):
        frame, _, _, _, info = env.step(action)
        seen += [frame, info["state"]]
    return seen


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def inside(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask whose eight neighbours are in it too: there nothing but background is seen."""
    n, padded = len(mask), np.pad(mask, 1)
    return np.min([padded[y : y + n, x : x + n] for y in range(3) for x in range(3)], axis=0)


# ----------------------------------------------------------------------------------- other packages


def test_metaworld_ignores_the_seed_of_reset_but_not_seed():
    env = ALL_V3_ENVIRONMENTS["drawer-open-v3"]()
    env._freeze_rand_vec = False
    env.seeded_rand_vec = env._set_task_called = True
    states = []
    for seed, reset_seed in ((1, 7), (1, 8), (2, 7)):
        env.seed(seed)
        states.append(env.reset(seed=reset_seed)[0])
    assert np.array_equal(states[0], states[1]), "reset(seed=) counts now: reconsider our own reset"
    assert not np.array_equal(states[0], states[2])


@pytest.mark.parametrize("task", ["drawer-open", "pick-place"])
def test_an_episode_does_not_depend_on_those_before_it(make_env, task):
    env = make_env(task, videos="generated")
    first, other, again = play(env, 3), play(env, 5), play(env, 3)
    assert equal(first, again) and equal(first, play(make_env(task, videos="generated"), 3))
    assert not equal(first, other)


def test_two_environments_do_not_corrupt_each_others_frames(make_env):
    """A, B, A, also for segments; through gymnasium's own renderer this fails."""
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
    """Drawer and goal marker are where the camera's pose says; the world's up points up in the picture."""
    env = make_env("drawer-open", size=96, camera=camera)
    env.reset(options={"episode": 0})
    pose, classes = env.renderer.pose, env.segments()
    right, up, backward = np.array(pose["rotation"]).T
    if up[2] < 0:  # the camera is upside down; an upright picture is turned by 180 degrees
        right, up = -right, -up
    focal = 48 / np.tan(np.deg2rad(pose["fovy"]) / 2)
    expected, shown = [], []
    for point, name in (
        (env.inner.data.body("drawer_link").xpos, "object"),
        (env.inner.data.site("goal").xpos, "goal"),
    ):
        ray = point - pose["position"]
        expected.append(48 + focal * np.array([-(ray @ up), ray @ right]) / -(ray @ backward))  # row, column
        shown.append(np.argwhere(classes == SEGMENTS.index(name)).mean(0) + 0.5)
    expected, shown = np.array(expected), np.array(shown)
    assert np.abs(shown - expected).max() < 1.5
    for flip in ((-1, 1), (1, -1), (-1, -1)):  # two points tell every wrong orientation from the right one
        flipped = 48 + (shown - 48) * flip
        assert np.abs(flipped - expected).max() > 3


@pytest.mark.parametrize(
    "task, camera",
    [("drawer-open", "corner4"), ("reach", "corner"), ("window-open", "corner4"), ("push", "behindGripper")],
)
def test_drawing_what_never_moves_once_changes_no_byte(make_env, task, camera):
    env = make_env(task, camera=camera)
    renderer, data = env.renderer, env.inner.data
    layered = task in ("drawer-open", "reach")  # a window's glass is transparent, behindGripper moves
    for episode in range(2):
        env.reset(options={"episode": episode})
        for action in random_actions(6):
            env.step(action)
            pictures = [picture.copy() for picture in renderer.render(data)] + [renderer.segments(data)]
            assert renderer.layered == layered
            renderer.layered = False
            assert equal(pictures, [*renderer.render(data), renderer.segments(data)])
            renderer.layered = layered
    assert (renderer.fixed_depth < 1).mean() > 0.2


@pytest.mark.parametrize("task", ["reach", "button-press-topdown", "window-open"])
def test_scripted_experts_succeed(make_env, monkeypatch, task):
    """A matter of states, not of pictures: all are those of the first frame."""
    env = make_env(task, size=16, max_steps=200)
    env.reset(options={"episode": 0})
    pictures, classes = env.renderer.render(env.inner.data), env.segments()
    monkeypatch.setattr(env.renderer, "render", lambda data: pictures)
    monkeypatch.setattr(env, "segments", lambda: classes)
    dropped = [expert_episode(env, episode, noise=0.0, after_success=1)[1] for episode in range(5)]
    assert sum(count == 0 for count in dropped) >= 4, dropped


# ----------------------------------------------------------------------------------- environment


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
        background = env.segments() == SEGMENTS.index("background")
        assert background[mask].any() and not background[~mask].any()
        assert before is None or abs(info["clip_frame"] - before) == 1, "one frame of the video a step"
        before = info["clip_frame"]


def test_less_distraction(make_env):
    """A still picture, one clip, and a video in some squares alone: a quarter's are among those of a half."""
    still, one = make_env(videos="generated", video_step=0), make_env(videos="generated", clips=1)
    clips, frames = set(), set()
    for episode in range(8):
        clips.add(one.reset(options={"episode": episode})[1]["clip"])
        still.reset(options={"episode": episode})
        info = [still.step(action)[4] for action in random_actions(3)]
        frames.add(len({step["clip_frame"] for step in info}))
    assert clips == {0} and frames == {1}
    unseen = make_env(videos="generated", clips=1, split="test")
    assert len({unseen.reset(options={"episode": episode})[1]["clip"] for episode in range(8)}) > 3
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
    assert not now[0] and any(now) and not now[-1], (
        "the episode must fail, succeed and fail again for this test to say anything"
    )
    assert env.reset()[1]["success"] is False


def test_the_step_limit_truncates_and_never_terminates(make_env):
    env = make_env(max_steps=3)
    for _ in range(2):
        env.reset()
        assert [env.step(action)[2:4] for action in random_actions(3)] == [
            (False, False),
            (False, False),
            (False, True),
        ]


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
            goals[split] += [
                tuple(env.reset(options={"episode": episode})[1]["state"][4:7]) for episode in range(4)
            ]
        clips[split] = set(env.clips.names)
    assert len({*goals["train"], *goals["test"]}) == 16
    assert clips["train"] and clips["test"] and not clips["train"] & clips["test"]


def test_episode_rng():
    keys = [(0, "reach", 0), (1, "reach", 0), (0, "push", 0), (0, "reach", 1), (0, "reach", 0, "test")]
    draws = [int(episode_rng(*key).integers(2**31)) for key in keys]
    assert draws[0] == int(episode_rng(0, "reach", 0, "train").integers(2**31))
    assert len(set(draws)) == len(keys)
    assert draws == GOLDEN_DRAWS, "every data set ever made would come out different"


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


def test_a_camera_on_the_hand_does_not_move_backward(make_env):
    with pytest.raises(SystemExit, match="gripperPOV sits on the hand"):
        make_env(videos="none", camera="gripperPOV", camera_distance=0.3)


def test_metaworlds_own_names_are_accepted(make_env):
    own, short = make_env("drawer-open-v3"), make_env("drawer-open")
    assert own.task == "drawer-open" and equal(play(own, 0, steps=1), play(short, 0, steps=1))


def test_the_50_tasks_are_metaworlds():
    assert {f"{task}-v3" for task in TASKS} == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(TASKS) == 50 and set(MT10) < set(TASKS) and len(set(MT10)) == 10
    assert len(set(INSTRUCTIONS.values())) == 50, "no two tasks are asked for in the same words"
    for task in TASKS:
        assert OBJECTS[task] and INSTRUCTIONS[task].islower() and not INSTRUCTIONS[task].endswith(".")
        assert task_name(task) == task_name(f"{task}-v3") == task


@pytest.mark.parametrize(
    "name, near", [("drawr-open", "drawer-open"), ("dor-open-v3", "door-open"), ("mt1", "mt10")]
)
def test_an_unknown_task_suggests_the_nearest(name, near):
    with pytest.raises(SystemExit, match=f"unknown task.*{near}"):
        task_name(name)


def test_the_simulators_pace_is_what_the_metadata_says(make_env):
    env = make_env()
    assert 1 / env.inner.dt == pytest.approx(env.metadata["render_fps"])


def test_the_environment_is_imported_without_torch():
    heavy = {"torch", "transformers", "matplotlib", "collect"}
    program = f"import sys, common.distracting_metaworld; assert not {heavy!r} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------ what a slip of one line would change


def test_the_video_runs_at_its_pace_and_both_ways(make_env):
    env, directions = make_env(videos="generated", size=16, video_step=3), set()
    for episode in range(8):
        env.reset(options={"episode": episode})
        directions.add(env.direction)
    shown = [env.step(action)[4]["clip_frame"] for action in random_actions(5)]
    length = len(env.clips[env.clip])
    assert shown == [background_index(env.start, env.direction, 3 * k, length) for k in range(1, 6)]
    assert directions == {-1, 1}
