"""A rerun of the builder appended to the manifest: every line stands there twice."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    return data(folder, lambda rows: rows + rows)


FAULT = Fault("doubled_manifest", ("data-duplicates",), "before", make)
