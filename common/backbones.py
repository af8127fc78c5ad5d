"""What reads frames and words for latbot.py: a small transformer, or a vision-language model of transformers.

    states, logits, targets = backbone(frames, task, subtask)

frames: uint8 (B, F, 3, H, W); task (B,): index of its instruction; subtask (B,): index of the text to say, or
None. states (B, queries, width): the hidden states of the query tokens, which come after frames and
instruction. logits (B, T, words) and targets (B, T), -100 past a text's end: the text comes after the
queries, and each of its words sees those before it alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import fail
from common.dataset import chunks, to_float
from common.encoders import one_line
from common.shards import RANK
from common.tokens import check_source
from common.windows import Windows

MARKS = ("[CP_SCE]", "[CP_MOT]")  # words added to the vocabulary of a vision-language model
BOTH_WAYS = ("paligemma",)  # models whose prompt is no causal sequence
END = "<end>"


def split_words(text: str) -> list[str]:
    return text.lower().replace(",", " ,").split()


def transformer(width: int, heads: int, blocks: int) -> nn.TransformerEncoder:
    like = {"activation": "gelu", "batch_first": True, "norm_first": True}
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, **like)
    return nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)


class TinyBackbone(nn.Module):
    """Convolutional patches of the frames, words, queries, and a small transformer over them.

    vision: conv nets (B, 3, H, W) -> (B, C, s, s) of the first frame and, if there are others,
    (B, 6, H, W) -> (B, C, s, s) of those, which come with their difference from the first. Words are those
    of the data set.
    """

    def __init__(
        self,
        vision: list[nn.Module],
        size: int,
        queries: int,
        instructions: list[str],
        subtasks: list[str],
        width: int,
        heads: int,
        blocks: int,
        frames: int,
    ):
        super().__init__()
        self.width = width
        self.vision = nn.ModuleList(vision)
        with torch.no_grad():
            _, channels, side, _ = vision[0](torch.zeros(1, 3, size, size)).shape
        self.project = nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width))
        self.glance = nn.Linear(frames * side**2 * channels, width)  # attention finds places slowly
        self.place = nn.Parameter(0.5 * torch.randn(frames, side**2, width))
        words = sorted({word for text in [*instructions, *subtasks] for word in split_words(text)})
        number = {word: index for index, word in enumerate([END, *words])}
        self.register_buffer("instructions", self.numbers(instructions, number), persistent=False)
        self.register_buffer("subtasks", self.numbers(subtasks, number), persistent=False)
        longest = max(self.instructions.shape[1], self.subtasks.shape[1])
        self.words = nn.Embedding(len(number), width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.word_place = nn.Parameter(0.1 * torch.randn(2, longest, width))  # of instruction, of text
        self.queries = nn.Parameter(0.5 * torch.randn(queries, width))
        self.blocks = transformer(width, heads, blocks)
        self.say = nn.Linear(width, len(number))

    def numbers(self, texts: list[str], number: dict[str, int]) -> Tensor:
        """(texts, L) int64: each text's words, its end, and -100 after it."""
        rows = [torch.tensor([number[word] for word in [*split_words(text), END]]) for text in texts]
        if not rows:
            return torch.zeros(0, 1, dtype=torch.long)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def see(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, 3, H, W) uint8 -> tokens (B, F * s^2, width), and all of them at a glance (B, 1, width)."""
        first = to_float(frames[:, 0])
        pictures = [self.vision[0](first)]
        for index in range(1, frames.shape[1]):
            frame = to_float(frames[:, index])
            pictures.append(self.vision[1](torch.cat([frame, 4 * (frame - first)], 1)))
        tokens = [self.project(picture.flatten(2).transpose(1, 2)) for picture in pictures]
        glance = self.glance(torch.cat([picture.flatten(1) for picture in pictures], 1))
        return torch.cat([token + place for token, place in zip(tokens, self.place)], 1), glance[:, None]

    def sequence(
        self, frames: Tensor, task: Tensor, subtask: Tensor | None
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """All tokens (B, T, width); what they do not see (T, T); where the text begins; its words (B, L)."""
        instruction = self.instructions[task].clamp_min(0)
        read = self.words(instruction) + self.word_place[0, : instruction.shape[1]]
        patches, glance = self.see(frames)
        parts = [patches, read, self.queries + glance]
        before, said, targets = sum(part.shape[1] for part in parts), 0, None
        if subtask is not None:
            targets = self.subtasks[subtask]
            said = targets.shape[1]
            spoken = self.words(targets.clamp_min(0)[:, :-1])  # a word is predicted from those before it
            start = torch.zeros_like(spoken[:, :1])
            parts.append(torch.cat([start, spoken], 1) + self.word_place[1, :said])
        order = torch.cat([torch.zeros(before), torch.arange(1, said + 1)]).to(frames.device)
        return torch.cat(parts, 1), order[:, None] < order, before, targets  # True: hidden

    def forward(
        self, frames: Tensor, task: Tensor, subtask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens, hidden, before, targets = self.sequence(frames, task, subtask)
        states = self.blocks(tokens, mask=hidden)
        queries = states[:, before - len(self.queries) : before]
        if subtask is None:
            return queries, None, None
        return queries, self.say(states[:, before:]), targets

    def attention(self, frames: Tensor, task: Tensor, subtask: Tensor) -> Tensor:
        """Attention of a text's last word over the first frame: last block, mean over heads. (B, s, s)"""
        tokens, hidden, before, targets = self.sequence(frames, task, subtask)
        *others, last = self.blocks.layers
        for block in others:
            tokens = block(tokens, src_mask=hidden)
        tokens = last.norm1(tokens)
        _, weights = last.self_attn(tokens, tokens, tokens, attn_mask=hidden)  # (B, T, T)
        end = before + (targets >= 0).sum(1) - 1
        patches = self.place.shape[1]
        side = round(patches**0.5)
        return weights[torch.arange(len(end)), end, :patches].reshape(-1, side, side)


class VLMBackbone(nn.Module):
    """A native vision-language model with two words more, [CP_SCE] and [CP_MOT]; its vision tower is frozen.

    The prompt: the frames, the instruction, each mark `queries` / 2 times, and the text. Padding is left.
    """

    def __init__(self, source: str, queries: int, instructions: list[str], subtasks: list[str]):
        super().__init__()
        check_source(source, "--backbone")
        with one_line(f"--backbone {source}"):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            self.model = AutoModelForImageTextToText.from_pretrained(
                source, trust_remote_code=False, dtype=torch.float32
            )
        if self.model.config.model_type in BOTH_WAYS:
            fail(f"--backbone {source}: its words see later ones, so the queries would read the text")
        if not getattr(self.processor, "chat_template", None):
            fail(f"--backbone {source} has no chat template, by which frames and instruction become a prompt")
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.add_tokens(list(MARKS), special_tokens=True)
        self.model.resize_token_embeddings(
            max(len(tokenizer), self.model.get_input_embeddings().num_embeddings)
        )
        self.marks = tokenizer.convert_tokens_to_ids(list(MARKS))
        self.width = self.model.config.get_text_config().hidden_size
        frozen = [name for name, _ in self.model.named_parameters() if "vision" in name or "visual" in name]
        if not frozen:
            fail(f"--backbone {source} has no vision tower")
        for name in frozen:
            self.model.get_parameter(name).requires_grad_(False)
        self.instructions, self.subtasks = instructions, subtasks
        self.query_text = "".join(mark * (queries // len(MARKS)) for mark in MARKS)
        self.n_queries = queries
        self.end = tokenizer.eos_token or ""

    def prompt(self, frames: int, instruction: str, subtask: str | None) -> str:
        content = [{"type": "image"}] * frames + [{"type": "text", "text": instruction}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True) + self.query_text
        if subtask is not None:
            text += f" {subtask}{self.end}"
        return text

    def forward(
        self, frames: Tensor, task: Tensor, subtask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        pictures = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
        prompts = []
        for row in range(len(frames)):
            said = None
            if subtask is not None:
                said = self.subtasks[subtask[row]]
            prompts.append(self.prompt(frames.shape[1], self.instructions[task[row]], said))
        images = [list(pictures_of_row) for pictures_of_row in pictures]
        inputs = self.processor(text=prompts, images=images, return_tensors="pt", padding=True)
        inputs.pop("labels", None)
        inputs = inputs.to(self.model.device)
        ids = inputs["input_ids"]
        is_query = (ids == self.marks[0]) | (ids == self.marks[1])
        # logits take more memory than all else
        if subtask is None and self.model.base_model is not self.model:
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        else:
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
            states = output.hidden_states[-1]
        states = states[is_query].view(len(frames), self.n_queries, -1)
        if subtask is None:
            return states, None, None
        last_query = ids.shape[1] - 1 - is_query.flip(1).int().argmax(1)  # (B,)
        is_text = torch.arange(ids.shape[1], device=ids.device) > last_query[:, None]
        targets = torch.where(is_text, ids, -100)
        return states, output.logits[:, :-1], targets[:, 1:]


def spatial_entropy(maps: np.ndarray) -> float:
    """How scattered attention maps (N, H, W) are, mean over maps: 0 if all of it is in one place.

    What lies above a map's mean, in 8-connected components: the entropy of their areas, in nats (LatBot,
    equation 7).
    """
    entropies = []
    for attention in maps:
        places, count = scipy.ndimage.label(attention > attention.mean(), np.ones((3, 3)))
        areas = np.bincount(places.ravel(), minlength=count + 1)[1:]
        shares = areas / areas.sum()
        entropies.append(-(shares * np.log(shares)).sum())
    return float(np.mean(entropies))


@torch.no_grad()
def attended(backbone: nn.Module, windows: Windows, path: Path) -> dict[str, float]:
    """Where a sub-task's last word looks on held-out frames, of a TinyBackbone; drawn at `path`.

    attention_entropy: spatial entropy, the lower the more concentrated. attention_on_robot: the attention
    that the robot gets, over its share of the picture.
    """
    data, result = windows.data, {}
    rows = windows.named(data.held_out)
    if not len(rows) or not isinstance(backbone, TinyBackbone):
        return result
    backbone.eval()
    maps, robot = [], []
    for part in chunks(rows):
        words = windows.task(part), windows.subtask_of(part)
        maps.append(backbone.attention(data.frame(part)[:, None], *words))
        if "segments" in data.columns:
            area = F.adaptive_avg_pool2d(data.segment(part, "robot"), maps[-1].shape[1:])
            seen = (maps[-1] * area[:, 0]).sum((1, 2)) / maps[-1].sum((1, 2))
            robot.append(seen / area.mean((1, 2, 3)).clamp_min(1e-3))
    maps = torch.cat(maps).cpu().numpy()
    result["attention_entropy"] = spatial_entropy(maps)
    if robot:
        result["attention_on_robot"] = float(torch.cat(robot).mean())
    some = np.linspace(0, len(rows) - 1, 6).astype(int)
    if RANK == 0:
        from common.figures import plot_attention  # takes a second

        plot_attention(data.columns["frames"][rows[some]], maps[some], path)
    return result
