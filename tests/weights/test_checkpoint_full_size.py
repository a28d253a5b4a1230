"""A full-size gpt2-medium in the official layout: content and peak memory."""

import subprocess
import sys
from pathlib import Path

from tests.weights.official_file import write_official

ROOT = Path(__file__).parents[2]
MEASURE = """
import pathlib, sys
import numpy as np
from model import GPT2
from tests.weights.official_file import read_tensorwise
from weights import load_weights

def peak():
    # Not getrusage's ru_maxrss, which a process inherits from the one that starts it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

before = peak()
model = GPT2.from_state_dict(load_weights(sys.argv[1]), assign=True)
extra = peak() - before - sum(p.nbytes for p in model.parameters())
parameters = dict(model.named_parameters())
stored = 0
for name, values in read_tensorwise(sys.argv[1]):
    stored += 1
    if not name.endswith(".attn.bias"):
        assert np.array_equal(parameters.pop(name).detach(), values), name
assert stored == 316 and not parameters
print(extra)
"""


def test_the_full_medium_file_becomes_a_model_without_a_second_copy(tmp_path):
    """316 tensors in, 292 equal parameters out. The peak memory of a separate process exceeds the
    model by at most its largest tensor, the embedding."""
    path = tmp_path / "medium.safetensors"
    try:
        write_official(path)
        command = [sys.executable, "-c", MEASURE, path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 50257 * 1024 * 4
