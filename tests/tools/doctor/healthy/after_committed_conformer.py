"""The committed curve of the conformer recipe on the mini corpus, as a run folder."""

import shutil

from tests.tools.doctor.faults import Healthy
from tests.conftest import ROOT


def make(folder):
    from recipes.config import compose
    from omegaconf import OmegaConf

    run = folder / "run"
    run.mkdir()
    shutil.copy(ROOT / "recipes" / "conformer" / "results" / "mini.csv", run / "curve.csv")
    given = [f"corpus.train={folder}/train.json", f"corpus.validation={folder}/dev.json"]
    for name in ("train", "dev"):
        (folder / f"{name}.json").touch()  # the corpus itself is not here, as on somebody else's machine
    cfg = compose("conformer", given)
    steps = int((run / "curve.csv").read_text().splitlines()[-1].split(",")[0])
    OmegaConf.update(cfg, "trainer.max_steps", steps)
    cfg.model.train_ds.batch_duration = cfg.training.global_batch_seconds
    cfg.model.optim.sched.warmup_steps = max(int(cfg.training.warmup_share * steps), 1)
    cfg.model.optim.sched.min_lr = cfg.training.final_share * cfg.model.optim.lr
    for name in ("train", "dev"):
        (folder / f"{name}.json").unlink()
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    return {"run": str(run)}


HEALTHY = Healthy("after_committed_conformer", "after", make)
