"""The page of an evaluation: drawn from `results.json` alone, with pictures of clips where their shards are at hand."""

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from affekt.data.files import write_text
from affekt.data.page import anchor, card, grid, page, section, table
from affekt.data.shards import ShardIndex
from affekt.finetune.report.clips import find_samples
from affekt.finetune.report.confidence import calibration, risk_coverage, votes
from affekt.finetune.report.confusions import confusions, mistakes
from affekt.finetune.report.gallery import gallery
from affekt.finetune.report.map import drawn, map_section
from affekt.finetune.report.people import conflict, fairness, speakers
from affekt.finetune.report.summary import chosen_on_test, differences, folds_and_seeds, lead, summary
from affekt.finetune.report.sweeps import layers, stress
from affekt.finetune.schema import Results, Table
from affekt.pretrain.curves import LEARNING, curve_cards, picture_cards
from affekt.pretrain.log import read_metrics

LIMITS = """Expressions are not feelings: these labels say what people posed, or what others saw and heard in them,
not what anyone felt. The scores hold for recordings, languages and speakers like those tested and carry the biases of
the clips and of those who labelled them; a different camera, culture, age or health can change them in ways no interval
here shows. This is meant for research on expression, for teaching, and for people who analyse recordings with consent.
It is not fit for decisions about individuals, and laws restrict such use: in the EU, Regulation 2024/1689 forbids
inferring emotions of people at work and in education (article 5) and puts duties on most other uses."""
SHOWN_PEOPLE = " Faces and voices of people are in this page: hand it on only as the licences of their clips allow."


def write_results_report(
    out_html: str | Path,
    results: Results,
    index: ShardIndex | None = None,
    *,
    run: Path | None = None,
    extras: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of `results` and return its path. Sections without data are left out.

    `index` are the shards of the clips: thumbnails on the map, mistakes to look at and listen to, some clips of each
    class. `run` is the folder of the pre-training run, whose curves and reconstructions are shown. `extras` are further
    sections, ready HTML by title (say a sheet of spoiled clips, of `affekt.data.page.card`). The file asks for nothing
    from elsewhere and runs no script but its own.
    """
    wrong = {m.id for system in results.systems for m in system.mistakes}
    samples = find_samples(index, wrong | {p.id for p in drawn(results.map)})
    clip_map, data = map_section(results.map, index, samples)
    sections = {
        "The short answer": [lead(results), summary(results)],
        "Chosen on the test clips": [chosen_on_test(results)],
        "Differences": [differences(results)],
        "What is taken for what": [confusions(results)],
        "Speakers": [speakers(results)],
        "Groups of people": [fairness(results)],
        "Confidence": [calibration(results)],
        "Against the raters' votes": [votes(results)],
        "When it may stay silent": [risk_coverage(results)],
        "Where in the network it sits": [layers(results)],
        "Under stress": [stress(results)],
        "When face and voice disagree": [conflict(results)],
        "Map of the clips": [clip_map],
        "Worst mistakes": [mistakes(results, index, samples)],
        "More tables": [_table(t) for t in results.tables],
        **{title: [html] for title, html in (extras or {}).items()},
        "Folds and seeds": [_boxed(folds_and_seeds(results))],
        "How it was learned": _training(run),
        "What pre-training saw": [_seen(results)],
        "The clips": [_clips(results), gallery(results, index)],
        "Limits and intended use": [_limits(results, shown=bool(samples))],
        "How it was measured": [_measured(results)],
    }
    named = [(title, section(title, *parts)) for title, parts in sections.items()]
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title, html in named if html)
    body = [_header(results), f'<nav aria-label="Contents">{links}</nav>', *(html for _, html in named if html)]
    body += [
        f"<footer>Made by affekt {escape(results.versions.get('affekt', ''))}. All numbers are in"
        " <code>results.json</code> beside this file, the scores in <code>results.csv</code> too.</footer>"
    ]
    body += [f'<script type="application/json" id="map-data">{data}</script>'] if data else []
    here = files("affekt.finetune.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("results.css", "map.js"))
    html = page(results.title, "\n".join(body), style=style, script=script if data else "")
    write_text(Path(out_html), html)
    return Path(out_html)


def _header(results: Results) -> str:
    kinds = {
        "single": f"{len(results.classes)} classes",
        "soft": f"shares of {len(results.classes)} classes",
        "multi": f"{len(results.classes)} classes, several at once",
        "dimensions": ", ".join(results.dimensions),
        "joint": f"{len(results.classes)} classes with {', '.join(results.dimensions)}",
    }
    name = results.protocol.get("name")
    facts = [f"{escape(kinds[results.task])} of <code>{escape(results.label)}</code>"]
    facts += [f"protocol <code>{escape(str(name))}</code>"] if name else []
    clips, people = max(s.clips for s in results.systems), max(len(s.speakers) for s in results.systems)
    facts.append(f"{clips:,} test clips" + (f" of {people:,} speakers" if people else ""))
    marked = any(s.transductive for s in results.systems)
    warning = " <strong>Transductive rows: pre-training saw their test clips.</strong>" if marked else ""
    return (
        f'<header><p class="over">affekt · evaluation</p><h1>{escape(results.title)}</h1>'
        f'<p class="soft">{", ".join(facts)}.{warning}</p></header>'
    )


def _table(found: Table) -> str:
    rows = [[escape(value) for value in row] for row in found.rows]
    note = f"<figcaption>{escape(found.note)}</figcaption>" if found.note else ""
    return card(table([escape(name) for name in found.head], rows, numbers=1), note, title=found.title)


def _boxed(html: str) -> str:
    return card(html) if html else ""


def _training(run: Path | None) -> list[str]:
    """Curves of `metrics.jsonl` and reconstructions of a pre-training run, as far as they are there."""
    if run is None:
        return []
    curves = grid(curve_cards(LEARNING, {"": read_metrics(Path(run) / "metrics.jsonl")}), "two")
    told = "<p>Masked patches are predicted from the visible ones; no label is used.</p>" if curves else ""
    return [told, curves, grid(picture_cards(Path(run)), "two")]


def _seen(results: Results) -> str:
    """What pre-training shares with the test clips, by the counts of `splits.check_unseen`."""
    seen, shared = results.pretraining, results.pretraining.get("shared_with_test")
    if not shared:
        return ""
    names = {"ids": "an id", "sources": "a source file", "speakers": "a speaker"}
    if any(shared.values()):
        parts = ", ".join(f"{count} {escape(name)}" for name, count in shared.items() if count)
        verdict = f"<strong>They share {parts} with the test clips: these results are transductive.</strong>"
    else:
        *first, last = (names.get(name, escape(name)) for name in shared)
        verdict = f"None of them shares {', '.join(first)}{' or ' if first else ''}{last} with a test clip."
        if seen.get("without_speaker"):
            count = f"<strong>But {seen['without_speaker']:,} of its clips name no speaker"
            verdict += f" {count}: test speakers may be among them.</strong>"
    speakers = f" of {seen['speakers']:,} named speakers" if seen.get("speakers") else ""
    what = "The encoder was pre-trained, without labels, on"
    if results.command == "stress":
        what = "The model learned, with labels or without, from"
    return f"<p>{what} {seen.get('clips', 0):,} clips{speakers}. {verdict}</p>"


def _clips(results: Results) -> str:
    """Counts of the clips to fit, to choose and to score on, where the results have them."""
    parts = results.clips.get("parts", {})
    names = {"fit": "To fit on", "choose": "To choose on", "test": "To score"}
    rows = []
    for part, name in ((part, name) for part, name in names.items() if part in parts):
        found = parts[part]
        classes = [f"{found['classes'].get(c, 0):,}" for c in results.classes]
        figures = [found["clips"], len(found["speakers"]) or "not named", found["with_audio"], found["with_video"]]
        rows.append([name, *classes, *map(str, figures)])
    left = results.clips.get("left_out", {}).get("without_label")
    note = f'<p class="soft">{left:,} clips without a label were left out.</p>' if left else ""
    head = ["Part", *map(escape, results.classes), "Clips", "Speakers", "With sound", "With picture"]
    return card(table(head, rows, numbers=1)) + note if rows else ""


def _limits(results: Results, shown: bool) -> str:
    items = "".join(f"<li>{escape(licence)}</li>" for licence in results.licences)
    listed = f"<ul>{items}</ul>" if items else "<p>The clips state none.</p>"
    text = escape(LIMITS + (SHOWN_PEOPLE if shown else ""))
    passed = "Licences of the clips, which pass on to the weights, this page and what is made of them:"
    return card(f"<p>{text}</p>") + f"<p>{passed}</p>{listed}"


def _measured(results: Results) -> str:
    """Protocol, clips, pre-training, settings and versions, each as a part that opens."""
    parts = {
        "Protocol": results.protocol,
        "Clips": results.clips,
        "What pre-training saw": results.pretraining,
        "Settings": results.settings,
        "Versions": results.versions,
        "Seconds": {name: round(value, 1) for name, value in results.seconds.items()},
        "Files of predictions": {s.name: s.predictions for s in results.systems if s.predictions},
    }
    return _boxed("".join(_opened(title, values) for title, values in parts.items() if values))


def _opened(title: str, values: dict[str, Any]) -> str:
    if all(isinstance(value, str | int | float) for value in values.values()):
        rows = [[escape(str(name)), escape(str(value))] for name, value in values.items()]
        return f"<details><summary>{title}</summary>{table(['What', 'Value'], rows)}</details>"
    values = json.loads(json.dumps(values, default=str))  # paths and the like as text
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
