"""The embedded corpus: `synthesise` writes clips of procedural talking faces and a manifest."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import write_text
from affekt.data.machine import available_cores, run_in_processes
from affekt.data.synth.face import act
from affekt.data.synth.film import write_clip
from affekt.data.synth.head import FaceTraits, draw_face, set_scene
from affekt.data.synth.plan import LICENCE, ClipPlan, Speaker, Strengths, generator, plan_clip, plan_speakers
from affekt.data.synth.voice import Lips, VoiceTraits, draw_voice, speak

FPS = 25
SIZE = 224
COLUMNS = (
    *("id", "video", "audio", "speaker", "sex", "label", "label_voice", "label_face"),
    *("votes", "valence", "arousal", "split", "licence"),
)
# Of the pixels and samples that given arguments lead to. Raise it with every change that changes them: a folder of an
# older version is then refused instead of filled up with clips of another kind.
CONTENT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the content of a corpus but the number of clips."""

    speakers: int
    seed: int
    conflict: float
    missing: float
    seconds: float
    strengths: Strengths


def synthesise(
    out: str | Path,
    clips: int,
    speakers: int,
    seed: int = 0,
    *,
    conflict: float = 0.0,
    noise: float = 1.0,
    missing: float = 0.0,
    seconds: float = 3.0,
    strengths: Strengths | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a corpus to the folder `out` and return the path of its `manifest.csv`.

    `conflict`: share of clips whose voice and face show different emotions; `label` is then that of the voice.
    `missing`: share of clips that lack a stream, half of them the sound (mp4 without it), half the picture (FLAC).
    `noise`: factor on the amplitude of the noise in the sound. `strengths`: how hard the corpus is, see `Strengths`.
    `workers`: processes, by default one per core; it does not change a bit of the result.

    A second call with the same arguments keeps the clips that are there, so an interrupted run is finished by repeating
    it; more `clips` add to the corpus. Raises SettingsError for arguments out of range and for a folder that holds
    anything else, DataError when a file cannot be written.
    """
    strengths = strengths or Strengths()
    strengths = dataclasses.replace(strengths, noise=strengths.noise * noise)
    recipe = Recipe(
        speakers=speakers, seed=seed, conflict=conflict, missing=missing, seconds=seconds, strengths=strengths
    )
    _check(recipe, clips, noise, workers)
    folder = Path(out)
    _claim(folder, recipe, clips)
    plans = plan_corpus(recipe, clips)
    todo = [plan.number for plan in plans if not (folder / _file(plan)).exists()]
    done = clips - len(todo)
    if progress:
        progress(done, clips)
    for _ in _make_all(folder, recipe, todo, workers or available_cores()):
        done += 1
        if progress:
            progress(done, clips)
    return _write_manifest(folder, plans)


def plan_corpus(recipe: Recipe, clips: int) -> list[ClipPlan]:
    """What every clip will show, without making it."""
    cast = plan_speakers(recipe.speakers, recipe.seed)
    return [plan_clip(number, cast, recipe.seed, recipe.conflict, recipe.missing) for number in range(clips)]


def render(plan: ClipPlan, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, Lips]:
    """One clip in memory: film uint8 RGB (T, 224, 224, 3), sound float32 (S,) at 16 kHz, and the lips between them."""
    seed, number, strengths = recipe.seed, plan.number, recipe.strengths
    voice, face = _person(plan.speaker, seed, strengths)
    rng = generator(seed, "voice of clip", number)
    sound, lips = speak(voice, plan.label_voice, plan.intensity_voice, recipe.seconds, FPS, rng, strengths)
    identity = plan.speaker.number + 1000 * (seed % 1000)
    scene = set_scene(face, identity, SIZE, generator(seed, "scene of clip", number), strengths)
    rng = generator(seed, "face of clip", number)
    film = act(face, scene, plan.label_face, plan.intensity_face, lips, FPS, rng, strengths)
    return film, sound, lips


@lru_cache(maxsize=256)
def _person(speaker: Speaker, seed: int, strengths: Strengths) -> tuple[VoiceTraits, FaceTraits]:
    voice = draw_voice(generator(seed, "voice", speaker.number), speaker.sex, speaker.youth, strengths)
    return voice, draw_face(generator(seed, "face", speaker.number), speaker.sex, speaker.youth, strengths)


def _check(recipe: Recipe, clips: int, noise: float, workers: int | None) -> None:
    limits = {
        "clips": (clips, 1, 10_000_000),
        "speakers": (recipe.speakers, 1, 10_000),
        "seed": (recipe.seed, 0, 2**32 - 1),
        "conflict": (recipe.conflict, 0, 1),
        "missing": (recipe.missing, 0, 1),
        "seconds": (recipe.seconds, 0.5, 60),
        "noise": (noise, 0, 10),
        "workers": (1 if workers is None else workers, 1, 1024),
        **{f"strengths.{name}": (value, 0, 10) for name, value in dataclasses.asdict(recipe.strengths).items()},
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise SettingsError(f"{name} is {value}; it must lie between {low} and {high}")


def _claim(folder: Path, recipe: Recipe, clips: int) -> None:
    """Write the arguments into the folder, or compare them with those that are there."""
    mine = {"format": "affekt-synth", "version": CONTENT_VERSION, **dataclasses.asdict(recipe)}
    path = folder / "synth.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made = found.pop("clips")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise SettingsError(
                f"{path}: not readable as written by affekt synth ({error}); use another folder"
            ) from None
        differ = [
            f"{key}: {found.get(key)} there, {mine.get(key)} asked"
            for key in {**found, **mine}
            if found.get(key) != mine.get(key)
        ]
        if differ:
            raise SettingsError(
                f"{folder} holds a corpus made with other arguments ({'; '.join(differ)}); "
                "repeat those arguments, choose another folder, or delete this one"
            )
        if clips < made:
            raise SettingsError(f"{folder} was made for {made} clips; ask for {made} or more, or choose another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and not a corpus of affekt synth; choose another folder")
    try:
        (folder / "clips").mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**mine, "clips": clips}, indent=1) + "\n")
    except (OSError, DataError) as error:
        raise SettingsError(f"{folder}: cannot be written: {error}") from None


def _make_all(folder: Path, recipe: Recipe, todo: list[int], workers: int) -> Iterator[int]:
    if min(workers, len(todo)) <= 1:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            yield from map(partial(_make, folder, recipe), todo)
        finally:
            cv2.setNumThreads(threads)
        return
    jobs = [(folder, recipe, number) for number in todo]
    for _, made in run_in_processes(_make, jobs, workers, partial(cv2.setNumThreads, 1)):
        yield made


def _make(folder: Path, recipe: Recipe, number: int) -> int:
    cast = _cast(recipe.speakers, recipe.seed)
    plan = plan_clip(number, cast, recipe.seed, recipe.conflict, recipe.missing)
    film, sound, _ = render(plan, recipe)
    path = folder / _file(plan)
    try:
        write_clip(path, film if plan.picture else None, sound if plan.sound else None, FPS)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}; repeat the command to go on from here") from None
    return number


@lru_cache(maxsize=4)
def _cast(speakers: int, seed: int) -> list[Speaker]:
    return plan_speakers(speakers, seed)


def _file(plan: ClipPlan) -> str:
    return f"clips/{plan.id}.{'mp4' if plan.picture else 'flac'}"


def _write_manifest(folder: Path, plans: list[ClipPlan]) -> Path:
    path = folder / "manifest.csv"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(plan) for plan in plans)
    write_text(path, text.getvalue())
    return path


def _row(plan: ClipPlan) -> dict[str, object]:
    return {
        "id": plan.id,
        "video": _file(plan) if plan.picture else "",
        "audio": "" if plan.picture else _file(plan),  # the sound of an mp4 is inside it
        "speaker": plan.speaker.id,
        "sex": plan.speaker.sex,
        "label": plan.label_voice,
        "label_voice": plan.label_voice,
        "label_face": plan.label_face,
        "votes": json.dumps(plan.votes),
        "valence": plan.valence,
        "arousal": plan.arousal,
        "split": plan.speaker.split,
        "licence": LICENCE,
    }
