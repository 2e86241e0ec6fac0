"""Names the NeMo internals that this project leans on: when one of these fails, NeMo has changed under us."""

import importlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_nemo_is_the_version_the_internals_were_read_in():
    import nemo

    assert nemo.__version__ == "3.0.0", "read recipes/__init__.py, ctc_model.py, monitor.py again before moving the pin"


@pytest.mark.parametrize(
    "module, names",
    [
        ("nemo.core.classes.common", ["ALLOWED_TARGET_PREFIXES", "UnsafeTargetError", "import_class_by_path"]),
        ("nemo.collections.asr.models.ctc_models", ["EncDecCTCModel"]),
        (
            "nemo.collections.common.data.lhotse.dataloader",
            ["get_lhotse_dataloader_from_config", "LhotseDataLoadingConfig"],
        ),
        ("nemo.core.optim.lr_scheduler", ["AVAILABLE_SCHEDULERS"]),
        ("nemo.core.optim.optimizers", ["AVAILABLE_OPTIMIZERS"]),
        ("nemo.utils.exp_manager", ["exp_manager", "ExpManagerConfig", "CallbackParams"]),
    ],
)
def test_internals_are_where_they_were(module, names):
    loaded = importlib.import_module(module)
    for name in names:
        assert hasattr(loaded, name), f"{module}.{name} is gone"


def test_hooks_that_the_models_override_exist():
    from lightning.pytorch.callbacks import ModelCheckpoint
    from nemo.collections.asr.models import EncDecCTCModel
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    for name in ("_setup_dataloader_from_config", "setup_multiple_validation_data", "_update_dataset_config",
                 "validation_pass", "on_validation_epoch_end", "add_interctc_losses", "is_interctc_enabled"):
        assert callable(getattr(EncDecCTCModel, name)), f"EncDecCTCModel.{name} is gone"
    for name in ("_save_last_checkpoint", "_monitor_candidates"):
        assert callable(getattr(ModelCheckpoint, name)), f"ModelCheckpoint.{name} is gone"
    preprocessor = AudioToMelSpectrogramPreprocessor(sample_rate=16000)
    assert preprocessor._sample_rate == 16000 and hasattr(preprocessor.featurizer, "get_seq_len")


def test_our_prefix_is_on_the_allow_list_whatever_is_imported_first():
    program = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES as allowed\n"
        "assert allowed.count('recipes.') == 1, allowed\n"
    )
    for order in (["recipes", "nemo.core.classes.common"], ["nemo.core.classes.common", "recipes"]):
        done = subprocess.run([sys.executable, "-c", program, *order], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_importing_recipes_does_not_import_nemo_or_torch():
    program = "import sys, recipes, recipes.config; assert not {'torch', 'nemo'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_foreign_target_is_still_refused():
    import recipes  # noqa: F401
    from nemo.core.classes.common import Serialization, UnsafeTargetError

    with pytest.raises(UnsafeTargetError):
        Serialization.from_config_dict({"_target_": "subprocess.Popen", "args": ["true"]})
