"""Audio files and folders to text: any rate, any number of channels, and the rest goes on when one file is bad."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes import transcribe
from recipes.decode import Decoder, load_model
from recipes.metrics import count_errors
from recipes.pretrained import pretrained_path
from recipes.transcribe import find_audio, pieces, probe, read_mono
from tests.recipes import tiny
from tests.recipes.tiny import RATE, write_audio


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.nemo"
    tiny.model().save_to(str(path))
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr), in this process."""
    try:
        status = transcribe.main(list(map(str, arguments)))
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_folders_are_searched_sorted_and_every_file_comes_once(tmp_path):
    for name in ("b/2.wav", "b/1.flac", "a/deep/x.ogg", "b/notes.txt", "top.WAV"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "silent").mkdir()
    for name in ("b/._1.flac", ".trash/old.wav", "silent/._x.wav"):  # hidden
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, problems = find_audio([tmp_path / "b" / "2.wav", tmp_path, tmp_path / "silent", tmp_path / "gone.wav"])
    assert [str(f.relative_to(tmp_path)) for f in files] == ["b/2.wav", "a/deep/x.ogg", "b/1.flac", "top.WAV"]
    assert problems == [
        f"{tmp_path}/silent: no audio in this folder (.wav, .flac, .mp3, .ogg, .opus)",
        f"{tmp_path}/gone.wav: no such file or folder",
    ]


def test_a_folder_that_is_hidden_itself_is_searched_when_named(tmp_path):
    (tmp_path / ".mine").mkdir()
    (tmp_path / ".mine" / "a.wav").touch()
    (tmp_path / ".mine" / ".b.wav").touch()
    named = tmp_path / ".mine" / ".b.wav"
    assert find_audio([tmp_path / ".mine", named]) == ([tmp_path / ".mine" / "a.wav", named], [])


@pytest.mark.parametrize(
    "suffix, subtype", [(".wav", None), (".flac", None), (".ogg", "VORBIS"), (".mp3", None), (".opus", "OPUS")]
)
def test_formats_are_read_at_the_models_rate(tmp_path, suffix, subtype):
    path = tmp_path / f"tone{suffix}"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    soundfile.write(path, tone, 48000, format="OGG" if suffix == ".opus" else None, subtype=subtype)
    samples = read_mono({"audio_filepath": str(path)}, RATE)
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(RATE, rel=0.1)
    peak = np.abs(np.fft.rfft(samples[:RATE])).argmax() * RATE / len(samples[:RATE])
    assert peak == pytest.approx(440, abs=5)


def test_channels_are_averaged(tmp_path):
    left, right = np.full(400, 0.5), np.full(400, -0.25)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    assert np.allclose(read_mono({"audio_filepath": str(tmp_path / "stereo.wav")}, RATE), 0.125)


def test_paths_and_texts_go_to_stdout_in_order_and_equal_nemos(saved, tmp_path, capsys):
    files = [write_audio(tmp_path / f"{name}.wav", seconds, seed=i) for i, (name, seconds) in enumerate(
        [("z", 0.5), ("m", 2.0), ("a", 1.1)])]
    listed = f"audio=[{files[0]},{files[1]},{files[2]}]"
    status, out, err = run(capsys, f"model={saved}", listed, "device=cpu")
    assert status == 0 and err == ""
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == list(map(str, files))
    # of its own: NeMo's transcribe() leaves a model in the state of training, dropout and all
    expected = load_model(saved, "cpu").transcribe([str(f) for f in files], batch_size=1, verbose=False)
    assert [line[1] for line in lines] == [hypothesis.text for hypothesis in expected]


def test_bad_files_are_named_and_the_others_transcribed(saved, tmp_path, capsys):
    good = write_audio(tmp_path / "in" / "good.flac", 0.8)
    stereo = write_audio(tmp_path / "in" / "stereo.wav", 0.8, channels=2)
    (tmp_path / "in" / "broken.wav").write_text("no audio")
    soundfile.write(tmp_path / "in" / "empty.wav", np.zeros(0), RATE)
    whole = write_audio(tmp_path / "in" / "truncated.flac", 3.0).read_bytes()
    (tmp_path / "in" / "truncated.flac").write_bytes(whole[: len(whole) // 3])
    write_audio(tmp_path / "in" / "click.wav", 0.004)
    soundfile.write(tmp_path / "in" / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    status, out, err = run(capsys, f"model={saved}", f"audio=[{tmp_path}/in,{tmp_path}/gone.wav]", "device=cpu")
    assert status == 1
    assert [line.split("\t")[0] for line in out.splitlines() if "truncated" not in line] == [str(good), str(stereo)]
    for said in ("gone.wav: no such file", "broken.wav: not readable", "empty.wav: no samples",
                 "click.wav: 0.004 s is too short", "nan.wav: holds samples that are not finite",
                 "stereo.wav: several channels, averaged"):
        assert err.count(said) == 1, err
    assert all(line.startswith("transcribe.py: ") for line in err.splitlines())


def test_output_is_text_or_a_manifest(saved, tmp_path, capsys):
    audio = write_audio(tmp_path / "one.wav", 1.0)
    _, printed, _ = run(capsys, f"model={saved}", f"audio={audio}", "device=cpu")
    status, out, _ = run(capsys, f"model={saved}", f"audio={audio}", f"output={tmp_path}/o.txt", "device=cpu")
    assert status == 0 and (tmp_path / "o.txt").read_text() == printed and "o.txt: 1 files" in out
    status, _, _ = run(capsys, f"model={saved}", f"audio={audio}", f"output={tmp_path}/o.json", "device=cpu")
    row = json.loads((tmp_path / "o.json").read_text())
    assert status == 0 and row["audio_filepath"] == str(audio) and row["duration"] == 1.0
    assert row["pred_text"] == printed.rstrip("\n").split("\t")[1]


def test_a_path_in_brackets_that_is_there_is_that_path(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[it's, x].flac", "[y].wav", "y.wav"):
        write_audio(Path(name), 0.5)
    for given, expected in (("[it's, x].flac", "[it's, x].flac"), ("[y].wav", "[y].wav"), ("[y.wav]", "y.wav")):
        status, out, err = run(capsys, f"model={saved}", f"audio={given}", "device=cpu")
        assert status == 0 and out.split("\t")[0] == expected, err


def test_bad_arguments_are_one_line(saved, tmp_path, capsys):
    audio = write_audio(tmp_path / "a.wav", 0.3)
    for arguments, status, said in (
        ([f"model={saved}"], 2, "missing mandatory option: give audio=..."),
        ([f"model={saved}", f"audio={audio}", "output=x.csv"], 2, "give a name that ends in .txt or .json"),
        ([f"model={saved}", f"audio={audio}", "piece_seconds=0.5"], 2, "piece_seconds=0.5: must be 1 or more"),
        ([f"model={saved}", f"audo={audio}"], 2, "did you mean audio?"),
        ([f"model={tmp_path}", f"audio={audio}"], 2, "is a folder"),
    ):
        found = run(capsys, *arguments)
        assert found[0] == status and said in found[2] and found[2].count("\n") == 1 and found[1] == ""
    status, out, err = run(capsys, f"model={saved}", f"audio={tmp_path}/gone.wav")
    assert status == 1 and err.splitlines()[-1] == "transcribe.py: nothing to transcribe" and out == ""


def with_pauses(path: Path, utterances: list, pause: float, rate: int = RATE) -> Path:
    """The utterances in one file, a pause of hardly anything after each."""
    silence = 1e-4 * np.random.default_rng(0).standard_normal(int(pause * rate))
    soundfile.write(path, np.concatenate([part for one in utterances for part in (one, silence)]), rate)
    return path


@pytest.mark.parametrize("rate", [RATE, 11025, 44100])
def test_long_recordings_are_cut_in_their_pauses_and_nothing_is_lost(tmp_path, rate):
    noise = 0.3 * np.random.default_rng(1).standard_normal((9, 5 * rate))
    path = with_pauses(tmp_path / "long.wav", list(noise), pause=1.0, rate=rate)
    row = probe(path)
    assert pieces(row, 27.0) == [row]  # 54 s are not more than twice that
    cut = pieces(row, 8.0)
    assert len(cut) == 9 and all(3 < piece["duration"] <= 8 for piece in cut)
    for piece in cut[1:]:
        assert 5 <= piece["offset"] % 6 <= 6
    read = np.concatenate([read_mono(piece, rate) for piece in cut])
    assert np.array_equal(read, read_mono(row, rate))


def test_a_recording_just_over_two_pieces_has_no_piece_too_short_to_be_understood(tmp_path):
    path = write_audio(tmp_path / "a.wav", 8.03)
    assert all(1.0 <= piece["duration"] <= 4 for piece in pieces(probe(path), 4.0))


def test_a_long_recording_is_one_line_with_the_texts_of_its_pieces(saved, tmp_path, capsys):
    rng = np.random.default_rng(2)
    long = with_pauses(tmp_path / "long.wav", list(0.3 * rng.standard_normal((4, RATE))), pause=0.5)
    short = write_audio(tmp_path / "short.wav", 1.0)
    status, out, err = run(capsys, f"model={saved}", f"audio=[{long},{short}]", "device=cpu", "piece_seconds=1.9",
                           f"output={tmp_path}/o.json")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "o.json").read_text().splitlines()]
    assert [(row["audio_filepath"], row["duration"]) for row in rows] == [(str(long), 6.0), (str(short), 1.0)]
    parts = []
    for i, piece in enumerate(pieces(probe(long), 1.9)):
        soundfile.write(tmp_path / f"{i}.wav", read_mono(piece, RATE), RATE)
        parts.append(probe(tmp_path / f"{i}.wav"))
    texts = Decoder(load_model(saved, "cpu"), parts, read=read_mono).run()
    assert len(texts) > 3 and rows[0]["pred_text"] == " ".join(text.strip() for text in texts if text.strip())


def test_a_long_recording_that_cannot_be_read_is_named_once(saved, tmp_path, capsys, monkeypatch):
    long = write_audio(tmp_path / "long.wav", 6.0)
    short = write_audio(tmp_path / "short.wav", 1.0)

    def read(row, rate):
        if row.get("offset"):
            raise RuntimeError(f"{row['audio_filepath']}: not readable as audio")
        return read_mono(row, rate)

    monkeypatch.setattr(transcribe, "read_mono", read)
    status, out, err = run(capsys, f"model={saved}", f"audio=[{long},{short}]", "device=cpu", "piece_seconds=1.0")
    assert status == 1 and err.count("not readable") == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(short)]


@pytest.mark.skipif(not pretrained_path("conformer").is_file(), reason="no pretrained weights here")
def test_real_utterances_in_one_long_file_give_all_their_texts(librispeech_sample, tmp_path):
    model = load_model(pretrained_path("conformer"), "cpu")
    files, seconds = [], 0.0
    for path in sorted(librispeech_sample.rglob("*.flac")):
        files.append(path)
        seconds += soundfile.info(path).duration + 0.3
        if seconds > 65:
            break
    long = with_pauses(tmp_path / "long.wav", [read_mono({"audio_filepath": str(path)}, RATE) for path in files], 0.3)
    alone = " ".join(row["pred_text"] for row in transcribe.transcribe(model, files))
    [row] = transcribe.transcribe(model, [long])
    assert count_errors([alone], [row["pred_text"]])[1].rate < 0.15
