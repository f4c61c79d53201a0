"""A fine-tuned model: what it says about a batch, and the folder that holds everything to ask it again.

`model.safetensors` weights, `config.json` architecture, head, classes, dimensions with their ranges and temperatures,
`preprocess.json` what turns media into inputs, `pretrain_data.json` which clips the weights have seen, with labels or
without, `README.md` a model card. The same major version of the format reads.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from affekt import __version__
from affekt.data.batch import Batch, Streams
from affekt.data.decode import Window
from affekt.data.errors import CheckpointError
from affekt.data.files import check_version
from affekt.finetune.classifier import Classifier
from affekt.finetune.predictions import Kind
from affekt.finetune.training.adapting import Adapting
from affekt.finetune.training.heads import create_head
from affekt.finetune.training.settings import HeadSettings
from affekt.pretrain.engine import AUTOCAST
from affekt.pretrain.export import create_encoder
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.seen import SEEN_FILE, stamped

FORMAT, VERSION = "affekt-finetuned", "1.0"
FILES = {"model.safetensors", "config.json", "preprocess.json", SEEN_FILE, "README.md"}


@dataclass
class Finetuned:
    """A network with the names of what it says; a `Judge`.

    `dimensions` are names with the range of their ratings, which outputs of -1 to 1 stand for; `columns` and `places`
    choose, for one corpus, among the classes and dimensions of the head, `width` classes wide (all by default).
    `temperatures` divide the logits: one, or one per class. `adapter_width` is that of `Adapting`.
    """

    network: Classifier
    classes: list[str]
    dimensions: dict[str, tuple[float, float]]
    kind: Kind = "single"
    head: HeadSettings = field(default_factory=HeadSettings)
    streams: Streams = "both"
    precision: str = "fp32"
    temperatures: list[float] = field(default_factory=list)
    columns: list[int] | None = None
    places: list[int] | None = None
    width: int | None = None
    adapter_width: int = 0

    @property
    def window(self) -> Window:
        return self.network.encoder.window

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` (B, K) and `values` (B, D) in units of the ratings; NaN rows for clips without a stream."""
        outputs, _ = self._ask(batch)
        width = len(self.classes) if self.width is None else self.width
        said = {}
        if self.classes:
            logits = outputs[:, :width] if self.columns is None else outputs[:, self.columns]
            said["logits"] = logits / logits.new_tensor(self.temperatures) if self.temperatures else logits
        if self.dimensions:
            values = outputs[:, width:] if self.places is None else outputs[:, [width + i for i in self.places]]
            low, high = (values.new_tensor([span[i] for span in self.dimensions.values()]) for i in (0, 1))
            said["values"] = (values * (high - low) + low + high) / 2
        return said

    def features(self, batch: Batch) -> Tensor:
        """(B, F) float32: what the heads read, picture before sound; rows of clips that lack a stream that others of
        the batch have mean nothing."""
        _, parts = self._ask(batch)
        return torch.cat([parts[stream].float().flatten(1) for stream in ("video", "audio") if stream in parts], 1)

    def _ask(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.network.parameters()).device
        half = AUTOCAST.get(self.precision)
        self.network.eval()
        with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
            outputs, parts = self.network(self.network.encoder.preprocess(batch.to(device)), with_features=True)
        return outputs.float(), parts


def save_finetuned(model: Finetuned, out: Path, origin: dict[str, Any], seen: dict[str, Any]) -> Path:
    """Write the folder, built under a temporary name and renamed; what stood at `out` is replaced where it is one of
    these. Raises CheckpointError when the disk refuses or `out` holds something else."""
    if out.exists() and not {entry.name for entry in out.iterdir()} <= FILES:
        raise CheckpointError(f"{out}: exists and is not a fine-tuned model alone; choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    encoder = model.network.encoder
    config = {
        "format": FORMAT,
        "version": VERSION,
        "affekt": __version__,
        "model": encoder.settings.model_dump(mode="json"),
        "head": model.head.model_dump(mode="json"),
        "streams": model.streams,
        "kind": model.kind,
        "classes": model.classes,
        "dimensions": {name: list(span) for name, span in model.dimensions.items()},
        "temperatures": model.temperatures,
        "adapter_width": model.adapter_width,
        "origin": origin,
    }
    preprocess = {
        "window": encoder.window.model_dump(mode="json"),
        "transforms": encoder.preprocess.to_dict(),
        "prepare": encoder.prepare,
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.network.state_dict().items()}, partial / "model.safetensors")
        for name, content in (("config", config), ("preprocess", preprocess), ("pretrain_data", stamped(seen))):
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (partial / f"{name}.json").write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(model_card(model, origin, seen), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out}: the model cannot be written: {error}") from error
    return out


def load_finetuned(folder: str | Path, device: torch.device | str = "cpu") -> Finetuned:
    """Read what `save_finetuned` wrote. Raises CheckpointError for a missing or damaged file, another format version,
    other preprocessing than ours, or weights whose names or shapes are not those of the configuration."""
    folder = Path(folder)
    try:
        config, preprocess = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "preprocess")
        )
        if config.get("format") == "affekt-export":
            raise CheckpointError(
                f"{folder}: an encoder alone, which knows no classes; `affekt finetune` with encoder={folder} makes a "
                "model of it (OUT/seed-0/model)"
            )
        check_version(config, FORMAT, VERSION, folder / "config.json", CheckpointError)
        settings = HiCMAESettings.parse_saved(config["model"], str(folder / "config.json"))
        window = Window.parse_saved(preprocess["window"], str(folder / "preprocess.json"))
        encoder = create_encoder(settings, window.frame_stride, preprocess["prepare"])
        if encoder.window != window or encoder.preprocess.to_dict() != preprocess["transforms"]:
            raise CheckpointError(f"{folder / 'preprocess.json'}: other preprocessing than this affekt does")
        head = HeadSettings.parse_saved(config["head"], str(folder / "config.json"))
        dimensions = {name: tuple(span) for name, span in config["dimensions"].items()}
        outputs = len(config["classes"]) + len(dimensions)
        network = create_head(encoder, outputs, config["streams"], head)
        Adapting(adapter_width=config["adapter_width"]).add(network)
        weights = load_file(folder / "model.safetensors")
        network.load_state_dict(weights)
        broken = [name for name, x in weights.items() if not x.isfinite().all()]
        if broken:
            raise ValueError(f"numbers that are not finite in {', '.join(broken[:5])}")
    except CheckpointError:
        raise
    except Exception as error:  # files, keys and shapes each raise a class of their own
        raise CheckpointError(f"{folder}: no fine-tuned model of `affekt finetune` can be read: {error}") from error
    how = {name: config[name] for name in ("kind", "streams", "temperatures", "adapter_width")}
    return Finetuned(network.to(device).eval(), config["classes"], dimensions, head=head, **how)


def is_finetuned(folder: str | Path) -> bool:
    """Whether a folder says that it is one of these."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def model_card(model: Finetuned, origin: dict[str, Any], seen: dict[str, Any]) -> str:
    says = ", ".join(model.classes) or "no classes"
    rates = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in model.dimensions.items())
    licences = "\n".join(f"- {licence}" for licence in seen["licences"]) or "- not stated in the shards"
    several = " Several may hold at once." if model.kind == "multi" else ""
    chosen = f"epoch {origin['epoch']}, chosen on development clips" if origin["chosen"] == "best" else "the last epoch"
    return f"""# {origin["title"]}

Fine-tuned by affekt {__version__} from {origin["encoder"]} (seed {origin["seed"]}, {chosen}).

Input: {"picture and sound" if model.streams == "both" else model.streams}. Classes: {says}.{several}
{f"Dimensions: {rates}." if rates else ""}

    affekt predict --model this/folder clip.mp4

## Data and licences
Learned from clips of {len(seen["speakers"])} speakers, with labels or without. Licences of these clips, which pass on
to the weights:
{licences}

## Use
For research. Expressions are not feelings: scores carry the biases of the clips and of those who labelled them, and
laws restrict emotion recognition of people (in the EU at work and in education, Regulation 2024/1689 article 5).
"""
