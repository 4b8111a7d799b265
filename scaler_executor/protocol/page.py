"""The page of memory that a worker shares with its agent and its forker, and the records in its result pipe.

The page is an array of native, aligned 64-bit words (`memoryview.cast("q")`): a word cannot be torn by a stop. It
tells, at any moment at which the worker is frozen or dead, which calls are over, which one is in progress and which
have not been started.

The worker's side, for each call, in this order:

    page[CURRENT] = seq                       # claim
    page[slot(seq)] == seq, or skip it        # then look whether it is still allowed
    ... run it ...
    write the result into the pipe            # crash-proof from here on
    page[DONE] = seq

Claim before look: a freezer that sees `CURRENT < seq` may take `seq` back, since the worker has yet to look; one that
sees `CURRENT == seq` may not. Before it claims a run of items the worker writes ITEM = 0 and STOP = items; inside the
run each item is claimed the same way: ITEM = i, then look at i < STOP, then run it, then write its result.

The values of consecutive items of a run are collected in a buffer behind the words, the range buffer, and written into
the pipe together: a system call for each would take longer than a short item. They are as safe there: PENDING says, in
one word, how many are complete, and whoever finds the worker dead takes them from there. An agent may also read them
while the worker is inside a long item, if it finds all three words unchanged afterwards.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

#: Number of the call claimed last; that call is in progress unless DONE has reached it. Written by the worker.
CURRENT: Final = 0
#: Number of the last call whose results are all in the pipe. Written by the worker.
DONE: Final = 1
#: Item of the current run claimed last, counted from the first one of the row. Written by the worker.
ITEM: Final = 2
#: Items of the current run from this one on must not be started. Written by the worker before it claims a run,
#: lowered by the forker while the worker is frozen inside it.
STOP: Final = 3
#: The call that is to be stopped softly. Written by the forker before it signals.
INTERRUPT: Final = 4
#: INTERRUPT as the worker's handler last found it: a signal that comes right before a system call does not end it, and
#: its handler runs when something else does. Written by the worker.
HEARD: Final = 9
#: 1 after the worker rang the bell, until the agent has read its pipe. Tells which of many workers rang.
RANG: Final = 5

#: What stands in the range buffer and not yet in the pipe: number of items << 32 | bytes; 0: nothing. Written by the
#: worker, as everything below.
PENDING: Final = 6
#: The run and its first item that the range buffer holds. Written before the buffer, which is written before PENDING.
RANGE_SEQ: Final = 7
RANGE_FIRST: Final = 8

#: What the process last wrote to stderr stands in a ring of bytes behind the range buffer: so many bytes in all since
#: the call and item that they are of. Written by the worker.
STDERR_COUNT: Final = 10
STDERR_SEQ: Final = 11
STDERR_ITEM: Final = 12
#: 1 if the user's program wants the stack of a fatal fault on stderr. Written by the worker.
SHOW_FAULT: Final = 13

#: What calls print stands in a ring of its own, see `runtime.output_ring`: bytes written to it since the start, up to
#: where it has been overwritten, and so many lines that were overwritten before they were read. Written by the worker.
OUTPUT_END: Final = 14
OUTPUT_FIRST: Final = 15
OUTPUT_LOST: Final = 16
#: Up to where it has been read; and 1 while the agent looks there by itself, without a bell. Written by the agent.
OUTPUT_READ: Final = 17
OUTPUT_WATCHED: Final = 18

#: 1 when an end of the pair of the worker's nested session is in the call pair, until the agent has taken it.
NESTS: Final = 19

HEADER_WORDS: Final = 24
#: So many calls may be in a worker's hands at once.
RING_SLOTS: Final = 1000
PAGE_WORDS: Final = HEADER_WORDS + RING_SLOTS
#: The range buffer, behind the words.
RANGE_BYTES: Final = 1 << 16
RANGE_START: Final = 8 * PAGE_WORDS
#: How a range begins whose values stand in it as little-endian words, signed integers or floats, and not as pickles
#: (which begin otherwise). A pickle of one takes three times as long to write and thirty times as long to read.
INTEGERS: Final = b"q" + bytes(7)
FLOATS: Final = b"d" + bytes(7)
#: The ring of what was written to stderr, behind that.
STDERR_BYTES: Final = 1 << 12
STDERR_START: Final = RANGE_START + RANGE_BYTES
#: The ring of what calls print.
OUTPUT_BYTES: Final = 1 << 17
OUTPUT_START: Final = STDERR_START + STDERR_BYTES
#: What the fault handler writes of a fatal fault, zeros behind it. What does not fit is lost.
FAULT_BYTES: Final = 1 << 14
FAULT_START: Final = OUTPUT_START + OUTPUT_BYTES
PAGE_BYTES: Final = FAULT_START + FAULT_BYTES


def slot(seq: int) -> int:
    """Return the index of the word that holds `seq` while the call is allowed to start; the agent writes it before it
    sends the call."""
    return HEADER_WORDS + seq % RING_SLOTS


#: Head of a record in the result pipe: body length in bytes, seq, item, number of frames, kind. With frames the body
#: begins with the length of each of them as an unsigned 64-bit word; frame 0 is the pickle. A frame whose length has
#: the mark of `segment` says in which file it is.
RECORD: Final = Struct("<QQIHBx")
RECORD_BYTES: Final = RECORD.size

# Kinds of records. The first two are those of `messages.ResultKind`.
RECORD_VALUE: Final = 0  # pickle of the item's value
RECORD_ERROR: Final = 1  # pickle of the item's exception
RECORD_UNWOUND: Final = 2  # the call was stopped softly and has unwound; the worker exits and claims nothing more
RECORD_SKIPPED: Final = 3  # the call was claimed, found taken back and not started
RECORD_BATCH_END: Final = 4  # `seq`: duration of the message's calls in ns; `item`: the items run
RECORD_READY: Final = 5  # the initializer is through
RECORD_START_FAILED: Final = 6  # utf-8 text: traceback of the initializer; the worker exits
RECORD_VALUES: Final = 7  # of a run: u32 number of items, then what stood in the range buffer: their values
