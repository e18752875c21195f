"""GPU evidence in named parts: `python -m benchmarks.gpu PART ...`, `make test-gpu`, `bench-gpu`.

Each part runs cases of vitkernels.evidence or tests/gpu_cases.py in worker processes and keeps one
record of them; `status.py` makes the README's table and the dispatch tables of the records.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# The cases of the tests are data that the parts share with pytest.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
