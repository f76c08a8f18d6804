"""Every error a user of Djinn can meet, and whose fault it is.

    DjinnError
    ├── RequestError   the caller's mistake: what was asked, what was got, what is allowed
    ├── RunError       the request was fine, doing it failed
    ├── Closed         you closed it
    └── Lost           a peer, an engine or a checkpoint is gone

The wire carries `code` (stable, part of the protocol) and the sentence; `from_wire` turns them back
into the same class on the other side.
"""


class DjinnError(Exception):
    """Base of all errors raised by Djinn. `code` is stable; the text is for people."""

    code = "error"


class RequestError(DjinnError):
    """The caller's mistake. The session and everything in it are as before."""

    code = "bad-request"


class ProtocolError(RequestError):
    """Bytes that are not a message of this protocol, or one out of turn."""

    code = "protocol"


class UnknownModel(RequestError):
    """No model of that name, directory or hub id can be served."""

    code = "unknown-model"


class ModelRefused(RequestError):
    """The model loaded, but cannot be served exactly (or not at all), for the named reason."""

    code = "model-refused"


class NoTokenizer(RequestError):
    """Text was sent to a model that has no tokenizer; token ids are served."""

    code = "no-tokenizer"


class NoSessions(RequestError):
    """The model's cached steps are not exact, for the named reason: plain runs are served."""

    code = "no-sessions"


class UnknownSession(RequestError):
    """No such session, or it belongs to somebody else."""

    code = "unknown-session"


class UnknownCheckpoint(RequestError):
    """No such checkpoint: never made, released, lost with its engine, or somebody else's."""

    code = "unknown-checkpoint"

    @classmethod
    def numbered(cls, number: int) -> "UnknownCheckpoint":
        """What is said of checkpoint *number*, whoever misses it."""
        return cls(
            f"checkpoint {number:#x} does not exist or is not yours here: it may have been released, or "
            "lost with an engine that had the only copy"
        )


class UnknownStop(RequestError):
    """No run is held at that stop: it goes on already, or its program gave it up."""

    code = "unknown-stop"


class LayerError(RequestError):
    """A layer the model does not have, or one that lies behind the checkpoint."""

    code = "layer"


class StopError(RequestError):
    """A stop that cannot be: a path that names no module, a condition that can never hold."""

    code = "stop"


class NotServed(RequestError):
    """Something of a model in one's own process that a served one does not do, by name."""

    code = "not-served"


class SweepTooLarge(RequestError):
    """Not even one branch of a sweep fits the memory there is. The sentence carries sizes."""

    code = "sweep-too-large"


class PromptError(RequestError):
    """A prompt that is empty, too long, ragged, or names a token the model does not have."""

    code = "prompt"


class EditError(RequestError):
    """An edit whose shape, dtype, values or index do not fit the activation."""

    code = "edit"


class SelectionError(RequestError, IndexError):
    """An index that an array does not have, or that selects nothing of it."""

    code = "index"


class BadFile(RequestError):
    """A file that is no checkpoint, or not one of this model. The sentence names it."""

    code = "bad-file"


class OnDevice(RequestError):
    """The bytes are in an engine's own memory alone, where only the engine reads them."""

    code = "on-device"


class AccessDenied(RequestError):
    """The peer may not do this: wrong owner, or not the user who runs the server."""

    code = "access"


class Busy(RequestError):
    """A bounded queue is full; ask again after an answer has come."""

    code = "busy"


class AddressInUse(RequestError):
    """A socket or port the server was told to bind already has a server behind it."""

    code = "address-in-use"


class RunError(DjinnError):
    """The request was well formed, doing it failed."""

    code = "run-failed"


class Cancelled(RunError):
    """The run was cancelled by its client."""

    code = "cancelled"


class DeadlineExceeded(RunError):
    """The request's own deadline passed before it was done."""

    code = "deadline"


class ArenaFull(RunError):
    """No room for a slot. The sentence carries sizes: asked, free and limit, in bytes."""

    code = "arena-full"


class StartError(RunError):
    """A server or an engine could not be started, for the named reason."""

    code = "start"


class PullError(RunError):
    """A model could not be brought into the cache, for the named reason."""

    code = "pull"


class Closed(DjinnError):
    """The object was closed by its own side."""

    code = "closed"


class Lost(DjinnError):
    """A peer, an engine or a checkpoint is gone."""

    code = "lost"


class Unreachable(Lost):
    """No server answers at the endpoint."""

    code = "unreachable"


class StaleSlot(Lost):
    """A slot reference whose generation has passed: the slot holds something else now."""

    code = "stale-slot"


def _by_code(root: type[DjinnError]) -> dict[str, type[DjinnError]]:
    classes = {root.code: root}
    for child in root.__subclasses__():
        classes |= _by_code(child)
    return classes


_CLASSES = _by_code(DjinnError)


def from_wire(code: str, text: str) -> DjinnError:
    """The error that *code* names; an unknown code (a newer peer) becomes a DjinnError."""
    return _CLASSES.get(code, DjinnError)(text)
