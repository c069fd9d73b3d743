"""Sizes that arrays are padded to, so that few shapes are compiled."""


def multiple(size: int, of: int) -> int:
    """The smallest multiple of `of` that is not less than `size`."""
    return -(-size // of) * of


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size` ≥ 1."""
    return 1 << (size - 1).bit_length()


def prompt_slots(length: int) -> int:
    """Slots for `length` prompt tokens: 0, multiples of 8 up to 64, then four sizes for each doubling.

    A padded slot costs as much as a real token in the prompt's pass, and a key and a value read in every step: a
    quarter at most beyond 32 tokens, a tenth on average; coarser buckets would cost more than they save compiling.
    """
    return multiple(length, max(8, power_of_two(length) // 8))


def text_length(length: int, limit: int) -> int:
    """Tokens of a row of text, at most `limit` unless `length` is more: multiples of 16, of 64 from 128, of 256 from
    1,024."""
    step = 16 if length <= 128 else 64 if length <= 1024 else 256
    return min(multiple(length, step), max(limit, length))


def tail_length(length: int) -> int:
    """Tokens that each of many rows adds to what they share: multiples of 8 up to 64, then powers of two."""
    return multiple(length, 8) if length <= 64 else power_of_two(length)
