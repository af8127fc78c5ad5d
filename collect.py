"""Trajectories of Distracting MetaWorld, rendered with and without a moving background, and cached embeddings of them.

    python collect.py                                            quick: drawer-open, 80 episodes, generated backgrounds, oracle embeddings
    python collect.py paper --videos davis                       all of MT10, 5000 episodes a task, DAVIS-2017 backgrounds
    python collect.py --videos my_clips/ --out data/mine         a folder of video files or of frame folders as backgrounds
    python collect.py --prompt blind                             adds the embeddings of another prompt to the same data
    torchrun --nproc_per_node=4 collect.py ...                   shards and their embeddings divided among four processes, machines or GPUs

Part 1 is the environment and its trajectories, part 2 the encoders and their cache; each can be read alone. Data layout: README, "Files".
A command that was cut off goes on where it stopped; the files are equal, byte for byte, whatever the number of workers and interruptions.
"""

from __future__ import annotations

import atexit
import colorsys
import concurrent.futures
import contextlib
import difflib
import fcntl
import glob
import hashlib
import http.client
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal


def pick_headless_gl() -> None:
    """Sets MUJOCO_GL (unless the user did) to the first of EGL and OSMesa that really opens a context; must run before `import mujoco`."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of software rendering: more make small pictures slower, and fight among processes
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    for backend in ("egl", "osmesa"):
        environ = {**os.environ, "MUJOCO_GL": backend}
        probe = [sys.executable, "-c", "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"]
        if subprocess.run(probe, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    os.environ["MUJOCO_GL"] = "disable"  # the simulator still works; DistractingMetaWorld says what to install


pick_headless_gl()

import gymnasium  # noqa: E402
import imageio.v3 as iio  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from PIL import Image, ImageDraw, ImageOps, ImageSequence  # noqa: E402
from tqdm import tqdm  # noqa: E402

# fmt: off
MT10 = ("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown", "peg-insert-side", "window-open",
        "window-close")
TASKS = tuple(sorted(name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS))
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
MOVING = mujoco.mjtCatBit.mjCAT_DYNAMIC | mujoco.mjtCatBit.mjCAT_DECOR
SEGMENTS = ("background", "table", "robot", "object", "goal")  # classes of segments.npy
# fmt: on


@dataclass
class Args:
    tasks: tuple[str, ...] = ("drawer-open",)
    """MetaWorld tasks without "-v3"; `mt10` stands for the ten of MT10"""
    episodes_per_task: int = 80
    """episodes a task (lam_vlm.py keeps the last fifth for its probes: 64 + 16)"""
    videos: str = "generated"
    """backgrounds: generated, davis, none (no distractors anywhere), or the path of a folder of clips or of a DAVIS archive"""
    clips: int = 0
    """train on the first so many clips alone; 0: on all (the unseen ones of the evaluation stay all)"""
    video_step: int = 1
    """video frames that pass in an environment step; 0: a still picture for the whole episode"""
    video_area: float = 1.0
    """share of the background that shows the video, 0 to 1: of 8 x 8 cells of the picture, in a fixed random order"""
    size: int = 64
    """side of the frames in pixels"""
    camera: str = "corner4"
    """camera of MetaWorld: corner, corner2, corner3, corner4, topview, behindGripper, gripperPOV"""
    camera_distance: float = 0.0
    """metres that the camera is moved backward, for a wider view"""
    max_steps: int = 150
    """step limit of an episode, 500 at most"""
    after_success: int = 5
    """frames of an episode from its first success on, at least 1"""
    noise: float = 0.0
    """std of the Gaussian noise added to the expert's actions; the action stored is the action executed"""
    shard_episodes: int = 5
    """episodes a shard: what a killed run loses at most, for each worker"""
    workers: int = 0
    """processes; 0: one a core"""
    seed: int = 0
    """seed of goals, backgrounds and noise"""
    out: str = "data/quick"
    """folder of the data set"""
    encoder: str = "oracle"
    """oracle, none, random (a ViT never trained: a floor), otter:<CLIP>, or a hub id or local folder of a VLM, DINOv2, CLIP or SigLIP"""
    prompt: tuple[str, ...] = ("best",)
    """prompts, each a preset (best, positive, arm, object, blind) or a text of your own; {object} is filled per task"""
    layers: tuple[int, ...] = ()
    """layers to export; none given: the encoder's default"""
    pools: tuple[str, ...] = ()
    """token pools to export; none given: the encoder's default"""
    background_kept: float = 0.0
    """oracle only: fraction of what the prompt does not name that leaks into the embedding, 0 to 1"""
    otter_temperature: float = 0.07
    """otter only: temperature of the softmax over patches"""
    trust_remote_code: bool = False
    """Molmo only: run the Python code that comes with the model, on this machine and with your rights"""
    model_revision: str = ""
    """commit or branch of a hub id; none given: a pinned commit for Molmo, main for others"""
    encoder_batch: int = 0
    """images a batch of an encoder with weights; 0: a guess, halved when memory runs out"""
    embedding_dtype: Literal["float16", "float32"] = "float16"
    """numbers that embeddings are stored as"""
    list_embeddings: bool = False
    """print which embeddings the data set --out has, and stop"""


QUICK = Args()
PAPER = replace(
    QUICK, tasks=("mt10",), episodes_per_task=5000, videos="davis", size=128, max_steps=500, shard_episodes=50, camera_distance=0.6,
    out="data/paper",
)  # fmt: skip
PRESETS = {"quick": QUICK, "paper": PAPER}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun: shard n is made by rank n % WORLD


def fail(message: str) -> None:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f"collect.py: {message}")


def wait_for_all_ranks() -> None:
    """A barrier, under torchrun; the ranks share the folder of the data set."""
    if WORLD > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest shard may take long
        dist.barrier()


def nearest(word: str, names: tuple[str, ...] | list[str], what: str) -> str:
    """One line for an unknown name: the nearest valid ones, or all of them when none is near."""
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    return f"unknown {what} {word!r}; " + (f"did you mean {', '.join(close)}?" if close else f"valid: {', '.join(names)}")


# ------------------------------------------------------------------------------------------------ environment


def episode_rng(seed: int, task: str, episode: int, split: str = "train") -> np.random.Generator:
    """The one source of chance of an episode: goal, clip, start frame, direction, action noise. `split` keeps test episodes apart."""
    return np.random.default_rng([seed, episode, *f"{split}/{task}".encode()])


class Renderer:
    """Colour, depth and (on demand) segmentation of one MuJoCo model, from one off-screen context of its own.

    Two MetaWorld environments rendered through gymnasium in one process corrupt each other's frames; a private context is exact. Shadows,
    reflections and multisampling are off: pictures are drawn at twice the size and averaged down instead, which is 10x faster. What never
    moves is drawn once, and each frame's moving bodies into it by their depth: the same bytes as in one pass, which is what is done where
    something is transparent or the camera moves.
    """

    def __init__(self, model: mujoco.MjModel, size: int, camera: str, camera_distance: float):
        if not hasattr(mujoco, "GLContext"):
            fail("no OpenGL for headless rendering; install one, e.g. `apt-get install libegl1 libgl1-mesa-dri` (or `libosmesa6`)")
        model.vis.global_.offwidth = model.vis.global_.offheight = 2 * size
        model.vis.quality.offsamples = 0
        self.model, self.side = model, 2 * size
        try:
            self.gl = mujoco.GLContext(self.side, self.side)
            self.gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # the loaders of EGL and OSMesa raise their own types
            fail(f"OpenGL ({os.environ.get('MUJOCO_GL', 'default')}) opens no context: {error}; try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene, self.option, self.perturb = mujoco.MjvScene(model, maxgeom=2000), mujoco.MjvOption(), mujoco.MjvPerturb()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scene.flags[flag] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type, self.camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(camera).id
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        rotation = data.cam_xmat[self.camera.fixedcamid].reshape(3, 3)  # columns: right, up, backward
        model.cam_pos[self.camera.fixedcamid] += camera_distance * rotation[:, 2]
        self.upside_down = rotation[2, 1] < 0  # every corner camera of MetaWorld is
        self.pose = {"position": (data.cam_xpos[self.camera.fixedcamid] + camera_distance * rotation[:, 2]).round(6).tolist()}
        self.pose |= {"rotation": rotation.round(6).tolist(), "fovy": float(model.cam_fovy[self.camera.fixedcamid])}
        self.rgb = np.empty((self.side, self.side, 3), np.uint8)
        self.depth = np.empty((self.side, self.side), np.float32)
        self.rect = mujoco.MjrRect(0, 0, self.side, self.side)
        self.close = weakref.finalize(self, release, self.context, self.gl)
        atexit.register(self.close)  # runs before mujoco's own, registered earlier, tears EGL down
        self.segment_of_body = np.array([self._segment(body) for body in range(model.nbody)], np.uint8)
        fixed = (model.body_weldid == 0) & (model.body_mocapid < 0)  # the bodies of mjCAT_STATIC
        self.fixed_geoms, self.fixed_sites, self.fixed_pose = fixed[model.geom_bodyid], fixed[model.site_bodyid], np.zeros(0)
        self.camera_moves = not fixed[model.cam_bodyid[self.camera.fixedcamid]]  # two cameras sit on the hand

    def _segment(self, body: int) -> int:
        root = self.model.body(self.model.body_rootid[body]).name
        return {"world": 0, "tablelink": 1, "RetainingWall": 1, "base": 2, "mocap": 2}.get(root, 3)

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        """OpenGL's rows go up; an upside-down camera's rows already go down once more, but its columns are swapped."""
        return picture[:, ::-1] if self.upside_down else picture[::-1]

    def __call__(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """Renders the scene; returns views of the colour (2S, 2S, 3) uint8 and depth (2S, 2S) float32 buffers, upright."""
        geoms, sites = self.fixed_geoms, self.fixed_sites
        parts = data.geom_xpos[geoms], data.geom_xmat[geoms], data.site_xpos[sites], data.site_xmat[sites]
        pose = np.concatenate([part.ravel() for part in parts])
        if not np.array_equal(pose, self.fixed_pose):
            self._update(data, mujoco.mjtCatBit.mjCAT_ALL)
            opaque = all(geom.rgba[3] == 1 for geom in self.scene.geoms[: self.scene.ngeom])
            self.layered = opaque and not self.camera_moves
            self._draw(data, mujoco.mjtCatBit.mjCAT_STATIC)
            self.fixed_pose, self.fixed_rgb, self.fixed_depth, self.fixed_classes = pose, self.rgb.copy(), self.depth.copy(), None
        self._draw(data, MOVING if self.layered else mujoco.mjtCatBit.mjCAT_ALL)
        if self.layered:
            self.behind = self.depth >= self.fixed_depth
            np.copyto(self.rgb, self.fixed_rgb, where=self.behind[..., None])
            np.copyto(self.depth, self.fixed_depth, where=self.behind)
        return self._upright(self.rgb), self._upright(self.depth)

    def empty_depth(self, data: mujoco.MjData) -> np.ndarray:
        """Depth (2S, 2S) of the room with the floor alone."""
        self._update(data, mujoco.mjtCatBit.mjCAT_ALL)
        self.scene.ngeom = 1  # geom 0 is the floor in every task
        mujoco.mjr_render(self.rect, self.scene, self.context)
        depth = np.empty_like(self.depth)  # the last call's views stay valid
        mujoco.mjr_readPixels(None, depth, self.rect, self.context)
        return self._upright(depth)

    def segments(self, data: mujoco.MjData) -> np.ndarray:
        """Class of each pixel (S, S) uint8, an index of SEGMENTS, of the scene of the last call (one more render pass)."""
        if not self.layered:
            return self._classes(data, mujoco.mjtCatBit.mjCAT_ALL)
        if self.fixed_classes is None:
            self.fixed_classes = self._classes(data, mujoco.mjtCatBit.mjCAT_STATIC)
        return np.where(self._upright(self.behind)[::2, ::2], self.fixed_classes, self._classes(data, MOVING))

    def _update(self, data: mujoco.MjData, categories: int) -> None:
        self.gl.make_current()
        mujoco.mjv_updateScene(self.model, data, self.option, self.perturb, self.camera, categories, self.scene)

    def _draw(self, data: mujoco.MjData, categories: int) -> None:
        self._update(data, categories)
        mujoco.mjr_render(self.rect, self.scene, self.context)
        mujoco.mjr_readPixels(self.rgb, self.depth, self.rect, self.context)

    def _classes(self, data: mujoco.MjData, categories: int) -> np.ndarray:
        self._update(data, categories)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = self.scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 1
        mujoco.mjr_render(self.rect, self.scene, self.context)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = self.scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 0
        codes = np.empty_like(self.rgb)
        mujoco.mjr_readPixels(codes, None, self.rect, self.context)
        code = self._upright(codes)[::2, ::2].astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)  # segid + 1, 0 where nothing is
        table = np.zeros(self.scene.ngeom + 1, np.uint8)
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                table[geom.segid + 1] = self.segment_of_body[self.model.geom_bodyid[geom.objid]]
            elif geom.objtype == mujoco.mjtObj.mjOBJ_SITE:  # goal markers are sites; those on the robot are drawn with it
                segment = self.segment_of_body[self.model.site_bodyid[geom.objid]]
                table[geom.segid + 1] = segment if segment == 2 else 4
        return table[code]


def box_sum(picture: np.ndarray) -> np.ndarray:
    """Sum over 2 x 2 pixels: (2S, 2S, ...) -> (S, S, ...) uint16."""
    rows = np.add(picture[::2], picture[1::2], dtype=np.uint16)
    return rows[:, ::2] + rows[:, 1::2]


def release(context: mujoco.MjrContext, gl: object) -> None:
    gl.make_current()  # the numbers of what is freed mean other things in another environment's context
    context.free()
    gl.free()


class DistractingMetaWorld(gymnasium.Env):
    """A MetaWorld task seen by a camera, with a video playing behind table, robot and objects (MaskLAM's protocol, paper_facts 3).

    A pixel is background where the camera sees nothing or the floor: where its depth equals the empty room's. Per episode one clip, start
    frame and direction are drawn; one video frame passes per step, forwards and backwards in turn. Observation: uint8 (size, size, 3),
    upright. `info`: state float32 (39,), success (at any step so far), clean (the twin), mask (bool, True where any of the video shows),
    clip, clip_frame, episode, goal. Outside the mask observation and twin are equal.

    task: a MetaWorld name without "-v3"; videos: generated, davis, none or a path (see `Clips`); split: "train" or "test", with no clip
    and no goal in common; camera_distance: metres that the camera is moved backward; max_steps: the episode's limit (500 at most).
    Less distraction: clips (the first so many of the training clips; 0: all), video_step (video frames a step; 0: a still picture) and
    video_area (share of 8 x 8 cells of the picture in which the video shows; those of a smaller share are among those of a larger one).
    `reset(options={"episode": e, "goal": g})` picks an episode, and a goal other than the episode's own. Unknown names end the program
    with one line.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: str = "drawer-open", videos: str = "generated", split: str = "train", size: int = 64, camera: str = "corner4",
                 camera_distance: float = 0.0, max_steps: int = 150, seed: int = 0, clips: int = 0, video_step: int = 1,
                 video_area: float = 1.0):  # fmt: skip
        if task not in TASKS:
            fail(nearest(task, TASKS, "task"))
        if camera not in CAMERAS:
            fail(nearest(camera, CAMERAS, "camera"))
        if split not in ("train", "test"):
            fail(f"split is 'train' or 'test', not {split!r}")
        if not 1 <= max_steps <= 500:
            fail(f"max_steps must lie in 1..500 (MetaWorld's own limit), not {max_steps}")
        self.task, self.split, self.size, self.max_steps, self.seed = task, split, size, max_steps, seed
        self.clips, self.video_step = None if videos == "none" else Clips(videos, split, size), video_step
        if self.clips is not None:
            self.clip_count = min(clips or len(self.clips), len(self.clips)) if split == "train" else len(self.clips)
        rank = np.random.default_rng(0).permutation(64).reshape(8, 8)
        cell = np.arange(size) * 8 // size
        self.shows_video = (rank < round(64 * video_area))[cell[:, None], cell].repeat(2, 0).repeat(2, 1)  # (2S, 2S)
        self.inner = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.inner._freeze_rand_vec, self.inner.seeded_rand_vec, self.inner._set_task_called = False, True, True
        self.inner._partially_observable = False
        del self.inner.sawyer_observation_space  # cached for the other observability
        self.renderer = Renderer(self.inner.model, size, camera, camera_distance)
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.render_mode = "rgb_array"
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.seed, self.episode = seed, -1
        options = options or {}
        self.episode = int(options.get("episode", self.episode + 1))
        self.goal = int(options.get("goal", self.episode))
        self.rng = episode_rng(self.seed, self.task, self.episode, self.split)
        goal_rng = episode_rng(self.seed, f"goal/{self.task}", self.goal, self.split)
        self.inner.seed(int(goal_rng.integers(2**31)))  # MetaWorld draws the goal from its own distribution, redrawing the invalid ones
        state, _ = self.inner.reset()
        if self.clips is not None:
            self.clip = int(self.rng.integers(self.clip_count))
            self.start, self.direction = int(self.rng.integers(len(self.clips[self.clip]))), int(self.rng.choice([-1, 1]))
        self.steps, self.success = 0, False
        mujoco.mj_forward(self.inner.model, self.inner.data)
        self.empty_depth = self.renderer.empty_depth(self.inner.data)
        return self._observe(state)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        state, reward, _, _, info = self.inner.step(np.clip(np.asarray(action, np.float32), -1, 1))
        self.steps += 1
        self.success |= bool(info["success"])
        frame, info = self._observe(state)
        return frame, float(reward), False, self.steps >= self.max_steps, info

    def _observe(self, state: np.ndarray) -> tuple[np.ndarray, dict]:
        rgb, depth = self.renderer(self.inner.data)
        if self.renderer.camera_moves:
            self.empty_depth = self.renderer.empty_depth(self.inner.data)
        background = (depth == self.empty_depth) & self.shows_video  # (2S, 2S)
        share = box_sum(background)[..., None]  # (S, S, 1), 0 to 4
        clean = ((box_sum(rgb) + 2) // 4).astype(np.uint8)
        info = {"state": state.astype(np.float32), "success": self.success, "clean": clean, "mask": share[..., 0] > 0}
        info |= {"clip": -1, "clip_frame": -1, "episode": self.episode, "goal": self.goal}
        self.frame = clean.copy()
        if self.clips is not None:
            video = self.clips[self.clip]
            index = background_index(self.start, self.direction, self.video_step * self.steps, len(video))
            foreground = box_sum(rgb * ~background[..., None])
            self.frame = ((foreground + share * video[index] + 2) // 4).astype(np.uint8)
            info |= {"clip": self.clip, "clip_frame": index}
        return self.frame, info

    def segments(self) -> np.ndarray:
        """Classes (size, size) uint8 of the last frame's pixels, see SEGMENTS; costs another render pass."""
        return self.renderer.segments(self.inner.data)

    def render(self) -> np.ndarray:
        return self.frame

    def close(self) -> None:
        self.renderer.close()


# ------------------------------------------------------------------------------------------------ background videos

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".gif")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
MAX_CLIP_FRAMES = 1000  # a longer video is cut here
CACHE_BYTES = 256 * 2**20  # decoded clips that one Clips keeps in memory
DAVIS_URL = "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip"
DAVIS_LISTS = {"train": "ImageSets/2017/train.txt", "test": "ImageSets/2017/val.txt"}  # official split: 60 and 30 clips
GENERATED_CLIPS = {"train": 60, "test": 30}  # as many as DAVIS-2017
GENERATED_FRAMES = 90
GENERATED_SEED = 20_170_480  # not --seed: the generated clips are a fixed data set, as DAVIS is


def background_index(start: int, direction: int, step: int, length: int) -> int:
    """Frame shown at environment step `step`: one frame a step from `start`, reflected at both ends (ping-pong)."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    phase = (start + direction * step) % period
    return min(phase, period - phase)


# Generated clips: a textured scene, a moving camera, and 3 to 6 people and objects that walk, roll and fly through the view.
# No draw from `rng` depends on the size in pixels, so a clip looks the same at every size.


def random_colour(rng: np.random.Generator, hue: float) -> tuple[int, ...]:
    """RGB in 0..255 near `hue` (in turns)."""
    rgb = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.06)) % 1, rng.uniform(0.05, 0.75), rng.uniform(0.2, 1.0))
    return tuple(int(255 * channel) for channel in rgb)


def smooth_noise(rng: np.random.Generator, n: int, cells: tuple[int, ...] = (3, 6, 12, 24, 48)) -> np.ndarray:
    """Multi-octave noise, float (n, n) in [0, 1]; `cells` across in each octave."""
    octaves = (Image.fromarray(rng.random((c, c), dtype=np.float32)).resize((n, n), Image.Resampling.BICUBIC) for c in cells)
    total = sum(0.6**k * np.asarray(octave) for k, octave in enumerate(octaves))
    return (total - total.min()) / (total.max() - total.min())


def texture(rng: np.random.Generator, n: int) -> Image.Image:
    """(n, n) picture of one of seven materials in a random palette, worn by noise."""
    noise, grain = smooth_noise(rng, n), smooth_noise(rng, n, (12, 30, 60))
    angle, f, warp = rng.uniform(0, np.pi), rng.uniform(3, 11), rng.uniform(0, 2)
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    u = f * (x * np.cos(angle) + y * np.sin(angle)) + warp * noise
    v = f * (y * np.cos(angle) - x * np.sin(angle)) + warp * noise
    row, brick = 2 * f * y, f * x + 0.5 * (np.floor(2 * f * y) % 2)
    materials = (
        lambda: noise,  # clouds, grass, plaster
        lambda: np.abs(4 * noise % 2 - 1),  # marble
        lambda: 0.5 + 0.5 * np.sin(2 * np.pi * u),  # stripes, curtains
        lambda: (np.floor(u) + np.floor(v)) % 2,  # checker
        lambda: np.where((row % 1 < 0.15) | (brick % 1 < 0.08), 0, 0.5 + 0.5 * np.sin(13 * np.floor(brick) + 78 * np.floor(row))),
        lambda: np.clip(5 * (0.55 - 1.3 * np.hypot(u % 1 - 0.5, v % 1 - 0.5)), 0, 1),  # dots, leaves
        lambda: (y + 0.3 * noise) / 1.3,  # sky, wall under a lamp
    )
    field = materials[rng.integers(len(materials))]()
    hue, other = rng.random(2)
    palette = np.array([random_colour(rng, h) for h in (hue, other if rng.random() < 0.3 else hue, hue)])
    palette = palette.mean(axis=0) + rng.uniform(0.3, 0.9) * (palette - palette.mean(axis=0))  # bold and faint patterns
    rgb = np.stack([np.interp(field, (0, 0.5, 1), palette[:, c]) for c in range(3)], axis=-1) * (0.7 + 0.6 * grain[..., None])
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def textured_shape(rng: np.random.Generator, n: int, kind: str) -> tuple[Image.Image, Image.Image]:
    """A ball, box, car, polygon or star as an (n, n) picture and its (n, n) mask."""
    mask = Image.new("L", (n, n))
    draw, points, turn, (a, b) = ImageDraw.Draw(mask), int(rng.integers(3, 8)), rng.uniform(0, 2 * np.pi), n * rng.uniform(0.02, 0.25, 2)
    y, x = np.mgrid[0:n, 0:n] / n - 0.5
    shade = 1.15 - 1.1 * np.hypot(x + 0.12, y + 0.15) ** 2 if kind == "ball" else 1.1 - 0.3 * (y + 0.5)  # lit from above
    skin = Image.fromarray((np.asarray(texture(rng, n)) * shade[..., None]).clip(0, 255).astype(np.uint8))
    if kind == "ball":
        draw.ellipse((1, 1, n - 2, n - 2), fill=255)
    elif kind == "box":
        draw.rounded_rectangle((a, b, n - a, n - b), n * 0.06, fill=255)
    elif kind == "car":
        draw.rounded_rectangle((0.02 * n, 0.45 * n, 0.98 * n, 0.72 * n), 0.1 * n, fill=255)
        draw.polygon([(0.16 * n, 0.5 * n), (0.3 * n, 0.25 * n), (0.66 * n, 0.25 * n), (0.84 * n, 0.5 * n)], fill=255)
        paint = ImageDraw.Draw(skin)
        paint.polygon([(0.25 * n, 0.47 * n), (0.34 * n, 0.3 * n), (0.62 * n, 0.3 * n), (0.73 * n, 0.47 * n)], (190, 215, 230))
        for wheel in ((0.23 * n, 0.72 * n), (0.77 * n, 0.72 * n)):
            draw.circle(wheel, 0.12 * n, fill=255)
            paint.circle(wheel, 0.12 * n, fill=(25, 25, 28))
            paint.circle(wheel, 0.06 * n, fill=(170, 170, 175))
    else:  # polygon, or star: every other corner further in
        radii = 0.48 * n * np.array([1, 0.5] * points if kind == "star" else [1] * points)
        corners = radii * np.exp(1j * (turn + 2 * np.pi * np.arange(len(radii)) / len(radii)))
        draw.polygon([(n / 2 + c.real, n / 2 + c.imag) for c in corners], fill=255)
    return skin, mask


def make_scene(rng: np.random.Generator, n: int) -> Image.Image:
    """The still part of a clip, (n, n): a wall or sky, mostly a floor, and things that stand and hang there."""
    scene, horizon = texture(rng, n), rng.uniform(0.45, 1.0)
    if horizon < 0.9:
        scene.paste(texture(rng, n), (0, int(horizon * n)))
    for _ in range(rng.integers(5, 11)):
        skin, mask = textured_shape(rng, int(n * rng.uniform(0.1, 0.35)), str(rng.choice(("box", "box", "box", "ball", "polygon"))))
        scene.paste(skin, tuple((rng.uniform(-0.1, 0.95, 2) * n).astype(int)), mask)
    return scene


def make_person(rng: np.random.Generator, height: float, facing: int) -> Callable[[Image.Image, float, float, float], None]:
    """Returns draw(frame, x, y, angle): a person of `height` pixels, middle at (x, y), at phase `angle` of the stride.

    facing: 1 walks to the right, -1 to the left.
    """
    skin = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.3, 1)))
    hair, shirt, stripe, trousers, shoes = (random_colour(rng, hue) for hue in rng.random(5))
    swing, width = rng.uniform(0.4, 0.8), 0.09 * height * rng.uniform(0.8, 1.2)

    def draw(frame: Image.Image, x: float, y: float, angle: float) -> None:
        canvas = ImageDraw.Draw(frame)

        def limb(y0: float, upper: float, lower: float, length: float, colour: tuple, end: tuple) -> None:
            """Two segments from (x, y0), at the angles `upper` and `lower` from straight down, with a hand or a shoe."""
            x1, y1 = x + facing * length * np.sin(upper), y0 + length * np.cos(upper)
            x2, y2 = x1 + facing * length * np.sin(lower), y1 + length * np.cos(lower)
            canvas.line([(x, y0), (x1, y1), (x2, y2)], colour, max(1, round(width)), joint="curve")
            canvas.circle((x, y0), width / 2, colour)
            canvas.circle((x2, y2), 0.6 * width, end)

        y += 0.015 * height * np.cos(2 * angle)  # the body bobs twice a stride
        hip, shoulder, s = y + 0.03 * height, y - 0.27 * height, swing * np.sin(angle)
        bend = 0.5 + 0.5 * np.cos(angle)  # the knee of the leg on its way forward is bent
        limb(shoulder, -s, -s + 0.5, 0.17 * height, stripe, skin)
        limb(hip, -s, -s - (1 - bend), 0.23 * height, trousers, shoes)
        limb(hip, s, s - bend, 0.23 * height, trousers, shoes)
        canvas.rounded_rectangle((x - width, shoulder - width / 2, x + width, hip + width / 2), width * 0.8, shirt)
        for k in (0.25, 0.55):
            canvas.rectangle((x - width, shoulder + k * (hip - shoulder), x + width, shoulder + (k + 0.13) * (hip - shoulder)), stripe)
        limb(shoulder, s, s + 0.5, 0.17 * height, shirt, skin)
        canvas.circle((x - 0.02 * facing * height, shoulder - 0.15 * height), 0.085 * height, hair)
        canvas.circle((x + 0.015 * facing * height, shoulder - 0.115 * height), 0.07 * height, skin)

    return draw


def make_object(rng: np.random.Generator, n: int) -> Callable[[Image.Image, float, float, float], None]:
    """Returns draw(frame, x, y, angle): a textured shape, n pixels wide, middle at (x, y), rolled by `angle` (boxes and cars only rock)."""
    kind = str(rng.choice(("ball", "ball", "box", "car", "polygon", "star")))
    pictures, m = textured_shape(rng, n, kind), int(1.5 * n)  # m: room for the corners of a turned square

    def draw(frame: Image.Image, x: float, y: float, angle: float) -> None:
        turn = {"car": 0.04 * np.sin(5 * angle), "box": 0.4 * np.sin(angle)}.get(kind, angle)
        left, top = int(np.floor(x - m / 2)), int(np.floor(y - m / 2))
        c, s, dx, dy = np.cos(turn), np.sin(turn), left - x, top - y  # the fraction of a pixel is kept: slow things glide
        affine = (c, s, c * dx + s * dy + n / 2, -s, c, -s * dx + c * dy + n / 2)
        skin, mask = (picture.transform((m, m), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR) for picture in pictures)
        frame.paste(skin, (left, top), mask)

    return draw


def generated_clip(split: str, index: int, size: int) -> np.ndarray:
    """Clip `index` of the split, uint8 (GENERATED_FRAMES, size, size, 3), the same in every process. Lengths are in views of the camera."""
    rng = np.random.default_rng([GENERATED_SEED, int(split == "test"), index])
    view, t = 2 * size, np.arange(GENERATED_FRAMES)[:, None] / GENERATED_FRAMES

    def waves(amplitude: float, low: float, high: float, count: int = 1) -> np.ndarray:
        """Smooth curves (T, count) of low..high cycles a clip."""
        return amplitude * np.sin(2 * np.pi * (t * rng.uniform(low, high, count) + rng.random(count)))

    scene = make_scene(rng, int(2.4 * view))  # all is drawn at twice the size, and averaged down at the end
    camera = waves(0.45, 0.15, 0.45, 2) + waves(0.004, 4, 8, 2)  # pan and tilt, and the tremor of a hand
    zoom, roll = 1 + waves(0.1, 0.3, 0.8), waves(0.05, 0.3, 0.8)
    cos, sin, (mx, my) = zoom * np.cos(roll), zoom * np.sin(roll), (scene.width / 2 + camera * view).T[..., None]
    affines = np.hstack([cos, -sin, mx - (cos - sin) * view / 2, sin, cos, my - (sin + cos) * view / 2])
    things = []
    for scale in np.sort(rng.uniform(0.25, 0.75, rng.integers(3, 7))):  # near things are large, drawn last, and pass the camera faster
        person, heading = rng.random() < 0.5, int(rng.choice((-1, 1)))
        extent = 1.6 * scale if person else scale
        draw = make_person(rng, extent * view, heading) if person else make_object(rng, int(extent * view))
        x = 3 * rng.random() + heading * rng.uniform(0.5, 1.2) * t + waves(0.05, 0.5, 1.5) - camera[:, :1] * (0.3 + scale)
        y = rng.uniform(0.1, 0.9) + waves(0.04 if person else 0.25, 0.4, 1.2) - camera[:, 1:] * 0.4
        margin = 0.72 * extent  # leaves on one side and comes back on the other, both out of sight
        angle = heading * 2 * np.pi * (rng.random() + rng.uniform(1, 2.5) * t)
        things.append((draw, np.hstack([((x + margin) % (1 + 2 * margin) - margin) * view, y * view, angle])))
    (kx, ky), speed, depth = rng.uniform(-5, 5, 2), rng.uniform(2, 9), rng.uniform(0.05, 0.25)  # a slow wave of light and shadow
    yy, xx = np.mgrid[0:size, 0:size] / size
    frames = np.empty((GENERATED_FRAMES, size, size, 3), np.uint8)
    for k in range(GENERATED_FRAMES):
        frame = scene.transform((view, view), Image.Transform.AFFINE, tuple(affines[k]), Image.Resampling.BILINEAR)
        for draw, path in things:
            draw(frame, *path[k])
        light = 1 + depth * np.sin(kx * xx + ky * yy + speed * t[k])
        frames[k] = (np.asarray(frame.reduce(2)) * light[..., None]).clip(0, 255)
    return frames


# Clips from disk: DAVIS-2017, or a folder of videos and of frame folders.


def davis_archive() -> Path:
    """The official DAVIS-2017 archive in the cache folder, downloaded if not there; a download that was cut goes on where it stopped."""
    final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lam_vlm" / DAVIS_URL.rsplit("/", 1)[1]
    part = final.with_name(final.name + ".part")
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a second process waits for the first one's download
            if final.exists():
                return final
            have = file.seek(0, os.SEEK_END)
            try:
                request = urllib.request.Request(DAVIS_URL, headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=30) as reply:
                    if reply.status != 206:  # the server starts from the beginning
                        have = file.truncate(0)
                        file.seek(0)
                    total = have + int(reply.headers.get("Content-Length") or 0)
                    with tqdm(desc="DAVIS-2017", initial=have, total=total or None, unit="B", unit_scale=True) as bar:
                        while chunk := reply.read(2**20):
                            bar.update(file.write(chunk))
                if file.tell() < total:
                    raise OSError(f"the connection ended at {file.tell()} of {total} bytes")
            except urllib.error.HTTPError as error:
                if error.code != 416:  # 416: nothing is missing after the bytes that are here
                    raise
            file.flush()
            try:
                whole = zipfile.ZipFile(part).testzip() is None
            except Exception:  # zipfile and zlib raise their own errors on damaged data
                whole = False
            if not whole:
                part.unlink()
                raise OSError("what came is not a whole zip archive and was deleted")
            os.replace(part, final)
    except (OSError, http.client.HTTPException) as error:
        hint = "run again, or give a local archive or folder with --videos PATH"
        raise SystemExit(f"collect.py: cannot download {DAVIS_URL} ({error}); {hint}") from None
    return final


def list_clips(root: Path, split: str) -> dict[str, list[str]]:
    """Clips of a split in a folder or DAVIS archive: {name: its pictures in order, relative to root; none where the clip is a video}."""
    if root.is_file() and not zipfile.is_zipfile(root):
        raise SystemExit(f"collect.py: --videos {root} is neither a folder of clips nor a DAVIS archive (.zip)")
    with zipfile.ZipFile(root) if root.is_file() else contextlib.nullcontext() as archive:
        files = archive.namelist() if archive else glob.glob("**/*", root_dir=root, recursive=True)  # glob leaves out hidden files
        lists = [file for file in files if file.endswith(DAVIS_LISTS[split])]
        official = (archive.read(lists[0]) if archive else (root / lists[0]).read_bytes()).decode().split() if lists else []
    clips: dict[str, list[str]] = {file: [] for file in files if file.lower().endswith(VIDEO_ENDINGS)}
    files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", file)])  # frame 2 before 10
    for file in files:
        if file.lower().endswith(PICTURE_ENDINGS) and "/" in file:
            clips.setdefault(os.path.dirname(file), []).append(file)
    davis = {os.path.basename(folder): clips[folder] for folder in clips if os.path.dirname(folder).endswith("JPEGImages/480p")}
    if davis:
        if not official:
            raise SystemExit(f"collect.py: {root} has the frames of DAVIS but no {DAVIS_LISTS[split]}, which names the {split} clips")
        if missing := set(official) - set(davis):
            raise SystemExit(f"collect.py: {root} has no frames of the DAVIS clip {min(missing)!r}, named in {DAVIS_LISTS[split]}")
        return {name: davis[name] for name in official}
    if root.is_file():
        raise SystemExit(f"collect.py: the archive {root} has no folder JPEGImages/480p: it is not DAVIS-2017 at 480p")
    if len(clips) < 2:
        raise SystemExit(
            f"collect.py: {len(clips) or 'no'} clip in {root}, at least 2 are needed (test clips are never training clips): "
            f"video files ({' '.join(VIDEO_ENDINGS)}) or one sub-folder of frames ({' '.join(PICTURE_ENDINGS)}) for each clip"
        )
    names = sorted(clips)
    cut = round(len(names) * 2 / 3)  # leaves at least one on either side
    return {name: clips[name] for name in (names[:cut] if split == "train" else names[cut:])}


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Centre crop, antialiased resize: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))


def read_frames(root: Path, name: str, pictures: list[str], size: int) -> Iterator[np.ndarray]:
    """Frames of a clip one after the other, uint8 (size, size, 3): a video is never held at its full size."""
    file = name
    try:
        if pictures:
            # The archive is opened anew for each clip: forked processes that share a handle also share its position.
            with zipfile.ZipFile(root) if root.is_file() else contextlib.nullcontext() as archive:
                for file in pictures:
                    with archive.open(file) if archive else open(root / file, "rb") as stream, Image.open(stream) as image:
                        image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded no larger than needed
                        yield to_square(ImageOps.exif_transpose(image), size)
        elif name.lower().endswith(".gif"):
            with Image.open(root / name) as image:
                yield from (to_square(frame, size) for frame in ImageSequence.Iterator(image))
        else:
            yield from (to_square(Image.fromarray(frame), size) for frame in iio.imiter(root / name, plugin="pyav"))
    except Exception as error:  # decoders raise errors of every kind on damaged data
        raise SystemExit(f"collect.py: cannot decode {root / file} ({error}); delete or replace it and run again") from None


class Clips:
    """Background clips of a split ("train", "test"): clips[i] is uint8 (T, size, size, 3), read-only, made or decoded when first asked for.

    videos: "generated", "davis", or the path of a folder of clips or of a DAVIS archive. Raises SystemExit with one line on bad input.
    """

    cache: OrderedDict[tuple, np.ndarray] = OrderedDict()  # of all environments of the process; least recently used first

    def __init__(self, videos: str, split: str, size: int):
        self.split, self.size = split, size
        if videos == "generated":
            self.root, self.pictures = None, {f"{split}-{i:02d}": [] for i in range(GENERATED_CLIPS[split])}
        else:
            self.root = davis_archive() if videos == "davis" else Path(videos).expanduser()
            if not self.root.exists():
                near = difflib.get_close_matches(videos.lower(), ("generated", "davis", "none"), 1)
                hint = f"; did you mean {near[0]!r}?" if near and "/" not in videos else ""
                raise SystemExit(f"collect.py: --videos {videos!r} is neither generated, davis or none nor an existing path{hint}")
            self.pictures = list_clips(self.root, split)
        self.names = list(self.pictures)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        key = (self.root, self.split, name, self.size)
        if key not in self.cache:
            if self.root is None:
                frames = generated_clip(self.split, self.names.index(name), self.size)
            else:
                stream = read_frames(self.root, name, self.pictures[name], self.size)
                frames = list(itertools.islice(stream, MAX_CLIP_FRAMES))
                if not frames:
                    raise SystemExit(f"collect.py: the video {self.root / name} has no frames; delete or replace it and run again")
                frames = np.stack(frames)
            frames.flags.writeable = False
            self.cache[key] = frames
            while len(self.cache) > 1 and sum(clip.nbytes for clip in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]


# ------------------------------------------------------------------------------------------------ trajectories

ARRAYS = ("frames", "clean", "segments", "actions", "states", "rewards", "success", "episode", "step", "video")
MAX_ATTEMPTS = 20  # an expert that fails this often in a row is a fault, not bad luck


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder: Path) -> int:
    """Locks an output folder until this process ends, however it ends; a second process gets one line."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"another process is writing {folder}; wait for it, or choose another --out")
    return handle


def expert_episode(env: DistractingMetaWorld, slot: int, noise: float, after_success: int) -> tuple[dict[str, np.ndarray], int]:
    """Rolls the scripted expert out until `after_success` frames show success. Actions stored are the actions executed.

    A failed episode is dropped and the slot tried again with other chances. Returns the arrays, (N, ...) each, and the number dropped.
    The last row's action and reward are zero: nothing was done after it.
    """
    from metaworld.policies import ENV_POLICY_MAP

    warnings.filterwarnings("ignore", message="Constant")  # the experts' raw actions leave [-1, 1]; they are clipped here
    expert = ENV_POLICY_MAP[f"{env.task}-v3"]()
    for attempt in range(MAX_ATTEMPTS):
        frame, info = env.reset(options={"episode": slot + attempt * 1_000_000})
        rows, left, truncated = {name: [] for name in ARRAYS}, after_success, False
        while True:
            done = truncated or left <= 0
            action, reward = np.zeros(4, np.float32), 0.0
            row = {"frames": frame, "clean": info["clean"], "segments": env.segments(), "states": info["state"], "step": env.steps}
            row |= {"success": info["success"], "episode": slot, "video": (info["clip"], info["clip_frame"])}
            if not done:
                action = expert.get_action(info["state"].astype(np.float64)).astype(np.float32)
                action = np.clip(np.clip(action, -1, 1) + noise * env.rng.standard_normal(4, np.float32), -1, 1).astype(np.float32)
                frame, reward, _, truncated, info = env.step(action)
                left -= info["success"]
            for name, value in (row | {"actions": action, "rewards": reward}).items():
                rows[name].append(value)
            if done:
                break
        if info["success"]:
            kinds = {"rewards": np.float32, "success": np.bool_, "episode": np.int32, "step": np.int16, "video": np.int32}
            return {name: np.asarray(values, kinds.get(name)) for name, values in rows.items()}, attempt
    fail(f"the expert of {env.task} failed {MAX_ATTEMPTS} times on episode {slot}: less --noise, or more --max-steps than {env.max_steps}")


def collect_shard(folder: Path, env_args: dict, noise: float, after_success: int, slots: range) -> dict:
    """Collects the episodes `slots` of one task into `folder`, which appears whole or not at all. Returns the shard's facts."""
    env = cached_env(json.dumps(env_args))
    episodes, attempts = zip(*(expert_episode(env, slot, noise, after_success) for slot in slots))
    temporary = folder.with_name(f".tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ARRAYS:
        with open(temporary / f"{name}.npy", "wb") as file:
            np.save(file, np.concatenate([episode[name] for episode in episodes]), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    mask = np.concatenate([episode["segments"] for episode in episodes]) == 0
    facts = {"shard": f"{folder.parent.name}/{folder.name}", "episodes": len(episodes), "frames": len(mask), "attempts": attempts}
    facts |= {"background": float(mask.mean()), "sha256": {name: sha256(temporary / f"{name}.npy") for name in ARRAYS}}
    write_json(temporary / "shard.json", facts)
    os.rename(temporary, folder)
    return facts


ENVS: dict[str, DistractingMetaWorld] = {}  # one environment per task and process: building one costs more than resetting it


def cached_env(key: str) -> DistractingMetaWorld:
    if key not in ENVS:
        ENVS[key] = DistractingMetaWorld(**json.loads(key))
    return ENVS[key]


def die_with_parent() -> None:
    """Run by every worker: a worker must not go on writing after a kill -9 of its parent."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def parallel(workers: int, jobs: list[tuple]) -> Iterator:
    """Yields function(*arguments) of each (function, *arguments) in jobs as they are done, by `workers` processes (1: by this one)."""
    if workers == 1:
        yield from (job[0](*job[1:]) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=die_with_parent) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            yield from (future.result() for future in concurrent.futures.as_completed(futures))
        except concurrent.futures.process.BrokenProcessPool:
            fail("a worker died (out of memory?); the finished shards are kept: run the command again, with fewer --workers")
        finally:
            pool.shutdown(cancel_futures=True)


def collect(args: Args, out: Path) -> dict:
    """Makes every missing shard and meta.json, which lists them with counts and checksums. Returns meta."""
    env_args = {name: getattr(args, name) for name in ("videos", "size", "camera", "camera_distance", "max_steps")}
    env_args |= {name: value for name in ("clips", "video_step", "video_area") if (value := getattr(args, name)) != getattr(QUICK, name)}
    identity = {"env": env_args, "seed": args.seed, "noise": args.noise, "after_success": args.after_success}
    identity |= {"tasks": list(args.tasks), "episodes_per_task": args.episodes_per_task, "shard_episodes": args.shard_episodes}
    clips = {split: Clips(args.videos, split, args.size).names if args.videos != "none" else [] for split in ("train", "test")}
    identity["clips"] = clips | {"train": clips["train"][: args.clips or None]}
    path = out / "meta.json"
    if RANK > 0:
        wait_for_all_ranks()  # until rank 0 has written it
    if path.exists():
        meta = read_meta(out)
        changed = [f"{key}: {meta.get(key)} there, {value} here" for key, value in identity.items() if meta.get(key) != value]
        if changed:
            fail(f"{out} was collected with other arguments ({'; '.join(changed)}); choose another --out")
    else:
        meta = identity | {"versions": versions()}
        meta["segments"] = list(SEGMENTS)
        env = cached_env(json.dumps({"task": args.tasks[0], "seed": args.seed, **env_args}))  # fails early, before workers start
        meta["camera_pose"] = env.renderer.pose
        write_json(path, meta)
    shards = []
    for task in args.tasks:
        for first in range(0, args.episodes_per_task, args.shard_episodes):
            slots = range(first, min(first + args.shard_episodes, args.episodes_per_task))
            shards.append((out / task / f"shard_{first // args.shard_episodes:05d}", task, slots))
    if RANK == 0:
        for leftover in out.glob("*/.tmp_*"):  # of a killed run; this process holds the lock
            shutil.rmtree(leftover)
        wait_for_all_ranks()
    jobs, facts, mine = [], [], shards[RANK::WORLD]
    for folder, task, slots in mine:
        if folder.exists():
            facts.append(check_shard(folder))
        else:
            jobs.append((collect_shard, folder, {"task": task, "seed": args.seed, **env_args}, args.noise, args.after_success, slots))
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(args.workers or max(1, cores), max(1, len(jobs)))
    total, start = sum(len(slots) for _, _, slots in mine), time.time()
    new_frames = 0
    done = sum(fact["episodes"] for fact in facts)
    with tqdm(total=total, initial=done, desc="collect", unit="episode", smoothing=0.1, disable=RANK > 0) as bar:
        for fact in parallel(workers, jobs):
            facts.append(fact)
            new_frames += fact["frames"]
            bar.set_postfix_str(f"{new_frames / (time.time() - start):.0f} frames/s")
            bar.update(fact["episodes"])
    wait_for_all_ranks()
    if WORLD > 1:  # each rank has checked its own
        facts = [json.loads((folder / "shard.json").read_text()) for folder, _, _ in shards]
    meta["shards"] = sorted(facts, key=lambda fact: fact["shard"])
    if RANK > 0:
        return meta
    write_json(path, meta)
    total = args.episodes_per_task * len(args.tasks)
    frames, dropped = sum(f["frames"] for f in facts), sum(sum(f["attempts"]) for f in facts)
    size = sum(file.stat().st_size for file in out.rglob("*.npy"))
    background = sum(f["background"] * f["frames"] for f in facts) / frames
    speed = f"{new_frames / (time.time() - start):.0f} frames/s{' a rank' * (WORLD > 1)}" if jobs else "nothing left to do"
    expert = total / (total + dropped)
    print(f"{out}: {total} episodes, {frames} frames, expert success {expert:.1%}, background {background:.0%} of the area, "
          f"{size / 2**20:.0f} MiB, {speed}")  # fmt: skip
    return meta


def read_meta(out: Path) -> dict:
    try:
        return json.loads((out / "meta.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{out / 'meta.json'} does not read ({error}); delete the folder, or choose another --out")


def check_shard(folder: Path) -> dict:
    """Facts of a finished shard; one that was damaged since is named and refused."""
    try:
        facts = json.loads((folder / "shard.json").read_text())
        damaged = [name for name in ARRAYS if sha256(folder / f"{name}.npy") != facts["sha256"][name]]
    except (OSError, ValueError, KeyError) as error:
        fail(f"shard {folder} does not read ({error}); delete that folder and run the same command again")
    if damaged:
        fail(f"shard {folder}: {damaged[0]}.npy is damaged (checksum); delete that folder and run the same command again")
    return facts


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("metaworld", "mujoco", "numpy", "pillow")} | {"python": sys.version.split()[0]}


def preview(meta: dict, out: Path) -> None:
    """preview.png: a row a task; the distracted frame and its twin at three moments of the first episode, rendered larger."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = meta["tasks"]
    figure, axes = plt.subplots(len(tasks), 6, figsize=(9, 1.6 * len(tasks) + 0.3), squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks):
        shard = out / task / "shard_00000"
        episode = json.loads((shard / "shard.json").read_text())["attempts"][0] * 1_000_000
        last = int((np.load(shard / "episode.npy", allow_pickle=False) == 0).sum()) - 1
        actions = np.load(shard / "actions.npy", allow_pickle=False)
        env = DistractingMetaWorld(task, seed=meta["seed"], **meta["env"] | {"size": 192})
        frame, info = env.reset(options={"episode": episode})
        moments = {last // 6: 0, last // 2: 2, last: 4}
        for step in range(last + 1):
            if step in moments:
                for axis, picture, title in zip(row[moments[step] :], (frame, info["clean"]), ("distracted", "clean twin")):
                    axis.imshow(picture)
                    axis.set_title(f"{title}, step {step}", fontsize=7)
            if step < last:
                frame, _, _, _, info = env.step(actions[step])
        env.close()
        for axis in row:
            axis.set_xticks([]), axis.set_yticks([])
        row[0].set_ylabel(task, fontsize=8)
    temporary = out / ".tmp_preview.png"
    figure.savefig(temporary, dpi=150, metadata={"Software": None})
    os.replace(temporary, out / "preview.png")
    plt.close(figure)


# ================================================================================================ part 2: encoders and their cache

PROMPTS = {  # presets of --prompt; {object} is filled per task. The first is the paper's best
    "best": "Do not describe background features. Focus on the robot arm and the {object}.",
    "positive": "Focus on the robot arm and the {object}.",
    "arm": "Focus on the robot arm.",
    "object": "Focus on the {object}.",
    "blind": "Describe the image.",
}
# fmt: off
OBJECTS = {
    "assembly": "nut and peg", "basketball": "ball and hoop", "bin-picking": "cube and bin", "box-close": "box and lid",
    "button-press": "button", "button-press-topdown": "button", "button-press-topdown-wall": "button", "button-press-wall": "button",
    "coffee-button": "coffee machine", "coffee-pull": "mug", "coffee-push": "mug", "dial-turn": "dial", "disassemble": "nut and peg",
    "door-close": "door", "door-lock": "door lock", "door-open": "door", "door-unlock": "door lock", "drawer-close": "drawer",
    "drawer-open": "drawer", "faucet-close": "faucet", "faucet-open": "faucet", "hammer": "hammer and nail",
    "hand-insert": "block and hole",
    "handle-press": "handle", "handle-press-side": "handle", "handle-pull": "handle", "handle-pull-side": "handle", "lever-pull": "lever",
    "peg-insert-side": "peg and box", "peg-unplug-side": "plug", "pick-out-of-hole": "puck", "pick-place": "puck",
    "pick-place-wall": "puck",
    "plate-slide": "plate", "plate-slide-back": "plate", "plate-slide-back-side": "plate", "plate-slide-side": "plate", "push": "puck",
    "push-back": "block", "push-wall": "puck", "reach": "puck", "reach-wall": "puck", "shelf-place": "block and shelf",
    "soccer": "ball and goal",
    "stick-pull": "stick and mug", "stick-push": "stick and mug", "sweep": "block", "sweep-into": "block", "window-close": "window",
    "window-open": "window",
}
# fmt: on


def prompt_text(prompt: str, task: str) -> str:
    """The text that an encoder is given: a preset's or the user's own, with {object} filled in."""
    return PROMPTS.get(prompt, prompt).replace("{object}", OBJECTS[task])


def named_segments(text: str, task: str) -> list[int]:
    """The oracle's understanding of a prompt: indices of the SEGMENTS to keep.

    Sentences with a negation take away what they name, the others ask for it. A prompt that asks for nothing known keeps everything.
    """
    words_of = {"table": {"table"}, "robot": {"robot", "arm", "gripper", "hand", "sawyer"}, "goal": {"goal", "target"}}
    words_of["object"] = {"object", *OBJECTS[task].split()} - {"and"}
    asked, refused = set(), set()
    for sentence in re.split("[.!?]", text.lower().replace("'", "")):
        words = set(re.findall(r"\w+", sentence))
        negated = words & {"not", "dont", "ignore", "without", "except", "no"}
        named = {segment for segment, names in words_of.items() if words & names}
        (refused if negated else asked).update(named | ({"goal"} if "object" in named else set()))
    kept = (asked or set(SEGMENTS)) - refused
    return [SEGMENTS.index(segment) for segment in kept]


class Oracle:
    """Encoder `oracle`: the simulator's segmentation answers the prompt, then a fixed projection. No weights, no language model.

    Pixels of what the prompt names are kept, all others blanked (`background_kept` is the fraction of them that leaks through). It is an
    upper bound of what a VLM can say and a control (prompt "blind"); never report it as a VLM.
    """

    revision, layers, pools = "1", (0,), ("all",)
    known_layers, known_pools = layers, pools
    promptable, batch = True, 256
    about: dict[str, str] = {}  # nothing to guard: it has no weights, and a change of this class changes `revision`
    frames_suffice = False  # it sees the segments too, so equal frames may have different embeddings
    grid, colours, dim = 32, 3, 256

    def __init__(self, background_kept: float = 0.0):
        self.name = f"oracle-a{background_kept:g}" if background_kept else "oracle"
        self.background_kept = background_kept
        rng = np.random.default_rng(0)
        inputs = self.grid**2 * self.colours
        self.projection = (rng.standard_normal((inputs, self.dim)) / np.sqrt(self.dim)).astype(np.float32)

    def __call__(self, images: np.ndarray, texts: list[str], segments: np.ndarray, task: str) -> dict[tuple[str, int, str], np.ndarray]:
        """images (B, H, W, 3) uint8, segments (B, H, W) uint8 -> {(text, layer, pool): (B, D) float32}, as every encoder here."""
        result = {}
        for text in texts:
            keep = np.isin(segments, named_segments(text, task))[..., None]
            blank = 128 + self.background_kept * (images.astype(np.float32) - 128)
            pictures = np.where(keep, images, blank.round().astype(np.uint8))
            small = [np.asarray(Image.fromarray(picture).resize((self.grid, self.grid), Image.Resampling.BOX)) for picture in pictures]
            features = (np.stack(small).reshape(len(images), -1).astype(np.float32) - 128) / 128
            result[text, 0, "all"] = features @ self.projection
        return result


MOLMO_REVISION = "1721478b71306fb7dc671176d5c204dc7a4d27d7"  # of allenai/Molmo-7B-D-0924: its remote code is run, so it is pinned
VISION_MODELS = ("clip", "clip_vision_model", "dinov2", "dinov2_with_registers", "siglip", "siglip_vision_model")
PROMPT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # what a processor gives per token: (B, T)
GUARD_PICTURE = (np.indices((64, 64, 3)).T.dot([3, 5, 80]).transpose(1, 2, 0) % 256).astype(np.uint8)  # (64, 64, 3), any fixed picture


class Pretrained:
    """What the encoders with weights share; `load` reads the model, `pooled` runs it.

    Calls map images (B, H, W, 3) uint8 and texts to {(text, layer, pool): (B, D) float32}; `layer` indexes hidden_states (0: embeddings,
    -1: after the last block), pooling is done in float32. Weights are bfloat16 on CUDA, float32 elsewhere.
    """

    promptable, frames_suffice, known_pools = True, True, ("image", "text", "last", "all")
    layers, pools = (-2,), ("text",)
    kind = ""

    def __init__(self, args: Args, config: dict):
        import torch

        self.args, self.torch = args, torch
        self.id = args.encoder.removeprefix("otter:")
        self.source = {"pretrained_model_name_or_path": self.id}
        self.source |= {} if Path(self.id).is_dir() else {"revision": config["revision"]}
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.batch = args.encoder_batch or (64 if cuda else 16)
        self.revision = config["revision"][:8]
        folder = Path(self.id).resolve().name  # of a local model the content is recorded, not where it lies
        self.name = self.kind + re.sub("[^A-Za-z0-9.]+", "-", folder).strip("-")
        self.about = {"id": folder if Path(self.id).is_dir() else self.id, "full_revision": config["revision"]}
        self.load(config)
        self.model.eval().to(self.device)
        self.known_layers = tuple(range(-self.depth - 1, self.depth + 1)) if self.depth else (-1,)

    def read(self, model_class: type, strict: bool = False) -> None:
        """Loads the weights; a tensor that the file lacks would stay random (or NaN) without a word, so it is refused."""
        self.model, info = model_class.from_pretrained(**self.source, dtype=self.dtype, output_loading_info=True)
        for fault in ("missing_keys", "mismatched_keys") + (("unexpected_keys",) if strict else ()):
            if info[fault]:
                fail(f"--encoder {self.id}: the weights file has {fault.replace('_keys', '')} tensors: {sorted(map(str, info[fault]))[:3]}")

    def __call__(self, images: np.ndarray, texts: list[str], segments: np.ndarray | None, task: str) -> dict:
        with self.torch.inference_mode():
            result = {cell: value.float().cpu().numpy() for cell, value in self.pooled(images, texts)}
        for (text, layer, pool), value in result.items():
            if not np.isfinite(value).all():
                fail(f"--encoder {self.id}: layer {layer}, pool {pool}, prompt {text!r} has numbers that are not finite")
        return result

    def caught(self, forward: Callable) -> tuple[dict, object]:
        """Runs forward(); {layer: (B, T, D)} of the layers asked for, caught on their way into and out of self.blocks, and its result."""
        states, handles = {}, []
        for layer in self.layers:
            index = layer % (self.depth + 1)
            if index < self.depth:  # hidden_states[i] is what goes into block i
                catch = self.blocks[index].register_forward_pre_hook
                handles.append(
                    catch(lambda _, given, named, key=layer: states.update({key: (*given, *named.values())[0]}), with_kwargs=True)
                )
            else:
                catch = self.blocks[-1].register_forward_hook
                handles.append(
                    catch(lambda _, __, out, key=layer: states.update({key: self.norm(out[0] if isinstance(out, tuple) else out)}))
                )
        try:
            result = forward()
        finally:
            for handle in handles:
                handle.remove()
        return states, result

    def may_share(self, full: Iterator[dict], quick: Iterator[dict]) -> bool:
        """Whether prompts that share a pass over the image have the hidden states of full passes; if not, a line says why."""
        bound, error = 2e-2 if self.dtype == self.torch.bfloat16 else 1e-4, 0.0
        try:
            for one, other in zip(full, quick, strict=True):
                for layer in one:
                    far = (one[layer].float() - other[layer].float()).norm(dim=-1) / one[layer].float().norm(dim=-1)
                    error = max(error, float(far.max()))  # of the worst token: some are a thousand times larger than others
        except Exception as problem:  # each architecture has its own way of not taking a cache; full passes are always right
            return self.cannot_share(type(problem).__name__)
        return error < bound or self.cannot_share(f"relative difference {error:.1e}")

    def cannot_share(self, why: str) -> bool:
        print(f"{self.name}: prompts cannot share a pass over the image ({why}); each gets a full pass")
        return False

    def resized(self, images: np.ndarray, size: int) -> object:
        """(B, H, W, 3) uint8 -> (B, 3, size, size) float32, 0 to 1, on the device."""
        x = self.torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float() / 255
        return self.torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)

    def token_pools(self, text: str, states: dict, image: object, words: object, real: object) -> Iterator:
        """states {layer: (B, T, D)}; masks (B, T) of the image's tokens, the prompt's, and all but padding -> the cells asked for."""
        masks = {"image": image, "text": words, "all": real}
        for layer, pool in itertools.product(self.layers, self.pools):
            if pool == "last":
                yield (text, layer, pool), states[layer][:, -1]
            else:
                weight = masks[pool][..., None].float()
                yield (text, layer, pool), (states[layer].float() * weight).sum(1) / weight.sum(1)


class NativeVLM(Pretrained):
    """A vision-language model of transformers' own: LLaVA, Idefics3, PaliGemma, Gemma3, Qwen-VL, Molmo2, ..., by its chat template.

    Pools: `image` mean of the image tokens, `text` of all others, `last` the last token, `all` of all. Where attention is causal and the
    image comes first, the image tokens cannot see the prompt: only `text` and `last` are promptable. Several prompts then share one pass
    over the image and its key/value cache; two prompts check at the first use that this equals full passes.
    """

    reuse: bool | None = None  # not known yet

    def load(self, config: dict) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(**self.source)
        self.processor.tokenizer.padding_side = "left"  # so that the last position is the last token
        self.read(AutoModelForImageTextToText)
        self.image_id = getattr(self.model.config, "image_token_id", getattr(self.model.config, "image_token_index", None))
        if self.image_id is None:
            fail(f"--encoder {self.id}: no image token in its config, so its pools are not defined")
        self.depth = self.model.config.get_text_config().num_hidden_layers
        text = self.model.get_decoder()
        self.blocks, self.norm = getattr(text, "layers", None), getattr(text, "norm", None)
        if self.norm is None or self.blocks is None or len(self.blocks) != self.depth:
            self.blocks = None

    def inputs(self, images: np.ndarray, text: str) -> dict:
        pictures = [Image.fromarray(image) for image in images]
        if getattr(self.processor, "chat_template", None):
            content = [[{"type": "image", "image": picture}, {"type": "text", "text": text}] for picture in pictures]
            messages = [[{"role": "user", "content": part}] for part in content]
            as_tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
            inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True, **as_tensors)
        else:  # PaliGemma: not a chat model
            prompts = [getattr(self.processor, "image_token", "<image>") + text] * len(pictures)
            inputs = self.processor(images=[[picture] for picture in pictures], text=prompts, return_tensors="pt", padding=True)
        inputs.pop("labels", None)  # PaliGemma's processor makes some
        return dict(inputs.to(self.device, dtype=self.dtype))  # casts floating tensors only

    def run(self, inputs: dict, **cache: object) -> tuple[dict, object]:
        """{layer: (B, T, D)} of the layers asked for, and the key/value cache."""
        arguments = inputs | {"logits_to_keep": 1, "use_cache": False} | cache
        if self.blocks is not None:
            states, out = self.caught(lambda: self.model(**arguments))
        else:  # keeps every layer
            out = self.model(**arguments, output_hidden_states=True)
            states = {layer: out.hidden_states[layer] for layer in self.layers}
        return states, out.past_key_values

    def shared_tokens(self, inputs: list[dict]) -> int:
        """Length of the beginning that all prompts share, if all image tokens are in it and each prompt has more; else 0."""
        ids = [one["input_ids"][0] for one in inputs]
        length = min(len(one) for one in ids) - 1
        same = self.torch.stack([one[:length] == ids[0][:length] for one in ids]).all(0)
        shared = int(same.long().cumprod(0).sum())
        return shared if not any((one[shared:] == self.image_id).any() for one in ids) else 0

    def reused(self, inputs: list[dict], shared: int) -> Iterator[dict]:
        """Hidden states of each prompt, the shared beginning run once."""
        prefix, cache = self.run({k: v[:, :shared] if k in PROMPT_INPUTS else v for k, v in inputs[0].items()}, use_cache=True)
        for one in inputs:
            ids, mask = one["input_ids"][:, shared:], one["attention_mask"]
            rest, cache = self.run({"input_ids": ids, "attention_mask": mask}, past_key_values=cache, use_cache=True)
            cache.crop(-ids.shape[1])  # negative: so many tokens are removed
            yield {layer: self.torch.cat([prefix[layer], rest[layer]], 1) for layer in self.layers}

    def check_reuse(self) -> bool:
        inputs = [self.inputs(GUARD_PICTURE[None], text) for text in (PROMPTS["best"], PROMPTS["blind"])]
        if not (shared := self.shared_tokens(inputs)):
            return self.cannot_share("the image does not come first")
        return self.may_share((self.run(one)[0] for one in inputs), self.reused(inputs, shared))

    def pooled(self, images: np.ndarray, texts: list[str]) -> Iterator:
        if len(texts) > 1 and self.reuse is None:
            self.reuse = self.check_reuse()
        inputs = [self.inputs(images, texts[0])]  # further prompts: pictures of one size give equal tokens, so one is tokenised for all
        for text in texts[1:]:
            prompt = {k: v.expand(len(images), -1) for k, v in self.inputs(images[:1], text).items() if k in PROMPT_INPUTS}
            inputs.append(inputs[0] | prompt)
        shared = self.shared_tokens(inputs) if self.reuse and len(texts) > 1 else 0
        states = self.reused(inputs, shared) if shared else (self.run(one)[0] for one in inputs)
        for text, one, state in zip(texts, inputs, states):
            image, real = one["input_ids"] == self.image_id, one["attention_mask"].bool()
            yield from self.token_pools(text, state, image, real & ~image, real)


class Molmo(Pretrained):
    """allenai/Molmo-7B-D-0924, the paper's encoder: the hub's own model code, made to run on transformers 5, with inputs made here.

    Its processor needs torchvision and tensorflow; the inputs below equal its own, bit for bit, for square frames of 64 to 336 px.
    Token ids and the set of tensors are checked at load. `text` is the mean from the end of the image on (" User: ... Assistant:").
    Several prompts share one pass over the image, as in NativeVLM, after the same check.
    """

    reuse: bool | None = None

    def load(self, config: dict) -> None:
        from transformers import AutoTokenizer
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        torch = self.torch
        where = {key: value for key, value in self.source.items() if key == "revision"}
        model_class = get_class_from_dynamic_module("modeling_molmo.MolmoForCausalLM", self.id, **where)
        model_class.all_tied_weights_keys = {}  # transformers 5 expects both of these; the code predates it
        model_class.tie_weights = lambda *args, **kwargs: None
        self.read(model_class, strict=True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)  # its constructor switches it off for the whole process
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        parts, self.depth = self.model.model.transformer, self.model.config.num_hidden_layers
        self.blocks, self.norm = parts["blocks"], parts["ln_f"]
        first = self.model.config.vocab_size
        ids = self.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<im_patch>", "<im_col>"])
        if ids != list(range(first, first + 4)):
            fail(f"--encoder {self.id}: its tokenizer numbers the image tokens {ids}, not from {first}; the picture would go in wrong")
        example = " User: Focus on the drawer. Assistant:"
        if first == 152064 and self.encode(example) != [2657, 25, 25806, 389, 279, 26482, 13, 21388, 25]:
            fail(f"--encoder {self.id}: its tokenizer splits {example!r} otherwise than Molmo-7B-D's own does")
        start, end, patch, column = ids
        begin = self.tokenizer.bos_token_id
        picture = [start] + 12 * (12 * [patch] + [column]) + [end]
        self.prefix = torch.tensor([self.tokenizer.eos_token_id if begin is None else begin] + 2 * picture)
        self.patch, self.patches = patch, (self.prefix == patch).nonzero()[:, 0].view(1, 2, 144)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def pictures(self, images: np.ndarray) -> object:
        """(B, H, W, 3) uint8 -> (B, 2, 576, 588): 14 x 14 patches of the picture at 336 px, as global crop and as its only tile."""
        x = self.resized(images, 336).clip(0, 1)
        mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's
        x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
        x = x.view(-1, 3, 24, 14, 24, 14).permute(0, 2, 4, 3, 5, 1).reshape(-1, 1, 576, 588)
        return x.expand(-1, 2, -1, -1).to(self.dtype)

    def run(self, inputs: dict, **cache: object) -> tuple[dict, object]:
        """{layer: (B, T, D)} of the layers asked for, and the keys and values of every block."""
        states, out = self.caught(lambda: self.model.model(**inputs, **cache, last_logits_only=True))
        return states, out.attn_key_values

    def reused(self, picture: dict, tails: list) -> Iterator[dict]:
        """Hidden states of each prompt (B, T) of `tails`, the image, which comes first, run once."""
        torch, (batch, length) = self.torch, picture["input_ids"].shape
        prefix, past = self.run(picture, use_cache=True)
        for tail in tails:
            whole = torch.arange(length + tail.shape[1], device=self.device).expand(batch, -1)
            one = {"input_ids": tail, "attention_mask": torch.ones_like(whole), "position_ids": whole[:, length:]}
            rest, _ = self.run(one, past_key_values=past)
            yield {layer: torch.cat([prefix[layer], rest[layer]], 1) for layer in self.layers}

    def full(self, picture: dict, tails: list) -> Iterator[dict]:
        for tail in tails:
            yield self.run(picture | {"input_ids": self.torch.cat([picture["input_ids"], tail], 1)})[0]

    def inputs(self, images: np.ndarray, texts: list[str]) -> tuple[dict, list]:
        torch, batch = self.torch, len(images)
        masks = torch.ones(batch, 2, 576, device=self.device, dtype=self.dtype)
        masks[:, 1] = -1  # as the processor has it for the second crop
        picture = {"input_ids": self.prefix.to(self.device).expand(batch, -1), "images": self.pictures(images), "image_masks": masks}
        picture["image_input_idx"] = self.patches.expand(batch, -1, -1).to(self.device)
        tails = [torch.tensor(self.encode(f" User: {text} Assistant:"), device=self.device).expand(batch, -1) for text in texts]
        return picture, tails

    def pooled(self, images: np.ndarray, texts: list[str]) -> Iterator:
        if len(texts) > 1 and self.reuse is None:
            example = self.inputs(GUARD_PICTURE[None], [PROMPTS["best"], PROMPTS["blind"]])
            self.reuse = self.may_share(self.full(*example), self.reused(*example))
        picture, tails = self.inputs(images, texts)
        for text, tail, states in zip(texts, tails, (self.reused if self.reuse and len(texts) > 1 else self.full)(picture, tails)):
            ids = self.torch.cat([picture["input_ids"], tail], 1)
            words = (self.torch.arange(ids.shape[1], device=self.device) >= len(self.prefix)).expand(len(ids), -1)
            yield from self.token_pools(text, states, ids == self.patch, words, self.torch.ones_like(words))


class VisionModel(Pretrained):
    """DINOv2, and the image halves of CLIP and SigLIP. Nothing reads the prompt: keys say `noprompt`.

    Pools: `cls` the class token (SigLIP has none), `mean` of the patches. Layer -1 is last_hidden_state (CLIP's is not normalised).
    """

    promptable, layers, pools = False, (-1,), ("mean",)

    def load(self, config: dict) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(**self.source)
        self.read(AutoModel)
        self.model = getattr(self.model, "vision_model", self.model)
        self.known_pools = ("mean",) if "siglip" in config["model_type"] else ("cls", "mean")
        self.extra = len(self.known_pools) - 1 + getattr(self.model.config, "num_register_tokens", 0)  # tokens before the patches
        self.depth = self.model.config.num_hidden_layers

    def pixels(self, images: np.ndarray) -> object:
        inputs = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return inputs["pixel_values"].to(self.device, self.dtype)

    def pooled(self, images: np.ndarray, texts: list[str]) -> Iterator:
        out = self.model(pixel_values=self.pixels(images), output_hidden_states=True)
        for layer, pool in itertools.product(self.layers, self.pools):
            state = (out.last_hidden_state if layer in (-1, self.depth) else out.hidden_states[layer]).float()
            for text in texts:
                yield (text, layer, pool), state[:, 0] if pool == "cls" else state[:, self.extra :].mean(1)


class RandomViT(VisionModel):
    """A floor: DINOv2's architecture at the size of ViT-Ti (12 layers, 5 million weights) that was never trained. 8 px patches of 64 px."""

    def load(self, config: dict) -> None:
        from transformers import Dinov2Config, Dinov2Model

        with self.torch.random.fork_rng():
            self.torch.manual_seed(0)
            sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12, "image_size": 64, "patch_size": 8}
            self.model = Dinov2Model(Dinov2Config(**sizes)).to(self.dtype)
        self.known_pools, self.extra, self.depth = ("cls", "mean"), 1, 12

    def pixels(self, images: np.ndarray) -> object:
        return ((self.resized(images, 64) - 0.5) / 0.25).to(self.dtype)


class Otter(VisionModel):
    """CLIP's patches, read out by the prompt's words (OTTER, arXiv 2503.03734): the mean over words of what each word attends to.

    x_k: the last block's self-attention output without residual and MLP, p_k = normalise(W_v ln_post(x_k)); t_i = normalise(W_t h_i) of
    the prompt's first 15 tokens; f_i = sum_k softmax_k(<t_i, p_k> / temperature) p_k. One layer (-1) and one pool (`mean` of f_i).
    """

    promptable, kind, words = True, "otter-", 15

    def load(self, config: dict) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if config["model_type"] != "clip":
            fail(f"--encoder otter:{self.id}: OTTER needs a CLIP model with both halves, this is {config['model_type']}")
        self.processor, self.tokenizer = AutoImageProcessor.from_pretrained(**self.source), AutoTokenizer.from_pretrained(**self.source)
        self.read(CLIPModel)
        self.known_pools, self.depth, self.temperature = ("mean",), 0, self.args.otter_temperature
        self.name += f"-t{self.temperature:g}" if self.temperature != Args.otter_temperature else ""
        self.about |= {"temperature": self.temperature}

    def patches(self, images: np.ndarray) -> tuple[object, object]:
        """Self-attention output of the last block, (B, 1 + patches, width), and the patches in CLIP's joint space, (B, patches, D)."""
        kept, vision = [], self.model.vision_model
        hook = vision.encoder.layers[-1].self_attn.register_forward_hook(lambda _, __, out: kept.append(out[0]))
        try:
            vision(pixel_values=self.pixels(images))
        finally:
            hook.remove()
        p = self.model.visual_projection(vision.post_layernorm(kept[0][:, 1:]))
        return kept[0], self.torch.nn.functional.normalize(p.float(), dim=-1)

    def tokens(self, text: str) -> object:
        """The prompt's words in the joint space, (at most 15, D); begin and end marks are left out."""
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=77).to(self.device)
        states = self.model.text_model(input_ids=inputs["input_ids"]).last_hidden_state[0, 1:-1][: self.words]
        return self.torch.nn.functional.normalize(self.model.text_projection(states).float(), dim=-1)

    def pooled(self, images: np.ndarray, texts: list[str]) -> Iterator:
        _, p = self.patches(images)
        for text in texts:
            attention = (self.tokens(text) @ p.transpose(1, 2) / self.temperature).softmax(-1)  # (B, words, patches)
            yield (text, -1, "mean"), (attention @ p).mean(1)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors of a library on the way to a model (no network, no such model, a package missing) become one line."""
    try:
        yield
    except ImportError as error:
        words = " ".join(str(error).split())
        package = next((name for name in ("torchvision", "einops", "num2words", "transformers", "torch") if name in words.lower()), None)
        build = " (the build that fits your torch, see pytorch.org)" if package == "torchvision" else ""
        fail(f"{what} needs a package that is missing: {package or ''}{build}; {words[:100]}")
    except Exception as error:
        fail(f"{what} does not load: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def encoder_config(args: Args) -> dict:
    """config.json of --encoder with its `revision` (hub: commit; folder: hash of its files). Runs none of the model's code."""
    if args.encoder == "random":
        return {"model_type": "random", "revision": "1"}
    with one_line(f"--encoder {args.encoder}"):
        from transformers import logging
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NATIVE
        from transformers.utils.hub import cached_file, extract_commit_hash

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        source = args.encoder.removeprefix("otter:")
        asked = args.model_revision or (MOLMO_REVISION if source.lower() == "allenai/molmo-7b-d-0924" else "main")
        path = cached_file(source, "config.json", revision=asked)
        config = json.loads(Path(path).read_text())
        config["revision"] = extract_commit_hash(path, None) or asked  # of the hub's copies the path has the commit
    kind = config.get("model_type")
    if kind == "molmo" and not args.trust_remote_code:
        fail(f"--encoder {source} needs --trust-remote-code: transformers has no Molmo, so Python code that comes with the model is run on "
             f"this machine with your rights; the default --model-revision pins which")  # fmt: skip
    if kind != "molmo" and kind not in VISION_MODELS and kind not in NATIVE:
        fail(f"--encoder {source} is of type {kind!r}, which is no image encoder known here: {', '.join(VISION_MODELS)}, molmo, or a "
             f"vision-language model of AutoModelForImageTextToText")  # fmt: skip
    if Path(source).is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.suffix != ".md"):
            with open(path, "rb") as file:  # both ends of a big weights file are enough here: the guard sees the rest
                digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
                file.seek(max(0, path.stat().st_size - 2**20))
                digest.update(file.read())
        config["revision"] = digest.hexdigest()[:40]
    return config


def make_encoder(args: Args) -> Oracle | Pretrained:
    """The encoder of --encoder with its --layers and --pools; each way to fail is one line."""
    if args.encoder == "oracle":
        encoder = Oracle(args.background_kept)
    else:
        config = encoder_config(args)
        classes = {"molmo": Molmo, "random": RandomViT} | dict.fromkeys(VISION_MODELS, VisionModel)
        encoder_class = Otter if args.encoder.startswith("otter:") else classes.get(config["model_type"], NativeVLM)
        with one_line(f"--encoder {args.encoder}"):
            encoder = encoder_class(args, config)
            print(f"encoder {encoder.name}: {encoder_class.__name__}, revision {encoder.revision}, {encoder.device}, {encoder.dtype}")
    encoder.layers, encoder.pools = args.layers or encoder.layers, args.pools or encoder.pools
    for given, known, what in ((encoder.layers, encoder.known_layers, "layer"), (encoder.pools, encoder.known_pools, "pool")):
        for value in given:
            if value not in known:
                has = ", ".join(map(str, known)) if len(known) < 8 else f"{known[0]} to {known[-1]}"
                fail(f"encoder {encoder.name} has no {what} {value!r}; it has {has}")
    return encoder


def embedding_key(encoder: Oracle | Pretrained, prompt: str, layer: int, pool: str) -> str:
    """File name of a cache: encoder, prompt, layer, pool, revision. A prompt of the user's own goes in as a hash."""
    name = prompt if prompt in PROMPTS else "p" + hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{encoder.name}_{name if encoder.promptable else 'noprompt'}_L{layer}_{pool}_r{encoder.revision}"


def check_cache(path: Path, about: dict, guard: list[float] | None) -> None:
    """Refuses embeddings that are damaged or were made from other frames, another prompt or another model."""
    try:
        have = {"dtype": "float16"} | json.loads(path.read_text())
        whole = have["sha256"] == sha256(path.with_suffix(".npy"))
        other = [key for key, value in about.items() if have.get(key) != value]
        if guard is not None and not np.allclose(have["guard"], guard, rtol=0, atol=0.02 * np.abs(guard).max()):
            other.append(f"model (guard; made with transformers {have.get('transformers')})")  # 0.02: devices and bfloat16 differ by less
    except (OSError, ValueError, KeyError, TypeError):
        whole, other = False, []
    if other:
        fail(f"{path} was made with other {', '.join(other)}; delete it and its .npy, and run again")
    if not whole:
        fail(f"{path} or its .npy is damaged; delete both and run again")


def encode(
    encoder: Oracle | Pretrained, frames: np.ndarray, segments: np.ndarray, rows: np.ndarray, texts: list[str], task: str
) -> Iterator:
    """Yields (number of rows, {(text, layer, pool): (number, D)}) batch by batch; out of memory halves encoder.batch."""
    start = 0
    while start < len(rows):
        chosen, full = rows[start : start + encoder.batch], None
        try:
            result = encoder(frames[chosen], texts, segments[chosen], task)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is what the CPU raises
            full = " ".join(str(error).split())[:100]
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", full):
                raise
        if full is not None:  # out here the traceback, which holds the tensors, is gone
            if len(chosen) == 1:
                fail(f"encoder {encoder.name}: out of memory with a single image ({full})")
            encoder.batch = len(chosen) // 2
            tqdm.write(f"encoder {encoder.name}: out of memory, going on with batches of {encoder.batch}")
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            continue
        yield len(chosen), result
        start += len(chosen)


HALF_DONE_SECONDS = 60  # between two savings of a shard that is being embedded


def half_done(shard: Path, about: list[dict]) -> Path:
    """Where the embeddings of a part of a shard's frames are kept, named by all that they depend on."""
    return shard / "embeddings" / f".half_{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.npz"


def embed(args: Args, out: Path, meta: dict) -> None:
    """Caches the embeddings of every frame, a file a shard and key; finished files are kept, files of other frames or models refused.

    A shard that was cut off goes on at most HALF_DONE_SECONDS back.
    """
    encoder = make_encoder(args)
    prompts = tuple(dict.fromkeys(args.prompt)) if encoder.promptable else ("noprompt",)
    cells = [(prompt, layer, pool) for prompt in prompts for layer in encoder.layers for pool in encoder.pools]
    guards, made_with, work = {}, {}, []
    for fact in meta["shards"][RANK::WORLD]:
        shard, task, missing = out / fact["shard"], fact["shard"].split("/")[0], []
        texts = {prompt: prompt_text(prompt, task) if encoder.promptable else "" for prompt in prompts}
        if encoder.about and not all(text in {cell[0] for cell in guards} for text in texts.values()):
            from importlib.metadata import version

            made_with = {"transformers": version("transformers")}
            with one_line(f"--encoder {args.encoder}"):
                found = encoder(GUARD_PICTURE[None], list(dict.fromkeys(texts.values())), None, task)
            guards |= {cell: value[0, :8].tolist() for cell, value in found.items()}
        (shard / "embeddings").mkdir(exist_ok=True)
        for prompt, layer, pool in cells:
            path = shard / "embeddings" / f"{embedding_key(encoder, prompt, layer, pool)}.json"
            about = {"encoder": encoder.name, "revision": encoder.revision, "prompt": prompt, "text": texts[prompt]}
            about |= {"layer": layer, "pool": pool, "frames_sha256": fact["sha256"]["frames"], **encoder.about}
            if encoder.about or args.embedding_dtype != "float16":
                about["dtype"] = args.embedding_dtype
            guard = guards.get((texts[prompt], layer, pool))
            if path.exists():
                check_cache(path, {"dtype": args.embedding_dtype} | about, guard)
            else:
                missing.append((path, about, guard))
        if missing:
            work.append((fact, missing))
    with tqdm(
        total=sum(fact["frames"] for fact, _ in work), desc=f"embed {encoder.name}", unit="image", disable=RANK > 0 or not work
    ) as bar:
        for fact, missing in work:
            shard, task = out / fact["shard"], fact["shard"].split("/")[0]
            frames, segments = (np.load(shard / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("frames", "segments"))
            seen: dict[object, int] = {}  # frames that repeat exactly (an arm that rests) are computed once
            names = (hashlib.sha256(frame).digest() if encoder.frames_suffice else t for t, frame in enumerate(frames))
            which = np.array([seen.setdefault(name, len(seen)) for name in names])
            rows, count = np.unique(which, return_index=True, return_counts=True)[1:]
            texts = list(dict.fromkeys(about["text"] for _, about, _ in missing))
            parts: dict[tuple[str, int, str], list] = {(text, layer, pool): [] for text in texts for _, layer, pool in cells}
            done, half, saved = 0, half_done(shard, [made_with, *(about for _, about, _ in missing)]), time.time()
            if half.exists():  # of a command that was cut off
                with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
                    with np.load(half, allow_pickle=False) as arrays:
                        parts, done = {cell: [arrays[str(k)]] for k, cell in enumerate(parts)}, int(arrays["done"])
            bar.update(int(count[:done].sum()))
            for number, result in encode(encoder, frames, segments, rows[done:], texts, task):
                for cell, value in result.items():
                    if args.embedding_dtype == "float16" and np.abs(value).max() > np.finfo(np.float16).max:
                        fail(f"encoder {encoder.name}, layer {cell[1]}: too large for float16; add --embedding-dtype float32")
                    parts[cell].append(value.astype(args.embedding_dtype))
                bar.update(int(count[done : done + number].sum()))
                done += number
                if time.time() - saved > HALF_DONE_SECONDS:
                    buffer, saved = io.BytesIO(), time.time()
                    np.savez(buffer, done=done, **{str(k): np.concatenate(part) for k, part in enumerate(parts.values())})
                    atomic_write(half, buffer.getvalue())
            for path, about, guard in missing:
                array = np.concatenate(parts[about["text"], about["layer"], about["pool"]])[which]
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                atomic_write(path.with_suffix(".npy"), buffer.getvalue())
                facts = {"dim": array.shape[1], "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
                write_json(path, about | made_with | ({"guard": guard} if guard else {}) | facts)
            for leftover in half.parent.glob(".half_*"):
                leftover.unlink()
    wait_for_all_ranks()
    if RANK == 0:
        print(f"{out}: embeddings {', '.join(embedding_key(encoder, *cell) for cell in cells)}")


def list_embeddings(out: Path) -> None:
    """Prints each key of a data set: encoder, prompt, numbers a frame, shards that have it, MiB."""
    shards = read_meta(out).get("shards", [])
    files: dict[str, list[Path]] = {}
    for fact in shards:
        for path in sorted((out / fact["shard"] / "embeddings").glob("*.json")):
            files.setdefault(path.stem, []).append(path)
    rows = [("key", "encoder", "prompt", "dim", "shards", "MiB")]
    for key, paths in sorted(files.items()):
        try:
            about, size = json.loads(paths[0].read_text()), sum(path.with_suffix(".npy").stat().st_size for path in paths) / 2**20
        except (OSError, ValueError) as error:
            fail(f"{paths[0]} and its .npy do not read ({error}); delete them and make them again")
        source = about.get("id", about.get("encoder", "?"))
        rows.append((key, source, about.get("prompt", "?"), str(about.get("dim", "?")), f"{len(paths)}/{len(shards)}", f"{size:.2f}"))
    for row in rows:
        print("  ".join(cell.ljust(max(len(other[k]) for other in rows)) for k, cell in enumerate(row)).rstrip())


def parse_args(arguments: list[str]) -> Args:
    preset, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in PRESETS else ("quick", arguments)
    args = tyro.cli(Args, default=PRESETS[preset], args=rest, description=__doc__, prog=f"collect.py [{'|'.join(PRESETS)}]")
    args.tasks = tuple(dict.fromkeys(task for name in args.tasks for task in (MT10 if name == "mt10" else (name,))))
    for task in args.tasks:
        if task not in TASKS:
            fail(nearest(task, [*TASKS, "mt10"], "task"))
    source = args.encoder.removeprefix("otter:")
    if args.encoder not in ("oracle", "none", "random") and not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
        near = nearest(args.encoder, ["oracle", "none", "random"], "encoder")
        fail(f"{near} (or a hub id like owner/model, a local folder, otter:<CLIP>; there is no folder {source!r})")
    if args.otter_temperature <= 0:
        fail("--otter-temperature must be positive")
    least = dict.fromkeys(("workers", "noise", "seed", "encoder_batch", "clips", "video_step"), 0) | {"size": 16}
    least |= dict.fromkeys(("episodes_per_task", "max_steps", "after_success", "shard_episodes"), 1)
    for name, bound in least.items():
        if getattr(args, name) < bound:
            fail(f"--{name.replace('_', '-')} must be at least {bound}")
    for name in ("background_kept", "video_area"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} is a fraction, 0 to 1")
    return args


def main(args: Args) -> None:
    out = Path(args.out)
    if args.list_embeddings:
        return list_embeddings(out)
    if args.encoder not in ("oracle", "none"):
        encoder_config(args)  # a wrong name fails here, not after hours of collecting
    lock = lock_folder(out) if RANK == 0 else None  # held until the process ends
    meta = collect(args, out)
    if RANK == 0 and not (out / "preview.png").exists():
        preview(meta, out)
    if args.encoder != "none":
        embed(args, out, meta)
    if lock is not None:
        os.close(lock)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except OSError as error:
        fail(f"{error}; what is finished is kept: run the same command again")
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: run the same command again")
