"""Scores of predictions that are there already: files of an evaluation, of a fine-tuning, or of anybody's model."""

from collections.abc import Sequence
from pathlib import Path

from affekt.data.errors import SettingsError
from affekt.data.files import refuse_other_kind
from affekt.finetune.imported import read_table
from affekt.finetune.predictions import Predictions, pooled
from affekt.finetune.probes.results import versions
from affekt.finetune.schema import Results, System
from affekt.finetune.scores import cluster_of, describe_system, main_score, task_of, values
from affekt.finetune.table import differences, system_name, write_results

SUFFIXES = (".safetensors", ".csv")
UNKNOWN = "unknown"  # on which clips a table's epoch was chosen, where it does not say


def score_files(
    paths: Sequence[str | Path], out: Path | None = None, *, bootstrap: int = 2000, main: str | None = None
) -> Results:
    """A row for each path: a file, or a folder whose files are the folds and seeds of one run (`about` tells which;
    those of development clips are passed over). The first minus each other, paired on the clips that both have judged.

    Raises SettingsError where nothing is named, runs of other classes are compared, `main` is no score of theirs or
    `out` holds what another command wrote; DataError for files that cannot be read.
    """
    if out:
        refuse_other_kind(out, "results of `affekt evaluate --predictions`")
    if not paths:
        raise SettingsError("--predictions: name files (.safetensors, .csv) or folders of them")
    runs = [read_run(Path(path)) for path in paths]
    names = unique_names([Path(path) for path in paths])
    runs = [[named(table, name) for table in run] for run, name in zip(runs, names)]
    first = runs[0][0]
    for run, name in zip(runs, names):
        for what in ("classes", "dimensions", "kind"):
            if getattr(run[0], what) != getattr(first, what):
                ours, theirs = getattr(first, what), getattr(run[0], what)
                raise SettingsError(
                    f"{what} differ: {names[0]} has {ours}, {name} has {theirs}; compare like with like"
                )
    main = main or main_score(task_of(first))
    values(first, [main])  # a score that there is not is refused before anything is computed
    how = {"bootstrap": bootstrap, "cluster": cluster_of(first)}
    results = Results(
        command="evaluate --predictions",
        title=", ".join(names),
        task=task_of(first),
        label="label",
        classes=first.classes,
        dimensions=first.dimensions,
        main_score=main,
        clips={"judged": {name: len(run[0]) for name, run in zip(names, runs)}},
        systems=[system_of(name, run, how) for name, run in zip(names, runs)],
        differences=differences(runs, main, how),
        versions=versions(),
    )
    if out:
        write_results(out, results)
    return results


def read_run(path: Path) -> list[Predictions]:
    """The test predictions at a path, one table per seed, folds pooled."""
    if not path.is_dir():
        return [read_table(path)]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
    tables = [read_table(file) for file in files]
    tables = [table for table in tables if table.about.get("part", "test") == "test"]
    if not tables:
        raise SettingsError(f"{path}: no predictions of test clips in this folder ({len(files)} files)")
    kinds = {(table.about.get("name"), table.about.get("selected", UNKNOWN)) for table in tables}
    if len(kinds) > 1:
        told = ", ".join(sorted(f"{name} ({selected}-selected)" for name, selected in kinds))
        raise SettingsError(f"{path}: holds predictions of several runs: {told}; name the folder of one")
    seeds: dict[str, list[Predictions]] = {}
    for table in tables:
        seeds.setdefault(str(table.about.get("seed", 0)), []).append(table)
    return [pooled(parts, fold="all") for parts in seeds.values()]


def system_of(name: str, run: list[Predictions], how: dict) -> System:
    about = run[0].about
    selected = about["selected"]
    title = name if selected == UNKNOWN else f"{name} ({selected}-selected)"
    row = describe_system(system_name(name, selected), title, "other", run, None, **how)
    streams = about.get("streams", "both")
    return row.model_copy(
        update={"selected": selected, "streams": streams, "seeds": [t.about.get("seed", 0) for t in run]}
    )


def unique_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as makes all of them differ."""
    whole = [path.resolve().with_suffix("") for path in paths]
    for length in range(1, 12):
        names = ["-".join(path.parts[-length:]).strip("/") for path in whole]
        if len(set(names)) == len(names):
            return names
    raise SettingsError(f"--predictions: {paths[0]} stands there twice")


def named(table: Predictions, name: str) -> Predictions:
    selected = table.about.get("selected", UNKNOWN)
    return Predictions(**{**table.__dict__, "about": {**table.about, "name": name, "selected": selected}})
