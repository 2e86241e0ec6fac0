"""Makes the corpus tree: starts the speaking processes, hands them chapters, and marks the tree complete at the end.

    DEST/LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<nnnn>.flac    16 kHz, mono, 16 bit
                                                  <speaker>-<chapter>.trans.txt      UPPER CASE text
    DEST/LibriSpeech/SPEAKERS.TXT
    DEST/LibriSpeech/.started, .completed         JSON: what the tree is made of; .completed is written last
    DEST/LibriSpeech/.lock                        held while a process writes here

A chapter's folder is made under ``.partial`` and renamed when it is whole, so an interrupted run leaves whole chapters
only, and the next start with the same settings goes on with the missing ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from manifests.mini.grammar import Grammar
from manifests.mini.plan import READERS, Chapter, plan
from manifests.mini.voices import DEV_ONLY, KNOWN, UNSEEN

VERSION = 4  # of the code: raise it when the same rule files and voices give other sentences, sound or files
ROOT = Path(__file__).resolve().parent.parent.parent
LARGEST = 20.0
SPEAKERS_HEAD = """\
; Metadata of the embedded corpus, in the format of LibriSpeech's own SPEAKERS.TXT. The voices are synthetic.
;
; reader_id: the number of the voice
; gender: 'F' for female, 'M' for male
; subset: the subset in which the voice is heard first (those of train are heard in dev and test too)
; duration: total number of minutes of speech by the voice, over all subsets
; name: the name of the voice
;
;ID  |SEX| SUBSET           |MINUTES| NAME
"""


class MiniError(RuntimeError):
    """The corpus cannot be made; the message is one line that says what to do."""


def make(
    dest: Path, seed: int = 0, jobs: int = 2, scale: float = 1.0, force: bool = False, quiet: bool = False,
    update: bool = False,
) -> Path:
    """Make the corpus under ``dest`` and return the folder that holds the subsets, ``dest/LibriSpeech``.

    The tree is a function of ``seed`` and ``scale`` alone: any number of processes (``jobs``) gives the same bytes.
    ``scale`` multiplies the number of train sentences; under 1 it cuts dev and test too (for tests of the code: only
    from 1 on the promises about words and sizes hold). A complete tree with the same settings is left as it is; one
    with other settings, or of another version of this code, is made anew with ``update`` and refused without.
    ``force`` makes any anew.

    Raises MiniError when espeak-ng is not installed, a process fails, or ``dest`` holds another tree (and no
    ``force`` or ``update``); ValueError for a jobs or scale out of range.
    """
    if not 0 < scale <= LARGEST:
        raise ValueError(f"scale is {scale}; it must be over 0 and at most {LARGEST:g}")
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    say = (lambda line: None) if quiet else _say
    tree = Path(dest) / "LibriSpeech"
    made_of = {"corpus": "mini", "version": _version(), "seed": seed, "scale": float(scale)}
    if not force and _read_mark(tree / ".completed") == made_of:
        say(f"{tree} is complete (seed {seed}, scale {scale:g}): left as it is")
        return tree
    if importlib.util.find_spec("espeakng_loader") is None:
        raise MiniError(
            "the embedded corpus needs espeak-ng: install the extra 'synth' of this project"
            " (pip install -e '.[synth]', or pip install espeakng-loader)"
        )
    _check(tree, made_of, force or update)
    tree.mkdir(parents=True, exist_ok=True)
    with open(tree / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MiniError(f"another process is writing {tree}; wait for it, or give another folder") from None
        _clear(tree, made_of, force)
        chapters = plan(seed, scale)
        missing = [chapter for chapter in chapters if not (tree / chapter.folder).is_dir()]
        if len(missing) < len(chapters):
            say(f"{tree}: {len(chapters) - len(missing)} of {len(chapters)} chapters are there, making the others")
        if missing:
            _Crew(tree, min(jobs, len(missing)), say).run(missing)
        shutil.rmtree(tree / ".partial", ignore_errors=True)
        _write(tree / "SPEAKERS.TXT", speakers_txt(tree))
        _write(tree / ".completed", json.dumps(made_of) + "\n")
    return tree


def speakers_txt(tree: Path) -> str:
    """The text of SPEAKERS.TXT; minutes are read from the FLAC headers of ``tree``."""
    import soundfile

    seconds: dict[int, float] = {}
    for path in sorted(tree.glob("*/*/*/*.flac")):
        info = soundfile.info(path)
        speaker = int(path.parent.parent.name)
        seconds[speaker] = seconds.get(speaker, 0.0) + info.frames / info.samplerate
    first = {voice: "train" for voice in KNOWN} | {voice: "dev" for voice in DEV_ONLY}
    rows = [
        f"{voice.speaker:<4} | {voice.sex} | {first.get(voice, 'test-unseen-voices'):<18}"
        f"| {seconds[voice.speaker] / 60:<5.2f} | {voice.name}\n"
        for voice in KNOWN + DEV_ONLY + UNSEEN
        if voice.speaker in seconds
    ]
    return SPEAKERS_HEAD + "".join(rows)


def _version() -> str:
    """Names the texts, the voices and the code's version: a tree of another one is not taken for this one."""
    grammar = Grammar("grammar.txt", "newwords.txt")
    made_of = (grammar.classes, grammar.frames, KNOWN, DEV_ONLY, UNSEEN)
    return f"{VERSION}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"


def _read_mark(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check(tree: Path, made_of: dict, force: bool) -> None:
    """Raise MiniError where ``tree`` holds what must not be overwritten."""
    done = _read_mark(tree / ".completed")
    if done is not None and done != made_of and not force:
        other = ", ".join(f"{key} {done.get(key)!r}" for key in made_of if done.get(key) != made_of[key])
        raise MiniError(f"{tree} holds another complete corpus ({other}); give another folder, or --force to remake it")
    if _read_mark(tree / ".started") is None and tree.is_dir() and set(os.listdir(tree)) - {".lock"}:
        raise MiniError(f"{tree} is not empty and was not made by manifests.mini; give another folder")


def _clear(tree: Path, made_of: dict, force: bool) -> None:
    """Leave in ``tree`` only whole chapters of this very corpus, and the mark that says so."""
    (tree / ".completed").unlink(missing_ok=True)
    shutil.rmtree(tree / ".partial", ignore_errors=True)
    if force or _read_mark(tree / ".started") != made_of:
        for subset in READERS:
            shutil.rmtree(tree / subset, ignore_errors=True)
        (tree / "SPEAKERS.TXT").unlink(missing_ok=True)
    _write(tree / ".started", json.dumps(made_of) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _say(line: str) -> None:
    print(line, flush=True)


class _Progress:
    """A line that is rewritten every second on a terminal, and a new one every ten seconds in a log."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say = total, say
        self.live = say is _say and sys.stdout.isatty()
        self.began = self.said = time.monotonic()
        self.utterances, self.spoken = 0, 0.0

    def add(self, utterances: int, seconds: float) -> None:
        self.utterances, self.spoken = self.utterances + utterances, self.spoken + seconds
        now, last = time.monotonic(), self.utterances == self.total
        if last or now - self.said >= (1 if self.live else 10):
            self.said = now
            line = f"mini: {self.utterances}/{self.total} utterances, {self.spoken / 60:.1f} min of speech"
            line += f", {now - self.began:.0f} s"
            if self.live:
                print(f"\r{line}", end="\n" if last else "", flush=True)
            else:
                self.say(line)


class _Crew:
    """Speaking processes, each served by a thread that takes the next chapter from a common queue."""

    def __init__(self, tree: Path, jobs: int, say: Callable[[str], None]):
        self.tree, self.jobs, self.say = tree, jobs, say
        self.todo: queue.SimpleQueue[Chapter] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[tuple[int, float] | MiniError] = queue.SimpleQueue()

    def run(self, chapters: list[Chapter]) -> None:
        """Make ``chapters``; raises MiniError at the first one that fails. No process is left when this returns."""
        for chapter in chapters:
            self.todo.put(chapter)
        progress = _Progress(sum(len(chapter.jobs) for chapter in chapters), self.say)
        processes: list[subprocess.Popen] = []
        threads: list[threading.Thread] = []
        try:
            for _ in range(self.jobs):
                processes.append(self._start())
                threads.append(threading.Thread(target=self._serve, args=(processes[-1],), daemon=True))
                threads[-1].start()
            for _ in chapters:
                answer = self.done.get()
                if isinstance(answer, MiniError):
                    raise answer
                progress.add(*answer)
        finally:
            for process in processes:  # they have nothing left to do, or this run has failed or was interrupted
                process.kill()
            for thread in threads:
                thread.join()
            for process in processes:
                process.communicate()

    def _start(self) -> subprocess.Popen:
        # One thread a process: the processes are the parallelism, and a process with threads must not fork.
        env = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "manifests.mini.synth"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env
        )

    def _serve(self, process: subprocess.Popen) -> None:
        while True:
            try:
                chapter = self.todo.get_nowait()
            except queue.Empty:
                return
            request = {
                "name": chapter.name,
                "partial": str(self.tree / ".partial" / f"{chapter.name}.{process.pid}"),
                "final": str(self.tree / chapter.folder),
                "utterances": chapter.jobs,
            }
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:  # the process is gone
                answer = ""
            if not answer:
                last = (process.stderr.read().strip().splitlines() or ["the process died without a message"])[-1]
                self.done.put(MiniError(f"chapter {chapter.name} could not be made: {last.removeprefix('error: ')}"))
                return
            self.done.put((len(chapter.jobs), json.loads(answer)["seconds"]))
