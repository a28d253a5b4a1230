"""The Triton kernels run without a GPU: compiled, unless the interpreter is asked for."""

from tests.kernels.kl_cases import COMPILED_ON_CPU

if COMPILED_ON_CPU:
    from tests.kernels.ptx import driver

    driver.install()
