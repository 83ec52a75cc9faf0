"""Changes valid inputs: their bytes, and what lies within their structure, so that checks behind the first are met."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
_TEXTS = ("", "a", "../x", "/etc/passwd", "x" * 300, "\0", "é", "__class__", "1e999", "NaN", "sha256:0", "-1", "[[[[")


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changes: bits, numbers of all widths, and pieces cut, repeated or moved."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(result) + 1)
        if rng.random() < 0.5:
            place = min(place, rng.randrange(1, 129))  # Headers are at the beginning.
        length = min(len(result) - place, 1 << rng.randrange(10))
        match rng.randrange(7):
            case 0 if place < len(result):
                result[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(result):
                result[place] = rng.randrange(256)
            case 2:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(_NUMBERS) % (1 << 8 * width)
                result[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            case 3:
                del result[place : place + length]
            case 4:
                result[place:place] = result[place : place + length]
            case 5:
                result[place:place] = rng.randbytes(rng.randrange(1, 17))
            case _:
                del result[place:]
    return bytes(result)


def in_json(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with one value replaced, dropped or repeated somewhere in its tree."""
    root: Any = json.loads(data)
    node: Any = root
    parent: Any = None
    key: Any = None
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.9):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return in_bytes(data, rng)
    match rng.randrange(4):
        case 0:
            del parent[key]
        case 1:
            parent[key] = rng.choice((*_NUMBERS, *_TEXTS, None, True, [], {}, 1.5, float("nan"), [[]], {"as_int": -1}))
        case 2 if isinstance(parent, list):
            parent.append(node)
        case _ if isinstance(parent, dict):
            parent[rng.choice(_TEXTS)] = parent.pop(key)
    return json.dumps(root).encode()


def in_zip(within: Callable[[str], Mutate]) -> Mutate:
    """Return a mutation of one entry of a zip, whose checksums are then right again.

    Args:
        within: Mutation that suits an entry's name.
    """

    def mutate(data: bytes, rng: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            entries = [(entry, old.read(entry)) for entry in old.infolist()]
        chosen = rng.randrange(len(entries))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as new:
            for number, (entry, content) in enumerate(entries):
                if number == chosen:
                    content = within(entry.filename)(content, rng)
                    if rng.random() < 0.05:
                        continue
                new.writestr(entry.filename, content, rng.choice((0, 0, 0, 0, 0, 0, 0, 8)))
        return buffer.getvalue()

    return mutate


def in_text(data: bytes, rng: random.Random) -> bytes:
    """Return lines of text with one changed, moved, repeated or indented, or a word replaced."""
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[place]
        case 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[place])
        case 2:
            lines[place] = "  " + lines[place]
        case 3:
            key, colon, _ = lines[place].partition(":")
            value = rng.choice((*_TEXTS, *map(str, _NUMBERS), "!!python/object/apply:os.system [x]", "&a [*a]", "{"))
            lines[place] = f"{key}{colon} {value}"
        case 4:
            lines[place] = in_bytes(lines[place].encode(), rng).decode("latin-1")
        case _:
            lines[place] = lines[place].strip() * rng.randrange(1, 40)
    return "\n".join(lines).encode()


def one_of(*mutations: Mutate) -> Mutate:
    """Return a mutation that is one of several each time."""
    return lambda data, rng: rng.choice(mutations)(data, rng)
