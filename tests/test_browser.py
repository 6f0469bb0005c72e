"""The report as its reader sees it: opened in a headless Chromium, wide and narrow, light and dark."""

import pytest

from benchmarks.generated import PAPER, TWENTY, generate
from dgal_bench.report.write import write_report
from tests.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: make setup-browser"),
]

SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]

EMPTY_FIGURES = """[...document.querySelectorAll('figure')].filter(figure => {
  const drawn = [...figure.querySelectorAll('svg, img')].some(one => {
    const box = one.getBoundingClientRect();
    const content = one.tagName === 'IMG' ? one.naturalWidth : one.querySelector('path, line, rect, circle, use');
    return box.width > 0 && box.height > 0 && content;
  });
  return !drawn;
}).map(figure => figure.id || figure.textContent.trim().slice(0, 60))"""

# What scrolls or cuts within a container of its own does not widen the page.
TOO_WIDE = """(() => {
  const held = one => {
    for (let up = one.parentElement; up && up !== document.body; up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible' || up.tagName === 'svg') return true;
    return false;
  };
  const wide = [...document.body.querySelectorAll('*')]
    .filter(one => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 1 && !held(one))
    .map(one => `${one.tagName.toLowerCase()}.${one.getAttribute('class')}: ${one.getBoundingClientRect().right}`);
  const page = document.scrollingElement;
  return page.scrollWidth > innerWidth ? [`page: ${page.scrollWidth}`, ...wide] : wide;
})()"""

# Boxes of turned labels are turned too: two convex shapes meet unless a line parallel to a side parts them. A text's
# box is a line's height; what is inked is about three quarters of that.
OVERLAPS = """(() => {
  const corners = text => {
    const box = text.getBBox(), m = text.getScreenCTM(), cut = 0.14 * box.height;
    const [x, y, X, Y] = [box.x, box.y + cut, box.x + box.width, box.y + box.height - cut];
    return [[x, y], [X, y], [X, Y], [x, Y]].map(([a, b]) => [m.a * a + m.c * b + m.e, m.b * a + m.d * b + m.f]);
  };
  const sides = shape => [0, 1].map(i => {
    const [dx, dy] = [shape[i + 1][0] - shape[i][0], shape[i + 1][1] - shape[i][1]], length = Math.hypot(dx, dy) || 1;
    return [dx / length, dy / length];
  });
  const depth = (one, other) => Math.min(...[...sides(one), ...sides(other)].map(([x, y]) => {
    const [a, b] = [one, other].map(shape => shape.map(([px, py]) => px * x + py * y));
    return Math.min(Math.max(...a) - Math.min(...b), Math.max(...b) - Math.min(...a));
  }));
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')].filter(one => one.checkVisibility({checkOpacity: true,
      checkVisibilityCSS: true}) && one.textContent.trim() && one.getBBox().width > 0);
    const shapes = texts.map(corners);
    texts.forEach((text, i) => {
      for (let j = i + 1; j < texts.length; j++)
        if (depth(shapes[i], shapes[j]) > 1) {
          const where = (svg.closest('figure') || svg).id || svg.closest('section')?.id;
          found.push(`${where}: '${text.textContent.trim()}' on '${texts[j].textContent.trim()}'`);
        }
    });
  }
  return found;
})()"""

# WCAG 2.1: (L1 + 0.05) / (L2 + 0.05) of relative luminances.
FAINT_TEXTS = """(() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const brush = canvas.getContext('2d', {willReadFrequently: true});
  const painted = colours => {
    brush.clearRect(0, 0, 1, 1);
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const below = one => {
    const layers = [];
    for (let up = one; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
    return ['Canvas', ...layers];
  };
  const found = new Set();
  for (const one of document.body.querySelectorAll('*')) {
    const own = [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || one.closest('svg, script, style') || !one.checkVisibility({checkVisibilityCSS: true})) continue;
    const layers = below(one), ground = luminance(painted(layers));
    const ink = luminance(painted([...layers, getComputedStyle(one).color]));
    const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (contrast < 4.5) found.add(`${contrast.toFixed(2)}: ${one.tagName} '${one.textContent.trim().slice(0, 40)}'`);
  }
  return [...found];
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """On the paper's strategies with one data set, and on twenty with another."""
    results = tmp_path_factory.mktemp("results")
    for dataset, strategies in (("svhn", PAPER), ("digits", TWENTY)):
        generate(results, (dataset,), strategies, range(3), rounds=6)
    write_report(results, results / "report")
    return results / "report" / "report.html"


def page_of(tmp_path, body, head=""):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><html><head><meta charset=utf-8>{head}</head><body>{body}</body></html>")
    return path


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<script>console.error('a word', 7)</script>", "a word 7"),
        ("<script>setTimeout(() => { throw new Error('thrown') })</script>", "thrown"),
        ("<script>Promise.reject(new Error('unheard'))</script>", "unheard"),
        ("<img src=missing.png>", "ERR_FILE_NOT_FOUND"),
    ],
)
def test_what_goes_wrong_in_a_page_is_seen(browser, tmp_path, body, says):
    assert any(says in error for error in browser.open(page_of(tmp_path, body)).errors)


def test_what_a_policy_forbids_is_seen(browser, tmp_path):
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    errors = browser.open(page_of(tmp_path, "<script>1</script>", policy)).errors
    assert any("Content Security Policy" in error for error in errors)


@pytest.mark.parametrize(
    "body",
    [
        "<script>fetch('http://127.0.0.1:1/x').catch(() => 0)</script>",
        "<img src='http://127.0.0.1:1/x'>",
        "<style>@import 'http://127.0.0.1:1/x';</style>",
    ],
    ids=["fetch", "img", "style"],
)
def test_a_request_is_seen(browser, tmp_path, body):
    assert browser.open(page_of(tmp_path, body)).requests == ["http://127.0.0.1:1/x"]


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1"])
def test_a_request_to_another_machine_is_seen_and_not_sent(browser, tmp_path, host):
    page = browser.open(page_of(tmp_path, f"<img src='http://{host}/x'>"))
    assert page.requests == [f"http://{host}/x"]
    assert any("ERR_NAME_NOT_RESOLVED" in error for error in page.errors)


def test_a_quiet_page_is_quiet(browser, tmp_path):
    body = "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><script>console.log('fine')</script>"
    page = browser.open(page_of(tmp_path, body))
    assert (page.errors, page.requests) == ([], [])


def test_width_and_scheme_are_the_pages(browser, tmp_path):
    head = "<meta name=viewport content='width=device-width'>"
    asked = "[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches, matchMedia('print').matches]"
    for width, dark in SCREENS:
        page = browser.open(page_of(tmp_path, "", head), width, dark=dark)
        assert page.evaluate(asked) == [width, dark, False]
    assert browser.open(page_of(tmp_path, "", head), printed=True).evaluate(asked) == [1280, False, True]


def test_a_screenshot_is_of_the_whole_page(browser, tmp_path):
    from PIL import Image

    browser.open(page_of(tmp_path, "<div style='height: 3000px'>")).screenshot(tmp_path / "whole.png")
    with Image.open(tmp_path / "whole.png") as picture:
        assert picture.width == 1280
        assert picture.height >= 3000


@pytest.mark.parametrize(
    ("other", "meet"),
    [
        ("x=12 y=20", True),
        ("x=0 y=52", False),
        ("x=90 y=20", False),
        ("transform='translate(60 10) rotate(45)'", False),
    ],
)
def test_labels_that_overlap_are_found(browser, tmp_path, other, meet):
    body = f"<figure id=f><svg width=300 height=90><text x=0 y=20>label</text><text {other}>label</text></svg></figure>"
    assert bool(browser.open(page_of(tmp_path, body)).evaluate(OVERLAPS)) == meet


def test_the_checks_find_what_they_look_for(browser, tmp_path):
    head = "<meta name=viewport content='width=device-width'>"
    body = "<figure id=none></figure><p style='color: #999'>faint</p><div class=wide style='width: 2000px'>x</div>"
    page = browser.open(page_of(tmp_path, body, head), 390)
    assert page.evaluate(EMPTY_FIGURES) == ["none"]
    assert [text.split(": ", 1)[1] for text in page.evaluate(FAINT_TEXTS)] == ["P 'faint'"]
    assert any("wide" in one for one in page.evaluate(TOO_WIDE))


@pytest.mark.parametrize(("width", "dark"), SCREENS, ids=["wide-light", "wide-dark", "narrow-light", "narrow-dark"])
def test_the_report_is_clean(browser, report, width, dark):
    page = browser.open(report, width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.querySelectorAll('figure').length") > 0
    found = {
        "errors": page.errors, "requests": page.requests, "empty figures": page.evaluate(EMPTY_FIGURES),
        "too wide": page.evaluate(TOO_WIDE), "overlaps": page.evaluate(OVERLAPS), "faint": page.evaluate(FAINT_TEXTS),
    }  # fmt: skip
    assert {what: trouble[:12] for what, trouble in found.items() if trouble} == {}
