"""Files of embeddings: what they hold, what is refused, disturbances, blanking; a tiny VLM end to end."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refusal, run_script
from tiny_models import tiny_model
from tqdm import tqdm

import collect
from common import encoders, pretrained
from common.dataset import Column
from common.disturb import change_std, frame_noise, round_to_bfloat16, tremble_of
from common.encoders import embed_frames, embed_shard, embedding_key, make_encoder
from common.oracle import blanked, named_segments, prompt_text
from common.shards import SEGMENTS

TASK = "drawer-open"


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Two shards of 20 frames of 32 px, four episodes of ten; what the encoders read of them."""
    rng, folders = np.random.default_rng(0), []
    for number in range(2):
        folder = tmp_path / TASK / f"shard_{number:05d}"
        folder.mkdir(parents=True)
        drift = np.cumsum(rng.integers(-9, 10, (20, 32, 32, 3)), axis=0)
        arrays = {
            "frames": np.clip(128 + drift, 0, 255).astype(np.uint8),
            "segments": rng.integers(0, len(SEGMENTS), (20, 32, 32), dtype=np.uint8),
            "episode": (2 * number + np.arange(20) // 10).astype(np.int32),
            "step": (np.arange(20) % 10).astype(np.int16),
        }
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        sha = hashlib.sha256((folder / "frames.npy").read_bytes()).hexdigest()
        (folder / "shard.json").write_text(json.dumps({"sha256": {"frames": sha}}))
        folders.append(folder)
    return folders


def embed(shard: Path, name: object, prompts: tuple[str, ...] = ("best",), **flags: object) -> list[Path]:
    """Embeds one shard; the .json files of what was asked for."""
    encoder = make_encoder(str(name), trust_remote_code=True, **flags)
    texts = {prompt: prompt_text(prompt, "drawer") for prompt in prompts}
    keys = embed_shard(encoder, shard, json.loads((shard / "shard.json").read_text()), TASK, texts)
    return [shard / "embeddings" / f"{key}.json" for key in keys]


def array_of(path: Path) -> np.ndarray:
    return np.load(path.with_suffix(".npy"))


def load(shard: Path, name: str) -> np.ndarray:
    return np.load(shard / f"{name}.npy")


# ------------------------------------------------------------------------------------ what a file holds


def test_the_object_is_that_of_the_task(shards):
    """A prompt's "handle" is the drawer's in one task, nothing in another."""
    encoder = make_encoder("oracle")
    found = [embed_frames(encoder, shards[0], task, ["Focus on the drawer."]) for task in (TASK, "reach")]
    assert not np.array_equal(*(embeddings["Focus on the drawer.", 0, "all"] for embeddings in found))


def test_numbers_that_are_not_finite_are_not_kept(shards):
    with pytest.raises(SystemExit, match="not finite"):
        embed(shards[0], "oracle", noise_std=float("inf"))


@pytest.mark.parametrize("name", ["oracle", "llava", "molmo", "dinov2", "otter", "random"])
def test_embeddings_are_those_of_the_frames(name, shards):
    source = {"otter": f"otter:{tiny_model('clip')}", "oracle": "oracle", "random": "random"}
    source = source.get(name) or tiny_model(name)
    flags = {"pools": ("text", "last")} if name == "llava" else {}
    paths = embed(shards[0], source, ("best", "Look!"), **flags)
    assert len(paths) == {"llava": 4, "dinov2": 1, "random": 1}.get(name, 2)
    assert set(shards[0].glob("embeddings/*")) == {*paths, *(path.with_suffix(".npy") for path in paths)}
    encoder = make_encoder(str(source), trust_remote_code=True, **flags)
    encoder.fit_size(32)
    frames, segments = load(shards[0], "frames"), load(shards[0], "segments")
    for path in paths:
        record, cached = json.loads(path.read_text()), array_of(path)
        text = "" if name in ("dinov2", "random") else prompt_text(record["prompt"], "drawer")
        prepared = encoder.prepare(frames[5:8], segments[5:8], [text], "drawer")
        expected = encoder.embed(prepared)[text, record["layer"], record["pool"]]
        assert len(cached) == len(frames) and np.allclose(cached[5:8], expected, rtol=2e-3, atol=2e-3)
        assert cached.dtype == record["dtype"] == "float16" and cached.shape[1] == record["dim"]
        known = {"family", "encoder", "id", "revision", "prompt", "text", "layer", "pool", "background_kept",
                 "temperature", "encoder_size", "split_tiles", "blank", "noise_std", "tremble", "bfloat16",
                 "frames_sha256", "arithmetic", "dtype", "dim", "sha256"}  # fmt: skip
        if name != "oracle":
            known.add("processor")
        assert set(record) == known and record["text"] == text and record["encoder_size"] == 32
        assert record["family"] == {"llava": "native_vlm", "dinov2": "vision"}.get(name, name)
        assert record["temperature"] == (0.07 if name == "otter" else None)
        assert "/" not in record["id"], "where a local model lies is nobody's business"
        assert record["sha256"] == hashlib.sha256(path.with_suffix(".npy").read_bytes()).hexdigest()
        start = {"otter": "otter-clip"}.get(name, name) + ("_noprompt_" if not encoder.promptable else "_")
        end = f"_L{record['layer']}_{record['pool']}_r{encoder.revision[:8]}"
        assert path.stem.startswith(start) and path.stem.endswith(end)


def test_keys_of_the_oracle():
    encoder = make_encoder("oracle")
    assert embedding_key(encoder, "best", 0, "all") == "oracle_best_L0_all_r1"
    leaky = make_encoder("oracle", background_kept=0.1)
    assert embedding_key(leaky, "blind", 0, "all") == "oracle-a0.1_blind_L0_all_r1"
    assert leaky.record()["background_kept"] == 0.1
    own = hashlib.sha256(b"Look!").hexdigest()[:8]
    assert embedding_key(encoder, "Look!", 0, "all") == f"oracle_p{own}_L0_all_r1"


def test_finished_files_are_kept_and_the_bar_advances(shards, monkeypatch):
    paths = embed(shards[0], "oracle", ("best", "blind"))
    before = [path.with_suffix(".npy").stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    encoder, bar = make_encoder("oracle"), tqdm(total=40, disable=True)
    seen, count = [], []
    monkeypatch.setattr(bar, "update", count.append)
    prepare = encoder.prepare
    monkeypatch.setattr(encoder, "prepare", lambda *given: seen.append(given[2]) or prepare(*given))
    metadata = json.loads((shards[0] / "shard.json").read_text())
    texts = {prompt: prompt_text(prompt, "drawer") for prompt in ("best", "blind")}
    embed_shard(encoder, shards[0], metadata, TASK, texts, bar)
    assert seen == [[texts["blind"]]] and sum(count) == 20, "only what is missing is computed"
    after = [path.with_suffix(".npy").stat().st_mtime_ns for path in paths]
    assert after[0] == before[0] and after[1] > before[1]
    embed_shard(encoder, shards[0], metadata, TASK, texts, bar)
    assert sum(count) == 40


def test_an_interrupted_write_leaves_nothing_that_counts(shards, monkeypatch):
    monkeypatch.setattr(encoders, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(shards[0], "oracle")
    monkeypatch.undo()
    assert not list(shards[0].glob("embeddings/*.json"))
    assert embed(shards[0], "oracle")[0].exists()


# ------------------------------------------------------------------------------------ what is refused


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


KEYS = [
    "revision",
    "id",
    "family",
    "text",
    "encoder_size",
    "blank",
    "noise_std",
    "arithmetic",
    "frames_sha256",
]


@pytest.mark.parametrize("key", KEYS)
def test_foreign_embeddings_are_refused(key, shards):
    path = embed(shards[0], tiny_model("dinov2"))[0]
    embed(shards[0], tiny_model("dinov2"))
    content = path.read_text()
    change(path, **{key: "other"})
    with pytest.raises(SystemExit, match=f"made with other {key}; delete it"):
        embed(shards[0], tiny_model("dinov2"))
    record = json.loads(content)
    del record["arithmetic"]  # of an older version
    for whole in (json.dumps(record), content):
        path.write_text(whole)
        embed(shards[0], tiny_model("dinov2"))


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_damaged_embeddings_are_refused(suffix, shards):
    path = embed(shards[0], "oracle")[0].with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SystemExit, match="is damaged; delete both"):
        embed(shards[0], "oracle")
    path.unlink()
    if suffix == ".npy":
        with pytest.raises(SystemExit, match="is damaged"):
            embed(shards[0], "oracle")


def test_a_local_model_is_known_by_the_whole_content_of_its_files(shards, tmp_path):
    """Two models that differ in the middle of a long file, where their first and last MiB are equal."""
    folders = [tmp_path / name / "dinov2" for name in ("one", "other")]
    for number, folder in enumerate(folders):
        shutil.copytree(tiny_model("dinov2"), folder)
        content = bytearray(3 * 2**20)
        content[len(content) // 2] = number
        (folder / "more.bin").write_bytes(content)
    one, other = (embed(shards[0], folder)[0] for folder in folders)
    assert one != other and one.exists()
    (folders[0] / "README.md").write_text("Notes are no part of a model.")
    (folders[0] / ".cache").mkdir()
    (folders[0] / ".cache/download").write_text("nor is when it was downloaded")
    assert embed(shards[0], folders[0])[0] == one


# ------------------------------------------------------------------------------------ batches


def test_the_next_batch_is_prepared_while_this_one_runs(shards, monkeypatch):
    encoder = make_encoder("oracle")
    encoder.batch = 8
    begun, threads = [threading.Event() for _ in range(3)], set()
    prepare, run = encoder.prepare, encoder.embed

    def watched_prepare(*given):
        threads.add(threading.current_thread())
        next(event for event in begun if not event.is_set()).set()
        return prepare(*given)

    def watched_embed(prepared):
        batch = len(results)
        results.append(run(prepared))
        if batch < 2:
            assert begun[batch + 1].wait(timeout=20), "the next batch waits for this one"
        return results[-1]

    results = []
    monkeypatch.setattr(encoder, "prepare", watched_prepare)
    monkeypatch.setattr(encoder, "embed", watched_embed)
    embed_frames(encoder, shards[0], TASK, ["Look at the drawer."])
    assert len(results) == 3 and threading.main_thread() not in threads


@pytest.mark.parametrize("where", ["pooled", "pixels"])
def test_out_of_memory_halves_the_batch(where, shards, monkeypatch, capsys):
    expected = array_of(embed(shards[0], tiny_model("dinov2"))[0])
    shutil.rmtree(shards[0] / "embeddings")
    original = getattr(pretrained.VisionModel, where)

    def small(self, given):
        images = len(given[0]) if where == "pooled" else len(given)
        if images > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(self, given)

    monkeypatch.setattr(pretrained.VisionModel, where, small)
    limit = 5
    path = embed(shards[0], tiny_model("dinov2"), batch=16)[0]
    assert np.allclose(array_of(path), expected, atol=2e-3)
    assert "batches of 4" in "".join(capsys.readouterr())
    shutil.rmtree(shards[0] / "embeddings")
    limit = 0
    with pytest.raises(SystemExit, match="single image"):
        embed(shards[0], tiny_model("dinov2"))


def test_a_bug_keeps_its_traceback(shards, monkeypatch):
    monkeypatch.setattr(
        pretrained.VisionModel, "pooled", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug"))
    )
    with pytest.raises(RuntimeError, match="a bug"):
        embed(shards[0], tiny_model("dinov2"))


def test_numbers_too_large_for_float16_are_stored_as_float32(shards, monkeypatch):
    pooled = pretrained.VisionModel.pooled

    def large(self, prepared):
        for cell, value in pooled(self, prepared):
            yield cell, value * 1e6

    monkeypatch.setattr(pretrained.VisionModel, "pooled", large)
    path = embed(shards[0], tiny_model("dinov2"))[0]
    array, record = array_of(path), json.loads(path.read_text())
    assert record["dtype"] == "float32" and array.dtype == np.float32 and np.abs(array).max() > 65504
    assert np.isfinite(array).all()
    assert embed(shards[0], tiny_model("dinov2")) == [path]
    monkeypatch.undo()
    small = embed(shards[1], tiny_model("dinov2"))[0]
    column = Column([small.with_suffix(".npy"), path.with_suffix(".npy")])
    assert column.dtype == np.float32 and np.array_equal(column[np.arange(20, 40)], array)


# ------------------------------------------------------------------------------------ the oracle, blanking


def test_what_the_oracle_understands():
    def named(text):
        return {SEGMENTS[k] for k in named_segments(text, "door lock")}

    assert named(prompt_text("best", "door lock")) == {"robot", "object", "goal"}
    assert named("Describe the image.") == set(SEGMENTS)
    assert named("Ignore the table.") == set(SEGMENTS) - {"table"}
    assert named("Look at the lock. Don't look at the goal!") == {"object"}
    assert named("Focus on the robot arm.") == {"robot"}


def test_blanking_shows_any_encoder_what_the_oracle_sees(shards):
    paths = embed(shards[0], "random", ("arm", "blind"), blank="oracle")
    assert [path.stem for path in paths] == ["random-blank_arm_L-1_mean_r1", "random-blank_blind_L-1_mean_r1"]
    plain = embed(shards[0], "random")[0]
    frames, segments = load(shards[0], "frames"), load(shards[0], "segments")
    arm = frames.copy()
    arm[segments != SEGMENTS.index("robot")] = 128
    assert np.array_equal(blanked(frames, segments, prompt_text("arm", ""), "drawer"), arm)
    vit = make_encoder("random")
    expected = vit.embed(vit.prepare(arm, None, [""], ""))["", -1, "mean"]
    assert np.allclose(array_of(paths[0]), expected, atol=2e-3)
    assert np.array_equal(array_of(paths[1]), array_of(plain)), "blind names nothing, so nothing is blanked"
    assert not np.allclose(array_of(paths[0]), array_of(plain), atol=2e-3)
    assert json.loads(paths[0].read_text())["blank"] == "oracle"
    assert json.loads(plain.read_text())["blank"] == "none"


def test_blanking_gives_a_vlm_its_prompt_as_well(shards):
    paths = embed(shards[0], tiny_model("llava"), ("arm", "object"), blank="oracle")
    encoder, task_object = make_encoder(str(tiny_model("llava"))), "drawer"
    frames, segments = load(shards[0], "frames"), load(shards[0], "segments")
    for path, prompt in zip(paths, ("arm", "object"), strict=True):
        text = prompt_text(prompt, task_object)
        seen = blanked(frames[:3], segments[:3], text, task_object)
        expected = encoder.embed(encoder.prepare(seen, None, [text], ""))[text, -2, "text"]
        assert np.allclose(array_of(path)[:3], expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("flags", [{"name": "oracle"}, {"name": "random", "blank": "oracle"}])
def test_imported_videos_have_no_segments(flags, shards):
    (shards[0] / "segments.npy").unlink()
    with pytest.raises(SystemExit, match="has no segments"):
        embed(shards[0], **flags)
    embed(shards[0], "random")


# ------------------------------------------------------------------------------------ disturbances


def test_noise_belongs_to_the_frame(shards):
    plain = array_of(embed(shards[1], "oracle")[0]).astype(np.float64)
    path = embed(shards[1], "oracle", noise_std=0.5)[0]
    assert path.stem == "oracle-noise0.5_best_L0_all_r1" and json.loads(path.read_text())["noise_std"] == 0.5
    first = array_of(embed(shards[0], "oracle")[0])
    unit = change_std(first, load(shards[0], "episode"))
    noise = (array_of(path) - plain) / (0.5 * unit)
    expected = frame_noise(TASK, load(shards[1], "episode"), load(shards[1], "step"), 256)
    assert np.allclose(noise, expected, atol=0.2) and abs(noise.std() - 1) < 0.05
    again = frame_noise(TASK, load(shards[1], "episode")[7:9], load(shards[1], "step")[7:9], 256)
    assert np.array_equal(again, expected[7:9]), "whatever the shard that holds it"
    assert not np.allclose(frame_noise("door-open", np.array([2]), np.array([0]), 256), expected[0], atol=0.1)
    assert np.abs(np.corrcoef(expected[::4]) - np.eye(5)).max() < 0.3, "each frame has its own"
    twice = embed(shards[1], "oracle", noise_std=1.0)[0]
    assert np.allclose(array_of(twice) - plain, 2 * (array_of(path) - plain), atol=0.01)


def test_the_unit_is_the_change_within_an_episode():
    embedding, episode = np.random.default_rng(0).standard_normal((60, 4)), np.arange(60) // 20
    embedding[episode == 1] += 1000.0
    changes = np.concatenate([np.diff(embedding[episode == k], axis=0) for k in range(3)])
    assert np.allclose(change_std(embedding, episode), changes.std(axis=0), rtol=1e-6)


def test_tremble_is_a_random_vit_of_the_whole_frame(shards):
    plain = array_of(embed(shards[1], "oracle")[0]).astype(np.float64)
    path = embed(shards[1], "oracle", tremble=2.0)[0]
    assert path.stem == "oracle-tremble2_best_L0_all_r1" and json.loads(path.read_text())["tremble"] == 2.0
    vit = make_encoder("random")
    views = [vit.embed(vit.prepare(load(s, "frames"), None, [""], ""))["", -1, "mean"] for s in shards]
    episodes = load(shards[0], "episode")
    unit = change_std(array_of(embed(shards[0], "oracle")[0]), episodes)
    expected = 2.0 * unit * tremble_of(views[1], views[0], episodes, 256)
    assert np.allclose(array_of(path) - plain, expected, atol=0.02)
    first = tremble_of(views[0], views[0], episodes, 256)
    assert np.allclose(change_std(first, episodes), 1, rtol=1e-3) and np.allclose(
        first.mean(axis=0), 0, atol=1e-3
    )
    assert np.linalg.matrix_rank(first - first.mean(0)) == 19, "all of the view is in it"


def test_rounding_to_bfloat16(shards):
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 1e3
    values[:3] = [0, 1 + 2**-8, 1 + 3 * 2**-8]  # zero, and two ties
    assert np.array_equal(round_to_bfloat16(values), torch.tensor(values).bfloat16().float().numpy())
    path = embed(shards[0], "oracle", bfloat16=True)[0]
    plain = array_of(embed(shards[0], "oracle")[0])
    array = array_of(path).astype(np.float32)
    assert path.stem == "oracle-bf16_best_L0_all_r1" and json.loads(path.read_text())["bfloat16"] is True
    assert np.array_equal(round_to_bfloat16(array), array) and not np.array_equal(array, plain)
    assert np.allclose(array, plain, rtol=2**-7, atol=1e-3)


def test_disturbances_add_up_and_go_with_any_encoder(shards):
    paths = embed(shards[1], tiny_model("dinov2"), noise_std=1, tremble=0.5, bfloat16=True)
    assert paths[0].stem.startswith("dinov2-noise1-tremble0.5-bf16_noprompt_")
    assert np.isfinite(array_of(paths[0])).all()


# ------------------------------------------------------------------------------------ command line


def test_the_command_embeds_and_refuses(tiny_data, tmp_path, monkeypatch):
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    cache, commit = (
        tmp_path / "hub/models--someone--idefics3",
        "0123456789" * 4,
    )  # as the hub's client lays it out
    shutil.copytree(tiny_model("idefics3"), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    flags = [
        *TINY,
        "--out",
        "data/tiny",
        "--encoder",
        "someone/idefics3",
        "--layers",
        -2,
        -3,
        "--encoder-size",
        112,
    ]
    flags += ["--no-split-tiles", "--pools", "text", "last"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    made = run_script("collect.py", *flags, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "image/s" in made.stderr and "idefics3-s112-whole_best_L-3_last_r01234567" in made.stdout
    for shard in (tmp_path / "data/tiny/drawer-open").glob("shard_*"):
        assert len(list(shard.glob("embeddings/idefics3*.npy"))) == 4
    record = json.loads((shard / "embeddings/idefics3-s112-whole_best_L-2_text_r01234567.json").read_text())
    assert (
        record["id"] == "someone/idefics3" and record["revision"] == commit and record["encoder_size"] == 112
    )
    new = tmp_path / "data/new"
    line = refusal(
        run_script("collect.py", *TINY, "--out", new, "--encoder", tiny_model("molmo"), cwd=tmp_path)
    )
    assert "--trust-remote-code" in line and not new.exists(), "refused before anything is collected"
    for source, hint in {"./nowhere": "no folder", "nobody/no-such-model": "does not load"}.items():
        with pytest.raises(SystemExit, match=hint):
            collect.main(collect.parse_args([*TINY, "--out", str(new), "--encoder", source]))
        assert not new.exists()


def test_the_oracle_and_collecting_need_no_torch(tiny_data, tmp_path):
    """The heavy imports are inside what needs them."""
    shutil.copytree(tiny_data, tmp_path / "data")
    flags = [*TINY, "--workers", "1", "--prompt", "arm", "--noise-std", "1", "--out", "data"]
    code = f"import collect, sys; collect.main(collect.parse_args({flags!r}))"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data").rglob("oracle-noise1_arm_L0_all_r1.npy"))) == 3


def test_a_tiny_vlm_from_end_to_end(tiny_data, tmp_path):
    """collect.py --encoder, lam_vlm.py on its key, and linear_lam.py ranks it beside the oracle."""
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    flags = ["--out", "data/tiny", "--encoder", tiny_model("llava"), "--prompt", "best", "blind"]
    made = run_script("collect.py", *TINY, *flags, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    data = ["--data", "data/tiny"]
    updates = ["--lam-updates", 3, "--bc-updates", 2, "--decoder-updates", 2, "--labelled-episodes", 1]
    trained = run_script(
        "lam_vlm.py", *data, *updates, "--encoder", "llava_best", "--out", "runs/one", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(next((tmp_path / "runs").rglob("summary.json")).read_text())
    embedding = summary["embedding"]
    assert embedding["key"].startswith("llava_best_L-2_text_r") and embedding["prompt"] == "best"
    ranked = run_script("linear_lam.py", *data, cwd=tmp_path)
    assert ranked.returncode == 0, ranked.stderr
    for key in ("llava_best", "llava_blind", "oracle_best"):
        assert key in ranked.stdout, ranked.stdout


# ------------------------------------------------------------ what a slip of one line would change


def test_the_oracle_averages_squares():
    """A frame of 64 px: each of its 32 x 32 features is the mean of four pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    text = prompt_text("blind", "")
    (features,) = make_encoder("oracle").prepare(frames, np.zeros((1, 64, 64), np.uint8), [text], "").values()
    expected = frames[0].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(128 * features.reshape(32, 32, 3) + 128 - expected).max() <= 1


@pytest.mark.parametrize("key", ["text", "revision", "blank", "noise_std", "frames_sha256"])
def test_embeddings_that_do_not_say_what_they_are_are_refused(key, shards):
    path = embed(shards[0], "oracle")[0]
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"made with other {key}"):
        embed(shards[0], "oracle")
