"""What a reply that nobody takes has had the engine keep, so that it can be released."""

from collections.abc import Iterator

from djinn_zmq.wire import messages
from djinn_zmq.wire.forwards import Forwarded
from djinn_zmq.wire.looks import LookReply
from djinn_zmq.wire.talks import Generated, Token
from djinn_zmq.wire.tiers import HoldReply, RestoreReply


def kept_by(meta: object) -> Iterator[int]:
    """The numbers of all that a reply with *meta* brings its client: checkpoints, logits, branches,
    holds."""
    if isinstance(meta, messages.RunReply):
        yield from (kept.id for kept in meta.checkpoints)
        yield from filter(None, (meta.logits_id, meta.branch))
    elif isinstance(meta, (Token, Generated)):
        yield from (kept.id for kept in meta.checkpoints)
        if isinstance(meta, Generated) and meta.branch:
            yield meta.branch
    elif isinstance(meta, LookReply):
        yield from (seen.id for seen in meta.seen if seen.id)
    elif isinstance(meta, Forwarded):
        yield from filter(None, (meta.past, *(output.id for output in meta.outputs)))
    elif isinstance(meta, messages.Uploaded):
        yield meta.id
    elif isinstance(meta, HoldReply):
        yield meta.hold
    elif isinstance(meta, RestoreReply):
        yield meta.kept.id
