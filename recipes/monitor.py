"""What a run shows and keeps while it trains: the live line, curve.csv, checkpoints between validations, wandb media.

Everything here watches; nothing changes what is learned.
"""

from __future__ import annotations

import csv
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.threads import give_back_memory

COLUMNS = [
    "step", "seconds", "loss", "loss_per_char", "blank_rate", "learning_rate", "grad_norm",
    "audio_seconds_per_second", "memory_mb", "val_loss", "val_wer", "val_cer", "val_blank_rate",
]


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    seconds = max(int(seconds), 0)
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress(Callback):
    """Prints one line a person can read every few seconds, and a row of curve.csv every `every_n_steps` steps.

    A resumed run goes on in the same curve.csv: rows after the checkpoint's step are dropped, `seconds` counts
    training time over all sittings.
    """

    def __init__(self, folder: Path, every_n_steps: int = 10, every_seconds: float = 10.0):
        self.path = Path(folder) / "curve.csv"
        self.every_n_steps, self.every_seconds = every_n_steps, every_seconds
        self.seconds = 0.0  # of training, over all sittings
        self.validation: dict[str, float] = {}
        self.rows: list[dict] = []
        # Read now: exp_manager moves the files of an earlier sitting to run_0, run_1, ... before training starts.
        self._earlier: list[dict] = []
        try:
            with open(self.path, newline="") as file:
                self._earlier = [row for row in csv.DictReader(file) if row["step"]]
        except FileNotFoundError:  # a first sitting; or the first process has moved it already, which alone needs it
            pass
        self._mark = self._printed = None
        self._since: dict | None = None

    def state_dict(self):
        return {"seconds": self.seconds, "validation": self.validation}

    def load_state_dict(self, state):
        self.seconds, self.validation = state["seconds"], state["validation"]

    def restore(self) -> None:
        """Puts an earlier sitting's curve.csv back where exp_manager has moved it away."""
        if self._earlier and not self.path.is_file():
            self.rows = self._earlier
            self._write()

    def on_train_start(self, trainer, model):
        self.rows = []
        if trainer.global_step:
            self.rows = [row for row in self._earlier if int(row["step"]) <= trainer.global_step]
        if trainer.is_global_zero:
            self._write()
            if trainer.global_step:
                print(f"resumed at step {trainer.global_step} of {trainer.max_steps}", flush=True)
        self._mark = self._printed = time.perf_counter()
        self._begin = (self.seconds, trainer.global_step)
        self._step = trainer.global_step
        self._reset()

    def _reset(self):
        self._sums = {"loss": 0.0, "loss_per_char": 0.0, "blank_rate": 0.0, "audio": 0.0}
        self._finite, self._started = 0, time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        stats = model.step_stats
        # Sums stay on the device: fetching each number would wait for the GPU at each step. A skipped batch is named in
        # the log; it must not hide the loss of the others in its row.
        finite = torch.isfinite(stats.loss)
        for key, value in (
            ("loss", stats.loss), ("loss_per_char", stats.loss_per_char), ("blank_rate", stats.blank_rate),
        ):
            self._sums[key] = self._sums[key] + torch.where(finite, value, 0.0)
        self._sums["audio"] = self._sums["audio"] + stats.audio_seconds
        self._finite = self._finite + finite
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:  # a batch of several that make a step
            return
        if step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates what the last step has left, wherever it falls
        if not trainer.is_global_zero or step % self.every_n_steps and step < trainer.max_steps:
            return
        took = max(now - self._started, 1e-9)
        finite_steps = int(self._finite) or float("nan")
        row = {
            "step": step,
            "seconds": round(self.seconds, 2),
            "loss": round(float(self._sums["loss"]) / finite_steps, 5),
            "loss_per_char": round(float(self._sums["loss_per_char"]) / finite_steps, 5),
            "blank_rate": round(float(self._sums["blank_rate"]) / finite_steps, 4),
            "learning_rate": f"{trainer.optimizers[0].param_groups[0]['lr']:.4g}",
            "grad_norm": f"{float(stats.grad_norm):.4g}",
            "audio_seconds_per_second": round(float(self._sums["audio"]) / took * trainer.world_size, 1),
            "memory_mb": round(memory_mb(model.device)),
        }
        self._append(row)
        self._reset()
        if now - self._printed >= self.every_seconds or step >= trainer.max_steps:
            self._printed = now
            begin_seconds, begin_step = self._begin
            left = (self.seconds - begin_seconds) / max(step - begin_step, 1) * (trainer.max_steps - step)
            wer = f"{self.validation['val_wer']:.1%}" if self.validation else "-"
            print(
                f"step {step}/{trainer.max_steps}  loss {row['loss_per_char']:.3f} a {model.unit}  val WER {wer}  "
                f"blank {row['blank_rate']:.0%}  lr {row['learning_rate']}  grad {row['grad_norm']}  "
                f"{row['audio_seconds_per_second']:.0f} s audio/s  left {clock(left)}",
                flush=True,
            )

    def on_validation_start(self, trainer, model):
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer, model):
        if trainer.sanity_checking or self._mark is None:
            return
        # Validation counts as training time in `seconds` (a user waits for it) but not in the throughput.
        self._started += time.perf_counter() - self._paused
        give_back_memory()
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self.validation = metrics
        if trainer.is_global_zero:
            now = time.perf_counter()
            row = {"step": trainer.global_step, "seconds": round(self.seconds + now - self._mark, 2)}
            self._append({**row, **{key: round(value, 5) for key, value in metrics.items()}})
            print(
                f"step {trainer.global_step}  validation: loss {metrics['val_loss']:.3f} a {model.unit}, "
                f"WER {metrics['val_wer']:.1%}, CER {metrics['val_cer']:.1%}, blank {metrics['val_blank_rate']:.0%}, "
                f"after {clock(row['seconds'])}",
                flush=True,
            )
            for row_, reference, hypothesis in model.validation_examples[:1]:
                print(f"    reference   {reference}\n    hypothesis  {hypothesis}", flush=True)

    def _append(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the device on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class SaveLast(Callback):
    """Keeps the `-last` checkpoint fresh between validations, and saves it when SIGTERM or Ctrl-C asks the run to end.

    A second Ctrl-C ends it at once. All devices decide together, in the step in which one of them was asked, so none
    waits for another.
    """

    def __init__(self, every_seconds: float = 300.0):
        self.every_seconds = every_seconds
        self._asked = False
        self._interrupt = None  # the handler of SIGINT before the training

    def on_train_start(self, trainer, model):
        self._saved, self._step = time.perf_counter(), trainer.global_step
        model.end_requested = lambda: self._asked

        process = os.getpid()

        def ask(signum, frame):
            if os.getpid() != process:  # a loader's worker has inherited this: it goes on reading until it is ended
                return
            self._asked = True
            launcher = trainer.strategy.launcher
            if signum == signal.SIGINT:  # a terminal sends it to all processes itself
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if trainer.is_global_zero:
                    os.write(2, b"\nsaves after this step and ends; Ctrl-C again ends at once, without saving\n")
            elif launcher is not None and trainer.is_global_zero:
                launcher.kill(signum)  # the processes that this one started get no signal of their own

        # Lightning's own handlers would end the run at this step without a checkpoint.
        signal.signal(signal.SIGTERM, ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as run.sh leaves it, which sends SIGTERM for it
            self._interrupt = signal.signal(signal.SIGINT, ask)

    def on_train_end(self, trainer, model):
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)

    def on_exception(self, trainer, model, exception):
        self.on_train_end(trainer, model)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:  # in the middle of a step of several batches, whose gradients no checkpoint holds
            return
        end = model.end_agreed
        due = False
        if step % 20 == 0:
            due = bool(trainer.strategy.broadcast(time.perf_counter() - self._saved > self.every_seconds))
        if not (end or due):
            return
        self._saved = time.perf_counter()
        save_last(trainer)
        if end:
            if trainer.is_global_zero:
                print(f"asked to end: saved at step {step}; the same command goes on from here", flush=True)
            trainer._signal_connector.received_sigterm = True  # Lightning now ends the run on every device


def save_last(trainer) -> None:
    """Writes exp_manager's `-last` checkpoint in the middle of an epoch."""
    checkpoint = next(c for c in trainer.callbacks if isinstance(c, ModelCheckpoint))
    # In this hook Lightning has not yet counted the batch that was just trained on.
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for count in (progress.current, progress.total):
        count.completed += 1
    checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    for count in (progress.current, progress.total):
        count.completed -= 1


class WandbMedia(Callback):
    """Predictions, audio and spectrograms of a few fixed utterances, at each validation, where wandb is on."""

    def __init__(self, utterances: int = 4):
        self.utterances = utterances

    def on_validation_end(self, trainer, model):
        from lightning.pytorch.loggers import WandbLogger

        logger = next((x for x in trainer.loggers if isinstance(x, WandbLogger)), None)
        if logger is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        import wandb

        from recipes.data import read_audio

        rate = model.preprocessor._sample_rate
        examples = model.validation_examples[: self.utterances]
        table = wandb.Table(columns=["utterance", "reference", "hypothesis"])
        media = {}
        for row, reference, hypothesis in examples:
            name = str(row.get("utterance") or Path(row["audio_filepath"]).stem)
            table.add_data(name, reference, hypothesis)
            if not getattr(self, "_sounds_sent", False):
                samples = read_audio(row, rate)
                media[f"audio/{name}"] = wandb.Audio(samples, sample_rate=rate, caption=reference)
                media[f"spectrogram/{name}"] = wandb.Image(_spectrogram(model, samples), caption=name)
        self._sounds_sent = True
        logger.experiment.log({"predictions": table, **media, "trainer/global_step": trainer.global_step})


def _spectrogram(model, samples):
    """Features of one utterance as an image, low frequencies at the bottom, values 0 to 255."""
    with torch.inference_mode():
        audio = torch.from_numpy(samples)[None].to(model.device)
        features, _ = model.preprocessor(input_signal=audio, length=torch.tensor([len(samples)], device=model.device))
    image = features[0].float().cpu().flip(0)
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return (image * 255).byte().numpy()
