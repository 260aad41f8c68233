"""The one error type for bad input."""


class ConfigError(ValueError):
    """Input that the user can mend: one or two sentences that name the key, file or line, and what to do."""
