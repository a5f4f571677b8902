"""One module a kind of page; each gives its pages by path, drawn only when they are asked for."""
