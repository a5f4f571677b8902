"""Claims, one a file ``NN_name.py`` that defines CLAIM; `deltacontrol.experiments.claims.scoreboard` finds them."""
