"""The loss accounts for what it cannot learn from, and equals torch's where everything fits."""

import pytest
import torch
from torch.nn import functional as F

from recipes.ctc_loss import CTCLoss


def batch(seed=0, B=4, T=20, S=6, V=5):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(B, T, V + 1, generator=generator).log_softmax(-1).requires_grad_()
    targets = torch.randint(0, V, (B, S), generator=generator)
    return log_probs, targets, torch.tensor([T, T - 3, T - 5, T - 8]), torch.tensor([S, S - 1, S - 2, 1])


@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch"])
def test_equals_torch_where_all_utterances_fit(reduction):
    log_probs, targets, lengths, target_lengths = batch()
    loss = CTCLoss(5, reduction)(log_probs, targets, lengths, target_lengths)
    each = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, blank=5, reduction="none")
    expected = each.sum() / target_lengths.sum() if reduction == "mean_volume" else each.mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch"])
def test_an_infeasible_utterance_is_left_out_of_loss_and_mean_and_is_known(reduction):
    log_probs, targets, lengths, target_lengths = batch()
    targets[1] = 2  # five equal symbols need nine frames
    lengths[1] = 8
    criterion = CTCLoss(5, reduction)
    loss = criterion(log_probs, targets, lengths, target_lengths)
    assert criterion.infeasible.tolist() == [False, True, False, False]
    kept = [0, 2, 3]
    alone = criterion(log_probs[kept], targets[kept], lengths[kept], target_lengths[kept])
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert torch.isfinite(log_probs.grad).all()
    assert log_probs.grad[1].abs().max() == 0 and log_probs.grad[0].abs().max() > 0


def test_a_batch_of_infeasible_utterances_is_zero_with_zero_gradient():
    log_probs, targets, lengths, target_lengths = batch()
    criterion = CTCLoss(5)
    loss = criterion(log_probs, targets, torch.ones_like(lengths), torch.full_like(target_lengths, 6))
    loss.backward()
    assert float(loss) == 0 and criterion.infeasible.all() and log_probs.grad.abs().max() == 0


def test_nan_log_probs_are_not_hidden():
    log_probs, targets, lengths, target_lengths = batch()
    broken = log_probs.detach().clone()
    broken[0, 3] = float("nan")
    assert torch.isnan(CTCLoss(5)(broken, targets, lengths, target_lengths))


def test_half_precision_log_probs_are_summed_in_float32():
    log_probs, targets, lengths, target_lengths = batch(T=200)
    loss = CTCLoss(5)(log_probs.detach().bfloat16(), targets, lengths, target_lengths)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_unknown_reduction_names_the_valid_ones():
    with pytest.raises(ValueError, match="'sum'; valid: mean_volume, mean_batch"):
        CTCLoss(5, "sum")
