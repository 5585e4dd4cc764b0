"""What every test runs under: strict JAX, eight CPU devices, run-time types, warnings as errors."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read once, when the CPU client starts: this has to come before the first use of jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Half of the time of the tests is compilation, mostly of programs that another test has as well:
# the processes of one run compile each of them once. What it was is gone with the run, unless a
# folder is given, as CI gives it: Pythons with one jaxlib have their programs in common.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compand_jax-compiled-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# Of what the tests start as processes of their own; pytest's filters are for its own process.
os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning"

import jax
import jaxtyping

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Has to come before the first import of compand_jax, by a test or by the doctest collector.
jaxtyping.install_import_hook("compand_jax", "beartype.beartype")

# Each line: the filter, and why what it lets through is no defect of this project.
WARNINGS = (
    "error",
    # Another process is writing the program at this moment: it is compiled here as well.
    "ignore:Error reading persistent compilation cache entry",
)


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_make_parametrize_id(val, argname):
    if argname == "case":
        bits, signed, grid = val
        return f"{bits}bit-{'signed' if signed else 'unsigned'}-{grid}"
    return None
