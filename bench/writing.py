"""What a user writes in place, and on which side of the clock: the same on both sides of a ratio.

    resume alone                the edit is made in front of each call, and is not timed
    resume alone after numpy    the same, written by one thread: `view[...] = data`, as a user does it
    edit and resume             the edit is timed together with the resume

A resume whose activation was rewritten in shared pinned memory is one copy over PCIe and a request, as
one from host memory is, and the budget of both says so. Writing 10.56 MB is the user's own work, the
same whoever copies it to the GPU afterwards: 0.1 to 0.3 ms, much of it torch waking its threads. So it
stands on no side of that ratio, or on both: against an offload that writes the same bytes, by the same
call, into its own pinned tensor (`bench.manual_offload`, "written first"). On one side alone it would
be held against a copy of something that nobody wrote.

But writing leaves something behind: the lines lie dirty in the L2 caches of the cores that wrote, and a
copy over PCIe has to fetch them from there. (That is read off these times; no counter was.) On an H200
machine (16 cores, one NUMA node, 2 MB of L2 a core), 10.56 MB of pinned memory, medians of 60, in us:

                                                   offload    resume alone
    untouched: nobody wrote it                         237             427
    16 threads of torch wrote it just before           430             649
    … and 1 ms passes                                  335
    one thread (numpy) wrote it just before            246             492; 438 with a ping between
    16 threads wrote another buffer just before        215

It is not that 16 threads are awake (the last line; and with OMP_WAIT_POLICY=passive an offload after them
takes 528), nor the resume: of the 222 us that their writing adds to it, a bare copy pays 193 as well. So
beside the budget of "resume alone" over an offload of untouched memory, 649 / 237 = 2.7, stands the same
over an offload whose tensor the same call has written in front of the clock ("written before the
clock"), 649 / 430 = 1.5; neither takes the other's place. One thread leaves the copy nearly as fast as
untouched memory: what numpy wrote is held against that, 492 / 237 = 2.1. And the memory is not all of
it: a resume of what nobody wrote is at 427 / 237 = 1.8, where all above the copy is the resume's own.

A row edited in the engine's own GPU memory is another matter: nothing goes over PCIe, the user's edit
is a good part of what there is, and the budget counts it.

After idling, the edit that is not timed lies in front of the idling, of an offload as of a resume: when
the clock starts all is as cold as it is for a bare offload.
"""

from typing import Any

from djinn_zmq.probe.rounds import Case

ALONE, WITH_EDIT = "resume alone", "edit and resume"
AFTER_NUMPY = "resume alone after numpy"  # as `ALONE`, but for who wrote
FIRST = "written first"  # of an offload: as `WITH_EDIT`
BEFORE = "written before the clock"  # of an offload: as `ALONE`


def rewriting(there: Any, data: Any) -> Case:
    """All of a tensor of torch's written with *data*, as fast as can be: with as many threads as torch
    has (numpy has one). Both uint8, of the same shape, in host memory."""

    def rewrite() -> None:
        there.copy_(data)

    return rewrite


def assigning(there: Any, data: Any) -> Case:
    """All of a numpy array written with *data*, of the same shape and dtype: by one thread."""

    def assign() -> None:
        there[...] = data

    return assign
