"""A run on two devices leaves one report, with what both have seen."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from tests.conftest import ROOT
from tools.doctor import devices
from tools.doctor.finding import Finding
from tools.doctor.trace import Trace

SCRIPT = '''
import sys, warnings
warnings.filterwarnings("ignore")
import lightning.pytorch as pl
import torch
from tests.tools.doctor.runs import Plain, loader, tones
from tools.doctor.callback import Doctor

if __name__ == "__main__":
    # Without a shuffle the second device gets the odd ones: six letters in six frames, of which none may repeat.
    fine, full = tones(32), [(x, torch.full_like(y, 3)) for x, y in tones(32, seed=1, letters=6, frames=1)]
    pairs = [pair for both in zip(fine, full) for pair in both]
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Plain(torch.nn.Linear(16, 16), 16), loader(pairs, shuffle=False), None)
'''


def finding(id_: str, weight: str = "warning") -> Finding:
    return Finding(id_, weight, "seen", "why", {"number": 1}, ["change it"], 0.8)


def test_what_another_device_alone_has_found_is_added_once():
    trace = Trace(utterances_seen=10)
    every = [devices.facts(trace, [finding("batch-leak")], 1.0)]
    every += [devices.facts(Trace(utterances_seen=7, infeasible_seen=2, infeasible={"a": (5, 3)}),
                            [finding("batch-leak"), finding("explodes", "prevents"), finding("run-early", "note")], 2.0)
              for _ in range(2)]
    devices.count_together(trace, every, 0)
    assert (trace.utterances_seen, trace.infeasible_seen, trace.infeasible) == (24, 4, {"a": (5, 3)})
    added = devices.seen_elsewhere(every, 0, {"batch-leak"})
    assert [(f.id, f.weight, f.evidence) for f in added] == [
        ("explodes", "prevents", {"seen on device": 1, "number": 1})]
    assert devices.seen_elsewhere([], 0, set()) == []


def test_one_device_asks_nobody():
    trace = Trace()
    assert devices.ask(SimpleNamespace(world_size=1), trace, lambda: [finding("explodes")], 0.0) == []


def test_two_devices_leave_one_report_with_the_counts_of_both(tmp_path):
    watched = f"logger=False, callbacks=[Doctor(folder={str(tmp_path)!r}, probe=False)],"
    (tmp_path / "run.py").write_text(SCRIPT.replace("logger=False,", watched))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "doctor").iterdir()) == ["curve.csv", "report.html", "report.json"]
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    hidden = next(f for f in report["findings"] if f["id"] == "infinite-loss-hidden")
    # Four batches of eight on each device: all of the second's, none of the first's are too long.
    assert hidden["evidence"]["utterances"] == 32 and hidden["evidence"]["share"] == 0.5
