"""Imported last in the process that local ranks are forked from: garbage collections of a rank leave alone what was
imported before the fork, which would otherwise cost each rank a copy of it, and the time of walking it."""

import gc

gc.collect()
gc.freeze()
