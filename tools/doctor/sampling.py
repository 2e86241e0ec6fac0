"""Sampling rates that cannot all be true: those of one configuration, and those at which nobody would speak so."""

from __future__ import annotations

from tools.doctor.finding import Finding

SLOWEST, FASTEST = 3.5, 27.0  # characters a second, over a whole manifest of Latin letters


def pace_of_speech(subject):
    """Speech that nobody speaks: a header that states a wrong rate makes duration and pitch wrong together."""
    for role, rows in subject.rows.items():
        paces = sorted(len(row["text"]) / row["duration"] for row in rows if row["text"].strip())
        letters = "".join(row["text"] for row in rows[:50])
        latin = sum(char.isascii() and char.isalpha() for char in letters)
        if len(paces) < 20 or latin < 0.5 * max(len(letters), 1):
            continue
        middle = paces[len(paces) // 2]
        if not SLOWEST < middle < FASTEST:
            fast = middle >= FASTEST
            yield Finding(
                "data-sample-rate",
                "warning",
                f"In {role}, speech has {middle:.1f} characters a second (median); people read at 12 to 18.",
                "The headers state a sampling rate that the samples do not have, so that audio plays too "
                f"{'fast' if fast else 'slow'}; or the texts are of other audio.",
                {"characters a second": round(middle, 2), "utterances": len(paces)},
                ["listen to a file; write its true rate into the header (sox -r RATE), then build the manifest again"],
                0.6 if fast else 0.4,
                where=rows[0]["_at"].rpartition(":")[0],
            )


def configured_rates(subject):
    """The sections of one configuration that name different rates."""
    settings = subject.settings
    if settings is None:
        return
    keys = ("model.preprocessor.sample_rate", "model.train_ds.sample_rate", "model.validation_ds.sample_rate",
            "model.sample_rate")
    rates = {settings.key(key): int(value) for key in keys if (value := settings.number(key)) is not None}
    if len(set(rates.values())) > 1:
        model = rates.get(settings.key("model.preprocessor.sample_rate"))
        wrong = [key for key, rate in rates.items() if model is not None and rate != model]
        yield Finding(
            "data-sample-rate",
            "prevents",
            f"The configuration names different sampling rates: {', '.join(f'{k}={v}' for k, v in rates.items())}.",
            "Audio is loaded at one rate and its features are computed as if it had another: time and frequency are "
            "stretched.",
            {"rates": rates},
            [f"{key}={model}" for key in wrong] or ["give all of them the audio's rate"],
            0.95,
            where=(wrong or list(rates))[0],
        )
