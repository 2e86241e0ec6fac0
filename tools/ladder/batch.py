"""The first rung: one batch, in this process and without the training loop around it.

`fit`    every target must fit into the frames that the model puts out: T_out >= S + adjacent repeats.
`batch`  eight utterances are learned by heart, to WER 0. A model that cannot do this has a fault in the model,
         the targets or the loss; more data and more patience will not help it.

Without SpecAugment, dropout and dither, which make learning by heart slower and are not what is examined.
"""

from __future__ import annotations

import time

from recipes.quiet import quiet_nemo
from tools.ladder.rungs import LONGEST, SHORTEST

UTTERANCES = 8


class RungFailed(RuntimeError):
    """A rung that was not climbed. The message says what was reached and what that means."""


def without_regularisation(cfg):
    """The configuration with every dropout at 0 and no SpecAugment or dither."""
    from omegaconf import open_dict

    with open_dict(cfg):
        cfg.model.spec_augment = None
        cfg.model.preprocessor.dither = 0.0
        cfg.init_from = None
        for key in cfg.model.encoder:
            if key.startswith("dropout"):
                cfg.model.encoder[key] = 0.0
    return cfg


def check_fit(model, rows: list[dict]) -> dict:
    """Counts the utterances whose CTC loss would be infinite, with the model's own length function."""
    import torch

    from recipes.lengths import adjacent_repeats

    encode, rate = model.text_encoder(), model.preprocessor._sample_rate
    samples = torch.tensor([int(row["duration"] * rate) for row in rows])
    frames = model.encoder.output_lengths(model.preprocessor.featurizer.get_seq_len(samples).long())
    worst, infeasible = 0.0, []
    for row, room in zip(rows, frames.tolist()):
        target = torch.tensor([encode(row["text"])])
        need = target.shape[1] + int(adjacent_repeats(target, torch.tensor([target.shape[1]])))
        worst = max(worst, need / max(room, 1))
        if need > room:
            infeasible.append(str(row.get("utterance", row["audio_filepath"])))
    return {"utterances": len(rows), "infeasible": len(infeasible), "examples": infeasible[:10],
            "tightest": round(worst, 3)}


def choose(rows: list[dict], count: int = UTTERANCES) -> list[dict]:
    """`count` utterances spread over the manifest, of 2 to 8 seconds where there are enough such."""
    short = [row for row in rows if SHORTEST <= row["duration"] <= LONGEST]
    pool = short if len(short) >= count else sorted(rows, key=lambda row: row["duration"])[:count]
    count = min(count, len(pool))
    return [pool[i * len(pool) // count] for i in range(count)]


def learn_by_heart(model, rows: list[dict], lr: float, max_steps: int, device="cpu") -> dict:
    """Trains on one batch until its greedy WER is 0; returns steps, seconds, loss and the transcripts.

    AdamW with a short warm-up and a constant rate after it. Raises RungFailed after `max_steps`, or at once where
    the loss is not finite.
    """
    import torch

    from recipes.data import manifest_loader
    from recipes.metrics import count_errors

    loader = manifest_loader(rows, model.preprocessor._sample_rate, model.text_encoder(), batch_seconds=1e9)
    (audio_BT, audio_lengths, targets_BS, target_lengths, ids), positions = next(iter(loader))
    references = [rows[p]["text"] for p in positions]
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 25, 1.0))
    signal = {"input_signal": audio_BT.to(device), "input_signal_length": audio_lengths.to(device)}
    targets_BS, target_lengths = targets_BS.to(device), target_lengths.to(device)
    begin, curve, best = time.perf_counter(), [], None
    for step in range(1, max_steps + 1):
        log_probs, lengths, _ = model.forward(**signal)
        loss = model.loss(log_probs, targets_BS, lengths, target_lengths)
        if not torch.isfinite(loss):
            raise RungFailed(f"the loss is {float(loss)} at step {step} of one batch: lower model.optim.lr, now {lr:g}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # Decoding costs a forward pass, so it waits until the loss says that it may have worked.
        if step < max_steps and (step % 10 or (float(loss) > 0.7 and step % 50)):
            continue
        model.eval()
        with torch.no_grad():
            log_probs, lengths, _ = model.forward(**signal)
        model.train()
        texts = model.decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=lengths)
        texts = [text if isinstance(text, str) else text.text for text in texts]
        words, _ = count_errors(references, texts)
        seconds = time.perf_counter() - begin
        point = {"step": step, "seconds": round(seconds, 1), "loss": round(float(loss), 4), "wer": round(words.rate, 4)}
        curve.append(point)
        best = {"step": step, "seconds": round(seconds, 1), "loss": float(loss), "wer": words.rate}
        print(f"   one batch: step {step}  loss {float(loss):.3f} a {model.unit}  WER {words.rate:.1%}", flush=True)
        if words.errors == 0:
            pairs = [{"utterance": i, "reference": r, "hypothesis": h} for i, r, h in zip(ids, references, texts)]
            return {**best, "utterances": len(ids), "curve": curve, "transcripts": pairs}
    raise RungFailed(
        f"one batch of {len(ids)} utterances was not learned by heart in {max_steps} steps: WER {best['wer']:.1%}, "
        f"loss {best['loss']:.3f} a {model.unit}. The fault is in the model, the targets or the loss, not in the amount "
        "of data"
    )


def climb(cfg, max_steps: int) -> dict:
    """The rung of one batch for a composed configuration; returns what was measured. Raises RungFailed."""
    return climb_with_model(cfg, max_steps)[0]


def climb_with_model(cfg, max_steps: int):
    """As `climb`, and the model that has learned the batch."""
    import lightning.pytorch as pl
    import torch
    from omegaconf import open_dict

    from recipes.data import read_rows
    from recipes.train import build_model, fill_in

    pl.seed_everything(cfg.seed, verbose=False)
    cfg = without_regularisation(cfg)
    quiet_nemo()
    manifests = cfg.model.train_ds.manifest_filepath
    rows = read_rows(manifests if isinstance(manifests, str) else list(manifests))
    with open_dict(cfg):
        # A text that the labels cannot spell is told by file and line, as in training.
        fill_in(cfg, None if cfg.model.get("tokenizer") else cfg.model.labels)
    model = build_model(cfg)
    fit = check_fit(model, [row for row in rows if row["duration"] <= cfg.model.train_ds.max_duration])
    print(
        f"   targets fit into the output of {cfg.name}: {fit['utterances'] - fit['infeasible']} of {fit['utterances']} "
        f"utterances; the tightest uses {fit['tightest']:.0%} of its frames", flush=True,
    )
    if fit["infeasible"] > 0.05 * fit["utterances"]:
        raise RungFailed(
            f"{fit['infeasible']} of {fit['utterances']} targets do not fit into the output, for example "
            f"{fit['examples'][:3]}: lower the encoder's subsampling factor, or use BPE"
        )
    device = "cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    learned = learn_by_heart(model, choose(rows), cfg.model.optim.lr, max_steps, device)
    return {"recipe": cfg.name, "fit": fit, "batch": learned}, model
