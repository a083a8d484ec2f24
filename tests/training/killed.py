"""Runs named configs whole, then killed by SIGKILL and resumed, each in a process forked from this one.

Usage: killed.py FOLDER, with FOLDER/runs.json {name: tables}. Leaves FOLDER/NAME/whole and FOLDER/NAME/parts, and
FOLDER/exits.json {name: [exit status of the whole run, of the killed one, of the resumed one]}.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import algorithms  # noqa: F401 (makes its network known)

from training import engine
from training.config import from_tables

LAST_STEP = 6  # of 8: between the checkpoint after the fifth and the end


def forked(config, folder, resume=False, kill=False):
    """The exit status of a run in a process of its own, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if kill:
            engine.Trainer._train_step = until_last_step
        engine.run(config, folder, resume=resume)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def until_last_step(self, *args, step=engine.Trainer._train_step):
    if self.step == LAST_STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *args)


root = Path(sys.argv[1])
runs = {name: from_tables(tables) for name, tables in json.loads((root / "runs.json").read_text()).items()}
for config in runs.values():
    engine.Trainer(config, root / "nothing", show=False)  # imports, once for all forks
exits = {}
for name, config in runs.items():
    exits[name] = [
        forked(config, root / name / "whole"),
        forked(config, root / name / "parts", kill=True),
        forked(config, root / name / "parts", resume=True),
    ]
(root / "exits.json").write_text(json.dumps(exits))
