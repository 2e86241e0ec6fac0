"""A run on two devices leaves one report, with what both have seen."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import is_initialized  # by its name, as some do

from tests.conftest import ROOT
from tools.doctor import devices
from tools.doctor.alone import alone, possible
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

# One utterance of the second device alone makes a module give infinities, in a batch after which no step is taken: that
# device computes it again, the first does not. NeMo's encoder speaks with the other devices in each forward pass.
LONE = '''
import datetime, os, sys, warnings
warnings.filterwarnings("ignore")
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from nemo.collections.asr.modules import ConformerEncoder
from tests.tools.doctor.runs import FEATURES, Plain, loader, tones
from tools.doctor.callback import Doctor

class Marked(torch.nn.Module):
    def forward(self, x):
        return torch.where(x.amax() > 100, x * float("inf"), x)

class Conformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.marked = Marked()
        self.inner = ConformerEncoder(feat_in=FEATURES, n_layers=1, d_model=16, n_heads=2, conv_kernel_size=5,
                                      subsampling="striding", subsampling_factor=4, subsampling_conv_channels=4)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        return self.inner(audio_signal=self.marked(x.transpose(1, 2)), length=lengths)[0].transpose(1, 2)

class SwitchOff(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            doctor._off = True

if __name__ == "__main__":
    pairs = tones(64)
    if os.environ.get("LOCAL_RANK") == "1":
        pairs[3][0][0, 0] = 1000.0
    doctor = Doctor(folder=sys.argv[1], probe=False, stop=True, every_n_steps=1)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(max_steps=30, accelerator="cpu", devices=2, logger=False, accumulate_grad_batches=2,
                         use_distributed_sampler=False,
                         strategy=DDPStrategy(timeout=datetime.timedelta(seconds=float(sys.argv[2]))),
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[doctor, SwitchOff()])
    trainer.fit(Plain(Conformer(), 16, stride=4), loader(pairs, batch=4, shuffle=False), None)
    print(f"rank {trainer.global_rank} ended at step {trainer.global_step}", flush=True)
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


def test_a_spoilt_sum_of_gradients_yields_to_the_device_whose_loss_was_not_finite():
    def nan(where, **evidence):
        return Finding("run-nan", "prevents", "seen", "why", {"first at step": 3, **evidence}, ["it"], 0.9, where)

    summed = nan("decoder", **{devices.FROM_ANOTHER: "it came from another device"})
    every = [devices.facts(Trace(), found, 1.0) for found in ([summed], [summed], [nan("encoder.norm")])]
    joined = devices.joined([summed, finding("explodes")], every, 0)
    assert [(f.id, f.where, f.evidence.get("seen on device")) for f in joined] == [
        ("explodes", "", None), ("run-nan", "encoder.norm", 2)]
    # Where no device knows more, what is known stays.
    assert devices.joined([summed], every[:2], 0) == [summed]


@pytest.fixture
def one_in_a_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1,
                            timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


def test_alone_no_group_is_seen_and_it_is_put_back(one_in_a_group):
    with pytest.raises(KeyError), alone():
        assert not dist.is_initialized() and not is_initialized()
        with pytest.raises(ValueError):  # at once, and no wait
            dist.barrier()
        raise KeyError
    assert is_initialized() and dist.get_world_size() == 1
    dist.barrier()


def test_only_a_whole_copy_of_the_model_is_computed_alone(one_in_a_group):
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

    assert possible(SimpleNamespace(world_size=1))
    assert possible(SimpleNamespace(world_size=2, strategy=DDPStrategy()))
    assert not possible(SimpleNamespace(world_size=2, strategy=FSDPStrategy()))
    dist.new_group([0])  # of somebody's own
    assert not possible(SimpleNamespace(world_size=2, strategy=DDPStrategy()))


def test_one_device_computes_its_bad_batch_again_and_the_others_do_not_wait(tmp_path):
    """Also a callback that is off takes part where all ask each other whether to end."""
    (tmp_path / "run.py").write_text(LONE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, str(tmp_path / "run.py"), str(tmp_path), "240"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"rank 0 ended at step 10", "rank 1 ended at step 10"} <= set(done.stdout.splitlines())
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    first = report["findings"][0]
    assert (first["id"], first["where"], first["evidence"]["seen on device"]) == ("run-nan", "encoder.marked", 1)
    assert first["evidence"]["utterances of that batch"] == ["tone-0", "tone-1", "tone-2", "tone-3"]


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
