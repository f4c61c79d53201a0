"""What moves: brows, lids, eyes, mouth and head of a talking face, drawn frame by frame over the still head.

An emotion is a handful of facial actions (after the action units of Ekman & Friesen, named in `Expression`); the mouth
also follows the sound. Curves of all frames are computed at once, the loop over frames only draws.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter1d

from affekt.data.synth.head import MIDDLE, UNIT, FaceTraits, Scene, fill, pixels, rgb, stroke
from affekt.data.synth.plan import Strengths, blend
from affekt.data.synth.voice import Lips


@dataclass(frozen=True)
class Expression:
    """Facial actions, 0 = at rest, 1 = as strong as the emotion at its height."""

    raise_brows: float = 0.0  # AU2
    inner_brows: float = 0.0  # AU1 (+) up, AU4 (-) down
    squeeze: float = 0.0  # AU4: brows drawn together, furrow
    upper_lid: float = 0.0  # AU5 (+) wide eyes, (-) drooping
    lower_lid: float = 0.0  # AU6, AU7: lower lid raised
    smile: float = 0.0  # AU12 (+), AU15 (-): corners of the mouth
    stretch: float = 0.0  # AU20: mouth widened
    upper_lip: float = 0.0  # AU10
    press: float = 0.0  # AU23, AU24: thin lips
    wrinkle: float = 0.0  # AU9: nose
    flush: float = 0.0  # redder (+), paler (-)
    bow: float = 0.0  # head down (+), up (-)
    activity: float = 1.0  # size of head movements
    tremble: float = 0.0
    blinks: float = 0.3  # per second


# Angry and disgust share the lowered brows, sad and fearful the raised inner brows: the voice tells these pairs apart.
EXPRESSIONS = {
    "neutral": Expression(),
    "happy": Expression(0.15, 0.05, 0.0, -0.10, 0.6, 1.0, 0.4, 0.1, 0.0, 0.0, 0.4, -0.1, 1.4, 0.0, 0.3),
    "sad": Expression(0.1, 0.9, 0.4, -0.40, 0.1, -0.8, -0.1, 0.0, 0.1, 0.0, -0.4, 0.4, 0.5, 0.0, 0.2),
    "angry": Expression(-0.35, -1.0, 1.0, 0.15, 0.5, -0.4, 0.0, 0.1, 0.8, 0.2, 0.9, 0.2, 1.4, 0.1, 0.1),
    "fearful": Expression(0.8, 0.8, 0.4, 0.65, 0.1, -0.45, 0.6, 0.0, 0.0, 0.0, -0.8, -0.2, 0.7, 1.0, 0.6),
    "disgust": Expression(-0.3, -0.8, 0.6, -0.25, 0.7, -0.5, -0.1, 1.0, 0.0, 1.0, 0.1, -0.5, 0.8, 0.0, 0.3),
}

_SPREAD = np.linspace(-1, 1, 17)  # along the mouth, corner to corner
_ALONG = np.linspace(0, 1, 9)  # along a brow or lid, from the nose outwards


@dataclass(frozen=True)
class Pose:
    """Movement of the head, each (T,): film pixels, radians, and turns as shares of half a head."""

    x: np.ndarray
    y: np.ndarray
    roll: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray


def act(
    traits: FaceTraits,
    scene: Scene,
    emotion: str,
    intensity: float,
    lips: Lips,
    fps: int,
    rng: np.random.Generator,
    strengths: Strengths,
) -> np.ndarray:
    """One clip: uint8 RGB (T, size, size, 3), T as long as `lips`."""
    frames, size = len(lips.opening), len(scene.background)
    style = blend(EXPRESSIONS["neutral"], EXPRESSIONS[emotion], intensity * strengths.face)
    # Expressions swell and fade: at any moment people hold 30 to 100 % of what they show.
    hold = 0.65 + 0.35 * np.clip(gaussian_filter1d(rng.standard_normal(frames), 10) * 6, -1, 1)
    fidget = strengths.speaker * gaussian_filter1d(rng.standard_normal((3, frames)), 6) * 4.5
    pose = _pose(style, lips, fps, size, rng, strengths)
    brows = [_brow(traits, style, hold, side, fidget[0]) for side in (-1, 1)]
    eyes = _eyes(traits, style, hold, fps, rng, fidget[1:])
    mouth = _mouth(traits, style, hold, lips)
    still = _still(traits, blend(EXPRESSIONS["neutral"], style, 0.65), scene.albedo)
    ink = _Ink(traits, style)
    film = np.empty((frames, size, size, 3), np.uint8)
    offsets = rng.integers(0, 32, (frames, 2))
    for t in range(frames):
        canvas = still.copy()
        for eye in eyes:
            _draw_eye(canvas, eye, t, ink)
        for brow in brows:
            fill(canvas, brow[t], ink.brow)
        _draw_mouth(canvas, mouth, t, ink)
        film[t] = _shoot(canvas, scene, pose, mouth["drop"][t], t, offsets[t])
    return film


class _Ink:
    """Colours of the moving parts as cv2 scalars."""

    def __init__(self, traits: FaceTraits, style: Expression) -> None:
        skin = traits.skin
        self.brow = rgb(0.75 * traits.hair * 0.8 + 0.25 * skin * 0.6)
        self.lash = rgb(0.25 * skin * 0.4 + 0.35 * traits.hair * 0.5)
        self.crease = rgb(skin * 0.66)
        self.under = rgb(skin * 0.72)
        self.iris = rgb(traits.iris)
        self.ring = rgb(traits.iris * 0.45)
        self.upper_lip = rgb(traits.lips * (0.86 - 0.04 * style.press))
        self.lower_lip = rgb(traits.lips)
        self.line = rgb(traits.lips * 0.45)
        self.fold = rgb(skin * 0.78)


def _pose(style: Expression, lips: Lips, fps: int, size: int, rng: np.random.Generator, strengths: Strengths) -> Pose:
    frames = len(lips.opening)
    time = np.arange(frames) / fps

    def sway(slow: float, fast: float) -> np.ndarray:
        waves = [np.sin(2 * np.pi * rng.uniform(slow, fast) * time + rng.uniform(0, 6.28)) for _ in range(3)]
        return style.activity * sum(waves) / 3

    nod = gaussian_filter1d(lips.stress, 1.5) * 0.035 * style.activity
    shake = style.tremble * gaussian_filter1d(rng.standard_normal((2, frames)), 0.8) * 0.8 * size / 224
    lean = strengths.scene * rng.uniform(-1, 1, 3)
    return Pose(
        x=size / 224 * 4.0 * sway(0.1, 0.6) + shake[0],
        y=size / 224 * 2.0 * sway(0.1, 0.6) + shake[1],
        roll=0.035 * sway(0.1, 0.5) + 0.05 * lean[0],
        yaw=0.07 * sway(0.1, 0.5) + 0.13 * lean[1],
        pitch=0.025 * sway(0.1, 0.6) + nod + 0.06 * style.bow + 0.06 * lean[2],
    )


def _brow(face: FaceTraits, style: Expression, hold: np.ndarray, side: int, fidget: np.ndarray) -> np.ndarray:
    """Closed outlines, fixed point (T, 18, 2)."""
    inner = face.eye_gap - 0.185 - 0.045 * max(style.squeeze, 0)
    x = inner + (face.eye_gap + 0.20 - inner) * _ALONG
    lift = style.raise_brows * 0.085 * (1 - 0.3 * (_ALONG - 0.5) ** 2) + style.inner_brows * 0.115 * (1 - _ALONG) ** 1.4
    rest = face.eye_y + face.brow_y - face.brow_arch * 4 * _ALONG * (1 - _ALONG) + 0.02 * _ALONG**2
    rest -= face.brow_slope * (0.5 - _ALONG) * 2
    middle = rest - hold[:, None] * lift - 0.008 * fidget[:, None]
    half = face.brow_thick * (0.58 + 0.5 * np.sin(np.pi * _ALONG)) * (1 - 0.55 * _ALONG)
    x = np.broadcast_to(side * x, middle.shape)
    upper, lower = np.stack([x, middle - half], -1), np.stack([x, middle + half], -1)
    return pixels(np.concatenate([upper, lower[:, ::-1]], axis=1))


def _eyes(face: FaceTraits, style: Expression, hold, fps: int, rng: np.random.Generator, gaze) -> list[dict]:
    """Lids, iris and patch of both eyes; blinks and glances are shared."""
    frames = len(hold)
    shut = np.zeros(frames)
    for start in np.flatnonzero(rng.random(frames) < max(style.blinks, 0.05) / fps):
        shape = np.array([0.5, 1.0, 1.0, 0.6, 0.25])[: frames - start]
        shut[start : start + 5] = np.maximum(shut[start : start + 5], shape)
    upper = face.eye_open * (1 + 0.60 * style.upper_lid * hold) * (1 - shut)
    lower = face.eye_open * 0.55 * (1 - 0.75 * style.lower_lid * hold)
    upper = np.maximum(upper, -0.6 * lower)
    arch = (4 * _ALONG * (1 - _ALONG)) ** 0.75
    eyes = []
    for side in (-1, 1):
        x = side * (face.eye_gap + face.eye_half * (2 * _ALONG - 1))
        base = face.eye_y + 0.012 - (face.eye_tilt + 0.012) * (2 * _ALONG - 1)
        x = np.broadcast_to(x, (frames, 9))
        top = base - upper[:, None] * arch - 0.6 * (shut * -lower)[:, None] * arch
        low = base + lower[:, None] * arch
        crease = np.minimum(base - 1.35 * face.eye_open * arch - 0.012, top - 0.028 * arch)
        pupil = np.stack([side * face.eye_gap + 0.012 * gaze[0], face.eye_y - 0.004 + 0.006 * gaze[1]], -1)
        eyes.append(
            {
                "shape": pixels(np.concatenate([np.stack([x, top], -1), np.stack([x, low], -1)[:, ::-1]], axis=1)),
                "top": pixels(np.stack([x, top], -1)),
                "low": pixels(np.stack([x, low], -1)),
                "crease": pixels(np.stack([x, crease], -1)),
                "pupil": pixels(pupil),
                "size": 0.47 * face.eye_half,
                "box": _eye_box(face, side),
            }
        )
    return eyes


def _eye_box(face: FaceTraits, side: int) -> tuple[slice, slice]:
    x, y = np.array([side * face.eye_gap, face.eye_y]) * UNIT + MIDDLE
    half, high = (face.eye_half + 0.04) * UNIT, 0.16 * UNIT
    return slice(int(y - high), int(y + high)), slice(int(x - half), int(x + half) + 1)


def _draw_eye(canvas: np.ndarray, eye: dict, t: int, ink: _Ink) -> None:
    rows, columns = eye["box"]
    patch = canvas[rows, columns]
    corner = np.array([columns.start, rows.start]) << 4
    ball = np.full_like(patch, (238, 234, 230))
    ball[: len(ball) * 2 // 5] = (208, 200, 196)  # the upper lid's shadow
    centre, radius = (eye["pupil"][t] - corner).tolist(), int(eye["size"] * UNIT * 16)
    cv2.circle(ball, centre, radius, ink.ring, -1, cv2.LINE_AA, 4)
    cv2.circle(ball, centre, int(radius * 0.80), ink.iris, -1, cv2.LINE_AA, 4)
    cv2.circle(ball, centre, int(radius * 0.45), (14, 12, 12), -1, cv2.LINE_AA, 4)
    glint = [centre[0] - radius // 3, centre[1] - radius // 3]
    cv2.circle(ball, glint, int(radius * 0.22), (250, 250, 250), -1, cv2.LINE_AA, 4)
    mask = np.zeros(patch.shape[:2], np.uint8)
    fill(mask, eye["shape"][t] - corner, 255)
    cover = mask[..., None].astype(np.uint16)
    patch[:] = (ball * cover + patch * (255 - cover)) // 255
    stroke(canvas, eye["crease"][t], ink.crease, 1)
    stroke(canvas, eye["low"][t], ink.under, 1)
    stroke(canvas, eye["top"][t], ink.lash, 2)


def _mouth(face: FaceTraits, style: Expression, hold: np.ndarray, lips: Lips) -> dict[str, np.ndarray]:
    """Lip contours (fixed point) and how far the jaw drops (T,), in units of half a head."""
    smile, opening, rounding = style.smile * hold, lips.opening, lips.rounding * np.minimum(1, lips.opening * 4)
    show = 0.030 * np.maximum(smile, 0) + 0.035 * style.upper_lip * hold + 0.02 * max(style.stretch, 0) * hold
    gap = 0.17 * opening * (1 - 0.25 * style.press) + show * (1 - 0.8 * max(style.press, 0))
    half = face.mouth_half * (1 + 0.20 * style.stretch * hold + 0.14 * smile - 0.25 * rounding - 0.06 * opening)
    bend = face.corner + 0.075 * smile - 0.015 * style.upper_lip * hold
    profile = (1 - _SPREAD**2) ** 0.7
    bow = 1 + 0.14 * np.exp(-(((np.abs(_SPREAD) - 0.28) / 0.16) ** 2)) - 0.26 * np.exp(-((_SPREAD / 0.12) ** 2))
    thick = face.lip * (1 - 0.5 * style.press * hold) * (1 - 0.15 * opening)
    x = half[:, None] * _SPREAD
    base = face.mouth_y + bend[:, None] * (0.35 - _SPREAD**2) - 0.03 * (style.upper_lip * hold)[:, None] * profile
    inner_top = base - (0.28 * gap)[:, None] * profile
    inner_low = base + (0.72 * gap)[:, None] * profile
    outer_top = inner_top - thick[:, None] * profile * bow
    outer_low = inner_low + 1.15 * thick[:, None] * profile
    teeth = np.minimum(inner_top + 0.055 * profile, inner_low)
    tongue = np.maximum(inner_low - 0.045 * profile, teeth)

    def ring(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return pixels(np.concatenate([np.stack([x, first], -1), np.stack([x, second], -1)[:, ::-1]], axis=1))

    return {
        "upper": ring(outer_top, inner_top),
        "lower": ring(inner_low, outer_low),
        "cavity": ring(inner_top, inner_low),
        "teeth": ring(inner_top, teeth),
        "tongue": ring(tongue, inner_low),
        "line": pixels(np.stack([x, (inner_top + inner_low) / 2], -1)),
        "gap": gap,
        "drop": 0.10 * opening,
    }


def _draw_mouth(canvas: np.ndarray, mouth: dict, t: int, ink: _Ink) -> None:
    fill(canvas, mouth["cavity"][t], (58, 20, 24))
    if mouth["gap"][t] > 0.015:
        fill(canvas, mouth["tongue"][t], (150, 72, 74))
        fill(canvas, mouth["teeth"][t], (236, 230, 220))
    fill(canvas, mouth["lower"][t], ink.lower_lip)
    fill(canvas, mouth["upper"][t], ink.upper_lip)
    if mouth["gap"][t] < 0.02:
        stroke(canvas, mouth["line"][t], ink.line, 1)


def _still(face: FaceTraits, style: Expression, albedo: np.ndarray) -> np.ndarray:
    """The head with the colour and the folds of this clip's expression."""
    still = albedo.copy()
    tip = face.eye_y + face.nose_length

    def fold(points, amount: float, thickness: int = 2) -> None:
        if amount > 0.05:
            layer = still.copy()
            stroke(layer, pixels(np.array(points)), rgb(face.skin * 0.62), thickness)
            cv2.addWeighted(layer, min(0.75 * amount, 1), still, 1 - min(0.75 * amount, 1), 0, dst=still)

    for side in (-1, 1):
        nostril, corner = side * (face.nose_width + 0.03), side * (face.mouth_half + 0.09)
        depth = 0.9 * max(style.smile, 0) + 0.8 * style.wrinkle
        fold([(nostril, tip - 0.05), (side * 0.24, tip + 0.05), (corner, face.mouth_y - 0.03)], 0.15 + depth)
        fold([(side * 0.045, face.eye_y - 0.15), (side * 0.035, face.eye_y - 0.30)], style.squeeze)
        fold([(side * 0.02, face.eye_y + 0.06), (side * 0.12, face.eye_y + 0.01)], style.wrinkle)
        fold([(side * 0.02, face.eye_y + 0.13), (side * 0.12, face.eye_y + 0.09)], style.wrinkle)
    for height in (-0.42, -0.50):
        line = [(x, face.eye_y + height - 0.03 * np.cos(3 * x)) for x in np.linspace(-0.35, 0.35, 7)]
        fold(line, 0.8 * max(style.raise_brows - 0.2, 0), 1)
    tint = np.clip(128 * (1 + 0.06 * style.flush * np.array([0.7, -0.8, -0.7])), 0, 255)
    return cv2.multiply(still, np.full_like(still, np.round(tint)), scale=1 / 128)


_COARSE = 28  # the warp is smooth: it is computed on a coarse grid and enlarged


def _shoot(canvas: np.ndarray, scene: Scene, pose: Pose, drop: float, t: int, offset: np.ndarray) -> np.ndarray:
    """Light, turn and place the head before its background: uint8 (size, size, 3)."""
    size = len(scene.background)
    lit = cv2.multiply(canvas, scene.shade, scale=1 / 160)
    step = size / _COARSE
    at = (np.arange(_COARSE) + 0.5) * step - 0.5
    x = (at - scene.centre[0] - pose.x[t])[None, :] / (scene.scale * UNIT)
    y = (at - scene.centre[1] - pose.y[t])[:, None] / (scene.scale * UNIT)
    cos, sin = np.cos(pose.roll[t]), np.sin(pose.roll[t])
    x, y = cos * x + sin * (y - 1), 1 - sin * x + cos * (y - 1)  # the head rolls about the chin
    near = np.sqrt(np.maximum(0, 1 - (x / 1.0) ** 2 - (y / 1.2) ** 2))  # the nearer to the viewer, the further it moves
    x = x - pose.yaw[t] * near
    y = y - pose.pitch[t] * near
    y = y - drop * np.clip((y - 0.55) / 0.4, 0, 1) * np.clip(1.5 - np.abs(x), 0, 1) * (y < 1.6)
    maps = [cv2.resize(axis.astype(np.float32), (size, size)) for axis in (x * UNIT + MIDDLE[0], y * UNIT + MIDDLE[1])]
    head = cv2.remap(lit, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    alpha = cv2.remap(scene.alpha, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    rest = cv2.multiply(scene.background, cv2.cvtColor(255 - alpha, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    frame = cv2.add(head, rest)
    top, left = offset
    return cv2.addWeighted(frame, 1.0, scene.grain[top : top + size, left : left + size], 1.0, -32)
