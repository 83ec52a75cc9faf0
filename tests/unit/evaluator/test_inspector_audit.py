"""What engine inspectors print is read, in the forms in which versions print it; and borne, in any other."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluator.graph import Layer, load_graph
from services.evaluator.inspector_audit import audit_inspector
from tests.support.onnx_graphs import quantized, saved

UNKNOWN = "N/A due to dynamic shapes"
INT8 = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tilesize64x96x64"


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, ...]:
    return load_graph(saved(tmp_path_factory.mktemp("graph"), "m", quantized()), "f").layers


def entry(name: str, datatype: str = UNKNOWN, **more: Any) -> dict[str, Any]:
    made = {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [-1, 16, 8, 8], "Format/Datatype": datatype}],
        "ParameterType": "Convolution",
        "TacticName": "",
        "Metadata": "",
    }
    return made | more


def nodes(*names: str, separator: str = "\x1e") -> str:
    return separator.join(f"[ONNX Layer: {name}]" for name in names)


def verdicts(layers: tuple[Layer, ...], *entries: Any) -> tuple[int, dict[str, str]] | None:
    audit = audit_inspector(json.dumps({"Layers": entries, "Bindings": ["images", "logits"]}), layers)
    return None if audit is None else (audit.int8, {found.layer.name: found.reason for found in audit.floats})


def test_weights_tell_also_where_shapes_are_free(layers: tuple[Layer, ...]) -> None:
    found = verdicts(
        layers,
        entry("conv1_codes + conv1_weight + conv1_sums + PWN(conv1)", Weights={"Type": "Int8", "Count": 432}),
        entry("conv2_sums", Weights={"Type": "Float", "Count": 2304}, TacticName="sm80_xmma_fprop_f32f32"),
        entry("myelin", LayerType="gemm", Metadata=nodes("flat", "logits_sums"), TacticName=INT8.replace("fprop", "g")),
    )
    assert found == (2, {"conv2_sums": "the builder chose CaskConvolution with Float weights sm80_xmma_fprop_f32f32"})


@pytest.mark.parametrize(
    ("kernel", "int8"),
    [
        ({"datatype": "Thirty-two wide channel vectorized row major Int8 format"}, True),
        ({"datatype": "Int8(32,1:32,...)"}, True),
        ({"datatype": "Row major linear FP32"}, False),
        ({"datatype": "Channel major FP16 format where channel % 8 == 0"}, False),
        ({"datatype": "Half"}, False),
        ({"TacticName": INT8}, True),
        ({"TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n"}, True),
        ({"Weights": {"Type": "Half", "Count": 1}, "datatype": "Int8"}, False),
        ({"Weights": {"Type": "Int8", "Count": 1}, "datatype": UNKNOWN}, True),
    ],
)
def test_evidence(layers: tuple[Layer, ...], kernel: dict[str, Any], int8: bool) -> None:
    for separator in ("\x1e", "\x1f", " "):
        found = verdicts(layers, entry("k", Metadata=nodes("other", "conv1_sums", separator=separator), **kernel))
        assert found is not None
        assert (found[0], "conv1_sums" in found[1]) == (int(int8), not int8)


def test_what_moves_values_and_what_follows_is_not_the_layer(layers: tuple[Layer, ...]) -> None:
    reformat = "Reformatting CopyNode for Input Tensor 0 to conv1_codes + conv1_sums"
    found = verdicts(
        layers,
        entry(reformat, "Row major linear FP32", LayerType="Reformat"),
        entry("conv1_sums copy", "Row major linear FP32", LayerType="Reformat", Metadata=nodes("conv1_sums")),
        entry("conv1_sums", "Int8", Metadata=nodes("conv1_sums")),
        entry("epilogue", "Row major linear FP32", LayerType="kgen", Metadata=nodes("conv1_sums", "conv1")),
        entry("node_of_conv2_sums", Weights={"Type": "Int8", "Count": 1}),
        # Names are compared as wholes.
        entry("conv1_sums_2 || logits_sums_2", "Row major linear FP32"),
    )
    assert found == (2, {})


def test_reasons_of_the_graph_come_first(tmp_path: Path) -> None:
    graph = load_graph(saved(tmp_path, "m", quantized(channel_scales=True, float_weights=("conv2",))), "f")
    found = verdicts(graph.layers, *(entry(layer.name, "Row major linear FP32") for layer in graph.layers))
    assert found is not None
    assert found[1] == {
        "conv1_sums": "its input has one scale per channel",
        "conv2_sums": "its weight is stored in floating point",
        "logits_sums": "the builder chose CaskConvolution",
    }


@pytest.mark.parametrize(
    "information",
    [
        "",
        "not JSON",
        "[]",
        "null",
        '{"Layers": 3}',
        '{"Layers": ["conv1_sums", "conv2_sums"]}',  # layer names only
        json.dumps({"Layers": [entry("conv1_sums"), entry("conv2_sums"), entry("logits_sums")]}),
        json.dumps({"Layers": [entry("conv1_sums", Weights=[]), entry("conv2_sums", Inputs={})]}),
        json.dumps({"Layers": [entry("unrelated", "Int8")]}),
    ],
)
def test_what_shows_no_formats_is_no_audit(layers: tuple[Layer, ...], information: str) -> None:
    assert audit_inspector(information, layers) is None


def test_separators_that_are_not_escaped(layers: tuple[Layer, ...]) -> None:
    text = json.dumps({"Layers": [entry("k", "Int8", Metadata=nodes("conv1_sums", "conv1", separator="|"))]})
    assert audit_inspector(text, layers) == audit_inspector(text.replace("]|[", "]\x1e["), layers)


KEYS = ("Layers", "Name", "LayerType", "Inputs", "Weights", "Type", "Format/Datatype", "Metadata")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["conv1_sums", "Int8", "Half", UNKNOWN]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ANYTHING, max_size=4))
def test_any_listing_is_borne(layers: tuple[Layer, ...], entries: list[Any]) -> None:
    audit = audit_inspector(json.dumps({"Layers": entries}), layers)
    assert audit is None or audit.int8 + len(audit.floats) <= audit.total == 3
