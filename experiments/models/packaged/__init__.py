"""The packaged models, one file each; a module that defines a `MODEL` is found by itself."""
