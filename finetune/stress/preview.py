"""A sheet to look at: pictures and spectrogram of one clip, as they are and spoiled in every way."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from affekt.data.batch import Batch
from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.files import committed
from affekt.data.loader import eval_loader
from affekt.data.shards import ShardIndex
from affekt.data.transforms import log_mel
from affekt.finetune.stress.beginnings import Beginnings
from affekt.finetune.stress.menu import ALTERATIONS
from affekt.finetune.stress.missing import missing
from affekt.finetune.stress.scene import Scene
from affekt.finetune.stress.settings import StressSettings

SIDE, PICTURES, MEL, NAME, GAP = 72, 6, 320, 190, 4


def write_preview(
    path: Path, index: ShardIndex, positions: list[int], window: Window, settings: StressSettings
) -> Path:
    """A PNG with a row per alteration at its first and last level that changes anything, per generator of missing
    input at half, and for the beginning of the clip. The clip is the first that has both streams, or else any.

    Raises SettingsError where there is no clip, DataError where it cannot be read.
    """
    if not positions:
        raise SettingsError("a preview needs a clip; none was chosen")
    samples = index.samples
    chosen = next((p for p in positions if samples.has_audio[p] and samples.has_video[p]), positions[0])
    batch, scene = _view(index, chosen, window), Scene(index, positions, window)
    rows = [("as it is", batch)]
    for name, levels in settings.alterations.items():
        one = ALTERATIONS[name]
        steps = [level for level in levels or one.levels if level != one.clean]
        for level in dict.fromkeys((*steps[:1], *steps[-1:])):
            rows.append((f"{name} {level:g} {one.unit}", one.make(scene, level)(batch)))
    for name in settings.missing:
        for fill in settings.fills:
            rate = 1.0 if name == "SMM" else 0.5
            rows.append((f"{name} {rate:g} {fill}", missing(scene, name, rate, fill)(batch)))
    for share in settings.early[:1]:
        rows.append((f"first {share:.0%} of the clip", _view(Beginnings(index, share), chosen, window)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with committed(path) as file:
        _sheet(rows, f"clip {samples[chosen].id}").save(file, "PNG")
    return path


def _view(index: ShardIndex, position: int, window: Window) -> Batch:
    batch = next(iter(eval_loader(index, window, indices=[position], batch_size=1)), None)
    if batch is None or not batch.ids:
        raise DataError(f"clip {index.samples[position].id} cannot be read; choose others to preview")
    return batch


def _sheet(rows: list[tuple[str, Batch]], title: str) -> Image.Image:
    wide = NAME + PICTURES * (SIDE + GAP) + MEL + GAP
    sheet = Image.new("RGB", (wide, 20 + len(rows) * (SIDE + GAP)), "white")
    draw, scale = ImageDraw.Draw(sheet), None
    draw.text((GAP, GAP), title, fill="black")
    for number, (name, batch) in enumerate(rows):
        top = 20 + number * (SIDE + GAP)
        draw.text((GAP, top + SIDE // 2 - 6), name.strip(), fill="black")
        if batch.has_video[0]:
            video = batch.video[0]
            for place, at in enumerate(np.linspace(0, len(video) - 1, PICTURES).round().astype(int)):
                picture = Image.fromarray(video[at].numpy()).resize((SIDE, SIDE))
                sheet.paste(picture, (NAME + place * (SIDE + GAP), top))
        if batch.has_audio[0]:
            mel = log_mel(batch.audio, 64, torch.tensor([batch.audio.shape[1]]))[0].numpy().T[::-1]
            scale = scale or tuple(np.quantile(mel, [0.05, 0.995]))  # of the clip as it is, for all rows
            grey = ((mel - scale[0]) / max(scale[1] - scale[0], 1e-6)).clip(0, 1) * 255
            picture = Image.fromarray(grey.astype(np.uint8)).resize((MEL, SIDE))
            sheet.paste(picture, (NAME + PICTURES * (SIDE + GAP), top))
    return sheet
