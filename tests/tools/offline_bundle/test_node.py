"""On the node: unpacking and installing from the first part alone, and training in a budget."""

import ensurepip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from manifests.schema import read_manifest, write_manifest
from recipes.config import compose
from tools.offline_bundle import check, node, pack, train, wheels
from tools.offline_bundle.__main__ import command_line, main
from tools.offline_bundle.parts import BundleError, PartWriter

ROOT = Path(__file__).resolve().parents[3]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
TARGET = wheels.Target((3, 12), "manylinux_2_28_x86_64")


@pytest.fixture
def bundle(tmp_path, shelf, corpus):
    """A bundle of a tiny project with made-up wheels, packed for this Python."""
    root = tmp_path / "root"
    for path in [*ROOT.glob("manifests/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tools/offline_bundle/*.py")]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / path.relative_to(ROOT))
    shutil.copyfile(shelf.lock, root / "requirements.lock")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["top==1.0"]\n')
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not bundled:
        pytest.skip("this Python holds no wheel of pip, and tests fetch nothing")
    args = SimpleNamespace(
        out=tmp_path / "out", python=HERE, platform="manylinux_2_17_x86_64", has=["numpy"], without=[], jobs=1,
        corpus=[f"small={corpus}"], audio="flac", max_audio="1MiB", opus_kbits=24, part_size="1MiB", rev="HEAD",
        no_wheels=False, work=tmp_path / "work")
    folder = args.work / "wheels" / f"{HERE}-{args.platform}"
    folder.mkdir(parents=True)
    shutil.copyfile(bundled[-1], folder / bundled[-1].name)
    index = pack.pack(args, root, shelf.fetch)
    return SimpleNamespace(index=index, out=args.out, args=args, root=root, fetch=shelf.fetch)


def on_node(part: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -I -S: without anything that is installed, so that what runs there needs the standard library only.
    return subprocess.run([sys.executable, "-I", "-S", str(part), *arguments], cwd=part.parent, capture_output=True,
                          text=True, env={**environment, "PIP_NO_INDEX": "1"})


class TestNode:
    def test_unpacks_and_installs_from_the_first_part_alone(self, bundle, tmp_path):
        first, dest = bundle.out / "bundle-001.pyz", tmp_path / "dest"
        last = bundle.out / bundle.index["parts"][-1]["name"]
        last.rename(tmp_path / "late")
        waiting = on_node(first, "unpack", "--to", str(dest))
        assert waiting.returncode == node.EXIT_WAITING and last.name in waiting.stdout
        (tmp_path / "late").rename(last)
        done = on_node(first, "unpack", "--to", str(dest))
        assert done.returncode == 0, done.stderr
        assert (dest / "project" / "pyproject.toml").is_file()
        assert len(read_manifest(dest / "corpora" / "small" / "train.json")) == 3

        assert "unpack --to" in on_node(first, "install", "--dir", str(tmp_path / "elsewhere")).stderr
        installed = on_node(first, "install", "--dir", str(dest), "--no-check")
        assert installed.returncode == 0, installed.stderr
        # The environment has the bundle's packages, and behind them those of the Python that made it.
        code = "import top, deep_one, numpy; print(top.__file__)"
        seen = subprocess.run([str(node.python_of(dest)), "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert seen.returncode == 0 and str(dest / "venv") in seen.stdout, seen.stderr
        # Again, from the unpacked folder: the parts may be gone by then.
        assert "installed before" in on_node(dest, "install", "--no-check").stdout

    def test_new_code_travels_alone(self, bundle, tmp_path):
        dest = tmp_path / "dest"
        assert node.run_unpack([bundle.out], dest) == 0
        subprocess.run(["git", "-C", str(bundle.root), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                        "--allow-empty", "-m", "more"], check=True)
        (bundle.root / "pyproject.toml").write_text("changed and not committed\n")
        args = SimpleNamespace(**{**vars(bundle.args), "no_wheels": True, "corpus": [], "out": tmp_path / "code"})
        index = pack.pack(args, bundle.root)
        assert len(index["parts"]) == 1 and index["commit"] != bundle.index["commit"]
        (dest / "project" / "stale").touch()
        assert node.run_unpack([args.out], dest) == 0
        merged = node.installed_index(dest)
        assert merged["commit"] == index["commit"] and merged["corpora"].keys() == {"small"}
        assert merged["wheels"] == bundle.index["wheels"]
        assert list((dest / "wheels").glob("top-*.whl")) and not list(dest.glob(".project*"))
        assert (dest / "project" / "pyproject.toml").read_text().startswith("[project]")

    def test_wrong_python_machine_or_glibc_is_one_line(self, monkeypatch):
        index = {"wheels": [], "python": HERE, "platform": "manylinux_2_17_x86_64", "glibc": [2, 17]}
        monkeypatch.setattr(node.platform, "machine", lambda: "x86_64")
        node.fits_here(index)
        for change, word in (({"python": "3.9"}, "3.9"), ({"platform": "manylinux_2_17_aarch64"}, "aarch64"),
                             ({"glibc": [2, 99]}, "2.99")):
            with pytest.raises(BundleError, match=word):
                node.fits_here(index | change)

    def test_requirements_of_the_bundle_are_checked_and_those_of_the_node_noted(self, tmp_path, monkeypatch):
        from tools.offline_bundle.check import requirements_met

        def put(folder, name, version, *requires):
            info = tmp_path / folder / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
            (info / "METADATA").write_text("\n".join(lines) + "\n")

        put("own", "top", "1.0", "fine>=1", "shadowed<3", "torch>=2.6", "gone; extra == 'all'", "wandb")
        put("own", "shadowed", "2.0")
        put("own", "fine", "1.0")
        put("node", "torch", "2.11.0+cu130", "driver==5", "shadowed>=4", "absent-there")
        put("node", "driver", "6")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "own"), str(tmp_path / "node"), *sys.path])
        count, problems, notes = requirements_met(["top"], ["wandb"], tmp_path / "own")
        assert (count, problems) == (5, []) and len(notes) == 1 and "shadowed>=4" in notes[0]
        problems = requirements_met(["top[all]", "torch>=2.12"], ["wandb"], tmp_path / "own").problems
        assert ["gone" in problems[0], "torch 2.11.0" in problems[1], len(problems)] == [True, True, 2]

    def test_the_index_is_remembered_for_the_parts_that_come_later(self, tmp_path):
        writer = PartWriter(tmp_path / "first", "home", 4096)
        for name in "ab":
            writer.add(name, name.encode() * 3000)
        second = writer.finish()["parts"][1]["name"]
        (tmp_path / "second").mkdir()
        (tmp_path / "first" / second).rename(tmp_path / "second" / second)
        with pytest.raises(BundleError, match="no bundle.json"):  # nothing is remembered yet
            node.run_unpack([tmp_path / "second"], tmp_path / "dest")
        assert node.run_unpack([tmp_path / "first"], tmp_path / "dest") == node.EXIT_WAITING
        assert node.run_unpack([tmp_path / "second"], tmp_path / "dest") == 0
        assert (tmp_path / "dest" / "b").read_bytes() == b"b" * 3000

    @pytest.mark.parametrize("problems, status, last", [
        ([], 0, "check: ready to train"),
        (["fsspec 2026.9.0 is here"], node.EXIT_DOUBTS, "check: works, but see the packages above"),
    ])
    def test_a_check_that_worked_says_so_whatever_the_packages(self, tmp_path, monkeypatch, capsys, problems, status,
                                                               last):
        monkeypatch.setattr(check, "installed_index", lambda dest: {"requires": [], "left_out": [], "corpora": {}})
        monkeypatch.setattr(check, "requirements_met", lambda *_: check.Requirements(1, problems, []))
        monkeypatch.setattr(check, "nemo_line", lambda: "NeMo: imported")
        monkeypatch.setattr(check, "one_pass", lambda *_: "conformer: a pass")
        assert check.main(["--dir", str(tmp_path)]) == status
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == last and said.err.count("check: ") == len(problems)

    def test_wheels_of_an_earlier_bundle_go(self, tmp_path):
        for name in ("a-1.0-py3-none-any.whl", "a-2.0-py3-none-any.whl"):
            (tmp_path / "wheels").mkdir(exist_ok=True)
            (tmp_path / "wheels" / name).touch()
        node._drop_old_wheels(tmp_path, {"wheels": ["a-2.0-py3-none-any.whl"]})
        assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["a-2.0-py3-none-any.whl"]


CURVE = "step,seconds,val_wer\n" + "".join(f"{s},{30 + 0.1 * s:.2f},\n" for s in range(10, 101, 10)) + "100,45.0,0.9\n"


def job_in(tmp_path, **options) -> train.Job:
    exp = tmp_path / "exp" / "conformer_small"
    return train.Job("conformer", "small", tmp_path / "corpora" / "small", exp, options.pop("seconds", None), **options)


class TestTrain:
    def test_steps_fit_the_budget(self, tmp_path):
        (tmp_path / "curve.csv").write_text(CURVE)
        each, validation, trained = train.step_times(tmp_path / "curve.csv", 50)
        assert (round(each, 6), round(validation, 6), trained) == (0.1, 5.0, 100)
        steps = train.steps_within(480, each, validation, 30, validations=8, most=100_000)
        assert steps % 8 == 0 and 480 - 0.8 <= steps * each + 8 * validation + 30 <= 480 + 1e-6
        assert train.steps_within(480, each, validation, 30, validations=8, most=1000) == 1000
        assert train.steps_within(1, each, validation, 30, validations=8, most=1000) == 8  # at least one a validation
        (tmp_path / "curve.csv").write_text("step,seconds,val_wer\n10,1.0,\n")
        with pytest.raises(BundleError, match="too few"):
            train.step_times(tmp_path / "curve.csv", 5)

    def test_stages_are_done_once_and_resume_after_a_failure(self, tmp_path, monkeypatch, capsys):
        job, calls, broken = job_in(tmp_path, steps=20), [], ["recipes.average"]
        monkeypatch.setattr(train, "full_length", lambda job: train.Length(1000, 40, 8, 10.0))

        def run(arguments, log, limit=None, since=None):
            calls.append(arguments[0])
            log.write_text("some words\nthe reason\n")
            if arguments[0] == "recipes.evaluate":
                (job.exp / "evaluation").mkdir()
                metrics = {"manifests": [{"name": "dev", "wer": 0.25}]}
                (job.exp / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
            if arguments[0] == "recipes.train":
                assert "trainer.max_steps=20" in arguments
            return (1 if arguments[0] in broken else 0), False

        with pytest.raises(BundleError, match="average failed with status 1: the reason"):
            train.run_job(job, run)
        broken.clear()
        assert "dev 25.0%" in train.run_job(job, run)
        assert calls == ["recipes.train", "recipes.average", "recipes.average", "recipes.evaluate", "tools.report",
                         "tools.offline_bundle.weights"]
        job.steps = 40
        assert "WER" in train.run_job(job, run) and len(calls) == 6
        assert "goes on with 20 steps" in capsys.readouterr().out

    def test_budget_is_probed_and_kept(self, tmp_path, monkeypatch):
        job = job_in(tmp_path, seconds=480)
        monkeypatch.setattr(train, "full_length", lambda job: train.Length(100_000, 40, 8, 10.0))

        def run(arguments, log, limit=None, since=None):
            folder = job.exp / ".probe"
            folder.mkdir(parents=True)
            (folder / "curve.csv").write_text(CURVE)
            return 0, False

        plan = train.Plan(job)
        train.probe(job, plan, run)
        # (480 - 30 - 8 * 5) / 0.1, and a multiple of 8
        assert train.Plan(job).facts["steps"] == plan.facts["steps"] == 4096
        assert not (job.exp / ".probe").exists()

    def test_validations_are_budgeted_where_the_probe_did_not_reach_its_own(self, tmp_path, monkeypatch):
        job = job_in(tmp_path, seconds=480)
        monkeypatch.setattr(train, "full_length", lambda job: train.Length(100_000, 40, 8, 10.0))

        def run(arguments, log, limit=None, since=None):
            (job.exp / ".probe").mkdir(parents=True)
            (job.exp / ".probe" / "curve.csv").write_text(CURVE.rpartition("100,45")[0])
            return 143, True

        plan = train.Plan(job)
        train.probe(job, plan, run)
        # as much audio as in 10 steps: 0.1 s each, and in the first pass of 40 steps 30 s went into reading it
        assert plan.facts["seconds_a_validation"] == pytest.approx(10 * (0.1 + 30 / 40))
        assert plan.facts["steps"] == 8 * int((480 - 30 - 8 * 8.5) / 0.1 / 8) and "at most" in plan.facts["why"]

    def test_length_is_the_recipes_with_the_overrides(self, tmp_path):
        words = ["training.epochs=3", "training.global_batch_seconds=10", "training.validations=5"]
        job = job_in(tmp_path, overrides=words)
        job.corpus, row = "mini", {"audio_filepath": "a.flac", "text": "a"}
        for name, durations in (("train", [5.0] * 12 + [99.0]), ("dev", [2.5] * 6)):
            write_manifest(job.manifests / f"{name}.json", [{**row, "duration": seconds} for seconds in durations])
        assert train.full_length(job) == (18, 6, 5, 1.5)

    def test_changed_overrides_do_not_go_on_in_the_same_folder(self, tmp_path):
        train.Plan(job_in(tmp_path, overrides=["seed=1"])).save()
        with pytest.raises(BundleError, match="seed=1.*seed=2"):
            train.Plan(job_in(tmp_path, overrides=["seed=2"]))

    def test_end_of_the_sitting_ends_the_program(self, tmp_path):
        import time

        sleep = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]
        begin = time.monotonic()
        with pytest.raises(train.Cut):
            train.Runner(begin + 0.5)(sleep, tmp_path / "log")
        status, over = train.Runner()(sleep, tmp_path / "log", limit=0.5)
        assert status != 0 and over and time.monotonic() - begin < 30
        with pytest.raises(train.Cut):
            train.Runner(time.monotonic() - 1)(sleep, tmp_path / "log")
        # The clock starts with the curve: a slow import is no part of the budget.
        curve = tmp_path / "curve.csv"
        program = f"import time; time.sleep(1); open({str(curve)!r}, 'w'); time.sleep(60)"
        write = ["timeit", "-n", "1", "-r", "1", program]
        begin = time.monotonic()
        assert train.Runner()(write, tmp_path / "log", limit=0.5, since=curve)[1]
        assert 1.5 <= time.monotonic() - begin < 30

    def test_a_second_signal_leaves_a_training_the_time_to_save(self, tmp_path, monkeypatch):
        lines = ["import pathlib, signal, sys, time",
                 "def save(*_):",
                 "    time.sleep(2); pathlib.Path('saved').touch(); sys.exit(143)",
                 "signal.signal(signal.SIGTERM, save); pathlib.Path('ready').touch(); time.sleep(60)"]
        (tmp_path / "slow_to_save.py").write_text("\n".join(lines) + "\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(train, "run_job", lambda job, run: run(["slow_to_save"], tmp_path / "log"))

        def ask_twice():
            while not Path("ready").exists():
                ended.wait(0.05)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                ended.wait(0.7)

        ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
        asking = threading.Thread(target=ask_twice, daemon=True)
        try:
            asking.start()
            assert train.run_all([job_in(tmp_path)]) == train.EXIT_CUT
            assert Path("saved").exists()
        finally:
            ended.set()
            asking.join()
            signal.signal(signal.SIGTERM, before)

    def test_a_failed_model_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        def run_job(job, run):
            if job.model == "conformer":
                raise BundleError("conformer: train failed")
            raise train.Cut

        monkeypatch.setattr(train, "run_job", run_job)
        monkeypatch.setattr(train.signal, "signal", lambda *_: None)
        one = job_in(tmp_path)
        assert train.run_all([one]) == 1 and "conformer: train failed" in capsys.readouterr().err
        two = train.Job("deepspeech", "small", one.manifests, one.exp, None)
        assert train.run_all([one, two]) == train.EXIT_CUT

    def test_jobs_by_options(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "_gpu", lambda: False)
        folder = tmp_path / "corpora" / "small"
        folder.mkdir(parents=True)
        for name in ("train", "dev", "eval"):
            (folder / f"{name}.json").touch()
        (tmp_path / ".bundle").mkdir()
        (tmp_path / ".bundle" / "index.json").write_text('{"commit": "abc"}')
        jobs = train.make_jobs(tmp_path, ["conformer", "deepspeech"], "small", 8, None, [],
                               ["seed=1", "conformer:model.optim.lr=1", "deepspeech:model.optim.lr=2"])
        assert [job.overrides for job in jobs] == [["seed=1", "model.optim.lr=1"], ["seed=1", "model.optim.lr=2"]]
        assert [path.name for path in jobs[0].evaluate] == ["dev.json", "eval.json"] and jobs[0].seconds == 480
        with pytest.raises(BundleError, match="--models nemo"):
            train.make_jobs(tmp_path, ["nemo"], "small", None, None, [], [])
        with pytest.raises(BundleError, match="other/train.json.*small"):
            train.make_jobs(tmp_path, ["conformer"], "other", None, None, [], [])


class TestCommands:
    def test_all_in_one_brings_home_what_a_cut_training_has_done(self, bundle, tmp_path, monkeypatch):
        from tools.offline_bundle import __main__ as commands

        def run_train(args):
            notes = args.dir / "exp" / "conformer_small" / "offline"
            notes.mkdir(parents=True)
            (notes / "plan.json").write_text("{}")
            return train.EXIT_CUT

        # The check worked, though not all packages are as they should be.
        monkeypatch.setattr(commands, "run_install", lambda args: node.EXIT_DOUBTS)
        monkeypatch.setattr(commands, "run_train", run_train)
        words = ["all", "--parts", str(bundle.out), "--to", str(tmp_path / "dest"), "--corpus", "small", "--minutes",
                 "8", "--out", str(tmp_path / "home")]
        assert main(words) == train.EXIT_CUT
        assert (tmp_path / "home" / "home-001.zip").is_file()
        monkeypatch.setattr(commands, "run_install", lambda args: 1)
        assert main(words) == 1
        next(bundle.out.glob("*.zip")).unlink()
        assert main([*words[:4], str(tmp_path / "fresh"), *words[5:]]) == node.EXIT_WAITING

    @pytest.mark.parametrize("model", ["conformer", "deepspeech2", "deepspeech"])
    def test_the_readmes_line_for_a_gpu_is_one_that_trains(self, model, tmp_path):
        page = (ROOT / "tools" / "offline_bundle" / "README.md").read_text()
        line = re.search(r"^python3 bundle-001\.pyz (all (?:\\\n|[^\n])*)$", page, re.MULTILINE)[1]
        args = command_line().parse_args(shlex.split(line.replace("\\\n", " ")))
        assert model in args.models.split(",") and args.minutes == 8 and args.overrides[0] == "size=large"
        manifest = tmp_path / "m.json"
        write_manifest(manifest, [{"audio_filepath": "a.flac", "duration": 2.0, "text": "a"}])
        cfg = compose(model, [f"corpus={args.corpus}", f"corpus.train={manifest}", f"corpus.validation={manifest}",
                              "trainer=gpu", *args.overrides])
        assert cfg.model.optim.lr == cfg["size"][model].lr and cfg.training.epochs == 150

    def test_a_program_is_asked_to_end_by_the_same_signal(self, tmp_path):
        (tmp_path / "project").mkdir()
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        (tmp_path / "venv" / node.INSTALLED).touch()
        node.python_of(tmp_path).symlink_to(sys.executable)
        program = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
        assert node.run_program(tmp_path, ["timeit", "-n", "1", "-r", "1", program]) == -15

    @pytest.mark.parametrize("command", ["have", "pack", "unpack", "install", "check", "train", "collect", "all"])
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and len(capsys.readouterr().out) > 100

    def test_have_lists_what_pack_reads(self, tmp_path, capsys):
        assert main(["have"]) == 0
        (tmp_path / "has.txt").write_text(capsys.readouterr().out)
        assert wheels.read_has([str(tmp_path / "has.txt")], TARGET).versions["hydra-core"] == "1.3.2"

    @pytest.mark.parametrize("arguments, word", [
        (["pack", "--out", "x", "--python", "12"], "3.12"),
        (["pack", "--out", "x", "--part-size", "many"], "45MiB"),
        (["pack", "--out", "x", "--no-wheels", "--corpus", "gone"], "gone"),
        (["unpack", "--parts", "nowhere", "--to", "x"], "nowhere"),
        (["train", "--corpus", "mini"], "unpack"),
        (["collect", "--out", "x"], "no run"),
    ])
    def test_bad_input_is_one_line(self, arguments, word, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
