"""What is said where a run asks for GPUs that PyTorch cannot use. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

from recipes import config, gpu
from recipes.config import compose
from recipes.decode import ModelError, pick_device
from recipes.train import device_count
from tools import install


CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def made(devices: int, cuda: str | None = "13.0", driver: str = "535.104.05", capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
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
        (0, None, ["without CUDA", "tools/install.py --cuda"]),
        (2, "13.0", ["sees 2", "--gpus 2"]),
    ],
)
def test_gpus_that_torch_does_not_see_are_one_line_with_the_reason(devices, cuda, words, machine, capsys):
    machine(devices, cuda)
    assert gpu.main(["4"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in ["4 GPU(s)", "trainer=cpu", *words])


@pytest.mark.parametrize("capability, fits", [
    ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((12, 0), True), ((13, 0), True),
    ((6, 1), False), ((7, 0), False), ((11, 0), False),
])
def test_binaries_run_within_their_major_number_and_ptx_on_what_came_later(capability, fits):
    assert gpu.has_kernels(capability, CU130) is fits


def test_a_binary_of_one_gpu_alone_and_what_is_not_cuda():
    assert gpu.has_kernels((9, 0), ["sm_90a"]) and not gpu.has_kernels((10, 3), ["sm_100a", "compute_90a"])
    assert gpu.has_kernels((10, 3), ["sm_100f"]) and not gpu.has_kernels((12, 0), ["compute_100f"])
    assert gpu.has_kernels((9, 0), ["gfx90a"]) and gpu.has_kernels((9, 0), [])


def test_an_old_gpu_is_one_line_that_names_the_build(machine, capsys):
    machine(1, capability=(6, 1))
    assert gpu.main(["1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(w in said for w in ("no kernels for sm_61", "CUDA 12.6", "cu126", "--gpus 0"))


def test_decoding_leaves_an_old_gpu_alone_and_says_so(machine, capsys):
    machine(1, capability=(6, 1))
    assert pick_device("auto").type == "cpu" and "no kernels for sm_61" in capsys.readouterr().err
    with pytest.raises(ModelError, match="device=cuda: .* no kernels for sm_61 .* device=cpu"):
        pick_device("cuda")
    machine(1)
    assert pick_device("auto").type == pick_device("cuda:0").type == "cuda" and capsys.readouterr().err == ""


def test_gpus_that_are_hidden_are_said_to_be(machine, monkeypatch, capsys):
    machine(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["1"]) == 2 and "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


def test_of_gpus_on_other_nodes_the_build_is_asked(machine, capsys):
    machine(0)
    assert gpu.main(["8", "--elsewhere"]) == 0
    machine(0, cuda=None)
    assert gpu.main(["8", "--elsewhere"]) == 2 and "tools/install.py --cuda" in capsys.readouterr().err


@pytest.mark.parametrize("named, count", [(None, 2), ("0,1,2", 3), ("GPU-5ab", 1), ("", 0), ("-1", 0)])
def test_gpus_are_counted_without_torch(monkeypatch, named, count):
    monkeypatch.setattr(gpu, "asked_of_driver", lambda what: ("0", "1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu.visible_gpus() == count


@pytest.mark.parametrize("devices, count", [(3, 3), (-1, 4), ("auto", 4), ([1, 3], 2)])
def test_devices_are_counted_before_torch_is_there(devices, count):
    trainer = compose("conformer", ["trainer=ddp", f"trainer.devices={devices}"], manifests=False).trainer
    assert device_count(trainer, lambda: 4) == count


def test_a_cpu_build_of_torch_gives_way_where_gpus_are_wanted(monkeypatch):
    done = []
    monkeypatch.setattr(install, "pip", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    monkeypatch.setattr(install, "without_cuda", lambda: True)
    monkeypatch.setattr(install, "cpu_index", lambda: ["--extra-index-url", "cpu"])
    monkeypatch.setattr(install.sys, "base_prefix", "elsewhere")
    passed = SimpleNamespace(returncode=0)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **more: done.append(tuple(command[1:])) or passed)
    install.main([])
    assert ("-m", "pip", "uninstall", "-q", "-y", "torch") not in done and "cpu" in done[-2]
    done.clear()
    install.main(["--cuda"])
    assert ("-m", "pip", "uninstall", "-q", "-y", "torch") in done and "cpu" not in done[-2]


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
    ("ddp", {"SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "4"}, 2, True), ("ddp", {"LOCAL_WORLD_SIZE": "1"}, 11, True),
])
def test_a_gpu_has_the_cores_beside_it_to_read_audio(monkeypatch, trainer, environment, workers, pinned):
    for name in ("SLURM_PROCID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "usable_cores", lambda: 12)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    train = compose("conformer", [f"trainer={trainer}"], manifests=False).model.train_ds
    assert (train.num_workers, train.pin_memory) == (workers, pinned)
