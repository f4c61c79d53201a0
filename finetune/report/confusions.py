"""What is taken for what: confusion matrices with recall and counts, and the clips that were misjudged most surely."""

from collections.abc import Sequence
from html import escape

from affekt.data.page import card, grid, table
from affekt.data.samples import Sample
from affekt.data.shards import ShardIndex
from affekt.finetune.report.clips import film
from affekt.finetune.report.words import models, system_title, titles
from affekt.finetune.schema import Mistake, Results

MATRICES, MISTAKES = 6, 12


def confusions(results: Results) -> str:
    """A matrix per model, of the first few; baselines only where there is nothing else."""
    found = [s for s in models(results.systems) if s.confusion]
    shown = sorted(found, key=lambda s: not s.speakers)[:MATRICES]  # those of which all is told come first
    if not shown or not results.classes:
        return ""
    cards = [card(f"<h3>{system_title(s)}</h3>", matrix(s.confusion, results.classes)) for s in shown]
    summed = " Counts are summed over seeds." if any(len(s.seeds) > 1 for s in shown) else ""
    note = (
        '<p class="soft">Rows are the truth, columns the answer: percent of the row, which on the diagonal is the'
        f" recall of a class, above the number of clips.{summed}</p>"
    )
    return note + grid(cards, "two" if len(results.classes) <= 8 else "one")


def matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A table of percent per row, shaded, over the counts, and the clips of each class at the end of its row."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in classes)
    lines = []
    for truth, row in zip(classes, counts):
        total = sum(row)
        cells = "".join(_cell(truth, predicted, count, total) for predicted, count in zip(classes, row))
        lines.append(f'<tr><th scope="row">{escape(truth)}</th>{cells}<td class="sum">{total:,}</td></tr>')
    return (
        '<div class="scroll"><table class="confusion counted"><thead><tr><th></th>'
        f'{head}<th scope="col"><span>clips</span></th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _cell(truth: str, predicted: str, count: int, total: int) -> str:
    share = 100 * count / total if total else 0
    dark = " class=dark" if share > 55 else ""  # the ground's colour reads better there
    title = escape(f"{truth} taken for {predicted}: {count} of {total}")
    text = f"{share:.0f}<small>{count:,}</small>" if count else ""
    return f'<td{dark} style="--share:{share:.0f}%" title="{title}">{text}</td>'


def mistakes(results: Results, index: ShardIndex | None, samples: dict[str, Sample]) -> str:
    """The wrong answers of the first model that has any, with the clips themselves where shards are at hand."""
    system = next((s for s in models(results.systems) if s.mistakes), None)
    if system is None:
        return ""
    shown = system.mistakes[:MISTAKES]
    note = (
        f'<p class="soft">Wrong answers that {escape(titles(results)[system.name])} was surest of, out of all test '
        "clips. Some are mistakes of the model, some of the label, and some of this page's reader.</p>"
    )
    if index is None:
        rows = [[escape(m.id), escape(m.truth), escape(m.prediction), _percent(m), escape(m.speaker)] for m in shown]
        return note + card(table(["Clip", "Truth", "Answer", "Confidence", "Speaker"], rows))
    return note + grid([_mistake(index, samples.get(m.id), m) for m in shown], "clips")


def _percent(mistake: Mistake) -> str:
    return f"{100 * mistake.confidence:.0f} %"


def _mistake(index: ShardIndex, sample: Sample | None, mistake: Mistake) -> str:
    view = film(index, sample) if sample else '<p class="soft">Not in the shards of this page.</p>'
    speaker = f" · {escape(mistake.speaker)}" if mistake.speaker else ""
    return (
        f'<article class="card clip">{view}<p><b>{escape(mistake.truth)}</b>, taken for '
        f'<b class="wrong">{escape(mistake.prediction)}</b> at {_percent(mistake)}</p>'
        f'<p class="soft id">{escape(mistake.id)}{speaker}</p></article>'
    )
