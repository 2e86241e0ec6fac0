"""What comes home from a node: results in few files, weights in half precision."""

import os

import pytest

from tools.offline_bundle.__main__ import main
from tools.offline_bundle.collect import collect
from tools.offline_bundle.parts import BundleError


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

    def test_what_is_being_written_stays(self, exp, tmp_path):
        for name in (".conformer-fp16.nemo", "evaluation/.predictions_dev.json", "offline/.train.log"):
            (exp / "conformer_mini" / name).write_bytes(b"half")
        assert collect(exp, tmp_path / "out", 200_000, 8) == []
        main(["unpack", "--parts", str(tmp_path / "out"), "--to", str(tmp_path / "home")])
        names = {path.name for path in (tmp_path / "home" / "conformer_mini").rglob("*")}
        assert "conformer-fp16.nemo" in names and not any(name.startswith(".") for name in names)

    def test_weights_that_do_not_fit_are_named_and_metrics_come(self, exp, tmp_path, capsys):
        left = collect(exp, tmp_path / "out", 20_000, 4)
        assert left == ["deepspeech_mini/deepspeech-fp16.nemo"] and left[0] in capsys.readouterr().out
        assert len(list((tmp_path / "out").iterdir())) <= 4
        with pytest.raises(BundleError, match="no run"):
            collect(tmp_path / "nowhere", tmp_path / "out", 20_000, 4)
