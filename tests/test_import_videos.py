"""Clips and LeRobot data sets, written with a counter drawn into each frame, and what comes in."""

import ast
import io
import itertools
import json
import re
import struct
import sys
from fractions import Fraction
from pathlib import Path

import as_videos
import av
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, digests, kill_when, refusal, run_script, start_script
from PIL import Image

import import_videos
from common.dataset import Dataset
from common.recordings import Episode, frame_times, read_frames
from common.shards import read_meta

FPS = 10
LENGTHS = (7, 12, 5, 9, 11)  # frames of the episodes
TASKS = ("open the drawer", "lift the cup", "open the drawer", "open the drawer", "lift the cup")
FOLDERS = {"open-the-drawer": [0, 2, 3], "lift-the-cup": [1, 4]}  # episodes by their task's folder
CAMERAS = ("observation.images.front", "observation.images.wrist")
HEIGHT, WIDTH = 48, 64
CELL = 12  # pixels; 4 x 2 cells in the central square show the bits of the counter
RED, BLUE = (200, 30, 30), (30, 30, 200)  # bars above and below


def numbers_of(episode: int) -> list[int]:
    """The counters of an episode's frames, which count over all episodes."""
    first = sum(LENGTHS[:episode])
    return list(range(first, first + LENGTHS[episode]))


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (height, width, 3)."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    image[:CELL] = RED
    image[-CELL:] = BLUE
    for bit in range(8):
        row, column = divmod(bit, 4)
        top, left = CELL * (1 + row), 8 + CELL * column
        image[top : top + CELL, left : left + CELL] = 20 + 210 * (number >> bit & 1)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))


def shown(frames: np.ndarray) -> list[int]:
    """The counters that frames (N, 48, 48, 3) show, upright, in RGB and near to what was drawn."""
    assert frames.shape[1:] == (HEIGHT, HEIGHT, 3) and frames.dtype == np.uint8
    found = np.zeros(len(frames), int)
    for bit in range(8):
        row, column = divmod(bit, 4)
        cell = frames[:, CELL * (1 + row) :, CELL * column :][:, 3:9, 3:9]
        found += (cell.mean((1, 2, 3)) > 128).astype(int) << bit
    drawn = np.stack([picture(number)[:, 8:56] for number in found])
    assert np.abs(frames.astype(int) - drawn).mean() < 8, "pixels within the error of the codec"
    return found.tolist()


def actions_of(episode: int) -> np.ndarray:
    """(N, 3): the counter, twice its negative, and what never moves."""
    numbers = np.array(numbers_of(episode), np.float32)
    return np.stack([numbers, -2 * numbers, np.full_like(numbers, 5)], axis=1)


def write_video(
    path: Path, pictures: list[np.ndarray], times=None, faststart: bool = False, **options
) -> None:
    """H.264 with B-frames. times: of the frames, in units of 0.01 s; None: FPS a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    movflags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=movflags) as video:
        stream = video.add_stream("libx264", rate=FPS)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.codec_context.time_base = Fraction(1, 100)
        stream.options = {"crf": "10", "preset": "fast", "forced-idr": "1"} | options
        for index, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.time_base = Fraction(1, 100)
            frame.pts = 100 // FPS * index if times is None else times[index]
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def write_clips(root: Path, actions: str = "npy", episodes: int = len(LENGTHS), repeat: int = 1) -> Path:
    """A folder of clips, with or without their actions."""
    for episode in range(episodes):
        path = root / f"clip_{episode}.mp4"
        write_video(path, [picture(number) for number in numbers_of(episode)] * repeat)
        table = np.tile(actions_of(episode), (repeat, 1))
        if actions == "npy":
            np.save(path.with_suffix(".npy"), table)
        if actions == "csv":
            rows = "\n".join(",".join(f"{value:g}" for value in row) for row in table)
            path.with_suffix(".csv").write_text(f'\ufeff"x", y,grip\n{rows}\n\n', encoding="utf-8")
    return root


def write_lerobot(root: Path, layout: str, stored: str = "video") -> Path:
    """A data set as lerobot's own writers lay it out; in v3.0 files hold several episodes.

    The wrist's frames show the counter + 100, so that a mix-up of the cameras shows.
    """
    rows = [table_rows(episode, stored) for episode in range(len(LENGTHS))]
    features = {"action": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "grip"]}}}
    for camera in CAMERAS:
        features[camera] = {"dtype": stored, "shape": [HEIGHT, WIDTH, 3]}
    info = {"codebase_version": layout, "fps": FPS, "chunks_size": 1000, "features": features}
    episodes = [{"episode_index": e, "length": LENGTHS[e]} for e in range(len(LENGTHS))]
    for episode in episodes:
        episode["tasks"] = ["lift the cup", "open the drawer"]  # not in order of time
    if layout == "v2.1":
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        for episode in range(len(LENGTHS)):
            place = {"episode_chunk": 0, "episode_index": episode}
            write_table(root / info["data_path"].format(**place), rows[episode])
            for camera in CAMERAS:
                path = root / info["video_path"].format(**place, video_key=camera)
                write_video(path, camera_pictures(camera, [episode]))
        (root / "meta").mkdir(parents=True)
        lines = [json.dumps(episode) for episode in episodes]
        (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
        tasks = [{"task_index": index, "task": task} for index, task in enumerate(dict.fromkeys(TASKS))]
        (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        for index, group in enumerate(([0, 1, 2], [3, 4])):
            path = root / info["data_path"].format(chunk_index=0, file_index=index)
            write_table(path, list(itertools.chain(*(rows[episode] for episode in group))))
            for episode in group:
                episodes[episode] |= {"data/chunk_index": 0, "data/file_index": index}
                episodes[episode] |= {
                    "stats/action/mean": [0.5],
                    "dataset_from_index": numbers_of(episode)[0],
                }
        for camera, groups in zip(CAMERAS, (([0, 1], [2, 3, 4]), ([0], [1, 2, 3], [4]))):
            for index, group in enumerate(groups):
                path = root / info["video_path"].format(video_key=camera, chunk_index=index, file_index=0)
                write_video(path, camera_pictures(camera, group), g="250" if camera == CAMERAS[0] else "2")
                start = 0
                for episode in group:
                    episodes[episode][f"videos/{camera}/chunk_index"] = index
                    episodes[episode][f"videos/{camera}/file_index"] = 0
                    episodes[episode][f"videos/{camera}/from_timestamp"] = start / FPS
                    start += LENGTHS[episode]
                    episodes[episode][f"videos/{camera}/to_timestamp"] = start / FPS
        write_table(root / "meta/episodes/chunk-000/file-000.parquet", episodes[3:])
        write_table(root / "meta/episodes/chunk-000/file-001.parquet", episodes[:3])
        tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(dict.fromkeys(TASKS))})
        pq.write_table(tasks, root / "meta/tasks.parquet")
    if stored == "image":
        info["video_path"] = None
    (root / "meta/info.json").write_text(json.dumps(info, indent=1))
    return root


def camera_pictures(camera: str, episodes: list[int]) -> list[np.ndarray]:
    numbers = itertools.chain(*map(numbers_of, episodes))
    return [picture(number + 100 * CAMERAS.index(camera)) for number in numbers]


def table_rows(episode: int, stored: str) -> list[dict]:
    """Of the last third of the rows the task is the other one: an episode's task is its first row's."""
    tasks = list(dict.fromkeys(TASKS))
    rows = []
    for step, (number, action) in enumerate(zip(numbers_of(episode), actions_of(episode))):
        task = tasks.index(TASKS[episode])
        if step > 2 / 3 * LENGTHS[episode]:
            task = 1 - task
        row = {"action": action.tolist(), "timestamp": np.float32(step / FPS), "frame_index": step}
        row |= {"episode_index": episode, "index": number, "task_index": task}
        for camera in CAMERAS:
            if stored == "image":
                png = io.BytesIO()
                Image.fromarray(picture(number + 100 * CAMERAS.index(camera))).save(png, "PNG")
                row[camera] = {"bytes": png.getvalue(), "path": f"frame_{step:06d}.png"}
        rows.append(row)
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if "action" in table.column_names:
        actions = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel([row["action"] for row in rows])), 3)
        table = table.set_column(
            table.column_names.index("action"), "action", actions.cast(pa.list_(pa.float32(), 3))
        )
        stamps = pa.array([row["timestamp"] for row in rows], pa.float32())
        table = table.set_column(table.column_names.index("timestamp"), "timestamp", stamps)
    pq.write_table(table, path)


def bring_in(source: Path, out: Path, *flags: object) -> tuple[dict, dict[int, dict[str, np.ndarray]]]:
    """Runs the import in this process: meta, and the arrays of each episode, in its own units."""
    words = map(str, (source, "--out", out, "--workers", 1, *flags))
    if "--size" not in flags:
        words = (*words, "--size", str(HEIGHT))
    import_videos.main(import_videos.parse_args(list(words)))
    return read_episodes(out)


def read_episodes(out: Path) -> tuple[dict, dict[int, dict[str, np.ndarray]]]:
    meta = read_meta(out)
    episodes = {}
    for shard in meta["shards"]:
        arrays = {name: np.load(out / shard["shard"] / f"{name}.npy") for name in meta["arrays"]}
        assert {len(array) for array in arrays.values()} == {shard["frames"]}
        if "actions" in arrays:
            assert arrays["actions"].dtype == np.float32
            low, high = np.array(meta["action"]["low"]), np.array(meta["action"]["high"])
            arrays["actions"] = low + (arrays["actions"] + 1) / 2 * (high - low)
        for index in dict.fromkeys(arrays["episode_index"].tolist()):
            rows = arrays["episode_index"] == index
            assert index not in episodes, "the frames of an episode stand together"
            episodes[index] = {name: array[rows] for name, array in arrays.items()} | {"task": shard["task"]}
    for task in meta["tasks"]:
        of_task = [episode for episode in episodes.values() if episode["task"] == task]
        assert [set(episode["episode"]) for episode in of_task] == [{k} for k in range(len(of_task))]
        assert meta["episodes"][task] == len(of_task)
    return meta, episodes


def check_all(meta: dict, episodes: dict, camera: int = 0) -> None:
    """Every frame of every episode once, in order, with its own action."""
    assert sorted(episodes) == list(range(len(LENGTHS)))
    for index, episode in episodes.items():
        numbers = [number + 100 * camera for number in numbers_of(index)]
        assert shown(episode["frames"]) == numbers
        assert episode["step"].tolist() == list(range(LENGTHS[index]))
        assert np.allclose(episode["actions"], actions_of(index), atol=1e-4)


# ---------------------------------------------------------------------------------------- a folder of clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "open_the_drawer")


def test_clips_with_npy(clips, tmp_path):
    meta, episodes = bring_in(clips, tmp_path / "data", "--object", "drawer", "--shard-episodes", 2)
    check_all(meta, episodes)
    assert meta["tasks"] == ["open-the-drawer"] and meta["episodes"] == {"open-the-drawer": 5}
    assert meta["instructions"] == {"open-the-drawer": "open the drawer"}
    assert meta["objects"] == {"open-the-drawer": "drawer"} and meta["env"] is None
    assert (meta["size"], meta["fps"], meta["probe_fraction"]) == (HEIGHT, FPS, 0.2)
    assert meta["action"]["names"] == ["action_0", "action_1", "action_2"]
    assert [shard["episodes"] for shard in meta["shards"]] == [2, 2, 1]


def test_actions_are_scaled_by_the_episodes_that_are_trained_on(clips, tmp_path):
    meta, _ = bring_in(clips, tmp_path / "data", "--probe-fraction", 0.4)
    data = Dataset(str(tmp_path / "data"), probe_fraction=meta["probe_fraction"])
    trained = data.columns["actions"].whole()[data.episode < data.n_train[0]]
    assert data.n_train == [3] and data.action_dim == 3
    assert np.allclose(trained[:, :2].min(0), -1) and np.allclose(trained[:, :2].max(0), 1)
    assert (meta["action"]["low"], meta["action"]["high"]) == ([0, -46, 5], [23, 0, 5])
    assert np.isfinite(data.columns["actions"].whole()).all(), "also of what never moves"
    assert data.columns["actions"].whole().max() > 1, "held-out actions are not clipped"


def test_clips_with_csv(tmp_path):
    meta, episodes = bring_in(write_clips(tmp_path / "clips", "csv"), tmp_path / "data")
    check_all(meta, episodes)
    assert meta["action"]["names"] == ["x", "y", "grip"]
    for path in (tmp_path / "clips").glob("*.csv"):
        path.rename(path.with_suffix(".CSV"))
    again, _ = bring_in(tmp_path / "clips", tmp_path / "again")
    assert again["shards"] == meta["shards"]


def test_other_actions_are_another_data_set(tmp_path):
    """Also within the same range: a row late, say."""
    source = write_clips(tmp_path / "clips", episodes=3)
    flags = ("import_videos.py", source, "--size", 32, "--out", "data")
    first = run_script(*flags, cwd=tmp_path)
    assert "3 episodes of clips; actions action_0, action_1, action_2; " in first.stdout, first.stderr
    path = source / "clip_1.npy"
    np.save(path, np.roll(np.load(path), 1, axis=0))
    before = digests(tmp_path / "data")
    assert "source_rows" in refusal(run_script(*flags, cwd=tmp_path)) and digests(tmp_path / "data") == before
    for path in source.glob("*.npy"):
        path.unlink()
    assert "3 episodes of clips; no actions; " in run_script(*flags[:-1], "videos", cwd=tmp_path).stdout


SMALL = "--target pixels --lam-updates 2 --bc-updates 2 --decoder-updates 2 --batch-size 4".split()


def test_clips_of_which_some_have_actions(tmp_path):
    """Many videos, few of them labelled: all are trained on, and the others' actions are missed nowhere."""
    source = write_clips(tmp_path / "clips", repeat=2)
    for episode in (0, 3):
        (source / f"clip_{episode}.npy").unlink()
    made = run_script("import_videos.py", source, "--size", 32, "--out", "data", cwd=tmp_path)
    assert "actions action_0, action_1, action_2 of 3 alone; " in made.stdout, made.stderr
    data = Dataset(str(tmp_path / "data"))
    assert data.meta["action"]["low"] == actions_of(1).min(0).tolist()[:1] + actions_of(2).min(0).tolist()[1:]
    assert set(data.episode[data.train]) == {0, 1, 2, 3}
    assert set(data.episode[data.labelled("all")]) == set(data.episode[data.labelled("2")]) == {1, 2}
    with pytest.raises(SystemExit, match="from 1 to 2 .*with actions"):
        data.labelled("3")
    run = ("lam_vlm.py", "--data", "data", *SMALL, "--labelled-episodes", 2, "--out", "runs/mine")
    made = run_script(*run, cwd=tmp_path)
    assert made.returncode == 0 and "2 of those to train on have actions" in made.stdout, made.stderr
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    for value in (summary["action_probe_nmse"], summary["policy_nmse"]["2"]):
        assert np.isfinite(value)
    assert run_script("eval.py", "--out", "results", cwd=tmp_path).returncode == 0
    assert "nan" not in (tmp_path / "results/errors.csv").read_text().lower()
    assert run_script("linear_lam.py", "--data", "data", "--out", "ranks", cwd=tmp_path).returncode == 0


def test_held_out_clips_without_actions(tmp_path):
    source = write_clips(tmp_path / "clips", repeat=2)
    (source / "clip_4.npy").unlink()
    made = run_script("import_videos.py", source, "--size", 32, "--out", "data", cwd=tmp_path)
    assert "clips: no held-out episode has actions" in made.stdout, made.stderr
    run = ("lam_vlm.py", "--data", "data", *SMALL, "--labelled-episodes", 2, "--out", "runs/mine")
    assert run_script(*run, cwd=tmp_path).returncode == 0
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert summary["action_probe_nmse"] is None and summary["policy_nmse"] == {"2": None}
    assert run_script("eval.py", "--out", "results", cwd=tmp_path).returncode == 0


def test_linked_folders_are_followed_and_hidden_ones_are_not(clips, tmp_path):
    root = tmp_path / "clips"
    (root / "lift_the_cup").mkdir(parents=True)
    (root / "lift_the_cup/0.mp4").write_bytes((clips / "clip_1.mp4").read_bytes())
    (root / "lift_the_cup/all").symlink_to(root)  # back to where it came from
    (root / "push").symlink_to(clips)
    (root / ".trash").mkdir()
    (root / ".trash/1.mp4").write_bytes(b"hello")
    meta, episodes = bring_in(root, tmp_path / "data")
    assert meta["episodes"] == {"lift-the-cup": 1, "push": len(LENGTHS)} and len(episodes) == 6


def test_another_share_of_held_out_episodes_is_refused(clips, tmp_path):
    bring_in(clips, tmp_path / "data", "--probe-fraction", 0.4)
    with pytest.raises(SystemExit, match="add --probe-fraction 0.4"):
        Dataset(str(tmp_path / "data"))


def test_an_imported_task_may_be_named_like_one_of_metaworld(clips, tmp_path):
    for name in ("pick", "pick-v3"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for episode in range(2):
            path = tmp_path / "clips" / name / f"{episode}.mp4"
            path.write_bytes((clips / f"clip_{episode}.mp4").read_bytes())
    bring_in(tmp_path / "clips", tmp_path / "data")
    assert Dataset(str(tmp_path / "data"), ("pick-v3",)).tasks == ("pick-v3",)


def test_clips_without_actions_in_a_folder_for_each_task(clips, tmp_path):
    for episode, task in enumerate(TASKS):
        folder = tmp_path / "clips" / task.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{episode}.mp4").write_bytes((clips / f"clip_{episode}.mp4").read_bytes())
    (tmp_path / "clips" / "._0.mp4").write_text("what macOS leaves behind")
    meta, episodes = bring_in(tmp_path / "clips", tmp_path / "data")
    assert meta["tasks"] == ["lift-the-cup", "open-the-drawer"] and meta["action"] is None
    assert meta["objects"] == meta["instructions"] == {name: name.replace("-", " ") for name in meta["tasks"]}
    assert "actions" not in meta["arrays"]
    order = FOLDERS["lift-the-cup"] + FOLDERS["open-the-drawer"]  # by their paths
    assert [shown(episodes[rank]["frames"]) for rank in range(5)] == [numbers_of(e) for e in order]


def test_range_of_episodes_keeps_the_sources_numbers(clips, tmp_path):
    _, episodes = bring_in(clips, tmp_path / "data", "--episodes", 1, 4)
    assert {index: shown(episode["frames"]) for index, episode in episodes.items()} == {
        index: numbers_of(index) for index in (1, 2, 3)
    }


def test_crop_and_pad(tmp_path):
    """A wide picture: left third red, middle green, right blue; and the same standing upright."""
    image = np.zeros((60, 180, 3), np.uint8)
    for third in range(3):
        image[:, 60 * third : 60 * third + 60, third] = 220
    for name, source in {"wide": image, "tall": image.transpose(1, 0, 2)}.items():
        write_video(tmp_path / name / "a.mp4", [source, source])
    frames = {}
    for name, how in itertools.product(("wide", "tall"), ("crop", "pad")):
        out = tmp_path / name / how
        _, episodes = bring_in(tmp_path / name, out, "--square", how, "--size", 30)
        frames[name, how] = episodes[0]["frames"][0].astype(int)
    assert np.abs(frames["wide", "crop"][3:-3, 3:-3] - (0, 220, 0)).max() < 30
    padded = frames["wide", "pad"]
    assert padded[:9].max() < 30 and padded[-9:].max() < 30, "black above and below"
    for third in range(3):
        assert np.abs(padded[12:18, 10 * third + 2 : 10 * third + 8] - np.eye(3)[third] * 220).max() < 40
    for how in ("crop", "pad"):
        assert np.abs(frames["tall", how] - frames["wide", how].transpose(1, 0, 2)).mean() < 5


def test_fewer_frames_by_time(clips, tmp_path):
    """Those nearest to 0, 1/4, 2/4 ... seconds; of two as near the later. Their actions go with them."""
    meta, episodes = bring_in(clips, tmp_path / "data", "--fps", 4)
    assert meta["fps"] == 4
    for index, episode in episodes.items():
        kept = [step for step in (0, 3, 5, 8, 10) if step < LENGTHS[index]]
        assert episode["step"].tolist() == kept
        assert shown(episode["frames"]) == [numbers_of(index)[step] for step in kept]
        assert np.allclose(episode["actions"], actions_of(index)[kept], atol=1e-4)


def test_frames_at_varying_times(tmp_path):
    times = [0, 4, 9, 22, 30, 31, 55, 61, 79]
    write_video(tmp_path / "clips/a.mp4", [picture(number) for number in range(9)], times)
    np.save(tmp_path / "clips/a.npy", np.arange(9))
    _, episodes = bring_in(tmp_path / "clips", tmp_path / "all")
    assert shown(episodes[0]["frames"]) == list(range(9))
    _, episodes = bring_in(tmp_path / "clips", tmp_path / "five", "--fps", 5)
    assert shown(episodes[0]["frames"]) == [0, 3, 5, 7], (
        "nearest to 0, .2, .4 and .6 s: of .31 and .55 the one"
    )
    assert np.allclose(episodes[0]["actions"][:, 0], [0, 3, 5, 7])


def test_a_clip_that_was_filmed_with_a_turned_phone(tmp_path):
    """The film stands on its head or lies on its side, and the file says so."""
    write_video(tmp_path / "clips/a.mp4", [picture(number)[::-1, ::-1] for number in range(5)])
    data = bytearray((tmp_path / "clips/a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", -65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30)
    (tmp_path / "clips/a.mp4").write_bytes(data)
    _, episodes = bring_in(tmp_path / "clips", tmp_path / "half")
    assert shown(episodes[0]["frames"]) == list(range(5))

    for number, turned in enumerate((np.rot90(picture(7), 1), np.rot90(picture(7), -1))):
        folder = tmp_path / f"quarter_{number}"
        write_video(folder / "a.mp4", [turned, turned])
        data = bytearray((folder / "a.mp4").read_bytes())
        matrix = data.index(b"tkhd") + 44
        quarter = 65536 * (1 - 2 * number)  # clockwise first
        data[matrix : matrix + 36] = struct.pack(">9i", 0, quarter, 0, -quarter, 0, 0, 0, 0, 1 << 30)
        (folder / "a.mp4").write_bytes(data)
        _, episodes = bring_in(folder, tmp_path / f"data_{number}")
        assert shown(episodes[0]["frames"]) == [7, 7]


def test_a_clip_that_was_cut_without_encoding_it_anew(tmp_path):
    """Its first frames are there for the decoder alone."""
    write_video(tmp_path / "whole.mp4", [picture(number) for number in range(20)])
    (tmp_path / "clips").mkdir()
    with av.open(str(tmp_path / "whole.mp4")) as whole:
        stream = whole.streams.video[0]
        options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
        with av.open(str(tmp_path / "clips/cut.mp4"), "w", options=options) as cut:
            copy = cut.add_stream_from_template(stream)
            for packet in whole.demux(stream):
                if packet.dts is not None:
                    packet.pts -= round(0.8 / stream.time_base)
                    packet.dts -= round(0.8 / stream.time_base)
                    packet.stream = copy
                    cut.mux(packet)
    np.save(tmp_path / "clips/cut.npy", np.arange(12))
    _, episodes = bring_in(tmp_path / "clips", tmp_path / "data")
    assert shown(episodes[0]["frames"]) == list(range(8, 20))


# ---------------------------------------------------------------------------------------- LeRobot


@pytest.fixture(scope="module", params=["v2.1 video", "v3.0 video", "v2.1 image", "v3.0 image"])
def lerobot(request, tmp_path_factory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("set") / "mine", *request.param.split())


@pytest.mark.parametrize("camera", ["", "wrist", "observation.images.wrist"])
def test_lerobot(lerobot, camera, tmp_path):
    flags = ("--camera", camera) if camera else ()
    meta, episodes = bring_in(lerobot, tmp_path / "data", *flags)
    check_all(meta, episodes, camera=int("wrist" in camera))
    assert meta["camera"] == CAMERAS["wrist" in camera] and meta["fps"] == FPS
    assert meta["action"]["names"] == ["x", "y", "grip"]
    assert meta["instructions"] == {"open-the-drawer": "open the drawer", "lift-the-cup": "lift the cup"}
    for index, episode in episodes.items():
        assert meta["instructions"][episode["task"]] == TASKS[index]


def test_latents_join_the_data_set_as_the_page_says(lerobot, tmp_path, monkeypatch):
    """docs/own_videos.md: import, a run, export, its five lines of pandas, and the policy in its loop."""
    monkeypatch.chdir(tmp_path)
    Path("lerobot_folder").symlink_to(lerobot)
    assert run_script("import_videos.py", "lerobot_folder", "--size", 32, cwd=tmp_path).returncode == 0
    page = (ROOT / "docs/own_videos.md").read_text()
    lines, loop = re.findall("```python\n(.*?)```", page, re.DOTALL)
    run = Path(re.search('"(runs/.*?)/latents', lines)[1])
    small = "--target pixels --lam-updates 2 --bc-updates 2 --decoder-updates 2 --batch-size 4 --frame-gap 2"
    made = run_script(
        "lam_vlm.py",
        *("--data", "data/mine", "--labelled-episodes", 1, *small.split(), "--export", "--out", run),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr

    here = {}
    exec(lines, here)
    rows, joined = here["rows"], here["joined"]
    assert joined[["episode_index", "frame_index"]].equals(rows[["episode_index", "frame_index"]])
    assert len(joined) == sum(LENGTHS)
    for episode, table in joined.groupby("episode_index"):
        without = table["latent_action"].isna().to_numpy()
        assert without.tolist() == [False] * (LENGTHS[episode] - 2) + [True] * 2
    assert {len(z) for z in joined["latent_action"].dropna()} == {16}

    exec(loop, here)
    action = here["act"](np.zeros((32, 32, 3), np.uint8))
    low, high = here["low"], here["high"]
    assert action.shape == low.shape == (3,) and np.all((low <= action) & (action <= high))
    said = here["policy"](np.zeros((32, 32, 3), np.uint8))
    assert np.allclose(action, low + (said + 1) / 2 * (high - low)) and (high > low + 1).any()


def test_collected_episodes_come_back_as_clips(tiny_data, tmp_path):
    as_videos.main(tiny_data, tmp_path / "my_videos")
    meta, _ = bring_in(tmp_path / "my_videos", tmp_path / "data", "--size", 32)
    assert meta["tasks"] == ["drawer-open"] and meta["fps"] == read_meta(tiny_data)["fps"]
    native, ours = Dataset(str(tiny_data)), Dataset(str(tmp_path / "data"))
    assert np.array_equal(ours.episode, native.episode)
    low, high = (np.array(meta["action"][bound]) for bound in ("low", "high"))
    actions = (ours.columns["actions"].whole() + 1) / 2 * np.where(high > low, high - low, 1) + low
    assert np.allclose(actions, native.columns["actions"].whole(), atol=1e-5)
    frames, drawn = ours.columns["frames"].whole().astype(int), native.columns["frames"].whole()
    assert np.abs(frames - drawn).mean() < 8, (
        "within the error of a codec that halves the colours' resolution"
    )
    assert np.abs((frames - drawn).mean((0, 1, 2))).max() < 2, "no colour is shifted"
    errors = [np.abs(frames - np.roll(drawn, by, axis=0)).mean((1, 2, 3)) for by in (0, -1, 1)]
    assert (np.argmin(errors, axis=0) == 0).mean() > 0.95, "each at its place, and not a step beside it"


def test_lerobot_at_another_rate(lerobot, tmp_path):
    _, episodes = bring_in(lerobot, tmp_path / "data", "--fps", 5, "--episodes", 1, 3, "--camera", "wrist")
    assert sorted(episodes) == [1, 2]
    for index, episode in episodes.items():
        assert shown(episode["frames"]) == [number + 100 for number in numbers_of(index)[::2]]
        assert episode["step"].tolist() == list(range(0, LENGTHS[index], 2)), "the keys of the source stay"
        assert np.allclose(episode["actions"], actions_of(index)[::2], atol=1e-4)


def test_lerobot_from_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub: of the videos those of the camera alone."""
    source = write_lerobot(tmp_path / "source", "v3.0")
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    meta, episodes = bring_in("user/name", tmp_path / "data", "--camera", "wrist")
    check_all(meta, episodes, camera=1)
    assert asked["name"] == meta["source"] == "user/name" and asked["repo_type"] == "dataset"
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    matching = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert matching == {file for file in files if "front" not in file}


def test_names_of_tasks_that_are_alike(tmp_path):
    episodes = [
        import_videos.Episode(0, text, *[None] * 8) for text in ("Open it!", "open it", "抓住杯子", "")
    ]
    tasks, texts = import_videos.group_by_task(episodes)
    assert texts == {"open-it": "Open it!", "open-it-2": "open it", "task": "抓住杯子", "task-2": ""}
    assert list(tasks) == list(texts)


# ---------------------------------------------------------------------------------------- runs


def test_workers_and_kills_change_nothing(tmp_path):
    source = write_clips(tmp_path / "clips", episodes=3, repeat=100)
    flags = (source, "--size", 32, "--shard-episodes", 1)
    one = run_script("import_videos.py", *flags, "--workers", 1, "--out", "one", cwd=tmp_path)
    assert one.returncode == 0 and "3 episodes" in one.stdout and "frames/s" in one.stdout, one.stderr
    expected = digests(tmp_path / "one")

    process = start_script("import_videos.py", *flags, "--workers", 1, "--out", "two", cwd=tmp_path)
    kill_when(process, lambda: len(list((tmp_path / "two").glob("*/shard_*"))) == 1)
    assert "shards" not in read_meta(tmp_path / "two") and digests(tmp_path / "two") != expected
    (tmp_path / "two/clips/.tmp_shard_00002").mkdir(exist_ok=True)
    (tmp_path / "two/clips/.tmp_shard_00002/frames.npy").write_text("half a shard")
    first = (tmp_path / "two/clips/shard_00000/frames.npy").stat().st_mtime_ns
    two = run_script("import_videos.py", *flags, "--workers", 2, "--out", "two", cwd=tmp_path)
    assert two.returncode == 0 and digests(tmp_path / "two") == expected, two.stderr
    assert (tmp_path / "two/clips/shard_00000/frames.npy").stat().st_mtime_ns == first, "not made again"

    other = run_script(
        "import_videos.py", source, "--size", 48, "--shard-episodes", 1, "--out", "two", cwd=tmp_path
    )
    assert "size: 32 there, 48 here" in refusal(other) and digests(tmp_path / "two") == expected
    (tmp_path / "two/clips/shard_00001/step.npy").write_bytes(b"damaged")
    assert "shard_00001" in refusal(run_script("import_videos.py", *flags, "--out", "two", cwd=tmp_path))


def test_every_flag_has_help(capsys):
    tree = ast.parse(Path(import_videos.__file__).read_text())
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    with pytest.raises(SystemExit):
        import_videos.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(import_videos.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        name = flag.target.id.replace("_", "-")
        assert (f"--{name}" in text or name == "path") and doc.value.value in text


# ---------------------------------------------------------------------------------------- bad input


def truncated(folder: Path) -> None:
    write_video(folder / "clip_1.mp4", [picture(number) for number in range(40)], faststart=True)
    data = (folder / "clip_1.mp4").read_bytes()
    (folder / "clip_1.mp4").write_bytes(data[: len(data) * 2 // 3])


def another_size(folder: Path) -> None:
    write_video(folder / "clip_1.mp4", [picture(number, 48, 48) for number in numbers_of(1)])


def size_within(folder: Path) -> None:
    """Two streams of other sizes, one after the other in the same file."""
    with av.open(str(folder / "clip_1.mkv"), "w") as video:
        stream = video.add_stream("mjpeg", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for number in range(12):
            jpeg = io.BytesIO()
            side = 64 if number < 6 else 32
            Image.fromarray(picture(number, side * 3 // 4, side)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.pts = packet.dts = number
            video.mux(packet)
    (folder / "clip_1.mp4").unlink()


def save(name: str, array: np.ndarray):
    return lambda folder: np.save(folder / name, array)


def nan_in(row: int) -> np.ndarray:
    actions = actions_of(1)
    actions[row, 1] = np.nan
    return actions


def cut_mkv(folder: Path) -> None:
    """Matroska says how long the film is, not how many frames it has."""
    (folder / "clip_1.mp4").unlink()
    write_video(folder / "clip_1.mkv", [picture(number % 90) for number in range(100)], g="10")
    data = (folder / "clip_1.mkv").read_bytes()
    (folder / "clip_1.mkv").write_bytes(data[: len(data) // 2])


def test_frames_that_a_decoder_leaves_out_are_missed(clips):
    """What the packets say of the times is not what the decoder gives: here every frame is one early."""
    file = clips / "clip_1.mp4"
    times, _ = frame_times(file)
    episode = Episode(1, "", file, "", 0.0, FPS, times + 1 / FPS, np.arange(len(times)), None, [])
    with pytest.raises(SystemExit, match="does not decode: the frame of 0.100 s is of 0.000 s"):
        read_frames(episode, HEIGHT, "crop")


def latin_csv(folder: Path) -> None:
    (folder / "clip_1.npy").unlink()
    (folder / "clip_1.csv").write_bytes("größe,y,z\n".encode("latin-1") + b"1,2,3\n" * LENGTHS[1])


BAD_CLIPS = {
    "no video": (lambda folder: [path.unlink() for path in folder.glob("*.mp4")], "no video"),
    "no film in it": (lambda folder: (folder / "clip_1.mp4").write_bytes(b"hello" * 500), "clip_1.mp4"),
    "empty file": (lambda folder: (folder / "clip_1.mp4").write_bytes(b""), "clip_1.mp4"),
    "ends early": (truncated, "clip_1.mp4 ends early"),
    "another size": (another_size, "clip_1.mp4"),
    "size within": (size_within, "size of its frames varies, 32 x 24, 64 x 48"),
    "rate": (lambda f: write_video(f / "clip_1.mp4", [picture(0)] * 12, [5 * k for k in range(12)]), "--fps"),
    "one frame": (lambda folder: write_video(folder / "clip_1.mp4", [picture(0)]), "1 frame"),
    "a row less": (save("clip_1.npy", actions_of(1)[1:]), "12 frames but 11 rows"),
    "not finite": (save("clip_1.npy", nan_in(3)), "clip_1.mp4): its actions are not finite"),
    "width": (save("clip_1.npy", actions_of(1)[:, :2]), "['action_0', 'action_1']"),
    "objects": (save("clip_1.npy", np.array([{}] * 12)), "clip_1.npy"),
    "words": (save("clip_1.npy", np.array(["left"] * 12)), "no table of numbers"),
    "none to train on": (
        lambda folder: (folder / "clip_0.npy").unlink(),
        "only held-out episodes have actions",
    ),
    "empty npy": (lambda folder: (folder / "clip_1.npy").write_bytes(b""), "clip_1.npy"),
    "no table": (save("clip_1.npy", np.array(3.0)), "no table of numbers"),
    "cut mkv": (cut_mkv, "clip_1.mkv ends early: its frames last"),
    "not UTF-8": (latin_csv, "clip_1.csv does not read as UTF-8"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips(case, tmp_path, monkeypatch):
    make, words = BAD_CLIPS[case]
    write_clips(tmp_path / "clips", episodes=2)
    make(tmp_path / "clips")
    assert words in refused(monkeypatch, tmp_path / "clips", tmp_path / "data")


def change_info(root: Path, **changes: object) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | changes))


def shorten(root: Path) -> None:
    path = root / "videos/observation.images.front/chunk-001/file-000.mp4"
    write_video(path, camera_pictures(CAMERAS[0], [2, 3, 4])[:-1])


def other_picture(root: Path) -> None:
    rows = table_rows(1, "image")
    png = io.BytesIO()
    Image.fromarray(picture(3, 24, 32)).save(png, "PNG")
    rows[4][CAMERAS[0]]["bytes"] = png.getvalue()
    write_table(root / "data/chunk-000/episode_000001.parquet", rows)


FRONT = "videos/observation.images.front/chunk-001/file-000.mp4"
DATA = "data/chunk-000/file-001.parquet"
BAD_SETS = {
    "layout": ("v3.0", lambda root: change_info(root, codebase_version="v1.6"), "v2.1 and v3.0"),
    "no json": ("v3.0", lambda root: (root / "meta/info.json").write_text("{"), "info.json"),
    "video is missing": ("v3.0", lambda root: (root / FRONT).unlink(), FRONT),
    "data are missing": ("v3.0", lambda root: (root / DATA).unlink(), DATA),
    "data are damaged": ("v3.0", lambda root: (root / DATA).write_bytes(b"PAR1"), DATA),
    "tasks are missing": ("v2.1", lambda root: (root / "meta/tasks.jsonl").unlink(), "tasks.jsonl"),
    "episodes are missing": ("v2.1", lambda root: (root / "meta/episodes.jsonl").unlink(), "episodes.jsonl"),
    "a row less": (
        "v2.1",
        lambda root: write_table(root / "data/chunk-000/episode_000001.parquet", table_rows(1, "video")[1:]),
        "11 rows of episode 1; the metadata say 12",
    ),
    "video ends early": ("v3.0", shorten, "10 of 11 frames"),
    "video does not decode": ("v3.0", lambda root: (root / FRONT).write_bytes(b"hello" * 500), FRONT),
    "picture of another size": ("v2.1 image", other_picture, "32 x 24, 64 x 48"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_bad_lerobot_sets(case, tmp_path, monkeypatch):
    layout, make, words = BAD_SETS[case]
    write_lerobot(tmp_path / "set", *layout.split())
    make(tmp_path / "set")
    assert words in refused(monkeypatch, tmp_path / "set", tmp_path / "data")


def refused(monkeypatch, source: Path, out: Path) -> str:
    """The one line; no finished data set is left, nor a whole shard of what was refused."""
    monkeypatch.setattr(sys, "argv", ["import_videos.py"])
    with pytest.raises(SystemExit) as error:
        bring_in(source, out)
    message = error.value.code
    assert message.startswith("import_videos.py: ") and "\n" not in message, message
    assert not (out / "meta.json").exists() or "shards" not in json.loads((out / "meta.json").read_text())
    return message


BAD_FLAGS = {
    "unknown camera": ("--camera side", "observation.images.front, observation.images.wrist"),
    "no such episodes": ("--episodes 7 9", "7 to 9"),
    "more frames than there are": ("--fps 30", "--fps 30"),
    "size": ("--size 0", "--size"),
    "fraction": ("--probe-fraction 1", "--probe-fraction"),
}


def test_bad_flags(tmp_path, monkeypatch):
    write_lerobot(tmp_path / "set", "v3.0")
    monkeypatch.setattr(sys, "argv", ["import_videos.py"])
    for flags, words in BAD_FLAGS.values():
        with pytest.raises(SystemExit, match=words):
            bring_in(tmp_path / "set", tmp_path / "data", *flags.split())
    assert not (tmp_path / "data").exists()


def test_a_name_that_is_no_folder_without_a_network(tmp_path):
    for name in ("user/name", "no_such_folder", "no such/folder/at/all"):
        line = refusal(run_script("import_videos.py", name, "--out", "data", cwd=tmp_path))
        assert name in line
    assert not (tmp_path / "data").exists()


def test_a_folder_that_another_process_writes(clips, tmp_path):
    lock = import_videos.shards.lock_folder(tmp_path / "data")
    assert "another process" in refusal(run_script("import_videos.py", clips, "--out", "data", cwd=tmp_path))
    assert lock


# ------------------------------------------------------------ what a slip of one line would change


def test_actions_of_all_tasks_have_one_scale(tmp_path):
    for task, first in (("lift", 0), ("pour", 100)):
        for clip in range(2):  # of which the second is held out
            path = tmp_path / "clips" / task / f"{clip}.mp4"
            write_video(path, [picture(number) for number in range(4)])
            np.save(path.with_suffix(".npy"), first + 1000 * clip + np.arange(4))
    meta, _ = bring_in(tmp_path / "clips", tmp_path / "data")
    assert (meta["action"]["low"], meta["action"]["high"]) == ([0], [103])
