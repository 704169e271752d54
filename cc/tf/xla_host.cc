#include "tf/xla_host.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <vector>

#include "core/cpu/convolution.h"
#include "core/types.h"
#include "tf/attributes.h"

namespace mdcn {
namespace {

// ---- XLA's C interface. ----

// The arguments of a function of the interface, opened as they all are.
#define MDCN_FFI_ARGS(NAME)                               \
  [] {                                                    \
    XLA_FFI_##NAME##_Args args = {};                      \
    args.struct_size = XLA_FFI_##NAME##_Args_STRUCT_SIZE; \
    return args;                                          \
  }()

XLA_FFI_Error* MakeError(const XLA_FFI_Api* api, XLA_FFI_Error_Code code,
                         const std::string& message) {
  auto args = MDCN_FFI_ARGS(Error_Create);
  args.message = message.c_str();
  args.errc = code;
  return api->XLA_FFI_Error_Create(&args);
}

// The message of an error, which it destroys.
std::string TakeMessage(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  auto message_args = MDCN_FFI_ARGS(Error_GetMessage);
  message_args.error = error;
  api->XLA_FFI_Error_GetMessage(&message_args);
  const std::string message = message_args.message;
  auto destroy_args = MDCN_FFI_ARGS(Error_Destroy);
  destroy_args.error = error;
  api->XLA_FFI_Error_Destroy(&destroy_args);
  return message;
}

XLA_FFI_ByteSpan Span(const char* text) { return {text, std::strlen(text)}; }

template <typename T>
constexpr XLA_FFI_DataType kDataType = XLA_FFI_DataType_INVALID;
template <>
constexpr XLA_FFI_DataType kDataType<float> = XLA_FFI_DataType_F32;
template <>
constexpr XLA_FFI_DataType kDataType<double> = XLA_FFI_DataType_F64;
template <>
constexpr XLA_FFI_DataType kDataType<Half> = XLA_FFI_DataType_F16;
template <>
constexpr XLA_FFI_DataType kDataType<BFloat16> = XLA_FFI_DataType_BF16;

// ---- Attributes, as one array of int64. ----

constexpr char kAttributesName[] = "attributes";
using EncodedCall = std::array<int64_t, 14>;

EncodedCall ToArray(const HostCall& call) {
  const Attributes& from = call.attributes;
  const auto& pads = from.explicit_paddings;
  return {from.strides[0],
          from.strides[1],
          from.dilations[0],
          from.dilations[1],
          static_cast<int64_t>(from.padding),
          pads[0],
          pads[1],
          pads[2],
          pads[3],
          static_cast<int64_t>(from.data_format),
          from.groups,
          from.deformable_groups,
          call.has_mask,
          call.has_bias};
}

HostCall FromArray(const EncodedCall& from) {
  HostCall call;
  call.attributes.strides = {from[0], from[1]};
  call.attributes.dilations = {from[2], from[3]};
  call.attributes.padding = static_cast<Padding>(from[4]);
  call.attributes.explicit_paddings = {from[5], from[6], from[7], from[8]};
  call.attributes.data_format = static_cast<DataFormat>(from[9]);
  call.attributes.groups = from[10];
  call.attributes.deformable_groups = from[11];
  call.has_mask = from[12] != 0;
  call.has_bias = from[13] != 0;
  return call;
}

std::optional<HostCall> Decode(const XLA_FFI_Attrs& attributes) {
  if (attributes.size != 1 || attributes.types[0] != XLA_FFI_AttrType_ARRAY) return std::nullopt;
  const auto& array = *static_cast<const XLA_FFI_Array*>(attributes.attrs[0]);
  EncodedCall encoded;
  if (array.dtype != XLA_FFI_DataType_S64 || array.size != encoded.size()) return std::nullopt;
  std::copy_n(static_cast<const int64_t*>(array.data), encoded.size(), encoded.begin());
  return FromArray(encoded);
}

// ---- Threads. ----

// XLA's intra-op threads, which are TensorFlow's. They flush subnormals to zero, and so does XLA on
// the calling thread: results are those of the OpKernels. The calling thread does whatever no other
// has begun, so that a call ends even if all the threads are callers that wait, as they can be
// where XLA runs calls side by side.
class XlaPool : public cpu::WorkerPool {
 public:
  explicit XlaPool(const XLA_FFI_CallFrame& frame) : api_(frame.api), context_(frame.ctx) {
    int64_t count = 0;
    auto args = MDCN_FFI_ARGS(ThreadPool_NumThreads);
    args.ctx = context_;
    args.num_threads = &count;
    // Without a pool, the caller works alone.
    if (XLA_FFI_Error* error = api_->XLA_FFI_ThreadPool_NumThreads(&args)) TakeMessage(api_, error);
    workers_ = static_cast<int>(std::max<int64_t>(count, 1));
  }

  int workers() const override { return workers_; }

  void Run(int count, const std::function<void(int)>& body) override {
    const auto work = std::make_shared<Work>(count, body);
    for (int helper = 1; helper < count; ++helper) {
      auto args = MDCN_FFI_ARGS(ThreadPool_Schedule);
      args.ctx = context_;
      args.task = [](void* data) {
        const std::unique_ptr<std::shared_ptr<Work>> held(
            static_cast<std::shared_ptr<Work>*>(data));
        (*held)->Help();
      };
      auto* data = new std::shared_ptr<Work>(work);
      args.data = data;
      if (XLA_FFI_Error* error = api_->XLA_FFI_ThreadPool_Schedule(&args)) {
        TakeMessage(api_, error);
        delete data;
        break;  // the caller works alone
      }
    }
    work->Help();
    work->Wait();
  }

 private:
  // What the threads of one Run share; a thread that comes late finds nothing to do.
  class Work {
   public:
    Work(int count, const std::function<void(int)>& body) : count_(count), body_(body) {}

    // `body` lives as long as there are workers to run.
    void Help() {
      for (int worker; (worker = next_.fetch_add(1)) < count_;) {
        body_(worker);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (++done_ == count_) all_done_.notify_one();
      }
    }

    void Wait() {
      std::unique_lock<std::mutex> lock(mutex_);
      all_done_.wait(lock, [this] { return done_ == count_; });
    }

   private:
    const int count_;
    const std::function<void(int)>& body_;
    std::atomic<int> next_{0};
    std::mutex mutex_;
    std::condition_variable all_done_;
    int done_ = 0;
  };

  const XLA_FFI_Api* const api_;
  XLA_FFI_ExecutionContext* const context_;
  int workers_;
};

// ---- Handlers. ----

// The buffers of a call, taken in order.
class Buffers {
 public:
  Buffers(void* const* buffers, int64_t count) : buffers_(buffers), count_(count) {}

  // Null when there are no more, which is found by `complete`.
  const XLA_FFI_Buffer* Next() {
    const int64_t i = next_++;
    return i < count_ ? static_cast<const XLA_FFI_Buffer*>(buffers_[i]) : nullptr;
  }
  const XLA_FFI_Buffer* NextIf(bool present) { return present ? Next() : nullptr; }
  bool complete() const { return next_ == count_; }

 private:
  void* const* const buffers_;
  const int64_t count_;
  int64_t next_ = 0;
};

Shape ShapeOf(const XLA_FFI_Buffer* buffer) {
  if (buffer == nullptr) return std::nullopt;
  return std::vector<int64_t>(buffer->dims, buffer->dims + buffer->rank);
}

template <typename T>
T* Data(const XLA_FFI_Buffer* buffer) {
  return buffer == nullptr ? nullptr : static_cast<T*>(buffer->data);
}

struct Tensors {
  const XLA_FFI_Buffer *input, *filters, *offset, *mask, *bias, *output_gradient;
};

struct FreeAligned {
  void operator()(char* memory) const {
    ::operator delete(memory, std::align_val_t(cpu::kWorkspaceAlignmentBytes));
  }
};

template <typename Operation>
XLA_FFI_Error* RunOperation(const XLA_FFI_CallFrame& frame, const Geometry& geometry,
                            const typename Operation::Tensors& tensors) {
  cpu::InstructionSet instruction_set;
  if (const Status status = cpu::ChooseInstructionSet(&instruction_set); !status.ok()) {
    return MakeError(frame.api, XLA_FFI_Error_Code_INVALID_ARGUMENT, status.message());
  }
  XlaPool pool(frame);
  const Operation operation(geometry, instruction_set, pool.workers());
  // XLA's own allocator of scratch memory serves devices only.
  const size_t bytes = operation.workspace_bytes();
  const std::unique_ptr<char, FreeAligned> workspace(static_cast<char*>(
      ::operator new(bytes, std::align_val_t(cpu::kWorkspaceAlignmentBytes), std::nothrow)));
  if (workspace == nullptr) {
    return MakeError(frame.api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                     std::string(kForwardName) + ": no memory for " + std::to_string(bytes) +
                         " bytes of scratch");
  }
  operation.Run(tensors, pool, workspace.get());
  return nullptr;
}

// Each operation: its name in messages, what it takes besides inputs, offset and mask, and how it
// is run.
struct ForwardCall {
  static constexpr const char* kName = kForwardName;
  static constexpr bool kTakesFilters = true, kTakesOutputGradient = false;

  template <typename T, typename TOffset>
  static XLA_FFI_Error* Run(const XLA_FFI_CallFrame& frame, const HostCall&,
                            const Geometry& geometry, const Tensors& in, Buffers out) {
    return RunOperation<cpu::Forward<T, TOffset>>(
        frame, geometry,
        {Data<T>(in.input), Data<T>(in.filters), Data<TOffset>(in.offset), Data<TOffset>(in.mask),
         Data<T>(in.bias), Data<T>(out.Next())});
  }
};

struct InputGradientCall {
  static constexpr const char* kName = kInputGradientName;
  static constexpr bool kTakesFilters = true, kTakesOutputGradient = true;

  template <typename T, typename TOffset>
  static XLA_FFI_Error* Run(const XLA_FFI_CallFrame& frame, const HostCall& call,
                            const Geometry& geometry, const Tensors& in, Buffers out) {
    T* input_gradient = Data<T>(out.Next());
    TOffset* offset_gradient = Data<TOffset>(out.Next());
    return RunOperation<cpu::InputGradient<T, TOffset>>(
        frame, geometry,
        {Data<T>(in.input), Data<T>(in.filters), Data<TOffset>(in.offset), Data<TOffset>(in.mask),
         Data<T>(in.output_gradient), input_gradient, offset_gradient,
         Data<TOffset>(out.NextIf(call.has_mask))});
  }
};

struct FilterGradientCall {
  static constexpr const char* kName = kFilterGradientName;
  static constexpr bool kTakesFilters = false, kTakesOutputGradient = true;

  template <typename T, typename TOffset>
  static XLA_FFI_Error* Run(const XLA_FFI_CallFrame& frame, const HostCall& call,
                            const Geometry& geometry, const Tensors& in, Buffers out) {
    T* filters_gradient = Data<T>(out.Next());
    return RunOperation<cpu::FilterGradient<T, TOffset>>(
        frame, geometry,
        {Data<T>(in.input), Data<TOffset>(in.offset), Data<TOffset>(in.mask),
         Data<T>(in.output_gradient), filters_gradient, Data<T>(out.NextIf(call.has_bias))});
  }
};

template <typename Operation>
XLA_FFI_Error* Execute(const XLA_FFI_CallFrame& frame) {
  const auto error = [&](XLA_FFI_Error_Code code, const std::string& message) {
    return MakeError(frame.api, code, message);
  };
  const std::string name = Operation::kName;
  const std::optional<HostCall> call = Decode(frame.attrs);
  if (!call) return error(XLA_FFI_Error_Code_INTERNAL, name + ": unknown attributes of the call");

  Buffers arguments(frame.args.args, frame.args.size);
  Tensors in;
  in.input = arguments.Next();
  in.filters = arguments.NextIf(Operation::kTakesFilters);
  in.offset = arguments.Next();
  in.mask = arguments.NextIf(call->has_mask);
  in.bias = arguments.NextIf(call->has_bias && !Operation::kTakesOutputGradient);
  in.output_gradient = arguments.NextIf(Operation::kTakesOutputGradient);
  if (!arguments.complete() || frame.rets.size < 1) {
    return error(XLA_FFI_Error_Code_INTERNAL, name + ": wrong number of buffers");
  }
  const Buffers results(frame.rets.rets, frame.rets.size);
  const XLA_FFI_Buffer* filters = Operation::kTakesFilters ? in.filters : Buffers(results).Next();

  TensorShapes shapes;
  shapes.input = ShapeOf(in.input);
  shapes.filters = ShapeOf(filters);
  shapes.offset = ShapeOf(in.offset);
  shapes.has_mask = in.mask != nullptr;
  shapes.mask = ShapeOf(in.mask);
  shapes.has_bias = in.bias != nullptr;
  shapes.bias = ShapeOf(in.bias);
  Geometry geometry;
  if (const Status status = MakeGeometry(name, call->attributes, shapes, &geometry); !status.ok()) {
    return error(XLA_FFI_Error_Code_INVALID_ARGUMENT, status.message());
  }

#define MDCN_RUN_TYPES(T, TOFFSET)                                                   \
  if (in.input->dtype == kDataType<T> && in.offset->dtype == kDataType<TOFFSET>) {   \
    return Operation::template Run<T, TOFFSET>(frame, *call, geometry, in, results); \
  }
  MDCN_FOR_EACH_TYPE_PAIR(MDCN_RUN_TYPES)
#undef MDCN_RUN_TYPES
  return error(XLA_FFI_Error_Code_INTERNAL, name + ": unknown types of the buffers");
}

template <typename Operation>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  // XLA asks once, at registration, what the handler was compiled for.
  if (frame->extension_start != nullptr &&
      frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
    extension->metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                                        XLA_FFI_API_MINOR};
    extension->metadata->traits = 0;
    return nullptr;
  }
  return Execute<Operation>(*frame);
}

}  // namespace

std::string Encode(const HostCall& call) {
  std::ostringstream text;
  const char* separator = " ";
  text << "{" << kAttributesName << " = array<i64:";
  for (int64_t value : ToArray(call)) {
    text << separator << value;
    separator = ", ";
  }
  text << ">}";
  return text.str();
}

Status RegisterHostHandlers(const XLA_FFI_Api* api) {
  const auto add = [&](const char* target, XLA_FFI_Handler* handler) -> Status {
    auto args = MDCN_FFI_ARGS(Handler_Register);
    args.name = Span(target);
    args.platform = Span("Host");
    args.bundle.execute = handler;
    XLA_FFI_Error* error = api->XLA_FFI_Handler_Register(&args);
    if (error == nullptr) return Status();
    return Status::Internal(std::string(kForwardName) + ": XLA refuses the handler " + target +
                            ": " + TakeMessage(api, error));
  };
  MDCN_RETURN_IF_ERROR(add(kForwardTarget, Handle<ForwardCall>));
  MDCN_RETURN_IF_ERROR(add(kInputGradientTarget, Handle<InputGradientCall>));
  return add(kFilterGradientTarget, Handle<FilterGradientCall>);
}

}  // namespace mdcn
