"""On the node: unpacking and installing from the first part alone, training in a budget, and what comes home."""

import ensurepip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from manifests.schema import read_manifest
from tools.offline_bundle import node, pack, train, wheels
from tools.offline_bundle.__main__ import main
from tools.offline_bundle.collect import collect
from tools.offline_bundle.parts import BundleError

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
        monkeypatch.setattr(train, "full_length", lambda job: (1000, 40, 8))

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
        monkeypatch.setattr(train, "full_length", lambda job: (100_000, 40, 8))

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


class TestHome:
    def test_half_precision_never_makes_infinities(self):
        import torch

        from tools.offline_bundle.weights import halve

        state = {"encoder.w": torch.full((2, 2), 0.1), "encoder.large": torch.tensor([[70_000.0, 1.0]]),
                 "encoder.bias": torch.ones(3), "norm.running_var": torch.full((2, 2), 0.1),
                 "preprocessor.featurizer.fb": torch.rand(1, 8, 9), "steps": torch.tensor(3)}
        halved, kept = halve(state)
        half = [name for name, value in halved.items() if value.dtype == torch.float16]
        assert half == ["encoder.w"] and kept == ["encoder.large"]
        assert all(bool(torch.isfinite(value).all()) for value in halved.values()) and halved["steps"] == 3
        with pytest.raises(BundleError, match="encoder.w.*not finite"):
            halve({"encoder.w": torch.tensor([[float("nan")]])})

    def test_written_weights_are_read_back_by_name(self, tmp_path):
        import io
        import tarfile

        import torch

        from tools.offline_bundle.weights import write_half

        source = tmp_path / "m.nemo"
        packed = io.BytesIO()
        torch.save({"w": torch.full((64, 64), 1 / 3)}, packed)
        with tarfile.open(source, "w") as tar:
            for name, data in (("./model_config.yaml", b"a: 1\n"), ("./model_weights.ckpt", packed.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        facts = write_half(source, tmp_path / "half.nemo")
        assert facts["bytes"] < facts["source_bytes"] and facts["kept_float32"] == []
        with tarfile.open(tmp_path / "half.nemo") as tar:
            assert tar.extractfile("./model_config.yaml").read() == b"a: 1\n"
            state = torch.load(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()), weights_only=True)
        assert state["w"].dtype == torch.float16 and abs(float(state["w"][0, 0]) - 1 / 3) < 1e-3
        source.write_bytes(b"no tar")
        with pytest.raises(BundleError, match="m.nemo"):
            write_half(source, tmp_path / "other.nemo")
        assert not (tmp_path / "other.nemo").exists()

    @pytest.fixture
    def exp(self, tmp_path):
        for model, size in (("conformer", 30_000), ("deepspeech", 60_000)):
            run = tmp_path / "exp" / f"{model}_mini"
            for name in ("evaluation", "offline"):
                (run / name).mkdir(parents=True)
            results = ("evaluation/metrics.json", "evaluation/predictions_dev.json")
            for name in ("offline/plan.json", "curve.csv", *results):
                (run / name).write_text(model * 20)
            (run / "offline" / "train.log").write_bytes(b"x" * 3000)
            (run / f"{model}-fp16.nemo").write_bytes(os.urandom(size))
            (run / f"{model}.nemo").write_bytes(os.urandom(size))
        return tmp_path / "exp"

    def test_comes_home_in_few_files_of_a_given_size(self, exp, tmp_path):
        assert collect(exp, tmp_path / "out", 20_000, 8) == []
        written = list((tmp_path / "out").iterdir())
        assert len(written) <= 8 and all(path.stat().st_size <= 20_000 for path in written)
        assert main(["unpack", "--parts", str(tmp_path / "out"), "--to", str(tmp_path / "home")]) == 0
        for path in (tmp_path / "home").rglob("*mini/*"):
            if path.is_file():
                assert path.read_bytes() == (exp / path.relative_to(tmp_path / "home")).read_bytes()
        assert len(list((tmp_path / "home").rglob("*-fp16.nemo"))) == 2

    def test_weights_that_do_not_fit_are_named_and_metrics_come(self, exp, tmp_path, capsys):
        left = collect(exp, tmp_path / "out", 20_000, 4)
        assert left == ["deepspeech_mini/deepspeech-fp16.nemo"] and left[0] in capsys.readouterr().out
        assert len(list((tmp_path / "out").iterdir())) <= 4
        with pytest.raises(BundleError, match="no run"):
            collect(tmp_path / "nowhere", tmp_path / "out", 20_000, 4)


class TestCommands:
    def test_all_in_one_brings_home_what_a_cut_training_has_done(self, bundle, tmp_path, monkeypatch):
        from tools.offline_bundle import __main__ as commands

        def run_train(args):
            notes = args.dir / "exp" / "conformer_small" / "offline"
            notes.mkdir(parents=True)
            (notes / "plan.json").write_text("{}")
            return train.EXIT_CUT

        monkeypatch.setattr(commands, "run_install", lambda args: 0)
        monkeypatch.setattr(commands, "run_train", run_train)
        words = ["all", "--parts", str(bundle.out), "--to", str(tmp_path / "dest"), "--corpus", "small", "--minutes",
                 "8", "--out", str(tmp_path / "home")]
        assert main(words) == train.EXIT_CUT
        assert (tmp_path / "home" / "home-001.zip").is_file()
        next(bundle.out.glob("*.zip")).unlink()
        assert main([*words[:4], str(tmp_path / "fresh"), *words[5:]]) == node.EXIT_WAITING

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
