"""Run the benchmarks that need no finished run: `make bench`.

`python -m tests.benchmarks.planted RUN` and `python -m tests.benchmarks.oracle RUN` score finished runs;
`python -m tests.benchmarks.architectures RUN` trains every kind of dictionary on the activations of one.
"""

import runpy
import sys

for name in ("step", "store", "harvest", "memory", "kill"):
    print(f"\n== {name}", flush=True)
    sys.argv = [name]
    runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__")
