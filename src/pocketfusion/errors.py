"""The one exception a user is meant to read."""


class PocketfusionError(Exception):
    """Bad input or a failed stage, told in one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
