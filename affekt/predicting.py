"""`affekt predict`: what a fine-tuned model says about media files."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from affekt.arguments import AsJson
from affekt.data.errors import AffektError, DataError, SettingsError
from affekt.data.files import write_text


def predict(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Video, sound or pictures.")],
    model: Annotated[Path, typer.Option(help="Folder of a model that `affekt finetune` wrote, as OUT/seed-0/model.")],
    out: Annotated[Path | None, typer.Option(help="Write to this .csv or .json file instead of the terminal.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Evenly spaced windows of each file; their mean counts.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Name what people express in media files: csv with a line per file, or json; exit code 2 where one is unreadable.

    Expressions are not feelings; see the model's README.md for what it learned from.
    """
    if out:
        check_place(out, files)
    from affekt.predictor import Predictor
    from affekt.pretrain.device import device_of

    predictor = Predictor(model, device_of(device))
    found, failed = [], []
    for path in files:
        try:
            found.append({"file": str(path), **predictor.predict(path, windows)})
        except AffektError as error:
            failed.append(str(error))
            print(f"affekt: {error}", file=sys.stderr)
    wants_json = as_json or (out is not None and out.suffix == ".json")
    text = json.dumps(found, ensure_ascii=False) + "\n" if wants_json else as_csv(found)
    if out:
        write_text(out, text)
    else:
        print(text, end="")
    if failed:
        rest = "; the others are answered" if found else ""
        raise DataError(f"{len(failed)} of {len(files)} files could not be judged{rest}")


def check_place(out: Path, files: list[Path]) -> None:
    """Raises SettingsError before anything is judged for an `out` that is one of the files, of another kind, or in no
    folder."""
    if out.suffix not in (".csv", ".json"):
        raise SettingsError(f"--out {out}: .csv and .json are written; found {out.suffix or 'no suffix'}")
    if out.resolve() in {path.resolve() for path in files}:
        raise SettingsError(f"--out {out}: is one of the files to judge, which it would replace")
    if not out.parent.is_dir():
        raise SettingsError(f"--out {out}: there is no folder {out.parent}")


def as_csv(found: list[dict[str, Any]]) -> str:
    """file, label, then p_CLASS and the dimensions; several labels are joined by `|`."""
    rows = []
    for one in found:
        row = {"file": one["file"]}
        if "probabilities" in one:
            row["label"] = one["label"] if "label" in one else "|".join(one["labels"])
            row |= {f"p_{name}": round(p, 6) for name, p in one["probabilities"].items()}
        rows.append(row | {name: round(value, 6) for name, value in one.get("values", {}).items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else ["file"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
