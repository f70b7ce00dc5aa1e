"""Before a byte is loaded: what each phase of a request will hold on the device, and what streams.

`make_plan` is a pure function of numbers. Its answer fits the budget, or BudgetError says what
would. Times are estimates; they only choose between placements.
"""

from dataclasses import dataclass, replace

from wanrt.config import VaeWork
from wanrt.errors import BudgetError
from wanrt.memory.budget import gib
from wanrt.memory.phases import Option
from wanrt.memory.placement import Ask, Guidance, Phase, Placement
from wanrt.memory.question import Lessons, Question

_STEP_DOWN = 0.85  # of what did not fit, what is tried next


@dataclass(frozen=True)
class Plan:
    """Where everything of a request will be. Peaks are bytes on the device, `fixed` included."""

    question: Question
    budget: int | None
    lessons: Lessons
    keep: bool  # every part fits beside the others and stays for the next request
    options: dict[str, Option]  # by phase: text, image, encode, step, decode

    @property
    def model(self) -> str:
        return self.question.spec.id

    @property
    def precision(self) -> str:
        return self.question.precision

    @property
    def ask(self) -> Ask:
        return self.question.ask

    @property
    def fixed(self) -> int:
        """What the process holds on the device beside all tensors."""
        return self.question.machine.fixed

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(option.phase for option in self.options.values())

    @property
    def peak(self) -> int:
        """The most at any time; parts that are kept are there in every phase."""
        if not self.keep:
            return self.fixed + max(phase.peak for phase in self.phases)
        return self.fixed + _together(self.phases)

    @property
    def host(self) -> int:
        """Host memory held at one time for the device, bytes: parts come one after the other."""
        return max(phase.host for phase in self.phases)

    @property
    def workspace(self) -> int:
        """The most that engines may work in, bytes."""
        return max(phase.workspace for phase in self.phases)

    def placement(self, phase: str) -> Placement:
        """Of the part that a phase runs: `text`, `image` or `step`."""
        placement = self.options[phase].placement
        assert placement is not None, f"{phase=}"
        return placement

    def work(self, phase: str) -> VaeWork:
        """How the VAE goes about `encode` or `decode`."""
        work = self.options[phase].work
        assert work is not None, f"{phase=}"
        return work

    @property
    def guidance(self) -> Guidance:
        return self.options["step"].guidance


def make_plan(
    question: Question, budget: int | None = None, lessons: Lessons | None = None
) -> Plan:
    """The fastest plan within `budget` bytes on the device and the question's host memory.

    budget None: everything stays on the device. Raises BudgetError with the smallest budget that
    would do and the longest video that this one allows.
    """
    lessons = Lessons() if lessons is None else lessons
    options = question.best(budget, lessons)
    if isinstance(options, str):
        assert budget is not None
        raise BudgetError(question.advice(budget, options))
    whole = question.best(None)
    assert not isinstance(whole, str), f"{whole=}"
    needed = question.machine.fixed + _together(tuple(option.phase for option in whole.values()))
    keep = question.spec.boundary is None and (budget is None or needed <= budget)
    keep = keep and not lessons.apart
    return Plan(question, budget, lessons, keep, whole if keep else options)


def plan_for_any_text(
    question: Question, budget: int | None = None, lessons: Lessons | None = None
) -> Plan:
    """The plan for the longest text that fits, so that what a prompt says moves no block.

    That is a text of the model's own length; where such a one does not fit, `ask.text_rows` says
    how long one may be. Raises BudgetError, with what the model's own length needs.
    """

    def of(rows: int) -> Question:
        return replace(question, ask=replace(question.ask, text_rows=rows))

    def fits(rows: int) -> bool:
        return not isinstance(of(rows).best(budget), str)

    rows = question.spec.dit.text_len
    if not fits(rows) and fits(1):
        low, high = 1, rows
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        rows = low
    return make_plan(of(rows), budget, lessons)


def step_down(plan: Plan, phase: str) -> Plan:
    """The next plan to try: without the parts that are kept, then with less for this one phase.

    What the refusal taught is in its lessons. Raises BudgetError where the phase already holds the
    least it can.
    """
    if plan.keep:
        return relearned(plan, Lessons(apart=True))
    now = plan.options[phase].phase.peak
    less = [o.phase.peak for o in plan.question.phases[phase] if o.phase.peak < now]
    if not less:
        raise BudgetError(
            f"memory ran out ({phase}), which holds {gib(plan.fixed + now)} and cannot do with "
            "less; close other programs, or ask for fewer --frames or a smaller --size"
        )
    most = max(int(_STEP_DOWN * now), min(less))
    return relearned(plan, Lessons(apart=True, most={phase: most}))


def relearned(plan: Plan, lessons: Lessons) -> Plan:
    """The plan for the same question with further lessons; itself if it knows them."""
    lessons = plan.lessons.merged(lessons)
    if lessons == plan.lessons:
        return plan
    return make_plan(plan.question, plan.budget, lessons)


def _together(phases: tuple[Phase, ...]) -> int:
    """Peak where no part goes before the next one comes. The VAE is one part of two phases.

    The workspace of engines is one for all and stays, too.
    """
    parts = {"vae" if p.name in ("encode", "decode") else p.name: p.weights for p in phases}
    kept = sum(parts.values()) + max(phase.workspace for phase in phases)
    return kept + max(phase.peak - phase.weights - phase.workspace for phase in phases)
