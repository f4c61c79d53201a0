"""What does not move within a clip: a speaker's face geometry and colours, skin, hair, shoulders, light, background.

Faces live on a canvas of 288 x 216 pixels. Lengths are in units of half the height of the head (crown to chin = 2), x
to the right and y down from the middle of the head, which is the line of the eyes.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from affekt.data.synth.plan import Strengths

HEIGHT, WIDTH = 288, 216
UNIT = 84.0  # canvas pixels per unit: a little more than in the film, so that edges stay smooth when it is warped down
MIDDLE = np.array([WIDTH / 2, 132.0])
_Y, _X = ((np.mgrid[0:HEIGHT, 0:WIDTH] - MIDDLE[::-1, None, None]) / UNIT).astype(np.float32)
_SHIFT = 4  # bits of sub-pixel position in cv2's polygon functions

_SKINS = np.array([(246, 214, 190), (232, 190, 160), (214, 166, 130), (186, 134, 98), (150, 102, 72)], float)
_HAIRS = np.array([(36, 28, 24), (70, 46, 30), (112, 72, 40), (176, 134, 80), (150, 66, 34), (150, 146, 142)], float)
_IRISES = np.array([(74, 46, 26), (112, 80, 44), (74, 104, 84), (84, 116, 148), (110, 124, 132)], float)
HAIR_STYLES = ("crop", "parted", "fringe", "bob", "long", "bun", "receding")


@dataclass(frozen=True)
class FaceTraits:
    """One speaker's face; lengths in units of half a head."""

    width: float
    jaw: float  # how much the face narrows towards the chin
    eye_gap: float  # from the middle line to the middle of an eye
    eye_y: float
    eye_half: float  # half the width of an eye
    eye_open: float
    eye_tilt: float
    brow_y: float  # above the eyes
    brow_slope: float  # resting: > 0 inner end high
    brow_arch: float
    brow_thick: float
    nose_length: float
    nose_width: float
    mouth_y: float
    mouth_half: float
    lip: float
    corner: float  # resting: > 0 corners up
    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    style: str
    beard: float
    freckles: float


@dataclass(frozen=True)
class Scene:
    """One clip's picture without its person's movement."""

    albedo: np.ndarray  # uint8 (288, 216, 3)
    shade: np.ndarray  # uint8 (288, 216, 3), light and alpha; 160 = unchanged
    alpha: np.ndarray  # uint8 (288, 216)
    background: np.ndarray  # uint8 (size, size, 3), shoulders included
    scale: float  # film pixels per canvas pixel
    centre: np.ndarray  # (2,) of the head in the film, pixels
    grain: np.ndarray  # uint8 (size + 32, size + 32, 3), 32 = nothing


def draw_face(rng: np.random.Generator, sex: str, youth: float, strengths: Strengths) -> FaceTraits:
    """A speaker's face. Draws are in a fixed order; `strengths.speaker` scales every deviation from the average."""
    wide = strengths.speaker
    male = 1.0 if sex == "male" else 0.0

    def vary(middle: float, most: float) -> float:
        return middle + wide * most * rng.uniform(-1, 1)

    def colour(palette: np.ndarray) -> np.ndarray:
        place = rng.uniform(0, len(palette) - 1)
        low = int(place)
        mixed = palette[low] + (place - low) * (palette[min(low + 1, len(palette) - 1)] - palette[low])
        return np.clip(mixed * (1 + 0.03 * wide * rng.standard_normal(3)), 0, 255)

    skin = colour(_SKINS)
    return FaceTraits(
        width=vary(0.75 + 0.03 * male + 0.04 * youth, 0.05),
        jaw=vary(0.26 - 0.10 * male, 0.09),
        eye_gap=vary(0.325, 0.03),
        eye_y=vary(0.02 + 0.08 * youth, 0.03),
        eye_half=vary(0.155 + 0.015 * youth, 0.018),
        eye_open=vary(0.074 + 0.015 * youth, 0.016),
        eye_tilt=vary(0.0, 0.02),
        brow_y=vary(-0.205, 0.045),
        brow_slope=vary(0.0, 0.045),
        brow_arch=vary(0.035, 0.02),
        brow_thick=vary(0.034 + 0.014 * male, 0.012),
        nose_length=vary(0.40 - 0.05 * youth, 0.04),
        nose_width=vary(0.125, 0.02),
        mouth_y=vary(0.63, 0.035),
        mouth_half=vary(0.235, 0.03),
        lip=vary(0.066 - 0.014 * male, 0.016),
        corner=vary(0.0, 0.025),
        skin=skin,
        hair=colour(_HAIRS),
        iris=colour(_IRISES),
        lips=np.clip(skin * (0.86, 0.62, 0.60) + rng.uniform(-12, 12, 3) - (0, 12 * (1 - male), 4), 20, 255),
        style=HAIR_STYLES[int(rng.choice([0, 1, 6, 0, 1] if male else [1, 2, 3, 4, 5, 3, 4]))],
        beard=male * max(0.0, rng.uniform(-1.2, 1.0)),
        freckles=max(0.0, rng.uniform(-1.0, 1.0)),
    )


def pixels(points: np.ndarray) -> np.ndarray:
    """Face units (..., 2) to fixed-point canvas coordinates for cv2."""
    return np.round((points * UNIT + MIDDLE) * (1 << _SHIFT)).astype(np.int32)


def fill(image: np.ndarray, points: np.ndarray, colour) -> None:
    """A filled anti-aliased polygon of fixed-point `points` (K, 2)."""
    cv2.fillPoly(image, [points], colour, cv2.LINE_AA, _SHIFT)


def stroke(image: np.ndarray, points: np.ndarray, colour, thickness: int = 1) -> None:
    """An open anti-aliased line through fixed-point `points` (K, 2)."""
    cv2.polylines(image, [points], False, colour, thickness, cv2.LINE_AA, _SHIFT)


def rgb(colour: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(c) for c in np.clip(colour, 0, 255))


def set_scene(traits: FaceTraits, identity: int, size: int, rng: np.random.Generator, strengths: Strengths) -> Scene:
    """Light, background and framing of one clip. `identity` seeds the hair's and skin's texture of the speaker."""
    albedo, alpha = _paint(_Frozen(traits), identity)
    light, warm = _light(rng, strengths)
    lambert = np.clip(_normals(_Frozen(traits)) @ light[:3], 0, None)
    shade = (light[3] + light[4] * lambert)[..., None] * warm
    shade = np.clip(shade * (alpha[..., None] / 255.0) * 160, 0, 255).astype(np.uint8)
    scale = size / 224 * (0.86 + 0.09 * strengths.scene * rng.uniform(-1, 1))
    centre = size * (np.array([0.5, 0.49]) + strengths.scene * rng.uniform(-1, 1, 2) * (0.05, 0.025))
    room = _room(size, rng, strengths) * (0.75 + 0.25 * light[3]) * (0.5 + 0.5 * warm)
    background = _shoulders(room, traits, centre, scale, light, warm, rng)
    grain = 32 + strengths.scene * rng.uniform(0.5, 3.0) * rng.standard_normal((size + 32, size + 32, 3), np.float32)
    return Scene(albedo, shade, alpha, background, scale, centre, np.clip(np.round(grain), 0, 64).astype(np.uint8))


class _Frozen:
    """Traits as a cache key: a worker meets the same few speakers again and again."""

    def __init__(self, traits: FaceTraits) -> None:
        self.traits = traits
        self._key = repr(traits)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key


def _light(rng: np.random.Generator, strengths: Strengths) -> tuple[np.ndarray, np.ndarray]:
    """(x, y, z, ambient, diffuse) and the colour of the light (3,)."""
    side = strengths.light * rng.uniform(-1.0, 1.0)
    above = 0.55 + 0.35 * strengths.light * rng.uniform(-1, 1)
    power = 0.97 + 0.22 * strengths.light * rng.uniform(-1, 1)
    ambient = 0.50 + 0.12 * strengths.light * rng.uniform(-1, 1)
    direction = (np.sin(side) * np.cos(above), -np.sin(above), np.cos(side) * np.cos(above))
    warm = 1 + strengths.light * rng.uniform(-0.09, 0.14) * np.array([1.0, 0.2, -1.0])
    return np.array([*direction, ambient * power, 0.72 * power * (1.35 - ambient)]), warm


def _bump(x: float, y: float, wide: float, high: float) -> np.ndarray:
    return np.exp(-0.5 * (((_X - x) / wide) ** 2 + ((_Y - y) / high) ** 2))


def outline(traits: FaceTraits, grow: float = 0.0) -> np.ndarray:
    """The head from the right ear over the crown (negative y) and around the chin: (64, 2)."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    cos, sin = np.cos(turn), -np.sin(turn)
    x = (traits.width + grow) * np.sign(cos) * np.abs(cos) ** 0.85 * (1 - traits.jaw * np.maximum(sin, 0) ** 2)
    return np.stack([x, (1 + grow) * sin], axis=-1)


@lru_cache(maxsize=64)
def _normals(frozen: _Frozen) -> np.ndarray:
    """Surface normals (288, 216, 3) of a head with brow ridge, sockets, nose, cheeks, lips and chin."""
    face = frozen.traits
    skull = 1 - (_X / (1.06 * face.width)) ** 2 - (_Y / 1.12) ** 2
    depth = 0.62 * np.sqrt(np.maximum(skull, 0.02))
    tip = face.eye_y + face.nose_length
    depth += 0.10 * _bump(0, tip - 0.24, face.nose_width * 0.55, 0.20)
    depth += 0.12 * _bump(0, tip - 0.05, face.nose_width * 0.75, 0.075)
    depth += 0.05 * _bump(0, face.mouth_y, 0.26, 0.13) - 0.03 * _bump(0, face.mouth_y + 0.14, 0.14, 0.035)
    depth += 0.05 * _bump(0, 0.88, 0.15, 0.08)
    for side in (-1, 1):
        depth -= 0.055 * _bump(side * face.eye_gap, face.eye_y, 0.17, 0.085)
        depth += 0.028 * _bump(side * face.eye_gap, face.eye_y + face.brow_y, 0.20, 0.06)
        depth += 0.045 * _bump(side * 0.42, 0.30, 0.17, 0.15)
    dy, dx = np.gradient(depth, 1 / UNIT)
    hair = 0.5 * np.sqrt(np.maximum(1 - (_X / 1.25) ** 2 - ((_Y - 0.1) / 1.6) ** 2, 0.1))
    hair_dy, hair_dx = np.gradient(hair, 1 / UNIT)
    inside = np.clip(skull / 0.2, 0, 1)  # the rim of the skull meets the hair that hangs beside it
    dx, dy = inside * dx + (1 - inside) * hair_dx, inside * dy + (1 - inside) * hair_dy
    normals = np.stack([-dx, -dy, np.ones_like(dx)], axis=-1)
    return (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=64)
def _paint(frozen: _Frozen, identity: int) -> tuple[np.ndarray, np.ndarray]:
    """Head without eyes, brows and mouth: albedo uint8 (288, 216, 3) and alpha uint8 (288, 216)."""
    face = frozen.traits
    rng = np.random.default_rng([identity, 77])
    back, cap = _hair(face)
    head = pixels(outline(face))
    masks = [np.zeros((HEIGHT, WIDTH), np.uint8) for _ in range(3)]
    for shape in back:
        fill(masks[0], pixels(shape), 255)
    neck = np.array([(-0.27, 0.5), (0.27, 0.5), (0.31, 1.6), (-0.31, 1.6)])
    fill(masks[0], pixels(neck), 0)
    fill(masks[1], head, 255)
    for side in (-1, 1):
        ear = pixels(np.array([side * (face.width + 0.02), face.eye_y + 0.10]))
        axes = (int(0.075 * UNIT * 16), int(0.17 * UNIT * 16))
        cv2.ellipse(masks[1], ear.tolist(), axes, side * 8, 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)
    fill(masks[2], pixels(cap), 255)
    skin = _skin(face, rng)
    streaks = cv2.resize(
        rng.uniform(0.84, 1.14, (12, 72)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
    )
    hair = face.hair * (streaks * (1.0 - 0.12 * np.clip(_Y, -1, 1)))[..., None]
    behind, front, top = (mask[..., None] / 255.0 for mask in masks)
    colour = hair * 0.62 * (1 - front) + skin * front
    soft = cv2.GaussianBlur(masks[2], (0, 0), 1.2)[..., None] / 255.0
    shadow = np.roll(cv2.GaussianBlur(masks[2], (0, 0), 3.5), 4, axis=0)[..., None] / 255.0
    colour = colour * (1 - 0.35 * shadow * (1 - soft))
    colour = colour * (1 - soft) + hair * soft
    alpha = np.maximum(np.maximum(behind, front), top)[..., 0]
    return np.clip(colour, 0, 255).astype(np.uint8), np.round(alpha * 255).astype(np.uint8)


def _skin(face: FaceTraits, rng: np.random.Generator) -> np.ndarray:
    """Skin with the shadows that every light leaves: sockets, sides of the nose, under nose and lip, ears, beard."""
    dark = np.zeros_like(_X)
    tip = face.eye_y + face.nose_length
    for side in (-1, 1):
        dark += 0.26 * _bump(side * face.eye_gap, face.eye_y - 0.05, 0.16, 0.065)
        dark += 0.10 * _bump(side * face.eye_gap * 0.9, face.eye_y + 0.10, 0.12, 0.03)
        dark += 0.16 * _bump(side * face.nose_width * 0.95, tip - 0.04, 0.03, 0.07)
        dark += 0.42 * _bump(side * face.nose_width * 0.48, tip + 0.015, 0.036, 0.020)
        dark += 0.12 * _bump(side * face.nose_width * 0.9, face.eye_y - 0.02, 0.04, 0.10)
        dark -= 0.05 * _bump(side * 0.40, 0.25, 0.13, 0.10)
        dark += 0.35 * _bump(side * (face.width + 0.02), face.eye_y + 0.10, 0.025, 0.09)
    dark += 0.20 * _bump(0, tip + 0.04, face.nose_width * 0.8, 0.022)
    dark += 0.14 * _bump(0, face.mouth_y + 0.15, 0.13, 0.03) - 0.06 * _bump(0, tip - 0.18, 0.045, 0.16)
    skin = face.skin * (1 - dark)[..., None]
    blush = sum(_bump(side * 0.44, 0.32, 0.15, 0.12) for side in (-1, 1)) + 0.6 * _bump(0, tip, 0.10, 0.06)
    skin += blush[..., None] * (6, -9, -6)
    spots = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), (0, 0), 1.3)
    skin *= 1 - (0.015 + 0.05 * face.freckles * np.clip(1 - np.abs(_Y - 0.22) * 3, 0, 1))[..., None] * (
        2 * spots[..., None]
    )
    if face.beard > 0:
        ring = np.clip((_Y - 0.42) * 4, 0, 1) * np.clip(1.6 * np.hypot(_X, (_Y - 0.45)) - 0.1, 0, 1)
        cover = (0.55 * face.beard * ring * (1 + 0.3 * spots))[..., None]
        skin = skin * (1 - cover) + 0.8 * face.hair * cover
    return skin


def _hair(face: FaceTraits) -> tuple[list[np.ndarray], np.ndarray]:
    """Hair behind the head (polygons) and the cap in front (one polygon), in face units."""
    grow = {"crop": 0.05, "receding": 0.03, "bun": 0.05}.get(face.style, 0.10)
    down = {"crop": -0.12, "receding": -0.05, "bun": -0.15, "parted": -0.05 if face.beard or face.jaw < 0.2 else 0.2}
    line = {"fringe": -0.40, "receding": -0.82, "crop": -0.66, "parted": -0.62}.get(face.style, -0.60)
    shell = outline(face, grow)
    over = shell[shell[:, 1] <= down.get(face.style, 0.25)]
    over = over[np.argsort(np.arctan2(over[:, 1] - 0.3, over[:, 0]))]  # from the left temple to the right
    x = np.linspace(-1, 1, 25)
    middle = {"parted": 0.45, "bob": 0.2, "long": 0.0}.get(face.style, 0.0)
    fall = np.abs(x - middle) / (1 + abs(middle) * np.sign(middle - x))
    height = line + (down.get(face.style, 0.25) - line) * np.clip(fall, 0, 1) ** (6 if face.style == "fringe" else 3.2)
    front = np.stack([x * (face.width - 0.02), height], axis=-1)
    cap = np.concatenate([over, front[::-1]])
    back = []
    if face.style in ("long", "bob"):
        low, wide = (1.38, face.width + 0.14) if face.style == "long" else (0.74, face.width + 0.13)
        left = [(-wide + 0.04, -0.2), (-wide - 0.02, 0.2), (-wide - 0.03, low - 0.35), (-wide + 0.06, low - 0.08)]
        side = np.array([*left, (-wide + 0.22, low), (-0.3, low - 0.1)])
        back.append(np.concatenate([side, side[::-1] * (-1, 1), shell[(shell[:, 1] < -0.2)]]))
    if face.style == "bun":
        turn = np.linspace(0, 2 * np.pi, 24)
        back.append(np.stack([0.30 * np.cos(turn), -1.05 + 0.22 * np.sin(turn)], axis=-1))
    return back, cap


def _room(size: int, rng: np.random.Generator, strengths: Strengths) -> np.ndarray:
    """A blurred room behind the speaker: float32 (size, size, 3)."""
    base = 128 + 70 * strengths.scene * rng.uniform(-1, 1) + 30 * strengths.scene * rng.uniform(-1, 1, 3)
    slope = strengths.scene * rng.uniform(-50, 50, (2, 2, 3))
    room = cv2.resize((base + slope).astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(0, 8)) if strengths.scene else 0):
        colour = rgb(base + 60 * strengths.scene * rng.uniform(-1, 1, 3))
        x, y = (int(v) for v in rng.integers(-20, size, 2))
        if rng.random() < 0.6:
            wide, high = (int(v) for v in rng.integers(15, 110, 2) * size // 224)
            cv2.rectangle(room, (x, y), (x + wide, y + high), colour, -1)
        else:
            cv2.circle(room, (x, y), int(rng.integers(6, 40)) * size // 224, colour, -1, cv2.LINE_AA)
    return cv2.GaussianBlur(np.clip(room, 10, 245), (0, 0), float(rng.uniform(0.8, 5.0)))


def _shoulders(room, face: FaceTraits, centre, scale, light, warm, rng: np.random.Generator) -> np.ndarray:
    """The room with neck and shoulders in front of it: uint8 (size, size, 3)."""
    size = len(room)
    unit = UNIT * scale
    masks = np.zeros((2, size, size), np.uint8)
    neck = 0.40 if face.beard or face.jaw < 0.2 else 0.34
    wide = neck + rng.uniform(0.85, 1.15)
    body = np.array([(-neck, 0.95), (-neck - 0.08, 1.12), (-wide, 1.35), (-wide - 0.15, 2.6)])
    body = np.concatenate([body, body[::-1] * (-1, 1)])
    throat = np.array([(-neck, 0.4), (-neck - 0.02, 1.15), (0, 1.42), (neck + 0.02, 1.15), (neck, 0.4)])
    for mask, shape in zip(masks, (body, throat)):
        fill(mask, np.round((shape * unit + centre) * 16).astype(np.int32), 255)
    y, x = (np.mgrid[0:size, 0:size] - centre[::-1, None, None]) / unit
    round_ = np.clip(1.05 - 0.22 * x**2 + 0.35 * light[0] * x, 0.45, 1.4)
    power = light[3] + 0.55 * light[4]
    cloth = rng.uniform(25, 215, 3) * (round_ * power)[..., None] * warm
    under = 0.62 + 0.35 * np.clip((y - 1.0) * 2.0, 0, 1)  # the chin shades the neck
    flesh = face.skin * (under * power * np.clip(1 + 0.5 * light[0] * x / neck, 0.5, 1.3))[..., None] * warm
    for mask, colour in zip(masks, (cloth, flesh)):
        cover = mask[..., None] / 255.0
        room = room * (1 - cover) + colour * cover
    return np.clip(room, 0, 255).astype(np.uint8)
