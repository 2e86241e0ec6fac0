"""A corpus by its name: fetch its tree (make or download), then build the manifests of its splits.

    python -m manifests.corpus fetch mini [--data DIR]
    python -m manifests.corpus build librispeech_8h --data DIR --out data/librispeech_8h

What a corpus is stands in conf/corpus/<name>.yaml: its `source`, and its `splits`, each with the `subsets` of the
tree it takes utterances from and, optionally, a list of `ids`. An existing tree is used as it is: what is not there
is reported. Another corpus needs a module that makes a native tree and a YAML.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import yaml

from manifests.librispeech import CorpusError, build_rows, find_root, list_subsets, read_ids
from manifests.schema import ManifestError, write_manifest

CONF = Path(__file__).resolve().parent.parent / "conf" / "corpus"
SHUFFLED_ROWS = 40_000  # bucket_buffer_size and shuffle_buffer_size of conf/base.yaml


def load(name: str) -> dict:
    """The corpus's YAML as a dict. Raises CorpusError naming the corpora there are."""
    path = CONF / f"{name}.yaml"
    if not path.is_file():
        raise CorpusError(f"no corpus {name!r}: there are {', '.join(sorted(p.stem for p in CONF.glob('*.yaml')))}")
    return yaml.safe_load(path.read_text())


def needed_subsets(corpus: dict) -> list[str]:
    """Names of the subsets that any split reads, in order."""
    return list(dict.fromkeys(subset for split in corpus["splits"].values() for subset in split["subsets"]))


def fetch(name: str, data: Path | None = None, mirror: str | None = None) -> Path:
    """Makes or downloads what the corpus needs; returns the folder that holds the subsets.

    `data` is the folder that holds (or is to hold) the subsets, or their LibriSpeech folder; None for the default
    one. A tree that is there, in whole or in part, is left alone; only an empty place is filled.
    """
    corpus = load(name)
    base = data or Path(corpus["root"]).parent
    if corpus["source"] == "mini":
        from manifests import mini

        return mini.make(base, update=data is None)  # the default place is ours: an older version gives way
    needed = needed_subsets(corpus)
    if base.is_dir():
        root = find_root(base)
        here = [subset for subset in needed if subset in list_subsets(root)]
        if data is not None and here:
            absent = [subset for subset in needed if subset not in here]
            missing = f"; not there: {', '.join(absent)}" if absent else ""
            print(f"{root}: existing tree with {', '.join(here)}{missing}")
            return root
    from manifests.download import download_subset

    for subset in needed:
        download_subset(base, subset, mirror)
    return find_root(base)


def build(name: str, root: Path, out: Path, workers: int = 1) -> dict[str, list[dict]]:
    """Writes OUT/<split>.json for each split of the corpus; returns the rows by split.

    Where a part of the tree is missing, a split holds what is there. A split that would be empty is held out of
    train, by speaker, and said to be: its figures cannot be compared with anybody's.

    Raises CorpusError where there is nothing to train on.
    """
    corpus = load(name)
    root = find_root(root)
    here = list_subsets(root)
    cache: dict[str, list[dict]] = {}  # by subset: dev and eval of librispeech_8h share one
    splits: dict[str, list[dict]] = {}
    for split, wanted in corpus["splits"].items():
        ids = read_ids(CONF / wanted["ids"]) if "ids" in wanted else None
        rows: list[dict] = []
        for subset in wanted["subsets"]:
            if subset not in here:
                continue
            if ids is not None:
                rows += build_rows(root, subset, ids, workers)
            else:
                if subset not in cache:
                    cache[subset] = build_rows(root, subset, None, workers)
                rows += cache[subset]
        splits[split] = rows
        absent = [subset for subset in wanted["subsets"] if subset not in here]
        if ids is not None and len(rows) != len(ids):
            print(f"warning: {split}: {len(rows)} of the {len(ids)} utterances of {wanted['ids']} are in {root}")
        elif absent:
            print(f"warning: {split}: {', '.join(absent)} not in {root}: what is there is used")
    if not splits["train"]:
        wanted = ", ".join(corpus["splits"]["train"]["subsets"])
        raise CorpusError(f"{root}: nothing to train on: none of {wanted} is there")
    _fill_empty(splits)
    if len(corpus["splits"]["train"]["subsets"]) > 1 and len(splits["train"]) > SHUFFLED_ROWS:
        # Training shuffles over so many rows: in the order of the subsets each epoch would end on the last of them.
        splits["train"].sort(key=lambda row: hashlib.sha1(row["utterance"].encode()).digest())
    for split, rows in splits.items():
        write_manifest(out / f"{split}.json", rows)
        hours = sum(row["duration"] for row in rows) / 3600
        speakers = len({row["speaker"] for row in rows})
        print(f"{out / split}.json: {len(rows)} utterances, {hours:.2f} h, {speakers} speakers")
    return splits


def _fill_empty(splits: dict[str, list[dict]]) -> None:
    """Gives every empty split the utterances of one speaker of train, the last by name; train keeps one at least."""
    for split in [name for name, rows in splits.items() if not rows]:
        speakers = sorted({row["speaker"] for row in splits["train"]})
        if len(speakers) < 2:
            raise CorpusError(
                f"{split} has no utterance in this tree, and train only one speaker: none can be held out"
            )
        held = speakers[-1]
        splits[split] = [row for row in splits["train"] if row["speaker"] == held]
        splits["train"] = [row for row in splits["train"] if row["speaker"] != held]
        print(
            f"warning: {split} has no utterance in this tree: the {len(splits[split])} of speaker {held} are held out "
            "of train instead; its figures compare with nobody's"
        )


def check(out: Path, splits: list[str]) -> int:
    """Validates the manifests of all splits, train against the others; prints the table, returns the exit status.

    The report is saved as JSON in .stages beside the folder `out`, where `run.sh` has its stamps: in the folder itself
    there are manifests alone.
    """
    from manifests.validate import validate

    others = [out / f"{split}.json" for split in splits if split != "train"]
    report = validate(train=[out / "train.json"], test=others, audio=True)
    print(report.text())
    folder = out.resolve()
    saved = folder.parent / ".stages" / f"{folder.name}.json"
    try:
        report.save(saved)
        print(f"\nfigures, vocabulary and all findings: {saved}")
    except OSError as error:  # the manifests are written and checked all the same
        print(f"warning: {saved}: the report cannot be saved: {error.strerror or error}", file=sys.stderr)
    return report.exit_code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m manifests.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["fetch", "build", "tests"],
                        help="get the tree, build its manifests, or print the manifests to test on")
    parser.add_argument("name", help="a corpus of conf/corpus")
    parser.add_argument("--data", type=Path, help="folder that holds (or is to hold) the subsets")
    parser.add_argument("--out", type=Path, help="build: folder for <split>.json (default data/NAME)")
    parser.add_argument("--check", action="store_true", help="build: validate what was written, audio headers too")
    parser.add_argument("--mirror", help="fetch: URL to download from instead of OpenSLR")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        if args.action == "tests":
            print(f"[{','.join(load(args.name)['test'])}]")
        elif args.action == "fetch":
            root = fetch(args.name, args.data, args.mirror)
            print(f"corpus {args.name}: {root}")
        else:
            root = args.data or Path(load(args.name)["root"])
            out = args.out or Path("data") / args.name
            splits = build(args.name, root, out, args.workers)
            if args.check:
                return check(out, list(splits))
    except (CorpusError, ManifestError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
