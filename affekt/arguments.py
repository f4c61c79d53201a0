"""Arguments that several commands share, and how they answer."""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from affekt.data.errors import SettingsError

SHIPPED = resources.files("affekt.launch")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines, and no progress.")]
Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped experiment.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as in `train.steps=200`.")
]
Resume = Annotated[str | None, typer.Option(help="auto (go on or begin), latest (go on), or the path of a checkpoint.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved settings and stop.")]
AllowChange = Annotated[
    list[str] | None, typer.Option(help="A setting that may differ from the resumed run's; can be repeated.")
]


def find_experiment(config: str) -> Path:
    """The file that CONFIG names: a path, or a shipped experiment by its bare name."""
    if Path(config).is_file():
        return Path(config)
    shipped = {path.name.removesuffix(".yaml"): path for path in SHIPPED.iterdir() if path.name.endswith(".yaml")}
    if config.removesuffix(".yaml") in shipped:
        return Path(str(shipped[config.removesuffix(".yaml")]))
    near = difflib.get_close_matches(config, shipped, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"shipped experiments: {', '.join(sorted(shipped)) or 'none'}"
    raise SettingsError(f"{config}: neither a file nor the name of a shipped experiment; {hint}")


def answer(as_json: bool, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values, ensure_ascii=False) if as_json else text)


def conditions(pairs: list[str], option: str = "--where") -> dict[str, list[str]]:
    """The values of `--where`: `["split=train", "split=dev"]` -> `{"split": ["train", "dev"]}`."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        column, equals, value = pair.partition("=")
        if not (column and equals):
            raise SettingsError(f"{option} {pair}: not of the form COLUMN=VALUE")
        found.setdefault(column, []).append(value)
    return found
