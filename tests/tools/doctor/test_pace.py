"""What the callback counts as its own cost."""

import time

import torch
from torch import nn

from tests.tools.doctor.runs import FEATURES, Plain, fit, loader, speech
from tools.doctor.pace import Pace, settle


def test_only_a_device_that_works_on_its_own_is_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    settle(torch.device("cpu"))
    settle(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


def test_what_a_device_had_to_do_before_is_not_our_cost(monkeypatch):
    monkeypatch.setattr("tools.doctor.pace.settle", lambda device: time.sleep(0.2))
    pace = Pace(10, 0.01)
    with pace.counted(torch.device("cuda")):
        time.sleep(0.01)
    assert 0.01 <= pace.cost < 0.15


def test_the_backward_pass_of_a_run_is_not_our_cost(tmp_path, monkeypatch):
    """A GPU is still at the backward pass when a hook asks it for the loss: that wait stands at each step for it."""
    waits = []

    def backlog(device):
        waits.append(device)
        time.sleep(0.05)

    monkeypatch.setattr("tools.doctor.pace.settle", backlog)
    doctor = fit(Plain(nn.Linear(FEATURES, 8), 8), loader(speech()), tmp_path, 30, probe=False)
    assert len(waits) >= 30 and doctor.pace.cost < 0.5 * 0.05 * len(waits)
