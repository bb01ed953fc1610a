"""Tables of what a check found."""

import math
import re
from typing import Any

from common import Table

from gpu.check import Check


def number(value: Any, unit: float = 1.0, digits: int = 2) -> str:
    return f"{value / unit:.{digits}f}" if isinstance(value, int | float) else str(value if value is not None else "")


def verdict(line: dict[str, Any]) -> str:
    return "" if line["passed"] else "WRONG"


def tables_of(check: Check) -> list[Table]:
    """All that was found, for people."""
    phases = Table("Phases.", ["phase", "result", "s", "last words"], [
        [line["phase"], line["result"], number(line["seconds"], digits=0), line["last_words"].replace("|", "/")]
        for line in check.lines("phase")
    ])  # fmt: skip
    tests = Table("What was compared: an error above what is allowed is wrong.", ["test", "error", "allowed", ""], [
        [line["name"].replace("|", "/"), f"{line['error']:.2g}", f"{line['allowed']:.2g}", verdict(line)]
        for line in check.lines("test")
    ])  # fmt: skip
    products: dict[tuple[str, int], str] = {}
    for line in check.lines("product"):
        key, rate = (line["name"], line["tokens"]), number(line["flops"], 1e12, 0)
        products[key] = f"{products[key]} / {rate}" if key in products else rate
    ceilings = Table("Ceilings; products both ways, and with 16 and 64 more columns.", ["what", "rate"], [
        *(["copy, GB/s", number(line["bytes_per_s"], 1e9, 0)] for line in check.lines("copy")),
        *(["square product, TFLOP/s", number(line["flops"], 1e12, 0)] for line in check.lines("square")),
        *([f"{name}, {tokens} tokens, TFLOP/s", rates] for (name, tokens), rates in products.items()),
        *(["link from the host, GB/s", number(line["bytes_per_s"], 1e9, 1)] for line in check.lines("link")),
    ])  # fmt: skip
    kernels = Table("Kernels.", ["op", "whose", "us", "GB/s", "of the copy"], [
        [line["name"], line["contender"], number(line["seconds"], 1e-6, 1), number(line["bytes_per_s"], 1e9, 0),
         f"{line['share_of_copy']:.0%}" if math.isfinite(line["share_of_copy"]) else ""]
        for line in check.lines("kernel")
    ])  # fmt: skip
    columns = ["tokens", "keeping", "path", "ms", "tokens/s", "of L1", "of L0", "idle", "launches", "waits",
               "allocated, GB", "reserved, GB", "planned, GB"]  # fmt: skip
    steps = Table("Steps: times of the ideal step (L1) and of the products alone (L0).", columns, [
        step_row(line) for line in check.lines("step")
    ])  # fmt: skip
    longest = next((line for line in check.lines("step") if line.get("top_ms")), {"top_ms": {}})
    kernel_times = [[name.replace("|", "/"), number(ms)] for name, ms in longest["top_ms"].items()]
    top = Table("What took longest in the first of these steps.", ["kernel", "ms"], kernel_times)
    return [phases, tests, ceilings, kernels, steps, top, token_table(check), peer_table(check), block_table(check)]


def step_row(line: dict[str, Any]) -> list[str]:
    begin = [f"{line['tokens']} in rows of {line['row']}", line["keep"] + from_graphs(line)]
    if "seconds" not in line:
        return [*begin, line["result"], *[""] * 10]
    seconds, ideal, idle = line["seconds"], line["ideal"] or {"products": math.nan}, line["idle"]
    return [
        *begin, line["path"], number(seconds, 1e-3, 1), number(line["tokens"] / seconds, digits=0),
        number(seconds / sum(ideal.values())), number(seconds / ideal["products"]),
        f"{idle:.0%}" if isinstance(idle, float) else str(idle), number(line.get("launches"), digits=0),
        number(line["waits"], digits=0), *(number(line[key], 1e9) for key in ("allocated", "reserved", "planned")),
    ]  # fmt: skip


def from_graphs(line: dict[str, Any]) -> str:
    return ", from graphs" if line.get("graphs") else ""


def token_table(check: Check) -> Table:
    rows = [
        [f"{line['rows']} after {line['context']} tokens{from_graphs(line)}", number(line["seconds"], 1e-3),
         number(line["rows"] / line["seconds"], digits=0), number(line["seconds"] / line["floor"]),
         f"{line['idle']:.0%}" if isinstance(line["idle"], float) else str(line["idle"]),
         number(line.get("launches"), digits=0), number(line["waits"], digits=0)]
        for line in check.lines("token")
    ]  # fmt: skip
    columns = ["texts", "ms a token", "tokens/s", "of reading the weights", "idle", "launches", "waits"]
    return Table("Generation: a token of each text, the time of reading all weights once beside it.", columns, rows)


def peer_table(check: Check) -> Table:
    """Against nybble's step that keeps nothing, since these recompute every layer too."""
    steps = [line for line in check.lines("step") if line["keep"] == "nothing" and not line.get("graphs")]
    ours = {line["tokens"]: line for line in steps if "seconds" in line}
    rows = []
    for line in check.lines("peer"):
        if "seconds" not in line:
            rows.append([line["name"], line["result"], "", "", "", ""])
            continue
        own = ours.get(line["tokens"], {})
        times = number(line["seconds"] / own["seconds"]) if own else ""
        memory = own.get("allocated")
        share = number(memory / line["allocated"]) if isinstance(memory, int) else ""
        rows.append([line["name"], str(line["tokens"]), number(line["seconds"], 1e-3, 1), times,
                     number(line["allocated"], 1e9), share])  # fmt: skip
    columns = ["peer", "tokens", "ms", "times nybble's, keeping nothing", "allocated, GB", "nybble's share of it"]
    return Table("Peers.", columns, rows)


def block_table(check: Check) -> Table:
    lines = check.lines("blocks")
    rows = [
        [line["name"], str(line["layers"]), number(line["seconds"], 1e-3, 1),
         number(line["seconds"] / lines[0].get("seconds", math.nan)), number(line["allocated"], 1e9)]
        if "seconds" in line else [line["name"], str(line["layers"]), line["result"], "", ""]
        for line in lines
    ]  # fmt: skip
    return Table("Blocks of a 70B.", ["where", "blocks", "ms", "times resident", "allocated, GB"], rows)


def card_name(check: Check) -> str:
    name = next((line["name"] for line in check.lines("card")), check.device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
