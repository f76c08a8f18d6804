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
machine (16 cores, one NUMA node, 2 MB of L2 a core), 10.56 MB of pinned memory, medians of 150, a ping in front of the writing, in us:

                                                   offload    resume alone
    untouched: nobody wrote it                         209             271
    16 threads of torch wrote it just before           383             547
    one thread (numpy) wrote it just before            236             320

It is not that 16 threads are awake (after they wrote another buffer an offload takes 215 us where one of
untouched memory takes 237; with OMP_WAIT_POLICY=passive one after them takes 528; 1 ms later 335), nor the
resume: of the 276 us that their writing adds to it, a bare copy pays 174 as well. So beside the budget of
"resume alone" over an offload of untouched memory, 547 / 209 = 2.6, stands the same over an offload whose
tensor the same call has written in front of the clock ("written before the clock"), 547 / 383 = 1.4;
neither takes the other's place. One thread leaves the copy nearly as fast as untouched memory: what numpy
wrote is held against that, 320 / 209 = 1.5. And the memory is not all of it: a resume of what nobody wrote
is at 271 / 209 = 1.3, where all above the copy is the resume's own. On a machine with slower cores that is
more: what numpy wrote is at 1.9 to 2.3 there.

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
