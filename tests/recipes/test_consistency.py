"""Consistency regularisation: the divergence of two views, and a training step with it."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import open_dict

from recipes.consistency import consistency_loss, two_views
from recipes.ctc_model import CTCModel
from tests.recipes import tiny


def outputs(frames=5, labels=4, seed=0):
    return torch.randn(4, frames, labels, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_views_that_agree_cost_nothing():
    one = outputs()[:2]
    torch.testing.assert_close(consistency_loss(torch.cat([one, one]), torch.tensor([5, 3, 5, 3])), torch.zeros(2))


def test_divergence_is_that_of_the_definition_over_valid_frames():
    log_probs, lengths = outputs(), torch.tensor([5, 3, 5, 3])
    expected = []
    for first, second, length in ((0, 2, 5), (1, 3, 3)):
        p, q = log_probs[first, :length].exp(), log_probs[second, :length].exp()
        expected.append(0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()))
    torch.testing.assert_close(consistency_loss(log_probs, lengths), torch.stack(expected))
    noisy = log_probs.clone()
    noisy[[1, 3], 3:] = outputs(seed=1)[[1, 3], 3:]
    torch.testing.assert_close(consistency_loss(noisy, lengths), torch.stack(expected))


def test_a_view_is_drawn_towards_the_other_as_it_is():
    """The gradient of a view is that of KL(other || view): probabilities minus the other's, halved."""
    scores = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    consistency_loss(scores.log_softmax(-1), torch.tensor([1, 1])).sum().backward()
    p, q = scores.detach().softmax(-1)
    torch.testing.assert_close(scores.grad, 0.5 * torch.stack([p - q, q - p]))


def test_views_stand_behind_each_other():
    a, b = two_views(torch.arange(3), torch.arange(6).view(3, 2))
    assert a.tolist() == [0, 1, 2, 0, 1, 2] and b.shape == (6, 2) and torch.equal(b[0], b[3])


@pytest.mark.parametrize("features", [False, True], ids=["audio", "cached features"])
def test_a_training_step_counts_each_utterance_once(features):
    torch.manual_seed(0)
    cfg = tiny.config()
    with open_dict(cfg):
        cfg.preprocessor.dither, cfg.spec_augment, cfg.encoder.jasper[0].dropout = 0.0, None, 0.0
        cfg.encoder.jasper[1].dropout = 0.0
    model = CTCModel(cfg).train()
    model.log_dict, model._optimizer = lambda *_, **__: None, SimpleNamespace(param_groups=[{"lr": 1.0}])
    signals = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16000, 12000])
    if features:
        signals, lengths = model.preprocessor(input_signal=signals, length=lengths)
    batch = (signals, lengths, torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2]), ["a", "b"])
    losses, seconds = {}, {}
    for weight in (0.0, 0.2):
        with open_dict(model._cfg):
            model._cfg.consistency_weight = weight
        losses[weight] = model.training_step(batch, 0)["loss"]
        seconds[weight] = float(model.step_stats.audio_seconds)
    # without masks and dropout both views are the same: the mean loss is that of one, and the divergence is nothing
    torch.testing.assert_close(losses[0.2], losses[0.0], rtol=1e-3, atol=1e-4)
    assert seconds[0.2] == seconds[0.0] == pytest.approx(1.75, abs=0.03)
    model.encoder.encoder[0].mout[-1].p = 0.5  # dropout: the views differ now
    assert model.training_step(batch, 0)["loss"] > float(model.step_stats.loss_per_char) + 1e-3
