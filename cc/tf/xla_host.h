// What a compiled XLA program calls on the host: names, attributes, registration. Separate from
// xla.cc, which emits the calls, so that the handlers see XLA's stable C interface alone.
#ifndef MDCN_TF_XLA_HOST_H_
#define MDCN_TF_XLA_HOST_H_

#include <string>

#include "core/geometry.h"
#include "core/status.h"
#include "xla/ffi/api/c_api.h"

namespace mdcn {

// The targets of the custom calls, with what they take and return.
// inputs, filters, offset, [mask], [bias] -> output
inline constexpr char kForwardTarget[] = "tf_mdcn.forward";
// inputs, filters, offset, [mask], out_backprop -> inputs, offset, [mask] gradients
inline constexpr char kInputGradientTarget[] = "tf_mdcn.input_gradient";
// inputs, offset, [mask], out_backprop -> filters, [bias] gradients
inline constexpr char kFilterGradientTarget[] = "tf_mdcn.filter_gradient";

struct HostCall {
  Attributes attributes;
  bool has_mask = false;
  bool has_bias = false;
};

// The dictionary, in MLIR's notation, that a custom call carries to its handler.
std::string Encode(const HostCall& call);

// Registers the handlers of the three targets on the platform "Host".
Status RegisterHostHandlers(const XLA_FFI_Api* api);

}  // namespace mdcn

#endif  // MDCN_TF_XLA_HOST_H_
