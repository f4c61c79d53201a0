"""What `affekt inspect` found, for a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from affekt.data.inspect.report import KINDS, drawn

SHOWN = 5  # examples of a kind


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result of `inspect`; all damaged clips are named, of the rest some examples."""
    shards, lengths = result["shards"], result["duration_s"]
    streams = ", ".join(
        f"{part['clips']} {n.replace('_', ' ')}" for n, part in result["streams"].items() if part["clips"]
    )
    console.print(
        f"{result['clips']} clips ({streams}), {result['hours']:.2f} hours of {lengths['least']:.2f} to "
        f"{lengths['most']:.2f} s, median {lengths['median']:.2f}; {shards['count']} shards, "
        f"{shards['bytes'] / 2**20:.0f} MiB, {shards['size']} px",
        highlight=False,
    )
    console.print(_splits(result))
    for kind in ("labels", "votes"):
        if any(part[kind] for part in result["splits"].values()):
            console.print(_labels(result, kind))
    lines = [
        *drawn(result),
        _sound(result),
        *_copies(result),
        _offset(result["av_offset"]),
        _flags(result["flags"]),
        _quarantine(result["quarantine"]),
    ]
    lines += [f"damaged: {row['message']}" for row in result["damage"]["clips"]]
    lines += [f"damaged: {message}" for message in result["damage"]["shards"]]
    if result["damage"]["verified"] and not (result["damage"]["clips"] or result["damage"]["shards"]):
        lines.append("every checksum of every member and shard is right")
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _splits(result: dict[str, Any]) -> Table:
    columns = {name: name for name in ("clips", "hours", "speakers", "silent", "clipped")}
    columns |= {"with_picture": "picture", "with_sound": "sound", "faceless": "no face"}
    table = Table(title=f"By {result['split']}")
    table.add_column("")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for name, part in result["splits"].items():
        table.add_row(escape(name), *(str(part[column]) for column in columns))
    return table


def _labels(result: dict[str, Any], kind: str) -> Table:
    table = Table(title=result["label"] if kind == "labels" else kind)
    table.add_column("")
    for split in result["splits"]:
        table.add_column(escape(split), justify="right")
    names = sorted({name for part in result["splits"].values() for name in part[kind]})
    for name in names[:30]:
        table.add_row(escape(name), *(str(part[kind].get(name, 0)) for part in result["splits"].values()))
    if len(names) > 30:
        table.add_row(f"and {len(names) - 30} more")
    if kind == "labels":
        table.add_row("(none given)", *(str(part["without_label"]) for part in result["splits"].values()))
    return table


def _sound(result: dict[str, Any]) -> str:
    sound, faces, meaning = result["sound"], result["faces"], result["definitions"]
    parts = [f"{sound[kind]['clips']} {kind} ({meaning[kind]})" for kind in ("silent", "clipped")]
    share = f"{faces['share']:.1%}" if faces["share"] is not None else "-"
    return (
        f"sound: {'; '.join(parts)}. Faceless: {faces['faceless']} of {faces['with_picture']} with a picture ({share})"
    )


def _copies(result: dict[str, Any]) -> list[str]:
    lines = []
    for kind, name in KINDS.items():
        found = result["duplicates"][kind]
        if found["groups"]:
            examples = [
                " = ".join(group["ids"][:3]) + (f" ({', '.join(group['splits'])})" if len(group["splits"]) > 1 else "")
                for group in found["examples"][:SHOWN]
            ]
            count = f"{found['clips']} clips in {found['groups']} groups, {found['across_splits']} across splits"
            lines.append(f"{name.lower()}: {count}: {'; '.join(examples)}")
    across = [f"{row['speaker']} ({', '.join(row['splits'])})" for row in result["speakers"]["across_splits"]]
    if across:
        lines.append(f"speakers across splits: {len(across)}: {', '.join(across[:SHOWN])}")
    if result["speakers"]["without"]:
        lines.append(f"{result['speakers']['without']} clips name no speaker, so nothing keeps them apart")
    return lines or ["no copies, and no speaker on several sides"]


def _offset(found: dict[str, Any]) -> str:
    if not found["told"]:
        return f"sound against picture: cannot be told: {found['why']}"
    return (
        f"sound against picture: {found['ms']:+.0f} ms, 95 % interval {found['low']:+.0f} to {found['high']:+.0f} "
        f"({found['clips']} clips; positive: the sound is late); {_apart(found)}"
    )


def _apart(found: dict[str, Any]) -> str:
    examples = [f"{row['id']} {row['ms']:+.0f} ms" for row in found["apart"]["examples"][:SHOWN]]
    return f"{found['apart']['clips']} clips out of step with the rest" + (
        f": {', '.join(examples)}" if examples else ""
    )


def _flags(found: dict[str, int]) -> str:
    return "flags of the preparation: " + (", ".join(f"{name} {count}" for name, count in found.items()) or "none")


def _quarantine(found: dict[str, Any]) -> str:
    if not found["known"]:
        return "quarantine: no quarantine.jsonl beside the shards"
    causes = ", ".join(f"{count} {cause}" for cause, count in found["causes"].items())
    return f"quarantine: {found['clips']} clips left out" + (f": {causes}" if causes else "")
