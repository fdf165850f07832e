"""The public names, for type checkers; ``__init__.py`` loads them on first use."""

from samegrad.data.readers import check_rows as check_rows
from samegrad.data.readers import open_rows as open_rows
from samegrad.data.rows import Rows as Rows
from samegrad.declared import DeclaredStep as DeclaredStep
from samegrad.errors import BadInput as BadInput
from samegrad.errors import BudgetTooSmall as BudgetTooSmall
from samegrad.errors import CannotSplit as CannotSplit
from samegrad.errors import EnvironmentProblem as EnvironmentProblem
from samegrad.errors import FalseNormalise as FalseNormalise
from samegrad.errors import GradientsDiffer as GradientsDiffer
from samegrad.errors import NonFinite as NonFinite
from samegrad.errors import OverBudget as OverBudget
from samegrad.errors import SamegradError as SamegradError
from samegrad.errors import UsageError as UsageError
from samegrad.exact.over import over as over
from samegrad.exact.rowwise import rowwise as rowwise
from samegrad.execute.best_weights import BestWeights as BestWeights
from samegrad.execute.run import train as train
from samegrad.measure.counters import find_device as find_device
from samegrad.measure.counting import count_bytes as count_bytes
from samegrad.plan.choose import choose_plan as choose_plan
from samegrad.records import Budget as Budget
from samegrad.records import Category as Category
from samegrad.records import Exactness as Exactness
from samegrad.records import Footprint as Footprint
from samegrad.records import KnobOrigin as KnobOrigin
from samegrad.records import Plan as Plan
from samegrad.records import StepResult as StepResult
from samegrad.records import Verdict as Verdict
from samegrad.report import Picture as Picture
from samegrad.report import Story as Story
from samegrad.report import render_markdown as render_markdown
from samegrad.report import render_report as render_report
from samegrad.settle import measure_step as measure_step
from samegrad.settle import settle_plan as settle_plan
from samegrad.step import Step as Step
from samegrad.units import format_bytes as format_bytes
from samegrad.verify.gradients import verify_step as verify_step

__version__: str
__all__: list[str]
