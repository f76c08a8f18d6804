"""How a program is named where there is a column for it."""

COLUMN = 40  # characters


def shown(command: str) -> str:
    """A command line in one short line, its program and a script behind that without their directories.

    What comes behind them is their arguments, and stays as it is.
    """
    words = "".join(one if one.isprintable() else " " for one in command).split()
    for place, word in enumerate(words):
        if word in ("-c", "-m"):
            break
        if not word.startswith("-"):
            words[place] = word.rsplit("/", 1)[-1] or word
            if place:
                break
    line = " ".join(words)
    return line if len(line) <= COLUMN else f"{line[: COLUMN - 1]}…"
