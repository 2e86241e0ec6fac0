"""The published archives of LibriSpeech: names, checksums, sizes. Facts only, so that reading them costs nothing."""

from typing import NamedTuple


class Archive(NamedTuple):
    """One <subset>.tar.gz of OpenSLR: its resource number there, its MD5 and how many utterances it holds."""

    resource: int
    md5: str
    utterances: int


# https://www.openslr.org/12 (LibriSpeech) and https://www.openslr.org/31 (Mini LibriSpeech); Panayotov et al., 2015.
ARCHIVES: dict[str, Archive] = {
    "dev-clean": Archive(12, "42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": Archive(12, "c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": Archive(12, "32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": Archive(12, "fb5a50374b501bb3bac4815ee91d3135", 2939),
    "train-clean-100": Archive(12, "2a93770f6d5c6c964bc36631d331a522", 28539),
    "train-clean-360": Archive(12, "c0e676e450a7ff2f54aeade5171606fa", 104014),
    "train-other-500": Archive(12, "d1a0fd59409feb2c614ce4d30c387708", 148688),
    "train-clean-5": Archive(31, "5df7d4e78065366204ca6845bb08f490", 1519),
    "dev-clean-2": Archive(31, "6d7ab67ac6a1d2c993d050e16d61080d", 1089),
}
