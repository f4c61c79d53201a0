"""The pages that affekt writes: their style and the few pieces of HTML they are made of, with nothing beside.

A page's own policy forbids it to ask for anything and to run any script but the one that it was written with.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np
import simplejpeg

# One colour per kind of features, the same in every chart, chosen to keep their contrast on both grounds and to differ
# in lightness too, for readers who do not tell the hues apart.
STYLE = """
:root { color-scheme: light dark;
  --ground: #f7f6f3; --card: #ffffff; --ink: #1f1d26; --soft: #67636f; --line: #e4e1da; --wash: #f1efea;
  --pretrained: #4a3fcf; --random: #8d8996; --statistics: #c47a12; --majority: #bab6c0;
  --audio: #0f8577; --video: #c2476b; --both: #4a3fcf; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #131218; --card: #1c1b22; --ink: #eceaf1; --soft: #a39fad; --line: #33313b; --wash: #25232c;
  --pretrained: #a59dff; --random: #95919f; --statistics: #e5a650; --majority: #64606c;
  --audio: #4cc4b3; --video: #f0879f; --both: #a59dff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 72px; }
header { margin-bottom: 36px; }
.over { color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; margin: 0 0 6px; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 10px; font-weight: 700; }
h2 { font-size: 24px; letter-spacing: -.01em; margin: 56px 0 6px; line-height: 1.25; }
h3 { font-size: 15px; margin: 0 0 10px; font-weight: 600; }
p { margin: 0 0 14px; max-width: 72ch; }
.soft, figcaption { color: var(--soft); }
figcaption { font-size: 14px; margin-top: 10px; max-width: 84ch; }
.lead { font-size: 20px; line-height: 1.45; max-width: 62ch; }
strong { font-weight: 650; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 22px 24px;
  margin: 16px 0; min-width: 0; }
.card p { max-width: none; } .card > :last-child { margin-bottom: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  margin: 16px 0; }
.grid > .card { margin: 0; }
header p { max-width: none; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.tile b { display: block; font-size: 40px; line-height: 1.1; letter-spacing: -.02em; font-weight: 700;
  font-variant-numeric: tabular-nums; color: var(--pretrained); }
.tile b small { font-size: 20px; font-weight: 600; margin-left: 3px; }
.tile span { display: block; font-size: 14px; color: var(--soft); }
.tile .name { color: var(--ink); font-weight: 600; font-size: 15px; margin-bottom: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); }
tbody tr:last-child > * { border-bottom: 0; }
th.n, td.n { text-align: right; padding: 8px 0 8px 14px; }
td small { color: var(--soft); font-size: 13px; display: inline-block; min-width: 86px; margin-left: 6px; }
.scores tbody tr > * { border-bottom: 0; padding-top: 4px; padding-bottom: 4px; }
.scores tbody tr:has(strong) > * { border-top: 1px solid var(--line); padding-top: 12px; }
.scores tbody tr:first-child > * { border-top: 0; } .scores tbody tr:has(+ tr strong) > * { padding-bottom: 12px; }
td.wrap { white-space: normal; min-width: 200px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.key.plain { background: transparent !important; border: 2px solid; }

.dots { display: grid; grid-template-columns: max-content 1fr max-content; column-gap: 18px; row-gap: 2px;
  align-items: center; font-size: 15px; font-variant-numeric: tabular-nums; }
.dots .row { display: contents; }
.dots .group { grid-column: 1 / -1; font-weight: 650; margin-top: 16px; }
.dots .group:first-child { margin-top: 0; }
.dots .track { position: relative; height: 26px; background:
  repeating-linear-gradient(to right, var(--line) 0 1px, transparent 1px 20%); border-right: 1px solid var(--line); }
.dots .chance { position: absolute; top: 0; bottom: 0; width: 0; border-left: 2px dotted var(--soft); }
.dots .bar { position: absolute; top: 11px; height: 4px; border-radius: 2px; opacity: .45; }
.dots .dot { position: absolute; top: 6px; width: 14px; height: 14px; margin-left: -7px; border-radius: 50%;
  border: 2px solid var(--card); }
.dots .value { text-align: right; min-width: 3.2em; }
.dots .axis { position: relative; height: 22px; font-size: 13px; color: var(--soft); }
.dots .axis span { position: absolute; transform: translateX(-50%); }

.confusion { width: auto; font-size: 13px; border-collapse: separate; border-spacing: 2px; margin: 0 auto; }
.confusion th, .confusion td { border: 0; padding: 0; }
.confusion tbody th { font-weight: 400; padding-right: 8px; text-align: right; }
.confusion thead th { font-weight: 400; color: var(--ink); vertical-align: bottom; text-align: center; height: 74px; }
.confusion thead th span { writing-mode: vertical-rl; transform: rotate(180deg); padding-top: 4px; }
.confusion td { width: 36px; height: 32px; text-align: center; border-radius: 5px; }

svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); stroke-width: 1; } svg .chance { stroke: var(--soft); stroke-dasharray: 2 4; }
svg .line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: .18; stroke: none; }
svg .name { font-size: 12.5px; font-weight: 600; }

.picture { width: 100%; border-radius: 10px; display: block; background: #fff; }
.light { background: #fff; border-radius: 10px; padding: 10px; }
.faces { display: grid; grid-template-columns: repeat(4, 1fr); gap: 5px; margin-bottom: 8px; }
.faces img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px; display: block; }
.sound { width: 100%; height: 84px; object-fit: fill; border-radius: 8px; display: block; }
audio { width: 100%; height: 34px; margin-top: 8px; }
details { margin: 12px 0; } summary { cursor: pointer; font-weight: 600; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-x: auto; margin: 12px 0 0;
  background: var(--wash); padding: 14px 16px; border-radius: 10px; }
code { font: .88em ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
ul { padding-left: 20px; margin: 0 0 14px; }
footer { margin-top: 56px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--soft); font-size: 14px; }
@media (max-width: 640px) { main { padding: 28px 16px 48px; } h1 { font-size: 29px; } .lead { font-size: 18px; }
  .card { padding: 16px; } .tile b { font-size: 34px; } .dots { display: block; font-size: 14px; }
  .dots .row { display: grid; grid-template: "name value" "track track" / 1fr max-content; }
  .dots .track, .dots .axis { grid-area: track; margin-right: 8px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } pre { white-space: pre-wrap; } }
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
$body
</main>$script</body>
</html>
""")


# Nothing is fetched; pictures and sounds stand in the page. Styles may be inline, scripts only with the right hash.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
)


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole page. `style` comes after what all pages share; `script` is the only one that the page will run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return PAGE.substitute(
        title=escape(title),
        policy=f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY,
        style=STYLE + style,
        body=body,
        script=f"<script>{script}</script>" if script else "",
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page, which `#anchor(title)` leads to; nothing at all when every part is empty."""
    if not any(parts):
        return ""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def card(*parts: str, title: str = "") -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{heading}{"".join(parts)}</div>'


def grid(cards: Sequence[str], kind: str = "") -> str:
    return f'<div class="grid {kind}">{"".join(cards)}</div>' if cards else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int | None = None, kind: str = "") -> str:
    """A table of ready HTML cells; columns from index `numbers` on are figures and stand to the right."""
    numbers = len(head) if numbers is None else numbers

    def line(cells: Sequence[str], tag: str) -> str:
        parts = (f"<{tag}{' class=n' if i >= numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    inner = f"<thead>{line(head, 'th')}</thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(image: np.ndarray, quality: int = 88) -> str:
    """A picture `(H, W, 3)` uint8 as a JPEG data URI."""
    return data_uri(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality), "image/jpeg")


def file_uri(path: Path) -> str | None:
    """A picture file as a JPEG data URI, at a tenth of the bytes of a PNG; None for one that cannot be read."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    return None if pixels is None else picture_uri(pixels[..., ::-1])
