"""A sentencepiece BPE tokenizer from the texts of manifests, in the folder layout that NeMo reads.

    python -m manifests.tokenizer data/mini/train.json --out exp/conformer_bpe_mini/tokenizer [--vocab 128]

Writes tokenizer.model, tokenizer.vocab and vocab.txt. The vocabulary is small on purpose: at 25 output frames a
second CTC has no room to waste, and a token needs to be seen often to be learned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from manifests.schema import ManifestError, read_manifest
from manifests.text import normalize


def train(manifests: list[Path], out: Path, vocab: int = 128) -> int:
    """Trains on the normalised texts of the manifests; returns the vocabulary's size.

    Fewer tokens are made where the text does not hold as many as asked for. Raises ManifestError where there is
    no text or `vocab` does not even cover the characters.
    """
    import sentencepiece

    texts = [normalize(row["text"]) for path in manifests for row in read_manifest(path)]
    texts = [text for text in texts if text]
    if not texts:
        raise ManifestError(f"{', '.join(map(str, manifests))}: no text to train a tokenizer on")
    characters = sorted(set("".join(texts)) - {" "})
    if vocab < len(characters) + 2:
        raise ManifestError(f"--vocab {vocab}: the texts have {len(characters)} characters; give 2 more at least")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tokenizer-") as part:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{part}/tokenizer",
            vocab_size=vocab,
            model_type="bpe",
            character_coverage=1.0,
            hard_vocab_limit=False,
            bos_id=-1,
            eos_id=-1,
            unk_id=0,
            minloglevel=2,
            num_threads=1,  # the same text gives the same tokenizer
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{part}/tokenizer.model")
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        # NeMo counts the lines of vocab.txt to size the decoder; the unknown token is not among them.
        lines = [("##" + piece if not piece.startswith("\u2581") else piece[1:]) for piece in pieces[1:]]
        Path(part, "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for name in ("vocab.txt", "tokenizer.vocab", "tokenizer.model"):
            shutil.move(f"{part}/{name}", out / f".{name}")
            os.replace(out / f".{name}", out / name)
    return len(pieces)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m manifests.tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab", type=int, default=128, help="tokens (default 128)")
    args = parser.parse_args(argv)
    try:
        size = train(args.manifests, args.out, args.vocab)
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --out {args.out}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
