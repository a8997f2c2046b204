"""The precision of an artifact is written into its graph, never into a flag of a builder."""

from export.float16 import to_float16
from export.int8 import Form, Judge, Verdict, to_int8

__all__ = ["Form", "Judge", "Verdict", "to_float16", "to_int8"]
