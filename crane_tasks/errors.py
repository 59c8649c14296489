"""The exception tree. Everything a user can cause and cure is a `BadInput`."""


class CraneError(Exception):
    """Base of all errors raised on purpose by this project."""


class BadInput(CraneError):
    """The recipe, a checkpoint or a data file is wrong; nothing was computed from it.

    The command line ends with exit code 2 and prints the message alone.
    """


class RecipeError(BadInput):
    """The recipe cannot be read, or names something that does not exist."""


class CheckpointError(BadInput):
    """A checkpoint is missing, damaged, or does not fit its partner or the method."""


class ChangedWeights(CheckpointError):
    """A weight file does not hold what its digest was taken from."""


class DataError(BadInput):
    """A calibration or evaluation data file is missing, broken or empty."""


class EndpointError(BadInput):
    """The server that decodes targets is not there, refuses, or gives no usable completion."""


class ScoreError(CraneError):
    """The gate's scores cannot be normalised: the baseline has no positive gain."""


class OutputError(BadInput):
    """The output folder cannot be used: it exists, or the disk has no room for it."""
