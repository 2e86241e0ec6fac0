"""The NeMo model classes of all recipes: CTC over characters and CTC over sentencepiece tokens.

What they add to NeMo's EncDecCTCModel and EncDecCTCModelBPE:
- utterances whose CTC loss is infinite are counted and named, never silently zeroed;
- a batch whose loss or gradient is not finite is named, skipped by all devices together, leaves parameters
  and BatchNorm statistics as they were, and stops the run when that goes on;
- each step leaves its numbers (loss a character, blank rate, gradient norm, seconds of audio) in `step_stats`;
- validation sums errors over the corpus, on batches of which each utterance is in exactly one.

Shapes: B batch, T samples or frames, S targets, V labels (blank is index V).
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE
from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import safe_instantiate
from nemo.core.classes.mixins import AccessMixin
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from recipes.augment import FRAMES_MULTIPLE, GPU_MULTIPLE, change_tempo, round_up_frames
from recipes.consistency import consistency_loss, two_views
from recipes.ctc_loss import CTCLoss
from recipes.data import (
    CharEncoder, FeatureCache, ResumableLoader, SampledPieces, lhotse_loader, manifest_loader, read_rows,
)
from recipes.intermediate import characters_of
from recipes.lengths import valid_mask
from recipes.metrics import ErrorCounts, count_errors


log = logging.getLogger("recipes")


class TrainingDiverged(RuntimeError):
    """Too many non-finite batches in a row: going on would only burn time."""


@dataclass
class StepStats:
    """Numbers of the latest training step; floats, or tensors not yet fetched from the device."""

    loss: Tensor | float = float("nan")
    loss_per_char: Tensor | float = float("nan")
    blank_rate: Tensor | float = float("nan")
    grad_norm: Tensor | float = float("nan")
    audio_seconds: Tensor | float = 0.0
    utterances: list[str] = field(default_factory=list)


class _RecipeModel:
    """What both classes share; comes before NeMo's class in the order of resolution."""

    max_bad_batches = 10  # in a row
    unit = "character"  # of the targets: what losses are a share of

    def __init__(self, cfg: DictConfig, trainer=None):
        # NeMo would set up data inside its constructor, before the encoder and our own state exist.
        cfg = copy.deepcopy(cfg)
        for key in ("train_ds", "validation_ds"):
            if cfg.get(key) is not None:
                with open_dict(cfg):
                    cfg[key].defer_setup = True
        super().__init__(cfg=cfg, trainer=trainer)
        self._use_our_loss()
        noise = cfg.get("noise_and_rooms")
        self.noise_and_rooms = safe_instantiate(noise) if noise else None
        self.step_stats = StepStats()
        self.infeasible_seen: set[str] = set()
        self._bad_in_a_row = 0
        self._bad_step = False
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self.end_requested = lambda: False  # monitor.SaveLast puts the SIGTERM flag here
        self.end_agreed = False
        self._validation: list[dict] = []
        self._seed = torch.initial_seed()
        self._alike = np.random.default_rng(self._seed)  # draws that all devices have to share

    def _use_our_loss(self) -> None:
        self.loss = CTCLoss(
            self.decoder.num_classes_with_blank - 1, self._cfg.get("ctc_reduction", "mean_volume")
        )

    def change_vocabulary(self, *args, **kwargs):
        super().change_vocabulary(*args, **kwargs)
        self._use_our_loss()  # NeMo has put its own back

    # ---- data ----------------------------------------------------------------------------------------------

    def text_encoder(self):
        """Callable from a normalised text to a list of targets."""
        raise TypeError("use CTCModel or CTCModelBPE")

    def training_text_encoder(self):
        """The same for training, where it may draw one of several ways to spell a text."""
        return self.text_encoder()

    def _setup_dataloader_from_config(self, config):
        if not config.get("use_lhotse") or config.get("do_transcribe"):
            return super()._setup_dataloader_from_config(config)  # NeMo's own ways in stay open
        return lhotse_loader(
            config, self.training_text_encoder(), self.global_rank, self.world_size, preprocessor=self.preprocessor
        )

    def setup_multiple_validation_data(self, val_data_config):
        self.setup_validation_data(val_data_config)  # several manifests are one validation set here

    def setup_validation_data(self, val_data_config):
        """`manifest_filepath` (one or a list), `batch_seconds`, `num_workers`, `cache_features` (see FeatureCache)."""
        self._update_dataset_config(dataset_name="validation", config=val_data_config)
        self._validation_rows = read_rows(
            OmegaConf.to_container(val_data_config, resolve=True)["manifest_filepath"]
            if isinstance(val_data_config, DictConfig)
            else val_data_config["manifest_filepath"]
        )
        self._validation_dl = manifest_loader(
            self._validation_rows,
            self.preprocessor._sample_rate,
            self.text_encoder(),
            batch_seconds=val_data_config.get("batch_seconds", 240.0),
            num_workers=val_data_config.get("num_workers", 0),
            rank=self.global_rank,
            world_size=self.world_size,
            cache=FeatureCache(self.preprocessor) if val_data_config.get("cache_features", False) else None,
        )

    # ---- training ------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Of a saved schedule only the step is taken: a run that goes on follows the plan that it is given now."""
        super().on_load_checkpoint(checkpoint)
        for state in checkpoint.get("lr_schedulers", []):
            for key in set(state) - {"last_epoch", "_step_count", "_last_lr"}:
                del state[key]

    def on_train_batch_start(self, batch, batch_idx):
        """What a step draws (tempo, masks, dropout) follows from the seed, the step and the device alone: a run that
        was cut off and goes on draws what a whole one would have drawn."""
        part = batch_idx % self.trainer.accumulate_grad_batches  # of the step
        if part == 0:
            self._bad_step = False
            self._remember_running_statistics()
        step = [self._seed, self.trainer.global_step, part]
        self._alike = np.random.default_rng(step)
        torch.manual_seed(int(np.random.default_rng([*step, self.global_rank]).integers(2**63)))

    def training_step(self, batch, batch_idx):
        signals, signal_lengths, targets_BS, target_lengths, ids = batch
        intermediate = self.is_interctc_enabled()
        if intermediate:
            AccessMixin.set_access_enabled(access_enabled=True, guid=self.model_guid)
        consistency = self._cfg.get("consistency_weight", 0.0)
        if signals.ndim == 3:  # features, see recipes.data.FeatureCache
            features_BDT, feature_lengths = signals, signal_lengths
            signals_a_second = 1 / self._cfg.preprocessor.window_stride
        else:
            audio_BT = self.noise_and_rooms(signals, signal_lengths) if self.noise_and_rooms else signals
            features_BDT, feature_lengths = self.preprocessor(input_signal=audio_BT, length=signal_lengths)
            signals_a_second = self.preprocessor._sample_rate
        if tempo := self._cfg.get("tempo", 0.0):
            factor = 1 + tempo * self._alike.uniform(-1, 1)  # one for all devices, which wait for the slowest
            features_BDT, feature_lengths = change_tempo(features_BDT, feature_lengths, factor)
        features_BDT = round_up_frames(features_BDT, GPU_MULTIPLE if features_BDT.is_cuda else FRAMES_MULTIPLE)
        if consistency:
            features_BDT, feature_lengths, targets_BS, target_lengths = two_views(
                features_BDT, feature_lengths, targets_BS, target_lengths
            )
        log_probs, lengths, symbols_BT = self.forward(
            processed_signal=features_BDT, processed_signal_length=feature_lengths
        )
        loss = self.loss(log_probs, targets_BS, lengths, target_lengths)
        infeasible, ctc_loss = self.loss.infeasible, loss.detach().clone()  # NeMo mixes the other losses in in place
        if intermediate:
            loss, _ = self.add_interctc_losses(loss, targets_BS, target_lengths, compute_wer=False)
            AccessMixin.reset_registry(self)
        if consistency:
            loss = loss + consistency * self.loss.average(
                consistency_loss(log_probs, lengths), infeasible[: len(ids)], target_lengths[: len(ids)]
            )

        batch_loss = loss.detach()  # what the records show, also of a batch that is skipped
        finite = torch.isfinite(batch_loss)
        self._report_infeasible(infeasible[: len(ids)], target_lengths, lengths, ids)
        if intermediate:
            self._report_intermediate(lengths, ids)
        bad, self.end_agreed = self._any_device(~finite, self.end_requested())
        self._bad_step |= bad
        if bad:
            self._skip_batch("loss", float(batch_loss), ids, signals)
            loss = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0

        with torch.no_grad():
            valid = valid_mask(lengths, symbols_BT.shape[1])
            blanks = ((symbols_BT == self.loss.blank) & valid).sum() / valid.sum().clamp(min=1)
            scale = 1.0 if self.loss.reduction == "mean_volume" else len(lengths) / target_lengths.sum().clamp(min=1)
            self.step_stats = StepStats(
                loss=batch_loss,
                loss_per_char=ctc_loss * scale,
                blank_rate=blanks,
                audio_seconds=signal_lengths.sum() / signals_a_second,
                utterances=ids,
            )
        if isinstance(self._train_dl, ResumableLoader):
            self._train_dl.mark_trained()
        if self._step_is_logged():
            values = {
                "train_loss": self.step_stats.loss_per_char,
                "blank_rate": blanks,
                "learning_rate": self._optimizer.param_groups[0]["lr"],
                "infeasible_utterances": float(len(self.infeasible_seen)),
            }
            self.log_dict(values, batch_size=len(ids))
        return {"loss": loss}

    def on_before_optimizer_step(self, optimizer):
        """Gradient norm before clipping; a step that is not finite is left out on every device alike."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self.step_stats.grad_norm = norm
        if not self._bad_step and not bool(torch.isfinite(norm)):
            self._bad_step = True
            self._skip_batch("gradient norm", float(norm), self.step_stats.utterances, None)
        if self._bad_step:
            optimizer.zero_grad(set_to_none=True)  # the optimizer passes over parameters without gradient
            self._restore_running_statistics()
        else:
            self._bad_in_a_row = 0
        if self._step_is_logged():
            self.log("grad_norm", norm)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        """Clips by the norm that `on_before_optimizer_step` has just measured, instead of measuring it again."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and not self._bad_step:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.step_stats.grad_norm)

    def _step_is_logged(self) -> bool:
        """Whether Lightning hands this step's numbers to its loggers. Those of other steps it throws away, and takes as
        long for them: 2 to 3 ms of a CPU, and a GPU is waited for with each that is not a tensor on it."""
        trainer = self._trainer
        if trainer is None or not trainer.log_every_n_steps:
            return False
        step = trainer.global_step + 1
        return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps or trainer.should_stop

    def _any_device(self, bad: Tensor, end: bool) -> tuple[bool, bool]:
        """The two flags, each true where it is on any device: one small exchange a step."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            flags = torch.stack([bad.float(), torch.full_like(bad, end, dtype=torch.float32)])
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            bad, end = flags.bool().tolist()
        return bool(bad), bool(end)

    def _skip_batch(self, what: str, value: float, ids: list[str], signals: Tensor | None) -> None:
        self._bad_in_a_row += 1
        source = ""
        if signals is not None:
            rows = (~torch.isfinite(signals)).flatten(1).any(dim=1)
            if bool(rows.any()):
                named = [i for i, bad in zip(ids, rows.tolist()) if bad]
                source = f"; the audio or its features are not finite in {named}"
        broken = [name for name, p in self.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            source += f"; {len(broken)} parameters are not finite any more, first {broken[0]}"
        message = (
            f"step {self.trainer.global_step}: {what} is {value}: batch skipped, nothing was updated; "
            f"utterances {ids}{source}"
        )
        log.warning(message)
        if self._bad_in_a_row >= self.max_bad_batches or broken:
            raise TrainingDiverged(
                f"{message}. {self._bad_in_a_row} such batches in a row: the run stops. Lower model.optim.lr, "
                "raise the warm-up, or train in float32; the last checkpoint before it is intact"
            )

    def _report_intermediate(self, lengths, ids) -> None:
        """Names those that only the intermediate loss leaves out; where it spells as the last layer does there are none."""

    def _report_infeasible(self, infeasible, target_lengths, lengths, ids) -> None:
        """Names each utterance whose target does not fit into the output, once."""
        for row in torch.nonzero(infeasible).flatten().tolist():
            if ids[row] not in self.infeasible_seen:
                self.infeasible_seen.add(ids[row])
                log.warning(
                    f"utterance {ids[row]}: CTC loss is infinite, {int(target_lengths[row])} targets (and blanks "
                    f"between repeats) do not fit into {int(lengths[row])} output frames; it is left out of the loss. "
                    f"{len(self.infeasible_seen)} such utterances so far"
                )

    def _remember_running_statistics(self) -> None:
        statistics = [b for name, b in self.named_buffers() if "running_" in name or "num_batches" in name]
        self._statistics = [(buffer, buffer.clone()) for buffer in statistics]

    def _restore_running_statistics(self) -> None:
        for buffer, value in self._statistics:
            buffer.copy_(value)

    # ---- validation ----------------------------------------------------------------------------------------

    def validation_pass(self, batch, batch_idx, dataloader_idx=0):
        (signals, signal_lengths, targets_BS, target_lengths, ids), positions = batch
        kind = "processed" if signals.ndim == 3 else "input"  # features or audio
        log_probs, lengths, symbols_BT = self.forward(
            **{f"{kind}_signal": signals, f"{kind}_signal_length": signal_lengths}
        )
        losses = self.loss.per_utterance(log_probs, targets_BS, lengths, target_lengths)
        texts = self.decoding.ctc_decoder_predictions_tensor(
            decoder_outputs=log_probs, decoder_lengths=lengths, return_hypotheses=False
        )
        hypotheses = [text if isinstance(text, str) else text.text for text in texts]
        valid = valid_mask(lengths, symbols_BT.shape[1])
        return {
            "loss": losses.sum(),
            "targets": target_lengths.sum(),
            "blanks": ((symbols_BT == self.loss.blank) & valid).sum(),
            "frames": valid.sum(),
            "pairs": [(p, self._validation_rows[p]["text"], h) for p, h in zip(positions, hypotheses)],
        }

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch[1]:  # a rank without utterances gets one empty batch
            self._validation.append(self.validation_pass(batch, batch_idx, dataloader_idx))

    def on_validation_epoch_end(self, sync_metrics: bool = False):
        outputs, self._validation = self._validation, []
        pairs = sorted(pair for output in outputs for pair in output["pairs"])
        words, characters = count_errors([p[1] for p in pairs], [p[2] for p in pairs])
        sums = torch.tensor(
            [float(sum(output[key] for output in outputs)) for key in ("loss", "targets", "blanks", "frames")]
            + [words.errors, words.reference, characters.errors, characters.reference],
            dtype=torch.float64,
        )
        if self.world_size > 1 and torch.distributed.is_initialized():
            sums = sums.to(self.device)
            torch.distributed.all_reduce(sums)
        loss, targets, blanks, frames, word_errors, word_count, char_errors, char_count = sums.tolist()
        self.validation_examples = [(self._validation_rows[p], text, hyp) for p, text, hyp in pairs]
        metrics = {
            "val_loss": loss / max(targets, 1),
            "val_wer": ErrorCounts(int(word_errors), 0, 0, int(word_count)).rate,
            "val_cer": ErrorCounts(int(char_errors), 0, 0, int(char_count)).rate,
            "val_blank_rate": blanks / max(frames, 1),
        }
        # The sums are already those of all devices.
        values = {key: torch.tensor(value, dtype=torch.float32) for key, value in metrics.items()}
        self.log_dict(values, sync_dist=False)
        return metrics


class CTCModel(_RecipeModel, EncDecCTCModel):
    """CTC over characters: targets are positions in `decoder.vocabulary`."""

    def text_encoder(self):
        return CharEncoder(self.decoder.vocabulary)


class CTCModelBPE(_RecipeModel, EncDecCTCModelBPE):
    """CTC over sentencepiece tokens; the tokenizer travels inside the `.nemo`.

    With `intermediate_labels` (a list of characters) the intermediate CTC spells in them, with a decoder of its own:
    the lower layers learn the letters, the upper ones to put them together (Sanabria and Metze 2018, arXiv 1807.07104).
    """

    unit = "token"

    def __init__(self, cfg: DictConfig, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.character_decoder = None
        if (labels := cfg.get("intermediate_labels")) and self.is_interctc_enabled():
            self.character_decoder = ConvASRDecoder(self.decoder._feat_in, len(labels), vocabulary=list(labels))
            self.character_loss = CTCLoss(len(labels), self.loss.reduction)
            self.characters_infeasible_seen: set[str] = set()
            self.setup_interctc(decoder_name="character_decoder", loss_name="character_loss", wer_name="wer")

    def add_interctc_losses(self, loss_value, transcript, transcript_len, compute_wer, **options):
        """NeMo's, on the characters of the tokens where the model has `intermediate_labels`."""
        if self.character_decoder is not None and self.is_interctc_enabled():
            labels = self.character_decoder.vocabulary
            transcript, transcript_len = characters_of(transcript, transcript_len, self.tokenizer, labels)
            self._characters = transcript_len
        return super().add_interctc_losses(loss_value, transcript, transcript_len, compute_wer, **options)

    def _report_intermediate(self, lengths, ids) -> None:
        if self.character_decoder is None:
            return
        for row in torch.nonzero(self.character_loss.infeasible[: len(ids)]).flatten().tolist():
            if ids[row] not in self.characters_infeasible_seen:
                self.characters_infeasible_seen.add(ids[row])
                log.warning(
                    f"utterance {ids[row]}: {int(self._characters[row])} characters (and blanks between repeats) do not fit "
                    f"into {int(lengths[row])} output frames; it is left out of the intermediate loss, not of the last "
                    f"layer's. {len(self.characters_infeasible_seen)} such utterances so far"
                )

    def text_encoder(self):
        return self.tokenizer.text_to_ids

    def training_text_encoder(self):
        """`SampledPieces` where the model has a `bpe_dropout`; raises ValueError where its tokenizer has no merges."""
        dropout = self._cfg.get("bpe_dropout") or 0.0
        return SampledPieces(self.tokenizer, dropout, self.global_rank) if dropout else self.text_encoder()
