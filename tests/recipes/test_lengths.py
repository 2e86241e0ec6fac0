"""Length arithmetic against what torch itself does, on random sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.lengths import adjacent_repeats, conv_out_length, ctc_infeasible, split_global_batch, valid_mask

sizes = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 60), kernel=sizes, stride=sizes, left=st.integers(0, 6), right=st.integers(0, 6),
    dilation=st.integers(1, 3),
)
def test_conv_out_length_is_what_a_convolution_gives(length, kernel, stride, left, right, dilation):
    conv = torch.nn.Conv1d(1, 1, kernel, stride, dilation=dilation)
    ours = conv_out_length(length, kernel, stride, (left, right), dilation)
    if dilation * (kernel - 1) + 1 > length + left + right:
        assert ours == 0
    else:
        assert ours == conv(torch.zeros(1, 1, length + left + right)).shape[-1]
    if left == right:
        assert conv_out_length(length, kernel, stride, left, dilation) == ours


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6), kernel=sizes, stride=sizes, padding=st.integers(0, 6)
)
def test_conv_out_length_of_a_tensor_is_that_of_its_integers(lengths, kernel, stride, padding):
    of_tensor = conv_out_length(torch.tensor(lengths), kernel, stride, padding)
    assert of_tensor.dtype == torch.int64
    assert of_tensor.tolist() == [conv_out_length(n, kernel, stride, padding) for n in lengths]


def test_nothing_stays_nothing_whatever_the_padding():
    assert conv_out_length(0, 3, 2, 5) == 0
    assert conv_out_length(torch.tensor([0, 1]), 3, 2, 5).tolist() == [0, 5]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6), extra=st.integers(0, 5))
def test_valid_mask_is_true_on_the_first_frames_of_each_item(lengths, extra):
    width = max(lengths) + extra
    mask = valid_mask(torch.tensor(lengths), width)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * n + [False] * (width - n) for n in lengths]


@st.composite
def padded_targets(draw):
    """(targets (B, S), target lengths (B)) over few symbols, so that neighbours repeat; padding repeats too."""
    items = draw(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=5))
    pad, extra = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    width = max(map(len, items)) + extra
    rows = [item + [pad] * (width - len(item)) for item in items]
    return torch.tensor(rows).reshape(len(items), width), torch.tensor([len(item) for item in items])


@settings(max_examples=100, deadline=None)
@given(padded_targets())
def test_adjacent_repeats_counts_inside_the_target_only(targets_and_lengths):
    targets, lengths = targets_and_lengths
    expected = []
    for row, n in zip(targets.tolist(), lengths.tolist()):
        expected.append(sum(row[i] == row[i - 1] for i in range(1, n)))
    assert adjacent_repeats(targets, lengths).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(padded_targets(), st.data())
def test_ctc_infeasible_is_where_torch_gives_an_infinite_loss(targets_and_lengths, data):
    targets, target_lengths = targets_and_lengths
    B, S = targets.shape
    output_lengths = torch.tensor(data.draw(st.lists(st.integers(0, 2 * S + 1), min_size=B, max_size=B)))
    log_probs = torch.randn(max(int(output_lengths.max()), 1), B, 4).log_softmax(-1)
    # torch reads targets of width 0 as malformed: give it a column that no length reaches
    padded = torch.cat([targets, torch.zeros(B, 1, dtype=torch.int64)], dim=1)
    loss = torch.nn.functional.ctc_loss(
        log_probs, padded, output_lengths, target_lengths, blank=3, reduction="none", zero_infinity=False
    )
    assert ctc_infeasible(targets, target_lengths, output_lengths).tolist() == loss.isinf().tolist()


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 1e5), st.integers(1, 512), st.integers(1, 64))
def test_split_global_batch_adds_up(seconds, devices, accumulate):
    assert split_global_batch(seconds, devices, accumulate) * devices * accumulate == pytest.approx(seconds)


@pytest.mark.parametrize("bad", [(0, 1, 1), (-1.0, 1, 1), (10, 0, 1), (10, 1, 0)])
def test_split_global_batch_names_what_is_wrong(bad):
    with pytest.raises(ValueError, match="must be positive"):
        split_global_batch(*bad)
