"""Numbers as people read them."""


def format_bytes(num_bytes: float) -> str:
    """1234567 -> "1.23 MB"; units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5 or unit == "GB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
