"""The errors that end in one sentence."""


class OptionError(ValueError):
    """An option, or what it names, cannot work; the sentence names the option and the valid values.

    fairseq's tools print the sentence alone and end with status 1; from Python it is an ordinary ValueError.
    """


class RunError(RuntimeError):
    """A run cannot go on, for a reason outside of its options; the sentence says how to go on.

    fairseq's tools print the sentence alone and end with status 1; from Python it is a RuntimeError.
    """
