"""One file a verb: a typed function whose parameters are its options and whose docstring is its help."""
