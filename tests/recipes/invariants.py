"""What every encoder of this project must keep to, as checks that the tests of each encoder call."""

import copy

import torch

LENGTHS = [61, 40, 7, 1]


def batch(feat_in=16, lengths=LENGTHS, extra=0, seed=0, fill=float("nan")):
    """Random features (B, D, T) with ``fill`` on the padding, and their lengths (B)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), feat_in, max(lengths) + extra, generator=generator)
    for item, n in zip(x, lengths):
        item[:, n:] = fill
    return x, torch.tensor(lengths)


def warm(encoder, steps=3, feat_in=16):
    """Give batch normalisation running statistics that are not the initial ones."""
    encoder.train()
    with torch.no_grad():
        for seed in range(steps):
            encoder(audio_signal=batch(feat_in, seed=seed)[0] * 2 + 1, length=torch.tensor(LENGTHS))
    return encoder


def check_padding_and_neighbours_do_not_matter(encoder, tolerance=2e-5):
    """In evaluation an item alone and unpadded gives what it gives in a batch with NaN behind it."""
    warm(encoder).eval()
    x, lengths = batch(extra=13)
    with torch.no_grad():
        together, out_lengths = encoder(audio_signal=x, length=lengths)
        assert together.isfinite().all()
        for i, n in enumerate(lengths.tolist()):
            alone, (out_n,) = encoder(audio_signal=x[i : i + 1, :, :n], length=lengths[i : i + 1])
            assert out_n == out_lengths[i] == alone.shape[-1]
            torch.testing.assert_close(together[i, :, :out_n], alone[0], atol=tolerance, rtol=tolerance)
            assert (together[i, :, out_n:] == 0).all()


def check_gradients_add_up_over_items(encoder, tolerance=1e-9):
    """In training, without batch statistics and dropout, a batch's gradient is the sum of its items' gradients."""
    encoder = encoder.double().train()
    x, lengths = batch(extra=5)
    x = x.double()
    whole, alone = copy.deepcopy(encoder), copy.deepcopy(encoder)
    y, _ = whole(audio_signal=x, length=lengths)
    weight = torch.randn(y.shape[1:], dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    for i, n in enumerate(lengths.tolist()):
        z, _ = alone(audio_signal=x[i : i + 1, :, :n], length=lengths[i : i + 1])
        (z * weight[:, : z.shape[-1]]).sum().backward()
    for (name, p), q in zip(whole.named_parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=tolerance, rtol=1e-6, msg=lambda m: f"{name}: {m}")


def check_gradients_reach_all(encoder):
    """Each parameter gets a finite gradient that is not all zero."""
    encoder.train()
    x, lengths = batch()
    y, _ = encoder(audio_signal=x, length=lengths)
    (y * torch.randn_like(y)).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def check_lengths(encoder, feat_in=16):
    """forward, output_lengths of integers and of tensors agree for every length from 0 to 40."""
    encoder.eval()
    lengths = list(range(41))
    as_tensor = encoder.output_lengths(torch.tensor(lengths))
    assert as_tensor.tolist() == [encoder.output_lengths(n) for n in lengths]
    with torch.no_grad():
        y, out = encoder(audio_signal=torch.randn(41, feat_in, 40), length=torch.tensor(lengths))
    assert out.tolist() == as_tensor.tolist() and out.dtype == torch.int64
    assert y.shape == (41, encoder._feat_out, encoder.output_lengths(40))
    factor = encoder.subsampling_factor
    assert [encoder.output_lengths(n * factor) for n in range(5)] == [0, 1, 2, 3, 4]


def check_nothing_and_little(encoder, feat_in=16):
    """Items without a frame, a batch of nothing else, one of a single frame, and one of no time at all."""
    for mode in (True, False):
        for lengths, T in (([9, 0, 1], 9), ([0, 0], 5), ([1], 1), ([0], 0)):
            encoder.train(mode).zero_grad()
            y, out = encoder(audio_signal=torch.randn(len(lengths), feat_in, T), length=torch.tensor(lengths))
            assert y.isfinite().all() and [n > 0 for n in out.tolist()] == [n > 0 for n in lengths]
            y.square().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert all(b.isfinite().all() for b in encoder.buffers())


def check_bf16(encoder):
    """Under bf16 autocast outputs and gradients are finite, and outputs near those of float32."""
    warm(encoder).eval()
    x, lengths = batch()
    exact, _ = encoder(audio_signal=x, length=lengths)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(audio_signal=x, length=lengths)
    assert (y.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    encoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(audio_signal=x, length=lengths)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def check_traced(encoder, feat_in=16):
    """A trace (what export uses) gives the same for other batch sizes and lengths than those it was made with."""
    from nemo.core.classes.common import typecheck

    warm(encoder).eval()
    with typecheck.disable_checks(), torch.no_grad():
        traced = torch.jit.trace(encoder, encoder.input_example(2, 50), check_trace=False)
        x, lengths = batch(extra=4)
        torch.testing.assert_close(traced(x, lengths), encoder(x, lengths), atol=2e-5, rtol=2e-5)


def check_learns(encoder, feat_in=16, steps=120, lr=3e-3):
    """CTC on two utterances of noise until greedy decoding gives their targets, no utterance excepted."""
    torch.manual_seed(0)
    x, lengths = batch(feat_in, [80, 60])
    targets, target_lengths = torch.tensor([[1, 2, 2, 3, 1, 4], [4, 3, 1, 0, 0, 0]]), torch.tensor([6, 3])
    decoder = torch.nn.Conv1d(encoder._feat_out, 6, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr)
    encoder.train()
    for _ in range(steps):
        y, out = encoder(audio_signal=x, length=lengths)
        log_probs = decoder(y).permute(2, 0, 1).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(log_probs, targets, out, target_lengths, blank=5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        best = log_probs.argmax(-1).t()
        texts = [torch.unique_consecutive(row[:n]) for row, n in zip(best, out.tolist())]
        found = [text[text != 5].tolist() for text in texts]
        if found == [[1, 2, 2, 3, 1, 4], [4, 3, 1]]:
            return
    raise AssertionError(f"after {steps} steps: loss {loss.item():.3f}, decoded {found}")
