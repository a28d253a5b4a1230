"""What happens on the second device: waits and copies by line, operators by name."""

import linecache
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Record:
    """Counts since it was made or cleared.

    waits     the host needs a result: {"item  train/run.py:41  loss.item()": 1}
    copies    between host and device, whether the host waits or not, in the same form
    launches  operators and Triton kernels that a GPU would have to start: {"aten.addmm": 96}
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self._counts = {what: Counter[str]() for what in ("waits", "copies", "launches")}

    def waits(self) -> Counter[str]:
        return self._counts["waits"]

    def copies(self) -> Counter[str]:
        return self._counts["copies"]

    def launches(self) -> Counter[str]:
        return self._counts["launches"]

    def add_wait(self, why: str) -> None:
        """Count a wait at the line of this project that runs."""
        self._counts["waits"][f"{why}  {current_line()}"] += 1

    def add_copy(self, where: str, waits: bool) -> None:
        """Count a copy to the "host" or to the "device" at that line, and a wait if it is one."""
        self._counts["copies"][f"to the {where}  {current_line()}"] += 1
        if waits:
            self.add_wait(f"copy to the {where}")

    def add_launch(self, operator: str) -> None:
        """Count an operator that starts a kernel."""
        self._counts["launches"][operator] += 1


def current_line() -> str:
    """Return "file:line  code" of the innermost frame in the repository, but not in this folder."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent != HERE and "site-packages" not in path.parts:
            code = linecache.getline(str(path), frame.f_lineno).strip()
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}  {code}"
        frame = frame.f_back
    return "outside the repository"
