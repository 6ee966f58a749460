"""Runs a program, a list of records of operations, on all threads of a pool: one native call for a whole step.

Every thread runs the same loop. An operation is cut into items, these into parts, one a thread: a thread takes the
next item that is left of its own part, so that it reads weights in a row, and then of others', so that a thread that is
held up holds up nobody for longer than an item. A barrier follows where the next operation needs the result. Items
don't depend on who does them.
"""

from __future__ import annotations

import numpy as np

from llorch_provider_numba import attention, products, rows
from llorch_provider_numba.intrinsics import atomic_add, atomic_load, atomic_swap, call_yield, load_i64, native, pause
from llorch_provider_numba.protocol import (
    ADD,
    APPEND,
    ARGMAX,
    ARRIVED,
    ASLEEP,
    ATTEND,
    BASE,
    COMBINE,
    COUNT,
    COUNTERS,
    EMBED,
    ENDED,
    ENDING,
    GATHER,
    JOIN,
    LINE,
    MULTIPLY,
    PARTS,
    PREPARE,
    PROGRAM,
    RECORD,
    RMSNORM,
    ROPE,
    SERVE,
    START,
    STARTED,
    SWIGLU,
    YIELD,
)

SPINS = 4000  # pauses at a barrier before the thread lets others run


@native
def _do(p, operation, item, thread):
    if operation == MULTIPLY:
        products.multiply(p, item)
    elif operation == PREPARE:
        products.prepare(p, item)
    elif operation == RMSNORM:
        rows.rmsnorm(p, item)
    elif operation == ATTEND:
        attention.attend(p, item, thread)
    elif operation == COMBINE:
        attention.combine(p, item)
    elif operation == APPEND:
        attention.append(p, item)
    elif operation == ROPE:
        rows.rope(p, item)
    elif operation == SWIGLU:
        rows.swiglu(p, item)
    elif operation == ADD:
        rows.add(p, item)
    elif operation == GATHER:
        rows.gather(p, item)
    elif operation == ARGMAX:
        rows.argmax(p, item)
    elif operation == EMBED:
        rows.embed(p, item)


@native
def _run(shared, program, count, counters, base, thread, threads):
    """slots of every record: operation, items, whether a barrier follows"""
    passed, parts = base, min(threads, PARTS)
    own = thread * parts // threads
    for i in range(count):
        p = program + RECORD * i
        operation, items = load_i64(p), load_i64(p + 8)
        for turn in range(parts):
            part = (own + turn) % parts
            end = items * (part + 1) // parts
            counter = counters + LINE * (i * parts + part)
            item = items * part // parts + atomic_load(counter)
            while item < end:
                item = items * part // parts + atomic_add(counter, 1)
                if item < end:
                    _do(p, operation, item, thread)
        if load_i64(p + 16) != 0 and threads > 1:
            passed += threads
            atomic_add(shared + ARRIVED, 1)
            spins = 0
            while atomic_load(shared + ARRIVED) < passed:
                spins += 1
                if spins < SPINS:
                    pause()
                else:
                    call_yield(load_i64(shared + YIELD))


@native
def _join(shared, thread, threads):
    """A thread's part of the program that was started last."""
    _run(
        shared, atomic_load(shared + PROGRAM), atomic_load(shared + COUNT), atomic_load(shared + COUNTERS),
        atomic_load(shared + BASE), thread, threads,
    )  # fmt: skip


@native
def _publish(shared, program, count, counters, threads):
    """Returns how many threads sleep. Theirs is the mark beside their flag: the caller has to wake them."""
    for i in range(count * min(threads, PARTS)):
        atomic_swap(counters + LINE * i, 0)
    atomic_swap(shared + PROGRAM, program)
    atomic_swap(shared + COUNT, count)
    atomic_swap(shared + COUNTERS, counters)
    atomic_swap(shared + BASE, atomic_load(shared + ARRIVED))
    atomic_add(shared + STARTED, 1)
    asleep = 0
    for thread in range(1, threads):
        flag = shared + ASLEEP + LINE * thread
        if atomic_swap(flag, 0) == 1:
            atomic_swap(flag + 8, 1)
            asleep += 1
    return asleep


@native
def _serve(shared, thread, threads, seen, spins):
    """Runs what is started, until nothing was for a while. Returns how many programs it has seen, or ENDED."""
    waited = 0
    while True:
        if atomic_load(shared + STARTED) > seen:
            seen += 1
            _join(shared, thread, threads)
            waited = 0
        elif atomic_load(shared + ENDING) != 0:
            return np.int64(ENDED)
        elif waited < spins:
            waited += 1
            pause()
        else:
            return seen


@native
def _lie_down(shared, thread, seen):
    """Whether the thread may sleep: not where a program came meanwhile and nobody has promised to wake it."""
    flag = shared + ASLEEP + LINE * thread
    atomic_swap(flag, 1)
    if atomic_load(shared + STARTED) > seen or atomic_load(shared + ENDING) != 0:
        return np.int64(atomic_swap(flag, 0) == 0)
    return np.int64(1)


@native
def drive(what, shared, thread, threads, a, b, c):
    """The one compiled entry: START (program, count, counters), JOIN, SERVE (seen, spins) or LIE_DOWN (seen)."""
    if what == START:
        asleep = _publish(shared, a, b, c, threads)
        if asleep == 0:
            _join(shared, np.int64(0), threads)
        return np.int64(asleep)
    if what == JOIN:
        _join(shared, np.int64(0), threads)
        return np.int64(0)
    if what == SERVE:
        return _serve(shared, thread, threads, a, b)
    return _lie_down(shared, thread, a)
