"""Encoders on tiny random models of the real architectures: pools, layers, sharing, sizes, refusals."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from PIL import Image
from tiny_models import HAND_MADE, PROMPTS, tiny_model

from common import pretrained
from common.encoders import encoder_config, make_encoder
from common.oracle import prompt_text

POOLS = ("image", "text", "last", "all")
ATTENDS_BOTH_WAYS = ("paligemma", "instructblip", "florence2")  # their image tokens can hear the prompt
CANNOT_SHARE = (*ATTENDS_BOTH_WAYS, "mllama", "blip_2")
IMAGE_TOKENS = {  # of a picture of 32 px, in these tiny models
    **{"llava": 16, "llava_next": 36, "vipllava": 16, "idefics2": 20, "idefics3": 20, "paligemma": 16},
    **{"gemma3": 4, "aya_vision": 4, "janus": 16, "deepseek_vl": 16, "chameleon": 49, "ovis2": 4, "aria": 8},
    **{"mllama": 1, "blip_2": 4, "instructblip": 4, "florence2": 65},
    **{"qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "glm4v": 9, "phi4_multimodal": 13, "molmo": 288},
}
NEEDS_TORCHVISION = (
    "smolvlm",
    "internvl",
    "fuyu",
)  # their processors; HAND_MADE stands for those of others


def pictures(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def encoder_of(name: str, **flags: object) -> pretrained.Pretrained:
    """Of the tiny model `name`, with a hand-made processor where the real one needs torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        if name in HAND_MADE:
            patch.setattr(transformers.AutoProcessor, "from_pretrained", lambda **_: HAND_MADE[name]())
        return make_encoder(str(tiny_model(name)), trust_remote_code=True, **flags)


def run(encoder: pretrained.Pretrained, images: np.ndarray, texts: list[str] | None = None) -> dict:
    return encoder.embed(encoder.prepare(images, None, texts or PROMPTS, "drawer"))


def watch(encoder: pretrained.Pretrained) -> tuple[list[dict], object]:
    """The keyword arguments of each forward pass of the model, and the hook that collects them."""
    calls = []
    core = encoder.model
    if encoder.family == "molmo":
        core = core.model
    hook = core.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls, hook


# ------------------------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("name", IMAGE_TOKENS)
def test_every_architecture(name, capsys):
    """Load; pools against hidden states pooled by hand; an image alone as in a batch; sharing."""
    layers = (-4, -2, -1, 0, 3)
    encoder, images = encoder_of(name, layers=layers, pools=POOLS), pictures(3)
    full, calls = {}, []
    for text in PROMPTS:
        calls, hook = watch(encoder)
        full |= run(encoder, images, [text])
        hook.remove()
        check_pools_by_hand(encoder, name, text, calls[0], full)
    alone = run(encoder, images[1:2], PROMPTS[:1])
    for cell, value in alone.items():
        scale = np.abs(full[cell]).max()
        assert np.allclose(full[cell][1], value[0], rtol=1e-4, atol=1e-5 * scale), cell
        if cell[1:] == (-2, "text"):
            assert np.abs(full[cell][0] - full[cell][1]).max() > 1e-7 * scale, "does not see the picture"

    run(encoder, images)
    assert encoder.shares == (name not in CANNOT_SHARE)
    assert ("cannot share" in capsys.readouterr().out) == (name in CANNOT_SHARE)
    calls, hook = watch(encoder)
    shared = run(encoder, images)
    hook.remove()
    assert len(calls) == 2 + encoder.shares, "the image and each prompt's own tokens, once"
    assert set(shared) == set(full)
    shorter_first = run(encoder, images, PROMPTS[::-1])
    for cell, value in full.items():
        scale = np.abs(value).max()
        assert np.allclose(shared[cell], value, rtol=1e-4, atol=1e-5 * scale), cell
        assert np.allclose(shorter_first[cell], value, rtol=1e-4, atol=1e-5 * scale), cell


def check_pools_by_hand(encoder: object, name: str, text: str, inputs: dict, result: dict) -> None:
    core, inputs = encoder.model, inputs | {"output_hidden_states": True}
    if name == "molmo":
        core = core.model
        inputs["last_logits_only"] = False
    with torch.inference_mode():
        states = pretrained.hidden_states_of(core(**inputs))
    assert len(states) == 4
    ids = inputs["input_ids"].numpy()
    assert (ids == ids[0]).all()
    image = ids[0] == encoder.image_id
    assert image.sum() == IMAGE_TOKENS[name]
    last = np.flatnonzero(image).max()
    if name == "molmo":
        last = 316  # the column mark and the end mark after the last patch
    words = np.arange(len(ids[0])) > last
    read = encoder.tokenizer if name == "molmo" else encoder.processor.tokenizer
    assert text in read.decode(ids[0][words]), "all of the prompt is in the text pool"
    for layer in encoder.layers:
        state = states[layer].numpy()
        by_hand = {
            "image": state[:, image].mean(1),
            "text": state[:, words].mean(1),
            "last": state[:, -1],
            "all": state.mean(1),
        }
        for pool, value in by_hand.items():
            got = result[text, layer, pool]
            assert got.shape == (3, 32) and got.dtype == np.float32
            assert np.allclose(got, value, rtol=1e-4, atol=1e-5 * np.abs(value).max()), (layer, pool)


@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_an_architecture_whose_processor_needs_torchvision(name):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip(f"the processor of {name} needs torchvision, which is not installed")
    encoder = make_encoder(str(tiny_model(name)), pools=POOLS)
    full = {cell: value for text in PROMPTS for cell, value in run(encoder, pictures(3), [text]).items()}
    for cell, value in run(encoder, pictures(3)).items():
        assert np.allclose(value, full[cell], rtol=1e-4, atol=1e-5 * np.abs(value).max()), cell


@pytest.mark.parametrize("name", IMAGE_TOKENS)
def test_image_tokens_cannot_hear_the_prompt(name):
    """Causal attention, image first: the same bits under every prompt, but where attention goes both ways."""
    encoder, images = encoder_of(name, pools=POOLS), pictures(3)
    texts = [
        "qqqq qqqq",
        "zzzz zzzz",
    ]  # equally many tokens: sums of another length would be rounded otherwise
    one, other = (run(encoder, images, [text]) for text in texts)
    for pool in POOLS:
        a, b = one[texts[0], -2, pool], other[texts[1], -2, pool]
        deaf = pool == "image" and name not in ATTENDS_BOTH_WAYS
        assert np.array_equal(a, b) == deaf, pool


# ------------------------------------------------------------------------------------ sharing


def test_where_a_shared_pass_fails_full_passes_are_made(capsys, monkeypatch):
    encoder, images = encoder_of("llava", pools=POOLS), pictures(2)
    full = {cell: value for text in PROMPTS for cell, value in run(encoder, images, [text]).items()}
    monkeypatch.setattr(encoder, "shared_states", lambda *_: (1 / 0 for _ in "x"))
    both = run(encoder, images)
    assert encoder.shares is False
    assert "cannot share a pass over the image (ZeroDivisionError)" in capsys.readouterr().out
    for cell, value in full.items():
        assert np.array_equal(both[cell], value), cell


def test_wrong_states_of_a_shared_pass_are_found(monkeypatch):
    encoder = encoder_of("llava")
    exact = encoder.shared_states

    def a_little_off(*arguments):
        for states in exact(*arguments):
            yield {layer: state + 1e-3 * state.std() for layer, state in states.items()}

    monkeypatch.setattr(encoder, "shared_states", a_little_off)
    run(encoder, pictures(2))
    assert encoder.shares is False


def test_prompts_longer_than_a_sliding_window_do_not_share(monkeypatch):
    """Short ones did, and a cache of sliding attention can not be cut back once it is full."""
    texts = ["zq xj vk wy " * 8, "Describe the image."]
    alone = [run(encoder_of("gemma3"), pictures(2), [text]) for text in texts]
    encoder = encoder_of("gemma3")
    run(encoder, pictures(2))
    assert encoder.shares
    window = max(
        inputs["input_ids"].shape[1] for inputs in encoder.prepare(pictures(1), None, texts, "").values()
    )
    monkeypatch.setattr(encoder, "window", window)
    monkeypatch.setattr(encoder, "shared_states", lambda *_: pytest.fail("shared"))
    found = run(encoder, pictures(2), texts)
    for expected in alone:
        for cell, value in expected.items():
            assert np.allclose(found[cell], value, atol=1e-5)


def test_a_chat_template_that_tells_the_date_tells_the_same_one_every_day(tmp_path):
    shutil.copytree(tiny_model("llava"), tmp_path / "llava")
    template = tmp_path / "llava/chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M:%S') }} " + template.read_text())
    encoder = make_encoder(str(tmp_path / "llava"))
    text = encoder.processor.tokenizer.decode(encoder.inputs(pictures(1), "hi")["input_ids"][0])
    assert "strftime_now" not in encoder.processor.chat_template
    assert encoder.processor.chat_template.startswith("{{ '1 January 2026' }}") and text
    assert encoder.record()["processor"] == type(encoder.processor.image_processor).__name__


@pytest.mark.parametrize(
    ("noise", "error", "shares"), [(2e-2, 3e-2, True), (1e-3, 3e-2, False), (0.0, 1e-2, True)]
)
def test_the_error_of_a_shared_pass_is_measured_by_the_models_own(noise, error, shares, monkeypatch):
    """Over 40 layers in bfloat16, two batch sizes of a full pass differ by 2.4e-2: no fixed bound fits."""
    encoder = encoder_of("llava")
    encoder.dtype = torch.bfloat16
    encoder.model.to(torch.bfloat16)
    found = iter([noise, noise, error, error])
    monkeypatch.setattr(pretrained, "relative_difference", lambda *_: next(found))
    run(encoder, pictures(2))
    assert encoder.shares == shares


def test_a_shared_pass_that_gives_no_numbers_is_no_equal():
    states, gaps = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    gaps[0, 1] = torch.nan
    assert pretrained.relative_difference({0: states, 1: states}, {0: states, 1: gaps}) == np.inf
    states[0, 2] = 0  # a token of no length
    assert pretrained.relative_difference({0: states}, {0: states}) == 0


def test_bfloat16_of_forty_layers_shares(capsys):
    tiny_models.BUILDERS["deep"] = lambda folder: tiny_models.llava(folder, layers=40)
    encoder = make_encoder(str(tiny_model("deep")))
    encoder.dtype = torch.bfloat16
    encoder.model.to(torch.bfloat16)
    run(encoder, pictures(2))
    assert encoder.shares, capsys.readouterr().out


# ------------------------------------------------------------------------------------ sizes and tiles


def test_frames_of_native_resolution_models_are_enlarged(capsys):
    """A frame of 64 px is 4 tokens of Qwen2-VL, one of 128 px 25: it is resized until it is 64."""
    encoder = encoder_of("qwen2_vl")
    assert encoder.image_tokens(pictures(1, 64)) == 4 and encoder.image_tokens(pictures(1, 128)) == 25
    encoder.fit_size(64)
    assert encoder.size == 224 and "resized to 224 px it is 64" in capsys.readouterr().out
    assert encoder.record()["encoder_size"] == 224 and "-s" not in encoder.name
    inputs = encoder.prepare(pictures(1, 64), None, PROMPTS, "drawer")[PROMPTS[0]]
    assert (inputs["input_ids"] == encoder.image_id).sum() == 64


def test_models_with_enough_image_tokens_are_left_alone(capsys):
    encoder = encoder_of("florence2")
    encoder.fit_size(64)
    assert encoder.size == 64 and not capsys.readouterr().out.count("resized")
    few = encoder_of("llava")
    few.fit_size(64)
    assert few.size == 64 and "only 16 image tokens" in capsys.readouterr().out
    cross_attention = encoder_of("mllama")
    cross_attention.fit_size(64)
    assert cross_attention.size == 64 and "image tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llava", "dinov2", "molmo", "qwen2_vl"])
def test_encoder_size_resizes_frames_before_the_processor(name):
    given, plain = encoder_of(name, size=112), encoder_of(name)
    images = pictures(2)
    large = np.stack(
        [np.asarray(Image.fromarray(i).resize((112, 112), Image.Resampling.BICUBIC)) for i in images]
    )
    given.fit_size(32)
    assert given.size == given.record()["encoder_size"] == 112 and given.name == f"{plain.name}-s112"
    for cell, value in run(given, images).items():
        assert np.array_equal(value, run(plain, large)[cell])
        assert not np.allclose(value, run(plain, images)[cell], atol=1e-6)


TILES = [("idefics2", 20, 4), ("idefics3", 20, 4), ("llava_next", 88, 36), ("aya_vision", 20, 4)]


@pytest.mark.parametrize(("name", "cut", "whole"), TILES)
def test_tile_splitting_can_be_switched_off(name, cut, whole):
    split, one = encoder_of(name), encoder_of(name, split_tiles=False)
    frame = pictures(1, 112)
    assert (split.image_tokens(frame), one.image_tokens(frame)) == (cut, whole)
    assert (
        one.name == f"{split.name}-whole"
        and not one.record()["split_tiles"]
        and split.record()["split_tiles"]
    )
    run(one, frame)


@pytest.mark.parametrize("name", ["llava", "molmo", "dinov2"])
def test_where_nothing_cuts_tiles_the_switch_is_refused(name):
    with pytest.raises(SystemExit, match="cuts no picture into tiles: leave out --no-split-tiles"):
        encoder_of(name, split_tiles=False)


# ------------------------------------------------------------------------------------ processors


@pytest.mark.parametrize("name", ["llava", "chameleon", "dinov2"])
def test_processors_are_told_the_device(name, monkeypatch):
    """Those of torchvision then work there; PIL's ignore it."""
    encoder, devices = encoder_of(name), []
    call = type(encoder.processor).__call__

    def watched(self, *args, **options):
        devices.append(options.get("device"))
        return call(self, *args, **options)

    monkeypatch.setattr(type(encoder.processor), "__call__", watched)
    encoder.prepare(pictures(2), None, PROMPTS, "drawer")
    assert devices and set(devices) == {encoder.device}


def test_a_model_without_chat_template_gets_one_image_then_the_text(tmp_path):
    torch.manual_seed(0)
    tiny_models.paligemma(tmp_path / "plain", template=None)
    encoder = make_encoder(str(tmp_path / "plain"))
    for one in (encoder, encoder_of("chameleon"), encoder_of("blip_2")):
        ids = one.inputs(pictures(2), PROMPTS[0])["input_ids"]
        assert ids.shape[0] == 2 and (ids == one.image_id).sum() == 2 * one.image_tokens(pictures(1))
        assert one.processor.tokenizer.decode(ids[0]).count("Focus on the robot") == 1


def test_prompts_are_filled_in():
    assert prompt_text("best", "mug").endswith("Focus on the robot arm and the mug.")
    assert prompt_text("Look at the {object}!", "door lock") == "Look at the door lock!"


# ------------------------------------------------------------------------------------ Molmo


def test_molmo_gets_the_inputs_of_its_own_processor():
    encoder = encoder_of("molmo")
    ids = encoder.begin.tolist()
    assert len(ids) == 317 and ids.count(514) == 288
    assert (
        ids[:3] == [0, 512, 514] and ids[14] == 515 and ids[158] == 513 and ids[159] == 512 and ids[-1] == 513
    )
    assert all(ids[position] == 514 for position in encoder.patches.flatten())
    half = np.full((1, 64, 64, 3), 255, np.uint8)
    half[:, :, 32:] = 0
    patches = encoder.pictures(half)[0].numpy().reshape(2, 24, 24, 14, 14, 3)
    assert np.array_equal(patches[0], patches[1]), "the tile is the whole picture"
    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    white, black = (1 - mean) / std, -mean / std
    assert np.allclose(patches[0, :, :11], white, atol=1e-5) and np.allclose(
        patches[0, :, 13:], black, atol=1e-5
    )
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    calls, hook = watch(encoder)
    for text in PROMPTS:
        run(encoder, half, [text])
    hook.remove()
    for text, given in zip(PROMPTS, calls, strict=True):
        assert encoder.tokenizer.decode(given["input_ids"][0, 317:]) == f" User: {text} Assistant:"
        assert (given["image_masks"][:, 0] == 1).all() and (given["image_masks"][:, 1] == -1).all()


def test_molmo_refuses_frames_that_its_processor_would_cut():
    encoder = encoder_of("molmo")
    encoder.fit_size(336)
    with pytest.raises(SystemExit, match="--encoder-size 336"):
        encoder_of("molmo").fit_size(400)
    encoder_of("molmo", size=336).fit_size(400)


def test_molmo_reads_a_folder_without_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer

    shutil.copytree(tiny_model("molmo"), tmp_path / "molmo")
    whole = Tokenizer.from_file(str(tmp_path / "molmo/tokenizer.json"))
    whole.model.save(str(tmp_path / "molmo"))  # vocab.json and merges.txt, as the old repositories have them
    added = json.loads(whole.to_str())["added_tokens"]
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    settings["auto_map"] = {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"}
    (tmp_path / "molmo/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "molmo/tokenizer.json").unlink()
    encoder = make_encoder(str(tmp_path / "molmo"), trust_remote_code=True)
    reference = encoder_of("molmo")
    assert encoder.encode(PROMPTS[0]) == reference.encode(PROMPTS[0])
    images = pictures(2)
    for cell, value in run(encoder, images).items():
        assert np.array_equal(value, run(reference, images)[cell])


# ------------------------------------------------------------------------------------ vision models and OTTER


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "otter"])
def test_an_image_is_embedded_alike_alone_and_in_a_batch(name):
    encoder = otter() if name == "otter" else encoder_of(name)
    images = pictures(3)
    batch, alone = run(encoder, images), run(encoder, images[1:2])
    assert set(batch) == set(alone)
    for cell, value in batch.items():
        assert np.allclose(value[1], alone[cell][0], rtol=1e-4, atol=1e-5 * np.abs(value).max()), cell
        assert np.abs(value[0] - value[1]).max() > 1e-6


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, other = (make_encoder("random", layers=(-1, -7), pools=("cls", "mean")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and one.name == "random" and not one.promptable
    images = pictures(3)
    first, second = (run(encoder, images, [""]) for encoder in (one, other))
    assert set(first) == {("", layer, pool) for layer in (-1, -7) for pool in ("cls", "mean")}
    for cell, value in first.items():
        assert np.array_equal(value, second[cell]) and value.shape == (3, 192)
    assert first["", -1, "mean"].std(0).mean() > 1e-3, "it tells pictures apart"


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_vision_models_pool_class_token_and_patches(name):
    pools = ("mean",) if name == "siglip" else ("cls", "mean")
    encoder, images = encoder_of(name, layers=(-1, -2, 0), pools=pools), pictures(2)
    result = run(encoder, images, [""])
    with torch.inference_mode():
        out = encoder.model(pixel_values=encoder.pixels(images), output_hidden_states=True)
    for layer, state in ((-1, out.last_hidden_state), (-2, out.hidden_states[-2]), (0, out.hidden_states[0])):
        state = state.numpy()
        first = len(pools) - 1
        assert state.shape[1] == 16 + first
        assert np.allclose(result["", layer, "mean"], state[:, first:].mean(1), atol=1e-6)
        assert first == 0 or np.allclose(result["", layer, "cls"], state[:, 0])


def otter(**flags: object) -> pretrained.Otter:
    return make_encoder(f"otter:{tiny_model('clip')}", **flags)


def test_otter_reads_the_last_attention_before_residual_and_mlp():
    encoder, images = otter(), pictures(2)
    block, seen = encoder.model.vision_model.encoder.layers[-1], {}

    def keep(_, args, kwargs, output):
        seen.update(x=args[0] if args else kwargs["hidden_states"], y=output)

    hook = block.register_forward_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        attention, p = encoder.patches(encoder.pixels(images))
        hook.remove()
        y = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
        middle = seen["x"] + attention
        assert torch.allclose(y, middle + block.mlp(block.layer_norm2(middle)), atol=1e-6)
        assert not torch.allclose(y, middle, atol=1e-3)
        normed = encoder.model.vision_model.post_layernorm(attention[:, 1:])
        x = normed @ encoder.model.visual_projection.weight.T
        assert torch.allclose(p, x / x.norm(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("text", [PROMPTS[0], "zq " * 40])
def test_otter_is_its_formula(text):
    encoder, images = otter(otter_temperature=0.2), pictures(2)
    assert encoder.name == "otter-clip-t0.2" and encoder.record()["temperature"] == 0.2
    got = run(encoder, images, [text])[text, -1, "mean"]
    with torch.inference_mode():
        p = encoder.patches(encoder.pixels(images))[1].numpy()
        ids = encoder.tokenizer(text, truncation=True, max_length=77)["input_ids"]
        assert (ids[0], ids[-1]) == (0, 1)
        h = encoder.model.text_model(torch.tensor([ids])).last_hidden_state[0]
        t = encoder.model.text_projection(h)[1 : min(16, len(ids) - 1)].numpy()
    t /= np.linalg.norm(t, axis=1, keepdims=True)
    assert len(t) == 15 or len(t) == len(ids) - 2
    for b in range(2):
        f = []
        for token in t:
            a = np.exp(p[b] @ token / 0.2)
            f.append((a / a.sum()) @ p[b])
        assert np.allclose(got[b], np.mean(f, 0), atol=1e-5)
    sharper = run(otter(), images, [text])[text, -1, "mean"]
    assert not np.allclose(got, sharper, atol=1e-4)


# ------------------------------------------------------------------------------------ refusals


def refused(name: object, **flags: object) -> str:
    """The one line with which make_encoder, and one image, are refused."""
    with pytest.raises(SystemExit) as error:
        run(make_encoder(str(name), **flags), pictures(1))
    line = str(error.value)
    assert "\n" not in line and ("--encoder" in line or "encoder " in line)
    return line


def test_an_encoder_decoder_as_language_model_is_refused(tmp_path):
    config = {"model_type": "blip-2", "use_decoder_only_language_model": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "encoder-decoder" in refused(tmp_path)


def test_molmo_runs_remote_code_only_when_asked():
    line = refused(tiny_model("molmo"))
    assert "--trust-remote-code" in line and "your rights" in line


def hub_copy(cache: Path, model: str, folder: Path, monkeypatch) -> str:
    """Lays a folder out as the hub's client does; returns its commit."""
    commit = "0123456789" * 4
    place = cache / f"models--{model.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    return commit


def test_other_molmos_demand_a_pinned_revision(tmp_path, monkeypatch):
    commit = hub_copy(tmp_path, "someone/GraspMolmo", tiny_model("molmo"), monkeypatch)
    with pytest.raises(SystemExit, match="pin it with --model-revision"):
        encoder_config("someone/GraspMolmo", trust_remote_code=True)
    assert encoder_config("someone/GraspMolmo", True, commit)["revision"] == commit


CRAFTED = {  # native checkpoints that name code of their own where transformers' own class does not do
    "llava": (
        "processor_config.json",
        {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}},
    ),
    "dinov2": (
        "preprocessor_config.json",
        {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}},
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_nothing_asks_whether_to_run_code(name, tmp_path, monkeypatch):
    """Without the flag nobody is asked [y/N], and nothing of the checkpoint's is run."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    shutil.copytree(tiny_model(name), tmp_path / "model")
    (tmp_path / "model/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    place, content = CRAFTED[name]
    path = tmp_path / "model" / place
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    line = refused(tmp_path / "model")
    assert "custom code" in line and not asked and not (tmp_path / "ran").exists()


def test_molmos_tokenizer_does_not_ask_again(monkeypatch):
    load, trusted = transformers.AutoTokenizer.from_pretrained, []

    def watched(*args, **options):
        trusted.append(options.get("trust_remote_code"))
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", watched)
    encoder_of("molmo")
    assert trusted == [True]


class RunsWhenLoaded:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple:
        return (open, (str(self.place), "w"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    shutil.copytree(tiny_model("dinov2"), tmp_path / "dinov2")
    (tmp_path / "dinov2/model.safetensors").unlink()
    torch.save({"x": RunsWhenLoaded(tmp_path / "ran")}, tmp_path / "dinov2/pytorch_model.bin")
    assert "does not load" in refused(tmp_path / "dinov2")
    assert not (tmp_path / "ran").exists()


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.transformer.blocks.1.out.weight"
DAMAGES = {
    "missing": lambda t: t.pop(KEY),
    "unexpected": lambda t: t.update(extra=torch.zeros(2)),
    "not finite": lambda t: t[KEY].fill_(float("nan")),
    "mismatch|size": lambda t: t.update({KEY: torch.zeros(3, 3)}),
}


@pytest.mark.parametrize("hint", DAMAGES)
def test_molmos_weights_must_be_whole(hint, tmp_path):
    shutil.copytree(tiny_model("molmo"), tmp_path / "molmo")
    edit_weights(tmp_path / "molmo", DAMAGES[hint])
    line = refused(tmp_path / "molmo", trust_remote_code=True)
    assert any(word in line for word in hint.split("|")), line


def test_molmos_tokenizer_must_number_image_tokens_as_expected(tmp_path):
    shutil.copytree(tiny_model("molmo"), tmp_path / "molmo")
    path = tmp_path / "molmo/tokenizer.json"
    path.write_text(path.read_text().replace("<im_start>", "<im_strt>"))
    assert "image tokens" in refused(tmp_path / "molmo", trust_remote_code=True)


def test_a_native_model_with_a_tensor_missing_is_refused(tmp_path):
    shutil.copytree(tiny_model("llava"), tmp_path / "llava")
    edit_weights(tmp_path / "llava", lambda t: t.pop(next(name for name in t if "q_proj" in name)))
    assert "missing" in refused(tmp_path / "llava")


def test_encoders_that_do_not_load_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "does not load" in refused(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"model_type": "bert"}')
    assert "'bert'" in refused(tmp_path / "empty")
    assert "does not load" in refused("nobody/no-such-model")  # offline here: not in the hub's cache
    assert "no folder './nowhere'" in refused("./nowhere") and "did you mean oracle" in refused("oracel")
    assert "both halves" in refused(f"otter:{tiny_model('dinov2')}")
    for flags, hint in (({"layers": (7,)}, "-4 to 3"), ({"pools": ("cls",)}, "text, last, image, all")):
        assert hint in refused(tiny_model("llava"), **flags)
    assert "it has mean" in refused(tiny_model("siglip"), pools=("cls",))
    assert "it has -1" in refused(f"otter:{tiny_model('clip')}", layers=(0,))
    assert "--blank" in refused("oracle", blank="oracle")

    def needs_torchvision(**_):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library\nbut it was not found.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs_torchvision)
    assert "missing: torchvision" in refused(tiny_model("llava"))


# ------------------------------------------------------------ what a slip of one line would change


def test_register_tokens_are_no_patches(tmp_path):
    shutil.copytree(tiny_model("dinov2"), tmp_path / "dino")
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    config = transformers.Dinov2WithRegistersConfig(**size, num_register_tokens=3)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    encoder, images = make_encoder(str(tmp_path / "dino")), pictures(2)
    with torch.inference_mode():
        states = encoder.model(pixel_values=encoder.pixels(images)).last_hidden_state
    assert states.shape[1] == 1 + 3 + 16
    assert np.allclose(run(encoder, images, [""])["", -1, "mean"], states[:, 4:].mean(1), atol=1e-6)


def test_random_weights_do_not_depend_on_what_was_drawn_before():
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(next(make_encoder("random").model.parameters()))
    assert torch.equal(*weights)
