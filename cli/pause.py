"""How a long run is interrupted: Ctrl-C, SIGTERM, SIGHUP or an error, with nothing lost but the step in hand.

Not what is saved: that is the caller's `save`.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cli import ranks
from cli.screen import STOPS


class Pause:
    """A signal of STOPS saves the steps that are whole (a SIGKILL may follow), lets the step end, saves it
    too, and stops; a second one stops at once. Of several processes SIGTERM ends each at once, as torchrun
    kills those that linger. whole(): is the adapter that of the last whole step?"""

    def __init__(self, save: Callable[[], None], whole: Callable[[], bool]):
        self.asked = self.saving = False
        self._save, self._whole = save, whole

    def save(self) -> bool:
        """Save, unless the adapter has moved since the last whole step: a state in the middle of a step
        cannot be resumed. Returns whether it saved."""
        self.saving = True  # a signal meanwhile must neither write the same files nor end this
        try:
            if whole := self._whole():
                self._save()
        finally:
            self.saving = False
        return whole

    def __call__(self, number: int, _) -> None:
        if number == signal.SIGTERM and ranks.world() > 1:
            return None if self.saving else ranks.lost()
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # the terminal may be gone
            print("\nstopping after this step (again: at once)", file=sys.stderr)
        if not self.saving:
            self.save()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within it, these signals ask for a pause."""
        old = {sig: signal.signal(sig, self) for sig in STOPS if signal.getsignal(sig) != signal.SIG_IGN}
        try:
            yield
        finally:
            for sig, handler in old.items():
                signal.signal(sig, handler)


@contextmanager
def saving_on_failure(out: str, facts: dict, pause: Pause) -> Iterator[None]:
    """Whatever ends the loop early, the steps that are whole are saved if they can be, and the error says how
    to go on."""
    try:
        yield
    except Exception as e:
        pause.saving = True  # torchrun's SIGTERM is on its way
        advice = f"Step {facts['step'] + 1} is lost"
        try:
            advice += ", no more" if pause.save() else ", and those since the last save"
            advice += " (unless the first process has ended)" if ranks.rank() else ""
        except (OSError, ValueError) as failed:
            advice += f", and those since the last save, as this one failed ({failed})"
        advice += f": go on with --out {out} --resume"
        if isinstance(e, (ValueError, OSError)):
            raise (ValueError if isinstance(e, ValueError) else OSError)(f"{e}. {advice}") from None
        print(advice, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        pause.save()
        raise
