"""Recurrent layers for training on a CPU: exact, the two directions side by side, weight gradients in one product.

torch's own CPU loop adds the gradient of the recurrent weights step by step, which reads and writes the
whole matrix once a frame, runs the two directions one after the other, and has no cheap way around padding.
Here the loop only carries the state: a step is one product and a few elementwise calls; everything that can
be done for all frames at once is done outside it. With two threads or more each direction has a thread of its
own: a step is too small to be shared between threads, a direction is not. With one thread both directions
take their steps together, as one batched product. Under bf16 autocast the products run in bfloat16 and
states, gates and sums stay in float32.

Shapes: K directions (1 or 2), T time, B batch, D features in, H units, G gates (GRU 3, LSTM 4, else 1).
Time is the outer axis, so that what a step reads and writes lies together. Direction 1 runs on the time-flipped
batch: its padding comes first and leaves the zero state untouched, because the gate that writes is shut
there (see ``_CLOSED``). Gate order and equations are those of torch.nn.GRU, LSTM and RNN.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import List  # TorchScript reads it with every Python

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GATES = {"gru": 3, "lstm": 4, "tanh": 1, "relu": 1}
# Added before the sigmoid on padding frames: far enough out to saturate to exactly 0 or 1 in every float type
_CLOSED = 1.0e4

_sigmoid_grad = torch.ops.aten.sigmoid_backward  # (g, y) -> g * y * (1 - y)
_tanh_grad = torch.ops.aten.tanh_backward  # (g, y) -> g * (1 - y * y)

_helper: tuple[int, ThreadPoolExecutor] | None = None  # of which process, and its one thread


def _second_thread() -> ThreadPoolExecutor:
    """A thread for the second direction, with no threads of its own; a forked process gets its own."""
    global _helper
    if _helper is None or _helper[0] != os.getpid():
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(1, "second-direction")
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # the call above also set what threads yet to come begin with
        _helper = (os.getpid(), pool)
    return _helper[1]


def _side_by_side(run, *arguments: tuple) -> list:
    """``run`` of each of one or two tuples of arguments, at the same time."""
    if len(arguments) == 1:
        return [run(*arguments[0])]
    threads = torch.get_num_threads()
    second = _second_thread().submit(run, *arguments[1])
    torch.set_num_threads(1)  # else the products here would wait for a core that the other direction has
    try:
        first = run(*arguments[0])
    finally:
        second.exception()  # waits: nothing may go on in the background after an error here
        torch.set_num_threads(threads)
    return [first, second.result()]


class _Recurrence(torch.autograd.Function):
    """x (T, B, D), weights stacked over K -> the states of each direction (T, B, H); backward by hand."""

    @staticmethod
    def forward(ctx, kind, x, pad_TB, w_ih, w_hh, b_ih, b_hh, product_dtype):
        K = len(w_ih)
        x16, w_ih16, w_hh16 = x.to(product_dtype), w_ih.to(product_dtype), w_hh.to(product_dtype)
        ways = [(x16, pad_TB), (x16.flip(0), pad_TB.flip(0))][:K]
        apart = [[0], [1]] if K == 2 and torch.get_num_threads() > 1 else [list(range(K))]

        def arguments(ks):
            weights = (w[ks[0] : ks[-1] + 1] for w in (w_ih16, w_hh16, b_ih, b_hh))
            return (kind, [ways[k][0] for k in ks], torch.stack([ways[k][1] for k in ks], dim=1), *weights)

        saved = _side_by_side(_forward, *map(arguments, apart))
        ctx.kind, ctx.apart, ctx.x_dtype = kind, apart, x.dtype
        ctx.save_for_backward(w_ih16, w_hh16, *(way[0] for way in ways), *(t for part in saved for t in part))
        states = [part[1][1:, i] for ks, part in zip(apart, saved) for i in range(len(ks))]
        return tuple(y if k == 0 else y.flip(0) for k, y in enumerate(states))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        w_ih16, w_hh16, *rest = ctx.saved_tensors
        K, apart, wants_dx = len(w_ih16), ctx.apart, ctx.needs_input_grad[1]
        xs, rest = rest[:K], rest[K:]
        each = len(rest) // len(apart)
        dys = [dy if k == 0 else dy.flip(0) for k, dy in enumerate(dys)]

        def arguments(i):
            ks, saved = apart[i], rest[i * each : (i + 1) * each]
            part = slice(ks[0], ks[-1] + 1)
            dy = torch.stack([dys[k] for k in ks], dim=1)
            return (ctx.kind, xs[part], w_ih16[part], w_hh16[part], dy, wants_dx, *saved)

        found = _side_by_side(_backward, *map(arguments, range(len(apart))))
        dxs, *weights = ([g for part in found for g in part[i]] for i in range(5))
        dx = None
        if wants_dx:
            dx = (dxs[0] if K == 1 else dxs[0] + dxs[1].flip(0)).to(ctx.x_dtype)
        return None, dx, None, *map(torch.stack, weights), None


@torch.no_grad()  # which other threads do not inherit
def _forward(kind, xs, pad_TKB, w_ih, w_hh, b_ih, b_hh):
    """K directions: inputs (T, B, D) each to (gates (T, K, B, GH), states (T + 1, K, B, H), what backward needs)."""
    T, K, B = pad_TKB.shape
    H, dtype = w_hh.shape[2], b_ih.dtype
    # every bias joins the input product but that of the GRU's candidate, which its reset gate multiplies
    bias = b_ih + b_hh
    if kind == "gru":
        bias[:, 2 * H :] = b_ih[:, 2 * H :]
    gates = torch.empty(T, K, B, GATES[kind] * H, dtype=dtype, device=b_ih.device)
    for k, x in enumerate(xs):
        torch.add(torch.mm(x.reshape(T * B, -1), w_ih[k].t()).view(T, B, -1), bias[k], out=gates[:, k])
    states = gates.new_zeros(T + 1, K, B, H)
    # what enters the products, in their type
    read = states if w_hh.dtype == dtype else states.to(w_hh.dtype)
    run = {"gru": _gru_forward, "lstm": _lstm_forward}.get(kind, _plain_forward)
    extra = run(kind, gates, states, read, pad_TKB, w_hh.transpose(1, 2), b_hh)
    return gates, states, read, pad_TKB, *extra


@torch.no_grad()
def _backward(kind, xs, w_ih, w_hh, dy_TKBH, wants_dx, gates, states, read, pad_TKB, *extra):
    """Lists over K of dx (T, B, D), dw_ih, dw_hh, db_ih, db_hh; dx entries are None where they are not wanted."""
    T, K, B, H = dy_TKBH.shape
    run = {"gru": _gru_backward, "lstm": _lstm_backward}.get(kind, _plain_backward)
    d_rec, candidate = run(kind, gates, states, pad_TKB, extra, dy_TKBH, w_hh)
    dxs, dw_ihs, dw_hhs, db_ihs, db_hhs = [], [], [], [], []
    for k, x in enumerate(xs):
        rows = d_rec[:, k].reshape(T * B, -1)
        db_hh = rows.sum(0, dtype=gates.dtype)
        db_ih = db_hh.clone()  # one tensor for two parameters would be accumulated into twice
        dw_hhs.append(torch.mm(rows.t(), read[:-1, k].reshape(T * B, H)).to(gates.dtype))
        if candidate is not None:
            # the GRU's candidate sees its input outside the reset gate and its state inside
            db_ih[2 * H :] = candidate[:, k].sum((0, 1))
            rows.view(T, B, -1)[..., 2 * H :] = candidate[:, k]
        dw_ihs.append(torch.mm(rows.t(), x.reshape(T * B, -1)).to(gates.dtype))
        dxs.append(torch.mm(rows, w_ih[k]).view(x.shape) if wants_dx else None)
        db_ihs.append(db_ih)
        db_hhs.append(db_hh)
    return dxs, dw_ihs, dw_hhs, db_ihs, db_hhs


def _scripted(function):
    """A loop as a TorchScript function: as Python, two threads would wait for each other between its steps.

    With two threads the recipe's DeepSpeech2 trains 1.2 times as fast for it. torch.compile, which torch names
    as the successor, needs a C++ compiler on the user's machine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


@torch.no_grad()
def _for_steps(w_KIO: Tensor, rows: int) -> tuple[list[Tensor], bool]:
    """The matrices (I, O) of K directions, as `_products` takes them, and whether they are packed.

    oneDNN multiplies in bfloat16 only what lies in an order of its own. Given a plain matrix it puts it there first,
    at every step of the loop: with 10 rows of 320 units that is a quarter of the product's time.
    """
    if w_KIO.dtype == torch.bfloat16 and PACKS:
        return [torch.ops.mkldnn._reorder_linear_weight(w.t().contiguous(), rows) for w in w_KIO], True
    return list(w_KIO), False


def _packs() -> bool:
    """Whether this torch and this processor have oneDNN's packed products; they are not part of torch's public API."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and all(
            hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
        )
    except (AttributeError, RuntimeError):
        return False


PACKS = _packs()


def _packed_product(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def _plain_product(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w)


# TorchScript would not compile a call of what this torch does not have
_product = _scripted(_packed_product if PACKS else _plain_product)


@_scripted
def _products(x: Tensor, w: List[Tensor], packed: bool, out: Tensor):
    """x (K, B, I) with the matrices of `_for_steps` into out (K, B, O), which may be of a wider type."""
    for k in range(len(w)):
        # widened at once: an addition of mixed types is three times as slow as the conversion and a plain one
        if packed:
            out[k].copy_(_product(x[k], w[k]))
        elif x.dtype == out.dtype:
            torch.mm(x[k], w[k], out=out[k])
        else:
            out[k].copy_(torch.mm(x[k], w[k]))


@_scripted
def _gru_steps(
    gates: Tensor, states: Tensor, read: Tensor, q: Tensor, w: List[Tensor], packed: bool, b_n: Tensor
):
    H = states.size(3)
    rec = torch.empty_like(gates[0])
    for t in range(gates.size(0)):
        g = gates[t]
        _products(read[t], w, packed, rec)
        g.narrow(2, 0, 2 * H).add_(rec.narrow(2, 0, 2 * H)).sigmoid_()
        from_state = q[t]
        torch.add(rec.narrow(2, 2 * H, H), b_n, out=from_state)
        n = g.narrow(2, 2 * H, H)
        n.addcmul_(g.narrow(2, 0, H), from_state).tanh_()
        h = states[t + 1]
        torch.lerp(n, states[t], g.narrow(2, H, H), out=h)
        read[t + 1].copy_(h)


@_scripted
def _gru_steps_back(
    d_state: Tensor, d_rec: Tensor, factor: Tensor, z: Tensor, dy: Tensor, w: List[Tensor], packed: bool
):
    T, K, B, H = d_state.size(0), d_state.size(1), d_state.size(2), d_state.size(3)
    carry = torch.zeros_like(d_state[0])
    for i in range(T):
        t = T - 1 - i
        dh, d = d_state[t], d_rec[t]
        torch.add(carry, dy[t], out=dh)
        torch.mul(dh.to(factor.dtype).unsqueeze(2), factor[t], out=d)
        _products(d.view(K, B, 3 * H), w, packed, carry)
        carry.addcmul_(dh, z[t])


def _gru_forward(kind, gates, states, read, pad_TKB, w, b_hh):
    H = states.shape[-1]
    gates[..., H : 2 * H][pad_TKB] = _CLOSED  # z = 1: the state stays as it is
    from_state = torch.empty_like(states[1:])  # the state's part of the candidate, before the reset gate
    _gru_steps(gates, states, read, from_state, *_for_steps(w, states.shape[2]), b_hh[:, None, 2 * H :])
    return (from_state,)


def _gru_backward(kind, gates, states, pad_TKB, extra, dy, w_hh):
    (q,) = extra
    T, K, B, H = q.shape
    r, z, n = gates.split(H, dim=-1)
    d_candidate = _tanh_grad(1 - z, n)
    factor = torch.empty(T, K, B, 3, H, dtype=w_hh.dtype, device=gates.device)
    factor[..., 0, :] = _sigmoid_grad(d_candidate * q, r)
    factor[..., 1, :] = _sigmoid_grad(states[:-1] - n, z)
    factor[..., 2, :] = d_candidate * r
    d_rec, d_state = torch.empty_like(factor), torch.empty_like(q)
    _gru_steps_back(d_state, d_rec, factor, z, dy, *_for_steps(w_hh, B))
    return d_rec.view(T, K, B, 3 * H), d_candidate.mul_(d_state)


@_scripted
def _lstm_steps(
    gates: Tensor, states: Tensor, read: Tensor, cells: Tensor, squashed: Tensor, w: List[Tensor], packed: bool
):
    H = states.size(3)
    rec = torch.empty_like(gates[0])
    for t in range(gates.size(0)):
        g, c, h = gates[t], cells[t + 1], states[t + 1]
        _products(read[t], w, packed, rec)
        g.add_(rec)
        g.narrow(2, 0, 2 * H).sigmoid_()
        g.narrow(2, 2 * H, H).tanh_()
        g.narrow(2, 3 * H, H).sigmoid_()
        torch.mul(g.narrow(2, H, H), cells[t], out=c)
        c.addcmul_(g.narrow(2, 0, H), g.narrow(2, 2 * H, H))
        torch.tanh(c, out=squashed[t])
        torch.mul(g.narrow(2, 3 * H, H), squashed[t], out=h)
        read[t + 1].copy_(h)


@_scripted
def _lstm_steps_back(
    d_rec: Tensor, to_gates: Tensor, to_cell: Tensor, to_out: Tensor, f: Tensor, dy: Tensor, w: List[Tensor],
    packed: bool,
):
    T, K, B, H = dy.size(0), dy.size(1), dy.size(2), dy.size(3)
    dh = torch.zeros_like(to_cell[0])
    dc = torch.zeros_like(dh)
    for i in range(T):
        t = T - 1 - i
        d = d_rec[t]
        dh.add_(dy[t])
        dc = torch.addcmul(dc, dh, to_cell[t])
        torch.mul(dc.to(d.dtype).unsqueeze(2), to_gates[t], out=d.narrow(2, 0, 3))
        d.select(2, 3).copy_(dh * to_out[t])
        dc = dc * f[t]
        _products(d.view(K, B, 4 * H), w, packed, dh)


def _lstm_forward(kind, gates, states, read, pad_TKB, w, b_hh):
    H = states.shape[-1]
    gates[..., :H][pad_TKB] = -_CLOSED  # i = 0: nothing is written to the cell
    cells, squashed = torch.zeros_like(states), torch.empty_like(states[1:])
    _lstm_steps(gates, states, read, cells, squashed, *_for_steps(w, states.shape[2]))
    return cells, squashed


def _lstm_backward(kind, gates, states, pad_TKB, extra, dy, w_hh):
    cells, t = extra
    T, K, B, H = t.shape
    i, f, g, o = gates.split(H, dim=-1)
    to_gates = torch.empty(T, K, B, 3, H, dtype=w_hh.dtype, device=gates.device)
    to_gates[..., 0, :] = _sigmoid_grad(g, i)
    to_gates[..., 1, :] = _sigmoid_grad(cells[:-1], f)
    to_gates[..., 2, :] = _tanh_grad(i, g)
    d_rec = torch.empty(T, K, B, 4, H, dtype=w_hh.dtype, device=gates.device)
    _lstm_steps_back(d_rec, to_gates, _tanh_grad(o, t), _sigmoid_grad(t, o), f, dy, *_for_steps(w_hh, B))
    return d_rec.view(T, K, B, 4 * H), None


def _plain_forward(kind, gates, states, read, pad_TKB, w, b_hh):
    keep = (~pad_TKB)[..., None].to(gates.dtype)
    squash = torch.Tensor.tanh_ if kind == "tanh" else torch.Tensor.relu_
    for h16, h16_new, h_new, g, k in zip(read[:-1], read[1:], states[1:], gates, keep):
        torch.mul(squash(g.add_(torch.bmm(h16, w).to(g.dtype))), k, out=h_new)
        h16_new.copy_(h_new)
    return ()


def _plain_backward(kind, gates, states, pad_TKB, extra, dy, w_hh):
    # gates hold the states before padding was zeroed
    factor = _tanh_grad(torch.ones_like(gates), gates) if kind == "tanh" else (gates > 0).to(gates.dtype)
    factor[pad_TKB] = 0.0
    d_rec = torch.empty_like(factor, dtype=w_hh.dtype)
    carry = torch.zeros_like(factor[0])
    for y, f, d in zip(*(reversed(x) for x in map(list, (dy, factor, d_rec)))):
        d.copy_((carry + y) * f)
        carry = torch.bmm(d, w_hh).to(gates.dtype)
    return d_rec, None


def recurrence(kind: str, x_BTD: Tensor, mask_BT: Tensor, weights: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Run one or two directions over a padded batch.

    Args:
        kind: ``gru``, ``lstm``, ``tanh`` or ``relu``.
        x_BTD: input (B, T, D); what stands on padding frames must be finite and does not matter.
        mask_BT: True on valid frames.
        weights: for each direction (w_ih, w_hh, b_ih, b_hh) as torch.nn has them; the second runs backward.

    Returns: the states of each direction, (B, T, H), of no meaning on padding frames.
    """
    autocast = torch.is_autocast_enabled("cpu")
    product_dtype = torch.get_autocast_dtype("cpu") if autocast else weights[0][0].dtype
    with torch.autocast("cpu", enabled=False):
        stacked = [torch.stack(w) for w in zip(*weights)]
        ys = _Recurrence.apply(kind, x_BTD.transpose(0, 1), ~mask_BT.t(), *stacked, product_dtype)
        return [y.transpose(0, 1) for y in ys]
