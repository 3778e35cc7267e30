"""Run by test_resume.py as a program that is killed: `python -m tests.modules.endless_run FOLDER`."""

import sys
from pathlib import Path

from lit_palm.callbacks import LastCheckpoint
from tests.modules.test_resume import job, trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    module, data = job("policy", folder, 2)
    saving = LastCheckpoint(str(folder / "killed"), every_n_steps=1)
    run = trainer(folder, callbacks=[saving], max_epochs=100000, gradient_clip_val=0.5, accumulate_grad_batches=2)
    run.fit(module, datamodule=data)
