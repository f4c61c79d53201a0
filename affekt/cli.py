"""The `affekt` command: reads arguments, calls the rooms, prints what they return.

A room is imported when its command runs, so `affekt --help` answers without loading torch.
"""

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from affekt import __version__
from affekt.arguments import (
    AllowChange,
    AsJson,
    Config,
    Overrides,
    PrintConfig,
    Resume,
    answer,
    conditions,
    find_experiment,
)
from affekt.data.errors import AffektError, DataError
from affekt.data.machine import available_cores
from affekt.evaluating import LAST, evaluate
from affekt.finetuning import finetune
from affekt.launching import launch
from affekt.planning import plan
from affekt.predicting import predict
from affekt.progress import Report, progress, training
from affekt.retrieving import index, recall, retrieve
from affekt.stressing import stress
from affekt.watching import compare, runs

app = typer.Typer(
    help="Learn what people express from video with sound, without labels, and measure what was learned.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TYPER_USAGE_ERROR = 2  # what typer leaves with; here 2 means bad data and usage is 1
INTERRUPTED = 130
CORES = available_cores()
HOW_TO_GO_ON = {
    "synth": "finished clips are kept; the same command goes on from there",
    "prepare": "finished shards are kept; the same command goes on from there",
    "pretrain": "the last checkpoint is kept; the same command with `--resume auto` goes on from there",
    "evaluate": LAST,
    "finetune": "the last checkpoint is kept; the same command goes on from there",
    "stress": "finished levels are kept; the same command goes on from there",
    "launch": "the last checkpoint is kept; the same command with `--resume auto` goes on from there",
    "index": "features of finished parts are kept; the same command goes on from there",
    "demo": "what is finished is kept; the same command goes on from there",
}

Seed = Annotated[int, typer.Option(help="Same seed and arguments, same result.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that work side by side.")]


def run(args: list[str]) -> int:
    """Run one command; messages instead of tracebacks for errors raised on purpose. Returns the exit code."""
    try:
        app(args)
    except AffektError as error:
        print(f"affekt: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        print(
            f"affekt: {error.filename or args[0]}: {error.strerror or error}; nothing finished is lost", file=sys.stderr
        )
        return DataError.exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        if code == INTERRUPTED:
            print(f"affekt: interrupted; {HOW_TO_GO_ON.get(args[0], 'run the command again')}", file=sys.stderr)
        return 1 if code == TYPER_USAGE_ERROR else code
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"affekt {__version__}")
        raise typer.Exit


def _show_corpora(wanted: bool) -> None:
    if wanted:
        from affekt.data.corpora.importer import CORPORA

        width = max(map(len, CORPORA))
        for name, corpus in CORPORA.items():
            about = ", ".join(filter(None, (corpus.title, corpus.licence, corpus.source)))
            print(f"{name:{width}}  {about}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write clips/ and manifest.csv into.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 240,
    speakers: Annotated[int, typer.Option(min=1, help="Number of speakers, split into train, dev and test.")] = 24,
    seed: Seed = 0,
    conflict: Annotated[float, typer.Option(min=0, max=1, help="Share of clips whose voice and face disagree.")] = 0.0,
    noise: Annotated[float, typer.Option(min=0, max=10, help="Factor on the noise in the sound.")] = 1.0,
    missing: Annotated[float, typer.Option(min=0, max=1, help="Share of clips that lack a stream.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a clip.")] = 3.0,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Make a corpus of procedural talking faces with six emotions in voice and face."""
    from affekt.data.synth.corpus import synthesise

    with progress("synth", quiet=as_json) as report:
        manifest = synthesise(
            out,
            clips=clips,
            speakers=speakers,
            seed=seed,
            conflict=conflict,
            noise=noise,
            missing=missing,
            seconds=seconds,
            workers=workers,
            progress=report,
        )
    answer(as_json, {"clips": clips, "manifest": str(manifest)}, f"{clips} clips, described in {manifest}")


@app.command("import")
def import_(
    corpus: Annotated[str, typer.Argument(help="Name of a corpus or of a kind of list; see --list.")],
    source: Annotated[Path, typer.Argument(help="The folder of the corpus as it was downloaded, or the list.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="Manifest to write (.csv); default: manifest.csv in SOURCE.", show_default=False),
    ] = None,
    media: Annotated[Path | None, typer.Option(help="For lists: where the files are on this machine.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a manifest with other content.")] = False,
    show_list: Annotated[
        bool, typer.Option("--list", callback=_show_corpora, is_eager=True, help="Print the known corpora and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read the names and label tables of a corpus into a manifest for `affekt prepare`; say what is missing."""
    from affekt.data.corpora.importer import import_corpus, told

    summary = import_corpus(corpus, source, out, media, overwrite)
    answer(as_json, summary, f"{told(summary)}\nnext: affekt prepare {summary['manifest']} SHARDS")


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder of media, a manifest (.csv, .jsonl, .txt, .lst) or a file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write shards, index, quarantine list and summary into.")],
    overrides: Overrides = None,
    size: Annotated[int | None, typer.Option(help="Side of the face crop in pixels; default 160.")] = None,
    face: Annotated[str | None, typer.Option(help="haar (default), center, or package.module:callable.")] = None,
    face_fallback: Annotated[
        str | None, typer.Option(help="For clips without a face: sound (alone, default), quarantine or center.")
    ] = None,
    picture: Annotated[str | None, typer.Option(help="Stored as mjpeg (default, fast) or mp4 (small).")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Take only these rows of the manifest; repeat for more."),
    ] = None,
    workers: Workers = CORES,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace shards of other settings and damaged ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn foreign media into shards: face crops at 25 fps, sound at 16 kHz, one clock; other settings as KEY=VALUE."""
    from affekt.data.prepare import PrepareSettings
    from affekt.data.prepare import prepare as make_shards
    from affekt.data.settings import apply_overrides

    named = {"size": size, "face": face, "face_fallback": face_fallback, "picture": picture}
    given = {key: value for key, value in named.items() if value is not None}
    settings = PrepareSettings.parse(apply_overrides(given, overrides or []), "prepare")
    chosen = conditions(where or [])
    with progress("measure", "sources", quiet=as_json) as measuring, progress("prepare", quiet=as_json) as report:
        summary = make_shards(source, out, settings, workers, report, overwrite, chosen, measuring)
    causes = ", ".join(f"{count} {cause}" for cause, count in summary["quarantined"].items())
    left_out = f"; left out: {causes}, each listed in {out / 'quarantine.jsonl'}" if causes else ""
    parts = f", cut from {summary['sources']} sources," if summary["clips"] != summary["sources"] else ""
    text = (
        f"{summary['prepared']} of {summary['clips']} clips{parts} are in {out}, shards: {summary['shards']}{left_out}"
    )
    answer(as_json, summary, text)


@app.command()
def inspect(
    shards: Annotated[Path, typer.Argument(help="Folder of shards, as `affekt prepare` writes it.")],
    label: Annotated[str, typer.Option(help="Field of the manifest to count per split.")] = "label",
    split: Annotated[str, typer.Option(help="Field that says on which side a clip stands.")] = "split",
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum of every clip and shard.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Decode no more than so many clips, drawn from all, of a large corpus.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a contact sheet to this file.")] = None,
    clips: Annotated[int, typer.Option(min=0, help="Clips on the contact sheet.")] = 24,
    seed: Seed = 0,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Say what is in shards: counts, labels, copies, leaks, offset of the sound; exit code 2 for damage and leaks."""
    from affekt.data.inspect.corpus import check
    from affekt.data.inspect.corpus import inspect as look

    if html:
        html.parent.mkdir(parents=True, exist_ok=True)  # now, and not after hours of work
    with progress("inspect", quiet=as_json) as report:
        how = {"verify": verify, "sample": sample, "seed": seed, "workers": workers}
        result = look(shards, label=label, split=split, **how, progress=report)
    if html:
        from affekt.data.inspect.report import write_page
        from affekt.data.shards import ShardIndex

        write_page(html, result, ShardIndex.open(shards), clips, seed)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        from affekt.data.inspect.text import show

        show(result, Console())
        if html:
            print(f"page: {html}")
    check(result, shards)


@app.command()
def pretrain(
    config: Config = "",
    overrides: Overrides = None,
    resume: Resume = None,
    allow_change: AllowChange = None,
    replay: Annotated[Path | None, typer.Option(help="Do a skipped step of RUN/health again, clip by clip.")] = None,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Learn from shards without labels; several processes and machines with `affekt launch`."""
    if replay:
        from affekt.pretrain.replay import replay_step, told

        result = replay_step(replay, [item for item in (config, *(overrides or [])) if item])
        return answer(as_json, result, told(result))
    from affekt.pretrain.settings import PretrainSettings

    settings = PretrainSettings.read(find_experiment(config or "CONFIG"), overrides or [])
    if print_config:
        print(settings.explained(), end="")
        return
    from affekt.pretrain.loop import pretrain as train

    with training(quiet=as_json) as show:
        run = train(settings, resume, tuple(allow_change or ()), show)
    if int(os.environ.get("RANK", 0)) == 0:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        answer(as_json, {"run": str(run), **summary}, f"trained; next: affekt export {run} {run / 'export'}")
    if settings.train.zero_stage == 3:  # DeepSpeed's threads now and then abort an interpreter that ends in order
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


for command in (launch, plan, runs, compare, index, retrieve, recall, finetune, evaluate, predict, stress):
    app.command()(command)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a pre-training run, or a published HiCMAE .pth file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an export that stands there is replaced.")],
    checkpoint: Annotated[str, typer.Option(help="latest, or the path of a checkpoint.")] = "latest",
    as_json: AsJson = False,
) -> None:
    """Write the encoders of a run, with their preprocessing, as a folder that `affekt.load` reads."""
    from affekt.pretrain.export import export as write

    folder = write(run, out, checkpoint)
    told = f'written; next: affekt probe, finetune or index, or affekt.load("{folder}") in Python'
    answer(as_json, {"export": str(folder)}, told)


@app.command()
def probe(
    config: Config, overrides: Overrides = None, print_config: PrintConfig = False, as_json: AsJson = False
) -> None:
    """Measure what frozen features are worth, beside untrained encoders and plain statistics; writes report.html."""
    path = find_experiment(config)
    from affekt.finetune.probes.probe import ProbeSettings
    from affekt.finetune.probes.probe import probe as measure

    settings = ProbeSettings.read(path, overrides or [])
    if print_config:
        print(settings.explained(), end="")
        return
    with progress("features", "windows", quiet=as_json) as report:
        results = measure(settings, report)
    if results:  # other ranks than the first have computed features and are done
        _show(results, settings.output / "report.html", as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the corpus, the run and the report.")] = Path("runs/demo"),
    seed: Seed = 0,
    workers: Workers = CORES,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what stands in the folder and start over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Go the whole way on the built-in corpus, on a CPU, and write a report to look at."""
    from affekt.demo import demo as go

    def show(stage: str, unit: str) -> AbstractContextManager[Report]:
        return progress(stage, unit, quiet=as_json, lines=stage != "pretrain")  # that one writes lines of its own

    results = go(out, seed, workers, show, fresh)
    _show(results, Path(results["report"]), as_json)
    if not as_json:
        print(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds_by_stage"].items()))


def _show(results: dict[str, Any], report: Path, as_json: bool) -> None:
    from affekt.finetune.probes.results import show_table

    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        show_table(results, Console())
        print(f"report: {report if report.is_file() else report.with_name('results.json')}")
