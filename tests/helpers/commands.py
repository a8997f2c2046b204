"""Run a command of fer_dist in this process and require that it refuses its arguments."""

from collections.abc import Callable

import pytest

from fer_dist.errors import EXIT_USER_ERROR
from tests.helpers.exporting import command


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[], None], *words: object) -> str:
    """Require exit code 2, one error with its fix and no traceback; return what stands on stderr."""
    capsys.readouterr()
    assert command(main, *words) == EXIT_USER_ERROR, words
    err = capsys.readouterr().err
    assert err.count("error: ") == 1, err
    assert "\n  -> " in err, err
    assert "Traceback" not in err
    return err
