"""Updates with gradients that are not finite, which are skipped: what to do after too many of them."""

from __future__ import annotations

from w2vscale.checkpoint.format import committed
from w2vscale.errors import UserError
from w2vscale.training.pending import PendingUpdate
from w2vscale.training.replay import Window, keep_window
from w2vscale.training.run import Run


def explain_skips(run: Run, last: PendingUpdate, in_a_row: int, *, per_forward: int) -> str:
    """Keep the window of the last skipped update, and say what to do. Collective."""
    run.store.wait()
    newest = committed(run.store.folder)[-1:]
    resume = f"continue from {newest[0]}, which is finite" if newest else "start again"
    window = Window(last.window, last.number - 1, per_forward, last.denominator)
    finite = all(bool(field.isfinite().all()) for field in last.sums)
    try:
        kept = keep_window(run, window, finite=finite)
        cause = f"find the module with: w2vscale replay {kept}"
    except UserError as error:
        cause = str(error)
    return (
        f"{in_a_row} updates in a row had gradients that are not finite, the last is update "
        f"{last.number}; {cause}; lower optim.lr ({run.config.optim.lr:g}) and {resume}"
    )
