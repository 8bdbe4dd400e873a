"""Model programs to use as they are or to copy."""

from .countdown import countdown, expression_of
from .direct_answer import direct_answer
from .plan_then_solve import plan_then_solve
from .self_check import self_check
from .step_by_step import step_by_step

__all__ = ["countdown", "direct_answer", "expression_of", "plan_then_solve", "self_check", "step_by_step"]
