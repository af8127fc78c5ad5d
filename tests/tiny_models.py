"""Tiny random models of the real architectures, with their processors, written to folders. No network."""

import functools
import json
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

PROMPTS = ["Focus on the robot arm and the drawer.", "Describe the image."]
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = {
    **WIDTH,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "max_position_embeddings": 4096,
}
VISION = {**WIDTH, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
SQUARE = {"size": {"height": 56, "width": 56}}
MARKS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# -------------------------------------------------------------------------- tokenizers and templates


def words(special: list[str], size: int = 300) -> Tokenizer:
    """Byte-level BPE: reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(PROMPTS, trainer)
    return tokenizer


def fast_tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    """Ids: <unk> 0, <s> 1, </s> 2, <pad> 3, <image> 4, then `special` and what `named` names beyond them."""
    extra = [mark for mark in ("<image>", *special, *named.values())]
    extra = list(dict.fromkeys(extra))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words([*MARKS.values(), *extra]),
        extra_special_tokens=named or extra,
        padding_side="left",
        **MARKS,
    )


def chat(image: str) -> str:
    part = "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
    turn = "{{ m['role'] }}: {% for c in m['content'] %}" + part + "{% endfor %}\n"
    return (
        "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )


def save(folder: Path, model: torch.nn.Module, *parts: object) -> None:
    for part in (model, *parts):
        part.save_pretrained(folder)


def llama(tokenizer: object, **changes: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=len(tokenizer), **(TEXT | changes))


# -------------------------------------------------------------------------- vision-language models


def llava_parts(processor_class: type, pictures: object, tokenizer: object) -> object:
    return processor_class(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )


def llava(folder: Path, layers: int = 3) -> None:
    tokenizer = fast_tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=llama(tokenizer, num_hidden_layers=layers),
        image_token_index=4,
        image_seq_length=16,
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    processor = llava_parts(transformers.LlavaProcessor, pictures, tokenizer)
    save(folder, transformers.LlavaForConditionalGeneration(config), processor)


def llava_next(folder: Path) -> None:
    tokenizer, grid = fast_tokenizer(), [[56, 112], [112, 56], [112, 112]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=llama(tokenizer),
        image_token_index=4,
        image_seq_length=16,
        image_grid_pinpoints=grid,
    )
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=SQUARE["size"], image_grid_pinpoints=grid
    )
    processor = llava_parts(transformers.LlavaNextProcessor, pictures, tokenizer)
    save(folder, transformers.LlavaNextForConditionalGeneration(config), processor)


def vipllava(folder: Path) -> None:
    tokenizer = fast_tokenizer()
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=llama(tokenizer),
        image_token_index=4,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    processor = llava_parts(transformers.LlavaProcessor, pictures, tokenizer)
    save(folder, transformers.VipLlavaForConditionalGeneration(config), processor)


def idefics2(folder: Path) -> None:
    tokenizer = fast_tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    resampler = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
    }
    text = transformers.MistralConfig(vocab_size=len(tokenizer), **TEXT)
    config = transformers.Idefics2Config(
        vision_config=VISION,
        perceiver_config={**resampler, "num_key_value_heads": 2, "hidden_size": 32},
        text_config=text,
        image_token_id=4,
        pad_token_id=3,
    )
    pictures = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 56, "longest_edge": 56}, do_image_splitting=True
    )
    processor = transformers.Idefics2Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=chat("<image>")
    )
    save(folder, transformers.Idefics2ForConditionalGeneration(config), processor)


def idefics3(folder: Path, splitting: bool = True) -> None:
    """A picture of 56 px is 4 tokens; with splitting, as its makers ship it, 2 x 2 tiles and the whole."""
    rows = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    tokenizer = fast_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows)
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=llama(tokenizer), image_token_id=4, scale_factor=2, pad_token_id=3
    )
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=splitting
    )
    processor = transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=chat("<image>")
    )
    save(folder, transformers.Idefics3ForConditionalGeneration(config), processor)


def paligemma(folder: Path, template: str | None = chat("<image>")) -> None:
    pictures = transformers.SiglipImageProcessorPil(**SQUARE)
    pictures.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pictures, fast_tokenizer(), chat_template=template)
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        text_config={"model_type": "gemma", "vocab_size": len(processor.tokenizer), "head_dim": 8, **TEXT},
        projection_dim=32,
        hidden_size=32,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    save(folder, transformers.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> None:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = fast_tokenizer(**named)
    boi, eoi, image = tokenizer.convert_tokens_to_ids(list(named.values()))
    config = transformers.Gemma3Config(
        text_config={"vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 256, **TEXT},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.2)  # zeros: the image would be ignored
    pictures = transformers.Gemma3ImageProcessorPil(**SQUARE)
    template = chat("<start_of_image>")
    processor = transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4, chat_template=template)
    save(folder, model, processor)


def aya_vision(folder: Path) -> None:
    marks = [
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
    ]
    tokenizer = fast_tokenizer(*marks)
    config = transformers.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        text_config={"model_type": "cohere2", "vocab_size": len(tokenizer), "sliding_window": 256, **TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    pictures = transformers.GotOcr2ImageProcessorPil(
        **SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.AyaVisionProcessor(
        pictures, tokenizer, patch_size=14, img_size=56, downsample_factor=2, chat_template=chat("<image>")
    )
    save(folder, transformers.AyaVisionForConditionalGeneration(config), processor)


def janus(folder: Path) -> None:
    named = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = fast_tokenizer(**named)
    config = transformers.JanusConfig(
        text_config=llama(tokenizer),
        vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2.0},
        vq_config={
            **dict.fromkeys(
                ("base_channels", "latent_channels", "projection_dim", "image_token_embed_dim"), 32
            ),
            **{"channel_multiplier": (1, 1), "num_res_blocks": 1, "num_embeddings": 16, "num_patches": 4},
        },
        image_token_id=4,
    )
    pictures = transformers.JanusImageProcessorPil(**SQUARE)
    processor = transformers.JanusProcessor(
        pictures, tokenizer, chat_template=chat("<image>"), num_image_tokens=16
    )
    save(folder, transformers.JanusForConditionalGeneration(config), processor)


def deepseek_vl(folder: Path) -> None:
    tokenizer = fast_tokenizer(image_token="<image>")
    config = transformers.DeepseekVLConfig(
        text_config=llama(tokenizer),
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        image_token_id=4,
    )
    pictures = transformers.DeepseekVLImageProcessorPil(**SQUARE)
    processor = transformers.DeepseekVLProcessor(
        pictures, tokenizer, chat_template=chat("<image>"), num_image_tokens=16
    )
    save(folder, transformers.DeepseekVLForConditionalGeneration(config), processor)


def chameleon(folder: Path) -> None:
    """Has no chat template: its processor wants <image> in the text. Pictures are tokens of a VQ-VAE."""
    tokenizer = fast_tokenizer("<racm3:break>", "<eoss>", "<sep>")
    tokenizer.sep_token = "<sep>"
    codes = {f"IMGIMG{letter}Z": 10 + k for k, letter in enumerate("ABCDEFGH")}
    vq = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 56, "base_channels": 32}
    config = transformers.ChameleonConfig(
        vocab_size=len(tokenizer),
        vq_config={**vq, "channel_multiplier": (1, 1, 1, 1), "num_res_blocks": 1},
        vocabulary_map={"<image>": 4, **codes},
        **TEXT,
    )
    pictures = transformers.ChameleonImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    processor = transformers.ChameleonProcessor(pictures, tokenizer, image_seq_length=49)
    save(folder, transformers.ChameleonForConditionalGeneration(config), processor)


def ovis2(folder: Path) -> None:
    marks = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = fast_tokenizer(*marks)
    atom, *indicators = tokenizer.convert_tokens_to_ids(marks)
    config = transformers.Ovis2Config(
        vision_config={**VISION, "vocab_size": 64, "hidden_stride": 2},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=atom,
        visual_indicator_token_ids=indicators,
        hidden_size=32,
        vocab_size=len(tokenizer),
    )
    pictures = transformers.Ovis2ImageProcessorPil(**SQUARE, crop_to_patches=False)
    processor = transformers.Ovis2Processor(
        pictures, tokenizer, chat_template=chat("<image>"), image_seq_length=4
    )
    save(folder, transformers.Ovis2ForConditionalGeneration(config), processor)


def aria(folder: Path) -> None:
    """Its processor always makes pictures of 980 px."""
    tokenizer = fast_tokenizer(image_token="<image>")
    experts = {"moe_num_experts": 4, "moe_num_shared_experts": 1}
    config = transformers.AriaConfig(
        vision_config={**VISION, "image_size": 980, "patch_size": 140, "model_type": "idefics3_vision"},
        text_config={"model_type": "aria_text", "vocab_size": len(tokenizer), **experts, **TEXT},
        image_token_index=4,
        projector_patch_to_query_dict={49: 8},
    )
    pictures = transformers.AriaImageProcessorPil(max_image_size=980)
    processor = transformers.AriaProcessor(
        pictures, tokenizer, chat_template=chat("<image>"), size_conversion={490: 4, 980: 8}
    )
    save(folder, transformers.AriaForConditionalGeneration(config), processor)


def mllama(folder: Path) -> None:
    tokenizer = fast_tokenizer("<|image|>", "<|python_tag|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    depth = {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [1]}
    text = {"vocab_size": 296, "cross_attention_layers": [1], "rope_parameters": rope, **TEXT, **ids}
    config = transformers.MllamaConfig(
        vision_config={**tower, **depth, "vision_output_dim": 64, "max_num_tiles": 4},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    config.text_config.vocab_size = len(tokenizer)
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(parameter, 0.5)  # zeros: the image would be ignored
    pictures = transformers.MllamaImageProcessorPil(**SQUARE, max_image_tiles=4)
    processor = transformers.MllamaProcessor(pictures, tokenizer, chat_template=chat("<|image|>"))
    save(folder, model, processor)


def opt(tokenizer: object) -> dict:
    sizes = {"ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
    width = {"hidden_size": 32, "word_embed_proj_dim": 32}
    return {"model_type": "opt", "vocab_size": len(tokenizer), "pad_token_id": 3, **width, **sizes}


def blip_config(config_class: type, tokenizer: object) -> object:
    qformer = {**WIDTH, "num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": 400}
    return config_class(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=opt(tokenizer),
        num_query_tokens=4,
        image_token_index=4,
    )


def sharpen_qformer(model: torch.nn.Module) -> None:
    """As initialised, its queries are zeros, and the picture hardly counts."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ("qformer" in name or "query" in name):
            torch.nn.init.normal_(parameter, std=0.3)


def blip_2(folder: Path) -> None:
    """Has no chat template, and its processor puts the image tokens in by itself."""
    tokenizer = fast_tokenizer()
    model = transformers.Blip2ForConditionalGeneration(blip_config(transformers.Blip2Config, tokenizer))
    sharpen_qformer(model)
    pictures = transformers.BlipImageProcessorPil(**SQUARE)
    save(folder, model, transformers.Blip2Processor(pictures, tokenizer, num_query_tokens=4))


def instructblip(folder: Path) -> None:
    """As BLIP-2, but its Q-Former reads the prompt, too: image tokens are promptable."""
    tokenizer = fast_tokenizer()
    config = blip_config(transformers.InstructBlipConfig, tokenizer)
    model = transformers.InstructBlipForConditionalGeneration(config)
    sharpen_qformer(model)
    pictures = transformers.BlipImageProcessorPil(**SQUARE)
    processor = transformers.InstructBlipProcessor(pictures, tokenizer, fast_tokenizer(), num_query_tokens=4)
    save(folder, model, processor)


def florence2(folder: Path) -> None:
    """An encoder-decoder; its processor puts the image tokens in by itself."""
    tokenizer = fast_tokenizer(image_token="<image>")
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32}
    for part, layers in (("encoder", 3), ("decoder", 1)):
        text |= {f"{part}_layers": layers, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64}
    text |= {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    patches = {
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
    }
    blocks = {
        "depths": (1, 1),
        "embed_dim": (16, 32),
        "num_heads": (2, 4),
        "num_groups": (2, 4),
        "window_size": 4,
    }
    vision = {**patches, **blocks, "projection_dim": 32}
    config = transformers.Florence2Config(vision_config=vision, text_config=text, image_token_id=4)
    pictures = transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, crop_size=SQUARE["size"]
    )
    pictures.image_seq_length = 65
    processor = transformers.Florence2Processor(pictures, tokenizer)
    save(folder, transformers.Florence2ForConditionalGeneration(config), processor)


# -------------------------------------------------------------------------- processors need torchvision


class HandMade:
    """Stands for a processor that needs torchvision; puts the image tokens in by itself."""

    chat_template = None

    def __init__(self, image_token: str, begin: str, end: str, pictures: object = None):
        self.image_token, self.begin, self.end = image_token, begin, end
        self.tokenizer = fast_tokenizer(image_token, begin, end, "<|video_pad|>")
        self.image_processor = pictures

    def id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def __call__(self, images: list, text: list[str], **options: object) -> transformers.BatchFeature:
        pictures, counts = self.pictures([picture for row in images for picture in row])
        filled = []
        for one, count in zip(text, counts):
            filled.append(f"user: {self.begin}{self.image_token * int(count)}{self.end}{one} assistant:")
        tokens = self.tokenizer(filled, return_tensors="pt", padding=True, return_token_type_ids=False)
        if "image_grid_thw" in pictures:
            pictures["mm_token_type_ids"] = (tokens["input_ids"] == self.id(self.image_token)).long()
        return transformers.BatchFeature({**tokens, **pictures})

    def pictures(self, images: list) -> tuple[dict, torch.Tensor]:
        """As Qwen-VL and GLM-4V: patches of the picture at its own size, four to a token."""
        inputs = self.image_processor(images, return_tensors="pt")
        return dict(inputs), inputs["image_grid_thw"].prod(1) // 4


class HandMadePhi4(HandMade):
    """As Phi-4-multimodal: the picture as a whole and as one tile, each row of 2 tokens ended by a mark."""

    def pictures(self, images: list) -> tuple[dict, torch.Tensor]:
        small = [torch.tensor(list(image.resize((56, 56)).get_flattened_data())) for image in images]
        pixels = torch.stack(small).view(-1, 1, 56, 56, 3).permute(0, 1, 4, 2, 3).float() / 128 - 1
        inputs = {
            "image_pixel_values": pixels.repeat(1, 2, 1, 1, 1),
            "image_sizes": torch.full((len(images), 2), 56),
            "image_attention_mask": torch.ones(len(images), 2, 4, 4),
        }
        return inputs, torch.full((len(images),), 13)


def qwen_processor() -> HandMade:
    pictures = transformers.Qwen2VLImageProcessorPil()
    return HandMade("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", pictures)


def qwen3_processor() -> HandMade:
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=16)
    return HandMade("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", pictures)


def glm4v_processor() -> HandMade:
    return HandMade(
        "<|image|>", "<|begin_of_image|>", "<|end_of_image|>", transformers.Glm4vImageProcessorPil()
    )


def phi4_processor() -> HandMade:
    return HandMadePhi4("<|endoftext10|>", "", "")


def multi_rope(*sections: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


def token_ids(processor: HandMade) -> dict[str, int]:
    image, video = processor.id(processor.image_token), processor.id("<|video_pad|>")
    return {"image_token_id": image, "video_token_id": video}


def qwen_ids(processor: HandMade) -> dict[str, int]:
    begin, end = processor.id(processor.begin), processor.id(processor.end)
    return token_ids(processor) | {"vision_start_token_id": begin, "vision_end_token_id": end}


def qwen2_vl(folder: Path) -> None:
    processor = qwen_processor()
    config = transformers.Qwen2VLConfig(
        text_config={"vocab_size": len(processor.tokenizer), **multi_rope(1, 1, 2), **TEXT},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        **qwen_ids(processor),
    )
    save(folder, transformers.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl(folder: Path) -> None:
    processor = qwen_processor()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={"vocab_size": len(processor.tokenizer), **multi_rope(1, 1, 2), **TEXT},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **qwen_ids(processor),
    )
    save(folder, transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl(folder: Path) -> None:
    """Its first layers get vision features added ("deepstack")."""
    processor = qwen3_processor()
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config={"vocab_size": len(processor.tokenizer), "head_dim": 8, **multi_rope(2, 1, 1), **TEXT},
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **qwen_ids(processor),
    )
    save(folder, transformers.Qwen3VLForConditionalGeneration(config))


def glm4v(folder: Path) -> None:
    processor = glm4v_processor()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    begin, end = processor.id(processor.begin), processor.id(processor.end)
    config = transformers.Glm4vConfig(
        text_config={"vocab_size": len(processor.tokenizer), **multi_rope(1, 1, 2), **TEXT},
        vision_config={**vision, "image_size": 56},
        image_start_token_id=begin,
        image_end_token_id=end,
        **token_ids(processor),
    )
    save(folder, transformers.Glm4vForConditionalGeneration(config))


def phi4_multimodal(folder: Path) -> None:
    processor = phi4_processor()
    audio = {**WIDTH, "num_blocks": 1, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
             "nemo_conv_channels": 32, "input_size": 16}  # fmt: skip
    audio.pop("num_attention_heads")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Phi4MultimodalConfig(
        vocab_size=len(processor.tokenizer),
        vision_config={**VISION, "crop_size": 56, "image_token_id": processor.id(processor.image_token)},
        audio_config={**audio, "num_attention_heads": 4, "audio_token_id": processor.id("<|video_pad|>")},
        **TEXT,
        **ids,
    )
    save(folder, transformers.Phi4MultimodalForCausalLM(config))


HAND_MADE = {"qwen2_vl": qwen_processor, "qwen2_5_vl": qwen_processor, "qwen3_vl": qwen3_processor,
             "glm4v": glm4v_processor, "phi4_multimodal": phi4_processor}  # fmt: skip

# -------------------------------------------------------------------------- where torchvision imports


def smolvlm(folder: Path) -> None:
    tokenizer = fast_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>")
    config = transformers.SmolVLMConfig(
        vision_config=VISION, text_config=llama(tokenizer), image_token_id=4, scale_factor=2, pad_token_id=3
    )
    pictures = transformers.SmolVLMImageProcessor(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    video = transformers.SmolVLMVideoProcessor()
    template = chat("<image>")
    processor = transformers.SmolVLMProcessor(
        pictures, tokenizer, video, image_seq_len=4, chat_template=template
    )
    save(folder, transformers.SmolVLMForConditionalGeneration(config), processor)


def internvl(folder: Path) -> None:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = fast_tokenizer(**named)
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    pictures = transformers.GotOcr2ImageProcessor(**SQUARE, crop_to_patches=False)
    video = transformers.InternVLVideoProcessor()
    template = chat("<IMG_CONTEXT>")
    processor = transformers.InternVLProcessor(
        pictures, tokenizer, video, image_seq_length=4, chat_template=template
    )
    save(folder, transformers.InternVLForConditionalGeneration(config), processor)


def fuyu(folder: Path) -> None:
    """No image tower: patches of 30 px are the tokens |SPEAKER|, each row ended by |NEWLINE|."""
    tokenizer = fast_tokenizer("|SPEAKER|", "|NEWLINE|", "<0x04>")
    image = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    text = {"model_type": "persimmon", "vocab_size": len(tokenizer), **TEXT}
    text.pop("num_key_value_heads")
    config = transformers.FuyuConfig(text_config=text, image_size=60, patch_size=30, image_token_id=image)
    pictures = transformers.FuyuImageProcessor(size={"height": 60, "width": 60})
    save(folder, transformers.FuyuForCausalLM(config), transformers.FuyuProcessor(pictures, tokenizer))


# -------------------------------------------------------------------------- vision models, Molmo


def clip(folder: Path) -> None:
    tokenizer = words(["<|startoftext|>", "<|endoftext|>"])
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    around = "<|startoftext|> $A <|endoftext|>"
    special = [("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 77}
    text = {**WIDTH, "num_hidden_layers": 3, "vocab_size": len(fast), **ids}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    save(folder, transformers.CLIPModel(config), fast, pictures)


def siglip(folder: Path) -> None:
    text = {**WIDTH, "num_hidden_layers": 3, "vocab_size": 50}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    save(folder, transformers.SiglipModel(config), transformers.SiglipImageProcessorPil(**SQUARE))


def dinov2(folder: Path) -> None:
    config = transformers.Dinov2Config(**{**VISION, "mlp_ratio": 2})
    pictures = transformers.BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE["size"])
    save(folder, transformers.Dinov2Model(config), pictures)


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
        parts = {"wte": nn.Embedding(c.vocab_size + 128, d), "blocks": nn.ModuleList(blocks)}
        parts["ln_f"] = nn.LayerNorm(d)
        self.transformer, self.vision = nn.ModuleDict(parts), nn.Linear(588, d)
    def forward(self, input_ids, attention_mask=None, images=None, image_masks=None, image_input_idx=None,
                position_ids=None, past_key_values=None, use_cache=False, last_logits_only=False,
                output_hidden_states=False):
        assert images is None or past_key_values is None, "images with a cache"
        past = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        x = self.transformer["wte"](input_ids)
        place = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        x = x + 0.1 * torch.sin(place[..., None] * torch.arange(1, x.shape[2] + 1) / 50)
        if images is not None:
            b, t, n, w = images.shape
            images = images.view(b * t, n, w).view(b, t, n, w)  # as in Molmo: fails on what expand gives
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
    """The entry points of Molmo-7B-D and its traps for transformers 5. No line of Molmo's is in it."""
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder.mkdir()
    (folder / "config_molmo.py").write_text(MOLMO_CONFIG)
    (folder / "modeling_molmo.py").write_text(MOLMO_MODEL)
    config = {"model_type": "molmo", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = words(["<|endoftext|>"])
    fill = [f"<fill{k}>" for k in range(512 - tokenizer.get_vocab_size())]
    marks = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in fill + marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model_class = get_class_from_dynamic_module("modeling_molmo.MolmoForCausalLM", str(folder))
    tensors = model_class(model_class.config_class()).state_dict()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHAT_VLMS = (
    *(llava, llava_next, vipllava, idefics2, idefics3, paligemma, gemma3, aya_vision),
    *(janus, deepseek_vl, ovis2, aria, mllama),
)
PLAIN_VLMS = (chameleon, blip_2, instructblip, florence2)  # no chat template
HAND_MADE_VLMS = (qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, phi4_multimodal)
WITH_TORCHVISION = (smolvlm, internvl, fuyu)
OTHERS = (clip, siglip, dinov2, molmo)
BUILDERS = {f.__name__: f for f in (*CHAT_VLMS, *PLAIN_VLMS, *HAND_MADE_VLMS, *WITH_TORCHVISION, *OTHERS)}
ROOT = tempfile.TemporaryDirectory()


@functools.cache
def tiny_model(name: str) -> Path:
    """Folder of a random model, made once."""
    torch.manual_seed(0)
    folder = Path(ROOT.name) / name
    BUILDERS[name](folder)
    return folder
