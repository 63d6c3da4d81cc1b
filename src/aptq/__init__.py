"""aptq compresses language models to a budget.

Names are loaded on first use: `import aptq` takes milliseconds and imports neither torch nor
transformers.  It also makes transformers able to load the packed checkpoints (see hook.py).
"""

import importlib
from typing import TYPE_CHECKING, Any

from aptq import hook

if TYPE_CHECKING:
    from aptq.adapting import adapt as adapt
    from aptq.assessing import assess as assess
    from aptq.core.budget import Budget as Budget
    from aptq.core.grid import Grid as Grid
    from aptq.core.plan import Plan as Plan
    from aptq.core.scores import Scores as Scores
    from aptq.engine.data import Data as Data
    from aptq.engine.stage import Stage as Stage
    from aptq.exporting import export_to as export_to
    from aptq.model.model import Model as Model
    from aptq.pipeline import compress as compress
    from aptq.pipeline import measure as measure
    from aptq.pipeline import plan as plan
    from aptq.recipe import Recipe as Recipe
    from aptq.runtime.load import load as load

__version__ = "0.1.0"

_HOME = {  # public name -> the module that holds it
    "Budget": "aptq.core.budget",
    "Data": "aptq.engine.data",
    "Grid": "aptq.core.grid",
    "Model": "aptq.model.model",
    "Plan": "aptq.core.plan",
    "Recipe": "aptq.recipe",
    "Scores": "aptq.core.scores",
    "Stage": "aptq.engine.stage",
    "adapt": "aptq.adapting",
    "assess": "aptq.assessing",
    "compress": "aptq.pipeline",
    "export_to": "aptq.exporting",
    "load": "aptq.runtime.load",
    "measure": "aptq.pipeline",
    "plan": "aptq.pipeline",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'aptq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


hook.install()
