"""The errors that people read without a traceback."""


class UserError(ValueError):
    """A mistake in what the user handed in: an option, a path, a file, the machine's set-up.

    The message is one sentence that says what is wrong, where, and what to do. Programs of the
    zoo print it without a traceback and end with exit code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, through no mistake in the options: a full disk, a loss of NaN.

    The message is one sentence that says what happened, where, and what to do. Programs of the
    zoo print it without a traceback and end with exit code 1.
    """


class LostPeerError(TrainingError):
    """Another process of the run is gone or does not answer; the ranks may be started again."""
