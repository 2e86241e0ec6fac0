"""Texts straight from the subtitles: numbers as digits, commas, question marks."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data

SPELLED = {"one": "1", "two": "2", "three": "3", "first": "1st"}


def make(folder):
    def unnormalised(rows):
        changed = []
        for i, row in enumerate(rows):
            words = [SPELLED.get(word, word) for word in row["text"].split()]
            words[0] += "," if len(words) > 2 else ""
            changed.append({**row, "text": " ".join(words) + ".?!"[i % 3]})
        return changed

    return data(folder, unnormalised)


FAULT = Fault("digits_and_punctuation", ("data-characters",), "before", make)
