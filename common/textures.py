"""Textured pictures, for the generated clips: what their scenes and objects are made of.

No draw from `rng` depends on the size n in pixels, so a picture looks the same at every size.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

FINE = (12, 30, 60)  # squares across in the octaves of a noise
COARSE = (3, 6, 12, 24, 48)


def make_scene(rng: np.random.Generator, n: int) -> Image.Image:
    """The still part of a clip, (n, n): a wall or sky, mostly a floor, and things that stand there."""
    scene = texture(rng, n)
    horizon = rng.uniform(0.45, 1.0)
    if horizon < 0.9:
        scene.paste(texture(rng, n), (0, int(horizon * n)))
    for _ in range(rng.integers(5, 11)):
        side = int(n * rng.uniform(0.1, 0.35))
        kind = rng.choice(("box", "box", "box", "ball", "polygon"))
        skin, mask = textured_shape(rng, side, str(kind))
        corner = rng.uniform(-0.1, 0.95, 2) * n
        scene.paste(skin, tuple(corner.astype(int)), mask)
    return scene


def textured_shape(rng: np.random.Generator, n: int, kind: str) -> tuple[Image.Image, Image.Image]:
    """A ball, box, car, polygon or star as an (n, n) picture and its (n, n) mask."""
    corners = int(rng.integers(3, 8))
    turn = rng.uniform(0, 2 * np.pi)
    a, b = n * rng.uniform(0.02, 0.25, 2)
    y, x = np.mgrid[0:n, 0:n] / n - 0.5
    shade = 1.1 - 0.3 * (y + 0.5)  # lit from above
    if kind == "ball":
        shade = 1.15 - 1.1 * np.hypot(x + 0.12, y + 0.15) ** 2
    lit = np.asarray(texture(rng, n)) * shade[..., None]
    skin = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    mask = Image.new("L", (n, n))
    shape = ImageDraw.Draw(mask)
    if kind == "ball":
        shape.ellipse((1, 1, n - 2, n - 2), fill=255)
    elif kind == "box":
        shape.rounded_rectangle((a, b, n - a, n - b), n * 0.06, fill=255)
    elif kind == "car":
        paint = ImageDraw.Draw(skin)
        shape.rounded_rectangle((0.02 * n, 0.45 * n, 0.98 * n, 0.72 * n), 0.1 * n, fill=255)
        cabin = [(0.16 * n, 0.5 * n), (0.3 * n, 0.25 * n), (0.66 * n, 0.25 * n), (0.84 * n, 0.5 * n)]
        window = [(0.25 * n, 0.47 * n), (0.34 * n, 0.3 * n), (0.62 * n, 0.3 * n), (0.73 * n, 0.47 * n)]
        shape.polygon(cabin, fill=255)
        paint.polygon(window, (190, 215, 230))
        for wheel in ((0.23 * n, 0.72 * n), (0.77 * n, 0.72 * n)):
            shape.circle(wheel, 0.12 * n, fill=255)
            paint.circle(wheel, 0.12 * n, fill=(25, 25, 28))
            paint.circle(wheel, 0.06 * n, fill=(170, 170, 175))
    else:
        reach = [1] * corners
        if kind == "star":
            reach = [1, 0.5] * corners  # every other corner further in
        radii = 0.48 * n * np.array(reach)
        outline = radii * np.exp(1j * (turn + 2 * np.pi * np.arange(len(radii)) / len(radii)))
        shape.polygon([(n / 2 + corner.real, n / 2 + corner.imag) for corner in outline], fill=255)
    return skin, mask


def texture(rng: np.random.Generator, n: int) -> Image.Image:
    """(n, n) picture of one of seven materials in a random palette, worn by noise."""
    noise = smooth_noise(rng, n, COARSE)
    grain = smooth_noise(rng, n, FINE)
    angle = rng.uniform(0, np.pi)
    f = rng.uniform(3, 11)
    warp = rng.uniform(0, 2)
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    u = f * (x * np.cos(angle) + y * np.sin(angle)) + warp * noise
    v = f * (y * np.cos(angle) - x * np.sin(angle)) + warp * noise
    field = material(int(rng.integers(7)), noise, f, x, y, u, v)

    hue, other = rng.random(2)
    middle_hue = hue
    if rng.random() < 0.3:
        middle_hue = other
    palette = np.array([random_colour(rng, h) for h in (hue, middle_hue, hue)])
    mean = palette.mean(axis=0)
    palette = mean + rng.uniform(0.3, 0.9) * (palette - mean)  # bold and faint patterns
    channels = [np.interp(field, (0, 0.5, 1), palette[:, c]) for c in range(3)]
    rgb = np.stack(channels, axis=-1) * (0.7 + 0.6 * grain[..., None])
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def material(
    kind: int, noise: np.ndarray, f: float, x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Brightness of one of seven materials, about 0 to 1; f: cycles across; u, v: turned and warped axes."""
    if kind == 0:  # clouds, grass, plaster
        return noise
    if kind == 1:  # marble
        return np.abs(4 * noise % 2 - 1)
    if kind == 2:  # stripes, curtains
        return 0.5 + 0.5 * np.sin(2 * np.pi * u)
    if kind == 3:  # checker
        return (np.floor(u) + np.floor(v)) % 2
    if kind == 4:  # bricks
        row = 2 * f * y
        brick = f * x + 0.5 * (np.floor(row) % 2)
        joint = (row % 1 < 0.15) | (brick % 1 < 0.08)
        return np.where(joint, 0, 0.5 + 0.5 * np.sin(13 * np.floor(brick) + 78 * np.floor(row)))
    if kind == 5:  # dots, leaves
        return np.clip(5 * (0.55 - 1.3 * np.hypot(u % 1 - 0.5, v % 1 - 0.5)), 0, 1)
    return (y + 0.3 * noise) / 1.3  # sky, wall under a lamp


def smooth_noise(rng: np.random.Generator, n: int, octaves: tuple[int, ...]) -> np.ndarray:
    """Multi-octave noise, float (n, n) in [0, 1]."""
    total = np.zeros((n, n), np.float32)
    for k, squares in enumerate(octaves):
        coarse = Image.fromarray(rng.random((squares, squares), dtype=np.float32))
        total = total + 0.6**k * np.asarray(coarse.resize((n, n), Image.Resampling.BICUBIC))
    return (total - total.min()) / (total.max() - total.min())


def random_colour(rng: np.random.Generator, hue: float) -> tuple[int, ...]:
    """RGB in 0..255 near `hue` (in turns)."""
    hue = (hue + rng.normal(0, 0.06)) % 1
    return to_rgb(hue, rng.uniform(0.05, 0.75), rng.uniform(0.2, 1.0))


def to_rgb(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
