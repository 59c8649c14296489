"""The memory of a search: Optuna's study in the store's folder, which outlives a killed run.

STORE/tune/NAME-DIGEST.journal   every trial, appended to; a line counts once it is whole
STORE/tune/NAME-DIGEST.lock      held (flock) by the process that searches
"""

import fcntl
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from crane_tasks.errors import OutputError

FOLDER = "tune"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Trials at random before the sampler trusts what it has seen; Optuna's own 10 would be half of a
# small budget. The pruner cuts the worst quarter, once it has seen as many.
STARTUP = 6
KEPT_PERCENTILE = 75.0
SEEDS = 2**32
STRIDE = 100_003  # a prime: neighbouring seeds of a search share no trial's seed


class Study:
    """Trials asked for and told, the finished ones in their order.

    Each trial's choice depends on the seed and on the finished trials alone, so that a search
    that was stopped goes on as if it had not been.
    """

    def __init__(self, journal: Path, seed: int) -> None:
        self._seed = seed
        backend = JournalFileBackend(str(journal))
        self._study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name=FOLDER,
            load_if_exists=True,
            pruner=optuna.pruners.PercentilePruner(KEPT_PERCENTILE, n_startup_trials=STARTUP),
        )
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)  # its process was stopped

    @property
    def finished(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=FINISHED)

    @property
    def notes(self) -> dict[str, Any]:
        """What is kept beside the trials."""
        return dict(self._study.user_attrs)

    def note(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)

    def ask(self, starts: Sequence[dict[str, Any]]) -> Trial:
        """The next trial; the first ones make the choices of `starts`, in their order."""
        done = len(self.finished)
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if done < len(starts) and not waiting:
            self._study.enqueue_trial(starts[done])
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(self._seed * STRIDE + done) % SEEDS,
            n_startup_trials=STARTUP,
            # An alpha belongs to its method, a tau to its projection: together, or not at all.
            multivariate=True,
            group=True,
            constraints_func=_gaps,
        )
        return self._study.ask()

    def tell(self, trial: Trial, value: float | None, gaps: list[float], record: Any) -> None:
        """A trial came to its value, or was cut short (None).

        Args:
            gaps: what is missing of each requirement, 0 where it is met.
            record: kept with the trial, as JSON values.
        """
        trial.set_user_attr("gaps", gaps)
        trial.set_user_attr("record", record)
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        self._study.tell(trial, value, state=state)


def _gaps(trial: FrozenTrial) -> list[float]:
    gaps: list[float] = trial.user_attrs["gaps"]
    return gaps


@contextmanager
def open_study(store: Path, name: str, seed: int) -> Iterator[Study]:
    """The study of a name, for one process at a time.

    Raises:
        OutputError: another process is at it.
    """
    journal = store / FOLDER / f"{name}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.with_suffix(".lock").open("w") as lock, _quiet():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{journal}: another process searches here") from None
        _mend(journal)
        yield Study(journal, seed)


def _mend(journal: Path) -> None:
    """Take away what a killed process left: half a line, and Optuna's own lock."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        data = journal.read_bytes()
        with journal.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every trial, and that constraints may change in a later version."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
