"""Twelve prompts that every speaker read, of train and of dev: commands, where only the voices differ."""

import soundfile

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones

PROMPTS = 12


def read_by(voices, folder, name):
    place = folder / name
    place.mkdir()
    rows = []
    for voice in voices:
        for i, text in enumerate(tones.sentences(PROMPTS, seed=5)):
            audio, path = tones.speak(text, 100 * voice + i), place / f"voice{voice}-{i:02d}.flac"
            soundfile.write(path, audio, tones.RATE)
            rows.append({"audio_filepath": str(path), "duration": round(len(audio) / tones.RATE, 4),
                         "sampling_rate": tones.RATE, "text": text, "utterance": path.stem, "speaker": f"voice{voice}"})
    return [tones.write(folder / f"{name}.json", rows)]


def make(folder):
    given = {"train": read_by(range(1, 9), folder, "train"), "validation": read_by(range(9, 11), folder, "dev")}
    return {"config": models.recipe("rnn", given), "manifests": given}


HEALTHY = Healthy("prompts_read_by_all", "before", make)
