"""What `affekt inspect` found as one HTML file that needs nothing beside it: what is wrong first, pictures last."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from affekt.data.files import write_text
from affekt.data.inspect.sheet import contact_sheet
from affekt.data.page import card, grid, page, section, table
from affekt.data.shards import ShardIndex

KINDS = {
    "same_source": "Same file",
    "same_picture": "Same stored picture",
    "same_sound": "Same stored sound",
    "near_picture": "Same picture, encoded anew",
    "near_sound": "Same sound, encoded anew",
}
SHOWN = 12  # rows of a list of examples

STYLE = """<style>
.bad { border-left: 5px solid var(--video); } .good { border-left: 5px solid var(--audio); }
.sheet { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.sheet .card { padding: 12px; } .row, .mel { width: 100%; display: block; border-radius: 8px; }
.mel { height: 56px; object-fit: fill; } .wave { height: 40px; margin: 4px 0; }
.wave polygon { fill: var(--audio); stroke: var(--audio); stroke-width: .6; vector-effect: non-scaling-stroke; }
.facts { font-size: 13px; color: var(--soft); margin-top: 8px; }
.facts b { display: block; color: var(--ink); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.share { background: linear-gradient(to right, color-mix(in srgb, var(--both) 26%, transparent) var(--s),
  transparent var(--s)) no-repeat 6px 4px / calc(100% - 6px) calc(100% - 8px); }
.curve polyline { fill: none; stroke: var(--both); stroke-width: 2.25; stroke-linejoin: round; }
.curve .zero { stroke: var(--soft); stroke-dasharray: 2 4; } .curve .range { fill: var(--both); opacity: .16; }
</style>"""


def write_page(out: Path, result: dict[str, Any], index: ShardIndex, clips: int = 24, seed: int = 0) -> Path:
    """Write the page of what `inspect` returned, with a contact sheet of `clips` clips drawn by `seed`."""
    body = [
        STYLE,
        _header(result, index),
        _verdict(result),
        section("Splits", _splits(result)),
        section(f"Labels: {result['label']}", _labels(result, "labels")),
        section("Votes", _labels(result, "votes")),
        section("Sound and faces", "".join(f"<p>{line}.</p>" for line in drawn(result)), _streams(result)),
        section("Copies and leaks", _duplicates(result)),
        section("Sound against picture", _offset(result["av_offset"])),
        section("Quarantine", _quarantine(result["quarantine"])),
        section("Damage", _damage(result["damage"])),
        section("Some clips", f"<p class='soft'>Drawn with seed {seed}.</p>" if clips else "",
                contact_sheet(index, result["label"], result["split"], clips, seed)),
        f"<footer>Made by affekt {escape(result['affekt'])}; index {result['shards']['fingerprint'][:16]}.</footer>",
    ]  # fmt: skip
    write_text(out, page(f"Shards: {index.root.name}", "\n".join(part for part in body if part)))
    return out


def drawn(result: dict[str, Any]) -> list[str]:
    """What to know where not every clip was looked at, and nothing otherwise."""
    if result["looked_at"] == result["clips"]:
        return []
    return [
        f"decoded {result['looked_at']} clips drawn from all {result['clips']}: silent, clipped and damaged ones, "
        "copies encoded anew and the offset of the sound were looked for among these alone"
    ]


def _header(result: dict[str, Any], index: ShardIndex) -> str:
    shards, streams = result["shards"], result["streams"]
    tiles = [("Clips", f"{result['clips']:,}", ""), ("Hours", f"{result['hours']:,.2f}", "")]
    tiles += [("Speakers", f"{result['speakers']['count']:,}", f"{result['speakers']['without']} clips name none")]
    tiles += [("Size", f"{shards['bytes'] / 2**20:,.0f}<small>MiB</small>", f"{shards['count']} shards")]
    lengths = result["duration_s"]
    notes = {
        "Clips": ", ".join(
            f"{part['clips']:,} {name.replace('_', ' ')}" for name, part in streams.items() if part["clips"]
        ),
        "Hours": f"clips of {lengths['least']:.2f} to {lengths['most']:.2f} s, median {lengths['median']:.2f}",
    }
    cards = [
        f'<div class="card tile"><span class="name">{name}</span><b>{value}</b>'
        f"<span>{notes.get(name, note)}</span></div>"
        for name, value, note in tiles
    ]
    facts = (
        f"{shards['size']} px, {shards['fps']} pictures per second as {shards['picture']}, {shards['sample_rate']} Hz"
    )
    return (
        f'<header><p class="over">affekt · inspect</p><h1>{escape(index.root.name)}</h1>'
        f'<p class="soft">{escape(facts)}</p></header>{grid(cards, "tiles")}'
    )


def _verdict(result: dict[str, Any]) -> str:
    if not result["problems"]:
        looked = (
            "every clip" if result["looked_at"] == result["clips"] else f"each of {result['looked_at']:,} clips drawn"
        )
        checked = "every checksum is right" if result["damage"]["verified"] else f"{looked} can be decoded"
        return f'<div class="card good"><p><strong>Nothing wrong was found:</strong> {checked}, nothing stands on two '\
            f"sides of <code>{escape(result['split'])}</code>.</p></div>"  # fmt: skip
    items = "".join(f"<li>{escape(problem)}</li>" for problem in result["problems"])
    return f'<div class="card bad"><h3>To be mended</h3><ul>{items}</ul></div>'


def _splits(result: dict[str, Any]) -> str:
    columns = {
        "clips": "Clips", "hours": "Hours", "with_picture": "With picture", "with_sound": "With sound",
        "speakers": "Speakers", "without_speaker": "No speaker", "silent": "Silent", "clipped": "Clipped",
        "faceless": "No face",
    }  # fmt: skip
    rows = [[escape(name), *(f"{part[column]:,}" for column in columns)] for name, part in result["splits"].items()]
    return card(table([escape(result["split"]), *columns.values()], rows, numbers=1))


def _labels(result: dict[str, Any], kind: str) -> str:
    """Counts per split, each cell shaded by its share of the split."""
    splits = result["splits"]
    names = sorted({name for part in splits.values() for name in part[kind]})
    if not names:
        return "" if kind == "votes" else f"<p>No clip has the field <code>{escape(result['label'])}</code>.</p>"
    totals = {split: sum(part[kind].values()) for split, part in splits.items()}
    rows = []
    for name in names[:100]:
        cells = []
        for split, part in splits.items():
            count = part[kind].get(name, 0)
            share = 100 * count / totals[split] if totals[split] else 0
            cells.append(f'<span title="{share:.1f} % of {escape(split)}">{count:,}<small>{share:.0f} %</small></span>')
        rows.append([escape(name), *cells])
    if kind == "labels":
        rows.append(["<i>none given</i>", *(f"{part['without_label']:,}<small></small>" for part in splits.values())])
    more = f'<p class="soft">and {len(names) - 100} more</p>' if len(names) > 100 else ""
    return card(table(["", *map(escape, splits)], rows, numbers=1), more)


def _streams(result: dict[str, Any]) -> str:
    sound, faces, meaning = result["sound"], result["faces"], result["definitions"]
    rows = [
        [name.capitalize(), str(found), escape(meaning[name]), _names(ids)]
        for name, found, ids in (
            ("silent", sound["silent"]["clips"], sound["silent"]["ids"]),
            ("clipped", sound["clipped"]["clips"], sound["clipped"]["ids"]),
            ("faceless", faces["faceless"], faces["ids"]),
        )
    ]
    rows = [[name, f"<b>{count}</b>", f'<span class="soft">{what}</span>', ids] for name, count, what, ids in rows]
    flags = ", ".join(f"{escape(name)} {count}" for name, count in result["flags"].items()) or "none"
    level = sound["loudest_db"]
    levels = (
        f" Loudest tenth of a second of a clip: {level['least']:.1f} to {level['most']:.1f} dB of full scale, "
        f"median {level['median']:.1f}."
        if level
        else ""
    )
    note = f'<p class="soft">Flags of the preparation: {flags}.{levels}</p>'
    return card(_wrapped(table(["", "Clips", "Means", "Which"], rows))) + note


def _duplicates(result: dict[str, Any]) -> str:
    rows = []
    for kind, name in KINDS.items():
        found = result["duplicates"][kind]
        figures = [f"<b>{found[figure]}</b>" for figure in ("groups", "clips", "across_splits")]
        rows.append([name, *figures, f'<span class="soft">{escape(result["definitions"][kind])}</span>'])
    counts = table(["", "Groups", "Clips", "Across splits", "Means"], rows)
    examples = [
        [KINDS[kind], _names(group["ids"], 4), escape(", ".join(group["splits"]))]
        for kind in KINDS
        for group in result["duplicates"][kind]["examples"][:SHOWN]
    ]
    speakers = result["speakers"]["across_splits"]
    told = "".join(f"<li>{escape(row['speaker'])}: {escape(', '.join(row['splits']))}</li>" for row in speakers[:SHOWN])
    more = f"<p class='soft'>and {len(speakers) - SHOWN} more</p>" if len(speakers) > SHOWN else ""
    return (
        card(_wrapped(counts))
        + (card(_wrapped(table(["", "Clips", "Splits"], examples)), title="Examples") if examples else "")
        + (card(f"<ul>{told}</ul>{more}", title="Speakers on several sides") if told else "")
    )


def _offset(found: dict[str, Any]) -> str:
    if found["told"]:
        direction = "late" if found["ms"] > 0 else "early"
        said = (
            f"The sound is <strong>{abs(found['ms']):.0f} ms {direction}</strong> (95 % interval "
            f"{found['low']:+.0f} to {found['high']:+.0f} ms) over {found['clips']} clips with both streams. "
            f"{found['apart']['clips']} of them are out of step with the rest."
        )
    else:
        said = f"<strong>It cannot be told:</strong> {escape(found['why'] or '')}."
    note = (
        "How well the picture predicts the level of the sound at each lag, on clips that were not learned from. Lips "
        "lead the voice a little by nature; offsets below one picture (40 ms) mean nothing."
    )
    rows = [[escape(row["id"]), f"{row['ms']:+.0f} ms"] for row in found["apart"]["examples"][:SHOWN]]
    apart = card(table(["Clip", "Offset"], rows, numbers=1), title="Out of step with the rest") if rows else ""
    return card(f"<p>{said}</p>", _curve(found), f"<figcaption>{note}</figcaption>" if found["curve"] else "") + apart


def _curve(found: dict[str, Any]) -> str:
    if not found["curve"]:
        return ""
    width, height, left, bottom = 640, 150, 40, 24
    lags, values = zip(*found["curve"])
    low, high = min(0.0, *values), max(0.1, *values)

    def x(lag: float) -> float:
        return left + (lag - lags[0]) / (lags[-1] - lags[0]) * (width - left - 10)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (height - bottom - 8)

    points = " ".join(f"{x(lag):.1f},{y(value):.1f}" for lag, value in found["curve"])
    ticks = "".join(
        f'<text x="{x(lag):.1f}" y="{height - 4}" text-anchor="middle">{lag:+d} ms</text>'.replace("+0 ms", "0")
        for lag in range(-600, 601, 200)
    )
    ticks += "".join(
        f'<line class="rule" x1="{left}" x2="{width - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
        for v in (k / 10 for k in range(int(low * 10), int(high * 10) + 1, 2))
    )
    interval = ""
    if found["told"]:
        a, b = x(found["low"]), x(found["high"])
        interval = f'<rect class="range" x="{a:.1f}" y="8" width="{max(b - a, 1):.1f}" height="{height - bottom - 8}"/>'
    zero = f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="8" y2="{height - bottom}"/>'
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}">{ticks}{zero}{interval}<polyline points="{points}"/></svg>'
    )


def _quarantine(found: dict[str, Any]) -> str:
    if not found["known"]:
        return "<p>No <code>quarantine.jsonl</code> lies beside the shards, so what was left out is unknown.</p>"
    if not found["clips"]:
        return "<p>The preparation left no clip out.</p>"
    causes = table(["Cause", "Clips"], [[escape(cause), f"{n:,}"] for cause, n in found["causes"].items()], numbers=1)
    rows = [[escape(str(row[key])) for key in ("id", "cause", "message")] for row in found["examples"][:SHOWN]]
    return card(causes) + card(_wrapped(table(["Clip", "Cause", "What happened"], rows)), title="Examples")


def _damage(found: dict[str, Any]) -> str:
    checked = "Every member and every shard was compared with its checksum." if found["verified"] else (
        "Streams were checked as they were decoded; <code>--verify</code> checks every byte."
    )  # fmt: skip
    rows = [[escape(row["id"]), escape(row["cause"]), escape(row["message"])] for row in found["clips"]]
    rows += [["", "shard", escape(message)] for message in found["shards"]]
    listed = card(_wrapped(table(["Clip", "Cause", "What is wrong"], rows))) if rows else "<p>No damage was found.</p>"
    return f"<p class='soft'>{checked}</p>{listed}"


def _names(ids: Sequence[str], count: int = 3) -> str:
    more = f" and {len(ids) - count} more" if len(ids) > count else ""
    return escape(", ".join(ids[:count])) + more


def _wrapped(html: str) -> str:
    """The same table with cells that break lines."""
    return html.replace("<td>", '<td class="wrap" style="min-width:0">')
