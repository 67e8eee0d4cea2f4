# SPDX-License-Identifier: Apache-2.0
"""All that needs the serving engines themselves: ``python tests/integration [--work DIR]``.

Runs ``loaders.py`` (vLLM's and SGLang's own loader classes) and ``serving.py`` (the real vLLM engine on CPUs), which
download what they need, about 2 GB, into ``--work``. Ends with status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    default = HERE.parents[1] / "build" / "integration"
    parser.add_argument("--work", type=Path, default=default, help="kept from run to run")
    work = parser.parse_args().work.resolve()
    failed = False
    for name in ("loaders", "serving"):
        command = [sys.executable, str(HERE / f"{name}.py"), "--work", str(work / name)]
        status = subprocess.run(command).returncode
        print(f"{name}: {'passed' if status == 0 else f'failed ({status})'}", flush=True)
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
