"""The one text normalisation of the project: manifests, references and hypotheses all pass through it."""

import unicodedata

# Apostrophes as keyboards, word processors and e-books write them. Replaced before NFKC, which would turn the acute
# accent into a space and a combining mark.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u2032\u00b4\u0060", "'"))


def normalize(text: str) -> str:
    """Lower case, Unicode NFKC, every kind of apostrophe as ', runs of white space as one space, none at the ends.

    Punctuation, digits and accents stay: what a model's labels do not hold is for `manifests.validate` to report, not
    to be dropped here unseen. Applying it twice gives what applying it once gives.
    """
    if not text.isascii():
        # Lower-casing can leave NFKC's form and NFKC can give capitals (U+2122 is "TM"), hence three steps.
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
        text = unicodedata.normalize("NFKC", text.lower()).translate(_APOSTROPHES)
    elif "`" in text:
        text = text.replace("`", "'")
    return " ".join(text.lower().split())
