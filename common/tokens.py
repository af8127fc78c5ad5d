"""Frames as patch tokens, instructions as words: what the transformers of univla.py see of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import fail
from common.dataset import Dataset, change_statistics, to_float
from common.encoders import one_line

GRID = 8  # patches per side of a frame
SQUARES = 4  # squares per side of a patch
SAMPLE = 2000  # transitions that the statistics are taken of
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as DINOv2's processor has them
DINO_TYPES = ("dinov2", "dinov2_with_registers")


class Tokens:
    """Tokens of a data set's rows: `patches`, (B, N, D) of a frame, and `text`, of its task's instruction.

    features: `pixels`, or hub id or folder of a DINOv2. text: `words`, `none`, or hub id or folder of a text
    encoder. What is pretrained stays frozen, and is run on the fly.
    """

    def __init__(self, data: Dataset, features: str, text: str):
        self.data = data
        self.features = Pixels(data.size)
        if features != "pixels":
            self.features = DINO(features, data.device)
        instructions = [data.meta["instructions"][task] for task in data.tasks]
        self.task = torch.from_numpy(data.task)
        self.words, self.text_dim = 0, 0
        if text == "words":
            self.texts, self.words = word_numbers(instructions)
        elif text != "none":
            self.texts = text_states(text, instructions)
            self.text_dim = self.texts.shape[2]
        self.shape = tuple(self.patches(data.train[:1]).shape[1:])  # (N, D)

    def patches(self, rows: np.ndarray) -> Tensor:
        """(B,) -> (B, N, D) float32"""
        return self.features(self.data.frame(rows)).float()

    def text(self, rows: np.ndarray) -> Tensor:
        """(B,) -> word numbers (B, L), 0 past the end, or states of the text encoder (B, L, D)."""
        return self.texts[self.task[rows]].to(self.data.device)

    def statistics(self) -> dict[str, Tensor]:
        """mean, std of the tokens and change_mean, change_std of their change, each (D,)."""
        rows = np.sort(np.random.default_rng(0).permutation(self.data.train)[:SAMPLE])
        return change_statistics(lambda part: self.patches(part).flatten(0, 1), rows, self.data.frame_gap)


class Pixels:
    """uint8 frames (B, 3, S, S) -> GRID^2 patches (B, 64, 48), each the mean colours of SQUARES^2 squares.

    A target that cannot collapse, and without the fine texture that no code of a few bits can hold.
    """

    def __init__(self, size: int):
        if size % GRID:
            fail(f"--features pixels cuts frames in {GRID} x {GRID} patches, and these have {size} px")
        self.squares = min(SQUARES, size // GRID)

    def __call__(self, frames: Tensor) -> Tensor:
        squares = F.adaptive_avg_pool2d(to_float(frames), GRID * self.squares)
        return F.unfold(squares, self.squares, stride=self.squares).transpose(1, 2)


class DINO:
    """uint8 frames (B, 3, S, S) -> patch tokens (B, N, D) of a frozen DINOv2 at 224 px."""

    def __init__(self, source: str, device: torch.device, size: int = 224):
        check_source(source, "--features")
        with one_line(f"--features {source}"):
            from transformers import AutoModel

            self.model = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        config = self.model.config
        if config.model_type not in DINO_TYPES:
            fail(f"--features {source} is of type {config.model_type!r}; valid: {', '.join(DINO_TYPES)}")
        self.model.eval().requires_grad_(False).to(device)
        self.size = size // config.patch_size * config.patch_size
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)  # class token, registers

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        x = F.interpolate(frames.float() / 255, (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = x.new_tensor(IMAGENET_MEAN), x.new_tensor(IMAGENET_STD)
        x = (x.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
        return self.model(pixel_values=x).last_hidden_state[:, self.prefix :]


def word_numbers(texts: list[str]) -> tuple[Tensor, int]:
    """(texts, L) int64, 0 past a text's end, and the number of words, that 0 included."""
    words = sorted({word for text in texts for word in text.lower().split()})
    number = {word: index for index, word in enumerate(words, 1)}
    rows = [torch.tensor([number[word] for word in text.lower().split()], dtype=torch.long) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), len(words) + 1


@torch.no_grad()
def text_states(source: str, texts: list[str]) -> Tensor:
    """Last hidden states (texts, L, D) float32 of a frozen text encoder; zero past a text's end."""
    check_source(source, "--text")
    with one_line(f"--text {source}"):
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return (states.last_hidden_state * batch["attention_mask"][..., None]).float()


def check_source(source: str, flag: str) -> None:
    """One line for what can be neither a folder nor a hub id."""
    if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
        fail(f"{flag} {source} is no folder, and a hub id reads owner/model")
