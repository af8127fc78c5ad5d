"""Environment, trajectories, oracle and cache of collect.py, and what they rely on in MetaWorld and MuJoCo. Backgrounds: test_videos.py."""

import ast
import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, digests, kill_when, refusal, run_script, start_script
from gymnasium.utils.env_checker import check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

import collect
from collect import MT10, SEGMENTS, Clips, DistractingMetaWorld, Oracle, episode_rng, expert_episode, named_segments, prompt_text

SIZE = 32


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


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)).astype(np.float32)


def rollout(env: DistractingMetaWorld, episode: int, count: int = 5) -> list[np.ndarray]:
    """Frames and states of an episode under fixed actions."""
    seen = [env.reset(options={"episode": episode})] + [env.step(action)[:5:4] for action in actions(count)]
    return [array for frame, info in seen for array in (frame, info["state"])]


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


# ------------------------------------------------------------------------------------------------ what we rely on in other packages


def test_metaworld_ignores_the_seed_of_reset_but_not_seed():
    env = ALL_V3_ENVIRONMENTS["drawer-open-v3"]()
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    states = []
    for seed, reset_seed in ((1, 7), (1, 8), (2, 7)):
        env.seed(seed)
        states.append(env.reset(seed=reset_seed)[0])
    assert np.array_equal(states[0], states[1]), "reset(seed=) counts now: DistractingMetaWorld.reset should be reconsidered"
    assert not np.array_equal(states[0], states[2])


@pytest.mark.parametrize("task", ["drawer-open", "pick-place"])
def test_an_episode_does_not_depend_on_those_before_it(make_env, task):
    env = make_env(task, videos="generated")
    first, other, again = rollout(env, 3), rollout(env, 5), rollout(env, 3)
    assert equal(first, again) and equal(first, rollout(make_env(task, videos="generated"), 3))
    assert not equal(first, other)


def test_two_environments_do_not_corrupt_each_others_frames(make_env):
    """A, B, A: through gymnasium's own renderer this fails."""
    a = make_env()
    alone = rollout(a, 0)
    b = make_env("door-open", size=48)
    seen = list(a.reset(options={"episode": 0})[0:1])
    b.reset()
    frames = [seen[0]]
    for action in actions(5):
        frames.append(a.step(action)[0])
        b.step(action)
    assert equal(alone[::2], frames)


@pytest.mark.parametrize("camera", collect.CAMERAS)
def test_frames_are_upright_and_not_mirrored(make_env, camera):
    """The hand is drawn where the pose of the camera says, with the world's up pointing up in the picture."""
    env = make_env("drawer-open", size=64, camera=camera)
    env.reset(options={"episode": 0})
    before = env.segments()
    position = env.inner.data.body("hand").xpos.copy()
    for _ in range(25):
        _, _, _, _, info = env.step(np.array([1, -1, 1, 0], np.float32))
    moved = env.inner.data.body("hand").xpos - position
    right, up, backward = np.array(env.renderer.pose["rotation"]).T
    if up[2] < 0:  # an upside-down camera: upright means turned by 180 degrees
        right, up = -right, -up
    if camera == "gripperPOV":  # moves with the hand: the world moves the other way
        assert up[2] >= 0
        return
    centre = np.array(env.renderer.pose["position"])
    focal = 32 / np.tan(np.deg2rad(env.renderer.pose["fovy"]) / 2)

    def pixel(point: np.ndarray) -> np.ndarray:
        ray = point - centre
        return 32 + focal * np.array([-(ray @ up), ray @ right]) / -(ray @ backward)

    expected = pixel(position + moved) - pixel(position)
    after = env.segments()
    middle = [np.argwhere((frame == 2) & (other != 2)).mean(0) for frame, other in ((before, after), (after, before))]
    shown = middle[1] - middle[0]
    cosine = shown @ expected / np.linalg.norm(shown) / np.linalg.norm(expected)
    assert cosine > 0.8, (shown, expected)
