"""The disk was full while the manifest was written: its last line breaks off; another has Python's quotes."""

from pathlib import Path

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    given = data(folder, lambda rows: rows)
    path = Path(given["manifests"]["train"][0])
    lines = path.read_text().splitlines()
    lines[40] = lines[40].replace('"', "'")
    path.write_text("\n".join(lines)[:-60])
    return given


FAULT = Fault("half_written_manifest", ("data-manifest-broken",), "before", make)
