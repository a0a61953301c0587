"""The token of a copy. Routers send it to address a copy, and model servers compare it with their own.

Its form is `<incarnation>.<create revision>`: the pod's incarnation and the model record's create revision.
`.<generation>` follows once the registration's content has been reloaded. Before the first reload, the generation is 0
and is left out. This is the form that earlier versions know.

During a reload, a pod has copies of two generations of one registration. Either copy may answer a call for the older
generation. Only the newer copy may answer a call for the newer generation.
"""


def make(incarnation: str, revision: int, generation: int = 0) -> bytes:
    """Returns the token of a copy."""
    if not generation:
        return b"%s.%d" % (incarnation.encode(), revision)
    return b"%s.%d.%d" % (incarnation.encode(), revision, generation)


def read(token: bytes) -> tuple[bytes, int, int] | None:
    """Returns the incarnation, create revision and generation in a token, or None if the token is invalid."""
    incarnation, *numbers = token.split(b".")
    if len(numbers) not in (1, 2) or not all(number.isdigit() and len(number) < 20 for number in numbers):
        return None
    return incarnation, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0


def revision(token: bytes) -> int:
    """Returns the create revision in a token, or 0 if the token is invalid."""
    found = read(token)
    return 0 if found is None else found[1]


def supersedes(held: bytes, meant: bytes) -> bool:
    """Returns whether the copy with the token `held` is of a newer generation than the one with the token `meant`, in
    the same pod and of the same registration."""
    one, other = read(held), read(meant)
    return one is not None and other is not None and one[:2] == other[:2] and one[2] > other[2]
