"""From predictions on the disk to `results.json`, `results.csv` and `report.html`: all seeds are one system."""

from pathlib import Path
from typing import Any

from affekt.data.files import write_text
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.results import versions
from affekt.finetune.report.results import write_results_report
from affekt.finetune.report.rows import results_csv
from affekt.finetune.schema import Results
from affekt.finetune.scores import cluster_of, describe_system, main_score, values
from affekt.finetune.splits import describe_side, licences
from affekt.finetune.training.choice import name_of_choice
from affekt.finetune.training.clips import Clips, Part
from affekt.finetune.training.mapping import read_map
from affekt.finetune.training.settings import FinetuneSettings


def write_results(
    settings: FinetuneSettings, clips: Clips, seen: dict[str, Any] | None, seen_by_test: dict[str, Any]
) -> Results:
    """Score the test predictions of every judged corpus and write its results; those of the first are returned. `seen`
    is what pre-training saw, `seen_by_test` what each corpus shares with that."""
    found = []
    for part in (part for part in clips.parts if part.judged):
        folder = corpus_folder(settings, part)
        files = {side: [prediction_file(folder, seed, side) for seed in settings.seeds] for side in ("dev", "test")}
        dev, test = ([Predictions.read(path) for path in files[side] if path.exists()] for side in ("dev", "test"))
        about = test[0].about
        system = describe_system(
            about["name"],
            settings.title,
            about["name"],
            test,
            dev,
            bootstrap=settings.bootstrap,
            cluster=cluster_of(test[0]),
            transductive=settings.transductive,
        )
        system.predictions = [str(path.relative_to(folder)) for path in files["test"]]
        results = Results(
            command="finetune",
            title=settings.title,
            task=settings.task,
            label=next(corpus.labels.told for corpus in settings.data.parts if corpus.name == part.name),
            classes=part.targets.classes,
            dimensions=list(part.targets.dimensions),
            main_score=main_score(settings.task),
            protocol={"chosen_by": name_of_choice(settings), "dev": [scores_of(table) for table in dev]},
            clips={
                "parts": {
                    name: describe_side(part.index, clips, part.targets.classes, part.targets.label[clips])
                    for name, clips in sides(part, settings.refit).items()
                },
                "unread": {clip: cause for table in test for clip, cause in table.about["unread"].items()},
            },
            systems=[system],
            map=read_map(map_file(folder), settings.map_clips) or [],
            pretraining=seen_by_test.get(part.name, {}),
            licences=licences(part.index, part.train + part.dev + part.test, seen),
            settings=settings.model_dump(mode="json"),
            versions=versions(),
        )
        results.write(folder / "results.json")
        write_text(folder / "results.csv", results_csv(results))
        write_results_report(folder / "report.html", results, part.index)
        found.append(results)
    return found[0]


def sides(part: Part, refit: bool) -> dict[str, list[int]]:
    """Positions of the clips that the scored weights were fitted on, of those to choose on, and of those to score."""
    return {"fit": part.train + part.dev if refit else part.train, "choose": part.dev, "test": part.test}


def scores_of(dev: Predictions) -> dict[str, float | int]:
    """Those of the development clips, where the epoch was chosen: better than they would be elsewhere."""
    return {"seed": dev.about["seed"], "epoch": dev.about["epoch"], **values(dev)}


def corpus_folder(settings: FinetuneSettings, part: Part) -> Path:
    """Where the results of a judged corpus are: of one alone in `out`, of several in folders by their names."""
    judged = sum(corpus.test is not None for corpus in settings.data.parts)
    return Path(settings.out) if judged == 1 else Path(settings.out) / part.name


def map_file(folder: Path) -> Path:
    return folder / "map.json"


def prediction_file(folder: Path, seed: int, side: str) -> Path:
    return folder / "predictions" / f"seed-{seed}-{side}.safetensors"
