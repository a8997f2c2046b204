"""The precision of an artifact is written into its graph, never into a flag of a builder."""

from export.float16 import to_float16
from export.int8 import Form, Judge, Verdict, to_int8
from export.rewrite import CannotRewriteError

__all__ = ["CannotRewriteError", "Form", "Judge", "Verdict", "to_float16", "to_int8"]
