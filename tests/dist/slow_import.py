"""Takes its time to be imported, for a Ctrl-C in the middle of it."""

import time

print("importing", flush=True)
time.sleep(1)
