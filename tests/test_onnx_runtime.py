"""The native op against independent implementations of ONNX's DeformConv: ONNX Runtime, ONNX's
reference evaluator and the node tests that ONNX publishes. Separate because it shares nothing with
the oracle: should both we and the oracle misread the definition, this notices.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from native_op import forward, random_configuration, with_whole_offsets
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from oracle import Case, assert_close, random_case, rounding_bound

OPSET = 19  # the first with DeformConv


def onnx_order(case: Case) -> dict[str, np.ndarray]:
    """The tensors of a channels_first case by their ONNX names: only the filters differ."""
    names = {"inputs": "X", "filters": "W", "offset": "offset", "bias": "B", "mask": "mask"}
    tensors = {names[name]: tensor for name, tensor in case.tensors.items()}
    tensors["W"] = np.transpose(tensors["W"], (3, 2, 0, 1))
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def onnx_model(case: Case, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    (top, bottom), (left, right) = case.padding
    inputs = [name if name in tensors else "" for name in ("X", "W", "offset", "B", "mask")]
    node = helper.make_node(
        "DeformConv",
        inputs,
        ["Y"],
        kernel_shape=case.filters.shape[:2],
        strides=case.strides,
        pads=[top, left, bottom, right],
        dilations=case.dilations,
        group=case.groups,
        offset_group=case.deformable_groups,
    )
    elements = helper.np_dtype_to_tensor_dtype(case.inputs.dtype)
    graph = helper.make_graph(
        [node],
        "deform_conv",
        [helper.make_tensor_value_info(k, elements, v.shape) for k, v in tensors.items()],
        [helper.make_tensor_value_info("Y", elements, [None] * 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def explicit_case(seed: int, **changes) -> Case:
    """A random case in the terms of ONNX, which has no "same" padding and channels first."""
    settings = random_configuration(seed)
    if settings["padding"] == "same":
        settings["padding"] = ((2, 1), (0, 3))
    case = random_case(seed, **{**settings, **changes})
    return with_whole_offsets(case).channels_first()


def check(case: Case, expected: np.ndarray) -> None:
    """Both sides may be as far from the truth as rounding explains."""
    bound = 2 * rounding_bound(case, expected, case.inputs.dtype)
    assert_close(forward(case), expected, bound)


@pytest.mark.parametrize("seed", range(100, 160))
def test_onnx_runtime_agrees(seed):
    case = explicit_case(seed).cast(np.float32)
    check_with_onnx_runtime(case)


@pytest.mark.parametrize("groups, deformable_groups", [(2, 3), (3, 2), (6, 4), (2, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_onnx_runtime_agrees_on_groups_with_deformable_groups(groups, deformable_groups, dtype):
    channels = int(np.lcm(groups, deformable_groups))
    case = explicit_case(
        groups,
        groups=groups,
        deformable_groups=deformable_groups,
        in_channels=3 * channels,
        out_channels=5 * groups,
    )
    check_with_onnx_runtime(case.cast(dtype))


def check_with_onnx_runtime(case: Case) -> None:
    tensors = onnx_order(case)
    session = onnxruntime.InferenceSession(
        onnx_model(case, tensors).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, tensors)
    check(case, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"with_mask": False, "with_bias": False},
        {"groups": 1, "deformable_groups": 2, "kernel_size": (2, 3), "strides": (1, 2)},
        {"groups": 4, "deformable_groups": 1, "in_channels": 8, "dilations": (1, 2)},
    ],
)
def test_the_reference_evaluator_agrees(changes):
    """It takes seconds for what ONNX Runtime does at once, and no picture of one row or column."""
    settings = {"batch": 1, "in_channels": 6, "out_channels": 4, **changes}
    case = random_case(200, **settings).channels_first().cast(np.float32)
    tensors = onnx_order(case)
    (expected,) = ReferenceEvaluator(onnx_model(case, tensors)).run(None, tensors)
    check(case, expected)


def published_node_tests():
    from onnx.backend.test.case.node import collect_testcases

    return [test for test in collect_testcases("DeformConv") if "deform_conv" in test.name]


PUBLISHED = published_node_tests()


def test_onnx_publishes_node_tests():
    assert len(PUBLISHED) >= 4, [test.name for test in PUBLISHED]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda test: test.name)
def test_published_node_tests(published):
    (node,) = published.model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert published.data_sets
    for inputs, outputs in published.data_sets:
        present = [name for name in node.input if name]
        tensors = dict(zip(present, inputs, strict=True))
        named = dict(zip(("X", "W", "offset", "B", "mask"), node.input, strict=False))
        x, w, offset, bias, mask = (
            tensors.get(named.get(name, "")) for name in ("X", "W", "offset", "B", "mask")
        )
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
        case = Case(
            inputs=x,
            filters=np.transpose(w, (2, 3, 1, 0)),
            offset=offset,
            mask=mask,
            bias=bias,
            strides=tuple(attributes.get("strides", (1, 1))),
            padding=((top, bottom), (left, right)),
            data_format="channels_first",
            dilations=tuple(attributes.get("dilations", (1, 1))),
            groups=attributes.get("group", 1),
            deformable_groups=attributes.get("offset_group", 1),
        )
        check(case, outputs[0])


def test_the_model_has_what_the_case_has():
    """Float32 on both sides: a wrong attribute would be seen above, a dropped input here."""
    case = explicit_case(300, with_mask=True, with_bias=True).cast(np.float32)
    model = onnx_model(case, onnx_order(case))
    assert list(model.graph.node[0].input) == ["X", "W", "offset", "B", "mask"]
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
