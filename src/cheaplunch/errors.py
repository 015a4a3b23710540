"""The exceptions that reach a user as a sentence instead of a traceback."""


class UserError(Exception):
    """Input the user can mend: one line that names the file or flag and the way out (exit status 2)."""


class Stopped(Exception):
    """The user or the system asked the process to leave; says what was saved and how to go on (exit status 1)."""
