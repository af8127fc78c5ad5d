"""Prompts, what an encoder is, and the one that needs no weights: the oracle. Imports without torch."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from common.disturb import Disturbance
from common.shards import SEGMENTS

PROMPTS = {  # presets of --prompt; {object} is filled per task. The first is the paper's best
    "best": "Do not describe background features. Focus on the robot arm and the {object}.",
    "positive": "Focus on the robot arm and the {object}.",
    "arm": "Focus on the robot arm.",
    "object": "Focus on the {object}.",
    "blind": "Describe the image.",
}


def prompt_text(prompt: str, object: str) -> str:
    """The text that an encoder is given: a preset's or the user's own, with {object} filled in."""
    return PROMPTS.get(prompt, prompt).replace("{object}", object)


class Encoder:
    """What every encoder has: what it can export, what it was asked for, and how its settings are recorded.

    `prepare` is what can be done on the CPU while another batch runs; `embed` runs the model on what it
    returns: {(text, layer, pool): (B, D) float32}, text "" from an encoder that reads no prompt.
    """

    family = ""
    promptable = True
    layers: tuple[int, ...]  # asked for; a class has its default here
    pools: tuple[str, ...]
    known_layers: tuple[int, ...]
    known_pools: tuple[str, ...]
    name = ""  # begins the key of its embeddings
    id = ""  # of a hub's model the id, of a local one the folder's name
    revision = "1"  # hub: commit; local folder: hash of its files
    batch = 256
    size = 0  # side that frames are resized to before the encoder; 0: as they are
    split_tiles = True
    blank = "none"
    background_kept = 0.0
    temperature: float | None = None
    arithmetic = "float32"
    disturbance = Disturbance()

    def prepare(
        self, images: np.ndarray, segments: np.ndarray | None, texts: list[str], object: str
    ) -> object:
        return images

    def embed(self, prepared: object) -> dict[tuple[str, int, str], np.ndarray]:
        raise NotImplementedError

    def fit_size(self, frame_size: int) -> None:
        """Called once the side of the frames is known, before any is embedded."""
        self.size = self.size or frame_size

    def record(self) -> dict:
        """Everything that decides what the numbers mean, except prompt, layer and pool."""
        return {
            "family": self.family,
            "encoder": self.name,
            "id": self.id,
            "revision": self.revision,
            "encoder_size": self.size,
            "split_tiles": self.split_tiles,
            "blank": self.blank,
            "background_kept": self.background_kept,
            "temperature": self.temperature,
            "arithmetic": self.arithmetic,
            "noise_std": self.disturbance.noise_std,
            "tremble": self.disturbance.tremble,
            "bfloat16": self.disturbance.bfloat16,
        }


# ------------------------------------------------------------------------------------ the oracle


ASKING = "describe|focus|look|show|watch"  # verbs that begin a new request


def named_segments(text: str, object: str) -> list[int]:
    """The oracle's understanding of a prompt: indices of the SEGMENTS to keep.

    A sentence asks for what it names up to a negation, and takes away what it names from there on, up to an
    "except", which turns it round. A prompt that asks for nothing known keeps all but what it takes away.
    """
    words_of = {
        "background": {"background", "backdrop"},
        "table": {"table"},
        "robot": {"robot", "arm", "gripper", "hand", "sawyer"},
        "goal": {"goal", "target"},
        "object": {"object", *object.split()} - {"and"},
    }
    negations = {"not", "dont", "ignore", "without", "no", "avoid", "disregard", "never", "rather"}
    asked, refused = set(), set()
    text = text.lower().replace("’", "'").replace("'s", "").replace("'", "")  # the robot's; don't
    text = re.sub(r"\b(other than|apart from|(?<=everything )but|(?<=anything )but)\b", "except", text)
    for sentence in re.split(rf"[.!?;:]|\bbut\b|(?:,|\band\b)\s*(?=(?:{ASKING})\b)", text):
        found, other = asked, refused
        for word in re.findall(r"\w+", sentence):
            if word == "except" or (word in negations and found is asked):
                found, other = other, found
            named = {segment for segment, names in words_of.items() if {word, word.removesuffix("s")} & names}
            if "object" in named:
                named.add("goal")
            found |= named
    kept = (asked or set(SEGMENTS)) - refused
    return [SEGMENTS.index(segment) for segment in kept]


def blanked(
    images: np.ndarray, segments: np.ndarray, text: str, object: str, background_kept: float = 0.0
) -> np.ndarray:
    """(B, H, W, 3), (B, H, W) uint8 -> images in which all that the prompt does not name is grey.

    `background_kept` is the fraction of it that leaks through.
    """
    keep = np.isin(segments, named_segments(text, object))[..., None]
    blank = 128 + background_kept * (images.astype(np.float32) - 128)
    return np.where(keep, images, blank.round().astype(np.uint8))


class Oracle(Encoder):
    """Encoder `oracle`: the simulator's segmentation answers the prompt, then a fixed projection. No
    weights, no language.

    Pixels of what the prompt names are kept, all others blanked. It is an upper bound of what a VLM can say
    and a control (prompt "blind"); never report it as a VLM. A change of this class changes `revision`.
    """

    family = "oracle"
    id = "oracle"
    layers = known_layers = (0,)
    pools = known_pools = ("all",)
    grid, colours, dim = 32, 3, 256

    def __init__(self, background_kept: float = 0.0):
        self.name = "oracle"
        if background_kept:
            self.name += f"-a{background_kept:g}"
        self.background_kept = background_kept
        rng = np.random.default_rng(0)
        inputs = self.grid**2 * self.colours
        projection = rng.standard_normal((inputs, self.dim)) / np.sqrt(self.dim)
        # in multiples of 2^-30, as features are in 2^-7: float64 sums them exactly, in whatever order
        self.projection = np.round(projection * 2**30) / 2**30

    def prepare(self, images: np.ndarray, segments: np.ndarray, texts: list[str], object: str) -> dict:
        """{text: (B, grid * grid * colours) float32, -1 to 1}."""
        prepared = {}
        for text in texts:
            seen = blanked(images, segments, text, object, self.background_kept)
            small = np.stack([resize(image, self.grid, Image.Resampling.BOX) for image in seen])
            prepared[text] = (small.reshape(len(images), -1).astype(np.float32) - 128) / 128
        return prepared

    def embed(self, prepared: dict) -> dict[tuple[str, int, str], np.ndarray]:
        found = {}
        for text, features in prepared.items():
            found[text, 0, "all"] = (features.astype(np.float64) @ self.projection).astype(np.float32)
        return found


def resize(image: np.ndarray, size: int, filter: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8."""
    return np.asarray(Image.fromarray(image).resize((size, size), filter))
