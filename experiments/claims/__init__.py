"""Claims, one a file ``NN_name.py`` that defines CLAIM; `experiments.scoreboard` finds them."""
