"""Runs of which only text logs are left: their curve is read from what was printed."""

import pytest

from tests.tools.doctor.test_runs_of_others import explain, logged, losses
from tools.doctor.explain import read_run


def bars(epochs, loss, batches=81, rest="") -> str:
    """What Lightning's bar leaves in a file: states of an epoch apart by carriage returns."""
    return "".join(
        "\r".join(f"Epoch {e}:  45%|####      | {b}/{batches} [00:18<00:22,  1.9it/s, v_num=0, "
                  f"train_loss={loss(e * batches + b)}{rest}]" for b in (1, 37, batches)) + "\n" for e in epochs)


@pytest.mark.parametrize("text, step, place", [
    (bars(range(9), lambda s: "nan.0" if s >= 442 else 171.5), 442, "epoch 5, batch 37 of 81"),
    ("Epoch 5/9 ━━━━ 37/81 0:00:18 • 0:00:22 1.90it/s v_num: 0.000 train_loss: nan\n" * 2, 442,
     "epoch 5, batch 37 of 81"),
    ("".join(f"epoch {s // 81} step {s} train_loss {171 if s < 246 else 'nan'} val_wer 1.0\n"
             for s in range(82, 400, 41)), 246, "epoch 3"),
    ("".join(f"{{'loss': {2.5 if k < 4 else 'nan'}, 'epoch': {k}}}\n" for k in range(8)), 5, "epoch 4"),
])
def test_a_loss_that_was_only_printed_is_read(tmp_path, text, step, place):
    (tmp_path / "train.log").write_text("[NeMo I 2026-11-10 10:00:00 wer:318] loss: default\n" + text)
    report = explain(tmp_path)
    first = report.findings[0]
    assert (report.exit_code, first.id, first.evidence["first at step"]) == (1, "run-nan", step)
    assert place in first.symptom
    assert not {"explodes", "lr-too-high", "run-plateau"} & {*report.ruled_out}  # of which the log says nothing


def test_the_last_validation_that_a_bar_shows_is_of_the_epoch_before(tmp_path):
    (tmp_path / "train.log").write_text(bars(range(1), lambda s: 90.0) + bars(
        range(1, 3), lambda s: 80.0, rest=", val_loss=1.2e+2, val_wer=0.500"))
    trace = read_run(tmp_path)
    assert trace.get("val_loss") == [(81, 120.0), (162, 120.0), (243, 120.0)] and trace.last_step == 243
    assert [s for s, _ in trace.get("loss")] == [1, 37, 81, 82, 118, 162, 163, 199, 243]
    logged(tmp_path / "metrics.csv", losses(range(10, 100, 10)))
    assert [s for s, _ in read_run(tmp_path).get("loss")] == [*range(10, 100, 10)]  # a curve is surer


@pytest.mark.parametrize("said, epochs, weight", [("", 40, "prevents"), ("", 12, "warning"), ("", 2, None),
                                                  ("the", 40, None)])
def test_hypotheses_in_nemos_log_that_stay_empty(tmp_path, said, epochs, weight):
    prefix = "[NeMo I 2026-11-10 10:00:31 wer:320] WER "
    (tmp_path / "nemo_log.txt").write_text("".join(
        bars([e], lambda s: 171.0) + f"{prefix}reference:ben lost it\n{prefix}predicted:{said}\n" * 4
        for e in range(epochs)))
    found = [f.weight for f in explain(tmp_path).findings if f.id == "run-collapse-blank"]
    assert found == [weight] * (weight is not None)


@pytest.mark.parametrize("wer, steps, weights", [(1.0, 40, ["warning"]), (0.9, 40, []), (1.0, 8, [])])
def test_a_loss_without_unit_whose_validations_have_no_word_right(tmp_path, wer, steps, weights):
    (tmp_path / "train.log").write_text("".join(
        f"epoch {k} step {81 * k} train_loss 171 val_wer {wer}\n" for k in range(1, steps + 1)))
    assert [f.weight for f in explain(tmp_path).findings if f.id == "run-plateau"] == weights


def test_a_folder_of_which_nothing_can_be_read_is_not_healthy(tmp_path):
    (tmp_path / "train.log").write_text("GPU available: False\nTrainable params: 3.1 M\n")
    report = explain(tmp_path)
    assert report.exit_code == 2 and "no loss, hypothesis or error" in report.verdict
    assert not {"run-nan", "explodes", "lr-too-high", "run-ended"} & {*report.ruled_out}
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-1" / "run-1.wandb").write_bytes(b"\x00\x01")
    report = explain(tmp_path)
    assert report.exit_code == 2 and "W&B's binary file" in report.verdict
    assert report.findings[0].fix[0].startswith("wandb sync ")
    logged(tmp_path / "metrics.csv", [{"_step": s, "train_loss": 40.0} for s in range(10, 600, 10)])  # as exported
    assert explain(tmp_path).exit_code == 0 and read_run(tmp_path).last_step == 590
