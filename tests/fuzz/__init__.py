"""Bad and odd inputs for every command and every public call, and what answers them.

    python -m tests.fuzz --commands 300 --calls 300 --seed 1

A wrong input has one right answer: a message (exit code 2, or an `InputError`) that says what was
wrong. A traceback and a call that does not come back are faults of this project. What is accepted
is written to a file, to be looked at: it may have had to be refused.

Case ``command:17`` of a seed is the same whenever it is drawn, and is drawn alone by ``--case``.
"""
