"""The packaged tasks, one file each; a module that defines a `TASK` is found by itself."""
