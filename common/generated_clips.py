"""The embedded background clips: a textured scene, a moving camera, and people and objects that pass by.

No draw from `rng` depends on the size in pixels, so a clip looks the same at every size. Lengths are in
pixels (n: side of a picture) or, in `generated_clip`, in views of the camera.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from common.textures import make_scene, random_colour, textured_shape, to_rgb

GENERATED_CLIPS = {"train": 60, "test": 30}  # as many as DAVIS-2017
GENERATED_FRAMES = 90
GENERATED_SEED = 20_170_480  # not --seed: the generated clips are a fixed data set, as DAVIS is
AFFINE = Image.Transform.AFFINE
BILINEAR = Image.Resampling.BILINEAR


def generated_clip(split: str, index: int, size: int) -> np.ndarray:
    """Clip `index` of the split, uint8 (GENERATED_FRAMES, size, size, 3), the same in every process."""
    rng = np.random.default_rng([GENERATED_SEED, int(split == "test"), index])
    time = np.arange(GENERATED_FRAMES)[:, None] / GENERATED_FRAMES  # (T, 1), 0 to 1
    view = 2 * size  # all is drawn at twice the size, and averaged down at the end
    scene = make_scene(rng, int(2.4 * view))

    camera = waves(rng, time, 0.45, 0.15, 0.45, 2)  # (T, 2) pan and tilt
    camera = camera + waves(rng, time, 0.004, 4, 8, 2)  # the tremor of a hand
    zoom = 1 + waves(rng, time, 0.1, 0.3, 0.8)
    roll = waves(rng, time, 0.05, 0.3, 0.8)
    cos, sin = zoom * np.cos(roll), zoom * np.sin(roll)
    middle_x, middle_y = (scene.width / 2 + camera * view).T[..., None]
    left = middle_x - (cos - sin) * view / 2
    top = middle_y - (sin + cos) * view / 2
    affines = np.hstack([cos, -sin, left, sin, cos, top])  # (T, 6) from the view to the scene

    actors, paths = [], []
    for scale in np.sort(rng.uniform(0.25, 0.75, rng.integers(3, 7))):  # near ones are large and drawn last
        is_person = rng.random() < 0.5
        heading = int(rng.choice((-1, 1)))
        if is_person:
            extent, sway = 1.6 * scale, 0.04
            actor = Person(rng, extent * view, heading)
        else:
            extent, sway = scale, 0.25
            actor = Thing(rng, int(extent * view))
        x = 3 * rng.random() + heading * rng.uniform(0.5, 1.2) * time + waves(rng, time, 0.05, 0.5, 1.5)
        x = x - camera[:, :1] * (0.3 + scale)  # near ones pass the camera faster
        y = rng.uniform(0.1, 0.9) + waves(rng, time, sway, 0.4, 1.2) - camera[:, 1:] * 0.4
        margin = 0.72 * extent  # leaves on one side and comes back on the other, both out of sight
        x = (x + margin) % (1 + 2 * margin) - margin
        angle = heading * 2 * np.pi * (rng.random() + rng.uniform(1, 2.5) * time)
        actors.append(actor)
        paths.append(np.hstack([x * view, y * view, angle]))

    wave_x, wave_y = rng.uniform(-5, 5, 2)  # a slow wave of light and shadow
    speed = rng.uniform(2, 9)
    depth = rng.uniform(0.05, 0.25)
    y, x = np.mgrid[0:size, 0:size] / size
    frames = np.empty((GENERATED_FRAMES, size, size, 3), np.uint8)
    for k in range(GENERATED_FRAMES):
        frame = scene.transform((view, view), AFFINE, tuple(affines[k]), BILINEAR)
        for actor, path in zip(actors, paths):
            actor.paint(frame, *path[k])
        light = 1 + depth * np.sin(wave_x * x + wave_y * y + speed * time[k])
        frames[k] = (np.asarray(frame.reduce(2)) * light[..., None]).clip(0, 255)
    return frames


def waves(
    rng: np.random.Generator, time: np.ndarray, amplitude: float, low: float, high: float, count: int = 1
) -> np.ndarray:
    """Smooth curves (T, count) of low..high cycles a clip."""
    frequency = rng.uniform(low, high, count)
    phase = rng.random(count)
    return amplitude * np.sin(2 * np.pi * (time * frequency + phase))


class Person:
    """Somebody of `height` pixels who walks to the right (facing 1) or to the left (-1)."""

    def __init__(self, rng: np.random.Generator, height: float, facing: int):
        self.height = height
        self.facing = facing
        self.skin = to_rgb(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.3, 1))
        hues = rng.random(5)
        self.hair, self.shirt, self.stripe, self.trousers, self.shoes = (random_colour(rng, h) for h in hues)
        self.swing = rng.uniform(0.4, 0.8)
        self.width = 0.09 * height * rng.uniform(0.8, 1.2)

    def paint(self, frame: Image.Image, x: float, y: float, angle: float) -> None:
        """With the middle of the body at (x, y), at phase `angle` of the stride."""
        canvas = ImageDraw.Draw(frame)
        height, width = self.height, self.width
        y += 0.015 * height * np.cos(2 * angle)  # the body bobs twice a stride
        hip = y + 0.03 * height
        shoulder = y - 0.27 * height
        s = self.swing * np.sin(angle)
        bend = 0.5 + 0.5 * np.cos(angle)  # the knee of the leg on its way forward is bent

        arm, leg = 0.17 * height, 0.23 * height
        self.paint_limb(canvas, (x, shoulder), (-s, -s + 0.5), arm, (self.stripe, self.skin))
        self.paint_limb(canvas, (x, hip), (-s, -s - (1 - bend)), leg, (self.trousers, self.shoes))
        self.paint_limb(canvas, (x, hip), (s, s - bend), leg, (self.trousers, self.shoes))
        trunk = (x - width, shoulder - width / 2, x + width, hip + width / 2)
        canvas.rounded_rectangle(trunk, width * 0.8, self.shirt)
        for k in (0.25, 0.55):
            upper = shoulder + k * (hip - shoulder)
            lower = shoulder + (k + 0.13) * (hip - shoulder)
            canvas.rectangle((x - width, upper, x + width, lower), self.stripe)
        self.paint_limb(canvas, (x, shoulder), (s, s + 0.5), arm, (self.shirt, self.skin))
        back_of_head = (x - 0.02 * self.facing * height, shoulder - 0.15 * height)
        face = (x + 0.015 * self.facing * height, shoulder - 0.115 * height)
        canvas.circle(back_of_head, 0.085 * height, self.hair)
        canvas.circle(face, 0.07 * height, self.skin)

    def paint_limb(
        self, canvas: ImageDraw.ImageDraw, joint: tuple, angles: tuple, length: float, colours: tuple
    ) -> None:
        """Two segments from a joint (x, y), at angles from straight down, and a hand or shoe at the end."""
        colour, end_colour = colours
        x, y = joint
        points = [joint]
        for angle in angles:
            x = x + self.facing * length * np.sin(angle)
            y = y + length * np.cos(angle)
            points.append((x, y))
        canvas.line(points, colour, max(1, round(self.width)), joint="curve")
        canvas.circle(joint, self.width / 2, colour)
        canvas.circle((x, y), 0.6 * self.width, end_colour)


class Thing:
    """A textured shape, n pixels wide, that rolls; boxes and cars only rock."""

    def __init__(self, rng: np.random.Generator, n: int):
        self.n = n
        self.kind = str(rng.choice(("ball", "ball", "box", "car", "polygon", "star")))
        self.skin, self.mask = textured_shape(rng, n, self.kind)

    def paint(self, frame: Image.Image, x: float, y: float, angle: float) -> None:
        """With its middle at (x, y), turned by `angle`."""
        if self.kind == "car":
            angle = 0.04 * np.sin(5 * angle)
        elif self.kind == "box":
            angle = 0.4 * np.sin(angle)
        side = int(1.5 * self.n)  # room for the corners of a turned square
        left = int(np.floor(x - side / 2))
        top = int(np.floor(y - side / 2))
        dx, dy = left - x, top - y  # the fraction of a pixel is kept: slow things glide
        cos, sin = np.cos(angle), np.sin(angle)
        shift_x = cos * dx + sin * dy + self.n / 2
        shift_y = -sin * dx + cos * dy + self.n / 2
        affine = (cos, sin, shift_x, -sin, cos, shift_y)
        skin = self.skin.transform((side, side), AFFINE, affine, BILINEAR)
        mask = self.mask.transform((side, side), AFFINE, affine, BILINEAR)
        frame.paste(skin, (left, top), mask)
