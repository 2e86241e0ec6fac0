"""Memory that is kept between steps, and given back when asked; room for compiled shapes."""

import os
import subprocess
import sys

import pytest

from recipes import threads
from tests.conftest import ROOT

HOLES = """
from recipes.threads import give_back_memory, set_threads
set_threads()
import numpy as np

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

blocks = [np.ones(1 << 20, dtype=np.uint8) for _ in range(400)]
stay = blocks[::10]
del blocks
kept = resident()
assert give_back_memory()
print(kept - resident())
"""


def test_memory_between_what_stays_is_kept_until_it_is_given_back():
    freed = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(freed) > 300  # of the 360 MB between the blocks that stay


CAPACITY = """
import os, sys
from recipes.threads import set_threads
set_threads()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], "torch" in sys.modules)
"""


def test_room_for_compiled_shapes_is_asked_for_before_torch_and_the_user_has_the_last_word():
    def run(**environment):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEDNN")} | environment
        command = [sys.executable, "-c", CAPACITY]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert run().split() == ["16384", "False"]
    assert run(ONEDNN_PRIMITIVE_CACHE_CAPACITY="77").split() == ["77", "False"]


@pytest.fixture
def no_threads_chosen(monkeypatch):
    for name in ("OMP_NUM_THREADS", threads.CHOSEN):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)


@pytest.mark.parametrize("processes, each", [(1, 8), (3, 2), (16, 1)])
def test_processes_of_one_machine_share_its_cores(processes, each, no_threads_chosen):
    assert threads.set_threads(processes) == each


def test_what_a_parent_chose_for_itself_is_chosen_anew_and_what_the_user_asks_for_is_kept(no_threads_chosen, monkeypatch):
    assert threads.set_threads() == 8
    assert threads.set_threads(2) == 4  # a training of two processes that a tool of one process has started
    assert threads.set_threads(2) == 4  # and the second of them, which Lightning starts
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.set_threads() == 3 and threads.set_threads(2) == 3
