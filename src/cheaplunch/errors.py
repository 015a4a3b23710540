"""The one exception that reaches a user as a sentence instead of a traceback."""


class UserError(Exception):
    """Input the user can mend: one line that names the file or flag and the way out (exit status 2)."""
