"""The batch that is computed again leaves everything as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.doctor.runs import FEATURES, Plain, collate, tones
from tools.doctor.autopsy import ENDED, RandomState, Watch, examine_batch, forward_again


class Draws(nn.Module):
    """Draws from all generators, counts its batches, and makes a buffer anew."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.register_buffer("positions", torch.zeros(1))
        self.seen: list[tuple] = []

    def forward(self, x):
        self.positions = torch.arange(x.shape[1], dtype=torch.float32)
        self.seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def batch():
    return collate([(x, y, f"tone-{k}") for k, (x, y) in enumerate(tones(4))])


@pytest.mark.parametrize("seeds_each_step", [False, True])
def test_random_states_and_buffers_are_as_before_and_the_draws_are_those_of_the_batch(seeds_each_step):
    model = Plain(Draws(), FEATURES)
    state = RandomState(torch.device("cpu"))
    if seeds_each_step:
        torch.manual_seed(state.seed + 1)
    model.training_step = model.compute  # there is no trainer to log to
    given = batch()
    model.training_step(given)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    after = torch.initial_seed(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model.training_step = lambda batch, batch_idx: model.compute(batch)
    outputs = forward_again(model, given, 0, state, None)
    assert [o.name for o in outputs][:2] == ["encoder.norm", "encoder"]
    first, second = model.encoder.seen
    assert first == second
    assert torch.initial_seed() == after[0] and torch.equal(torch.get_rng_state(), after[1])
    assert random.getstate() == after[2] and (np.random.get_state()[1] == after[3]).all()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_look_that_fails_does_not_end_the_models_pass(monkeypatch):
    def fails(tensor):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr("tools.doctor.autopsy.largest_value", fails)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with Watch(model) as watch:
        assert model(torch.ones(2, 3)).shape == (2, 3)
    assert watch.outputs == []


def test_a_step_that_optimizes_by_hand_is_not_taken_again():
    model = Plain(nn.Identity(), FEATURES)
    model.automatic_optimization = False
    model.training_step = lambda *_: pytest.fail("taken again")
    bad = examine_batch(model, batch(), 0, 7, None, None, True, ["a"] * 4)
    assert (bad.step, bad.depth) == (7, [])


def test_an_error_in_the_second_pass_is_not_taken_for_a_finite_one(monkeypatch):
    from tools.doctor.listen import CTCListener

    model = Plain(nn.Linear(FEATURES, FEATURES), FEATURES)
    listener = CTCListener()
    listener.open()
    try:
        given = batch()
        model.compute((given[0] * float("inf"), *given[1:]))
        call = listener.call
    finally:
        listener.close()

    def fails(*_):
        raise ValueError("Default process group has not been initialized")

    model.training_step = fails
    bad = examine_batch(model, given, 0, 1, None, call, False, ["a"] * 4)
    assert bad.depth[-1][0].startswith(ENDED)
    assert bad.details["note"].startswith("the batch could not be computed again: ValueError: Default process group")
