"""Distracting MetaWorld: a MetaWorld task with a video playing behind table, robot and objects.

    env = DistractingMetaWorld("drawer-open", videos="generated")
    frame, info = env.reset(options={"episode": 3})

A gymnasium environment and its renderer; the videos are those of video_clips.py.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import weakref

from common import fail, nearest
from common.tasks import task_name
from common.video_clips import Clips


def pick_headless_gl() -> None:
    """Sets MUJOCO_GL, unless the user did, to the first of EGL and OSMesa that really opens a context.

    Must run before `import mujoco`.
    """
    # Threads of software rendering: more of them make small pictures slower, and fight among processes.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    attempt = "import mujoco; context = mujoco.GLContext(8, 8); context.make_current(); context.free()"
    for backend in ("egl", "osmesa"):
        environ = os.environ | {"MUJOCO_GL": backend}
        result = subprocess.run([sys.executable, "-c", attempt], env=environ, capture_output=True)
        if result.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    os.environ["MUJOCO_GL"] = "disable"  # the simulator still works; Renderer says what to install


pick_headless_gl()

import gymnasium  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402

CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
ROBOT, GOAL = 2, 4  # places in shards.SEGMENTS
SEGMENT_OF_ROOT = {"world": 0, "tablelink": 1, "RetainingWall": 1, "base": ROBOT, "mocap": ROBOT}
OBJECT = 3  # every other body
VIDEO_GRID = 8  # video_area counts squares of this grid

# ----------------------------------------------------------------------------------------- environment


def episode_rng(seed: int, task: str, episode: int, split: str = "train") -> np.random.Generator:
    """The one source of chance of an episode: goal, clip, start frame, direction, action noise.

    `split` keeps test episodes apart.
    """
    return np.random.default_rng([seed, episode, *f"{split}/{task}".encode()])


def background_index(start: int, direction: int, step: int, length: int) -> int:
    """Frame of the clip shown after `step` steps: one a step from `start`, reflected at both ends."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    phase = (start + direction * step) % period
    return min(phase, period - phase)


def video_squares(area: float, size: int) -> np.ndarray:
    """Where the video may show, bool (2S, 2S): a share `area` of the squares of a grid.

    The order is random but fixed: the squares of a smaller area are among those of a larger one.
    """
    order = np.random.default_rng(0).permutation(VIDEO_GRID**2).reshape(VIDEO_GRID, VIDEO_GRID)
    chosen = order < round(area * VIDEO_GRID**2)
    square = np.arange(size) * VIDEO_GRID // size  # of each row and column of pixels
    return chosen[square[:, None], square].repeat(2, axis=0).repeat(2, axis=1)


def box_sum(picture: np.ndarray) -> np.ndarray:
    """Sum over 2 x 2 pixels: (2S, 2S, ...) -> (S, S, ...) uint16."""
    rows = np.add(picture[::2], picture[1::2], dtype=np.uint16)
    return rows[:, ::2] + rows[:, 1::2]


def quarter(total: np.ndarray) -> np.ndarray:
    """Mean, rounded, of four pixels whose sum is `total`."""
    return ((total + 2) // 4).astype(np.uint8)


class DistractingMetaWorld(gymnasium.Env):
    """A MetaWorld task seen by a camera, with a video behind table, robot and objects (as in MaskLAM).

    A pixel is background where the camera sees nothing or the floor: where its depth is the empty room's. Per
    episode one clip, start frame and direction are drawn; one video frame passes per step, forwards and
    backwards in turn. Observation: uint8 (size, size, 3), upright. Action: float32 (4,), x y z gripper.

    `info`: state float32 (39,), success (at any step so far), clean (the twin, uint8 (size, size, 3)), mask
    (bool (size, size), True where any of the video shows), clip, clip_frame, episode, goal. Outside the mask
    observation and twin are equal.

    task: a name of MetaWorld, with or without "-v3"
    videos: generated, davis, none or a path, see `Clips`
    split: "train" or "test", with no clip and no goal in common
    camera_distance: metres that the camera is moved backward
    max_steps: the episode's limit, 500 at most
    clips: the first so many of the training clips; 0: all
    video_step: video frames a step; 0: a still picture
    video_area: share of the picture in which the video shows, in squares of an 8 x 8 grid

    `reset(options={"episode": e, "goal": g})` picks an episode, and a goal other than the episode's own.
    Unknown names end the program with one line.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # the simulator's own pace

    def __init__(
        self,
        task: str = "drawer-open",
        videos: str = "generated",
        split: str = "train",
        size: int = 64,
        camera: str = "corner4",
        camera_distance: float = 0.0,
        max_steps: int = 150,
        seed: int = 0,
        clips: int = 0,
        video_step: int = 1,
        video_area: float = 1.0,
    ):
        self.task = task_name(task)
        if camera not in CAMERAS:
            fail(nearest(camera, CAMERAS, "camera"))
        if split not in ("train", "test"):
            fail(f"split is 'train' or 'test', not {split!r}")
        if not 1 <= max_steps <= 500:
            fail(f"max_steps must lie in 1..500 (MetaWorld's own limit), not {max_steps}")
        self.split = split
        self.size = size
        self.max_steps = max_steps
        self.seed = seed
        self.video_step = video_step
        self.shows_video = video_squares(video_area, size)  # (2S, 2S)

        self.clips = None
        if videos != "none":
            self.clips = Clips(videos, split, size)
            self.clip_count = len(self.clips)
            if split == "train" and clips > 0:
                self.clip_count = min(clips, len(self.clips))

        self.inner = ALL_V3_ENVIRONMENTS[f"{self.task}-v3"]()
        self.inner._freeze_rand_vec = False
        self.inner.seeded_rand_vec = True
        self.inner._set_task_called = True
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
            self.seed = seed
            self.episode = -1
        options = options or {}
        self.episode = int(options.get("episode", self.episode + 1))
        self.goal = int(options.get("goal", self.episode))
        self.rng = episode_rng(self.seed, self.task, self.episode, self.split)
        goal_rng = episode_rng(self.seed, f"goal/{self.task}", self.goal, self.split)
        self.inner.seed(int(goal_rng.integers(2**31)))  # MetaWorld draws the goal from it, DETAIL 11
        state, _ = self.inner.reset()
        if self.clips is not None:
            self.clip = int(self.rng.integers(self.clip_count))
            self.start = int(self.rng.integers(len(self.clips[self.clip])))
            self.direction = int(self.rng.choice([-1, 1]))
        self.steps = 0
        self.success = False
        mujoco.mj_forward(self.inner.model, self.inner.data)
        self.empty_depth = self.renderer.empty_depth(self.inner.data)
        return self._observe(state)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        action = np.clip(np.asarray(action, np.float32), -1, 1)
        state, reward, _, _, info = self.inner.step(action)
        self.steps += 1
        self.success |= bool(info["success"])
        frame, info = self._observe(state)
        truncated = self.steps >= self.max_steps
        return frame, float(reward), False, truncated, info

    def _observe(self, state: np.ndarray) -> tuple[np.ndarray, dict]:
        rgb, depth = self.renderer.render(self.inner.data)  # (2S, 2S, 3), (2S, 2S)
        if self.renderer.camera_moves:
            self.empty_depth = self.renderer.empty_depth(self.inner.data)
        background = (depth == self.empty_depth) & self.shows_video  # (2S, 2S), DETAIL 2
        count = box_sum(background)  # (S, S), 0 to 4
        clean = quarter(box_sum(rgb))
        frame = clean.copy()
        clip, clip_frame = -1, -1
        if self.clips is not None:
            clip, video = self.clip, self.clips[self.clip]
            passed = self.video_step * self.steps
            clip_frame = background_index(self.start, self.direction, passed, len(video))
            foreground = box_sum(rgb * ~background[..., None])
            frame = quarter(foreground + count[..., None] * video[clip_frame])
        self.frame = frame
        info = {"state": state.astype(np.float32), "success": self.success, "clean": clean, "mask": count > 0}
        info |= {"clip": clip, "clip_frame": clip_frame, "episode": self.episode, "goal": self.goal}
        return frame, info

    def segments(self) -> np.ndarray:
        """Class of each pixel of the last frame, uint8 (size, size), see shards.SEGMENTS; one more pass."""
        return self.renderer.segments(self.inner.data)

    def render(self) -> np.ndarray:
        return self.frame

    def close(self) -> None:
        self.renderer.close()


# ----------------------------------------------------------------------------------------- renderer


class Renderer:
    """Colour, depth and (on demand) segmentation of one MuJoCo model, from an off-screen context of its own.

    Two MetaWorld environments rendered through gymnasium in one process corrupt each other's frames; a
    private context is exact. Shadows, reflections and multisampling are off: pictures are drawn at twice the
    size S and averaged down by the environment, which is 10x faster. What never moves is drawn once, and each
    frame's moving bodies into it by their depth. That gives the bytes of a single pass, which is what is done
    where something is transparent or the camera moves.
    """

    ALL = mujoco.mjtCatBit.mjCAT_ALL
    FIXED = mujoco.mjtCatBit.mjCAT_STATIC
    MOVING = mujoco.mjtCatBit.mjCAT_DYNAMIC | mujoco.mjtCatBit.mjCAT_DECOR

    def __init__(self, model: mujoco.MjModel, size: int, camera: str, camera_distance: float):
        self.model = model
        self.side = 2 * size
        self._open_context()
        self.close = weakref.finalize(self, release, self.context, self.gl)
        atexit.register(self.close)  # runs before mujoco's own, registered earlier, tears EGL down
        self.scene = mujoco.MjvScene(model, maxgeom=2000)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.option = mujoco.MjvOption()
        self.perturb = mujoco.MjvPerturb()
        self.rect = mujoco.MjrRect(0, 0, self.side, self.side)
        self.rgb = np.empty((self.side, self.side, 3), np.uint8)
        self.depth = np.empty((self.side, self.side), np.float32)

        fixed = (model.body_weldid == 0) & (model.body_mocapid < 0)  # the bodies of FIXED
        self.fixed_geoms = fixed[model.geom_bodyid]
        self.fixed_sites = fixed[model.site_bodyid]
        self.fixed_pose = np.zeros(0)  # in which the layer of what never moves was drawn
        self._place_camera(camera, camera_distance)
        self.camera_moves = not fixed[model.cam_bodyid[self.camera.fixedcamid]]  # two cameras sit on the hand
        if self.camera_moves and camera_distance:
            fail(f"--camera-distance is for a camera that stands still; {camera} sits on the hand")
        roots = [model.body(root).name for root in model.body_rootid]
        self.segment_of_body = np.array([SEGMENT_OF_ROOT.get(root, OBJECT) for root in roots], np.uint8)

    def _open_context(self) -> None:
        if not hasattr(mujoco, "GLContext"):
            packages = "`apt-get install libegl1 libgl1-mesa-dri` (or `libosmesa6`)"
            fail(f"no OpenGL for headless rendering; install one, e.g. {packages}")
        self.model.vis.global_.offwidth = self.side
        self.model.vis.global_.offheight = self.side
        self.model.vis.quality.offsamples = 0
        try:
            self.gl = mujoco.GLContext(self.side, self.side)
            self.gl.make_current()
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # the loaders of EGL and OSMesa raise their own types
            backend = os.environ.get("MUJOCO_GL", "default")
            fail(f"OpenGL ({backend}) opens no context: {error}; try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)

    def _place_camera(self, name: str, distance: float) -> None:
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        index = self.camera.fixedcamid = self.model.camera(name).id
        data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, data)
        rotation = data.cam_xmat[index].reshape(3, 3)  # columns: right, up, backward
        shift = distance * rotation[:, 2]
        self.model.cam_pos[index] += shift
        self.upside_down = rotation[2, 1] < 0  # every corner camera of MetaWorld is
        self.pose = {
            "position": (data.cam_xpos[index] + shift).round(6).tolist(),
            "rotation": rotation.round(6).tolist(),
            "fovy": float(self.model.cam_fovy[index]),
        }

    def render(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """Colour uint8 (2S, 2S, 3), depth float32 (2S, 2S), upright: views that the next call overwrites."""
        geoms, sites = self.fixed_geoms, self.fixed_sites
        places = data.geom_xpos[geoms], data.geom_xmat[geoms], data.site_xpos[sites], data.site_xmat[sites]
        pose = np.concatenate([place.ravel() for place in places])
        if not np.array_equal(pose, self.fixed_pose):
            self._draw_fixed_layer(data)
            self.fixed_pose = pose
        if self.layered:
            self._draw(data, self.MOVING)
            self.behind = self.depth >= self.fixed_depth
            np.copyto(self.rgb, self.fixed_rgb, where=self.behind[..., None])
            np.copyto(self.depth, self.fixed_depth, where=self.behind)
        else:
            self._draw(data, self.ALL)
        return self._upright(self.rgb), self._upright(self.depth)

    def _draw_fixed_layer(self, data: mujoco.MjData) -> None:
        self._update(data, self.ALL)
        opaque = all(geom.rgba[3] == 1 for geom in self.scene.geoms[: self.scene.ngeom])
        self.layered = opaque and not self.camera_moves
        self._draw(data, self.FIXED)
        self.fixed_rgb = self.rgb.copy()
        self.fixed_depth = self.depth.copy()
        self.fixed_segments = None  # drawn when first asked for

    def empty_depth(self, data: mujoco.MjData) -> np.ndarray:
        """Depth (2S, 2S) of the room with the floor alone."""
        self._update(data, self.ALL)
        self.scene.ngeom = 1  # geom 0 is the floor in every task
        mujoco.mjr_render(self.rect, self.scene, self.context)
        depth = np.empty_like(self.depth)  # the views of the last call stay valid
        mujoco.mjr_readPixels(None, depth, self.rect, self.context)
        return self._upright(depth)

    def segments(self, data: mujoco.MjData) -> np.ndarray:
        """Class of each pixel, (S, S) uint8, of the scene of the last `render` (one more pass)."""
        if not self.layered:
            return self._draw_segments(data, self.ALL)
        if self.fixed_segments is None:
            self.fixed_segments = self._draw_segments(data, self.FIXED)
        behind = self._upright(self.behind)[::2, ::2]
        return np.where(behind, self.fixed_segments, self._draw_segments(data, self.MOVING))

    def _draw_segments(self, data: mujoco.MjData, categories: int) -> np.ndarray:
        flags = [int(mujoco.mjtRndFlag.mjRND_SEGMENT), int(mujoco.mjtRndFlag.mjRND_IDCOLOR)]
        self._update(data, categories)
        self.scene.flags[flags] = 1
        mujoco.mjr_render(self.rect, self.scene, self.context)
        self.scene.flags[flags] = 0
        colours = np.empty_like(self.rgb)
        mujoco.mjr_readPixels(colours, None, self.rect, self.context)
        small = self._upright(colours)[::2, ::2].astype(np.uint32)
        code = small @ np.array([1, 256, 65536], np.uint32)  # segid + 1; 0 where nothing is

        segment_of_code = np.zeros(self.scene.ngeom + 1, np.uint8)
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                segment = self.segment_of_body[self.model.geom_bodyid[geom.objid]]
            elif geom.objtype == mujoco.mjtObj.mjOBJ_SITE:  # goal markers, and sites drawn with the robot
                segment = self.segment_of_body[self.model.site_bodyid[geom.objid]]
                if segment != ROBOT:
                    segment = GOAL
            else:
                continue
            segment_of_code[geom.segid + 1] = segment
        return segment_of_code[code]

    def _update(self, data: mujoco.MjData, categories: int) -> None:
        self.gl.make_current()
        mujoco.mjv_updateScene(
            self.model, data, self.option, self.perturb, self.camera, categories, self.scene
        )

    def _draw(self, data: mujoco.MjData, categories: int) -> None:
        self._update(data, categories)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = categories != self.MOVING  # the fixed layer has it
        mujoco.mjr_render(self.rect, self.scene, self.context)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 1
        mujoco.mjr_readPixels(self.rgb, self.depth, self.rect, self.context)

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        """OpenGL's rows go up; an upside-down camera's already go down, but its columns are swapped."""
        if self.upside_down:
            return picture[:, ::-1]
        return picture[::-1]


def release(context: mujoco.MjrContext, gl: object) -> None:
    gl.make_current()  # the numbers of what is freed mean other things in another environment's context
    context.free()
    gl.free()
