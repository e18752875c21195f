"""The process that runs cases: `python -m vitkernels.evidence.worker module:function '{...}'`.

Reads a case's name from each line of its input and answers with one line of JSON. Whatever a case
prints goes to standard error.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, function = sys.argv[1].partition(":")
    arguments = json.loads(sys.argv[2])
    from .outcome import FAILED, DeviceLost, Outcome, outcome_of
    from .runner import LOST

    run = getattr(importlib.import_module(module), function)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        try:
            result = outcome_of(functools.partial(run, name, **arguments)).as_json()
        except DeviceLost as error:
            result = Outcome(FAILED, str(error)).as_json() | {"lost": True}
        print(json.dumps(result), file=answers, flush=True)
        if "lost" in result:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
