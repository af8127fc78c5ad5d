"""Speed, side by side in one run: python tests/benchmark.py [--json] [--smoke] prints {name: ratio}.

What is compared runs in turns, so that other load on the machine hits all of it. Whole commands are timed.

env_step: times faster than the public way (gymnasium renders colour, a second environment the segmentation)
    is a step with frame and twin.
stage1: times faster than a plain eager float32 loop with a DataLoader is an update at LAOM's widths.
evaluation: times more episodes a second than one environment of ours and one forward pass at a time.
evaluation_public: the same against the public way of rendering, one episode at a time.
embedding: times more images a second than one image a call, a tiny random LLaVA, two prompts.
bootstrap: times faster than a plain Python loop is the interval of a (3, 10) matrix, 50 000 replicates.
data_loading_share: share of an update of stage 1, quick, that goes into making its batch.

--big [GIB]: stage 1 on a data set of that size (20; the files are sparse and take no disk): peak of memory
    that is not the files' own pages, and rate relative to a small data set.
--cost: collects and trains at 1x, 4x and 16x the data; time and memory of each stage in results/cost/.
--smoke: everything at its smallest size: a test that it runs, no measurement.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.distracting_metaworld import DistractingMetaWorld  # noqa: E402, I001  picks MUJOCO_GL first

import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import lam_vlm  # noqa: E402
from common import encoders  # noqa: E402
from common.dataset import Dataset  # noqa: E402
from common.statistics import stratified_bootstrap_ci  # noqa: E402

LAOM = (
    "--widths 96 192 192 --res-blocks 2 --stem 2 --fdm-hidden 1024 --latent-dim 128 --batch-size 32".split()
)


def smallest(smoke: bool) -> list[str]:
    """lam_vlm.py's flags of a network and batch that train at once, for --smoke."""
    return "--widths 8 16 --batch-size 8".split() if smoke else []


def interleaved(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each way; they take turns. The first turn warms up."""
    seconds = {name: [] for name in ways}
    for _ in range(repetitions + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------- environment


class PublicWay:
    """drawer-open by gymnasium, a second environment for the segmentation, a video behind both."""

    def __init__(self, size: int = 64, camera: str = "corner"):
        make = ALL_V3_ENVIRONMENTS["drawer-open-v3"]
        self.camera = camera
        self.colour = make(render_mode="rgb_array", camera_name=camera, width=size, height=size)
        self.copy = make(render_mode="rgb_array", camera_name=camera, width=size, height=size)
        for env in (self.colour, self.copy):
            env._freeze_rand_vec, env._set_task_called = False, True
            env.reset()
        self.segmentation = mujoco.Renderer(self.copy.model, size, size)
        self.segmentation.enable_segmentation_rendering()  # gymnasium's own overflows with numpy 2
        self.viewer = self.colour.mujoco_renderer._get_viewer("rgb_array")
        self.video = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)

    def step(self, action: np.ndarray) -> np.ndarray:
        self.colour.step(action)
        if self.colour.curr_path_length >= 400:
            self.colour.reset()
        self.viewer.make_context_current()  # gymnasium does not, and would draw into the other one's buffers
        clean = np.flip(self.colour.render(), (0, 1))
        self.copy.set_state(self.colour.data.qpos, self.colour.data.qvel)
        self.copy.data.mocap_pos[:] = self.colour.data.mocap_pos
        self.copy.data.mocap_quat[:] = self.colour.data.mocap_quat
        mujoco.mj_forward(self.copy.model, self.copy.data)
        self.segmentation.update_scene(self.copy.data, self.camera)
        geom, kind = np.moveaxis(np.flip(self.segmentation.render(), (0, 1)), 2, 0)
        background = (geom < 1) | (kind != int(mujoco.mjtObj.mjOBJ_GEOM))
        return np.where(background[..., None], self.video, clean)


def env_step(smoke: bool) -> dict[str, float]:
    """64 px, default quality; physics, colour, background mask and composition for both. One thread."""
    ours, public = DistractingMetaWorld("drawer-open", size=64, camera="corner"), PublicWay()
    ours.reset(options={"episode": 0})
    action = np.array([0.1, -0.1, 0.1, 0], np.float32)

    def own() -> None:
        truncated = ours.step(action)[3]
        if truncated:
            ours.reset(options={"episode": 0})

    seconds = interleaved({"public": lambda: public.step(action), "own": own}, 2 if smoke else 60)
    return {
        "env_step": seconds["public"] / seconds["own"],
        "env_step_ms": 1000 * seconds["own"],
        "public_step_ms": 1000 * seconds["public"],
    }


# ---------------------------------------------------------------------------------------- training


def make_quick_data(root: Path, episodes: int = 60, max_steps: int = 100) -> None:
    """Frames of noise in collect.py's layout: episodes of 100 steps, 64 px, an embedding of 256 numbers."""
    folder, rng, n = root / "drawer-open/shard_00000", np.random.default_rng(0), 100 * episodes
    (folder / "embeddings").mkdir(parents=True)
    arrays = {
        "frames": rng.integers(0, 256, (n, 64, 64, 3), np.uint8),
        "segments": rng.integers(0, 5, (n, 64, 64), np.uint8),
        "actions": rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        "states": rng.normal(size=(n, 39)).astype(np.float32),
        "episode": np.repeat(np.arange(episodes, dtype=np.int32), 100),
        "step": np.tile(np.arange(100, dtype=np.int16), episodes),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "embeddings/made_up.npy", rng.normal(size=(n, 256)).astype(np.float16))
    record = {
        "encoder": "made-up",
        "prompt": "best",
        "layer": 0,
        "pool": "all",
        "frames_sha256": "",
        "sha256": "",
    }
    (folder / "embeddings/made_up.json").write_text(json.dumps(record))
    env = {
        "videos": "generated",
        "size": 64,
        "camera": "corner4",
        "camera_distance": 0.0,
        "max_steps": max_steps,
    }
    env |= {"clips": 0, "video_step": 1, "video_area": 1.0}
    shard = {"shard": "drawer-open/shard_00000", "task": "drawer-open", "frames": n, "sha256": {"frames": ""}}
    meta = {"env": env, "tasks": ["drawer-open"], "size": 64, "arrays": list(arrays), "shards": [shard]}
    meta |= {
        "action": {"names": list("xyzg"), "low": [-1] * 4, "high": [1] * 4},
        "episodes_per_task": episodes,
    }
    meta |= {"objects": {"drawer-open": "drawer"}, "instructions": {"drawer-open": "open the drawer"}}
    (root / "meta.json").write_text(json.dumps(meta | {"episodes": {"drawer-open": episodes}}))


def seconds_an_update(folder: Path, flags: list[str], few: int, many: int) -> Callable[[], float]:
    """Returns a function: (time of a run of `many` updates of stage 1 - that of `few`) / their difference."""
    runs = iter(range(10_000))

    def measure() -> float:
        seconds = {}
        for updates in (few, many):
            arguments = ["--data", f"{folder}/data", "--encoder", "made_up", "--stages", "lam", *flags]
            arguments += ["--lam-updates", str(updates), "--out", f"{folder}/run{next(runs)}"]
            begun = time.perf_counter()
            lam_vlm.main(lam_vlm.parse_args(arguments))
            seconds[updates] = time.perf_counter() - begun
        return (seconds[many] - seconds[few]) / (many - few)

    return measure


def data_loading(smoke: bool) -> dict[str, float]:
    """An update of stage 1 with the default target and arguments on synthetic data of the quick size."""
    repetitions, few, many = (1, 1, 3) if smoke else (3, 10, 60)
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"), 6 if smoke else 60)
        data = Dataset(f"{folder}/data", target="embedding", encoder="made_up")
        rng = np.random.default_rng(0)

        def load() -> None:
            t = rng.choice(data.train, 128)
            data.observe(t), data.observe(t + 1), data.target(t), data.target(t + 1)

        whole = seconds_an_update(Path(folder), smallest(smoke), few, many)
        updates = [whole() for _ in range(repetitions)]
        loads = interleaved({"load": load}, 10 * repetitions)["load"]
    return {
        "data_loading_share": loads / float(np.median(updates)),
        "update_ms": 1000 * float(np.median(updates)),
    }


class Transitions(torch.utils.data.Dataset):
    """Single transitions of a shard, as a plain DataLoader collates them."""

    def __init__(self, shard: Path, rows: np.ndarray):
        self.frames, self.embeddings = (
            np.load(shard / "frames.npy"),
            np.load(shard / "embeddings/made_up.npy"),
        )
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple:
        t = self.rows[index]
        now, after = (
            torch.from_numpy(self.frames[k]).permute(2, 0, 1).float() / 255 - 0.5 for k in (t, t + 1)
        )
        embedded, embedded_after = (torch.from_numpy(self.embeddings[k]).float() for k in (t, t + 1))
        return now, after, embedded, embedded_after


def stage1(smoke: bool) -> dict[str, float]:
    """LAOM's widths at 64 px, embedding target, batches of 32, all cores: against float32, channels first and
    a DataLoader that collates single transitions in two processes."""
    repetitions, few, many = (1, 1, 2) if smoke else (3, 4, 16)
    widths = smallest(smoke) or LAOM
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"), 6 if smoke else 60)
        arguments = ["--data", f"{folder}/data", "--encoder", "made_up", "--out", f"{folder}/plain", *widths]
        args = lam_vlm.parse_args(arguments)
        run, data = lam_vlm.open_run(args)
        run.close()
        plain = lam_vlm.LAM(data, args)
        optimizer = torch.optim.AdamW(plain.parameters(), 1e-3)
        transitions = Transitions(Path(folder, "data/drawer-open/shard_00000"), data.train)
        loader = torch.utils.data.DataLoader(transitions, batch_size=32, shuffle=True, num_workers=2)

        def eager() -> float:
            begun = time.perf_counter()
            batches = iter(loader)
            for _ in range(many - few):
                now, after, embedded, embedded_after = next(batches)
                z = plain.idm.encoder(torch.cat([now, (after - now) * 4], 1))
                change = plain.standardise(embedded_after - embedded)
                loss = F.mse_loss(plain.fdm(plain.context(now, embedded), z), change)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return (time.perf_counter() - begun) / (many - few)

        own = seconds_an_update(Path(folder), widths, few, many)
        times = [(own(), eager()) for _ in range(repetitions)]
    own_seconds, eager_seconds = np.median(times, axis=0)
    return {"stage1": eager_seconds / own_seconds, "stage1_seconds": own_seconds, "stage1_dtype": args.dtype}


# ---------------------------------------------------------------------------------------- evaluation


def evaluation(smoke: bool) -> dict[str, float]:
    """A policy of the quick widths that never succeeds, 100 steps an episode: eval.py's whole command."""
    steps, episodes, single = (10, 4, 1) if smoke else (100, 100, 10)
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"), 6 if smoke else 60, steps)
        flags = "--lam-updates 1 --bc-updates 1 --decoder-updates 1 --encoder made_up".split()
        flags += smallest(smoke)
        lam_vlm.main(lam_vlm.parse_args([*flags, "--data", f"{folder}/data", "--out", f"{folder}/run"]))
        command = ["eval.py", "--runs", f"{folder}/run", "--episodes", str(episodes), "--media", "0"]
        command += ["--workers", "1"] if smoke else []
        own = measured(*command, "--out", f"{folder}/results", cwd=folder)[0] / episodes

        policy, env = (
            lam_vlm.load_policy(f"{folder}/run"),
            DistractingMetaWorld(split="test", max_steps=steps),
        )
        begun = time.perf_counter()
        for episode in range(single):
            frame, _ = env.reset(options={"episode": episode})
            truncated = False
            while not truncated:
                frame, _, _, truncated, _ = env.step(policy(frame))
        plain = (time.perf_counter() - begun) / single

        public = PublicWay(camera="corner4")
        begun = time.perf_counter()
        for _ in range(single):
            for _ in range(steps):
                frame = public.step(policy(frame))
        public_seconds = (time.perf_counter() - begun) / single
        env.close()
    return {
        "evaluation": plain / own,
        "evaluation_public": public_seconds / own,
        "evaluation_episodes_per_second": 1 / own,
    }


# ---------------------------------------------------------------------------------- encoders, statistics


def embedding(smoke: bool) -> dict[str, float]:
    """60 frames at one thread. Both give the mean of the prompt's tokens at layer -2; they must agree."""
    from tiny_models import llava

    texts = [encoders.PROMPTS["arm"], encoders.PROMPTS["blind"]]
    count = 4 if smoke else 60
    frames = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        llava(Path(folder))
        shard = Path(folder, "drawer-open/shard_00000")
        shard.mkdir(parents=True)
        np.save(shard / "frames.npy", frames)
        encoder = encoders.make_encoder(folder, batch=30)
        processor, model, found = encoder.processor, encoder.model, {}

        def own() -> None:
            found["own"] = encoders.embed_frames(encoder, shard, "drawer-open", texts)

        @torch.no_grad()
        def single() -> None:
            found["single"] = {text: [] for text in texts}
            for frame in frames:
                for text in texts:
                    content = [
                        {"type": "image", "image": Image.fromarray(frame)},
                        {"type": "text", "text": text},
                    ]
                    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
                    message = [{"role": "user", "content": content}]
                    inputs = processor.apply_chat_template(message, return_tensors="pt", **how)
                    states = model(**inputs, output_hidden_states=True).hidden_states[-2][0]
                    after_image = int((inputs["input_ids"][0] == encoder.image_id).nonzero().max()) + 1
                    found["single"][text].append(states[after_image:].mean(0).numpy())

        seconds = interleaved({"own": own, "single": single}, 1 if smoke else 4)
    for text in texts:
        assert np.allclose(found["own"][text, -2, "text"], np.stack(found["single"][text]), atol=1e-4)
    return {
        "embedding": seconds["single"] / seconds["own"],
        "embedding_images_per_second": count / seconds["own"],
    }


def bootstrap(smoke: bool) -> dict[str, float]:
    """Our interval against the loop it replaces; the loop's time is that of 500 replicates, times 100."""
    scores = np.random.default_rng(0).random((3, 10))

    def loop() -> np.ndarray:
        rng, values = np.random.default_rng(0), []
        for _ in range(500):
            resampled = np.stack([rng.choice(scores[:, task], 3) for task in range(10)], axis=1)
            ordered = np.sort(resampled, axis=None)
            values.append(ordered[7:-7].mean())
        return np.percentile(values, (2.5, 97.5))

    ways = {"loop": loop, "own": lambda: stratified_bootstrap_ci(scores, reps=50_000)}
    seconds = interleaved(ways, 1 if smoke else 7)
    return {"bootstrap": 100 * seconds["loop"] / seconds["own"], "bootstrap_seconds": seconds["own"]}


# ---------------------------------------------------------------------------------------- whole commands


def measured(*command: str, cwd: str) -> tuple[float, float]:
    """(seconds, peak GiB) of one of the scripts: its own memory, without pages of files that it maps."""
    begun, peak = time.perf_counter(), 0
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"benchmark.py: {' '.join(command)} failed")
    return time.perf_counter() - begun, peak / 2**20


def rate(run: Path) -> float:
    """Updates a second of stage 1: median over the rows of its log, so that probes do not count."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = np.array([row["update"] for row in rows])
    times = updates / [row["updates_per_second"] for row in rows]
    return float(1 / np.median(np.diff(times) / np.diff(updates)))


def big(gib: float, smoke: bool) -> dict[str, float]:
    """Stage 1 with default arguments: `gib` GiB of data in sparse files against the 121 MiB of quick."""
    with tempfile.TemporaryDirectory() as folder:
        small, root = Path(folder, "data/small"), Path(folder, "data/big")
        make_quick_data(small, 6 if smoke else 60)
        shard, meta = small / "drawer-open/shard_00000", json.loads((small / "meta.json").read_text())
        episodes = meta["episodes"]["drawer-open"]
        paths = [*shard.glob("*.npy"), *shard.glob("embeddings/*.npy")]
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in paths}
        copies = max(2, round(gib * 2**30 / sum(array.nbytes for array in arrays.values())))
        for k in range(copies):
            to = root / f"drawer-open/shard_{k:05d}"
            (to / "embeddings").mkdir(parents=True)
            for name, array in arrays.items():
                path = to / f"{name}.npy"
                if name == "made_up":
                    path = to / "embeddings/made_up.npy"
                if name == "episode":
                    np.save(path, array + episodes * k)
                else:  # a header and a hole
                    np.lib.format.open_memmap(path, "w+", array.dtype, array.shape)
            (to / "embeddings/made_up.json").write_bytes((shard / "embeddings/made_up.json").read_bytes())
        shards = [meta["shards"][0] | {"shard": f"drawer-open/shard_{k:05d}"} for k in range(copies)]
        (root / "meta.json").write_text(json.dumps(meta | {"shards": shards}))
        updates = "10" if smoke else "1000"
        flags = f"lam_vlm.py --encoder made_up --stages lam --lam-updates {updates} --device cpu".split()
        flags += smallest(smoke)
        result = {}
        for name in ("small", "big"):
            _, peak = measured(*flags, "--data", f"data/{name}", "--out", f"runs/{name}", cwd=folder)
            result[f"{name}_peak_gib"] = peak
            result[f"{name}_updates_per_second"] = rate(Path(folder, "runs", name))
        size = sum(path.stat().st_size for path in root.rglob("*.npy")) / 2**30
    relative = result["big_updates_per_second"] / result["small_updates_per_second"]
    return {"big_gib": size, "big_rate": relative} | result


def cost(smoke: bool) -> dict[str, float]:
    """Time and peak memory of each stage over 1x, 4x and 16x the episodes; quick's flags."""
    rows, out = [], ROOT / "results/cost"
    with tempfile.TemporaryDirectory() as folder:
        if smoke:
            out = Path(folder, "cost")
        for episodes in (2,) if smoke else (10, 40, 160):
            data, run = f"data/{episodes}", f"runs/{episodes}"
            collect = f"collect.py --episodes-per-task {episodes} --out {data}"
            # equal passes over the data
            updates = f"--lam-updates {5 * episodes} --bc-updates {5 * episodes} --labelled-episodes 1"
            if smoke:
                updates += " --decoder-updates 2"
            network = " ".join(smallest(smoke))
            train = f"lam_vlm.py --data {data} --out {run} {updates} {network} --stages"
            commands = {
                "collect": f"{collect} --encoder none",
                "embed": collect,
                "lam": f"{train} lam",
                "bc": f"{train} lam bc",
                "decoder": f"{train} lam bc decoder",
                "evaluate": f"eval.py --runs {run} --episodes {episodes // 2} --media 0 --out {data}-results",
            }
            for stage, command in commands.items():
                if smoke and stage in ("collect", "lam", "bc"):  # the next one does it as well
                    continue
                seconds, peak = measured(*command.split(), cwd=folder)
                row = {"episodes": episodes, "stage": stage}
                rows.append(row | {"seconds": round(seconds, 1), "peak_gib": round(peak, 3)})
                print(rows[-1], file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "cost.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        plot_cost(rows, out / "cost.png")
    return {"cost_seconds": sum(row["seconds"] for row in rows)}


def plot_cost(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted({row["episodes"] for row in rows})
    for axis, key, label in zip(axes, ("seconds", "peak_gib"), ("seconds", "peak memory, GiB")):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            values = [row[key] for row in rows if row["stage"] == stage]
            axis.loglog(sizes, values, "o-", label=stage, base=2)
        first = min(row[key] for row in rows)
        axis.loglog(sizes, [first * size / sizes[0] for size in sizes], "k:", label="linear", base=2)
        axis.set(xlabel="episodes collected", ylabel=label, xticks=sizes)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--smoke", action="store_true", help="the smallest size: a test, no measurement")
    parser.add_argument(
        "--big", nargs="?", type=float, const=20, metavar="GIB", help="data larger than memory"
    )
    parser.add_argument("--cost", action="store_true", help="time and memory over the size of the data")
    args = parser.parse_args()
    stdout, sys.stdout = sys.stdout, sys.stderr  # the scripts' own lines
    result = {}
    if args.big is not None:
        result = big(args.big, args.smoke)
    elif args.cost:
        result = cost(args.smoke)
    else:
        for benchmark in (env_step, stage1, evaluation, embedding, bootstrap, data_loading):
            result |= benchmark(args.smoke)
    sys.stdout = stdout
    result = {
        name: value if isinstance(value, str) else round(float(value), 4) for name, value in result.items()
    }
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32} {value:>10}")


if __name__ == "__main__":
    os.environ.setdefault("LP_NUM_THREADS", "1")
    main()
