"""Who makes the runs of a sweep: this process, processes of its own, a Ray cluster, Slurm.

One file an executor, found by itself (`registry`); `base` is what each of them gives.
"""
