"""A fine-tuned model together with the way from a media file to what it says."""

from pathlib import Path
from typing import Any

import torch

from affekt.data.errors import DataError, SettingsError
from affekt.data.media.clip import PreparedClip, PrepareSettings
from affekt.data.media.workers import prepare_clip_safely
from affekt.finetune.finetuned import load_finetuned
from affekt.model import batches_of


class Predictor:
    """What `affekt.load` returns for a folder of `affekt finetune`. `finetuned` is the judge underneath."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        self.finetuned = load_finetuned(folder, device)
        self.prepare_settings = PrepareSettings.parse(self.finetuned.network.encoder.prepare, "preprocess.json")

    @torch.inference_mode()
    def predict(self, clip: str | Path | PreparedClip, windows: int = 2) -> dict[str, Any]:
        """`probabilities` {class: p} (of one class, or where the model knows several at once, of each), `label` the
        class that is most probable (`labels` those above one half), and `values` {dimension: rating}: means over at
        most `windows` evenly spaced windows.

        Raises MediaError where a file cannot be read, DataError where it holds no stream that the model knows,
        SettingsError for less than one window.
        """
        if windows < 1:
            raise SettingsError(f"windows is {windows}; at least 1 is needed")
        name = "clip" if isinstance(clip, PreparedClip) else str(clip)
        if not isinstance(clip, PreparedClip):
            clip = prepare_clip_safely(clip, self.prepare_settings)
        model, said = self.finetuned, {}
        for batch in batches_of(clip, model.window, windows, self.prepare_settings.size, model.streams):
            for what, x in model(batch).items():
                if what == "logits":
                    x = x.sigmoid() if model.kind == "multi" else x.softmax(1)
                said.setdefault(what, []).append(x.double().cpu())
        means = {what: torch.cat(parts).mean(0) for what, parts in said.items()}
        if any(mean.isnan().any() for mean in means.values()):
            raise DataError(f"{name}: holds no stream of this model, which knows {model.streams}")
        found: dict[str, Any] = {}
        if "logits" in means:
            p = dict(zip(model.classes, means["logits"].tolist(), strict=True))
            several = [name for name, share in p.items() if share > 0.5]
            found |= {"labels": several} if model.kind == "multi" else {"label": max(p, key=p.get)}
            found["probabilities"] = p
        if "values" in means:
            found["values"] = dict(zip(model.dimensions, means["values"].tolist(), strict=True))
        return found
