"""What a measurement may fail with: apart from it, because the command line knows it without the extra ``bench``."""


class BenchError(Exception):
    """What makes a measurement impossible; the message says what to do."""
