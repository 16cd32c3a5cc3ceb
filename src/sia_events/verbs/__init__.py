"""The verbs of `sia`, a file a kind: they parse and print, and decide nothing."""
