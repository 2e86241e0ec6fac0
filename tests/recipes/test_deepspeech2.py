"""DeepSpeech2: padding, lengths, gradients, normalisation over valid frames, and the CPU recurrence against torch's."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.deepspeech2.encoder import DeepSpeech2Encoder, LookAhead
from recipes import recurrent_cpu
from recipes.dropout import LockedDropout
from recipes.lengths import valid_mask
from recipes.recurrent import RNN_TYPES, RecurrentLayer, SequenceBatchNorm, SequenceNorm
from recipes.recurrent_cpu import recurrence
from tests.recipes import invariants


def small(**kwargs) -> DeepSpeech2Encoder:
    torch.manual_seed(0)
    settings_ = dict(
        feat_in=16, conv_channels=(4, 6), conv_kernels=((5, 5), (3, 3)), conv_strides=((2, 2), (2, 2)),
        rnn_layers=2, rnn_hidden=12, dropout=0.0,
    )
    return DeepSpeech2Encoder(**{**settings_, **kwargs})


VARIANTS = {
    "default": {},
    "layer norm": dict(conv_norm="layer", rnn_norm="layer"),
    "no norm": dict(conv_norm="none", rnn_norm="none"),
    "lstm, concatenated, projected": dict(rnn_type="lstm", merge="concat", feat_out=10),
    "streaming": dict(bidirectional=False, look_ahead=3, rnn_norm="layer"),
    "paper kernels": dict(conv_kernels=((9, 11), (5, 11)), conv_strides=((2, 2), (2, 1)), rnn_type="relu"),
    "dropouts of recurrent layers": dict(dropout=0.1, locked_dropout=True, dropout_recurrent=0.2, rnn_norm="layer"),
    "residual": dict(rnn_layers=3, residual=True, rnn_norm="layer"),
    "three convs for BPE": dict(
        conv_channels=(4, 4, 4), conv_kernels=((3, 3),) * 3, conv_strides=((2, 2),) * 3, rnn_type="tanh"
    ),
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
    invariants.check_gradients_add_up_over_items(small(conv_norm=norm, rnn_norm=norm, rnn_type=rnn_type))


@pytest.mark.parametrize("rnn_type", ["gru", "lstm"])
def test_bf16_autocast(rnn_type):
    invariants.check_bf16(small(rnn_type=rnn_type))


@pytest.mark.parametrize("kwargs", [{}, dict(rnn_norm="layer"), dict(rnn_type="lstm")])
def test_learns_two_utterances(kwargs):
    invariants.check_learns(small(rnn_hidden=32, **kwargs))


def test_full_size_is_that_of_the_paper():
    with torch.device("meta"):
        encoder = DeepSpeech2Encoder()
    assert 41e6 <= sum(p.numel() for p in encoder.parameters()) <= 121e6
    assert encoder.subsampling_factor == 2 and encoder._feat_out == 1024


@pytest.mark.parametrize(
    "kwargs, named",
    [
        (dict(rnn_type="grue"), "rnn_type='grue' is not known, use one of: gru, lstm, tanh, relu"),
        (dict(rnn_norm="group"), "rnn_norm='group' is not known, use one of: batch, layer, none"),
        (dict(conv_norm=None), "conv_norm=None is not known"),
        (dict(merge="max"), "merge='max' is not known, use one of: sum, concat"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(dropout_recurrent=-0.1), "dropout_recurrent=-0.1: must be at least 0 and below 1"),
        (dict(rnn_layers=0), "rnn_layers=0: must be at least 1"),
        (dict(conv_channels=()), "conv_channels="),
        (dict(conv_kernels=((4, 3), (3, 3))), "must be odd"),
        (dict(conv_kernels=((3, 3),)), "needs 2 positive"),
        (dict(conv_strides=((2, 2), (2, 0))), "needs 2 positive"),
        (dict(conv_strides=(2, 2)), "needs 2 positive"),
        (dict(look_ahead=3), "look_ahead=3 needs bidirectional=False"),
    ],
)
def test_bad_arguments_are_named_in_one_line(kwargs, named):
    with pytest.raises(ValueError) as error:
        small(**kwargs)
    assert named in str(error.value) and "\n" not in str(error.value)


# the pieces


def directions(layer):
    both = [layer.ahead] + ([layer.back] if layer.back is not None else [])
    return [layer._weights(rnn) for rnn in both]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("rnn_type", RNN_TYPES)
def test_cpu_recurrence_equals_torch_in_values_and_gradients(rnn_type, bidirectional, threads):
    torch.manual_seed(0)
    layer = RecurrentLayer(6, 5, rnn_type, bidirectional, init="torch").double()
    x = torch.randn(4, 9, 6, dtype=torch.double, requires_grad=True)
    lengths = torch.tensor([9, 6, 1, 0])
    mask = valid_mask(lengths, 9)
    results = []
    for states in (recurrence(rnn_type, x, mask, directions(layer)), layer._torch_recurrence(x, lengths)):
        y = torch.stack(states).masked_fill(~mask[..., None], 0.0)
        weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        for p in layer.parameters():
            p.grad = None
        (y * weight).sum().backward()  # not autograd.grad: gradients that share memory show up when accumulated
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rnn_type", RNN_TYPES)
def test_recurrent_dropout_leaves_out_the_same_weights_at_all_times_on_both_paths(rnn_type):
    layer = RecurrentLayer(6, 5, rnn_type, dropout=0.5, init="torch").double().train()
    x, lengths = torch.randn(3, 9, 6, dtype=torch.double), torch.tensor([9, 6, 1])
    mask = valid_mask(lengths, 9)
    results = []
    for run in (lambda: recurrence(rnn_type, x, mask, directions(layer)), lambda: layer._torch_recurrence(x, lengths)):
        layer.zero_grad()
        torch.manual_seed(1)
        y = torch.stack(run()).masked_fill(~mask[..., None], 0.0)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)
    left_out = (results[0][2] == 0.0).float().mean()  # gradients of weight_hh_l0
    assert list(dict(layer.named_parameters()))[1] == "ahead.weight_hh_l0" and 0.2 < left_out < 0.8
    first, second = layer(x, lengths, mask), layer(x, lengths, mask)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x, lengths, mask), layer(x, lengths, mask))


def test_locked_dropout_leaves_out_the_same_units_at_all_times():
    y = LockedDropout(0.5)(torch.ones(8, 11, 500))
    assert torch.equal(y, y[:, :1].expand_as(y)) and set(y.unique().tolist()) == {0.0, 2.0}
    assert 0.45 < (y == 0).float().mean() < 0.55 and not torch.equal(y[0], y[1])
    encoder = small(dropout=0.5, locked_dropout=True)
    assert isinstance(encoder.dropout, LockedDropout) and not isinstance(small(dropout=0.5).dropout, LockedDropout)
    assert torch.equal(encoder.dropout.eval()(y), y)


@pytest.mark.skipif(not recurrent_cpu.PACKS, reason="this torch or processor has no packed products in bfloat16")
@pytest.mark.parametrize("rnn_type", ["gru", "lstm"])
def test_packed_products_equal_plain_ones(rnn_type, threads, monkeypatch):
    torch.manual_seed(0)
    layer, x = RecurrentLayer(24, 20, rnn_type), torch.randn(6, 30, 24)
    lengths = torch.tensor([30, 30, 21, 7, 1, 0])
    results = []
    for packs in (True, False):
        monkeypatch.setattr(recurrent_cpu, "PACKS", packs)
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, lengths, valid_mask(lengths, 30))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
    for packed, plain in zip(*results):  # sums in another order, rounded to bfloat16
        assert (packed - plain).abs().max() < 0.01 * plain.abs().max()


def test_a_residual_stack_adds_what_enters_a_layer_to_what_leaves_it():
    encoder = small(rnn_layers=2, residual=True, rnn_norm="none").eval()
    without = small(rnn_layers=2, rnn_norm="none").eval()
    x, lengths = torch.randn(2, 16, 40), torch.tensor([40, 24])
    entering = []
    encoder.rnns[1].register_forward_pre_hook(lambda module, arguments: entering.append(arguments[0]))
    with torch.no_grad():
        (y, out), (plain, _) = (e(audio_signal=x, length=lengths) for e in (encoder, without))
    expected = plain + entering[0].transpose(1, 2)
    torch.testing.assert_close(y, expected.masked_fill(~valid_mask(out, y.shape[2])[:, None], 0.0))


@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_merge_of_the_directions(merge):
    torch.manual_seed(0)
    layer = RecurrentLayer(6, 5, merge=merge)
    x, lengths = torch.randn(2, 7, 6), torch.tensor([7, 7])
    ahead, back = layer._torch_recurrence(x, lengths)
    expected = torch.cat([ahead, back], -1) if merge == "concat" else ahead + back
    torch.testing.assert_close(layer(x, lengths, valid_mask(lengths, 7)), expected)
    assert layer.output_size == expected.shape[-1]


@pytest.mark.parametrize("rnn_type", RNN_TYPES)
def test_reverse_direction_equals_torch_on_packed_sequences(rnn_type):
    torch.manual_seed(0)
    layer = RecurrentLayer(6, 5, rnn_type, merge="concat", init="torch").double()
    base = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}.get(rnn_type, torch.nn.RNN)
    extra = {} if rnn_type in ("gru", "lstm") else {"nonlinearity": rnn_type}
    both = base(6, 5, batch_first=True, bidirectional=True, **extra).double()
    state = {k: v for k, v in layer.ahead.state_dict().items()}
    both.load_state_dict({**state, **{f"{k}_reverse": v for k, v in layer.back.state_dict().items()}})
    x, lengths = torch.randn(3, 8, 6, dtype=torch.double), torch.tensor([8, 5, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(both(packed)[0], batch_first=True, total_length=8)
    torch.testing.assert_close(layer(x, lengths, valid_mask(lengths, 8)), expected, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), rnn_type=st.sampled_from(RNN_TYPES),
    low=st.booleans(),
)
def test_recurrence_ignores_whatever_stands_on_padding(lengths, rnn_type, low):
    torch.manual_seed(0)
    layer, T = RecurrentLayer(3, 4, rnn_type), max(lengths) + 2
    lengths = torch.tensor(lengths)
    mask = valid_mask(lengths, T)
    x = torch.randn(len(lengths), T, 3)
    noisy = torch.where(mask[..., None], x, 1e3 * torch.randn_like(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y, again = layer(x, lengths, mask), layer(noisy, lengths, mask)
    torch.testing.assert_close(again, y)
    assert (y[~mask] == 0).all()


def test_an_error_in_the_second_direction_is_raised_and_the_next_call_works(threads):
    layer, mask = RecurrentLayer(3, 4), torch.ones(2, 5, dtype=torch.bool)
    (w_ih, w_hh, b_ih, b_hh), bad = directions(layer)[0], directions(layer)[1]
    with pytest.raises(RuntimeError):
        recurrence("gru", torch.randn(2, 5, 3), mask, [(w_ih, w_hh, b_ih, b_hh), (bad[0][:, :2], *bad[1:])])
    assert layer(torch.randn(2, 5, 3), torch.tensor([5, 4]), mask).isfinite().all()


def test_a_forked_process_has_a_second_thread_of_its_own():
    script = """
import os, torch
from recipes.recurrent import RecurrentLayer
torch.set_num_threads(2)
layer, x, lengths = RecurrentLayer(3, 4), torch.randn(2, 5, 3), torch.tensor([5, 4])
mask = torch.ones(2, 5, dtype=torch.bool)
y = layer(x, lengths, mask)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x, lengths, mask), y) else 1)
print("child:", os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "child: 0" in done.stdout, done.stderr[-500:]


def test_recurrence_may_be_differentiated_again_and_without_input_gradient(threads):
    layer = RecurrentLayer(3, 4)
    lengths = torch.tensor([5, 3])
    y = layer(torch.randn(2, 5, 3), lengths, valid_mask(lengths, 5)).sum()
    first = torch.autograd.grad(y, list(layer.parameters()), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(y, list(layer.parameters())))


def test_initialisation_keeps_states_alive():
    for gate in RecurrentLayer(8, 6, "gru").back.weight_hh_l0.split(6):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(6), atol=1e-5, rtol=0)
    lstm = RecurrentLayer(8, 6, "lstm").ahead
    assert (lstm.bias_ih_l0 + lstm.bias_hh_l0).tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12
    assert torch.linalg.matrix_norm(RecurrentLayer(8, 6, "relu").ahead.weight_hh_l0, 2) < 0.51


BATCH_NORMS = {"frames picked": SequenceBatchNorm.forward, "sums, as on a GPU": SequenceBatchNorm._by_sums}


@pytest.mark.parametrize("normalise", BATCH_NORMS.values(), ids=BATCH_NORMS)
@pytest.mark.parametrize("inner", [(), (3,)], ids=["frames", "frames by frequency"])
def test_batch_norm_is_that_of_the_valid_frames_alone(inner, normalise):
    torch.manual_seed(0)
    ours, theirs = SequenceBatchNorm(5), torch.nn.BatchNorm1d(5)
    for module in (ours, theirs):
        torch.nn.init.constant_(module.weight, 1.5)
        torch.nn.init.constant_(module.bias, 0.3)
    lengths = torch.tensor([7, 4, 0])
    mask = valid_mask(lengths, 7)
    x = torch.randn(3, 7, *inner, 5, requires_grad=True)
    frames = torch.cat([x[i, :n].reshape(-1, 5) for i, n in enumerate(lengths)])
    noisy = torch.where(mask.reshape(3, 7, *[1] * len(inner), 1), x, torch.full_like(x, float("inf")))
    y, expected = normalise(ours, noisy, mask)[mask].reshape(-1, 5), theirs(frames)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    weight = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad((z * weight).sum(), x)[0] for z in (y, expected)))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, mask)[mask].reshape(-1, 5), theirs(frames))


@pytest.mark.parametrize("normalise", BATCH_NORMS.values(), ids=BATCH_NORMS)
@pytest.mark.parametrize("frames", [0, 1])
def test_batch_norm_without_a_variance_uses_and_keeps_running_statistics(frames, normalise):
    norm = SequenceBatchNorm(4)
    norm.running_mean.fill_(2.0)
    mask = valid_mask(torch.tensor([frames]), 3)
    y = normalise(norm, torch.full((1, 3, 4), 5.0), mask)
    assert y.isfinite().all() and norm.running_mean.eq(2.0).all() and norm.running_var.eq(1.0).all()
    torch.testing.assert_close(y[mask], torch.full((frames, 4), 3.0), atol=1e-4, rtol=0)


def test_norm_kinds():
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    assert SequenceNorm("none", 4)(x, mask) is x
    torch.testing.assert_close(SequenceNorm("layer", 4)(x, mask).mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_look_ahead_sees_the_future_and_no_past():
    look = LookAhead(2, 3)
    torch.nn.init.normal_(look.conv.weight)
    x = torch.zeros(1, 8, 2)
    x[0, 5] = 1.0
    seen = look(x)[0].abs().sum(-1) > 0
    assert seen.tolist() == [False, False, True, True, True, True, False, False]


def test_streaming_model_looks_no_further_than_it_says():
    encoder = small(bidirectional=False, look_ahead=2).eval()
    x, lengths = torch.randn(1, 16, 80), torch.tensor([80])
    changed = x.clone()
    changed[:, :, 48:] += 1.0
    with torch.no_grad():
        y, z = (encoder(audio_signal=a, length=lengths)[0][0] for a in (x, changed))
    # 3 frames of convolution to each side at the input rate, 2 frames of look-ahead at the output rate
    first = int((y != z).any(0).nonzero()[0])
    assert 48 // 4 - 4 <= first <= 48 // 4 and (y[:, 13:] != z[:, 13:]).any()
