"""Claims, one a file ``NN_name.py`` that defines CLAIM; the `scoreboard` finds them."""
