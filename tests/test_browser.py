"""The page of an evaluation in a headless browser: what readers see, point at, switch and print."""

import zlib
from itertools import pairwise

import pytest

from affekt.finetune.report.results import write_results_report
from benchmarks.example_results import example
from benchmarks.pages import NAMES, Browser, find_browser

HOSTILE = "</script><img src=x onerror=window.hacked=1>\"'"


@pytest.fixture(scope="module")
def results(tiny_shards):
    index = tiny_shards(48, "mixed", seconds=0.5, size=32)
    return example(index, attack=HOSTILE), index


@pytest.fixture(scope="module")
def browser(results, tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH")
    folder = tmp_path_factory.mktemp("browser")
    report = write_results_report(folder / "report.html", *results)
    browser = Browser(program, folder / "profile")
    browser.report = report
    yield browser
    browser.close()


@pytest.fixture
def opened(browser):
    """The page, loaded anew and looked at in a wide window by day."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.look()
    browser.open(browser.report)
    yield browser
    outside = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    assert not outside and not browser.complaints
    assert browser.run("window.hacked") is None


def tip(browser):
    """What the map shows of a clip: its picture and its text; None while it shows none."""
    return browser.run(
        "(() => { const t = document.querySelector('.tip'); if (t.hidden) return null;"
        "const i = t.querySelector('img'); return [i.hidden ? null : i.src, i.naturalWidth, t.innerText] })()"
    )


def place(browser, point):
    """Where a point of the map lies in the window, scrolled to."""
    return browser.run(
        f"(() => {{ const p = document.querySelectorAll('.map .p')[{point}]; p.scrollIntoView({{block: 'center'}});"
        "const b = p.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )


def points(browser):
    return browser.run("JSON.parse(document.getElementById('map-data').textContent).points")


def test_pointing_at_a_clip_shows_its_picture_and_its_names(opened, results):
    known = points(opened)
    assert [p["id"] for p in known] == [p.id for p in results[0].map]
    for point in (0, 17, 30):
        x, y = place(opened, point)
        opened.mouse("mouseMoved", x, y)
        opened.run("new Promise(requestAnimationFrame)")
        picture, width, text = tip(opened)
        nearest = next(p for p in known if p["id"] in text)
        assert (nearest["x"] - known[point]["x"]) ** 2 + (nearest["y"] - known[point]["y"]) ** 2 < 4
        assert picture == nearest["src"]
        assert (picture.startswith("data:image/jpeg") and width == 72) if point % 2 == 0 else picture is None
        assert results[0].map[known.index(nearest)].speaker in text
    opened.mouse("mouseMoved", 5, 5)
    assert tip(opened) is None


def test_the_map_is_walked_with_keys(opened):
    opened.run("document.getElementById('by-speaker').focus()")
    opened.press("Tab")
    assert opened.run("document.activeElement.matches('.plane svg')")
    seen = [tip(opened)[2]]
    xs = []
    for _ in range(3):
        opened.press("ArrowRight")
        seen.append(tip(opened)[2])
        xs.append(float(opened.run("document.querySelector('.here').getAttribute('cx')")))
    assert len(set(seen)) == 4 and all(a < b for a, b in pairwise(xs))
    opened.press("Escape")
    assert tip(opened) is None


def test_a_tap_shows_a_clip_on_a_telephone(opened):
    opened.look(width=390, height=800)
    x, y = place(opened, 4)
    touch = {"touchPoints": [{"x": x, "y": y}]}
    opened.call("Input.dispatchTouchEvent", type="touchStart", **touch)
    opened.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert tip(opened)[1] == 72
    left, right = opened.run(
        "(() => { const b = document.querySelector('.tip').getBoundingClientRect(); return [b.left, b.right] })()"
    )
    assert 0 <= left < right <= 390


def test_colours_follow_the_switch_and_the_legend_filters(opened):
    def colours():
        return opened.run("[...document.querySelectorAll('.map .p')].map(p => getComputedStyle(p).fill)")

    known, by_label = points(opened), colours()
    assert len(set(by_label)) == len({p["l"] for p in known})
    opened.run("document.getElementById('by-speaker').click()")
    by_speaker = colours()
    assert len(set(by_speaker)) == len({p["s"] for p in known}) and by_speaker != by_label
    shown = "[...document.querySelectorAll('.of-{} input')].filter(i => i.checkVisibility()).length"
    assert opened.run(shown.format("speaker")) == len({p["s"] for p in known})
    opened.run("document.querySelector('input[data-kind=label][data-i=\"2\"]').click()")
    off = opened.run("[...document.querySelectorAll('.map .p')].map(p => p.classList.contains('off'))")
    assert off == [p["l"] == 2 for p in known] and any(off)
    opened.mouse("mouseMoved", *place(opened, off.index(True)))
    said = tip(opened)
    assert said is None or known[off.index(True)]["id"] not in said[2].split("\n")[0:1]
    opened.run("document.querySelector('button[data-kind=label]').click()")
    assert opened.run("document.querySelectorAll('.map .p.off').length") == 0


def contrast(one, other):
    """WCAG 2 contrast of two colours (R, G, B)."""

    def light(colour):
        parts = [c / 255 for c in colour]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_can_be_read(opened, dark):
    opened.look(dark=dark)

    def colour(name):
        rgb = opened.run(
            "(() => { const e = document.body.appendChild(document.createElement('i'));"
            f"e.style.color = 'var({name})';"
            "const c = getComputedStyle(e).color; e.remove(); return c.match(/\\d+/g).map(Number) })()"
        )
        return tuple(rgb[:3])

    ground, card = colour("--ground"), colour("--card")
    assert (sum(ground) < 150) == dark
    for name in ("--ink", "--soft"):
        assert contrast(colour(name), card) >= 4.5 and contrast(colour(name), ground) >= 4.5
    for name in ("--pretrained", "--random", "--statistics", "--raters", *(f"--c{i}" for i in range(12))):
        assert contrast(colour(name), card) >= 3, name


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.look(width=width)
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.run("document.documentElement.scrollWidth") <= width
    cut = opened.run(
        "[...document.querySelectorAll('.card > *, .card svg, .card img')].filter(e => e.checkVisibility() && "
        "e.getBoundingClientRect().right > e.closest('.card').getBoundingClientRect().right + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert not cut


def test_it_prints_with_every_section_and_no_chart_cut(opened, results):
    titles = opened.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    pdf = opened.pdf()
    assert pdf.startswith(b"%PDF")
    written = pdf
    for part in pdf.split(b"stream\n")[1:]:
        try:
            written += zlib.decompressobj().decompress(part)
        except zlib.error:
            continue
    for title in titles:
        outline = b"(" + title.encode() + b")"
        assert outline in written or title.encode("utf-16-be") in written, title
    opened.look(media="print")
    assert opened.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    avoided = "[...document.querySelectorAll('main svg')].every(s => getComputedStyle(s).breakInside == 'avoid')"
    assert opened.run(avoided)


def test_the_policy_refuses_scripts_and_requests_that_are_not_the_page_s(browser):
    browser.look()
    browser.open(browser.report)
    browser.complaints.clear()
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,x\" onerror=\"window.hacked = 1\">')")
    refused = browser.run("fetch('https://example.org/x').then(() => 'sent', error => String(error))")
    assert "sent" not in refused and browser.run("window.hacked") is None
    assert sum("Content Security Policy" in text for text in browser.complaints) >= 2
    browser.complaints.clear()
