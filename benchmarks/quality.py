"""What pre-training is worth on real clips, from shards to the table: `python -m benchmarks.quality [--only grid]`.

`speech` pre-trains an audio encoder on the training rows of RAVDESS, EMO-DB and GRID, probes it frozen and fine-tunes
it on RAVDESS and EMO-DB together, beside the same network from scratch with as much compute as pre-training and
fine-tuning took, random encoders with the same menu, plain statistics, and openSMILE's features where the package is
there. `grid` pre-trains on lips and sound, finds one for the other and tells colour words. `folds` leaves four RAVDESS
actors out at a time, with an encoder that heard none of them. `planted` makes synthetic people, learns what was planted
in their voices and faces, and from answers to each alone how often the two disagree.

Each step is a command on a shipped experiment file, printed as it runs; what is finished is kept, and the same call
goes on from there. Recipes were found on development speakers (benchmarks/README.md); test clips are scored once a row.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from affekt.finetune.schema import Estimate, Results, System
from benchmarks import conflict
from benchmarks.report import print_figures

PARTS = ("speech", "grid", "folds", "planted")
LIPS = ("--face", "affekt.data.media.face:mouth", "--size", "64")
SHARDS = {
    "ravdess_audio": ("--where", "data_set=RAVDESS", "--where", "has_video=0"),
    "emodb": ("--where", "data_set=EMO-DB"),
    "grid": ("--where", "data_set=GRID"),
    "grid_lips": ("--where", "data_set=GRID", *LIPS),
}
CORPORA = {"ravdess_audio": "RAVDESS, actors 17-20", "emodb": "EMO-DB, speakers 13, 14"}
SMILE = ("egemaps", "compare")
BASELINES = ["majority", "mel", *(SMILE if find_spec("opensmile") else ())]
SYNTHETIC = {
    "synth": ("--clips", "2400", "--speakers", "60", "--seed", "7"),
    "synth_conflict": ("--clips", "1200", "--speakers", "30", "--seed", "11", "--conflict", "0.3"),
}
STREAMS = {"both": "both", "audio": "voice", "video": "face"}
ALONE = {"both": (), "audio": ("data.augment.flip=false",), "video": ("varied.sound={}",)}  # nothing else has an effect
TWIN = {"pretrained": "", "random": "random_", "statistics": "stats_"}


@dataclass
class Row:
    """One line of the table: whose score, on what, and the name of its figure."""

    what: str
    who: str
    figure: str
    score: Estimate
    seeds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with manifest.csv")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for part in arguments.only:
        rows += {"speech": speech, "grid": grid, "folds": folds, "planted": planted}[part](arguments.data)
    table = Table(title="Real clips, in percent [95 %] (each seed)")
    for name in ("On", "Who", "Score"):
        table.add_column(name, justify="right" if name == "Score" else "left")
    for row in rows:
        seeds = f" ({', '.join(f'{100 * x:.1f}' for x in row.seeds)})" if len(row.seeds) > 1 else ""
        low, high = 100 * row.score.low, 100 * row.score.high
        table.add_row(row.what, row.who, f"{100 * row.score.value:.1f} [{low:.0f}, {high:.0f}]{seeds}")
    Console(width=140).print(table)
    print_figures("quality", {row.figure: round(row.score.value, 4) for row in rows})


def speech(data: Path) -> list[Row]:
    for corpus in ("ravdess_audio", "emodb", "grid"):
        prepare(data, corpus)
    pretrain("speech_audio", procs=2)
    for config in ("speech_finetune", "speech_scratch"):
        affekt("finetune", config)
    rows = []
    for corpus, what in CORPORA.items():
        name = corpus.partition("_")[0]  # of the protocol
        frozen = evaluate(f"{name}_fixed", f"{corpus}_probe", baselines=BASELINES)
        tuned = compared(corpus, "speech_finetune", "speech_scratch")
        probe = f"{corpus}_probe"
        rows += [
            row(what, "frozen probe", f"{corpus}_probe_uar", frozen, f"{probe}_audio"),
            row(what, "frozen probe, random encoders", f"random_{corpus}_probe_uar", frozen, f"{probe}_random_audio"),
            row(what, "mel statistics + SVM", f"stats_{corpus}_probe_uar", frozen, "mel_svm"),
            row(what, "fine-tuned", f"{corpus}_finetune_uar", tuned, 0),
            row(what, "from scratch, equal compute", f"random_{corpus}_finetune_uar", tuned, 1),
            row(what, "mel statistics + SVM", f"stats_{corpus}_finetune_uar", frozen, "mel_svm"),
            *(
                row(what, f"{kind} + SVM", f"{kind}_{corpus}_uar", frozen, f"{kind}_svm")
                for kind in BASELINES
                if kind in SMILE
            ),
        ]
        gain = tuned.differences[0]
        rows.append(Row(what, f"fine-tuned minus scratch, p {gain.p:.3f}", f"{corpus}_gain", gain.estimate, []))
    return rows


def grid(data: Path) -> list[Row]:
    prepare(data, "grid_lips")
    pretrain("grid_lips")
    affekt("recall", "grid_retrieval", unless="runs/grid_lips/retrieval/results.json")
    affekt("probe", "grid_lips_probe", unless="runs/grid_lips/probe/results.json")
    found = Results.read("runs/grid_lips/retrieval/results.json")
    told = Results.read("runs/grid_lips/probe/results.json")
    rows = []
    for system in found.systems:
        features, _, space = system.name.partition(
            "_"
        )  # contrast: as it was trained; chosen: aligned on training pairs
        aligned = "aligned_" if space == "chosen" and features != "statistics" else ""
        for task, short in (("audio_to_video", "a2v"), ("video_to_audio", "v2a")):
            for k in (1, 5, 10):
                figure = f"{TWIN[features]}{aligned}grid_{short}_recall{k}"
                score = system.scores[f"{task}_recall_{k}"]
                rows.append(Row(f"GRID, {short}", f"{system.title}, recall@{k}", figure, score, []))
    for system in told.systems:
        features, _, stream = system.name.partition("_")  # with a third part it is no main row
        if features in TWIN and stream in ("audio", "video", "both"):
            figure = f"{TWIN[features]}grid_colour_{'' if stream == 'both' else stream + '_'}probe_uar"
            rows.append(Row("GRID, colour", system.title, figure, system.scores["uar"], seeds_of(system)))
    return rows


def folds(data: Path) -> list[Row]:
    for corpus in ("ravdess_audio", "emodb", "grid"):
        prepare(data, corpus)
    pretrain("speech_audio_other")
    models = ("ravdess_audio_finetune", "ravdess_audio_probe", "encoder=runs/speech_audio_other/export")
    results = evaluate("ravdess20", *models, baselines=BASELINES)
    what = "RAVDESS, four actors left out of 20"
    return [
        row(what, s.title, f"ravdess20_{s.name.partition(':')[0]}_uar", results, at)
        for at, s in enumerate(results.systems)
    ]


def planted(data: Path) -> list[Row]:
    for corpus, how in SYNTHETIC.items():
        affekt("synth", f"runs/{corpus}_corpus", *how, unless=f"shards/{corpus}/index.safetensors")
        affekt("prepare", f"runs/{corpus}_corpus/manifest.csv", f"shards/{corpus}", "--size", "112")
    pretrain("synth", procs=2)
    affekt("probe", "synth_probe", unless="runs/synth/probe/results.json")
    rows, told = [], Results.read("runs/synth/probe/results.json")
    for system in told.systems:
        features, _, stream = system.name.partition("_")
        if features in TWIN and stream in STREAMS:
            figure = f"{TWIN[features]}planted_{STREAMS[stream]}_probe_uar"
            rows.append(Row("Planted", system.title, figure, system.scores["uar"], seeds_of(system)))
    for stream, name in STREAMS.items():
        affekt("finetune", "synth_finetune", f"streams={stream}", f"out=runs/synth_{name}", *ALONE[stream])
        tuned = Results.read(f"runs/synth_{name}/results.json")
        rows.append(row("Planted", f"fine-tuned, {name}", f"planted_{name}_finetune_uar", tuned, 0))
    classic = evaluate("fixed:split", "--shards", "shards/synth", baselines=["mel", "pixels", "hog"])
    rows += [
        row("Planted", system.title, f"{system.name.partition(':')[0]}_planted_uar", classic, at)
        for at, system in enumerate(classic.systems)
    ]
    models = (f"--{name}=runs/synth_{name}/seed-0/model" for name in ("voice", "face"))
    conflict.main(["shards/synth_conflict", *models])
    return rows


def prepare(data: Path, corpus: str) -> None:
    affekt("prepare", str(data / "manifest.csv"), f"shards/{corpus}", *SHARDS[corpus])


def pretrain(config: str, procs: int = 1) -> None:
    start = ("launch", "--procs", str(procs)) if procs > 1 else ("pretrain",)
    affekt(*start, config, "--resume", "auto", unless=f"runs/{config}/export/config.json")
    affekt("export", f"runs/{config}", f"runs/{config}/export", unless=f"runs/{config}/export/config.json")


def evaluate(protocol: str, *models: str, baselines: list[str]) -> Results:
    out = f"runs/quality/{protocol.replace(':', '_')}"
    affekt("evaluate", *models, "--protocol", protocol, "--baselines", ",".join(baselines), "--out", out)
    return Results.read(f"{out}/results.json")


def compared(corpus: str, *runs: str) -> Results:
    """The first fine-tuning minus the second, paired on the clips, from the predictions of all their seeds."""
    folders = [f"runs/{run}/{corpus}/predictions" for run in runs]
    out = f"runs/quality/{corpus}_finetune"
    affekt("evaluate", "--predictions", *folders, "--out", out)
    return Results.read(f"{out}/results.json")


def row(what: str, who: str, figure: str, results: Results, name: str | int) -> Row:
    """The UAR of a system, by its place or its name, behind which the table says what was chosen on."""
    names = [system.name.partition(":")[0] for system in results.systems]
    found = results.systems[name if isinstance(name, int) else names.index(name)]
    return Row(what, who, figure, found.scores["uar"], seeds_of(found))


def seeds_of(system: System) -> list[float]:
    return [scores["uar"] for scores in system.by_seed]


def affekt(*words: str, unless: str = "") -> None:
    """Run a command of the package; not where the file `unless` is there already."""
    if unless and Path(unless).exists():
        return
    print("affekt", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "affekt", *words], stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
