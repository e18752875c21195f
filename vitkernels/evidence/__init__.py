"""From a GPU to hardware records: cases that are checked and timed, and what follows from them.

`vitkernels tune`, `make test-gpu` and `make bench-gpu` share what is here: the calls that stand for
each regime (`shapes.py`, and one file for each operator), the error model applied to one of them
(`contest.py`), the clock (`clock.py`), records that are resumed (`record.py`, `runner.py`), and the
way from records to dispatch (`verdicts.py`).
"""
