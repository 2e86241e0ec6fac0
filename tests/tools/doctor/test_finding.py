"""Findings, reports, the registry and the terminal's output. No torch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tools.doctor import causes, registry, terminal
from tools.doctor.finding import PAGES, Finding, Plot, Report, plain


def finding(id="lr-zero", weight="prevents", confidence=0.9, **fields):
    return Finding(id, weight, "symptom", "cause", {"n": 3}, ["do this"], confidence, **fields)


def test_order_is_by_weight_then_by_how_sure():
    report = Report([finding("a", "note", 1.0), finding("b", "warning", 0.5), finding("c", "prevents", 0.6),
                     finding("d", "warning", 0.9), finding("e", "prevents", 0.9)])
    assert report.ids == ["e", "c", "d", "b", "a"]


@pytest.mark.parametrize("findings, examined, code", [
    ([], ["x"], 0),
    ([finding(weight="warning")], ["x"], 0),
    ([finding()], ["x"], 1),
    ([finding(unreadable=True)], [], 2),
    ([finding(unreadable=True), finding()], [], 1),
    ([], [], 2),
])
def test_exit_code(findings, examined, code):
    assert Report(findings, examined).exit_code == code


def test_a_weight_or_a_confidence_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="weight 'fatal'"):
        finding(weight="fatal")
    with pytest.raises(ValueError, match="confidence 1.5"):
        finding(confidence=1.5)


def test_json_round_trip_keeps_everything_and_is_strict(tmp_path):
    plot = Plot("t", "x", "y", {"s": ([1.0, 2.0], [float("nan"), 3.0])})
    report = Report([finding(plots=[plot], where="model.optim.lr")], ["a"], ["b"], ["c"])
    report.save(tmp_path / "deep" / "r.json")
    text = (tmp_path / "deep" / "r.json").read_text()
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Report.from_dict(loaded)
    assert again.findings[0].where == "model.optim.lr" and again.exit_code == 1
    assert again.findings[0].plots[0].series["s"] == ([1.0, 2.0], ["nan", 3.0])
    assert (again.examined, again.ruled_out, again.not_examined) == (["a"], ["b"], ["c"])


def test_numbers_of_numpy_become_plain():
    assert plain({"a": np.float32(1.5), "b": np.arange(2), "c": {3, 1}, "d": float("inf")}) == {
        "a": 1.5, "b": [0, 1], "c": [1, 3], "d": "inf"}


def test_terminal_says_the_verdict_first_and_every_part_of_a_finding():
    findings = [finding(where="model.optim.lr"), finding("x", "warning")]
    report = Report(findings, ["labels"], ["frozen"], ["depth: no time"])
    text = terminal.render(report)
    assert text.startswith("This will not learn: lr-zero; 1 warning.")
    for part in ("PREVENTS LEARNING  lr-zero", "(sure, 90%)", "[model.optim.lr]", "n: 3", "do this", "lr-zero.md",
                 "Ruled out: frozen", "Not examined: depth: no time"):
        assert part in text
    assert "\033[" not in text and "\033[" in terminal.render(report, colour=True)


def test_an_effect_becomes_a_note_that_names_its_cause():
    named = causes.name_causes([finding("loss-wrong"), finding("not-log-probs")])
    assert [(f.id, f.weight) for f in named if f.weight == "prevents"] == [("not-log-probs", "prevents")]
    assert "follows from not-log-probs" in next(f for f in named if f.id == "loss-wrong").symptom


def test_one_finding_a_fault_of_the_model_but_one_a_file_of_data():
    named = causes.name_causes([finding("explodes", "warning"), finding("explodes"), finding("data-clipped"),
                                finding("data-clipped")])
    assert [f.id for f in named] == ["explodes", "data-clipped", "data-clipped"]
    assert named[0].weight == "prevents" and named[0].evidence["also seen 1"] == "symptom"


def test_every_fault_that_a_check_names_has_a_page_with_its_four_parts():
    checks = registry.checks()
    titles = registry.catalogue()
    assert len(checks) > 40
    for fault in {fault for check in checks for fault in check.faults}:
        assert titles.get(fault), f"pages/{fault}.md is not there or has no title"
        text = (PAGES / f"{fault}.md").read_text()
        for part in ("## What it looks like", "## Why it happens", "## How it is detected", "## How to fix it"):
            assert part in text, (fault, part)


def test_a_new_check_is_one_function():
    with pytest.raises(ValueError, match="family 'nonsense'"):
        registry.check("nonsense")
    with pytest.raises(ValueError, match="needs"):
        registry.check("data", needs=("gpu",))

    @registry.check("data", faults=("data-clipped",), needs=("manifests",))
    def a_check_of_the_test(subject):
        """Nothing is wrong."""
        return []

    try:
        assert a_check_of_the_test in [c.function for c in registry.checks(["manifests"], ["data"])]
    finally:
        del registry._CHECKS["data.a_check_of_the_test"]


def test_the_package_and_its_list_need_no_torch():
    code = ("import sys, tools.doctor, tools.doctor.__main__ as m; tools.doctor.Report, tools.doctor.examine;"
            "assert m.main(['list']) == 0; assert not {'torch', 'nemo'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "padding-leak" in done.stdout
