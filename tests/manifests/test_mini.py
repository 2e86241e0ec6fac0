"""The embedded corpus as a tree of files: made small, and once killed on the way."""

import ast
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests.librispeech import build_rows
from manifests.mini import MiniError, audio, build, make
from manifests.mini.__main__ import main
from manifests.mini.plan import Chapter, plan
from manifests.mini.stats import read_tree, report
from manifests.mini.text import SIZES
from manifests.mini.voices import Voice

ROOT = Path(__file__).resolve().parent.parent.parent
SCALE = 0.02
needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (extra 'synth') is not installed"
)


def digests(tree: Path) -> dict[str, str]:
    files = (path for path in sorted(tree.rglob("*")) if path.is_file())
    return {str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if importlib.util.find_spec("espeakng_loader") is None:
        pytest.skip("espeakng-loader (extra 'synth') is not installed")
    return make(tmp_path_factory.mktemp("mini"), seed=0, jobs=2, scale=SCALE, quiet=True)


@pytest.fixture(scope="module")
def before(tree):
    return digests(tree)


# ------------------------------------------------------------------------------------------------ the tree
def test_tree_has_librispeech_shape(tree):
    utterances = 0
    for subset in SIZES:
        transcripts = sorted((tree / subset).glob("*/*/*.trans.txt"))
        assert transcripts
        for transcript in transcripts:
            speaker, chapter = transcript.parent.parent.name, transcript.parent.name
            assert speaker.isdigit() and chapter.isdigit() and transcript.name == f"{speaker}-{chapter}.trans.txt"
            lines = transcript.read_text(encoding="ascii").splitlines()
            for i, line in enumerate(lines):
                assert re.fullmatch(rf"{speaker}-{chapter}-{i:04d}( [A-Z']+){{4,14}}", line)
            assert {path.name for path in transcript.parent.iterdir()} == {transcript.name} | {
                f"{line.split()[0]}.flac" for line in lines
            }
            utterances += len(lines)
    assert utterances == sum(max(1, round(SCALE * size)) for size in SIZES.values())
    assert {path.name for path in tree.iterdir()} == set(SIZES) | {"SPEAKERS.TXT", ".started", ".completed", ".lock"}


def test_sound(tree):
    for path in sorted(tree.rglob("*.flac")):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "FLAC")
        assert 0.8 < info.duration < 10
        samples_T, _ = soundfile.read(path)
        assert 0.05 < np.max(np.abs(samples_T)) < 0.9  # neither silent nor clipped
        assert -32 < 20 * np.log10(np.sqrt(np.mean(samples_T**2))) < -15
        frames = samples_T[: len(samples_T) // 160 * 160].reshape(-1, 160)
        level = 20 * np.log10(np.sqrt(np.mean(frames**2, axis=1)) + 1e-9)
        assert -95 < np.min(level) < np.max(level) - 25  # quiet background, but no digital silence


def test_text_fits_the_ctc_frames(tree):
    for rows in read_tree(tree).values():
        for utterance, text, seconds in rows:
            assert audio.ctc_symbols(text) <= 0.8 * 25 * seconds, utterance


def test_librispeech_builder_reads_it(tree):
    rows = build_rows(tree, "train")
    jobs = [job for chapter in plan(0, SCALE) if chapter.subset == "train" for job in chapter.jobs]
    planned = {job["id"]: job["text"] for job in jobs}
    assert {row["utterance"]: row["text"] for row in rows} == planned
    assert {row["gender"] for row in rows} == {"F", "M"}


def test_speakers_txt(tree):
    lines = (tree / "SPEAKERS.TXT").read_text().splitlines()
    rows = [[field.strip() for field in line.split("|")] for line in lines if not line.startswith(";")]
    assert all(len(row) == 5 for row in rows)
    speakers = {path.name for subset in SIZES for path in (tree / subset).iterdir()}
    assert {row[0] for row in rows} == speakers
    minutes = sum(seconds for found in read_tree(tree).values() for _, _, seconds in found) / 60
    assert sum(float(row[3]) for row in rows) == pytest.approx(minutes, abs=0.01 * len(rows))
    assert {row[2] for row in rows} <= {"train", "dev", "test-unseen-voices"} and rows[0][2] == "train"


def test_report(tree, capsys):
    assert main([str(tree.parent), "--stats"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == report(tree)
    assert re.search(rf"^train +16 +{round(SCALE * SIZES['train'])} ", out, re.M)
    assert main([str(tree / "nowhere"), "--stats"]) == 1
    assert "is not a folder: make the corpus first" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- seed, jobs, starting again
def test_any_number_of_jobs_gives_the_same_bytes(tmp_path, before):
    assert digests(make(tmp_path, seed=0, jobs=1, scale=SCALE, quiet=True)) == before


def test_complete_tree_is_left_as_it_is(tree, capsys):
    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert make(tree.parent, seed=0, scale=SCALE) == tree
    assert "is complete (seed 0, scale 0.02): left as it is" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == times


def test_another_complete_tree_is_not_overwritten(tree, before):
    with pytest.raises(MiniError, match=r"another complete corpus \(seed 0\); give another folder, or --force"):
        make(tree.parent, seed=1, scale=SCALE)
    assert digests(tree) == before


@needs_espeak
def test_force_and_another_seed(tmp_path, before):
    first = digests(make(tmp_path, seed=0, scale=0.001, quiet=True))
    second = digests(make(tmp_path, seed=1, scale=0.001, force=True, quiet=True))
    sounds = [name for name in first if name.endswith(".flac")]
    assert len(sounds) == 5 and set(first) == set(second)
    assert all(first[name] != second[name] for name in sounds)
    assert all(first[name] == before[name] for name in sounds)  # an utterance does not depend on the scale
    assert digests(make(tmp_path, seed=0, scale=0.001, update=True, quiet=True)) == first


@needs_espeak
def test_killed_run_leaves_whole_chapters_and_is_resumed(tmp_path, before):
    command = [sys.executable, "-m", "manifests.mini", str(tmp_path), "--scale", str(SCALE)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    tree = tmp_path / "LibriSpeech"
    give_up = time.monotonic() + 120
    while len(list(tree.glob("train/*/*/*.trans.txt"))) < 3 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tree / ".completed").exists()
    chapters = [chapter for subset in SIZES for chapter in tree.glob(f"{subset}/*/*")]
    planned = len(plan(scale=SCALE))
    assert 3 <= len(chapters) < planned
    for chapter in chapters:
        for path in chapter.iterdir():
            name = str(path.relative_to(tree))
            assert hashlib.sha256(path.read_bytes()).hexdigest() == before[name]
    (tree / ".partial" / "101-101000.0").mkdir(parents=True)  # as an interrupted process leaves it
    kept = {chapter: chapter.stat().st_ino for chapter in chapters}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\d+ of {planned} chapters are there, making the others", done.stdout)
    assert digests(tree) == before
    assert {chapter: chapter.stat().st_ino for chapter in chapters} == kept
    assert not (tree / ".partial").exists()


@needs_espeak
def test_incomplete_tree_of_another_seed_is_made_anew(tmp_path):
    tree = make(tmp_path, seed=5, scale=0.001, quiet=True)
    (tree / ".completed").unlink()
    make(tmp_path, seed=0, scale=0.001, quiet=True)
    fresh = make(tmp_path / "fresh", seed=0, scale=0.001, quiet=True)
    assert digests(tree) == digests(fresh)


# ------------------------------------------------------------------------------------------------ what may go wrong
def test_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "LibriSpeech" / "train").mkdir(parents=True)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not empty and was not made by manifests.mini" in error
    assert os.listdir(tmp_path / "LibriSpeech") == ["train"]


def test_missing_extra_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "install the extra 'synth'" in error and "espeakng-loader" in error
    assert not any(tmp_path.iterdir())


def test_synth_process_names_the_extra_too(tmp_path):
    (tmp_path / "espeakng_loader.py").write_text("raise ImportError('no such wheel')\n")
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run(
        [sys.executable, "-m", "manifests.mini.synth"], input="", env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: espeak-ng is not installed (no such wheel); install the project's extra: synth\n"


@needs_espeak
def test_unknown_voice_is_one_line_and_leaves_no_process(tmp_path):
    job = dict(plan(0, 0.001)[0].jobs[0], voice="en-us+nosuch")
    chapter = Chapter("train", Voice(9, "F", "No", "en-us+nosuch", 150, 50, 50), 9000, (job,))
    with pytest.raises(MiniError) as caught:
        build._Crew(tmp_path, 1, lambda line: None).run([chapter])
    assert str(caught.value) == (
        "chapter 9-9000 could not be made: espeak-ng has no voice variant 'nosuch' (voice 'en-us+nosuch')"
    )
    assert not (tmp_path / "train").exists()


@needs_espeak
def test_second_process_on_the_same_tree_is_refused(tmp_path):
    (tmp_path / "LibriSpeech").mkdir()
    with open(tmp_path / "LibriSpeech" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MiniError, match="another process is writing"):
            make(tmp_path, scale=0.001)


@pytest.mark.parametrize("bad", [{"scale": 0}, {"scale": 21}, {"scale": float("nan")}, {"jobs": 0}])
def test_settings_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match=r"must be (over 0 and at most 20|at least 1)"):
        make(tmp_path, **bad)


def test_only_the_synth_module_imports_espeak():
    importers = set()
    for folder in ("manifests", "recipes", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] == "espeakng_loader" or name == "manifests.mini.synth" for name in names):
                    importers.add(str(path.relative_to(ROOT)))
    assert importers == {"manifests/mini/synth.py"}


def test_importing_the_package_is_light():
    code = "import sys, manifests.mini; print([m for m in ('numpy', 'torch', 'soundfile', 'soxr') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ audio
def test_ctc_symbols():
    assert audio.ctc_symbols("") == 0
    assert audio.ctc_symbols("abc") == 3
    assert audio.ctc_symbols("better apple") == 14  # 12 characters, tt and pp
    assert audio.fits_ctc("a" * 10, 16000) and not audio.fits_ctc("a" * 11, 16000)  # 19 and 21 of 20 frames


def test_trim_leaves_the_lead_and_tail_that_were_asked_for():
    burst_T = np.ones(1600)
    signal_T = np.concatenate([np.zeros(8000), burst_T, np.zeros(160)])
    out_T = audio.trim(signal_T, lead=0.1, tail=0.2)
    assert len(out_T) == 1600 + 1600 + 3200
    assert np.array_equal(np.flatnonzero(out_T), np.arange(1600, 3200))
    for empty_T in (np.zeros(1600), np.zeros(0)):
        with pytest.raises(ValueError, match="silence"):
            audio.trim(empty_T, 0.1, 0.1)


def test_finish_sets_level_and_noise():
    time_T = np.arange(22050) / 22050
    tone_T = (12000 * np.sin(2 * np.pi * 440 * time_T)).astype(np.int16)
    settings = {"lead": 0.2, "tail": 0.2, "slope": 0.0, "level": -25.0, "snr": 30.0, "seed": 1}
    out_T = audio.finish(tone_T, 22050, settings).astype(float) / 32767
    assert len(out_T) == pytest.approx(1.4 * 16000, abs=320)
    assert 20 * np.log10(np.sqrt(np.mean(out_T**2))) == pytest.approx(-25, abs=0.2)
    assert 20 * np.log10(np.sqrt(np.mean(out_T[:3000] ** 2))) == pytest.approx(-55, abs=2)
    spectrum = np.abs(np.fft.rfft(out_T[3200:19200]))
    assert np.argmax(spectrum) == pytest.approx(440, abs=2)  # the resampling keeps the pitch
    loud_T = audio.finish(tone_T, 22050, {**settings, "level": 3.0})
    assert np.max(np.abs(loud_T)) <= round(audio.PEAK * 32767)


@pytest.mark.parametrize("length", [1, 7, 1600, 40001])
def test_room_noise_has_unit_rms(length):
    noise_T = audio.room_noise(length, np.random.default_rng(0))
    assert noise_T.shape == (length,)
    assert np.sqrt(np.mean(noise_T**2)) == pytest.approx(1, abs=1e-6)


def test_marks_name_what_the_tree_is_made_of(tree):
    mark = json.loads((tree / ".completed").read_text())
    assert (mark["corpus"], mark["seed"], mark["scale"]) == ("mini", 0, SCALE)
    assert mark == json.loads((tree / ".started").read_text())
