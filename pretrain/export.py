"""Export: a folder that holds everything to run an encoder, and loads without DeepSpeed.

`model.safetensors` weights, `config.json` architecture and format version, `preprocess.json` what turns media into
inputs, `pretrain_data.json` which clips the weights have seen, `README.md` a model card. The same major version of
the format reads; another one is refused with both versions named.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from affekt import __version__
from affekt.data.decode import Window
from affekt.data.errors import CheckpointError
from affekt.data.files import check_version
from affekt.data.media.clip import PrepareSettings
from affekt.pretrain.checkpoint import find_checkpoint, read_checkpoint
from affekt.pretrain.encoder import NOT_EXPORTED, Encoder
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.published import PUBLISHED_STRIDE, Published, load_weights, read_published
from affekt.pretrain.seen import SEEN_FILE, read_seen, stamped
from affekt.pretrain.settings import PretrainSettings

FORMAT, VERSION = "affekt-export", "1.1"  # 1.1: with the projection heads of the contrast, where there are some
# What weights are for, where names and shapes do not tell all of it: heads, and which place a position stands for.
ARCHITECTURE = ("embed_dim", "num_heads", "depth", "fusion_depth", "patch_size", "tubelet_size", "patch_size_audio")
ARCHITECTURE += ("img_size", "num_frames", "mel_frames", "mel_bins", "mel_window_ms", "positions")
DECODERS = ("decoder_embed_dim", "decoder_num_heads", "taps")
FILES = {"model.safetensors", "config.json", "preprocess.json", SEEN_FILE, "README.md"}


def export(run: str | Path, out: str | Path, checkpoint: str = "latest") -> Path:
    """Write the encoders of a run's checkpoint to the folder `out`, built under a temporary name and renamed. `run` may
    be a `.pth` file of the authors of HiCMAE.

    Raises CheckpointError when the run has no complete checkpoint, `checkpoint` is the path of another run's, a file is
    refused, or `out` exists and is not an export.
    """
    run, out = Path(run), Path(out)
    if out.exists() and not _is_export(out):
        raise CheckpointError(f"{out}: exists and is not an export alone; choose another folder")
    if run.is_file():
        if checkpoint != "latest":
            raise CheckpointError(f"{run}: a file holds one set of weights; leave --checkpoint {checkpoint} out")
        published = read_published(run)
        save_encoder(published_encoder(published), out, {"run": run.name, "step": "published"}, published.seen)
        return out
    if not (run / "settings.yaml").is_file():
        raise CheckpointError(f"{run}: not a run folder (no settings.yaml)")
    path = find_checkpoint(run / "checkpoints", checkpoint)
    if path.resolve().parent != (run / "checkpoints").resolve():
        raise CheckpointError(f"{path}: not a checkpoint of {run}, whose list of clips would go with it")
    state, weights, _ = read_checkpoint(path)
    settings = PretrainSettings.parse_saved(state["settings"], str(path / "state.json"))
    seen = read_seen(run)
    encoder = create_encoder(settings.model, settings.data.frame_stride, seen["prepare"])
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith(NOT_EXPORTED)})
    save_encoder(
        encoder, out, {"run": run.name, "step": state["step"], "pretrain": settings.model_dump(mode="json")}, seen
    )
    return out


def create_encoder(settings: HiCMAESettings, frame_stride: int, prepare: dict[str, Any]) -> Encoder:
    """An encoder with fresh weights, its window and its preprocessing, from the settings of a pre-training run."""
    window = Window(num_frames=settings.num_frames, frame_stride=frame_stride, mel_frames=settings.mel_frames)
    return Encoder(settings, window, settings.preprocess, prepare).eval()


def save_encoder(encoder: Encoder, out: Path, origin: dict[str, Any], seen: dict[str, Any]) -> None:
    """Write the export folder; an export that stood at `out` is replaced. Raises CheckpointError when the disk refuses;
    what stood there then stays."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_files(encoder, partial, origin, seen)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out}: the export cannot be written: {error}") from error


def _write_files(encoder: Encoder, folder: Path, origin: dict[str, Any], seen: dict[str, Any]) -> None:
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, folder / "model.safetensors")
    config = {
        "format": FORMAT,
        "version": VERSION,
        "affekt": __version__,
        "model": encoder.settings.model_dump(mode="json"),
        "origin": origin,
    }
    preprocess = {
        "window": encoder.window.model_dump(mode="json"),
        "transforms": encoder.preprocess.to_dict(),
        "prepare": encoder.prepare,
    }
    for name, content in (("config", config), ("preprocess", preprocess), ("pretrain_data", stamped(seen))):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(model_card(encoder, origin, seen), encoding="utf-8")


def published_encoder(published: Published) -> Encoder:
    """The encoders of a file of the authors; its decoders or its classifier are left out, which is said on stderr."""
    encoder = create_encoder(published.settings, PUBLISHED_STRIDE, published.prepare)
    load_weights(encoder, published.weights | published.classifier, str(published.path))
    return encoder


def start_from(model: HiCMAE, source: str | Path) -> dict[str, Any]:
    """Load `pretrained=` weights, an export folder or a file of the authors, into a model about to be pre-trained, and
    return what they have seen. Decoders that `source` lacks stay as they are; all else has to fit."""
    if Path(source).is_file():
        published = read_published(source, taps=model.settings.taps)
        theirs, weights, seen = published.settings, published.weights | published.classifier, published.seen
    else:
        encoder = load_encoder(source)
        theirs, weights, seen = encoder.settings, encoder.state_dict(), read_seen(source)
        if (theirs.projector_dim, theirs.taps) != (model.settings.projector_dim, model.settings.taps):
            weights = {name: x for name, x in weights.items() if not name.startswith("projector_")}
    fields = ARCHITECTURE + (DECODERS if any(name.startswith("decoder_") for name in weights) else ())
    odd = [
        f"{name} is {getattr(theirs, name)}, the model's is {getattr(model.settings, name)}"
        for name in fields
        if getattr(theirs, name) != getattr(model.settings, name)
    ]
    if odd:  # some of these no shape would tell
        raise CheckpointError(
            f"{source}: other settings than those of the model to start: {'; '.join(odd)}. "
            f"Set model.name={theirs.name} and these like the file's, or start without it"
        )
    load_weights(model, weights, str(source), may_lack=(*NOT_EXPORTED, "projector_"))
    return seen


def load_encoder(folder: str | Path) -> Encoder:
    """Read an export, or a `.pth` file of the authors of HiCMAE. Raises CheckpointError for a missing or damaged file,
    another format version, or weights whose names or shapes are not exactly those of the configuration."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such file or folder; an export or a HiCMAE .pth file is expected")
    if folder.is_file():
        return published_encoder(read_published(folder))
    config, preprocess = (_read_json(folder, name) for name in ("config.json", "preprocess.json"))
    check_version(config, FORMAT, VERSION, folder / "config.json", CheckpointError)
    try:
        model = _known(config["model"], HiCMAESettings.model_fields)
        window = Window.parse(_known(preprocess["window"], Window.model_fields), str(folder / "preprocess.json"))
        transforms, prepare = preprocess["transforms"], _known(preprocess["prepare"], PrepareSettings.model_fields)
    except (LookupError, AttributeError) as error:
        raise CheckpointError(f"{folder}: config.json or preprocess.json is incomplete: {error!r}") from error
    encoder = create_encoder(HiCMAESettings.parse(model, str(folder / "config.json")), window.frame_stride, prepare)
    ours = encoder.preprocess.to_dict()
    if ours != _known(transforms, {*ours, "mel_window_ms"}) or encoder.window != window:
        raise CheckpointError(
            f"{folder / 'preprocess.json'}: the weights were trained on other preprocessing than this affekt does "
            f"(file: {preprocess}; here: {encoder.window}, {encoder.preprocess.to_dict()})"
        )
    try:
        weights = load_file(folder / "model.safetensors")
        if not any(name.startswith("projector_") for name in weights):
            encoder.drop_projectors()  # an export of 1.0
        encoder.load_state_dict(weights)
        broken = [name for name, x in weights.items() if not x.isfinite().all()]
        if broken:
            raise ValueError(f"numbers that are not finite in {', '.join(broken[:5])}")
    except Exception as error:  # safetensors raises its own class for damage, torch RuntimeError for names and shapes
        raise CheckpointError(f"{folder / 'model.safetensors'}: does not fit its config.json: {error}") from error
    return encoder


def random_encoder(folder: str | Path, seed: int) -> Encoder:
    """An encoder of the export's configuration with fresh weights: the baseline beside the trained one."""
    trained = load_encoder(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_encoder(trained.settings, trained.window.frame_stride, trained.prepare)


def model_card(encoder: Encoder, origin: dict[str, Any], seen: dict[str, Any]) -> str:
    s = encoder.settings
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    licences = "\n".join(f"- {licence}" for licence in seen["licences"]) or "- not stated in the shards"
    made = f"pre-trained without labels by affekt {__version__} ({origin['run']}, step {origin['step']})"
    clips = f"{len(seen['ids'])} clips of {len(seen['speakers'])} speakers"
    if origin["step"] == "published":
        made = (
            f"published by the authors of HiCMAE ({origin['run']}) and brought into this form by affekt {__version__}"
        )
        clips = f"{' and '.join(seen['data_sets'])}; the file does not list its clips"
    return f"""# {s.name} ({s.streams}), {parameters:.1f} M parameters

Encoders of a HiCMAE model, {made}.

    import affekt
    model = affekt.load("this/folder")
    model.embed("clip.mp4")

Input: {s.num_frames} frames of {s.img_size} px, every {encoder.window.frame_stride}th at 25 fps, and
{s.mel_frames} log-mel frames of 16 kHz sound ({encoder.window.audio_samples} samples).

## Data and licences
{clips[0].upper() + clips[1:]}. Licences of these clips, which pass on to the weights:
{licences}

## Use
For research. Expressions are not feelings: scores carry the biases of the clips and of those who labelled them, and
laws restrict emotion recognition of people (in the EU at work and in education, Regulation 2024/1689 article 5).
"""


def _is_export(folder: Path) -> bool:
    """An export and nothing beside it, so that replacing the folder loses nothing else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = isinstance(config, dict) and config.get("format") == FORMAT
    return ours and {entry.name for entry in folder.iterdir()} <= FILES


def _known(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Without the keys that a newer minor version added."""
    return {key: value for key, value in values.items() if key in known}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / name}: not readable ({error}); is this a folder of `affekt export`?"
        ) from error
