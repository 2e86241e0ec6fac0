"""The committed curve of the deepspeech2 recipe on the mini corpus, as a run folder."""

from functools import partial

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups.committed import committed_run

HEALTHY = Healthy("after_committed_deepspeech2", "after", partial(committed_run, "deepspeech2"))
