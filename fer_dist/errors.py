"""The one error that is shown to people without a traceback."""


class UserError(Exception):
    """Something the user can put right: what was found, and what to type next.

    Args:
        problem: what was found and what was expected, naming file, row or field.
        fix: what to do about it, ideally a line to type.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  -> {self.fix}" if self.fix else self.problem


EXIT_USER_ERROR = 2
"""Exit code of every command after a UserError."""
