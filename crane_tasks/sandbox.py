"""Code that a model wrote, run where it can do no harm: bubblewrap, with limits.

It sees the system's programs read-only, an empty folder of its own, no network and no other
process, and has bounds on time, memory and the size of files.
"""

import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from crane_tasks.errors import RecipeError

SECONDS = 10
MEMORY = 2**30  # bytes
FILE = 16 * 2**20
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/alternatives")
LIMITED = f"""
import resource, sys
for what, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
code, tests, token = sys.stdin.read().split("\\0")
names = {{"__name__": "__main__"}}
exec(compile(code, "answer", "exec"), names)
exec(compile(tests, "tests", "exec"), names)
sys.stdout.write(token)
"""


def require_sandbox() -> None:
    """Refuse to run code where nothing keeps it in.

    Raises:
        RecipeError: bubblewrap is absent, or may not make its namespaces here.
    """
    passed, said = run_tests("", "")
    if not passed:
        raise RecipeError(
            "evaluate.run_code: code that a model wrote is run in bubblewrap (`bwrap`) alone, "
            f"which does not work here: {said}"
        )


def run_tests(code: str, tests: str) -> tuple[bool, str]:
    """Whether the code, and then its tests, run to their end; the last line of what was said."""
    # What exits early has not come to the end of its tests: that alone says the token.
    token = secrets.token_hex(8)
    wrapper = shutil.which("bwrap")
    if wrapper is None:
        return False, "it is not installed"
    python = Path(sys.executable).resolve()
    seen = dict.fromkeys((*SYSTEM, str(Path(sys.base_prefix).resolve())))
    binds = [part for path in seen if Path(path).exists() for part in ("--ro-bind", path, path)]
    inside = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    places = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command = [wrapper, *inside, *binds, *places, str(python), "-I", "-c", LIMITED]
    program = "\0".join([code.replace("\0", ""), tests, token])
    try:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command,
                input=program.encode("utf-8", "replace"),
                stdout=out,
                stderr=said,
                timeout=2 * SECONDS,
                check=False,
            )
            out.seek(max(0, out.tell() - len(token)))
            ended = out.read() == token.encode()
            said.seek(0)
            lines = said.read(2**16).decode(errors="replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        return False, f"took longer than {2 * SECONDS} s"
    except OSError as error:
        return False, str(error)
    if done.returncode == 0 and ended:
        return True, ""
    return False, lines[-1] if lines else f"ended early, with {done.returncode}"
