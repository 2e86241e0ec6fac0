"""What is packed: parts of a given size, the wheels that a node lacks, corpora."""

import hashlib
import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.schema import ManifestError, read_manifest, resolve_audio
from tests.tools.offline_bundle.conftest import make_wheel
from tools.offline_bundle import corpora, pack, wheels
from tools.offline_bundle.parts import BundleError, PartWriter, parse_size, read_index, unpack

TARGET = wheels.Target((3, 12), "manylinux_2_28_x86_64")


def write_parts(out: Path, files: dict[str, bytes], part_size: int) -> dict:
    writer = PartWriter(out, "bundle", part_size)
    for name, data in files.items():
        writer.add(name, data)
    return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".bundle/")}


@pytest.fixture
def files() -> dict[str, bytes]:
    generator = random.Random(0)
    return {f"a/{i}.bin": generator.randbytes(size) for i, size in enumerate([0, 1, 700, 30_000, 5000, 9000, 100])}


class TestParts:
    @settings(max_examples=30, deadline=None)
    @given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=12), part_size=st.integers(4096, 30_000))
    def test_no_part_is_over_its_size_and_all_comes_back(self, tmp_path_factory, sizes, part_size):
        folder = tmp_path_factory.mktemp("parts")
        files = {f"d{i % 3}/f{i}": bytes([i]) * size for i, size in enumerate(sizes)}
        index = write_parts(folder / "out", files, part_size)
        assert all(part["bytes"] <= part_size for part in index["parts"])
        assert all((folder / "out" / part["name"]).stat().st_size == part["bytes"] for part in index["parts"])
        total = sum(part["bytes"] for part in index["parts"])
        assert len(index["parts"]) <= 1 + total // (part_size - 2048)  # parts are full
        assert unpack(index, [folder / "out"], folder / "dest").complete
        assert contents(folder / "dest") == files

    def test_parts_arrive_one_at_a_time(self, tmp_path, files):
        index = write_parts(tmp_path / "out", files, 8192)
        names = [part["name"] for part in index["parts"]]
        assert len(names) > 3
        for at, name in enumerate(reversed(names)):  # in any order, each in a folder of its own
            (tmp_path / f"post{at}").mkdir()
            shutil.move(tmp_path / "out" / name, tmp_path / f"post{at}" / name)
            result = unpack(index, [tmp_path / f"post{at}"], tmp_path / "dest")
            assert result.now == [name] and len(result.missing) == len(names) - at - 1
            shutil.rmtree(tmp_path / f"post{at}")
        assert result.complete and contents(tmp_path / "dest") == files

    def test_same_files_give_the_same_parts(self, tmp_path, files):
        one, two = (write_parts(tmp_path / name, files, 8192) for name in "ab")
        assert one == two

    def test_a_later_corpus_does_not_change_when_the_code_does(self, tmp_path):
        def parts(code):
            writer = PartWriter(tmp_path / str(len(code)), "bundle", 4096)
            writer.add("code", code)
            writer.new_part()
            writer.add("corpus", b"c" * 3000)
            return {part["sha256"] for part in writer.finish()["parts"]}

        assert len(parts(b"x" * 10) & parts(b"y" * 20)) == 1

    @pytest.mark.parametrize("harm", ["flip", "cut"])
    def test_damaged_part_is_named_and_nothing_of_it_is_unpacked(self, tmp_path, files, harm):
        index = write_parts(tmp_path / "out", files, 1 << 20)
        path = tmp_path / "out" / index["parts"][0]["name"]
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data if harm == "flip" else data[:-5])
        result = unpack(index, [tmp_path / "out"], tmp_path / "dest")
        assert not result.complete and path.name in result.damaged[0] and "bring it again" in result.damaged[0]
        assert contents(tmp_path / "dest") == {}

    def test_a_cut_unpacking_goes_on(self, tmp_path, files, monkeypatch):
        index = write_parts(tmp_path / "out", files, 8192)
        replace, calls = os.replace, []

        def cut(source, target):
            calls.append(target)
            if len(calls) == 5:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            unpack(index, [tmp_path / "out"], tmp_path / "dest")
        whole = {name: data for name, data in contents(tmp_path / "dest").items() if not name.endswith(".part")}
        assert all(data == files[name] for name, data in whole.items() if name in files)
        monkeypatch.undo()
        assert unpack(index, [tmp_path / "out"], tmp_path / "dest").complete
        assert {k: v for k, v in contents(tmp_path / "dest").items() if not k.endswith(".part")} == files

    def test_another_bundle_and_back(self, tmp_path):
        one = write_parts(tmp_path / "one", {"f": b"1"}, 4096)
        two = write_parts(tmp_path / "two", {"f": b"2"}, 4096)
        for index, folder, expected in ((one, "one", b"1"), (two, "two", b"2"), (one, "one", b"1")):
            unpack(index, [tmp_path / folder], tmp_path / "dest")
            assert (tmp_path / "dest" / "f").read_bytes() == expected

    def test_fewer_parts_than_before_leave_no_old_ones(self, tmp_path, files):
        write_parts(tmp_path / "out", files, 8192)
        index = write_parts(tmp_path / "out", files, 1 << 20)
        assert sorted(path.name for path in tmp_path.joinpath("out").iterdir()) == ["bundle-001.zip", "bundle.json"]
        assert len(index["parts"]) == 1

    def test_member_outside_the_folder_is_refused(self, tmp_path):
        index = write_parts(tmp_path / "out", {"f": b"1"}, 4096)
        path = tmp_path / "out" / "bundle-001.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../evil", "x")
        index["parts"][0] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        with pytest.raises(BundleError, match="evil"):
            unpack(index, [tmp_path / "out"], tmp_path / "dest")
        assert not (tmp_path / "evil").exists()

    def test_index_missing_or_of_two_bundles(self, tmp_path):
        with pytest.raises(BundleError, match="no bundle.json"):
            read_index([tmp_path])
        write_parts(tmp_path / "one", {"f": b"1"}, 4096)
        write_parts(tmp_path / "two", {"f": b"2"}, 4096)
        with pytest.raises(BundleError, match="different bundles"):
            read_index([tmp_path / "one", tmp_path / "two"])

    def test_sizes(self):
        assert [parse_size(text) for text in ("45MiB", "16 MB", "1GiB", "10", "2kb")] == [
            45 << 20, 16_000_000, 1 << 30, 10, 2000]
        for text in ("", "MiB", "-3", "0", "5 apples"):
            with pytest.raises(BundleError):
                parse_size(text)


def resolve(shelf, roots, has, **options):
    listed = wheels.read_has(has, TARGET)
    return wheels.resolve(roots, shelf.lock.read_text(), listed, TARGET, shelf.lock.parent / "wheels",
                          fetch=shelf.fetch, **options)


class TestWheels:
    def test_walks_through_what_is_lacking_only(self, shelf):
        found = resolve(shelf, ["top"], ["numpy"])
        assert sorted(found.wheels) == ["deep-one", "middle", "speed", "top"]  # no wandb, no other extra, no Windows
        assert len(shelf.asked) == len(set(shelf.asked))

    def test_version_of_the_node_is_used_where_it_will_do(self, shelf):
        assert "numpy" not in resolve(shelf, ["top"], ["numpy==1.5+local"]).wheels
        found = resolve(shelf, ["top"], ["numpy==0.5"])
        assert found.wheels["numpy"].name.startswith("numpy-2.0") and "0.5" in found.replaced["numpy"]

    def test_left_out_and_unknown_packages(self, shelf):
        assert sorted(resolve(shelf, ["top"], [], left_out=["wandb", "middle"]).wheels) == ["numpy", "top"]
        with pytest.raises(BundleError, match="nowhere.*--without nowhere"):
            resolve(shelf, ["nowhere"], [])
        with pytest.raises(BundleError, match="torch .*node"):
            resolve(shelf, ["torch>=2.6"], [])

    def test_list_of_the_node_in_each_form(self, tmp_path):
        texts = {"pip.txt": "Package    Version\n---------- -------\nNum_Py 1.5\ntorch 2.11.0+cu130\n",
                 "freeze.txt": "num-py==1.5\ntorch==2.11.0+cu130\n# nothing\n",
                 "json.txt": '[{"name": "num.py", "version": "1.5"}, {"name": "torch", "version": "2.11.0+cu130"}]'}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
            found = wheels.read_has([str(tmp_path / name)], TARGET).versions
            assert found == {"num-py": "1.5", "torch": "2.11.0+cu130"}
        (tmp_path / "bad.txt").write_text("fine 1.0\n$$$ 1.0\n")
        with pytest.raises(BundleError, match="bad.txt:2"):
            wheels.read_has([str(tmp_path / "bad.txt")], TARGET)
        with pytest.raises(BundleError, match="no such file"):
            wheels.read_has(["gone.txt"], TARGET)

    def test_a_bare_name_is_there_with_its_dependencies(self):
        has = wheels.read_has(["hypothesis"], TARGET)
        assert has.versions["sortedcontainers"] is None

    def test_targets(self):
        tags = TARGET.platforms()
        names = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1")
        assert {f"{name}_x86_64" for name in names} < set(tags)
        assert "manylinux_2_29_x86_64" not in tags
        assert wheels.parse_target("3.11", "manylinux2014_aarch64") == wheels.Target((3, 11), "manylinux_2_17_aarch64")
        for python, platform in (("3", "manylinux_2_28_x86_64"), ("3.12", "linux"), ("3.12", "win_amd64")):
            with pytest.raises(BundleError):
                wheels.parse_target(python, platform)

    def test_only_wheels_of_the_target_count(self, tmp_path):
        for tag in ("cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-manylinux_2_34_x86_64", "cp312-cp312-win_amd64"):
            make_wheel(tmp_path, "fast", tag=tag)
        assert wheels.wheels_in(tmp_path, TARGET) == {}
        for tag in ("cp39-abi3-manylinux2014_x86_64", "cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64"):
            path = make_wheel(tmp_path, "fast", tag=tag)
            assert wheels.wheels_in(tmp_path, TARGET) == {("fast", "1.0"): path}
            path.unlink()

    def test_pip_checks_hashes_and_builds_what_is_source_only(self, tmp_path, monkeypatch):
        store = tmp_path / "store"
        wheel = make_wheel(store, "ready")
        source = tmp_path / "oldpack-1.0"
        source.mkdir()
        (source / "setup.py").write_text("from setuptools import setup\nsetup(name='oldpack', version='1.0', "
                                         "py_modules=['oldpack'])\n")
        (source / "oldpack.py").write_text("here = True\n")
        (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: oldpack\nVersion: 1.0\n")
        sdist = Path(shutil.make_archive(str(store / "oldpack-1.0"), "gztar", tmp_path, "oldpack-1.0"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(store))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        pins = {name: ("1.0", ["sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()])
                for name, path in (("ready", wheel), ("oldpack", sdist))}
        folder = tmp_path / "got"
        folder.mkdir()
        found, built = wheels.download(pins, TARGET, folder)
        assert found["ready"].name == wheel.name and built == ["oldpack-1.0-py3-none-any.whl"]
        shutil.rmtree(store)  # a second call needs nothing from outside
        assert wheels.download(pins, TARGET, folder) == (found, built)
        found["ready"].write_bytes(b"broken")
        with pytest.raises(BundleError, match="pip download|no wheel|source only"):
            wheels.download(pins, TARGET, folder)


class TestCorpora:
    @pytest.mark.parametrize("kind", ["flac", "opus"])
    def test_every_sample_is_there_under_relative_paths(self, corpus, tmp_path, kind):
        read = corpora.read_corpus("small", corpus, tmp_path / "work")
        packed = dict(corpora.files(read, kind, 24, tmp_path / "work"))
        for name, path in packed.items():
            (tmp_path / "node" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / "node" / name)
        assert len([name for name in packed if "/audio/" in name]) == 4  # c.wav once, though in two splits
        for split in ("train", "dev"):
            manifest = tmp_path / "node" / "corpora" / "small" / f"{split}.json"
            for row in read_manifest(manifest):
                assert not os.path.isabs(row["audio_filepath"])
                info = soundfile.info(resolve_audio(row, manifest))
                assert info.frames / info.samplerate == row["duration"]
                assert info.format == {"flac": "FLAC", "opus": "OGG"}[kind]

    def test_flac_is_bit_for_bit(self, corpus, tmp_path):
        read = corpora.read_corpus("small", corpus, tmp_path / "work")
        packed = dict(corpora.files(read, "flac", 24, tmp_path / "work"))
        wav = next(path for path in read.audio if path.endswith(".wav"))
        assert np.array_equal(soundfile.read(wav)[0], soundfile.read(packed["corpora/small/audio/s2/c.flac"])[0])
        assert packed["corpora/small/audio/s1/a.flac"] == Path(read.audio[1])  # FLAC goes as it is

    def test_encoding_goes_on_where_it_was_cut(self, corpus, tmp_path):
        read = corpora.read_corpus("small", corpus, tmp_path / "work")
        first = dict(corpora.files(read, "opus", 24, tmp_path / "work"))["corpora/small/audio/s1/a.ogg"]
        before = first.stat().st_mtime_ns
        dict(corpora.files(read, "opus", 24, tmp_path / "work"))
        assert first.stat().st_mtime_ns == before

    @pytest.mark.parametrize("harm", ["content", "length", "older", "broken"])
    def test_another_source_is_encoded_anew(self, corpus, tmp_path, harm):
        def packed():
            read = corpora.read_corpus("small", corpus, tmp_path / "work")
            return dict(corpora.files(read, "flac", 24, tmp_path / "work"))["corpora/small/audio/s2/c.flac"]

        source, kept = tmp_path / "tree" / "s2" / "c.wav", packed()
        time = source.stat().st_mtime_ns
        if harm == "broken":
            kept.write_bytes(b"what is this")
            os.utime(kept, ns=(time, time))
        else:  # the same name in another corpus, of another time or length
            samples = np.random.default_rng(1).standard_normal(12_345 - 345 * (harm == "length"))
            soundfile.write(source, 0.1 * samples, 16_000, subtype="PCM_16")
            changed = time + {"content": 1_000_000_000, "length": 0, "older": -10**16}[harm]
            os.utime(source, ns=(changed, changed))
        assert np.array_equal(soundfile.read(packed())[0], soundfile.read(source)[0])
        before = kept.stat().st_ino
        assert packed().stat().st_ino == before

    def test_bad_corpora_are_named(self, corpus, tmp_path):
        with pytest.raises(BundleError, match="no such folder"):
            corpora.read_corpus("small", tmp_path / "gone", tmp_path / "work")
        (tmp_path / "tree" / "d.flac").unlink()
        with pytest.raises(ManifestError, match="d.flac"):
            corpora.read_corpus("small", corpus, tmp_path / "work")
        (tmp_path / "empty").mkdir()
        with pytest.raises(BundleError, match="empty.*no manifests"):
            corpora.read_corpus("mini", tmp_path / "empty", tmp_path / "work")
        with pytest.raises(BundleError, match="twice"):
            corpora.parse_corpora(["mini=a", "mini=b"])
        assert corpora.parse_corpora(["x/mini", "other=y"]) == {"mini": Path("x/mini"), "other": Path("y")}

    def test_choice_by_size(self):
        assert pack.choose_audio("auto", 10, 10)[0] == "flac" and pack.choose_audio("auto", 11, 10)[0] == "opus"
        assert pack.choose_audio("opus", 0, 10)[0] == "opus"
