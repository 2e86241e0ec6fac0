"""The Conformer encoder: masks, lengths, gradients, parts against plain formulas, export, bad arguments."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recipes.conformer.attention import RelPositionAttention, relative_positions, shift_to_keys
from recipes.conformer.convolution import MaskedBatchNorm
from recipes.conformer.depthwise import depthwise_conv
from recipes.dropout import add_branch, dropout
from recipes.conformer.encoder import ConformerEncoder
from recipes.conformer.subsampling import ConvSubsampling
from recipes.lengths import valid_mask

SMALL = {"feat_in": 20, "n_layers": 2, "d_model": 24, "n_heads": 4, "conv_kernel_size": 7}
SMALL["subsampling_conv_channels"] = 8
NO_DROPOUT = {"dropout": 0.0, "dropout_pre_encoder": 0.0}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return ConformerEncoder(**{**SMALL, **changes})


def batch(lengths, feat_in=20, frames=None, seed=1):
    """Features of given lengths, with what must not be looked at (large numbers, NaN) in the padding."""
    torch.manual_seed(seed)
    length_B = torch.tensor(lengths)
    x_BFT = torch.randn(len(lengths), feat_in, frames or max(lengths))
    pad = ~valid_mask(length_B, x_BFT.shape[2])[:, None]
    x_BFT = torch.where(pad, torch.where(torch.rand_like(x_BFT) < 0.5, torch.nan, 1e4), x_BFT)
    return x_BFT, length_B


def test_padding_and_other_items_do_not_change_an_utterance():
    for changes in ({}, {"subsampling": "dw_striding", "subsampling_factor": 8, "conv_norm_type": "layer_norm"}):
        encoder = make(**changes).eval()
        x_BFT, length_B = batch([131, 90, 57, 8, 1], frames=150)
        outputs, lengths = encoder(audio_signal=x_BFT, length=length_B)
        for i, (frames, out) in enumerate(zip(length_B.tolist(), lengths.tolist())):
            alone, alone_length = encoder(audio_signal=x_BFT[i : i + 1, :, :frames], length=length_B[i : i + 1])
            assert alone.shape[2] == out == alone_length.item()
            assert_close(outputs[i, :, :out], alone[0], atol=2e-5, rtol=1e-4)


def gradients(encoder, x_BFT, length_B, items=slice(None)):
    encoder.zero_grad()
    outputs, lengths = encoder(audio_signal=x_BFT, length=length_B)
    real = valid_mask(lengths, outputs.shape[2])[:, None]
    outputs.masked_fill(~real, 0.0)[items].square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}


def test_padding_changes_no_gradient_and_no_statistic_in_training():
    encoder = make(**NO_DROPOUT).train()
    padded_more = copy.deepcopy(encoder)
    tight = gradients(encoder, *batch([70, 41, 16]))
    x_BFT, length_B = batch([70, 41, 16])
    wide = gradients(padded_more, F.pad(x_BFT, (0, 50), value=1e4), length_B)
    for name, grad in tight.items():
        assert_close(wide[name], grad, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(encoder.named_buffers(), padded_more.buffers()):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_with_layer_norm_an_item_trains_as_if_it_were_alone():
    encoder = make(conv_norm_type="layer_norm", **NO_DROPOUT).train()
    x_BFT, length_B = batch([70, 41, 16])
    in_batch = gradients(encoder, x_BFT, length_B, items=slice(1, 2))
    alone = gradients(encoder, x_BFT[1:2, :, :41], length_B[1:2])
    for name, grad in alone.items():
        assert_close(in_batch[name], grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


TINY = {
    (kind, factor): ConformerEncoder(
        4, 1, 8, n_heads=2, conv_kernel_size=3, subsampling=kind, subsampling_factor=factor
    )
    for kind in ("striding", "dw_striding")
    for factor in (2, 4, 8)
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TINY)), st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(0, 20))
def test_lengths_are_those_of_the_output(which, lengths, extra):
    encoder = TINY[which].eval()
    length_B = torch.tensor(lengths, dtype=torch.int32)
    features = torch.randn(len(lengths), 4, max(lengths) + extra)
    outputs, encoded = encoder(audio_signal=features, length=length_B)
    assert encoded.dtype == torch.int64 and torch.isfinite(outputs).all()
    assert encoded.tolist() == [encoder.output_lengths(n) for n in lengths]
    assert encoded.tolist() == [-(-n // which[1]) for n in lengths]
    assert outputs.shape == (len(lengths), 8, max(encoder.output_lengths(max(lengths) + extra), 1))


def test_gradients_reach_each_parameter():
    other = {"subsampling": "dw_striding", "untie_biases": False, "feat_out": 10, "conv_norm_type": "layer_norm"}
    for changes in ({}, other):
        encoder = make(**changes).train()
        for name, grad in gradients(encoder, *batch([70, 41])).items():
            # a normalisation over time takes a constant away again: this one has no effect, in NeMo's neither
            without_effect = name.endswith("conv.depthwise.bias") and not changes
            assert torch.isfinite(grad).all() and (without_effect or grad.abs().max() > 0), name


def test_state_survives_saving():
    encoder = make().train()
    encoder(audio_signal=torch.randn(2, 20, 50), length=torch.tensor([50, 30]))
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    other = make(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    x_BFT, length_B = batch([50, 33])
    assert torch.equal(
        encoder.eval()(audio_signal=x_BFT, length=length_B)[0], other.eval()(audio_signal=x_BFT, length=length_B)[0]
    )


def test_bfloat16_autocast():
    encoder = make(**NO_DROPOUT).train()
    x_BFT, length_B = batch([80, 45, 0])
    exact, _ = encoder(audio_signal=x_BFT, length=length_B)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, lengths = encoder(audio_signal=x_BFT, length=length_B)
        loss = outputs.float().square().mean()
    loss.backward()
    assert torch.isfinite(outputs).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in encoder.parameters())
    real = valid_mask(lengths, outputs.shape[2])[:, None].expand_as(exact)
    assert (outputs.float() - exact)[real].abs().mean() < 0.05


def test_learns_one_batch_by_heart():
    """The failure this project began with: a Conformer that does not converge, not even on one batch."""
    encoder = make(subsampling="dw_striding", n_layers=3, d_model=48, **NO_DROPOUT).train()
    head = torch.nn.Linear(48, 6)
    x_BFT, length_B = batch([120, 96, 72, 64])
    targets, target_lengths = torch.randint(1, 6, (4, 8)), torch.tensor([8, 7, 6, 5])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    for _ in range(80):
        outputs, lengths = encoder(audio_signal=x_BFT, length=length_B)
        log_probs = head(outputs.transpose(1, 2)).log_softmax(-1)
        loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.05
    for best, frames, target, size in zip(log_probs.argmax(-1), lengths, targets, target_lengths):
        symbols = torch.unique_consecutive(best[:frames])
        assert symbols[symbols > 0].tolist() == target[:size].tolist()


def test_deep_and_wide_starts_with_signal_and_gradient_in_every_layer():
    torch.manual_seed(0)
    encoder = ConformerEncoder(40, 17, 64, n_heads=4, subsampling="dw_striding", **NO_DROPOUT).train()
    x_BFT, length_B = torch.randn(2, 40, 80), torch.tensor([80, 60])
    into_first = encoder.subsampling(x_BFT.transpose(1, 2), length_B)
    assert 0.5 < into_first.std() < 2.0
    outputs, _ = encoder(audio_signal=x_BFT, length=length_B)
    (outputs * torch.randn_like(outputs)).sum().backward()
    norms = [layer.ff1.linear_in.weight.grad.norm().item() for layer in encoder.layers]
    assert 0.05 < norms[0] / norms[-1] < 20


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "million"), [(16, 144, 4, 8.7), (16, 256, 4, 27.3), (17, 512, 8, 115.1)]
)
def test_paper_sizes(n_layers, d_model, n_heads, million):
    with torch.device("meta"):
        encoder = ConformerEncoder(80, n_layers, d_model, n_heads=n_heads)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == million


# ---- parts


def test_batch_norm_is_torchs_on_real_frames_only():
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(6), torch.nn.BatchNorm1d(6)
    for norm in (ours, theirs):
        torch.nn.init.constant_(norm.bias, 0.3)
        torch.nn.init.constant_(norm.weight, 1.7)
    x_BTC = torch.randn(3, 11, 6) * 3 + 5
    mask = valid_mask(torch.tensor([11, 4, 0]), 11)
    results = []
    for norm, run in ((ours, lambda x: ours(x, ~mask)[mask]), (theirs, lambda x: theirs(x[mask]))):
        x = x_BTC.clone().requires_grad_()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y, x.grad, norm.weight.grad, norm.bias.grad, *norm.state_dict().values()))
    for a, b in zip(*results):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    ours.eval(), theirs.eval()
    assert_close(ours(x_BTC, ~mask)[mask], theirs(x_BTC[mask]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_batch_does_not_stay_in_the_statistics(bad):
    norm = MaskedBatchNorm(3)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    norm(torch.randn(2, 5, 3), pad)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((2, 5, 3), bad), pad)
    norm(torch.randn(2, 5, 3), ~pad)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_attention_follows_the_formula(frames):
    torch.manual_seed(0)
    attention = RelPositionAttention(8, 2).double()
    torch.nn.init.normal_(attention.bias_u)
    torch.nn.init.normal_(attention.bias_v)
    x_BTD = torch.randn(2, frames, 8, dtype=torch.float64)
    pad = ~valid_mask(torch.tensor([frames, (frames + 1) // 2]), frames)
    pos = relative_positions(frames, 8, x_BTD.device, x_BTD.dtype)
    got = attention(x_BTD, pos, pad)
    q, k, v = (part.view(2, frames, 2, 4) for part in attention.qkv(x_BTD).chunk(3, dim=-1))
    r = attention.pos(pos).view(-1, 2, 4)
    for b in range(2):
        real = int((~pad[b]).sum())
        for i in range(real):
            heads = []
            for h in range(2):
                scores = torch.stack([
                    (q[b, i, h] + attention.bias_u[h]) @ k[b, j, h]
                    + (q[b, i, h] + attention.bias_v[h]) @ r[frames - (i - j), h]
                    for j in range(real)
                ])
                heads.append((scores / 2.0).softmax(0) @ v[b, :real, h])
            assert_close(got[b, i], attention.out(torch.cat(heads)))


def test_relative_positions_and_their_shift():
    by_distance = torch.arange(5, -5, -1).expand(2, 5, 10)
    query, key = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    assert torch.equal(shift_to_keys(by_distance.contiguous())[1], query - key)
    pos = relative_positions(5, 6, torch.device("cpu"), torch.float32)
    assert pos.shape == (10, 6)
    assert_close(pos[5], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    assert_close(pos[3, :2], torch.stack((torch.tensor(2.0).sin(), torch.tensor(2.0).cos())))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 6), st.integers(0, 6))
def test_depthwise_is_conv1d(items, frames, channels, left, right):
    results = []
    for run in (
        lambda x, w, b: depthwise_conv(x, w[:, 0], b, left, right),
        lambda x, w, b: F.conv1d(F.pad(x.transpose(1, 2), (left, right)), w, b, groups=channels).transpose(1, 2),
    ):
        torch.manual_seed(items)
        shapes = ((items, frames, channels), (channels, 1, left + right + 1), (channels,))
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        y = run(*inputs)
        (y * torch.randn(y.shape)).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for a, b in zip(*results):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["striding", "dw_striding"])
def test_subsampling_is_a_chain_of_masked_convolutions(kind):
    torch.manual_seed(0)
    module = ConvSubsampling(kind, 8, feat_in=12, channels=5, d_model=7)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BFT, length_B = batch([37, 20, 1], feat_in=12)
    x = x_BFT.nan_to_num()[:, None].transpose(2, 3)
    lengths = length_B
    for stage, conv in enumerate([module.first, *module.convs]):
        x = conv(x * valid_mask(lengths, x.shape[2])[:, None, :, None])
        if kind == "dw_striding" and stage:
            x = module.pointwise[stage - 1](x.movedim(1, -1)).movedim(-1, 1)
        x, lengths = x.relu(), (lengths + 1) // 2
    expected = module.out(x.permute(0, 2, 3, 1).flatten(2))
    got = module(x_BFT.transpose(1, 2), length_B)
    real = valid_mask(lengths, got.shape[1])
    assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


def test_dropout_keeps_the_mean_and_hits_its_rate():
    torch.manual_seed(0)
    x = torch.ones(300, 1001, requires_grad=True)
    for p in (0.1, 0.5):
        y = dropout(x, p, training=True)
        assert_close(y.mean().item(), 1.0, atol=0.01, rtol=0)
        assert_close((y == 0).float().mean().item(), p, atol=0.005, rtol=0)
        assert_close(y.max().item(), 1 / (1 - p))
        residual = add_branch(torch.full_like(x, 2.0), x, p, training=True, weight=0.5)
        assert_close(sorted(set(residual.unique().tolist())), [2.0, 2.0 + 0.5 / (1 - p)])
        # neighbours share random words: they must still be independent
        kept = (y[:, :-1] != 0).float(), (y[:, 1:] != 0).float()
        assert_close((kept[0] * kept[1]).mean().item(), (1 - p) ** 2, atol=0.01, rtol=0)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x
    assert torch.equal(add_branch(x, x, 0.3, training=False, weight=0.5), x * 1.5)


# ---- compiling and export


def test_no_graph_break():
    """One graph for training and one for evaluation: nothing in the forward waits for a value or leaves torch."""
    encoder = make(n_layers=1)
    x_BFT, length_B = torch.randn(2, 20, 60), torch.tensor([60, 31])
    for mode in (True, False):
        encoder.train(mode)
        torch._dynamo.reset()
        compiled = torch.compile(encoder.encode, fullgraph=True, backend="eager")
        outputs, lengths, captured = compiled(x_BFT, length_B, (0,))
        assert lengths.tolist() == [15, 8] and captured[0].shape == outputs.shape == (2, 24, 15)


def test_trace_and_onnx(tmp_path):
    encoder = make().eval()
    encoder.freeze()
    features, length = encoder.input_example(max_batch=2, max_dim=64)
    traced = torch.jit.trace(lambda x, n: encoder.encode(x, n)[:2], (features, length), check_trace=False)
    x_BFT, length_B = torch.randn(3, 20, 101), torch.tensor([101, 60, 33])
    for a, b in zip(traced(x_BFT, length_B), encoder(audio_signal=x_BFT, length=length_B)):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    path = tmp_path / "encoder.onnx"
    encoder.export(str(path), input_example=(features, length), check_trace=False)
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference").ReferenceEvaluator(onnx.load(str(path)))
    exported = reference.run(None, {"audio_signal": x_BFT.numpy(), "length": length_B.numpy()})
    for a, b in zip(exported, encoder(audio_signal=x_BFT, length=length_B)):
        assert_close(torch.from_numpy(a), b, atol=1e-4, rtol=1e-3)


# ---- bad arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, ["d_model=24", "n_heads=5"]),
        ({"d_model": 27, "n_heads": 3}, ["d_model=27", "even"]),
        ({"subsampling_factor": 3}, ["subsampling_factor=3", "2, 4 or 8"]),
        ({"subsampling": "vggnet"}, ["subsampling='vggnet'", "dw_striding"]),
        ({"subsampling_conv_channels": 0}, ["subsampling_conv_channels=0", "-1"]),
        ({"conv_kernel_size": 32}, ["conv_kernel_size=32", "33"]),
        ({"conv_context_size": [2, 2]}, ["[2, 2]", "conv_kernel_size=7", "6"]),
        ({"conv_context_size": "lookahead"}, ["lookahead", "causal"]),
        ({"conv_norm_type": "group_norm8"}, ["group_norm8", "layer_norm"]),
        ({"n_layers": 0}, ["n_layers=0", "positive"]),
    ],
)
def test_bad_arguments(changes, words):
    with pytest.raises(ValueError) as error:
        make(**changes)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_wrong_number_of_bins():
    with pytest.raises(ValueError, match="80 bins.*feat_in=20.*preprocessor"):
        make()(audio_signal=torch.randn(1, 80, 30), length=torch.tensor([30]))
