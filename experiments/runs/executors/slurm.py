"""The runs as jobs of Slurm, handed over by submitit."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from deltacontrol.experiments.runs.executors.base import GRACE_SECONDS, End, Work
from deltacontrol.experiments.runs.executors.remote import Remote, last_line, missing
from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.theory.errors import InputError

FOLDER = ".jobs"  # of the store: what is handed over, and what jobs print
_LONGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 unless somebody raised it


@dataclass(frozen=True)
class Slurm(Remote[Any]):
    """Slurm, by job arrays that submitit hands over.

    Jobs stay in the queue when the sweep is killed; the same command finds what they finished, and
    no run is computed twice. What a job printed lies in the folder .jobs of the store until its run
    is recorded.

    Attributes:
        partition: Of the queue.
        account: That is charged.
        cluster: local makes jobs processes of this machine, for trying out.
    """

    name: ClassVar[str] = "slurm"

    partition: str | None = None
    account: str | None = None
    cluster: Literal["slurm", "local"] = "slurm"

    @contextmanager
    def session(self, workers: int | None) -> Iterator[None]:
        """Check that there is something to hand jobs to."""
        _submitit()
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise InputError(
                "there is no sbatch here, so that no job can be handed to Slurm: start on a "
                "machine of the cluster, or try slurm:cluster=local"
            )
        yield

    def places(self) -> int:
        """As many as Slurm lets run; of processes here, one a core."""
        return _LONGEST_ARRAY if self.cluster == "slurm" else max(1, usable_cores() // self.cpus)

    def room(self, workers: int) -> int:
        """All are handed to Slurm, which begins `workers` at a time; processes here begin at once.

        What waits in the queue costs nothing, and the priorities of a cluster count waiting.
        """
        return 10**9 if self.cluster == "slurm" else workers

    def hand_over(
        self, work: Work, served: Mapping[str, Callable[[], End]], workers: int
    ) -> dict[str, Any]:
        """Job arrays, one for each limit of time."""
        arrays: dict[float, list[str]] = {}
        for name in served:
            arrays.setdefault(work.calls[name].seconds, []).append(name)
        found: dict[str, Any] = {}
        for seconds, names in arrays.items():
            for first in range(0, len(names), _LONGEST_ARRAY):
                part = names[first : first + _LONGEST_ARRAY]
                try:
                    executor = self._executor(work, seconds, workers)
                    with executor.batch():
                        found |= {name: executor.submit(served[name]) for name in part}
                except Exception as error:
                    raise InputError(
                        f"Slurm took no job: {last_line(error)}; try `sbatch` by hand with the "
                        "same partition and account"
                    ) from error
        return found

    def _executor(self, work: Work, seconds: float, workers: int) -> Any:
        submitit = _submitit()
        folder = work.folder.resolve() / FOLDER / "%j"
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        wanted = {
            "timeout_min": int((seconds + 2 * GRACE_SECONDS) // 60 + 1),
            "cpus_per_task": self.cpus,
            "gpus_per_node": int(self.gpus) or None,
            "mem_gb": self.memory,
            "name": "deltacontrol",
            "slurm_array_parallelism": workers,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
        }
        executor.update_parameters(**{k: v for k, v in wanted.items() if v is not None})
        return executor

    def over(self, handles: Mapping[str, Any], seconds: float) -> list[str]:
        """Those with a result, or that Slurm says are over."""
        until = time.monotonic() + seconds
        while not (found := [name for name, job in handles.items() if job.done()]):
            left = until - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, 0.5))
        return found

    def end(self, handle: Any) -> End:
        """What the job says, or what Slurm says of it."""
        submitit = _submitit()
        try:
            end = handle.result()
        except submitit.core.utils.FailedJobError as error:  # before the call could be made
            return End(failure=f"the job could not begin: {last_line(error)}")
        except submitit.core.utils.UncompletedJobError:
            return End(
                failure=f"its job {handle.job_id} ended without a result ({handle.state}); "
                f"{handle.paths.folder} has what it printed",
                died=True,
            )
        if end.failure is None:
            shutil.rmtree(handle.paths.folder, ignore_errors=True)
        return end

    def stop(self, handle: Any, *, at_once: bool) -> None:
        """Take the job out of the queue, or end it."""
        with suppress(Exception):  # it may be over by now
            handle.cancel(check=False)


def _submitit() -> Any:
    try:
        importlib.import_module("submitit.core.utils")
        return importlib.import_module("submitit")
    except ImportError as error:
        raise InputError(missing("slurm", "submitit")) from error
