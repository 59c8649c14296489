"""Points of sweeps and searches told to an experiment tracker, a run each."""

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.choice import Point
from crane_tasks.session import Session

Values = Mapping[str, Any]


def _wandb_like(module: Any, project: str, name: str, config: Values, metrics: Values) -> None:
    """Weights & Biases, and trackio, which has its interface."""
    module.init(project=project, name=name, config=dict(config))
    module.log(dict(metrics))
    module.finish()


def _mlflow(module: Any, project: str, name: str, config: Values, metrics: Values) -> None:
    module.set_experiment(project)
    with module.start_run(run_name=name):
        module.log_params(dict(config))
        module.log_metrics(dict(metrics))


WAYS = {"trackio": _wandb_like, "wandb": _wandb_like, "mlflow": _mlflow}


def tracker_of(session: Session) -> Callable[[Point], None]:
    """Tells a point that was measured to the recipe's tracker; where it lies is the tracker's own
    setting (`TRACKIO_DIR`, `WANDB_MODE`, `MLFLOW_TRACKING_URI`).

    A tracker that fails is told of once and costs no point.

    Raises:
        RecipeError: the tracker is not installed.
    """
    recipe = session.recipe
    name = recipe.run.tracker
    if name is None:
        return lambda point: None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"run.tracker: {name} is not installed: pip install 'crane-merge[{name}]'"
        ) from error
    failed = False

    def tell(point: Point) -> None:
        nonlocal failed
        if point.error is not None or point.status == "reused" or failed:
            return
        config = {"alpha": point.alpha, "tau": point.tau, **point.changes, "key": point.key}
        try:
            with redirect_stdout(sys.stderr):  # ours is for the result
                WAYS[name](module, f"crane-{recipe.name}", point.name, config, point.metrics)
        except Exception as error:  # a service's fault, of whatever kind: the points matter more
            failed = True
            session.notice(f"{name} takes no more points of this run: {error}")

    return tell
