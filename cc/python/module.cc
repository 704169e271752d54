// tf_mdcn._core: the core on NumPy arrays, without TensorFlow, for tests, benchmarks and debugging;
// and what is known of the build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/cpu/convolution.h"
#include "core/cpu/dispatch.h"
#include "core/cpu/thread_pool.h"
#include "core/geometry.h"

namespace py = pybind11;

namespace mdcn {
namespace {

constexpr char kName[] = "tf_mdcn._core";

void ThrowIfError(const Status& status) {
  if (status.ok()) return;
  if (status.code() == Status::Code::kInvalidArgument) throw py::value_error(status.message());
  throw std::runtime_error(status.message());
}

class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(
            cpu::kWorkspaceAlignmentBytes,
            (bytes / cpu::kWorkspaceAlignmentBytes + 1) * cpu::kWorkspaceAlignmentBytes))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  char* data() { return data_; }

 private:
  char* data_;
};

// The attributes, the threads and the instruction set of a call, from Python's keywords.
struct Call {
  Attributes attributes;
  int threads = 1;
  cpu::InstructionSet instruction_set;

  explicit Call(const py::kwargs& keywords) {
    std::string chosen;
    for (const auto& [key_object, value] : keywords) {
      const std::string key = py::cast<std::string>(key_object);
      if (key == "strides") {
        attributes.strides = py::cast<std::array<int64_t, 2>>(value);
      } else if (key == "dilations") {
        attributes.dilations = py::cast<std::array<int64_t, 2>>(value);
      } else if (key == "padding") {
        attributes.padding = ParsePadding(py::cast<std::string>(value));
      } else if (key == "explicit_paddings") {
        attributes.explicit_paddings = py::cast<std::array<int64_t, 4>>(value);
      } else if (key == "data_format") {
        attributes.data_format = ParseDataFormat(py::cast<std::string>(value));
      } else if (key == "groups") {
        attributes.groups = py::cast<int64_t>(value);
      } else if (key == "deformable_groups") {
        attributes.deformable_groups = py::cast<int64_t>(value);
      } else if (key == "threads") {
        threads = py::cast<int>(value);
        if (threads < 1) {
          throw py::value_error(std::string(kName) + ": threads must be at least 1; received " +
                                std::to_string(threads));
        }
      } else if (key == "instruction_set") {
        chosen = py::cast<std::string>(value);
      } else {
        throw py::type_error(std::string(kName) + ": unknown keyword " + key);
      }
    }
    ThrowIfError(chosen.empty() ? cpu::ChooseInstructionSet(&instruction_set)
                                : cpu::FindInstructionSet(chosen, &instruction_set));
  }

  static Padding ParsePadding(const std::string& name) {
    if (name == "VALID") return Padding::kValid;
    if (name == "SAME") return Padding::kSame;
    if (name == "EXPLICIT") return Padding::kExplicit;
    throw py::value_error(std::string(kName) +
                          ": padding must be VALID, SAME or EXPLICIT; received " + name);
  }

  static DataFormat ParseDataFormat(const std::string& name) {
    if (name == "channels_last") return DataFormat::kChannelsLast;
    if (name == "channels_first") return DataFormat::kChannelsFirst;
    throw py::value_error(std::string(kName) +
                          ": data_format must be channels_last or channels_first; received " +
                          name);
  }
};

using OptionalArray = std::optional<py::array>;

std::vector<int64_t> ShapeOf(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

Geometry MakeGeometry(const Call& call, const std::vector<int64_t>& input,
                      const std::vector<int64_t>& filters, const py::array& offset,
                      const OptionalArray& mask, const OptionalArray& bias) {
  TensorShapes shapes;
  shapes.input = input;
  shapes.filters = filters;
  shapes.offset = ShapeOf(offset);
  shapes.has_mask = mask.has_value();
  if (mask) shapes.mask = ShapeOf(*mask);
  shapes.has_bias = bias.has_value();
  if (bias) shapes.bias = ShapeOf(*bias);
  Geometry geometry;
  ThrowIfError(MakeGeometry(kName, call.attributes, shapes, &geometry));
  return geometry;
}

void CheckType(const char* name, const py::array& array, const py::dtype& expected) {
  if (!array.dtype().equal(expected)) {
    throw py::type_error(std::string(kName) + ": " + name + " must have dtype " +
                         py::cast<std::string>(py::str(expected)) + "; received " +
                         py::cast<std::string>(py::str(array.dtype())));
  }
  if (!(array.flags() & py::array::c_style)) {
    throw py::type_error(std::string(kName) + ": " + name + " must be C-contiguous");
  }
}

template <typename T>
const T* Data(const py::array& array) {
  return static_cast<const T*>(array.data());
}

template <typename T>
const T* Data(const OptionalArray& array) {
  return array ? Data<T>(*array) : nullptr;
}

template <typename T>
T* MutableData(py::array& array) {
  return static_cast<T*>(array.mutable_data());
}

// Calls function(T{}, TOffset{}) for the arrays' types.
template <typename Function>
void DispatchTypes(const py::array& input, const py::array& offset, const Function& function) {
  const std::string data = py::cast<std::string>(py::str(input.dtype()));
  const std::string positions = py::cast<std::string>(py::str(offset.dtype()));
  const auto with_float_or_same = [&](auto type) {
    if (positions == data) {
      function(type, type);
    } else if (positions == "float32") {
      function(type, float{});
    } else {
      throw py::type_error(std::string(kName) + ": offset must have dtype float32 or " + data +
                           "; received " + positions);
    }
  };
  if (data == "float32" && positions == data) {
    function(float{}, float{});
  } else if (data == "float64" && positions == data) {
    function(double{}, double{});
  } else if (data == "float16") {
    with_float_or_same(Half{});
  } else if (data == "bfloat16") {
    with_float_or_same(BFloat16{});
  } else {
    throw py::type_error(std::string(kName) + ": no kernel for inputs of dtype " + data +
                         " with offset of dtype " + positions);
  }
}

template <typename Operation>
void RunOperation(const Operation& operation, const typename Operation::Tensors& tensors,
                  int threads) {
  py::gil_scoped_release release;
  AlignedBuffer workspace(operation.workspace_bytes());
  cpu::ThreadPool pool(threads);
  operation.Run(tensors, pool, workspace.data());
}

py::array Forward(const py::array& input, const py::array& filters, const py::array& offset,
                  const OptionalArray& mask, const OptionalArray& bias,
                  const py::kwargs& keywords) {
  const Call call(keywords);
  const Geometry geometry =
      MakeGeometry(call, ShapeOf(input), ShapeOf(filters), offset, mask, bias);
  CheckType("inputs", input, input.dtype());
  CheckType("filters", filters, input.dtype());
  CheckType("offset", offset, offset.dtype());
  if (mask) CheckType("mask", *mask, offset.dtype());
  if (bias) CheckType("bias", *bias, input.dtype());
  std::vector<int64_t> shape = {geometry.batch, geometry.out_height, geometry.out_width,
                                geometry.out_channels};
  if (geometry.data_format == DataFormat::kChannelsFirst) {
    shape = {shape[0], shape[3], shape[1], shape[2]};
  }
  py::array output(input.dtype(), shape);
  DispatchTypes(input, offset, [&](auto type, auto offset_type) {
    using T = decltype(type);
    using TOffset = decltype(offset_type);
    RunOperation(cpu::Forward<T, TOffset>(geometry, call.instruction_set, call.threads),
                 {Data<T>(input), Data<T>(filters), Data<TOffset>(offset), Data<TOffset>(mask),
                  Data<T>(bias), MutableData<T>(output)},
                 call.threads);
  });
  return output;
}

py::tuple InputGradient(const py::array& input, const py::array& filters, const py::array& offset,
                        const OptionalArray& mask, const py::array& output_gradient,
                        const py::kwargs& keywords) {
  const Call call(keywords);
  const Geometry geometry =
      MakeGeometry(call, ShapeOf(input), ShapeOf(filters), offset, mask, std::nullopt);
  ThrowIfError(CheckOutputGradientShape(kName, geometry, ShapeOf(output_gradient)));
  CheckType("inputs", input, input.dtype());
  CheckType("filters", filters, input.dtype());
  CheckType("offset", offset, offset.dtype());
  if (mask) CheckType("mask", *mask, offset.dtype());
  CheckType("out_backprop", output_gradient, input.dtype());
  py::array input_gradient(input.dtype(), ShapeOf(input));
  py::array offset_gradient(offset.dtype(), ShapeOf(offset));
  py::object mask_gradient = py::none();
  if (mask) mask_gradient = py::array(offset.dtype(), ShapeOf(*mask));
  DispatchTypes(input, offset, [&](auto type, auto offset_type) {
    using T = decltype(type);
    using TOffset = decltype(offset_type);
    TOffset* mask_data = nullptr;
    if (mask) {
      py::array array = py::cast<py::array>(mask_gradient);
      mask_data = MutableData<TOffset>(array);
    }
    RunOperation(cpu::InputGradient<T, TOffset>(geometry, call.instruction_set, call.threads),
                 {Data<T>(input), Data<T>(filters), Data<TOffset>(offset), Data<TOffset>(mask),
                  Data<T>(output_gradient), MutableData<T>(input_gradient),
                  MutableData<TOffset>(offset_gradient), mask_data},
                 call.threads);
  });
  return py::make_tuple(input_gradient, offset_gradient, mask_gradient);
}

py::tuple FilterGradient(const py::array& input, const std::vector<int64_t>& filters_shape,
                         const py::array& offset, const OptionalArray& mask,
                         const py::array& output_gradient, const py::kwargs& keywords) {
  const Call call(keywords);
  const Geometry geometry =
      MakeGeometry(call, ShapeOf(input), filters_shape, offset, mask, std::nullopt);
  ThrowIfError(CheckOutputGradientShape(kName, geometry, ShapeOf(output_gradient)));
  CheckType("inputs", input, input.dtype());
  CheckType("offset", offset, offset.dtype());
  if (mask) CheckType("mask", *mask, offset.dtype());
  CheckType("out_backprop", output_gradient, input.dtype());
  py::array filters_gradient(input.dtype(), filters_shape);
  py::array bias_gradient(input.dtype(), std::vector<int64_t>{geometry.out_channels});
  DispatchTypes(input, offset, [&](auto type, auto offset_type) {
    using T = decltype(type);
    using TOffset = decltype(offset_type);
    RunOperation(
        cpu::FilterGradient<T, TOffset>(geometry, call.instruction_set, call.threads),
        {Data<T>(input), Data<TOffset>(offset), Data<TOffset>(mask), Data<T>(output_gradient),
         MutableData<T>(filters_gradient), MutableData<T>(bias_gradient)},
        call.threads);
  });
  return py::make_tuple(filters_gradient, bias_gradient);
}

py::dict BuildInformation() {
  py::dict information;
  information["tensorflow"] = TF_MDCN_TF_VERSION;
  information["compiler"] = TF_MDCN_COMPILER;
#if defined(TF_MDCN_CUDA_VERSION)
  information["cuda"] = TF_MDCN_CUDA_VERSION;
  information["cuda_architectures"] = py::str(TF_MDCN_CUDA_ARCHS).attr("split")(",");
#else
  information["cuda"] = py::none();
  information["cuda_architectures"] = py::list();
#endif
  return information;
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const cpu::InstructionSet& set : cpu::AvailableInstructionSets()) names.push_back(set.name);
  return names;
}

std::string ChosenInstructionSet() {
  cpu::InstructionSet chosen;
  ThrowIfError(cpu::ChooseInstructionSet(&chosen));
  return chosen.name;
}

}  // namespace
}  // namespace mdcn

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The core of tf_mdcn on NumPy arrays. Keywords: strides, dilations, padding (VALID, SAME, "
      "EXPLICIT), explicit_paddings, data_format, groups, deformable_groups, threads, "
      "instruction_set.";
  module.def("forward", &mdcn::Forward, py::arg("inputs"), py::arg("filters"), py::arg("offset"),
             py::arg("mask"), py::arg("bias"));
  module.def("input_gradient", &mdcn::InputGradient,
             "Gradients of inputs, offset and mask (None without a mask).", py::arg("inputs"),
             py::arg("filters"), py::arg("offset"), py::arg("mask"), py::arg("out_backprop"));
  module.def("filter_gradient", &mdcn::FilterGradient, "Gradients of filters and bias.",
             py::arg("inputs"), py::arg("filters_shape"), py::arg("offset"), py::arg("mask"),
             py::arg("out_backprop"));
  module.def("build_information", &mdcn::BuildInformation);
  module.def("instruction_sets", &mdcn::InstructionSets,
             "Instruction sets that are compiled in and run on this machine, best first.");
  module.def("chosen_instruction_set", &mdcn::ChosenInstructionSet);
}
