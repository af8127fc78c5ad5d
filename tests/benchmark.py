"""Speed, side by side in one run: python tests/benchmark.py [--json] prints {name: ratio}; what is compared runs in turns, so that other
load on the machine hits all of it.

env_step: times faster than the public way (gymnasium renders colour, a second environment the segmentation) is a step with frame and twin.
stage1: times faster than a plain eager float32 loop with a DataLoader over the same arrays is an update of stage 1 at LAOM's widths.
evaluation: times more episodes a second than one environment and one forward pass at a time, the processes' start included.
embedding: times more images a second than a loop of one image a call, a tiny random LLaVA, two prompts.
bootstrap: times faster than a plain Python loop is the vectorised interval of a (3, 10) matrix with 50 000 replicates.
data_loading_share: share of an update of stage 1, quick, that goes into making its batch.

python tests/benchmark.py --big [GIB] trains stage 1 from the files of a data set of that size (20; they are sparse and take no disk):
peak memory, and rate relative to resident data. python tests/benchmark.py --cost collects and trains at 1x, 4x and 16x the data and draws
time and memory of each stage to results/cost/cost.png.
"""

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
    """64 px, default quality; physics, colour, background mask and composition for both. One thread."""
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
    """An update of stage 1 with the default target and arguments on synthetic data of the quick size, resident."""
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"))
        run, module, make, loss_of = first_stage(folder)
        optimiser, batch, rng = torch.optim.AdamW(module.parameters()), [None], np.random.default_rng(0)

        def load() -> None:
            batch[0] = make(rng)

        def learn() -> None:
            with run.autocast():
                loss = loss_of(batch[0])
            update(optimiser, loss)

        seconds = interleaved({"load": load, "learn": learn}, 30)
        os.close(run.lock)
    share = seconds["load"] / sum(seconds.values())
    return {"data_loading_share": share, "update_ms": 1000 * sum(seconds.values())}


def update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def first_stage(folder: str, *flags: str) -> tuple:
    """(run, LAM, make(rng) -> batch, loss_of(batch)) of stage 1 on the data set folder/data, before its first update."""
    arguments = ["--data", f"{folder}/data", "--encoder", "made_up", "--out", f"{folder}/run", "--stages", "lam", "--resident", "yes"]
    run, caught = lam_vlm.open_run(lam_vlm.parse_args([*arguments, *flags])), []
    train = lam_vlm.train
    lam_vlm.train = lambda run, stage, module, updates, lr, make, loss_of, probe=None: caught.extend([module, make, loss_of])
    lam_vlm.train_lam(run)
    lam_vlm.train = train
    return run, caught[0].train().requires_grad_(True), *caught[1:]


def stage1() -> dict[str, float]:
    """LAOM's widths at 64 px, embedding target, batches of 32, all cores: ours (bfloat16 where the hardware has it, channels last, batches
    indexed as a whole) against float32, channels first, and a DataLoader that collates single transitions in two processes."""
    widths = "--widths 96 192 192 --res-blocks 2 --stem 2 --fdm-hidden 1024 --latent-dim 128 --batch-size 32".split()
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"))
        run, module, make, loss_of = first_stage(folder, *widths)
        shard = Path(folder, "data/drawer-open/shard_00000")
        frames, embeddings = np.load(shard / "frames.npy"), np.load(shard / "embeddings/made_up.npy")
        plain = lam_vlm.LAM(run.data, run.args)
        plain.fit_statistics(run.data)

        class Transitions(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(run.data.train)

            def __getitem__(self, index: int) -> tuple:
                t = run.data.train[index]
                pictures = (torch.from_numpy(frames[k]).permute(2, 0, 1).float() / 255 - 0.5 for k in (t, t + 1))
                return *pictures, torch.from_numpy(embeddings[t]).float(), torch.from_numpy(embeddings[t + 1]).float()

        loader = iter(torch.utils.data.DataLoader(Transitions(), batch_size=32, shuffle=True, num_workers=2))
        optimiser, eager_optimiser = (torch.optim.AdamW(lam.parameters(), 1e-3) for lam in (module, plain))
        rng = np.random.default_rng(0)

        def own() -> None:
            batch = make(rng)
            with run.autocast():
                loss = loss_of(batch)
            update(optimiser, loss)

        def eager() -> None:
            now, after, embedded, embedded_after = next(loader)
            z = lam_vlm.Head.forward(plain.idm, torch.cat([now, (after - now) * 4], 1))
            target = (embedded_after - embedded - plain.change_mean) / plain.change_std
            update(eager_optimiser, ((plain.fdm((embedded - plain.mean) / plain.std, z) - target) ** 2).mean())

        seconds = interleaved({"own": own, "eager": eager}, 6)
        os.close(run.lock)
    return {"stage1": seconds["eager"] / seconds["own"], "stage1_seconds": seconds["own"], "stage1_dtype": run.args.dtype}


def evaluation() -> dict[str, float]:
    """A policy of the quick widths that never succeeds, 100 steps an episode, all cores: eval.py's command without its report."""
    with tempfile.TemporaryDirectory() as folder:
        make_quick_data(Path(folder, "data"), {"camera": "corner4", "camera_distance": 0.0, "max_steps": 100})
        flags = "--lam-updates 1 --bc-updates 1 --decoder-updates 1 --labelled-episodes 2 --encoder made_up".split()
        lam_vlm.main(lam_vlm.parse_args([*flags, "--data", f"{folder}/data", "--out", f"{folder}/run"]))
        [run] = ev.find_runs([f"{folder}/run"])
        begun = time.perf_counter()
        ev.roll_out([run], ev.Args(episodes=100, media=0))
        own = (time.perf_counter() - begun) / 100
        policy, env = ev.load_policy(f"{folder}/run"), collect.DistractingMetaWorld(split="test", max_steps=100)
        begun = time.perf_counter()
        for episode in range(10):
            frame, _ = env.reset(options={"episode": episode})
            truncated = False
            while not truncated:
                frame, _, _, truncated, info = env.step(policy(frame))
        plain = (time.perf_counter() - begun) / 10
        env.close()
    return {"evaluation": plain / own, "evaluation_episodes_per_second": 1 / own}


def embedding() -> dict[str, float]:
    """60 frames at one thread. Both give the mean of the prompt's tokens at layer -2; they must agree."""
    from test_encoders import llava

    texts = [collect.PROMPTS["arm"], collect.PROMPTS["blind"]]
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        llava(Path(folder))
        encoder = collect.make_encoder(collect.Args(encoder=folder, encoder_batch=30))
        processor, model, found = encoder.processor, encoder.model, {}

        def own() -> None:
            parts = [result for _, result in collect.encode(encoder, frames, frames, np.arange(60), texts, "drawer-open")]
            found["own"] = {text: np.concatenate([part[text, -2, "text"] for part in parts]) for text in texts}

        @torch.no_grad()
        def single() -> None:
            found["single"] = {text: [] for text in texts}
            for frame in frames:
                for text in texts:
                    content = [{"type": "image", "image": collect.Image.fromarray(frame)}, {"type": "text", "text": text}]
                    message = [{"role": "user", "content": content}]
                    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
                    inputs = processor.apply_chat_template(message, **how)
                    states = model(**inputs, output_hidden_states=True).hidden_states[-2][0]
                    found["single"][text].append(states[inputs["input_ids"][0] != encoder.image_id].mean(0).numpy())

        seconds = interleaved({"own": own, "single": single}, 4)
    for text in texts:
        assert np.allclose(found["own"][text], np.stack(found["single"][text]), atol=1e-4)
    return {"embedding": seconds["single"] / seconds["own"], "embedding_images_per_second": 60 / seconds["own"]}


def make_quick_data(root: Path, env: dict | None = None) -> None:
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
    meta = {"env": {"videos": "generated", "size": 64} | (env or {}), "tasks": ["drawer-open"], "episodes_per_task": 60, "shards": [shard]}
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


def measured(*command: str, cwd: str) -> tuple[float, float]:
    """(seconds, peak GiB) of one of the scripts; the peak is that of its largest process."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"benchmark.py: {' '.join(map(str, command))} failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 2**20


def rate(run: Path) -> float:
    """Updates a second of stage 1: median over the rows of its log, so that the pauses for probes do not count."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = np.array([row["update"] for row in rows])
    times = updates / [row["updates_per_second"] for row in rows]
    return float(1 / np.median(np.diff(times) / np.diff(updates)))


def big(gib: float) -> dict[str, float]:
    """Stage 1 with default arguments: `gib` GiB of data (frames, segments and embeddings as sparse files) against resident noise."""
    with tempfile.TemporaryDirectory() as folder:
        small, root = Path(folder, "data/small"), Path(folder, "data/big")
        make_quick_data(small)
        shard, meta = small / "drawer-open/shard_00000", json.loads((small / "meta.json").read_text())
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in [*shard.glob("*.npy"), *shard.glob("embeddings/*.npy")]}
        copies = round(gib * 2**30 / sum(array.nbytes for array in arrays.values()))
        for k in range(copies):
            to = root / f"drawer-open/shard_{k:05d}"
            (to / "embeddings").mkdir(parents=True)
            for name, array in arrays.items():
                path = to / ("embeddings" if name == "made_up" else ".") / f"{name}.npy"
                if name == "episode":
                    np.save(path, array + 60 * k)
                else:  # a header and a hole
                    np.lib.format.open_memmap(path, "w+", array.dtype, array.shape)
            (to / "embeddings/made_up.json").write_bytes((shard / "embeddings/made_up.json").read_bytes())
        facts = [meta["shards"][0] | {"shard": f"drawer-open/shard_{k:05d}"} for k in range(copies)]
        (root / "meta.json").write_text(json.dumps(meta | {"shards": facts, "episodes_per_task": 60 * copies}))
        flags = "lam_vlm.py --encoder made_up --stages lam --lam-updates 300 --log-every 10 --device cpu".split()
        result = {}
        for name, resident in (("small", "yes"), ("big", "no")):
            _, peak = measured(*flags, "--data", f"data/{name}", "--resident", resident, "--out", f"runs/{name}", cwd=folder)
            result |= {f"{name}_peak_gib": peak, f"{name}_updates_per_second": rate(Path(folder, "runs", name))}
        size = sum(path.stat().st_size for path in root.rglob("*.npy")) / 2**30
    return {"big_gib": size, "big_rate": result["big_updates_per_second"] / result["small_updates_per_second"]} | result


def cost() -> None:
    """Time and peak memory of collecting, embedding, stage 1 to 3 and evaluation over 1x, 4x and 16x the episodes; quick's flags."""
    import matplotlib.pyplot as plt

    rows, out = [], ROOT / "results/cost"
    with tempfile.TemporaryDirectory() as folder:
        for episodes in (10, 40, 160):
            data, run = f"data/{episodes}", f"runs/{episodes}"
            stages = {"collect": ["collect.py", "--episodes-per-task", str(episodes), "--encoder", "none", "--out", data]}
            stages["embed"] = ["collect.py", "--episodes-per-task", str(episodes), "--out", data]
            updates = f"--lam-updates {5 * episodes} --bc-updates {5 * episodes}"  # as many passes over the data at each size
            for done in ("lam", "lam bc", "lam bc decoder"):
                stages[done.split()[-1]] = f"lam_vlm.py --data {data} --out {run} {updates} --stages {done}".split()
            stages["evaluate"] = [
                "eval.py",
                "--runs",
                run,
                "--episodes",
                str(episodes // 2),
                "--media",
                "0",
                "--out",
                f"results/{episodes}",
            ]
            for stage, command in stages.items():
                seconds, peak = measured(*command, cwd=folder)
                rows.append({"episodes": episodes, "stage": stage, "seconds": round(seconds, 1), "peak_gib": round(peak, 3)})
                print(rows[-1], file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "cost.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted({row["episodes"] for row in rows})
    for axis, key, label in zip(axes, ("seconds", "peak_gib"), ("seconds", "peak memory, GiB")):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            axis.loglog(sizes, [row[key] for row in rows if row["stage"] == stage], "o-", label=stage, base=2)
        first = min(row[key] for row in rows)
        axis.loglog(sizes, [first * size / sizes[0] for size in sizes], "k:", label="linear", base=2)
        axis.set(xlabel="episodes collected", ylabel=label, xticks=sizes)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
    axes[1].legend(fontsize=8)
    figure.savefig(out / "cost.png", dpi=150)


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # the scripts' own lines
    if "--cost" in sys.argv[1:]:
        raise SystemExit(cost())
    if "--big" in sys.argv[1:]:
        ratios = big(float(sys.argv[-1]) if sys.argv[-1] != "--big" else 20)
    else:
        ratios = env_step() | stage1() | evaluation() | embedding() | bootstrap() | data_loading()
    sys.stdout = stdout
    if "--json" in sys.argv[1:]:
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in ratios.items()}))
    else:
        for name, value in ratios.items():
            print(f"{name:32} {value:10.3f}" if isinstance(value, float) else f"{name:32} {value:>10}")
