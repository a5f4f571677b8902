"""The runs on a Ray cluster, each a task."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from deltacontrol.experiments.runs.executors.base import End, Work
from deltacontrol.experiments.runs.executors.remote import Remote, last_line, missing
from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.theory.errors import InputError

_GIB = 2**30
_ATTEMPTS = 3  # to start a cluster here: Ray gives its server half a minute, a busy machine more


@dataclass(frozen=True)
class Ray(Remote[Any]):
    """A Ray cluster: that of `address`, else that of RAY_ADDRESS, else one on this machine.

    The cluster decides where a run goes, by the cores, GPUs and memory that it asks for. With more
    workers than it has room for, those that wait let an autoscaler start machines.

    Attributes:
        address: Of a cluster that is there, such as ``auto`` or ``10.0.0.1:6379``.
    """

    name: ClassVar[str] = "ray"

    address: str | None = None

    @contextmanager
    def session(self, workers: int | None) -> Iterator[None]:
        """A connection to the cluster; one on this machine ends with it."""
        ray = _ray()
        if ray.is_initialized():
            yield
            return
        self._connect(ray, workers)
        try:
            yield
        finally:
            ray.shutdown()

    def _connect(self, ray: Any, workers: int | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        address = self.address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:
            number = self.cpus * (workers or max(1, usable_cores() // self.cpus))
            options |= {"address": "local", "num_cpus": number, "include_dashboard": False}
        else:
            options |= {"address": address}
        attempts = _ATTEMPTS if address is None else 1
        for attempt in range(1, attempts + 1):
            try:
                ray.init(**options)
                return
            except Exception as error:
                ray.shutdown()
                if attempt == attempts:
                    where = "be started here" if address is None else f"be reached at {address}"
                    raise InputError(
                        f"no Ray cluster can {where}: {last_line(error)}; `ray status` says what "
                        "is there"
                    ) from error

    def places(self) -> int:
        """As many runs as the cluster has room for now."""
        with self.session(None):
            there = _ray().cluster_resources()
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory or 0.0) * _GIB}
        room = [int(there.get(name, 0.0) // amount) for name, amount in wanted.items() if amount]
        if min(room) < 1:
            raise InputError(
                f"the cluster has no room for a run of {self.cpus} cores, {self.gpus:g} GPUs and "
                f"{self.memory or 0:g} GiB: ask for less, or give --workers where an autoscaler "
                "starts such machines"
            )
        return min(room)

    def hand_over(
        self, work: Work, served: Mapping[str, Callable[[], End]], workers: int
    ) -> dict[str, Any]:
        """One task a call; Ray itself retries nothing."""
        ray = _ray()
        memory = {} if self.memory is None else {"memory": int(self.memory * _GIB)}

        def make(call: Callable[[], Any]) -> Any:  # sent by its text, as what it calls is
            return call()

        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, **memory)(make)
        return {name: task.remote(call) for name, call in served.items()}

    def over(self, handles: Mapping[str, Any], seconds: float) -> list[str]:
        """Those of which Ray has the end."""
        ray = _ray()
        names = {handle: name for name, handle in handles.items()}
        ready, rest = ray.wait(list(names), num_returns=1, timeout=seconds)
        if ready and rest:
            more, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
            ready += more
        return [names[handle] for handle in ready]

    def end(self, handle: Any) -> End:
        """What the worker says, or what Ray says of the worker."""
        ray = _ray()
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:  # before the call could be made
            return End(failure=f"the worker could not begin: {last_line(error)}")
        except ray.exceptions.TaskCancelledError:
            return End(failure="it was interrupted; it goes on from its checkpoint")
        except ray.exceptions.RayError as error:
            return End(failure=f"its worker died: {type(error).__name__}", died=True)

    def stop(self, handle: Any, *, at_once: bool) -> None:
        """As Ctrl-C does, or by the end of the worker."""
        _ray().cancel(handle, force=at_once)


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError(missing("ray", "ray")) from error
