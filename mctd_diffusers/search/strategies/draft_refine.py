"""Draft and refine: many cheap drafts, then the best of them again at full quality.

After Flash-BoN (2026, arXiv 2607.04461), which drafts by caches and skipped layers and resumes the
winners from the state in which their cached computation began:

1. draft: new initial noises, each brought to the end by a few long strides and scored; every state
   is stored;
2. select: the drafts of the highest reward;
3. refine: resume those from a stored state (by default a quarter down the schedule), with short
   strides, in one batch; score them.

A share of the budget is reserved for step 3, and drafts take all the rest. Flash-BoN ranks drafts
by a tournament of a vision-language judge, because its pointwise scores tie; here the reward ranks.
It stores eight states; here the tree keeps all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import back_up, draw, finish
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import best_first
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import ancestor_at

_DRAFTS_OF_A_ROUND: Final = 16  # where no budget bounds their number


@dataclass(frozen=True)
class DraftRefine:
    """Best of many coarse samples, of which the best are sampled again more finely.

    Attributes:
        draft_stride: schedule steps that an edge of a draft crosses; ``None``: the longest up to a
            quarter of the schedule, so that a draft takes about four edges.
        refine: drafts to refine, as far as ``refine_share`` pays; 0 is best of n with few steps.
        refine_share: share of the budget reserved for refining, 0 to 1.
        refine_stride: schedule steps that an edge of a refined sample crosses. Where it takes no
            more edges than the draft did, nothing is refined.
        resume_at: share of the schedule whose states refined samples keep of their draft, 0 to 1;
            they resume from the draft's last state up to there, at 0 from the initial noise.
        wave_size: drafts that are denoised side by side.
    """

    draft_stride: int | None = None
    refine: int = 4
    refine_share: float = 0.5
    refine_stride: int = 1
    resume_at: float = 0.25
    wave_size: int = 8

    def __post_init__(self) -> None:
        if self.draft_stride is not None:
            check_setting("draft_stride", self.draft_stride, 1, whole=True)
        check_setting("refine", self.refine, 0, whole=True)
        for name in ("refine_stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)
        for name in ("refine_share", "resume_at"):
            check_setting(name, getattr(self, name), 0, 1)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "draft_refine"

    def least_evaluations(self, num_steps: int) -> int:
        """One draft."""
        return len(self._course(num_steps).draft)

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        course = self._course(num_steps)
        return max((*course.draft, *course.refined))

    def search(self, problem: Problem) -> Asks:
        """Draft, select, refine; again only where no budget ends it."""
        tree = problem.tree
        course = self._course(problem.num_steps)
        while True:
            num_drafts, num_refined = self._shares(problem, course)
            if num_drafts == 0:
                return "budget"
            drafts: list[int] = []
            while len(drafts) < num_drafts:
                count = min(self.wave_size, num_drafts - len(drafts))
                noises = yield from draw(problem, count)
                drafts += yield from finish(problem, noises, strides=course.draft)
            back_up(problem, drafts)
            best = best_first(tree.reward[drafts])[:num_refined]
            states = [ancestor_at(tree, drafts[i], course.resume) for i in best]
            if states:
                refined = yield from finish(problem, states, strides=course.refined)
                back_up(problem, refined)

    def _course(self, num_steps: int) -> _Course:
        """The edges of drafts and refined samples on a schedule."""
        stride = max(num_steps // 4, 1) if self.draft_stride is None else self.draft_stride
        draft = constant_strides(num_steps, stride)
        edges_kept = min(int(self.resume_at * num_steps) // stride, len(draft) - 1)
        resume = edges_kept * stride
        refined = constant_strides(num_steps - resume, self.refine_stride)
        finer = len(refined) > len(draft) - edges_kept
        return _Course(draft, resume, refined if finer else ())

    def _shares(self, problem: Problem, course: _Course) -> tuple[int, int]:
        """Drafts and refined samples of a round, with which what is left is used up."""
        account = problem.account
        draft = account.price(evaluations=len(course.draft), rewards=1)
        # The state that a refined sample resumes from is evaluated.
        refinement = max(len(course.refined) - 1, 0)
        refined = account.price(evaluations=refinement, rewards=1)

        def is_paid(count: int) -> bool:
            whole = Fraction(count) / Fraction(self.refine_share)  # whose share is the reserve
            reserve = account.price(
                evaluations=math.ceil(whole * refinement), rewards=math.ceil(whole)
            )
            return account.affords(reserve) and account.affords((draft + refined) * count)

        num_refined = self.refine if course.refined and self.refine_share else 0
        while num_refined and not is_paid(num_refined):
            num_refined -= 1
        num_drafts = account.affordable(draft, UNLIMITED, besides=refined * num_refined)
        return (_DRAFTS_OF_A_ROUND if num_drafts == UNLIMITED else num_drafts), num_refined


class _Course(NamedTuple):
    """The edges of drafts and refined samples.

    Attributes:
        draft: strides of a draft.
        resume: step index of the state from which a refined sample resumes.
        refined: strides of a refined sample from there; empty if that is no finer than the draft.
    """

    draft: tuple[int, ...]
    resume: int
    refined: tuple[int, ...]
