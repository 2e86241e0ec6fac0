"""A Plot as inline SVG: lines over linear or logarithmic axes, drawn without any library. Standard library only."""

from __future__ import annotations

import math
from html import escape

from tools.doctor.finding import Plot

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 12, 40
# Told apart by people who do not see red and green alike (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#000000")
POINTS = 600  # a line: more are not seen at this width
DECADES = 3.0  # a spread of more than so many powers of ten is drawn on a logarithmic axis


def draw(plot: Plot) -> str:
    """An `<svg>` element with axes, ticks, lines and a legend; a note in place of the lines where nothing is finite."""
    lines = {name: _points(xs, ys) for name, (xs, ys) in plot.series.items()}
    flat = [point for line in lines.values() for part in line for point in part]
    label = escape(f"{plot.title}: {plot.y_label} over {plot.x_label}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    if not flat:
        place = f'x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle"'
        return f'{head}<text class="empty" {place}>no finite value</text></svg>'
    x_axis = _Axis([x for x, _ in flat], LEFT, WIDTH - RIGHT, log=False)
    y_axis = _Axis([y for _, y in flat], HEIGHT - BOTTOM, TOP, log=_logarithmic([y for _, y in flat]))
    parts = [head]
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" '
                     f'text-anchor="middle">{number(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    scale = ", log" if y_axis.log else ""
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(plot.x_label)}</text>")
    parts.append(f'<text class="axis" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
                 f"{escape(plot.y_label)}{scale}</text>")
    for colour, line in zip(_cycle(), lines.values()):
        for part in line:
            if y_axis.log:
                part = [(x, y) for x, y in part if y > 0]
            at = [(x_axis(x), y_axis(y)) for x, y in part]
            if len(at) == 1:
                parts.append(f'<circle cx="{at[0][0]:.1f}" cy="{at[0][1]:.1f}" r="2.6" fill="{colour}"/>')
            elif at:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
                parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
    return "".join(parts) + "</svg>"


def legend(plot: Plot) -> str:
    """The names of the lines with their colours, as HTML; empty for a single line without a name."""
    names = [name for name in plot.series if name]
    if not names:
        return ""
    items = [
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(_cycle(), plot.series) if name
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def number(value: float) -> str:
    """A tick's text: short, without needless digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def _cycle():
    while True:
        yield from COLOURS


def _points(xs, ys) -> list[list[tuple[float, float]]]:
    """Runs of finite points between the gaps, thinned so that the highest and the lowest of each stretch stay."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys):
        if _finite(x) and _finite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [_thin(run) for run in runs if run]


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _thin(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(run) <= POINTS:
        return run
    kept, width = [], len(run) / (POINTS / 2)
    for k in range(POINTS // 2):
        stretch = run[int(k * width): int((k + 1) * width)] or [run[int(k * width)]]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def _logarithmic(values: list[float]) -> bool:
    return min(values) > 0 and math.log10(max(values) / min(values)) > DECADES


class _Axis:
    """Maps values onto pixels from `begin` to `end`."""

    def __init__(self, values: list[float], begin: float, end: float, log: bool):
        self.begin, self.end, self.log = begin, end, log
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        elif low >= 0 and low < 0.4 * high:
            low = 0.0  # a quantity that comes near nothing is read against nothing
        if high == low:
            margin = abs(high) * 0.1 or 1.0
            low, high = low - margin, high + margin
        elif begin > end:  # the vertical one: the topmost line does not lie on the frame
            high += 0.04 * (high - low)
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            step = max(math.ceil((last - first) / 5), 1)
            ticks = [10.0**k for k in range(first, last + 1, step) if -300 < k < 300]
            return ticks or [10.0**self.low, 10.0**self.high]
        span = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(span / 6))
        step = next(unit * times for times in (1, 2, 5, 10, 20) if span / (unit * times) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        count = int((self.high - first * step) / step + 1e-9) + 1
        return [round((first + k) * step, 12) for k in range(count)]
