"""What compiled code and the code that prepares its work agree on. Importing it loads no Numba."""

from __future__ import annotations

RECORD = 384  # bytes of an operation: 48 slots
LINE = 64  # counters lie apart, so that threads don't wait for each other's cache lines
PARTS = 8  # of an operation's items, at most, so that many threads don't look through many

# What all threads share, by byte offset: how many programs were started, the program, its operations, its counters,
# arrivals at barriers ever, arrivals before this program, the address of the system's yield, whether the pool ends,
# and for each thread a flag, 1 while it sleeps, with the starter's mark beside it
STARTED, PROGRAM, COUNT, COUNTERS, ARRIVED, BASE, YIELD, ENDING, ASLEEP = (LINE * i for i in range(9))

# Operations
(
    PREPARE, MULTIPLY, RMSNORM, ROPE, SWIGLU, ADD, GATHER, ARGMAX, EMBED, APPEND, ATTEND, COMBINE,
) = range(12)  # fmt: skip

# What `drive` does
START, JOIN, SERVE, LIE_DOWN = range(4)
ENDED = -1

# Kinds of prepared activations: columns, int8 records, float32 records
PLAIN, ROUNDED, KEPT = range(3)

CHUNK = 4  # groups of rows of an item of a product
ELEMENTS = 4096  # of an item of an elementwise operation
