"""The report as one HTML page that needs nothing beside it: findings, their numbers, plots and explanations.

    write(report, "exp/x/doctor/report.html", title="exp/x")

Standard library only. What comes from files and runs is escaped.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from tools.doctor.finding import Finding, Report
from tools.doctor.svg import draw, legend
from tools.doctor.terminal import show_value

HEADS = {"prevents": "prevents learning", "warning": "warning", "note": "note"}
STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5b6570;--rule:#d9dee3;--card:#fff;--ground:#f5f6f8;--code:#eef1f4;
--bad:#b3261e;--warn:#8a5a00;--note:#0b5cad;--good:#1b6e3c}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--rule:#39424c;--card:#1f252b;--ground:#15191d;
--code:#2a323a;--bad:#ff8a80;--warn:#f0b95a;--note:#7db9ff;--good:#7ed6a0}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:900px;margin:0 auto;padding:28px 20px 60px}h1{font-size:21px;margin:0 0 4px}
.sub{color:var(--soft);margin:0 0 18px;overflow-wrap:anywhere}
.verdict{font-size:18px;font-weight:600;margin:0 0 22px;padding:12px 16px;border-left:5px solid;background:var(--card)}
.verdict.bad{border-color:var(--bad)}.verdict.good{border-color:var(--good)}
article{background:var(--card);border:1px solid var(--rule);border-left:5px solid;border-radius:4px;
padding:14px 18px;margin:0 0 16px}
article.prevents{border-left-color:var(--bad)}article.warning{border-left-color:var(--warn)}
article.note{border-left-color:var(--note)}
h2{font-size:17px;margin:0 0 8px}h2 code{background:none;padding:0;font-size:17px}h3{font-size:15px;margin:22px 0 6px}
.weight{font-size:12px;text-transform:uppercase;letter-spacing:.05em;font-weight:700}
.prevents .weight{color:var(--bad)}.warning .weight{color:var(--warn)}.note .weight{color:var(--note)}
.sure{color:var(--soft);font-size:13px;font-weight:400}
dl{display:grid;grid-template-columns:88px 1fr;gap:4px 14px;margin:0}dt{color:var(--soft)}dd{margin:0;min-width:0;
overflow-wrap:anywhere}table{border-collapse:collapse;font-size:14px}td{padding:1px 14px 1px 0;vertical-align:top}
td:first-child{color:var(--soft);white-space:nowrap}
@media(max-width:640px){td:first-child{white-space:normal}dl{grid-template-columns:1fr}}
code,pre{font:13px/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,monospace;
background:var(--code);border-radius:3px;padding:1px 4px}pre{padding:8px 10px;overflow-x:auto}pre code{padding:0}
ul,ol{margin:4px 0;padding-left:20px}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));
gap:14px;margin-top:12px}figure{margin:0}figcaption{font-size:13px;font-weight:600}
.hint{color:var(--soft);font-size:13px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px;font-family:inherit}
svg .grid{stroke:var(--rule);stroke-width:1}.legend{font-size:13px;color:var(--soft)}.key{margin-right:14px;
white-space:nowrap}
.key i{display:inline-block;width:14px;height:3px;vertical-align:middle;margin-right:5px}
details{margin-top:10px}summary{cursor:pointer;color:var(--note);font-size:14px}.list{color:var(--soft);font-size:14px}
"""


def write(report: Report, path: str | Path, title: str = "", subtitle: str = "") -> None:
    """Writes the page, whole or not at all; makes the folder."""
    from manifests.schema import write_atomic

    write_atomic(path, render(report, title, subtitle).encode())


def render(report: Report, title: str = "", subtitle: str = "") -> str:
    """The page as text; `title` is what was examined, `subtitle` a line below it."""
    verdict = f'<p class="verdict {"bad" if report.exit_code else "good"}">{escape(report.verdict)}</p>'
    body = [f"<h1>Doctor's report{': ' + escape(title) if title else ''}</h1>",
            f'<p class="sub">{escape(subtitle)}</p>' if subtitle else "", verdict]
    body += [_article(finding) for finding in report.findings]
    for head, lines in (("Ruled out", report.ruled_out), ("Not examined", report.not_examined),
                        ("Examined", report.examined)):
        if lines:
            between = ", " if head == "Ruled out" else "; "
            body.append(f'<h3>{head}</h3><p class="list">{escape(between.join(lines))}</p>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Doctor's report{': ' + escape(title) if title else ''}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _article(finding: Finding) -> str:
    where = f" &middot; {escape(finding.where)}" if finding.where else ""
    rows = [("Symptom", escape(finding.symptom)), ("Cause", escape(finding.cause))]
    if finding.evidence:
        cells = "".join(
            f"<tr><td>{escape(str(name))}</td><td>{_value(value)}</td></tr>"
            for name, value in finding.evidence.items()
        )
        rows.append(("Evidence", f"<table>{cells}</table>"))
    if finding.fix:
        changes = "".join(f"<li>{_inline(change)}</li>" for change in finding.fix)
        rows.append(("Change", f"<ol>{changes}</ol>"))
    listed = "".join(f"<dt>{head}</dt><dd>{text}</dd>" for head, text in rows)
    plots = "".join(
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{draw(plot)}{legend(plot)}"
        f'{f"<div class=hint>{escape(plot.note)}</div>" if plot.note else ""}</figure>'
        for plot in finding.plots
    )
    return (
        f'<article class="{finding.weight}" id="{escape(finding.id)}">'
        f'<div class="weight">{HEADS[finding.weight]}</div>'
        f"<h2><code>{escape(finding.id)}</code> "
        f'<span class="sure">{finding.certainty}, {finding.confidence:.0%}{where}</span></h2>'
        f"<dl>{listed}</dl>{f'<div class=plots>{plots}</div>' if plots else ''}{_explanation(finding)}</article>"
    )


def _value(value) -> str:
    """A piece of evidence; sentences stand on lines of their own."""
    if isinstance(value, (list, tuple)) and any(isinstance(item, str) and len(item) > 40 for item in value):
        return "<br>".join(escape(show_value(item)) for item in list(value)[:20])
    return escape(show_value(value, items=20))


def _explanation(finding: Finding) -> str:
    if not finding.page.is_file():
        return ""
    text = finding.page.read_text(encoding="utf-8")
    return f"<details><summary>What this is, how it is detected, how to fix it</summary>{markdown(text)}</details>"


def markdown(text: str) -> str:
    """The few forms that the pages use: headings, paragraphs, lists, fenced code, `code`, **bold** and links."""
    out: list[str] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at].rstrip()
        if line.startswith("```"):
            end = next((k for k in range(at + 1, len(lines)) if lines[k].startswith("```")), len(lines))
            out.append(f"<pre><code>{escape(chr(10).join(lines[at + 1: end]))}</code></pre>")
            at = end + 1
        elif match := re.match(r"#+ (.*)", line):
            out.append(f"<h3>{_inline(match[1])}</h3>")
            at += 1
        elif re.match(r"([-*]|\d+\.) ", line):
            items: list[str] = []
            kind = "ol" if line[0].isdigit() else "ul"
            while at < len(lines) and (found := re.match(r"(?:[-*]|\d+\.) (.*)|(\s+\S.*)", lines[at])):
                if found[1] is not None:
                    items.append(found[1])
                else:
                    items[-1] += " " + found[2].strip()
                at += 1
            out.append(f"<{kind}>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</{kind}>")
        elif line:
            paragraph = [line]
            at += 1
            while at < len(lines) and lines[at].strip() and not re.match(r"#+ |```|([-*]|\d+\.) ", lines[at]):
                paragraph.append(lines[at].strip())
                at += 1
            out.append(f"<p>{_inline(' '.join(paragraph))}</p>")
        else:
            at += 1
    return "".join(out)


def _inline(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    done = []
    for piece in pieces:
        if len(piece) > 1 and piece.startswith("`") and piece.endswith("`"):
            done.append(f"<code>{escape(piece[1:-1])}</code>")
        else:
            piece = escape(piece)
            piece = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", piece)
            done.append(re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', piece))
    return "".join(done)
