"""Warping of the frequency axis, before NeMo's masks."""

import pytest
import torch

from recipes.augment import WarpedSpectrogramAugmentation, change_tempo, round_up_frames, warp_matrix


def test_a_factor_of_one_leaves_the_bins_and_others_read_between_two():
    one, more, less = warp_matrix(torch.tensor([1.0, 1.25, 0.5]), 8)
    torch.testing.assert_close(one, torch.eye(8))
    ramp = torch.arange(8.0)
    torch.testing.assert_close(more @ ramp, torch.tensor([0, 1.25, 2.5, 3.75, 5, 6.25, 7, 7]))
    torch.testing.assert_close(less @ ramp, ramp / 2)
    torch.testing.assert_close(more.sum(-1), torch.ones(8))


def test_each_utterance_has_a_warp_of_its_own_within_the_limit_and_time_stays():
    torch.manual_seed(0)
    ramp = torch.arange(40.0)[None, :, None].expand(64, 40, 3)
    warped = WarpedSpectrogramAugmentation(warp=0.1)(input_spec=ramp, length=torch.full((64,), 3))
    factors = warped[:, 20, 0] / 20
    assert 0.9 <= factors.min() < 0.93 and 1.07 < factors.max() <= 1.1
    assert torch.equal(warped[..., 0], warped[..., 2])


def test_without_a_warp_it_is_nemos():
    from nemo.collections.asr.modules import SpectrogramAugmentation

    masks = dict(freq_masks=2, time_masks=2, freq_width=4, time_width=0.2)
    x, lengths, outputs = torch.randn(3, 16, 50), torch.tensor([50, 40, 30]), []
    for module in (SpectrogramAugmentation(**masks), WarpedSpectrogramAugmentation(warp=0.0, **masks)):
        torch.manual_seed(0)
        outputs.append(module(input_spec=x.clone(), length=lengths))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("warp", [-0.1, 0.5])
def test_a_warp_that_cannot_be_is_one_line(warp):
    with pytest.raises(ValueError, match=f"warp={warp}"):
        WarpedSpectrogramAugmentation(warp=warp)


def test_tempo_stretches_features_and_lengths_together_and_padding_stays_behind():
    ramp = torch.arange(200.0).repeat(2, 3, 1)
    ramp[1, :, 150:] = -1000.0  # padding
    for asked in (0.9, 0.932, 1.0, 1.017, 1.1):
        x, lengths = change_tempo(ramp, torch.tensor([200, 150]), asked)
        factor = x.shape[2] / 200
        assert abs(factor - asked) <= 0.5 / 200
        assert lengths.tolist() == [x.shape[2], round(150 * factor)] and lengths.dtype == torch.int64
        places = (torch.arange(x.shape[2]) + 0.5) / factor - 0.5
        torch.testing.assert_close(x[0, 0], places.clamp(0, 199), atol=1e-3, rtol=0)
        assert (x[1, :, int(lengths[1]) + 1 :] < -500).all() and (x[1, :, : int(lengths[1]) - 1] >= 0).all()


@pytest.mark.parametrize("frames, rounded", [(1, 16), (16, 16), (17, 32), (400, 400)])
def test_frames_are_rounded_up_with_silence(frames, rounded):
    x = torch.randn(2, 3, frames)
    y = round_up_frames(x, 16)
    assert y.shape == (2, 3, rounded) and torch.equal(y[..., :frames], x) and not y[..., frames:].any()
