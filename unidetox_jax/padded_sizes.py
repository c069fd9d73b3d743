"""Array sizes to pad to, so that few shapes are compiled."""

PROGRAM_USES = 4  # evaluations that padding slows down for each compilation saved: of a model's forms, and later ones


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not less than `size`."""
    return -(-size // multiple) * multiple


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size` ≥ 1."""
    return 1 << (size - 1).bit_length()


def prompt_slots(length: int) -> int:
    """Slots for `length` prompt tokens: 0, multiples of 8 up to 64, then four sizes per doubling.

    A padded slot costs as much as a real token in prefill, and a key and value read in every step: beyond 32 tokens at
    most a quarter, on average a tenth. Coarser buckets would cost more than they save in compilation.
    """
    return round_up(length, max(8, next_power_of_two(length) // 8))


def text_length(length: int, limit: int) -> int:
    """Row length for `length` tokens of text: multiples of 16, of 64 beyond 128, of 256 beyond 1,024; at most `limit`
    unless `length` exceeds it."""
    step = 16 if length <= 128 else 64 if length <= 1024 else 256
    return min(round_up(length, step), max(limit, length))


def tail_length(length: int) -> int:
    """Row length for `length` tokens after a shared prefix: multiples of 8 up to 64, then powers of two."""
    return round_up(length, 8) if length <= 64 else next_power_of_two(length)
