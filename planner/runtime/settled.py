"""Imported last into the process that workers are forked from: what it has loaded is there to stay.

A worker's collector of cycles would look through all of it, time and again, and write to every
object that it looks at: pages that workers share until one is written to.
"""

import gc

gc.collect()
gc.freeze()
