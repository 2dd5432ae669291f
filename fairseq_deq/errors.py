"""The error that a user can mend by typing something else."""


class OptionError(ValueError):
    """An option, or what it names, cannot work; the sentence names the option and the valid values.

    fairseq's tools print the sentence alone and end with status 1; from Python it is an ordinary ValueError.
    """
