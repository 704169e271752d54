// The result of a checked operation in the core, which knows no TensorFlow: an error code and a
// message in the house form (operation, argument, rule, what was received).
#ifndef MDCN_CORE_STATUS_H_
#define MDCN_CORE_STATUS_H_

#include <string>
#include <utility>

namespace mdcn {

class [[nodiscard]] Status {
 public:
  enum class Code { kOk, kInvalidArgument, kInternal };

  Status() = default;
  static Status InvalidArgument(std::string message) {
    return Status(Code::kInvalidArgument, std::move(message));
  }
  static Status Internal(std::string message) {
    return Status(Code::kInternal, std::move(message));
  }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  Code code_ = Code::kOk;
  std::string message_;
};

#define MDCN_RETURN_IF_ERROR(expression)                                                  \
  do {                                                                                    \
    if (::mdcn::Status mdcn_status = (expression); !mdcn_status.ok()) return mdcn_status; \
  } while (false)

}  // namespace mdcn

#endif  // MDCN_CORE_STATUS_H_
