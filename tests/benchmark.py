"""Speed, side by side in one run and on one core: python tests/benchmark.py [--json] prints {name: ratio}.

env_step: times faster than the public way (gymnasium renders colour, a second environment the segmentation) is a step with frame and twin.
data_loading_share: share of an update of stage 1 that goes into making its batch; data_loading is its inverse.
bootstrap: times faster than a plain Python loop is the vectorised interval of a (3, 10) matrix with 50 000 replicates.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ[variable] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import collect  # noqa: E402
import eval as ev  # noqa: E402
import lam_vlm  # noqa: E402


def interleaved(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each way; they take turns, so that other load on the machine hits all of them."""
    seconds = {name: [] for name in ways}
    for _ in range(repetitions + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}  # the first one warms up


def env_step() -> dict[str, float]:
    """64 px, default quality; physics, colour, background mask and composition for both."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    ours = collect.DistractingMetaWorld("drawer-open", videos="generated", size=64, camera="corner")
    ours.reset(options={"episode": 0})
    clip = collect.Clips("generated", "train", 64)[0]
    action = np.array([0.1, -0.1, 0.1, 0], np.float32)

    def public_env() -> object:
        env = ALL_V3_ENVIRONMENTS["drawer-open-v3"](render_mode="rgb_array", camera_name="corner", width=64, height=64)
        env._freeze_rand_vec, env._set_task_called = False, True
        env.reset()
        return env

    colour, copy = public_env(), public_env()
    segmentation = mujoco.Renderer(copy.model, 64, 64)
    segmentation.enable_segmentation_rendering()  # gymnasium's own segmentation=True overflows with numpy 2
    viewer = colour.mujoco_renderer._get_viewer("rgb_array")

    def public() -> np.ndarray:
        colour.step(action)
        if colour.curr_path_length >= 400:
            colour.reset()
        viewer.make_context_current()  # gymnasium does not, and would draw into the other environment's buffers
        clean = np.flip(colour.render(), (0, 1))
        copy.set_state(colour.data.qpos, colour.data.qvel)
        copy.data.mocap_pos[:], copy.data.mocap_quat[:] = colour.data.mocap_pos, colour.data.mocap_quat
        mujoco.mj_forward(copy.model, copy.data)
        segmentation.update_scene(copy.data, "corner")
        geom, kind = np.moveaxis(np.flip(segmentation.render(), (0, 1)), 2, 0)
        background = (geom < 1) | (kind != int(mujoco.mjtObj.mjOBJ_GEOM))
        return np.where(background[..., None], clip[0], clean)

    def own() -> np.ndarray:
        frame, _, _, truncated, info = ours.step(action)
        if truncated:
            ours.reset(options={"episode": 0})
        return frame

    seconds = interleaved({"public": public, "own": own}, 60)
    return {
        "env_step": seconds["public"] / seconds["own"],
        "env_step_ms": 1000 * seconds["own"],
        "public_step_ms": 1000 * seconds["public"],
    }


def data_loading() -> dict[str, float]:
    """An update of stage 1 with the default target and arguments on synthetic data of the quick size, resident, one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", f"{folder}/data", "--encoder", "made_up", "--out", f"{folder}/run", "--stages", "lam", "--resident", "yes"]
        make_quick_data(Path(folder, "data"))
        run = lam_vlm.open_run(lam_vlm.parse_args(flags))
        caught = {}
        train, lam_vlm.train = (
            lam_vlm.train,
            lambda run, stage, module, updates, lr, make, loss_of, probe=None: caught.update(module=module, make=make, loss_of=loss_of),
        )
        lam_vlm.train_lam(run)
        lam_vlm.train = train
        module, make, loss_of = caught["module"].train().requires_grad_(True), caught["make"], caught["loss_of"]
        optimiser, batch, rng = torch.optim.AdamW(module.parameters()), [None], np.random.default_rng(0)

        def load() -> None:
            batch[0] = make(rng)

        def learn() -> None:
            optimiser.zero_grad(set_to_none=True)
            loss_of(batch[0]).backward()
            optimiser.step()

        seconds = interleaved({"load": load, "learn": learn}, 30)
        os.close(run.lock)
    share = seconds["load"] / sum(seconds.values())
    return {"data_loading": 1 / share, "data_loading_share": share, "update_ms": 1000 * sum(seconds.values())}


def make_quick_data(root: Path) -> None:
    """6000 frames of noise in collect.py's layout: 60 episodes of 100."""
    folder, rng = root / "drawer-open/shard_00000", np.random.default_rng(0)
    (folder / "embeddings").mkdir(parents=True)
    arrays = {"frames": rng.integers(0, 256, (6000, 64, 64, 3), np.uint8), "segments": rng.integers(0, 5, (6000, 64, 64), np.uint8)}
    arrays |= {"actions": rng.uniform(-1, 1, (6000, 4)).astype(np.float32), "states": rng.normal(size=(6000, 39)).astype(np.float32)}
    for name, array in (arrays | {"episode": np.repeat(np.arange(60, dtype=np.int32), 100)}).items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "embeddings/made_up.npy", rng.normal(size=(6000, 256)).astype(np.float16))
    (folder / "embeddings/made_up.json").write_text(json.dumps({"frames_sha256": "", "sha256": ""}))
    shard = {"shard": "drawer-open/shard_00000", "frames": 6000, "sha256": {"frames": ""}}
    meta = {"env": {"videos": "generated", "size": 64}, "tasks": ["drawer-open"], "episodes_per_task": 60, "shards": [shard]}
    (root / "meta.json").write_text(json.dumps(meta))


def bootstrap() -> dict[str, float]:
    """Our interval against the loop it replaces; the loop's time is that of 500 replicates, times 100."""
    scores = np.random.default_rng(0).random((3, 10))

    def loop() -> tuple[float, float]:
        rng, values = np.random.default_rng(0), []
        for _ in range(500):
            resampled = np.stack([rng.choice(scores[:, task], 3) for task in range(10)], axis=1)
            ordered = np.sort(resampled, axis=None)
            values.append(ordered[7:-7].mean())
        return tuple(np.percentile(values, (2.5, 97.5)))

    seconds = interleaved({"loop": loop, "own": lambda: ev.stratified_bootstrap_ci(scores, reps=50_000)}, 7)
    return {"bootstrap": 100 * seconds["loop"] / seconds["own"], "bootstrap_seconds": seconds["own"]}


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # the scripts' own lines
    ratios = env_step() | data_loading() | bootstrap()
    sys.stdout = stdout
    if "--json" in sys.argv[1:]:
        print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))
    else:
        for name, value in ratios.items():
            print(f"{name:20} {value:10.3f}")
