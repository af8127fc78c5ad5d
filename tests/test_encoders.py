"""Encoders of collect.py on tiny random models of the real architectures, and their cache. No network, no real weights."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, refusal, run_script
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

import collect
import lam_vlm
from collect import Args, make_encoder

PROMPTS = ["Focus on the robot arm and the drawer.", "Describe the image."]
POOLS = ("image", "text", "last", "all")
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
SQUARE = {"size": {"height": 56, "width": 56}}

# ------------------------------------------------------------------------------------------------ tiny models, built here


def words(special: list[str], size: int = 300) -> Tokenizer:
    """Byte-level BPE: reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(PROMPTS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    return tokenizer


def fast_tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = words([*marks.values(), "<image>", *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **marks, extra_special_tokens=named or ["<image>", *special], padding_side="left"
    )


def chat(image: str) -> str:
    part = "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
    turn = "{{ m['role'] }}: {% for c in m['content'] %}" + part + "{% endfor %}\n"
    return "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def llava(folder: Path) -> None:
    tokenizer = fast_tokenizer()
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=3, **TEXT)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=4, image_seq_length=16
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    processor = transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )
    save(folder, transformers.LlavaForConditionalGeneration(config), processor)


def idefics3(folder: Path) -> None:
    tokenizer = fast_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>")
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=3, **TEXT)
    config = transformers.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=4, scale_factor=2, pad_token_id=3)
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=chat("<image>"))
    save(folder, transformers.Idefics3ForConditionalGeneration(config), processor)


def paligemma(folder: Path, template: str | None = chat("<image>")) -> None:
    pictures = transformers.SiglipImageProcessorPil(**SQUARE)
    pictures.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pictures, fast_tokenizer(), chat_template=template)
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
    text = {"model_type": "gemma", "vocab_size": len(processor.tokenizer), "head_dim": 8, "pad_token_id": 3, **TEXT}
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=32, hidden_size=32, image_token_index=image
    )
    save(folder, transformers.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> None:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = fast_tokenizer(*named.values(), **named)
    boi, eoi, image = tokenizer.convert_tokens_to_ids(list(named.values()))
    text = {"vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 256, "pad_token_id": 3, **TEXT}
    ids = {"boi_token_index": boi, "eoi_token_index": eoi, "image_token_index": image}
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **ids)
    )
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros: the image would be ignored
    pictures = transformers.Gemma3ImageProcessorPil(**SQUARE)
    save(folder, model, transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4, chat_template=chat("<start_of_image>")))


def clip(folder: Path) -> None:
    tokenizer = words(["<|startoftext|>", "<|endoftext|>"])
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    around = "<|startoftext|> $A <|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    text = {**TEXT, "vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 77}
    text.pop("num_key_value_heads")
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    save(
        folder,
        transformers.CLIPModel(config),
        fast,
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"]),
    )


def siglip(folder: Path) -> None:
    text = {**TEXT, "vocab_size": 50}
    text.pop("num_key_value_heads")
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    save(folder, transformers.SiglipModel(config), transformers.SiglipImageProcessorPil(**SQUARE))


def dinov2(folder: Path) -> None:
    config = transformers.Dinov2Config(**{**VISION, "mlp_ratio": 2})
    pictures = transformers.BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    save(folder, transformers.Dinov2Model(config), pictures)


def save(folder: Path, model: torch.nn.Module, *parts: object) -> None:
    for part in (model, *parts):
        part.save_pretrained(folder)


MOLMO_CONFIG = """
from transformers import PretrainedConfig
class MolmoConfig(PretrainedConfig):
    model_type = "molmo"
    def __init__(self, hidden_size=32, num_hidden_layers=3, vocab_size=512, **rest):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        super().__init__(tie_word_embeddings=False, **rest)
"""
MOLMO_MODEL = """
from typing import NamedTuple
import einops, torch
from torch import nn
from transformers import PreTrainedModel
from .config_molmo import MolmoConfig
class MolmoOutput(NamedTuple):
    logits: torch.Tensor
    attn_key_values: list | None
    hidden_states: tuple | None
class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
    def forward(self, x, mask, layer_past=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k], 1), torch.cat([layer_past[1], v], 1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)), (k, v)
class Core(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, blocks = c.hidden_size, [Block(c.hidden_size) for _ in range(c.num_hidden_layers)]
        parts = {"wte": nn.Embedding(c.vocab_size + 128, d), "blocks": nn.ModuleList(blocks), "ln_f": nn.LayerNorm(d)}
        self.transformer, self.vision = nn.ModuleDict(parts), nn.Linear(588, d)
    def forward(self, input_ids, attention_mask=None, images=None, image_masks=None, image_input_idx=None, position_ids=None,
                past_key_values=None, use_cache=False, last_logits_only=False, output_hidden_states=False):
        assert images is None or past_key_values is None, "Cached key and values should not be used with images."
        past = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        x = self.transformer["wte"](input_ids)
        place = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        x = x + 0.1 * torch.sin(place[..., None] * torch.arange(1, x.shape[2] + 1) / 50)
        if images is not None:
            patches = self.vision(images) + image_masks[..., None]
            patches = einops.reduce(patches, "b n (h p w q) d -> b (n h w) d", "mean", h=12, p=2, w=12, q=2)
            rows = torch.arange(len(x))[:, None].expand(-1, 288)
            x = x.index_put((rows, image_input_idx.flatten(1)), patches, accumulate=True)
        length = past + x.shape[1]
        mask, states, kept = torch.ones(length, length, dtype=torch.bool).tril()[past:], [], []
        for k, block in enumerate(self.transformer["blocks"]):
            states.append(x)
            x, cache = block(x, mask, layer_past=past_key_values[k] if past else None)
            kept.append(cache)
        x = self.transformer["ln_f"](x[:, -1:] if last_logits_only else x)
        return MolmoOutput(x, kept if use_cache else None, (*states, x) if output_hidden_states else None)
class MolmoForCausalLM(PreTrainedModel):
    config_class, base_model_prefix = MolmoConfig, "model"
    def __init__(self, config):  # as in Molmo: no post_init, and memory-efficient attention off
        super().__init__(config)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        self.model = Core(config)
    def tie_weights(self):  # as in Molmo: takes no arguments
        pass
"""


def molmo(folder: Path) -> None:
    """A folder with the entry points of Molmo-7B-D and its traps for transformers 5. No line of Molmo's is in it."""
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder.mkdir()
    (folder / "config_molmo.py").write_text(MOLMO_CONFIG)
    (folder / "modeling_molmo.py").write_text(MOLMO_MODEL)
    (folder / "config.json").write_text(json.dumps({"model_type": "molmo", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 512}))
    tokenizer = words(["<|endoftext|>"])
    tokenizer.add_special_tokens([AddedToken(f"<fill{k}>", special=True) for k in range(512 - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    model_class = get_class_from_dynamic_module("modeling_molmo.MolmoForCausalLM", str(folder))
    save_file(model_class(model_class.config_class()).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


BUILDERS = {f.__name__: f for f in (llava, idefics3, paligemma, gemma3, clip, siglip, dinov2, molmo)}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(name) -> folder of a random model, made once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def build(name: str) -> Path:
        torch.manual_seed(0)
        BUILDERS[name](root / name)
        return root / name

    return build


def pictures(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def encoder_of(source: object, **flags: object) -> collect.Pretrained:
    return make_encoder(replace(Args(), encoder=str(source), trust_remote_code=True, **flags))


def run(encoder: collect.Pretrained, images: np.ndarray, texts: list[str] | None = None) -> dict:
    return encoder(images, texts or PROMPTS, None, "drawer-open")


# ------------------------------------------------------------------------------------------------ encoders

VLMS = ("llava", "idefics3", "paligemma", "gemma3", "molmo")


@pytest.mark.parametrize("name", VLMS)
def test_prompts_reach_the_pools_that_can_see_them(name, tiny_model):
    """Causal attention, image first: image tokens do not depend on the prompt at all. PaliGemma's prefix attends both ways."""
    encoder, images = encoder_of(tiny_model(name), pools=POOLS), pictures(3)
    texts = ["qqqq qqqq", "zzzz zzzz"]  # equally many tokens: sums of another length would be rounded in another order
    one, other = (run(encoder, images, [text]) for text in texts)
    for pool in POOLS:
        a, b = one[texts[0], -2, pool], other[texts[1], -2, pool]
        assert a.shape == (3, 32) and a.dtype == np.float32
        assert np.array_equal(a, b) == (pool == "image" and name != "paligemma"), pool
        assert np.abs(a[0] - a[1]).max() > 1e-6 * np.abs(a).max(), f"{pool} does not see the picture"


@pytest.mark.parametrize("name", [*VLMS, "clip", "siglip", "dinov2", "otter"])
def test_an_image_is_embedded_alike_alone_and_in_a_batch(name, tiny_model):
    encoder = encoder_of(f"otter:{tiny_model('clip')}") if name == "otter" else encoder_of(tiny_model(name))
    images = pictures(3)
    batch, alone = run(encoder, images), run(encoder, images[1:2])
    assert set(batch) == set(alone)
    for cell, value in batch.items():
        assert np.allclose(value[1], alone[cell][0], rtol=1e-4, atol=1e-5 * np.abs(value).max()), cell
        assert np.abs(value[0] - value[1]).max() > 1e-6


@pytest.mark.parametrize("name", VLMS)
def test_layers_and_pools_are_those_of_hidden_states(name, tiny_model):
    """Against output_hidden_states of the model itself, pooled by hand."""
    layers = (-4, -2, -1, 0, 3)
    encoder, images, text = encoder_of(tiny_model(name), layers=layers, pools=POOLS), pictures(2), PROMPTS[0]
    caught, core = [], encoder.model.model if name == "molmo" else encoder.model
    hook = core.register_forward_pre_hook(lambda _, args, kwargs: caught.append(kwargs), with_kwargs=True)
    result = run(encoder, images, [text])
    hook.remove()
    with torch.inference_mode():
        states = core(
            **(caught[0] | {"output_hidden_states": True} | ({"last_logits_only": False} if name == "molmo" else {}))
        ).hidden_states
    assert encoder.blocks is not None, "the model has to keep the states of every layer"
    assert len(states) == 4 and len(result) == len(layers) * len(POOLS)
    ids = caught[0]["input_ids"][0]
    image = (ids == (514 if name == "molmo" else encoder.image_id)).numpy()
    assert image.sum() == {"llava": 16, "idefics3": 4, "paligemma": 16, "gemma3": 4, "molmo": 288}[name]
    rest = np.arange(len(ids)) >= 317 if name == "molmo" else ~image
    for layer in layers:
        state = states[layer].numpy()
        expected = {"image": state[:, image].mean(1), "text": state[:, rest].mean(1), "last": state[:, -1], "all": state.mean(1)}
        for pool, value in expected.items():
            assert np.allclose(result[text, layer, pool], value, rtol=1e-4, atol=1e-5), (layer, pool)


def test_molmo_gets_the_inputs_of_its_own_processor(tiny_model):
    encoder = encoder_of(tiny_model("molmo"))
    ids = encoder.prefix.tolist()
    assert len(ids) == 317 and ids[:3] == [0, 512, 514] and ids[158] == 513 and ids[159] == 512 and ids[14] == 515 and ids[-1] == 513
    assert ids.count(514) == 288 and all(ids[position] == 514 for position in encoder.patches.flatten())
    grey = np.full((1, 64, 64, 3), 255, np.uint8)
    grey[:, :, 32:] = 0
    patches = encoder.pictures(grey)[0].numpy().reshape(2, 24, 24, 14, 14, 3)
    assert np.array_equal(patches[0], patches[1]), "the tile is the whole picture"
    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    white, black = (1 - mean) / std, -mean / std
    assert np.allclose(patches[0, :, :11], white, atol=1e-5) and np.allclose(patches[0, :, 13:], black, atol=1e-5)
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    caught = []
    encoder.model.model.register_forward_pre_hook(lambda _, args, kwargs: caught.append(kwargs), with_kwargs=True)
    for text in PROMPTS:
        run(encoder, grey, [text])
    for text, given in zip(PROMPTS, caught, strict=True):
        assert encoder.tokenizer.decode(given["input_ids"][0, 317:]) == f" User: {text} Assistant:"
        assert (given["image_masks"][:, 0] == 1).all() and (given["image_masks"][:, 1] == -1).all()


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "molmo"])
def test_a_shared_image_pass_equals_full_passes(name, tiny_model, capsys):
    encoder, images = encoder_of(tiny_model(name), layers=(-2, -1), pools=POOLS), pictures(3)
    full = {cell: value for text in PROMPTS for cell, value in run(encoder, images, [text]).items()}
    lengths = []
    core = encoder.model.model if name == "molmo" else encoder.model
    hook = core.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    shared = run(encoder, images)
    lengths.clear()
    shared = run(encoder, images)
    hook.remove()
    assert encoder.reuse and len(lengths) == 3 and "cannot share" not in capsys.readouterr().out, "the image and two prompts, once each"
    for cell, value in full.items():
        assert np.allclose(shared[cell], value, rtol=1e-4, atol=1e-5 * np.abs(value).max()), cell


@pytest.mark.parametrize("fault", ["prefix attends both ways", "no cache"])
def test_where_sharing_fails_full_passes_are_made(fault, tiny_model, capsys, monkeypatch):
    encoder, images = encoder_of(tiny_model("paligemma" if fault != "no cache" else "llava"), pools=POOLS), pictures(2)
    full = {cell: value for text in PROMPTS for cell, value in run(encoder, images, [text]).items()}
    if fault == "no cache":
        monkeypatch.setattr(encoder, "reused", lambda *_: (1 / 0 for _ in "x"))
    both = run(encoder, images)
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot share" in line]
    assert encoder.reuse is False and len(lines) == 1
    for cell, value in full.items():
        assert np.allclose(both[cell], value, rtol=1e-4, atol=1e-5 * np.abs(value).max()), cell


def test_a_model_without_chat_template_gets_image_then_text(tiny_model, tmp_path):
    torch.manual_seed(0)
    paligemma(tmp_path / "plain", template=None)
    encoder = encoder_of(tmp_path / "plain")
    ids = encoder.inputs(pictures(2), PROMPTS[0])["input_ids"]
    assert ids.shape[0] == 2 and (ids == encoder.image_id).sum() == 32
    assert "Focus on the robot" in encoder.processor.tokenizer.decode(ids[0])
    a, b = (run(encoder, pictures(2), [text])[text, -2, "text"] for text in PROMPTS)
    assert not np.allclose(a, b)


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, other = (encoder_of("random", layers=(-1, -7), pools=("cls", "mean")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and one.name == "random" and not one.promptable
    images = pictures(3)
    first, second = (run(encoder, images, [""]) for encoder in (one, other))
    assert set(first) == {("", layer, pool) for layer in (-1, -7) for pool in ("cls", "mean")}
    assert all(np.array_equal(first[cell], second[cell]) and first[cell].shape == (3, 192) for cell in first)
    assert first["", -1, "mean"].std(0).mean() > 1e-3, "it tells pictures apart"


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_vision_models_pool_class_token_and_patches(name, tiny_model):
    pools = ("mean",) if name == "siglip" else ("cls", "mean")
    encoder, images = encoder_of(tiny_model(name), layers=(-1, -2, 0), pools=pools), pictures(2)
    result = run(encoder, images, [""])
    with torch.inference_mode():
        out = encoder.model(pixel_values=encoder.pixels(images), output_hidden_states=True)
    for layer, state in ((-1, out.last_hidden_state), (-2, out.hidden_states[-2]), (0, out.hidden_states[0])):
        state = state.numpy()
        first = len(pools) - 1
        assert state.shape[1] == 16 + first
        assert np.allclose(result["", layer, "mean"], state[:, first:].mean(1), atol=1e-6)
        assert first == 0 or np.allclose(result["", layer, "cls"], state[:, 0])


def test_otter_reads_the_last_attention_before_residual_and_mlp(tiny_model):
    encoder, images = encoder_of(f"otter:{tiny_model('clip')}"), pictures(2)
    block, seen = encoder.model.vision_model.encoder.layers[-1], {}
    hook = block.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(x=args[0] if args else kwargs["hidden_states"], y=out), with_kwargs=True
    )
    with torch.inference_mode():
        attention, p = encoder.patches(images)
        hook.remove()
        y = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
        middle = seen["x"] + attention
        assert torch.allclose(y, middle + block.mlp(block.layer_norm2(middle)), atol=1e-6)
        assert not torch.allclose(y, middle, atol=1e-3)
        x = encoder.model.vision_model.post_layernorm(attention[:, 1:]) @ encoder.model.visual_projection.weight.T
        assert torch.allclose(p, x / x.norm(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("text", [PROMPTS[0], "zq " * 40])
def test_otter_is_its_formula(text, tiny_model):
    encoder, images = encoder_of(f"otter:{tiny_model('clip')}", otter_temperature=0.2), pictures(2)
    got = run(encoder, images, [text])[text, -1, "mean"]
    with torch.inference_mode():
        p = encoder.patches(images)[1].numpy()
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
    sharper = run(encoder_of(f"otter:{tiny_model('clip')}"), images, [text])[text, -1, "mean"]
    assert not np.allclose(got, sharper, atol=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


def refused(capsys, source: object, **flags: object) -> str:
    """The one line with which make_encoder, and one image, are refused."""
    with pytest.raises(SystemExit) as error:
        run(make_encoder(replace(Args(), encoder=str(source), **flags)), pictures(1))
    line = str(error.value)
    assert line.startswith("collect.py: ") and "\n" not in line
    return line


def test_molmo_runs_remote_code_only_when_asked(tiny_model, capsys):
    line = refused(capsys, tiny_model("molmo"))
    assert "--trust-remote-code" in line and "your rights" in line


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
def test_molmos_weights_must_be_whole(hint, tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model("molmo"), tmp_path / "molmo")
    edit_weights(tmp_path / "molmo", DAMAGES[hint])
    line = refused(capsys, tmp_path / "molmo", trust_remote_code=True)
    assert any(word in line for word in hint.split("|")), line


def test_molmos_tokenizer_must_number_image_tokens_as_expected(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model("molmo"), tmp_path / "molmo")
    path = tmp_path / "molmo/tokenizer.json"
    path.write_text(path.read_text().replace("<im_start>", "<im_strt>"))
    assert "image tokens" in refused(capsys, tmp_path / "molmo", trust_remote_code=True)


def test_a_native_model_with_a_tensor_missing_is_refused(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model("llava"), tmp_path / "llava")
    edit_weights(tmp_path / "llava", lambda t: t.pop(next(name for name in t if "q_proj" in name)))
    assert "missing" in refused(capsys, tmp_path / "llava")


def test_encoders_that_do_not_load_are_one_line(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "does not load" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"model_type": "bert"}')
    assert "'bert'" in refused(capsys, tmp_path / "empty")
    assert "does not load" in refused(capsys, "nobody/no-such-model")  # offline here: not in the hub's cache
    assert "both halves" in refused(capsys, f"otter:{tiny_model('dinov2')}")
    for flags, hint in (({"layers": (7,)}, "-4 to 3"), ({"pools": ("cls",)}, "image, text, last, all")):
        assert hint in refused(capsys, tiny_model("llava"), **flags)
    assert "it has mean" in refused(capsys, tiny_model("siglip"), pools=("cls",))
    assert "it has -1" in refused(capsys, f"otter:{tiny_model('clip')}", layers=(0,))

    def needs_torchvision(**_):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found\nin your environment.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs_torchvision)
    assert "missing: torchvision" in refused(capsys, tiny_model("llava"))


# ------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data set that a test may change, without embeddings."""
    shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("embeddings"))
    return tmp_path / "data"


def embed(data: Path, source: object, **flags: object) -> list[Path]:
    """Embeds the data set; the .json files of its first shard."""
    args = replace(Args(), encoder=str(source), trust_remote_code=True, **flags)
    collect.embed(args, data, collect.read_meta(data))
    return sorted((data / "drawer-open/shard_00000/embeddings").glob("*.json"))


@pytest.mark.parametrize("name", ["llava", "molmo", "dinov2", "otter"])
def test_embeddings_are_those_of_the_frames_and_lam_vlm_finds_them(name, data, tiny_model):
    source = f"otter:{tiny_model('clip')}" if name == "otter" else tiny_model(name)
    pools = {"llava": ("text", "last")}.get(name, ())
    paths = embed(data, source, prompt=("best", "Look!") if name != "molmo" else ("arm",), pools=pools)
    encoder = encoder_of(source, pools=pools)
    assert len(paths) == {"llava": 4, "molmo": 1, "dinov2": 1, "otter": 2}[name]
    frames = np.load(data / "drawer-open/shard_00000/frames.npy")
    for path in paths:
        about, cached = json.loads(path.read_text()), np.load(path.with_suffix(".npy"))
        text = "" if name == "dinov2" else collect.prompt_text(about["prompt"], "drawer-open")
        expected = run(encoder, frames[5:8], [text])[text, about["layer"], about["pool"]]
        assert about["text"] == text and len(cached) == len(frames) and cached.dtype == np.float16 and about["dim"] == cached.shape[1]
        assert np.allclose(cached[5:8], expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
        words = {"encoder", "id", "revision", "full_revision", "transformers", "text", "layer", "pool", "frames_sha256", "guard", "dtype"}
        assert words <= set(about) and about["transformers"] == transformers.__version__ and len(about["guard"]) == 8
        start = {"otter": "otter-clip"}.get(name, name) + ("_noprompt_" if name == "dinov2" else "_")
        assert path.stem.startswith(start) and path.stem.endswith(f"_L{about['layer']}_{about['pool']}_r{encoder.revision}")
        assert "/" not in about["id"], "where a local model lies is nobody's business"
    folders = sorted((data / "drawer-open").glob("shard_*"))
    assert lam_vlm.Dataset.find_key(folders, paths[0].stem) == paths[0].stem


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("key", ["full_revision", "text", "frames_sha256", "guard", "dtype", "id"])
def test_foreign_embeddings_are_refused(key, data, tiny_model):
    path = embed(data, tiny_model("dinov2"))[0]
    embed(data, tiny_model("dinov2"))
    about = json.loads(path.read_text())
    change(path, **{key: [2 * x for x in about["guard"]] if key == "guard" else "other"})
    with pytest.raises(SystemExit, match=f"made with other .*{key}.*delete it"):
        embed(data, tiny_model("dinov2"))
    change(path, **{key: about[key]}, transformers="4.0")
    embed(data, tiny_model("dinov2"))  # another version with the same guard is the same model


def test_another_model_gets_another_key_and_its_guard_differs(data, tiny_model, tmp_path):
    shutil.copytree(tiny_model("dinov2"), tmp_path / "dinov2")
    edit_weights(tmp_path / "dinov2", lambda t: t["encoder.layer.1.mlp.fc1.weight"].mul_(3))
    first = embed(data, tiny_model("dinov2"))
    both = embed(data, tmp_path / "dinov2")
    assert len(both) == 2 and first[0] in both
    guards = [json.loads(path.read_text())["guard"] for path in both]
    assert not np.allclose(*guards, atol=0.02 * np.abs(guards).max())


def test_repeated_frames_are_computed_once(data, tiny_model, monkeypatch):
    shard = data / "drawer-open/shard_00000"
    frames = np.load(shard / "frames.npy")
    frames[10:20], frames[30] = frames[9], frames[3]
    np.save(shard / "frames.npy", frames)
    plain = embed(data, tiny_model("dinov2"), embedding_dtype="float32")[0]
    seen, call = [], collect.Pretrained.__call__
    monkeypatch.setattr(collect.Pretrained, "__call__", lambda self, images, *rest: seen.append(len(images)) or call(self, images, *rest))
    for path in data.rglob("embeddings/*"):
        path.unlink()
    embed(data, tiny_model("dinov2"), embedding_dtype="float32")
    distinct = [len(np.unique(np.load(f).reshape(-1, 32 * 32 * 3), axis=0)) for f in sorted(data.rglob("frames.npy"))]
    assert sum(seen) == 1 + sum(distinct) and distinct[0] <= len(frames) - 11, "the guard's picture, and each distinct frame"
    array = np.load(plain.with_suffix(".npy"))
    assert array.dtype == np.float32 and (array[9:20] == array[9]).all() and (array[30] == array[3]).all() and (array[8] != array[9]).any()
    expected = run(encoder_of(tiny_model("dinov2")), frames[[3, 25, -1]], [""])["", -1, "mean"]
    assert np.allclose(array[[3, 25, -1]], expected, atol=1e-5)


def test_embedding_goes_on_within_a_shard(data, tiny_model, monkeypatch):
    """Cut off after two batches: the same command computes the others alone, and the files are those of an uninterrupted one."""
    monkeypatch.setattr(collect, "HALF_DONE_SECONDS", 0)
    flags = {"prompt": ("best", "blind"), "encoder_batch": 16}
    paths = embed(data, tiny_model("llava"), **flags)
    whole, calls, pooled = [path.with_suffix(".npy").read_bytes() for path in paths], [], collect.NativeVLM.pooled
    for path in data.rglob("embeddings/*"):
        path.unlink()

    def cut_off(encoder, images, texts):
        calls.append(len(images))
        if len(calls) == limit:
            raise KeyboardInterrupt
        return pooled(encoder, images, texts)

    monkeypatch.setattr(collect.NativeVLM, "pooled", cut_off)
    limit = 4  # the guard picture, two batches, and no third
    with pytest.raises(KeyboardInterrupt):
        embed(data, tiny_model("llava"), **flags)
    assert [path.name[:6] for path in data.rglob("embeddings/*")] == [".half_"]
    calls, limit = [], 0
    assert embed(data, tiny_model("llava"), **flags) == paths
    assert [path.with_suffix(".npy").read_bytes() for path in paths] == whole and not list(data.rglob(".half_*"))
    distinct = [len(np.unique(np.load(f).reshape(-1, 32 * 32 * 3), axis=0)) for f in sorted(data.rglob("frames.npy"))]
    assert sum(calls) == 1 + sum(distinct) - 32


def test_out_of_memory_halves_the_batch(data, tiny_model, monkeypatch, capsys):
    expected = np.load(embed(data, tiny_model("dinov2"))[0].with_suffix(".npy"))
    for path in data.rglob("embeddings/*"):
        path.unlink()
    pooled = collect.VisionModel.pooled

    def small(self, images, texts):
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return pooled(self, images, texts)

    monkeypatch.setattr(collect.VisionModel, "pooled", small)
    limit = 5
    path = embed(data, tiny_model("dinov2"), encoder_batch=16)[0]
    assert np.allclose(np.load(path.with_suffix(".npy")), expected, atol=2e-3)
    assert "batches of 4" in "".join(capsys.readouterr())
    for path in data.rglob("embeddings/*"):
        path.unlink()
    encoder, limit = encoder_of(tiny_model("dinov2")), 0
    with pytest.raises(SystemExit, match="single image"):
        list(collect.encode(encoder, pictures(3), pictures(3), np.arange(3), [""], "drawer-open"))


def test_numbers_too_large_for_float16_are_refused(data, tiny_model, monkeypatch):
    pooled = collect.VisionModel.pooled
    monkeypatch.setattr(collect.VisionModel, "pooled", lambda *args: ((cell, value * 1e6) for cell, value in pooled(*args)))
    with pytest.raises(SystemExit, match="--embedding-dtype float32"):
        embed(data, tiny_model("dinov2"))
    embed(data, tiny_model("dinov2"), embedding_dtype="float32")


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_embeds_lists_and_refuses(tiny_data, tiny_model, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data/tiny")
    flags = [*TINY, "--out", "data/tiny"]
    cache, commit = tmp_path / "hub/models--someone--idefics3", "0123456789" * 4  # laid out as the hub's client does
    shutil.copytree(tiny_model("idefics3"), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    flags += ["--encoder", "someone/idefics3", "--layers", -2, -3, "--pools", "text", "last"]
    made = run_script("collect.py", *flags, cwd=tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert made.returncode == 0, made.stderr
    assert "image/s" in made.stderr and "idefics3_best_L-3_last_r01234567" in made.stdout
    unfinished = next((tmp_path / "data/tiny/drawer-open/shard_00001/embeddings").glob("idefics3_best_L-3_last*.json"))
    unfinished.unlink()
    listed = run_script("collect.py", "--list-embeddings", "--out", "data/tiny", cwd=tmp_path)
    assert listed.returncode == 0 and not listed.stderr
    rows = {line.split()[0]: line.split()[1:] for line in listed.stdout.splitlines()}
    assert len(rows) == 1 + 2 + 4
    size = sum(path.stat().st_size for path in (tmp_path / "data/tiny").rglob("oracle_blind_L0_all_r1.npy")) / 2**20
    assert rows["oracle_blind_L0_all_r1"] == ["oracle", "blind", "256", "3/3", f"{size:.2f}"]
    assert rows[unfinished.stem][:4] == ["someone/idefics3", "best", "32", "2/3"]
    assert "does not read" in refusal(run_script("collect.py", "--list-embeddings", "--out", "data/none", cwd=tmp_path))
    molmo, new = tiny_model("molmo"), tmp_path / "data/new"
    line = refusal(run_script("collect.py", *TINY, "--out", new, "--encoder", molmo, cwd=tmp_path))
    assert "--trust-remote-code" in line and not new.exists(), "refused before anything is collected"
    for source, hint in {"./nowhere": "no folder", "nobody/no-such-model": "does not load"}.items():
        with pytest.raises(SystemExit, match=hint):
            collect.main(collect.parse_args([*TINY, "--out", str(new), "--encoder", source]))
        assert not new.exists()


def test_the_oracle_and_collecting_need_no_torch(tiny_data, tmp_path):
    """The heavy imports are inside what needs them."""
    shutil.copytree(tiny_data, tmp_path / "data")
    flags = [*TINY, "--workers", "1", "--prompt", "arm", "--out", "data"]
    code = f"import collect, sys; collect.main(collect.parse_args({flags!r})); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
