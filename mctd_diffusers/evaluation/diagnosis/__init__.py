"""Where does a search fall short? The model's ceiling, the reward's error, the search's regret.

What a search lacks of the greatest possible gold is split by a *pool* of plain samples of the same
problem, none of them selected. With the greatest possible gold ``top``, the pool's best by gold
``best``, the pool's best by the searched reward ``pick``, and the search's ``winner``::

    top - gold(winner) = [top - gold(best)]             the model's ceiling, at least 0
                       + [gold(best) - gold(pick)]      the reward's error, at least 0
                       + [gold(pick) - gold(winner)]    the search's regret, of either sign

The identity holds by definition, for every problem and so for means over problems. The first two
terms are about the model and the reward alone; only the third knows the search, and where it is
negative the search did better than picking from the whole pool.

*Where* the path went wrong is asked level by level. Whenever the search chose the winner's ancestor
among siblings, continuations of the rejected siblings and as many of the chosen one are drawn with
fresh noise, and compared (:func:`sibling_regret`). Levels do not add up to the search's regret: a
good sibling that was passed over early may be made up for later.

Nothing of this is in the search's own ledger: samples are made again by their moves and seeds in an
environment of their own.
"""

from mctd_diffusers.evaluation.diagnosis.calls import diagnose, diagnose_saved
from mctd_diffusers.evaluation.diagnosis.terms import Diagnosis, Effort, Level, Regret, Scores

__all__ = ["Diagnosis", "Effort", "Level", "Regret", "Scores", "diagnose", "diagnose_saved"]
