"""The token of a copy: routers send it to address a copy, model servers compare it.

Its form is `<incarnation>.<create revision>`: the pod's incarnation and the model record's create revision.
`.<generation>` follows once the registration's content was reloaded; before the first reload the generation is 0 and
left out, which is also the form that earlier versions know.

During a reload a pod holds two generations of one registration. A call for the older one may be answered by either:
both belong to the same registration. A call for the newer one is never answered by the older.
"""


def make(incarnation: str, revision: int, generation: int = 0) -> bytes:
    """Returns the token of a copy."""
    if not generation:
        return b"%s.%d" % (incarnation.encode(), revision)
    return b"%s.%d.%d" % (incarnation.encode(), revision, generation)


def read(token: bytes) -> tuple[bytes, int, int] | None:
    """Returns incarnation, create revision and generation; None for an invalid token."""
    incarnation, *numbers = token.split(b".")
    if len(numbers) not in (1, 2) or not all(number.isdigit() and len(number) < 20 for number in numbers):
        return None
    return incarnation, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0


def revision(token: bytes) -> int:
    """Returns the create revision in a token; 0 if there is none."""
    found = read(token)
    return 0 if found is None else found[1]


def supersedes(held: bytes, meant: bytes) -> bool:
    """Returns whether the copy `held` is a newer generation of the copy `meant`."""
    one, other = read(held), read(meant)
    return one is not None and other is not None and one[:2] == other[:2] and one[2] > other[2]
