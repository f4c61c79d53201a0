"""Whether the share of clips whose voice and face disagree is found again: `python -m benchmarks.conflict SHARDS ...`.

SHARDS are made of `affekt synth --conflict 0.3`, so that every clip says what was planted in its voice and in its face.
Two fine-tuned models (or one of both streams, asked with each alone) answer by one stream each. From their answers on
all other speakers, calibrated on the development speakers, follows the share of conflicts; the planted one is known.
The models must have been trained on another corpus (another `--seed`). The last line of the output is JSON.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from affekt.data.shards import ShardIndex
from affekt.data.split import where
from affekt.finetune.finetuned import Finetuned, load_finetuned
from affekt.finetune.judge import judge_clips
from affekt.finetune.predictions import Predictions
from affekt.finetune.scores import values
from affekt.finetune.stress.conflict import conflict_share, describe_conflict, said_by_raters, subsets
from affekt.finetune.stress.missing import missing
from affekt.finetune.stress.scene import Scene
from benchmarks.report import print_figures

ALONE = {"voice": 2.0, "face": 1.0}  # levels of SMM: the sound alone, the pictures alone


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--voice", type=Path, required=True, help="a model's folder; of sound, or of both streams")
    parser.add_argument("--face", type=Path, required=True, help="a model's folder; of pictures, or of both streams")
    arguments = parser.parse_args(argv)
    index = ShardIndex.open(arguments.shards)
    models = {"voice": load_finetuned(arguments.voice), "face": load_finetuned(arguments.face)}
    sides = {"dev": where(index, {"split": "dev"}), "test": where(index, {"split": ["train", "test"]})}
    said = {(who, side): answers(models[who], index, sides[side], who) for who in models for side in sides}
    figures = recovered(index, sides["test"], said)
    table = Table(title=f"{len(said['voice', 'test'])} test clips")
    for column in ("figure", "value"):
        table.add_column(column)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    Console().print(table)
    print_figures("conflict", figures)


def answers(model: Finetuned, index: ShardIndex, positions: list[int], who: str) -> Predictions:
    """What a model says of clips by the voice or by the face alone, beside what was planted there."""
    alter = None
    if model.streams == "both":
        alter = missing(Scene(index, positions, model.window), "SMM", ALONE[who], "drop")
    judged = judge_clips(model, index, positions, kind=model.kind, alter=alter)
    metas = [index.samples.row(p)["meta"] for p in judged.positions]
    label = np.array([model.classes.index(meta[f"label_{who}"]) for meta in metas])
    speakers = [str(meta["speaker"]) for meta in metas]
    return Predictions(judged.ids, model.classes, logits=judged.logits, label=label, meta={"speaker": speakers})


def recovered(index: ShardIndex, test: list[int], said: dict[tuple[str, str], Predictions]) -> dict[str, float]:
    """Figures by name; shares of 0 to 1."""
    rows = [index.samples.row(p) for p in test]
    voice, face, _ = said_by_raters(rows)
    planted = float(np.mean(subsets(voice, face) == "conflict"))
    heard, seen = said["voice", "test"], said["face", "test"]
    place = {row["id"]: number for number, row in enumerate(rows)}
    order = [place[clip] for clip in heard.ids]
    follows = describe_conflict(heard, [voice[i] for i in order], [face[i] for i in order])
    found = conflict_share(heard, seen, said["voice", "dev"], said["face", "dev"])
    return {
        "conflict_share_planted": planted,
        "conflict_share_by_answers": found,
        "conflict_share_error": abs(found - planted),
        "conflict_share_uncorrected": float(np.mean(heard.logits.argmax(1) != seen.logits.argmax(1))),
        "voice_uar": values(heard, ["uar"])["uar"],
        "face_uar": values(seen, ["uar"])["uar"],
        "audio_follow_of_voice_model": follows.audio_follow.value,
    }


if __name__ == "__main__":
    main()
