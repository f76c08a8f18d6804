"""What a user writes in place, and on which side of the clock: the same on both sides of a ratio.

    resume alone            the edit is made in front of each call, and is not timed
    edit and resume         the edit is timed together with the resume

A resume whose activation was rewritten in shared pinned memory is one copy over PCIe and a request, as
one from host memory is, and the budget of both says so. Writing 10.56 MB is the user's own work, the
same whoever copies it to the GPU afterwards: 0.1 to 0.3 ms, much of it torch waking its threads. So it
stands on no side of that ratio, or on both: against an offload that writes the same bytes, by the same
call, into its own pinned tensor (`bench.manual_offload`, "written first"). On one side alone it would
be held against a copy of something that nobody wrote.

A row edited in the engine's own GPU memory is another matter: nothing goes over PCIe, the user's edit
is a good part of what there is, and the budget counts it.

After idling, the edit that is not timed lies in front of the idling: when the clock starts all is as
cold as it is for a bare offload.
"""

from typing import Any

from djinn_zmq.probe.rounds import Case

ALONE, WITH_EDIT = "resume alone", "edit and resume"
FIRST = "written first"  # of an offload: as `WITH_EDIT`


def rewriting(there: Any, data: Any) -> Case:
    """All of a tensor of torch's written with *data*, as fast as can be: with as many threads as torch
    has (numpy has one). Both uint8, of the same shape, in host memory."""

    def rewrite() -> None:
        there.copy_(data)

    return rewrite
