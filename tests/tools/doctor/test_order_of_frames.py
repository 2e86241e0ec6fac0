"""Frames out of order among neighbours or inside the model, attention without positions, and layers that are alike."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

from tests.tools.doctor.test_model_probes import WIDTH, Around, after, assert_named_first, edited, probe, recurrent, stock


def unfolded(y, n, chunk: int = 16):
    """Chunks of (B, D, T) by unfold, whose features are taken for frames."""
    x = F.pad(y, (0, -y.shape[2] % chunk)).transpose(1, 2)
    return x.unfold(1, chunk, chunk).reshape(x.shape)[:, : y.shape[2]].transpose(1, 2), n


def halved(double):
    """Half the frames through a layer, as many again by `double` (B, T / 2, D), and a shortcut around both."""
    def make():
        model = stock()

        def change(self, x, n):
            y, n = self.inner(audio_signal=x, length=n)
            half = F.avg_pool1d(F.pad(y, (0, y.shape[2] % 2)), 2).transpose(1, 2)
            return y + self.restore(double(half))[:, : y.shape[2]].transpose(1, 2), n

        model.encoder = Around(model, change)
        model.encoder.restore = nn.Linear(WIDTH, WIDTH)
        return model

    return make


def backwards(turned: bool):
    """A recurrence that meets the end first, beside a shortcut; turned round after it or not."""
    def make():
        model = recurrent(batch_first=True)()

        def step(y, n):
            back = model.encoder.rnn(y.transpose(1, 2).flip(1))[0].transpose(1, 2)
            return y + (back.flip(2) if turned else back), n

        model.encoder.step = step
        return model

    return make


class Attention(nn.Module):
    """Four frames side by side and layers of attention: without positions, with them, or one frame by one."""

    def __init__(self, positions: bool = False, mixes: bool = True):
        super().__init__()
        self._feat_in, self.mixes = WIDTH, mixes
        self.inp = nn.Linear(4 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, 0.0, batch_first=True) for _ in "ab")
        self.register_buffer("positions", torch.randn(1, 2000, WIDTH) * positions)

    def forward(self, audio_signal, length):
        x = F.pad(audio_signal, (0, -audio_signal.shape[2] % 4)).transpose(1, 2)
        x, length = self.inp(x.reshape(len(x), -1, 4 * WIDTH)), (length + 3) // 4
        x = x + self.positions[:, : x.shape[1]]
        padding = torch.arange(x.shape[1])[None] >= length[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding) if self.mixes else layer.linear1(x).relu()
        return x.transpose(1, 2), length


def with_encoder(**kwargs):
    def make():
        model = stock()
        model.encoder = Attention(**kwargs)
        return model

    return make


def constant(count):
    """The first `count` convolutions with weights all alike."""
    def edit(model):
        for module in [m for m in model.encoder.modules() if isinstance(m, nn.Conv1d)][:count]:
            nn.init.constant_(module.weight, 0.01)

    return edit


def one_layer_twice(model):
    model.encoder.layers = nn.ModuleList([model.encoder.layers[0]] * 2)


def last_layer_of_zeros(model):
    nn.init.zeros_(model.encoder.layers[0].conv.pointwise_conv2.weight)


FAULTS = {
    "chunks unfolded": ("time-scrambled", after(unfolded)),
    "repeated for interleaved": ("time-scrambled", halved(lambda y: y.repeat(1, 2, 1))),
    "a recurrence not turned back": ("time-scrambled", backwards(turned=False)),
    "no positions": ("order-unknown", with_encoder()),
    "one layer twice": ("layers-shared", edited(one_layer_twice)),
    "constant weights": ("channels-alike", edited(constant(None), encoder="conv")),
}
RIGHT = {
    "up-sampled": halved(lambda y: y.repeat_interleave(2, 1)),
    "a recurrence turned back": backwards(turned=True),
    "positions": with_encoder(positions=True),
    "frame by frame": with_encoder(mixes=False),
    "a last layer of zeros": edited(last_layer_of_zeros),
    "one constant layer": edited(constant(1), encoder="conv"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_named_first(name):
    assert_named_first(*FAULTS[name])


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_like_it_and_is_right(name):
    report = probe(RIGHT[name](), ["locality", "neighbours", "gradients", "weights"])
    assert {"time-scrambled", "order-unknown", "channels-alike", "layers-shared"} <= set(report.ruled_out), report


def test_the_padding_that_a_module_carries_to_other_times_is_its_effect():
    report = probe(FAULTS["repeated for interleaved"][1](), ["locality", "neighbours", "invariance"])
    assert report.findings[0].where == "encoder.restore"
    assert [(f.id, f.weight) for f in report.findings if f.id == "padding-leak"] == [("padding-leak", "note")]


def test_rounding_is_among_the_causes_of_no_gradient():
    rounded = after(lambda y, n: ((16 * y).round() / 16, n))
    found = probe(rounded(), ["gradients"]).findings[0]
    assert found.id == "no-gradient" and "straight-through" in found.fix[0]


def test_outputs_that_do_not_change_in_time_are_not_those_of_other_audio():
    pooled = after(lambda y, n: (y.mean(2, keepdim=True).expand_as(y), n))
    report = probe(pooled(), ["loss", "locality", "neighbours"])
    assert report.ids == ["time-scrambled"] and "loss-wrong" in report.ruled_out
