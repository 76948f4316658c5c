"""Scenes of the demo: coloured shapes with compositional captions, and videos in which one shape moves.

Some (colour, shape) pairs occur only in the test split; every colour and every shape occurs in training, so the test
split measures composition. In a video, the shape moves at constant speed from a uniformly random position and wraps
around the edges. So the position in a single frame has the same distribution for all four directions, and a video in
reverse order is a video of the opposite motion. Only the order of the frames shows the direction.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np

from univitar_ds.demo.draw import (
    COLOURS,
    QUARTER,
    SHAPES,
    Background,
    Thing,
    draw_background,
    draw_thing,
    luminance,
    to_uint8,
)

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RELATIONS = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
"""The inverse of each relation between two shapes."""
VIDEO_GROUND = 20
"""Maximum brightness of the background of a video. On a dark background the side to which a shape moves always becomes
brighter. An encoder of a few million parameters learns this cue within minutes; with backgrounds of any brightness it
needs three times as many videos."""
VIDEO_FRAMES = (16, 24)
"""Minimum and maximum number of frames of a video."""
STEP_PX = (4, 10)
"""Minimum and maximum motion in pixels between neighbours of eight evenly sampled frames."""


@dataclass(frozen=True)
class Scene:
    """One image or video with all parameters for drawing it. An image has one frame and no direction."""

    name: str
    split: str
    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]
    captions: tuple[str, ...]
    label: str | None
    quality: int = 95
    frames: int = 1
    speed_q: int = 0
    direction: str | None = None
    rate: int = 12

    @property
    def kind(self) -> str:
        """image or video."""
        return "image" if self.direction is None else "video"

    def row(self) -> dict[str, object]:
        """Returns the scene's line of metadata.jsonl. Evaluation uses the first caption."""
        attributes: dict[str, object] = {"things": [thing.name for thing in self.things]}
        if self.direction is not None:
            attributes["direction"] = self.direction
        return {
            "file": self.name,
            "kind": self.kind,
            "captions": list(self.captions),
            "label": self.label,
            "split": self.split,
            "attributes": attributes,
        }


def compositions(split: str) -> list[tuple[str, str]]:
    """Returns the (colour, shape) pairs of a split. 16 of 64 are test pairs, two of each colour and of each shape."""
    colours = list(COLOURS)
    held_out = {
        (colours[(column + shift) % len(colours)], shape) for column, shape in enumerate(SHAPES) for shift in (0, 3)
    }
    return [(c, s) for c in colours for s in SHAPES if ((c, s) in held_out) == (split == "test")]


def image_scene(seed: int, split: str, index: int) -> Scene:
    """Returns image number `index` of a split. 60 % of the images show one shape, the others two and their relation."""
    random = _random(seed, "image", split, index)
    width, height = _sides(random, median=140, spread=0.5, least=40, most=400, longest_ratio=3.0)
    pairs = compositions(split)
    first = pairs[index % len(pairs)]
    if random.random() < 0.6:
        things, captions, label = _one(random, first, width, height)
    else:
        others = [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]]
        things, captions, label = _two(random, first, others[random.integers(len(others))], width, height)
    extension = "png" if random.random() < 0.25 else "jpg"
    return Scene(
        name=f"images/{split}-{index:06d}.{extension}",
        split=split,
        width=width,
        height=height,
        background=_background(random, things),
        things=things,
        captions=captions,
        label=label,
        quality=int(random.integers(85, 97)),
    )


def video_scene(seed: int, split: str, index: int) -> Scene:
    """Returns video number `index` of a split. Directions alternate; each cycles through the compositions."""
    random = _random(seed, "video", split, index)
    direction = list(DIRECTIONS)[index % len(DIRECTIONS)]
    pairs = compositions(split)
    colour, shape = pairs[index // len(DIRECTIONS) % len(pairs)]
    width, height = _sides(random, median=80, spread=0.3, least=40, most=160, longest_ratio=2.0)
    width, height = width // 2 * 2, height // 2 * 2  # H.264 subsamples chroma by two along both sides
    diameter_q = max(round(random.uniform(0.28, 0.46) * min(width, height) * QUARTER), 14 * QUARTER)
    thing = Thing(
        colour,
        shape,
        _shade(random, colour),
        diameter_q,
        int(random.integers(width * QUARTER)),
        int(random.integers(height * QUARTER)),
    )
    frames = int(random.integers(VIDEO_FRAMES[0], VIDEO_FRAMES[1] + 1))
    slowest, fastest = (math.ceil(px * QUARTER * 8 / frames) for px in STEP_PX)
    return Scene(
        name=f"videos/{split}-{index:06d}.mp4",
        split=split,
        width=width,
        height=height,
        background=_background(random, (thing,), brightest=VIDEO_GROUND),
        things=(thing,),
        # Captions name only the motion: colour and shape alone would identify most videos.
        captions=(f"something moving {direction}",),
        label=f"moving {direction}",
        frames=frames,
        speed_q=int(random.integers(slowest, fastest + 1)),
        direction=direction,
        rate=int(random.integers(8, 16)),
    )


def thing_at(scene: Scene, frame: int) -> Thing:
    """Returns the moving shape of a video in frame number `frame`."""
    assert scene.direction is not None, "images do not move"
    (thing,) = scene.things
    right, down = DIRECTIONS[scene.direction]
    return replace(
        thing,
        left_q=(thing.left_q + right * scene.speed_q * frame) % (scene.width * QUARTER),
        top_q=(thing.top_q + down * scene.speed_q * frame) % (scene.height * QUARTER),
    )


def render(scene: Scene) -> list[np.ndarray]:
    """Draws the frames of a scene, each (height, width, 3) uint8."""
    canvas = draw_background(scene.background, scene.height, scene.width)
    if scene.direction is not None:
        return [to_uint8(draw_thing(canvas, thing_at(scene, frame))) for frame in range(scene.frames)]
    for thing in scene.things:
        canvas = draw_thing(canvas, thing)
    return [to_uint8(canvas)]


def _random(seed: int, kind: str, split: str, index: int) -> np.random.Generator:
    """Returns the random generator of one scene, equal in every process."""
    digest = hashlib.blake2b(f"scenes/{seed}/{kind}/{split}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _sides(
    random: np.random.Generator, *, median: float, spread: float, least: int, most: int, longest_ratio: float
) -> tuple[int, int]:
    """Draws width and height: area and aspect ratio are log-normal, clipped to the limits."""
    side = median * math.exp(random.normal(0, spread))
    tilt = math.exp(float(np.clip(random.normal(0, 0.42), -math.log(longest_ratio), math.log(longest_ratio))) / 2)
    width, height = (round(float(np.clip(value, least, most))) for value in (side * tilt, side / tilt))
    return width, height


def _shade(random: np.random.Generator, colour: str) -> tuple[int, int, int]:
    shift = random.integers(-10, 11, 3)
    red, green, blue = (int(np.clip(value + move, 0, 255)) for value, move in zip(COLOURS[colour], shift, strict=True))
    return red, green, blue


def _background(random: np.random.Generator, things: tuple[Thing, ...], brightest: int = 235) -> Background:
    """Draws a background whose brightness differs from that of every shape, so that all shapes are visible."""
    greys = range(min(20, brightest), brightest + 1, 5)
    apart = [grey for grey in greys if all(abs(grey - luminance(t.rgb)) >= 45 for t in things)]
    grey = apart[random.integers(len(apart))]
    tints = [tuple(int(v) for v in np.clip(grey + random.integers(-16, 17, 3), 0, 255)) for _ in range(2)]
    return Background(
        first=tints[0],
        second=tints[1] if random.random() < 0.6 else tints[0],
        angle=float(random.uniform(0, 2 * math.pi)),
        noise=float(random.choice([0.0, random.uniform(1, 6)])),
        noise_key=int(random.integers(2**63)),
    )


def _place(random: np.random.Generator, room_q: int, size_q: int) -> int:
    return int(random.integers(max(room_q - size_q - QUARTER, 0) + 1))


_Content = tuple[tuple[Thing, ...], tuple[str, ...], str | None]


def _one(random: np.random.Generator, pair: tuple[str, str], width: int, height: int) -> _Content:
    colour, shape = pair
    size, low, high = (("small ", 0.26, 0.34), ("", 0.44, 0.54), ("large ", 0.68, 0.86))[random.integers(3)]
    diameter_q = round(max(random.uniform(low, high) * min(width, height), 12) * QUARTER)
    left_q, top_q = _place(random, width * QUARTER, diameter_q), _place(random, height * QUARTER, diameter_q)
    thing = Thing(colour, shape, _shade(random, colour), diameter_q, left_q, top_q)
    noun = f"{size}{thing.name}"
    return (thing,), (f"a {noun}", f"an image of a {noun}", f"there is one {noun}"), thing.name


def _two(
    random: np.random.Generator, first: tuple[str, str], second: tuple[str, str], width: int, height: int
) -> _Content:
    """Draws `first` above, below, left or right of `second`, without overlap and within 45 degrees of the axis."""
    relation = list(RELATIONS)[random.integers(len(RELATIONS))]
    upright = relation in ("above", "below")
    along, across = (height, width) if upright else (width, height)
    near, far = (round(random.uniform(0.28, 0.42) * min(width, height) * QUARTER) for _ in range(2))
    gap = QUARTER * 2
    near_along = _place(random, along * QUARTER - gap - far, near)
    far_along = near_along + near + gap + _place(random, along * QUARTER - near_along - near - gap, far)
    near_across = _place(random, across * QUARTER, near)
    reach = (far_along + far / 2 - near_along - near / 2) / 2
    centre = near_across + near / 2 + random.uniform(-reach, reach)
    far_across = int(np.clip(centre - far / 2, 0, across * QUARTER - far - QUARTER))
    spots = [(near, near_along, near_across), (far, far_along, far_across)]
    if relation in ("below", "to the right of"):
        spots.reverse()
    things = tuple(
        Thing(c, s, _shade(random, c), size, *((x, y) if upright else (y, x)))
        for (c, s), (size, y, x) in zip((first, second), spots, strict=True)
    )
    one, other = (f"a {thing.name}" for thing in things)
    detail = f"{one} {relation} {other}"
    return things, (detail, f"{other} {RELATIONS[relation]} {one}", f"an image of {detail}"), None
