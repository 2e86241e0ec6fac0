"""Utterances as segments of long recordings, a dozen of one file, by offset and duration."""

import numpy as np
import soundfile

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import data, tones


def recordings(rows, folder, speakers: int = 8):
    """The rows as segments of one recording a speaker, with some silence between them."""
    place = folder / "recordings"
    place.mkdir(parents=True)
    found = []
    for speaker in range(speakers):
        path, parts, at = place / f"talk-{speaker}.flac", [], 0
        for row in rows[speaker::speakers]:
            audio = tones.samples(row)
            found.append({**row, "audio_filepath": str(path), "offset": round(at / tones.RATE, 4)})
            silence = np.zeros(tones.RATE // 4, dtype=np.float32)
            parts += [audio, silence]
            at += len(audio) + len(silence)
        soundfile.write(path, np.concatenate(parts), tones.RATE)
    return found


def make(folder):
    return data(folder, lambda rows: recordings(rows, folder))


HEALTHY = Healthy("segments_of_long_recordings", "before", make)
