"""Who may know of what happened, and how much of it is still known."""

from djinn_zmq.server.journal import KEPT, Journal


def test_an_owner_is_told_of_his_own_and_of_what_is_everybodys_in_order() -> None:
    journal = Journal()
    heard: list[tuple[int, str]] = []
    journal.listeners.append(lambda event, owner: heard.append((event.number, owner)))
    for owner in ("me", "", "another", "me"):
        journal.tell("run", f"of {owner}", owner=owner, session=7, nbytes=8, elapsed_ns=9)
    assert heard == [(1, "me"), (2, ""), (3, "another"), (4, "me")]
    mine = journal.after(0, "me", 9)
    assert [event.number for event in mine] == [1, 2, 4]
    first = mine[0]
    assert (first.kind, first.text, first.session) == ("run", "of me", 7)
    assert (first.nbytes, first.elapsed_ns) == (8, 9)
    assert [event.number for event in journal.after(0, "me", 2)] == [1, 2]
    assert [event.number for event in journal.after(2, "me", 9)] == [4]
    assert journal.after(4, "me", 9) == () == journal.after(2**64, "me", 9)


def test_what_happened_long_ago_is_forgotten() -> None:
    journal = Journal()
    for _ in range(KEPT + 2):
        journal.tell("engine", "")
    events = journal.after(0, "me", KEPT + 2)
    assert (events[0].number, events[-1].number) == (3, KEPT + 2)
