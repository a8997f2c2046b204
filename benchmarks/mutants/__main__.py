"""Break the code in one place at a time and require that a test fails: `python -m benchmarks.mutants [FILES]`.

Each entry of `benchmarks/mutants/*.yaml` is one mutant:

    - file: fer_dist/world.py          # a tracked file
      find: the text to replace        # must occur exactly once
      replace: the text that breaks it
      tests: tests/test_world.py -k joined        # arguments for pytest; these tests must pass without the mutant
      before: tests/test_world.py -k old_name     # optional: the tests of an older revision, for `--key before`

The exit code is 1 if a mutant survives (the tests pass), 2 if an entry is invalid.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(Path(__file__).parent.glob("*.yaml")))
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at the same time")
    parser.add_argument("--revision", default="HEAD", help="commit whose files are tested; default: HEAD")
    parser.add_argument("--key", default="tests", choices=("tests", "before"), help="which tests to run")
    arguments = parser.parse_args()
    entries = [(file.stem, entry) for file in arguments.files for entry in yaml.safe_load(file.read_text())]
    entries = [(name, entry) for name, entry in entries if arguments.key in entry]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda pair: report(pair[0], pair[1], arguments.revision, arguments.key), entries))
    counts = {result: results.count(result) for result in ("killed", "survived", "invalid")}
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 2 if counts["invalid"] else int(counts["survived"] > 0)


def report(name: str, entry: dict[str, Any], revision: str, key: str) -> str:
    """Test one mutant and print one line about it."""
    result, detail = outcome(entry, revision, key)
    first = str(entry["replace"]).strip().splitlines()[0] if str(entry["replace"]).strip() else "(deleted)"
    print(f"{result:9} {name}: {entry['file']}: {first}{detail}", flush=True)
    return result


def outcome(entry: dict[str, Any], revision: str, key: str) -> tuple[str, str]:
    """Return `killed`, `survived` or `invalid`, and the reason for the last."""
    folder = Path(tempfile.mkdtemp(prefix="mutant"))
    try:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
        path = folder / entry["file"]
        text = path.read_text(encoding="utf-8")
        if text.count(entry["find"]) != 1:
            return "invalid", f": `find` occurs {text.count(entry['find'])} times"
        path.write_text(text.replace(entry["find"], entry["replace"]), encoding="utf-8")
        code = run_pytest(shlex.split(entry[key]), folder)
        if code == 124:  # a mutant that hangs is noticed, too
            return "killed", f" (no end within {LIMIT_S} s)"
        if code in (0, 1):
            return ("survived" if code == 0 else "killed"), ""
        return "invalid", f": pytest ended with exit code {code}"
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=False)  # ranks that wait for each other
        shutil.rmtree(folder, ignore_errors=True)


def run_pytest(arguments: list[str], folder: Path) -> int:
    """Run pytest in a copy of the repository; exit code 124 after LIMIT_S."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not soak"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TEST_TIME_FACTOR": "5"}
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return 124
        log.seek(0)
        text = log.read().decode(errors="replace")
        if code == 0 and " passed" not in text:  # all were skipped
            code = 5
        if code not in (0, 1) or (code == 1 and " failed" not in text and " error" not in text):
            sys.stderr.write(text[-2000:])
            return max(code, 2)  # a Python without pytest ends with 1, too
        return code


if __name__ == "__main__":
    sys.exit(main())
