"""Encoders with weights: vision-language models, Molmo, DINOv2, CLIP, SigLIP, OTTER, a ViT never trained."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import fail
from common.oracle import PROMPTS, Encoder, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# of a processor's output: what has a value for each token, (B, T, ...), and what else changes with the text
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
PER_PROMPT = (*PER_TOKEN, "qformer_input_ids", "qformer_attention_mask")
TILE_SWITCHES = {  # attributes of image processors that cut pictures into tiles -> value for whole ones
    "do_image_splitting": False,
    "crop_to_patches": False,
    "do_pan_and_scan": False,
    "split_image": False,
    "dynamic_hd": 1,
}
FEW_IMAGE_TOKENS = 64  # fewer than these say little about where things are
ENLARGED_SIZES = (112, 168, 224, 280, 336, 448, 512)  # tried in turn, until they give enough image tokens
SHARING_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # always allowed


class Pretrained(Encoder):
    """What the encoders with weights share.

    A subclass has `load`, which reads the model, `prepare`, which makes its inputs, and `pooled`, which runs
    it. `layer` indexes hidden_states (0: embeddings, -1: after the last block). Weights are bfloat16 on CUDA,
    float32 elsewhere; pooling is done in float32.
    """

    known_pools = ("text", "last", "image", "all")
    layers, pools = (-2,), ("text",)
    prefix_of_name = ""
    shown_whole = False  # whether the cutting of pictures into tiles was switched off

    def __init__(self, name: str, config: dict, batch: int, size: int, split_tiles: bool, temperature: float):
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.batch = batch or 16
        if cuda:
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            self.dtype = torch.bfloat16
            self.batch = batch or 64
        self.arithmetic = str(self.dtype).removeprefix("torch.")
        self.path = name.removeprefix("otter:")
        self.revision = config["revision"]
        self.source = {"pretrained_model_name_or_path": self.path, "trust_remote_code": False}
        folder = Path(self.path)
        if folder.is_dir():
            self.id = folder.resolve().name  # where a local model lies is nobody's business
        else:
            self.id = self.path
            self.source["revision"] = self.revision
        last_part = Path(self.path).resolve().name
        self.name = self.prefix_of_name + re.sub("[^A-Za-z0-9.]+", "-", last_part).strip("-")
        self.size, self.split_tiles, self.temperature = size, split_tiles, None
        self.load(config, temperature)
        if size:
            self.name += f"-s{size}"
        if not split_tiles:
            if not self.shown_whole:
                fail(f"--encoder {self.path} cuts no picture into tiles: leave out --no-split-tiles")
            self.name += "-whole"
        self.model.eval().to(self.device)
        if self.depth:
            self.known_layers = tuple(range(-self.depth - 1, self.depth + 1))
        else:
            self.known_layers = (-1,)

    def record(self) -> dict:
        pictures = getattr(self, "processor", None)  # transformers takes torchvision's where it is installed
        pictures = getattr(pictures, "image_processor", pictures)
        return super().record() | {"processor": pictures and type(pictures).__name__}

    def read(self, model_class: type, strict: bool = False, **source: object) -> None:
        """Loads the weights. A tensor that the file lacks is refused: it would stay random, or NaN."""
        arguments = {"dtype": self.dtype, "output_loading_info": True}
        self.model, info = model_class.from_pretrained(**(source or self.source), **arguments)
        faults = ["missing_keys", "mismatched_keys"]
        if strict:
            faults.append("unexpected_keys")
        for fault in faults:
            if info[fault]:
                some = sorted(map(str, info[fault]))[:3]
                kind = fault.removesuffix("_keys")
                fail(f"--encoder {self.path}: the weights file has {kind} tensors: {some}")

    def embed(self, prepared: object) -> dict[tuple[str, int, str], np.ndarray]:
        with torch.inference_mode():
            result = {cell: value.float().cpu().numpy() for cell, value in self.pooled(prepared)}
        for (text, layer, pool), value in result.items():
            if not np.isfinite(value).all():
                cell = f"layer {layer}, pool {pool}, prompt {text!r}"
                fail(f"--encoder {self.path}: {cell} has numbers that are not finite")
        return result

    def resized(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) -> (B, size, size, 3), both uint8, if frames are to be resized."""
        if self.size in (0, images.shape[1]):
            return images
        return np.stack([resize(image, self.size) for image in images])

    def scaled(self, images: np.ndarray, size: int) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, size, size) float32, 0 to 1, on the device."""
        x = torch.tensor(images, device=self.device).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


def image_token(config: object) -> int | None:
    """Id of the token that stands for a piece of the picture; architectures keep it in different places."""
    for place in (config, getattr(config, "vision_config", None)):
        for attribute in ("image_token_id", "image_token_index"):
            if getattr(place, attribute, None) is not None:
                return getattr(place, attribute)
    return None


def hidden_states_of(output: object) -> tuple:
    """(B, T, D) of each layer; BLIP-2 keeps them a level deeper, Florence-2 has those of its encoder."""
    output = getattr(output, "language_model_outputs", output)
    states = getattr(output, "hidden_states", None)
    if states is None:
        states = output.encoder_hidden_states
    return states


def relative_difference(states: dict, others: dict) -> float:
    """{layer: (B, T, D)}: the worst token's distance over its length (some are a thousand times longer)."""
    worst = 0.0
    for layer, state in states.items():
        distance = (state.float() - others[layer].float()).norm(dim=-1)
        length = state.float().norm(dim=-1).clamp_min(1e-12)
        worst = max(worst, float((distance / length).max().nan_to_num(nan=torch.inf)))
    return worst


class NativeVLM(Pretrained):
    """A vision-language model of transformers' own: LLaVA, Idefics3, PaliGemma, Gemma3, Qwen-VL, Phi-4, ...

    Pools: `image` mean of the image tokens, `text` of the positions after the last of them, `last` the last
    token, `all` of all. Where attention is causal and the image comes first, image tokens cannot see the
    prompt: only `text` and `last` are promptable. Several prompts then share one pass over the image, see
    `states_of_prompts`.
    """

    family = "native_vlm"
    shares: bool | None = None  # not known yet
    window: int | None = None  # of sliding attention

    def load(self, config: dict, temperature: float) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
        from transformers.models.auto import modeling_auto

        self.processor = AutoProcessor.from_pretrained(**self.source)
        self.processor.tokenizer.padding_side = "left"  # so that the last position is the last token
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, str):  # some tell the date: other numbers every day
            self.processor.chat_template = re.sub(r"strftime_now\([^)]*\)", "'1 January 2026'", template)
        model_class = AutoModelForCausalLM  # Phi-4-multimodal
        if config["model_type"] in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            model_class = AutoModelForImageTextToText
        self.read(model_class)
        self.image_id = image_token(self.model.config)
        if self.image_id is None:
            fail(f"--encoder {self.path}: no image token in its config, so its pools are not defined")
        self.image_marks = (self.image_id,)  # the `text` pool begins after the last of these
        text_config = self.model.config.get_text_config()
        self.depth = text_config.num_hidden_layers
        self.window = getattr(text_config, "sliding_window", None)
        known = inspect.signature(self.model.forward).parameters
        self.run_arguments = {"output_hidden_states": True}
        if "logits_to_keep" in known:
            self.run_arguments["logits_to_keep"] = 1
        self.picture_options = {"device": self.device}
        if not self.split_tiles:
            self.keep_pictures_whole()
        self.image_before_text = ""
        self.add_image_token_if_needed()

    def keep_pictures_whole(self) -> None:
        """Switches off the cutting into tiles, by the name that this image processor has for it."""
        pictures = self.processor.image_processor
        for name, whole in TILE_SWITCHES.items():
            if hasattr(pictures, name):
                setattr(pictures, name, whole)
                self.picture_options[name] = whole  # some processors have a default of their own
                self.shown_whole = True
        if hasattr(pictures, "image_grid_pinpoints"):  # LLaVA-NeXT: the picture and one tile are the least
            side = self.model.config.vision_config.image_size
            pictures.image_grid_pinpoints = [[side, side]]
            self.model.config.image_grid_pinpoints = [[side, side]]
            self.shown_whole = True

    def add_image_token_if_needed(self) -> None:
        """Without a chat template some processors add the image tokens, others want one in the text."""
        grey = np.full((1, 64, 64, 3), 128, np.uint8)
        if getattr(self.processor, "chat_template", None) is None:
            try:
                inserted = self.image_tokens(grey) > 0
            except ValueError:  # "the number of images does not match the number of image tokens"
                inserted = False
            if not inserted:
                self.image_before_text = getattr(self.processor, "image_token", "<image>")
        if self.image_tokens(grey) == 0:
            fail(f"--encoder {self.path}: its processor makes no image token, so its pools are not defined")

    def image_tokens(self, images: np.ndarray) -> int:
        ids = self.inputs(images, "Describe the image.")["input_ids"][0]
        return int((ids == self.image_id).sum())

    def fit_size(self, frame_size: int) -> None:
        """Models of native resolution make 4 tokens of 64 px: a frame is enlarged where that gives more."""
        # of mllama one mark in the text stands for any picture
        if self.size or self.model.config.model_type == "mllama":
            self.size = self.size or frame_size
            return
        sizes = [frame_size, *(size for size in ENLARGED_SIZES if size > frame_size)]
        tokens = {}
        for size in sizes:
            tokens[size] = self.image_tokens(np.full((1, size, size, 3), 128, np.uint8))
            if tokens[size] >= FEW_IMAGE_TOKENS:
                break
        self.size = max(tokens, key=tokens.get)  # the smallest, where several give as many
        if tokens[self.size] < FEW_IMAGE_TOKENS:
            tqdm.write(f"encoder {self.name}: a frame is only {tokens[self.size]} image tokens")
        elif self.size != frame_size:
            tqdm.write(
                f"encoder {self.name}: a frame of {frame_size} px is {tokens[frame_size]} image tokens; "
                f"resized to {self.size} px it is {tokens[self.size]} (--encoder-size chooses another side)"
            )

    def inputs(self, images: np.ndarray, text: str) -> dict:
        """What the model takes, {name: tensor}. Torchvision's processors work on the device, PIL's do not."""
        pictures = [Image.fromarray(image) for image in images]
        options = {"padding": True, **self.picture_options}
        if getattr(self.processor, "chat_template", None):
            messages = []
            for picture in pictures:
                content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
                messages.append([{"role": "user", "content": content}])
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
        else:
            prompts = [self.image_before_text + text] * len(pictures)
            nested = [[picture] for picture in pictures]
            inputs = self.processor(images=nested, text=prompts, return_tensors="pt", **options)
        inputs.pop("labels", None)  # PaliGemma's processor makes some
        return dict(inputs.to(self.device, dtype=self.dtype))  # casts floating tensors only

    def prepare(self, images: np.ndarray, segments: np.ndarray | None, texts: list[str], object: str) -> dict:
        """{text: inputs}. Pictures of one size give equal tokens, so a further prompt is tokenised once."""
        images = self.resized(images)
        prepared = {texts[0]: self.inputs(images, texts[0])}
        for text in texts[1:]:
            inputs = dict(prepared[texts[0]])
            for name, value in self.inputs(images[:1], text).items():
                if name in PER_PROMPT:
                    inputs[name] = value.expand(len(images), *value.shape[1:])
            prepared[text] = inputs
        return prepared

    def run(self, inputs: dict, **options: object) -> tuple[dict, object]:
        """{layer: (B, T, D)} of the layers asked for, and the key/value cache."""
        output = self.model(**inputs, **self.run_arguments, **{"use_cache": False, **options})
        states = hidden_states_of(output)
        return {layer: states[layer] for layer in self.layers}, output.get("past_key_values")

    def run_rest(self, inputs: dict, begin: int, cache: object) -> dict:
        """{layer: (B, T - begin, D)} from position `begin` on; the cache has those before, and is left so.

        Without attention_mask: nothing is padded, and Qwen-VL refuses one that is longer than the ids.
        """
        rest = {"input_ids": inputs["input_ids"][:, begin:]}
        if "cross_attention_mask" in inputs:
            rest["cross_attention_mask"] = inputs["cross_attention_mask"][:, begin:]
        states, cache = self.run(rest, past_key_values=cache, use_cache=True)
        cache.crop(-rest["input_ids"].shape[1])  # negative: so many tokens are removed
        return states

    def states_of_prompts(self, prepared: dict) -> Iterator[dict]:
        """{layer: (B, T, D)} under each prompt.

        The beginning that all prompts share, the image in it, is run once, and each prompt's own tokens
        after its key/value cache: a further prompt is about 15 times cheaper. Only where that equals
        full passes; else each prompt gets one.
        """
        begin = 0
        if len(prepared) > 1:
            if self.shares is None:
                self.shares = self.may_share()
            if self.shares:
                begin = self.shared_tokens(list(prepared.values()))
        if begin:
            yield from self.shared_states(list(prepared.values()), begin)
        else:
            for inputs in prepared.values():
                yield self.run(inputs)[0]

    def shared_states(self, prompts: list[dict], begin: int) -> Iterator[dict]:
        first = dict(prompts[0])
        for name in PER_TOKEN:
            if name in first:
                first[name] = first[name][:, :begin]
        image, cache = self.run(first, use_cache=True)
        for inputs in prompts:
            rest = self.run_rest(inputs, begin, cache)
            yield {layer: torch.cat([image[layer], rest[layer]], dim=1) for layer in self.layers}

    def shared_tokens(self, prompts: list[dict]) -> int:
        """Length of the beginning that all prompts share, if all image tokens are in it and nothing is
        padded; else 0."""
        ids = [inputs["input_ids"][0] for inputs in prompts]
        if self.window and max(map(len, ids)) >= self.window:
            return 0  # such a cache can not be cut back
        shortest = min(len(one) for one in ids)
        same = torch.stack([one[: shortest - 1] == ids[0][: shortest - 1] for one in ids]).all(dim=0)
        begin = int(same.long().cumprod(dim=0).sum())
        for inputs in prompts:
            padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
            if padded or bool((inputs["input_ids"][:, begin:] == self.image_id).any()):
                return 0
        return begin

    def may_share(self) -> bool:
        """Whether prompts that share a pass have the hidden states of full passes; if not, a line says why.

        Tried on two noise pictures and two prompts. Allowed are a few times the difference between two batch
        sizes of full passes: that is what the model's precision and depth make of an exact computation.
        """
        side = self.size or 64
        images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        texts = [PROMPTS["arm"], PROMPTS["blind"]]
        both = list(self.prepare(images, None, texts, "").values())
        alone = list(self.prepare(images[:1], None, texts, "").values())
        begin = self.shared_tokens(both)
        if not begin:
            return self.cannot_share("the image does not come first")
        full = [self.run(inputs)[0] for inputs in both]
        noise = 0.0
        for states, inputs in zip(full, alone, strict=True):
            first_of_both = {layer: state[:1] for layer, state in states.items()}
            noise = max(noise, relative_difference(self.run(inputs)[0], first_of_both))
        try:
            shared = list(self.shared_states(both, begin))
        except Exception as problem:  # each architecture has its own way of not taking a cache
            return self.cannot_share(type(problem).__name__)
        error = max(map(relative_difference, full, shared))
        if error > max(4 * noise, SHARING_ERROR[self.dtype]):
            return self.cannot_share(f"relative difference {error:.1e}, of two batch sizes {noise:.1e}")
        return True

    def cannot_share(self, why: str) -> bool:
        tqdm.write(
            f"encoder {self.name}: prompts cannot share a pass over the image ({why}); each has its own"
        )
        return False

    def pooled(self, prepared: dict) -> Iterator:
        for (text, inputs), states in zip(prepared.items(), self.states_of_prompts(prepared), strict=True):
            ids = inputs["input_ids"]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            position = torch.arange(ids.shape[1], device=ids.device)
            mark = torch.isin(ids, torch.tensor(self.image_marks, device=ids.device))
            last_mark = (position * mark).amax(dim=1, keepdim=True)
            masks = {"image": ids == self.image_id, "text": real & (position > last_mark), "all": real}
            for layer, pool in itertools.product(self.layers, self.pools):
                if pool == "last":
                    yield (text, layer, pool), states[layer][:, -1]
                else:
                    weight = masks[pool][..., None].float()
                    yield (text, layer, pool), (states[layer].float() * weight).sum(1) / weight.sum(1)


class Molmo(NativeVLM):
    """allenai/Molmo-7B-D-0924, the paper's encoder: the hub's own model code, made to run on transformers 5.

    Its processor needs torchvision and tensorflow; the inputs made here equal its own, bit for bit, for
    square frames of 32 to 336 px. Token ids and the set of tensors are checked at load. `text` begins after
    the image (" User: ... Assistant:").
    """

    family = "molmo"
    largest = 336  # above, its processor cuts the picture into more tiles than the one made here

    def load(self, config: dict, temperature: float) -> None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        source = {key: value for key, value in self.source.items() if key != "trust_remote_code"}
        revision = {key: value for key, value in source.items() if key == "revision"}
        model_class = get_class_from_dynamic_module("modeling_molmo.MolmoForCausalLM", self.path, **revision)
        model_class.all_tied_weights_keys = {}  # transformers 5 expects both of these; the code predates it
        model_class.tie_weights = lambda *args, **kwargs: None
        self.read(model_class, strict=True, **source)
        torch.backends.cuda.enable_mem_efficient_sdp(True)  # its constructor switches it off for everybody
        self.depth = self.model.config.num_hidden_layers
        self.read_tokenizer(first_image_token=self.model.config.vocab_size)

    def read_tokenizer(self, first_image_token: int) -> None:
        """The tokenizer, and `begin`: a first token and the picture twice, whole and as its one tile."""
        from transformers import AutoTokenizer, Qwen2Tokenizer

        source = self.source | {"trust_remote_code": True}  # allowed; else it would be asked again
        tokenizer_class = AutoTokenizer
        if Path(self.path).is_dir() and not (Path(self.path) / "tokenizer.json").exists():
            tokenizer_class = Qwen2Tokenizer
        self.tokenizer = tokenizer_class.from_pretrained(**source)
        ids = self.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<im_patch>", "<im_col>"])
        if ids != list(range(first_image_token, first_image_token + 4)):
            fail(f"--encoder {self.path}: its tokenizer's image tokens are {ids}, not those of Molmo")
        example = " User: Focus on the drawer. Assistant:"
        words = [2657, 25, 25806, 389, 279, 26482, 13, 21388, 25]
        if first_image_token == 152064 and self.encode(example) != words:
            fail(f"--encoder {self.path}: its tokenizer splits {example!r} otherwise than Molmo-7B-D's own")
        start, end, patch, column = ids
        self.image_id, self.image_marks = patch, tuple(ids)
        picture = [start] + 12 * (12 * [patch] + [column]) + [end]
        first = self.tokenizer.bos_token_id
        if first is None:
            first = self.tokenizer.eos_token_id
        self.begin = torch.tensor([first] + 2 * picture)
        self.patches = (self.begin == patch).nonzero()[:, 0].view(1, 2, 144)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def fit_size(self, frame_size: int) -> None:
        self.size = self.size or frame_size
        if self.size > self.largest:
            fail(
                f"--encoder {self.path}: of pictures above {self.largest} px Molmo makes further tiles, "
                f"which are not made here; these have {self.size} px: add --encoder-size {self.largest}"
            )

    def pictures(self, images: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 2, 576, 588): 14 x 14 patches of the picture at 336 px, twice."""
        x = self.scaled(images, 336).clip(0, 1)
        mean, std = x.new_tensor(CLIP_MEAN), x.new_tensor(CLIP_STD)
        x = (x - mean[:, None, None]) / std[:, None, None]
        x = x.view(-1, 3, 24, 14, 24, 14).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(-1, 1, 576, 588)
        return x.repeat(1, 2, 1, 1).to(self.dtype)  # not expand: Molmo's own code calls .view on it

    def prepare(self, images: np.ndarray, segments: np.ndarray | None, texts: list[str], object: str) -> dict:
        """{text: inputs}, as its own processor makes them."""
        batch = len(images)
        masks = torch.ones(batch, 2, 576, device=self.device, dtype=self.dtype)
        masks[:, 1] = -1  # as the processor has it for the second crop
        picture = {"images": self.pictures(self.resized(images)), "image_masks": masks}
        picture["image_input_idx"] = self.patches.expand(batch, -1, -1).to(self.device)
        prepared = {}
        for text in texts:
            words = torch.tensor(self.encode(f" User: {text} Assistant:"))
            ids = torch.cat([self.begin, words]).expand(batch, -1).to(self.device)
            prepared[text] = {"input_ids": ids, **picture}
        return prepared

    def run(self, inputs: dict, **options: object) -> tuple[dict, object]:
        options["output_hidden_states"] = True
        options["last_logits_only"] = not {-1, self.depth} & set(self.layers)  # it cuts the last layer, too
        output = self.model.model(**inputs, **options)
        return {layer: output.hidden_states[layer] for layer in self.layers}, output.attn_key_values

    def run_rest(self, inputs: dict, begin: int, cache: object) -> dict:
        ids = inputs["input_ids"]
        position = torch.arange(ids.shape[1], device=self.device).expand(len(ids), -1)
        rest = {"input_ids": ids[:, begin:], "position_ids": position[:, begin:]}
        return self.run(rest, attention_mask=torch.ones_like(ids), past_key_values=cache)[0]


class VisionModel(Pretrained):
    """DINOv2, and the image halves of CLIP and SigLIP. Nothing reads the prompt: keys say `noprompt`.

    Pools: `cls` the class token (SigLIP has none), `mean` of the patches. Layer -1 is last_hidden_state
    (CLIP's is not normalised).
    """

    family = "vision"
    promptable, layers, pools = False, (-1,), ("mean",)

    def load(self, config: dict, temperature: float) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(**self.source)
        self.read(AutoModel)
        self.model = getattr(self.model, "vision_model", self.model)
        self.known_pools = ("cls", "mean")
        if "siglip" in config["model_type"]:
            self.known_pools = ("mean",)
        registers = getattr(self.model.config, "num_register_tokens", 0)
        self.first_patch = len(self.known_pools) - 1 + registers
        self.depth = self.model.config.num_hidden_layers

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, h, w), as the model's own processor makes it."""
        pictures = [Image.fromarray(image) for image in self.resized(images)]
        inputs = self.processor(images=pictures, return_tensors="pt", device=self.device)
        return inputs["pixel_values"].to(self.device, self.dtype)

    def prepare(
        self, images: np.ndarray, segments: np.ndarray | None, texts: list[str], object: str
    ) -> tuple:
        return self.pixels(images), texts

    def pooled(self, prepared: tuple) -> Iterator:
        pixels, texts = prepared
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        for layer, pool in itertools.product(self.layers, self.pools):
            state = output.hidden_states[layer]
            if layer in (-1, self.depth):
                state = output.last_hidden_state
            value = state[:, 0].float()
            if pool == "mean":
                value = state[:, self.first_patch :].float().mean(dim=1)
            for text in texts:
                yield (text, layer, pool), value


class RandomViT(VisionModel):
    """A floor: a DINOv2 of the size of ViT-Ti (12 layers, 5 million weights) that was never trained."""

    family = "random"

    def load(self, config: dict, temperature: float) -> None:
        from transformers import Dinov2Config, Dinov2Model

        self.dtype, self.arithmetic = torch.float32, "float32"  # small, and the tremble of other embeddings
        sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Dinov2Model(Dinov2Config(image_size=64, patch_size=8, **sizes)).to(self.dtype)
        self.known_pools, self.first_patch, self.depth = ("cls", "mean"), 1, 12

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, 64, 64)."""
        return ((self.scaled(self.resized(images), 64) - 0.5) / 0.25).to(self.dtype)


class Otter(VisionModel):
    """CLIP's patches, as the prompt's words attend to them, averaged (OTTER, arXiv 2503.03734).

    x_k: the last block's self-attention output without residual and MLP
    p_k = normalise(W_v ln_post(x_k))
    t_i = normalise(W_t h_i) of the prompt's first 15 tokens
    f_i = sum_k softmax_k(<t_i, p_k> / temperature) p_k
    One layer (-1) and one pool (`mean` of f_i).
    """

    family, prefix_of_name = "otter", "otter-"
    promptable, words, usual_temperature = True, 15, 0.07

    def load(self, config: dict, temperature: float) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if config["model_type"] != "clip":
            kind = config["model_type"]
            fail(f"--encoder otter:{self.path}: OTTER needs a CLIP model with both halves, this is {kind}")
        self.processor = AutoImageProcessor.from_pretrained(**self.source)
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        source = {key: value for key, value in self.source.items() if key != "trust_remote_code"}
        self.read(CLIPModel, **source)
        self.known_pools, self.depth, self.temperature = ("mean",), 0, temperature
        if temperature != self.usual_temperature:
            self.name += f"-t{temperature:g}"

    def prepare(
        self, images: np.ndarray, segments: np.ndarray | None, texts: list[str], object: str
    ) -> tuple:
        ids = {}
        for text in texts:
            ids[text] = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=77)["input_ids"]
        return self.pixels(images), ids

    def patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, 1 + patches, width) and p (B, patches, D), in CLIP's joint space."""
        vision, attention_outputs = self.model.vision_model, []
        attention = vision.encoder.layers[-1].self_attn
        hook = attention.register_forward_hook(lambda _, __, output: attention_outputs.append(output[0]))
        try:
            vision(pixel_values=pixels)
        finally:
            hook.remove()
        x = attention_outputs[0]
        p = self.model.visual_projection(vision.post_layernorm(x[:, 1:]))
        return x, torch.nn.functional.normalize(p.float(), dim=-1)

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The prompt's words in the joint space, (at most 15, D); begin and end marks are left out."""
        states = self.model.text_model(input_ids=ids.to(self.device)).last_hidden_state[0, 1:-1]
        t = self.model.text_projection(states[: self.words])
        return torch.nn.functional.normalize(t.float(), dim=-1)

    def pooled(self, prepared: tuple) -> Iterator:
        pixels, ids_of_text = prepared
        _, p = self.patches(pixels)
        for text, ids in ids_of_text.items():
            similarity = self.tokens(ids) @ p.transpose(1, 2)  # (B, words, patches)
            attention = (similarity / self.temperature).softmax(dim=-1)
            yield (text, -1, "mean"), (attention @ p).mean(dim=1)
