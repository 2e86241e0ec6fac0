"""The process that speaks: the only module that loads espeak-ng (GPL-3), started as ``python -m manifests.mini.synth``.

It reads one chapter a line as JSON from standard input, writes that chapter's folder and answers with one line of
JSON; it ends when its input ends. The rest of the project talks to it through these two pipes only.

espeak-ng keeps state between utterances (random numbers, phase of the pitch flutter, filter memory), so the same
sentence sounds different after another one, even with the seed set again. Here each utterance is spoken in a fork of
the freshly initialised process: its samples depend on its own job and on nothing that was spoken before it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np

from manifests.mini.audio import SAMPLE_RATE, finish, fits_ctc, write_flac

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, none to a sound card
NO_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report errors, do not end the process
RATE, VOLUME, PITCH, SPREAD = 1, 2, 3, 4  # espeak_PARAMETER
UTF8 = 1
SLOWEST = 100  # words a minute
PARENT = os.getppid()
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class SynthError(RuntimeError):
    """The synthesizer cannot do what a job asks; the message is one line."""


class Synthesizer:
    """espeak-ng through ctypes. ``rate``: sampling rate of what ``speak`` returns, Hz."""

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise SynthError(f"espeak-ng is not installed ({error}); install the project's extra: synth") from None
        self.data = Path(espeakng_loader.get_data_path())
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self.lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.lib.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self.rate = self.lib.espeak_Initialize(SYNCHRONOUS, 0, str(self.data).encode(), NO_EXIT)
        if self.rate <= 0:
            raise SynthError(f"espeak-ng could not start with the data in {self.data}")
        self._chunks: list[bytes] = []
        self._callback = _CALLBACK(self._collect)  # kept: ctypes does not hold a reference
        self.lib.espeak_SetSynthCallback(self._callback)
        # Read the lists of voices and the English dictionary once, here, and not again in each fork: half the time.
        # Always with the same words, so each process forks from the same state.
        self.speak("one moment please", "en", 160, 50, 50, 0)
        gc.collect()
        gc.freeze()  # collections would touch, and so copy, the memory that the forks share

    def _collect(self, samples, count, _events) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def check_voice(self, voice: str) -> None:
        """Raise SynthError unless the variant exists: espeak-ng itself silently passes over an unknown one.

        Looks at the files only: loading a voice here would change the state that the forks start from.
        """
        variant = voice.partition("+")[2]
        if variant and not (self.data / "voices" / "!v" / variant).is_file():
            raise SynthError(f"espeak-ng has no voice variant {variant!r} (voice {voice!r})")

    def speak(self, text: str, voice: str, rate: int, pitch: int, spread: int, seed: int) -> np.ndarray:
        """``text`` as int16 samples (T,) at ``self.rate`` Hz. ``rate``: words a minute; the others as espeak-ng's."""
        self._chunks.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SynthError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_ng_SetRandSeed(seed & 0x7FFFFFFF)
        # Volume 70 of 100: the loudest variants would clip inside espeak-ng at 100. audio.finish sets the level.
        for parameter, value in ((RATE, rate), (VOLUME, 70), (PITCH, pitch), (SPREAD, spread)):
            if self.lib.espeak_SetParameter(parameter, int(value), 0) != 0:
                raise SynthError(f"espeak-ng refused the value {value} for its parameter {parameter}")
        data = text.encode() + b"\0"
        if self.lib.espeak_Synth(data, len(data), 0, 0, 0, UTF8, None, None) != 0:
            raise SynthError(f"espeak-ng refused the text {text[:60]!r}")
        self.lib.espeak_Synchronize()
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16)


def speak_in_fork(synth: Synthesizer, job: dict, rate: int) -> np.ndarray:
    """``synth.speak`` for ``job`` in a fork, so that nothing of it is left in this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                try:
                    samples_T = synth.speak(job["spoken"], job["voice"], rate, job["pitch"], job["spread"], job["seed"])
                    pipe.write(samples_T.tobytes())
                    status = 0
                except SynthError as error:
                    pipe.write(str(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        raise SynthError(f"{job['id']}: {data.decode(errors='replace') or 'the speaking process died'}")
    return np.frombuffer(data, dtype=np.int16)


def make_utterance(synth: Synthesizer, job: dict, path: Path) -> float:
    """Speak one utterance into ``path``; returns its seconds. Slows down until the text fits the CTC frames.

    Raises SynthError when it cannot be spoken, or not slowly enough.
    """
    rate = job["rate"]
    while True:
        try:
            samples_T = finish(speak_in_fork(synth, job, rate), synth.rate, job)
        except ValueError as error:
            raise SynthError(f"{job['id']}: {error}") from None
        if fits_ctc(job["text"], len(samples_T)):
            break
        rate = int(rate * 0.93)
        if rate < SLOWEST:
            raise SynthError(f"{job['id']}: too many characters a second even at {SLOWEST} words a minute")
    write_flac(path, samples_T)
    return len(samples_T) / SAMPLE_RATE


def make_chapter(synth: Synthesizer, chapter: dict) -> dict:
    """Write the folder ``chapter["final"]``: its FLAC files, its ``.trans.txt``, and then the folder's own name.

    ``chapter``: ``name`` (speaker-chapter), ``partial`` and ``final`` (paths), ``utterances`` (list of jobs).
    Returns {"seconds": total}. Raises SynthError when an utterance cannot be made.
    """
    partial, final = Path(chapter["partial"]), Path(chapter["final"])
    for voice in {job["voice"] for job in chapter["utterances"]}:
        synth.check_voice(voice)
    partial.mkdir(parents=True)
    seconds = 0.0
    for job in chapter["utterances"]:
        if os.getppid() != PARENT:  # killed: leave the tree to the run that comes next
            raise SynthError("the run that started this process is gone")
        seconds += make_utterance(synth, job, partial / f"{job['id']}.flac")
    lines = [f"{job['id']} {job['text'].upper()}\n" for job in chapter["utterances"]]
    (partial / f"{chapter['name']}.trans.txt").write_text("".join(lines), encoding="ascii")
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(partial, final)
    return {"seconds": seconds}


def main() -> int:
    """Serve chapters until standard input ends. Exit code 1, with one line on standard error, on a failure."""
    try:
        synth = Synthesizer()
        for line in sys.stdin:
            print(json.dumps(make_chapter(synth, json.loads(line))), flush=True)
    except (SynthError, OSError, RuntimeError) as error:  # RuntimeError: soundfile's
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
