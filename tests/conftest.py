"""What every test runs under: strict JAX, eight CPU devices, run-time types, warnings as errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read once, when the CPU client starts: this has to come before the first use of jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import jaxtyping

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Has to come before the first import of compand_jax, by a test or by the doctest collector.
jaxtyping.install_import_hook("compand_jax", "beartype.beartype")

# Each line: the filter, and why what it lets through is no defect of this project.
WARNINGS = ("error",)


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_make_parametrize_id(val, argname):
    if argname == "case":
        bits, signed, grid = val
        return f"{bits}bit-{'signed' if signed else 'unsigned'}-{grid}"
    return None
