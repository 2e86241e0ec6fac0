"""The page: complete, self-contained, escaped, its plots drawn to scale."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from tools.doctor.finding import Finding, Plot, Report
from tools.doctor.html import markdown, render, write
from tools.doctor.svg import POINTS, draw, legend, number

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """Raises AssertionError where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser


def finding(**changes) -> Finding:
    fields = {
        "id": "run-diverged", "weight": "prevents", "symptom": "The loss <b>& more</b> rose.", "cause": "A step.",
        "evidence": {"loss": 3.25, "which": ["a", "<script>alert(1)</script>"]}, "fix": ["`model.optim.lr=1e-3`"],
        "confidence": 0.9, "where": "model.optim.lr",
        "plots": [Plot("Loss", "step", "nats", {"train": ([0, 10, 20], [4.0, 2.0, 3.0]), "validation": ([10], [2.5])})],
    }
    return Finding(**{**fields, **changes})


def test_the_page_holds_everything_and_needs_nothing():
    report = Report([finding(), finding(id="run-early", weight="note", plots=[])], ["run: curve"], ["lr-zero"],
        ["x: y"])
    page = render(report, "exp/a<b", "step 20")
    parsed = parse(page)
    text = "".join(parsed.text)
    for expected in (report.verdict, "The loss <b>& more</b> rose.", "A step.", "3.25", "model.optim.lr=1e-3",
        "lr-zero",
                     "exp/a<b", "step 20", "x: y", "run: curve", "sure"):
        assert expected in text, expected
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("article") == 2 and tags.count("svg") == 1 and tags.count("polyline") == 1 and "circle" in tags
    assert "script" not in tags and "link" not in tags and "img" not in tags
    assert not [a for _, attributes in parsed.tags for a in attributes if a == "src"]
    assert "Why it happens" in text  # the fault's page travels inside


def test_the_page_of_a_healthy_run(tmp_path):
    write(Report([], ["run: curve"], [], []), tmp_path / "doctor" / "report.html", "exp/x")
    page = (tmp_path / "doctor" / "report.html").read_text()
    assert 'class="verdict good"' in page and "Nothing found that prevents learning" in page
    parse(page)


def test_lines_are_drawn_to_scale_and_break_at_gaps():
    plot = Plot("t", "step", "loss", {"a": ([0, 1, 2, 3, 4], [0.0, 1.0, float("nan"), 1.0, 0.5])})
    root = ElementTree.fromstring(draw(plot))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    (x3, y3), (x4, y4) = [tuple(map(float, p.split(","))) for p in lines[1].attrib["points"].split()]
    assert x1 - x0 == pytest.approx(x4 - x3, abs=0.2) and x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.3)
    assert y1 < y0 and y1 == pytest.approx(y3) and y4 - y3 == pytest.approx((y0 - y1) / 2, abs=0.2)


def test_a_wide_range_gets_a_logarithmic_axis():
    values = [10.0**k for k in range(0, 31, 5)]
    svg = draw(Plot("t", "frame", "largest", {"": (list(range(7)), values)}))
    assert "largest, log" in svg and ">1e28<" in svg
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    steps = [a[1] - b[1] for a, b in zip(points, points[1:])]
    assert max(steps) == pytest.approx(min(steps), abs=0.3)  # equal factors, equal distances


def test_long_lines_are_thinned_and_keep_their_peaks():
    values = [1.0] * 50_000
    values[31_234] = 900.0
    svg = draw(Plot("t", "step", "norm", {"": (list(range(50_000)), values)}))
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    assert len(points) <= POINTS + 2
    heights = [float(p.split(",")[1]) for p in points]
    assert sum(h < min(heights) + 1 for h in heights) == 1


def test_nothing_finite_and_single_values_are_drawn_too():
    assert "no finite value" in draw(Plot("t", "x", "y", {"a": ([0, 1], [math.nan, None])}))
    svg = draw(Plot("t", "x", "y", {"a": ([5], [2.0])}))
    ElementTree.fromstring(svg)
    assert "<circle" in svg
    ElementTree.fromstring(draw(Plot("t", "x", "y", {"a": ([0, 1, 2], [7.0, 7.0, 7.0])})))


def test_ticks_are_round_and_few():
    for low, high in ((0, 1), (3, 1000), (0.1, 0.13), (-5, 5), (0, 7e6)):
        svg = draw(Plot("t", "x", "y", {"a": ([low, high], [low, high])}))
        ticks = [float(t) for t in re.findall(r'class="tick"[^>]*>([^<]+)<', svg)]
        assert 4 <= len(ticks) <= 16, (low, high, ticks)


def test_numbers_are_short():
    assert [number(x) for x in (0, 0.25, 1500, 2e6, 1e-5)] == ["0", "0.25", "1500", "2e6", "1e-5"]


def test_names_in_the_legend_are_escaped():
    assert legend(Plot("t", "x", "y", {"": ([], [])})) == ""
    assert "&lt;i&gt;" in legend(Plot("t", "x", "y", {"<i>": ([], [])}))


def test_markdown_of_the_pages():
    html = markdown("# a: b\n\nSome `x<y` and **bold**\nin two lines.\n\n- one\n  more\n- two\n\n```\nif a < "
                    "b:\n```\n1. first\n")
    assert "<h3>a: b</h3>" in html and "<code>x&lt;y</code> and <b>bold</b> in two lines." in html
    assert "<ul><li>one more</li><li>two</li></ul>" in html
    assert "<pre><code>if a &lt; b:</code></pre>" in html and "<ol><li>first</li></ol>" in html
    parse(html)
