"""`affekt stress`: what is left of a model's scores when clips are spoiled, and for whom."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from affekt.arguments import AsJson, Overrides, PrintConfig, answer
from affekt.progress import progress


def stress(
    model: Annotated[Path, typer.Argument(help="Folder of a model that `affekt finetune` wrote: OUT/seed-0/model.")],
    shards: Annotated[str, typer.Argument(help="Labelled clips that the model has not seen; by default split=test.")],
    out: Annotated[Path, typer.Argument(help="Folder for results.json, results.csv, report.html and preview.png.")],
    overrides: Overrides = None,
    preview: Annotated[bool, typer.Option("--preview", help="Write preview.png alone: a clip in all damage.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Judge spoiled clips: noise, covered faces, missing streams, early ends; compare groups, conflicts, corpora.

    Goes on where it was ended. Fewer levels, as in `damage.fills=[zero] damage.missing=[RMFM]`, take less time.
    """
    from affekt.data.settings import apply_overrides
    from affekt.finetune.stress.settings import StressRun

    settings = StressRun.parse(apply_overrides({"data": {"shards": shards}}, overrides or []), "stress")
    if print_config:
        print(settings.explained(), end="")
        return
    if preview:
        from affekt.data.shards import ShardIndex
        from affekt.data.split import where
        from affekt.finetune.finetuned import load_finetuned
        from affekt.finetune.stress.preview import write_preview

        index = ShardIndex.open(shards)
        window = load_finetuned(model).window
        path = write_preview(out / "preview.png", index, where(index, settings.data.clips), window, settings.damage)
        return answer(as_json, {"preview": str(path)}, f"written: {path}")
    from affekt.finetune.stress.whole import stress as judge

    with progress("stress", "levels", quiet=as_json) as report:
        results = judge(model, out, settings, device, report)
    if as_json:
        print(json.dumps(results.model_dump(mode="json"), ensure_ascii=False))
        return
    table = Table(title=results.title)
    for name in ("damage", "score", "first level", "last level", "AUILC"):
        table.add_column(name)
    for one in results.stress:
        ends = [f"{one.scores[i].value:.3f} at {one.levels[i]:g} {one.unit}".strip() for i in (0, -1)]
        table.add_row(one.title, one.score, *ends, "" if one.area is None else f"{one.area:.3f}")
    Console().print(table)
    for what, why in results.protocol.get("left_out", {}).items():
        print(f"left out: {what}: {why}")
    print(f"report: {out / 'report.html'}")
