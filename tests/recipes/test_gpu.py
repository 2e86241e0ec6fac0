"""What is said where a run asks for GPUs that PyTorch does not see. No GPU is needed."""

import pytest
import torch

from recipes import config, gpu
from recipes.config import compose


@pytest.fixture
def machine(monkeypatch):
    def made(devices: int, cuda: str | None = "13.0", driver: str = "535.104.05"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(gpu, "driver_version", lambda: driver)

    return made


def test_gpus_that_are_there_are_no_problem(machine, capsys):
    machine(8)
    assert gpu.main(["8"]) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "devices, cuda, words",
    [
        (0, "13.0", ["CUDA 13.0", "driver 535.104.05", "requirements-torch.txt"]),
        (0, None, ["without CUDA"]),
        (2, "13.0", ["sees 2", "--gpus 2"]),
    ],
)
def test_gpus_that_torch_does_not_see_are_one_line_with_the_reason(devices, cuda, words, machine, capsys):
    machine(devices, cuda)
    assert gpu.main(["4"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in ["4 GPU(s)", "trainer=cpu", *words])


def test_a_driver_that_cannot_be_asked_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu.asked_of_driver.cache_clear()
    assert gpu.driver_version() == "unknown"


@pytest.mark.parametrize("capabilities, precision", [
    (("9.0",), "bf16-mixed"), (("8.6", "7.5"), "32"), (("7.0",), "32"), ((), "bf16-mixed"), (("[N/A]",), "bf16-mixed"),
])
def test_gpus_that_imitate_bfloat16_train_in_float32(monkeypatch, capabilities, precision):
    monkeypatch.setattr(gpu, "asked_of_driver", lambda what: capabilities)
    assert compose("conformer", ["trainer=gpu"], manifests=False).trainer.precision == precision
    assert compose("conformer", ["trainer=gpu", "trainer.precision=32"], manifests=False).trainer.precision == 32


@pytest.mark.parametrize("trainer, environment, workers, pinned", [
    ("cpu", {}, 2, False), ("gpu", {}, 11, True), ("ddp", {}, 5, True), ("ddp", {"SLURM_PROCID": "1"}, 11, True),
])
def test_a_gpu_has_the_cores_beside_it_to_read_audio(monkeypatch, trainer, environment, workers, pinned):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(config, "usable_cores", lambda: 12)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    train = compose("conformer", [f"trainer={trainer}"], manifests=False).model.train_ds
    assert (train.num_workers, train.pin_memory) == (workers, pinned)
