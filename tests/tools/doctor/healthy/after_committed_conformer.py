"""The committed curve of the conformer recipe on the mini corpus, as a run folder."""

from functools import partial

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups.committed import committed_run

HEALTHY = Healthy("after_committed_conformer", "after", partial(committed_run, "conformer"))
