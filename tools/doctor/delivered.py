"""What the training loader delivers, against the manifest: is the text of a row that of its audio, in one numbering?

A manifest can be right and what reaches the model wrong: a collate function that sorts the audio alone, a data set that
takes another line's text, labels that are numbered otherwise than the decoder's. NeMo's batches carry no names, so a
row is known by its text, and its audio by its length. Imports no torch.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter, defaultdict

from manifests.schema import ManifestError, scan_manifest
from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

ROWS, FEWEST = 48, 16  # rows to look at, and those needed for a verdict
SAME = 0.03  # of the logarithm of seconds: the same audio, but for rounding
OTHER = 0.3  # of it: other audio; a change of speed in training stays below
ONE_WAY = 0.25  # of the rows with other audio: fewer that are longer, or shorter, come from no mixture of rows
# Options of a training section that make audio shorter, or longer, than the manifest says, and are meant to.
MOVING = ("trim_silence", "pad_min_duration", "augmentor.silence")
BEHIND = 0.1  # of the spread of a row, from which on what lies behind its length is no padding
LINES = 200_000  # of the manifests, to be read


class Delivered:
    """Collects rows as they were delivered, and judges them.

    Args:
        manifests: paths of the training manifests.
        rate: of the audio, Hz.
        frame_rate: of features, Hz, where they are delivered in place of audio.

    Attributes:
        options: those of the loader that change how long audio is (moving).
    """

    title = "loader: text and audio of the rows delivered, against the manifest"

    def __init__(self, manifests: list[str], rate: int, frame_rate: float = 100.0):
        self.manifests, self.rate, self.frame_rate = list(manifests), rate, frame_rate
        self.batches: list[list[tuple[float, str]]] = []
        self.padded = self.behind = 0  # rows that are shorter than their batch, and those with sound behind their length
        self.judged = False
        self.options: list[str] = []
        self._durations: dict[str, list[float]] | None = None
        self._by_duration: dict[int, list[str]] = {}

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))

    @property
    def wanted(self) -> bool:
        """Whether more rows are to be seen."""
        return bool(self.manifests) and not self.judged and self.rows < ROWS

    def add(self, batch, texts: list[str]) -> None:
        """Takes a batch of NeMo's kind, (audio (B, samples) or features (B, D, T), lengths (B), ...), and its texts.

        There may be more texts, of further views of the same utterances.
        """
        if not isinstance(batch, (list, tuple)) or len(batch) < 4 or getattr(batch[0], "ndim", 0) not in (2, 3):
            return
        counts = batch[1].tolist() if hasattr(batch[1], "tolist") else []
        for row, count in zip(batch[0], counts):
            if row.shape[-1] > 1.05 * count + 3:
                self.padded += 1
                self.behind += float(row[..., int(count):].float().std()) > BEHIND * float(row.float().std())
        if batch[0].ndim == 3:  # a frame more than there are steps between frames
            seconds = [(count - 1) / self.frame_rate for count in counts]
        else:
            seconds = [count / self.rate for count in counts]
        if counts and len(texts) % len(counts) == 0 and texts == texts[: len(counts)] * (len(texts) // len(counts)):
            self.batches.append(list(zip(seconds, texts)))

    def judge(self) -> list[Finding]:
        """Findings on all that was delivered. Raises NotExamined where too few rows can be told."""
        self.judged = True
        if self.padded >= 8 and self.behind > 0.3 * self.padded:
            return [self._sound_behind()]
        if self.rows < FEWEST:
            raise NotExamined(f"{self.rows} rows were seen, {FEWEST} are needed")
        self._read()
        known = [[(seconds, self._nearest(text, seconds)) for seconds, text in batch if plain(text) in self._durations]
                 for batch in self.batches]
        count = sum(map(len, known))
        if count < 0.5 * self.rows:
            found = self._more_than_the_text() or self._another_numbering()
            if found is None:
                raise NotExamined(f"the texts of {self.rows - count} of {self.rows} rows stand in no manifest")
            return [found]
        if count < FEWEST:
            raise NotExamined(f"{count} rows can be found in the manifest, {FEWEST} are needed")
        return self._other_audio(known, count)

    def _read(self) -> None:
        durations: dict[str, list[float]] = defaultdict(list)
        by_duration: dict[int, list[str]] = defaultdict(list)
        for path in self.manifests:
            try:
                for number, line in enumerate(scan_manifest(path)):
                    if number > LINES:
                        break
                    try:
                        text, seconds = str(line.row["text"]), float(line.row["duration"])
                    except (KeyError, TypeError, ValueError):
                        continue
                    durations[plain(text)].append(seconds)
                    by_duration[round(seconds * 100)].append(text)
            except (ManifestError, OSError):
                continue
        self._durations, self._by_duration = durations, by_duration

    def _nearest(self, text: str, seconds: float) -> float:
        return min(self._durations[plain(text)], key=lambda duration: abs(duration - seconds))

    def _other_audio(self, known, count: int) -> list[Finding]:
        ratios = sorted(math.log(max(a, 0.01) / max(b, 0.01)) for batch in known for a, b in batch)
        usual = ratios[len(ratios) // 2]  # what is cut off everywhere, or another rate, which the data family speaks of
        if abs(usual) >= OTHER and sum(abs(ratio - usual) < SAME for ratio in ratios) < 0.8 * count:
            usual = 0.0
        away = sum(abs(ratio - usual) > OTHER for ratio in ratios) / count
        fits = sum(abs(ratio) < SAME for ratio in ratios) / count
        turned = [(a, b) for batch in known for a, b in zip(*(sorted(column) for column in zip(*batch)))]
        permuted = sum(abs(math.log(max(a, 0.01) / max(b, 0.01))) < SAME for a, b in turned) / count
        mixed = permuted > 0.8 and fits < 0.7
        longest = max(a for batch in known for a, _ in batch)
        cut = sum(abs(a - longest) < 0.02 and b > 1.03 * a for batch in known for a, b in batch) / count
        if cut > 0.3:
            return [self._cut(known, count, longest, cut)]
        if not mixed and away < 0.3:
            return []
        if not mixed and (told := self._one_way(ratios, count)) is not None:
            return told
        falling = all(sorted(row[0] for row in batch) in ([row[0] for row in batch], [row[0] for row in batch][::-1])
                      for batch in self.batches)
        evidence = {"rows": count, "audio as long as the manifest says for the text": round(fits, 3),
                    "if the audio of each batch is put in another order": round(permuted, 3),
                    "the audio of each batch is sorted by length": falling}
        worst = max((pair for batch in self.batches for pair in batch if plain(pair[1]) in self._durations),
                    key=lambda pair: abs(math.log(max(pair[0], 0.01) / self._nearest(pair[1], pair[0]))))
        evidence["for instance"] = (f"{worst[1][:60]!r} with {worst[0]:.2f} s of audio; in the manifest it has "
                                    f"{self._nearest(worst[1], worst[0]):.2f} s")
        return [Finding(
            "data-mismatched-text", "prevents",
            f"What the loader delivers does not belong together: for {1 - fits:.0%} of {count} rows the audio is not "
            "as long as the manifest says for the row's text"
            + (f"; within each batch, in another order, {permuted:.0%} would be." if mixed else "."),
            "The collate function puts the audio of a batch in another order"
            + (" (by length)" if falling else "") + " and leaves the targets where they were." if mixed else
            "The data set takes text and audio from different lines.", evidence,
            ["sort or shuffle audio, lengths, targets and target lengths by the same order, in collate_fn",
             "or let pack_padded_sequence(..., enforce_sorted=False) do it"] if mixed else
            ["look at the data set's __getitem__: one index for audio and text"],
            0.97 if mixed else 0.85, where="the training loader")]

    def _one_way(self, ratios: list[float], count: int) -> list[Finding] | None:
        """Findings where audio is only shorter than in the manifest, or only longer, and not of other rows; None where it is
        both. Raises NotExamined where an option of the loader makes it so."""
        shorter, longer = sum(ratio < -OTHER for ratio in ratios), sum(ratio > OTHER for ratio in ratios)
        if min(shorter, longer) >= ONE_WAY * (shorter + longer):
            return None
        if self.options:
            raise NotExamined(f"{' and '.join(self.options)} of the loader change how long audio is")
        less = shorter > longer
        return [Finding(
            "data-duration-wrong", "warning",
            f"The loader delivers {'less' if less else 'more'} audio than the manifest says: {max(shorter, longer)} of {count} "
            f"rows are more than a quarter {'shorter' if less else 'longer'}.",
            ("Durations in the manifest are too long, or silence or more is cut off on the way: targets may not fit any more."
             if less else "Durations in the manifest are too short, or more than the utterance is read.")
            + " What is chosen by duration (max_duration, buckets, batches of so many seconds) goes wrong.",
            {"rows": count, "shorter": shorter, "longer": longer, "median of the ratio": math.exp(ratios[len(ratios) // 2])},
            ["durations as soundfile.info gives them, of the audio as it is read",
             "if it is cut on the way: listen whether speech is cut with the silence"], 0.7, where="the training loader")]

    def _cut(self, known, count: int, longest: float, share: float) -> Finding:
        text, seconds = next((text, self._nearest(text, a)) for batch in self.batches for a, text in batch
                             if plain(text) in self._durations and self._nearest(text, a) > 1.03 * longest)
        return Finding(
            "data-duration-wrong", "prevents" if share > 0.5 else "warning",
            f"The loader delivers no more than {longest:.2f} s of audio: {share:.0%} of {count} rows are cut there, "
            "and keep their whole text.",
            "What is said after the cut is in the targets and not in the audio: many targets do not fit, and the "
            "others are learned wrongly.",
            {"rows": count, "cut": round(share, 3), "longest delivered": longest,
             "for instance": f"{text[:60]!r}: {seconds:.2f} s in the manifest"},
            ["leave out utterances that are too long (model.train_ds.max_duration) instead of cutting their audio",
             "batches of one shape: pad, or bucket by duration"], 0.93, where="the training loader")

    def _sound_behind(self) -> Finding:
        return Finding(
            "length-mismatch", "prevents",
            f"What the loader delivers goes on behind its length: in {self.behind} of {self.padded} rows that are shorter than "
            "their batch there is sound where padding should be.",
            "Lengths count from the start. Rows that are padded in front, or lengths in another unit than the audio (frames "
            "for samples, another sampling rate), leave the end of what is said outside, and its text in the targets.",
            {"rows with padding": self.padded, "with sound behind their length": self.behind},
            ["pad behind the audio: torch.nn.functional.pad(audio, (0, longest - len(audio)))",
             "lengths in samples of the audio that is delivered"], 0.95, where="the training loader")

    def _texts_near(self, seconds: float) -> set[str]:
        """Texts of the manifest whose audio lasts about so long."""
        return {text.lower() for key in range(round(seconds * 100) - 1, round(seconds * 100) + 2)
                for text in self._by_duration.get(key, ())}

    def _more_than_the_text(self) -> Finding | None:
        """A finding where the rows hold the manifest's texts with the same labels before or behind each."""
        around: Counter = Counter()
        example = {}
        for seconds, said in (row for batch in self.batches for row in batch):
            for text in self._texts_near(seconds):
                at = said.lower().find(text) if text and len(text) < len(said) <= len(text) + 6 else -1
                if at >= 0:
                    frame = said[:at], said[at + len(text):]
                    around[frame] += 1
                    example.setdefault(frame, (text, said))
                    break
        (before, behind), count = around.most_common(1)[0] if around else (("", ""), 0)
        if count < max(0.7 * self.rows, 8):
            return None
        text, said = example[before, behind]
        return Finding(
            "data-mismatched-text", "warning",
            f"The loader's targets are more than the texts: {said[:60]!r} for {text[:60]!r}, in {count} of "
            f"{self.rows} rows.",
            "Marks for the start and the end of a text belong to attention and transducers. CTC has none: here they "
            "are labels like others, which the model learns to write around every text.",
            {"rows": count, "of": self.rows, "before each text": before, "behind each text": behind},
            ["bos_id and eos_id of the data set: None", "add_bos=False, add_eos=False for a tokenizer"], 0.95,
            where="the training loader")

    def _another_numbering(self) -> Finding | None:
        """A finding where the texts are those of the manifest with letters that stand for other letters."""
        pairs: Counter = Counter()
        example, rows = None, 0
        for seconds, text in (row for batch in self.batches for row in batch):
            near = {other for other in self._texts_near(seconds) if len(other) == len(text)}
            if len(near) == 1:
                other = near.pop()
                pairs.update(zip(text, other))
                example, rows = example or (other, text), rows + 1
        best: dict[str, tuple[int, str]] = {}
        for (seen, true), number in pairs.items():
            best[seen] = max(best.get(seen, (0, "")), (number, true))
        total = sum(pairs.values())
        agreed = sum(number for number, _ in best.values())
        changed = {seen: true for seen, (_, true) in best.items() if seen != true}
        if rows < 8 or agreed < 0.95 * total or len(changed) < 5:
            return None
        return Finding(
            "label-order", "prevents",
            f"The targets that the loader delivers spell {example[1][:60]!r} by the decoder's labels, where the "
            f"manifest says {example[0][:60]!r}.",
            "The loader numbers the labels otherwise than the decoder: the model learns well and prints a cipher.",
            {"rows": rows, "letters": [f"{true} -> {seen}" for seen, true in list(changed.items())[:12]],
             "agreeing": round(agreed / max(total, 1), 3)},
            ["one list of labels for all: model.train_ds.labels=${model.labels} "
             "model.decoder.vocabulary=${model.labels}"], 0.95, where="the training loader")


def moving(settings) -> list[str]:
    """Options of a configuration's training section that change how long audio is, as the user writes them."""
    return [settings.key(f"model.train_ds.{name}") for name in MOVING
            if settings is not None and settings.get(f"model.train_ds.{name}")]


def plain(text: str) -> str:
    """In lower case, ligatures and wide letters as plain ones, with one space between words: as texts are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@check("loader", faults=("data-mismatched-text", "label-order", "length-mismatch"), needs=("model", "manifests"))
def loader_keeps_pairs(subject):
    """The training loader delivers each text with its own audio."""
    from tools.doctor.probe import untouched
    from tools.doctor.utterances import speller

    probe = subject.probe
    with untouched(probe.model):
        loader = _loader(subject)
        data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if collate is None or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise NotExamined("the loader cannot be asked for single rows")
        spell = speller(probe.model, len(probe.vocabulary) + 1)
        if spell is None:
            raise NotExamined("nothing says what the targets mean")
        seen = Delivered(subject.manifests.get("train", []), probe.sample_rate)
        seen.options = moving(subject.settings)
        draw = random.Random(subject.seed).sample(range(len(data)), min(len(data), ROWS))
        for first in range(0, len(draw) - 7, 8):
            batch = collate([data[i] for i in draw[first : first + 8]])
            if not isinstance(batch, (list, tuple)) or len(batch) < 4:
                raise NotExamined("its batches are not of NeMo's kind")
            texts = [spell(row[:size]) for row, size in zip(batch[2].tolist(), batch[3].tolist())]
            seen.add(batch, texts)
        yield from seen.judge()


def _loader(subject):
    """The live model's training loader, else the one that NeMo makes of its section; nothing is kept in the model."""
    model = subject.model
    if getattr(model, "_train_dl", None) is not None:
        return model._train_dl
    section = subject.settings.get("model.train_ds") if subject.settings is not None else None
    if section is None or subject.settings.recipe or section.get("use_lhotse") or section.get("is_tarred"):
        raise NotExamined("a loader of this kind is looked at in training")
    if not hasattr(model, "_setup_dataloader_from_config"):
        raise NotExamined("the model makes no loader")
    from omegaconf import OmegaConf, open_dict

    config = OmegaConf.create(OmegaConf.to_container(section, resolve=True))
    with open_dict(config):
        config.manifest_filepath = subject.manifests["train"][0]
        config.num_workers, config.defer_setup = 0, False
        if not config.get("labels") and probe_labels(subject):
            config.labels = probe_labels(subject)
    try:
        loader = model._setup_dataloader_from_config(config)
    except Exception as error:  # anybody's section
        raise NotExamined(f"no loader can be made ({type(error).__name__})") from None
    if loader is None:
        raise NotExamined("no loader can be made")
    return loader


def probe_labels(subject) -> list[str] | None:
    """The labels that NeMo puts into a loader's section that has none."""
    given = subject.settings.get("model.labels")
    return [str(label) for label in given] if given else subject.probe.labels
