"""Whether deltas do better together: all subsets of three at once, and in turn in every order."""
