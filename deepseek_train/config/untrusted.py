"""What readers of files from elsewhere ask of a value before they go by it."""


def is_count(value: object) -> bool:
    """A whole number that is not negative (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_plain_name(name: object) -> bool:
    """The name of a file beside the one that mentions it: no path, no drive, no URL, nothing hidden."""
    if not isinstance(name, str) or not name or name.startswith("."):
        return False
    return not any(mark in name for mark in ("/", "\\", ":", "\0"))
