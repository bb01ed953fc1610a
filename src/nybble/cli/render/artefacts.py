"""What comes of merging and exporting."""

from rich.text import Text

from nybble.cli.render.terminal import Terminal, new_table, show
from nybble.exporting.compare import MergesCompared
from nybble.exporting.push import Pushed
from nybble.exporting.verify import Verified
from nybble.units import format_bytes


@show.register
def _(event: Verified, terminal: Terminal) -> None:
    """What was asked of whom, and what came of it."""
    verification = event.verification
    table = new_table(f"verified in: {verification.consumer}", ("check", "found", "needed", ""))
    for check in verification.checks:
        failed = Text("too little to tell") if verification.outcome == "undecided" else Text("failed", style="red")
        table.add_row(check.name, check.found, check.needed, "passed" if check.passed else failed)
    terminal.console.print(table)
    f = verification.figures
    if "positions" not in f:  # it could not be asked, or gives scores, of which the table says all
        return
    where = ", ".join("equal" if at is None else f"differs from token {at} on" for at in f["first_difference"])
    terminal.say(
        f"{f['positions']} held-out positions: "
        f"same choice {f['top1_agreement']:.2%} (base {f['top1_agreement_of_base']:.2%}), "
        f"KL to the tuned model {f['kl_mean']:.3g}, 99th percentile {f['kl_p99']:.3g} "
        f"(base {f['kl_mean_of_base']:.3g}), "
        f"loss {f['loss']:.4f} (tuned {f['loss_tuned']:.4f}, base {f['loss_base']:.4f})\n"
        f"greedy answers: {where}; {f['ended']} of {f['texts']} ended, {f['ended_tuned']} of the tuned model's"
    )


@show.register
def _(event: MergesCompared, terminal: Terminal) -> None:
    """Losses, and how much of what fine-tuning gained each way keeps."""
    _, base, kept, *_ = event.losses.values()
    figures = ("loss, nats a token", "against kept apart", "gain kept")
    title = f"{event.num_rows} held-out rows, {event.num_tokens} supervised tokens"
    table = new_table(title, ["model", *figures], right=figures)
    for name, loss in event.losses.items():
        gain = f"{(base - loss) / (base - kept):.0%}" if base > kept and "base, " not in name[:6] else ""
        table.add_row(name, f"{loss:.4f}", f"{loss - kept:+.4f}", gain)
    terminal.console.print(table)


@show.register
def _(event: Pushed, terminal: Terminal) -> None:
    """The files with their sizes, and where they are now, or would be."""
    width = max(map(len, event.files))
    for name, size in event.files.items():
        terminal.say(f"  {name:<{width}}  {format_bytes(size)}")
    what = f"{len(event.files)} files, {format_bytes(event.num_bytes)}"
    where = f"{event.repository}, {event.revision}"
    terminal.say(f"{what} would go to {where}; nothing was sent" if event.url is None else f"{what}: {event.url}")
