"""`affekt evaluate`: every fold of a protocol, or predictions that are there already, scored into one table."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from affekt.arguments import AsJson, conditions, find_experiment
from affekt.data.errors import SettingsError
from affekt.progress import progress

MAJORITY = "majority"
LAST = "the folds that are done are kept; the same command goes on from there"


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]... [KEY=VALUE]...",
            help="Experiment files of `affekt finetune` or `affekt probe` (or names of shipped ones), and settings of "
            "them to change; with --predictions its files.",
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="cremad6, ravdess20 ... (see --list), or kfold:speaker:5, loso:speaker ...")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: runs/evaluate-PROTOCOL.")] = None,
    shards: Annotated[str | None, typer.Option(help="Folder of shards; default: that of the first CONFIG.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Take only these clips; repeat for more.")
    ] = None,
    folds: Annotated[str | None, typer.Option(help="Run these alone, as 1,2; default: all.")] = None,
    baselines: Annotated[
        str, typer.Option(help="Of majority, mel, pixels, hog, egemaps, compare (the last two need `opensmile`).")
    ] = MAJORITY,
    selected: Annotated[
        str, typer.Option(help="dev: all is chosen on development clips; test: on the test clips, as often published.")
    ] = "dev",
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of the intervals.")] = 2000,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Score files of predictions (.safetensors, .csv) and compare them.")
    ] = False,
    main_score: Annotated[str | None, typer.Option(help="With --predictions: the score to compare by.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print the known protocols and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure by a protocol: all its folds and seeds, each contender in one table, with intervals over speakers."""
    if show_list:
        return show_protocols()
    if predictions:
        from affekt.finetune.scored import score_files

        given = {"--protocol": protocol, "--shards": shards, "--include": include, "--folds": folds}
        given |= {"--baselines": baselines != MAJORITY, "--selected": selected != "dev"}
        unused = [option for option, value in given.items() if value]
        if unused:
            raise SettingsError(f"{unused[0]}: without effect beside --predictions, which scores all there is")
        results = score_files(words or [], out, bootstrap=bootstrap, main=main_score)
    else:
        if main_score:
            raise SettingsError("--main-score: without effect without --predictions; a protocol has its own")
        results, out = _run(words or [], protocol, out, shards, include, folds, baselines, selected, bootstrap, as_json)
    if as_json:
        print(json.dumps(results.model_dump(mode="json"), ensure_ascii=False))
        return
    from affekt.finetune.table import show

    show(results, Console())
    if out:
        print(f"report: {out / 'report.html'}")


def _run(words, protocol, out, shards, include, folds, baselines, selected, bootstrap, as_json):  # as in `evaluate`
    from affekt.finetune.entry import enter
    from affekt.finetune.evaluate import EvaluateSettings
    from affekt.finetune.table import evaluate as run

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingsError(
            "affekt evaluate is one process; to share the work start several with their own --folds and the same "
            "--out, then once without --folds to collect the table"
        )
    if not protocol:
        raise SettingsError("--protocol: say by which; `affekt evaluate --list` names them")
    configs = [str(find_experiment(word)) for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    names = [name.strip() for name in baselines.split(",") if name.strip()]
    apart = "-test-selected" if selected == "test" else ""
    out = out or Path("runs") / f"evaluate-{protocol.replace(':', '-')}{apart}"
    contenders, found = enter(configs, overrides, names, out / "cache")
    if not (shards or found):
        raise SettingsError("--shards: say where the clips are; there is no CONFIG that does")
    settings = EvaluateSettings.parse(
        {
            **{
                "protocol": protocol,
                "shards": shards or found,
                "output": out,
                "include": conditions(include or [], "--include"),
            },
            **{"folds": [name.strip() for name in (folds or "").split(",") if name.strip()], "selected": selected},
            "bootstrap": bootstrap,
        },
        "evaluate",
    )
    with progress("evaluate", "folds", quiet=as_json) as report:
        return run(settings, contenders, lambda _name, done, total: report(done, total)), out


def show_protocols() -> None:
    from affekt.finetune.protocols import GENERIC, PROTOCOLS

    width = max(map(len, [*PROTOCOLS, *GENERIC]))
    for name, rules in PROTOCOLS.items():
        print(f"{name:{width}}  {rules.title}; {rules.main_score}; {rules.source}")
    for name, title in GENERIC.items():
        print(f"{name:{width}}  {title}")
