"""A randomly damaged file is refused or loads as if it were undamaged.

There is nothing in between: the content is float32, no other four-byte dtype is accepted, and
offsets may leave no gap, so a changed header is either invalid or means the same.
"""

import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.weights.official_file import assert_equal, parameters_of, write_official
from weights import WeightsError, load_weights

TINY = {"n_layer": 1, "n_embd": 64, "vocab_size": 7, "n_positions": 3}
KINDS = ["flip", "cut", "grow", "length", "entry", "share", "rename", "drop"]
ANY_DTYPE = st.sampled_from(["F16", "BF16", "F64", "I32", "F8_E4M3", "F4", "BOOL", "f32"])
ANY_SIZE = st.integers(-1, 2**40) | st.sampled_from([0, 1, 3, 7, 64, 192, 256])
ANY_OFFSET = st.integers(-2, 2**64) | st.integers(0, 60_000).map(lambda n: 4 * n)
CHANGES = {
    "dtype": ANY_DTYPE | st.text(),
    "shape": st.lists(ANY_SIZE, max_size=4),
    "data_offsets": st.lists(ANY_OFFSET, min_size=1, max_size=3),
}


def with_header(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@st.composite
def mutations(draw, raw):
    """The bytes of a file, after one mutation of `raw`."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    names = sorted(header.keys() - {"__metadata__"})
    kind = draw(st.sampled_from(KINDS))
    if kind == "flip":
        changed = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, start - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if kind == "grow":
        return raw + draw(st.binary(min_size=1, max_size=9))
    if kind == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    if kind == "entry":
        for field in draw(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1)):
            header[one][field] = draw(CHANGES[field])
    elif kind == "share":  # two tensors on the same bytes
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == "rename":
        header[draw(st.text(max_size=12))] = header.pop(one)
    else:
        del header[one]
    return with_header(header, raw[start:])


@pytest.fixture(scope="module", params=["official", "transformers"])
def mutated_file(request, tmp_path_factory):
    """A complete file in either style, and its parameters."""
    path = tmp_path_factory.mktemp("mutated") / "model.safetensors"
    write_official(path, **TINY)
    parameters = parameters_of(path)
    if request.param == "transformers":
        head = {"lm_head.weight": parameters["wte.weight"].copy()}
        save_file({f"transformer.{k}": v for k, v in parameters.items()} | head, path)
    return path, path.read_bytes(), parameters


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_file_loads_correctly_or_raises_weights_error(mutated_file, data):
    """2 x 250 cases; correct means equal to the file before the mutation."""
    path, raw, parameters = mutated_file
    path.write_bytes(data.draw(mutations(raw)))
    try:
        state_dict = load_weights(path)
    except WeightsError as error:
        event("refused")
        assert str(path) in str(error)  # noqa: PT017, either outcome is fine, a message without the path is not
    else:
        event("loaded")
        assert_equal(state_dict, parameters)
