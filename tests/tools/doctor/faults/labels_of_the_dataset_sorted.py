"""The data set has its own list of labels in the YAML, sorted by somebody; the decoder has another order."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models, tones


def make(folder):
    given = tones.manifests(folder)
    sections = models.datasets(given)
    for section in sections.values():
        section["labels"] = [*tones.LETTERS, " "]
    return live(folder, **sections)


FAULT = Fault("labels_of_the_dataset_sorted", ("label-order",), "before", make)
