"""Text of audio files or folders, by greedy decoding.

    python recipes/transcribe.py model=x.nemo audio=[file.wav,folder] [output=out.json|out.txt]

Prints `path<TAB>text` lines, or saves them (.txt), or saves a manifest with `pred_text` (.json). Reads wav, flac, mp3,
ogg and opus of any sample rate; several channels are averaged. A folder is searched with its subfolders; hidden files
and folders (.name) are left out. What cannot be read is reported, the rest is transcribed, and the exit status is 1.
A recording of more than twice `piece_seconds` (60 s) is cut at its quietest places into pieces of at most that (30 s), and
their texts are joined: a model was trained on utterances, and attention takes memory by the square of the length.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from manifests.schema import write_atomic, write_manifest
from recipes.options import (
    EXIT_FAILED, EXIT_USAGE, PRECISIONS, UsageError, existing_model, fail, known, option, parse, path_list, positive,
    required,
)
from recipes.quiet import quiet_imports
from recipes.threads import set_threads

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
OUTPUTS = (".txt", ".json")
PIECE_SECONDS = 30.0  # somewhat over the longest utterances of a usual corpus
FRAMES_A_SECOND, PAUSE_FRAMES = 50, 10  # what loudness is measured on, and what it is averaged over


@dataclass
class Options:
    """What `python recipes/transcribe.py` takes."""

    model: str = required(".nemo file, Lightning .ckpt, or a recipe's name for its pretrained one")
    audio: Any = required("one audio file or folder, or a list of them, [a.wav,folder]")
    output: Optional[str] = option("file to save to: .txt with path<TAB>text, .json for a manifest", None)
    batch_seconds: Optional[float] = option("padded seconds of audio in a batch, by default by the device", None)
    piece_seconds: float = option("longest piece of a long recording, which is one of over twice that", PIECE_SECONDS)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: str = option("32, or bf16-mixed: faster where the processor or GPU has bfloat16", "32")
    num_workers: Optional[int] = option("batches at once on a CPU, reading threads beside a GPU", None)


def note(message: str) -> None:
    """One line on stderr: stdout carries transcripts only."""
    print(f"transcribe.py: {message}", file=sys.stderr)


def find_audio(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """(files, problems): the files as given, and those of folders sorted by path but for hidden ones; each file once.

    A Mac leaves files beside the audio that have its suffix and hold none (._a.flac).
    """
    files: dict[Path, None] = {}
    problems = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
            if not inside:
                problems.append(f"{path}: no audio in this folder ({', '.join(SUFFIXES)})")
            files.update(dict.fromkeys(inside))
        elif path.is_file():
            files[path] = None
        else:
            problems.append(f"{path}: no such file or folder")
    return list(files), problems


def plain_path(argument: str) -> str:
    """`audio=[x].flac` as a list of that one path where it is there: its brackets are no list of YAML's then."""
    key, _, value = argument.partition("=")
    if key != "audio" or not value.startswith("[") or not os.path.exists(value):
        return argument
    return "audio=['{}']".format(value.replace("'", "''"))


def probe(path: Path) -> dict:
    """A row with the duration in seconds and the channels by the file's header. Raises RuntimeError."""
    import soundfile

    try:
        info = soundfile.info(str(path))
    except Exception as error:  # soundfile raises several unrelated kinds
        raise RuntimeError(f"{path}: not readable as audio ({error})") from error
    if info.frames < 1:
        raise RuntimeError(f"{path}: no samples")
    return {"audio_filepath": str(path), "duration": info.frames / info.samplerate, "channels": info.channels}


def pieces(row: dict, piece_seconds: float) -> list[dict]:
    """The row of a recording as one or several, in order, each with its `duration` and `offset` in seconds.

    What is longer than two pieces is cut at its quietest places, of the second half of what a piece may take.
    Raises RuntimeError naming a file that cannot be read to its end.
    """
    if row["duration"] <= 2 * piece_seconds:
        return [row]
    loudness, frame = frame_loudness(row["audio_filepath"])
    most = int(piece_seconds / frame)
    borders = [0]
    while (left := len(loudness) - borders[-1]) > most:
        first, last = most // 2, min(most, left - most // 4)  # nothing too short to be understood is left at the end
        borders.append(borders[-1] + first + int(loudness[borders[-1] + first : borders[-1] + last].argmin()))
    borders.append(len(loudness))
    return [
        {**row, "offset": begin * frame, "duration": (end - begin) * frame}
        for begin, end in zip(borders, borders[1:])
    ]


def frame_loudness(path: str):
    """(mean square of the samples around each frame, seconds of a frame), read a minute at a time.

    Raises RuntimeError naming the file.
    """
    import numpy as np
    import soundfile

    found = []
    try:
        with soundfile.SoundFile(path) as file:
            rate, frame = file.samplerate, file.samplerate // FRAMES_A_SECOND
            for block in file.blocks(frame * FRAMES_A_SECOND * 60, dtype="float32", always_2d=True):
                samples = block.mean(axis=1)
                samples = np.pad(samples, (0, -len(samples) % frame))
                found.append(np.square(samples).reshape(-1, frame).mean(axis=1))
        loudness = np.convolve(np.concatenate(found), np.full(PAUSE_FRAMES, 1 / PAUSE_FRAMES), mode="same")
    except Exception as error:  # soundfile raises several unrelated kinds
        raise RuntimeError(f"{path}: not readable as audio ({error})") from error
    return loudness, frame / rate


def read_mono(row: dict, sample_rate: int):
    """Float32 samples at `sample_rate`, channels averaged, of a whole file or of the piece that the row names.

    Raises RuntimeError naming the file.
    """
    import soundfile
    import soxr

    part = {}
    try:
        if "offset" in row:
            rate = soundfile.info(row["audio_filepath"]).samplerate
            part = {"start": round(row["offset"] * rate), "frames": round(row["duration"] * rate)}
        samples, rate = soundfile.read(row["audio_filepath"], dtype="float32", always_2d=True, **part)
    except Exception as error:
        raise RuntimeError(f"{row['audio_filepath']}: not readable as audio ({error})") from error
    samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return samples if rate == sample_rate else soxr.resample(samples, rate, sample_rate)


def transcribe(model, files: list[Path], *, batch_seconds: float | None = None, precision: str = "32",
               num_workers: int | None = None, piece_seconds: float = PIECE_SECONDS, progress: bool = False,
               on_error=None) -> list[dict]:
    """Rows (`audio_filepath`, `duration` in seconds, `pred_text`) of the files that could be read, in their order.

    A recording of over two `piece_seconds` is decoded in pieces; its text is theirs with spaces between. `on_error` is
    told one line about each file that could not be read; without it the first raises RuntimeError.
    """
    from tqdm import tqdm

    from recipes.decode import Decoder

    def report(error: Exception) -> None:
        if on_error is None:
            raise error
        on_error(str(error))

    whole: list[dict] = []
    rows: list[dict] = []
    file_of: list[int] = []  # of each row, an index of `whole`
    for path in files:
        try:
            found = probe(path)
            parts = pieces(found, piece_seconds)
        except RuntimeError as error:
            report(error)
            continue
        file_of += [len(whole)] * len(parts)
        whole.append(found)
        rows += parts
    bad: set[int] = set()

    def leave_out(index: int, error: Exception) -> None:
        if file_of[index] not in bad:  # once, of however many pieces
            bad.add(file_of[index])
            report(error)

    total = round(sum(row["duration"] for row in rows))
    shown = {"unit": "s", "unit_scale": True, "desc": "seconds of audio", "leave": False, "disable": not progress}
    with tqdm(total=total, **shown) as bar:
        decoder = Decoder(
            model, rows, read=read_mono, batch_seconds=batch_seconds, precision=precision, num_workers=num_workers,
            on_audio=bar.update, on_error=leave_out,
        )
        texts = decoder.run()
    for i in decoder.short:
        if "offset" not in rows[i]:
            seconds = rows[i]["duration"]
            leave_out(i, RuntimeError(f"{rows[i]['audio_filepath']}: {seconds:.3f} s is too short to hold speech"))
    said: list[list[str]] = [[] for _ in whole]
    for i, text in zip(file_of, texts):
        said[i].append(text or "")
    return [
        {"audio_filepath": row["audio_filepath"], "duration": row["duration"],
         "pred_text": said[i][0] if len(said[i]) == 1 else " ".join(filter(None, map(str.strip, said[i])))}
        for i, row in enumerate(whole) if i not in bad
    ]


def save(path: Path, rows: list[dict]) -> None:
    """Writes .txt (path<TAB>text) or .json (a manifest, absolute paths), whole or not at all."""
    if path.suffix == ".txt":
        write_atomic(path, "".join(f"{row['audio_filepath']}\t{row['pred_text']}\n" for row in rows).encode())
    else:
        rows = [{**row, "audio_filepath": os.path.abspath(row["audio_filepath"])} for row in rows]
        write_manifest(path, rows, required=("audio_filepath", "duration"))


def main(arguments: list[str] | None = None) -> int:
    """Transcribes; returns the exit status: 0, or 1 where some file could not be read."""
    try:
        given = [plain_path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
        options = parse(Options, given, __doc__)
        positive("batch_seconds", options.batch_seconds)
        positive("num_workers", options.num_workers)
        if options.piece_seconds < 1:
            raise UsageError(f"piece_seconds={options.piece_seconds}: must be 1 or more")
        known("precision", options.precision, PRECISIONS)
        model_path = existing_model(options.model)
        output = Path(options.output).expanduser() if options.output else None
        if output and output.suffix not in OUTPUTS:
            raise UsageError(f"output={output}: give a name that ends in {' or '.join(OUTPUTS)}")
        files, problems = find_audio(path_list("audio", options.audio))
    except UsageError as error:
        fail("transcribe.py", error, EXIT_USAGE)
    for problem in problems:
        note(problem)
    if not files:
        fail("transcribe.py", "nothing to transcribe", EXIT_FAILED)
    set_threads()
    quiet_imports()
    from recipes.decode import ModelError, load_model

    stereo = [row["audio_filepath"] for row in map(_probe_or_nothing, files) if row and row["channels"] > 1]
    if stereo:
        more = f" and {len(stereo) - 1} more" if len(stereo) > 1 else ""
        note(f"{stereo[0]}{more}: several channels, averaged")

    def on_error(message: str) -> None:
        problems.append(message)
        note(message)

    try:
        model = load_model(model_path, options.device)
        rows = transcribe(
            model, files, batch_seconds=options.batch_seconds, precision=options.precision,
            num_workers=options.num_workers, piece_seconds=options.piece_seconds,
            progress=sys.stderr.isatty(), on_error=on_error,
        )
        if output:
            save(output, rows)
    except (ModelError, OSError, ValueError) as error:
        fail("transcribe.py", error, EXIT_FAILED)
    if output:
        print(f"{output}: {len(rows)} files")
    else:
        for row in rows:
            print(f"{row['audio_filepath']}\t{row['pred_text']}")
    return EXIT_FAILED if problems else 0


def _probe_or_nothing(path: Path) -> dict | None:
    try:
        return probe(path)
    except RuntimeError:
        return None


if __name__ == "__main__":
    sys.exit(main())
