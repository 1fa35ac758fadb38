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


def one_line(error: BaseException, longest: int = 300) -> str:
    """All that an error says, in one line; its type where it says nothing.

    Args:
        error: it may repeat what it met; a damaged zip file's error holds pieces of the file.
        longest: characters; of more, the middle is left out.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    if len(words) <= longest:
        return words
    tail = longest // 3
    return f"{words[: longest - tail - 5]} ... {words[-tail:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error, without its full stop; torch's have a stack in C++ behind it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
