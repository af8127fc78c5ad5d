"""Which encoder, and the files that collect.py keeps of what it makes of a data set's frames.

    encoder_config(name, ...)            early: what can be no encoder is refused before hours of collecting
    encoder = make_encoder(name, ...)    loads it
    keys = embed_shard(encoder, folder, metadata, task, {prompt: text})

An encoder turns images (B, H, W, 3) uint8 into {(text, layer, pool): (B, D) float32}; oracle.py and
pretrained.py hold them. The last function writes what is missing of one shard. Imports without torch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import fail, nearest
from common.disturb import Disturbance, change_std, frame_noise, round_to_bfloat16, tremble_of
from common.oracle import PROMPTS, Encoder, Oracle, blanked
from common.shards import atomic_write, sha256, write_json
from common.tasks import OBJECTS

MOLMO = "allenai/Molmo-7B-D-0924"
MOLMO_REVISION = "1721478b71306fb7dc671176d5c204dc7a4d27d7"  # its remote code is run, so it is pinned
OWN = ("oracle", "none", "random")  # names that need no download
VISION_MODELS = (
    "clip",
    "clip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "siglip",
    "siglip_vision_model",
)

# ------------------------------------------------------------------------------------ which encoder


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors of a library on the way to a model (no network, no such model, no package) become one line."""
    try:
        yield
    except ImportError as error:
        words = " ".join(str(error).split())
        package = ""
        for name in ("torchvision", "einops", "num2words", "sentencepiece", "transformers", "torch"):
            if name in words.lower():
                package = name
                break
        if package == "torchvision":
            package += " (the build that fits your torch, see pytorch.org)"
        fail(f"{what} needs a package that is missing: {package}; {words[:100]}")
    except Exception as error:  # of transformers and its hub client: a dozen types
        fail(f"{what} does not load: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def check_encoder_name(name: str) -> None:
    """One line for a name that can be no encoder; looks at nothing but the disk."""
    source = name.removeprefix("otter:")
    hub_id = source.count("/") == 1 and source[0] not in "./~"
    if name in OWN or Path(source).is_dir() or hub_id:
        return
    advice = f"or a hub id like owner/model, a local folder, otter:<CLIP>; there is no folder {source!r}"
    fail(f"{nearest(name, OWN, 'encoder')} ({advice})")


def encoder_config(name: str, trust_remote_code: bool = False, model_revision: str = "") -> dict:
    """The model's config.json with its `revision`, a hub's commit. Runs none of the model's code.

    What cannot be an encoder, or may not be run, is refused in one line: call it before anything that takes
    long.
    """
    check_encoder_name(name)
    if name in OWN:
        return {"model_type": name, "revision": "1"}
    source = name.removeprefix("otter:")
    pinned = source.lower() == MOLMO.lower()
    asked = model_revision or "main"
    if pinned and not model_revision:
        asked = MOLMO_REVISION
    with one_line(f"--encoder {name}"):
        from transformers import logging
        from transformers.models.auto import modeling_auto
        from transformers.utils.hub import cached_file, extract_commit_hash

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        path = cached_file(source, "config.json", revision=asked)
        config = json.loads(Path(path).read_text())
    config["revision"] = extract_commit_hash(path, None) or asked  # the path of a hub's copy has the commit
    kind = config.get("model_type")
    if kind == "molmo":
        if not trust_remote_code:
            fail(
                f"--encoder {source} needs --trust-remote-code: transformers has no Molmo, so Python code "
                f"that comes with the model is run on this machine with your rights"
            )
        if not (pinned or model_revision or Path(source).is_dir()):
            fail(f"--encoder {source} runs code of its repository: pin it with --model-revision (a commit)")
        return config
    if kind in ("blip-2", "instructblip") and not config.get("use_decoder_only_language_model", True):
        fail(f"--encoder {source} has an encoder-decoder as its language model, which is not understood here")
    native = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" in config
    if not (kind in VISION_MODELS or native or causal):
        known = ", ".join(VISION_MODELS)
        fail(
            f"--encoder {source} is of type {kind!r}, which is no image encoder known here: {known}, molmo, "
            f"or a vision-language model of transformers"
        )
    return config


def folder_hash(folder: Path) -> str:
    """Hash of a local model: of the names and whole contents of its files, but for notes and hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in name.parts)
        if path.is_file() and path.suffix != ".md" and not hidden:
            digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:40]


def make_encoder(
    name: str,
    *,
    layers: tuple[int, ...] = (),
    pools: tuple[str, ...] = (),
    background_kept: float = 0.0,
    otter_temperature: float = 0.07,
    trust_remote_code: bool = False,
    model_revision: str = "",
    batch: int = 0,
    size: int = 0,
    split_tiles: bool = True,
    blank: str = "none",
    noise_std: float = 0.0,
    tremble: float = 0.0,
    bfloat16: bool = False,
) -> Encoder:
    """The encoder of that name; each way to fail is one line.

    layers, pools: empty for its defaults. batch, size: 0 for its own choice. blank: "oracle" shows it
    frames in which the oracle has blanked what the prompt does not name. noise_std, tremble, bfloat16: see
    common/disturb.py.
    """
    if name == "oracle":
        if size or blank != "none" or model_revision or not split_tiles:
            fail("--encoder-size, --blank, --model-revision and --no-split-tiles are for other encoders")
        encoder = Oracle(background_kept)
    else:
        config = encoder_config(name, trust_remote_code, model_revision)
        from common import pretrained  # here: the oracle needs no torch

        encoder_class = pretrained.NativeVLM
        if name.startswith("otter:"):
            encoder_class = pretrained.Otter
        elif config["model_type"] in VISION_MODELS:
            encoder_class = pretrained.VisionModel
        elif config["model_type"] == "molmo":
            encoder_class = pretrained.Molmo
        elif name == "random":
            encoder_class = pretrained.RandomViT
        folder = Path(name.removeprefix("otter:"))
        if folder.is_dir():
            config["revision"] = folder_hash(folder)
        with one_line(f"--encoder {name}"):
            encoder = encoder_class(name, config, batch, size, split_tiles, otter_temperature)
        where = f"{encoder.device}, {encoder.dtype}"
        print(f"encoder {encoder.name}: {encoder_class.__name__}, revision {encoder.revision[:8]}, {where}")
    if blank == "oracle":
        encoder.blank, encoder.promptable = blank, True
        encoder.name += "-blank"
    encoder.disturbance = Disturbance(noise_std, tremble, bfloat16)
    encoder.name += encoder.disturbance.suffix()
    encoder.layers = tuple(layers) or encoder.layers
    encoder.pools = tuple(pools) or encoder.pools
    check_known(encoder.name, "layer", encoder.layers, encoder.known_layers)
    check_known(encoder.name, "pool", encoder.pools, encoder.known_pools)
    return encoder


def check_known(encoder: str, what: str, asked: tuple, known: tuple) -> None:
    for value in asked:
        if value not in known:
            has = ", ".join(map(str, known))
            if len(known) > 7:
                has = f"{known[0]} to {known[-1]}"
            fail(f"encoder {encoder} has no {what} {value!r}; it has {has}")


# ------------------------------------------------------------------------------------------------ the files


def embedding_key(encoder: Encoder, prompt: str, layer: int, pool: str) -> str:
    """File name: encoder, prompt, layer, pool, revision. A prompt of the user's own goes in as a hash."""
    if not encoder.promptable:
        prompt = "noprompt"
    elif prompt not in PROMPTS:
        prompt = "p" + hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{encoder.name}_{prompt}_L{layer}_{pool}_r{encoder.revision[:8]}"


def embed_shard(
    encoder: Encoder,
    folder: Path,
    metadata: dict,
    task: str,
    prompts: dict[str, str],
    bar: tqdm | None = None,
) -> list[str]:
    """Writes what is missing of a shard's embeddings: <folder>/embeddings/<key>.npy, (N, D), and <key>.json.

    metadata: that of the shard, with "sha256": {"frames": ...}. prompts: {name or text of the user's own:
    text as filled}; an encoder that reads none ignores them. bar: advances by the frames of the shard.
    Finished files are kept; damaged ones, and those of other frames, prompts or models, are refused in one
    line. A file appears whole or not at all, its .json last.
    """
    if not encoder.promptable:
        prompts = {"noprompt": ""}
    frames = load_array(folder, "frames")
    encoder.fit_size(frames.shape[1])
    missing, keys = {}, []
    for (prompt, text), layer, pool in itertools.product(prompts.items(), encoder.layers, encoder.pools):
        key = embedding_key(encoder, prompt, layer, pool)
        record = {"prompt": prompt, "text": text, "layer": layer, "pool": pool, **encoder.record()}
        record["frames_sha256"] = metadata["sha256"]["frames"]
        keys.append(key)
        path = folder / "embeddings" / f"{key}.json"
        if path.exists():
            check_embedding(path, record)
        else:
            missing[path] = record
    if missing:
        texts = list(dict.fromkeys(record["text"] for record in missing.values()))
        embeddings = embed_frames(encoder, folder, task, texts, bar)
        if encoder.disturbance != Disturbance():
            embeddings = disturbed(encoder, embeddings, folder, task)
        (folder / "embeddings").mkdir(exist_ok=True)
        for path, record in missing.items():
            write_embedding(path, record, embeddings[record["text"], record["layer"], record["pool"]])
    elif bar is not None:
        bar.update(len(frames))
    return keys


def load_array(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def check_embedding(path: Path, expected: dict) -> None:
    """Refuses embeddings that are damaged or were of other frames, another prompt or another model."""
    try:
        record = json.loads(path.read_text())
        whole = record["sha256"] == sha256(path.with_suffix(".npy"))
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{path} or its .npy is damaged; delete both and run again")
    older = {name: expected[name] for name in ("arithmetic", "processor") if name in expected}
    record = older | record  # which does not say it
    other = [key for key, value in expected.items() if record.get(key) != value]
    if other:
        fail(f"{path} was made with other {', '.join(other)}; delete it and its .npy, and run again")
    if not whole:
        fail(f"{path} or its .npy is damaged; delete both and run again")


def write_embedding(path: Path, record: dict, embedding: np.ndarray) -> None:
    """As float16, or as float32 where a number is too large for it."""
    if not np.isfinite(embedding).all():
        fail(f"{path}: its numbers are not finite")
    dtype = np.float16
    if np.abs(embedding).max() > np.finfo(np.float16).max:
        dtype = np.float32
    buffer = io.BytesIO()
    np.save(buffer, embedding.astype(dtype), allow_pickle=False)
    content = buffer.getvalue()
    atomic_write(path.with_suffix(".npy"), content)
    result = {
        "dtype": np.dtype(dtype).name,
        "dim": embedding.shape[1],
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_json(path, record | result)


def prepare_batch(
    encoder: Encoder, frames: np.ndarray, segments: np.ndarray, texts: list[str], object: str
) -> list:
    """What `embed` takes: one item, or with --blank one for each text, whose frames differ."""
    if encoder.blank == "none":
        return [encoder.prepare(frames, segments, texts, object)]
    prepared = []
    for text in texts:
        prepared.append(encoder.prepare(blanked(frames, segments, text, object), segments, [text], object))
    return prepared


def embed_frames(
    encoder: Encoder, folder: Path, task: str, texts: list[str], bar: tqdm | None = None
) -> dict:
    """{(text, layer, pool): (N, D) float32} of a shard's frames.

    The next batch is prepared by a thread while this one runs; out of memory halves encoder.batch.
    """
    frames = load_array(folder, "frames")
    segments = frames[..., 0]  # not looked at, unless the encoder needs them
    if encoder.family == "oracle" or encoder.blank != "none":
        if not (folder / "segments.npy").exists():
            fail(f"{folder} has no segments: the oracle, and --blank oracle, work on simulated data alone")
        segments = load_array(folder, "segments")
    object = OBJECTS.get(task, "object")
    parts, start, coming = {}, 0, None
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        while start < len(frames):
            stop = min(start + encoder.batch, len(frames))
            if coming is None:
                now = slice(start, stop)
                coming = thread.submit(prepare_batch, encoder, frames[now], segments[now], texts, object)
            memory_error = None
            try:
                batch = coming.result()
                coming = None
                if stop < len(frames):
                    after = slice(stop, stop + encoder.batch)
                    coming = thread.submit(
                        prepare_batch, encoder, frames[after], segments[after], texts, object
                    )
                results = [encoder.embed(prepared) for prepared in batch]
            except (RuntimeError, MemoryError) as error:
                memory_error = out_of_memory(error)
            if memory_error is not None:  # out here the traceback, which holds the tensors, is gone
                coming = batch = None
                halve_batch(encoder, stop - start, memory_error)
                continue
            for cell, value in itertools.chain.from_iterable(result.items() for result in results):
                parts.setdefault(cell, []).append(value)
            if bar is not None:
                bar.update(stop - start)
            start = stop
    return {cell: np.concatenate(values) for cell, values in parts.items()}


def out_of_memory(error: Exception) -> str:
    """What the error says if memory ran out (torch's error is a RuntimeError); any other is raised again."""
    words = " ".join(str(error).split())[:100]
    if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", words):
        raise error
    return words


def halve_batch(encoder: Encoder, images: int, reason: str) -> None:
    if images == 1:
        fail(f"encoder {encoder.name}: out of memory with a single image ({reason})")
    encoder.batch = images // 2
    tqdm.write(f"encoder {encoder.name}: out of memory, going on with batches of {encoder.batch}")
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


@functools.lru_cache(maxsize=16)
def embed_once(encoder: Encoder, folder: Path, task: str, text: str) -> dict:
    """embed_frames under one prompt, kept: each shard of a task needs its first shard again."""
    return embed_frames(encoder, folder, task, [text])


@functools.cache
def random_vit() -> Encoder:
    return make_encoder("random")


def disturbed(encoder: Encoder, embeddings: dict, folder: Path, task: str) -> dict:
    """{(text, layer, pool): (N, D)} with the encoder's disturbance, see common/disturb.py."""
    disturbance = encoder.disturbance
    episode, step = load_array(folder, "episode"), load_array(folder, "step")
    first = folder.parent / "shard_00000"
    first_episode = load_array(first, "episode")
    if disturbance.tremble:
        features = embed_once(random_vit(), folder, task, "")["", -1, "mean"]
        first_features = embed_once(random_vit(), first, task, "")["", -1, "mean"]
    result = {}
    for (text, layer, pool), embedding in embeddings.items():
        first_embedding = embed_once(encoder, first, task, text)[text, layer, pool]
        unit = change_std(first_embedding, first_episode)
        dim = embedding.shape[1]
        if disturbance.noise_std:
            embedding = embedding + disturbance.noise_std * unit * frame_noise(task, episode, step, dim)
        if disturbance.tremble:
            tremble = tremble_of(features, first_features, first_episode, dim)
            embedding = embedding + disturbance.tremble * unit * tremble
        if disturbance.bfloat16:
            embedding = round_to_bfloat16(embedding)
        result[text, layer, pool] = embedding
    return result
