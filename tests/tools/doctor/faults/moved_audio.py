"""The corpus was moved to another disk after the manifest was written; a part of it stayed."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def move(rows):
        return [
            {**row, "audio_filepath": row["audio_filepath"].replace("/train/", "/old/train/")} if i % 2 else row
            for i, row in enumerate(rows)
        ]

    return data(folder, move)


FAULT = Fault("moved_audio", ("data-missing-audio",), "before", make)
