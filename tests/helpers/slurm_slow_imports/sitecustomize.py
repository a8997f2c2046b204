"""Found by Python at its start through PYTHONPATH: what the environment asks of the ranks of a job, after each step.

SLOW_STEP_S   the first start of a job sleeps so long: there is time to break it off, and the numbers stay as they are
CRASH_STEP    the process ends with a traceback
STOP_STEP     in every start: the batch script is told to stop, as by a time limit
"""

import os
import subprocess
import time
from typing import Any

ASKED = {name: os.environ[name] for name in ("SLOW_STEP_S", "CRASH_STEP", "STOP_STEP") if name in os.environ}
steps = 0


def tell_the_script() -> None:
    subprocess.run(["/usr/bin/scancel", "--signal=USR1", "--batch", os.environ["SLURM_JOB_ID"]], check=True)


def after_a_step(*_: Any) -> None:
    global steps
    steps += 1
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(float(ASKED.get("SLOW_STEP_S", "0")))
    if ASKED.get("CRASH_STEP") == str(steps):
        raise RuntimeError("the test has asked for it")
    if "STOP_STEP" in ASKED and steps >= int(ASKED["STOP_STEP"]):
        if steps == int(ASKED["STOP_STEP"]) and os.environ["RANK"] == "0":
            tell_the_script()
        time.sleep(1)


if "RANK" in os.environ and ASKED:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(after_a_step)
