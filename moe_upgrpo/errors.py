"""The one exception that means "what you asked for cannot be done", as against a fault of ours."""


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and how to fix it.

    The launcher prints it as one line without a traceback and ends every rank with exit status 2.
    """
