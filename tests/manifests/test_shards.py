"""Shards: every row once, the same bytes from any number of workers, nothing half-written under a final name."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import soundfile

from manifests import shards
from manifests.schema import ManifestError, read_manifest
from manifests.shards import main, verify_shards, write_shards
from manifests.shards_format import COMBINED, ShardError, read_shard, shard_path
from manifests.validate import validate
from tests.recipes.tiny import RATE, write_audio, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """30 utterances in FLAC, WAV and Opus."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(30):
        kind = "wav" if i == 7 else "flac"
        path = write_audio(folder / "audio" / f"s{i % 3}" / f"u{i}.{kind}", 0.3 + 0.05 * (i % 5), seed=i)
        if i == 11:
            samples, _ = soundfile.read(path)
            path = path.with_suffix(".opus")
            soundfile.write(path, samples, RATE, format="OGG", subtype="OPUS")
        row = {"audio_filepath": str(path), "duration": soundfile.info(path).duration, "sampling_rate": RATE,
               "text": f"it's utterance {'abcdefghij'[i % 10]}", "utterance": f"u{i}"}
        if i == 5:
            row |= {"audio_filepath": os.path.relpath(path, folder), "text": "naïve café", "extra": {"a": [1, None]}}
        if i == 6:
            del row["sampling_rate"]
        rows.append(row)
    return write_rows(folder / "train.json", rows)


def contents(folder: Path) -> dict[str, str]:
    """Path below the folder -> SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def written(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards([manifest], out, hours=0.001)
    return out


def test_each_row_is_there_once_with_its_audio_byte_for_byte(manifest, written):
    source = {row["utterance"]: row for row in read_manifest(manifest)}
    rows = read_manifest(written / COMBINED)
    assert sorted(row["utterance"] for row in rows) == sorted(source)
    assert [row["utterance"] for row in rows] != list(source)  # dealt at random
    for row in rows:
        own = source[row["utterance"]]
        audio = Path(manifest.parent, own["audio_filepath"]).read_bytes()
        assert read_shard(shard_path(row, written / COMBINED), row) == audio
        with tarfile.open(written / f"audio_{row['shard_id']}.tar") as tar:
            assert tar.extractfile(row["audio_filepath"]).read() == audio
        left = {key: value for key, value in row.items() if key not in ("shard_id", "tar_offset", "tar_bytes")}
        assert left == {"sampling_rate": RATE, **own, "audio_filepath": Path(own["audio_filepath"]).name}
    names = [f"manifest_{shard}.json" for shard in range(rows[-1]["shard_id"] + 1)]
    parts = [read_manifest(written / "sharded_manifests" / name) for name in names]
    assert len(parts) >= 3 and [row for part in parts for row in part] == rows
    assert not (written / shards.WORK).exists()


def test_the_bytes_do_not_depend_on_workers_or_place(manifest, written, tmp_path):
    for workers in (1, 3):
        write_shards([manifest], tmp_path / str(workers), hours=0.001, workers=workers)
        assert contents(tmp_path / str(workers)) == contents(written)
    write_shards([manifest], tmp_path / "other", hours=0.001, seed=1)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(written).keys() and other != contents(written)


def test_an_order_can_be_kept_and_manifests_are_taken_as_one(manifest, tmp_path):
    rows = read_manifest(manifest)
    for row in rows:
        row["audio_filepath"] = str(manifest.parent / row["audio_filepath"])
    halves = [write_rows(tmp_path / "a.json", rows[:11]), write_rows(tmp_path / "b.json", rows[11:])]
    record = write_shards(halves, tmp_path / "out", hours=0.001, seed=None)
    found = read_manifest(tmp_path / "out" / COMBINED)
    assert [row["utterance"] for row in found] == [row["utterance"] for row in rows]
    assert record["utterances"] == 30 and record["seconds"] == pytest.approx(sum(row["duration"] for row in rows))


def test_names_that_a_tar_or_nemo_would_confuse_are_replaced(tmp_path):
    names = ["a/x.flac", "b/x.flac", "c/x-sub1.flac", f"{'l' * 110}.flac", "ü.flac", "row000000000.flac"]
    rows = [{"audio_filepath": str(write_audio(tmp_path / name, 0.2, seed=i)), "duration": 0.2, "text": "a"}
            for i, name in enumerate(names)]
    manifest = write_rows(tmp_path / "m.json", rows)
    write_shards([manifest], tmp_path / "out", seed=None)
    found = read_manifest(tmp_path / "out" / COMBINED)
    assert [row["audio_filepath"] for row in found] == [
        "_row000000000.flac", *(f"row00000000{i}.flac" for i in range(1, 5)), "row000000000.flac"
    ]
    assert [row.get("utterance") for row in found] == ["x", "x", "x-sub1", "l" * 110, "ü", None]
    for name, row in zip(names, found):
        assert read_shard(shard_path(row, tmp_path / "out" / COMBINED), row) == (tmp_path / name).read_bytes()
    assert verify_shards([manifest], tmp_path / "out")[1] == []


def test_a_killed_run_goes_on_and_gives_the_same_bytes(manifest, written, tmp_path, monkeypatch):
    out, finished = tmp_path / "out", []
    write = shards.write_shard

    def until_the_third(shard, *rest):
        if len(finished) == 2:
            Path(out, shards.WORK, f"audio_{shard}.tar.part").write_bytes(b"half")
            raise KeyboardInterrupt
        finished.append(shard)
        return write(shard, *rest)

    monkeypatch.setattr(shards, "write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_shards([manifest], out, hours=0.001)
    assert sorted(path.name for path in out.glob("*.tar")) == ["audio_0.tar", "audio_1.tar"]
    assert not (out / COMBINED).exists() and not (out / "shards.json").exists()
    again = []
    monkeypatch.setattr(shards, "write_shard", lambda shard, *rest: again.append(shard) or write(shard, *rest))
    write_shards([manifest], out, hours=0.001)
    assert again == list(range(2, len(again) + 2)) and contents(out) == contents(written)
    again.clear()
    write_shards([manifest], out, hours=0.001)
    assert again == [] and contents(out) == contents(written)
    (out / "audio_1.tar").write_bytes(b"cut off")
    write_shards([manifest], out, hours=0.001)
    assert again == [1] and contents(out) == contents(written)


def test_kill_9_at_any_moment_leaves_only_whole_files_and_no_worker(manifest, written, tmp_path):
    out = tmp_path / "out"
    options = ["--out", str(out), "--hours", "0.001", "--workers", "2"]
    command = [sys.executable, "-m", "manifests.shards", str(manifest), *options]
    whole, draw = contents(written), random.Random(0)
    # A slow disk: the kill comes while shards are being written.
    slow = ("import sys,time,manifests.shards_work as w,manifests.shards as s;c=w._checked;"
            "w._checked=lambda *a:(time.sleep(0.03),c(*a))[1];sys.exit(s.main(sys.argv[1:]))")
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(out.glob(f"{shards.WORK}/*.part")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name, digest in contents(out).items():
            assert name.startswith(shards.WORK) or digest == whole[name], name
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "complete: 30 utterances" in done.stdout, done.stderr
    assert contents(out) == whole


def test_verify_finds_each_kind_of_damage(manifest, written, tmp_path, capsys):
    def damaged(change) -> list[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        write_shards([manifest], out, hours=0.001)
        change(out)
        return verify_shards([manifest], out)[1]

    def flip(out):
        data = bytearray((out / "audio_1.tar").read_bytes())
        data[700] ^= 1
        (out / "audio_1.tar").write_bytes(data)

    def drop_a_row(out):
        path = out / "sharded_manifests" / "manifest_0.json"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))

    def change_a_text(out):
        path = out / "sharded_manifests" / "manifest_0.json"
        path.write_text(path.read_text().replace("utterance", "utterances", 1))

    assert verify_shards([manifest], written)[1] == []
    assert "audio_1.tar: its SHA-256" in "\n".join(damaged(flip))
    assert "audio_2.tar: cannot be read: No such file" in "\n".join(damaged(lambda out: (out / "audio_2.tar").unlink()))
    found = "\n".join(damaged(drop_a_row))
    assert "names, places and sizes" in found and "manifest_0.json:1: is not the row of" in found and COMBINED in found
    assert "manifest_0.json:1: is not the row of" in "\n".join(damaged(change_a_text))
    assert damaged(lambda out: (out / COMBINED).write_text("")) == [
        f"{sorted(tmp_path.iterdir())[-1] / COMBINED}: does not hold the rows of the shards' manifests"
    ]
    assert main([str(manifest), "--out", str(tmp_path / "0"), "--verify"]) == 1
    assert "audio_1.tar: its SHA-256" in capsys.readouterr().err
    assert main([str(manifest), "--out", str(written), "--verify", "--workers", "2"]) == 0
    assert "verified: 30 utterances" in capsys.readouterr().out


def test_a_row_that_cannot_be_sharded_is_named_by_file_and_line(manifest, written, tmp_path, capsys):
    good = {"audio_filepath": str(write_audio(tmp_path / "good.flac", 0.3)), "duration": 0.3, "text": "a"}
    stereo = str(write_audio(tmp_path / "stereo.flac", 0.3, channels=2))
    cut = tmp_path / "cut.flac"
    cut.write_bytes(Path(good["audio_filepath"]).read_bytes()[:-2000])
    bad = [
        ({"audio_filepath": stereo}, "stereo.flac has 2 channels"),
        ({"audio_filepath": str(cut)}, "cut.flac: "),
        ({"audio_filepath": str(tmp_path / "no.flac")}, "no audio at .*no.flac"),
        ({"duration": 0.5}, "duration is 0.5 s, .* has 0.300 s"),
        ({"sampling_rate": 8000}, "sampling_rate is 8000, .* has 16000"),
        ({"offset": 0.1}, "offset is 0.1: shards take whole files"),
        ({"duration": -1}, "duration is -1"),
        ({"shard_id": 3}, "shard_id is 3: the row is of shards already"),
    ]
    for number, (change, said) in enumerate(bad):
        path = write_rows(tmp_path / f"{number}.json", [good, {**good, **change}])
        for workers in (1, 2):
            with pytest.raises((ShardError, ManifestError), match=f"{path}:2: .*{said}"):
                write_shards([path], tmp_path / f"out{number}", hours=0.0001, seed=None, workers=workers)
        assert not (tmp_path / f"out{number}" / "shards.json").exists()
    assert main([str(tmp_path / "2.json"), "--out", str(tmp_path / "out2")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / '2.json'}:2: no audio at")


def test_a_folder_of_other_shards_is_left_alone(manifest, written, tmp_path, capsys):
    before = contents(written)
    assert main([str(manifest), "--out", str(written), "--hours", "0.002"]) == 1
    assert "holds shards of another manifest or other settings" in capsys.readouterr().err
    other = write_rows(tmp_path / "other.json", read_manifest(manifest)[:3])
    assert main([str(other), "--out", str(written), "--verify"]) == 1
    assert "30 utterances there, 3 here" in capsys.readouterr().err
    (tmp_path / "audio_0.tar").write_bytes(b"")
    assert main([str(other), "--out", str(tmp_path)]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert contents(written) == before


def test_a_manifest_and_tars_of_different_runs_are_told_apart(manifest, written, tmp_path):
    write_shards([manifest], tmp_path, hours=0.001, seed=9)
    row = read_manifest(written / COMBINED)[3]
    with pytest.raises(ShardError, match=f"{row['audio_filepath']} is not at byte {row['tar_offset']}"):
        read_shard(shard_path(row, tmp_path / COMBINED), row)
    tar = tmp_path / "audio_0.tar"
    last = read_manifest(tmp_path / "sharded_manifests" / "manifest_0.json")[-1]
    path = shard_path(last, tmp_path / COMBINED)
    os.truncate(tar, last["tar_offset"] + 10)
    with pytest.raises(ShardError, match=f"ends within .*, {last['tar_bytes'] - 10} bytes are missing"):
        read_shard(path, last)


def test_the_validator_takes_the_manifest_of_shards(manifest, written, tmp_path):
    labels = set("abcdefghijklmnopqrstuvwxyz 'ïé")

    def errors(path, **more):
        return [f for f in validate([path], labels, frames_per_second=0, **more).findings if f.severity == "error"]

    assert errors(written / COMBINED, audio=True) == []
    rows = read_manifest(written / COMBINED)
    gone = write_rows(tmp_path / COMBINED, rows)
    (tmp_path / "audio_1.tar").symlink_to(written / "audio_1.tar")
    found = errors(gone)
    assert {f.code for f in found} == {"missing_audio"} and "no audio at" in found[0].message
    assert len(found) == sum(row["shard_id"] != 1 for row in rows)


def test_the_writer_imports_nothing_heavy():
    code = "import sys, manifests.shards; print([m for m in ('torch', 'lhotse', 'nemo', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
