"""The report of a probe: one HTML file that needs nothing beside it, with the answer first and the evidence after."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from affekt.data.charts import Line, line_chart
from affekt.data.files import write_text
from affekt.data.page import card, grid, page, section, table
from affekt.data.shards import ShardIndex
from affekt.finetune.probes.results import HEAD_NAMES, STREAM_NAMES, find_row, percent, row_name
from affekt.finetune.report.gallery import gallery
from affekt.finetune.report.plots import confusion, dot_plot, key
from affekt.pretrain.curves import LEARNING, curve_cards, picture_cards
from affekt.pretrain.log import read_metrics

SENSES = {"audio": "sound alone", "video": "picture alone", "both": "picture and sound together"}
UNSEEN = {"speaker": "speakers it never met", "id": "clips it never met"}

LIMITS = """Expressions are not feelings: these labels say what people posed, or what others saw and heard in them,
not what anyone felt. The scores hold for recordings, languages and speakers like those tested and carry the biases of
the clips and of those who labelled them; a different camera, culture, age or health can change them in ways no interval
here shows. This is meant for research on expression, for teaching, and for people who analyse recordings with consent.
It is not fit for decisions about individuals, and laws restrict such use: in the EU, Regulation 2024/1689 forbids
inferring emotions of people at work and in education (article 5) and puts duties on most other uses."""


def write_report(
    out_html: Path,
    *,
    results: dict[str, Any],
    run_folder: Path | None = None,
    corpus: ShardIndex | None = None,
    title: str = "What the features know",
) -> Path:
    """Write the report of `results` (what `probe` returns or `results.json` holds) and return its path.

    `run_folder` adds curves and reconstructions of the pre-training run, `corpus` pictures and sounds of some clips.
    """
    body = [
        _header(results, title),
        section("The short answer", _answer(results)),
        section("What is taken for what", _confusions(results)),
        section("How it was learned", *_training(run_folder)),
        section("Where in the network it sits", _depth(results), _choices(results)),
        section("The clips", _clips(results), gallery(results, corpus)),
        section("What pre-training saw", _seen(results)),
        section("Limits and intended use", card(f"<p>{escape(LIMITS)}</p>"), _licences(results)),
        section("Settings and environment", _settings(results)),
        f"<footer>Made by affekt {escape(results['versions']['affekt'])}. All numbers are in <code>results.json</code>"
        " beside this file.</footer>",
    ]
    write_text(Path(out_html), page(title, "\n".join(part for part in body if part)))
    return Path(out_html)


def _header(results: dict[str, Any], title: str) -> str:
    parts = results["clips"]["parts"]
    test, speakers = parts["test"]["clips"], len(parts["test"]["speakers"])
    by_speaker = results["clips"]["group"] == "speaker"
    who = f" of {speakers} speakers nobody trained on" if by_speaker else ", held out by clip"
    fitted = parts["fit"]["clips"]
    marked = " <strong>Transductive: pre-training saw test clips.</strong>" if _transductive(results) else ""
    return (
        f'<header><p class="over">affekt · linear probe of frozen features</p><h1>{escape(title)}</h1>'
        f'<p class="soft">{len(results["classes"])} classes of <code>{escape(results["clips"]["label"])}</code>, '
        f"{test} test clips{who}, {fitted} clips to fit and choose on.{marked}</p></header>"
    )


def _answer(results: dict[str, Any]) -> str:
    streams = list(dict.fromkeys(row["stream"] for row in results["rows"]))
    best = "both" if "both" in streams else streams[0]
    row = find_row(results, "pretrained", best)
    score, gain = row["test"]["uar"], _difference(results, ("pretrained", best), ("random", best))
    plain, chance = find_row(results, "statistics", best), 100 * results["chance"]
    verdict = "above" if gain["low"] > 0 else "below" if gain["high"] < 0 else "not clearly apart from"
    amount = f"<strong>{abs(100 * gain['value']):.1f} points</strong> " if verdict != "not clearly apart from" else ""
    lead = (
        f'<p class="lead">From {SENSES[best]}, a linear model on the pre-trained features tells '
        f"{len(results['classes'])} classes apart on {UNSEEN[results['clips']['group']]} with "
        f"<strong>{100 * score['value']:.1f} % UAR</strong> (95 % interval {100 * score['low']:.0f} to "
        f"{100 * score['high']:.0f}). That is {amount}{verdict} the same network with random weights "
        f"({_bounds(gain)}); plain statistics reach {100 * plain['test']['uar']['value']:.1f} %, guessing "
        f"{chance:.1f} %.</p>"
    )
    tiles = []
    for stream in streams:
        row = find_row(results, "pretrained", stream)
        against = _difference(results, ("pretrained", stream), ("random", stream))
        tiles.append(
            f'<div class="card tile"><span class="name">{STREAM_NAMES[stream]}</span>'
            f"<b>{100 * row['test']['uar']['value']:.1f}<small>%</small></b><span>{_signed(against)} against random"
            f" weights</span></div>"
        )
    interval = row["test"]["uar"]
    caption = (
        "Unweighted average recall in percent on the test clips. Bars: 95 % intervals from resampling "
        f"{interval['clusters']} {interval['unit']}; dotted: chance. Layer, pooling and penalty are chosen on "
        "development clips from the same menu for both encoders, and the test clips are scored once. Hollow: the last "
        "layer under plain mean pooling, with nothing but the penalty chosen."
    )
    seeds = len(results["settings"]["random_seeds"])
    caption += f" Random encoder: mean over {seeds} initialisations." if seeds > 1 else " Random encoder: one seed."
    return (
        lead
        + grid(tiles, "tiles")
        + f"<figure class='card' style='margin-inline:0'>{dot_plot(results)}<figcaption>{caption}</figcaption></figure>"
        + card(_score_table(results, streams))
        + _both_sentence(results)
    )


def _score_table(results: dict[str, Any], streams: list[str]) -> str:
    head = ["Stream", "Features", "UAR", "WAR", "Macro F1", "Test clips"]
    rows = []
    for stream in streams:
        for position, row in enumerate(r for r in results["rows"] if r["stream"] == stream):
            cells = [_cell(row["test"][score]) for score in ("uar", "war", "macro_f1")]
            name = f"<strong>{STREAM_NAMES[stream]}</strong>" if position == 0 else ""
            rows.append([name, key(row) + escape(row_name(row)), *cells, str(row["clips"]["test"])])
    return table(head, rows, numbers=2, kind="scores")


def _both_sentence(results: dict[str, Any]) -> str:
    parts = []
    for stream in ("audio", "video"):
        gain = _difference(results, ("pretrained", "both"), ("pretrained", stream))
        if gain:
            parts.append(f"{_signed(gain)} over {SENSES[stream]}")
    return f"<p>Both streams together give {' and '.join(parts)} on the clips that have both.</p>" if parts else ""


def _confusions(results: dict[str, Any]) -> str:
    rows = [r for r in results["rows"] if r["features"] == "pretrained" and r["main"]]
    cards = [card(confusion(row["confusion"], results["classes"]), title=STREAM_NAMES[row["stream"]]) for row in rows]
    note = (
        '<p class="soft">Pre-trained encoder. Rows are the truth, columns the answer, figures percent of the row.</p>'
    )
    return note + grid(cards)


def _training(run: Path | None) -> list[str]:
    """Curves of `metrics.jsonl` and the first and last reconstruction picture of a run, as far as they are there."""
    if run is None:
        return []
    charts = curve_cards(LEARNING, {"": read_metrics(Path(run) / "metrics.jsonl")})
    parts = []
    if charts:
        parts += ["<p>Masked patches are predicted from the visible ones; no label is used.</p>", grid(charts, "two")]
    cards = picture_cards(Path(run))
    if cards:
        parts.append("<h3 style='margin-top:28px'>What it fills in</h3>" + grid(cards, "two"))
    return parts


def _depth(results: dict[str, Any]) -> str:
    """UAR on development clips by layer, the best pooling of each, pre-trained beside random."""
    cards = []
    for stream in ("audio", "video"):
        lines = []
        for features, name in (("pretrained", "Pre-trained"), ("random", "Random")):
            by_seed: dict[int, dict[int, float]] = {}
            row = find_row(results, features, stream)
            for trial in results["trials"] if row else ():
                of = (trial["features"], trial["stream"], trial["head"])
                if of == (features, stream, row["head"]) and len(trial["blocks"]) == 1:
                    layer = int(trial["blocks"][0].split("/")[0].split("_")[1])
                    best = by_seed.setdefault(trial["seed"], {})
                    best[layer] = max(best.get(layer, 0.0), *trial["dev_scores"])
            if by_seed:
                layers = sorted(by_seed[0])
                scores = 100 * np.array([[best[layer] for layer in layers] for best in by_seed.values()])
                low, high = (scores.min(0).tolist(), scores.max(0).tolist()) if len(scores) > 1 else (None, None)
                lines.append(Line(name, layers, scores.mean(0).tolist(), f"var(--{features})", low, high))
        if lines:
            chart = line_chart(lines, x_name="layer", chance=100 * results["chance"])
            cards.append(card(chart, title=STREAM_NAMES[stream]))
    note = (
        '<p class="soft">UAR in percent on development clips for every layer, under its best pooling and penalty. The'
        " band spans the random initialisations.</p>"
    )
    return note + grid(cards, "two") if cards else ""


def _choices(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        for choice in row["choices"]:
            blocks = " + ".join(block.replace("_statistics", "") for block in choice["blocks"])
            scores = [f"{100 * choice[name]:.1f}" for name in ("dev", "test")]
            rows.append(
                [
                    key(row) + escape(row_name(row)),
                    STREAM_NAMES[row["stream"]],
                    escape(blocks),
                    HEAD_NAMES.get(row["head"], ""),
                    escape(option_text(choice["option"])),
                    *scores,
                ]
            )
    head = ["Features", "Stream", "Chosen on development clips", "Head", "Option", "Dev UAR", "Test UAR"]
    return f"<details><summary>Every choice that was made</summary>{table(head, rows, numbers=3)}</details>"


def option_text(option: Any) -> str:
    """A penalty, a number of steps, or the k and the temperature of neighbours."""
    return " at ".join(f"{part:g}" for part in option) if isinstance(option, list | tuple) else str(option)


def _clips(results: dict[str, Any]) -> str:
    parts = results["clips"]["parts"]
    head = ["Part", *map(escape, results["classes"]), "Clips", "Speakers", "With sound", "With picture"]
    rows = []
    folds = f", in {results['clips']['folds']} folds" if results["clips"]["folds"] > 1 else ""
    for part, name in (("fit", "To fit on"), ("choose", f"of these to choose on{folds}"), ("test", "To score")):
        counts = parts[part]
        figures = [counts["clips"], len(counts["speakers"]) or "not named", counts["with_audio"], counts["with_video"]]
        rows.append([name, *(str(counts["classes"][c]) for c in results["classes"]), *map(str, figures)])
    notes = []
    if results["clips"]["left_out"]["without_label"]:
        notes.append(f"{results['clips']['left_out']['without_label']} clips without a label were left out.")
    if results["unread"]:
        notes.append(f"{len(results['unread'])} clips could not be read and have no features.")
    for stream, why in results["streams_without_clips"].items():
        notes.append(f"{STREAM_NAMES[stream]} was not probed: {escape(why)}.")
    return card(table(head, rows, numbers=1)) + (f'<p class="soft">{" ".join(notes)}</p>' if notes else "")


def _seen(results: dict[str, Any]) -> str:
    seen = results["pretraining"]
    shared = seen["shared_with_test"]
    speakers = f" of {seen['speakers']} named speakers" if seen["speakers"] else ""
    if not any(shared.values()):
        what = {"ids": "an id", "sources": "a source file", "speakers": "a speaker"}
        *first, last = (what[name] for name in shared)
        verdict = (
            f"None of them shares {', '.join(first)} or {last} with a test clip; had one, the probe would have refused."
        )
        if seen.get("without_speaker"):
            verdict += (
                f" <strong>But {seen['without_speaker']} of its clips name no speaker: test speakers may be among"
                " them.</strong>"
            )
    else:
        parts = ", ".join(f"{count} {name}" for name, count in shared.items() if count)
        verdict = f"<strong>They share {parts} with the test clips: these results are transductive.</strong>"
    return f"<p>The encoder was pre-trained, without labels, on {seen['clips']} clips{speakers}. {verdict}</p>"


def _licences(results: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(licence)}</li>" for licence in results["licences"])
    listed = f"<ul>{items}</ul>" if items else "<p>The clips state none.</p>"
    return f"<p>Licences of the clips, which pass on to the weights, this report and what is made of them:</p>{listed}"


def _settings(results: dict[str, Any]) -> str:
    rows = [[escape(name), escape(str(value))] for name, value in results["versions"].items()]
    rows += [["shards", f"<code>{results['shards'][:16]}</code>"]]
    rows += [[f"{name} weights", f"<code>{hashes[0][:16]}</code>"] for name, hashes in results["weights"].items()]
    rows += [[f"seconds, {name.replace('_', ' ')}", f"{value:.1f}"] for name, value in results["seconds"].items()]
    settings = yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
    return card(
        f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
        f"<details><summary>Environment</summary>{table(['What', 'Value'], rows)}</details>"
    )


def _difference(results: dict[str, Any], of: tuple[str, str], minus: tuple[str, str]) -> dict[str, Any] | None:
    names = "_".join(of), "_".join(minus)
    return next((d["estimate"] for d in results["differences"] if (d["of"], d["minus"]) == names), None)


def _transductive(results: dict[str, Any]) -> bool:
    return any(row["transductive"] for row in results["rows"])


def _signed(interval: dict[str, Any]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]".replace("-", "\u2212")


def _bounds(interval: dict[str, Any]) -> str:
    return f"95 % interval {100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}".replace("-", "\u2212")


def _cell(interval: dict[str, Any]) -> str:
    value, _, bounds = percent(interval).partition(" ")
    return f"{value}<small>{bounds}</small>"
