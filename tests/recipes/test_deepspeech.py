"""DeepSpeech v1: padding, lengths, gradients, and torchaudio's network as a setting of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.deepspeech.encoder import TORCHAUDIO, DeepSpeechEncoder
from recipes.recurrent import RNN_TYPES
from tests.recipes import invariants


def small(**kwargs) -> DeepSpeechEncoder:
    torch.manual_seed(0)
    return DeepSpeechEncoder(**{**dict(feat_in=16, hidden=20, context=2, dropout=0.0), **kwargs})


VARIANTS = {
    "default": {},
    "small": dict(stride=4, context=5, rnn_hidden=12),
    "layer norm": dict(norm="layer", rnn_norm="layer", rnn_type="gru", merge="concat"),
    "paper": dict(norm="none", rnn_norm="none", rnn_type="relu"),
    "no context": dict(context=0, stride=1, rnn_type="tanh"),
    "stride beyond the window": dict(context=1, stride=8),
}
variants = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_padding_and_neighbours_do_not_matter(kwargs):
    invariants.check_padding_and_neighbours_do_not_matter(small(**kwargs))


@variants
def test_gradients_reach_each_parameter(kwargs):
    invariants.check_gradients_reach_all(small(**kwargs))


@variants
def test_lengths_are_exact(kwargs):
    invariants.check_lengths(small(**kwargs))


@variants
def test_no_frames_and_one_frame(kwargs):
    invariants.check_nothing_and_little(small(**kwargs))


@variants
def test_trace_follows_shapes(kwargs):
    invariants.check_traced(small(**kwargs))


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("rnn_type", RNN_TYPES)
def test_items_train_independently_without_batch_statistics(norm, rnn_type):
    invariants.check_gradients_add_up_over_items(small(norm=norm, rnn_norm=norm, rnn_type=rnn_type))


@variants
def test_bf16_autocast(kwargs):
    invariants.check_bf16(small(**kwargs))


@pytest.mark.parametrize("kwargs", [{}, dict(norm="layer", rnn_norm="layer", rnn_type="gru")])
def test_learns_two_utterances(kwargs):
    invariants.check_learns(small(hidden=48, **kwargs))


class AsTorchaudioDocumentsIt(nn.Module):
    """torchaudio.models.DeepSpeech without its last Linear, from its documentation: four dense layers, each
    Linear, ReLU, clip at 20; a bidirectional ReLU RNN before the fourth, its directions summed. (B, T, D) in."""

    def __init__(self, features, hidden):
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(n, hidden) for n in (features, hidden, hidden, hidden))
        self.rnn = nn.RNN(hidden, hidden, nonlinearity="relu", bidirectional=True)

    def forward(self, x):
        x = x.transpose(0, 1)
        for dense in self.dense[:3]:
            x = F.relu(dense(x)).clamp(max=20.0)
        ahead, back = self.rnn(x)[0].chunk(2, dim=-1)
        return F.relu(self.dense[3](ahead + back)).clamp(max=20.0).transpose(0, 1)


def test_torchaudio_is_a_setting():
    torch.manual_seed(0)
    ours, theirs = small(**TORCHAUDIO), AsTorchaudioDocumentsIt(16, 20)
    with torch.no_grad():
        for mine, other in zip([*ours.dense, ours.last], theirs.dense):
            mine.linear.weight.copy_(other.weight[:, :, None])
            mine.linear.bias.copy_(other.bias)
        for direction, suffix in ((ours.rnn.ahead, ""), (ours.rnn.back, "_reverse")):
            for name, p in direction.named_parameters():
                p.copy_(getattr(theirs.rnn, name + suffix))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = 3 * torch.randn(3, 16, 30)
    y, lengths = ours(audio_signal=x, length=torch.tensor([30, 20, 0]))
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert lengths.tolist() == [30, 20, 0] and expected.abs().sum() > 0
    y.sum().backward(), expected.sum().backward()
    for p, q in zip((d.linear.weight.grad[:, :, 0] for d in ours.dense), (d.weight.grad for d in theirs.dense)):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_unbounded_recurrence_overflows_where_the_default_cannot():
    """What torchaudio's network does once its recurrent matrix stretches the state: the reported NaN."""
    x, lengths = torch.randn(1, 16, 400), torch.tensor([400])
    for kwargs, finite in ((TORCHAUDIO, False), ({}, True)):
        encoder = small(**kwargs)
        with torch.no_grad():
            for direction in (encoder.rnn.ahead, encoder.rnn.back):
                direction.weight_hh_l0.copy_(2.0 * torch.eye(20).repeat(direction.weight_hh_l0.shape[0] // 20, 1))
        y, _ = encoder(audio_signal=x, length=lengths)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters()) == finite


def test_window_is_the_context_around_each_step():
    encoder = small(context=3, stride=2, norm="none").eval()
    x, lengths = torch.randn(1, 16, 40), torch.tensor([40])
    changed = x.clone()
    changed[:, :, 20] += 1.0
    window = [encoder.dense[0](a.transpose(1, 2), None) for a in (x, changed)]
    # windows are centred on frames 0, 2, 4, ...: those within 3 of frame 20
    moved = (window[0] != window[1]).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == [9, 10, 11] and window[0].shape[1] == encoder.output_lengths(40) == 20


def test_full_size():
    with torch.device("meta"):
        encoder = DeepSpeechEncoder()
    assert encoder._feat_out == 2048 and encoder.subsampling_factor == 2
    assert 80e6 < sum(p.numel() for p in encoder.parameters()) < 85e6


@pytest.mark.parametrize(
    "kwargs, named",
    [
        (dict(rnn_type="gruu"), "rnn_type='gruu' is not known, use one of: gru, lstm, tanh, relu"),
        (dict(norm="instance"), "norm='instance' is not known, use one of: batch, layer, none"),
        (dict(rnn_norm=0), "rnn_norm=0 is not known"),
        (dict(merge="mean"), "merge='mean' is not known, use one of: sum, concat"),
        (dict(init="zeros"), "init='zeros' is not known, use one of: stable, torch"),
        (dict(hidden=0), "hidden=0: must be at least 1"),
        (dict(context=-1), "context=-1: must be at least 0"),
        (dict(stride=0), "stride=0: must be at least 1"),
        (dict(dropout=-0.1), "dropout=-0.1"),
        (dict(clip=0), "clip=0: must be above 0"),
    ],
)
def test_bad_arguments_are_named_in_one_line(kwargs, named):
    with pytest.raises(ValueError) as error:
        small(**kwargs)
    assert named in str(error.value) and "\n" not in str(error.value)
