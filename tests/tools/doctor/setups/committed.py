"""A run folder around a curve that the repository keeps."""

import shutil

from tests.conftest import ROOT


def committed_run(recipe: str, folder) -> dict:
    """The committed curve of `recipe` on the mini corpus as a run folder; keyword arguments for `examine`."""
    from recipes.config import compose
    from omegaconf import OmegaConf

    run = folder / "run"
    run.mkdir()
    shutil.copy(ROOT / "recipes" / recipe / "results" / "mini.csv", run / "curve.csv")
    given = [f"corpus.train={folder}/train.json", f"corpus.validation={folder}/dev.json"]
    for name in ("train", "dev"):
        (folder / f"{name}.json").touch()  # the corpus itself is not here, as on somebody else's machine
    cfg = compose(recipe, given)
    steps = int((run / "curve.csv").read_text().splitlines()[-1].split(",")[0])
    OmegaConf.update(cfg, "trainer.max_steps", steps)
    cfg.model.train_ds.batch_duration = cfg.training.global_batch_seconds
    cfg.model.optim.sched.warmup_steps = max(int(cfg.training.warmup_share * steps), 1)
    cfg.model.optim.sched.min_lr = cfg.training.final_share * cfg.model.optim.lr
    for name in ("train", "dev"):
        (folder / f"{name}.json").unlink()
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    return {"run": str(run)}
