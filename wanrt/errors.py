"""The exceptions users meet; each carries the exit code of the command line."""


class WanrtError(Exception):
    """A user-facing failure: one line that names the value, the limit and the remedy."""

    exit_code = 2


class UsageError(WanrtError):
    """A setting that cannot be used: size, frame count, steps, guidance, combination of flags."""

    exit_code = 2


class FormatError(WanrtError):
    """A file that is not what it should be: truncated, garbage, wrong model, broken image."""

    exit_code = 3

    def __init__(self, path: object, reason: str, fix: str = "") -> None:
        self.path, self.reason, self.fix = str(path), reason, fix
        super().__init__(f"{path}: {reason}" + (f" ({fix})" if fix else ""))


class BudgetError(WanrtError):
    """The request does not fit the memory that it was given."""

    exit_code = 4


class OutputError(WanrtError):
    """The result cannot be written: no folder, no space, already there."""

    exit_code = 5


class MarkingError(WanrtError):
    """The result cannot be marked as AI-generated: no key, a bad one, no signature, no ledger."""

    exit_code = 6


class NumericsError(WanrtError):
    """NaN or infinity where numbers must be finite."""

    exit_code = 7
