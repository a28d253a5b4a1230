"""Runs compiled Triton kernels without a GPU: their PTX on the CPU, every access checked.

parse.py        PTX text -> instructions
arithmetic.py   what each arithmetic instruction computes, on NumPy arrays
memory.py       loads and stores, with the faults that a GPU would not report; counts of them
machine.py      registers, branches and shuffles of all threads in lockstep
driver.py       stands in for the CUDA driver, so that Triton launches as it would on a GPU
"""
