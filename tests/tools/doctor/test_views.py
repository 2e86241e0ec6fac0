"""The callback, and explain, on runs whose steps train on two views of a batch, at other tempi, from kept features."""

import logging
import math
import warnings

import pytest

torch = pytest.importorskip("torch")

from tests.tools.doctor.healthy.after_two_views import SWITCHES
from tests.tools.doctor.setups import tones
from tests.tools.doctor.setups.runs import compose, train_recipe
from tools.doctor.callback import Doctor
from tools.doctor.delivered import Delivered
from tools.doctor.engine import examine
from tools.doctor.run import slow_data
from tools.doctor.trace import Trace
from tools.doctor.utterances import views

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A short run of our Conformer with all of it; (folder, callback)."""
    folder = tmp_path_factory.mktemp("views")
    doctor = Doctor(folder=folder / "run", every_n_steps=2)
    cfg = compose("conformer", tones.manifests(folder), folder / "run", "trainer.max_steps=30", *SWITCHES)
    train_recipe(cfg, folder / "run", [doctor])
    assert not (folder / "run" / "error.txt").exists()
    return folder / "run", doctor


def test_a_healthy_start_has_no_warning_of_its_own(watched):
    report = watched[1].report()
    assert [f.id for f in report.findings if f.weight != "note"] == [], report.findings
    assert {"no-gradient", "not-in-optimizer", "infinite-loss-hidden"} - set(report.ruled_out) <= {"not-in-optimizer"}
    assert any(line.startswith("loader: text and audio") for line in report.examined)  # from features, of two views


def test_each_utterance_is_counted_once(watched):
    trace, rows = watched[1].trace, 96
    passes = 30 / math.ceil(rows / 18)  # some 18 utterances a batch of 32 s
    assert 0.7 * passes * rows < trace.utterances_seen < 1.4 * passes * rows


def test_explain_has_nothing_against_it_either(watched):
    report = examine(run=str(watched[0]), families=["run", "metrics", "schedule", "limits"])
    assert report.exit_code == 0
    assert {f.id for f in report.findings if f.weight == "warning"} <= {"batch-size"}  # 96 utterances are few


def test_the_module_that_gives_nan_is_named_from_kept_features(tmp_path):
    """The batch holds features: it is computed again from them."""
    from recipes.conformer.encoder import ConformerEncoder

    def broken(module, given, output):
        return output * math.nan if doctor.trace.last_step >= 6 else output

    doctor = Doctor(folder=tmp_path / "run", every_n_steps=2, probe=False)
    cfg = compose("conformer", tones.manifests(tmp_path), tmp_path / "run", "trainer.max_steps=30", *SWITCHES)
    made = ConformerEncoder.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.layers[1].ff1.register_forward_hook(broken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConformerEncoder, "__init__", init)
        train_recipe(cfg, tmp_path / "run", [doctor], checkpoint=False)
    bad = doctor.trace.bad
    assert bad.origin == "forward" and bad.module.startswith("encoder.layers.1.ff1"), bad
    assert len(bad.utterances) < 30 and all(name.startswith("train-") for name in bad.utterances)


def test_views_are_counted_by_the_batch():
    audio, features = torch.zeros(4, 100), torch.zeros(4, 80, 10)
    assert [views((audio,), n) for n in (4, 8, 12, 6)] == [1, 2, 3, 1] and views((features,), 8) == 2
    assert views({"audio": audio}, 8) == 1 and views((), 8) == 1 and views(([1, 2],), 4) == 1


def test_features_and_further_views_are_delivered_rows(tmp_path):
    import json

    rows = [{"audio_filepath": "a", "duration": 1 + 0.1 * k, "text": f"words {k % 3} {k * chr(97)}"} for k in range(24)]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = torch.tensor([round(row["duration"] * 100) + 1 for row in rows])
    texts = [row["text"] for row in rows]
    for given, features in ((texts, lengths), (texts * 2, lengths)):
        seen = Delivered([str(tmp_path / "train.json")], 16000, 100.0)
        seen.add((torch.zeros(24, 4, 5), features, None, None), given)
        assert seen.rows == 24 and seen.judge() == []
    seen = Delivered([str(tmp_path / "train.json")], 16000, 100.0)
    seen.add((torch.zeros(24, 4, 5), lengths.sort().values.flip(0), None, None), texts * 2)
    assert [f.id for f in seen.judge()] == ["data-mismatched-text"]


def test_the_wait_for_features_of_a_first_pass_is_no_slow_disk():
    from tools.doctor.configs import Settings

    def trace(waits, cached):
        settings = Settings.__new__(Settings)
        settings.get = {"model.train_ds.cache_features": cached, "model.train_ds.num_workers": 2}.get
        settings.key = lambda key: key
        return Trace(settings=settings, series={"wait": [(10 * k, wait) for k, wait in enumerate(waits)]})

    first_pass, all_passes = [0.6] * 5 + [0.01] * 5, [0.6] * 10
    assert slow_data(trace(first_pass, True)) == []
    [slow] = slow_data(trace(all_passes, True))
    assert slow.weight == "note" and "first pass" in slow.cause and "num_workers" not in " ".join(slow.fix)
    assert slow_data(trace(first_pass, False))[0].weight == "warning"
