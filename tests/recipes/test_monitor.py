"""What SIGTERM and Ctrl-C do to a training: one asks it to save and end, a second Ctrl-C ends it at once."""

import os
import signal
from types import SimpleNamespace

import pytest

from recipes import monitor
from recipes.monitor import SaveLast


@pytest.fixture
def begun():
    """A callback whose training has begun, its model, and the signals that were passed on to other processes."""
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    passed_on = []
    launcher = SimpleNamespace(kill=passed_on.append)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, strategy=SimpleNamespace(launcher=launcher))
    callback, model = SaveLast(), SimpleNamespace()
    callback.on_train_start(trainer, model)
    yield callback, model, passed_on
    for signum, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(signum, handler)


def test_ctrl_c_asks_to_end_once_and_ends_the_second_time(begun, capfd):
    callback, model, passed_on = begun
    assert not model.end_requested()
    os.kill(os.getpid(), signal.SIGINT)
    assert model.end_requested() and passed_on == []  # a terminal has told the others
    assert "Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_sigterm_is_passed_on(begun):
    callback, model, passed_on = begun
    os.kill(os.getpid(), signal.SIGTERM)
    assert model.end_requested() and passed_on == [signal.SIGTERM]


def test_a_loaders_worker_does_nothing_with_what_it_inherits(begun, monkeypatch):
    callback, model, passed_on = begun
    here = os.getpid()
    monkeypatch.setattr(monitor.os, "getpid", lambda: here + 1)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert not model.end_requested() and passed_on == []


def test_after_the_training_ctrl_c_is_what_it_was(begun):
    callback, model, _ = begun
    callback.on_exception(None, model, RuntimeError())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_sigint_stays_ignored(begun):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = SimpleNamespace(global_step=0)
    SaveLast().on_train_start(trainer, SimpleNamespace())
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
