"""`affekt index`, `affekt retrieve` and `affekt recall`: find clips by what is heard and seen in another one."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from affekt.arguments import AsJson, Config, Overrides, PrintConfig, answer, conditions, find_experiment
from affekt.data.errors import AffektError, CheckpointError, DataError, SettingsError
from affekt.progress import progress

if TYPE_CHECKING:
    from affekt.finetune.retrieval.index import ClipIndex
    from affekt.model import Model

Stream = Literal["audio", "video", "both"]


def index(
    export: Annotated[Path, typer.Argument(help="Folder of `affekt export`, or a published HiCMAE .pth file.")],
    shards: Annotated[str, typer.Argument(help="Folder of `affekt prepare`, or its url.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an index that stands there is replaced.")],
    kind: Annotated[
        Literal["flat", "ivf", "hnsw"],
        typer.Option(help="flat: exact. ivf, hnsw: for millions; the share of exact answers they find is printed."),
    ] = "flat",
    stream: Annotated[
        list[str] | None, typer.Option(help="What may be found: audio, video, both; repeat for more; default: all.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only clips with this; repeat for more.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Evenly spaced windows of a clip that are averaged.")] = 4,
    space: Annotated[Path | None, typer.Option(help="A space-*.safetensors that `affekt recall` chose.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode clips.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Embed the clips of shards into a folder that `affekt retrieve` searches."""
    from affekt.data.shards import ShardIndex
    from affekt.data.split import where as select
    from affekt.finetune.retrieval.indexing import write_clip_index
    from affekt.finetune.retrieval.space import Space
    from affekt.pretrain.export import load_encoder

    clips = ShardIndex.open(shards)
    how: dict[str, Any] = {"kind": kind, "streams": stream or None, "windows": windows, "workers": workers}
    how |= {"positions": select(clips, conditions(where)) if where else None}
    how |= {"space": Space.load(space) if space else None}
    with progress("index", quiet=as_json) as report:
        about = write_clip_index(load_encoder(export), export, clips, out, **how, progress=report)
    counts = ", ".join(f"{count} by {name}" for name, count in about["clips"].items() if name in about["streams"])
    lines = [f"{out}: {counts} ({about['kind']}, space {about['space']})"]
    if about["unread"]:
        lines.append(f"{len(about['unread'])} clips could not be read and are not in it, first {about['unread'][0]}")
    for name, tuned in about["tuned"].items():
        lines.append(
            f"{name}: finds {tuned['recall']:.1%} of the exact {tuned['k']} best, by {tuned['queries']} queries at an "
            f"effort of {tuned['effort']}"
        )
    answer(as_json, about, "\n".join(lines))


def retrieve(
    clips: Annotated[
        list[Path], typer.Argument(metavar="CLIP...", help="Media files to ask with.", show_default=False)
    ],
    folder: Annotated[Path, typer.Option("--index", help="Folder of `affekt index`.", show_default=False)],
    to: Annotated[
        Stream | None, typer.Option(help="What of the clips to compare with; default: what CLIP has.")
    ] = None,
    by: Annotated[
        Stream | None, typer.Option(help="What of CLIP to ask with; default: the other stream than --to, or the same.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    encoder: Annotated[
        Path | None, typer.Option(help="The export, where it is no longer where the index was made.")
    ] = None,
    keep_own: Annotated[bool, typer.Option("--keep-own", help="Also clips that were cut from CLIP itself.")] = False,
    label: Annotated[str, typer.Option(help="Field of the manifest to show.")] = "label",
    as_json: AsJson = False,
) -> None:
    """Find the clips of an index that are most like CLIP: `--to video` the faces that go with its voice.

    Exit code 2 where a CLIP is unreadable; the others are answered.
    """
    from affekt.data.media.workers import prepare_clip_safely
    from affekt.finetune.retrieval.index import ClipIndex

    opened = ClipIndex.open(folder)
    model = _model(opened, encoder)
    fields = set().union(*(clip["meta"] for clip in opened.clips))
    if label not in {"label", *fields}:
        raise SettingsError(f"--label {label}: no clip of the index has it; known: {', '.join(sorted(fields))}")
    found, failed = [], []
    for path in clips:
        try:
            prepared = prepare_clip_safely(path, model.prepare_settings)
            features = model.contrast_features(prepared, opened.about["windows"], opened.space.segments)
            has = {name.partition("_")[0] for name in features}
            has |= {"both"} if len(has) == 2 else set()
            query, target = choose_streams(has, set(opened.searches), by, to, path)
            rows = {name: x[None].numpy() for name, x in features.items()}
            sources = () if keep_own else (prepared.record["source_sha256"],)
            (answers,) = opened.search(rows, query, target, k, sources)
        except AffektError as error:
            if len(clips) == 1:
                raise
            failed.append(str(path))
            print(f"affekt: {path}: {error}", file=sys.stderr)
            continue
        found.append({"clip": str(path), "by": query, "to": target, "answers": answers})
    if as_json:
        print(json.dumps({"index": str(folder), "queries": found}, ensure_ascii=False))
    for one in () if as_json else found:
        table = Table(title=Text(f"{one['clip']}: {one['by']} to {one['to']}"))
        for name in ("", "clip", "cosine", label, "speaker"):
            table.add_column(name)
        for place, line in enumerate(one["answers"], 1):
            cells = (
                place,
                line["id"],
                f"{line['score']:.3f}",
                line["meta"].get(label, ""),
                line["meta"].get("speaker", ""),
            )
            table.add_row(*(Text(str(cell)) for cell in cells))
        Console().print(table)
    if failed:
        rest = "; the others are answered" if found else ""
        raise DataError(f"{len(failed)} of {len(clips)} clips could not be asked with{rest}")


def recall(
    config: Config,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well clips are found: sound for a picture and back, and clips of the same label; with intervals."""
    path = find_experiment(config)
    from affekt.finetune.retrieval.evaluate import recall as measure
    from affekt.finetune.retrieval.settings import RetrievalSettings

    settings = RetrievalSettings.read(path, overrides or [])
    if print_config:
        print(settings.explained(), end="")
        return
    with progress("features", "windows", quiet=as_json) as report:
        results = measure(settings, report)
    if as_json:
        print(json.dumps(results.model_dump(mode="json"), ensure_ascii=False))
        return
    (told,) = results.tables
    for task in dict.fromkeys(row[1] for row in told.rows):
        rows = [row for row in told.rows if row[1] == task]
        table = Table("", *told.head[5:], title=f"{task.replace('_', ' ')}, {rows[0][3]} queries among {rows[0][4]}")
        for row in rows:
            table.add_row(*map(Text, (f"{row[0]} ({row[2]})" if row[2] else row[0], *row[5:])))
        Console().print(table)
    unread = results.clips["unread"]
    if unread:
        print(f"{len(unread)} clips could not be read and were left out, first {unread[0]}")
    print(f"results: {settings.output / 'results.json'}")


def choose_streams(has: set[str], held: set[str], by: str | None, to: str | None, clip: Path) -> tuple[str, str]:
    """What to ask with and what for, given what a clip has and an index holds. SettingsError where that is nothing."""
    if to is None:
        to = by if by in held else next((s for s in ("both", "audio", "video") if s in has & held), None)
        by = by or to
    if by is None:
        other = {"audio": "video", "video": "audio", "both": "both"}[to]
        by = other if other in has else to
    if to not in held or by not in has:
        raise SettingsError(
            f"{clip}: has {', '.join(sorted(has))}; the index holds {', '.join(sorted(held))}: it cannot be asked "
            f"by {by} for {to}; choose others by --by and --to"
        )
    return by, to


def _model(opened: "ClipIndex", encoder: Path | None) -> "Model":
    from affekt.finetune.features import weights_hash
    from affekt.model import Model
    from affekt.pretrain.export import load_encoder

    where = encoder or Path(opened.about["export"])
    if not where.exists():
        raise CheckpointError(f"{where}: the export of this index is not there; name it by --encoder")
    model = Model(load_encoder(where))
    if weights_hash(model.encoder) != opened.about["weights"]:
        raise CheckpointError(
            f"{where}: other weights than those that {opened.folder} was made with; name theirs by --encoder, or index "
            "again"
        )
    return model
