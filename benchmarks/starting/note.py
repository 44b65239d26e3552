"""A line for each phase that has ended, in the file that ``STARTUP_NOTES`` names. Light, like the command."""

import json
import os
import time
from pathlib import Path

VARIABLE = "STARTUP_NOTES"


def note(phase: str, cpu: float) -> None:
    """``phase`` ends now and took ``cpu`` seconds of one process's CPU time."""
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps([phase, time.monotonic(), cpu]) + "\n")
