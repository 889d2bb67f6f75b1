"""Measures everything, or the parts that are named, and prints one JSON; each part by itself has more options.

    python -m benchmarks [PART ...]

month          from CSV to a promoted model that answers over HTTP (benchmarks.month), 2 minutes
serving        the service against an empty route, 5 repeats (benchmarks.serving), 4 minutes
serving-redis  the same with the online features in Redis; needs redis-server
serving-1e6    the same with 1,000,000 more customers in PostgreSQL, 6 minutes
soak           ten minutes of mixed load
online-store   how fast a month goes online (benchmarks.online_store), 4 minutes
model          how well the procedure predicts, what its steps cost (benchmarks.model), 5 minutes; needs the real months
"""

import argparse
import json
import subprocess
import sys

PARTS = {
    "month": ["month"],
    "serving": ["serving"],
    "serving-redis": ["serving", "--redis"],
    "serving-1e6": ["serving", "--users", "1000000"],
    "soak": ["serving", "--soak", "600"],
    "online-store": ["online_store"],
    "model": ["model"],
}


def main() -> None:
    """Run each part in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; name some of {', '.join(PARTS)}")
    reports = {}
    for part in parts:
        print(f"measuring {part}", file=sys.stderr)
        module, *options = PARTS[part]
        command = [sys.executable, "-m", f"benchmarks.{module}", *options]
        reports[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(reports, indent=2))


if __name__ == "__main__":
    main()
