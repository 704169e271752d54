// The ops in XLA's standard operations: a gather, a matrix product, a scatter. Separate from
// xla.cc, which compiles for CPUs into calls of xla_host.h: this is for every other device.
#ifndef MDCN_TF_XLA_HLO_H_
#define MDCN_TF_XLA_HLO_H_

#include <vector>

#include "core/geometry.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/xla_data.pb.h"

namespace mdcn {

// What an operation takes; what it does not take is not valid().
struct XlaOperands {
  xla::XlaOp input, filters, offset, mask, bias, output_gradient;
};

// The results of each operation, in the type that they are computed in. Its input is in `type`, and
// the batch is not empty. XLA's builder keeps the first error, if there is one.
std::vector<xla::XlaOp> ForwardHlo(const Geometry& geometry, xla::PrimitiveType type,
                                   const XlaOperands& operands);
// The gradients of input, offset and, where there is one, mask.
std::vector<xla::XlaOp> InputGradientHlo(const Geometry& geometry, xla::PrimitiveType type,
                                         const XlaOperands& operands);
// The gradients of filters and bias.
std::vector<xla::XlaOp> FilterGradientHlo(const Geometry& geometry, xla::PrimitiveType type,
                                          const XlaOperands& operands);

}  // namespace mdcn

#endif  // MDCN_TF_XLA_HLO_H_
