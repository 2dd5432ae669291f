"""The layers that f can be: a folder per family, their common interface, and the parts that they share."""
