"""A manifest of segments whose starts stand under `start`, where `offset` is read: each begins with its recording."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.healthy.segments_of_long_recordings import recordings
from tests.tools.doctor.setups import data


def make(folder):
    def renamed(rows):
        segments = recordings(rows, folder)
        return [{"start" if key == "offset" else key: value for key, value in row.items()} for row in segments]

    return data(folder, renamed)


FAULT = Fault("offset_key_nobody_reads", ("data-mismatched-text", "data-duplicates"), "before", make)
