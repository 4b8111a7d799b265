"""The exceptions that are a BrokenProcessPool, apart from `errors` because their base is slow to import."""

from __future__ import annotations

import signal
from concurrent.futures.process import BrokenProcessPool

from scaler_executor.errors import title_of
from scaler_executor.protocol.messages import Death, DeathReport

_UNITS_MIB = 1 << 20


class WorkerDiedError(BrokenProcessPool):
    """The worker process died while it ran this call: a crash, `os._exit`, a kill, possibly for want of memory.

    Unlike with ProcessPoolExecutor no other call is affected and the executor stays usable.

    Attributes:
        call_name: Name of the function that was called, "" if it is not known.
        reason: A sentence about what was seen.
        exit_code: Exit code of the process; negative: minus the number of the signal that ended it; None: nobody could
        tell.
        signal_name: "SIGSEGV" for example, None if no signal ended it.
        host: Name of the machine.
        pid: Process id of the worker there.
        worker_id: Number of the worker on that machine.
        attempt: 1 for the first time that the call was made.
        out_of_memory: True if the kernel's counters say that it has killed a process for want of memory meanwhile,
        False if they do not, None if no SIGKILL ended the process or there are no counters.
        peak_memory_bytes: The most memory that the worker's process used, 0 if it is not known.
        stderr: The end of what the call wrote to `sys.stderr`, at most 4 KB; not what C code or other programs wrote.
        fault: The call's stack at a fatal fault (SIGSEGV, SIGFPE, SIGABRT, SIGBUS, SIGILL) in the format of
        `faulthandler`, "" if there was none.
        story: What the cluster remembers of the call, for bug reports; may be empty.
        earlier: WorkerDiedErrors of the attempts before this one, the latest 20.
    """

    __module__ = "scaler_executor"

    call_name: str = ""
    reason: str = ""
    exit_code: int | None = None
    host: str = ""
    pid: int = 0
    worker_id: int = 0
    attempt: int = 1
    out_of_memory: bool | None = None
    peak_memory_bytes: int = 0
    stderr: str = ""
    fault: str = ""
    story: str = ""
    earlier: list[WorkerDiedError] = []

    @classmethod
    def from_report(cls, report: Death, call_name: str = "") -> WorkerDiedError:
        """Return the error that tells a user of `report`."""
        what = f"the worker died in {title_of(call_name) or 'this call'}"
        details = [f"host {report.host}" if report.host else "", f"pid {report.pid}" if report.pid else ""]
        if report.attempt > 1:
            details.append(f"attempt {report.attempt}")
        if report.peak_memory_bytes:
            details.append(f"peak memory {report.peak_memory_bytes // _UNITS_MIB} MiB")
        aside = ", ".join(filter(None, details))
        sentence = f"{what}: {report.reason}" + (f" ({aside})" if aside else "")
        before = []
        earlier = report.earlier if isinstance(report, DeathReport) else []
        for death in earlier:
            where = ", ".join(filter(None, [death.host, f"pid {death.pid}" if death.pid else ""]))
            before.append(f"  attempt {death.attempt}: {death.reason}" + (f" ({where})" if where else ""))
        self = cls("\n".join(filter(None, (sentence, *before, report.last_words))))
        self.call_name = call_name
        for name in report.__struct_fields__:
            setattr(self, name, getattr(report, name))
        self.earlier = [cls.from_report(death, call_name) for death in earlier]
        return self

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that ended the worker, None if none did."""
        if self.exit_code is None or self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"


class WorkerStartError(BrokenProcessPool):
    """No worker can be started, its initializer failed for example; the message carries the cause, with the worker's
    traceback if there is one."""

    __module__ = "scaler_executor"
