"""Metrics that lie (family "metrics"): averaged over batches, repeats not collapsed, normalised differently.

During a run the validation's own log-probs are decoded once more and counted correctly; where the reported WER is
another number, it is compared with what each usual mistake would give. After a run the same is done with its
predictions. Imports torch nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

TOLERANCE = 0.005  # absolute, of a rate
NAMES = ("val_wer_ctc", "val_wer", "wer", "val/wer", "val_WER", "WER")  # of a hybrid's two heads, that of CTC
CAUSES = {
    "metric-averaged": ("it is the mean of the batches' rates",
                        "Short utterances and small batches then weigh more: the sum of errors must be divided once, "
                        "by the sum of reference words.",
                        ["sum word errors and reference words over all batches, then divide",
                         "NeMo: keep val_wer_num and val_wer_denom and let multi_validation_epoch_end divide"]),
    "metric-not-collapsed": ("it is the rate of texts whose repeats or blanks were not collapsed",
                             "CTC output must be collapsed: first equal neighbours to one, then blanks removed.",
                             ["use model.decoding.ctc_decoder_predictions_tensor",
                              "or: [k for k, _ in itertools.groupby(best) if k != blank]"]),
    "metric-normalisation": ("it is the rate of texts of which only one side is normalised",
                             "Upper case, punctuation or spaces count as errors, or are taken out of one side only.",
                             ["pass references and hypotheses through the same function, manifests.text.normalize"]),
}


def word_errors(reference: list[str], hypothesis: list[str]) -> int:
    """Edit distance over words."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(reference, hypothesis)


def rate(pairs) -> float:
    """Corpus-level WER of (reference, hypothesis) texts."""
    errors = sum(word_errors(r.split(), h.split()) for r, h in pairs)
    return errors / max(sum(len(r.split()) for r, _ in pairs), 1)


def collapse(best: list[int], blank: int, repeats: bool = True) -> list[int]:
    """Best labels a frame to CTC's labels: equal neighbours to one (unless not `repeats`), then blanks out."""
    kept = [label for at, label in enumerate(best) if not repeats or at == 0 or label != best[at - 1]]
    return [label for label in kept if label != blank]


class Tally:
    """Counts a validation's errors as they should be, and as the usual mistakes would."""

    title = "metrics: the reported WER against the same outputs counted anew"

    def __init__(self, model):
        self.model = model
        self.batches: list[dict[str, list[tuple[str, str]]]] = []
        self._spell = None

    @staticmethod
    def wanted(found: list[Finding], examined: list[str]) -> bool:
        """Whether the comparison is still to be made: once is enough."""
        return Tally.title not in examined and not any(f.id in CAUSES for f in found)

    def add(self, call) -> bool:
        """Takes one batch's listen.Call; False where its labels cannot be spelt."""
        from tools.doctor.utterances import speller

        self._spell = self._spell or speller(self.model, call.log_probs.shape[-1])
        if self._spell is None:
            return False
        size = call.log_probs.shape[-1]
        best = call.log_probs.argmax(dim=-1).t().tolist()
        targets, wanted = call.padded_targets().tolist(), call.target_lengths.tolist()
        ways: dict[str, list[tuple[str, str]]] = {"right": [], "repeats": []}
        for row, frames in enumerate(call.input_lengths.tolist()):
            reference = self._spell(targets[row][: wanted[row]])
            heard = [label for label in best[row][:frames] if label < size]
            ways["right"].append((reference, self._spell(collapse(heard, call.blank))))
            ways["repeats"].append((reference, self._spell(collapse(heard, call.blank, repeats=False))))
        self.batches.append(ways)
        return True

    def judge(self, metrics: dict[str, float]) -> list[Finding] | None:
        """Findings on `val_wer`; None where it says nothing yet (no WER, or next to all or nothing wrong)."""
        reported = next((metrics[key] for key in NAMES if key in metrics), None)
        hybrid = hasattr(self.model, "ctc_wer") and "val_wer_ctc" not in metrics  # what it logs is its other head's
        if reported is None or hybrid or not self.batches:
            return None
        pairs = {way: [pair for batch in self.batches for pair in batch[way]] for way in ("right", "repeats")}
        right = rate(pairs["right"])
        if right > 0.97 or right < 0.005 or len(pairs["right"]) < 4:
            return None
        others = {
            "metric-averaged": sum(rate(batch["right"]) for batch in self.batches) / len(self.batches),
            "metric-not-collapsed": rate(pairs["repeats"]),
        }
        return compare(reported, right, others, "validation", tolerance=0.01)


def other_rate(model) -> str:
    """Why a model's own rate is not the WER of its best labels, in words; "" where nothing says so.

    NeMo counts characters with `use_cer`, and may decode with a beam or a language model: a Tally has nothing to say.
    """
    scorer = getattr(model, "ctc_wer", getattr(model, "wer", None))
    if getattr(scorer, "use_cer", False):
        return "use_cer counts characters"
    decoding = getattr(getattr(model, "ctc_decoding", getattr(model, "decoding", None)), "cfg", None)
    if decoding is None:
        return ""
    strategy = str(getattr(decoding, "strategy", "greedy"))
    greedy = getattr(decoding, "greedy", None)
    if not strategy.startswith("greedy"):
        return f"the model decodes with {strategy}"
    if getattr(greedy, "ngram_lm_model", None) or getattr(greedy, "boosting_tree_alpha", 0.0):
        return "the model decodes with a language model"
    return ""


def compare(reported: float, right: float, others: dict[str, float], where: str,
    tolerance: float = TOLERANCE) -> list[Finding]:
    """A finding where a reported rate is not the right one, named by the mistake that gives the same number."""
    scale = 100.0 if reported > 3 * max(right, 1.0) else 1.0  # percent
    reported /= scale
    if abs(reported - right) <= tolerance:
        return []
    near = {id_: abs(value - reported) for id_, value in others.items() if abs(value - right) > tolerance}
    best = min(near, key=near.get, default=None)
    evidence = {"reported": reported, "counted anew": right, **{f"as {id_}": value for id_, value in others.items()}}
    if best is not None and near[best] <= tolerance:
        how, why, fix = CAUSES[best]
        return [Finding(best, "warning", f"The WER of {where} is reported as {reported:.1%} and is {right:.1%}: {how}.",
            why,
                        evidence, fix, 0.85, where=where)]
    low = reported < right
    return [Finding(
        "metric-normalisation", "warning",
        f"The WER of {where} is reported as {reported:.1%}; the same outputs counted anew give {right:.1%}.",
        f"The reported rate is too {'low' if low else 'high'}: references and hypotheses pass through different "
        "functions, or other utterances are counted.", evidence, CAUSES["metric-normalisation"][2], 0.4, where=where)]


# ---- after the run: predictions --------------------------------------------------------------------------------


@check("metrics", faults=("metric-averaged", "metric-not-collapsed", "metric-normalisation"), needs=("run",))
def predictions_agree_with_the_reported_rate(subject):
    """The reported WER is that of the predictions."""
    files = prediction_files(subject.run)
    if not files:
        raise NotExamined("no predictions (a JSON a line with text and pred_text) in the run's folder")
    for path, rows in files:
        pairs = [(str(row["text"]), str(row["pred_text"])) for row in rows]
        yield from examine_pairs(pairs, str(path.name), _reported(path))


def examine_pairs(pairs: list[tuple[str, str]], where: str, reported: float | None = None) -> list[Finding]:
    """Findings on (reference, hypothesis) texts as they were stored, and on the rate reported for them."""
    from manifests.text import normalize

    found: list[Finding] = []
    if len(pairs) < 2:
        return found
    raw, plain = rate(pairs), rate([(normalize(r), normalize(h)) for r, h in pairs])
    apart = _apart(pairs)
    if raw - plain > 0.02 and apart:
        example = next((p for p in pairs if normalize(p[0]) == normalize(p[1]) and p[0] != p[1]), pairs[0])
        found.append(Finding(
            "metric-normalisation", "warning",
            f"As stored, references and hypotheses of {where} differ in {raw:.1%} of the words; normalised alike, in "
            f"{plain:.1%}.",
            CAUSES["metric-normalisation"][1], {"as stored": raw, "normalised alike": plain, "example": list(example)},
            CAUSES["metric-normalisation"][2], 0.85, where=where))
    stuttered = sum(_stutters(h) for _, h in pairs)
    if stuttered > 0.5 * len(pairs):
        example = next(h for _, h in pairs if _stutters(h))
        found.append(Finding(
            "metric-not-collapsed", "warning",
            f"In {stuttered} of {len(pairs)} hypotheses of {where} letters stand three times in a row, or blanks are "
            "written.",
            CAUSES["metric-not-collapsed"][1], {"example": example[:120]}, CAUSES["metric-not-collapsed"][2], 0.9,
            where=where))
    if reported is not None and not found:
        others = {"metric-averaged": sum(rate([pair]) for pair in pairs) / len(pairs), "metric-normalisation": raw}
        # Of texts that keep their capitals on both sides the rate may be counted with or without them.
        if apart or compare(reported, raw, {}, where):
            found += compare(reported, plain, others, where)
    return found


def _apart(pairs: list[tuple[str, str]]) -> bool:
    """Whether `normalize` changes many words of one side and few of the other: a model may write capitals itself."""
    from manifests.text import normalize

    words = [" ".join(side).split() for side in zip(*pairs)]
    fewer, more = sorted(sum(normalize(word) != word for word in side) / max(len(side), 1) for side in words)
    return fewer < 0.4 * more


def _stutters(text: str) -> bool:
    """Whether a text looks like frames: a letter three times in a row, or a written blank."""
    tripled = sum(a == b == c and a.isalpha() for a, b, c in zip(text, text[1:], text[2:]))
    return tripled >= 2 or "<blank>" in text or "<b>" in text or text.count("_") > 2


def prediction_files(folder: Path, most: int = 20) -> list[tuple[Path, list[dict]]]:
    """JSON-lines files below a folder whose rows have `text` and `pred_text`, with their rows."""
    found = []
    for path in sorted([*Path(folder).rglob("*.json"), *Path(folder).rglob("*.jsonl")])[:200]:
        try:
            with open(path, encoding="utf-8") as file:
                first = json.loads(file.readline())
                if not (isinstance(first, dict) and "text" in first and "pred_text" in first):
                    continue
                rows = [first, *(json.loads(line) for line in file if line.strip())]
        except (OSError, ValueError):
            continue
        rows = [row for row in rows if isinstance(row, dict) and "text" in row and "pred_text" in row]
        found.append((path, rows))
        if len(found) >= most:
            break
    return found


def _reported(path: Path) -> float | None:
    """The WER that a metrics.json beside the predictions gives for them, as a share."""
    beside = path.parent / "metrics.json"
    try:
        data = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict):
        return None
    for part in data.get("manifests", []) if isinstance(data.get("manifests"), list) else []:
        if isinstance(part, dict) and str(part.get("name")) == path.stem.removeprefix("predictions_"):
            return part.get("wer")
    value = data.get("wer", data.get("WER"))
    return float(value) if isinstance(value, (int, float)) else None
